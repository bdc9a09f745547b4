"""Descriptors and mnemonics for the embedded wallet, and the door to its library.

It refuses what `BdkWallet` could not serve: scripts of several keys or leaves, descriptors without a wildcard (every address would
be the same), a descriptor without its change branch, keys of another network. The library is imported here and only when needed.

Law: what the library says about unreadable keys never reaches an exception, because it could quote them.
"""

from __future__ import annotations

import contextlib
import hashlib
import platform
import re
import sys
from dataclasses import dataclass, field
from functools import cache
from typing import Any, Literal, TypeAlias

from pjv2.errors import WrongUsage
from pjv2.units import Network

BdkKind: TypeAlias = Literal["p2wpkh", "p2tr", "p2sh-p2wpkh", "p2pkh"]
"""The script types of the embedded wallet: BIP84, BIP86, BIP49 and BIP44."""

_TEMPLATES = {"p2wpkh": "new_bip84", "p2tr": "new_bip86", "p2sh-p2wpkh": "new_bip49", "p2pkh": "new_bip44"}
_KINDS: dict[str, BdkKind] = {"WPKH": "p2wpkh", "TR": "p2tr", "SH_WPKH": "p2sh-p2wpkh", "PKH": "p2pkh"}
_PATHS = re.compile(r"<([0-9]+['hH]?);([0-9]+['hH]?)>")
_INPUT_CHARSET = (
    "0123456789()[],'/*abcdefgh@:$%{}IJKLMNOPQRSTUVWXYZ&+-.;<=>?!^_|~ijklmnopqrstuvwxyzABCDEFGH`#\"\\ "  # BIP380
)
_CHECKSUM_CHARSET = "qpzry9x8gf2tvdw0s3jn54khce6mua7l"
_GENERATOR = (0xF5DEE51989, 0xA9FDCA3312, 0x1BAB10E32D, 0x3706B1677A, 0x644D626FFD)


@cache
def library() -> Any:
    """The module `bdkpython.bdk`. Raises WrongUsage, with the wallets that work here, where it is not installed."""
    try:
        from bdkpython import bdk
    except (ImportError, OSError) as exc:
        raise WrongUsage(_without_library()) from exc
    return bdk


def _without_library() -> str:
    machine = platform.machine().lower()
    intel = machine in {"x86_64", "amd64"}
    there = {"linux": intel, "darwin": True, "win32": intel}.get(sys.platform, False)
    if sys.version_info < (3, 14) and there:
        missing = "is not installed (or cannot be loaded, as on musl): pip install 'pjv2[bdk]'; otherwise use"
    else:
        version = f"Python {sys.version_info.major}.{sys.version_info.minor}"
        missing = f"is not made for {version} on {sys.platform} {machine}: use"
    return f'the embedded wallet\'s library, bdkpython, {missing} [wallet] backend = "bitcoind" or "lnd", which work everywhere'


@dataclass(frozen=True, slots=True)
class DescriptorKeys:
    """A descriptor and its change descriptor (BIP380), or one two-path descriptor (BIP389); public ones make a watch-only wallet."""

    descriptor: str = field(repr=False)
    change: str | None = field(default=None, repr=False)


@dataclass(frozen=True, slots=True)
class MnemonicKeys:
    """The words of BIP39, account 0 of the purpose that goes with `kind`."""

    words: str = field(repr=False)
    kind: BdkKind = "p2wpkh"
    passphrase: str | None = field(default=None, repr=False)


Keys: TypeAlias = DescriptorKeys | MnemonicKeys


@dataclass(frozen=True, slots=True)
class KeyRing:
    """Keys as the library holds them. `name` is public: a hash over network and public descriptors, the same when watch-only."""

    network: Network
    name: str
    kinds: tuple[BdkKind, BdkKind]
    signs: bool
    external: Any = field(repr=False)
    change: Any = field(repr=False)
    redeem: tuple[Any, Any] = field(repr=False)
    """Per branch: for nested scripts the descriptor of the redeem script, else None."""


def keys_from(descriptor: str | None, change: str | None, mnemonic: bytes | None) -> Keys:
    """The keys that `[wallet]` names: the content of `mnemonic_file`, or descriptors. Raises WrongUsage."""
    if mnemonic is not None:
        words, wrong = "", True
        with contextlib.suppress(UnicodeDecodeError):
            words, wrong = mnemonic.decode(), False
        if wrong:  # outside of the except block: the error would hold the words
            raise WrongUsage("[wallet] mnemonic_file does not hold text")
        return MnemonicKeys(words)
    if descriptor is None:
        raise WrongUsage("[wallet] has no keys: name a mnemonic_file, or a descriptor (public ones make it watch-only)")
    return DescriptorKeys(descriptor, change)


def words_from_entropy(entropy: bytes) -> str:
    """The BIP39 words of 16 to 32 bytes. They are a secret."""
    bdk = library()
    if len(entropy) not in (16, 20, 24, 28, 32):
        raise WrongUsage("a mnemonic is made of 16, 20, 24, 28 or 32 bytes")
    return str(bdk.Mnemonic.from_entropy(entropy))


def key_ring(keys: Keys, network: Network) -> KeyRing:
    """Read the keys for `network`. Raises WrongUsage without quoting them."""
    pair = _from_words(keys, network) if isinstance(keys, MnemonicKeys) else _from_descriptors(keys, network)
    kinds = tuple(_kind(one) for one in pair)
    external, change = (str(one).partition("#")[0] for one in pair)
    if external == change:
        raise WrongUsage(
            "the descriptor and the change descriptor are the same: change would land on payment addresses"
        )
    name = hashlib.sha256(f"pjv2 wallet\n{network}\n{external}\n{change}".encode()).hexdigest()[:16]
    return KeyRing(
        network=network,
        name=name,
        kinds=(kinds[0], kinds[1]),
        signs=all(one.to_string_with_secret() != str(one) for one in pair),
        external=pair[0],
        change=pair[1],
        redeem=(_redeem(external, kinds[0], network), _redeem(change, kinds[1], network)),
    )


def _network_kind(network: Network) -> Any:
    kind = library().NetworkKind
    return kind.MAIN if network is Network.BITCOIN else kind.TEST


def _from_words(keys: MnemonicKeys, network: Network) -> tuple[Any, Any]:
    bdk, kind = library(), _network_kind(network)
    if keys.kind not in _TEMPLATES:
        raise WrongUsage(f"the embedded wallet speaks {', '.join(_TEMPLATES)}")
    words, wrong = None, ""
    try:
        words = bdk.Mnemonic.from_string(" ".join(keys.words.lower().split()))
    except bdk.Bip39Error as exc:
        wrong = _mnemonic_fault(exc)
    if words is None:  # outside of the except block: the library's error must not even be the context of ours
        raise WrongUsage(f"the mnemonic cannot be used: {wrong}")
    secret = bdk.DescriptorSecretKey(kind, words, keys.passphrase)
    template = getattr(bdk.Descriptor, _TEMPLATES[keys.kind])
    return template(secret, bdk.KeychainKind.EXTERNAL, kind), template(secret, bdk.KeychainKind.INTERNAL, kind)


def _mnemonic_fault(error: Any) -> str:
    faults = library().Bip39Error
    if isinstance(error, faults.BadWordCount):
        return f"it has {error.word_count} words, not 12, 15, 18, 21 or 24"
    if isinstance(error, faults.UnknownWord):
        return f"word {error.index + 1} is not in the BIP39 list"
    if isinstance(error, faults.InvalidChecksum):
        return "a word is wrong or in the wrong place (its checksum fails)"
    return "it is not of BIP39"


def _from_descriptors(keys: DescriptorKeys, network: Network) -> tuple[Any, Any]:
    first, second = keys.descriptor.strip(), (keys.change or "").strip()
    if "<" in first:
        if second:
            raise WrongUsage("a two-path descriptor holds its change branch: leave change_descriptor out")
        text = _checked(first)
        if len({len(found) for found in _PATHS.findall(text)}) != 1 or "<" in _PATHS.sub("", text):
            raise WrongUsage("a two-path descriptor names exactly two branches, as in /<0;1>/*")
        first, second = _PATHS.sub(r"\1", text), _PATHS.sub(r"\2", text)
    if not second:
        raise WrongUsage("a change descriptor is missing: give change_descriptor, or one descriptor with /<0;1>/*")
    return _descriptor(first, "descriptor", network), _descriptor(second, "change descriptor", network)


def _descriptor(text: str, what: str, network: Network) -> Any:
    bdk = library()
    with contextlib.suppress(bdk.DescriptorError, bdk.DescriptorKeyError, bdk.MiniscriptError):
        return bdk.Descriptor(text, _network_kind(network))
    # Outside of any except block, as above.
    raise WrongUsage(
        f"the {what} cannot be read for {network}: check its form, its checksum and the network of its keys"
    )


def _kind(descriptor: Any) -> BdkKind:
    kind = _KINDS.get(descriptor.desc_type().name)
    if kind is None or (kind == "p2tr" and "," in str(descriptor)):
        raise WrongUsage(
            "the embedded wallet speaks single keys: pkh(…), wpkh(…), sh(wpkh(…)), and tr(…) without script leaves"
        )
    if not descriptor.has_wildcard():
        raise WrongUsage("a descriptor without /* has a single address, and every payment needs its own")
    return kind


def _redeem(public: str, kind: BdkKind, network: Network) -> Any:
    if kind != "p2sh-p2wpkh":
        return None
    return _descriptor(public.removeprefix("sh(").removesuffix(")"), "nested script", network)


def _checked(text: str) -> str:
    """The descriptor without its checksum, which must be right where there is one (BIP380): a mistyped path has no other guard."""
    body, mark, checksum = text.partition("#")
    if mark and checksum != _checksum(body):
        raise WrongUsage("the descriptor's checksum is wrong: it was mistyped or cut")
    return body


def _checksum(body: str) -> str:
    symbols: list[int] = []
    groups: list[int] = []
    for char in body:
        place = _INPUT_CHARSET.find(char)
        if place < 0:
            raise WrongUsage("the descriptor holds a character that no descriptor has")
        symbols.append(place & 31)
        groups.append(place >> 5)
        if len(groups) == 3:
            symbols.append(groups[0] * 9 + groups[1] * 3 + groups[2])
            groups = []
    if groups:
        symbols.append(groups[0] if len(groups) == 1 else groups[0] * 3 + groups[1])
    state = 1
    for symbol in [*symbols, *bytes(8)]:
        top = state >> 35
        state = ((state & 0x7FFFFFFFF) << 5) ^ symbol
        for bit, term in enumerate(_GENERATOR):
            state ^= term if top >> bit & 1 else 0
    state ^= 1
    return "".join(_CHECKSUM_CHARSET[state >> 5 * (7 - place) & 31] for place in range(8))
