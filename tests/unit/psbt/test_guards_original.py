"""Guards of the receiver's checklist that no other test would miss."""

from __future__ import annotations

from dataclasses import replace

import pytest

from pjv2.errors import BadOriginal, CannotRead
from pjv2.psbt.coin import commits_to_all
from pjv2.psbt.original import (
    OriginalPayload,
    Prevout,
    channel_obstacle,
    check_original,
    is_nested,
    parse_original,
    restore_original,
    restore_payload,
    txid_is_stable,
)
from pjv2.psbt.params import Params
from pjv2.psbt.tx import ScriptKind, TxIn, TxOut
from pjv2.units import FeeRate
from tests.unit.psbt.payjoin_kit import TIP, facts, original_psbt, purse, received, sent, terms, unsigned
from tests.unit.psbt.test_original import coin_facts

ALICE = purse(ScriptKind.P2WPKH, 300_000, 1)
BOB = purse(ScriptKind.P2TR, 50_000, 50)


def test_a_message_without_a_line_break_is_refused_even_when_it_holds_a_psbt() -> None:
    with pytest.raises(BadOriginal, match="no line break"):
        parse_original(original_psbt([ALICE]).to_base64().encode())


def test_an_id_is_stable_only_where_every_previous_output_is_native_segwit_and_no_input_has_a_script_sig() -> None:
    tx = original_psbt([ALICE]).extract()
    bare = TxOut(300_000, b"\x51")  # anyone can spend it, without any scriptSig
    assert txid_is_stable(tx, [ALICE.txout])
    assert not txid_is_stable(tx, [bare])
    [txin] = tx.inputs
    assert not txid_is_stable(replace(tx, inputs=(replace(txin, script_sig=b"\x51"),)), [ALICE.txout])


def test_only_a_p2sh_input_that_signs_in_its_witness_is_nested() -> None:
    nested = purse(ScriptKind.P2SH, 1_000, 2).txout
    assert is_nested(nested, (b"signature", b"key"))
    assert not is_nested(nested, ())
    assert not is_nested(ALICE.txout, (b"signature", b"key"))


def test_one_signature_that_leaves_freedom_among_others_is_enough_to_leave_it() -> None:
    def der(hash_type: int) -> bytes:
        return b"\x30\x06\x02\x01\x01\x02\x01\x01" + b"\x00" * 0 + bytes([hash_type])

    script = purse(ScriptKind.P2WSH, 1_000, 3).txout
    both = TxIn(ALICE.outpoint, witness=(b"", der(1), der(1), b"\x52\xae"))
    one = TxIn(ALICE.outpoint, witness=(b"", der(1), der(3), b"\x52\xae"))
    assert commits_to_all(both, script)
    assert not commits_to_all(one, script)


def test_our_young_coin_is_locked_by_the_sequence_that_it_copies_from_an_old_one() -> None:
    checked = received(sent([ALICE], sequence=10), [ALICE])
    old = {ALICE.outpoint: Prevout(ALICE.txout, 500)}

    def obstacle(height: int) -> str | None:
        recheck = coin_facts(ALICE, BOB, prevouts={**old, BOB.outpoint: Prevout(BOB.txout, height)})
        return channel_obstacle(checked, [BOB.coin()], recheck, now=0.0, expires=1_000.0)

    assert obstacle(TIP - 9) is None
    assert f"{BOB.outpoint} does not satisfy" in str(obstacle(TIP - 8))


def test_an_accepted_original_is_rebuilt_as_it_was_judged_and_no_rule_is_asked() -> None:
    payload, known = OriginalPayload(original_psbt([ALICE]), Params()), facts([ALICE])
    rebuilt = restore_original(payload, known.prevouts, terms(), tip=known.tip, tip_time=known.tip_time)
    assert rebuilt == check_original(payload, known, terms())

    for stricter in (terms(amount=200_000), terms(min_fee_rate=FeeRate(10_000)), terms(script=ALICE.txout.script)):
        with pytest.raises(BadOriginal):
            check_original(payload, known, stricter)
        again = restore_original(payload, known.prevouts, stricter, tip=known.tip, tip_time=known.tip_time)
        assert (again.tx, again.fee) == (rebuilt.tx, rebuilt.fee)


def test_an_original_is_rebuilt_from_its_own_facts_only() -> None:
    payload = OriginalPayload(original_psbt([ALICE, BOB]), Params())
    with pytest.raises(CannotRead, match="lack a previous output"):
        restore_original(payload, facts([ALICE]).prevouts, terms(), tip=TIP, tip_time=0.0)
    from_nowhere = OriginalPayload(unsigned([ALICE], [TxOut(300_001, b"\x51")]), Params())
    with pytest.raises(CannotRead, match="worth less"):
        restore_original(from_nowhere, facts([ALICE]).prevouts, terms(), tip=TIP, tip_time=0.0)


def test_limits_of_the_parameters_are_asked_when_they_arrive_and_not_of_a_log() -> None:
    body = original_psbt([ALICE]).to_base64().encode() + b"\nv=2&minfeerate=30000"
    with pytest.raises(BadOriginal, match="out of range"):
        parse_original(body)
    assert restore_payload(body).params.min_fee_rate == FeeRate(30_000 * 250)
    for damaged in (body.replace(b"\n", b""), body.replace(b"30000", b"x"), body.replace(b"v=2", b"v=7"), b"junk\n"):
        with pytest.raises(BadOriginal):
            restore_payload(damaged)
