"""The receiver before there is anything to lose: waiting for an Original, judging it.

Poll the mailbox until expiry, and once more, answered, after it: an Original that was posted in time still becomes a payment
(design rule 8). Junk in the write-once mailbox ends the polling and nothing else. The checklist runs over facts gathered in one
trip; the store says whether an input was seen before, in the event's own transaction.

Law: an Original is accepted by the whole checklist or refused with one code; what the payer is told is in `refuse`.
"""

from __future__ import annotations

from pjv2.errors import BadOriginal, PayjoinError, ReplyCode
from pjv2.psbt.original import INPUTS_REFUSED, OriginalFacts, check_original, parse_original
from pjv2.session import events as ev
from pjv2.session.events import Outcome
from pjv2.session.monitor import Look
from pjv2.session.needs import GatherFacts, InputsSeen, Need, Poll, Polled
from pjv2.session.receive.life import Receiver, terms_of
from pjv2.units import Instant
from pjv2.wire.message import is_v1_text, open_message_a
from pjv2.wire.secp import SecretKey

# ---------------------------------------------------------------- Initialized


def polling(state: Receiver) -> bool:
    return state.spoiled is None and not state.cancelled and not state.polled_out


def polled(state: Receiver, answer: Polled, now: Instant) -> list[ev.Event]:
    if not polling(state):
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


def initialized_needs(state: Receiver) -> list[Need]:
    return [Poll(state.mailbox)] if polling(state) else []


def initialized_tick(state: Receiver, now: Instant, look: Look | None) -> list[ev.Event]:
    """The ends of a request that no Original came for (3.4)."""
    if look is None:
        return []
    buried = next((sight for sight in look.of("address") if sight.buried), None)
    if buried is not None:
        paid = sum(sight.amount for sight in look.of("address") if sight.buried)
        return [ev.Closed(now, Outcome.PAID_OTHERWISE, buried.txid, state.created.amount, paid)]
    if not look.covers or look.of("address"):
        return []
    if state.cancelled:
        return [ev.Closed(now, Outcome.CANCELLED, None, state.created.amount, 0)]
    if state.expired and (state.polled_out or now >= state.watch_over):
        return [ev.Closed(now, Outcome.EXPIRED, None, state.created.amount, 0)]
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
