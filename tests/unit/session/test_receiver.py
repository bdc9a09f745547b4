"""A receiver's life without accidents of the store: what it needs, when, and what it makes of the answers."""

from __future__ import annotations

import base64
import json
from dataclasses import replace

import pytest

from pjv2 import session as model
from pjv2.errors import ReplyCode, WrongUsage
from pjv2.psbt.tx import Psbt
from pjv2.session import events as ev
from pjv2.session import receive
from pjv2.session.events import Outcome
from pjv2.session.monitor import LEASE
from pjv2.wire.message import seal_message_a
from pjv2.wire.secp import SecretKey
from pjv2.wire.uri import V2Endpoint, parse_uri
from tests.unit.session.world import DAY, NOW, PEERS, PLAN, TWO, World, key_config, kit, order, want

Plan = type(PLAN)


def kinds(actor):
    return [type(need).__name__ for need in actor.due]


# ---------------------------------------------------------------- Initialized


def test_a_new_request_polls_its_mailbox_and_watches_its_address():
    actor = World().receiver()
    assert kinds(actor) == ["Poll", "Watch"]
    assert actor.need(want.Watch).scripts == {kit.PAYEE}
    assert actor.needs.wake_at == NOW + DAY
    uri = parse_uri(model.payment_uri(actor.state))
    assert isinstance(uri.endpoint, V2Endpoint)
    assert uri.endpoint.short_id == actor.need(want.Poll).mailbox.short_id
    assert (uri.amount, uri.label, uri.output_substitution) == (100_000, "coffee", False)


def test_an_empty_poll_records_nothing():
    actor = World().receiver()
    assert actor.do(want.Poll) == []


def test_an_original_posted_in_time_is_collected_after_expiry():
    world = World()
    actor = world.receiving()
    world.now += DAY + 5
    actor.settle()
    assert actor.has(ev.ExpiryPassed)
    actor.run("PendingFallback")
    assert actor.last(ev.ProposingStopped).why == "expired"
    actor.run(lambda state: state.fallback_broadcasted)
    assert world.original.txid in world.chain.txs


def test_one_answered_empty_poll_after_expiry_ends_the_request_once_the_chain_was_looked_at():
    world = World()
    actor = world.receiver()
    world.now += DAY
    actor.settle()
    actor.do(want.Poll)
    assert actor.state.polled_out
    assert actor.state.closed is None
    assert kinds(actor) == ["Watch"]
    actor.look()
    assert actor.state.closed.outcome is Outcome.EXPIRED


def test_a_payment_in_sight_keeps_an_expired_request_open_until_it_is_buried():
    world = World()
    actor = world.receiver()
    payment = world.chain.put(world.payment())
    actor.look()
    world.now += DAY
    actor.settle()
    actor.do(want.Poll)
    assert kinds(actor) == ["Watch"]
    world.chain.mine(6)
    actor.look()
    assert (actor.state.closed.outcome, actor.state.closed.txid) == (Outcome.PAID_OTHERWISE, payment.txid)


def test_a_cancelled_request_ends_when_the_mailbox_was_empty_and_nothing_is_in_sight():
    world = World()
    actor = world.receiver()
    actor.feed(want.Cancel())
    actor.look()
    assert actor.state.closed is None
    actor.do(want.Poll)
    assert actor.state.closed.outcome is Outcome.CANCELLED


def test_an_empty_answer_from_before_the_cancel_ends_it_at_once():
    world = World()
    actor = world.receiver()
    actor.do(want.Poll)
    actor.look()
    actor.feed(want.Cancel())
    assert actor.state.closed.outcome is Outcome.CANCELLED


def test_an_original_that_was_there_before_the_cancel_is_collected():
    world = World()
    actor = world.receiving()
    actor.feed(want.Cancel())
    actor.run("PendingFallback")
    assert actor.last(ev.ProposingStopped).why == "cancelled"
    actor.run(lambda state: state.fallback_broadcasted)


@pytest.mark.parametrize("junk", [b"", b"\xff" * 10, b"\xff" * 7168])
def test_junk_in_the_mailbox_ends_the_polling_and_nothing_else(junk):
    world = World()
    actor = world.receiver()
    world.mailbox = junk
    actor.do(want.Poll)
    assert actor.has(ev.MailboxSpoiled)
    assert kinds(actor) == ["Watch"]
    world.chain.put(world.payment(), depth=6)
    actor.look()
    assert actor.state.closed.outcome is Outcome.PAID_OTHERWISE


# ---------------------------------------------------------------- the Original


def refusal_of(world, actor):
    return json.loads(world.read_proposal(actor).rstrip(b"\x00"))


@pytest.mark.parametrize(("body", "code"), [(b"junk", "original-psbt-rejected"), (b"AAAA\nv=9", "version-unsupported")])
def test_an_original_that_does_not_parse_is_refused_without_asking_anybody(body, code):
    world = World()
    actor = world.receiver()
    world.post_original(actor, body=body)
    actor.do(want.Poll)
    assert actor.state.stage == "HasReplyableError"
    assert not any(isinstance(need, want.GatherFacts) for need in actor.done)
    actor.do(want.PostReply)
    assert refusal_of(world, actor)["errorCode"] == code
    actor.look()
    assert actor.state.closed.outcome is Outcome.REFUSED


def test_owned_and_seen_inputs_are_refused_with_the_same_words():
    owned = World()
    owned.ours.append(owned.payer)
    one = owned.receiving()
    one.run("HasReplyableError")
    seen = World()
    two = seen.receiving()
    two.run("UncheckedOriginal")
    assert [type(e) for e in two.decide(seen.answer(two, two.need(want.GatherFacts)))] == [ev.OriginalAccepted]
    two.feed(want.InputsSeen("f" * 32))
    assert two.state.stage == "HasReplyableError"
    for world, actor in ((owned, one), (seen, two)):
        actor.do(want.PostReply)
        assert actor.state.refused.code is ReplyCode.ORIGINAL_PSBT_REJECTED
        assert "f" * 32 not in refusal_of(world, actor)["message"]
    assert refusal_of(owned, one) == refusal_of(seen, two)


def test_an_original_that_pays_too_little_is_refused_and_never_broadcast():
    world = World()
    actor = world.receiving(amount=100_001)
    actor.run("HasReplyableError")
    world.chain.put(world.original)
    actor.look()
    actor.do(want.PostReply)
    assert actor.state.closed is None  # the payer sent it himself: told when it is final
    world.chain.mine(6)
    actor.look()
    assert actor.state.closed.outcome is Outcome.PAID_OTHERWISE
    assert world.chain.broadcasts == []


def test_a_refusal_that_the_directory_does_not_take_is_tried_until_expiry():
    world = World()
    world.status = 400
    world.chain.suitability = kit.Suitability("refused")
    actor = world.receiving()
    actor.run("HasReplyableError")
    actor.do(want.PostReply)
    assert actor.has(ev.Alarm)
    assert actor.do(want.PostReply) == []
    world.now += DAY
    actor.settle()
    assert actor.need(want.PostReply) is None
    actor.look()
    assert actor.state.closed is None  # nobody knows yet whether an older log posted something
    actor.do(want.ReadReply)
    assert actor.state.closed.outcome is Outcome.REFUSED


def test_a_known_original_is_under_way_and_never_refused():
    world = World()
    world.chain.suitability = kit.Suitability("known")
    world.chain.put(world.original)
    actor = world.receiving()
    actor.run("PendingFallback")
    assert actor.last(ev.OriginalAccepted).verdict == "known"
    assert actor.last(ev.ProposingStopped).why == "spend_seen"


# ---------------------------------------------------------------- proposing


def test_a_plain_payjoin_is_signed_posted_and_what_the_payer_finds_there():
    world = World()
    actor = world.receiving()
    actor.run("Monitor")
    found = Psbt.parse(world.read_proposal(actor), padded=True)
    assert found.tx.txid == actor.state.draft.txid
    assert actor.last(ev.ProposalPosted).relay != actor.state.original.relay
    post = next(need for need in actor.done if isinstance(need, want.PostReply))
    assert post.avoid_relay == actor.state.original.relay
    assert world.locked == {world.ours[0].outpoint}


def test_a_v1_payer_gets_base64_in_our_own_mailbox_by_put():
    world = World()
    actor = world.receiving(PLAN, v1=True)
    actor.run("PostingProposal")
    post = actor.need(want.PostReply)
    assert (post.method, post.mailbox) == ("PUT", actor.state.mailbox)
    assert Psbt.parse(base64.b64decode(post.message)).tx.txid == actor.state.draft.txid
    assert not actor.has(ev.ChannelsIntended)  # a v1 payer allows no substitution
    assert actor.state.reply_mailbox == actor.state.mailbox


def test_a_refused_v1_payer_is_told_in_clear():
    world = World()
    world.chain.suitability = kit.Suitability("refused")
    actor = world.receiving(v1=True)
    actor.run("HasReplyableError")
    post = actor.need(want.PostReply)
    assert post.method == "PUT"
    assert json.loads(post.message)["errorCode"] == "original-psbt-rejected"


def test_nothing_happens_before_a_person_approves():
    world = World()
    actor = world.receiving(policy=ev.Policy(approve="ask"))
    actor.run("CheckedOriginal")
    assert kinds(actor) == ["Watch"]
    assert model.status(actor.state) == "waiting for approval"
    offered = want.CoinsFound((world.ours[0].coin(),), want.ReceiverScripts(kit.OUR_CHANGE), world.inspection(()))
    assert actor.decide(offered) == []
    actor.feed(want.Approve())
    assert "FindCoins" in kinds(actor)
    for command in (want.Approve(), want.Decline()):
        with pytest.raises(WrongUsage, match="approval"):
            actor.decide(command)


def test_a_declined_payment_arrives_plainly_and_the_payer_is_told_unavailable():
    world = World()
    actor = world.receiving(policy=ev.Policy(approve="ask"))
    actor.run("CheckedOriginal")
    actor.feed(want.Decline())
    actor.run(lambda state: state.refusal_posted and state.fallback_broadcasted)
    assert refusal_of(world, actor)["errorCode"] == "unavailable"


def test_approval_waits_no_longer_than_the_request_lives():
    world = World()
    actor = world.receiving(policy=ev.Policy(approve="ask"))
    actor.run("CheckedOriginal")
    assert actor.needs.wake_at == NOW + DAY - 300
    world.now += DAY - 30
    actor.settle()
    assert actor.last(ev.RefusalPosting).code == "unavailable"


def test_without_a_coin_of_ours_the_payment_arrives_plainly():
    world = World()
    world.ours.clear()
    actor = world.receiving(PLAN)
    actor.run("PendingFallback")
    assert actor.last(ev.ProposingStopped).why == "policy"


def test_own_input_prefer_opens_channels_without_a_coin_as_the_named_risk():
    world = World()
    world.ours.clear()
    actor = world.receiving(PLAN, ev.Policy(own_input="prefer"))
    actor.run("Monitor")
    assert actor.state.draft.ours == frozenset()
    assert len(actor.state.draft.channels) == 1
    assert actor.state.own_coins == ()


def test_own_input_prefer_without_a_coin_and_without_channels_is_a_plain_payment():
    world = World()
    world.ours.clear()
    world.node.fail_reserve.add(PEERS[0])
    actor = world.receiving(PLAN, ev.Policy(own_input="prefer"))
    actor.run("PendingFallback")
    assert actor.last(ev.ProposingStopped).why == "policy"


def test_a_coin_that_the_wallet_will_not_lock_is_replaced_by_another():
    world = World()
    world.ours.append(kit.purse(kit.ScriptKind.P2WPKH, 300_000, 22))
    actor = world.receiving()
    actor.run(lambda state: state.coins is not None)
    first = actor.state.coins.coins[0].outpoint
    world.not_lockable.add(first)
    actor.run("Monitor")
    assert actor.last(ev.CoinsReserved).excluded == (first,)
    assert first not in actor.state.draft.ours
    assert any(isinstance(n, want.FindCoins) and n.exclude == {first} for n in actor.done)


def test_a_coin_taken_by_another_session_is_looked_for_again():
    world = World()
    actor = world.receiving()
    actor.run("CheckedOriginal")
    found = actor.decide(world.answer(actor, actor.need(want.FindCoins)))
    assert [type(event) for event in found] == [ev.CoinsReserved]
    assert actor.feed(want.CoinTaken(world.ours[0].outpoint, "a" * 32)) == []
    assert actor.need(want.FindCoins) is not None


def test_a_peer_taken_by_another_session_is_left_out_of_the_plan():
    world = World()
    plan = Plan((order(0, 40_000), order(1, None)))
    actor = world.receiving(plan, ev.Policy(on_peer_failure="drop"))
    actor.run(lambda state: state.coins is not None)
    intended = actor.decide(world.answer(actor, actor.need(want.ReserveCoins)))
    assert [type(event) for event in intended] == [ev.ChannelsIntended]
    actor.feed(want.PeerTaken(PEERS[0], "a" * 32))
    assert actor.state.coins.without == (PEERS[0],)
    assert actor.feed(want.PeerTaken(PEERS[0], "a" * 32)) == []
    actor.run("Monitor")
    assert [entry.peer for entry in actor.last(ev.ChannelsIntended).intent.orders] == [PEERS[1]]


@pytest.mark.parametrize("policy", ["drop", "deposit", "abort"])
def test_an_unreachable_peer_is_treated_as_the_policy_says(policy):
    world = World()
    world.unreachable = (PEERS[0],)
    actor = world.receiving(TWO, ev.Policy(on_peer_failure=policy))
    if policy == "abort":
        actor.run("PendingFallback")
        assert actor.last(ev.RefusalPosting).code is ReplyCode.UNAVAILABLE
        return
    actor.run("Monitor")
    assert len(actor.state.draft.channels) == (1 if policy == "drop" else 0)


@pytest.mark.parametrize("policy", ["drop", "deposit", "abort"])
def test_a_peer_that_says_no_is_treated_as_the_policy_says(policy):
    world = World()
    world.node.fail_reserve.add(PEERS[1])
    actor = world.receiving(TWO, ev.Policy(on_peer_failure=policy))
    actor.run("ReleasingChannels")
    first = actor.last(ev.ChannelsIntended)
    assert actor.last(ev.ChannelsReleasing).failed == (1,)
    if policy == "abort":
        actor.run("PendingFallback")
        assert actor.last(ev.RefusalPosting).code is ReplyCode.UNAVAILABLE
        return
    actor.run("Monitor")
    if policy == "drop":
        second = actor.last(ev.ChannelsIntended)
        assert second.attempt == 2
        assert not set(first.ids) & set(second.ids)
        assert [channel.txid for channel in actor.state.draft.channels] == [actor.state.draft.txid]
    else:
        assert actor.state.draft.channels == ()


def test_abort_after_a_failed_secure_is_a_refusal_too():
    world = World()
    world.node.fail_secure.add(PEERS[0])
    actor = world.receiving(PLAN, ev.Policy(on_peer_failure="abort"))
    actor.run("PendingFallback")
    assert actor.has(ev.RefusalPosting)


def test_attempts_are_limited():
    world = World()
    plan = Plan((order(0, 40_000), order(1, None)))
    world.node.fail_reserve |= set(PEERS)
    actor = world.receiving(plan, ev.Policy(on_peer_failure="drop", attempts=1))
    actor.run("Monitor")
    assert actor.names().count("ChannelsIntended") == 1
    assert actor.state.draft.channels == ()


def test_replanning_ends_with_the_first_secure_call():
    world = World()
    world.node.fail_secure.add(PEERS[0])
    actor = world.receiving(TWO, ev.Policy(on_peer_failure="drop"))
    actor.run("Monitor")
    assert actor.names().count("ChannelsIntended") == 1
    assert actor.last(ev.ProposalDrafted).funding == ()
    assert world.node.listed == []


def test_a_node_that_offers_another_output_than_asked_for_is_not_used():
    world = World()
    actor = world.receiving(PLAN)
    actor.run("ReservingChannels")
    need = actor.need(want.ReserveChannels)
    offered = world.answer(actor, need)
    wrong = replace(offered, reserved=tuple(replace(c, capacity=c.capacity + 1) for c in offered.reserved))
    actor.perform(need, wrong)
    assert actor.last(ev.ChannelsReleasing).failed == (0,)


def test_a_channel_secured_for_another_output_is_a_failure():
    world = World()
    actor = world.receiving(PLAN)
    actor.run("SecuringChannels")
    need = actor.need(want.SecureChannels)
    done = world.answer(actor, need)
    wrong = replace(done, secured=tuple(replace(c, outpoint=kit.Outpoint("aa" * 32, 0)) for c in done.secured))
    actor.perform(need, wrong)
    assert actor.last(ev.ChannelsReleasing).next == "plain"


def test_after_a_restart_channels_that_the_node_lists_for_exactly_this_transaction_are_secured():
    world = World()
    actor = world.receiving(TWO)
    actor.run("SecuringChannels")
    world.answer(actor, actor.need(want.SecureChannels))  # done, and killed before the answer was recorded
    actor.restart()
    assert actor.need(want.SecureChannels) is None
    actor.do(want.InspectChannels)
    assert actor.state.stage == "ProvisionalProposal"
    assert all(channel.backup for channel in actor.state.secured.channels)


def test_after_a_restart_a_channel_that_is_not_listed_ends_the_attempt():
    world = World()
    actor = world.receiving(TWO)
    actor.run("SecuringChannels")
    world.answer(actor, actor.need(want.SecureChannels))
    world.node.listed.pop()
    actor.restart()
    actor.do(want.InspectChannels)
    assert actor.last(ev.ChannelsReleasing).next == "plain"
    actor.look()
    assert actor.need(want.ReleaseChannels) is None  # another process might know more: the mailbox is read first
    actor.do(want.ReadReply)
    actor.do(want.ReleaseChannels)
    assert world.node.listed == []


def test_the_worker_that_saw_the_secure_call_fail_needs_no_read():
    world = World()
    world.node.fail_secure.add(PEERS[0])
    actor = world.receiving(PLAN)
    actor.run("ReleasingChannels")
    actor.look()
    assert actor.need(want.ReadReply) is None
    assert actor.need(want.ReleaseChannels) is not None


@pytest.mark.parametrize("why", ["nested", "wallet locked"])
def test_where_rule_2_forbids_channels_the_payjoin_is_plain(why):
    world = World(sender_kind="p2sh" if why == "nested" else "p2wpkh")
    world.can_sign = why != "wallet locked"
    actor = world.receiving(PLAN)
    actor.run("Monitor")
    assert not actor.has(ev.ChannelsIntended)
    assert actor.state.draft.channels == ()


def test_a_payjoin_with_a_nested_input_is_recognised_on_the_chain():
    world = World(sender_kind="p2sh")
    actor = world.receiving()
    actor.run("Monitor")
    payjoin = world.payjoin(actor)
    world.chain.put(payjoin, depth=6)
    actor.look()
    actor.run("Closed")
    assert (actor.state.closed.outcome, actor.state.closed.txid) == (Outcome.PAID, payjoin.txid)


@pytest.mark.parametrize("stage", ["WantsProposal", "PayjoinProposal"])
def test_rule_2_is_looked_at_again_right_before_secure_and_post(stage):
    world = World()
    actor = world.receiving(PLAN)
    actor.run(stage)
    world.chain.put(world.conflict())  # no Watch has seen it yet
    actor.do(want.InspectChannels if stage == "WantsProposal" else want.ReserveCoins)
    assert actor.last(ev.ChannelsReleasing).next == "end"
    assert not actor.has(ev.ProposalPosting)


@pytest.mark.parametrize("need", ["FindCoins", "ReserveCoins"])
def test_a_spend_that_shows_up_while_coins_are_chosen_stops_the_proposal(need):
    world = World()
    actor = world.receiving()
    actor.run(lambda state: state.stage == "CheckedOriginal" and (need == "FindCoins" or state.coins is not None))
    world.chain.put(world.original)
    actor.do(getattr(want, need))
    assert actor.last(ev.ProposingStopped).why == "spend_seen"


def test_a_plain_proposal_is_not_posted_once_an_input_is_spent_or_the_coin_lost():
    for accident in ("spent", "lost"):
        world = World()
        actor = world.receiving()
        actor.run("PayjoinProposal")
        if accident == "spent":
            world.chain.put(world.spend_of_ours())
        else:
            world.not_lockable.add(world.ours[0].outpoint)
        actor.do(want.ReserveCoins)
        assert actor.state.stage == "PendingFallback"
        assert not actor.has(ev.ProposalPosting)


def test_a_channel_proposal_whose_coin_is_lost_is_not_posted():
    world = World()
    actor = world.receiving(PLAN)
    actor.run("PayjoinProposal")
    world.not_lockable.add(world.ours[0].outpoint)
    actor.do(want.ReserveCoins)
    assert actor.last(ev.ChannelsReleasing).next == "end"


@pytest.mark.parametrize("stage", ["ReservingChannels", "WantsProposal", "SecuringChannels", "ProvisionalProposal"])
def test_less_than_five_minutes_are_too_late_for_channels(stage):
    world = World()
    actor = world.receiving(PLAN)
    actor.run(stage)
    world.now = NOW + DAY - 299
    actor.settle()
    assert actor.last(ev.ChannelsReleasing).next == "end"


@pytest.mark.parametrize("stage", ["CheckedOriginal", "ProvisionalProposal", "PayjoinProposal"])
def test_less_than_half_a_minute_is_too_late_for_a_plain_proposal(stage):
    world = World()
    actor = world.receiving()
    actor.run(stage)
    world.now = NOW + DAY - 31
    actor.settle()
    assert not actor.has(ev.ProposingStopped)
    world.now += 2
    actor.settle()
    assert actor.last(ev.ProposingStopped).why == "too_late"


def test_nothing_is_posted_once_the_reply_mailbox_may_be_pruned():
    world = World()
    actor = world.receiving(policy=ev.Policy(mailbox_ttl=3_600))
    actor.run("PostingProposal")
    assert actor.need(want.PostReply) is not None
    world.now += 3_600
    assert actor.need(want.PostReply) is None
    other = World()
    waiting = other.receiving(policy=ev.Policy(mailbox_ttl=3_600))
    waiting.run("CheckedOriginal")
    other.now += 3_600
    waiting.settle()
    assert waiting.last(ev.ProposingStopped).why == "too_late"


def test_a_wallet_that_changes_the_transaction_raises_one_alarm():
    world = World()
    actor = world.receiving()
    actor.run("ProvisionalProposal")
    need = actor.need(want.Sign)
    other = world.original
    junk = kit.unsigned([world.payer], other.outputs).serialize()
    for _ in range(2):
        actor.perform(need, want.SignedPsbt("payjoin", junk))
    assert actor.names().count("Alarm") == 1
    assert actor.feed(want.SignedPsbt("child", junk)) == []
    actor.run("Monitor")


def test_a_wallet_that_cannot_sign_now_is_asked_again_later():
    world = World()
    actor = world.receiving()
    actor.run("ProvisionalProposal")
    need = actor.need(want.Sign)
    with pytest.raises(receive.propose.NotNow):
        actor.decide(want.SignedPsbt("payjoin", need.psbt))
    assert actor.state.stage == "ProvisionalProposal"


def test_a_reply_that_the_directory_does_not_take_is_told_once_and_tried_again():
    world = World()
    actor = world.receiving()
    actor.run("PostingProposal")
    world.status = 413
    actor.do(want.PostReply)
    actor.do(want.PostReply)
    assert actor.names().count("Alarm") == 1
    world.status = 200
    actor.do(want.PostReply)
    assert actor.state.stage == "Monitor"


def test_the_same_message_is_posted_after_a_restart_and_never_another():
    world = World()
    actor = world.receiving(PLAN)
    actor.run("PostingProposal")
    before = actor.need(want.PostReply)
    actor.restart()
    assert actor.need(want.PostReply) == before


def test_a_posting_proposal_is_not_posted_again_once_cancelled():
    world = World()
    actor = world.receiving()
    actor.run("PostingProposal")
    actor.feed(want.Cancel())
    assert actor.need(want.PostReply) is None
    actor.look()
    assert actor.has(ev.FallbackBroadcasting)


def refuse_to(monkeypatch, name, condition):
    """Make a builder of the proposal give up, as it does for amounts and sizes that are tested where it lives."""
    usual = getattr(receive.propose, name)

    def give_up(*arguments, **named):
        if condition(*arguments):
            raise receive.propose.CannotPropose("it does not fit")
        return usual(*arguments, **named)

    monkeypatch.setattr(receive.propose, name, give_up)


def test_a_plan_that_does_not_fit_the_coins_becomes_a_plain_payjoin(monkeypatch):
    refuse_to(monkeypatch, "make_intent", lambda checked, plan, coins, scripts: plan is not None)
    actor = World().receiving(PLAN)
    actor.run("Monitor")
    assert not actor.has(ev.ChannelsIntended)


def test_a_payjoin_that_does_not_fit_at_all_becomes_a_plain_payment(monkeypatch):
    refuse_to(monkeypatch, "make_intent", lambda *arguments: True)
    actor = World().receiving(PLAN)
    actor.run("PendingFallback")
    assert actor.last(ev.ProposingStopped).why == "policy"


@pytest.mark.parametrize("plan", [None, PLAN])
def test_a_reply_that_outgrew_its_message_is_not_posted(monkeypatch, plan):
    refuse_to(monkeypatch, "seal_message_b", lambda *arguments: True)
    actor = World().receiving(plan)
    actor.run("PendingFallback")
    assert not actor.has(ev.ProposalPosting)


def test_a_stranger_channel_that_shows_up_between_finding_and_locking_coins_is_found():
    world = World()
    actor = world.receiving(PLAN)
    actor.run(lambda state: state.coins is not None)
    world.node.pend(kit.Outpoint("cd" * 32, 0))
    actor.do(want.ReserveCoins)
    assert actor.last(ev.ProposalFound).where == "node"


def test_a_stranger_channel_before_the_draft_ends_the_attempt():
    world = World()
    actor = world.receiving(PLAN)
    actor.run("WantsProposal")
    world.node.pend(kit.Outpoint("cd" * 32, 0))
    actor.do(want.InspectChannels)
    assert actor.last(ev.ChannelsReleasing).next == "plan"
    actor.run("Monitor")
    assert actor.last(ev.ProposalFound).where == "node"


# ---------------------------------------------------------------- commands


def test_commands_that_cannot_be_say_what_to_do_instead():
    world = World()
    actor = world.receiver()
    with pytest.raises(WrongUsage, match="nothing to broadcast"):
        actor.decide(want.BroadcastNow())
    with pytest.raises(WrongUsage, match="reclaimed"):
        actor.decide(want.Reclaim(kit.CHANGE, kit.FeeRate(1_000)))
    actor.feed(want.Cancel())
    assert actor.decide(want.Cancel()) == []
    assert [type(e) for e in actor.decide(want.Cancel(broadcast=False))] == [ev.CancelRequested]
    actor.run("Closed")
    for command in (want.Cancel(), want.Approve(), want.BroadcastNow()):
        with pytest.raises(WrongUsage, match="has ended"):
            actor.decide(command)


def test_broadcast_takes_back_an_earlier_no():
    world = World()
    actor = world.receiving()
    actor.run("Monitor")
    actor.feed(want.Cancel(broadcast=False))
    actor.look()
    assert not actor.has(ev.FallbackBroadcasting)
    actor.feed(want.BroadcastNow())
    assert actor.has(ev.FallbackBroadcasting)
    assert actor.decide(want.BroadcastNow()) == []


def test_an_answer_that_no_longer_fits_is_dropped_in_silence():
    world = World()
    actor = world.receiving(PLAN)
    answers = []
    usual = world.answer
    world.answer = lambda a, need: answers.append(usual(a, need)) or answers[-1]
    actor.run("Monitor")
    fresh = world.receiver()
    for answer in answers:
        if not isinstance(answer, want.Polled | want.ChainView):
            assert fresh.decide(answer) == []
    for answer in answers:
        if not isinstance(answer, want.ChainView):
            assert actor.decide(answer) == []


# ---------------------------------------------------------------- create


def test_a_request_outlives_neither_the_mailbox_nor_the_past():
    world = World()
    for lifetime in (0, -5, 518_401):
        with pytest.raises(WrongUsage, match="518400"):
            world.receiver(lifetime=lifetime)
    world.receiver(lifetime=518_400)


def test_a_request_without_node_plans_no_channels_and_asks_for_something():
    world = World()
    with pytest.raises(WrongUsage, match="satoshi"):
        world.receiver(amount=0)
    with pytest.raises(WrongUsage, match="Lightning"):
        model.create_receiver(
            NOW,
            world.rng,
            network=kit_network(),
            genesis="00",
            wallet="w",
            node=None,
            address="a",
            script=b"s",
            address_index=0,
            amount=1,
            directory="https://d",
            keys=key_config(),
            expires=int(NOW) + 60,
            height=1,
            plan=PLAN,
        )


def kit_network():
    from pjv2.units import Network

    return Network.REGTEST


def test_two_requests_share_no_key_and_no_name():
    world = World()
    one, two = world.receiver(), world.receiver()
    assert one.state.session != two.state.session
    assert one.state.mailbox.short_id != two.state.mailbox.short_id
    assert len(one.state.session) == 32


# ---------------------------------------------------------------- coins and rows


def test_a_lock_is_renewed_while_the_coin_may_still_be_spent():
    world = World()
    actor = world.receiving()
    actor.run("Monitor")
    world.now += 19 * DAY
    actor.settle()
    assert actor.need(want.ReserveCoins) is None
    world.now += 2 * DAY
    renewal = actor.need(want.ReserveCoins)
    assert renewal.until == actor.state.coins.until + LEASE
    world.now += DAY
    assert actor.need(want.ReserveCoins) == renewal
    assert actor.do(want.ReserveCoins) == []
    world.not_lockable.add(world.ours[0].outpoint)
    actor.do(want.ReserveCoins)
    actor.do(want.ReserveCoins)
    assert actor.names().count("Alarm") == 1


def test_what_the_store_writes_with_each_event():
    world = World()
    actor = world.receiving(PLAN)
    actor.run("Monitor")
    world.chain.put(world.original, depth=6)
    actor.look()
    actor.run("Closed")
    state = None
    seen = {}
    for event in actor.events:
        seen[type(event)] = model.effects(state, event)
        state = model.evolve(state, event)
    assert seen[ev.OriginalAccepted].see_inputs == (world.payer.outpoint,)
    assert seen[ev.CoinsReserved] == model.Effects(take_coins=(world.ours[0].outpoint,))
    assert seen[ev.ChannelsIntended].take_peers == (PEERS[0],)
    assert seen[ev.ChannelsReleased].free_peers
    assert seen[ev.ChannelsReleased].block_peers == ((PEERS[0], world.chain.tip + 2_016),)
    assert seen[ev.CoinsReleased].free_coins
    again = model.effects(actor.replayed(), actor.last(ev.CoinsReserved))
    assert again.free_coins


def test_the_row_says_when_to_come_back():
    world = World()
    actor = world.receiver()
    row = model.row_facts(actor.state, world.now, actor.memory)
    assert (row.state, row.outcome, row.next_due) == ("Initialized", None, world.now)
    assert (row.label, row.note, row.order, row.amount) == ("coffee", "table 4", "A-1", 100_000)
    actor.feed(want.Cancel())
    actor.run("Closed")
    assert model.row_facts(actor.state, world.now, actor.memory).outcome == "Cancelled"
    world.now += DAY + 2_592_000
    row = model.row_facts(actor.state, world.now, actor.memory)
    assert row.next_due is None
    assert actor.due == ()
    assert model.is_closed(actor.state)


def test_a_message_for_another_request_does_not_open():
    world = World()
    actor = world.receiver()
    stranger = SecretKey(b"\x77" * 32).public
    world.mailbox = seal_message_a(stranger, world.reply_key.public, b"x", world.rng)
    actor.do(want.Poll)
    assert actor.state.spoiled is not None
