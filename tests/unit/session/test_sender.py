"""A sender's life: session-model.md section 5."""

from __future__ import annotations

import pytest

from pjv2 import session as model
from pjv2.errors import WrongUsage
from pjv2.session import events as ev
from pjv2.session.events import Outcome
from pjv2.session.facts import BroadcastResult
from pjv2.session.monitor import LEASE
from pjv2.wire.uri import PjUri, parse_uri
from tests.unit.session.scenarios import sending
from tests.unit.session.world import DAY, NOW, TIP, World, kit, want

REQUIRE = ev.Policy(require_payjoin=True)


def kinds(actor):
    return [type(need).__name__ for need in actor.due]


# ---------------------------------------------------------------- before the Original left


def test_the_original_is_sealed_and_recorded_before_it_is_posted():
    world = World()
    actor = world.sender()
    assert actor.due == ()
    actor.settle()
    assert actor.state.stage == "PostingOriginal"
    need = actor.need(want.PostOriginal)
    assert need.message == actor.last(ev.OriginalPosting).message
    assert need.mailbox.short_id == actor.state.created.short_id
    actor.restart()
    assert actor.need(want.PostOriginal) == need


@pytest.mark.parametrize("why", ["cancelled", "expired"])
def test_before_it_left_the_coins_are_given_back_and_the_session_ends(why):
    world = World()
    actor = world.sender()
    if why == "cancelled":
        actor.append(*actor.decide(want.Cancel()))
    else:
        world.now += DAY
    actor.settle()
    assert kinds(actor) == ["ReleaseCoins"]
    actor.do(want.ReleaseCoins)
    assert actor.state.closed.outcome is (Outcome.CANCELLED if why == "cancelled" else Outcome.EXPIRED)
    assert actor.due == ()
    assert not actor.has(ev.OriginalPosting)


def test_from_posting_on_no_cancel_gives_the_coins_back():
    world = World()
    actor = world.sender()
    actor.settle()
    actor.feed(want.Cancel(broadcast=False))
    assert actor.state.stage == "PendingFallback"
    world.now += 100 * DAY
    for _ in range(3):
        for need in actor.due:
            assert not isinstance(need, want.ReleaseCoins | want.PostOriginal | want.Broadcast)
            actor.perform(need)
    assert actor.feed(want.CoinsFreed(actor.state.own_coins)) == []
    assert actor.state.own_coins


# ---------------------------------------------------------------- the exchange


def test_a_post_that_the_directory_does_not_take_ends_the_payjoin():
    world = World()
    world.status = 400
    actor = world.sender()
    actor.settle()
    actor.do(want.PostOriginal)
    assert actor.state.stage == "PendingFallback"
    actor.look()
    assert actor.need(want.Broadcast).purpose == "fallback"


def test_a_sender_polls_his_own_mailbox_with_cover():
    world = World()
    actor = world.sender()
    actor.run("PollingForProposal")
    poll = actor.need(want.Poll)
    assert poll.mailbox == actor.state.reply_mailbox
    assert poll.mailbox.short_id != actor.state.mailbox.short_id
    assert poll.cover == (actor.state.created.receiver, actor.state.reply_public)


@pytest.mark.parametrize("stage", ["PostingOriginal", "PollingForProposal"])
def test_after_expiry_one_empty_poll_ends_the_waiting(stage):
    world = World()
    actor = sending(world, proposal=False) if stage == "PollingForProposal" else world.sender()
    actor.settle()
    world.now += DAY
    actor.settle()
    assert actor.state.stage == stage
    assert actor.need(want.PostOriginal) is None
    actor.do(want.Poll, want.Polled(None))
    assert actor.state.stage == "PendingFallback"


def test_a_reply_may_be_there_before_the_directory_answered_our_post():
    world = World()
    actor = world.sender()
    actor.settle()
    world.answer(actor, actor.need(want.PostOriginal))
    world.propose_to(actor)
    actor.feed(want.Polled(world.reply))
    assert actor.state.stage == "WantsSignature"


def test_a_directory_that_never_answers_ends_the_waiting_at_the_deadline():
    world = World()
    actor = sending(world, proposal=False)
    world.now += DAY + 599
    actor.settle()
    assert actor.state.stage == "PollingForProposal"
    world.now += 1
    actor.settle()
    assert actor.state.stage == "PendingFallback"
    assert actor.feed(want.Polled(world.reply)) == []


@pytest.mark.parametrize(
    ("payload", "code"),
    [
        (b'{"errorCode":"unavailable","message":"come back"}', "unavailable"),
        (b'{"errorCode":"send-bitcoin-here","message":"phishing"}', "send-bitcoin-here"),
        (b'{"nothing":1}', None),
        (b"junk", None),
    ],
)
def test_a_refusal_is_recorded_and_the_original_pays(payload, code):
    world = World()
    actor = sending(world, proposal=False)
    world.reply_with(payload)
    actor.do(want.Poll)
    assert actor.last(ev.ProposalRefused).code == code
    shown = model.public_event(actor.state, actor.last(ev.ProposalRefused))
    assert shown["code"] in (None, "unavailable")
    assert "phishing" not in str(shown)
    actor.look()
    assert actor.has(ev.FallbackBroadcasting)


def test_a_reply_that_does_not_open_is_a_refusal():
    world = World()
    actor = sending(world, proposal=False)
    world.reply = b"\x01" * 7168
    actor.do(want.Poll)
    assert actor.last(ev.ProposalRefused).code is None


def test_a_proposal_that_breaks_a_rule_is_not_signed():
    world = World()
    actor = sending(world)
    bad = world.propose_to(actor)
    outputs = tuple(kit.TxOut(o.value - 5_000 if o.script == kit.CHANGE else o.value, o.script) for o in bad.tx.outputs)
    world.reply_with(kit.replace(bad, tx=kit.replace(bad.tx, outputs=outputs)).serialize())
    actor.do(want.Poll)
    assert actor.last(ev.ProposalRefused).code is None
    assert actor.state.stage == "PendingFallback"


def test_a_signature_that_cannot_be_used_ends_the_payjoin():
    world = World()
    actor = sending(world)
    actor.run("WantsSignature")
    actor.feed(want.SignedPsbt("payjoin", b"junk"))
    assert actor.state.stage == "PendingFallback"


def test_a_wallet_that_cannot_sign_now_is_asked_again():
    world = World()
    actor = sending(world)
    actor.run("WantsSignature")
    need = actor.need(want.Sign)
    with pytest.raises(model.send.NotNow):
        actor.decide(want.SignedPsbt("payjoin", need.psbt))


def test_nothing_new_is_signed_after_the_deadline():
    world = World()
    actor = sending(world)
    actor.run("WantsSignature")
    signed = world.answer(actor, actor.need(want.Sign))
    world.now += DAY + 600
    assert actor.decide(signed) == []
    assert actor.need(want.Sign) is None
    actor.settle()
    assert actor.state.stage == "PendingFallback"


@pytest.mark.parametrize("stage", ["PollingForProposal", "WantsSignature"])
def test_a_person_may_want_the_original_out_now(stage):
    world = World()
    actor = sending(world)
    actor.run(stage)
    actor.feed(want.BroadcastNow())
    assert actor.state.stage == "PendingFallback"
    assert actor.decide(want.BroadcastNow()) == []


# ---------------------------------------------------------------- require_payjoin


def test_require_payjoin_never_broadcasts_the_original_by_itself():
    world = World()
    actor = sending(world, REQUIRE, proposal=False)
    world.reply_with(b'{"errorCode":"unavailable"}')
    actor.do(want.Poll)
    world.now += 3 * DAY
    actor.look()
    assert actor.need(want.Broadcast) is None
    actor.feed(want.BroadcastNow())
    assert actor.need(want.Broadcast).purpose == "fallback"


def test_require_payjoin_keeps_trying_a_refused_payjoin_and_raises_an_alarm():
    world = World()
    actor = sending(world, REQUIRE)
    actor.run("BroadcastingPayjoin")
    actor.look()
    world.chain.refuses.add(actor.state.signed.txid)
    actor.do(want.Broadcast)
    actor.do(want.Broadcast)
    assert actor.names().count("Alarm") == 1
    assert not actor.has(ev.FallbackBroadcasting)
    assert actor.need(want.Broadcast).purpose == "payjoin"
    actor.feed(want.BroadcastNow())
    assert actor.need(want.Broadcast).purpose == "fallback"


# ---------------------------------------------------------------- afterwards


def test_a_payjoin_that_is_evicted_is_broadcast_again():
    world = World()
    actor = sending(world)
    actor.run(lambda state: state.sightings != ())
    assert actor.need(want.Broadcast) is None
    world.chain.txs.clear()
    actor.look()
    actor.do(want.Broadcast)
    assert world.chain.broadcasts == ["payjoin", "payjoin"]


@pytest.mark.parametrize(
    ("which", "ending", "paid"),
    [("original", "PaidByFallback", 100_000), ("conflict", "Conflicted", 0)],
)
def test_whatever_is_buried_decides(which, ending, paid):
    world = World()
    actor = sending(world, proposal=False)
    world.chain.put(world.original if which == "original" else world.conflict(), depth=5)
    actor.look()
    assert actor.need(want.ReleaseCoins) is None
    world.chain.mine()
    actor.look()
    actor.run("Closed")
    assert (actor.state.closed.outcome.value, actor.state.closed.amount_received) == (ending, paid)


def test_coins_stay_leased_until_a_burial_and_the_lease_is_renewed():
    world = World()
    actor = sending(world, proposal=False)
    actor.feed(want.Cancel(broadcast=False))
    world.now = NOW + LEASE
    actor.look()
    renewal = actor.need(want.ReserveCoins)
    assert renewal.coins == actor.state.created.inputs
    assert renewal.until > world.now + 10 * DAY
    actor.do(want.ReserveCoins)
    world.not_lockable.add(world.payer.outpoint)
    actor.do(want.ReserveCoins)
    actor.do(want.ReserveCoins)
    assert actor.names().count("Alarm") == 1


def test_the_networks_answers_to_the_original_are_recorded_once():
    world = World()
    actor = sending(world, proposal=False)
    actor.feed(want.Cancel())
    actor.look()
    need = actor.need(want.Broadcast)
    for reason in ("a", "a", "b"):
        actor.perform(need, want.BroadcastAnswer("fallback", need.txid, BroadcastResult("refused", reason)))
    for _ in range(2):
        actor.perform(need, want.BroadcastAnswer("fallback", need.txid, BroadcastResult("known")))
    assert actor.names().count("FallbackRejected") == 2
    assert actor.names().count("FallbackBroadcasted") == 1
    assert actor.feed(want.BroadcastAnswer("fallback", "00" * 32, BroadcastResult("accepted"))) == []


def test_an_answer_about_the_fallback_that_was_never_announced_says_nothing():
    world = World()
    actor = sending(world, proposal=False)
    assert actor.feed(want.BroadcastAnswer("fallback", world.original.txid, BroadcastResult("accepted"))) == []


# ---------------------------------------------------------------- reclaim and other commands


def test_a_reclaim_stops_every_other_broadcast_of_ours():
    world = World()
    actor = sending(world)
    actor.run("BroadcastingPayjoin")
    actor.look()
    actor.feed(want.Reclaim(kit.CHANGE, kit.FeeRate(2_500)))
    assert actor.need(want.Sign).purpose == "reclaim"
    actor.do(want.Sign)
    actor.look()
    assert [need.purpose for need in actor.due if isinstance(need, want.Broadcast)] == ["reclaim"]


def test_a_reclaim_can_be_asked_for_again_at_a_higher_rate():
    world = World()
    actor = sending(world, proposal=False)
    for rate in (1_000, 4_000):
        actor.feed(want.Reclaim(kit.CHANGE, kit.FeeRate(rate)))
        actor.look()
        actor.do(want.Sign)
    assert len(actor.state.reclaims) == 2
    actor.look()
    assert actor.need(want.Broadcast).txid == actor.state.reclaims[1].txid


def test_no_reclaim_is_signed_once_a_spend_confirmed():
    world = World()
    actor = sending(world, proposal=False)
    actor.feed(want.Reclaim(kit.CHANGE, kit.FeeRate(1_000)))
    world.chain.put(world.original, depth=1)
    actor.look()
    assert actor.need(want.Sign) is None


def test_a_wallet_that_signs_another_reclaim_is_not_believed():
    world = World()
    actor = sending(world, proposal=False)
    actor.feed(want.Reclaim(kit.CHANGE, kit.FeeRate(1_000)))
    actor.look()
    need = actor.need(want.Sign)
    assert actor.perform(need, want.SignedPsbt("reclaim", need.psbt)) == []
    assert actor.perform(need, want.SignedPsbt("child", need.psbt)) == []
    assert actor.perform(need, want.SignedPsbt("fallback", need.psbt)) == []


def test_commands_that_cannot_be_say_what_to_do_instead():
    world = World()
    actor = world.sender()
    with pytest.raises(WrongUsage, match="wait a moment"):
        actor.decide(want.BroadcastNow())
    with pytest.raises(WrongUsage, match="cancel the session"):
        actor.decide(want.Reclaim(kit.CHANGE, kit.FeeRate(1_000)))
    with pytest.raises(WrongUsage, match="nothing to approve"):
        actor.decide(want.Approve())
    actor.settle()
    with pytest.raises(WrongUsage, match="reclaimed"):
        actor.decide(want.Reclaim(kit.CHANGE, kit.FeeRate(100_000_000)))
    actor.feed(want.Cancel())
    assert actor.decide(want.Cancel()) == []
    world.chain.put(world.original, depth=6)
    actor.look()
    actor.run("Closed")
    with pytest.raises(WrongUsage, match="has ended"):
        actor.decide(want.Cancel())
    assert actor.decide(want.Tick()) == []


def create(world, uri, **changes):
    given = {
        "network": kit_network(),
        "genesis": "00",
        "wallet": "w",
        "uri": uri,
        "sent": world.sent,
        "amount": 1,
        "lock_id": b"",
        "height": TIP,
    }
    return model.create_sender(world.now, world.rng, **{**given, **changes})


def kit_network():
    from pjv2.units import Network

    return Network.REGTEST


def test_only_a_live_v2_uri_can_be_paid_this_way():
    world = World()
    with pytest.raises(WrongUsage, match="ordinary payment"):
        create(world, PjUri("address", 1))
    uri = parse_uri(world.uri_for(kit_key(), int(NOW) + 60))
    assert create(world, uri).amount == 1
    world.now += 60
    with pytest.raises(WrongUsage, match="expired"):
        create(world, uri)


def kit_key():
    from pjv2.wire.secp import SecretKey

    return SecretKey(b"\x44" * 32)


def test_the_row_of_a_sender_names_the_receiver_key_for_ever():
    world = World()
    actor = world.sender()
    row = model.row_facts(actor.state, world.now, actor.memory)
    assert row.role == "sender"
    assert len(row.uri_id) == 64
    assert (row.note, row.order) == (None, None)
    assert model.effects(None, actor.events[0]).take_coins == (world.payer.outpoint,)
