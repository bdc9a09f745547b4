"""Paying a payee who has a server of his own (BIP78): TLS both ways checked, and the Original when the server fails."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest

from pjv2.backends.mailroom.mailroom import HttpMailroom
from pjv2.errors import ReplyCode, WrongUsage
from pjv2.lab.world import Party
from pjv2.ports import Mailroom
from pjv2.psbt.params import parse_params
from tests.story.lab.kit import AMOUNT, Story, stage
from tests.story.lab.merchant import Merchant, certificate

BIP78 = ["Created", "OriginalPosting", "ProposalAccepted", "Signed", "Broadcasting", "CoinsReleased", "Closed"]
PLAINLY = [
    "Created",
    "OriginalPosting",
    "ExpiryPassed",
    "ProposalRefused",
    "FallbackBroadcasting",
    "FallbackBroadcasted",
    "CoinsReleased",
    "Closed",
]


def trusting(ca_file: Path | None) -> Callable[[Party], Mailroom]:
    def make(party: Party) -> Mailroom:
        return HttpMailroom(
            directories=[],
            relays=[party.world.relays[0].url],
            clock=party.world.clock,
            rng=party.world.entropy,
            ca_file=ca_file,
        )

    return make


@contextlib.asynccontextmanager
async def shop(
    tmp_path: Path, *, trusted: bool = True, **how: Any
) -> AsyncIterator[tuple[Story, Party, Party, Merchant, str]]:
    tls, ca_file = certificate(tmp_path / "ca.pem")
    async with stage() as s:
        bob = await s.bob()
        alice = await s.alice(mailroom=trusting(ca_file if trusted else None))
        merchant = Merchant(bob, AMOUNT, tls, **how)
        try:
            yield s, bob, alice, merchant, await merchant.open()
        finally:
            await merchant.stop()


async def paid(s: Story, alice: Party, session: str) -> Any:
    await s.until(alice, "Seen", session)
    await s.world.chain.mine(6)
    return (await s.until(alice, "Closed", session)).facts


async def test_a_payees_own_server_is_paid_by_a_payjoin(tmp_path: Path) -> None:
    async with shop(tmp_path) as (s, bob, alice, merchant, uri):
        payment = await s.pay(alice, uri)
        s.drive(alice, payment.session)
        closed = await paid(s, alice, payment.session)
        assert closed["outcome"] == "Paid"
        assert s.told(alice, payment.session) == BIP78
        tx = s.tx(closed["txid"])
        assert {txin.outpoint for txin in tx.inputs} == {*bob.funded, *alice.funded}
        cost = 500_000 - await alice.wallet.balance()
        assert AMOUNT + payment.fee <= cost <= AMOUNT + payment.fee + payment.worst_contribution
        [request] = merchant.asked
        assert request.headers["content-type"] == "text/plain"
        path, _, query = request.target.partition("?")
        assert (path, query[:9]) == ("/pay", "id=7&v=1&")
        assert parse_params(query.partition("&")[2]).version == 1
        assert "user-agent" not in request.headers or not request.headers["user-agent"]
        with pytest.raises(WrongUsage, match="paid before"):
            await s.pay(alice, uri)


async def test_pjos_forbids_the_server_to_substitute(tmp_path: Path) -> None:
    async with shop(tmp_path, substitution=False) as (s, _, alice, merchant, uri):
        payment = await s.pay(alice, uri)
        s.drive(alice, payment.session)
        assert (await paid(s, alice, payment.session))["outcome"] == "Paid"
        assert "disableoutputsubstitution=true" in merchant.asked[0].target


async def test_an_error_of_the_server_is_told_in_our_words_and_the_original_pays(tmp_path: Path) -> None:
    async with shop(tmp_path) as (s, _, alice, merchant, uri):
        merchant.refuse = ReplyCode.NOT_ENOUGH_MONEY
        payment = await s.pay(alice, uri)
        s.drive(alice, payment.session)
        refused = await s.until(alice, "ProposalRefused", payment.session)
        assert refused.facts["code"] == "not-enough-money"
        closed = await paid(s, alice, payment.session)
        assert closed["outcome"] == "PaidByFallback"
        assert 500_000 - await alice.wallet.balance() == AMOUNT + payment.fee


async def test_a_certificate_of_a_stranger_gets_no_original(tmp_path: Path) -> None:
    async with shop(tmp_path, trusted=False) as (s, _, alice, merchant, uri):
        payment = await s.pay(alice, uri)
        s.drive(alice, payment.session)
        waiting = await s.until(alice, "NotNow", payment.session)
        assert "certificate" in waiting.facts["why"]
        s.world.clock.skip(121)
        closed = await paid(s, alice, payment.session)
        assert closed["outcome"] == "PaidByFallback"
        assert merchant.asked == []
        assert s.told(alice, payment.session) == PLAINLY


async def test_an_answer_that_was_lost_is_asked_for_again(tmp_path: Path) -> None:
    async with shop(tmp_path) as (s, _, alice, merchant, uri):
        merchant.lose = 1
        payment = await s.pay(alice, uri)
        s.drive(alice, payment.session)
        await s.until(alice, "NotNow", payment.session)
        merchant.cut_after = None
        closed = await paid(s, alice, payment.session)
        assert closed["outcome"] == "Paid"
        assert len(merchant.asked) >= 2
        assert len({request.body for request in merchant.asked}) == 1


async def test_a_payer_who_dies_after_the_post_asks_again_and_pays_once(tmp_path: Path) -> None:
    async with shop(tmp_path) as (s, _, alice, merchant, uri):
        payment = await s.pay(alice, uri)
        merchant.lose = 10
        s.drive(alice, payment.session)
        await s.until(alice, "NotNow", payment.session)
        await s.leave(alice, payment.session)
        merchant.lose, merchant.cut_after = 0, None
        s.drive(alice, payment.session)
        assert (await paid(s, alice, payment.session))["outcome"] == "Paid"
