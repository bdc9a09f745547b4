"""A receiver's states, the table of its transitions, and `evolve`: the only way its state changes.

```
Initialized -> UncheckedOriginal -> CheckedOriginal -+-> ReservingChannels -> WantsProposal -> SecuringChannels -+
      |               |                ^   |         |          |                  |               |            |
      |               v                |   |         +-----------------------------------------------> ProvisionalProposal
      |        HasReplyableError       |   |                    v                  v               v            |
      |               |                +---+--------------- ReleasingChannels <----------------------- PayjoinProposal
      |               +- - - - - - - - - - v- - - - - - - - - - | - > found                                     v
      +---------> Closed <---------- PendingFallback <----------+ <--- Monitor <------------------------ PostingProposal
```

It refuses an event that the table does not list for the state, and one whose content contradicts the state: a damaged log is not
read half. Nothing here knows a clock, a socket or a database.

Law: `TRANSITIONS` is session-model.md 2.2; live use and replay share `evolve`; an illegal event leaves the state unchanged.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from enum import StrEnum
from functools import lru_cache
from typing import Final

from pjv2.errors import IllegalEvent, PayjoinError
from pjv2.psbt.original import (
    CheckedOriginal,
    OriginalPayload,
    ReceiverTerms,
    parse_original,
    restore_original,
    restore_payload,
)
from pjv2.psbt.plan import ChannelPlan, OutputRole
from pjv2.psbt.proposal import restore_proposal
from pjv2.psbt.tx import Psbt, Tx
from pjv2.session import events as ev
from pjv2.session.facts import NodeChannel
from pjv2.session.monitor import Draft, Sighting, Stakes, bare_txid, coin_outpoints, note_seen, note_unseen, read_tx
from pjv2.session.needs import Mailbox
from pjv2.units import Instant, Outpoint, Sats, SessionId, Txid
from pjv2.wire.mailbox import short_id
from pjv2.wire.secp import PublicKey, SecretKey


class Stage(StrEnum):
    """The states of session-model.md 2.1, by the question that is still open; persisted by name."""

    INITIALIZED = "Initialized"
    UNCHECKED_ORIGINAL = "UncheckedOriginal"
    CHECKED_ORIGINAL = "CheckedOriginal"
    RESERVING_CHANNELS = "ReservingChannels"
    WANTS_PROPOSAL = "WantsProposal"
    SECURING_CHANNELS = "SecuringChannels"
    PROVISIONAL_PROPOSAL = "ProvisionalProposal"
    PAYJOIN_PROPOSAL = "PayjoinProposal"
    POSTING_PROPOSAL = "PostingProposal"
    RELEASING_CHANNELS = "ReleasingChannels"
    PENDING_FALLBACK = "PendingFallback"
    HAS_REPLYABLE_ERROR = "HasReplyableError"
    MONITOR = "Monitor"
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

_FALLBACK: Final = (ev.FallbackBroadcasting, ev.FallbackBroadcasted, ev.FallbackRejected)


def _table() -> dict[tuple[Stage, type[ev.Event]], tuple[Stage, ...]]:
    s = Stage
    table: dict[tuple[Stage, type[ev.Event]], tuple[Stage, ...]] = {
        (s.INITIALIZED, ev.OriginalReceived): (s.UNCHECKED_ORIGINAL,),
        (s.INITIALIZED, ev.Closed): (s.CLOSED,),
        (s.UNCHECKED_ORIGINAL, ev.OriginalAccepted): (s.CHECKED_ORIGINAL,),
        (s.UNCHECKED_ORIGINAL, ev.OriginalRefused): (s.HAS_REPLYABLE_ERROR,),
        (s.CHECKED_ORIGINAL, ev.Approved): (s.CHECKED_ORIGINAL,),
        (s.CHECKED_ORIGINAL, ev.CoinsReserved): (s.CHECKED_ORIGINAL,),
        (s.CHECKED_ORIGINAL, ev.ChannelsIntended): (s.RESERVING_CHANNELS,),
        (s.CHECKED_ORIGINAL, ev.ProposalDrafted): (s.PROVISIONAL_PROPOSAL,),
        (s.CHECKED_ORIGINAL, ev.RefusalPosting): (s.PENDING_FALLBACK,),
        (s.CHECKED_ORIGINAL, ev.ProposingStopped): (s.PENDING_FALLBACK,),
        (s.CHECKED_ORIGINAL, ev.ProposalFound): (s.MONITOR,),
        (s.RESERVING_CHANNELS, ev.ChannelsReserved): (s.WANTS_PROPOSAL,),
        (s.RESERVING_CHANNELS, ev.ChannelsReleasing): (s.RELEASING_CHANNELS,),
        (s.WANTS_PROPOSAL, ev.ProposalDrafted): (s.SECURING_CHANNELS,),
        (s.WANTS_PROPOSAL, ev.ChannelsReleasing): (s.RELEASING_CHANNELS,),
        (s.SECURING_CHANNELS, ev.ChannelsSecured): (s.PROVISIONAL_PROPOSAL,),
        (s.SECURING_CHANNELS, ev.ChannelsReleasing): (s.RELEASING_CHANNELS,),
        (s.PROVISIONAL_PROPOSAL, ev.ProposalSigned): (s.PAYJOIN_PROPOSAL,),
        (s.PAYJOIN_PROPOSAL, ev.ProposalPosting): (s.POSTING_PROPOSAL,),
        (s.POSTING_PROPOSAL, ev.ProposalPosted): (s.MONITOR,),
        (s.RELEASING_CHANNELS, ev.ChannelsReleased): (
            s.CHECKED_ORIGINAL,
            s.PENDING_FALLBACK,
            s.MONITOR,
            s.POSTING_PROPOSAL,
        ),
        (s.RELEASING_CHANNELS, ev.ProposalFound): (s.MONITOR,),
        (s.RELEASING_CHANNELS, ev.WayOutBroadcasting): (s.RELEASING_CHANNELS,),
        (s.PENDING_FALLBACK, ev.RefusalPosted): (s.PENDING_FALLBACK,),
        (s.PENDING_FALLBACK, ev.CoinsReleased): (s.PENDING_FALLBACK,),
        (s.PENDING_FALLBACK, ev.WayOutBroadcasting): (s.PENDING_FALLBACK,),
        (s.PENDING_FALLBACK, ev.ProposalFound): (s.MONITOR,),
        (s.PENDING_FALLBACK, ev.Closed): (s.CLOSED,),
        (s.HAS_REPLYABLE_ERROR, ev.RefusalPosting): (s.HAS_REPLYABLE_ERROR,),
        (s.HAS_REPLYABLE_ERROR, ev.RefusalPosted): (s.HAS_REPLYABLE_ERROR,),
        (s.HAS_REPLYABLE_ERROR, ev.ProposalFound): (s.MONITOR,),
        (s.HAS_REPLYABLE_ERROR, ev.Closed): (s.CLOSED,),
        (s.CLOSED, ev.LatePayment): (s.CLOSED,),
    }
    for stage in (s.PROVISIONAL_PROPOSAL, s.PAYJOIN_PROPOSAL):
        table[stage, ev.ChannelsReleasing] = (s.RELEASING_CHANNELS,)
        table[stage, ev.ProposingStopped] = (s.PENDING_FALLBACK,)
        table[stage, ev.ProposalFound] = (s.MONITOR,)
    for stage in (s.POSTING_PROPOSAL, s.MONITOR):
        table[stage, ev.WayOutBroadcasting] = (stage,)
        table[stage, ev.ChannelsReleasing] = (s.RELEASING_CHANNELS,)
        table[stage, ev.CoinsReleased] = (stage,)
        table[stage, ev.Closed] = (s.CLOSED,)
    for stage in (s.POSTING_PROPOSAL, s.MONITOR, s.PENDING_FALLBACK, s.RELEASING_CHANNELS):
        for kind in _FALLBACK:
            table[stage, kind] = (stage,)
    for stage in s:
        if stage is not s.CLOSED:
            for flag in FLAGS:
                table[stage, flag] = (stage,)
    return table


TRANSITIONS: Final[Mapping[tuple[Stage, type[ev.Event]], tuple[Stage, ...]]] = _table()
"""Which event leads where. `ChannelsReleased` goes by what `ChannelsReleasing.next` said: plan and plain to CheckedOriginal, end to
PendingFallback, dead back to where it came from."""


@dataclass(frozen=True, slots=True)
class Receiver:
    """A receiver as its log tells it. `seq` is the number of events applied; every other field is named after what set it."""

    created: ev.ReceiverCreated = field(repr=False)
    mailbox: Mailbox = field(repr=False)
    """Where the payer writes."""
    stage: Stage = Stage.INITIALIZED
    seq: int = 1
    updated: float = 0.0
    # flags
    cancelled: bool = False
    no_broadcast: bool = False
    broadcast_now: bool = False
    expired: bool = False
    polled_out: bool = False
    found: bool = False
    found_channels: tuple[Outpoint, ...] = ()
    spoiled: str | None = None
    sightings: tuple[Sighting, ...] = ()
    alarms: tuple[tuple[str, str], ...] = ()
    # the Original
    original: ev.OriginalReceived | None = field(default=None, repr=False)
    payload: OriginalPayload | None = field(default=None, repr=False)
    accepted: ev.OriginalAccepted | None = field(default=None, repr=False)
    checked: CheckedOriginal | None = field(default=None, repr=False)
    refused: ev.OriginalRefused | None = None
    refusal: ev.RefusalPosting | None = field(default=None, repr=False)
    refusal_posted: bool = False
    approved: bool = False
    stopped: ev.ProposingStopped | None = None
    # coins
    coins: ev.CoinsReserved | None = field(default=None, repr=False)
    coins_known: frozenset[Outpoint] = frozenset()
    coins_released: bool = False
    # channels
    attempts: int = 0
    plain: bool = False
    plan: ChannelPlan | None = None
    failed: frozenset[int] = frozenset()
    intended: ev.ChannelsIntended | None = field(default=None, repr=False)
    intended_seq: int = -1
    reserved: ev.ChannelsReserved | None = field(default=None, repr=False)
    secured: ev.ChannelsSecured | None = field(default=None, repr=False)
    secure_called: bool = False
    releasing: ev.ChannelsReleasing | None = None
    releasing_from: Stage | None = None
    releasing_seq: int = -1
    # the proposal
    drafted: ev.ProposalDrafted | None = field(default=None, repr=False)
    drafted_seq: int = -1
    drafts: tuple[Draft, ...] = field(default=(), repr=False)
    signed: ev.ProposalSigned | None = field(default=None, repr=False)
    posting: ev.ProposalPosting | None = field(default=None, repr=False)
    posted: ev.ProposalPosted | None = None
    # afterwards
    entered: int = 1
    """`seq` after the event that led into the present stage: evidence from before it is too old."""
    fallback_broadcasting: bool = False
    fallback_broadcasted: bool = False
    fallback_rejected: str | None = None
    rejected_at: float = 0.0
    way_outs: tuple[ev.WayOutBroadcasting, ...] = field(default=(), repr=False)
    children: tuple[ev.ChildBroadcasting, ...] = field(default=(), repr=False)
    closed: ev.Closed | None = None
    late: tuple[Txid, ...] = ()

    role = "receiver"

    @property
    def session(self) -> SessionId:
        return self.created.session

    @property
    def memo(self) -> str:
        """Our recovery tag on channels: the node shows it to us alone."""
        return f"pj:{self.created.session}"

    @property
    def reply_mailbox(self) -> Mailbox:
        """Where our answer goes: the payer's reply mailbox, or for a v1 payer, who waits there, our own."""
        if self.original is None or self.original.reply_key is None:
            return self.mailbox
        return Mailbox(self.created.directory, self.created.keys, short_id(PublicKey.parse(self.original.reply_key)))

    @property
    def v1(self) -> bool:
        return self.original is not None and self.original.reply_key is None

    @property
    def own_coins(self) -> tuple[Outpoint, ...]:
        """Coins this session has reserved and not released."""
        if self.coins is None or self.coins_released:
            return ()
        return coin_outpoints(self.coins.coins)

    @property
    def scripts(self) -> frozenset[bytes]:
        """Every script of this session that a payment may arrive at: only these count."""
        found = [self.created.script]
        if self.coins is not None and self.coins.scripts.deposit is not None:
            found.append(self.coins.scripts.deposit)
        if self.created.cold is not None and self.original is not None:
            # Nobody was told of it before an Original came: what arrives there earlier is no payment of this request.
            found.append(self.created.cold.script)
        return frozenset(found)

    @property
    def draft(self) -> Draft | None:
        """The proposal under way, or posted."""
        return self.drafts[-1] if self.drafted is not None else None

    @property
    def pays_cold(self) -> bool:
        """The proposal under way, or posted, sends the payment to the cold address."""
        cold = self.created.cold
        return (
            cold is not None
            and self.drafted is not None
            and any(output.script == cold.script for output in self.drafted.intent.outputs)
        )

    @property
    def channels_pending(self) -> bool:
        """Channels of the present draft may be at the node, and no release was recorded."""
        return self.drafted is not None and bool(self.drafted.funding)

    @property
    def deadline(self) -> float:
        """When the Original goes out although a proposal was posted."""
        return self.created.expires + self.created.policy.fallback_after

    @property
    def watch_over(self) -> float:
        return self.created.expires + self.created.policy.watch_after_expiry

    @property
    def mailbox_gone(self) -> float:
        """When the directory may have pruned the reply mailbox (ttl): nothing is posted any more."""
        return (self.original.at if self.original is not None else self.created.at) + self.created.policy.mailbox_ttl

    @property
    def silence_counts_until(self) -> float:
        """How long an empty reply mailbox says that nothing was posted. A restored log fetches the Original a second time, long after
        the first, so this counts from the earliest moment at which the mailbox can have been written."""
        return self.created.at + self.created.policy.mailbox_ttl

    @property
    def fallback(self) -> Tx | None:
        """The Original's transaction, accepted; or refused, and well formed: an older log may have accepted it before a restore."""
        if self.checked is not None:
            return self.checked.tx
        if self.refused is not None and self.payload is not None:
            return self.payload.psbt.extract()
        return None

    @property
    def inputs(self) -> tuple[Outpoint, ...]:
        """What the Original spends."""
        fallback = self.fallback
        return tuple(txin.outpoint for txin in fallback.inputs) if fallback is not None else ()

    @property
    def stakes(self) -> Stakes:
        created, fallback = self.created, self.fallback
        return Stakes(
            since=created.height,
            scripts=self.scripts,
            original=fallback.txid if fallback is not None else None,
            original_bare=bare_txid(fallback) if fallback is not None else None,
            inputs=frozenset(self.inputs),
            drafts=self.drafts,
            coins=self.coins_known,
            way_outs=frozenset(entry.txid for entry in self.way_outs),
            children=frozenset(child.txid for child in self.children),
            bumped=frozenset(txin.outpoint for child in self.children for txin in read_tx(child.raw).inputs),
        )


def terms_of(created: ev.ReceiverCreated) -> ReceiverTerms:
    policy = created.policy
    return ReceiverTerms(
        script=created.script,
        amount=created.amount,
        min_fee_rate=policy.min_fee_rate,
        max_fee_rate=policy.max_fee_rate,
        max_fee_share_ppm=policy.max_fee_share_ppm,
        min_amount=policy.min_amount,
    )


def begin(event: ev.ReceiverCreated) -> Receiver:
    """The state after `Created`. Raises IllegalEvent when its receiver key is none."""
    try:
        key = SecretKey(event.receiver_key).public
    except PayjoinError as exc:
        raise IllegalEvent("Created holds no valid receiver key") from exc
    mailbox = Mailbox(event.directory, event.keys, short_id(key))
    return Receiver(created=event, mailbox=mailbox, plan=event.plan, updated=event.at)


def evolve(state: Receiver, event: ev.Event) -> Receiver:
    """The state after an event. Raises IllegalEvent: not in the table, or contradicting the state, which stays as it is."""
    allowed = TRANSITIONS.get((state.stage, type(event)))
    if allowed is None:
        raise IllegalEvent(f"{type(event).__name__} is no event of a receiver in {state.stage}")
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


# A live append and the replay before it read the same bytes: parsing a PSBT is most of what an event costs.
@lru_cache(maxsize=64)
def _read_original(body: bytes, v1: bool) -> OriginalPayload:
    return parse_original(body, v1=v1)


@lru_cache(maxsize=64)
def _bare_of(psbt: bytes) -> Txid:
    return bare_txid(Psbt.parse(psbt).tx)


def _require(fits: bool, what: str) -> None:
    if not fits:
        raise IllegalEvent(what)


def _apply(state: Receiver, event: ev.Event) -> Receiver:  # noqa: PLR0911, PLR0912, PLR0915  # one return per case
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
        case ev.OriginalReceived():
            return _original_received(state, event)
        case ev.OriginalAccepted():
            return _original_accepted(state, event)
        case ev.OriginalRefused():
            return replace(state, refused=event, stage=s.HAS_REPLYABLE_ERROR)
        case ev.RefusalPosting():
            _require(state.refusal is None, "a refusal was announced before, and a mailbox has one content")
            stage = s.PENDING_FALLBACK if state.stage is s.CHECKED_ORIGINAL else state.stage
            return replace(state, refusal=event, stage=stage)
        case ev.RefusalPosted():
            _require(state.refusal is not None, "no refusal was announced")
            return replace(state, refusal_posted=True)
        case ev.Approved():
            return replace(state, approved=True)
        case ev.CoinsReserved():
            known = state.coins_known | frozenset(coin_outpoints(event.coins))
            return replace(state, coins=event, coins_known=known, coins_released=False)
        case ev.ChannelsIntended():
            return _intended(state, event)
        case ev.ChannelsReserved():
            return _reserved(state, event)
        case ev.ProposalDrafted():
            return _drafted(state, event)
        case ev.ChannelsSecured():
            return _secured(state, event)
        case ev.ProposalSigned(psbt=psbt):
            _require(state.draft is not None, "no proposal was drafted")
            bare = _bare_of(psbt)
            _require(state.draft is not None and bare == state.draft.bare, "the signed proposal is another transaction")
            return replace(state, signed=event, stage=s.PAYJOIN_PROPOSAL)
        case ev.ProposalPosting():
            _require(
                not state.channels_pending or state.secured is not None, "a channel of this proposal is not secured"
            )
            return replace(state, posting=event, stage=s.POSTING_PROPOSAL)
        case ev.ProposalPosted():
            return replace(state, posted=event, stage=s.MONITOR)
        case ev.ProposingStopped():
            _require(not state.channels_pending, "a proposal with channels ends by releasing them")
            return replace(state, stopped=event, drafted=None, signed=None, stage=s.PENDING_FALLBACK)
        case ev.ProposalFound(channels=channels):
            return replace(state, found=True, found_channels=channels, stage=s.MONITOR)
        case ev.ChannelsReleasing():
            return _releasing(state, event)
        case ev.ChannelsReleased():
            return _released(state)
        case ev.WayOutBroadcasting():
            spent = {txin.outpoint for txin in read_tx(event.raw).inputs}
            _require(read_tx(event.raw).txid == event.txid, "the way out's bytes have another transaction id")
            _require(spent == set(state.own_coins), "the way out does not spend exactly this session's coins")
            return replace(state, way_outs=(*state.way_outs, event))
        case ev.FallbackBroadcasting(txid=txid):
            _require(_is_fallback(state, txid), "the fallback is another transaction")
            return replace(state, fallback_broadcasting=True)
        case ev.FallbackBroadcasted(txid=txid):
            _require(_is_fallback(state, txid), "the fallback is another transaction")
            return replace(state, fallback_broadcasted=True, fallback_rejected=None)
        case ev.FallbackRejected(reason=reason):
            first = event.at if state.fallback_rejected is None else state.rejected_at
            return replace(state, fallback_rejected=reason, rejected_at=first)
        case ev.CoinsReleased():
            _require(bool(state.own_coins), "no coin is reserved")
            return replace(state, coins_released=True)
        case ev.Closed():
            return replace(state, closed=event, stage=s.CLOSED)
        case ev.LatePayment(txid=txid):
            return replace(state, late=(*state.late, txid))
        case _:
            raise IllegalEvent(f"{type(event).__name__} is no event of a receiver")


def _is_fallback(state: Receiver, txid: Txid) -> bool:
    return state.fallback is not None and state.fallback.txid == txid


def _original_received(state: Receiver, event: ev.OriginalReceived) -> Receiver:
    if event.reply_key is not None:
        PublicKey.parse(event.reply_key)
    payload: OriginalPayload | None
    try:
        payload = _read_original(event.body, event.reply_key is None)
    except PayjoinError:
        payload = None  # refused with its code by the next decision
    return replace(state, original=event, payload=payload, stage=Stage.UNCHECKED_ORIGINAL)


def _original_accepted(state: Receiver, event: ev.OriginalAccepted) -> Receiver:
    """What was accepted once is rebuilt from the recorded facts, and must be what the event says; it is not judged again."""
    if state.original is None:
        raise IllegalEvent("no Original was received")
    payload = state.payload or restore_payload(state.original.body, v1=state.v1)
    prevouts = dict(zip(event.inputs, event.prevouts, strict=True))
    checked = restore_original(payload, prevouts, terms_of(state.created), tip=event.height, tip_time=event.tip_time)
    _require(
        (checked.tx.txid, checked.paid, tuple(txin.outpoint for txin in checked.tx.inputs))
        == (event.txid, event.amount, event.inputs),
        "the accepted Original is not the one received",
    )
    return replace(state, payload=payload, accepted=event, checked=checked, stage=Stage.CHECKED_ORIGINAL)


def _intended(state: Receiver, event: ev.ChannelsIntended) -> Receiver:
    ids = len(event.ids)
    _require(event.attempt == state.attempts + 1, "the attempts do not follow each other")
    _require(not state.secure_called and not state.plain, "no channel is planned after a secure call")
    _require(ids == len(event.intent.orders) == len(event.plan.orders) and ids > 0, "one id per channel")
    _require(len(set(event.ids)) == ids, "the channels' ids differ")
    _require(event.intent.coins == (state.coins.coins if state.coins else ()), "the intent spends other coins")
    return replace(
        state,
        attempts=event.attempt,
        plan=event.plan,
        failed=frozenset(),
        intended=event,
        intended_seq=state.seq,
        reserved=None,
        secured=None,
        stage=Stage.RESERVING_CHANNELS,
    )


def _reserved(state: Receiver, event: ev.ChannelsReserved) -> Receiver:
    intended = state.intended
    _require(
        intended is not None
        and tuple(channel.id for channel in event.channels) == intended.ids
        and all(len(channel.script) == 34 for channel in event.channels)
        and tuple(channel.capacity for channel in event.channels) == tuple(o.capacity for o in intended.intent.orders),
        "the reserved channels are not the intended ones",
    )
    return replace(state, reserved=event, stage=Stage.WANTS_PROPOSAL)


def _drafted(state: Receiver, event: ev.ProposalDrafted) -> Receiver:
    checked = state.checked
    if checked is None:
        raise IllegalEvent("there is no accepted Original")
    with_channels = state.stage is Stage.WANTS_PROPOSAL
    _require(bool(event.funding) == with_channels, "channels are drafted only after they were reserved")
    if with_channels and state.reserved is not None:
        scripts = [channel.script for channel in state.reserved.channels]
        _require([entry.script for entry in event.funding] == scripts, "the funding outputs are not the reserved ones")
    provisional = restore_proposal(checked, event.intent, event.psbt, event.funding)
    _require(provisional.txid == event.txid, "the drafted transaction has another id")
    coins = coin_outpoints(event.intent.coins)
    _require(set(provisional.ours) == set(coins), "the draft spends other coins")
    cold = state.created.cold
    ours = {state.created.script, cold.script if cold is not None else state.created.script}
    paid = {output.script for output in event.intent.outputs if output.role is OutputRole.PAYMENT}
    _require(paid <= ours, "the draft sends the payment to a script that is not of this session")
    outputs = sum(output.value for output in event.intent.outputs)
    values = sum(coin.txout.value for coin in event.intent.coins)
    tx = provisional.psbt.tx
    draft = Draft(
        txid=event.txid,
        bare=bare_txid(tx),
        tx=tx,
        inputs=frozenset(txin.outpoint for txin in tx.inputs),
        ours=frozenset(coins),
        channels=tuple(Outpoint(event.txid, entry.vout) for entry in event.funding),
        received=outputs - values,
        fee=sum(txout.value for txout in checked.prevouts) + values - sum(txout.value for txout in tx.outputs),
    )
    return replace(
        state,
        drafted=event,
        drafted_seq=state.seq,
        drafts=(*state.drafts, draft),
        signed=None,
        secured=None,
        secure_called=state.secure_called or with_channels,
        stage=Stage.SECURING_CHANNELS if with_channels else Stage.PROVISIONAL_PROPOSAL,
    )


def _secured(state: Receiver, event: ev.ChannelsSecured) -> Receiver:
    draft, intended = state.draft, state.intended
    _require(
        draft is not None
        and intended is not None
        and tuple(channel.id for channel in event.channels) == intended.ids
        and tuple(channel.outpoint for channel in event.channels) == draft.channels,
        "the secured channels are not those of the drafted transaction",
    )
    return replace(state, secured=event, stage=Stage.PROVISIONAL_PROPOSAL)


def _releasing(state: Receiver, event: ev.ChannelsReleasing) -> Receiver:
    dead = state.stage in (Stage.POSTING_PROPOSAL, Stage.MONITOR)
    _require((event.next == "dead") == dead, f"channels are not released with {event.next} in {state.stage}")
    if not dead:
        # ChannelsReleasing{plan, plain, end} and a later ProposalPosting of the same draft exclude each other (rule 5).
        _require(state.intended is not None, "no channel was ever intended")
        if state.stage in (Stage.SECURING_CHANNELS, Stage.PROVISIONAL_PROPOSAL, Stage.PAYJOIN_PROPOSAL):
            _require(event.next != "plan", "re-planning ends with the first secure call")
            _require(state.channels_pending, "a plain proposal has no channels to release")
    return replace(
        state,
        releasing=event,
        releasing_from=state.stage,
        releasing_seq=state.seq,
        stage=Stage.RELEASING_CHANNELS,
    )


def _released(state: Receiver) -> Receiver:
    releasing = state.releasing
    if releasing is None or state.releasing_from is None:
        raise IllegalEvent("no release was announced")
    failed = frozenset(releasing.failed)
    base = replace(state, releasing=None, intended=None, reserved=None, secured=None)
    match releasing.next:
        case "dead":
            return replace(base, stage=state.releasing_from, drafted=_without_funding(state), found_channels=())
        case "end":
            return replace(base, drafted=None, signed=None, stage=Stage.PENDING_FALLBACK)
        case "plain":
            base = replace(base, drafted=None, signed=None, plain=True, failed=failed)
            return replace(base, stage=Stage.CHECKED_ORIGINAL)
        case "plan":
            return replace(base, drafted=None, signed=None, failed=failed, stage=Stage.CHECKED_ORIGINAL)


def _without_funding(state: Receiver) -> ev.ProposalDrafted | None:
    """The posted proposal, its channels released: it is dead and stays known."""
    return replace(state.drafted, funding=()) if state.drafted is not None else None


def drafted_channels(state: Receiver) -> frozenset[Outpoint]:
    """Every funding outpoint that this log drafted, in any attempt."""
    return frozenset(outpoint for draft in state.drafts for outpoint in draft.channels)


def unlogged(state: Receiver, listed: tuple[NodeChannel, ...]) -> tuple[NodeChannel, ...]:
    """Channels with our memo, pending or open, of a transaction that this log never drafted (M11)."""
    known = {draft.txid for draft in state.drafts}
    return tuple(
        channel
        for channel in listed
        if channel.memo == state.memo
        and channel.state in ("pending", "open")
        and channel.outpoint is not None
        and channel.outpoint.txid not in known
    )


def received(state: Receiver, txid: Txid) -> Sats:
    """What a transaction in sight pays us, as `Seen` recorded it."""
    return next((entry.amount for entry in state.sightings if entry.txid == txid), 0)


def once(state: Receiver, what: str, detail: str, now: Instant) -> list[ev.Event]:
    """An alarm, unless it was raised before."""
    return [] if (what, detail) in state.alarms else [ev.Alarm(now, what, detail)]
