"""The nine rules that keep the money safe, as far as they are decided here; each is also taken apart in the other files."""

from __future__ import annotations

from dataclasses import replace

import pytest

from pjv2 import session as model
from pjv2.errors import IllegalEvent
from pjv2.session import events as ev
from tests.unit.session.scenarios import all_actors
from tests.unit.session.world import DAY, PLAN, TWO, World, kit, want


def stopped_at(stage, plan=PLAN):
    world = World()
    actor = world.receiving(plan)
    actor.run(stage)
    return world, actor


def test_rule_1_no_call_to_the_node_before_an_original_was_accepted():
    world = World()
    actor = world.receiver(TWO)
    actor.look()
    actor.do(want.Poll)
    assert world.node.calls == []
    world.post_original(actor)
    actor.do(want.Poll)
    assert not any(isinstance(need, want.ReserveChannels | want.InspectChannels | want.FindCoins) for need in actor.due)


def test_rule_2_is_looked_at_by_facts_of_that_moment_before_reserve_secure_and_post():
    actor = all_actors()["paid"]
    names = [type(need).__name__ for need in actor.done]
    assert names.index("ReserveCoins") < names.index("ReserveChannels")
    between = names[names.index("ReserveChannels") : names.index("SecureChannels")]
    assert "InspectChannels" in between
    assert "ReserveCoins" in names[names.index("Sign") : names.index("PostReply")]


def test_rule_3_no_proposal_leaves_while_a_channel_is_not_secured():
    _, actor = stopped_at("PayjoinProposal")
    posting = ev.ProposalPosting(0, b"x", "POST", 1)
    unsecured = replace(actor.state, secured=None)
    with pytest.raises(IllegalEvent, match="not secured"):
        model.evolve(unsecured, posting)
    assert model.evolve(actor.state, posting).stage == "PostingProposal"


def test_rule_4_a_channel_proposal_without_a_coin_of_ours_needs_the_named_risk():
    for own_input, channels in (("require", 0), ("prefer", 1)):
        world = World()
        world.ours.clear()
        actor = world.receiving(PLAN, ev.Policy(own_input=own_input))
        actor.run(lambda state: state.stage in ("PendingFallback", "Monitor"))
        assert sum(isinstance(event, ev.ChannelsIntended) for event in actor.events) == channels


@pytest.mark.parametrize("next_", ["plan", "plain", "end"])
def test_rule_5_after_the_post_channels_are_released_only_as_dead(next_):
    for stage in ("PostingProposal", "Monitor"):
        _, actor = stopped_at(stage)
        with pytest.raises(IllegalEvent, match="not released"):
            model.evolve(actor.state, ev.ChannelsReleasing(0, next_, "x"))


def test_rule_5_before_the_post_nothing_is_dead():
    _, actor = stopped_at("PayjoinProposal")
    with pytest.raises(IllegalEvent, match="not released"):
        model.evolve(actor.state, ev.ChannelsReleasing(0, "dead", "x"))


def test_rule_5_a_release_excludes_the_post_of_that_draft():
    _, actor = stopped_at("PayjoinProposal")
    released = model.evolve(actor.state, ev.ChannelsReleasing(0, "end", "x"))
    for state in (released, model.evolve(released, ev.ChannelsReleased(0))):
        with pytest.raises(IllegalEvent):
            model.evolve(state, ev.ProposalPosting(0, b"x", "POST", 1))


def test_rule_5_a_proposal_with_channels_is_never_just_stopped():
    _, actor = stopped_at("PayjoinProposal")
    with pytest.raises(IllegalEvent, match="releasing"):
        model.evolve(actor.state, ev.ProposingStopped(0, "expired"))
    _, plain = stopped_at("PayjoinProposal", None)
    with pytest.raises(IllegalEvent):
        model.evolve(plain.state, ev.ChannelsReleasing(0, "end", "x"))


def test_rule_5_no_second_refusal():
    world = World()
    world.chain.suitability = kit.Suitability("refused")
    actor = world.receiving()
    actor.run("HasReplyableError")
    with pytest.raises(IllegalEvent, match="one content"):
        model.evolve(actor.state, actor.last(ev.RefusalPosting))


ANNOUNCED = {
    "ReserveCoins": "CoinsReserved",
    "ReserveChannels": "ChannelsIntended",
    "SecureChannels": "ProposalDrafted",
    "ReleaseChannels": "ChannelsReleasing",
    "PostOriginal": "OriginalPosting",
}
BROADCAST = {
    "fallback": "FallbackBroadcasting",
    "way_out": "WayOutBroadcasting",
    "child": "ChildBroadcasting",
    "payjoin": "Broadcasting",
    "reclaim": "ReclaimBroadcasting",
}


@pytest.mark.parametrize("name", sorted(all_actors()))
def test_rule_6_what_costs_money_is_wanted_only_after_the_event_that_announces_it(name):
    """At every step of every story: no such need without its announcement in the log."""
    actor = all_actors()[name]
    state = None
    logged = set()
    for event in actor.events:
        state = model.evolve(state, event)
        logged.add(type(event).__name__)
        for memory in (want.Memory(), actor.memory, replace(actor.memory, own=frozenset(range(state.seq)))):
            for need in model.needs(state, actor.world.now, memory).due:
                kind = type(need).__name__
                if kind == "ReserveCoins" and isinstance(state, model.Sender):
                    continue  # leased with Created
                if kind == "ReleaseChannels" and state.closed is not None:
                    continue  # the sweep of closed sessions (4.3) has no event
                if kind in ANNOUNCED:
                    assert ANNOUNCED[kind] in logged
                if kind == "Broadcast":
                    assert BROADCAST[need.purpose] in logged
                if kind == "PostReply":
                    announced = state.posting or state.refusal
                    assert announced is not None
                    assert announced.message == need.message


def test_rule_6_reservations_are_not_resumed_by_another_run_of_the_process():
    for stage in ("ReservingChannels", "WantsProposal"):
        _, actor = stopped_at(stage)
        actor.restart()
        actor.settle()
        assert actor.last(ev.ChannelsReleasing).next == "plan"


def test_rule_7_no_new_attempt_after_the_first_secure_call():
    world = World()
    world.node.fail_secure.add(PLAN.orders[0].peer)
    actor = world.receiving(PLAN)
    actor.run("ReleasingChannels")
    actor.run("CheckedOriginal")
    again = replace(actor.last(ev.ChannelsIntended), attempt=2)
    with pytest.raises(IllegalEvent, match="secure"):
        model.evolve(actor.state, again)
    _, securing = stopped_at("SecuringChannels")
    with pytest.raises(IllegalEvent, match="re-planning"):
        model.evolve(securing.state, ev.ChannelsReleasing(0, "plan", "x"))


def test_rule_7_the_payment_arrives_whatever_fails():
    world = World()
    world.ours.clear()
    world.node.fail_reserve.add(PLAN.orders[0].peer)
    actor = world.receiving(PLAN)
    actor.run(lambda state: state.fallback_broadcasted)
    world.chain.mine(6)
    actor.run("Closed")
    assert actor.state.closed.amount_received == 100_000


def test_rule_8_expiry_never_stops_monitoring_fallback_or_clean_up():
    for stage in ("PostingProposal", "Monitor", "ReleasingChannels"):
        world, actor = stopped_at("ProvisionalProposal" if stage == "ReleasingChannels" else stage)
        world.now += DAY + 700
        actor.settle()
        assert actor.state.expired
        actor.run(lambda state: state.fallback_broadcasted, skip=[want.PostReply])
        world.chain.mine(6)
        actor.run("Closed", skip=[want.PostReply])


def test_rule_9_the_change_of_a_channel_proposal_can_carry_a_child():
    _, actor = stopped_at("Monitor")
    change = actor.state.drafted.change_vout
    assert change is not None
    assert actor.state.draft.tx.outputs[change].value > 10_000


def test_rule_9_a_way_out_spends_exactly_our_own_coins():
    world, actor = stopped_at("Monitor")
    other = world.conflict()
    with pytest.raises(IllegalEvent, match="exactly"):
        model.evolve(actor.state, ev.WayOutBroadcasting(0, other.txid, other.raw, "x"))
    with pytest.raises(IllegalEvent, match="another transaction id"):
        model.evolve(actor.state, ev.WayOutBroadcasting(0, "00" * 32, world.spend_of_ours().raw, "x"))


def test_nothing_but_the_announced_fallback_is_recorded_as_such():
    _, actor = stopped_at("Monitor")
    for kind in (ev.FallbackBroadcasting, ev.FallbackBroadcasted):
        with pytest.raises(IllegalEvent, match="another transaction"):
            model.evolve(actor.state, kind(0, "00" * 32))
    with pytest.raises(IllegalEvent, match="another transaction id"):
        model.evolve(actor.state, ev.ChildBroadcasting(0, "00" * 32, "11" * 32, actor.state.checked.tx.raw, 1))


def test_coins_are_given_back_once():
    actor = all_actors()["way out while posting"]
    freed = [i for i, event in enumerate(actor.events) if isinstance(event, ev.CoinsReleased)]
    state = model.replay(actor.records[: freed[0] + 1])
    with pytest.raises(IllegalEvent, match="no coin"):
        model.evolve(state, ev.CoinsReleased(0))
    sender = all_actors()["sender sold"]
    freed = [i for i, event in enumerate(sender.events) if isinstance(event, ev.CoinsReleased)]
    state = model.replay(sender.records[: freed[0]])
    with pytest.raises(IllegalEvent, match="leased"):
        model.evolve(state, sender.last(ev.Closed))
    with pytest.raises(IllegalEvent, match="given back"):
        model.evolve(model.replay(sender.records[: freed[0] + 1]), ev.CoinsReleased(0))


def test_a_senders_events_must_belong_to_his_payment():
    actor = all_actors()["sender sold"]
    at = {type(event): i for i, event in enumerate(actor.events)}
    other = actor.world.conflict()

    def refuses(kind, event):
        with pytest.raises(IllegalEvent):
            model.evolve(model.replay(actor.records[: at[kind]]), event)

    refuses(ev.ProposalAccepted, replace(actor.last(ev.ProposalAccepted), txid="00" * 32))
    refuses(ev.ProposalAccepted, replace(actor.last(ev.ProposalAccepted), psbt=b"junk"))
    refuses(ev.Signed, replace(actor.last(ev.Signed), txid=other.txid, raw=other.raw))
    refuses(ev.Signed, replace(actor.last(ev.Signed), txid="00" * 32))
    refuses(ev.Broadcasting, ev.FallbackBroadcasting(0, "00" * 32))
    refuses(ev.Broadcasting, ev.ReclaimBroadcasting(0, "00" * 32, other.raw))
    foreign = actor.world.payment()
    refuses(ev.Broadcasting, ev.ReclaimBroadcasting(0, foreign.txid, foreign.raw))
    refuses(ev.Broadcasting, ev.ChildBroadcasting(0, "00" * 32, "11" * 32, other.raw, 1))
