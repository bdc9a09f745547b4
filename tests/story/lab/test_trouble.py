"""When the world misbehaves on the lab: services away, keys rotated, wallets locked, fees that rise, proposals that get stuck."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from pjv2 import start
from pjv2.psbt.plan import ChannelOrder
from pjv2.psbt.verify import SentOriginal
from pjv2.session import events as ev
from pjv2.session.events import Policy
from pjv2.session.monitor import STUCK
from pjv2.session.needs import BroadcastNow
from pjv2.units import FeeRate
from tests.story.lab.kit import AMOUNT, DAY, PLAIN, SENT, WITH_CHANNELS, Story, Stranger, stage


def fast(rate: float) -> FeeRate:
    return FeeRate.from_sat_per_vb(rate)


# ---------------------------------------------------------------- services


async def test_the_proposal_leaves_through_another_relay_than_the_poll_that_brought_the_original() -> None:
    async with stage() as s:
        bob, alice = await s.bob(), await s.alice()
        for _ in range(2):
            bob.funded.update(dict.fromkeys(await bob.fund(210_000), 210_000))
            alice.funded.update(dict.fromkeys(await alice.fund(400_000), 400_000))
            request = await s.request(bob)
            await s.payjoin(bob, alice, request)
            received = await s.event(bob, request.session, ev.OriginalReceived)
            posted = await s.event(bob, request.session, ev.ProposalPosted)
            assert {received.relay, posted.relay} == {relay.url for relay in s.world.relays}
            hosts = [relay.host for relay in s.world.relays]
            if len(set(hosts)) == len(hosts):  # where the system tells loopback addresses apart
                reply = (await bob.driver.load(request.session)).reply_mailbox.short_id  # type: ignore[union-attr]
                [at] = [r.peer for r in s.world.directory.log if r.mailbox == reply and r.inner_method == "POST"]
                [via] = [relay for relay in s.world.relays if relay.host == at]
                assert via.url == posted.relay
                assert any(record.client == bob.address for record in via.log)


async def test_with_one_relay_down_everything_goes_through_the_other() -> None:
    async with stage() as s:
        bob, alice = await s.bob(), await s.alice()
        request = await s.request(bob)
        down, up = s.world.relays
        down.offline = True
        before = len(down.log)
        his, hers, _ = await s.payjoin(bob, alice, request)
        assert (his.facts["outcome"], hers.facts["outcome"]) == ("Paid", "Paid")
        assert len(down.log) == before
        assert (await s.event(bob, request.session, ev.ProposalPosted)).relay == up.url


async def test_while_the_directory_is_down_everybody_waits_and_then_goes_on() -> None:
    async with stage() as s:
        bob, alice = await s.bob(), await s.alice()
        request = await s.request(bob)
        payment = await s.pay(alice, request)
        s.world.directory.offline = True
        s.drive(bob, request.session)
        s.drive(alice, payment.session)
        await s.until(bob, "NotNow", request.session, what="Poll", tries=2)
        await s.until(alice, "NotNow", payment.session, what="PostOriginal", tries=2)
        s.world.directory.offline = False
        s.world.clock.skip(120)
        await s.both_seen(bob, request, alice, payment)
        await s.bury()
        await s.closed(bob, request.session)
        await s.closed(alice, payment.session)
        assert s.told(bob, request.session) == PLAIN
        assert s.told(alice, payment.session) == SENT


async def test_a_directory_that_dies_after_the_proposal_costs_nothing_but_the_payjoin() -> None:
    async with stage() as s:
        bob, alice = await s.bob(), await s.alice()
        request = await s.request(bob)
        payment = await s.propose(bob, alice, request)
        s.world.directory.offline = True
        s.drive(alice, payment.session)
        await s.until(alice, "NotNow", payment.session, what="Poll")
        s.past(request, 601)
        await s.until(bob, "Seen", request.session, what="original")
        await s.bury()
        await s.both_ended("PaidByFallback", bob, request, alice, payment)
        await s.all_free(bob, alice)


async def test_a_rotated_key_ends_the_exchange_and_the_original_pays() -> None:
    async with stage() as s:
        bob, alice = await s.bob(), await s.alice()
        request = await s.request(bob)
        payment = await s.propose(bob, alice, request)
        s.world.directory.rotate_keys()
        s.drive(alice, payment.session)
        await s.until(alice, "KeyRotated", payment.session)
        s.past(request, 601)
        await s.until(alice, "Seen", payment.session, what="original")
        await s.until(bob, "Seen", request.session, what="original")
        await s.bury()
        await s.both_ended("PaidByFallback", bob, request, alice, payment)
        # New requests carry the new key.
        bob.funded.update(dict.fromkeys(await bob.fund(210_000), 210_000))
        again = await s.request(bob)
        his, _, _ = await s.payjoin(bob, alice, again)
        assert his.facts["outcome"] == "Paid"


async def test_while_the_chain_source_is_away_nothing_is_decided_and_nothing_lost() -> None:
    async with stage() as s:
        bob, alice = await s.bob(lightning=True), await s.alice()
        request = await s.request(bob, channels=[s.order(s.world.peers(1)[0])])
        payment = await s.pay(alice, request)
        s.drive(alice, payment.session)
        await s.until(alice, "OriginalPosted", payment.session)
        s.drive(bob, request.session)
        await s.until(bob, "OriginalReceived", request.session)
        s.world.chain.offline = True
        await s.until(bob, "NotNow", request.session)
        await s.until(alice, "NotNow", payment.session)
        s.world.chain.offline = False
        await s.both_seen(bob, request, alice, payment)
        s.world.chain.offline = True
        await s.bury()
        s.world.clock.skip(3_600)
        await s.until(bob, "NotNow", request.session, what="Watch")
        assert not bob.diary.of("Closed")
        s.world.chain.offline = False
        his, hers = await s.closed(bob, request.session), await s.closed(alice, payment.session)
        assert (his.facts["outcome"], hers.facts["outcome"]) == ("Paid", "Paid")
        assert set(s.told(bob, request.session)) <= {*WITH_CHANNELS}


@pytest.mark.parametrize("channels", [False, True])
async def test_a_locked_wallet_delays_a_proposal_and_forbids_channels(channels: bool) -> None:
    async with stage() as s:
        bob, alice = await s.bob(lightning=channels), await s.alice()
        wanted = {"channels": [s.order(s.world.peers(1)[0])]} if channels else {}
        request = await s.request(bob, **wanted)
        bob.wallet.locked_for_signing = True
        payment = await s.begin(bob, alice, request)
        await s.until(bob, "NotNow", request.session, what="Sign", tries=2)
        assert s.told(bob, request.session) == PLAIN[:5]
        bob.wallet.locked_for_signing = False
        await s.both_seen(bob, request, alice, payment)
        await s.bury()
        await s.both_ended("Paid", bob, request, alice, payment)
        assert s.told(bob, request.session) == PLAIN


async def test_a_wallet_that_stays_locked_leaves_the_payment_to_the_original() -> None:
    async with stage(long_poll=0.2) as s:
        bob, alice = await s.bob(), await s.alice()
        request = await s.request(bob)
        bob.wallet.locked_for_signing = True
        payment = await s.begin(bob, alice, request)
        await s.until(bob, "NotNow", request.session, what="Sign")
        s.past(request, 601)
        await s.until(bob, "Seen", request.session, what="original")
        await s.bury()
        await s.both_ended("PaidByFallback", bob, request, alice, payment)
        await s.all_free(bob, alice)


async def test_a_node_that_is_down_for_a_while_delays_the_channels_and_does_not_cost_them() -> None:
    async with stage() as s:
        bob, alice = await s.bob(lightning=True), await s.alice()
        assert bob.node is not None
        request = await s.request(bob, channels=[s.order(s.world.peers(1)[0])])
        s.drive(bob, request.session)
        await s.world.directory.until_waiting()
        bob.node.stop()
        payment = await s.pay(alice, request)
        s.drive(alice, payment.session)
        await s.until(bob, "NotNow", request.session, what="FindCoins")
        bob.node.start()
        await s.both_seen(bob, request, alice, payment)
        await s.bury()
        assert len((await s.closed(bob, request.session)).facts["channels"]) == 1
        assert (await s.closed(alice, payment.session)).facts["outcome"] == "Paid"


async def test_two_payments_at_once_share_no_coin() -> None:
    async with stage() as s:
        bob, alice = await s.bob(), await s.alice()
        carol = await s.world.party("carol", coins=[600_000])
        one, two = await s.request(bob), await s.request(bob)
        s.drive(bob, one.session)
        s.drive(bob, two.session)
        first, second = await s.pay(alice, one), await s.pay(carol, two)
        s.drive(alice, first.session)
        s.drive(carol, second.session)
        ends = []
        for request, payer, payment in ((one, alice, first), (two, carol, second)):
            await s.until(bob, "Seen", request.session)
            await s.until(payer, "Seen", payment.session)
        await s.bury()
        for request, payer, payment in ((one, alice, first), (two, carol, second)):
            ends.append((await s.closed(bob, request.session)).facts["outcome"])
            assert (await s.closed(payer, payment.session)).facts["outcome"] == ends[-1]
        assert sorted(ends) == ["Paid", "PaidByFallback"]
        spenders = [s.world.chain.spender(outpoint) for outpoint in bob.funded]
        assert len(spenders) == 1
        await s.all_free(bob, alice, carol)


# ---------------------------------------------------------------- fees


async def test_a_stuck_payjoin_is_pulled_by_a_child_of_our_change() -> None:
    async with stage() as s:
        bob, alice = await s.bob(lightning=True), await s.alice()
        request = await s.request(bob, channels=[s.order(s.world.peers(1)[0])])
        payment = await s.begin(bob, alice, request)
        seen = await s.both_seen(bob, request, alice, payment)
        await s.leave(alice, payment.session)
        s.world.chain.estimates[6] = fast(20)
        s.world.clock.skip(STUCK - 60)
        await s.until(bob, "Seen", request.session, what="payjoin")
        assert not bob.diary.of("ChildBroadcasting")
        s.world.clock.skip(120)
        child = await s.until(bob, "ChildBroadcasting", request.session)
        assert child.facts["parent"] == seen.facts["txid"]
        pool = {entry.txid: entry for entry in s.world.chain.mempool()}
        while child.facts["txid"] not in pool:
            await s.until(bob, "Seen", request.session)
            await s.world.clock.sleep(0.01)
            pool = {entry.txid: entry for entry in s.world.chain.mempool()}
        family = [pool[child.facts["txid"]], pool[child.facts["parent"]]]
        package = FeeRate.of(sum(e.fee for e in family), sum(e.tx.weight for e in family))
        assert fast(19.5) <= package <= fast(21)
        assert {txin.outpoint.txid for txin in family[0].tx.inputs} == {seen.facts["txid"]}
        await s.bury()
        assert len((await s.closed(bob, request.session)).facts["channels"]) == 1
        s.drive(alice, payment.session)
        assert (await s.closed(alice, payment.session)).facts["outcome"] == "Paid"


async def test_an_original_that_is_too_slow_is_pulled_by_a_child_of_the_payment() -> None:
    async with stage() as s:
        bob, alice = await s.bob(), await s.alice()
        request = await s.request(bob)
        s.drive(bob, request.session)
        payer = Stranger(s, alice, request)
        sent = await payer.original()
        await payer.post(sent)
        await s.until(bob, "ProposalPosted", request.session)
        await bob.driver.command(request.session, BroadcastNow())
        await s.until(bob, "Seen", request.session, what="original")
        s.world.chain.estimates[6] = fast(15)
        s.world.clock.skip(STUCK + 60)
        child = await s.until(bob, "ChildBroadcasting", request.session)
        assert child.facts["parent"] == sent.tx.txid
        while child.facts["txid"] not in s.in_mempool():
            await s.world.clock.sleep(0.01)
        await s.bury()
        his = await s.closed(bob, request.session)
        assert (his.facts["outcome"], his.facts["amount_received"]) == ("PaidByFallback", AMOUNT)
        assert await bob.wallet.balance() == 200_000 + AMOUNT - child.facts["fee"]
        await s.all_free(bob)


async def test_a_payjoin_that_fell_out_of_the_mempool_comes_back_when_fees_fall() -> None:
    async with stage() as s:
        bob, alice = await s.bob(), await s.alice()
        request = await s.request(bob)
        payment = await s.begin(bob, alice, request)
        await s.both_seen(bob, request, alice, payment)
        await s.world.chain.spike(fast(10))
        assert not s.in_mempool()
        await s.until(bob, "Unseen", request.session, what="payjoin")
        await s.until(alice, "FallbackRejected", payment.session)
        await s.bury()
        assert not bob.diary.of("Closed")
        await s.world.chain.spike(FeeRate(0))
        await s.until(alice, "Seen", payment.session, what="original")
        await s.until(bob, "Seen", request.session, what="original")
        await s.bury()
        await s.both_ended("PaidByFallback", bob, request, alice, payment)
        await s.all_free(bob, alice)


async def test_one_stuck_proposal_is_evicted_and_sent_again_by_the_payer() -> None:
    async with stage() as s:
        bob, alice = await s.bob(), await s.alice()
        request = await s.request(bob)
        payment = await s.begin(bob, alice, request)
        seen = await s.both_seen(bob, request, alice, payment)
        await s.world.chain.evict(seen.facts["txid"])
        await s.until(alice, "Seen", payment.session, what="payjoin", count=2)
        await s.bury()
        await s.both_ended("Paid", bob, request, alice, payment)


# ---------------------------------------------------------------- the way out


async def silent(
    s: Story, orders: list[ChannelOrder], **policy: object
) -> tuple[Any, start.Request, Stranger, SentOriginal]:
    """A proposal is posted, its payer never answers, and the network takes nothing that pays what the Original pays."""
    bob = await s.bob(lightning=bool(orders))
    alice = await s.alice()
    request = await s.request(bob, channels=orders, policy=replace(Policy(), **policy))  # type: ignore[arg-type]
    s.drive(bob, request.session)
    payer = Stranger(s, alice, request)
    sent = await payer.original()
    await payer.post(sent)
    await s.until(bob, "ProposalPosted", request.session)
    await s.world.chain.spike(fast(10))
    s.past(request, 601)
    await s.until(bob, "FallbackRejected", request.session)
    return bob, request, payer, sent


async def test_a_silent_payer_and_a_refused_original_end_by_the_way_out_and_the_original_still_pays_later() -> None:
    async with stage() as s:
        [peer] = s.world.peers(1)
        bob, request, _, _ = await silent(s, [s.order(peer)], give_up_blocks=3)
        assert len(bob.node.pending()) == 1
        await s.bury(3)
        way_out = await s.until(bob, "WayOutBroadcasting", request.session)
        await s.until(bob, "Seen", request.session, what="way_out", txid=way_out.facts["txid"])
        assert s.fee(way_out.facts["txid"]) >= fast(10).fee(s.tx(way_out.facts["txid"]).weight)
        await s.bury(5)
        assert len(bob.node.pending()) == 1
        assert await bob.store.coins_in_use()
        await s.bury(1)
        await s.until(bob, "ChannelsReleased", request.session)
        await s.until(bob, "CoinsReleased", request.session)
        await s.all_free(bob)
        assert not bob.diary.of("Closed")
        await s.world.chain.spike(FeeRate(0))
        await s.until(bob, "Seen", request.session, what="original")
        await s.bury()
        his = await s.closed(bob, request.session)
        assert (his.facts["outcome"], his.facts["amount_received"]) == ("PaidByFallback", AMOUNT)
        assert await bob.wallet.balance() == 200_000 + AMOUNT - s.fee(way_out.facts["txid"])


async def test_after_the_way_out_a_payment_that_never_comes_is_expired_when_the_watch_is_over() -> None:
    async with stage(long_poll=0.2) as s:
        bob, request, _, _ = await silent(s, [], give_up_blocks=3)
        await s.bury(3)
        await s.until(bob, "Seen", request.session, what="way_out")
        await s.bury(6)
        await s.until(bob, "CoinsReleased", request.session)
        s.world.clock.skip(31 * DAY)
        his = await s.closed(bob, request.session)
        assert (his.facts["outcome"], his.facts["amount_received"]) == ("Expired", 0)
        await s.all_free(bob)


async def test_a_payer_who_signs_after_the_way_out_went_out_cannot_replace_it_and_pays_with_his_original() -> None:
    async with stage() as s:
        bob, request, payer, sent = await silent(s, [], give_up_blocks=3)
        await s.bury(3)
        await s.until(bob, "Seen", request.session, what="way_out")
        await s.world.chain.spike(FeeRate(0))
        tx = await payer.sign(sent, await payer.reply(), taken=False)
        assert tx.txid not in s.in_mempool()
        await s.until(bob, "Seen", request.session, what="original", txid=sent.tx.txid)
        await s.bury()
        assert (await s.closed(bob, request.session)).facts["outcome"] == "PaidByFallback"
        await s.all_free(bob)


async def test_a_channel_that_the_node_lost_makes_the_way_out_at_once() -> None:
    async with stage() as s:
        bob, alice = await s.bob(lightning=True), await s.alice()
        assert bob.node is not None
        request = await s.request(bob, channels=[s.order(s.world.peers(1)[0])])
        s.drive(bob, request.session)
        payer = Stranger(s, alice, request)
        await payer.post(await payer.original())
        await s.until(bob, "ProposalPosted", request.session)
        [lost] = bob.node.pending()
        await bob.node.abandon(lost)
        await s.until(bob, "WayOutBroadcasting", request.session)
        await s.until(bob, "Seen", request.session, what="way_out")
        await s.bury()
        await s.until(bob, "CoinsReleased", request.session)
        s.past(request, 601)
        await s.until(bob, "Seen", request.session, what="original")
        await s.bury()
        assert (await s.closed(bob, request.session)).facts["outcome"] == "PaidByFallback"
        await s.all_free(bob)


# ---------------------------------------------------------------- programs that end and start again


async def test_a_receiver_that_dies_after_every_single_event_ends_the_same() -> None:
    async with stage() as s:
        bob, alice = await s.bob(lightning=True), await s.alice()
        request = await s.request(bob, channels=[s.order(s.world.peers(1)[0])])
        payment = await s.pay(alice, request)
        s.drive(alice, payment.session)
        await s.until(alice, "OriginalPosted", payment.session)
        deaths = 0
        while not bob.diary.of("Closed", request.session):
            known = (await bob.driver.load(request.session)).seq
            state = await bob.driver.drive(request.session, lambda state, known=known: state.seq > known)  # type: ignore[misc]
            assert state.seq > known
            deaths += 1
            await bob.restart()
            if bob.diary.of("Seen", request.session) and s.in_mempool():
                await s.bury()
        assert deaths >= 10
        his = await s.closed(bob, request.session)
        assert his.facts["outcome"] == "Paid"
        assert (await s.closed(alice, payment.session)).facts["outcome"] == "Paid"
        await s.all_free(bob, alice)


async def test_a_payer_that_dies_after_every_single_event_pays_once() -> None:
    async with stage() as s:
        bob, alice = await s.bob(), await s.alice()
        request = await s.request(bob)
        s.drive(bob, request.session)
        payment = await s.pay(alice, request)
        while not alice.diary.of("Closed", payment.session):
            known = (await alice.driver.load(payment.session)).seq
            await alice.driver.drive(payment.session, lambda state, known=known: state.seq > known)  # type: ignore[misc]
            await alice.restart()
            if alice.diary.of("Seen", payment.session) and s.in_mempool():
                await s.bury()
        assert (await s.closed(bob, request.session)).facts["outcome"] == "Paid"
        await s.all_free(bob, alice)
