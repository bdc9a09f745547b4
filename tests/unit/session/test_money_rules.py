"""M1 to M21 of session-model.md, section 7: each test stages the accident that the rule prevents."""

from __future__ import annotations

import pytest

from pjv2 import session as model
from pjv2.errors import WrongUsage
from pjv2.session import events as ev
from pjv2.session.events import Outcome
from tests.unit.session.scenarios import sending
from tests.unit.session.world import DAY, PLAN, TWO, World, kit, want

FOREVER = 2_592_000


def posted(plan=PLAN, **more):
    """A receiver whose proposal is out."""
    world = World()
    actor = world.receiving(plan, **more)
    actor.run("Monitor")
    return world, actor


def test_M01_a_strangers_payment_to_the_address_decides_nothing_while_a_proposal_is_out():
    world, actor = posted()
    world.chain.put(world.payment(5_000), depth=6)
    actor.look()
    assert actor.last(ev.Seen).what == "address"
    assert actor.state.stage == "Monitor"
    assert actor.need(want.ReleaseChannels) is None
    assert actor.need(want.ReleaseCoins) is None
    world.chain.put(world.payjoin(actor), depth=6)
    actor.look()
    actor.run("Closed")
    assert actor.state.closed.outcome is Outcome.PAID
    assert len(actor.state.closed.channels) == 1


def test_M01_nor_while_the_original_is_collected():
    world = World()
    world.ours.clear()
    actor = world.receiving()
    actor.run("PendingFallback")
    world.chain.refuses.add(world.original.txid)
    world.chain.put(world.payment(100_000), depth=6)
    actor.look()
    actor.do(want.Broadcast)
    actor.settle()
    assert actor.state.closed is None
    world.now += DAY + FOREVER
    actor.settle()
    actor.run("Closed")
    assert actor.state.closed.outcome is Outcome.EXPIRED


def test_M01_the_same_payment_ends_a_request_that_no_original_came_for():
    world = World()
    actor = world.receiver()
    world.chain.put(world.payment(100_000), depth=6)
    actor.look()
    assert actor.state.closed is None  # an older log may have had an Original: the mailbox tells
    actor.do(want.Poll)
    assert (actor.state.closed.outcome, actor.state.closed.amount_received) == (Outcome.PAID_OTHERWISE, 100_000)


@pytest.mark.parametrize("depth", [1, 2, 5])
def test_M02_nothing_is_released_or_closed_before_six_deep_whatever_the_confirmations_say(depth):
    world, actor = posted(policy=ev.Policy(confirmations=1))
    world.chain.put(world.original, depth=depth)
    actor.look()
    assert actor.state.stage == "Monitor"
    assert actor.need(want.ReleaseCoins) is None
    assert actor.need(want.ReleaseChannels) is None
    world.chain.drop(world.original.txid)  # the reorg
    world.chain.put(world.payjoin(actor), depth=6)
    actor.look()
    assert actor.has(ev.Unseen)
    actor.run("Closed")
    assert actor.state.closed.outcome is Outcome.PAID


def way_out_recorded():
    world, actor = posted(None)
    actor.feed(want.Cancel(broadcast=False))
    world.chain.mine(1_000)
    actor.look()
    actor.do(want.Sign)
    assert actor.has(ev.WayOutBroadcasting)
    return world, actor


def test_M03_after_a_way_out_the_coin_is_free_only_when_its_spend_is_buried():
    world, actor = way_out_recorded()
    actor.do(want.Broadcast)
    actor.look()
    world.chain.drop(actor.state.way_outs[0].txid)  # evicted from view
    world.chain.put(world.conflict(), depth=6)  # D buried: T is dead
    actor.look()
    assert actor.need(want.ReleaseCoins) is None
    assert actor.need(want.Broadcast).purpose == "way_out"
    actor.do(want.Broadcast)
    world.chain.mine(6)
    actor.look()
    actor.run("Closed")
    assert actor.state.closed.outcome is Outcome.CONFLICTED


def releasing_after_a_crash():
    """Drafted with channels, then a crash and a cancel: the release must ask the mailbox."""
    world = World()
    actor = world.receiving(PLAN)
    actor.run("ProvisionalProposal")
    actor.restart()
    actor.feed(want.Cancel())
    assert actor.state.stage == "ReleasingChannels"
    actor.look()
    return world, actor


def test_M04_an_unreadable_mailbox_holds_the_release_but_not_the_collection():
    world, actor = releasing_after_a_crash()
    world.directory_gone = True
    actor.do(want.ReadReply)
    assert actor.need(want.ReleaseChannels) is None
    actor.do(want.Broadcast)
    assert actor.has(ev.FallbackBroadcasting)
    assert world.original.txid in world.chain.txs


def test_M04_a_burial_that_kills_the_proposal_replaces_the_read():
    world, actor = releasing_after_a_crash()
    world.directory_gone = True
    actor.do(want.ReadReply)
    world.chain.put(world.original, depth=6)
    actor.look()
    assert actor.need(want.ReadReply) is None
    actor.do(want.ReleaseChannels)
    actor.run("Closed")
    assert actor.state.closed.outcome is Outcome.PAID_BY_FALLBACK


def test_M04_after_a_thousand_blocks_the_coin_goes_home():
    world, actor = releasing_after_a_crash()
    world.directory_gone = True
    world.chain.refuses.add(world.original.txid)
    actor.do(want.ReadReply)
    world.chain.mine(1_000)
    actor.look()
    assert actor.need(want.Sign).purpose == "way_out"
    actor.do(want.Sign)
    actor.run(lambda state: any(entry.what == "way_out" for entry in state.sightings))
    world.chain.mine(6)
    actor.look()
    assert actor.state.stage == "ReleasingChannels"
    assert actor.need(want.ReadReply) is None  # its spend is buried: the proposal is dead
    actor.do(want.ReleaseChannels)
    assert actor.state.stage == "PendingFallback"


def test_M05_empty_counts_only_while_the_directory_keeps_the_mailbox():
    world, actor = releasing_after_a_crash()
    world.now += 7 * DAY
    actor.look()
    actor.do(want.ReadReply)  # empty: pruned, or never written
    assert actor.need(want.ReleaseChannels) is None
    assert actor.state.stage == "ReleasingChannels"


def test_M05_empty_counts_from_the_beginning_of_the_session():
    world = World()
    actor = world.receiving(PLAN, policy=ev.Policy(mailbox_ttl=3 * DAY), lifetime=6 * DAY)
    world.now += 2 * DAY  # an older log may have posted on the first day: pruned on the fourth
    actor.run("PayjoinProposal")
    actor.feed(want.Cancel())
    actor.restart()
    world.now += 1.5 * DAY
    actor.look()
    actor.do(want.ReadReply)
    assert actor.need(want.ReleaseChannels) is None


def test_M05_empty_in_time_lets_the_release_go_on():
    _, actor = releasing_after_a_crash()
    actor.do(want.ReadReply)
    assert actor.need(want.ReleaseChannels) is not None


def test_M06_a_restored_log_that_sees_its_proposal_on_the_chain_releases_nothing():
    world, actor = posted()
    payjoin = world.payjoin(actor)
    actor.restore(ev.ProposalSigned)
    world.chain.put(payjoin, depth=6)
    world.now += 7 * DAY  # the mailbox is pruned
    actor.settle()
    assert actor.state.stage == "ReleasingChannels"
    actor.look()
    assert actor.last(ev.ProposalFound).where == "chain"
    actor.run("Closed")
    assert actor.state.closed.outcome is Outcome.PAID
    assert len(actor.state.closed.channels) == 1
    assert "abandon" not in world.node.calls


def test_M07_coins_of_a_restored_log_are_not_freed_while_the_payer_holds_a_proposal():
    world, actor = posted(None)
    actor.restore(ev.ProposalDrafted)
    actor.feed(want.Cancel(broadcast=False))
    assert actor.state.stage == "PendingFallback"
    actor.look()
    assert actor.need(want.ReleaseCoins) is None
    assert actor.state.closed is None
    actor.do(want.ReadReply)
    assert actor.last(ev.ProposalFound).where == "mailbox"
    assert actor.need(want.ReleaseCoins) is None
    world.chain.put(world.original, depth=6)
    actor.look()
    actor.run("Closed")
    assert actor.state.coins_released


def test_M07_no_close_without_a_burial_before_the_mailbox_was_read():
    world = World()
    actor = world.receiving()
    actor.run("CheckedOriginal")
    actor.feed(want.Cancel(broadcast=False))
    actor.look()
    assert actor.state.stage == "PendingFallback"
    world.directory_gone = True
    actor.do(want.ReadReply)
    assert actor.state.stage == "PendingFallback"
    world.directory_gone = False
    actor.do(want.ReadReply)
    assert actor.state.closed.outcome is Outcome.CANCELLED


def refused_after_a_restore(plan=None):
    """A proposal is out; the store comes back from before the Original was accepted, and today the network refuses it."""
    world, actor = posted(plan)
    world.draft, world.proposal = actor.state.draft, world.payjoin(actor)
    actor.restore(ev.OriginalAccepted)
    world.chain.suitability = kit.Suitability("refused", "min relay fee not met")
    actor.run("HasReplyableError")
    actor.look()
    actor.do(want.PostReply)
    assert actor.has(ev.RefusalPosted)  # the directory keeps what it has, and says nothing
    return world, actor


def test_M07_a_refused_session_of_a_restored_log_does_not_close_beside_its_proposal():
    world, actor = refused_after_a_restore()
    assert actor.state.closed is None
    actor.do(want.ReadReply)
    assert actor.last(ev.ProposalFound).where == "mailbox"
    world.chain.put(world.proposal, depth=6)
    actor.look()
    assert actor.state.closed.outcome is Outcome.PAID_OTHERWISE


def test_M07_the_original_of_a_found_session_goes_out_although_it_was_refused_once():
    world, actor = refused_after_a_restore()
    actor.do(want.ReadReply)
    assert actor.need(want.Broadcast) is None  # not before the deadline
    world.now = actor.state.deadline
    actor.look()
    assert actor.do(want.Broadcast)
    world.chain.mine(6)
    actor.look()
    assert actor.state.closed.outcome is Outcome.PAID_BY_FALLBACK


def test_M07_a_person_may_send_the_original_of_a_found_session():
    world, actor = refused_after_a_restore()
    with pytest.raises(WrongUsage):
        actor.feed(want.BroadcastNow())
    actor.do(want.ReadReply)
    actor.feed(want.BroadcastNow())
    actor.do(want.Broadcast)
    assert world.chain.broadcasts == ["fallback"]


def test_M07_a_refused_session_with_a_node_asks_it_for_channels_of_a_lost_log():
    world, actor = refused_after_a_restore(PLAN)
    channel = world.draft.channels[0]
    actor.do(want.InspectChannels)
    assert actor.last(ev.ProposalFound).where == "node"
    world.chain.put(world.original, depth=6)
    actor.look()
    actor.run("Closed")
    assert channel not in {entry.outpoint for entry in world.node.listed}  # abandoned, its death is buried


def test_M07_a_refused_session_with_a_node_is_asked_before_a_burial_closes_it():
    world, actor = refused_after_a_restore(PLAN)
    world.chain.put(world.proposal, depth=6)
    actor.look()
    assert actor.state.closed is None
    actor.run("Closed")
    assert actor.state.closed.outcome is Outcome.PAID_OTHERWISE
    assert actor.state.closed.channels == world.draft.channels


def test_M07_our_own_refusal_in_the_mailbox_shows_that_nothing_else_was_posted():
    world = World()
    world.chain.suitability = kit.Suitability("refused")
    actor = world.receiving()
    actor.run("HasReplyableError")
    actor.look()
    assert actor.need(want.ReadReply) is None  # an empty mailbox would answer late: the refusal goes first
    actor.do(want.PostReply)
    world.directory_gone = True
    actor.do(want.ReadReply)
    assert actor.state.closed is None
    world.directory_gone = False
    actor.do(want.ReadReply)
    assert actor.state.closed.outcome is Outcome.REFUSED


def test_M07_a_burial_of_the_originals_inputs_replaces_the_read():
    world, actor = refused_after_a_restore()
    world.directory_gone = True
    conflict = kit.sign(kit.unsigned([world.payer], [kit.TxOut(400_000, kit.CHANGE)]), [world.payer]).extract()
    world.chain.put(conflict, depth=5)
    actor.look()
    assert actor.state.closed is None
    world.chain.mine(1)
    actor.look()
    assert actor.state.closed.outcome is Outcome.REFUSED


def test_M07_a_v1_payer_who_took_our_refusal_was_given_nothing_else():
    world = World()
    world.chain.suitability = kit.Suitability("refused")
    told, gone = world.receiving(v1=True), world.receiving(v1=True)
    for actor in (told, gone):
        actor.run("HasReplyableError")
        actor.look()
    told.do(want.PostReply)
    assert told.state.closed.outcome is Outcome.REFUSED
    world.now += DAY
    gone.settle()
    assert gone.due == (gone.need(want.Watch),)  # nothing can be read, so only the end of the watch closes
    world.now = gone.state.watch_over
    gone.look()
    assert gone.state.closed.outcome is Outcome.REFUSED


def test_M07_a_request_whose_log_lost_everything_does_not_end_beside_its_proposal():
    _, actor = posted(None)
    actor.restore(ev.OriginalReceived)
    actor.feed(want.Cancel(broadcast=False))
    actor.look()
    assert actor.state.closed is None
    actor.run("Monitor")
    assert actor.last(ev.ProposalFound).where == "mailbox"


def test_M07_a_request_with_a_node_does_not_end_beside_a_channel_that_its_log_lost():
    world, actor = posted()
    actor.restore(ev.OriginalReceived)
    world.mailbox = None  # pruned
    world.now += 8 * DAY
    actor.settle()
    actor.look()
    actor.do(want.Poll)
    assert actor.state.closed is None
    actor.do(want.InspectChannels)
    assert actor.state.closed is None
    assert actor.last(ev.Alarm).what == "channels"
    world.now = actor.state.watch_over
    actor.look()
    assert actor.state.closed.outcome is Outcome.EXPIRED


def test_M07_a_request_with_a_node_ends_where_the_node_knows_nothing_of_it():
    world = World()
    actor = world.receiver(PLAN)
    actor.feed(want.Cancel())
    actor.look()
    actor.do(want.Poll)
    assert actor.state.closed is None
    actor.do(want.InspectChannels)
    assert actor.state.closed.outcome is Outcome.CANCELLED


def test_M07_a_read_from_before_the_state_was_entered_is_no_evidence():
    _, actor = posted(None)
    actor.restore(ev.ProposalDrafted)
    actor.memory = want.Memory(reply=want.ReplyRead(True, None), reply_seq=actor.state.seq)
    actor.feed(want.Cancel(broadcast=False))
    actor.look()
    assert actor.state.stage == "PendingFallback"
    assert actor.need(want.ReleaseCoins) is None
    assert actor.need(want.ReadReply) is not None


def test_M07_a_mailbox_that_can_never_be_read_counts_as_empty_when_the_watch_is_over():
    world = World()
    actor = world.receiving()
    actor.run("ProvisionalProposal")
    world.directory_gone = True
    actor.feed(want.Cancel(broadcast=False))
    actor.look()
    actor.do(want.ReadReply)
    assert actor.need(want.ReleaseCoins) is None
    world.now += DAY + FOREVER
    actor.settle()
    actor.run("Closed")
    assert actor.state.closed.outcome is Outcome.CANCELLED


def test_M08_release_cancels_disconnects_and_lists_before_it_judges():
    world = World()
    world.node.fail_secure.add(TWO.orders[0].peer)
    world.node.pending_all_the_same = True  # verify failed, and the channel became pending all the same
    actor = world.receiving(TWO)
    actor.run("ReleasingChannels")
    assert len(world.node.listed) == 2
    actor.run("CheckedOriginal")
    assert world.node.calls[-4:] == ["cancel", "disconnect", "list", "abandon"]
    assert world.node.listed == []
    released = actor.last(ev.ChannelsReleased)
    assert {peer for peer, _ in released.blocked} == {entry.peer for entry in TWO.orders}
    assert all(height == world.chain.tip + 2_016 for _, height in released.blocked)


def test_M08_channels_that_are_still_listed_after_the_procedure_are_not_released():
    world = World()
    actor = world.receiving(PLAN)
    actor.run("ProvisionalProposal")
    actor.feed(want.Cancel())
    actor.look()
    actor.do(want.ReadReply)
    need = actor.need(want.ReleaseChannels)
    assert need.ids
    assert need.peers
    assert actor.perform(need, want.ChannelsCleared(tuple(world.node.listed), (), world.chain.tip)) == []
    assert actor.state.stage == "ReleasingChannels"


def test_M09_a_proposal_whose_channels_were_abandoned_is_not_posted():
    world = World()
    actor = world.receiving(PLAN)
    actor.run("PayjoinProposal")
    world.node.listed.clear()  # released by a later part of a log that was restored to here
    actor.restart()
    actor.run("ReleasingChannels")
    assert not actor.has(ev.ProposalPosting)
    assert actor.last(ev.ChannelsReleasing).next == "plain"
    actor.run("Monitor")
    assert actor.last(ev.ProposalDrafted).funding == ()


def test_M10_is_not_adopted_and_nothing_is_read_after_a_post():
    world, actor = posted()
    for _ in range(3):
        for need in actor.due:
            assert not isinstance(need, want.ReadReply)
            actor.perform(need)
    assert not any(isinstance(need, want.ReadReply) for need in actor.done)
    world.chain.put(world.payjoin(actor), depth=6)
    actor.look()
    actor.run("Closed")
    assert not any(isinstance(need, want.ReadReply) for need in actor.done)


@pytest.mark.parametrize("stage", ["CheckedOriginal", "PayjoinProposal"])
def test_M11_a_channel_that_the_log_does_not_know_ends_the_proposing(stage):
    world = World()
    actor = world.receiving(PLAN)
    actor.run(stage)
    stranger = kit.Outpoint("cd" * 32, 0)
    world.node.pend(stranger)
    actor.run("Monitor")
    assert actor.last(ev.ProposalFound).channels == (stranger,)
    assert not actor.has(ev.ProposalPosting)
    assert stranger in {channel.outpoint for channel in world.node.listed}
    actor.feed(want.Cancel())
    actor.look()
    assert actor.has(ev.FallbackBroadcasting)
    world.chain.put(world.original, depth=6)
    actor.look()
    actor.run("Closed")
    assert world.node.listed == []


def test_M11_the_sweep_covers_closed_sessions():
    world, actor = posted(PLAN)
    world.chain.put(world.original, depth=6)
    actor.look()
    actor.run("Closed")
    late = kit.Outpoint("cd" * 32, 1)
    world.node.pend(late)
    actor.look()
    actor.do(want.InspectChannels)
    assert actor.need(want.ReleaseChannels).drafted == {late}
    actor.do(want.ReleaseChannels)
    assert world.node.listed == []
    assert actor.state.stage == "Closed"


def test_M12_the_channel_that_was_just_paid_is_not_abandoned_by_a_log_that_forgot_it():
    world, actor = posted()
    payjoin, channel = world.payjoin(actor), actor.state.draft.channels[0]
    actor.restore(ev.ProposalDrafted)  # to WantsProposal
    world.chain.put(payjoin, depth=6)
    actor.settle()
    actor.look()
    actor.run("Closed")
    assert actor.has(ev.ProposalFound)
    assert "abandon" not in world.node.calls
    assert channel in {entry.outpoint for entry in world.node.listed}
    assert actor.state.closed.outcome is Outcome.PAID_OTHERWISE
    assert actor.state.closed.channels == (channel,)


def test_M13_the_way_out_counts_from_the_post_for_plain_payjoins_too():
    world, actor = posted(None)
    actor.feed(want.Cancel(broadcast=False))
    world.chain.mine(999)
    actor.look()
    assert actor.need(want.Sign) is None
    world.chain.mine(1)
    actor.look()
    assert actor.need(want.Sign).purpose == "way_out"


def test_M14_a_dead_proposal_with_nothing_at_stake_ends_when_the_watch_is_over():
    world, actor = posted(None)
    world.chain.refuses.add(world.original.txid)
    world.now += DAY + 600
    actor.settle()
    actor.look()
    actor.do(want.Broadcast)
    assert actor.has(ev.FallbackRejected)
    world.chain.mine(1_000)
    actor.look()
    actor.do(want.Sign)
    actor.run(lambda state: any(entry.what == "way_out" for entry in state.sightings))
    world.chain.mine(6)
    actor.look()
    actor.do(want.ReleaseCoins)
    assert actor.state.closed is None
    world.now += FOREVER
    actor.run("Closed")
    assert actor.state.closed.outcome is Outcome.EXPIRED


def test_M15_a_directory_that_never_answers_ends_the_session_with_the_watch():
    world = World()
    actor = world.receiver()
    world.now += DAY + 1
    actor.look()
    assert actor.state.stage == "Initialized"
    assert actor.need(want.Poll) is not None
    world.now += FOREVER
    actor.look()
    assert actor.state.closed.outcome is Outcome.EXPIRED


def test_M16_a_refusal_is_recorded_before_it_is_posted_and_never_followed_by_a_proposal():
    world = World()
    actor = world.receiving(policy=ev.Policy(approve="ask"))
    actor.run("CheckedOriginal")
    actor.feed(want.Decline())
    assert actor.state.stage == "PendingFallback"
    message = actor.need(want.PostReply).message
    assert actor.last(ev.RefusalPosting).message == message
    actor.restart()  # posted, crash before RefusalPosted
    assert actor.need(want.PostReply).message == message
    actor.do(want.PostReply)
    assert actor.has(ev.RefusalPosted)
    assert actor.need(want.FindCoins) is None
    with pytest.raises(model.receive.WrongUsage):
        actor.decide(want.Approve())


def test_M16_an_original_without_fallback_is_refused_by_the_same_order():
    world = World()
    world.chain.suitability = kit.Suitability("refused", "dust")
    actor = world.receiving()
    actor.run("HasReplyableError")
    assert actor.names()[-2:] == ["OriginalRefused", "RefusalPosting"]
    assert actor.need(want.PostReply).message == actor.state.refusal.message


def test_M17_a_worker_that_lost_does_not_go_on_with_its_reservation():
    world = World()
    actor = world.receiving(PLAN)
    actor.run("ReservingChannels")
    need = actor.need(want.ReserveChannels)
    answer = world.answer(actor, need)
    # Another worker released meanwhile; this one loads again, and its late answer fits nothing any more.
    actor.memory = want.Memory()
    actor.settle()
    assert actor.state.stage == "ReleasingChannels"
    assert actor.decide(answer) == []
    actor.look()
    assert set(actor.need(want.ReleaseChannels).ids) == {id for id, _ in need.orders}
    actor.do(want.ReleaseChannels)
    assert world.node.offers == {}


@pytest.mark.parametrize("why", ["refused", "foreign coin spent", "deadline", "cancelled"])
def test_M18_a_payjoin_that_cannot_confirm_gives_way_to_the_original(why):
    world = World()
    actor = sending(world)
    actor.run("BroadcastingPayjoin")
    actor.look()
    match why:
        case "refused":
            world.chain.refuses.add(actor.state.signed.txid)
            actor.do(want.Broadcast)
        case "foreign coin spent":
            world.chain.put(world.spend_of_ours())
            actor.look()
        case "deadline":
            world.now += DAY + 600
            actor.look()
        case "cancelled":
            actor.feed(want.Cancel())
    assert actor.has(ev.FallbackBroadcasting)
    assert actor.state.stage == "BroadcastingPayjoin"
    assert actor.need(want.Broadcast).purpose == "fallback"


def test_M19_a_reclaim_is_recorded_first_and_the_coins_stay_leased_until_a_burial():
    world = World()
    actor = sending(world, proposal=False)
    actor.feed(want.Reclaim(kit.CHANGE, kit.FeeRate(2_500)))
    actor.look()
    assert actor.need(want.Broadcast) is None
    actor.do(want.Sign)
    assert actor.has(ev.ReclaimBroadcasting)
    actor.do(want.Broadcast)
    actor.look()
    assert actor.need(want.ReleaseCoins) is None
    world.chain.drop(actor.state.reclaims[0].txid)
    world.chain.put(world.original, depth=5)  # O confirms instead
    actor.look()
    assert actor.need(want.ReleaseCoins) is None
    world.chain.mine(1)
    actor.look()
    actor.run("Closed")
    assert actor.state.closed.outcome is Outcome.PAID_BY_FALLBACK


def test_M20_a_recorded_way_out_is_broadcast_in_every_state_until_the_coin_is_spent_and_buried():
    world, actor = way_out_recorded()
    actor.restart()  # before the broadcast
    actor.look()
    assert actor.need(want.Broadcast).purpose == "way_out"
    world.chain.put(world.original, depth=6)
    actor.look()
    assert actor.need(want.Broadcast).purpose == "way_out"
    actor.do(want.Broadcast)
    world.chain.mine(6)
    actor.look()
    actor.run("Closed")
    assert actor.state.coins_released


def test_M20_a_way_out_that_the_network_refuses_is_told_once_and_tried_again():
    world, actor = way_out_recorded()
    world.chain.refuses.add(actor.state.way_outs[0].txid)
    actor.do(want.Broadcast)
    assert actor.last(ev.Alarm).what == "way out"
    assert actor.do(want.Broadcast) == []


def test_M20_the_way_out_of_a_release_is_carried_on_after_it():
    world, actor = releasing_after_a_crash()
    world.directory_gone = True
    world.chain.refuses.add(world.original.txid)
    actor.do(want.ReadReply)
    world.chain.mine(1_000)
    actor.look()
    actor.do(want.Sign)
    actor.restart()
    world.chain.put(world.conflict(), depth=6)
    actor.look()
    actor.do(want.ReleaseChannels)
    assert actor.state.stage == "PendingFallback"
    actor.look()
    assert actor.need(want.ReleaseCoins) is None
    assert actor.need(want.Broadcast).purpose == "way_out"


def test_M21_a_worker_judges_by_its_own_snapshot():
    world = World()
    actor = world.receiving(PLAN)
    actor.run("WantsProposal")
    old = actor.state
    actor.restart()
    actor.settle()  # another worker: ChannelsReleasing{plan}, the ids were undrafted in this log
    actor.look()
    need = actor.need(want.ReleaseChannels)
    assert need.drafted == frozenset()
    # Meanwhile the first worker's snapshot is stale: whatever it decides does not fit behind the release.
    drafted = model.decide(
        old,
        world.inspection((world.payer.outpoint, world.ours[0].outpoint)),
        world.now,
        world.rng,
        want.Memory(own=frozenset(range(old.seq))),
    )
    assert [type(event) for event in drafted] == [ev.ProposalDrafted]
    with pytest.raises(model.receive.life.IllegalEvent):
        model.evolve(actor.state, drafted[0])
    stranger = kit.Outpoint("ef" * 32, 0)
    world.node.pend(stranger)
    actor.do(want.ReleaseChannels)
    assert actor.last(ev.ProposalFound).where == "node"
    assert stranger in {channel.outpoint for channel in world.node.listed}
