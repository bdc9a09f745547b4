"""The events of a session: past-tense facts, in the order they happened. The log is the session; everything else is derived.

Everything random or timed (keys, ids, output order, fees, heights) stands in an event and is never computed again. Events hold
secrets (receiver key, reply key, PSBTs): those fields have no repr, and only `session.public` shows an event to anybody.

Law: an *announced* effect is recorded before it is performed, a *reported* one after it; a stored event never changes its
meaning. Names and fields are frozen by golden files: add optional fields, never rename. Electrum's warning holds: these names
are in people's databases.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum
from typing import Literal, TypeAlias

from pjv2.errors import ReplyCode
from pjv2.psbt.original import Prevout
from pjv2.psbt.plan import ChannelPlan, Coin, Intent, ReceiverScripts
from pjv2.psbt.proposal import Funding
from pjv2.session.facts import ReservedChannel, SecuredChannel
from pjv2.units import FeeRate, Instant, Network, Outpoint, Sats, SessionId, Txid


class Outcome(StrEnum):
    """How a session ended; a closed set."""

    PAID = "Paid"
    PAID_BY_FALLBACK = "PaidByFallback"
    PAID_OTHERWISE = "PaidOtherwise"
    REFUSED = "Refused"
    EXPIRED = "Expired"
    CANCELLED = "Cancelled"
    CONFLICTED = "Conflicted"


What: TypeAlias = Literal["payjoin", "original", "bumped", "conflict", "way_out", "reclaim", "address"]
"""session-model.md's T, O, B, D, W, the sender's reclaim, and A."""

Why: TypeAlias = Literal["cancelled", "expired", "too_late", "spend_seen", "declined", "policy"]
Next: TypeAlias = Literal["plan", "plain", "end", "dead"]
Where: TypeAlias = Literal["mailbox", "node", "chain"]


@dataclass(frozen=True, slots=True)
class Policy:
    """The rules a session was made under; later configuration does not change it. Rates in sat/vB steps, times in seconds."""

    max_fee_rate: FeeRate = FeeRate(50 * 250)
    max_fee_share_ppm: int = 50_000
    min_fee_rate: FeeRate = FeeRate(250)
    min_amount: Sats = 10_000
    own_input: Literal["require", "prefer"] = "require"
    on_peer_failure: Literal["drop", "deposit", "abort"] = "deposit"
    approve: Literal["auto", "ask"] = "auto"
    fallback_after: float = 600
    confirmations: int = 1
    give_up_blocks: int = 1_000
    watch_after_expiry: float = 2_592_000
    attempts: int = 2
    mailbox_ttl: float = 7 * 86_400
    require_payjoin: bool = False
    approve_within: float = 518_400
    """Seconds after the Original was accepted; no request lives longer than the default, so older logs have no such deadline."""


@dataclass(frozen=True, slots=True)
class ColdAddress:
    """A fresh address of keys that are kept elsewhere: the payment can go there, and nothing here can spend it."""

    address: str
    script: bytes
    index: int


@dataclass(frozen=True, slots=True)
class Event:
    at: Instant


# ---------------------------------------------------------------- both roles


@dataclass(frozen=True, slots=True)
class Seen(Event):
    """A transaction that matters is in sight: news, never an outcome. `height` None: in the mempool."""

    txid: Txid
    what: What
    height: int | None
    amount: Sats = 0
    """What it pays to scripts of this session."""


@dataclass(frozen=True, slots=True)
class Unseen(Event):
    """A transaction that was in sight is gone (evicted, replaced, or its block was disconnected)."""

    txid: Txid
    what: What


@dataclass(frozen=True, slots=True)
class CancelRequested(Event):
    broadcast: bool


@dataclass(frozen=True, slots=True)
class ExpiryPassed(Event):
    """The request expired. `polled`: since then the directory answered a poll, and the mailbox was empty."""

    polled: bool = False


@dataclass(frozen=True, slots=True)
class BroadcastRequested(Event):
    """A person wants the fallback out now; it takes back an earlier `CancelRequested(broadcast=False)`."""


@dataclass(frozen=True, slots=True)
class Alarm(Event):
    """Something a person must look at; nothing is decided by it."""

    what: str
    detail: str


@dataclass(frozen=True, slots=True)
class FallbackBroadcasting(Event):
    txid: Txid


@dataclass(frozen=True, slots=True)
class FallbackBroadcasted(Event):
    txid: Txid


@dataclass(frozen=True, slots=True)
class FallbackRejected(Event):
    reason: str


@dataclass(frozen=True, slots=True)
class ChildBroadcasting(Event):
    """A child that pays for its stuck parent, recorded before it is broadcast (CPFP)."""

    parent: Txid
    txid: Txid
    raw: bytes = field(repr=False)
    fee: Sats


@dataclass(frozen=True, slots=True)
class CoinsReleased(Event):
    pass


@dataclass(frozen=True, slots=True)
class Closed(Event):
    outcome: Outcome
    txid: Txid | None
    amount_requested: Sats | None
    amount_received: Sats
    channels: tuple[Outpoint, ...] = ()


@dataclass(frozen=True, slots=True)
class LatePayment(Event):
    """The address was paid after the session closed."""

    txid: Txid
    amount: Sats


# ---------------------------------------------------------------- receiver


@dataclass(frozen=True, slots=True)
class ReceiverCreated(Event):
    """`Created` of a receiver. `keys` is the encoded OHTTP key configuration, `expires` whole seconds (EX of the URI)."""

    session: SessionId
    network: Network
    genesis: str
    wallet: str
    node: str | None
    address: str
    script: bytes
    address_index: int
    amount: Sats | None
    directory: str
    keys: bytes
    receiver_key: bytes = field(repr=False)
    expires: int
    height: int
    plan: ChannelPlan | None
    policy: Policy
    label: str | None = None
    note: str | None = None
    order: str | None = None
    cold: ColdAddress | None = None
    """Where a proposal without a coin of ours sends the payment, if the payer lets its script be replaced."""


@dataclass(frozen=True, slots=True)
class MailboxSpoiled(Event):
    """Junk stands in the write-once mailbox: nobody can reach this session through it any more; the address is still watched."""

    reason: str


@dataclass(frozen=True, slots=True)
class OriginalReceived(Event):
    """`body` = base64 PSBT, newline, query. `reply_key` None: a v1 sender waits at the directory."""

    body: bytes = field(repr=False)
    reply_key: bytes | None
    relay: str


@dataclass(frozen=True, slots=True)
class OriginalAccepted(Event):
    """The Original passed every check; from here a fallback transaction exists. Seen inputs are written with it."""

    inputs: tuple[Outpoint, ...]
    prevouts: tuple[Prevout, ...]
    txid: Txid
    amount: Sats
    height: int
    economy_rate: FeeRate
    verdict: Literal["accepted", "known"]
    tip_time: float = 0.0


@dataclass(frozen=True, slots=True)
class OriginalRefused(Event):
    code: ReplyCode
    reason: str


@dataclass(frozen=True, slots=True)
class RefusalPosting(Event):
    code: ReplyCode
    message: bytes = field(repr=False)


@dataclass(frozen=True, slots=True)
class RefusalPosted(Event):
    pass


@dataclass(frozen=True, slots=True)
class Approved(Event):
    pass


@dataclass(frozen=True, slots=True)
class CoinsReserved(Event):
    """Own coins of this session: a row in the store with this event, the wallet's lock after it. May be empty (`prefer`).

    A later one replaces the former: its rows are freed in the same transaction.
    """

    coins: tuple[Coin, ...]
    scripts: ReceiverScripts
    lock_id: bytes = field(repr=False)
    until: Instant
    excluded: tuple[Outpoint, ...] = ()
    """Coins that the wallet would not lock: not asked for again."""
    without: tuple[str, ...] = ()
    """Peers that cannot take a channel now: unreachable, blocked, or in use by another session."""
    again: bool = False
    """Nothing is reserved: the wallet would not lock the former choice, look for other coins."""


@dataclass(frozen=True, slots=True)
class ChannelsIntended(Event):
    """`ids` were drawn for `intent.orders` before any call to the node; `plan` is what is left of the plan."""

    attempt: int
    ids: tuple[bytes, ...] = field(repr=False)
    intent: Intent
    plan: ChannelPlan


@dataclass(frozen=True, slots=True)
class ChannelsReserved(Event):
    channels: tuple[ReservedChannel, ...]


@dataclass(frozen=True, slots=True)
class ProposalDrafted(Event):
    """The transaction is frozen: inputs, outputs and their order. `funding` is empty for a plain payjoin."""

    txid: Txid
    psbt: bytes = field(repr=False)
    intent: Intent
    funding: tuple[Funding, ...]
    change_vout: int | None


@dataclass(frozen=True, slots=True)
class ChannelsSecured(Event):
    channels: tuple[SecuredChannel, ...]


@dataclass(frozen=True, slots=True)
class ProposalSigned(Event):
    psbt: bytes = field(repr=False)


@dataclass(frozen=True, slots=True)
class ProposalPosting(Event):
    """The point of no return: `message` is the inner message, fixed for ever; `height` starts the way out's count."""

    message: bytes = field(repr=False)
    method: Literal["POST", "PUT"]
    height: int


@dataclass(frozen=True, slots=True)
class ProposalPosted(Event):
    relay: str


@dataclass(frozen=True, slots=True)
class ProposingStopped(Event):
    why: Why
    detail: str = ""


@dataclass(frozen=True, slots=True)
class ProposalFound(Event):
    """A proposal is out that this log cannot vouch for: the log is older than the world."""

    where: Where
    detail: str = ""
    channels: tuple[Outpoint, ...] = ()
    """Funding outpoints that the node listed with our memo, and the log does not know."""


@dataclass(frozen=True, slots=True)
class ChannelsReleasing(Event):
    next: Next
    reason: str
    failed: tuple[int, ...] = ()
    """Indexes into the attempt's orders that failed, for the next plan."""
    abandon: tuple[Outpoint, ...] = ()
    """`dead` after `ProposalFound`: pending channels of transactions that the log does not know, proved dead by a burial."""


@dataclass(frozen=True, slots=True)
class ChannelsReleased(Event):
    blocked: tuple[tuple[str, int], ...] = ()
    """Peers that still hold a secured channel of ours, and the height until which they block."""


@dataclass(frozen=True, slots=True)
class WayOutBroadcasting(Event):
    txid: Txid
    raw: bytes = field(repr=False)
    reason: str


# ---------------------------------------------------------------- sender


@dataclass(frozen=True, slots=True)
class SenderCreated(Event):
    """`Created` of a sender. `original` is the signed PSBT with the wallet's metadata; its coins are leased with this event.

    `endpoint`: the payee's own server (BIP78); then there is no directory, no key and no mailbox, and those fields are empty.
    """

    session: SessionId
    network: Network
    genesis: str
    wallet: str
    uri: str = field(repr=False)
    address: str
    script: bytes
    amount: Sats
    directory: str
    keys: bytes
    receiver: bytes
    short_id: str
    reply_key: bytes = field(repr=False)
    expires: int
    original: bytes = field(repr=False)
    query: str
    inputs: tuple[Outpoint, ...]
    txid: Txid
    fee: Sats
    lock_id: bytes = field(repr=False)
    height: int
    policy: Policy
    label: str | None = None
    endpoint: str | None = field(default=None, repr=False)


@dataclass(frozen=True, slots=True)
class OriginalPosting(Event):
    """From here the Original counts as given away, whatever the directory answers."""

    message: bytes = field(repr=False)


@dataclass(frozen=True, slots=True)
class OriginalPosted(Event):
    pass


@dataclass(frozen=True, slots=True)
class ProposalAccepted(Event):
    psbt: bytes = field(repr=False)
    txid: Txid
    txid_is_stable: bool


@dataclass(frozen=True, slots=True)
class ProposalRefused(Event):
    """The receiver refused (`code`), or his proposal broke a rule (`code` None)."""

    code: str | None
    reason: str


@dataclass(frozen=True, slots=True)
class Signed(Event):
    txid: Txid
    raw: bytes = field(repr=False)
    fee: Sats


@dataclass(frozen=True, slots=True)
class Broadcasting(Event):
    pass


@dataclass(frozen=True, slots=True)
class ReclaimRequested(Event):
    """A person wants the inputs back at `script`: nothing else of this session is broadcast unless he says so."""

    script: bytes
    rate: FeeRate


@dataclass(frozen=True, slots=True)
class ReclaimBroadcasting(Event):
    txid: Txid
    raw: bytes = field(repr=False)
