"""Every way a payment can end on the lab: refused, cancelled, expired, paid otherwise, taken back, undone by a reorganisation."""

from __future__ import annotations

from dataclasses import replace

import pytest

from pjv2.backends.channel.rehearsal_peer import Fault, Step
from pjv2.errors import WrongUsage
from pjv2.psbt.tx import TxOut
from pjv2.session import events as ev
from pjv2.session.events import Policy
from pjv2.session.needs import Approve, BroadcastNow, Cancel, Decline, Reclaim
from pjv2.units import FeeRate
from pjv2.wire.mailbox import short_id
from tests.story.lab.kit import AMOUNT, DAY, PLAIN, Stranger, change_script, refused, spend, stage

ASK = replace(Policy(), approve="ask")


# ---------------------------------------------------------------- a person


async def test_nothing_is_proposed_before_a_person_approves() -> None:
    async with stage() as s:
        bob, alice = await s.bob(), await s.alice()
        request = await s.request(bob, policy=ASK)
        payment = await s.begin(bob, alice, request)
        await s.until(bob, "OriginalAccepted", request.session)
        assert s.told(bob, request.session) == ["Created", "OriginalReceived", "OriginalAccepted"]
        await bob.driver.command(request.session, Approve())
        await s.both_seen(bob, request, alice, payment)
        await s.bury()
        await s.both_ended("Paid", bob, request, alice, payment)
        assert s.told(bob, request.session) == [*PLAIN[:3], "Approved", *PLAIN[3:]]


async def test_a_declined_payer_is_told_and_his_original_pays() -> None:
    async with stage() as s:
        bob, alice = await s.bob(), await s.alice()
        request = await s.request(bob, policy=ASK)
        payment = await s.begin(bob, alice, request)
        await s.until(bob, "OriginalAccepted", request.session)
        await bob.driver.command(request.session, Decline())
        await s.until(alice, "ProposalRefused", payment.session, code="unavailable")
        await s.until(bob, "Seen", request.session, what="original")
        await s.bury()
        await s.both_ended("PaidByFallback", bob, request, alice, payment)
        await s.all_free(bob, alice)


# ---------------------------------------------------------------- cancelled


@pytest.mark.parametrize("broadcast", [True, False])
async def test_a_request_that_nobody_paid_is_cancelled_at_once(broadcast: bool) -> None:
    async with stage() as s:
        bob = await s.bob()
        request = await s.request(bob)
        s.drive(bob, request.session)
        await s.world.directory.until_waiting()
        await bob.driver.command(request.session, Cancel(broadcast))
        assert (await s.closed(bob, request.session)).facts["outcome"] == "Cancelled"
        await s.all_free(bob)


@pytest.mark.parametrize("broadcast", [True, False])
async def test_cancelling_before_a_proposal_left_ends_without_one(broadcast: bool) -> None:
    async with stage(long_poll=0.2) as s:
        bob, alice = await s.bob(), await s.alice()
        request = await s.request(bob, policy=ASK)
        payment = await s.begin(bob, alice, request)
        await s.until(bob, "OriginalAccepted", request.session)
        await bob.driver.command(request.session, Cancel(broadcast))
        await s.until(bob, "ProposingStopped", request.session, why="cancelled")
        if broadcast:
            await s.until(bob, "Seen", request.session, what="original")
            await s.bury()
        his = await s.closed(bob, request.session)
        assert his.facts["outcome"] == ("PaidByFallback" if broadcast else "Cancelled")
        if not broadcast:
            assert not s.in_mempool()
            # Alice's own program pays all the same: that is news to nobody, and a late payment after the end.
            s.drive(bob, request.session, stay=True)
            s.past(request, 601)
            await s.until(alice, "FallbackBroadcasted", payment.session)
            await s.bury()
            assert (await s.until(bob, "LatePayment", request.session)).facts["amount"] == AMOUNT
            await s.leave(bob, request.session)
        assert (await s.closed(alice, payment.session)).facts["outcome"] == "PaidByFallback"
        await s.all_free(bob, alice)


async def test_cancelling_while_channels_are_secured_releases_them_and_the_original_pays() -> None:
    async with stage(long_poll=0.2) as s:
        bob, alice = await s.bob(lightning=True), await s.alice()
        [peer] = s.world.peers(1)
        peer.fault(Step.SECURE, Fault.STALL_ANSWER)
        request = await s.request(bob, channels=[s.order(peer)])
        payment = await s.begin(bob, alice, request)
        await peer.until_held(Step.SECURE)
        await bob.driver.command(request.session, Cancel())
        await s.until(bob, "ChannelsReleasing", request.session, next="end")
        await s.until(bob, "ChannelsReleased", request.session)
        peer.resume()
        await s.until(bob, "Seen", request.session, what="original")
        await s.bury()
        await s.both_ended("PaidByFallback", bob, request, alice, payment)
        assert "ProposalPosting" not in s.told(bob, request.session)
        await s.all_free(bob, alice)


async def test_cancelling_a_posted_proposal_sends_the_original_which_replaces_nothing_yet_signed() -> None:
    async with stage() as s:
        bob, alice = await s.bob(), await s.alice()
        request = await s.request(bob)
        s.drive(bob, request.session)
        payer = Stranger(s, alice, request)
        sent = await payer.original()
        await payer.post(sent)
        await s.until(bob, "ProposalPosted", request.session)
        await bob.driver.command(request.session, Cancel())
        await s.until(bob, "Seen", request.session, what="original", txid=sent.tx.txid)
        await s.bury()
        assert (await s.closed(bob, request.session)).facts["outcome"] == "PaidByFallback"
        await s.all_free(bob)


async def test_without_broadcast_a_posted_proposal_ends_by_the_way_out_and_can_still_be_paid_until_then() -> None:
    async with stage(long_poll=0.2) as s:
        bob, alice = await s.bob(), await s.alice()
        request = await s.request(bob, policy=replace(Policy(), give_up_blocks=3))
        s.drive(bob, request.session)
        payer = Stranger(s, alice, request)
        await payer.post(await payer.original())
        await s.until(bob, "ProposalPosted", request.session)
        await bob.driver.command(request.session, Cancel(broadcast=False))
        await s.bury(2)
        assert "WayOutBroadcasting" not in s.told(bob, request.session)
        assert len(await bob.store.coins_in_use()) == 1
        await s.bury(1)
        way_out = await s.until(bob, "WayOutBroadcasting", request.session)
        while way_out.facts["txid"] not in s.in_mempool():
            await s.until(bob, "Seen", request.session, what="way_out")
        await s.bury()
        assert (await s.closed(bob, request.session)).facts["outcome"] == "Cancelled"
        assert await bob.wallet.balance() == 200_000 - s.fee(way_out.facts["txid"])
        await s.all_free(bob)


async def test_a_payment_that_never_left_is_cancelled_and_may_be_made_again() -> None:
    async with stage() as s:
        bob, alice = await s.bob(), await s.alice()
        request = await s.request(bob)
        payment = await s.pay(alice, request)
        error = await refused(s.pay(alice, request))
        assert isinstance(error, WrongUsage)
        assert payment.session in str(error)
        error = await refused(s.pay(alice, request, again=True))
        assert isinstance(error, WrongUsage), "the first one is still open"
        await alice.driver.command(payment.session, Cancel())
        s.drive(alice, payment.session)
        assert (await s.closed(alice, payment.session)).facts["outcome"] == "Cancelled"
        assert isinstance(await refused(s.pay(alice, request)), WrongUsage)
        his, hers, second = await s.payjoin(bob, alice, request, again=True)
        assert (his.facts["outcome"], hers.facts["outcome"]) == ("Paid", "Paid")
        assert second.session != payment.session
        error = await refused(s.pay(alice, request, again=True))
        assert isinstance(error, WrongUsage), "the second one paid, whatever became of the first"
        assert second.session in str(error)
        await s.all_free(bob, alice)


async def test_the_same_order_is_the_same_request() -> None:
    async with stage() as s:
        bob = await s.bob()
        one, two = await s.request(bob, order="A-1"), await s.request(bob, 99_999, order="A-1")
        assert (one.session, one.uri, one.address, two.amount) == (two.session, two.uri, two.address, AMOUNT)
        assert len(await bob.store.rows()) == 1
        assert (await s.request(bob, order="A-2")).session != one.session


# ---------------------------------------------------------------- expired


async def test_a_request_that_nobody_paid_expires_after_one_answered_poll() -> None:
    async with stage(long_poll=0.1) as s:
        bob = await s.bob()
        request = await s.request(bob)
        s.drive(bob, request.session)
        await s.world.directory.until_waiting()
        s.past(request)
        assert (await s.closed(bob, request.session)).facts["outcome"] == "Expired"
        assert s.told(bob, request.session) == ["Created", "ExpiryPassed", "ExpiryPassed", "Closed"]


async def test_an_original_posted_in_time_is_collected_by_the_poll_after_expiry() -> None:
    async with stage() as s:
        bob, alice = await s.bob(lightning=True), await s.alice()
        request = await s.request(bob, channels=[s.order(s.world.peers(1)[0])])
        payment = await s.pay(alice, request)
        s.drive(alice, payment.session)
        await s.until(alice, "OriginalPosted", payment.session)
        await s.leave(alice, payment.session)
        s.past(request)
        s.drive(bob, request.session)
        await s.until(bob, "ProposingStopped", request.session, why="expired")
        await s.until(bob, "Seen", request.session, what="original")
        await s.bury()
        his = await s.closed(bob, request.session)
        assert (his.facts["outcome"], his.facts["amount_received"]) == ("PaidByFallback", AMOUNT)
        s.drive(alice, payment.session)
        assert (await s.closed(alice, payment.session)).facts["outcome"] == "PaidByFallback"
        await s.all_free(bob, alice)


async def test_an_original_that_expires_while_a_person_hesitates_pays_by_itself() -> None:
    async with stage(long_poll=0.2) as s:
        bob, alice = await s.bob(), await s.alice()
        request = await s.request(bob, policy=ASK)
        payment = await s.begin(bob, alice, request)
        await s.until(bob, "OriginalAccepted", request.session)
        s.past(request)
        await s.until(bob, "ProposingStopped", request.session)
        await s.until(bob, "Seen", request.session, what="original")
        await s.bury()
        await s.both_ended("PaidByFallback", bob, request, alice, payment)


# ---------------------------------------------------------------- other payments


async def test_an_ordinary_payment_to_the_address_ends_the_request() -> None:
    async with stage() as s:
        bob = await s.bob()
        request = await s.request(bob)
        s.drive(bob, request.session)
        script = (await s.event(bob, request.session, ev.ReceiverCreated)).script
        outpoint = await s.world.chain.fund(script, AMOUNT + 5)
        await s.until(bob, "Seen", request.session, what="address", amount=AMOUNT + 5)
        await s.bury(4)
        assert not bob.diary.of("Closed")
        await s.bury(1)
        his = await s.closed(bob, request.session)
        assert (his.facts["outcome"], his.facts["txid"]) == ("PaidOtherwise", outpoint.txid)
        assert his.facts["amount_received"] == AMOUNT + 5
        bob.funded[outpoint] = AMOUNT + 5


async def test_once_an_original_was_accepted_a_stray_payment_to_the_address_is_only_news() -> None:
    async with stage() as s:
        bob, alice = await s.bob(), await s.alice()
        request = await s.request(bob)
        payment = await s.propose(bob, alice, request)
        script = (await s.event(bob, request.session, ev.ReceiverCreated)).script
        bob.funded[await s.world.chain.fund(script, 600)] = 600
        await s.bury()
        await s.until(bob, "Seen", request.session, what="address", amount=600)
        assert not bob.diary.of("Closed")
        s.drive(alice, payment.session)
        await s.both_seen(bob, request, alice, payment)
        await s.bury()
        await s.both_ended("Paid", bob, request, alice, payment)


@pytest.mark.parametrize("channels", [False, True])
async def test_a_bumped_original_pays_otherwise(channels: bool) -> None:
    async with stage() as s:
        bob, alice = await s.bob(lightning=channels), await s.alice()
        wanted = {"channels": [s.order(s.world.peers(1)[0])]} if channels else {}
        request = await s.request(bob, **wanted)
        s.drive(bob, request.session)
        payer = Stranger(s, alice, request)
        sent = await payer.original()
        await payer.post(sent)
        await s.until(bob, "ProposalPosted", request.session)
        outputs = [TxOut(AMOUNT, payer.script), TxOut(500_000 - AMOUNT - 5_000, await change_script(alice))]
        bumped = await payer.spend([txin.outpoint for txin in sent.tx.inputs], outputs)
        assert (await s.world.chain.broadcast(bumped.raw)).verdict == "accepted"
        await s.until(bob, "Seen", request.session, what="bumped", txid=bumped.txid)
        await s.bury()
        his = await s.closed(bob, request.session)
        assert (his.facts["outcome"], his.facts["txid"]) == ("PaidOtherwise", bumped.txid)
        assert (his.facts["amount_received"], his.facts["channels"]) == (AMOUNT, [])
        assert await bob.wallet.balance() == 200_000 + AMOUNT
        await s.all_free(bob)


@pytest.mark.parametrize("channels", [False, True])
async def test_a_payer_who_takes_his_coins_back_ends_both_sides_without_a_loss(channels: bool) -> None:
    async with stage() as s:
        bob, alice = await s.bob(lightning=channels), await s.alice()
        wanted = {"channels": [s.order(s.world.peers(1)[0])]} if channels else {}
        request = await s.request(bob, **wanted)
        payment = await s.propose(bob, alice, request)
        await alice.driver.command(payment.session, Reclaim(await change_script(alice), FeeRate.from_sat_per_vb(10)))
        s.drive(alice, payment.session)
        reclaim = await s.until(alice, "ReclaimBroadcasting", payment.session)
        await s.until(bob, "Seen", request.session, what="conflict", txid=reclaim.facts["txid"])
        await s.bury()
        his, hers = await s.closed(bob, request.session), await s.closed(alice, payment.session)
        assert (his.facts["outcome"], hers.facts["outcome"]) == ("Conflicted", "Cancelled")
        assert his.facts["amount_received"] == 0
        assert await bob.wallet.balance() == 200_000
        assert await alice.wallet.balance() == 500_000 - s.fee(reclaim.facts["txid"])
        await s.all_free(bob, alice)


async def test_a_payment_after_the_end_is_told_for_thirty_days() -> None:
    async with stage(long_poll=0.1) as s:
        bob = await s.bob()
        request = await s.request(bob)
        s.drive(bob, request.session, stay=True)
        s.past(request)
        await s.closed(bob, request.session)
        script = (await s.event(bob, request.session, ev.ReceiverCreated)).script
        outpoint = await s.world.chain.fund(script, 4_321)
        late = await s.until(bob, "LatePayment", request.session)
        assert (late.facts["txid"], late.facts["amount"]) == (outpoint.txid, 4_321)
        bob.funded[outpoint] = 4_321
        s.world.clock.skip(31 * DAY)
        state = await s.tasks[(bob.name, request.session)]
        assert state.closed is not None
        assert state.closed.outcome == "Expired"


# ---------------------------------------------------------------- refused


async def test_less_than_asked_is_refused_and_never_broadcast_by_us() -> None:
    async with stage() as s:
        bob, alice = await s.bob(), await s.alice()
        request = await s.request(bob)
        s.drive(bob, request.session)
        payer = Stranger(s, alice, request)
        await payer.post(await payer.original(AMOUNT - 1))
        his = await s.closed(bob, request.session)
        assert his.facts["outcome"] == "Refused"
        assert b"original-psbt-rejected" in await payer.reply()
        assert not s.in_mempool()


async def test_more_than_asked_is_accepted() -> None:
    async with stage() as s:
        bob, alice = await s.bob(), await s.alice()
        request = await s.request(bob)
        s.drive(bob, request.session)
        payer = Stranger(s, alice, request)
        sent = await payer.original(AMOUNT + 1_000)
        await payer.post(sent)
        tx = await payer.sign(sent, await payer.reply())
        await s.until(bob, "Seen", request.session, what="payjoin", txid=tx.txid)
        await s.bury()
        his = await s.closed(bob, request.session)
        assert his.facts["outcome"] == "Paid"
        assert his.facts["amount_received"] > AMOUNT


async def test_a_request_for_any_amount_takes_what_comes() -> None:
    async with stage() as s:
        bob, alice = await s.bob(), await s.alice()
        request = await s.request(bob, None)
        assert isinstance(await refused(s.pay(alice, request)), WrongUsage)
        his, hers, _ = await s.payjoin(bob, alice, request, amount=123_456)
        assert (his.facts["outcome"], hers.facts["amount_received"]) == ("Paid", 123_456)


async def test_another_amount_than_the_uri_asks_is_refused_before_anything_is_signed() -> None:
    async with stage() as s:
        bob, alice = await s.bob(), await s.alice()
        request = await s.request(bob)
        assert isinstance(await refused(s.pay(alice, request, amount=AMOUNT + 1)), WrongUsage)
        assert not await alice.store.rows()
        await s.all_free(alice)


async def test_seen_and_owned_inputs_are_refused_with_the_same_words() -> None:
    async with stage() as s:
        bob, alice = await s.bob(), await s.alice()
        first, second, third = [await s.request(bob) for _ in range(3)]
        for request in (first, second, third):
            s.drive(bob, request.session)
        one, two = Stranger(s, alice, first), Stranger(s, alice, second)
        await one.post(await one.original())
        await s.until(bob, "ProposalPosted", first.session)
        sent = await two.original()
        assert [txin.outpoint for txin in sent.tx.inputs] == list(alice.funded)
        await two.post(sent)
        seen = await two.reply()
        # A prober who somehow brings a valid signature of bob's own wallet learns no more than that.
        bob.funded[await s.world.chain.fund((await bob.wallet.new_address()).script, 300_000)] = 300_000
        prober = Stranger(s, bob, third)
        own = await prober.original()
        await prober.post(own)
        owned = await prober.reply()
        assert seen == owned
        assert (await s.closed(bob, second.session)).facts["outcome"] == "Refused"
        assert (await s.closed(bob, third.session)).facts["outcome"] == "Refused"
        s.past(first, 601)
        await s.until(bob, "Seen", first.session, what="original")
        await s.bury()
        assert (await s.closed(bob, first.session)).facts["outcome"] == "PaidByFallback"


async def test_an_original_that_is_already_in_the_mempool_is_under_way() -> None:
    async with stage() as s:
        bob, alice = await s.bob(), await s.alice()
        request = await s.request(bob)
        payer = Stranger(s, alice, request)
        sent = await payer.original()
        await payer.post(sent)
        await s.world.chain.broadcast(sent.tx.raw)
        s.drive(bob, request.session)
        await s.until(bob, "ProposingStopped", request.session, why="spend_seen")
        await s.bury()
        assert (await s.closed(bob, request.session)).facts["outcome"] == "PaidByFallback"
        await s.all_free(bob)


# ---------------------------------------------------------------- blocks that go away


async def test_a_reorganisation_below_six_blocks_undoes_nothing_but_news() -> None:
    async with stage() as s:
        bob, alice = await s.bob(lightning=True), await s.alice()
        request = await s.request(bob, channels=[s.order(s.world.peers(1)[0])])
        payment = await s.begin(bob, alice, request)
        seen = await s.both_seen(bob, request, alice, payment)
        await s.bury(5)
        height = s.world.chain.height - 4
        await s.until(bob, "Seen", request.session, what="payjoin", height=height)
        await s.until(alice, "Seen", payment.session, what="payjoin", height=height)
        await s.world.chain.reorg(5)
        assert seen.facts["txid"] in s.in_mempool()
        await s.until(bob, "Seen", request.session, count=2, what="payjoin", height=None)
        assert not bob.diary.of("Closed")
        assert len(await bob.store.coins_in_use()) == 1
        await s.bury()
        his = await s.closed(bob, request.session)
        assert (his.facts["outcome"], len(his.facts["channels"])) == ("Paid", 1)
        assert (await s.closed(alice, payment.session)).facts["outcome"] == "Paid"


async def test_a_reorganisation_that_puts_a_conflict_in_its_place_ends_conflicted() -> None:
    async with stage() as s:
        bob, alice = await s.bob(lightning=True), await s.alice()
        request = await s.request(bob, channels=[s.order(s.world.peers(1)[0])])
        payment = await s.begin(bob, alice, request)
        seen = await s.both_seen(bob, request, alice, payment)
        inputs = list(alice.funded)
        [value] = alice.funded.values()
        conflict = await spend(alice, inputs, [TxOut(value - 3_000, await change_script(alice))])
        await s.bury(3)
        height = s.world.chain.height - 2
        await s.until(bob, "Seen", request.session, what="payjoin", height=height)
        await s.world.chain.reorg(3, include=[conflict.raw], drop=[seen.facts["txid"]])
        await s.until(bob, "Unseen", request.session, what="payjoin")
        await s.until(bob, "Seen", request.session, what="conflict")
        await s.bury()
        his, hers = await s.closed(bob, request.session), await s.closed(alice, payment.session)
        assert (his.facts["outcome"], hers.facts["outcome"]) == ("Conflicted", "Conflicted")
        await s.all_free(bob, alice)


# ---------------------------------------------------------------- other programs


async def test_a_bip78_payer_is_answered_while_he_waits_at_the_directory() -> None:
    async with stage() as s:
        bob, alice = await s.bob(lightning=True), await s.alice()
        request = await s.request(bob, channels=[s.order(s.world.peers(1)[0])])
        s.drive(bob, request.session)
        await s.world.directory.until_waiting()
        payer = Stranger(s, alice, request)
        sent = await payer.original(substitution=False)
        answer = await payer.post_v1(sent)
        assert answer.status_code == 200
        tx = await payer.sign(sent, answer.content)
        assert {txin.outpoint for txin in tx.inputs} == {*alice.funded, *bob.funded}
        assert any(out.script == payer.script and out.value >= AMOUNT for out in tx.outputs)
        methods = [r.inner_method for r in s.world.directory.log if r.mailbox == payer.endpoint.short_id]
        assert "PUT" in methods
        await s.until(bob, "Seen", request.session, what="payjoin")
        await s.bury()
        his = await s.closed(bob, request.session)
        assert (his.facts["outcome"], his.facts["channels"]) == ("Paid", [])
        assert "ChannelsIntended" not in s.told(bob, request.session)


async def test_a_bip78_payer_who_left_too_early_is_paid_for_by_his_original() -> None:
    async with stage(long_poll=0.2) as s:
        bob, alice = await s.bob(), await s.alice()
        request = await s.request(bob, policy=ASK)
        s.drive(bob, request.session)
        await s.world.directory.until_waiting()
        payer = Stranger(s, alice, request)
        assert (await payer.post_v1(await payer.original(substitution=False))).status_code == 503
        await s.until(bob, "OriginalAccepted", request.session)
        await bob.driver.command(request.session, Approve())
        await s.until(bob, "NotNow", request.session, what="PostReply")
        await bob.driver.command(request.session, BroadcastNow())
        await s.until(bob, "Seen", request.session, what="original")
        await s.bury()
        assert (await s.closed(bob, request.session)).facts["outcome"] == "PaidByFallback"
        await s.all_free(bob)


async def test_junk_in_the_mailbox_ends_the_polling_and_not_the_watching() -> None:
    async with stage() as s:
        bob, alice = await s.bob(), await s.alice()
        request = await s.request(bob)
        s.drive(bob, request.session)
        vandal = Stranger(s, alice, request)
        assert await vandal.put(s.world.entropy.token(7_168)) == 200
        await s.until(bob, "MailboxSpoiled", request.session)
        polls = len([r for r in s.world.directory.log if r.mailbox == vandal.endpoint.short_id])
        script = (await s.event(bob, request.session, ev.ReceiverCreated)).script
        bob.funded[await s.world.chain.fund(script, AMOUNT)] = AMOUNT
        await s.bury()
        assert (await s.closed(bob, request.session)).facts["outcome"] == "PaidOtherwise"
        assert len([r for r in s.world.directory.log if r.mailbox == vandal.endpoint.short_id]) == polls


async def test_a_reply_that_is_junk_makes_the_payer_send_his_original() -> None:
    async with stage() as s:
        bob, alice = await s.bob(), await s.alice()
        request = await s.request(bob)
        payment = await s.pay(alice, request)
        created = await s.event(alice, payment.session, ev.SenderCreated)
        vandal = Stranger(s, alice, request)
        vandal.endpoint = replace(vandal.endpoint, short_id=_reply_box(created))
        assert await vandal.put(s.world.entropy.token(7_168)) == 200
        s.drive(alice, payment.session)
        await s.until(alice, "ProposalRefused", payment.session)
        s.drive(bob, request.session)
        await s.until(alice, "Seen", payment.session, what="original")
        await s.bury()
        assert (await s.closed(alice, payment.session)).facts["outcome"] == "PaidByFallback"
        assert (await s.closed(bob, request.session)).facts["outcome"] == "PaidByFallback"
        # The audit counts contents per mailbox; this one was given a second one by the vandal.
        s.world.directory._mailboxes.posted.pop(vandal.endpoint.short_id)


def _reply_box(created: ev.SenderCreated) -> str:
    from pjv2.wire.secp import SecretKey

    return short_id(SecretKey(created.reply_key).public)
