"""The receiver's checklist and rule 2 of the channels, one refusal each."""

from __future__ import annotations

import base64
import json
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from pjv2.errors import BadOriginal, PeerMistake, ReplyCode
from pjv2.psbt.coin import commits_to_all
from pjv2.psbt.original import (
    INPUTS_REFUSED,
    CheckedOriginal,
    FeeContribution,
    OriginalPayload,
    Prevout,
    RuleFacts,
    Suitability,
    channel_obstacle,
    check_original,
    check_shape,
    lock_is_satisfied,
    parse_original,
)
from pjv2.psbt.params import Params
from pjv2.psbt.tx import Psbt, PsbtInput, PsbtOutput, ScriptKind, Tx, TxIn, TxOut, build_psbt
from pjv2.psbt.verify import original_body
from pjv2.units import MAX_MONEY, FeeRate, Outpoint
from tests.unit.psbt.payjoin_kit import (
    CHANGE,
    KINDS,
    NATIVE,
    PAYEE,
    TIP,
    Purse,
    facts,
    original_psbt,
    purse,
    received,
    sent,
    sign,
    terms,
    unsigned,
)

VECTORS = json.loads((Path(__file__).parents[2] / "vectors" / "psbt.json").read_text())["vectors"]
ALICE = purse(ScriptKind.P2WPKH, 300_000, 1)


def body_of(psbt: Psbt, query: str = "v=2") -> bytes:
    return f"{psbt.to_base64()}\n{query}".encode()


def judged(psbt: Psbt, *, query: str = "v=2", purses: list[Purse] | None = None, **changes: object) -> CheckedOriginal:
    known = purses or [ALICE]
    return check_original(parse_original(body_of(psbt, query)), facts(known, **changes), terms())


def refused(psbt: Psbt, why: str, code: ReplyCode = ReplyCode.ORIGINAL_PSBT_REJECTED, **changes: object) -> None:
    with pytest.raises(BadOriginal, match=why) as refusal:
        judged(psbt, **changes)  # type: ignore[arg-type]
    assert refusal.value.reply is code


# --- parsing


def test_the_reference_body_is_read() -> None:
    vector = next(v for v in VECTORS if v["kind"] == "message_a_body")
    payload = parse_original(bytes.fromhex(vector["hex"]) + bytes(100))
    assert payload.params.version == 2
    assert len(payload.psbt.inputs) == 1
    assert not payload.v1


def test_upbug_i_everything_malformed_has_a_code_to_answer_with() -> None:
    good = original_psbt([ALICE]).to_base64()
    for body, code in (
        (b"\xff\xfe", ReplyCode.ORIGINAL_PSBT_REJECTED),
        (b"no line break", ReplyCode.ORIGINAL_PSBT_REJECTED),
        (b"\nv=2", ReplyCode.ORIGINAL_PSBT_REJECTED),
        (b"cHNidP8=\nv=2", ReplyCode.ORIGINAL_PSBT_REJECTED),
        (f"{good}\nv=3".encode(), ReplyCode.VERSION_UNSUPPORTED),
        (f"{good}\nminfeerate=nan".encode(), ReplyCode.ORIGINAL_PSBT_REJECTED),
    ):
        with pytest.raises(BadOriginal) as refusal:
            parse_original(body)
        assert refusal.value.reply is code


@given(st.binary(max_size=300))
@example(b"\n")
@settings(max_examples=100, deadline=None)
def test_any_body_is_an_original_or_a_bad_original(body: bytes) -> None:
    for text in (body, base64.b64encode(b"psbt\xff" + body) + b"\nv=2"):
        try:
            outcome: object = parse_original(text)
        except BadOriginal as refusal:
            outcome = refusal.reply
        assert isinstance(outcome, OriginalPayload | ReplyCode)


def test_a_missing_version_is_version_2_in_a_v2_message_and_version_1_in_clear_text() -> None:
    psbt = original_psbt([ALICE])
    assert parse_original(body_of(psbt, "")).params.version == 2
    assert parse_original(body_of(psbt, ""), v1=True).params.version == 1


def test_an_original_without_inputs_or_without_outputs_is_refused() -> None:
    psbt = original_psbt([ALICE])
    for tx in (Tx(2, 0, (), psbt.tx.outputs), Tx(2, 0, psbt.tx.inputs, ())):
        bare = build_psbt(tx, {ALICE.outpoint: ALICE.txout})
        with pytest.raises(BadOriginal, match="inputs and outputs"):
            parse_original(body_of(bare))


def test_fixed_10_duplicate_inputs_are_refused() -> None:
    tx = Tx(2, 0, (TxIn(ALICE.outpoint), TxIn(ALICE.outpoint)), (TxOut(1000, PAYEE),))
    with pytest.raises(BadOriginal, match="twice"):
        parse_original(body_of(build_psbt(tx, {ALICE.outpoint: ALICE.txout})))


def test_fixed_44_sums_beyond_all_bitcoin_are_refused() -> None:
    half = MAX_MONEY // 2 + 1
    rich = [Outpoint("11" * 32, n) for n in range(2)]
    outputs = (TxOut(half, PAYEE), TxOut(half, CHANGE))
    psbt = build_psbt(Tx(2, 0, tuple(map(TxIn, rich)), outputs), dict.fromkeys(rich, TxOut(half, CHANGE)))
    with pytest.raises(BadOriginal, match="outputs are worth more"):
        parse_original(body_of(psbt))
    psbt = build_psbt(Tx(2, 0, tuple(map(TxIn, rich)), outputs[:1]), dict.fromkeys(rich, TxOut(half, CHANGE)))
    with pytest.raises(BadOriginal, match="inputs are worth more"):
        parse_original(body_of(psbt))
    at_most = build_psbt(Tx(2, 0, (TxIn(rich[0]),), (TxOut(MAX_MONEY, PAYEE),)), {rich[0]: TxOut(MAX_MONEY, CHANGE)})
    assert parse_original(body_of(at_most)).psbt.fee == 0


def test_fixed_4_contradicting_previous_outputs_are_refused_at_ingestion() -> None:
    psbt = original_psbt([ALICE])
    lying = replace(psbt.inputs[0], witness_utxo=TxOut(1, CHANGE), non_witness_utxo=ALICE.parent)
    with pytest.raises(BadOriginal, match="contradict"):
        parse_original(body_of(replace(psbt, inputs=(lying,))))
    silent = replace(psbt.inputs[0], witness_utxo=None)
    with pytest.raises(BadOriginal, match="does not tell"):
        parse_original(body_of(replace(psbt, inputs=(silent,))))


# --- judging


@pytest.mark.parametrize("kind", KINDS)
def test_a_good_original_is_accepted_whatever_its_script_kind(kind: ScriptKind) -> None:
    payer = [purse(kind, 300_000, 2)]
    checked = received(sent(payer), payer)
    assert (checked.paid, checked.paid_vouts, checked.substitution) == (100_000, (0,), True)
    assert checked.txid_is_stable is (kind in NATIVE)
    assert checked.tx.txid == sent(payer).tx.txid
    assert checked.fee == sum(p.value for p in checked.prevouts) - sum(o.value for o in checked.tx.outputs)
    assert checked.rate == FeeRate.of(checked.fee, checked.tx.weight)


def test_an_unsigned_original_is_refused() -> None:
    bare = unsigned([ALICE], [TxOut(100_000, PAYEE), TxOut(199_000, CHANGE)])
    refused(bare, "not signed")


def test_an_original_the_network_refuses_is_refused() -> None:
    refused(original_psbt([ALICE]), "mempool full", suitability=Suitability("refused", "mempool full"))


def test_an_original_that_is_already_known_is_under_way_and_accepted() -> None:
    assert judged(original_psbt([ALICE]), suitability=Suitability("known")).paid == 100_000


def test_an_original_that_cannot_be_tested_is_answered_as_unavailable_with_a_clear_reason() -> None:
    unverifiable = Suitability("unverifiable", "no testmempoolaccept")
    refused(original_psbt([ALICE]), "no testmempoolaccept", ReplyCode.UNAVAILABLE, suitability=unverifiable)


def test_a_previous_output_that_the_chain_does_not_know_is_answered_as_unavailable() -> None:
    refused(original_psbt([ALICE]), "does not know", ReplyCode.UNAVAILABLE, prevouts={})


def test_fixed_2_a_lying_witness_utxo_cannot_hide_what_the_chain_holds() -> None:
    refused(original_psbt([ALICE]), "tells another output", prevouts={ALICE.outpoint: Prevout(TxOut(1, CHANGE), 5)})


def test_a_fee_rate_below_ours_is_refused_and_an_equal_one_is_not() -> None:
    payload = parse_original(body_of(original_psbt([ALICE])))
    rate = check_original(payload, facts([ALICE]), terms()).rate
    check_original(payload, facts([ALICE]), terms(min_fee_rate=rate))
    with pytest.raises(BadOriginal, match="too low"):
        check_original(payload, facts([ALICE]), terms(min_fee_rate=FeeRate(rate.sat_per_kwu + 1)))


def test_outputs_worth_more_than_inputs_are_refused() -> None:
    refused(sign(unsigned([ALICE], [TxOut(300_001, PAYEE)]), [ALICE]), "pays out more")


def test_inputs_of_ours_are_refused_by_outpoint_with_the_words_that_seen_ones_get() -> None:
    refused(original_psbt([ALICE]), INPUTS_REFUSED, owned=frozenset([ALICE.outpoint]))


def test_an_input_that_spends_this_sessions_own_address_is_ours() -> None:
    payload = parse_original(body_of(original_psbt([ALICE])))
    with pytest.raises(BadOriginal, match=INPUTS_REFUSED):
        check_original(payload, facts([ALICE]), terms(script=ALICE.key.script))


def test_only_this_sessions_script_counts_as_the_payment() -> None:
    older = original_psbt([ALICE], payee=purse(ScriptKind.P2WPKH, 1, 77).key.script)
    refused(older, "does not pay this session")


def test_less_than_asked_is_refused_and_more_is_accepted() -> None:
    refused(original_psbt([ALICE], pays=99_999), "99999 sat")
    assert judged(original_psbt([ALICE], pays=123_456)).paid == 123_456
    payload = parse_original(body_of(original_psbt([ALICE], pays=5_000)))
    assert check_original(payload, facts([ALICE]), terms(amount=None)).paid == 5_000


def test_several_outputs_to_us_are_all_the_payment() -> None:
    outputs = [TxOut(60_000, PAYEE), TxOut(190_000, CHANGE), TxOut(40_000, PAYEE)]
    checked = judged(sign(unsigned([ALICE], outputs), [ALICE]))
    assert (checked.paid, checked.paid_vouts) == (100_000, (0, 2))


def test_fixed_7_8_46_contributions_that_make_no_sense_are_dropped_not_clamped() -> None:
    psbt = original_psbt([ALICE])
    value = psbt.tx.outputs[1].value

    def offer(vout: int, most: int) -> FeeContribution | None:
        query = f"v=2&additionalfeeoutputindex={vout}&maxadditionalfeecontribution={most}"
        return judged(psbt, query=query).contribution

    assert offer(1, 91) == FeeContribution(1, 91)
    assert offer(1, value) == FeeContribution(1, value)
    assert offer(1, value + 1) is None
    assert offer(0, 91) is None
    assert offer(2, 91) is None
    assert offer(1, 0) is None


def test_substitution_is_off_for_v1_senders_and_by_parameter() -> None:
    psbt = original_psbt([ALICE])
    assert judged(psbt, query="v=2").substitution
    assert judged(psbt, query="").substitution
    assert not judged(psbt, query="v=1").substitution
    assert not judged(psbt, query="v=2&disableoutputsubstitution=true").substitution
    clear = replace(parse_original(body_of(psbt), v1=True), params=Params(version=2))
    assert not check_original(clear, facts([ALICE]), terms()).substitution


def test_fixed_13_segwit_is_not_enough_for_a_stable_txid() -> None:
    nested = [purse(ScriptKind.P2SH, 300_000, 4)]
    assert not received(sent(nested), nested).txid_is_stable
    mixed = [ALICE, purse(ScriptKind.P2PKH, 100_000, 5)]
    assert not received(sent(mixed), mixed).txid_is_stable


def test_the_map_of_a_payers_input_keeps_only_what_signers_need() -> None:
    legacy = purse(ScriptKind.P2PKH, 300_000, 6)
    assert received(sent([legacy]), [legacy]).sender_input(0) == PsbtInput(non_witness_utxo=legacy.parent)
    assert received(sent([ALICE]), [ALICE]).sender_input(0) == PsbtInput(witness_utxo=ALICE.txout)


def test_check_shape_passes_a_transaction_at_the_limits() -> None:
    check_shape(original_psbt([ALICE]))
    with pytest.raises(PeerMistake):
        check_shape(Psbt(Tx(2, 0, (), ()), (), ()))


# --- rule 2


def coin_facts(*coins: Purse, height: int | None = 500, **changes: object) -> RuleFacts:
    usual = RuleFacts(
        tip=TIP,
        tip_time=1_700_000_000.0,
        prevouts={item.outpoint: Prevout(item.txout, height) for item in coins},
        spends_seen=frozenset(),
        can_sign=True,
        economy_rate=FeeRate(250),
    )
    return replace(usual, **changes)  # type: ignore[arg-type]


BOB = purse(ScriptKind.P2TR, 50_000, 50)


def obstacle(payer: Purse = ALICE, own: Purse | None = BOB, *, left: float = 300, **changes: object) -> str | None:
    original = {key: changes.pop(key) for key in ("sequence", "substitution") if key in changes}
    checked = received(sent([payer], **original), [payer])
    coins = [own.coin()] if own else []
    recheck = coin_facts(payer, *([own] if own else []), **changes)  # type: ignore[arg-type]
    return channel_obstacle(checked, coins, recheck, now=1000.0, expires=1000.0 + left)


def test_rule_2_passes_when_nothing_stands_in_the_way() -> None:
    assert obstacle() is None


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"own": None}, "no coin of ours"),
        ({"substitution": False}, "output substitution"),
        ({"left": 299.9}, "300 seconds"),
        ({"can_sign": False}, "cannot sign"),
        ({"prevouts": {}}, "does not know"),
        (
            {"prevouts": {ALICE.outpoint: Prevout(TxOut(1, b""), 5), BOB.outpoint: Prevout(BOB.txout, 5)}},
            "another output",
        ),
        ({"payer": purse(ScriptKind.P2SH, 300_000, 8)}, "payer is not native"),
        ({"payer": purse(ScriptKind.P2PKH, 300_000, 8)}, "payer is not native"),
        ({"own": purse(ScriptKind.P2SH, 50_000, 9)}, "coin of ours is not native"),
        ({"height": None}, "not confirmed"),
        ({"height": TIP + 1}, "not confirmed"),
        (
            {"prevouts": {i.outpoint: Prevout(i.txout, TIP - 98, coinbase=True) for i in (ALICE, BOB)}},
            "immature",
        ),
        ({"spends_seen": frozenset([ALICE.outpoint])}, "in sight"),
        ({"spends_seen": frozenset([BOB.outpoint])}, "in sight"),
        ({"prevouts": {i.outpoint: Prevout(i.txout, 5, spent_by="aa" * 32) for i in (ALICE, BOB)}}, "in sight"),
        ({"sequence": 502}, "relative lock"),
        ({"sequence": (1 << 22) + 1}, "relative lock"),
        ({"economy_rate": FeeRate(600)}, "below the estimate"),
    ],
)
def test_rule_2_names_what_stands_in_the_way(changes: dict[str, object], why: str) -> None:
    assert why in str(obstacle(**changes))  # type: ignore[arg-type]


def test_without_a_coin_of_ours_channels_are_an_explicit_risk() -> None:
    checked = received(sent([ALICE]), [ALICE])
    assert channel_obstacle(checked, [], coin_facts(ALICE), 0.0, 1000.0, own_input_required=False) is None


@pytest.mark.parametrize("kind", NATIVE)
@pytest.mark.parametrize("hash_type", [2, 3, 0x81, 0x82, 0x83])
def test_upbug_v_the_byte_of_the_actual_signature_counts(kind: ScriptKind, hash_type: int) -> None:
    payer = purse(kind, 300_000, 11)
    psbt = sign(unsigned([payer], [TxOut(100_000, PAYEE), TxOut(199_000, CHANGE)]), [payer], hash_type)
    checked = judged(psbt, purses=[payer])
    why = channel_obstacle(checked, [BOB.coin()], coin_facts(payer, BOB), 0.0, 1000.0)
    assert "does not commit" in str(why)


def test_signatures_are_recognised_in_every_kind_of_input() -> None:
    for kind in KINDS:
        payer = purse(kind, 300_000, 12)
        tx = original_psbt([payer]).extract()
        assert commits_to_all(tx.inputs[0], payer.txout)
    taproot = TxOut(1, purse(ScriptKind.P2TR, 1, 13).key.script)
    where = Outpoint("11" * 32, 0)

    def spends(*witness: bytes, script_sig: bytes = b"") -> TxIn:
        return TxIn(where, script_sig, 0, witness)

    assert commits_to_all(spends(bytes(64)), taproot)
    assert commits_to_all(spends(bytes(64) + b"\x01", b"\x50annex"), taproot)
    assert not commits_to_all(spends(bytes(64) + b"\x83", b"script", bytes(33)), taproot)
    assert commits_to_all(spends(bytes(64), b"script", bytes(33)), taproot)
    assert not commits_to_all(spends(b"preimage", b"script", bytes(33)), taproot)
    assert not commits_to_all(spends(), TxOut(1, CHANGE))
    assert not commits_to_all(spends(script_sig=b"\x76"), TxOut(1, CHANGE))


@pytest.mark.parametrize(
    ("version", "sequence", "height", "time", "satisfied"),
    [
        (1, 10, None, None, True),
        (2, 1 << 31, None, None, True),
        (2, 0, None, None, True),
        (2, 1 << 22, None, None, True),
        (2, 10, 991, None, True),
        (2, 10, 992, None, False),
        (2, 10, None, None, False),
        (-1, 10, None, None, False),
        (2, (1 << 22) | 2, 5, 8976.0, True),
        (2, (1 << 22) | 2, 5, 8977.0, False),
        (2, (1 << 22) | 2, 5, None, False),
        (2, (1 << 22) | 2, None, 0.0, False),
    ],
)
def test_relative_locks_are_judged_as_bip68_says(
    version: int, sequence: int, height: int | None, time: float | None, satisfied: bool
) -> None:
    assert lock_is_satisfied(version, sequence, height, time, tip=1000, tip_time=10_000.0) is satisfied


def test_what_the_sender_posts_holds_no_wallet_data() -> None:
    payload = parse_original(original_body(sent([ALICE])))
    assert payload.psbt.outputs == (PsbtOutput(), PsbtOutput())
    assert not payload.psbt.inputs[0].has_derivation
