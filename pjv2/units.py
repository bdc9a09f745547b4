"""The units every layer shares: satoshis, fee rates, outpoints, networks, instants, and the one source of randomness.

It refuses amounts and rates outside what Bitcoin allows; Python integers do not overflow, so ranges are checked instead.

Law: money is integer arithmetic. A fee is the ceiling of rate x weight; a rate is the floor of fee / weight.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from decimal import Decimal, InvalidOperation
from enum import StrEnum
from typing import NamedTuple, Protocol, TypeAlias

from pjv2.errors import WrongUsage

Sats: TypeAlias = int
"""An amount in satoshis."""

Weight: TypeAlias = int
"""A transaction weight in weight units (BIP141)."""

Instant: TypeAlias = float
"""Seconds since the Unix epoch, UTC."""

SessionId: TypeAlias = str
"""32 lower-case hex characters (16 random bytes)."""

Txid: TypeAlias = str
"""A transaction id as people write it: 64 lower-case hex characters, reversed from the bytes on the wire."""

MAX_MONEY: Sats = 21_000_000 * 100_000_000
_TXID = re.compile(r"[0-9a-f]{64}\Z")


class Entropy(Protocol):
    """The only source of randomness the pure layers see; whoever calls them brings one."""

    def token(self, size: int) -> bytes:
        """`size` unpredictable bytes."""
        ...

    def below(self, limit: int) -> int:
        """A uniform integer in `0 <= n < limit`; `limit` is at least 1."""
        ...


@dataclass(frozen=True, slots=True, order=True)
class FeeRate:
    """A fee rate in satoshis per 1000 weight units; 1 sat/vB is 250."""

    sat_per_kwu: int

    def __post_init__(self) -> None:
        if self.sat_per_kwu < 0:
            raise WrongUsage("a fee rate cannot be negative")

    @classmethod
    def from_sat_per_vb(cls, rate: int | float | str | Decimal) -> FeeRate:
        """The rate in sat/vB, rounded up to the next sat/kwu. Raises WrongUsage when it is no finite number >= 0."""
        try:
            number = Decimal(str(rate))
        except InvalidOperation as exc:
            raise WrongUsage(f"{rate!r} is not a fee rate in sat/vB") from exc
        if not number.is_finite() or number < 0:
            raise WrongUsage(f"{rate!r} is not a fee rate in sat/vB")
        scaled = number * 250
        whole = int(scaled)
        return cls(whole if whole == scaled else whole + 1)

    @classmethod
    def of(cls, fee: Sats, weight: Weight) -> FeeRate:
        """The rate that `fee` pays for `weight`, rounded down."""
        if weight <= 0 or fee < 0:
            raise WrongUsage("a fee rate needs a fee >= 0 and a weight > 0")
        return cls(fee * 1000 // weight)

    @property
    def sat_per_vb(self) -> float:
        return self.sat_per_kwu / 250

    def fee(self, weight: Weight) -> Sats:
        """The fee for `weight`, rounded up."""
        return -(-self.sat_per_kwu * weight // 1000)

    def __str__(self) -> str:
        return f"{self.sat_per_vb:g} sat/vB"


class Outpoint(NamedTuple):
    """A transaction output: `txid` as people write it, and its index. Its text form is `txid:vout`."""

    txid: Txid
    vout: int

    @classmethod
    def parse(cls, text: str) -> Outpoint:
        """Read `txid:vout`. Raises WrongUsage."""
        txid, _, vout = text.partition(":")
        if not _TXID.match(txid) or not vout.isascii() or not vout.isdigit() or int(vout) > 0xFFFFFFFF:
            raise WrongUsage(f"{text!r} is not an outpoint of the form txid:vout")
        return cls(txid, int(vout))

    def __str__(self) -> str:
        return f"{self.txid}:{self.vout}"


class Network(StrEnum):
    """A Bitcoin network that pjv2 serves, named as in the configuration."""

    BITCOIN = "bitcoin"
    SIGNET = "signet"
    TESTNET4 = "testnet4"
    REGTEST = "regtest"

    @property
    def hrp(self) -> str:
        """The bech32 prefix of its addresses (BIP173)."""
        return {"bitcoin": "bc", "regtest": "bcrt"}.get(self.value, "tb")

    @property
    def genesis_hash(self) -> str:
        """The hash of block 0, as people write it."""
        return _GENESIS[self]


_GENESIS = {
    Network.BITCOIN: "000000000019d6689c085ae165831e934ff763ae46a2a6c172b3f1b60a8ce26f",
    Network.SIGNET: "00000008819873e925422c1ff0f99f7cc9bbb232af63a077a480a3633bee1ef6",
    Network.TESTNET4: "00000000da84f2bafbbc53dee25a72ae507ff4914b867c565be350b0da8bf043",
    Network.REGTEST: "0f9188f13cb7b2c71f2a335e3a4fc328bf5beb436012afca590b1a11466e2206",
}
