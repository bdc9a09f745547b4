"""`approve = "ask"`: a person has a time of his own to agree; after it the payer hears what a refusal would tell him."""

from __future__ import annotations

import json

import pytest

from pjv2 import session as model
from pjv2.errors import WrongUsage
from pjv2.session import events as ev
from pjv2.session.receive import approve_until
from tests.unit.session.world import DAY, NOW, PLAN, Actor, World, want

TEN_MINUTES = ev.Policy(approve="ask", approve_within=600)


def asking(world: World, policy: ev.Policy = TEN_MINUTES, **more: object) -> Actor:
    actor = world.receiving(policy=policy, **more)
    actor.run("CheckedOriginal")
    return actor


def test_when_nobody_agrees_in_time_the_payer_is_refused_and_his_original_pays():
    world = World()
    actor = asking(world)
    assert actor.needs.wake_at == NOW + 600
    world.now += 599.9
    assert actor.settle() == []
    world.now = NOW + 600
    actor.settle()
    assert actor.names()[-2:] == ["Alarm", "RefusalPosting"]
    assert (actor.state.stage, actor.last(ev.RefusalPosting).code) == ("PendingFallback", "unavailable")
    assert model.status(actor.state) == "nobody approved in time: collecting the payer's own transaction"
    assert model.public_session(actor.state)["alarms"] == ["approval"]
    assert any(
        "nobody approved a proposal within 600 seconds" in line for line in model.explain(actor.state, actor.events)
    )
    actor.run(lambda state: state.refusal_posted and state.fallback_broadcasted)
    assert json.loads(world.read_proposal(actor).strip(b"\0"))["errorCode"] == "unavailable"
    world.chain.mine(6)
    actor.run("Closed")
    assert actor.state.closed.outcome == "PaidByFallback"
    assert not actor.has(ev.CoinsReserved)


def test_after_a_restart_beyond_the_time_the_first_tick_refuses():
    world = World()
    actor = asking(world)
    actor.restart()
    world.now += 3_000
    actor.restart()
    actor.settle()
    assert actor.has(ev.RefusalPosting)


def test_a_word_in_time_is_heard_and_one_too_late_is_told_so():
    world = World()
    actor = asking(world)
    world.now += 599
    actor.feed(want.Approve())
    world.now += 10
    actor.run("Monitor")
    assert not actor.has(ev.RefusalPosting)
    late = World()
    actor = asking(late)
    late.now += 660
    with pytest.raises(WrongUsage, match="60 seconds ago"):
        actor.decide(want.Approve())
    assert [type(event).__name__ for event in actor.decide(want.Decline())] == ["RefusalPosting"]


def test_the_time_ends_while_a_proposal_can_still_be_made():
    world = World()
    actor = asking(world, lifetime=300)
    assert approve_until(actor.state) == NOW + 270
    actor.feed(want.Approve())
    world.now += 269
    actor.run("Monitor")


@pytest.mark.parametrize("lifetime", [20, 30])
def test_an_original_that_came_too_late_to_ask_is_no_silence(lifetime):
    world = World()
    actor = world.receiving(policy=TEN_MINUTES, lifetime=lifetime)
    actor.run("UncheckedOriginal")
    actor.do(want.GatherFacts)
    world.now += 1
    actor.settle()
    assert (actor.last(ev.ProposingStopped).why, actor.has(ev.Alarm)) == ("too_late", False)
    with pytest.raises(WrongUsage, match="approval"):
        actor.decide(want.Approve())


def test_after_the_requests_expiry_nobody_listens_and_nothing_is_posted():
    world = World()
    actor = asking(world)
    world.now += DAY + 1
    actor.settle()
    assert actor.names()[-3:] == ["ExpiryPassed", "Alarm", "ProposingStopped"]
    assert actor.need(want.PostReply) is None
    actor.run(lambda state: state.fallback_broadcasted)


def test_a_cancel_and_a_spend_in_sight_are_told_as_what_they_are():
    world = World()
    actor = asking(world)
    actor.append(*actor.decide(want.Cancel()))
    world.now += 700
    actor.settle()
    assert (actor.last(ev.ProposingStopped).why, actor.has(ev.RefusalPosting)) == ("cancelled", False)
    world = World()
    actor = asking(world)
    world.chain.put(world.conflict())
    actor.look()
    world.now += 700
    actor.settle()
    assert (actor.last(ev.ProposingStopped).why, actor.has(ev.RefusalPosting)) == ("spend_seen", False)


def test_everybody_is_told_until_when():
    world = World()
    actor = asking(world)
    until = NOW + 600
    accepted = model.public_event(actor.state, actor.last(ev.OriginalAccepted))
    assert accepted["approve_until"] == until
    assert model.public_session(actor.state)["approve_until"] == until
    assert any("has 600 seconds to approve" in line for line in model.explain(actor.state, actor.events))
    actor.feed(want.Approve())
    assert model.public_event(actor.state, actor.last(ev.Approved))["approve_until"] == until
    assert model.public_session(actor.state)["approve_until"] is None
    nobody = World().receiving()
    nobody.run("Monitor")
    assert model.public_event(nobody.state, nobody.last(ev.OriginalAccepted))["approve_until"] is None


def test_with_channels_the_time_is_the_same_and_agreeing_plans_them():
    world = World()
    actor = world.receiving(PLAN, TEN_MINUTES)
    actor.run("CheckedOriginal")
    world.now += 500
    actor.feed(want.Approve())
    actor.run("Monitor")
    assert actor.has(ev.ChannelsSecured)
    actor = (world := World()).receiving(PLAN, TEN_MINUTES)
    actor.run("CheckedOriginal")
    world.now += 600
    actor.settle()
    assert actor.has(ev.RefusalPosting)
    assert not actor.has(ev.ChannelsIntended)
