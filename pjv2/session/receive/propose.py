"""From a checked Original to a proposal in the reply mailbox: coins, channels, draft, signature, post.

```
FindCoins -> CoinsReserved -> ReserveCoins -+-> ProposalDrafted (plain) ----------------------------------+
                                            +-> ChannelsIntended -> reserve -> ProposalDrafted -> secure -+-> sign -> inspect -> post
inspect -> ProposalDrafted (to the cold address, no coin of ours) -> nothing to sign ----------------------------------^
```

Channels are tried only while rule 2 of the design holds, looked at again right before reserve, secure and post; what stands in the
way degrades to fewer channels, to a plain payjoin, to the Original itself. Reservations belong to the worker that announced them.

Law: secure before post; no channel is planned after the first secure call; every announced step is recorded before it is taken.
"""

from __future__ import annotations

import base64
from typing import Literal

from pjv2.errors import NotNow, PayjoinError, ReplyCode
from pjv2.psbt.original import CheckedOriginal, channel_obstacle
from pjv2.psbt.plan import CannotPropose, ChannelPlan, Intent, ReceiverScripts, choose_coins, make_intent, replan
from pjv2.psbt.proposal import ProvisionalProposal, draft_proposal, finish_proposal, restore_proposal
from pjv2.session import events as ev
from pjv2.session.facts import ChannelFailure, Inspection, NodeChannel, SecuredChannel
from pjv2.session.monitor import LEASE, Look, lease_until
from pjv2.session.needs import (
    ChannelsCommitted,
    ChannelsOffered,
    CoinsFound,
    CoinsHeld,
    Delivered,
    FindCoins,
    InspectChannels,
    Memory,
    Need,
    PostReply,
    ReserveChannels,
    ReserveCoins,
    SecureChannels,
    Sign,
    SignedPsbt,
)
from pjv2.session.receive.life import Receiver, Stage, once, unlogged
from pjv2.session.receive.refuse import seal_refusal
from pjv2.units import Entropy, Instant, Outpoint
from pjv2.wire.message import seal_message_b
from pjv2.wire.secp import PublicKey, SecretKey

PLAIN_SECONDS = 30
CHANNEL_SECONDS = 300
"""What must be left before expiry to propose at all, and to propose channels (design rule 2)."""


# ---------------------------------------------------------------- when to stop


def stop(state: Receiver, now: Instant, look: Look | None) -> tuple[ev.Why, str] | None:  # noqa: PLR0911  # one return per case
    """Why nothing may be proposed any more (session-model.md 2.2, `stop`); None: go on."""
    left = state.created.expires - now
    with_channels = state.intended is not None or state.channels_pending
    if state.cancelled or state.broadcast_now:
        return "cancelled", "the session was cancelled"
    if state.expired or left <= 0:
        return "expired", "the request expired"
    if left < (CHANNEL_SECONDS if with_channels else PLAIN_SECONDS):
        return "too_late", f"only {int(left)} seconds are left"
    if now >= state.mailbox_gone:
        return "too_late", "the directory may have pruned the reply mailbox"
    if state.way_outs:
        return "too_late", "our coins are on their way back"
    in_sight = look is not None and bool(look.spends_of_original)
    if in_sight or any(entry.what in ("original", "payjoin", "bumped", "conflict") for entry in state.sightings):
        return "spend_seen", "an input of the Original is spent by a transaction in sight"
    return None


def _spent(state: Receiver, inspection: Inspection) -> tuple[ev.Why, str] | None:
    """The same by the facts that were looked up for this very step."""
    facts = inspection.facts
    inputs = state.accepted.inputs if state.accepted is not None else ()
    for outpoint in (*inputs, *state.own_coins):
        prevout = facts.prevouts.get(outpoint)
        if outpoint in facts.spends_seen or (prevout is not None and prevout.spent_by is not None):
            return "spend_seen", f"{outpoint} is spent by a transaction in sight"
    return None


def _obstacle(state: Receiver, inspection: Inspection, now: Instant) -> str | None:
    """What stands in the way of channels (design rule 2), with the coins that are reserved."""
    if state.checked is None:
        return "there is no accepted Original"
    return channel_obstacle(
        state.checked,
        state.coins.coins if state.coins is not None else (),
        inspection.facts,
        now,
        state.created.expires,
        own_input_required=state.created.policy.own_input == "require",
    )


def proposing_tick(state: Receiver, now: Instant, rng: Entropy, look: Look | None, own: bool) -> list[ev.Event]:  # noqa: PLR0911  # one return per case
    """What time and flags do to a proposal that has not been posted."""
    why = stop(state, now, look)
    match state.stage:
        case Stage.CHECKED_ORIGINAL:
            if (why is None or why[0] in ("too_late", "expired")) and (nobody := _nobody_agreed(state, now)):
                # The payer hears what a person's refusal would tell him, while anybody listens.
                last = ev.ProposingStopped(now, *why) if why and why[0] == "expired" else None
                return [*nobody, last or seal_refusal(state, ReplyCode.UNAVAILABLE, now, rng)]
            return [ev.ProposingStopped(now, *why)] if why else []
        case Stage.RESERVING_CHANNELS | Stage.WANTS_PROPOSAL:
            if why:
                return [ev.ChannelsReleasing(now, "end", why[1])]
            if not own:
                return [ev.ChannelsReleasing(now, "plan", "the worker that reserved the channels is gone")]
        case Stage.SECURING_CHANNELS | Stage.PROVISIONAL_PROPOSAL | Stage.PAYJOIN_PROPOSAL:
            if why and state.channels_pending:
                return [ev.ChannelsReleasing(now, "end", why[1])]
            if why:
                return [ev.ProposingStopped(now, *why)]
            if state.stage is Stage.PROVISIONAL_PROPOSAL and _nothing_to_sign(state):
                return _complete(state, now)
        case _:
            pass
    return []


# ---------------------------------------------------------------- approval


def awaits_approval(state: Receiver) -> bool:
    """The policy wants a person to agree, and nobody has yet."""
    return state.created.policy.approve == "ask" and not state.approved


def approve_until(state: Receiver) -> Instant | None:
    """Until when a person may agree, and a proposal can still be made; None where nobody is asked, or not yet."""
    policy = state.created.policy
    if policy.approve != "ask" or state.accepted is None:
        return None
    return min(state.accepted.at + policy.approve_within, float(state.created.expires - PLAIN_SECONDS))


def _nobody_agreed(state: Receiver, now: Instant) -> list[ev.Event]:
    """The alarm that the time to approve passed without a word. An Original that came too late to ask anybody is no silence."""
    until = approve_until(state)
    if until is None or state.accepted is None or not awaits_approval(state) or not state.accepted.at < until <= now:
        return []
    waited = int(until - state.accepted.at)
    detail = f"nobody approved a proposal within {waited} seconds: the payer's Original pays"
    return once(state, "approval", detail, now)


# ---------------------------------------------------------------- the cold address


def cold_obstacle(state: Receiver) -> str | None:
    """Why the payment stays with this wallet although the request names a cold address; None: a proposal sends it there.

    A function of the log alone: the answer is the same after a restart.
    """
    cold, checked, accepted = state.created.cold, state.checked, state.accepted
    if cold is None or checked is None or accepted is None:
        return "there is no cold address, or no Original yet"
    if not checked.substitution:
        return "the payer does not let the address be replaced"
    if checked.rate < accepted.economy_rate:
        # Money rule 9: what pays the cold address can be sped up by nobody here, the Original can.
        return (
            "the payer's fee rate is so low that the transaction may need a child, which only the cold keys could sign"
        )
    try:
        _cold_intent(checked, cold)
    except CannotPropose as exc:
        return exc.reason
    return None


def _cold_intent(checked: CheckedOriginal, cold: ev.ColdAddress) -> Intent:
    return make_intent(checked, None, (), ReceiverScripts(cold.script), substitute=cold.script)


def goes_cold(state: Receiver) -> bool:
    """The next proposal sends the payment to the cold address, and contributes no coin."""
    return state.created.cold is not None and state.coins is None and cold_obstacle(state) is None


def draft_cold(state: Receiver, inspection: Inspection, now: Instant, rng: Entropy) -> list[ev.Event]:
    """No coin, no lease: only what is spent meanwhile stands in the way."""
    checked, cold = state.checked, state.created.cold
    if checked is None or cold is None or not goes_cold(state):
        return []
    if found := strangers_found(state, inspection, now):
        return found
    why = _spent(state, inspection)
    if why:
        return [ev.ProposingStopped(now, *why)]
    intent = _cold_intent(checked, cold)
    drafted = draft_proposal(checked, intent, (), rng)
    return [ev.ProposalDrafted(now, drafted.txid, drafted.psbt.serialize(), intent, (), drafted.change_vout)]


def _nothing_to_sign(state: Receiver) -> bool:
    """A plain proposal without an input of ours: no wallet is asked, a watch-only one could not even refuse."""
    return state.draft is not None and not state.draft.ours and not state.channels_pending


def _complete(state: Receiver, now: Instant) -> list[ev.Event]:
    proposal = provisional(state)
    if proposal is None:
        return []
    return [ev.ProposalSigned(now, finish_proposal(proposal, proposal.psbt.serialize()).psbt)]


# ---------------------------------------------------------------- needs


def proposing_needs(state: Receiver, now: Instant, own: bool) -> list[Need]:  # noqa: PLR0911  # one return per case
    inputs = state.accepted.inputs if state.accepted is not None else ()
    match state.stage:
        case Stage.CHECKED_ORIGINAL:
            if awaits_approval(state):
                return []
            if goes_cold(state):
                return [InspectChannels(state.memo, inputs, ())]
            if state.coins is None or state.coins.again:
                plan = _plan_left(state)
                orders = plan.orders if plan is not None else ()
                return [FindCoins(inputs, frozenset(state.coins.excluded if state.coins else ()), state.memo, orders)]
            return [hold_coins(state, now)]
        case Stage.RESERVING_CHANNELS if own and state.intended is not None:
            asked = tuple(zip(state.intended.ids, state.intended.intent.orders, strict=True))
            return [ReserveChannels(state.memo, asked)]
        case Stage.SECURING_CHANNELS if own and state.intended is not None and state.drafted is not None:
            funding = tuple(zip(state.intended.ids, state.drafted.funding, strict=True))
            return [SecureChannels(state.drafted.psbt, state.drafted.txid, funding)]
        case Stage.WANTS_PROPOSAL if own:
            return [InspectChannels(state.memo, inputs, state.own_coins)]
        case Stage.SECURING_CHANNELS:
            return [InspectChannels(state.memo, inputs, state.own_coins)]
        case Stage.PROVISIONAL_PROPOSAL if state.drafted is not None and not _nothing_to_sign(state):
            return [Sign("payjoin", state.drafted.psbt, state.own_coins)]
        case Stage.PAYJOIN_PROPOSAL:
            # Locks are renewed before each post; the answer brings the same facts as an inspection.
            if state.own_coins:
                return [hold_coins(state, now)]
            return [InspectChannels(state.memo, inputs, state.own_coins)]
        case _:
            return []


def hold_coins(state: Receiver, now: Instant) -> ReserveCoins:
    """Lock the reserved coins, or renew the lock, until the end of their lease."""
    coins = state.coins
    inputs = state.accepted.inputs if state.accepted is not None else ()
    until = coins.until if coins is not None else now + LEASE
    until = lease_until(until - LEASE, now) or until
    return ReserveCoins(state.own_coins, coins.lock_id if coins is not None else b"", until, inputs, state.memo)


def post_proposal(state: Receiver, now: Instant) -> list[Need]:
    """The stored message, while it is live and nobody cancelled."""
    over = state.cancelled or state.broadcast_now or state.expired or now >= state.created.expires
    if state.posting is None or state.original is None or over or now >= state.mailbox_gone:
        return []
    posting = state.posting
    return [PostReply(state.reply_mailbox, posting.method, posting.message, state.original.relay)]


# ---------------------------------------------------------------- CheckedOriginal


def _plan_left(state: Receiver) -> ChannelPlan | None:
    """The plan that is still to be tried; None: a plain payjoin. Raises nothing: `abort` is drawn by `_wanted_plan`."""
    if state.plan is None or state.plain or state.secure_called or state.attempts >= state.created.policy.attempts:
        return None
    if state.v1 or (state.checked is not None and not state.checked.substitution):
        return None
    return state.plan


def _wanted_plan(state: Receiver, without: tuple[str, ...]) -> ChannelPlan | None:
    """The plan less what failed and the peers that are away. Raises CannotPropose where the policy says abort."""
    plan = _plan_left(state)
    if plan is None:
        # The last attempt's failure ends the channels; the policy may still want no payjoin at all.
        if state.plan is not None and state.failed and state.created.policy.on_peer_failure == "abort":
            replan(state.plan, state.failed, "abort")
        return None
    away = frozenset(index for index, order in enumerate(plan.orders) if order.peer in without)
    failed = state.failed | away
    return replan(plan, failed, state.created.policy.on_peer_failure) if failed else plan


def coins_found(state: Receiver, answer: CoinsFound, now: Instant, rng: Entropy) -> list[ev.Event]:  # noqa: PLR0911  # one return per case
    checked, policy = state.checked, state.created.policy
    if checked is None or not (state.coins is None or state.coins.again):
        return []
    if found := strangers_found(state, answer.inspection, now):
        return found
    why = _spent(state, answer.inspection)
    if why:
        return [ev.ProposingStopped(now, *why)]
    if checked.paid < policy.min_amount:
        return [ev.ProposingStopped(now, "policy", f"{checked.paid} sat are less than an own input is offered for")]
    excluded = state.coins.excluded if state.coins is not None else ()
    candidates = [coin for coin in answer.coins if coin.outpoint not in excluded]
    try:
        plan = _wanted_plan(state, answer.unreachable)
    except CannotPropose as exc:
        return [seal_refusal(state, exc.reply, now, rng)]
    chosen = choose_coins(checked, candidates, plan=plan, rng=rng)
    if not chosen and plan is not None and policy.own_input == "require":
        chosen, plan = choose_coins(checked, candidates, plan=None, rng=rng), None
    if not chosen and plan is None:
        return [ev.ProposingStopped(now, "policy", "no coin of ours fits this payment")]
    return [
        ev.CoinsReserved(
            now,
            coins=chosen,
            scripts=answer.scripts,
            lock_id=rng.token(32),
            until=now + LEASE,
            excluded=excluded,
            without=answer.unreachable,
        )
    ]


def coins_held(state: Receiver, answer: CoinsHeld, now: Instant, rng: Entropy) -> list[ev.Event]:  # noqa: PLR0911  # one return per case
    """The coins are ours: plan channels, or draft a plain payjoin."""
    coins = state.coins
    if coins is None or coins.again or state.checked is None:
        return []
    if answer.missing:
        return [
            ev.CoinsReserved(
                now,
                coins=(),
                scripts=coins.scripts,
                lock_id=coins.lock_id,
                until=coins.until,
                excluded=tuple(dict.fromkeys((*coins.excluded, *answer.missing))),
                without=coins.without,
                again=True,
            )
        ]
    if found := strangers_found(state, answer.inspection, now):
        return found
    why = _spent(state, answer.inspection)
    if why:
        return [ev.ProposingStopped(now, *why)]
    try:
        plan = _wanted_plan(state, coins.without)
    except CannotPropose as exc:
        return [seal_refusal(state, exc.reply, now, rng)]
    if plan is not None and _obstacle(state, answer.inspection, now) is None:
        try:
            intent = make_intent(state.checked, plan, coins.coins, coins.scripts)
        except CannotPropose:
            pass  # a plain payjoin may still fit
        else:
            ids = tuple(rng.token(32) for _ in intent.orders)
            return [ev.ChannelsIntended(now, state.attempts + 1, ids, intent, plan)]
    return _draft_plain(state, now, rng)


def _draft_plain(state: Receiver, now: Instant, rng: Entropy) -> list[ev.Event]:
    coins, checked = state.coins, state.checked
    if coins is None or checked is None:
        return []
    if not coins.coins:
        return [ev.ProposingStopped(now, "policy", "a plain payjoin needs a coin of ours")]
    try:
        intent = make_intent(checked, None, coins.coins, coins.scripts)
        drafted = draft_proposal(checked, intent, (), rng)
    except CannotPropose as exc:
        return [ev.ProposingStopped(now, "policy", exc.reason)]
    return [ev.ProposalDrafted(now, drafted.txid, drafted.psbt.serialize(), intent, (), drafted.change_vout)]


def peer_taken(state: Receiver, peer: str, now: Instant) -> list[ev.Event]:
    """Another session opens a channel with this peer: the plan goes on without it."""
    coins = state.coins
    if coins is None or peer in coins.without:
        return []
    return [
        ev.CoinsReserved(
            now,
            coins.coins,
            coins.scripts,
            coins.lock_id,
            coins.until,
            coins.excluded,
            (*coins.without, peer),
            coins.again,
        )
    ]


def strangers_found(state: Receiver, inspection: Inspection, now: Instant) -> list[ev.Event]:
    """A channel of this session that the log does not know: nothing more is proposed (M11)."""
    strangers = unlogged(state, inspection.channels)
    return [_found_at_node(strangers, now)] if strangers else []


def _found_at_node(strangers: tuple[NodeChannel, ...], now: Instant) -> ev.ProposalFound:
    outpoints = tuple(channel.outpoint for channel in strangers if channel.outpoint is not None)
    return ev.ProposalFound(
        now, "node", "the node lists a channel of this session that the log does not know", outpoints
    )


# ---------------------------------------------------------------- channels


def channels_offered(state: Receiver, answer: ChannelsOffered, now: Instant, own: bool) -> list[ev.Event]:
    intended = state.intended
    if intended is None or not own:
        return []
    reserved = {channel.id: channel for channel in answer.reserved}
    failed: list[int] = []
    reasons = _reasons(answer.failed)
    for index, (id, order) in enumerate(zip(intended.ids, intended.intent.orders, strict=True)):
        channel = reserved.get(id)
        if channel is None:
            failed.append(index)
        elif channel.capacity != order.capacity or len(channel.script) != 34:
            failed.append(index)
            reasons.append(f"the node offered another funding output than asked for channel {index}")
    if failed:
        return [ev.ChannelsReleasing(now, "plan", "; ".join(reasons) or "a channel was not reserved", tuple(failed))]
    return [ev.ChannelsReserved(now, tuple(reserved[id] for id in intended.ids))]


def _reasons(failed: tuple[ChannelFailure, ...]) -> list[str]:
    return [failure.reason for failure in failed]


def draft_with_channels(
    state: Receiver, inspection: Inspection, now: Instant, rng: Entropy, own: bool
) -> list[ev.Event]:
    """Rule 2 once more, then the transaction is frozen: this announces the secure calls."""
    intended, reserved, checked = state.intended, state.reserved, state.checked
    if intended is None or reserved is None or checked is None or not own:
        return []
    if unlogged(state, inspection.channels):
        return [ev.ChannelsReleasing(now, "plan", "the node lists a channel that the log does not know")]
    obstacle = _obstacle(state, inspection, now)
    if obstacle is not None:
        return [ev.ChannelsReleasing(now, "end", obstacle)]
    drafted = draft_proposal(checked, intended.intent, [channel.script for channel in reserved.channels], rng)
    return [
        ev.ProposalDrafted(
            now, drafted.txid, drafted.psbt.serialize(), intended.intent, drafted.funding, drafted.change_vout
        )
    ]


def channels_committed(state: Receiver, answer: ChannelsCommitted, now: Instant, own: bool) -> list[ev.Event]:
    """Every channel secured for exactly T and its output, or none."""
    intended, draft = state.intended, state.draft
    if intended is None or draft is None or not own:
        return []
    secured = {channel.id: channel for channel in answer.secured}
    expected = dict(zip(intended.ids, draft.channels, strict=True))
    failed = tuple(
        index
        for index, (id, outpoint) in enumerate(expected.items())
        if id not in secured or secured[id].outpoint != outpoint
    )
    if failed:
        reason = "; ".join(_reasons(answer.failed)) or "a channel was secured for another output"
        return [ev.ChannelsReleasing(now, "plain", reason, failed)]
    return [ev.ChannelsSecured(now, tuple(secured[id] for id in intended.ids))]


def secured_after_all(state: Receiver, inspection: Inspection, now: Instant, own: bool) -> list[ev.Event]:
    """After a restart: what the node lists as pending for exactly T is secured, whoever was told (design rule 6)."""
    intended, draft = state.intended, state.draft
    if intended is None or draft is None or own:
        return []
    listed = _listed(state, inspection)
    if all(outpoint in listed for outpoint in draft.channels):
        channels = tuple(
            SecuredChannel(id, outpoint, listed[outpoint])
            for id, outpoint in zip(intended.ids, draft.channels, strict=True)
        )
        return [ev.ChannelsSecured(now, channels)]
    return [ev.ChannelsReleasing(now, "plain", "not every channel became pending before the restart")]


def _listed(state: Receiver, inspection: Inspection) -> dict[Outpoint, bytes]:
    """The channels of this session that are at the node for good, with their backups."""
    return {
        channel.outpoint: channel.backup
        for channel in inspection.channels
        if channel.outpoint is not None and channel.memo == state.memo and channel.state in ("pending", "open")
    }


# ---------------------------------------------------------------- sign and post


def provisional(state: Receiver) -> ProvisionalProposal | None:
    if state.checked is None or state.drafted is None:
        return None
    drafted = state.drafted
    return restore_proposal(state.checked, drafted.intent, drafted.psbt, drafted.funding)


def signed(state: Receiver, answer: SignedPsbt, now: Instant) -> list[ev.Event]:
    proposal = provisional(state)
    if proposal is None or answer.purpose != "payjoin":
        return []
    try:
        finished = finish_proposal(proposal, answer.psbt)
    except NotNow:
        raise
    except PayjoinError as exc:
        return once(state, "wallet", f"the wallet's signature cannot be used: {exc}", now)
    if finished.txid != proposal.txid:
        return once(state, "wallet", "the wallet's signatures changed the transaction's id", now)
    return [ev.ProposalSigned(now, finished.psbt)]


def ready_to_post(state: Receiver, inspection: Inspection, now: Instant, rng: Entropy) -> list[ev.Event]:  # noqa: PLR0911  # one return per case
    """The last look: the point of no return is recorded only if every channel is listed *now* (M9) and nothing changed."""
    if state.signed is None or state.original is None:
        return []
    if found := strangers_found(state, inspection, now):
        return found
    channels = state.draft.channels if state.draft is not None and state.channels_pending else ()
    listed = _listed(state, inspection)
    if any(outpoint not in listed for outpoint in channels):
        return [ev.ChannelsReleasing(now, "plain", "the node does not list a channel of the proposal any more")]
    why = _spent(state, inspection)
    obstacle = _obstacle(state, inspection, now) if channels else None
    if channels and (why or obstacle):
        return [ev.ChannelsReleasing(now, "end", why[1] if why else obstacle or "")]
    if why:
        return [ev.ProposingStopped(now, *why)]
    method: Literal["POST", "PUT"] = "PUT" if state.v1 else "POST"
    try:
        message = _seal(state, rng)
    except PayjoinError as exc:  # the reply outgrew what was planned
        if channels:
            return [ev.ChannelsReleasing(now, "end", str(exc))]
        return [ev.ProposingStopped(now, "policy", str(exc))]
    return [ev.ProposalPosting(now, message, method, inspection.facts.tip)]


def _seal(state: Receiver, rng: Entropy) -> bytes:
    """The inner message: sealed to the payer's reply key, or for a v1 payer base64 in clear (BIP77, "Backwards compatibility")."""
    psbt = state.signed.psbt if state.signed is not None else b""
    if state.original is None or state.original.reply_key is None:
        return base64.b64encode(psbt)
    reply = PublicKey.parse(state.original.reply_key)
    return seal_message_b(reply, SecretKey(state.created.receiver_key), psbt, rng)


def hold_before_post(state: Receiver, answer: CoinsHeld, now: Instant, rng: Entropy) -> list[ev.Event]:
    """As `ready_to_post`; a coin that the wallet lost since is a coin that somebody else may spend."""
    if answer.missing:
        reason = f"the wallet does not hold {answer.missing[0]} for this session any more"
        if state.channels_pending:
            return [ev.ChannelsReleasing(now, "end", reason)]
        return [ev.ProposingStopped(now, "policy", reason)]
    return ready_to_post(state, answer.inspection, now, rng)


def delivered(state: Receiver, answer: Delivered, now: Instant) -> list[ev.Event]:
    if answer.status == 200:
        return [ev.ProposalPosted(now, answer.relay)]
    return once(state, "reply", f"the directory answered {answer.status} to the proposal", now)


def is_own(state: Receiver, memory: Memory) -> bool:
    """This worker announced the reservations, and the secure calls, in this run of the process."""
    if state.intended_seq not in memory.own:
        return False
    return not state.channels_pending or state.drafted_seq in memory.own
