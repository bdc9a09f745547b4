"""The sender's checklist: what we send, what we read, and one refusal for each step of BIP78's checklist."""

from __future__ import annotations

import base64
import json
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from pjv2.errors import BadProposal, CannotRead, NotNow, OurMistake, WrongUsage
from pjv2.psbt.coin import declared_sighash_is_safe, predict_input_weight, script_pushes
from pjv2.psbt.original import FeeContribution, parse_original
from pjv2.psbt.params import Params, format_params
from pjv2.psbt.tx import Psbt, PsbtInput, PsbtOutput, ScriptKind, Tx, TxIn, TxOut, address_to_script, build_psbt
from pjv2.psbt.verify import (
    BadReply,
    SafeToSign,
    SentOriginal,
    build_reclaim,
    check_proposal,
    check_signed,
    clean_original,
    explicit_contribution,
    make_sent_original,
    original_body,
    read_reply,
    recommended_contribution,
)
from pjv2.units import MAX_MONEY, FeeRate, Network, Outpoint
from tests.unit.psbt.payjoin_kit import (
    CHANGE,
    KINDS,
    OUR_CHANGE,
    PAYEE,
    original_psbt,
    purse,
    sent,
    sign,
    unsigned,
)
from tests.unit.psbt.test_proposal import Meeting

VECTORS = json.loads((Path(__file__).parents[2] / "vectors" / "psbt.json").read_text())["vectors"]
ALICE = purse(ScriptKind.P2WPKH, 2_000_000, 1)
BOB = purse(ScriptKind.P2WPKH, 80_000, 50)


def of(name: str, **match: object) -> dict[str, str]:
    return next(v for v in VECTORS if v["name"] == name and all(v.get(key) == value for key, value in match.items()))


def reference(name: str) -> Psbt:
    return Psbt.from_base64(of(name)["value"])


BIP78 = of("bip78_exchange")
PAYEE_78 = Psbt.from_base64(BIP78["Original_PSBT"]).tx.outputs[1].script


# --- BIP78's own exchange and the reference's sender tests


def bip78_sender(**how: object) -> SentOriginal:
    psbt = Psbt.from_base64(BIP78["Original_PSBT"])
    usual: dict[str, object] = {"min_fee_rate": FeeRate(250), "max_contribution": 182}
    return make_sent_original(psbt, PAYEE_78, 2_000_000, **{**usual, **how})  # type: ignore[arg-type]


def test_the_bip78_vectors_proposal_is_safe_to_sign() -> None:
    safe = check_proposal(bip78_sender(), Psbt.from_base64(BIP78["payjoin_proposal"]))
    assert safe.fee_paid_by_us == 182
    assert not safe.txid_is_stable
    assert len(safe.ours) == 1
    mine = safe.psbt.tx.inputs.index(next(t for t in safe.psbt.tx.inputs if t.outpoint == safe.ours[0]))
    assert safe.psbt.inputs[mine].witness_utxo is not None
    assert not safe.psbt.inputs[mine].has_signature


def test_upbug_p_the_redeem_script_is_restored_for_signers() -> None:
    wallet = Psbt.from_base64(BIP78["Unfinalized_signed_PSBT"])
    final = Psbt.from_base64(BIP78["Original_PSBT"])
    kept = replace(
        final,
        inputs=(
            replace(
                final.inputs[0],
                redeem_script=wallet.inputs[0].redeem_script,
                bip32_derivation=wallet.inputs[0].bip32_derivation,
            ),
        ),
        outputs=wallet.outputs,
    )
    sender = make_sent_original(kept, PAYEE_78, None, min_fee_rate=FeeRate(250), max_contribution=182)
    safe = check_proposal(sender, Psbt.from_base64(BIP78["payjoin_proposal"]))
    assert safe.psbt.inputs[0].redeem_script == wallet.inputs[0].redeem_script
    assert safe.psbt.inputs[0].bip32_derivation == wallet.inputs[0].bip32_derivation


def test_fixed_38_only_the_outgoing_copy_is_stripped_and_output_maps_come_back_for_identical_outputs() -> None:
    psbt = original_psbt([ALICE])
    note = ((b"\x02" + bytes(32), bytes(8)),)
    rich = replace(
        psbt,
        inputs=(replace(psbt.inputs[0], bip32_derivation=note, proprietary=((b"\xfc\x01ax", b"y"),)),),
        outputs=(PsbtOutput(), PsbtOutput(bip32_derivation=note)),
        xpubs=((bytes(78), bytes(4)),),
        unknown=((b"\x77", b"z"),),
    )
    sender = make_sent_original(rich, PAYEE, 100_000, min_fee_rate=FeeRate(250), contribute=False)
    posted = parse_original(original_body(sender)).psbt
    assert (posted.xpubs, posted.unknown, posted.inputs[0].proprietary) == ((), (), ())
    assert not posted.inputs[0].has_derivation
    assert not posted.outputs[1].has_derivation
    assert Psbt.parse(sender.psbt) == rich
    unchanged = clean(sender)
    safe = check_proposal(sender, unchanged)
    assert safe.psbt.outputs[1].bip32_derivation == note
    assert safe.psbt.inputs[0].bip32_derivation == note
    assert safe.psbt.xpubs == ()


def clean(sender: SentOriginal) -> Psbt:
    """The Original itself as a proposal: a receiver that adds nothing."""
    psbt = clean_original(Psbt.parse(sender.psbt))
    blank = tuple(replace(i, final_script_sig=None, final_script_witness=None) for i in psbt.inputs)
    return replace(psbt, inputs=blank)


@pytest.mark.parametrize(
    "name", [f"input_weight_{kind}" for kind in ("p2pkh", "nested_p2wpkh", "p2wpkh", "p2tr_keyspend")]
)
def test_the_reference_predicts_the_same_weight_for_the_receivers_input(name: str) -> None:
    vector = of(name)
    psbt = Psbt.from_base64(vector["payjoin_psbt"])
    index = next(i for i, txin in enumerate(psbt.tx.inputs) if str(txin.outpoint) == vector["receiver_outpoint"])
    prevout = psbt.prevout(index)
    assert prevout is not None
    assert (prevout.value, prevout.script.hex()) == (
        vector["receiver_utxo_value_sat"],
        vector["receiver_script_pubkey"],
    )
    predicted = predict_input_weight(prevout, psbt.inputs[index])
    if "explicit_weight_required" in vector:
        # The receiver gives 230 before signing; this signature carries an explicit sighash byte.
        assert (purse(ScriptKind.P2TR, 1, 3).coin().weight, predicted) == (vector["expected_input_weight_wu"], 231)
    else:
        assert predicted == vector["expected_input_weight_wu"]


def test_weights_that_cannot_be_predicted_are_none() -> None:
    raw = Tx.parse(bytes.fromhex(of("psbt_mod_raw_tx")["raw_tx"]))
    redeem = bytes.fromhex(of("psbt_mod_raw_tx")["p2sh_non_p2wpkh_final_script_sig"])
    assert predict_input_weight(raw.outputs[0], PsbtInput(final_script_sig=redeem)) is None
    assert predict_input_weight(raw.outputs[0], PsbtInput()) is None
    assert predict_input_weight(purse(ScriptKind.P2TR, 1, 3).txout, PsbtInput()) is None
    assert predict_input_weight(TxOut(1, b"\x52\x02ab"), PsbtInput(final_script_witness=(b"x",))) is None


def test_the_references_weight_constants_are_ours() -> None:
    constants = of("input_weight_constants")
    for kind, name in (
        (ScriptKind.P2PKH, "p2pkh_compressed_max"),
        (ScriptKind.P2SH, "nested_p2wpkh_max"),
        (ScriptKind.P2WPKH, "p2wpkh_max"),
        (ScriptKind.P2TR, "p2tr_key_default_sighash"),
    ):
        assert purse(kind, 5, 4).coin().weight == constants[name]
    assert TxIn(Outpoint("11" * 32, 0), witness=(bytes(65),)).weight == constants["p2tr_key_non_default_sighash"]


def test_the_recommended_contribution_is_91_sat_from_output_0() -> None:
    vector = of("build_recommended_1_sat_vb")
    psbt = reference("test_utils_original_psbt")
    sender = make_sent_original(
        psbt,
        PAYEE_78,
        2_000_000,
        min_fee_rate=FeeRate(int(vector["min_fee_rate_sat_per_kwu"])),
        substitution=False,
    )
    assert sender.contribution == FeeContribution(0, int(vector["expected_max_contribution_sat"]))
    assert format_params(sender.params) == (
        "v=2&disableoutputsubstitution=true&additionalfeeoutputindex=0&maxadditionalfeecontribution=91&minfeerate=1"
    )


def test_the_recommended_contribution_is_clamped_to_the_output() -> None:
    psbt = reference("test_utils_original_psbt")
    rate = FeeRate(int(of("build_recommended_clamped")["min_fee_rate_sat_per_vb"]) * 250)
    offer = recommended_contribution(psbt.extract(), psbt.prevouts(), PAYEE_78, rate)
    assert offer == FeeContribution(0, psbt.tx.outputs[0].value)


def test_inputs_of_several_kinds_are_taken_for_taproot() -> None:
    vector = of("build_recommended_multi_input_mixed")
    psbt = reference("test_utils_multiparty_original_psbt_one")
    tx = psbt.extract()
    tx = replace(tx, inputs=tx.inputs[:2])
    payee = address_to_script("bc1qrmzkzmqcgatutq6nyje8t2qs3mf8t3p0qh3kl2", Network.BITCOIN)
    rate = FeeRate(int(vector["min_fee_rate_sat_per_vb"]) * 250)
    # The popped third input leaves one kind of script: the output's value is what clamps.
    prevouts = [txout for txout in map(psbt.prevout, range(2)) if txout is not None]
    offer = recommended_contribution(tx, prevouts, payee, rate)
    assert offer is not None
    assert offer.max == int(vector["expected_max_contribution_sat"])
    mixed = [ALICE, purse(ScriptKind.P2TR, 500_000, 2)]
    sender = sent(mixed, 100_000, rate=1, min_rate=250)
    assert sender.contribution is not None
    assert sender.contribution.max == 58  # ceil(231 x 250 / 1000)


def test_an_explicit_contribution_must_fit_into_the_change() -> None:
    vector = of("insufficient_fee_bound")
    tx = reference("test_utils_original_psbt").extract()
    assert explicit_contribution(tx, PAYEE_78, int(vector["ok_contribution_sat"])).max == int(
        vector["ok_contribution_sat"]
    )
    with pytest.raises(WrongUsage, match="less than the contribution"):
        explicit_contribution(tx, PAYEE_78, int(vector["error_contribution_sat"]))
    with pytest.raises(WrongUsage, match="exactly one change"):
        explicit_contribution(replace(tx, outputs=tx.outputs[1:]), PAYEE_78, 5)


def test_fixed_50_a_contribution_of_zero_is_not_advertised_and_no_dust_is_offered() -> None:
    assert sent([ALICE], 100_000, min_rate=0).contribution is None
    assert sent([ALICE], 100_000, contribute=False).contribution is None
    assert "fee" not in format_params(sent([ALICE], 100_000, min_rate=0).params)
    poor = purse(ScriptKind.P2WPKH, 100_000 + 141 + 300, 5)
    psbt = sign(unsigned([poor], [TxOut(100_000, PAYEE), TxOut(300, CHANGE)]), [poor])
    sender = make_sent_original(psbt, PAYEE, None, min_fee_rate=FeeRate(250))
    assert sender.contribution == FeeContribution(1, 6)
    whole = purse(ScriptKind.P2WPKH, 100_500, 6)
    sweep = original_psbt([whole], change=None)
    assert make_sent_original(sweep, PAYEE, None, min_fee_rate=FeeRate(250)).contribution is None


def test_the_advertised_rate_never_exceeds_the_originals_own() -> None:
    sender = sent([ALICE], 100_000, rate=2, min_rate=10_000)
    assert sender.params.min_fee_rate == FeeRate.of(Psbt.parse(sender.psbt).fee, sender.tx.weight)


# --- what cannot be an Original


@pytest.mark.parametrize(
    ("outputs", "amount", "why"),
    [
        ([TxOut(100_000, CHANGE)], None, "exactly one output, and has 0"),
        ([TxOut(100_000, PAYEE), TxOut(5_000, PAYEE)], None, "exactly one output, and has 2"),
        ([TxOut(100_000, PAYEE)], 99_999, "URI asks for 99999"),
        ([TxOut(3_000_000, PAYEE)], None, "cannot be an Original"),
        ([], None, "cannot be an Original"),
    ],
)
def test_an_original_that_does_not_pay_as_asked_is_refused(outputs: list[TxOut], amount: int | None, why: str) -> None:
    psbt = sign(unsigned([ALICE], outputs), [ALICE])
    with pytest.raises(WrongUsage, match=why):
        make_sent_original(psbt, PAYEE, amount, min_fee_rate=FeeRate(250))


def test_an_original_that_is_not_final_or_too_large_is_refused() -> None:
    with pytest.raises(WrongUsage, match="not signed"):
        make_sent_original(unsigned([ALICE], [TxOut(5, PAYEE)]), PAYEE, None, min_fee_rate=FeeRate(250))
    crowd = [purse(ScriptKind.P2WPKH, 30_000, 100 + n) for n in range(30)]
    with pytest.raises(WrongUsage, match="7055"):
        sent(crowd, 100_000)


@pytest.mark.parametrize("declared", [0x02, 0x03, 0x04, 0x80, 0x81, 0x82, 0x83, 0xFF, 0x100, 0xFFFFFFFF])
def test_fixed_5_declared_sighash_types_other_than_all_or_default_are_refused(declared: int) -> None:
    assert not declared_sighash_is_safe(declared)
    psbt = original_psbt([ALICE])
    with pytest.raises(WrongUsage, match="sighash"):
        make_sent_original(
            replace(psbt, inputs=(replace(psbt.inputs[0], sighash_type=declared),)),
            PAYEE,
            None,
            min_fee_rate=FeeRate(250),
        )
    for allowed in (0, 1):
        fine = replace(psbt, inputs=(replace(psbt.inputs[0], sighash_type=allowed),))
        make_sent_original(fine, PAYEE, None, min_fee_rate=FeeRate(250))


@pytest.mark.parametrize("kind", [k for k in KINDS if k is not ScriptKind.P2PKH])
@pytest.mark.parametrize("actual", [2, 3, 0x81])
def test_upbug_v_actual_signatures_other_than_all_or_default_are_refused(kind: ScriptKind, actual: int) -> None:
    payer = purse(kind, 300_000, 7)
    psbt = sign(unsigned([payer], [TxOut(100_000, PAYEE), TxOut(199_000, CHANGE)]), [payer], actual)
    with pytest.raises(WrongUsage, match="sighash"):
        make_sent_original(psbt, PAYEE, None, min_fee_rate=FeeRate(250))


def test_a_stored_original_that_is_damaged_cannot_be_read() -> None:
    sender = replace(sent([ALICE]), psbt=b"junk")
    with pytest.raises(CannotRead):
        original_body(sender)
    assert "junk" not in repr(sender)


# --- replies


@pytest.mark.parametrize("vector", [v for v in VECTORS if v["kind"] == "error_json"], ids=lambda v: v["json"][:50])
def test_the_references_error_replies_are_understood(vector: dict[str, str]) -> None:
    with pytest.raises(BadReply) as refusal:
        read_reply(vector["json"].encode() + bytes(20))
    expected: dict[str, str] = vector.get("expected", {})  # type: ignore[assignment]
    if expected.get("kind") == "WellKnown":
        assert refusal.value.code == expected["code"]
        if "display" in expected:
            assert str(refusal.value) == expected["display"]
            assert refusal.value.debug == expected["message"]
    elif expected.get("kind") == "Unrecognized":
        assert "random" not in str(refusal.value)
        assert refusal.value.code == "random"


def test_bip78s_error_examples_are_understood() -> None:
    examples = of("bip78_error_json_examples")
    with pytest.raises(BadReply) as refusal:
        read_reply(json.dumps(examples["version_unsupported"]).encode())
    assert (refusal.value.code, refusal.value.supported) == ("version-unsupported", (2, 3, 4))
    with pytest.raises(BadReply) as refusal:
        read_reply(json.dumps(examples["leaking_data"]).encode())
    assert "Key path" not in str(refusal.value)
    assert "Key path" in refusal.value.debug


@pytest.mark.parametrize(
    ("supported", "read"),
    [
        ("[1,2]", (1, 2)),
        ("x", ()),
        ("[" * 9000, ()),
        ("{}", ()),
        ([1, "2", True, -1, 10**9], (1,)),
        (None, ()),
        ([3] * 50, (3,) * 10),
    ],
)
def test_upbug_o_supported_is_read_as_array_and_as_string(supported: object, read: tuple[int, ...]) -> None:
    body = json.dumps({"errorCode": "version-unsupported", "supported": supported}).encode()
    with pytest.raises(BadReply) as refusal:
        read_reply(body)
    assert refusal.value.supported == read


@pytest.mark.parametrize("payload", [b"{}", b"[]", b"5", b'{"errorCode":5}', b"", b"junk", b"[" * 7088, b"\0" * 7088])
def test_any_other_json_and_anything_undecodable_is_refused_without_a_code(payload: bytes) -> None:
    with pytest.raises(BadReply) as refusal:
        read_reply(payload)
    assert refusal.value.code is None


@given(st.binary(max_size=300))
@example(b'{"errorCode": "unavailable"}')
@example(b"1" * 5000)
@settings(max_examples=100, deadline=None)
def test_any_payload_is_a_proposal_or_a_bad_reply(payload: bytes) -> None:
    for data in (payload, b"psbt\xff" + payload):
        try:
            assert isinstance(read_reply(data), Psbt)
        except BadReply:
            continue


def test_message_bs_zero_padding_is_tolerated() -> None:
    psbt = base64.b64decode(BIP78["payjoin_proposal"])
    assert read_reply(psbt + bytes(7088 - len(psbt))) == Psbt.parse(psbt)


# --- the checklist, one failure each


MEETING = Meeting([ALICE, purse(ScriptKind.P2TR, 500_000, 2)], [BOB], rate=2, min_rate=500)
GOOD = Psbt.parse(MEETING.finish().psbt)
OURS = {item.outpoint for item in MEETING.payer}
MINE = [n for n, txin in enumerate(GOOD.tx.inputs) if txin.outpoint in OURS]
THEIRS = next(n for n, txin in enumerate(GOOD.tx.inputs) if txin.outpoint not in OURS)
DERIVATION = ((b"\x02" + bytes(32), bytes(8)),)
TAP_DERIVATION = ((bytes(32), bytes(5)),)


def with_input(index: int, **fields: object) -> Psbt:
    inputs = list(GOOD.inputs)
    inputs[index] = replace(inputs[index], **fields)  # type: ignore[arg-type]
    return replace(GOOD, inputs=tuple(inputs))


def with_txin(index: int, **fields: object) -> Psbt:
    txins = list(GOOD.tx.inputs)
    txins[index] = replace(txins[index], **fields)  # type: ignore[arg-type]
    return replace(GOOD, tx=replace(GOOD.tx, inputs=tuple(txins)))


def with_outputs(*outputs: TxOut) -> Psbt:
    return Psbt(replace(GOOD.tx, outputs=outputs), GOOD.inputs, tuple(PsbtOutput() for _ in outputs))


def without_input(index: int) -> Psbt:
    txins = tuple(t for n, t in enumerate(GOOD.tx.inputs) if n != index)
    maps = tuple(m for n, m in enumerate(GOOD.inputs) if n != index)
    return Psbt(replace(GOOD.tx, inputs=txins), maps, GOOD.outputs)


def swapped() -> Psbt:
    order = list(range(len(GOOD.inputs)))
    a, b = MINE
    order[a], order[b] = b, a
    return Psbt(
        replace(GOOD.tx, inputs=tuple(GOOD.tx.inputs[n] for n in order)),
        tuple(GOOD.inputs[n] for n in order),
        GOOD.outputs,
    )


PAYMENT, OWN = GOOD.tx.outputs


def refuse(psbt: Psbt, why: str, sender: SentOriginal = MEETING.sender) -> None:
    with pytest.raises(BadProposal, match=why):
        check_proposal(sender, psbt)


def test_a_good_proposal_is_safe_to_sign_and_only_our_inputs_are() -> None:
    safe = check_proposal(MEETING.sender, GOOD)
    assert set(safe.ours) == OURS
    assert safe.fee_paid_by_us == MEETING.intent.sender_fee > 0


@pytest.mark.parametrize(
    ("psbt", "why"),
    [
        (replace(GOOD, tx=replace(GOOD.tx, version=1)), "version"),
        (replace(GOOD, tx=replace(GOOD.tx, locktime=5)), "lock time"),
        (without_input(MINE[0]), "missing from the proposal"),
        (with_txin(MINE[0], outpoint=Outpoint("ab" * 32, 0)), "missing from the proposal"),
        (swapped(), "another order"),
        (with_txin(THEIRS, outpoint=ALICE.outpoint), "twice"),
        (with_input(MINE[0], bip32_derivation=DERIVATION), "key paths"),
        (with_input(THEIRS, tap_bip32_derivation=TAP_DERIVATION), "key paths"),
        (with_input(MINE[0], partial_sigs=((b"\x02" + bytes(32), b"s"),)), "partial"),
        (with_input(THEIRS, tap_key_sig=bytes(64)), "partial"),
        (with_input(THEIRS, tap_script_sigs=((bytes(64), bytes(64)),)), "partial"),
        (with_txin(MINE[1], sequence=7), "sequence of our input"),
        (with_input(MINE[0], final_script_sig=b"\x51"), "already finalised"),
        (with_input(MINE[0], final_script_sig=b""), "already finalised"),
        (with_input(MINE[0], final_script_witness=(b"x",)), "already finalised"),
        (with_input(MINE[0], final_script_witness=()), "already finalised"),
        (with_input(MINE[0], sighash_type=0x83), "sighash"),
        (with_input(MINE[0], sighash_type=0x100), "sighash"),
        (with_input(THEIRS, final_script_sig=None, final_script_witness=None), "not signed"),
        (with_input(THEIRS, final_script_sig=b"", final_script_witness=()), "not signed"),
        (with_input(THEIRS, witness_utxo=None), "does not tell"),
        (with_input(THEIRS, non_witness_utxo=ALICE.parent), "inconsistent"),
        (with_txin(THEIRS, sequence=7), "another sequence"),
        (
            replace(GOOD, outputs=(PsbtOutput(bip32_derivation=DERIVATION), PsbtOutput())),
            "output of the proposal tells",
        ),
        (with_outputs(PAYMENT), "outputs of ours are missing"),
        (with_outputs(OWN), "outputs of ours are missing"),
        (with_outputs(PAYMENT, replace(OWN, script=PAYEE)), "outputs of ours are missing"),
        (with_outputs(OWN, PAYMENT), "outputs of ours are missing"),
        (with_outputs(PAYMENT, replace(OWN, value=OWN.value - 500)), "were offered"),
        (
            with_outputs(
                replace(PAYMENT, value=PAYMENT.value + MEETING.intent.our_fee + MEETING.intent.sender_fee + 1), OWN
            ),
            "lowers the fee",
        ),
        (with_outputs(replace(PAYMENT, value=PAYMENT.value + MEETING.intent.our_fee + 1), OWN), "keeps part"),
        (with_outputs(replace(PAYMENT, value=MAX_MONEY), OWN), "more than all bitcoin"),
        (with_input(THEIRS, witness_utxo=TxOut(1, BOB.key.script)), "cannot be computed"),
        (with_input(THEIRS, witness_utxo=TxOut(MAX_MONEY, BOB.key.script)), "more than all bitcoin"),
        (with_input(THEIRS, witness_utxo=TxOut(80_000, b"\x52\x02ab")), "cannot be predicted"),
    ],
)
def test_each_step_of_the_checklist_refuses(psbt: Psbt, why: str) -> None:
    refuse(psbt, why)


def test_the_receiver_cannot_steal_our_change_beyond_the_offer() -> None:
    most = MEETING.sender.params.max_fee_contribution
    assert most is not None
    before = MEETING.sender.tx.outputs[1].value
    refuse(with_outputs(PAYMENT, replace(OWN, value=before - most - 1)), "were offered")


def test_a_contribution_may_not_pay_for_outputs_of_the_receiver() -> None:
    payer = purse(ScriptKind.P2WPKH, 2_000_000, 8)
    sender = sent([payer], 100_000, rate=2, max_contribution=5_000)
    original = clean(sender)
    outputs = (sender.tx.outputs[0], replace(sender.tx.outputs[1], value=sender.tx.outputs[1].value - 5_000))
    greedy = Psbt(replace(original.tx, outputs=outputs), original.inputs, original.outputs)
    refuse(greedy, "pays for more than", sender)


def test_a_fee_rate_below_our_minimum_is_refused_and_at_the_minimum_is_not() -> None:
    payer = purse(ScriptKind.P2WPKH, 2_000_000, 9)
    sender = sent([payer], 100_000, rate=4, min_rate=990, contribute=False)
    base = clean(sender)
    fee = Psbt.parse(sender.psbt).fee
    extra = purse(ScriptKind.P2WPKH, 50_000, 10)

    def adding(more_fee: int) -> Psbt:
        txins = (*base.tx.inputs, TxIn(extra.outpoint, b"", base.tx.inputs[0].sequence))
        outputs = (TxOut(100_000 + 50_000 - more_fee, PAYEE), base.tx.outputs[1])
        psbt = Psbt(replace(base.tx, inputs=txins, outputs=outputs), (*base.inputs, extra.psbt_input), base.outputs)
        return sign(psbt, [extra])

    final = sign(adding(200), [payer]).extract()
    least = -(-990 * final.weight // 1000) - fee
    check_proposal(sender, adding(least + 1))
    with pytest.raises(BadProposal, match="pays less than"):
        check_proposal(sender, adding(least - 2))


def test_an_output_of_ours_that_is_not_the_fee_output_may_not_shrink_but_may_grow() -> None:
    payer = purse(ScriptKind.P2WPKH, 2_000_000, 11)
    sender = sent([payer], 100_000, contribute=False)
    original = clean(sender)
    pay, change = original.tx.outputs

    def changed(*outputs: TxOut) -> Psbt:
        return Psbt(replace(original.tx, outputs=outputs), original.inputs, tuple(PsbtOutput() for _ in outputs))

    with pytest.raises(BadProposal, match="lowers our output 1"):
        check_proposal(sender, changed(pay, replace(change, value=change.value - 1)))
    assert check_proposal(sender, changed(replace(pay, value=pay.value - 50), replace(change, value=change.value + 50)))


def test_a_receiver_that_adds_nothing_is_accepted() -> None:
    sender = sent([ALICE], 100_000)
    safe = check_proposal(sender, clean(sender))
    assert safe.txid == sender.tx.txid
    assert safe.fee_paid_by_us == 0


@pytest.mark.parametrize(
    ("allowed", "script", "delta", "accepted"),
    [
        (True, PAYEE, -500, True),
        (True, OUR_CHANGE, 0, True),
        (False, PAYEE, 0, True),
        (False, PAYEE, 1, True),
        (False, PAYEE, -1, False),
        (False, OUR_CHANGE, 0, False),
    ],
)
def test_fixed_6_output_substitution_is_what_we_allowed(
    allowed: bool, script: bytes, delta: int, accepted: bool
) -> None:
    payer = purse(ScriptKind.P2WPKH, 2_000_000, 12)
    sender = sent([payer], 100_000, rate=4, substitution=allowed, contribute=False, min_rate=250)
    extra = purse(ScriptKind.P2WPKH, 50_000, 13)
    base = clean(sender)
    txins = (*base.tx.inputs, TxIn(extra.outpoint, b"", base.tx.inputs[0].sequence))
    outputs = (TxOut(100_000 + delta, script), base.tx.outputs[1])
    proposal = sign(
        Psbt(replace(base.tx, inputs=txins, outputs=outputs), (*base.inputs, extra.psbt_input), base.outputs), [extra]
    )
    if accepted:
        assert isinstance(check_proposal(sender, proposal), SafeToSign)
    else:
        with pytest.raises(BadProposal, match="did not allow"):
            check_proposal(sender, proposal)


def test_upbug_f_with_substitution_disabled_an_output_before_the_payees_is_refused_and_after_it_is_not() -> None:
    payer = purse(ScriptKind.P2WPKH, 2_000_000, 14)
    sender = sent([payer], 100_000, rate=4, substitution=False, contribute=False)
    extra = purse(ScriptKind.P2WPKH, 50_000, 15)
    base = clean(sender)
    txins = (*base.tx.inputs, TxIn(extra.outpoint, b"", base.tx.inputs[0].sequence))

    def ordered(*outputs: TxOut) -> Psbt:
        maps = tuple(PsbtOutput() for _ in outputs)
        psbt = Psbt(replace(base.tx, inputs=txins, outputs=outputs), (*base.inputs, extra.psbt_input), maps)
        return sign(psbt, [extra])

    pay, change = base.tx.outputs
    more = TxOut(40_000, OUR_CHANGE)
    refuse(ordered(more, pay, change), "did not allow", sender)
    assert check_proposal(sender, ordered(pay, more, change))
    assert check_proposal(sender, ordered(pay, change, more))


# --- after signing


def signed_by_us(safe: SafeToSign) -> Psbt:
    return sign(safe.psbt, MEETING.payer)


def test_the_signed_transaction_is_final_and_ours_to_broadcast() -> None:
    safe = check_proposal(MEETING.sender, GOOD)
    tx = check_signed(MEETING.sender, safe, signed_by_us(safe).serialize())
    assert tx.txid == safe.txid
    assert all(txin.witness for txin in tx.inputs)


def test_a_wallet_that_changes_or_leaves_something_is_caught() -> None:
    safe = check_proposal(MEETING.sender, GOOD)
    signed = signed_by_us(safe)
    with pytest.raises(NotNow, match="did not sign"):
        check_signed(MEETING.sender, safe, safe.psbt.serialize())
    with pytest.raises(OurMistake, match="another transaction"):
        check_signed(MEETING.sender, safe, replace(signed, tx=replace(signed.tx, locktime=9)).serialize())
    with pytest.raises(OurMistake, match="something else"):
        check_signed(MEETING.sender, safe, b"")
    with pytest.raises(OurMistake, match="whole transaction"):
        check_signed(MEETING.sender, safe, sign(safe.psbt, MEETING.payer, 0x81).serialize())
    odd = tuple(replace(m, final_script_sig=b"\x51") if m.is_final else m for m in signed.inputs)
    with pytest.raises(OurMistake, match="transaction id"):
        check_signed(MEETING.sender, safe, replace(signed, inputs=odd).serialize())


def test_the_receivers_signatures_are_those_of_the_proposal_whatever_the_wallet_returns() -> None:
    safe = check_proposal(MEETING.sender, GOOD)
    signed = signed_by_us(safe)
    maps = list(signed.inputs)
    maps[THEIRS] = replace(maps[THEIRS], final_script_witness=(b"other",))
    tx = check_signed(MEETING.sender, safe, replace(signed, inputs=tuple(maps)).serialize())
    assert tx.inputs[THEIRS].witness == GOOD.inputs[THEIRS].final_script_witness


def test_the_real_fee_rate_is_checked_again_after_signing() -> None:
    safe = check_proposal(MEETING.sender, GOOD)
    signed = signed_by_us(safe)
    fat = tuple(
        replace(m, final_script_witness=(*(m.final_script_witness or ()), bytes(900))) if n == MINE[0] else m
        for n, m in enumerate(signed.inputs)
    )
    with pytest.raises(BadProposal, match="signed proposal pays less"):
        check_signed(MEETING.sender, safe, replace(signed, inputs=fat).serialize())


def test_monitor_of_a_legacy_payer_knows_that_the_id_is_not_known() -> None:
    pair = of("monitor_p2pkh_pair")
    original = Psbt.from_base64(pair["original_psbt"])
    payee = original.tx.outputs[0].script
    sender = make_sent_original(original, payee, None, min_fee_rate=FeeRate(0), contribute=False)
    safe = check_proposal(sender, Psbt.from_base64(pair["payjoin_proposal"]))
    assert not safe.txid_is_stable


@pytest.mark.parametrize("kind", KINDS)
def test_a_reclaim_replaces_the_original_and_comes_back_to_us(kind: ScriptKind) -> None:
    payer = purse(kind, 2_000_000, 16)
    sender = sent([payer], 100_000)
    fee = Psbt.parse(sender.psbt).fee
    psbt = build_reclaim(sender, CHANGE, FeeRate(250))
    tx = sign(psbt, [payer]).extract()
    assert psbt.fee >= fee + FeeRate(250).fee(tx.weight) - 2
    assert tx.outputs == (TxOut(2_000_000 - psbt.fee, CHANGE),)
    assert not psbt.inputs[0].has_signature
    with pytest.raises(WrongUsage, match="dust"):
        build_reclaim(sender, CHANGE, FeeRate(10_000_000))


def test_script_pushes_reads_only_pushes() -> None:
    assert script_pushes(b"\x02ab\x4c\x01c\x4d\x01\x00d\x00\x4f\x51") == (b"ab", b"c", b"d", b"", b"\x81", b"\x01")
    assert script_pushes(b"\x05ab") is None
    assert script_pushes(b"\x76") is None


def test_a_psbt_that_was_never_wallet_signed_keeps_its_scripts_in_the_copy() -> None:
    bare = build_psbt(Tx(2, 0, (TxIn(ALICE.outpoint),), (TxOut(5, PAYEE),)), {ALICE.outpoint: ALICE.txout})
    bare = replace(bare, inputs=(replace(bare.inputs[0], redeem_script=b"\x51", witness_script=b"\x52"),))
    assert clean_original(bare) == bare
    assert Params().version == 2
