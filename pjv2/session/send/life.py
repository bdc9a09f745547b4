"""A sender's states, the table of its transitions, and `evolve`: the only way its state changes.

```
Created -> PostingOriginal -> PollingForProposal -> WantsSignature -> SignedPayjoin -> BroadcastingPayjoin
   |             |                    |                   |                |                   |
   |             +--------------------+-------------------+----------------+-> PendingFallback |
   v                                                                                 v         v
 Closed <----------------------------- an input is buried ---------------------------+---------+
```

It refuses an event that the table does not list for the state, and one whose content contradicts the state.

Law: `TRANSITIONS` is session-model.md section 5. From `OriginalPosting` on the Original counts as given away: its coins stay leased
until one of them is spent and buried, there is no other exit.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from enum import StrEnum
from typing import Final

from pjv2.errors import IllegalEvent, PayjoinError
from pjv2.psbt.params import restore_params
from pjv2.psbt.tx import Psbt
from pjv2.psbt.verify import SafeToSign, SentOriginal, restore_safe_to_sign
from pjv2.session import events as ev
from pjv2.session.monitor import Draft, Sighting, Stakes, bare_txid, note_seen, note_unseen, read_tx
from pjv2.session.needs import Mailbox
from pjv2.units import Outpoint, SessionId
from pjv2.wire.mailbox import short_id
from pjv2.wire.secp import PublicKey, SecretKey


class Stage(StrEnum):
    """The states of session-model.md section 5; persisted by name."""

    CREATED = "Created"
    POSTING_ORIGINAL = "PostingOriginal"
    POLLING_FOR_PROPOSAL = "PollingForProposal"
    WANTS_SIGNATURE = "WantsSignature"
    SIGNED_PAYJOIN = "SignedPayjoin"
    BROADCASTING_PAYJOIN = "BroadcastingPayjoin"
    PENDING_FALLBACK = "PendingFallback"
    CLOSED = "Closed"


FLAGS: Final[tuple[type[ev.Event], ...]] = (
    ev.CancelRequested,
    ev.ExpiryPassed,
    ev.Seen,
    ev.Unseen,
    ev.Alarm,
    ev.MailboxSpoiled,
    ev.BroadcastRequested,
    ev.ChildBroadcasting,
)
"""Accepted in every state but Closed; they change flags only."""


def _table() -> dict[tuple[Stage, type[ev.Event]], tuple[Stage, ...]]:
    s = Stage
    table: dict[tuple[Stage, type[ev.Event]], tuple[Stage, ...]] = {
        (s.CREATED, ev.OriginalPosting): (s.POSTING_ORIGINAL,),
        (s.POSTING_ORIGINAL, ev.OriginalPosted): (s.POLLING_FOR_PROPOSAL,),
        (s.WANTS_SIGNATURE, ev.Signed): (s.SIGNED_PAYJOIN,),
        (s.WANTS_SIGNATURE, ev.ProposalRefused): (s.PENDING_FALLBACK,),
        (s.SIGNED_PAYJOIN, ev.Broadcasting): (s.BROADCASTING_PAYJOIN,),
        (s.SIGNED_PAYJOIN, ev.FallbackBroadcasting): (s.PENDING_FALLBACK,),
        (s.CREATED, ev.CoinsReleased): (s.CREATED,),
        (s.CREATED, ev.Closed): (s.CLOSED,),
    }
    for stage in (s.POSTING_ORIGINAL, s.POLLING_FOR_PROPOSAL):
        table[stage, ev.ProposalAccepted] = (s.WANTS_SIGNATURE,)
        table[stage, ev.ProposalRefused] = (s.PENDING_FALLBACK,)
    for stage in (s.BROADCASTING_PAYJOIN, s.PENDING_FALLBACK):
        for kind in (ev.FallbackBroadcasting, ev.FallbackBroadcasted, ev.FallbackRejected):
            table[stage, kind] = (stage,)
    for stage in s:
        if stage not in (s.CREATED, s.CLOSED):
            table[stage, ev.ReclaimRequested] = (stage,)
            table[stage, ev.ReclaimBroadcasting] = (stage,)
            table[stage, ev.CoinsReleased] = (stage,)
            table[stage, ev.Closed] = (s.CLOSED,)
        if stage is not s.CLOSED:
            for flag in FLAGS:
                table[stage, flag] = (stage,)
    return table


TRANSITIONS: Final[Mapping[tuple[Stage, type[ev.Event]], tuple[Stage, ...]]] = _table()


@dataclass(frozen=True, slots=True)
class Sender:
    """A sender as its log tells it. `seq` is the number of events applied."""

    created: ev.SenderCreated = field(repr=False)
    sent: SentOriginal = field(repr=False)
    reply_public: bytes = field(repr=False)
    """Our reply key, compressed; it names the mailbox where the proposal will be."""
    reply_mailbox: Mailbox = field(repr=False)
    stage: Stage = Stage.CREATED
    seq: int = 1
    updated: float = 0.0
    entered: int = 1
    # flags
    cancelled: bool = False
    no_broadcast: bool = False
    broadcast_now: bool = False
    expired: bool = False
    polled_out: bool = False
    spoiled: str | None = None
    sightings: tuple[Sighting, ...] = ()
    alarms: tuple[tuple[str, str], ...] = ()
    # the exchange
    posting: ev.OriginalPosting | None = field(default=None, repr=False)
    posted: bool = False
    accepted: ev.ProposalAccepted | None = field(default=None, repr=False)
    safe: SafeToSign | None = field(default=None, repr=False)
    refused: ev.ProposalRefused | None = None
    signed: ev.Signed | None = field(default=None, repr=False)
    # afterwards
    broadcasting: bool = False
    fallback_broadcasting: bool = False
    fallback_broadcasted: bool = False
    fallback_rejected: str | None = None
    reclaim_requested: ev.ReclaimRequested | None = None
    reclaims: tuple[ev.ReclaimBroadcasting, ...] = field(default=(), repr=False)
    children: tuple[ev.ChildBroadcasting, ...] = field(default=(), repr=False)
    coins_released: bool = False
    closed: ev.Closed | None = None

    role = "sender"

    @property
    def session(self) -> SessionId:
        return self.created.session

    @property
    def mailbox(self) -> Mailbox:
        """Where the Original goes: the receiver's mailbox. There is none where he has a server of his own."""
        return Mailbox(self.created.directory, self.created.keys, self.created.short_id)

    @property
    def own_coins(self) -> tuple[Outpoint, ...]:
        return () if self.coins_released else self.created.inputs

    @property
    def deadline(self) -> float:
        """After it nothing new is signed, and the Original goes out."""
        return self.created.expires + self.created.policy.fallback_after

    @property
    def payjoin(self) -> Draft | None:
        """T, as it was signed."""
        if self.signed is None:
            return None
        tx = read_tx(self.signed.raw)
        spends = frozenset(txin.outpoint for txin in tx.inputs)
        ours = frozenset(self.created.inputs)
        return Draft(self.signed.txid, bare_txid(tx), tx, spends, ours, (), self.created.amount, self.signed.fee)

    @property
    def stakes(self) -> Stakes:
        payjoin = self.payjoin
        return Stakes(
            since=self.created.height,
            original=self.created.txid,
            original_bare=bare_txid(self.sent.tx),
            inputs=frozenset(self.created.inputs),
            drafts=(payjoin,) if payjoin is not None else (),
            reclaims=frozenset(entry.txid for entry in self.reclaims),
            children=frozenset(child.txid for child in self.children),
            bumped=frozenset(txin.outpoint for child in self.children for txin in read_tx(child.raw).inputs),
            foreign=payjoin.inputs - payjoin.ours if payjoin is not None else frozenset(),
        )


def begin(event: ev.SenderCreated) -> Sender:
    """The state after `Created`. Raises IllegalEvent when the Original, the keys and the rest do not belong together."""
    try:
        reply = SecretKey(event.reply_key).public
        if event.endpoint is None:
            PublicKey.parse(event.receiver)
        params = restore_params(event.query)
        tx = Psbt.parse(event.original).extract()
        sent = SentOriginal(event.original, tx, event.script, params, params.output_substitution)
    except (PayjoinError, ValueError, IndexError) as exc:
        raise IllegalEvent(f"Created holds no Original that can be sent: {exc}") from exc
    if tx.txid != event.txid or tuple(txin.outpoint for txin in tx.inputs) != event.inputs:
        raise IllegalEvent("Created names another transaction than its Original")
    return Sender(
        created=event,
        sent=sent,
        reply_public=reply.compressed,
        reply_mailbox=Mailbox(event.directory, event.keys, short_id(reply)),
        updated=event.at,
    )


def evolve(state: Sender, event: ev.Event) -> Sender:
    """The state after an event. Raises IllegalEvent: not in the table, or contradicting the state, which stays as it is."""
    allowed = TRANSITIONS.get((state.stage, type(event)))
    if allowed is None:
        raise IllegalEvent(f"{type(event).__name__} is no event of a sender in {state.stage}")
    try:
        after = _apply(state, event)
    except IllegalEvent:
        raise
    except (PayjoinError, ValueError, IndexError, KeyError) as exc:
        raise IllegalEvent(f"{type(event).__name__} does not fit this session: {exc}") from exc
    if after.stage not in allowed:
        raise IllegalEvent(f"{type(event).__name__} does not lead from {state.stage} to {after.stage}")
    seq = state.seq + 1
    entered = seq if after.stage is not state.stage else state.entered
    return replace(after, seq=seq, updated=event.at, entered=entered)


def _require(fits: bool, what: str) -> None:
    if not fits:
        raise IllegalEvent(what)


def _apply(state: Sender, event: ev.Event) -> Sender:  # noqa: PLR0911, PLR0912  # one return per case
    s = Stage
    match event:
        case ev.Seen():
            return replace(state, sightings=note_seen(state.sightings, event))
        case ev.Unseen():
            return replace(state, sightings=note_unseen(state.sightings, event))
        case ev.CancelRequested(broadcast=wanted):
            return replace(state, cancelled=True, no_broadcast=not wanted)
        case ev.BroadcastRequested():
            return replace(state, broadcast_now=True, no_broadcast=False)
        case ev.ExpiryPassed(polled=polled):
            return replace(state, expired=True, polled_out=state.polled_out or polled)
        case ev.Alarm(what=what, detail=detail):
            return replace(state, alarms=(*state.alarms, (what, detail)))
        case ev.MailboxSpoiled(reason=reason):
            return replace(state, spoiled=reason)
        case ev.ChildBroadcasting():
            _require(read_tx(event.raw).txid == event.txid, "the child's bytes have another transaction id")
            return replace(state, children=(*state.children, event))
        case ev.OriginalPosting():
            _require(not state.coins_released, "the coins were given back")
            return replace(state, posting=event, stage=s.POSTING_ORIGINAL)
        case ev.OriginalPosted():
            return replace(state, posted=True, stage=s.POLLING_FOR_PROPOSAL)
        case ev.ProposalAccepted():
            safe = restore_safe_to_sign(state.sent, Psbt.parse(event.psbt))
            _require(safe.txid == event.txid, "the accepted proposal is another transaction")
            return replace(state, accepted=event, safe=safe, stage=s.WANTS_SIGNATURE)
        case ev.ProposalRefused():
            return replace(state, refused=event, stage=s.PENDING_FALLBACK)
        case ev.Signed():
            tx = read_tx(event.raw)
            _require(tx.txid == event.txid, "the signed payjoin's bytes have another transaction id")
            _require(state.safe is not None and bare_txid(tx) == bare_txid(state.safe.psbt.tx), "it is another payjoin")
            return replace(state, signed=event, stage=s.SIGNED_PAYJOIN)
        case ev.Broadcasting():
            return replace(state, broadcasting=True, stage=s.BROADCASTING_PAYJOIN)
        case ev.FallbackBroadcasting(txid=txid):
            _require(txid == state.created.txid, "the fallback is another transaction")
            stage = s.PENDING_FALLBACK if state.stage is s.SIGNED_PAYJOIN else state.stage
            return replace(state, fallback_broadcasting=True, stage=stage)
        case ev.FallbackBroadcasted(txid=txid):
            _require(txid == state.created.txid, "the fallback is another transaction")
            return replace(state, fallback_broadcasted=True, fallback_rejected=None)
        case ev.FallbackRejected(reason=reason):
            return replace(state, fallback_rejected=reason)
        case ev.ReclaimRequested():
            return replace(state, reclaim_requested=event, cancelled=True, no_broadcast=True)
        case ev.ReclaimBroadcasting():
            tx = read_tx(event.raw)
            _require(tx.txid == event.txid, "the reclaim's bytes have another transaction id")
            spends = {txin.outpoint for txin in tx.inputs}
            _require(spends <= set(state.created.inputs) and bool(spends), "the reclaim spends other coins")
            return replace(state, reclaims=(*state.reclaims, event), reclaim_requested=None)
        case ev.CoinsReleased():
            _require(not state.coins_released, "the coins were given back before")
            return replace(state, coins_released=True)
        case ev.Closed():
            _require(state.coins_released, "the coins are still leased")
            return replace(state, closed=event, stage=s.CLOSED)
        case _:
            raise IllegalEvent(f"{type(event).__name__} is no event of a sender")
