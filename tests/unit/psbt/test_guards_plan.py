"""Guards of plan and proposal that no other test would miss."""

from __future__ import annotations

from dataclasses import replace

import pytest

from pjv2.errors import CannotRead, WrongUsage
from pjv2.psbt.original import FeeContribution
from pjv2.psbt.plan import make_intent, parse_channel_order
from pjv2.psbt.proposal import draft_proposal, restore_proposal
from pjv2.psbt.tx import Psbt, ScriptKind, TxOut, dust_limit
from pjv2.psbt.verify import make_sent_original
from pjv2.units import FeeRate
from tests.unit.psbt.payjoin_kit import CHANGE, PAYEE, Dice, purse, received, sent, sign, terms, unsigned
from tests.unit.psbt.test_plan import ALICE, BOB, PEERS, SCRIPTS, paid


@pytest.mark.parametrize("text", ["", "nobody", f"{PEERS[0]}=50000", f"{PEERS[0]}@host:9735"])
def test_what_is_no_channel_order_at_all_is_told_the_form_of_one(text: str) -> None:
    with pytest.raises(WrongUsage, match="of the form pubkey@host:port=CAPACITY"):
        parse_channel_order(text)


def test_the_payer_pays_no_more_for_our_inputs_than_they_cost_at_the_rate_we_pay() -> None:
    checked = paid(
        rate=4, min_rate=250, max_contribution=1_000, terms=terms(amount=1_000_000, max_fee_rate=FeeRate(250))
    )
    intent = make_intent(checked, None, [BOB.coin()], SCRIPTS)
    assert intent.rate == FeeRate(250)
    assert intent.sender_fee == FeeRate(250).fee(BOB.coin().weight) == 68
    assert intent.our_fee >= 0


def test_the_payers_output_pays_down_to_dust_and_no_further() -> None:
    payer = purse(ScriptKind.P2WPKH, 1_000_000 + 900, 3)
    checked = received(sent([payer], 1_000_000, rate=1, contribute=False), [payer], terms(amount=1_000_000))
    value = checked.tx.outputs[1].value
    checked = replace(checked, rate=FeeRate(2_500), contribution=FeeContribution(1, value))
    intent = make_intent(checked, None, [purse(ScriptKind.P2PKH, 90_000, 51).coin()], SCRIPTS)
    assert value - intent.sender_fee == dust_limit(CHANGE)


def test_of_two_outputs_of_the_payer_with_one_script_only_the_named_one_pays() -> None:
    outputs = [TxOut(1_000_000, PAYEE), TxOut(400_000, CHANGE), TxOut(599_000, CHANGE)]
    sender = make_sent_original(sign(unsigned([ALICE], outputs), [ALICE]), PAYEE, 1_000_000, min_fee_rate=FeeRate(500))
    checked = received(sender, [ALICE], terms(amount=1_000_000))
    intent = make_intent(checked, None, [BOB.coin()], SCRIPTS)
    assert intent.sender_fee > 0
    draft = draft_proposal(checked, intent, (), Dice())
    theirs = [txout.value for txout in draft.psbt.tx.outputs if txout.script == CHANGE]
    assert theirs == [400_000 - intent.sender_fee, 599_000]


def test_a_stored_proposal_that_lost_an_output_without_value_or_swapped_inputs_cannot_be_read() -> None:
    carol = purse(ScriptKind.P2WPKH, 500_000, 7)
    outputs = [TxOut(1_000_000, PAYEE), TxOut(1_490_000, CHANGE), TxOut(0, b"\x6a\x02hi")]
    sender = make_sent_original(
        sign(unsigned([ALICE, carol], outputs), [ALICE, carol]), PAYEE, 1_000_000, min_fee_rate=FeeRate(500)
    )
    checked = received(sender, [ALICE, carol], terms(amount=1_000_000))
    intent = make_intent(checked, None, [BOB.coin()], SCRIPTS)
    draft = draft_proposal(checked, intent, (), Dice())
    psbt, tx = draft.psbt, draft.psbt.tx
    assert restore_proposal(checked, intent, psbt.serialize(), ()).txid == draft.txid

    kept = [vout for vout, txout in enumerate(tx.outputs) if txout.value]
    shorter = Psbt(
        replace(tx, outputs=tuple(tx.outputs[vout] for vout in kept)),
        psbt.inputs,
        tuple(psbt.outputs[vout] for vout in kept),
    )
    order = [index for index, txin in enumerate(tx.inputs) if txin.outpoint != BOB.outpoint]
    swapped = list(range(len(tx.inputs)))
    swapped[order[0]], swapped[order[1]] = order[1], order[0]
    other = Psbt(
        replace(tx, inputs=tuple(tx.inputs[index] for index in swapped)),
        tuple(psbt.inputs[index] for index in swapped),
        psbt.outputs,
    )
    for damaged in (shorter, other):
        with pytest.raises(CannotRead, match="does not belong"):
            restore_proposal(checked, intent, damaged.serialize(), ())
