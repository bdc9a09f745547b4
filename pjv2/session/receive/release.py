"""Letting go of channels and coins (session-model.md 3.2 and 3.3).

Law: nothing that a proposal uses is released while that proposal can confirm; a worker judges by its own snapshot (M21).
"""

from __future__ import annotations

from pjv2.session import events as ev
from pjv2.session.monitor import LEASE, Look, coins_settled, lease_until
from pjv2.session.needs import ChannelsCleared, Memory, Need, ReadReply, ReleaseChannels, ReleaseCoins, ReserveCoins
from pjv2.session.receive.evidence import (
    foreign_in_the_way,
    foreign_proposal,
    inspected,
    nothing_left,
    outputs_listed,
    reply_judged,
    with_node,
)
from pjv2.session.receive.life import Receiver, Stage, drafted_channels, unlogged
from pjv2.units import Instant, Outpoint

BLOCKED_BLOCKS = 2_016
"""How long a peer holds on to a channel that was pending there and never confirmed (LND)."""


def must_read(state: Receiver, look: Look, memory: Memory) -> bool:
    """3.2, step 2: whether the reply mailbox has to be read before channels are released."""
    releasing = state.releasing
    if releasing is None or releasing.next == "dead" or state.draft is None or not state.channels_pending:
        return False
    if look.burial is not None or look.dead(state.draft):
        return False  # a burial that kills T replaces the read, our own way out included
    failed_secure = state.releasing_from is Stage.SECURING_CHANNELS
    ours = {state.intended_seq, state.drafted_seq, state.releasing_seq} <= memory.own
    return not (failed_secure and ours)


def releasing_needs(state: Receiver, now: Instant, look: Look | None, memory: Memory) -> list[Need]:
    if look is None or not look.covers or state.releasing is None or foreign_in_the_way(state, look, memory):
        return []
    if not _death_in_view(state, look):
        return []
    if must_read(state, look, memory) and not nothing_left(state, memory, now, even_after_ttl=False):
        return [] if state.v1 else [ReadReply(state.reply_mailbox)]
    ids = state.intended.ids if state.intended is not None else ()
    peers = tuple(order.peer for order in state.intended.intent.orders) if state.intended is not None else ()
    return [ReleaseChannels(state.memo, ids, peers, released_channels(state, look))]


def released_channels(state: Receiver, look: Look) -> frozenset[Outpoint]:
    """What may be abandoned: drafted by this log and, once a proposal was posted or found, proved dead by its own txid (M12)."""
    if state.releasing is None:
        return frozenset()
    if state.releasing.next != "dead":
        return drafted_channels(state)
    dead = frozenset(outpoint for draft in state.drafts if look.dead(draft) for outpoint in draft.channels)
    return dead | frozenset(state.releasing.abandon)


def _death_in_view(state: Receiver, look: Look) -> bool:
    """`dead` was another worker's judgement, perhaps: until this one's own view shows the burial it would abandon nothing (M21)."""
    if state.releasing is None or state.releasing.next != "dead":
        return True
    return look.burial is not None or (state.draft is not None and look.dead(state.draft))


def releasing_tick(state: Receiver, now: Instant, look: Look | None, memory: Memory) -> list[ev.Event]:
    if look is None:
        return []
    sight = foreign_in_the_way(state, look, memory)
    if sight is not None:
        return [ev.ProposalFound(now, "chain", f"{sight.txid} is in sight", outputs_listed(state, memory, sight))]
    if state.releasing is not None and must_read(state, look, memory):
        return reply_judged(state, memory, now)
    return []


def channels_cleared(state: Receiver, answer: ChannelsCleared, now: Instant, look: Look | None) -> list[ev.Event]:
    """3.2, steps 4 and 5: what remains with our memo is a proposal that this log does not know, or not done yet."""
    releasing = state.releasing
    if releasing is None or look is None or not _death_in_view(state, look):
        return []
    gone = released_channels(state, look)
    live = [c for c in answer.remaining if c.memo == state.memo and c.state not in ("closed",)]
    strangers = unlogged(state, tuple(live))
    if strangers and not state.found:
        outpoints = tuple(channel.outpoint for channel in strangers if channel.outpoint is not None)
        return [
            ev.ProposalFound(
                now, "node", "the node lists a channel of a proposal that the log does not know", outpoints
            )
        ]
    if any(channel.outpoint is None or channel.outpoint in gone for channel in live):
        return []  # still there: the procedure is repeated
    blocked: tuple[tuple[str, int], ...] = ()
    if state.intended is not None and state.drafted is not None and state.draft is not None:
        orders = state.intended.intent.orders
        blocked = tuple(
            (order.peer, answer.height + BLOCKED_BLOCKS)
            for order, outpoint in zip(orders, state.draft.channels, strict=False)
            if outpoint in answer.abandoned or state.secured is not None
        )
    return [ev.ChannelsReleased(now, blocked)]


def coins_free(state: Receiver, now: Instant, look: Look, memory: Memory) -> bool:  # noqa: PLR0911  # one return per case
    """3.3: whether our coins may be given back."""
    coins = frozenset(state.own_coins)
    if not coins or not coins_settled(look, coins, way_out=bool(state.way_outs)):
        return False
    burial = look.burial
    if state.found:
        return burial is not None and not _alive(state, look)
    if state.stage in (Stage.POSTING_PROPOSAL, Stage.MONITOR):
        if state.draft is None:
            return burial is not None
        sight = look.sight_of(state.draft)
        return (sight is not None and sight.buried) or look.dead(state.draft)
    if state.stage is not Stage.PENDING_FALLBACK:
        return False
    if burial is not None:
        return True
    if foreign_proposal(state, look, memory) is not None:
        return False
    if with_node(state):
        seen = inspected(state, memory)
        if seen is None or unlogged(state, seen.channels):
            return False
    left = nothing_left(state, memory, now, even_after_ttl=True)
    return left is True or (left is None and now >= state.watch_over)


def _alive(state: Receiver, look: Look) -> bool:
    """A proposal of this log can still confirm."""
    return any(not look.dead(draft) for draft in state.drafts if not _is_buried(look, draft.bare))


def _is_buried(look: Look, bare: str) -> bool:
    return any(sight.buried and sight.bare == bare for sight in look.sights)


def renewal(state: Receiver, now: Instant, look: Look | None) -> list[Need]:
    """The wallet's lock, while a transaction that spends the coin may still confirm."""
    coins = state.coins
    if coins is None or not state.own_coins or (look is not None and look.spending(state.own_coins)):
        return []
    until = lease_until(coins.until - LEASE, now)
    inputs = state.accepted.inputs if state.accepted is not None else ()
    if until is None:
        return []
    return [ReserveCoins(state.own_coins, coins.lock_id, until, inputs, state.memo)]


def release_coins(state: Receiver) -> list[Need]:
    return [ReleaseCoins(state.own_coins, state.coins.lock_id)] if state.coins is not None else []
