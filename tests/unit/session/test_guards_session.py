"""Guards of the sessions that no other test would miss."""

from __future__ import annotations

from dataclasses import replace

import pytest

from pjv2 import session as model
from pjv2.errors import IllegalEvent
from pjv2.psbt.tx import Psbt
from pjv2.session import events as ev
from pjv2.session.monitor import STUCK
from tests.unit.session.scenarios import sending
from tests.unit.session.world import DAY, PLAN, TWO, Actor, World, kit, want

ELSEWHERE = kit.Outpoint("cd" * 32, 0)


def at(stage, plan=PLAN) -> tuple[World, Actor]:
    world = World()
    actor = world.receiving(plan)
    actor.run(stage)
    return world, actor


@pytest.mark.parametrize("stage", ["WantsProposal", "PayjoinProposal"])
def test_a_wallet_that_cannot_sign_any_more_ends_the_channels_right_before_secure_and_post(stage):
    world, actor = at(stage)
    world.can_sign = False
    actor.do(want.InspectChannels if stage == "WantsProposal" else want.ReserveCoins)
    assert actor.last(ev.ChannelsReleasing).next == "end"
    assert not actor.has(ev.ProposalPosting)


def test_a_look_at_the_chain_is_enough_to_stop_the_proposing():
    world, actor = at("CheckedOriginal", None)
    world.chain.put(world.original)
    actor.look()
    assert actor.last(ev.ProposingStopped).why == "spend_seen"
    assert actor.state.stage == "PendingFallback"


def contradicted(actor: Actor, event: ev.Event, why: str) -> None:
    """The event is no continuation of this log."""
    with pytest.raises(IllegalEvent, match=why):
        model.evolve(actor.state, event)


def test_a_log_in_which_a_channel_was_secured_for_another_output_is_not_believed():
    world, actor = at("SecuringChannels")
    [secured] = world.answer(actor, actor.need(want.SecureChannels)).secured
    event = ev.ChannelsSecured(world.now, (secured,))
    assert model.evolve(actor.state, event).stage == "ProvisionalProposal"
    contradicted(actor, replace(event, channels=(replace(secured, outpoint=ELSEWHERE),)), "not those of the drafted")


def test_a_log_in_which_other_channels_were_reserved_than_intended_is_not_believed():
    world, actor = at("ReservingChannels", TWO)
    first, second = world.answer(actor, actor.need(want.ReserveChannels)).reserved
    assert model.evolve(actor.state, ev.ChannelsReserved(world.now, (first, second))).stage == "WantsProposal"
    for channels in ((first,), (second, first), (first, replace(second, capacity=second.capacity + 1))):
        contradicted(actor, ev.ChannelsReserved(world.now, channels), "not the intended ones")


def test_a_log_in_which_something_else_was_signed_than_drafted_is_not_believed():
    world, actor = at("ProvisionalProposal")
    drafted = Psbt.parse(actor.state.drafted.psbt)
    outputs = (replace(drafted.tx.outputs[0], value=drafted.tx.outputs[0].value + 1), *drafted.tx.outputs[1:])
    other = replace(drafted, tx=replace(drafted.tx, outputs=outputs))
    contradicted(actor, ev.ProposalSigned(world.now, other.serialize()), "another transaction")


def test_a_log_whose_coins_are_none_opens_no_channels_where_an_input_of_ours_is_required():
    world, actor = at(lambda state: state.coins is not None)
    actor.append(replace(actor.last(ev.CoinsReserved), coins=()))
    actor.do(want.ReserveCoins)
    assert not actor.has(ev.ChannelsIntended)
    assert actor.last(ev.ProposingStopped).why == "policy"
    assert world.node.calls == []


def test_bytes_in_the_reply_mailbox_that_this_log_did_not_announce_are_not_ours():
    _, actor = at("Monitor")
    announced = actor.state.posting.message
    assert model.receive.evidence.own_bytes(actor.state, want.ReplyRead(True, None))
    assert model.receive.evidence.own_bytes(actor.state, want.ReplyRead(True, announced))
    assert not model.receive.evidence.own_bytes(actor.state, want.ReplyRead(True, announced + b"x"))


def test_a_log_in_which_two_channels_share_an_id_is_not_believed():
    _, actor = at("ReservingChannels", TWO)
    intended = actor.last(ev.ChannelsIntended)
    before = model.replay(actor.records[: actor.events.index(intended)])
    assert model.evolve(before, intended).stage == "ReservingChannels"
    with pytest.raises(IllegalEvent, match="ids differ"):
        model.evolve(before, replace(intended, ids=(intended.ids[0],) * 2))


def test_a_log_in_which_channels_were_planned_after_a_secure_call_is_not_believed():
    world = World()
    world.node.fail_secure.add(PLAN.orders[0].peer)
    actor = world.receiving(PLAN)
    actor.run("ReleasingChannels")
    actor.run("CheckedOriginal")
    again = replace(actor.last(ev.ChannelsIntended), attempt=2)
    contradicted(actor, again, "after a secure call")


def test_the_last_attempt_is_followed_by_a_plain_payjoin_although_a_peer_is_left():
    world = World()
    world.node.fail_reserve.add(TWO.orders[0].peer)
    actor = world.receiving(TWO, ev.Policy(on_peer_failure="drop", attempts=1))
    actor.run("Monitor")
    assert [event.attempt for event in actor.events if isinstance(event, ev.ChannelsIntended)] == [1]
    assert actor.last(ev.ProposalDrafted).funding == ()


def test_a_proposal_that_the_directory_never_took_is_not_posted_after_expiry():
    world, actor = at("PostingProposal")
    assert actor.need(want.PostReply) is not None
    world.now += DAY + 1
    actor.settle()
    assert actor.state.stage == "PostingProposal"
    assert actor.need(want.PostReply) is None


@pytest.mark.parametrize("plan", [None, PLAN])
def test_a_child_pays_no_more_than_our_highest_fee_rate_whatever_the_network_asks(plan):
    world, actor = at("Monitor", plan)
    parent = world.chain.put(world.payjoin(actor))
    actor.look()
    world.chain.rate = 20 * actor.state.created.policy.max_fee_rate.sat_per_kwu
    world.now += STUCK
    actor.look()
    actor.do(want.Sign)
    child = actor.last(ev.ChildBroadcasting)
    weight = parent.weight + kit.Tx.parse(child.raw).weight
    most = actor.state.created.policy.max_fee_rate.fee(weight)
    assert most * 9 // 10 < actor.state.draft.fee + child.fee < most * 11 // 10


def test_the_thousand_blocks_of_a_way_out_count_from_the_post_however_long_ago_the_original_was_accepted():
    world, actor = at("PayjoinProposal", None)
    world.chain.mine(500)
    actor.run("Monitor")
    actor.feed(want.Cancel(broadcast=False))
    world.chain.mine(999)
    actor.look()
    assert actor.need(want.Sign) is None
    world.chain.mine(1)
    actor.look()
    assert actor.need(want.Sign).purpose == "way_out"


def test_what_a_burial_frees_is_never_the_channel_of_the_buried_proposal():
    world, actor = at("PayjoinProposal")
    payjoin, [channel] = world.payjoin(actor), actor.state.draft.channels
    world.node.pend(ELSEWHERE)  # of a proposal that the log lost
    actor.run("Monitor")
    assert actor.has(ev.ProposalFound)
    world.chain.put(payjoin, depth=6)  # and this one was posted by a part of the log that is lost, too
    actor.look()
    actor.do(want.InspectChannels)
    assert actor.need(want.ReleaseChannels).drafted == {ELSEWHERE}
    actor.do(want.ReleaseChannels)
    assert [entry.outpoint for entry in world.node.listed] == [channel]


def test_a_coin_is_not_free_while_any_spend_of_it_is_in_a_mempool():
    world, actor = at("Monitor", None)
    world.chain.put(world.original, depth=6)  # the proposal is dead
    world.chain.put(world.spend_of_ours())
    actor.look()
    assert actor.need(want.ReleaseCoins) is None
    world.chain.mine(6)
    actor.look()
    assert actor.need(want.ReleaseCoins) is not None


def test_once_a_reclaim_is_out_the_original_is_not_broadcast_against_it_even_on_demand():
    world = World()
    actor = sending(world, proposal=False)
    actor.feed(want.Reclaim(kit.CHANGE, kit.FeeRate(2_500)))
    actor.look()
    actor.do(want.Sign)
    actor.feed(want.BroadcastNow())
    actor.look()
    assert not actor.has(ev.FallbackBroadcasting)
    assert {need.purpose for need in actor.due if isinstance(need, want.Broadcast)} == {"reclaim"}


def test_our_own_refusal_in_the_reply_mailbox_is_no_proposal_and_frees_the_coins():
    world = World()
    world.node.fail_reserve.add(PLAN.orders[0].peer)
    actor = world.receiving(PLAN, ev.Policy(on_peer_failure="abort"))
    actor.run("PendingFallback")
    actor.run(lambda state: state.refusal_posted and state.coins_released, skip=[want.Broadcast])
    assert world.reply == actor.state.refusal.message
    assert not actor.has(ev.ProposalFound)
