"""What may be shown: public facts, status, prose, the diagram; and that no secret ever is."""

from __future__ import annotations

import json
import re

import pytest

from pjv2 import session as model
from pjv2.session import events as ev
from pjv2.session.log import EVENTS
from tests.unit.session.samples import SAMPLES
from tests.unit.session.scenarios import all_actors, steps
from tests.unit.session.world import PLAN, World


def secrets_of(actor):
    """Everything in a session that nobody may see: hex and raw text forms."""
    found = set()
    created = actor.state.created
    for event in actor.events:
        for name in (
            "receiver_key",
            "reply_key",
            "body",
            "message",
            "psbt",
            "raw",
            "lock_id",
            "original",
            "keys",
        ):
            value = getattr(event, name, None)
            if isinstance(value, bytes) and len(value) > 8:
                found |= {value.hex()[:64], value.hex(), repr(value)[2:40]}
        found |= {id.hex() for id in getattr(event, "ids", ())}
        for channel in getattr(event, "channels", ()):
            if getattr(channel, "backup", b""):
                found.add(channel.backup.hex())
    found |= {actor.state.mailbox.short_id, actor.state.reply_mailbox.short_id, created.directory}
    if isinstance(created, ev.ReceiverCreated) and created.plan is not None:
        found |= {order.host for order in created.plan.orders}
    return {secret for secret in found if len(secret) > 8}


def shown(actor):
    """Everything that is shown of a session, except the URI in a receiver's Created."""
    parts = []
    for step in steps(actor):
        facts = dict(model.public_event(step.after, step.event))
        if isinstance(step.event, ev.ReceiverCreated):
            assert facts.pop("uri").startswith("bitcoin:")
            assert facts.pop("address") == step.event.address
        parts.append(json.dumps(facts))
    parts.append(json.dumps(model.public_session(actor.state)))
    parts += model.explain(actor.state, actor.events)
    return "\n".join(parts)


@pytest.mark.parametrize("name", sorted(all_actors()))
def test_no_secret_is_in_any_public_fact_or_prose(name):
    actor = all_actors()[name]
    text = shown(actor)
    for secret in secrets_of(actor):
        assert secret not in text, secret
    assert actor.state.created.address not in text


@pytest.mark.parametrize("name", sorted(all_actors()))
def test_no_secret_is_in_any_repr(name):
    actor = all_actors()[name]
    keys = {
        value
        for event in actor.events
        for field in ("receiver_key", "reply_key", "lock_id", "message", "body", "psbt", "original")
        if isinstance(value := getattr(event, field, None), bytes) and len(value) > 8 and not is_public(event, field)
    }
    texts = [repr(event) for event in actor.events]
    texts += [repr(step.after) for step in steps(actor)]
    texts += [repr(need) for need in actor.done]
    for text in texts:
        for key in keys:
            assert repr(key)[2:-1] not in text
            assert key.hex() not in text


def is_public(event, field):
    """The payer's reply key in `OriginalReceived` is a public key."""
    return isinstance(event, ev.OriginalReceived) and field == "reply_key"


@pytest.mark.parametrize("name", sorted(EVENTS))
def test_every_event_has_public_facts_that_are_json_and_prose(name):
    role = "sender" if name in ("SenderCreated", "Signed", "OriginalPosted") else "receiver"
    actor = all_actors()["sender sold" if role == "sender" else "paid"]
    facts = model.public_event(actor.state, SAMPLES[name])
    assert facts["session"] == actor.state.session
    json.dumps(facts)
    lines = model.explain(actor.state, [SAMPLES[name]])
    assert "{" not in lines[0]
    assert "None" not in lines[0]


def test_the_facts_that_other_programs_rely_on():
    world = World()
    actor = world.receiver()
    facts = model.public_event(actor.state, actor.events[0])
    assert {"session", "uri", "address", "amount", "expires"} <= set(facts)
    paid = all_actors()["paid"]
    closed = model.public_event(paid.state, paid.last(ev.Closed))
    assert set(closed) == {"session", "outcome", "txid", "amount_requested", "amount_received", "channels"}
    assert closed["channels"] == [str(outpoint) for outpoint in paid.state.closed.channels]
    seen = model.public_event(paid.state, paid.last(ev.Seen))
    assert {"what", "txid", "height"} <= set(seen)
    sold = all_actors()["sender sold"]
    assert model.public_event(sold.state, sold.last(ev.Closed))["payjoin"] is True


def test_a_sessions_facts_name_its_proposal_and_channels_while_they_matter():
    world = World()
    actor = world.receiving(PLAN)
    assert model.public_session(actor.state)["channels"] == []
    actor.run("Monitor")
    facts = model.public_session(actor.state)
    assert facts["proposal"] == actor.state.draft.txid
    assert facts["channels"] == [str(outpoint) for outpoint in actor.state.draft.channels]
    assert facts["fallback"] == world.original.txid
    releasing = ev.ChannelsReleasing(0, "dead", "x")
    assert model.public_event(actor.state, releasing)["channels"] == facts["channels"]
    sold = model.public_session(all_actors()["sender sold"].state)
    assert (sold["payjoin"], sold["outcome"], sold["status"]) == (True, "Paid", "ended: Paid")


def test_every_state_has_a_status_of_a_few_words():
    told = {model.status(step.after) for actor in all_actors().values() for step in steps(actor)}
    assert len(told) > 20
    assert all(re.fullmatch(r"[A-Za-z' :]+", text) for text in told)


def test_explain_tells_the_place_on_the_diagram():
    actor = all_actors()["fallback while monitored"]
    lines = model.explain(actor.state, actor.events)
    assert len(lines) == len(actor.events) + 2
    assert lines[-2].startswith("Now: Monitor")
    assert "Closed -> Closed" in lines[-1]
    ended = all_actors()["paid"]
    assert model.explain(ended.state, ended.events)[-1] == "Now: Closed (ended: Paid)."


def test_the_diagram_has_a_row_per_cell():
    rows = model.diagram()
    assert len(rows) == sum(len(table) for table in model.TRANSITIONS.values())
    assert ("receiver", "PostingProposal", "ProposalPosted", "Monitor") in rows
    assert ("sender", "SignedPayjoin", "Broadcasting", "BroadcastingPayjoin") in rows
