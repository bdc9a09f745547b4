"""What a Core wallet tells, read: coins, descriptors, transactions. Every reader raises ValueError, TypeError or KeyError for another
shape; `BitcoindRpc.read` makes `CannotRead` of that.

It refuses nothing else, and decides one thing: which coins are a single key's, for others cannot be weighed beforehand.

Law: pure; an answer goes in, a value of ours comes out.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias, get_args

from pjv2.backends.bitcoind_rpc import flag, hash_of, items, outpoint_of, raw_of, sats_of, text, whole
from pjv2.errors import PeerMistake
from pjv2.psbt.coin import is_p2wpkh
from pjv2.psbt.tx import ScriptKind, Tx, TxOut, address_to_script
from pjv2.units import Network, Outpoint, Txid

AddressType: TypeAlias = Literal["bech32", "bech32m", "p2sh-segwit", "legacy"]
_DESCRIPTORS: dict[AddressType, str] = {
    "bech32": "wpkh(",
    "bech32m": "tr(",
    "p2sh-segwit": "sh(wpkh(",
    "legacy": "pkh(",
}
_UNCOMPRESSED = 130


@dataclass(frozen=True, slots=True)
class Unspent:
    outpoint: Outpoint
    txout: TxOut
    depth: int
    redeem_script: bytes | None


def unspent_of(told: Any) -> Unspent | None:
    """A listed coin; None for one that is no single key's, or that the wallet cannot sign for."""
    txout = TxOut(sats_of(told["amount"]), raw_of(told["scriptPubKey"]))
    redeem = raw_of(told["redeemScript"]) if "redeemScript" in told else None
    single = {
        ScriptKind.P2WPKH: True,
        ScriptKind.P2TR: True,
        ScriptKind.P2SH: is_p2wpkh(redeem),
        ScriptKind.P2PKH: _UNCOMPRESSED not in map(len, innermost_keys(told.get("desc", ""))),
    }.get(txout.kind, False)
    if not single or not flag(told["spendable"]) or not flag(told["solvable"]):
        return None
    return Unspent(outpoint_of(told), txout, whole(told["confirmations"]), redeem)


def all_listed(listed: Any, young: Any) -> list[Any]:
    known = places_in(listed)
    return items(listed) + [one for one in items(young) if outpoint_of(one) not in known]


def innermost_keys(descriptor: str) -> list[str]:
    """The innermost argument of a descriptor, without its origin."""
    inner = descriptor.rpartition("(")[2].partition(")")[0]
    return [inner.rpartition("]")[2]]


def identity_of(listed: Any, network: Network) -> tuple[str, tuple[AddressType, ...]]:
    """A public name out of the oldest descriptor, and the types of addresses that the wallet makes, best first."""
    told = [(whole(one["timestamp"]), text(one["desc"]), one) for one in items(listed["descriptors"])]
    oldest = min((when, desc) for when, desc, _ in told)[1].partition("#")[0] if told else ""
    name = hashlib.sha256(f"{network.genesis_hash} {oldest}".encode()).hexdigest()[:16]
    active = [(desc, flag(one.get("internal", False))) for _, desc, one in told if flag(one["active"])]
    types: list[AddressType] = []
    for kind in get_args(AddressType):
        branches = {internal for desc, internal in active if desc.startswith(_DESCRIPTORS[kind])}
        if False in branches:
            types.append(kind)
    return name, tuple(types)


def has_keys(info: Any) -> bool:
    return flag(info["private_keys_enabled"]) and not flag(info.get("external_signer", False))


def signs_now(info: Any, now: float) -> bool:
    return has_keys(info) and ("unlocked_until" not in info or whole(info["unlocked_until"]) > now)


def wallet_block(info: Any) -> tuple[int, str]:
    told = info["lastprocessedblock"]
    return whole(told["height"]), hash_of(told["hash"])


def is_mine(info: Any) -> bool:
    return flag(info["ismine"])


def places_in(told: Any) -> frozenset[Outpoint]:
    return frozenset(outpoint_of(one) for one in items(told))


def address_index(info: Any) -> int:
    path = text(info["hdkeypath"])
    return int(path.rpartition("/")[2].rstrip("h'"))


def script_of(address: str, network: Network) -> bytes:
    try:
        return address_to_script(address, network)
    except PeerMistake as exc:
        raise ValueError("no address of this network") from exc


def tx_of(told: Any, txid: Txid) -> Tx:
    try:
        tx = Tx.parse(raw_of(told["hex"]))
    except PeerMistake as exc:
        raise ValueError("no transaction") from exc
    if tx.txid != txid:
        raise ValueError("another transaction")
    return tx
