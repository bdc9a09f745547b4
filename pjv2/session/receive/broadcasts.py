"""What a receiver sends to the network: the Original, our own coin spent back to us, a child that pulls a stuck parent (4.1).

Law: a transaction of ours is recorded before it is broadcast, and a recorded way out is carried to its end in every state (M20).
"""

from __future__ import annotations

from pjv2.errors import PayjoinError
from pjv2.psbt.plan import OutputRole
from pjv2.psbt.proposal import build_way_out
from pjv2.session import events as ev
from pjv2.session.monitor import (
    STUCK,
    Look,
    Parent,
    Sight,
    accept_child,
    broadcast,
    broadcast_child,
    child_to_sign,
    read_tx,
    signed_transaction,
)
from pjv2.session.needs import Broadcast, BroadcastAnswer, Memory, Need, Sign, SignedPsbt
from pjv2.session.receive.evidence import inspected
from pjv2.session.receive.life import Receiver, Stage, once
from pjv2.session.receive.release import must_read
from pjv2.units import FeeRate, Instant


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


def due_broadcasts(state: Receiver, now: Instant, look: Look | None) -> list[Need]:
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
