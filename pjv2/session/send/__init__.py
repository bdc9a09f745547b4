"""The sender: what it needs, and what follows from an answer, a command, or the passing of time.

It posts its Original, polls for a proposal, checks and signs it, and broadcasts; whatever goes wrong, the Original pays instead.
Where the payee has a server of his own (BIP78) the post and the proposal are one request and its answer; all the rest is the same.
From `OriginalPosting` on the receiver may broadcast the Original at any time: the coins stay leased until one is spent and buried.

Law: nothing new is signed after the deadline; a reclaim is recorded before it is broadcast (M19); T dead or refused means O at once,
else at the deadline, also after `Broadcasting` (M18).
"""

from __future__ import annotations

import base64
import binascii
from typing import assert_never

from pjv2.errors import BadProposal, NotNow, PayjoinError, WrongUsage
from pjv2.psbt.verify import build_reclaim, check_proposal, check_signed, original_body, read_reply
from pjv2.session import events as ev
from pjv2.session.events import Event, Outcome
from pjv2.session.facts import ChainView
from pjv2.session.monitor import (
    Look,
    Parent,
    accept_child,
    broadcast,
    broadcast_child,
    child_to_sign,
    coins_settled,
    covered,
    lease_until,
    look,
    news,
    read_view,
    signed_transaction,
)
from pjv2.session.needs import (
    Approve,
    Bip78Answer,
    BroadcastAnswer,
    BroadcastNow,
    Cancel,
    CoinsFreed,
    CoinsHeld,
    Command,
    Decline,
    Delivered,
    Input,
    Memory,
    Need,
    Needs,
    Poll,
    Polled,
    PostBip78,
    PostOriginal,
    Reclaim,
    ReleaseCoins,
    ReserveCoins,
    Sign,
    SignedPsbt,
    Tick,
)
from pjv2.session.send.life import TRANSITIONS as TRANSITIONS
from pjv2.session.send.life import Sender as Sender
from pjv2.session.send.life import Stage as Stage
from pjv2.session.send.life import evolve as evolve
from pjv2.units import Entropy, Instant
from pjv2.wire.message import open_message_b, seal_message_a
from pjv2.wire.secp import PublicKey, SecretKey
from pjv2.wire.uri import with_query

WAITING = (Stage.POSTING_ORIGINAL, Stage.POLLING_FOR_PROPOSAL, Stage.WANTS_SIGNATURE)


# ---------------------------------------------------------------- needs


def needs(state: Sender, now: Instant, memory: Memory) -> Needs:
    """What a sender wants from the world now; deterministic."""
    if state.stage is Stage.CLOSED:
        return Needs(())
    seen = look(state.stakes, memory, now)
    due: list[Need] = []
    match state.stage:
        case Stage.CREATED:
            if state.cancelled or state.expired:
                return Needs((_give_back(state),) if state.own_coins else ())
            return Needs((), float(state.created.expires))
        case Stage.POSTING_ORIGINAL:
            if not _given_up(state, now):
                due += _post(state)
        case Stage.POLLING_FOR_PROPOSAL:
            if not _given_up(state, now):
                due.append(_poll(state))
        case Stage.WANTS_SIGNATURE:
            if not _given_up(state, now) and state.safe is not None:
                due.append(Sign("payjoin", state.safe.psbt.serialize(), state.safe.ours))
        case _:
            pass
    due += _own_money(state, now, seen)
    due += _broadcasts(state, now, seen)
    due += _renewal(state, now, seen)
    if seen is not None and _coins_free(state, seen):
        due.append(_give_back(state))
    due.append(state.stakes.watch())
    times = [at for at in (float(state.created.expires), state.deadline) if at > now]
    return Needs(tuple(dict.fromkeys(due)), min(times) if times else None)


def _post(state: Sender) -> list[Need]:
    """The Original, until it was answered or the request expired; then a mailbox may still hold the reply."""
    endpoint = state.created.endpoint
    if state.expired or state.posting is None:
        return [_poll(state)] if endpoint is None else []
    if endpoint is None:
        return [PostOriginal(state.mailbox, state.posting.message)]
    return [PostBip78(with_query(endpoint, state.created.query), state.posting.message)]


def _poll(state: Sender) -> Poll:
    return Poll(state.reply_mailbox, (state.created.receiver, state.reply_public))


def _given_up(state: Sender, now: Instant) -> bool:
    """No proposal is waited for any more."""
    return state.cancelled or state.broadcast_now or now >= state.deadline


def _give_back(state: Sender) -> ReleaseCoins:
    return ReleaseCoins(state.own_coins, state.created.lock_id)


def _renewal(state: Sender, now: Instant, seen: Look | None) -> list[Need]:
    until = lease_until(state.created.at, now)
    if until is None or not state.own_coins or (seen is not None and seen.spending(state.own_coins)):
        return []
    return [ReserveCoins(state.own_coins, state.created.lock_id, until, (), "")]


def _coins_free(state: Sender, seen: Look) -> bool:
    """An input is buried in some transaction, and no other spend of ours is on its way (S7)."""
    return (
        bool(state.own_coins)
        and seen.burial is not None
        and coins_settled(seen, frozenset(state.own_coins), way_out=False)
    )


def _fallback_wanted(state: Sender, now: Instant, seen: Look) -> bool:
    """O has to go out: nothing spends our inputs, and the payjoin failed, or somebody said so."""
    if state.no_broadcast or not seen.quiet or state.reclaims:
        return False
    if state.broadcast_now:
        return state.stage in (Stage.PENDING_FALLBACK, Stage.BROADCASTING_PAYJOIN)
    if state.created.policy.require_payjoin:
        return False
    match state.stage:
        case Stage.PENDING_FALLBACK:
            return True
        case Stage.BROADCASTING_PAYJOIN:
            return (
                state.fallback_broadcasting or state.cancelled or now >= state.deadline or _foreign_spent(state, seen)
            )
        case _:
            return False


def _foreign_spent(state: Sender, seen: Look) -> bool:
    """The receiver's coin in T went elsewhere: T cannot confirm as things stand."""
    payjoin = state.payjoin
    if payjoin is None:
        return False
    return any(sight.bare != payjoin.bare for sight in seen.spending(payjoin.inputs - payjoin.ours))


def _broadcasts(state: Sender, now: Instant, seen: Look | None) -> list[Need]:
    if seen is None:
        return []
    due: list[Need] = []
    if state.reclaims:
        newest = state.reclaims[-1]
        confirmed = any(sight.height is not None for sight in seen.spends_of_original)
        if seen.covers and not confirmed and not seen.has(newest.txid):
            due.append(broadcast("reclaim", newest.txid, newest.raw))
    if state.fallback_broadcasting and _fallback_wanted(state, now, seen):
        due.append(broadcast("fallback", state.sent.tx.txid, state.sent.tx.raw))
    payjoin_out = state.stage is Stage.BROADCASTING_PAYJOIN and not state.fallback_broadcasting and not state.reclaims
    if payjoin_out and state.signed is not None and _payjoin_missing(state, seen):
        due.append(broadcast("payjoin", state.signed.txid, state.signed.raw))
    child = broadcast_child(state.children, seen)
    if child is not None:
        due.append(child)
    return due


def _payjoin_missing(state: Sender, seen: Look) -> bool:
    """T is not in sight and nothing confirmed stands against it; O in the mempool may still be replaced by it."""
    payjoin = state.payjoin
    if payjoin is None or not seen.covers or seen.sight_of(payjoin) is not None:
        return False
    return not any(sight.height is not None for sight in seen.spending(payjoin.inputs))


def _own_money(state: Sender, now: Instant, seen: Look | None) -> list[Need]:
    if seen is None:
        return []
    wish = state.reclaim_requested
    if wish is not None and not any(sight.height is not None for sight in seen.spends_of_original):
        try:
            psbt = build_reclaim(state.sent, wish.script, wish.rate)
        except PayjoinError:
            return []
        return [Sign("reclaim", psbt.serialize(), tuple(txin.outpoint for txin in psbt.tx.inputs))]
    pulled = _parent(state, seen)
    if pulled is None or state.reclaims:
        return []
    child = child_to_sign(pulled[0], state.children, pulled[1], seen, state.created.policy, now)
    return [child] if child is not None else []


def _parent(state: Sender, seen: Look) -> tuple[Parent, Instant] | None:
    """T or O stuck in the mempool, and our own change in it: the output that the Original let pay for the receiver's inputs."""
    change = state.sent.params.fee_output
    if change is None or change >= len(state.sent.tx.outputs):
        return None
    script = state.sent.tx.outputs[change].script
    for sight in seen.spends_of_original:
        fee = None
        if sight.what == "original":
            fee = state.created.fee
        elif sight.what == "payjoin" and state.signed is not None:
            fee = state.signed.fee
        vout = next((i for i, txout in enumerate(sight.tx.outputs) if txout.script == script), None)
        since = next((entry.since for entry in state.sightings if entry.txid == sight.txid), None)
        if fee is not None and vout is not None and since is not None and sight.height is None:
            return Parent(sight, fee, vout, script), since
    return None


# ---------------------------------------------------------------- decide


def decide(state: Sender, input: Input, now: Instant, rng: Entropy, memory: Memory) -> list[Event]:  # noqa: PLR0911, PLR0912  # one return per case
    """The events that follow from one input; [] when nothing does. Raises WrongUsage for a command that cannot be."""
    if isinstance(input, Approve | Decline | Cancel | BroadcastNow | Reclaim):
        return command(state, input, now)
    if state.stage is Stage.CLOSED:
        return []
    seen = look(state.stakes, memory, now)
    match input:
        case Tick():
            return tick(state, now, rng, seen)
        case ChainView():
            covers = memory.watched is not None and covered(state.stakes.watch(), memory.watched)
            return news(state.sightings, read_view(state.stakes, input, covers=covers), now)
        case Polled() if state.stage in (Stage.POSTING_ORIGINAL, Stage.POLLING_FOR_PROPOSAL):
            return _polled(state, input, now)
        case Delivered() if state.stage is Stage.POSTING_ORIGINAL:
            if input.status == 200:
                return [ev.OriginalPosted(now)]
            return [ev.ProposalRefused(now, None, f"the directory answered {input.status} to the Original")]
        case Bip78Answer() if state.stage is Stage.POSTING_ORIGINAL and state.created.endpoint is not None:
            return _bip78_answered(state, input, now)
        case SignedPsbt():
            return _signed(state, input, now, seen)
        case BroadcastAnswer():
            return _broadcast_answered(state, input, now, seen)
        case CoinsFreed(coins=coins) if coins == state.own_coins and coins:
            early = state.stage is Stage.CREATED and (state.cancelled or state.expired)
            free = seen is not None and _coins_free(state, seen)
            return [ev.CoinsReleased(now)] if early or free else []
        case CoinsHeld(missing=missing) if missing:
            detail = f"the wallet does not hold {missing[0]} for this payment any more"
            return [] if ("coins", detail) in state.alarms else [ev.Alarm(now, "coins", detail)]
        case _:
            return []


def tick(state: Sender, now: Instant, rng: Entropy, seen: Look | None) -> list[Event]:  # noqa: PLR0911  # one return per case
    """What time and flags lead to, given the latest look at the chain."""
    if not state.expired and now >= state.created.expires:
        return [ev.ExpiryPassed(now)]
    if state.stage is Stage.CREATED:
        return _created(state, now, rng)
    if state.stage in WAITING:
        if _given_up(state, now):
            said = "the payment was cancelled" if state.cancelled else "no proposal came in time"
            return [ev.ProposalRefused(now, None, "the Original is wanted now" if state.broadcast_now else said)]
        if state.polled_out and state.stage is not Stage.WANTS_SIGNATURE:
            return [ev.ProposalRefused(now, None, "the request expired without a proposal")]
        if state.expired and state.created.endpoint is not None and state.stage is Stage.POSTING_ORIGINAL:
            return [ev.ProposalRefused(now, None, "the payee's server did not answer in time")]
    if state.stage is Stage.SIGNED_PAYJOIN:
        if _given_up(state, now):
            return [ev.FallbackBroadcasting(now, state.created.txid)]
        return [ev.Broadcasting(now)]
    if seen is None:
        return []
    if not state.fallback_broadcasting and _fallback_wanted(state, now, seen):
        return [ev.FallbackBroadcasting(now, state.created.txid)]
    return _close(state, now, seen)


def _created(state: Sender, now: Instant, rng: Entropy) -> list[Event]:
    if state.cancelled or state.expired:
        outcome = Outcome.CANCELLED if state.cancelled else Outcome.EXPIRED
        return [] if state.own_coins else [ev.Closed(now, outcome, None, state.created.amount, 0)]
    if state.created.endpoint is not None:
        return [ev.OriginalPosting(now, original_body(state.sent))]
    receiver, reply = PublicKey.parse(state.created.receiver), PublicKey.parse(state.reply_public)
    message = seal_message_a(receiver, reply, original_body(state.sent), rng)
    return [ev.OriginalPosting(now, message)]


def _polled(state: Sender, answer: Polled, now: Instant) -> list[Event]:
    """The reply: a proposal that breaks no rule, or the reason why there is none."""
    if _given_up(state, now):
        return []
    if answer.body is None:
        return [ev.ExpiryPassed(now, polled=True)] if state.expired and not state.polled_out else []
    try:
        payload = open_message_b(
            SecretKey(state.created.reply_key), PublicKey.parse(state.created.receiver), answer.body
        )
    except PayjoinError as exc:
        return [ev.ProposalRefused(now, None, f"the reply cannot be read: {exc}")]
    return _replied(state, payload, now)


def _bip78_answered(state: Sender, answer: Bip78Answer, now: Instant) -> list[Event]:
    if _given_up(state, now):
        return []
    body = answer.body.strip()
    if answer.status == 200:
        try:
            return _replied(state, base64.b64decode(body, validate=True), now)
        except binascii.Error:
            return [ev.ProposalRefused(now, None, "the payee's server answered with something that is no proposal")]
    if body.startswith(b"{"):
        return _replied(state, body, now)
    return [ev.ProposalRefused(now, None, f"the payee's server answered {answer.status} to the Original")]


def _replied(state: Sender, payload: bytes, now: Instant) -> list[Event]:
    try:
        proposal = read_reply(payload)
        safe = check_proposal(state.sent, proposal)
    except BadProposal as exc:
        return [ev.ProposalRefused(now, getattr(exc, "code", None), str(exc))]
    except PayjoinError as exc:
        return [ev.ProposalRefused(now, None, f"the reply cannot be read: {exc}")]
    return [ev.ProposalAccepted(now, proposal.serialize(), safe.txid, safe.txid_is_stable)]


def _signed(state: Sender, answer: SignedPsbt, now: Instant, seen: Look | None) -> list[Event]:
    match answer.purpose:
        case "payjoin" if state.stage is Stage.WANTS_SIGNATURE and state.safe is not None and not _given_up(state, now):
            try:
                tx = check_signed(state.sent, state.safe, answer.psbt)
            except NotNow:
                raise
            except PayjoinError as exc:
                return [ev.ProposalRefused(now, None, str(exc))]
            return [ev.Signed(now, tx.txid, tx.raw, state.safe.fee)]
        case "reclaim" | "child" if seen is not None:
            wanted = next((need for need in _own_money(state, now, seen) if isinstance(need, Sign)), None)
            if wanted is None or wanted.purpose != answer.purpose:
                return []
            if answer.purpose == "reclaim":
                reclaim = signed_transaction(wanted.psbt, answer.psbt)
                return [ev.ReclaimBroadcasting(now, reclaim.txid, reclaim.raw)] if reclaim is not None else []
            pulled = _parent(state, seen)
            child = accept_child(wanted, pulled[0], answer.psbt, now) if pulled is not None else None
            return [child] if child is not None else []
        case _:
            return []


def _broadcast_answered(state: Sender, answer: BroadcastAnswer, now: Instant, seen: Look | None) -> list[Event]:  # noqa: PLR0911  # one return per case
    refused = answer.result.verdict == "refused"
    if answer.purpose == "payjoin" and state.stage is Stage.BROADCASTING_PAYJOIN and refused:
        # T refused: O at once. With --require-payjoin T is tried again until a person decides.
        if state.fallback_broadcasting or state.no_broadcast or seen is None or not seen.quiet:
            return []
        if state.created.policy.require_payjoin:
            detail = f"the network refuses the payjoin: {answer.result.reason}"
            return [] if ("payjoin", detail) in state.alarms else [ev.Alarm(now, "payjoin", detail)]
        return [ev.FallbackBroadcasting(now, state.created.txid)]
    if answer.purpose != "fallback" or answer.txid != state.created.txid or not state.fallback_broadcasting:
        return []
    if state.stage not in (Stage.BROADCASTING_PAYJOIN, Stage.PENDING_FALLBACK):
        return []
    if not refused:
        return (
            []
            if state.fallback_broadcasted and not state.fallback_rejected
            else [ev.FallbackBroadcasted(now, answer.txid)]
        )
    reason = answer.result.reason or "the network refused the Original"
    return [] if state.fallback_rejected == reason else [ev.FallbackRejected(now, reason)]


def _close(state: Sender, now: Instant, seen: Look) -> list[Event]:
    """Our inputs are spent and buried: the payment is over (section 5)."""
    burial = seen.burial
    if burial is None or state.own_coins:
        return []
    match burial.what:
        case "payjoin":
            outcome, paid = Outcome.PAID, state.created.amount
        case "original":
            outcome, paid = Outcome.PAID_BY_FALLBACK, state.created.amount
        case "reclaim":
            outcome, paid = Outcome.CANCELLED, 0
        case _:
            outcome, paid = Outcome.CONFLICTED, 0
    return [ev.Closed(now, outcome, burial.txid, state.created.amount, paid)]


# ---------------------------------------------------------------- commands


def command(state: Sender, wish: Command, now: Instant) -> list[Event]:
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
            if state.stage is Stage.CREATED:
                raise WrongUsage(f"session {state.session} has not sent its Original yet: wait a moment, or cancel it")
            return [] if state.broadcast_now and not state.no_broadcast else [ev.BroadcastRequested(now)]
        case Reclaim(script=script, rate=rate):
            if state.stage is Stage.CREATED:
                raise WrongUsage(f"the Original of session {state.session} has not left: cancel the session instead")
            try:
                build_reclaim(state.sent, script, rate)
            except PayjoinError as exc:
                raise WrongUsage(f"the coins of session {state.session} cannot be reclaimed this way: {exc}") from exc
            return [ev.ReclaimRequested(now, script, rate)]
        case Approve() | Decline():
            raise WrongUsage(f"session {state.session} is a payment: there is nothing to approve, cancel it instead")
        case _:
            assert_never(wish)
