"""Plain payjoins on the lab: what is paid arrives, whoever brings which coin, and every other end of a payment."""

from __future__ import annotations

import pytest

from pjv2.psbt.tx import address_to_script
from pjv2.units import Network
from tests.story.lab.kit import AMOUNT, PLAIN, SENT, stage


@pytest.mark.parametrize("receiver", ["p2wpkh", "p2tr"])
@pytest.mark.parametrize("sender", ["p2wpkh", "p2tr", "p2sh-p2wpkh", "p2pkh"])
async def test_a_plain_payjoin_pays_to_the_satoshi_whatever_coins_take_part(sender: str, receiver: str) -> None:
    async with stage() as s:
        bob = await s.bob(kinds=(receiver,))
        alice = await s.alice(kinds=(sender,))
        request = await s.request(bob)
        his, hers, payment = await s.payjoin(bob, alice, request)
        assert (his.facts["outcome"], hers.facts["outcome"]) == ("Paid", "Paid")
        assert his.facts["txid"] == hers.facts["txid"]
        assert s.told(bob, request.session) == PLAIN
        assert s.told(alice, payment.session) == SENT
        txid = his.facts["txid"]
        tx, fee = s.tx(txid), s.fee(txid)
        assert {txin.outpoint for txin in tx.inputs} == {*bob.funded, *alice.funded}
        script = address_to_script(request.address, Network.REGTEST)
        [paid] = [out.value for out in tx.outputs if out.script == script]
        received = his.facts["amount_received"]
        assert paid == 200_000 + received
        assert await bob.wallet.balance() == 200_000 + received
        her_cost = 500_000 - await alice.wallet.balance()
        assert her_cost + (AMOUNT - received) == AMOUNT + fee
        assert AMOUNT + payment.fee <= her_cost <= AMOUNT + payment.fee + payment.worst_contribution
        assert AMOUNT - received <= AMOUNT // 20, "our share of the fee stays under max_fee_share"
        await s.all_free(bob, alice)
