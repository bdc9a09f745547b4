"""Both roles' watch over the chain: news, broadcasts, children, the way out, the ends."""

from __future__ import annotations

import pytest

from pjv2 import session as model
from pjv2.errors import PeerMistake
from pjv2.psbt.tx import Tx
from pjv2.session import events as ev
from pjv2.session.events import Outcome
from pjv2.session.facts import BroadcastResult
from pjv2.session.monitor import LEASE, LEASE_MARGIN, STUCK, lease_until, read_tx
from tests.unit.session.scenarios import sending
from tests.unit.session.world import DAY, PLAN, World, kit, want

FOREVER = 2_592_000


def posted(plan=None, policy=None, **more):
    world = World(**more)
    actor = world.receiving(plan, policy)
    actor.run("Monitor")
    return world, actor


def outcome(actor):
    return actor.state.closed.outcome if actor.state.closed else None


# ---------------------------------------------------------------- news


def test_news_is_told_once_and_taken_back():
    world, actor = posted()
    world.chain.put(world.payjoin(actor))
    assert [type(e) for e in actor.look()] == [ev.Seen]
    assert actor.look() == []
    txid = actor.last(ev.Seen).txid
    world.chain.mine()
    assert [(e.height) for e in actor.look()] == [world.chain.tip]
    world.chain.drop(txid)
    assert [type(e) for e in actor.look()] == [ev.Unseen]
    assert actor.state.sightings == ()


def test_absence_counts_only_for_what_was_looked_for():
    world = World()
    actor = world.receiving()
    actor.run("CheckedOriginal")
    early = world.chain.view(actor.need(want.Watch))
    actor.run(lambda state: state.coins is not None)
    actor.feed(want.Cancel())
    # This view is of a time when our coin was not watched: it shows nothing, and proves nothing.
    stale = want.Watch(frozenset(), frozenset(), frozenset(), 0)
    actor.memory = want.Memory(view=early, watched=stale)
    assert actor.decide(want.Tick()) == []
    assert actor.need(want.ReadReply) is None
    actor.look()
    assert actor.has(ev.FallbackBroadcasting)


def test_what_is_missing_in_an_old_view_may_be_there_by_now():
    world = World()
    actor = world.receiving()
    actor.run("Monitor")
    actor.look()
    world.now = actor.state.deadline  # a laptop was opened again: its last look is a day old
    actor.settle()
    assert not actor.has(ev.FallbackBroadcasting)
    world.chain.put(world.payjoin(actor))
    actor.look()
    assert not actor.has(ev.FallbackBroadcasting)


@pytest.mark.parametrize("jump", [-DAY, DAY])
def test_a_clock_that_was_set_makes_a_view_old(jump):
    world = World()
    actor = world.sender()
    actor.settle()
    actor.look()
    seen = model.monitor.look(actor.state.stakes, actor.memory, world.now)
    assert seen.covers
    assert not model.monitor.look(actor.state.stakes, actor.memory, world.now + jump).covers


def test_without_any_look_at_the_chain_nothing_is_concluded():
    world = World()
    actor = world.receiving()
    actor.run("CheckedOriginal")
    actor.feed(want.Cancel(broadcast=True))
    actor.memory = want.Memory()
    assert actor.decide(want.Tick()) == []
    assert [type(need) for need in actor.due] == [want.Watch]


def test_what_each_transaction_is_called():
    world, actor = posted(PLAN)
    told = {}
    for tx in (world.payjoin(actor), world.original, world.conflict(), world.conflict(pays=90_000), world.payment()):
        world.chain.txs.clear()
        world.chain.put(tx)
        actor.look()
        told[tx.txid] = actor.state.sightings[0].what
    assert list(told.values()) == ["payjoin", "original", "conflict", "bumped", "address"]


def test_a_chain_source_that_sends_garbage_is_a_peers_mistake():
    with pytest.raises(PeerMistake):
        read_tx(b"\x00")


# ---------------------------------------------------------------- ends


@pytest.mark.parametrize("plan", [None, PLAN])
@pytest.mark.parametrize(
    ("which", "ending"),
    [("payjoin", "Paid"), ("original", "PaidByFallback"), ("bumped", "PaidOtherwise"), ("conflict", "Conflicted")],
)
def test_the_buried_transaction_decides(plan, which, ending):
    world, actor = posted(plan)
    tx = {
        "payjoin": world.payjoin(actor),
        "original": world.original,
        "bumped": world.conflict(pays=70_000),
        "conflict": world.conflict(),
    }[which]
    world.chain.put(tx)
    actor.look()
    world.chain.mine(6)
    actor.run("Closed")
    closed = actor.state.closed
    assert (closed.outcome, closed.txid, closed.amount_requested) == (Outcome(ending), tx.txid, 100_000)
    received = {"original": 100_000, "bumped": 70_000, "conflict": 0}
    if which == "payjoin":
        assert 99_000 < closed.amount_received < 100_000
        assert len(closed.channels) == (1 if plan else 0)
        assert (world.node.listed != []) == bool(plan)
    else:
        assert closed.amount_received == received[which]
        assert closed.channels == ()
        assert world.node.listed == []
    assert world.locked == set()


def test_a_late_payment_is_told_once_and_only_when_it_is_confirmed():
    world, actor = posted()
    world.chain.put(world.original, depth=6)
    actor.look()
    actor.run("Closed")
    world.chain.put(world.payment(5_000))
    assert actor.look() == []
    world.chain.mine()
    assert [(type(e), e.amount) for e in actor.look()] == [(ev.LatePayment, 5_000)]
    assert actor.look() == []
    world.now += DAY + FOREVER
    assert actor.due == ()


def test_a_closed_session_makes_no_use_of_any_other_answer():
    world, actor = posted()
    world.chain.put(world.original, depth=6)
    actor.look()
    actor.run("Closed")
    for answer in (want.Tick(), want.ReplyRead(True, b"x"), world.inspection(()), want.Delivered(200)):
        assert actor.decide(answer) == []


def test_nothing_closes_while_the_original_waits_to_be_taken():
    world, actor = posted()
    world.chain.refuses.add(world.original.txid)
    actor.feed(want.Cancel())
    for _ in range(3):
        for need in actor.due:
            actor.perform(need)
    assert actor.state.stage == "Monitor"
    assert actor.state.fallback_rejected is not None


# ---------------------------------------------------------------- the Original


def test_the_original_goes_out_at_the_deadline_when_a_proposal_was_posted():
    world, actor = posted(policy=ev.Policy(fallback_after=600))
    actor.look()
    world.now += DAY + 599
    actor.look()
    assert not actor.has(ev.FallbackBroadcasting)
    assert actor.needs.wake_at == actor.state.deadline
    world.now += 1
    actor.settle()
    assert actor.has(ev.FallbackBroadcasting)


@pytest.mark.parametrize("which", ["payjoin", "bumped", "conflict", "original"])
def test_the_original_is_not_broadcast_over_a_spend_in_sight(which):
    world, actor = posted()
    tx = {"payjoin": world.payjoin(actor), "bumped": world.conflict(pays=1_000), "conflict": world.conflict()}
    world.chain.put(tx.get(which, world.original))
    actor.look()
    actor.feed(want.Cancel())
    world.now += 2 * DAY
    actor.settle()
    assert not actor.has(ev.FallbackBroadcasting)
    assert actor.need(want.Broadcast) is None


def test_an_evicted_original_is_broadcast_again_without_a_new_announcement():
    world, actor = posted()
    actor.look()
    actor.feed(want.Cancel())
    actor.do(want.Broadcast)
    actor.look()
    assert actor.need(want.Broadcast) is None
    world.chain.drop(world.original.txid)
    actor.look()
    actor.do(want.Broadcast)
    assert world.chain.broadcasts == ["fallback", "fallback"]
    assert actor.names().count("FallbackBroadcasting") == 1
    assert actor.names().count("FallbackBroadcasted") == 1


def test_the_networks_refusal_is_recorded_once_per_reason():
    _, actor = posted()
    actor.look()
    actor.feed(want.Cancel())
    need = actor.need(want.Broadcast)
    for reason in ("a", "a", "", "", "b"):
        actor.perform(need, want.BroadcastAnswer("fallback", need.txid, BroadcastResult("refused", reason)))
    assert actor.names().count("FallbackRejected") == 3
    actor.perform(need, want.BroadcastAnswer("fallback", need.txid, BroadcastResult("known")))
    assert actor.state.fallback_rejected is None
    assert actor.feed(want.BroadcastAnswer("fallback", "00" * 32, BroadcastResult("accepted"))) == []
    assert actor.feed(want.BroadcastAnswer("child", need.txid, BroadcastResult("accepted"))) == []


def test_no_broadcast_means_no_broadcast():
    world, actor = posted(PLAN)
    actor.feed(want.Cancel(broadcast=False))
    world.now += 2 * DAY
    for _ in range(4):
        for need in actor.due:
            actor.perform(need)
    assert "fallback" not in world.chain.broadcasts
    assert world.locked


# ---------------------------------------------------------------- the way out


def test_the_way_out_pays_more_than_a_payjoin_in_the_mempool():
    world, actor = posted()
    world.chain.put(world.payjoin(actor))
    world.chain.tip += 1_000
    actor.look()
    psbt = actor.need(want.Sign).psbt
    value = kit.Psbt.parse(psbt).tx.outputs[0].value
    assert world.ours[0].value - value > actor.state.draft.fee
    actor.do(want.Sign)
    assert actor.last(ev.WayOutBroadcasting).reason.startswith("the proposal did not confirm")


def test_no_way_out_while_the_payjoin_is_confirming():
    world, actor = posted()
    world.chain.tip += 1_000
    world.chain.put(world.payjoin(actor), depth=2)
    actor.look()
    assert actor.need(want.Sign) is None


def test_a_channel_that_the_node_lost_while_the_payjoin_is_unconfirmed_means_the_way_out():
    world, actor = posted(PLAN)
    actor.look()
    actor.do(want.InspectChannels)
    assert actor.need(want.Sign) is None
    world.node.listed.clear()
    actor.do(want.InspectChannels)
    assert actor.need(want.Sign).purpose == "way_out"
    actor.do(want.Sign)
    assert "does not list" in actor.last(ev.WayOutBroadcasting).reason


def test_a_refused_original_is_tried_for_a_while_before_our_coin_comes_home():
    world, actor = posted()
    world.chain.refuses.add(world.original.txid)
    actor.feed(want.Cancel())
    actor.look()
    actor.do(want.Broadcast)
    assert actor.need(want.Sign) is None
    world.now += STUCK
    actor.look()
    assert actor.need(want.Sign).purpose == "way_out"
    world.chain.put(world.payjoin(actor))
    actor.look()
    assert actor.need(want.Sign) is None


def test_a_way_out_that_pays_too_little_is_signed_again_above_the_payjoin():
    world, actor = posted()
    actor.feed(want.Cancel(broadcast=False))
    world.chain.mine(1_000)
    actor.look()
    actor.do(want.Sign)
    first = actor.state.way_outs[0]
    world.chain.put(world.payjoin(actor))
    actor.look()
    assert actor.need(want.Sign).purpose == "way_out"
    actor.do(want.Sign)
    second = actor.state.way_outs[1]
    assert Tx.parse(second.raw).outputs[0].value < Tx.parse(first.raw).outputs[0].value
    actor.look()
    assert actor.need(want.Broadcast).txid == second.txid
    assert actor.need(want.Sign) is None


def test_a_way_out_that_is_stuck_is_raised():
    world, actor = posted()
    actor.feed(want.Cancel(broadcast=False))
    world.chain.mine(1_000)
    actor.look()
    actor.do(want.Sign)
    actor.look()
    actor.do(want.Broadcast)
    actor.look()
    assert actor.need(want.Sign) is None
    world.chain.rate = 5_000
    world.now += STUCK
    actor.look()
    assert actor.need(want.Sign).purpose == "way_out"


def test_a_wallet_that_signs_another_way_out_is_not_believed():
    world, actor = posted()
    actor.feed(want.Cancel(broadcast=False))
    world.chain.mine(1_000)
    actor.look()
    need = actor.need(want.Sign)
    assert actor.perform(need, want.SignedPsbt("way_out", need.psbt)) == []  # not signed at all
    other = kit.unsigned(world.ours, [kit.TxOut(1_000, kit.CHANGE)])
    signed = kit.sign(other, world.ours).serialize()
    assert actor.perform(need, want.SignedPsbt("way_out", signed)) == []
    assert actor.perform(need, want.SignedPsbt("child", signed)) == []
    actor.memory = want.Memory()
    assert actor.decide(want.SignedPsbt("way_out", signed)) == []


def test_no_way_out_where_the_fee_would_eat_the_coin():
    world = World(our_value=5_000)
    actor = world.receiving()
    actor.run("Monitor")
    world.chain.rate = 50 * 250
    actor.feed(want.Cancel(broadcast=False))
    world.chain.mine(1_000)
    actor.look()
    assert actor.need(want.Sign) is None
    world.chain.rate = 250
    actor.look()
    assert actor.need(want.Sign).purpose == "way_out"


# ---------------------------------------------------------------- children


@pytest.mark.parametrize("plan", [None, PLAN])
def test_a_stuck_payjoin_is_pulled_by_a_child_of_our_own_output(plan):
    world, actor = posted(plan)
    world.chain.put(world.payjoin(actor))
    actor.look()
    world.chain.rate = 5_000
    actor.look()
    assert actor.need(want.Sign) is None
    world.now += STUCK
    actor.settle()
    need = actor.need(want.Sign)
    assert need.purpose == "child"
    parent = actor.state.sightings[0].txid
    vout = need.ours[0].vout
    expected = actor.state.drafted.change_vout
    assert need.ours[0].txid == parent
    assert expected is None or vout == expected
    assert (expected is None) == (plan is None)
    actor.do(want.Sign)
    child = actor.last(ev.ChildBroadcasting)
    assert (child.parent, child.fee > 0) == (parent, True)
    actor.look()
    actor.do(want.Broadcast)
    actor.look()
    assert actor.need(want.Broadcast) is None
    assert actor.need(want.Sign) is None
    world.chain.rate = 12_000
    world.now += STUCK
    actor.look()
    actor.do(want.Sign)
    assert len(actor.state.children) == 2
    world.chain.mine(6)
    actor.run("Closed")
    assert outcome(actor) is Outcome.PAID


def test_a_stuck_original_is_pulled_by_a_child_of_the_output_that_pays_us():
    world = World()
    actor = world.receiving()
    actor.run("CheckedOriginal")
    actor.feed(want.Cancel())
    actor.run(lambda state: state.fallback_broadcasted)
    actor.look()
    world.chain.rate = 5_000
    world.now += STUCK
    actor.look()
    need = actor.need(want.Sign)
    assert need.ours == (kit.Outpoint(world.original.txid, actor.state.checked.paid_vouts[0]),)
    actor.do(want.Sign)
    world.chain.drop(world.original.txid)
    actor.look()
    assert actor.need(want.Broadcast).purpose == "fallback"


def test_no_child_where_our_output_cannot_carry_it_or_the_transaction_is_another():
    world, actor = posted()
    world.chain.put(world.conflict(pays=1_000))
    actor.look()
    world.chain.rate = 12_000
    world.now += STUCK
    actor.look()
    assert actor.need(want.Sign) is None
    small = World(pays=1_000, our_value=30_000)
    poor = small.receiving(policy=ev.Policy(min_amount=100_000))
    poor.run(lambda state: state.fallback_broadcasted)
    poor.look()
    small.chain.rate = 12_000
    small.now += STUCK
    poor.look()
    assert poor.need(want.Sign) is None


def test_a_child_that_the_wallet_changed_is_not_believed():
    world, actor = posted()
    world.chain.put(world.payjoin(actor))
    actor.look()
    world.chain.rate = 5_000
    world.now += STUCK
    actor.look()
    need = actor.need(want.Sign)
    assert actor.perform(need, want.SignedPsbt("child", need.psbt)) == []
    assert actor.perform(need, want.SignedPsbt("reclaim", need.psbt)) == []


# ---------------------------------------------------------------- found


def found(where="node"):
    world = World()
    actor = world.receiving(PLAN)
    actor.run("PayjoinProposal")
    world.node.pend(kit.Outpoint("cd" * 32, 0))
    actor.run("Monitor")
    return world, actor


def test_after_proposal_found_nothing_is_proposed_released_or_spent_back():
    world, actor = found()
    for _ in range(4):
        for need in actor.due:
            assert isinstance(need, want.Watch | want.InspectChannels)
            actor.perform(need)
    world.chain.mine(1_000)
    actor.look()
    assert actor.need(want.Sign) is None
    assert model.status(actor.state).startswith("an unknown proposal")


def test_after_proposal_found_the_original_goes_out_at_the_deadline():
    world, actor = found()
    world.now += DAY + 600
    actor.look()
    actor.do(want.Broadcast)
    assert world.original.txid in world.chain.txs


def test_an_alarm_when_the_network_refuses_the_original_of_a_found_proposal():
    world, actor = found()
    world.chain.refuses.add(world.original.txid)
    actor.feed(want.Cancel())
    actor.look()
    actor.do(want.Broadcast)
    actor.settle()
    assert actor.last(ev.Alarm).what == "found"
    world.now += DAY + FOREVER
    actor.settle()
    assert actor.state.closed is None


def test_an_alarm_when_channels_without_a_coin_of_ours_cannot_end():
    world = World()
    world.ours.clear()
    actor = world.receiving(PLAN, ev.Policy(own_input="prefer"))
    actor.run("Monitor")
    world.chain.refuses.add(world.original.txid)
    actor.feed(want.Cancel())
    actor.look()
    actor.do(want.Broadcast)
    assert actor.last(ev.Alarm).what == "channels"


def test_our_own_way_out_proves_nothing_about_a_found_proposal():
    world, actor = found()
    world.chain.put(world.spend_of_ours(), depth=6)
    actor.look()
    actor.do(want.InspectChannels)
    assert actor.need(want.ReleaseChannels) is None
    assert actor.state.stage == "Monitor"


def test_a_found_proposal_that_confirms_is_paid_otherwise_by_its_channel_point():
    world = World()
    lost = world.lost_proposal()
    actor = world.receiving(PLAN)
    actor.run(lambda state: state.coins is not None)
    channel = kit.Outpoint(lost.txid, 0)
    world.node.pend(channel)
    actor.feed(want.Cancel())
    world.chain.put(lost, depth=6)
    actor.look()
    assert actor.last(ev.ProposalFound).where == "chain"
    actor.run("Closed")
    closed = actor.state.closed
    assert (closed.outcome, closed.channels) == (Outcome.PAID_OTHERWISE, (channel,))
    assert closed.amount_received == 80_000
    assert world.node.listed[0].outpoint == channel


def test_a_channel_point_the_node_lists_makes_a_stranger_a_proposal_of_ours():
    world = World()
    world.ours.clear()
    actor = world.receiving(PLAN)
    actor.run("PendingFallback")
    stranger = world.conflict()
    world.node.pend(kit.Outpoint(stranger.txid, 0), 400_000)
    world.chain.put(stranger)
    actor.look()
    actor.do(want.InspectChannels)
    assert actor.last(ev.ProposalFound).where == "chain"
    world.chain.mine(6)
    actor.look()
    actor.run("Closed")
    assert outcome(actor) is Outcome.PAID_OTHERWISE


# ---------------------------------------------------------------- leases


@pytest.mark.parametrize(
    ("after", "until"),
    [
        (0, None),
        (LEASE - LEASE_MARGIN - 1, None),
        (LEASE - LEASE_MARGIN, 2 * LEASE),
        (2 * LEASE - LEASE_MARGIN - 1, 2 * LEASE),
        (2 * LEASE - LEASE_MARGIN, 3 * LEASE),
    ],
)
def test_a_lease_is_renewed_once_per_period(after, until):
    assert lease_until(0, after) == until


# ---------------------------------------------------------------- the sender's side of it


def test_a_senders_stuck_transactions_are_pulled_from_his_change():
    world = World()
    actor = sending(world)
    actor.run(lambda state: state.sightings != ())
    world.chain.rate = 5_000
    world.now += STUCK
    actor.look()
    need = actor.need(want.Sign)
    assert need.purpose == "child"
    actor.do(want.Sign)
    actor.look()
    assert actor.need(want.Broadcast).purpose == "child"
    world.chain.mine(6)
    actor.run("Closed")
    assert outcome(actor) is Outcome.PAID
