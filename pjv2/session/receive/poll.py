"""The receiver before there is anything to lose: waiting for an Original, judging it.

Poll the mailbox until expiry, and once more, answered, after it: an Original that was posted in time still becomes a payment
(design rule 8). Nor does a cancelled request end before one answer: its log may be older than what stands in the mailbox. Junk in the
write-once mailbox ends the polling and nothing else. The checklist runs over facts gathered in one trip; the store says whether an
input was seen before, in the event's own transaction.

Law: an Original is accepted by the whole checklist or refused with one code; what the payer is told is in `refuse`.
"""

from __future__ import annotations

from pjv2.errors import BadOriginal, PayjoinError, ReplyCode
from pjv2.psbt.original import INPUTS_REFUSED, OriginalFacts, check_original, parse_original
from pjv2.session import events as ev
from pjv2.session.events import Outcome
from pjv2.session.monitor import Look
from pjv2.session.needs import GatherFacts, InputsSeen, Memory, Need, Poll, Polled
from pjv2.session.receive.evidence import inspect, inspected, with_node
from pjv2.session.receive.life import Receiver, once, terms_of, unlogged
from pjv2.units import Instant
from pjv2.wire.message import is_v1_text, open_message_a
from pjv2.wire.secp import SecretKey

# ---------------------------------------------------------------- Initialized


def polling(state: Receiver, memory: Memory) -> bool:
    """Until expiry or a person's word, and then until one answer: a log that was restored may have had an Original before."""
    return state.spoiled is None and not state.polled_out and not (state.cancelled and memory.silent)


def polled(state: Receiver, answer: Polled, now: Instant) -> list[ev.Event]:
    if state.spoiled is not None or state.polled_out:
        return []
    if answer.body is None:
        return [ev.ExpiryPassed(now, polled=True)] if state.expired else []
    if not answer.body:
        return [ev.MailboxSpoiled(now, "the mailbox holds an empty message")]
    if is_v1_text(answer.body):
        return [ev.OriginalReceived(now, answer.body, None, answer.relay)]
    try:
        message = open_message_a(SecretKey(state.created.receiver_key), answer.body)
    except PayjoinError as exc:
        return [ev.MailboxSpoiled(now, f"the mailbox holds what was not meant for this request: {exc}")]
    return [ev.OriginalReceived(now, message.body, message.reply.compressed, answer.relay)]


def initialized_needs(state: Receiver, now: Instant, look: Look | None, memory: Memory) -> list[Need]:
    due: list[Need] = [Poll(state.mailbox)] if polling(state, memory) else []
    if with_node(state) and inspected(state, memory) is None and _ending(state, now, look, memory):
        due.append(inspect(state))
    return due


def initialized_tick(state: Receiver, now: Instant, look: Look | None, memory: Memory) -> list[ev.Event]:
    """The ends of a request that no Original came for (3.4)."""
    ending = _ending(state, now, look, memory)
    if not ending or not with_node(state) or now >= state.watch_over:
        return ending
    seen = inspected(state, memory)
    if seen is None:
        return []
    if unlogged(state, seen.channels):
        # An older log had an Original that nobody can read any more: no burial can be told to prove its proposal dead.
        return once(state, "channels", "the node lists a channel of this request that the log does not know", now)
    return ending


def _ending(state: Receiver, now: Instant, look: Look | None, memory: Memory) -> list[ev.Event]:
    if look is None:
        return []
    # The mailbox was seen empty, or can hold no Original: no proposal of an older log is out.
    silent = memory.silent or state.polled_out or state.spoiled is not None or now >= state.watch_over
    paid = look.of("address")
    final = [sight for sight in paid if sight.buried]
    asked = state.created.amount
    if final and silent:
        return [ev.Closed(now, Outcome.PAID_OTHERWISE, final[0].txid, asked, sum(sight.amount for sight in final))]
    if not look.covers or paid or not silent:
        return []
    if state.cancelled:
        return [ev.Closed(now, Outcome.CANCELLED, None, asked, 0)]
    if state.expired and (state.polled_out or now >= state.watch_over):
        return [ev.Closed(now, Outcome.EXPIRED, None, asked, 0)]
    return []


# ---------------------------------------------------------------- UncheckedOriginal


def unchecked_needs(state: Receiver) -> list[Need]:
    if state.payload is None:
        return []
    tx = state.payload.psbt.extract()
    return [GatherFacts(tx.raw, tuple(txin.outpoint for txin in tx.inputs))]


def unchecked_tick(state: Receiver, now: Instant) -> list[ev.Event]:
    """An Original that does not even parse needs no facts to be refused."""
    if state.payload is not None or state.original is None:
        return []
    try:
        parse_original(state.original.body, v1=state.v1)
    except BadOriginal as exc:
        return [_refused(exc, now)]
    return []


def judge(state: Receiver, facts: OriginalFacts, now: Instant) -> list[ev.Event]:
    if state.payload is None:
        return []
    wanted = tuple(txin.outpoint for txin in state.payload.psbt.tx.inputs)
    try:
        checked = check_original(state.payload, facts, terms_of(state.created))
    except BadOriginal as exc:
        return [_refused(exc, now)]
    return [
        ev.OriginalAccepted(
            now,
            inputs=wanted,
            prevouts=tuple(facts.prevouts[outpoint] for outpoint in wanted),
            txid=checked.tx.txid,
            amount=checked.paid,
            height=facts.tip,
            economy_rate=facts.economy_rate,
            verdict="known" if facts.suitability.verdict == "known" else "accepted",
            tip_time=facts.tip_time,
        )
    ]


def inputs_seen(answer: InputsSeen, now: Instant) -> list[ev.Event]:
    """Owned and seen inputs are refused with the same words: a prober learns nothing (BIP78)."""
    reason = f"{INPUTS_REFUSED}: session {answer.by} saw an input before"
    return [ev.OriginalRefused(now, ReplyCode.ORIGINAL_PSBT_REJECTED, reason)]


def _refused(exc: BadOriginal, now: Instant) -> ev.OriginalRefused:
    return ev.OriginalRefused(now, exc.reply or ReplyCode.ORIGINAL_PSBT_REJECTED, str(exc))
