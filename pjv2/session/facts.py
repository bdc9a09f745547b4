"""What the world told us: the values that ports answer with and sessions judge by.

Nothing here decides. A fact carries no secret, and says from which source it is: the chain source, the node, the directory.

Law: a fact is gathered in one trip and judged in one place (`session`), never by a callback.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from pjv2.psbt.original import RuleFacts
from pjv2.units import FeeRate, Instant, Outpoint, Sats, Txid

BURIED = 6
"""Confirmations after which a transaction is final for us; fewer is `seen`."""


@dataclass(frozen=True, slots=True)
class Tip:
    """The best block: its height, its hash, and the median time of the last eleven (BIP113)."""

    height: int
    hash: str
    median_time: Instant


@dataclass(frozen=True, slots=True)
class ChainTx:
    """A transaction in the chain source's sight; `height` is None while it is in the mempool."""

    txid: Txid
    raw: bytes
    height: int | None


@dataclass(frozen=True, slots=True)
class ChainView:
    """Everything the chain source knows about what a session watches, at one moment.

    `txs` holds each transaction that has a watched txid, spends a watched outpoint or pays a watched script.
    `rate` is the estimate for about six blocks, `economy_rate` the one for 144.
    """

    tip: Tip
    txs: tuple[ChainTx, ...]
    rate: FeeRate
    economy_rate: FeeRate

    def depth(self, tx: ChainTx) -> int:
        """Confirmations of `tx`: 0 in the mempool, 1 in the tip."""
        return 0 if tx.height is None else self.tip.height - tx.height + 1


@dataclass(frozen=True, slots=True)
class BroadcastResult:
    """The network's answer to a transaction; `known` means it is already in a mempool or a block."""

    verdict: Literal["accepted", "known", "refused"]
    reason: str = ""


@dataclass(frozen=True, slots=True)
class ChannelFailure:
    """A channel that did not come about, and why, in the node's words."""

    id: bytes
    peer: str
    reason: str


@dataclass(frozen=True, slots=True)
class ReservedChannel:
    """A channel the peer agreed to: the funding output's script (P2WSH or P2TR, 34 bytes) and exact value."""

    id: bytes
    script: bytes
    capacity: Sats


@dataclass(frozen=True, slots=True)
class SecuredChannel:
    """A channel whose commitment signature is on our node's disk for exactly this outpoint."""

    id: bytes
    outpoint: Outpoint
    backup: bytes


@dataclass(frozen=True, slots=True)
class NodeChannel:
    """A channel as the node lists it. `memo` is our recovery tag; `outpoint` is None before it is pending."""

    peer: str
    outpoint: Outpoint | None
    capacity: Sats
    memo: str
    state: Literal["reserved", "pending", "open", "closed"]
    backup: bytes = b""


@dataclass(frozen=True, slots=True)
class Inspection:
    """The node's channels that carry a session's memo, and the facts of money rule 2, read at one moment.

    `listed` is False where no Lightning node is configured.
    """

    channels: tuple[NodeChannel, ...]
    facts: RuleFacts
    listed: bool = True
