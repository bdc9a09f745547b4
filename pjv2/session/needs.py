"""What a session wants from the world (`Need`), what it is told (`Answer`), and what a person asks of it (`Command`).

A need is pure data: the driver performs it and hands the answer to `decide`. Needs are independent wants; several can be due
at once. A need refuses nothing and knows no socket; two equal needs are the same want, so a driver can tell that one is
already under way.

Law: a need that costs money or gives something away appears only after the event that announces it was recorded.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Literal, TypeAlias

from pjv2.psbt.original import OriginalFacts
from pjv2.psbt.plan import ChannelOrder, Coin, ReceiverScripts
from pjv2.psbt.proposal import Funding
from pjv2.session.facts import (
    BroadcastResult,
    ChainView,
    ChannelFailure,
    Inspection,
    NodeChannel,
    ReservedChannel,
    SecuredChannel,
)
from pjv2.units import FeeRate, Instant, Outpoint, Txid

Purpose: TypeAlias = Literal["fallback", "payjoin", "way_out", "child", "reclaim"]


@dataclass(frozen=True, slots=True)
class Mailbox:
    """A mailbox of a directory: origin (`https://host`), encoded OHTTP key configuration, short id."""

    directory: str
    keys: bytes
    short_id: str


# ---------------------------------------------------------------- needs


@dataclass(frozen=True, slots=True)
class Poll:
    """Ask a mailbox for its message, waiting as long as the directory holds the request. Answer: `Polled`.

    `cover` = (receiver key, reply key), compressed: a sender's poll carries a fresh empty message A (BIP77), a receiver's nothing.
    """

    mailbox: Mailbox
    cover: tuple[bytes, bytes] | None = None


@dataclass(frozen=True, slots=True)
class ReadReply:
    """Read the reply mailbox once, as evidence of what left this house. Answer: `ReplyRead`."""

    mailbox: Mailbox


@dataclass(frozen=True, slots=True)
class Watch:
    """Everything on chain and in the mempool about these. Answer: `ChainView`."""

    txids: frozenset[Txid]
    outpoints: frozenset[Outpoint]
    scripts: frozenset[bytes]
    since: int


@dataclass(frozen=True, slots=True)
class GatherFacts:
    """Everything the receiver's checklist asks about an Original, in one trip. Answer: `OriginalFacts`."""

    tx: bytes = field(repr=False)
    outpoints: tuple[Outpoint, ...]


@dataclass(frozen=True, slots=True)
class FindCoins:
    """Coins we may contribute, our scripts for a proposal, and the facts of rule 2. Answer: `CoinsFound`.

    `exclude` holds coins that other sessions took; `inputs` are the Original's. `channels` = a channel plan is wanted, so the
    peers of `orders` are connected to first.
    """

    inputs: tuple[Outpoint, ...]
    exclude: frozenset[Outpoint]
    memo: str
    orders: tuple[ChannelOrder, ...] = ()


@dataclass(frozen=True, slots=True)
class ReserveCoins:
    """Lock our coins at the wallet until `until`, under our own lock id; again to renew. Answer: `CoinsHeld`."""

    coins: tuple[Outpoint, ...]
    lock_id: bytes = field(repr=False)
    until: Instant
    inputs: tuple[Outpoint, ...]
    memo: str


@dataclass(frozen=True, slots=True)
class InspectChannels:
    """The node's channels with this memo, and the facts of rule 2 about `inputs` and `coins`. Answer: `Inspection`."""

    memo: str
    inputs: tuple[Outpoint, ...]
    coins: tuple[Outpoint, ...]


@dataclass(frozen=True, slots=True)
class ReserveChannels:
    """Open every channel up to its funding script; own worker only. Answer: `ChannelsOffered`."""

    memo: str
    orders: tuple[tuple[bytes, ChannelOrder], ...] = field(repr=False)


@dataclass(frozen=True, slots=True)
class SecureChannels:
    """Have every peer sign its commitment for the frozen transaction; own worker only. Answer: `ChannelsCommitted`."""

    psbt: bytes = field(repr=False)
    txid: Txid
    funding: tuple[tuple[bytes, Funding], ...] = field(repr=False)


@dataclass(frozen=True, slots=True)
class ReleaseChannels:
    """Cancel the ids, disconnect the peers, wait until they left, list, abandon what `drafted` names. Answer: `ChannelsCleared`."""

    memo: str
    ids: tuple[bytes, ...] = field(repr=False)
    peers: tuple[str, ...]
    drafted: frozenset[Outpoint]


@dataclass(frozen=True, slots=True)
class Sign:
    """Sign our inputs of a PSBT. Answer: `SignedPsbt` with the same purpose."""

    purpose: Purpose
    psbt: bytes = field(repr=False)
    ours: tuple[Outpoint, ...]


@dataclass(frozen=True, slots=True)
class PostReply:
    """Put a proposal or a refusal into the reply mailbox, through another relay than `avoid_relay` where there is one.

    `method` is PUT for a v1 sender waiting at the directory. Answer: `Delivered`.
    """

    mailbox: Mailbox
    method: Literal["POST", "PUT"]
    message: bytes = field(repr=False)
    avoid_relay: str = ""


@dataclass(frozen=True, slots=True)
class PostOriginal:
    """Put the Original into the receiver's mailbox. Answer: `Delivered`."""

    mailbox: Mailbox
    message: bytes = field(repr=False)


@dataclass(frozen=True, slots=True)
class PostBip78:
    """Send the Original to the payee's own server, and wait for what it says (BIP78). Answer: `Bip78Answer`."""

    url: str = field(repr=False)
    body: bytes = field(repr=False)


@dataclass(frozen=True, slots=True)
class Broadcast:
    """Give a transaction to the network; repeatable. Answer: `BroadcastAnswer`."""

    purpose: Purpose
    txid: Txid
    raw: bytes = field(repr=False)


@dataclass(frozen=True, slots=True)
class ReleaseCoins:
    """Unlock our coins at the wallet, by our lock id. Answer: `CoinsFreed`."""

    coins: tuple[Outpoint, ...]
    lock_id: bytes = field(repr=False)


Need: TypeAlias = (
    Poll
    | ReadReply
    | Watch
    | GatherFacts
    | FindCoins
    | ReserveCoins
    | InspectChannels
    | ReserveChannels
    | SecureChannels
    | ReleaseChannels
    | Sign
    | PostReply
    | PostOriginal
    | PostBip78
    | Broadcast
    | ReleaseCoins
)


@dataclass(frozen=True, slots=True)
class Needs:
    """What is due now, and when to look again even if nothing is answered (None: nothing is timed)."""

    due: tuple[Need, ...]
    wake_at: Instant | None = None


@dataclass(frozen=True, slots=True)
class Memory:
    """What a worker remembers of this run of the process, beside the log: nothing here survives a restart.

    `own`: sequence numbers of the events that this worker appended itself (a reservation belongs to the worker that announced
    it). `view`: its latest look at the chain for this session, taken at `viewed`, and `watched` the need that it answered: "not
    in sight" counts only for what was looked for, and not long ago. `reply` and `inspection`: its latest answers to `ReadReply`
    and `InspectChannels`, each with the `seq` of the state it was asked in: evidence that is older than the question is none,
    and none survives a restart (a log restored from an older copy must look again). `silent`: a poll of this run found the
    mailbox empty, so that no older log of the session can have had an Original from it.
    """

    own: frozenset[int] = frozenset()
    view: ChainView | None = None
    watched: Watch | None = None
    viewed: Instant = 0.0
    reply: ReplyRead | None = field(default=None, repr=False)
    reply_seq: int = -1
    inspection: Inspection | None = None
    inspection_seq: int = -1
    silent: bool = False

    def learned(self, need: Need, answer: Answer, seq: int, now: Instant) -> Memory:
        """The memory after `answer` to a `need` that was asked by the state with this `seq`."""
        if isinstance(need, Watch) and isinstance(answer, ChainView):
            return replace(self, view=answer, watched=need, viewed=now)
        if isinstance(answer, Polled):
            return replace(self, silent=self.silent or answer.body is None)
        if isinstance(answer, ReplyRead):
            return replace(self, reply=answer, reply_seq=seq)
        if isinstance(answer, Inspection):
            return replace(self, inspection=answer, inspection_seq=seq)
        if isinstance(answer, CoinsHeld):
            return replace(self, inspection=answer.inspection, inspection_seq=seq)
        return self

    def appended(self, first: int, count: int) -> Memory:
        """The memory after this worker appended `count` events from `first` on."""
        return replace(self, own=self.own | frozenset(range(first, first + count)))


# ---------------------------------------------------------------- answers


@dataclass(frozen=True, slots=True)
class Polled:
    """The mailbox's content, or None when it is empty; `relay` is the relay that carried the answer."""

    body: bytes | None = field(repr=False)
    relay: str = ""


@dataclass(frozen=True, slots=True)
class Bip78Answer:
    """What the payee's server answered: a proposal in base64, or an error in JSON."""

    status: int
    body: bytes = field(repr=False)


@dataclass(frozen=True, slots=True)
class ReplyRead:
    """`readable` False: the directory could not be asked. Else `body` is the content, None when empty."""

    readable: bool
    body: bytes | None = field(default=None, repr=False)


@dataclass(frozen=True, slots=True)
class CoinsFound:
    """Confirmed, unlocked coins of the wallet that no session uses, and where our change goes."""

    coins: tuple[Coin, ...]
    scripts: ReceiverScripts
    inspection: Inspection
    unreachable: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class CoinsHeld:
    """`missing`: coins that the wallet would not lock (spent, or locked by somebody else)."""

    missing: tuple[Outpoint, ...]
    inspection: Inspection


@dataclass(frozen=True, slots=True)
class ChannelsOffered:
    reserved: tuple[ReservedChannel, ...]
    failed: tuple[ChannelFailure, ...]


@dataclass(frozen=True, slots=True)
class ChannelsCommitted:
    secured: tuple[SecuredChannel, ...]
    failed: tuple[ChannelFailure, ...]


@dataclass(frozen=True, slots=True)
class ChannelsCleared:
    """After the release procedure: what the node still lists with our memo, and the height it was done at."""

    remaining: tuple[NodeChannel, ...]
    abandoned: tuple[Outpoint, ...]
    height: int


@dataclass(frozen=True, slots=True)
class SignedPsbt:
    purpose: Purpose
    psbt: bytes = field(repr=False)


@dataclass(frozen=True, slots=True)
class Delivered:
    """The directory answered a post. 200 is delivered; 4xx will not be taken; anything else raised before it came here."""

    status: int
    relay: str = ""


@dataclass(frozen=True, slots=True)
class BroadcastAnswer:
    purpose: Purpose
    txid: Txid
    result: BroadcastResult


@dataclass(frozen=True, slots=True)
class CoinsFreed:
    coins: tuple[Outpoint, ...]


@dataclass(frozen=True, slots=True)
class InputsSeen:
    """The store's answer to an `OriginalAccepted` whose inputs session `by` saw before: the event was not stored."""

    by: str


@dataclass(frozen=True, slots=True)
class CoinTaken:
    """The store's answer to a `CoinsReserved`: another session uses the coin, the event was not stored."""

    outpoint: Outpoint
    by: str


@dataclass(frozen=True, slots=True)
class PeerTaken:
    """The store's answer to a `ChannelsIntended`: another session has a channel with this peer under way; nothing was stored."""

    peer: str
    by: str


@dataclass(frozen=True, slots=True)
class Tick:
    """Time passed; nothing else happened. Deadlines are drawn from it."""


Answer: TypeAlias = (
    Polled
    | ReplyRead
    | ChainView
    | OriginalFacts
    | CoinsFound
    | CoinsHeld
    | Inspection
    | ChannelsOffered
    | ChannelsCommitted
    | ChannelsCleared
    | SignedPsbt
    | Delivered
    | Bip78Answer
    | BroadcastAnswer
    | CoinsFreed
    | InputsSeen
    | CoinTaken
    | PeerTaken
    | Tick
)


# ---------------------------------------------------------------- commands


@dataclass(frozen=True, slots=True)
class Cancel:
    """Stop the session; `broadcast` False asks not to send the fallback."""

    broadcast: bool = True


@dataclass(frozen=True, slots=True)
class Approve:
    """A person agrees to propose (policy `approve = "ask"`)."""


@dataclass(frozen=True, slots=True)
class Decline:
    """A person refuses: the payment arrives plainly."""


@dataclass(frozen=True, slots=True)
class BroadcastNow:
    """A person wants the fallback on the network now, also after `Cancel(broadcast=False)`."""


@dataclass(frozen=True, slots=True)
class Reclaim:
    """Sender: spend the inputs back to the own wallet's `script` at `rate`."""

    script: bytes
    rate: FeeRate


Command: TypeAlias = Cancel | Approve | Decline | BroadcastNow | Reclaim
Input: TypeAlias = Answer | Command
