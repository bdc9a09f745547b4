"""Descriptors and mnemonics: what is read, what is refused, and that nothing refused is quoted."""

from __future__ import annotations

import re

import pytest

from pjv2.backends.wallet import bdk_keys
from pjv2.backends.wallet.bdk import DescriptorKeys, MnemonicKeys, key_ring, keys_from, words_from_entropy
from pjv2.errors import WrongUsage
from pjv2.units import Network

WORDS = "abandon " * 11 + "about"
# BIP32, test vector 1: its master key, for the test networks.
XPRV = "tprv8ZgxMBicQKsPeDgjzdC36fs6bMjGApWDNLR9erAXMs5skhMv36j9MV5ecvfavji5khqjWaWSFhN3YcCUUdiKH6isR4Pwy3U5y5egddBr16m"
REGTEST = Network.REGTEST


def public(keys: MnemonicKeys, network: Network = REGTEST) -> tuple[str, str]:
    ring = key_ring(keys, network)
    return str(ring.external), str(ring.change)


@pytest.mark.parametrize(
    ("kind", "script"),
    # The first receiving addresses of these words by BIP84, BIP86 (both in the BIPs), BIP49 and BIP44.
    [
        ("p2wpkh", "bc1qcr8te4kr609gcawutmrza0j4xv80jy8z306fyu"),
        ("p2tr", "bc1p5cyxnuxmeuwuvkwfem96lqzszd02n6xdcjrs20cac6yqjjwudpxqkedrcr"),
        ("p2sh-p2wpkh", "37VucYSaXLCAsxYyAPfbSi9eh4iEcbShgf"),
        ("p2pkh", "1LqBGSKuX5yYUonjxT5qGfpUsXKYYWeabA"),
    ],
)
def test_words_make_the_addresses_of_the_bips(kind: str, script: str) -> None:
    from pjv2.backends.wallet.bdk_file import _network

    ring = key_ring(MnemonicKeys(WORDS, kind), Network.BITCOIN)  # type: ignore[arg-type]
    assert str(ring.external.derive_address(0, _network(Network.BITCOIN))) == script
    assert ring.signs
    assert ring.kinds == (kind, kind)


def test_a_two_path_descriptor_is_the_pair_of_its_branches() -> None:
    pair = key_ring(DescriptorKeys(f"wpkh({XPRV}/84h/1h/0h/0/*)", f"wpkh({XPRV}/84h/1h/0h/1/*)"), REGTEST)
    both = key_ring(DescriptorKeys(f" wpkh({XPRV}/84h/1h/0h/<0;1>/*)\n"), REGTEST)
    assert pair.name == both.name
    assert both.signs


def test_a_watch_only_copy_has_the_same_name() -> None:
    ours = key_ring(MnemonicKeys(WORDS, "p2tr"), REGTEST)
    external, change = public(MnemonicKeys(WORDS, "p2tr"))
    copy = key_ring(DescriptorKeys(external, change), REGTEST)
    assert copy.name == ours.name
    assert not copy.signs
    body = external.partition("#")[0].replace("/0/*", "/<0;1>/*")
    assert key_ring(DescriptorKeys(body), REGTEST).name == ours.name


def test_networks_kinds_words_and_passphrases_have_names_of_their_own() -> None:
    keys = [MnemonicKeys(WORDS), MnemonicKeys(WORDS, "p2tr"), MnemonicKeys(WORDS, passphrase="more")]
    keys.append(MnemonicKeys(words_from_entropy(b"\x07" * 32)))
    names = {key_ring(key, network).name for key in keys for network in Network}
    assert len(names) == len(keys) * len(Network)


def test_the_checksum_of_a_two_path_descriptor_is_checked() -> None:
    # BIP380's test vector, and the checksum that the library computes for a descriptor of ours.
    assert bdk_keys._checksum("raw(deadbeef)") == "89f8spxm"
    external, _ = public(MnemonicKeys(WORDS))
    body, _, checksum = external.partition("#")
    assert bdk_keys._checksum(body) == checksum
    two = body.replace("/0/*", "/<0;1>/*")
    key_ring(DescriptorKeys(f"{two}#{bdk_keys._checksum(two)}"), REGTEST)
    with pytest.raises(WrongUsage, match="checksum is wrong"):
        key_ring(DescriptorKeys(f"{two.replace('84', '48')}#{bdk_keys._checksum(two)}"), REGTEST)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        (DescriptorKeys(f"wpkh({XPRV}/0/*)"), "change descriptor is missing"),
        (DescriptorKeys(f"wpkh({XPRV}/0/*)", f"wpkh({XPRV}/0/*)"), "are the same"),
        (DescriptorKeys(f"wpkh({XPRV}/<0;1>/*)", f"wpkh({XPRV}/1/*)"), "leave change_descriptor out"),
        (DescriptorKeys(f"wpkh({XPRV}/<0;1;2>/*)"), "exactly two branches"),
        (DescriptorKeys(f"wpkh({XPRV}/0/0)", f"wpkh({XPRV}/1/0)"), "without /\\*"),
        (DescriptorKeys(f"wsh(multi(1,{XPRV}/0/*))", f"wsh(multi(1,{XPRV}/1/*))"), "single keys"),
        (DescriptorKeys(f"tr({XPRV}/0/*,pk({XPRV}/2/*))", f"tr({XPRV}/1/*)"), "single keys"),
        (DescriptorKeys(f"wpkh({XPRV}x/0/*)", f"wpkh({XPRV}/1/*)"), "cannot be read for regtest"),
        (DescriptorKeys(f"wpkh({XPRV}/0/*)#aaaaaaaa", f"wpkh({XPRV}/1/*)"), "cannot be read for regtest"),
        (DescriptorKeys("noise", "more"), "cannot be read for regtest"),
        (MnemonicKeys(WORDS.replace("about", "abandon")), "its checksum fails"),
        (MnemonicKeys(WORDS.replace("about", "zzzz")), "word 12 is not in the BIP39 list"),
        (MnemonicKeys("abandon about"), "it has 2 words"),
    ],
)
def test_keys_that_cannot_be_are_refused_without_quoting_them(keys: object, message: str) -> None:
    with pytest.raises(WrongUsage, match=message) as caught:
        key_ring(keys, REGTEST)  # type: ignore[arg-type]
    told = ""
    error: BaseException | None = caught.value
    while error is not None:
        told += f"{error!r} {error}"
        error = error.__cause__ or error.__context__
    assert not re.search(r"prv|abandon|zzzz|noise", told)


def test_keys_of_another_network_are_refused() -> None:
    external, change = public(MnemonicKeys(WORDS))
    with pytest.raises(WrongUsage, match="cannot be read for bitcoin"):
        key_ring(DescriptorKeys(external, change), Network.BITCOIN)


def test_no_secret_is_in_a_repr() -> None:
    ring = key_ring(MnemonicKeys(WORDS, passphrase="swordfish"), REGTEST)
    for shown in (ring, MnemonicKeys(WORDS, passphrase="swordfish"), DescriptorKeys(f"wpkh({XPRV}/0/*)", XPRV)):
        for text in (repr(shown), str(shown), f"{shown}"):
            assert not re.search(r"abandon|swordfish|prv|tpub", text)


def test_configured_keys_are_words_or_descriptors() -> None:
    assert keys_from("a", "b", None) == DescriptorKeys("a", "b")
    assert keys_from(None, None, b"one two\n") == MnemonicKeys("one two\n")
    with pytest.raises(WrongUsage, match="has no keys"):
        keys_from(None, None, None)
    with pytest.raises(WrongUsage, match="does not hold text") as caught:
        keys_from(None, None, b"\xff secret")
    assert caught.value.__context__ is None


@pytest.mark.parametrize(
    ("system", "machine", "version", "message"),
    [
        ("linux", "aarch64", (3, 12), "is not made for Python 3.12 on linux aarch64"),
        ("linux", "x86_64", (3, 12), "pip install 'pjv2\\[bdk\\]'"),
        ("darwin", "arm64", (3, 13), "pip install 'pjv2\\[bdk\\]'"),
    ],
)
def test_where_the_library_is_missing_the_wallets_that_work_are_named(
    monkeypatch: pytest.MonkeyPatch, system: str, machine: str, version: tuple[int, int], message: str
) -> None:
    class Version(tuple[int, ...]):
        major, minor = version

    bdk_keys.library.cache_clear()
    monkeypatch.setitem(__import__("sys").modules, "bdkpython", None)
    monkeypatch.setattr(bdk_keys.sys, "platform", system)
    monkeypatch.setattr(bdk_keys.sys, "version_info", Version(version))
    monkeypatch.setattr(bdk_keys.platform, "machine", lambda: machine)
    with pytest.raises(WrongUsage, match=message) as caught:
        bdk_keys.library()
    assert '"bitcoind" or "lnd"' in str(caught.value)
    bdk_keys.library.cache_clear()
