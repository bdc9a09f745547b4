"""Saying no: the one refusal of a session, its way to the payer, and the end of a session that refused.

Law: a refusal is recorded before it is posted (M16), and there is one content per mailbox; a refused session closes after it looked
for a proposal of an older log (M7).
"""

from __future__ import annotations

from typing import Literal

from pjv2.errors import ReplyCode
from pjv2.psbt.proposal import reply_payload_error
from pjv2.session import events as ev
from pjv2.session.events import Outcome
from pjv2.session.monitor import Look
from pjv2.session.needs import Delivered, Memory, Need, PostReply, ReadReply
from pjv2.session.receive.evidence import inspect, inspected, lost_proposal, nothing_left, with_node
from pjv2.session.receive.life import Receiver, once
from pjv2.units import Entropy, Instant
from pjv2.wire.message import seal_message_b
from pjv2.wire.secp import PublicKey, SecretKey


def seal_refusal(state: Receiver, code: ReplyCode, now: Instant, rng: Entropy) -> ev.RefusalPosting:
    """The one refusal of this session, fixed for ever. The payer is told the code and its standard words."""
    payload = reply_payload_error(code)
    original = state.original
    if original is None or original.reply_key is None:
        return ev.RefusalPosting(now, code, payload)
    key = PublicKey.parse(original.reply_key)
    return ev.RefusalPosting(now, code, seal_message_b(key, SecretKey(state.created.receiver_key), payload, rng))


def post_refusal(state: Receiver, now: Instant) -> list[Need]:
    """The announced refusal, until the directory took it or the request expired."""
    if state.refusal is None or state.refusal_posted or state.expired or now >= state.created.expires:
        return []
    relay = state.original.relay if state.original is not None else ""
    method: Literal["POST", "PUT"] = "PUT" if state.v1 else "POST"
    return [PostReply(state.reply_mailbox, method, state.refusal.message, relay)]


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


def refusal_delivered(state: Receiver, answer: Delivered, now: Instant) -> list[ev.Event]:
    if state.refusal is None or state.refusal_posted:
        return []
    if answer.status == 200:
        return [ev.RefusalPosted(now)]
    return once(state, "refusal", f"the directory answered {answer.status} to the refusal", now)


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
