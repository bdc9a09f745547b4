"""Payments that become channels on the lab: who gets which satoshi, and what makes a payjoin do without channels."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from pjv2.backends.channel.rehearsal import ANCHOR_RESERVE
from pjv2.errors import NotNow, WrongUsage
from pjv2.lab.world import Party
from pjv2.psbt.tx import Tx
from pjv2.session.events import Policy
from pjv2.session.needs import BroadcastNow
from pjv2.units import FeeRate, Outpoint, Sats
from tests.story.lab.kit import AMOUNT, PLAIN, SENT, WITH_CHANNELS, Story, Stranger, refused, stage


async def opened(bob: Party, points: list[str]) -> dict[str, Sats]:
    """The channels that bob's node lists as open, by outpoint."""
    assert bob.node is not None
    await bob.node.sync()
    listed = {str(channel.outpoint): channel for channel in await bob.node.channels()}
    assert all(listed[point].state == "open" for point in points)
    return {point: listed[point].capacity for point in points}


@pytest.mark.parametrize(
    ("capacities", "plan", "becomes", "deposited", "kept"),
    [
        ([None], {}, [150_000], 0, 0),
        ([60_000, None], {}, [60_000, 90_000], 0, 0),
        ([30_000, 40_000, None], {}, [30_000, 40_000, 80_000], 0, 0),
        ([60_000], {"deposit": True}, [60_000], 90_000, 0),
        ([60_000], {}, [60_000], 0, 90_000),
        ([160_000], {"top_up": True}, [160_000], 0, -10_000),
    ],
    ids=["rest", "two", "three", "deposit", "change", "top-up"],
)
async def test_a_payment_becomes_channels_and_every_satoshi_has_its_place(
    capacities: list[Sats | None], plan: dict[str, Any], becomes: list[Sats], deposited: Sats, kept: Sats
) -> None:
    async with stage() as s:
        bob, alice = await s.bob(lightning=True), await s.alice()
        peers = s.world.peers(len(capacities))
        orders = [s.order(peer, capacity) for peer, capacity in zip(peers, capacities, strict=True)]
        request = await s.request(bob, channels=orders, **plan)
        his, hers, payment = await s.payjoin(bob, alice, request)
        assert (his.facts["outcome"], hers.facts["outcome"]) == ("Paid", "Paid")
        assert s.told(bob, request.session) == WITH_CHANNELS
        assert s.told(alice, payment.session) == SENT
        channels = await opened(bob, his.facts["channels"])
        assert list(channels.values()) == becomes
        tx = s.tx(his.facts["txid"])
        assert [tx.outputs[Outpoint.parse(point).vout].value for point in channels] == becomes
        our_fee = AMOUNT - his.facts["amount_received"]
        assert 0 < our_fee <= AMOUNT // 20
        coins = await bob.wallet.coins()
        assert sum(coin.txout.value for coin in coins) == 200_000 + deposited + kept - our_fee
        assert len(coins) == (2 if deposited else 1)
        assert 500_000 - await alice.wallet.balance() + our_fee == AMOUNT + s.fee(his.facts["txid"])
        await s.all_free(bob, alice)


async def test_a_public_channel_takes_an_anchor_reserve_for_the_node_out_of_the_payment() -> None:
    async with stage() as s:
        bob, alice = await s.bob(lightning=True), await s.alice()
        [peer] = s.world.peers(1)
        request = await s.request(bob, channels=[s.order(peer, private=False)])
        his, _, _ = await s.payjoin(bob, alice, request)
        assert list((await opened(bob, his.facts["channels"])).values()) == [AMOUNT - ANCHOR_RESERVE]
        assert bob.node is not None
        home = [out.value for out in s.tx(his.facts["txid"]).outputs if out.script == bob.node.home_script]
        assert home == [ANCHOR_RESERVE]


async def test_pushed_satoshis_belong_to_the_peer_and_the_rest_comes_back_by_the_stored_commitment() -> None:
    async with stage() as s:
        bob, alice = await s.bob(lightning=True), await s.alice()
        [peer] = s.world.peers(1)
        request = await s.request(bob, channels=[s.order(peer, push=30_000, min_capacity=100_000)])
        his, _, _ = await s.payjoin(bob, alice, request)
        [point] = his.facts["channels"]
        await opened(bob, [point])
        assert bob.node is not None
        commitment = Tx.parse(bob.node.commitment(Outpoint.parse(point)))
        assert (await s.world.chain.broadcast(commitment.raw)).verdict == "accepted"
        await s.bury(1)
        fee = s.fee(commitment.txid)
        ours = sum(out.value for out in commitment.outputs if out.script == bob.node.home_script)
        theirs = sum(out.value for out in commitment.outputs if out.script != bob.node.home_script)
        assert (ours, theirs) == (AMOUNT - 30_000 - fee, 30_000)


async def test_what_is_paid_beyond_the_request_goes_to_the_rest() -> None:
    async with stage() as s:
        bob, alice = await s.bob(lightning=True), await s.alice()
        [peer] = s.world.peers(1)
        request = await s.request(bob, channels=[s.order(peer)])
        s.drive(bob, request.session)
        payer = Stranger(s, alice, request)
        sent = await payer.original(AMOUNT + 7_777)
        await payer.post(sent)
        await payer.sign(sent, await payer.reply())
        await s.until(bob, "Seen", request.session, what="payjoin")
        await s.bury()
        his = await s.closed(bob, request.session)
        assert list((await opened(bob, his.facts["channels"])).values()) == [AMOUNT + 7_777]


# ---------------------------------------------------------------- the payer does something else


async def fallen_back(s: Story, bob: Party, request: Any, peers: Any, txid: str) -> None:
    """The Original is out: a young conflict frees nothing, a buried one everything, and the peers are remembered."""
    assert bob.node is not None
    await s.until(bob, "Seen", request.session, what="original")
    await s.bury(5)
    await s.until(bob, "Seen", request.session, what="original", height=s.world.chain.height - 4)
    assert len(bob.node.pending()) == len(peers)
    assert len(await bob.store.coins_in_use()) == 1
    await s.bury(1)
    his = await s.closed(bob, request.session)
    assert (his.facts["outcome"], his.facts["txid"]) == ("PaidByFallback", txid)
    assert (his.facts["amount_received"], his.facts["channels"]) == (AMOUNT, [])
    assert s.told(bob, request.session)[-4:] == ["ChannelsReleasing", "ChannelsReleased", "CoinsReleased", "Closed"]
    await s.all_free(bob)
    blocked = await bob.store.blocked_peers()
    assert set(blocked) == {peer.pubkey for peer in peers}
    assert min(blocked.values()) >= s.world.chain.height + 2_000
    assert [len(peer.pending()) for peer in peers] == [1] * len(peers), "they hold on to a dead channel"
    error = await refused(s.request(bob, channels=[s.order(peers[0])]))
    assert isinstance(error, NotNow)
    assert "abandoned channel" in str(error)


async def test_when_the_payer_never_signs_his_original_pays_and_everything_is_given_back() -> None:
    async with stage() as s:
        bob, alice = await s.bob(lightning=True), await s.alice()
        peers = s.world.peers(2)
        request = await s.request(bob, channels=[s.order(peers[0], 60_000), s.order(peers[1])])
        payment = await s.propose(bob, alice, request)
        assert not s.in_mempool()
        s.past(request, 601)
        told = await s.until(bob, "FallbackBroadcasted", request.session)
        await fallen_back(s, bob, request, peers, told.facts["txid"])
        s.drive(alice, payment.session)
        assert (await s.closed(alice, payment.session)).facts["outcome"] == "PaidByFallback"


async def test_a_payer_who_broadcasts_his_original_instead_leaves_no_channel_behind() -> None:
    async with stage() as s:
        bob, alice = await s.bob(lightning=True), await s.alice()
        peers = s.world.peers(1)
        request = await s.request(bob, channels=[s.order(peers[0])])
        payment = await s.propose(bob, alice, request)
        await alice.driver.command(payment.session, BroadcastNow())
        s.drive(alice, payment.session)
        told = await s.until(alice, "FallbackBroadcasted", payment.session)
        await fallen_back(s, bob, request, peers, told.facts["txid"])
        assert (await s.closed(alice, payment.session)).facts["outcome"] == "PaidByFallback"


# ---------------------------------------------------------------- no channels then


async def no_channel_was_touched(s: Story, bob: Party, request: Any) -> None:
    assert "ChannelsIntended" not in s.told(bob, request.session)
    assert bob.node is not None
    assert not await bob.node.channels()
    assert all(peer.slots_taken() == 0 for peer in bob.node.peers())
    assert not await bob.store.blocked_peers()


@pytest.mark.parametrize("kind", ["p2sh-p2wpkh", "p2pkh"])
async def test_coins_whose_signature_changes_the_txid_make_a_plain_payjoin(kind: str) -> None:
    async with stage() as s:
        bob, alice = await s.bob(lightning=True), await s.alice(kinds=(kind,))
        request = await s.request(bob, channels=[s.order(s.world.peers(1)[0])])
        his, _, _ = await s.payjoin(bob, alice, request)
        assert (his.facts["outcome"], his.facts["channels"]) == ("Paid", [])
        assert s.told(bob, request.session) == PLAIN
        await no_channel_was_touched(s, bob, request)


async def test_a_payment_below_the_estimate_for_a_day_makes_a_plain_payjoin() -> None:
    async with stage() as s:
        bob, alice = await s.bob(lightning=True), await s.alice()
        s.world.chain.estimates[144] = FeeRate.from_sat_per_vb(3)
        request = await s.request(bob, channels=[s.order(s.world.peers(1)[0])])
        his, _, _ = await s.payjoin(bob, alice, request)
        assert (his.facts["outcome"], his.facts["channels"]) == ("Paid", [])
        await no_channel_was_touched(s, bob, request)


async def test_a_payer_who_forbids_substitution_gets_a_plain_payjoin_that_pays_the_address() -> None:
    async with stage() as s:
        bob, alice = await s.bob(lightning=True), await s.alice()
        request = await s.request(bob, channels=[s.order(s.world.peers(1)[0])])
        s.drive(bob, request.session)
        payer = Stranger(s, alice, request)
        sent = await payer.original(substitution=False)
        await payer.post(sent)
        tx = await payer.sign(sent, await payer.reply())
        assert any(out.script == payer.script and out.value >= AMOUNT for out in tx.outputs)
        await s.until(bob, "Seen", request.session, what="payjoin")
        await s.bury()
        assert (await s.closed(bob, request.session)).facts["outcome"] == "Paid"
        await no_channel_was_touched(s, bob, request)


async def test_an_unconfirmed_coin_of_the_payer_makes_a_plain_payjoin() -> None:
    async with stage() as s:
        bob, alice = await s.bob(lightning=True), await s.alice()
        request = await s.request(bob, channels=[s.order(s.world.peers(1)[0])])
        payer = Stranger(s, alice, request)
        sent = await payer.original()
        # The block that confirmed her coin goes away; her coin is in the mempool again.
        parent = sent.tx.inputs[0].outpoint.txid
        await s.world.chain.reorg(1, drop=())
        assert parent in s.in_mempool()
        s.drive(bob, request.session)
        await payer.post(sent)
        await payer.sign(sent, await payer.reply())
        await s.until(bob, "Seen", request.session, what="payjoin")
        await s.bury()
        assert (await s.closed(bob, request.session)).facts["channels"] == []
        await no_channel_was_touched(s, bob, request)


# ---------------------------------------------------------------- coins of ours


async def test_channels_without_a_coin_of_ours_are_refused_before_the_request_exists() -> None:
    async with stage() as s:
        bob = await s.bob(0, lightning=True)
        error = await refused(s.request(bob, channels=[s.order(s.world.peers(1)[0])]))
        assert isinstance(error, NotNow)
        assert "own_input" in str(error)
        assert not await bob.store.rows()


async def test_when_the_own_coin_is_gone_by_then_the_original_pays_at_once() -> None:
    async with stage() as s:
        bob, alice = await s.bob(lightning=True), await s.alice()
        request = await s.request(bob, channels=[s.order(s.world.peers(1)[0])])
        coin, lock = next(iter(bob.funded)), bytes(32)
        assert not await bob.wallet.lock([coin], lock, s.world.clock.now() + 86_400)
        payment = await s.begin(bob, alice, request)
        await s.until(bob, "ProposingStopped", request.session, why="policy")
        await s.until(bob, "Seen", request.session, what="original")
        await s.bury()
        assert (await s.closed(bob, request.session)).facts["outcome"] == "PaidByFallback"
        await s.leave(alice, payment.session)
        s.drive(alice, payment.session)
        assert (await s.closed(alice, payment.session)).facts["outcome"] == "PaidByFallback"
        await bob.wallet.unlock([coin], lock)
        await no_channel_was_touched(s, bob, request)


async def test_prefer_opens_channels_without_a_coin_of_ours_at_the_named_risk() -> None:
    async with stage() as s:
        bob, alice = await s.bob(0, lightning=True), await s.alice()
        policy = replace(Policy(), own_input="prefer")
        request = await s.request(bob, channels=[s.order(s.world.peers(1)[0])], policy=policy)
        his, _, _ = await s.payjoin(bob, alice, request)
        assert his.facts["outcome"] == "Paid"
        tx = s.tx(his.facts["txid"])
        assert {txin.outpoint for txin in tx.inputs} == set(alice.funded)
        [capacity] = (await opened(bob, his.facts["channels"])).values()
        assert capacity == his.facts["amount_received"] <= AMOUNT


async def test_a_plan_that_the_amount_cannot_carry_is_refused_with_the_missing_number() -> None:
    async with stage() as s:
        bob = await s.bob(lightning=True)
        error = await refused(s.request(bob, channels=[s.order(s.world.peers(1)[0], AMOUNT)]))
        assert isinstance(error, WrongUsage)
        assert "sat more than the 150000 asked" in str(error)
