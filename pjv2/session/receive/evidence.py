"""Whether a proposal left this house: the three places where one leaves traces, asked in this very state.

Before `ProposalPosting` is in the log nothing can have left, unless the log lost its end: a store restored from an older copy. So
every release, and the end of a refusal, looks at the chain first, then at the node, then into the reply mailbox. A burial of one of
the Original's inputs replaces every other evidence.

Law: evidence from before the present state was entered is none; what cannot be read is not "nothing" (session-model.md 3.1).
"""

from __future__ import annotations

from collections.abc import Sequence

from pjv2.session import events as ev
from pjv2.session.facts import Inspection, NodeChannel
from pjv2.session.monitor import Look, Sight
from pjv2.session.needs import InspectChannels, Memory, ReplyRead
from pjv2.session.receive.life import Receiver, unlogged
from pjv2.units import Instant, Outpoint


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


def inspect(state: Receiver) -> InspectChannels:
    return InspectChannels(state.memo, state.inputs, state.own_coins)


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


def foreign_in_the_way(state: Receiver, look: Look, memory: Memory) -> Sight | None:
    """3.2, step 1: a proposal of ours in sight that no burial has killed. T of this log is one, too, before it was posted."""
    sight = foreign_proposal(state, look, memory)
    burial = look.burial
    if sight is None or state.found or (burial is not None and burial.txid != sight.txid):
        return None
    return sight


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


def strangers_listed(state: Receiver, memory: Memory, look: Look) -> list[NodeChannel]:
    """Channels with our memo that this log never drafted; once a burial is in view, those that it proves dead (4.3)."""
    seen = inspected(state, memory)
    strangers = unlogged(state, seen.channels) if seen is not None else ()
    if look.burial is None:
        return list(strangers)
    dead = dead_orphans(state, strangers, look.burial)
    return [channel for channel in strangers if channel.state == "pending" and channel.outpoint in dead]


def outputs_listed(state: Receiver, memory: Memory, sight: Sight) -> tuple[Outpoint, ...]:
    seen = inspected(state, memory)
    channels = seen.channels if seen is not None else ()
    return tuple(c.outpoint for c in channels if c.outpoint is not None and c.outpoint.txid == sight.txid)


def reply_judged(state: Receiver, memory: Memory, now: Instant) -> list[ev.Event]:
    """Content in the reply mailbox that stands against a release is a proposal that left (3.2, step 2)."""
    left = nothing_left(state, memory, now, even_after_ttl=True)
    body = memory.reply.body if memory.reply is not None else None
    refusal = state.refusal.message if state.refusal is not None else None
    if left is False or (left and body is not None and body != refusal):
        return [ev.ProposalFound(now, "mailbox", "the reply mailbox holds a proposal")]
    return []


def lost_proposal(state: Receiver, now: Instant, look: Look, memory: Memory) -> list[ev.Event]:
    """Where nothing was posted: the traces of a proposal that an older log posted, on the chain, at the node, in the mailbox."""
    sight = foreign_in_the_way(state, look, memory)
    if sight is not None:
        return [ev.ProposalFound(now, "chain", f"{sight.txid} is in sight", outputs_listed(state, memory, sight))]
    outpoints = tuple(c.outpoint for c in strangers_listed(state, memory, look) if c.outpoint is not None)
    if outpoints:
        return [ev.ProposalFound(now, "node", "the node lists a channel that the log does not know", outpoints)]
    return reply_judged(state, memory, now) if look.burial is None else []
