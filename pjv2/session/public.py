"""What may be shown of a session: facts for JSON lines, hooks, metrics and people. Made of public facts, field by field.

No key, no PSBT, no message, no mailbox id, no peer's host ever comes out of here; address and URI only in `Created` of a receiver.
Free text that a wallet, node or directory wrote stays in the log, except where a person must read it (`Alarm`, reasons).

Law: an allow-list; a field that is not named here is not shown.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from pjv2.errors import ReplyCode
from pjv2.session import events as ev
from pjv2.session.create import payment_uri
from pjv2.session.log import State
from pjv2.session.receive import TRANSITIONS as RECEIVER_TRANSITIONS
from pjv2.session.receive import Receiver, approve_until, awaits_approval, cold_obstacle
from pjv2.session.receive import Stage as R
from pjv2.session.send import TRANSITIONS as SENDER_TRANSITIONS
from pjv2.session.send import Sender
from pjv2.session.send import Stage as S
from pjv2.units import Outpoint

# ---------------------------------------------------------------- one event


def public_event(state: State, event: ev.Event) -> Mapping[str, Any]:
    """The facts of an event that anybody may see; `state` is the session before or after it."""
    return {"session": state.session, **_facts(state, event)}


def _facts(state: State, event: ev.Event) -> dict[str, Any]:  # noqa: PLR0911, PLR0912  # one return per case
    match event:
        case ev.ReceiverCreated():
            uri = payment_uri(state) if isinstance(state, Receiver) else None
            return {
                "role": "receiver",
                "uri": uri,
                "address": event.address,
                "amount": event.amount,
                "expires": event.expires,
                "label": event.label,
                "channels": len(event.plan.orders) if event.plan is not None else 0,
                "cold_address": event.cold.address if event.cold is not None else None,
            }
        case ev.SenderCreated():
            return {
                "role": "sender",
                "amount": event.amount,
                "expires": event.expires,
                "fee": event.fee,
                "txid": event.txid,
            }
        case ev.Seen():
            return {"what": event.what, "txid": event.txid, "height": event.height, "amount": event.amount}
        case ev.Unseen():
            return {"what": event.what, "txid": event.txid}
        case ev.Closed():
            facts: dict[str, Any] = {
                "outcome": event.outcome.value,
                "txid": event.txid,
                "amount_requested": event.amount_requested,
                "amount_received": event.amount_received,
                "channels": [str(outpoint) for outpoint in event.channels],
            }
            if isinstance(state, Sender):
                facts["payjoin"] = event.outcome is ev.Outcome.PAID
            return facts
        case ev.LatePayment():
            return {"txid": event.txid, "amount": event.amount}
        case ev.OriginalAccepted():
            until = approve_until(state) if isinstance(state, Receiver) else None
            return {"txid": event.txid, "amount": event.amount, "approve_until": until}
        case ev.Approved():
            return {"approve_until": approve_until(state) if isinstance(state, Receiver) else None}
        case ev.OriginalRefused(code=code) | ev.RefusalPosting(code=code):
            return {"code": code.value}
        case ev.ProposalRefused():
            return {"code": _known_code(event.code)}
        case ev.CoinsReserved():
            return {"coins": len(event.coins), "value": sum(coin.txout.value for coin in event.coins)}
        case ev.ChannelsIntended():
            return {
                "attempt": event.attempt,
                "channels": [{"peer": order.peer, "capacity": order.capacity} for order in event.intent.orders],
            }
        case ev.ChannelsReserved():
            return {"channels": len(event.channels)}
        case ev.ProposalDrafted():
            channels = [f"{event.txid}:{entry.vout}" for entry in event.funding]
            return {"txid": event.txid, "channels": channels, "cold": _is_cold(state, event)}
        case ev.ChannelsSecured():
            return {"channels": [str(channel.outpoint) for channel in event.channels]}
        case ev.ChannelsReleasing():
            return {"next": event.next, "channels": _channels(state)}
        case ev.ChannelsReleased():
            return {"blocked_peers": [{"peer": peer, "until_height": height} for peer, height in event.blocked]}
        case ev.ProposalPosting():
            return {"height": event.height}
        case ev.ProposingStopped():
            return {"why": event.why}
        case ev.ProposalFound():
            return {"where": event.where, "channels": [str(outpoint) for outpoint in event.channels]}
        case ev.ProposalAccepted() | ev.Signed() | ev.WayOutBroadcasting() | ev.ReclaimBroadcasting():
            return {"txid": event.txid}
        case ev.FallbackBroadcasting() | ev.FallbackBroadcasted():
            return {"txid": event.txid}
        case ev.FallbackRejected():
            return {"reason": event.reason}
        case ev.ChildBroadcasting():
            return {"parent": event.parent, "txid": event.txid, "fee": event.fee}
        case ev.CancelRequested():
            return {"broadcast": event.broadcast}
        case ev.Alarm():
            return {"what": event.what, "detail": event.detail}
        case ev.ReclaimRequested():
            return {"fee_rate": event.rate.sat_per_vb}
        case _:
            return {}


def _known_code(code: str | None) -> str | None:
    """The receiver's code, if it is one of BIP78's: his own words are shown to nobody."""
    return code if code in {entry.value for entry in ReplyCode} else None


def _is_cold(state: State, event: ev.ProposalDrafted) -> bool:
    """The payment goes to the cold address."""
    cold = state.created.cold if isinstance(state, Receiver) else None
    return cold is not None and any(output.script == cold.script for output in event.intent.outputs)


def _channels(state: State) -> list[str]:
    if isinstance(state, Receiver) and state.draft is not None and state.channels_pending:
        return [str(outpoint) for outpoint in state.draft.channels]
    return []


# ---------------------------------------------------------------- one session


def public_session(state: State) -> Mapping[str, Any]:
    """What `show` and `history` tell about a session."""
    created = state.created
    facts: dict[str, Any] = {
        "session": state.session,
        "role": state.role,
        "state": state.stage.value,
        "status": status(state),
        "outcome": state.closed.outcome.value if state.closed is not None else None,
        "txid": state.closed.txid if state.closed is not None else None,
        "created": created.at,
        "expires": created.expires,
        "amount_requested": created.amount,
        "amount_received": state.closed.amount_received if state.closed is not None else None,
        "label": created.label,
        "network": created.network.value,
        "seen": [{"what": s.what, "txid": s.txid, "height": s.height, "amount": s.amount} for s in state.sightings],
        "alarms": [what for what, _ in state.alarms],
        "cancelled": state.cancelled,
    }
    if isinstance(state, Receiver):
        channels: Sequence[Outpoint] = state.closed.channels if state.closed is not None else ()
        if state.closed is None and state.draft is not None and state.channels_pending:
            channels = state.draft.channels
        facts["channels"] = [str(outpoint) for outpoint in channels]
        facts["proposal"] = state.draft.txid if state.draft is not None else None
        facts["fallback"] = state.accepted.txid if state.accepted is not None else None
        waits = state.stage is R.CHECKED_ORIGINAL and awaits_approval(state)
        facts["approve_until"] = approve_until(state) if waits else None
        facts["cold"] = state.pays_cold if state.created.cold is not None else None
    else:
        facts["payjoin"] = state.closed is not None and state.closed.outcome is ev.Outcome.PAID
        facts["proposal"] = state.signed.txid if state.signed is not None else None
        facts["fallback"] = created.txid if isinstance(created, ev.SenderCreated) else None
    return facts


_RECEIVER_STATUS: Mapping[R, str] = {
    R.INITIALIZED: "waiting for the payer",
    R.UNCHECKED_ORIGINAL: "checking the payer's transaction",
    R.CHECKED_ORIGINAL: "preparing a proposal",
    R.RESERVING_CHANNELS: "asking the channel peers",
    R.WANTS_PROPOSAL: "drafting the proposal",
    R.SECURING_CHANNELS: "securing the channels",
    R.PROVISIONAL_PROPOSAL: "signing the proposal",
    R.PAYJOIN_PROPOSAL: "looking once more before the proposal is posted",
    R.POSTING_PROPOSAL: "posting the proposal",
    R.RELEASING_CHANNELS: "releasing channels",
    R.PENDING_FALLBACK: "collecting the payer's own transaction",
    R.HAS_REPLYABLE_ERROR: "refusing the payer's transaction",
    R.MONITOR: "waiting for the payment to be buried",
    R.CLOSED: "ended",
}
_SENDER_STATUS: Mapping[S, str] = {
    S.CREATED: "ready to send",
    S.POSTING_ORIGINAL: "sending the Original to the receiver",
    S.POLLING_FOR_PROPOSAL: "waiting for a proposal",
    S.WANTS_SIGNATURE: "signing the payjoin",
    S.SIGNED_PAYJOIN: "about to broadcast the payjoin",
    S.BROADCASTING_PAYJOIN: "waiting for the payjoin to be buried",
    S.PENDING_FALLBACK: "waiting for the Original to be buried",
    S.CLOSED: "ended",
}


def status(state: State) -> str:
    """Where a session stands, in a few words."""
    if state.closed is not None:
        return f"ended: {state.closed.outcome.value}"
    if isinstance(state, Receiver):
        if state.found:
            return "an unknown proposal of this session is out: waiting for a burial"
        if state.stage is R.CHECKED_ORIGINAL and awaits_approval(state):
            return "waiting for approval"
        if state.stage is R.PENDING_FALLBACK and any(what == "approval" for what, _ in state.alarms):
            return "nobody approved in time: collecting the payer's own transaction"
        return _RECEIVER_STATUS[state.stage]
    return _SENDER_STATUS[state.stage]


# ---------------------------------------------------------------- prose


_PROSE: Mapping[type[ev.Event], str] = {
    ev.ReceiverCreated: "The request was made.",
    ev.SenderCreated: "The payment was made; its coins are leased.",
    ev.CancelRequested: "Somebody asked to cancel.",
    ev.ExpiryPassed: "The request expired: nothing new is proposed, collecting goes on.",
    ev.BroadcastRequested: "Somebody asked to broadcast the Original now.",
    ev.Unseen: "{what} {txid} is out of sight.",
    ev.Alarm: "A person should look at this: {detail}.",
    ev.FallbackBroadcasting: "The Original {txid} is broadcast.",
    ev.FallbackBroadcasted: "The network took the Original {txid}.",
    ev.FallbackRejected: "The network refused the Original: {reason}.",
    ev.ChildBroadcasting: "{parent} is stuck: the child {txid} pays {fee} sat for it.",
    ev.CoinsReleased: "Our coins are free again.",
    ev.LatePayment: "{amount} sat arrived after the end, in {txid}.",
    ev.MailboxSpoiled: "The mailbox holds junk: nobody can reach this request through it; the address is still watched.",
    ev.OriginalReceived: "The payer's Original arrived.",
    ev.OriginalAccepted: "The Original {txid} passed every check; it pays {amount} sat.",
    ev.OriginalRefused: "The Original was refused ({code}).",
    ev.RefusalPosting: "The payer is told {code}.",
    ev.RefusalPosted: "The payer was told.",
    ev.Approved: "A person approved.",
    ev.CoinsReserved: "{coins} coins of ours ({value} sat) are set aside.",
    ev.ChannelsIntended: "Attempt {attempt}: the channel peers are asked.",
    ev.ChannelsReserved: "Every peer agreed.",
    ev.ProposalDrafted: "The proposal {txid} is frozen.",
    ev.ChannelsSecured: "Every channel's commitment is on our disk.",
    ev.ProposalSigned: "Our inputs are signed.",
    ev.ProposalPosting: "The proposal leaves, at height {height}: from here only a burial ends it.",
    ev.ProposalPosted: "The directory took the proposal.",
    ev.ProposingStopped: "Nothing is proposed any more ({why}).",
    ev.ProposalFound: "A proposal is out that this log does not know ({where}): nothing is released without a burial.",
    ev.ChannelsReleasing: "The channels are released ({next}).",
    ev.ChannelsReleased: "The channels are released.",
    ev.WayOutBroadcasting: "Our coins are spent back to us in {txid}.",
    ev.OriginalPosting: "The Original leaves: from here its coins stay leased until one is spent.",
    ev.OriginalPosted: "The directory took the Original.",
    ev.ProposalAccepted: "A proposal came and broke no rule: {txid}.",
    ev.ProposalRefused: "There is no payjoin; the Original pays.",
    ev.Signed: "The payjoin {txid} is signed.",
    ev.Broadcasting: "The payjoin is broadcast.",
    ev.ReclaimRequested: "Somebody asked for the coins back, at {fee_rate} sat/vB.",
    ev.ReclaimBroadcasting: "The coins are spent back in {txid}.",
}


def explain(state: State, events: Sequence[ev.Event]) -> list[str]:
    """The log as prose, one line per event, and where the session stands on the diagram."""
    lines = [_sentence(state, event) for event in events]
    lines.append(f"Now: {state.stage.value} ({status(state)}).")
    table = RECEIVER_TRANSITIONS if isinstance(state, Receiver) else SENDER_TRANSITIONS
    ahead = [
        f"{kind.__name__} -> {' or '.join(target.value for target in targets)}"
        for (stage, kind), targets in table.items()
        if stage == state.stage and any(target != stage for target in targets)
    ]
    if ahead:
        lines.append("From here: " + "; ".join(ahead) + ".")
    return lines


def _sentence(state: State, event: ev.Event) -> str:
    match event:
        case ev.Seen():
            where = "in the mempool" if event.height is None else f"in block {event.height}"
            return f"{event.what} {event.txid} is in sight, {where}."
        case ev.Closed():
            return f"The session ended: {event.outcome.value}, {event.amount_received} sat."
        case ev.ProposalSigned() if isinstance(state, Receiver) and state.drafts and not state.drafts[-1].ours:
            return "Nothing of ours is in the proposal, so there is nothing to sign."
        case _:
            return _PROSE[type(event)].format(**_facts(state, event)) + _more(state, event)


def _more(state: State, event: ev.Event) -> str:
    """What a person must know beside the fact: who is asked, and where the payment goes."""
    if not isinstance(state, Receiver):
        return ""
    words = ""
    match event:
        case ev.OriginalAccepted():
            until = approve_until(state)
            if until is not None:
                words += f" A person has {max(0, int(until - event.at))} seconds to approve a proposal."
            if state.created.cold is not None and (why := cold_obstacle(state)) is not None:
                words += f" The payment does not go to the cold address: {why}."
        case ev.ProposalDrafted() if _is_cold(state, event):
            words = " It sends the payment to the cold address, and spends no coin of ours."
        case _:
            pass
    return words


def diagram() -> list[tuple[str, str, str, str]]:
    """The rows of both transition tables: role, state, event, next states; generated from `TRANSITIONS`."""
    rows = [
        ("receiver", stage.value, kind.__name__, " | ".join(target.value for target in targets))
        for (stage, kind), targets in RECEIVER_TRANSITIONS.items()
    ]
    rows += [
        ("sender", stage.value, kind.__name__, " | ".join(target.value for target in targets))
        for (stage, kind), targets in SENDER_TRANSITIONS.items()
    ]
    return rows
