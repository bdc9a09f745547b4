"""The end of a receiver: what the chain, the deadlines and the flags lead to, and what must be asked before (3.4 and 4).

Law: `Closed` only when no reorg, no posted proposal and no readable mailbox can contradict it; after `found` only by a burial (4.3).
"""

from __future__ import annotations

from pjv2.session import events as ev
from pjv2.session.events import Outcome
from pjv2.session.monitor import Look, Sight
from pjv2.session.needs import Memory, Need, ReadReply, ReleaseChannels
from pjv2.session.receive.broadcasts import fallback_wanted
from pjv2.session.receive.evidence import dead_orphans, inspect, inspected, lost_proposal, nothing_left, with_node
from pjv2.session.receive.life import Receiver, Stage, once
from pjv2.units import Instant


def monitor_tick(state: Receiver, now: Instant, look: Look | None, memory: Memory) -> list[ev.Event]:
    """PendingFallback, PostingProposal and Monitor: what the chain, the deadlines and the flags lead to."""
    if look is None:
        return []
    if state.stage is Stage.PENDING_FALLBACK:
        found = lost_proposal(state, now, look, memory)
        if found:
            return found
    elif release := dead_channels(state, now, look, memory):
        return release
    if fallback_wanted(state, now, look) and not state.fallback_broadcasting and state.fallback is not None:
        return [ev.FallbackBroadcasting(now, state.fallback.txid)]
    closing = close(state, now, look, memory)
    return closing or alarms(state, now, look)


def dead_channels(state: Receiver, now: Instant, look: Look, memory: Memory) -> list[ev.Event]:
    """T is dead: its channels, and after `ProposalFound` every channel that a burial proves dead, are released."""
    draft = state.draft
    if state.found:
        burial, seen = look.burial, inspected(state, memory)
        if burial is None or (with_node(state) and seen is None):
            return []
        orphans = dead_orphans(state, seen.channels if seen is not None else (), burial)
        ours = draft is not None and state.channels_pending and look.dead(draft)
        undrafted = state.intended is not None and not state.channels_pending
        if orphans or ours or undrafted:
            return [ev.ChannelsReleasing(now, "dead", f"{burial.txid} is buried", abandon=orphans)]
        return []
    if draft is not None and state.channels_pending and look.dead(draft):
        return [ev.ChannelsReleasing(now, "dead", "an input of the proposal is buried in another transaction")]
    return []


def close(state: Receiver, now: Instant, look: Look, memory: Memory) -> list[ev.Event]:  # noqa: PLR0911  # one return per case
    """3.4: nothing of ours is bound any more, and nothing can contradict the outcome."""
    burial, draft = look.burial, state.draft
    blind = with_node(state) and inspected(state, memory) is None
    if state.own_coins or (blind and (state.found or state.stage is Stage.PENDING_FALLBACK)):
        return []
    paid_by_payjoin = burial is not None and draft is not None and burial.bare == draft.bare
    if (state.channels_pending or (state.found and state.intended is not None)) and not paid_by_payjoin:
        return []
    asked = state.created.amount
    if burial is not None:
        match burial.what:
            case "payjoin":
                known = next(d for d in state.drafts if d.bare == burial.bare)
                return [ev.Closed(now, Outcome.PAID, burial.txid, asked, burial.amount, known.channels)]
            case "original":
                return [ev.Closed(now, Outcome.PAID_BY_FALLBACK, burial.txid, asked, burial.amount)]
            case _:
                return _closed_by_stranger(state, now, burial, memory)
    if state.found or not look.quiet or state.accepted is None:
        return []
    if state.posting is not None and not (draft is not None and look.dead(draft)):
        return []
    left = nothing_left(state, memory, now, even_after_ttl=True)
    if left is False or (left is None and now < state.watch_over):
        return []
    if with_node(state) and inspected(state, memory) is None:
        return []
    if state.cancelled and state.no_broadcast:
        return [ev.Closed(now, Outcome.CANCELLED, None, asked, 0)]
    if state.fallback_rejected is not None and now >= state.watch_over:
        return [ev.Closed(now, Outcome.EXPIRED, None, asked, 0)]
    return []


def _closed_by_stranger(state: Receiver, now: Instant, burial: Sight, memory: Memory) -> list[ev.Event]:
    """B, D, or a proposal this log lost: it paid us if it pays a script of this session or a channel of ours by its outpoint."""
    seen = inspected(state, memory)
    if with_node(state) and seen is None:
        return []
    listed = seen.channels if seen is not None else ()
    channels = tuple(
        channel.outpoint
        for channel in listed
        if channel.memo == state.memo and channel.outpoint is not None and channel.outpoint.txid == burial.txid
    )
    amount = burial.amount + sum(burial.tx.outputs[o.vout].value for o in channels if o.vout < len(burial.tx.outputs))
    outcome = Outcome.PAID_OTHERWISE if amount else Outcome.CONFLICTED
    return [ev.Closed(now, outcome, burial.txid, state.created.amount, amount, channels)]


def evidence_needs(state: Receiver, now: Instant, look: Look | None, memory: Memory) -> list[Need]:
    """What must be asked before coins are given back or the session closes without a burial (M7), or after `ProposalFound`."""
    if look is None or not look.covers:
        return []
    due: list[Need] = []
    strangers = any(sight.what in ("bumped", "conflict") for sight in look.spends_of_original)
    if state.found or strangers:
        # A spend that the log does not know may be a proposal that it lost: the node knows it by its channel point.
        return [inspect(state)] if with_node(state) else []
    if state.stage is not Stage.PENDING_FALLBACK:
        if with_node(state) and state.channels_pending and look.burial is None:
            due.append(inspect(state))  # a channel of T that the node lost means the way out
        if state.posting is not None and not (state.draft is not None and look.dead(state.draft)):
            return due
    if look.burial is not None:
        if state.stage is Stage.PENDING_FALLBACK and with_node(state) and inspected(state, memory) is None:
            due.append(inspect(state))  # a log that lost its channels must not close beside them
        return due
    # Coins have to be released, or the session may close without a burial.
    closing = (state.cancelled and state.no_broadcast) or (
        state.fallback_rejected is not None and now >= state.watch_over
    )
    if not ((closing and look.quiet) or (state.own_coins and state.stage is Stage.PENDING_FALLBACK)):
        return due
    if with_node(state) and inspected(state, memory) is None:
        due.append(inspect(state))
    if not state.v1 and nothing_left(state, memory, now, even_after_ttl=True) is None:
        due.append(ReadReply(state.reply_mailbox))
    return list(dict.fromkeys(due))


def alarms(state: Receiver, now: Instant, look: Look) -> list[ev.Event]:
    """What stays open by nature until a person decides."""
    refused = state.fallback_rejected is not None and look.quiet
    if state.found and refused:
        return once(state, "found", "an unknown proposal is out and the network refuses the Original", now)
    if refused and state.channels_pending and not state.own_coins:
        return once(
            state, "channels", "the network refuses the Original, and no coin of ours can end the channels", now
        )
    return []


def swept(state: Receiver, now: Instant, look: Look | None, memory: Memory) -> list[Need]:
    """After `Closed`: a pending channel with our memo that a burial proves dead is abandoned (4.3)."""
    if not with_node(state) or look is None or look.burial is None:
        return []
    seen = inspected(state, memory)
    orphans = dead_orphans(state, seen.channels, look.burial) if seen is not None else ()
    if orphans:
        return [ReleaseChannels(state.memo, (), (), frozenset(orphans))]
    return [inspect(state)]
