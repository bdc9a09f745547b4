"""Defects that other implementations had or have, by number of the reference's history or letter of its open list: we have none of them.

Those not here stand beside the rule they belong to, under names that begin `fixed_` or `upbug_`.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from pjv2.errors import BadOriginal, BadProposal, ReplyCode
from pjv2.psbt.coin import Coin
from pjv2.psbt.original import (
    INPUTS_REFUSED,
    OriginalFacts,
    Prevout,
    ReceiverTerms,
    Suitability,
    check_original,
    parse_original,
)
from pjv2.psbt.plan import choose_coins, make_intent
from pjv2.psbt.proposal import draft_proposal, reply_payload_error
from pjv2.psbt.tx import Psbt, PsbtInput, ScriptKind, TxOut, hash160, hash256
from pjv2.psbt.verify import check_proposal, make_sent_original, original_body
from pjv2.units import FeeRate, Outpoint
from tests.unit.psbt.payjoin_kit import PAYEE, Dice, facts, original_psbt, purse, received, sent, terms
from tests.unit.psbt.test_plan import SCRIPTS
from tests.unit.psbt.test_proposal import Meeting

DATA = Path(__file__).parents[2] / "vectors"
VECTORS = json.loads((DATA / "psbt.json").read_text())["vectors"]
BDK = json.loads((DATA / "psbt_bdk.json").read_text())["vectors"]
BIP78 = next(v for v in VECTORS if v["name"] == "bip78_exchange")
ALICE = purse(ScriptKind.P2WPKH, 2_000_000, 1)
BOB = purse(ScriptKind.P2WPKH, 80_000, 50)


def bip78_terms(script: bytes) -> ReceiverTerms:
    return ReceiverTerms(script, 2_000_000, FeeRate(250), FeeRate(12_500), 50_000, 10_000)


def test_our_receiver_reproduces_the_bip78_exchange_up_to_its_rounded_rate() -> None:
    psbt = Psbt.from_base64(BIP78["Original_PSBT"])
    theirs = Psbt.from_base64(BIP78["payjoin_proposal"])
    payee = psbt.tx.outputs[1].script
    known = {t.outpoint: Prevout(p, 500) for t, p in zip(psbt.tx.inputs, psbt.prevouts(), strict=True)}
    query = f"additionalfeeoutputindex=0&maxadditionalfeecontribution={BIP78['maxadditionalfeecontribution']}"
    payload = parse_original(f"{psbt.to_base64()}\n{query}".encode())
    gathered = OriginalFacts(1000, Suitability("accepted"), known, frozenset(), FeeRate(250))
    checked = check_original(payload, gathered, bip78_terms(payee))
    at = next(n for n, txin in enumerate(theirs.tx.inputs) if txin.outpoint not in known)
    coin = Coin.of(
        theirs.tx.inputs[at].outpoint,
        theirs.prevout(at) or TxOut(0, b""),
        height=5,
        redeem_script=(theirs.inputs[at].final_script_sig or b"")[1:],
    )
    intent = make_intent(checked, None, [coin], SCRIPTS)
    draft = draft_proposal(checked, intent, [], Dice())
    # The Original pays a little more than the 2 sat/vB that the BIP rounds to: one satoshi of our input's fee stays with us.
    assert (intent.sender_fee, intent.our_fee) == (182, 1)
    ours = {(o.value + (o.script == payee), o.script) for o in draft.psbt.tx.outputs}
    assert ours == {(o.value, o.script) for o in theirs.tx.outputs}


def test_the_restored_proposal_is_the_one_bip78_prints() -> None:
    wallet = Psbt.from_base64(BIP78["Unfinalized_signed_PSBT"])
    final = Psbt.from_base64(BIP78["Original_PSBT"])
    mine = replace(
        final.inputs[0],
        redeem_script=wallet.inputs[0].redeem_script,
        bip32_derivation=wallet.inputs[0].bip32_derivation,
    )
    kept = replace(final, inputs=(mine,), outputs=wallet.outputs)
    sender = make_sent_original(
        kept, final.tx.outputs[1].script, 2_000_000, min_fee_rate=FeeRate(250), max_contribution=182
    )
    safe = check_proposal(sender, Psbt.from_base64(BIP78["payjoin_proposal"]))
    printed = Psbt.from_base64(BIP78["payjoin_proposal_filled_with_senders_information"])
    assert safe.psbt.tx == printed.tx
    assert safe.psbt.inputs == printed.inputs
    assert safe.psbt.outputs == printed.outputs


@pytest.mark.parametrize("vector", [v for v in BDK if v["stage"] == "final"], ids=lambda v: v["kind"])
def test_what_bdk_signs_is_an_original_we_send_and_accept(vector: dict[str, str]) -> None:
    payee = bytes.fromhex(vector["payee_script"])
    sender = make_sent_original(Psbt.from_base64(vector["psbt"]), payee, 150_000, min_fee_rate=FeeRate(250))
    payload = parse_original(original_body(sender))
    known = {
        txin.outpoint: Prevout(prevout, 500)
        for txin, prevout in zip(payload.psbt.tx.inputs, payload.psbt.prevouts(), strict=True)
    }
    gathered = OriginalFacts(1000, Suitability("accepted"), known, frozenset(), FeeRate(250))
    checked = check_original(payload, gathered, terms(payee, 150_000))
    assert checked.tx.raw.hex() == vector["tx"]
    assert checked.fee == vector["fee"]
    assert checked.txid_is_stable is (vector["kind"] in ("p2wpkh", "p2tr"))


def test_the_references_dummy_hashes_are_ours() -> None:
    vector = next(v for v in VECTORS if v["name"] == "test_utils_dummies")
    assert vector["DUMMY32_sha256d_empty"] in (hash256(b"").hex(), hash256(b"")[::-1].hex())
    assert hash160(b"").hex() == vector["DUMMY20_hash160_empty"]


def test_every_psbt_of_the_reference_test_data_parses() -> None:
    for name in ("test_utils_payjoin_proposal", "test_utils_payjoin_proposal_with_sender_info"):
        assert len(Psbt.from_base64(next(v for v in VECTORS if v["name"] == name)["value"]).inputs) == 2


def test_fixed_11_a_fallback_exists_only_after_the_broadcast_check() -> None:
    payload = parse_original(original_body(sent([ALICE])))
    assert not hasattr(payload, "tx")
    with pytest.raises(BadOriginal):
        check_original(payload, facts([ALICE], suitability=Suitability("refused")), terms())
    assert check_original(payload, facts([ALICE]), terms()).tx == sent([ALICE]).tx


def test_fixed_12_a_nested_coin_weighs_364_although_its_signature_is_cleared() -> None:
    nested = purse(ScriptKind.P2SH, 90_000, 51)
    meeting = Meeting([purse(ScriptKind.P2SH, 2_000_000, 2)], [nested], contribute=False)
    assert meeting.intent.our_fee == meeting.checked.rate.fee(364)
    assert not any(psbt_input.has_signature for psbt_input in meeting.draft.psbt.inputs)


def test_fixed_42_the_peer_learns_a_code_and_never_why() -> None:
    psbt = original_psbt([ALICE])
    payload = parse_original(f"{psbt.to_base64()}\nv=2".encode())
    with pytest.raises(BadOriginal) as owned:
        check_original(payload, facts([ALICE], owned=frozenset([ALICE.outpoint])), terms())
    assert str(owned.value) == INPUTS_REFUSED
    reply = reply_payload_error(ReplyCode.ORIGINAL_PSBT_REJECTED)
    assert json.loads(reply)["message"] == "The receiver rejected the original PSBT."


def test_fixed_45_a_substituted_script_takes_the_value_of_the_payment_itself() -> None:
    for change_first in (True, False):
        meeting = Meeting([ALICE], [BOB], substitute=SCRIPTS.deposit, change_first=change_first)
        [output] = [o for o in meeting.draft.psbt.tx.outputs if o.script == SCRIPTS.deposit]
        assert output.value == 1_000_000 + 80_000 - meeting.intent.our_fee
        assert PAYEE not in {o.script for o in meeting.draft.psbt.tx.outputs}


def test_fixed_51_a_changed_outpoint_of_ours_is_not_taken_for_the_receivers() -> None:
    meeting = Meeting([ALICE, purse(ScriptKind.P2WPKH, 90_000, 3)], [BOB])
    good = Psbt.parse(meeting.finish().psbt)
    at = next(n for n, txin in enumerate(good.tx.inputs) if txin.outpoint == ALICE.outpoint)
    txins, maps = list(good.tx.inputs), list(good.inputs)
    txins[at] = replace(txins[at], outpoint=Outpoint("cc" * 32, 1))
    maps[at] = PsbtInput(witness_utxo=ALICE.txout, final_script_witness=(b"x" * 72, b"y" * 33))
    forged = Psbt(replace(good.tx, inputs=tuple(txins)), tuple(maps), good.outputs)
    with pytest.raises(BadProposal, match="missing from the proposal"):
        check_proposal(meeting.sender, forged)


def test_upbug_c_the_id_counts_the_script_sigs_of_both_sides() -> None:
    meeting = Meeting([purse(ScriptKind.P2SH, 2_000_000, 4)], [purse(ScriptKind.P2SH, 90_000, 52)])
    assert not meeting.draft.txid_is_stable
    assert meeting.draft.txid != meeting.draft.psbt.tx.txid
    assert meeting.finish().txid == meeting.draft.txid


def test_upbug_d_two_coins_cost_two_inputs_and_lose_nothing() -> None:
    second = purse(ScriptKind.P2WPKH, 70_000, 53)
    meeting = Meeting([ALICE], [BOB, second], contribute=False)
    assert meeting.intent.our_fee == meeting.checked.rate.fee(2 * 272)
    assert meeting.intent.outputs[0].value == 1_000_000 + 150_000 - meeting.intent.our_fee


def test_upbug_e_a_fee_that_would_eat_the_payment_is_refused_not_wrapped_around() -> None:
    checked = received(sent([ALICE], 10_000, rate=40, contribute=False), [ALICE], terms(amount=10_000))
    assert choose_coins(checked, [BOB.coin()], plan=None, rng=Dice()) == (BOB.coin(),)
    intent = make_intent(checked, None, [BOB.coin()], SCRIPTS)
    assert intent.our_fee <= 500 < checked.rate.fee(272)
