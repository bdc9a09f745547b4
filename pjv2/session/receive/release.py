"""Letting go: channels, coins, the session itself (session-model.md sections 3 and 4.3), and what is broadcast meanwhile.

Before `ProposalPosting` is in the log nothing can have left, unless the log lost its end: a store restored from an older copy. So
every release, and the end of a refusal, looks at the three places where a proposal leaves traces: the chain first, the node, the
reply mailbox. A burial of one of the Original's inputs replaces every other evidence.

Law: nothing that a proposal uses is released while that proposal can confirm; a recorded way out is carried to its end in every state.
"""

from __future__ import annotations

from collections.abc import Sequence

from pjv2.errors import PayjoinError
from pjv2.psbt.plan import OutputRole
from pjv2.psbt.proposal import build_way_out
from pjv2.session import events as ev
from pjv2.session.events import Outcome
from pjv2.session.facts import Inspection, NodeChannel
from pjv2.session.monitor import (
    LEASE,
    STUCK,
    Look,
    Parent,
    Sight,
    accept_child,
    broadcast,
    broadcast_child,
    child_to_sign,
    coins_settled,
    lease_until,
    read_tx,
    signed_transaction,
)
from pjv2.session.needs import (
    Broadcast,
    BroadcastAnswer,
    ChannelsCleared,
    InspectChannels,
    Memory,
    Need,
    ReadReply,
    ReleaseChannels,
    ReleaseCoins,
    ReplyRead,
    ReserveCoins,
    Sign,
    SignedPsbt,
)
from pjv2.session.receive.life import Receiver, Stage, drafted_channels, unlogged
from pjv2.session.receive.poll import once, seal_refusal
from pjv2.units import Entropy, FeeRate, Instant, Outpoint

BLOCKED_BLOCKS = 2_016
"""How long a peer holds on to a channel that was pending there and never confirmed (LND)."""


# ---------------------------------------------------------------- evidence


def own_bytes(state: Receiver, answer: ReplyRead) -> bool:
    """The mailbox holds what this log announced, or nothing: proposal and refusal exclude each other, and so do their bytes."""
    if answer.body is None:
        return True
    announced = [entry.message for entry in (state.posting, state.refusal) if entry is not None]
    return answer.body in announced


def nothing_left(state: Receiver, memory: Memory, now: Instant, *, even_after_ttl: bool) -> bool | None:
    """Whether the reply mailbox shows that no proposal left this house; None: it has not been asked in this state, or cannot be.

    A v1 payer has no reply mailbox, so there is nothing to read: only a burial is evidence then.
    """
    if state.v1 or memory.reply is None or memory.reply_seq < state.entered or not memory.reply.readable:
        return None
    if memory.reply.body is None and now >= state.silence_counts_until and not even_after_ttl:
        return None
    return own_bytes(state, memory.reply)


def inspected(state: Receiver, memory: Memory) -> Inspection | None:
    """The node's list, asked in this very state."""
    return memory.inspection if memory.inspection_seq >= state.entered else None


def with_node(state: Receiver) -> bool:
    """This session may have channels at a node, in any version of its log."""
    return state.created.plan is not None and state.created.node is not None


def foreign_proposal(state: Receiver, look: Look, memory: Memory) -> Sight | None:
    """A proposal of ours in sight: T of an earlier draft, a spend of O's inputs and of a coin of ours, or one that the node lists."""
    posted = state.draft.bare if state.posting is not None and state.draft is not None else None
    seen = inspected(state, memory)
    points = {channel.outpoint.txid for channel in seen.channels if channel.outpoint is not None} if seen else set()
    for sight in look.spends_of_original:
        ours = sight.what == "payjoin" or sight.spends & state.coins_known or sight.txid in points
        if ours and sight.bare != posted:
            return sight
    return None


def inspect(state: Receiver) -> InspectChannels:
    return InspectChannels(state.memo, state.inputs, state.own_coins)


def strangers_listed(state: Receiver, memory: Memory, look: Look) -> list[NodeChannel]:
    """Channels with our memo that this log never drafted; once a burial is in view, those that it proves dead (4.3)."""
    seen = inspected(state, memory)
    strangers = unlogged(state, seen.channels) if seen is not None else ()
    if look.burial is None:
        return list(strangers)
    dead = dead_orphans(state, strangers, look.burial)
    return [channel for channel in strangers if channel.state == "pending" and channel.outpoint in dead]


def lost_proposal(state: Receiver, now: Instant, look: Look, memory: Memory) -> list[ev.Event]:
    """Where nothing was posted: the traces of a proposal that an older log posted, on the chain, at the node, in the mailbox."""
    sight = foreign_in_the_way(state, look, memory)
    if sight is not None:
        return [ev.ProposalFound(now, "chain", f"{sight.txid} is in sight", _outputs_listed(state, memory, sight))]
    outpoints = tuple(c.outpoint for c in strangers_listed(state, memory, look) if c.outpoint is not None)
    if outpoints:
        return [ev.ProposalFound(now, "node", "the node lists a channel that the log does not know", outpoints)]
    return reply_judged(state, memory, now) if look.burial is None else []


# ---------------------------------------------------------------- HasReplyableError


def refused_tick(state: Receiver, now: Instant, rng: Entropy, look: Look | None, memory: Memory) -> list[ev.Event]:
    """The refusal, and the end. What is refused today may have been accepted before the store was restored: before it closes, a
    refused session looks where a proposal leaves traces, as every release does (M7). The refusal itself answers best: a mailbox has
    one content, and where ours stands no proposal was."""
    if state.refusal is None and state.refused is not None and not state.expired:
        return [seal_refusal(state, state.refused.code, now, rng)]
    if not _answered(state) or look is None or not look.covers:
        return []
    return lost_proposal(state, now, look, memory) or _close_refused(state, now, look, memory)


def refused_needs(state: Receiver, now: Instant, look: Look | None, memory: Memory) -> list[Need]:
    if state.payload is None or not _answered(state) or look is None or not look.covers:
        return []
    due: list[Need] = []
    if with_node(state) and inspected(state, memory) is None:
        due.append(inspect(state))
    if look.burial is None and not state.v1 and not _never_accepted(state, memory, now):
        due.append(ReadReply(state.reply_mailbox))
    return due


def _answered(state: Receiver) -> bool:
    """The refusal is out, or nobody waits for it any more."""
    return state.refusal_posted or state.expired


def _close_refused(state: Receiver, now: Instant, look: Look, memory: Memory) -> list[ev.Event]:
    if state.payload is not None and with_node(state) and inspected(state, memory) is None:
        return []
    paid = [sight for sight in look.sights if sight.amount > 0]
    final = [sight for sight in paid if sight.buried]
    if final:
        amount = sum(sight.amount for sight in final)
        return [ev.Closed(now, Outcome.PAID_OTHERWISE, final[0].txid, state.created.amount, amount)]
    decided = look.burial is not None or _never_accepted(state, memory, now) or now >= state.watch_over
    if paid or not decided:
        return []  # a payment is told when it is final
    return [ev.Closed(now, Outcome.REFUSED, None, state.created.amount, 0)]


def _never_accepted(state: Receiver, memory: Memory, now: Instant) -> bool:
    """No log of this session sent a proposal: no log could accept what is no Original; a v1 payer still waited for the answer when
    he got our refusal; or the reply mailbox says so."""
    if state.payload is None or (state.v1 and state.refusal_posted):
        return True
    return nothing_left(state, memory, now, even_after_ttl=True) is True


# ---------------------------------------------------------------- ReleasingChannels


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


def foreign_in_the_way(state: Receiver, look: Look, memory: Memory) -> Sight | None:
    """3.2, step 1: a proposal of ours in sight that no burial has killed. T of this log is one, too, before it was posted."""
    sight = foreign_proposal(state, look, memory)
    burial = look.burial
    if sight is None or state.found or (burial is not None and burial.txid != sight.txid):
        return None
    return sight


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
        return [ev.ProposalFound(now, "chain", f"{sight.txid} is in sight", _outputs_listed(state, memory, sight))]
    if state.releasing is not None and must_read(state, look, memory):
        return reply_judged(state, memory, now)
    return []


def reply_judged(state: Receiver, memory: Memory, now: Instant) -> list[ev.Event]:
    """Content in the reply mailbox that stands against a release is a proposal that left (3.2, step 2)."""
    left = nothing_left(state, memory, now, even_after_ttl=True)
    body = memory.reply.body if memory.reply is not None else None
    refusal = state.refusal.message if state.refusal is not None else None
    if left is False or (left and body is not None and body != refusal):
        return [ev.ProposalFound(now, "mailbox", "the reply mailbox holds a proposal")]
    return []


def _outputs_listed(state: Receiver, memory: Memory, sight: Sight) -> tuple[Outpoint, ...]:
    seen = inspected(state, memory)
    channels = seen.channels if seen is not None else ()
    return tuple(c.outpoint for c in channels if c.outpoint is not None and c.outpoint.txid == sight.txid)


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


# ---------------------------------------------------------------- coins


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


# ---------------------------------------------------------------- broadcasts


def fallback_wanted(state: Receiver, now: Instant, look: Look) -> bool:
    """4.1, row 1: nothing spends O's inputs, and nobody is waited for any more."""
    if state.fallback is None or state.no_broadcast or not look.quiet:
        return False
    over = state.cancelled or state.broadcast_now
    match state.stage:
        case Stage.PENDING_FALLBACK:
            return True
        case Stage.RELEASING_CHANNELS:
            next_ = state.releasing.next if state.releasing is not None else "end"
            return over or state.expired or next_ in ("end", "dead")
        case Stage.POSTING_PROPOSAL | Stage.MONITOR:
            dead = state.draft is not None and not state.found and look.dead(state.draft)
            return over or dead or now >= state.deadline
        case _:
            return False


def broadcasts(state: Receiver, now: Instant, look: Look | None) -> list[Need]:
    """O while it is missing, W until its coin's spend is buried (M20), the newest child while its parent waits."""
    if look is None:
        return []
    due: list[Need] = []
    fallback = state.fallback
    if fallback is not None and state.fallback_broadcasting and fallback_wanted(state, now, look):
        due.append(broadcast("fallback", fallback.txid, fallback.raw))
    way_out = rebroadcast_way_out(state, look)
    if way_out is not None:
        due.append(way_out)
    child = broadcast_child(state.children, look)
    if child is not None:
        due.append(child)
    return due


def rebroadcast_way_out(state: Receiver, look: Look) -> Broadcast | None:
    if not state.way_outs or not state.own_coins or not look.covers:
        return None
    newest = state.way_outs[-1]
    if any(sight.height is not None or sight.txid == newest.txid for sight in look.spending(state.own_coins)):
        return None
    return broadcast("way_out", newest.txid, newest.raw)


def broadcast_answered(state: Receiver, answer: BroadcastAnswer, now: Instant) -> list[ev.Event]:
    if answer.purpose == "way_out" and answer.result.verdict == "refused":
        return once(state, "way out", f"the network refuses the way out: {answer.result.reason}", now)
    if answer.purpose != "fallback" or state.fallback is None or answer.txid != state.fallback.txid:
        return []
    if not state.fallback_broadcasting:
        return []
    if answer.result.verdict != "refused":
        return (
            []
            if state.fallback_broadcasted and not state.fallback_rejected
            else [ev.FallbackBroadcasted(now, answer.txid)]
        )
    reason = answer.result.reason or "the network refused the Original"
    return [] if state.fallback_rejected == reason else [ev.FallbackRejected(now, reason)]


def way_out_reason(state: Receiver, now: Instant, look: Look, memory: Memory) -> str | None:  # noqa: PLR0911  # one return per case
    """Why our coin is spent back to us now (4.1); None: not yet."""
    if not state.own_coins or state.found or not look.covers or state.coins is None or state.accepted is None:
        return None
    if any(sight.height is not None for sight in look.spending(state.own_coins)):
        return None
    since = state.posting.height if state.posting is not None else state.accepted.height
    waited = look.tip - since >= state.created.policy.give_up_blocks
    if state.stage is Stage.RELEASING_CHANNELS:
        asked = memory.reply is not None and memory.reply_seq >= state.entered
        readable = asked and memory.reply is not None and memory.reply.readable
        impossible = state.v1 or now >= state.silence_counts_until or (asked and not readable)
        if waited and impossible and must_read(state, look, memory):
            return "the reply mailbox cannot be read and nobody moved"
        return None
    if state.stage not in (Stage.POSTING_PROPOSAL, Stage.MONITOR) or state.draft is None or look.dead(state.draft):
        return None
    if waited:
        return f"the proposal did not confirm within {state.created.policy.give_up_blocks} blocks"
    # A refusal may only mean that a spend of the same inputs has not come into view yet: O is tried again for a while first.
    if state.fallback_rejected is not None and look.quiet and now - state.rejected_at >= STUCK:
        return f"the network refuses the Original: {state.fallback_rejected}"
    seen = inspected(state, memory)
    if state.channels_pending and seen is not None and seen.listed:
        listed = {channel.outpoint for channel in seen.channels if channel.state in ("pending", "open")}
        if any(outpoint not in listed for outpoint in state.draft.channels):
            return "the node does not list a channel of the proposal any more"
    return None


def way_out_to_sign(state: Receiver, now: Instant, look: Look, memory: Memory) -> tuple[Sign, str] | None:
    """W, to be signed: the first time, or again where the last one pays too little to get through."""
    if state.coins is None:
        return None
    rate = min(look.rate, state.created.policy.max_fee_rate)
    in_pool = [s for s in look.spending(state.own_coins) if s.height is None and s.what != "way_out"]
    above = sum(_fee_of(state, sight) for sight in in_pool)
    if state.way_outs:
        last = state.way_outs[-1]
        fee, weight = _way_out_fee(state, last), read_tx(last.raw).weight
        stuck = now - last.at >= STUCK and rate.sat_per_kwu * 2 > FeeRate.of(fee, weight).sat_per_kwu * 3
        unspent = look.covers and all(s.height is None for s in look.spending(state.own_coins))
        if not unspent or not (stuck or (above and fee <= above)) or not state.own_coins:
            return None
        above, reason = max(above, fee), last.reason
    else:
        why = way_out_reason(state, now, look, memory)
        if why is None:
            return None
        reason = why
    try:
        psbt = build_way_out(state.coins.coins, state.coins.scripts.change, rate, above)
    except PayjoinError:
        return None
    return Sign("way_out", psbt.serialize(), state.own_coins), reason


def _fee_of(state: Receiver, sight: Sight) -> int:
    """The absolute fee of a proposal in the mempool, and of the child that pulls it."""
    draft = state.stakes.draft(sight.bare)
    fee = draft.fee if draft is not None else 0
    return fee + sum(child.fee for child in state.children if child.parent == sight.txid)


def _way_out_fee(state: Receiver, way_out: ev.WayOutBroadcasting) -> int:
    values = sum(coin.txout.value for coin in state.coins.coins) if state.coins is not None else 0
    return values - sum(txout.value for txout in read_tx(way_out.raw).outputs)


def parent_to_pull(state: Receiver, look: Look) -> tuple[Parent, Instant] | None:
    """T or O, stuck in the mempool, with an output of ours that a child can spend."""
    if state.checked is None or state.way_outs:
        return None
    for sight in look.spends_of_original:
        if sight.height is not None:
            continue
        script = state.coins.scripts.change if state.coins is not None else state.created.script
        vout: int | None = None
        draft = state.draft
        if sight.what == "payjoin" and draft is not None and draft.bare == sight.bare and state.drafted is not None:
            fee, vout = draft.fee, state.drafted.change_vout
            if vout is None and not state.pays_cold:  # nothing here could sign for the cold address
                payment = [o.script for o in state.drafted.intent.outputs if o.role is OutputRole.PAYMENT]
                vout = next((i for i, txout in enumerate(sight.tx.outputs) if txout.script in payment), None)
        elif sight.what == "original":
            fee, vout = state.checked.fee, state.checked.paid_vouts[0]
        else:
            continue
        since = next((entry.since for entry in state.sightings if entry.txid == sight.txid), None)
        if vout is not None and since is not None:
            return Parent(sight, fee, vout, script), since
    return None


def own_money_needs(state: Receiver, now: Instant, look: Look | None, memory: Memory) -> list[Need]:
    """What is to be signed with our own coins alone: the way out, a child."""
    if look is None:
        return []
    way_out = way_out_to_sign(state, now, look, memory)
    if way_out is not None:
        return [way_out[0]]
    pulled = parent_to_pull(state, look)
    if pulled is None:
        return []
    child = child_to_sign(pulled[0], state.children, pulled[1], look, state.created.policy, now)
    return [child] if child is not None else []


def own_money_signed(
    state: Receiver, answer: SignedPsbt, now: Instant, look: Look | None, memory: Memory
) -> list[ev.Event]:
    if look is None:
        return []
    if answer.purpose == "way_out":
        wanted = way_out_to_sign(state, now, look, memory)
        tx = signed_transaction(wanted[0].psbt, answer.psbt) if wanted is not None else None
        return [ev.WayOutBroadcasting(now, tx.txid, tx.raw, wanted[1])] if wanted is not None and tx is not None else []
    pulled = parent_to_pull(state, look)
    if answer.purpose != "child" or pulled is None:
        return []
    sign = child_to_sign(pulled[0], state.children, pulled[1], look, state.created.policy, now)
    child = accept_child(sign, pulled[0], answer.psbt, now) if sign is not None else None
    return [child] if child is not None else []


# ---------------------------------------------------------------- the end


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


def dead_orphans(state: Receiver, channels: Sequence[NodeChannel], burial: Sight) -> tuple[Outpoint, ...]:
    """Pending channels with our memo in another transaction than the buried one: every proposal spends all inputs of O (4.3)."""
    return tuple(
        channel.outpoint
        for channel in channels
        if channel.memo == state.memo
        and channel.state == "pending"
        and channel.outpoint is not None
        and channel.outpoint.txid != burial.txid
    )


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
