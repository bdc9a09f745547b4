"""Guards of the sender's checklist that no other test would miss."""

from __future__ import annotations

from dataclasses import replace

import pytest

from pjv2.errors import BadProposal, CannotRead, WrongUsage
from pjv2.psbt.tx import Psbt, PsbtInput, ScriptKind, TxOut
from pjv2.psbt.verify import check_inputs, check_proposal, check_signed, explicit_contribution, restore_safe_to_sign
from tests.unit.psbt.payjoin_kit import CHANGE, OUR_CHANGE, PAYEE, purse, sign, unsigned
from tests.unit.psbt.test_proposal import Meeting
from tests.unit.psbt.test_verify import ALICE, BOB, GOOD, MEETING, THEIRS, with_input


def test_an_explicit_contribution_is_not_taken_from_one_of_two_changes() -> None:
    two = (TxOut(100_000, PAYEE), TxOut(900_000, CHANGE), TxOut(900_000, OUR_CHANGE))
    with pytest.raises(WrongUsage, match="exactly one change output"):
        explicit_contribution(unsigned([ALICE], two).tx, PAYEE, 100)


def test_the_receivers_input_tells_its_output_before_any_fee_is_counted() -> None:
    with pytest.raises(BadProposal, match="which output the receiver's input"):
        check_inputs(MEETING.sender, with_input(THEIRS, witness_utxo=None))


def test_our_signer_sees_nothing_of_the_receiver_but_previous_output_and_final_scripts() -> None:
    chatty = with_input(THEIRS, witness_script=b"\x51", redeem_script=b"\x52", sighash_type=1)
    safe = check_proposal(MEETING.sender, chatty)
    given = GOOD.inputs[THEIRS]
    assert safe.psbt.inputs[THEIRS] == PsbtInput(
        witness_utxo=given.witness_utxo, final_script_witness=given.final_script_witness
    )


def test_the_id_of_a_nested_payers_payjoin_is_known_with_his_script_sig() -> None:
    payer = purse(ScriptKind.P2SH, 2_000_000, 5)
    meeting = Meeting([payer], [BOB])
    safe = check_proposal(meeting.sender, Psbt.parse(meeting.finish().psbt))
    tx = check_signed(meeting.sender, safe, sign(safe.psbt, [payer]).serialize())
    assert safe.txid == tx.txid
    assert not safe.txid_is_stable


def test_the_id_of_a_legacy_payers_payjoin_is_not_known_before_he_signs() -> None:
    payer = purse(ScriptKind.P2PKH, 2_000_000, 6)
    meeting = Meeting([payer], [BOB])
    assert not check_proposal(meeting.sender, Psbt.parse(meeting.finish().psbt)).txid_is_stable


def test_an_accepted_proposal_is_rebuilt_as_it_was_judged_and_no_step_is_asked() -> None:
    assert restore_safe_to_sign(MEETING.sender, GOOD) == check_proposal(MEETING.sender, GOOD)
    later = replace(GOOD, tx=replace(GOOD.tx, locktime=1))
    with pytest.raises(BadProposal, match="lock time"):
        check_proposal(MEETING.sender, later)
    assert restore_safe_to_sign(MEETING.sender, later).psbt.tx == later.tx


def test_a_proposal_is_rebuilt_for_its_own_original_only() -> None:
    other = Meeting([purse(ScriptKind.P2WPKH, 2_000_000, 7)], [BOB]).sender
    with pytest.raises(CannotRead, match="another Original"):
        restore_safe_to_sign(other, GOOD)
    with pytest.raises(CannotRead, match="does not belong to this Original"):
        restore_safe_to_sign(MEETING.sender, with_input(THEIRS, witness_utxo=None))
