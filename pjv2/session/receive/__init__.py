"""The receiver: what it needs, and what follows from an answer, a command, or the passing of time.

- `life`       states, the table of transitions, `evolve`
- `poll`       waiting for an Original, judging it
- `propose`    coins, channels, draft, signature, post
- `refuse`     the refusal, and the end of a session that refused
- `evidence`   whether a proposal left: chain, node, mailbox
- `release`    channels and coins given back
- `broadcasts` the Original, the way out, a child
- `close`      the end

Law: `decide` answers with events and nothing else; an answer that no longer fits the state is dropped in silence, and a command that
cannot be followed says what to do instead. A worker judges by its own snapshot (M21).
"""

from __future__ import annotations

from dataclasses import replace
from typing import assert_never

from pjv2.errors import ReplyCode, WrongUsage
from pjv2.psbt.original import OriginalFacts
from pjv2.session import events as ev
from pjv2.session.events import Event
from pjv2.session.facts import ChainView, Inspection
from pjv2.session.monitor import Look, covered, look, news, read_view
from pjv2.session.needs import (
    Approve,
    BroadcastAnswer,
    BroadcastNow,
    Cancel,
    ChannelsCleared,
    ChannelsCommitted,
    ChannelsOffered,
    CoinsFound,
    CoinsFreed,
    CoinsHeld,
    Command,
    Decline,
    Delivered,
    Input,
    InputsSeen,
    Memory,
    Need,
    Needs,
    PeerTaken,
    Polled,
    Reclaim,
    ReplyRead,
    SignedPsbt,
    Tick,
    Watch,
)
from pjv2.session.receive import broadcasts, close, poll, propose, refuse, release
from pjv2.session.receive.life import TRANSITIONS as TRANSITIONS
from pjv2.session.receive.life import Receiver as Receiver
from pjv2.session.receive.life import Stage as Stage
from pjv2.session.receive.life import evolve as evolve
from pjv2.session.receive.life import once
from pjv2.session.receive.propose import approve_until as approve_until
from pjv2.session.receive.propose import awaits_approval as awaits_approval
from pjv2.session.receive.propose import cold_obstacle as cold_obstacle
from pjv2.units import Entropy, Instant

PROPOSING = (
    Stage.CHECKED_ORIGINAL,
    Stage.RESERVING_CHANNELS,
    Stage.WANTS_PROPOSAL,
    Stage.SECURING_CHANNELS,
    Stage.PROVISIONAL_PROPOSAL,
    Stage.PAYJOIN_PROPOSAL,
)
MONITORING = (Stage.POSTING_PROPOSAL, Stage.PENDING_FALLBACK, Stage.MONITOR)


# ---------------------------------------------------------------- needs


def needs(state: Receiver, now: Instant, memory: Memory) -> Needs:  # noqa: PLR0912  # one return per case
    """What a receiver wants from the world now; deterministic."""
    seen = look(state.stakes, memory, now)
    due: list[Need] = []
    watch = watching(state, now)
    if state.stage is Stage.CLOSED:
        due = [watch, *close.swept(state, now, seen, memory)] if watch is not None else []
        return Needs(tuple(due), state.watch_over if watch is not None else None)
    match state.stage:
        case Stage.INITIALIZED:
            due += poll.initialized_needs(state, now, seen, memory)
        case Stage.UNCHECKED_ORIGINAL:
            due += poll.unchecked_needs(state)
        case Stage.HAS_REPLYABLE_ERROR:
            due += refuse.post_refusal(state, now)
            due += refuse.refused_needs(state, now, seen, memory)
        case Stage.RELEASING_CHANNELS:
            due += release.releasing_needs(state, now, seen, memory)
        case Stage.POSTING_PROPOSAL:
            due += propose.post_proposal(state, now)
        case Stage.PENDING_FALLBACK:
            due += refuse.post_refusal(state, now)
        case Stage.MONITOR:
            pass
        case _:
            due += propose.proposing_needs(state, now, propose.is_own(state, memory))
    if state.stage in MONITORING:
        due += close.evidence_needs(state, now, seen, memory)
        if seen is not None and release.coins_free(state, now, seen, memory):
            due += release.release_coins(state)
    if state.stage in MONITORING or state.stage is Stage.RELEASING_CHANNELS:
        due += broadcasts.own_money_needs(state, now, seen, memory)
        due += release.renewal(state, now, seen)
    if state.stage not in (Stage.INITIALIZED, Stage.UNCHECKED_ORIGINAL, Stage.HAS_REPLYABLE_ERROR):
        due += broadcasts.due_broadcasts(state, now, seen)
    if watch is not None:
        due.append(watch)
    return Needs(tuple(dict.fromkeys(due)), _wake_at(state, now))


def watching(state: Receiver, now: Instant) -> Watch | None:
    """The address from `Created` on, and 30 days past expiry; the Original's inputs once there is one."""
    if state.stage is Stage.CLOSED and now >= state.watch_over:
        return None
    return state.stakes.watch()


def _wake_at(state: Receiver, now: Instant) -> Instant | None:
    """The next moment at which time alone changes what is due."""
    created = state.created
    times = [created.expires, state.watch_over]
    if state.stage in PROPOSING:
        times += [
            created.expires - propose.CHANNEL_SECONDS,
            created.expires - propose.PLAIN_SECONDS,
            state.mailbox_gone,
        ]
    until = propose.approve_until(state)
    if until is not None and state.stage is Stage.CHECKED_ORIGINAL and awaits_approval(state):
        times.append(until)
    if state.posting is not None or state.found:
        times.append(state.deadline)
    later = [float(at) for at in times if at > now]
    return min(later) if later else None


# ---------------------------------------------------------------- decide


def decide(state: Receiver, input: Input, now: Instant, rng: Entropy, memory: Memory) -> list[Event]:
    """The events that follow from one input; [] when nothing does. Raises WrongUsage for a command that cannot be."""
    if isinstance(input, Approve | Decline | Cancel | BroadcastNow | Reclaim):
        return command(state, input, now, rng)
    if isinstance(input, ChainView):
        return _viewed(state, input, now, memory)
    if state.stage is Stage.CLOSED:
        return []
    if isinstance(input, Tick):
        return tick(state, now, rng, memory)
    if state.stage in PROPOSING:
        return _proposing(state, input, now, rng, memory)
    return _elsewhere(state, input, now, rng, memory)


def tick(state: Receiver, now: Instant, rng: Entropy, memory: Memory) -> list[Event]:  # noqa: PLR0911  # one return per case
    """What time and flags lead to, given the latest look at the chain."""
    if not state.expired and now >= state.created.expires:
        return [ev.ExpiryPassed(now)]
    seen = look(state.stakes, memory, now)
    match state.stage:
        case Stage.INITIALIZED:
            return poll.initialized_tick(state, now, seen, memory)
        case Stage.UNCHECKED_ORIGINAL:
            return poll.unchecked_tick(state, now)
        case Stage.HAS_REPLYABLE_ERROR:
            return refuse.refused_tick(state, now, rng, seen, memory)
        case Stage.RELEASING_CHANNELS:
            events = release.releasing_tick(state, now, seen, memory)
            return events or _fallback(state, now, seen)
        case Stage.POSTING_PROPOSAL | Stage.PENDING_FALLBACK | Stage.MONITOR:
            return close.monitor_tick(state, now, seen, memory)
        case Stage.CLOSED:
            return []
        case _:
            return propose.proposing_tick(state, now, rng, seen, propose.is_own(state, memory))


def _fallback(state: Receiver, now: Instant, seen: Look | None) -> list[Event]:
    if seen is None or state.fallback is None or state.fallback_broadcasting:
        return []
    wanted = broadcasts.fallback_wanted(state, now, seen)
    return [ev.FallbackBroadcasting(now, state.fallback.txid)] if wanted else []


def _viewed(state: Receiver, view: ChainView, now: Instant, memory: Memory) -> list[Event]:
    """News; after `Closed` a payment that nobody waits for any more."""
    covers = memory.watched is not None and covered(state.stakes.watch(), memory.watched)
    seen = read_view(state.stakes, view, covers=covers)
    if state.stage is not Stage.CLOSED:
        return news(state.sightings, seen, now)
    known = {entry.txid for entry in state.sightings} | set(state.late)
    if state.closed is not None and state.closed.txid is not None:
        known.add(state.closed.txid)
    return [
        ev.LatePayment(now, sight.txid, sight.amount)
        for sight in seen.sights
        if sight.height is not None and sight.amount > 0 and sight.txid not in known
    ]


def _proposing(state: Receiver, input: Input, now: Instant, rng: Entropy, memory: Memory) -> list[Event]:  # noqa: PLR0911, PLR0912  # one return per case
    """Answers on the way to a proposal; what stops it comes first."""
    own = propose.is_own(state, memory)
    held_up = propose.proposing_tick(state, now, rng, look(state.stakes, memory, now), own)
    if held_up:
        return list(held_up)
    if state.stage is Stage.CHECKED_ORIGINAL and awaits_approval(state):
        return []
    match state.stage, input:
        case Stage.CHECKED_ORIGINAL, CoinsFound():
            return propose.coins_found(state, input, now, rng)
        case Stage.CHECKED_ORIGINAL, CoinsHeld():
            return propose.coins_held(state, input, now, rng)
        case Stage.CHECKED_ORIGINAL, Inspection():
            return propose.draft_cold(state, input, now, rng)
        case Stage.CHECKED_ORIGINAL, PeerTaken(peer=peer):
            return propose.peer_taken(state, peer, now)
        case Stage.RESERVING_CHANNELS, ChannelsOffered():
            return propose.channels_offered(state, input, now, own)
        case Stage.WANTS_PROPOSAL, Inspection():
            return propose.draft_with_channels(state, input, now, rng, own)
        case Stage.SECURING_CHANNELS, ChannelsCommitted():
            return propose.channels_committed(state, input, now, own)
        case Stage.SECURING_CHANNELS, Inspection():
            return propose.secured_after_all(state, input, now, own)
        case Stage.PROVISIONAL_PROPOSAL, Inspection():
            return propose.strangers_found(state, input, now)
        case Stage.PROVISIONAL_PROPOSAL, SignedPsbt():
            return propose.signed(state, input, now)
        case Stage.PAYJOIN_PROPOSAL, CoinsHeld():
            return propose.hold_before_post(state, input, now, rng)
        case Stage.PAYJOIN_PROPOSAL, Inspection():
            return propose.ready_to_post(state, input, now, rng)
        case _:
            return []


def _elsewhere(state: Receiver, input: Input, now: Instant, rng: Entropy, memory: Memory) -> list[Event]:  # noqa: PLR0911, PLR0912  # one return per case
    seen = look(state.stakes, memory, now)
    match input:
        case Polled() if state.stage is Stage.INITIALIZED:
            return poll.polled(state, input, now)
        case OriginalFacts() if state.stage is Stage.UNCHECKED_ORIGINAL:
            return poll.judge(state, input, now)
        case InputsSeen() if state.stage is Stage.UNCHECKED_ORIGINAL:
            return poll.inputs_seen(input, now)
        case Delivered() if state.stage is Stage.POSTING_PROPOSAL:
            return propose.delivered(state, input, now)
        case Delivered() if state.stage in (Stage.PENDING_FALLBACK, Stage.HAS_REPLYABLE_ERROR):
            return refuse.refusal_delivered(state, input, now)
        case ChannelsCleared() if state.stage is Stage.RELEASING_CHANNELS:
            return release.channels_cleared(state, input, now, seen)
        case ReplyRead():
            return tick(state, now, rng, replace(memory, reply=input, reply_seq=state.seq))
        case Inspection():
            return tick(state, now, rng, replace(memory, inspection=input, inspection_seq=state.seq))
        case SignedPsbt():
            return broadcasts.own_money_signed(state, input, now, seen, memory)
        case BroadcastAnswer():
            return broadcasts.broadcast_answered(state, input, now)
        case CoinsFreed(coins=coins) if state.stage in MONITORING and coins == state.own_coins:
            free = seen is not None and release.coins_free(state, now, seen, memory)
            return [ev.CoinsReleased(now)] if free else []
        case CoinsHeld(missing=missing) if missing:
            return once(state, "coins", f"the wallet does not hold {missing[0]} for this session any more", now)
        case _:
            return []


# ---------------------------------------------------------------- commands


def command(state: Receiver, wish: Command, now: Instant, rng: Entropy) -> list[Event]:
    """What a person asks for. Raises WrongUsage with what to do instead."""
    if state.stage is Stage.CLOSED:
        outcome = state.closed.outcome if state.closed is not None else "closed"
        raise WrongUsage(f"session {state.session} has ended ({outcome}): nothing about it can be changed")
    match wish:
        case Cancel(broadcast=wanted):
            if state.cancelled and state.no_broadcast is not wanted:
                return []
            return [ev.CancelRequested(now, wanted)]
        case BroadcastNow():
            if state.accepted is None and not state.found:
                raise WrongUsage(
                    f"session {state.session} holds no accepted Original, so there is nothing to broadcast"
                )
            return [] if state.broadcast_now and not state.no_broadcast else [ev.BroadcastRequested(now)]
        case Approve():
            _awaiting_approval(state)
            until = propose.approve_until(state)
            if until is not None and now >= until:
                raise WrongUsage(
                    f"session {state.session} could be approved until {int(now - until)} seconds ago: the payer's Original pays"
                )
            return [ev.Approved(now)]
        case Decline():
            _awaiting_approval(state)
            return [refuse.seal_refusal(state, ReplyCode.UNAVAILABLE, now, rng)]
        case Reclaim():
            raise WrongUsage("only a payment that this wallet sends can be reclaimed: cancel the request instead")
        case _:
            assert_never(wish)


def _awaiting_approval(state: Receiver) -> None:
    if state.stage is not Stage.CHECKED_ORIGINAL or not awaits_approval(state):
        raise WrongUsage(f"session {state.session} is {state.stage} and waits for nobody's approval")
