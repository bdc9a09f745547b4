"""Lightning peers that fail, on the lab: every fault at every step under every policy, and the payment arrives all the same."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

import pytest

from pjv2.backends.channel.rehearsal_peer import Fault, RehearsalPeer, Step
from pjv2.session.events import Policy
from tests.story.lab.kit import AMOUNT, FAST, stage

Trouble = Literal["offline", "refuses", "stalls", "dies", "error-after-store", "stalls-securing", "ghost"]


def make_trouble(peer: RehearsalPeer, trouble: Trouble) -> None:
    match trouble:
        case "offline":
            peer.go_offline()
        case "refuses":
            peer.fault(Step.RESERVE, Fault.REFUSE)
        case "stalls":
            peer.fault(Step.RESERVE, Fault.STALL)
        case "dies":
            peer.fault(Step.RESERVE, Fault.OFFLINE)
        case "error-after-store":
            peer.fault(Step.SECURE, Fault.ERROR)
        case "stalls-securing":
            peer.fault(Step.SECURE, Fault.STALL)
        case "ghost":
            peer.fault(Step.SECURE, Fault.LOSE_ANSWER)


BEFORE = ("offline", "refuses", "stalls", "dies")
LATER = ("error-after-store", "stalls-securing", "ghost")


@pytest.mark.parametrize("policy", ["drop", "deposit", "abort"])
@pytest.mark.parametrize("trouble", [*BEFORE, *LATER])
async def test_a_peer_that_fails_costs_a_channel_and_never_the_payment(
    trouble: Trouble, policy: Literal["drop", "deposit", "abort"]
) -> None:
    async with stage() as s:
        bob, alice = await s.bob(lightning=True, pace=FAST), await s.alice()
        assert bob.node is not None
        bad, good = s.world.peers(2)
        request = await s.request(
            bob, channels=[s.order(bad, 60_000), s.order(good)], policy=replace(Policy(), on_peer_failure=policy)
        )
        make_trouble(bad, trouble)
        payment = await s.begin(bob, alice, request)
        if policy == "abort":
            await s.until(alice, "ProposalRefused", payment.session, code="unavailable")
            await s.until(bob, "Seen", request.session, what="original")
        else:
            await s.both_seen(bob, request, alice, payment)
        await s.bury()
        his, hers = await s.closed(bob, request.session), await s.closed(alice, payment.session)
        told = s.told(bob, request.session)
        if policy == "abort":
            assert (his.facts["outcome"], hers.facts["outcome"]) == ("PaidByFallback", "PaidByFallback")
            assert (his.facts["amount_received"], his.facts["channels"]) == (AMOUNT, [])
            assert "RefusalPosted" in told
            assert "ProposalPosting" not in told
        else:
            assert (his.facts["outcome"], hers.facts["outcome"]) == ("Paid", "Paid")
            assert "ProposalPosted" in told
        one_left = policy == "drop" and trouble in BEFORE
        assert len(his.facts["channels"]) == one_left
        if one_left:
            await bob.node.sync()
            [channel] = [entry for entry in await bob.node.channels() if entry.state == "open"]
            assert (channel.peer, channel.capacity) == (good.pubkey, AMOUNT)
        assert told.count("ChannelsIntended") <= 2
        await s.all_free(bob, alice)
        blocked = await bob.store.blocked_peers()
        if trouble in BEFORE:
            assert not blocked
            assert not bad.pending()
        assert len(good.pending()) <= 1
        assert {entry.pubkey for entry in (bad, good) if entry.pending()} <= set(blocked) | (
            {bad.pubkey} if trouble == "ghost" else set()
        )


async def test_a_peer_that_stalls_once_is_left_out_and_the_next_payment_uses_it_again() -> None:
    async with stage() as s:
        bob, alice = await s.bob(200_000, 220_000, lightning=True, pace=FAST), await s.alice(500_000, 400_000)
        assert bob.node is not None
        [peer] = s.world.peers(1)
        first = await s.request(bob, channels=[s.order(peer)])
        peer.fault(Step.RESERVE, Fault.STALL)
        his, _, _ = await s.payjoin(bob, alice, first)
        assert (his.facts["outcome"], his.facts["channels"]) == ("Paid", [])
        peer.resume()
        second = await s.request(bob, channels=[s.order(peer)])
        his, _, _ = await s.payjoin(bob, alice, second)
        assert len(his.facts["channels"]) == 1
        await bob.node.sync()
        assert peer.slots_taken() == 0


async def test_two_sessions_never_ask_the_same_peer_at_once() -> None:
    async with stage() as s:
        bob = await s.bob(200_000, 220_000, lightning=True)
        alice, carol = await s.alice(), await s.world.party("carol", coins=[600_000])
        [peer] = s.world.peers(1)
        peer.fault(Step.SECURE, Fault.STALL)
        one, two = await s.request(bob, channels=[s.order(peer)]), await s.request(bob, channels=[s.order(peer)])
        s.drive(bob, one.session)
        first = await s.pay(alice, one)
        s.drive(alice, first.session)
        await peer.until_held(Step.SECURE)
        s.drive(bob, two.session)
        second = await s.pay(carol, two)
        s.drive(carol, second.session)
        await s.until(bob, "ProposalPosted", two.session)
        assert "ChannelsIntended" not in s.told(bob, two.session)
        peer.resume()
        await s.both_seen(bob, one, alice, first)
        await s.both_seen(bob, two, carol, second)
        await s.bury()
        assert len((await s.closed(bob, one.session)).facts["channels"]) == 1
        assert (await s.closed(bob, two.session)).facts["channels"] == []
        await s.closed(alice, first.session)
        await s.closed(carol, second.session)
        await s.all_free(bob, alice, carol)
