"""Payments that arrive at keys kept elsewhere, with real embedded wallets over the lab's Esplora server."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from pjv2 import session as model
from pjv2 import start
from pjv2.app import Payjoin
from pjv2.backends.wallet.bdk import BdkWallet, DescriptorKeys, MnemonicKeys, key_ring, words_from_entropy
from pjv2.backends.wallet.bdk_sync import Esplora
from pjv2.backends.wallet.cold import ColdWallet, cold_ring
from pjv2.lab.world import Party, bdk_party_wallet, esplora_chain
from pjv2.ports import Appended, Change, Stored, Wallet
from pjv2.psbt.tx import address_to_script
from pjv2.session import events as ev
from pjv2.testing.paper_wallet import PaperKind
from pjv2.units import Network
from tests.story.lab.kit import AMOUNT, PATIENCE, Story, Stranger, stage

pytest.importorskip("bdkpython")
BDK: dict[str, Any] = {"wallet": bdk_party_wallet, "chain": esplora_chain}
COLD = ["Created", "OriginalReceived", "OriginalAccepted", "ProposalDrafted", "ProposalSigned", "ProposalPosting"]


def descriptor(party: Party) -> str:
    """What the person's wallet exports for others to watch."""
    words = words_from_entropy(party.seed[:16])
    return str(key_ring(MnemonicKeys(words, party.kinds[0]), Network.REGTEST).external)


async def vault(s: Story, kind: PaperKind = "p2wpkh") -> Party:
    """Whose keys are never on the machine that receives."""
    return await s.world.party("vault", kinds=(kind,), **BDK)


async def cold_of(s: Story, party: Party, keys: Party) -> ColdWallet:
    server = await s.world.serve_chain()
    ring = cold_ring(descriptor(keys), Network.REGTEST)
    return ColdWallet(party.home / "cold.sqlite", ring, sync=Esplora(server.url))


async def watching(party: Party) -> Wallet:
    """A wallet of public descriptors."""
    server = await party.world.serve_chain()
    ring = key_ring(MnemonicKeys(words_from_entropy(party.seed[:16])), Network.REGTEST)
    keys = DescriptorKeys(str(ring.external), str(ring.change))
    return await BdkWallet.open(
        party.home / "watching.sqlite",
        keys,
        Network.REGTEST,
        sync=Esplora(server.url),
        max_age=0.0,
        gap=20,
        now=party.world.clock.now,
    )


class Died(BaseException):
    """The process ended here. Not an Exception: nothing of it may catch this."""


class LastAppend:
    """A store whose process ends as soon as an event is durable."""

    def __init__(self, party: Party) -> None:
        self._store = party.store

    def __getattr__(self, name: str) -> Any:
        return getattr(self._store, name)

    async def append(self, change: Change) -> Appended:
        answer = await self._store.append(change)
        if isinstance(answer, Stored):
            raise Died
        return answer


async def live_from_crash_to_crash(bob: Party, session: str, seen: Callable[[], Awaitable[None]]) -> int:
    """Drive a session to its end, the process killed after every event and started again from disk; answers how often.

    `seen` is done once, when the log has the payment in the mempool.
    """
    deaths = 0
    while (state := await bob.driver.load(session)).closed is None:
        if any(entry.height is None for entry in state.sightings):
            await seen()
        try:
            await bob.make_driver(store=LastAppend(bob)).drive(session, model.is_closed)  # type: ignore[arg-type]  # one method replaced
        except Died:
            deaths += 1
            await bob.restart()
    return deaths


@pytest.mark.parametrize("kind", ["p2wpkh", "p2tr"])
async def test_killed_after_every_event_the_payment_arrives_at_the_cold_keys_to_the_satoshi(kind: PaperKind) -> None:
    async with stage() as s:
        bob, alice, keys = await s.bob(**BDK), await s.alice(**BDK), await vault(s, kind)
        cold = await cold_of(s, bob, keys)
        request = await s.request(bob, cold=cold)
        await cold.close()  # from here on the log knows all there is to know
        assert request.cold is not None
        payment = await s.pay(alice, request)
        s.drive(alice, payment.session)

        async def blocks() -> None:
            await s.until(alice, "Seen", payment.session, what="payjoin")
            await s.bury()

        async with asyncio.timeout(PATIENCE):
            deaths = await live_from_crash_to_crash(bob, request.session, blocks)
        log = await s.log(bob, request.session)
        assert deaths == len(log) - 1, "once per event, Created aside"
        assert [model.event_name(event) for event in log][: len(COLD)] == COLD
        his = log[-1]
        assert isinstance(his, ev.Closed)
        hers = await s.closed(alice, payment.session)
        assert (his.outcome, hers.facts["outcome"], his.txid) == ("Paid", "Paid", hers.facts["txid"])
        tx, fee = s.tx(his.txid), s.fee(his.txid)
        assert {txin.outpoint for txin in tx.inputs} == {*alice.funded}
        script = address_to_script(request.cold, Network.REGTEST)
        assert [out.value for out in tx.outputs if out.script == script] == [his.amount_received]
        heavier = fee - payment.fee
        assert his.amount_received == AMOUNT - heavier
        assert (heavier > 0) is (kind == "p2tr")
        assert await keys.wallet.balance() == his.amount_received
        assert await alice.wallet.balance() == 500_000 - AMOUNT - payment.fee
        assert await bob.wallet.balance() == 200_000
        assert not await bob.store.coins_in_use()
        assert not await bob.locked()


async def test_a_payer_who_forbids_substitution_pays_the_wallet_itself_in_an_ordinary_payjoin() -> None:
    async with stage() as s:
        bob, alice, keys = await s.bob(**BDK), await s.alice(**BDK), await vault(s)
        cold = await cold_of(s, bob, keys)
        request = await s.request(bob, cold=cold)
        await cold.close()
        s.drive(bob, request.session)
        payer = Stranger(s, alice, request)
        sent = await payer.original(substitution=False)
        await payer.post(sent)
        tx = await payer.sign(sent, await payer.reply())
        assert {txin.outpoint for txin in tx.inputs} == {*alice.funded, *bob.funded}
        await s.until(bob, "Seen", request.session, what="payjoin")
        await s.bury()
        his = await s.closed(bob, request.session)
        assert his.facts["outcome"] == "Paid"
        assert await bob.wallet.balance() == 200_000 + his.facts["amount_received"]
        assert await keys.wallet.balance() == 0
        state = await bob.driver.load(request.session)
        assert model.public_session(state)["cold"] is False


async def test_two_requests_never_share_a_cold_address_and_a_new_file_skips_those_that_were_used() -> None:
    async with stage() as s:
        bob, keys = await s.bob(**BDK), await vault(s)
        used = await keys.fund(10_000, 10_000)
        assert len(used) == 2
        cold = await cold_of(s, bob, keys)
        first, second = await s.request(bob, cold=cold), await s.request(bob, cold=cold)
        await cold.close()
        again = await cold_of(s, bob, keys)
        third = await s.request(bob, cold=again)
        await again.close()
        created = [await s.event(bob, made.session, ev.ReceiverCreated) for made in (first, second, third)]
        assert [event.cold.index for event in created] == [2, 3, 4]
        assert await keys.wallet.balance() == 20_000


async def test_a_wallet_that_only_watches_answers_with_a_fresh_address_of_its_own() -> None:
    async with stage() as s:
        bob = await s.bob(0, wallet=watching, chain=esplora_chain)
        alice = await s.alice(**BDK)
        ports = {"wallet": bob.wallet, "chain": bob.chain, "store": bob.store, "mailroom": bob.mailroom}
        async with Payjoin.open({}, clock=s.world.clock, notify=bob.diary, pace=bob.pace, **ports) as pj:
            request = await pj.receive(AMOUNT)
            plain = await pj.receive(AMOUNT, cold=False)
            assert plain.cold is None
            assert request.cold not in (None, request.address)
            s.drive(bob, request.session)
            payment = await s.pay(alice, request.uri)
            s.drive(alice, payment.session)
            await s.until(alice, "Seen", payment.session, what="payjoin")
            await s.until(bob, "Seen", request.session, what="payjoin")
            await s.bury()
            his = await s.closed(bob, request.session)
            await s.closed(alice, payment.session)
            assert (his.facts["outcome"], his.facts["amount_received"]) == ("Paid", AMOUNT)
            assert await bob.wallet.balance() == AMOUNT
            script = address_to_script(request.cold or "", Network.REGTEST)
            assert [out.value for out in s.tx(his.facts["txid"]).outputs if out.script == script] == [AMOUNT]
            assert pj.cold is bob.wallet
        assert await bob.wallet.balance() == AMOUNT, "a wallet that was handed in stays open"


async def test_a_watching_wallet_takes_the_original_of_a_payer_who_forbids_substitution() -> None:
    async with stage() as s:
        bob = await s.bob(0, wallet=watching, chain=esplora_chain)
        alice = await s.alice(**BDK)
        request = await s.request(bob, cold=bob.wallet)
        s.drive(bob, request.session)
        payer = Stranger(s, alice, request)
        await payer.post(await payer.original(substitution=False))
        await s.until(bob, "Seen", request.session, what="original")
        await s.bury()
        assert (await s.closed(bob, request.session)).facts["outcome"] == "PaidByFallback"
        assert await bob.wallet.balance() == AMOUNT


def test_who_wants_a_cold_address_and_cannot_have_one_is_told_why() -> None:
    with pytest.raises(Exception, match="cold_descriptor"):
        start.cold_for(None, True, ())
    with pytest.raises(Exception, match="channels"):
        start.cold_for(object(), True, ("a channel",))  # type: ignore[arg-type]  # never asked
    source: Any = object()
    assert start.cold_for(source, None, ()) is source
    assert start.cold_for(source, False, ()) is None
    assert start.cold_for(source, None, ("a channel",)) is None
    assert start.cold_for(None, None, ()) is None
