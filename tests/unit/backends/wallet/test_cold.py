"""The cold descriptor: public keys only, addresses that are given out once, and a wallet that is opened when one is wanted."""

from __future__ import annotations

import traceback
from pathlib import Path
from typing import Any

import pytest

from pjv2.config import Config
from pjv2.errors import WrongUsage
from pjv2.opening import open_cold
from pjv2.units import Network

bdk = pytest.importorskip("pjv2.backends.wallet.bdk")
pytest.importorskip("bdkpython")
from pjv2.backends.wallet.cold import ColdWallet, cold_ring, same_addresses  # noqa: E402  # needs the library

WORDS = bdk.words_from_entropy(b"\x07" * 16)
OTHER = bdk.words_from_entropy(b"\x08" * 16)


def ring(words: str = WORDS, kind: str = "p2wpkh") -> Any:
    return bdk.key_ring(bdk.MnemonicKeys(words, kind), Network.REGTEST)


def public(words: str = WORDS, kind: str = "p2wpkh") -> str:
    return str(ring(words, kind).external)


@pytest.mark.parametrize("kind", ["p2wpkh", "p2tr", "p2sh-p2wpkh", "p2pkh"])
async def test_its_addresses_are_those_of_the_keys_in_order(kind: str, tmp_path: Path) -> None:
    cold = ColdWallet(tmp_path / "cold.sqlite", cold_ring(public(kind=kind), Network.REGTEST), sync=None)
    found = [await cold.new_address() for _ in range(3)]
    await cold.close()
    hot = await bdk.BdkWallet.open(tmp_path / "hot.sqlite", bdk.MnemonicKeys(WORDS, kind), Network.REGTEST)
    assert found == [await hot.new_address() for _ in range(3)]
    await hot.close()
    # Another process, later: it goes on where this one ended.
    again = ColdWallet(tmp_path / "cold.sqlite", cold_ring(public(kind=kind), Network.REGTEST), sync=None)
    assert (await again.new_address()).index == 3
    await again.close()
    await again.close()


async def test_two_ways_of_writing_a_branch_have_one_file_and_no_address_in_common(tmp_path: Path) -> None:
    single = public().partition("#")[0]
    double = single.replace("/0/*", "/<0;1>/*")
    given = []
    for text in (single, public(), f" {single}\n", double):
        keys = cold_ring(text, Network.REGTEST)
        assert keys.name == cold_ring(single, Network.REGTEST).name
        cold = ColdWallet(tmp_path / f"{keys.name}.sqlite", keys, sync=None)
        given.append((await cold.new_address()).script)
        await cold.close()
    assert len(set(given)) == len(given)


def test_nothing_is_opened_before_an_address_is_wanted(tmp_path: Path) -> None:
    cold = ColdWallet(tmp_path / "cold.sqlite", cold_ring(public(), Network.REGTEST), sync=None)
    assert list(tmp_path.iterdir()) == []
    assert "pub" not in repr(cold)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("xprv", "holds a private key"),
        ("wif", "cold_descriptor"),
        ("words", "cold_descriptor"),
        ("network", "the network of its keys"),
        ("checksum", "its checksum"),
        ("single", "every payment needs its own"),
        ("multi", "single keys"),
    ],
)
def test_what_it_cannot_use_is_refused_without_quoting_it(text: str, words: str) -> None:
    base = public().partition("#")[0]
    secret = str(ring().external.to_string_with_secret())
    key = base.partition("(")[2].removesuffix(")")
    given = {
        "xprv": secret,
        "wif": "wpkh(cTYmoAaLmLWTLVnuXjEU8d2YzM3GY5RFWT6Ss5sBrKpAt4dM6Dpb)",
        "words": WORDS,
        "network": base.replace("tpub", "xpub"),
        "checksum": base + "#qqqqqqqq",
        "single": base.replace("/*", ""),
        "multi": f"wsh(multi(1,{key},{public(OTHER).partition('(')[2].partition(')')[0]}))",
    }[text]
    with pytest.raises(WrongUsage, match=words) as refused:
        cold_ring(given, Network.REGTEST)
    whole = "".join(traceback.format_exception(refused.value))
    assert given not in whole
    assert "prv" not in str(refused.value)


def test_the_hot_wallets_own_branches_are_recognised_however_they_are_written() -> None:
    bare = public().partition("#")[0]
    origin = bare[: bare.index("[")] + bare[bare.index("]") + 1 :]
    for text in (bare, origin, bare.replace("/0/*", "/1/*")):
        assert same_addresses(cold_ring(text, Network.REGTEST), bdk.MnemonicKeys(WORDS), Network.REGTEST)
    assert not same_addresses(cold_ring(public(OTHER), Network.REGTEST), bdk.MnemonicKeys(WORDS), Network.REGTEST)
    assert not same_addresses(cold_ring(public(kind="p2tr"), Network.REGTEST), bdk.MnemonicKeys(WORDS), Network.REGTEST)


async def opened(tmp_path: Path, wallet: Any, **told: Any) -> Any:
    chain = {"backend": "esplora", "url": "http://127.0.0.1:1/api"}
    return await open_cold(Config.load(None, {"wallet": told, "chain": chain}), wallet)


async def test_the_configuration_names_the_cold_wallet_or_the_wallet_watches(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pjv2.config.default_path", lambda: tmp_path / "config.toml")
    monkeypatch.setattr("pjv2.config.data_directory", lambda: tmp_path)
    words = tmp_path / "words"
    words.touch(0o600)
    words.write_text(WORDS)
    hot = await bdk.BdkWallet.open(tmp_path / "hot.sqlite", bdk.MnemonicKeys(WORDS), Network.REGTEST)
    keys = bdk.DescriptorKeys(str(ring().external), str(ring().change))
    watches = await bdk.BdkWallet.open(tmp_path / "watches.sqlite", keys, Network.REGTEST)
    try:
        assert await opened(tmp_path, hot) is None
        assert await opened(tmp_path, watches) is watches
        assert await opened(tmp_path, watches, backend="bitcoind") is None
        assert isinstance(await opened(tmp_path, hot, cold_descriptor=public(OTHER)), ColdWallet)
        named = await opened(tmp_path, watches, cold_descriptor=public(OTHER), mnemonic_file=str(words))
        assert isinstance(named, ColdWallet)
        with pytest.raises(WrongUsage, match="the wallet's own"):
            await opened(tmp_path, hot, cold_descriptor=public(), mnemonic_file=str(words))
        assert OTHER not in repr(named)
    finally:
        await hot.close()
        await watches.close()


def test_the_descriptor_is_in_no_repr() -> None:
    assert "pub" not in repr(Config(wallet={"cold_descriptor": public()}))
