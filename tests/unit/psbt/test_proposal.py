"""The proposal: what is drafted, what the wallet may do to it, what leaves, and the transactions that need nobody."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import product

import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from pjv2.errors import BadProposal, CannotRead, NotNow, OurMistake, ReplyCode, WrongUsage
from pjv2.psbt.original import CheckedOriginal
from pjv2.psbt.plan import (
    MAX_REPLY_BYTES,
    CannotPropose,
    ChannelPlan,
    Intent,
    OutputRole,
    choose_coins,
    make_intent,
)
from pjv2.psbt.proposal import (
    PayjoinProposal,
    ProvisionalProposal,
    build_child,
    build_way_out,
    draft_proposal,
    finish_proposal,
    reply_payload_error,
    restore_proposal,
)
from pjv2.psbt.scripts import p2wsh_script
from pjv2.psbt.tx import Psbt, PsbtInput, PsbtOutput, ScriptKind, TxIn, TxOut
from pjv2.psbt.verify import SentOriginal, check_proposal, check_signed, read_reply
from pjv2.units import FeeRate, Outpoint
from tests.unit.psbt.payjoin_kit import (
    CHANGE,
    KINDS,
    NATIVE,
    OUR_CHANGE,
    PAYEE,
    Dice,
    Key,
    Purse,
    purse,
    received,
    sent,
    sign,
    terms,
)
from tests.unit.psbt.test_plan import SCRIPTS, order

FUNDING = [p2wsh_script(bytes([n])) for n in range(40)]


class Meeting:
    """A payer and a payee who agreed on an Original, as far as a draft."""

    def __init__(
        self,
        payer: list[Purse],
        own: list[Purse],
        *,
        pays: int = 1_000_000,
        plan: ChannelPlan | None = None,
        substitute: bytes | None = None,
        seed: int = 0,
        limits: dict[str, object] | None = None,
        **how: object,
    ) -> None:
        self.payer, self.own = payer, own
        self.sender: SentOriginal = sent(payer, pays, **how)  # type: ignore[arg-type]
        payee = how.get("payee", PAYEE)
        self.checked: CheckedOriginal = received(
            self.sender,
            payer,
            terms(payee, pays, **(limits or {})),  # type: ignore[arg-type]
        )
        coins = [item.coin() for item in own]
        self.intent: Intent = make_intent(self.checked, plan, coins, SCRIPTS, substitute=substitute)
        funding = FUNDING[: len(self.intent.orders)]
        self.draft: ProvisionalProposal = draft_proposal(self.checked, self.intent, funding, Dice(seed))

    def signed(self) -> bytes:
        return sign(self.draft.psbt, self.own).serialize()

    def finish(self) -> PayjoinProposal:
        return finish_proposal(self.draft, self.signed())


ALICE = purse(ScriptKind.P2WPKH, 2_000_000, 1)
BOB = purse(ScriptKind.P2WPKH, 80_000, 50)


def fee_of(tx_inputs: list[Purse], outputs: tuple[TxOut, ...]) -> int:
    return sum(item.value for item in tx_inputs) - sum(txout.value for txout in outputs)


@pytest.mark.parametrize(("theirs", "ours"), list(product(KINDS, KINDS)))
@pytest.mark.parametrize("substitution", [True, False])
def test_every_proposal_of_ours_passes_the_senders_check_whatever_the_scripts(
    theirs: ScriptKind, ours: ScriptKind, substitution: bool
) -> None:
    meeting = Meeting(
        [purse(theirs, 2_000_000, 2)], [purse(ours, 90_000, 51)], substitution=substitution, rate=3, min_rate=750
    )
    proposal = meeting.finish()
    assert len(proposal.psbt) <= meeting.intent.reply_bytes <= MAX_REPLY_BYTES
    safe = check_proposal(meeting.sender, read_reply(proposal.psbt + bytes(7088 - len(proposal.psbt))))
    tx = check_signed(meeting.sender, safe, sign(safe.psbt, meeting.payer).serialize())
    assert fee_of([*meeting.payer, *meeting.own], tx.outputs) == safe.fee
    assert safe.fee == meeting.checked.fee + meeting.intent.our_fee + meeting.intent.sender_fee
    assert safe.fee_paid_by_us == meeting.intent.sender_fee
    assert safe.txid_is_stable is meeting.draft.txid_is_stable is (theirs in NATIVE and ours in NATIVE)
    if safe.txid_is_stable or theirs is not ScriptKind.P2PKH:
        # UPBUG c: a nested input's scriptSig is known before it is signed, and belongs to the id.
        assert tx.txid == proposal.txid == safe.txid
    assert {txin.sequence for txin in tx.inputs} == {meeting.checked.sequence}


def test_the_draft_to_sign_holds_no_signature_of_the_payer() -> None:
    meeting = Meeting([ALICE], [BOB])
    assert not any(psbt_input.has_signature for psbt_input in meeting.draft.psbt.inputs)
    assert not any(psbt_input.has_derivation for psbt_input in meeting.draft.psbt.inputs)
    assert all(psbt_output == PsbtOutput() for psbt_output in meeting.draft.psbt.outputs)
    assert meeting.draft.psbt.prevouts()
    nested = Meeting([ALICE], [purse(ScriptKind.P2SH, 90_000, 52)])
    ours = next(i for i in nested.draft.psbt.inputs if i.redeem_script)
    assert ours.redeem_script == nested.own[0].key.redeem_script


def test_inputs_land_everywhere_and_the_payers_keep_their_order() -> None:
    payers = [purse(ScriptKind.P2WPKH, 700_000, n) for n in (1, 2, 3)]
    seen = set()
    for seed in range(40):
        meeting = Meeting(payers, [BOB], seed=seed)
        points = [txin.outpoint for txin in meeting.draft.psbt.tx.inputs]
        assert [point for point in points if point != BOB.outpoint] == [item.outpoint for item in payers]
        seen.add(points.index(BOB.outpoint))
    assert seen == {0, 1, 2, 3}


def test_several_coins_are_contributed_in_one_call_and_lose_nothing() -> None:
    coins = [purse(kind, 50_000 + n, 60 + n) for n, kind in enumerate((*KINDS, *KINDS))]
    meeting = Meeting([ALICE], coins)
    payment = next(txout for txout in meeting.draft.psbt.tx.outputs if txout.script == PAYEE)
    assert payment.value == 1_000_000 + sum(coin.value for coin in coins) - meeting.intent.our_fee
    check_proposal(meeting.sender, Psbt.parse(meeting.finish().psbt))


def test_the_reference_property_of_interleaving_holds_for_outputs() -> None:
    plan = ChannelPlan((order(300_000), order(300_000, 1), order(None, 2)), reserve=20_000)
    positions: set[tuple[int, ...]] = set()
    for seed in range(60):
        meeting = Meeting([ALICE], [BOB], plan=plan, seed=seed)
        outputs = meeting.draft.psbt.tx.outputs
        assert len(outputs) == 6
        positions.add(tuple(item.vout for item in meeting.draft.funding))
        assert sum(txout.script == CHANGE for txout in outputs) == 1
        check_proposal(meeting.sender, Psbt.parse(meeting.finish().psbt))
    assert len(positions) > 20


@pytest.mark.parametrize("change_first", [True, False])
@pytest.mark.parametrize("seed", range(6))
def test_channel_proposals_are_accepted_wherever_the_payment_stood(change_first: bool, seed: int) -> None:
    plan = ChannelPlan((order(600_000), order(None, 1)), reserve=20_000)
    meeting = Meeting([ALICE], [BOB], plan=plan, seed=seed, change_first=change_first)
    proposal = meeting.finish()
    safe = check_proposal(meeting.sender, Psbt.parse(proposal.psbt))
    assert safe.txid == meeting.draft.txid == proposal.txid
    for item in meeting.draft.funding:
        assert meeting.draft.psbt.tx.outputs[item.vout] == TxOut(item.value, item.script)
        assert item.value == meeting.intent.orders[item.channel].capacity
    vout = meeting.draft.change_vout
    assert vout is not None
    assert meeting.draft.psbt.tx.outputs[vout].script == OUR_CHANGE
    assert len(proposal.psbt) <= meeting.intent.reply_bytes


def test_upbug_f_with_substitution_disabled_no_output_is_added_or_moved() -> None:
    for seed in range(10):
        meeting = Meeting([ALICE], [BOB], substitution=False, seed=seed)
        scripts = [txout.script for txout in meeting.draft.psbt.tx.outputs]
        assert scripts == [txout.script for txout in meeting.sender.tx.outputs]
    forged = replace(meeting.intent, outputs=(*meeting.intent.outputs, *meeting.intent.outputs))
    with pytest.raises(OurMistake, match="does not allow"):
        draft_proposal(meeting.checked, forged, [], Dice())


def test_fixed_52_the_fee_output_is_found_by_its_index_not_by_its_script() -> None:
    plan = ChannelPlan((order(None),))
    meeting = Meeting([ALICE], [BOB], plan=plan)
    own_change = next(o for o in meeting.intent.outputs if o.role is OutputRole.CHANGE)
    twin = replace(meeting.intent, outputs=(meeting.intent.outputs[0], replace(own_change, script=CHANGE)))
    draft = draft_proposal(meeting.checked, twin, FUNDING[:1], Dice())
    values = sorted(txout.value for txout in draft.psbt.tx.outputs if txout.script == CHANGE)
    assert values == sorted([own_change.value, meeting.sender.tx.outputs[1].value - twin.sender_fee])


def test_a_draft_that_does_not_add_up_is_our_mistake() -> None:
    meeting = Meeting([ALICE], [BOB])
    with pytest.raises(OurMistake, match="fee"):
        draft_proposal(meeting.checked, replace(meeting.intent, our_fee=1), [], Dice())
    with pytest.raises(OurMistake, match="funding scripts"):
        draft_proposal(meeting.checked, meeting.intent, FUNDING[:1], Dice())
    channels = Meeting([ALICE], [BOB], plan=ChannelPlan((order(None),)))
    with pytest.raises(OurMistake, match="34 bytes"):
        draft_proposal(channels.checked, channels.intent, [CHANGE], Dice())
    with pytest.raises(OurMistake, match="twice"):
        draft_proposal(meeting.checked, replace(meeting.intent, coins=(ALICE.coin(),)), [], Dice())


def test_funding_scripts_may_be_taproot_and_the_reply_is_no_larger_than_planned() -> None:
    plan = ChannelPlan((order(None),))
    meeting = Meeting([ALICE], [purse(ScriptKind.P2TR, 90_000, 55)], plan=plan)
    draft = draft_proposal(meeting.checked, meeting.intent, [Key(77, ScriptKind.P2TR).script], Dice())
    signed = sign(draft.psbt, meeting.own).serialize()
    assert len(finish_proposal(draft, signed).psbt) == meeting.intent.reply_bytes


# --- from the log


@pytest.mark.parametrize("plan", [None, ChannelPlan((order(500_000), order(None, 1)), reserve=9_000)])
def test_fixed_1_a_restored_proposal_is_the_drafted_one_with_its_change(plan: ChannelPlan | None) -> None:
    for seed in range(5):
        meeting = Meeting([ALICE], [BOB], plan=plan, seed=seed)
        stored = meeting.draft.psbt.serialize()
        assert restore_proposal(meeting.checked, meeting.intent, stored, meeting.draft.funding) == meeting.draft


def test_fixed_15_a_log_whose_parts_do_not_belong_together_cannot_be_read() -> None:
    plan = ChannelPlan((order(500_000), order(None, 1)))
    meeting = Meeting([ALICE], [BOB], plan=plan)
    stored, funding = meeting.draft.psbt, meeting.draft.funding
    other = Meeting([ALICE], [purse(ScriptKind.P2WPKH, 81_000, 56)], plan=plan)
    tx = stored.tx
    swapped = replace(tx, outputs=(replace(tx.outputs[0], value=1), *tx.outputs[1:]))
    shuffled = replace(tx, outputs=tx.outputs[:-1])
    bad: list[tuple[bytes, object]] = [
        (b"junk", funding),
        (stored.serialize(), funding[:1]),
        (stored.serialize(), (replace(funding[0], vout=9), funding[1])),
        (other.draft.psbt.serialize(), funding),
        (Psbt(swapped, stored.inputs, stored.outputs).serialize(), funding),
        (Psbt(shuffled, stored.inputs, stored.outputs[:-1]).serialize(), funding),
    ]
    for psbt, items in bad:
        with pytest.raises(CannotRead):
            restore_proposal(meeting.checked, meeting.intent, psbt, items)  # type: ignore[arg-type]
    with pytest.raises(CannotRead):
        restore_proposal(meeting.checked, replace(meeting.intent, our_fee=3), stored.serialize(), funding)


# --- what the wallet hands back


def test_fixed_9_another_transaction_from_the_wallet_is_refused() -> None:
    meeting = Meeting([ALICE], [BOB])
    signed = Psbt.parse(meeting.signed())
    changed = replace(signed, tx=replace(signed.tx, locktime=7))
    with pytest.raises(OurMistake, match="another transaction"):
        finish_proposal(meeting.draft, changed.serialize())
    with pytest.raises(OurMistake, match="something else"):
        finish_proposal(meeting.draft, b"no psbt")


@pytest.mark.parametrize(
    "material",
    [
        {"final_script_sig": b"\x51"},
        {"final_script_sig": b""},
        {"final_script_witness": (b"x",)},
        {"partial_sigs": ((b"\x02" + bytes(32), b"sig"),)},
        {"tap_key_sig": bytes(64)},
        {"tap_script_sigs": ((bytes(64), bytes(64)),)},
    ],
)
def test_fixed_3_any_signature_on_a_payers_input_is_refused(material: dict[str, object]) -> None:
    meeting = Meeting([ALICE], [BOB])
    signed = Psbt.parse(meeting.signed())
    inputs = tuple(
        replace(i, **material) if txin.outpoint == ALICE.outpoint else i  # type: ignore[arg-type]
        for txin, i in zip(signed.tx.inputs, signed.inputs, strict=True)
    )
    with pytest.raises(OurMistake, match="payer's"):
        finish_proposal(meeting.draft, replace(signed, inputs=inputs).serialize())


def test_an_unsigned_coin_of_ours_is_not_now_and_another_sighash_type_is_our_mistake() -> None:
    meeting = Meeting([ALICE], [BOB])
    with pytest.raises(NotNow, match="did not sign"):
        finish_proposal(meeting.draft, meeting.draft.psbt.serialize())
    with pytest.raises(OurMistake, match="SIGHASH_ALL"):
        finish_proposal(meeting.draft, sign(meeting.draft.psbt, [BOB], 0x81).serialize())


def test_fixed_39_what_leaves_is_copied_from_an_allow_list() -> None:
    meeting = Meeting([ALICE], [purse(ScriptKind.P2SH, 90_000, 57)])
    signed = Psbt.parse(meeting.signed())
    leaky_input = {
        "bip32_derivation": ((b"\x02" + bytes(32), bytes(8)),),
        "tap_internal_key": bytes(32),
        "redeem_script": b"\x51",
        "proprietary": ((b"\xfc\x01ax", b"y"),),
        "unknown": ((b"\x50", b"z"),),
        "sighash_type": 1,
    }
    leaky = Psbt(
        signed.tx,
        tuple(replace(i, **leaky_input) for i in signed.inputs),  # type: ignore[arg-type]
        tuple(PsbtOutput(bip32_derivation=((b"\x02" + bytes(32), bytes(8)),)) for _ in signed.outputs),
        proprietary=((b"\xfc\x01ax", b"y"),),
    )
    cleaned = Psbt.parse(finish_proposal(meeting.draft, leaky.serialize()).psbt)
    assert cleaned.outputs == tuple(PsbtOutput() for _ in cleaned.outputs)
    assert (cleaned.proprietary, cleaned.unknown, cleaned.xpubs) == ((), (), ())
    for psbt_input in cleaned.inputs:
        kept = PsbtInput(
            witness_utxo=psbt_input.witness_utxo,
            final_script_sig=psbt_input.final_script_sig,
            final_script_witness=psbt_input.final_script_witness,
        )
        assert psbt_input == kept


def test_a_reply_that_outgrew_the_plan_is_our_mistake() -> None:
    crowd = [purse(ScriptKind.P2WPKH, 400_000, 100 + n) for n in range(3)]
    wsh = purse(ScriptKind.P2WSH, 90_000, 58)
    meeting = Meeting(crowd, [wsh])
    signed = Psbt.parse(meeting.signed())
    fat = tuple(
        replace(i, final_script_witness=(*(i.final_script_witness or ()), bytes(7000))) if i.is_final else i
        for i in signed.inputs
    )
    with pytest.raises(OurMistake, match="message B"):
        finish_proposal(meeting.draft, replace(signed, inputs=fat).serialize())


def test_a_script_sig_on_a_native_coin_changes_the_id_and_is_our_mistake() -> None:
    meeting = Meeting([ALICE], [BOB])
    signed = Psbt.parse(meeting.signed())
    odd = tuple(replace(i, final_script_sig=b"\x51") if i.is_final else i for i in signed.inputs)
    with pytest.raises(OurMistake, match="transaction id"):
        finish_proposal(meeting.draft, replace(signed, inputs=odd).serialize())


def test_a_provisional_proposal_without_script_sigs_finishes_too() -> None:
    meeting = Meeting([ALICE], [BOB])
    assert finish_proposal(replace(meeting.draft, script_sigs=()), meeting.signed()) == meeting.finish()


# --- what needs nobody


@pytest.mark.parametrize("kind", KINDS)
def test_the_way_out_pays_its_rate_and_more_than_what_it_replaces(kind: ScriptKind) -> None:
    own = [purse(kind, 90_000, 61), purse(ScriptKind.P2WPKH, 50_000, 62)]
    psbt = build_way_out([item.coin() for item in own], OUR_CHANGE, FeeRate(1000))
    tx = sign(psbt, own).extract()
    assert psbt.fee >= FeeRate(1000).fee(tx.weight)
    assert psbt.fee - FeeRate(1000).fee(tx.weight) <= 20
    above = build_way_out([item.coin() for item in own], OUR_CHANGE, FeeRate(250), above=5_000)
    assert above.fee >= 5_000 + FeeRate(250).fee(tx.weight)
    alone = build_way_out([own[0].coin()], OUR_CHANGE, FeeRate(1000))
    assert alone.fee >= FeeRate(1000).fee(sign(alone, own).extract().weight)


def test_a_way_out_that_would_leave_dust_or_has_no_coin_is_refused() -> None:
    with pytest.raises(WrongUsage, match="dust"):
        build_way_out([BOB.coin()], OUR_CHANGE, FeeRate(250), above=79_900)
    with pytest.raises(WrongUsage, match="no coin"):
        build_way_out([], OUR_CHANGE, FeeRate(250))


@pytest.mark.parametrize("kind", [ScriptKind.P2WPKH, ScriptKind.P2TR, ScriptKind.P2SH, ScriptKind.P2PKH])
def test_a_child_lifts_its_package_to_the_target(kind: ScriptKind) -> None:
    own = purse(kind, 90_000, 63)
    target = FeeRate(2500)
    child = build_child(own.parent, 0, own.txout, CHANGE, target, 500, 600, redeem_script=own.key.redeem_script)
    tx = sign(child, [own]).extract()
    assert (500 + child.fee) * 1000 >= target.sat_per_kwu * (600 + tx.weight)
    assert Psbt.parse(child.serialize()) == child
    rich = build_child(own.parent, 0, own.txout, CHANGE, FeeRate(1), 50_000, 600, redeem_script=own.key.redeem_script)
    assert rich.fee >= FeeRate(250).fee(tx.weight)


def test_a_child_of_the_wrong_or_a_poor_output_is_refused() -> None:
    for vout, txout in ((1, BOB.txout), (0, TxOut(1, CHANGE))):
        with pytest.raises(WrongUsage, match="not the one"):
            build_child(BOB.parent, vout, txout, CHANGE, FeeRate(250), 0, 400)
    with pytest.raises(WrongUsage, match="too little"):
        build_child(BOB.parent, 0, BOB.txout, CHANGE, FeeRate(2_500_000), 0, 400)


# --- refusals


def test_upbug_o_supported_is_a_real_array() -> None:
    reply = json.loads(reply_payload_error(ReplyCode.VERSION_UNSUPPORTED))
    assert reply["supported"] == [1, 2]
    assert "supported" not in json.loads(reply_payload_error(ReplyCode.UNAVAILABLE))


@pytest.mark.parametrize("code", list(ReplyCode))
def test_error_replies_are_compact_json_that_a_sender_understands(code: ReplyCode) -> None:
    payload = reply_payload_error(code)
    assert b" :" not in payload
    assert json.loads(payload)["errorCode"] == code.value
    with pytest.raises(BadProposal) as refusal:
        read_reply(payload + bytes(100))
    assert refusal.value.code == code.value  # type: ignore[attr-defined]
    assert json.loads(reply_payload_error(code, "other words"))["message"] == "other words"


# --- properties


@st.composite
def meetings(draw: st.DrawFn) -> dict[str, object]:
    payers = [
        purse(draw(st.sampled_from(KINDS)), draw(st.integers(600_000, 3_000_000)), 10 + n)
        for n in range(draw(st.integers(1, 3)))
    ]
    own = [
        purse(draw(st.sampled_from(KINDS)), draw(st.integers(2_000, 4_000_000)), 40 + n)
        for n in range(draw(st.integers(1, 3)))
    ]
    substitution = draw(st.booleans())
    rate = draw(st.integers(1, 60))
    how: dict[str, object] = {
        "payer": payers,
        "own": own,
        "pays": draw(st.integers(30_000, 500_000)),
        "substitution": substitution,
        "contribute": draw(st.booleans()),
        "rate": rate,
        "min_rate": draw(st.integers(0, rate * 250)),
        "change_first": draw(st.booleans()),
        "payee": Key(9009, draw(st.sampled_from(KINDS))).script,
        "change": Key(9010, draw(st.sampled_from(KINDS))).script,
        "seed": draw(st.integers(0, 1000)),
        "limits": {
            "max_fee_rate": FeeRate(draw(st.integers(250, 20_000))),
            "max_fee_share_ppm": draw(st.integers(100, 300_000)),
        },
    }
    if substitution and draw(st.booleans()):
        how["substitute"] = Key(9011, draw(st.sampled_from(KINDS))).script
    native = all(item.key.kind in NATIVE for item in (*payers, *own))
    if substitution and native and draw(st.booleans()):
        how.pop("substitute", None)
        fixed = draw(st.lists(st.integers(20_000, 60_000), min_size=0, max_size=2))
        orders = [order(value, n) for n, value in enumerate(fixed)]
        if draw(st.booleans()) or not orders:
            orders.append(order(None, 9))
        how["plan"] = ChannelPlan(
            tuple(orders),
            deposit=draw(st.booleans()),
            reserve=draw(st.sampled_from([0, 1_000])),
            top_up=draw(st.booleans()),
        )
    return how


@given(meetings())
@settings(max_examples=70, deadline=None, suppress_health_check=list(HealthCheck))
def test_every_draft_conserves_satoshis_keeps_the_caps_and_is_accepted(how: dict[str, object]) -> None:
    try:
        meeting = Meeting(**how)  # type: ignore[arg-type]
    except CannotPropose:
        assume(False)
    checked, intent, sender = meeting.checked, meeting.intent, meeting.sender
    proposal = meeting.finish()
    limits = checked.terms
    fee = fee_of([*meeting.payer, *meeting.own], proposal.tx.outputs)
    assert fee == checked.fee + intent.our_fee + intent.sender_fee
    assert intent.rate <= limits.max_fee_rate
    assert intent.our_fee <= checked.paid * limits.max_fee_share_ppm // 1_000_000
    assert intent.sender_fee <= (sender.params.max_fee_contribution or 0)
    safe = check_proposal(sender, Psbt.parse(proposal.psbt))
    assert safe.fee == fee
    tx = check_signed(sender, safe, sign(safe.psbt, meeting.payer).serialize())
    assert fee_of([*meeting.payer, *meeting.own], tx.outputs) == fee
    spent_on_extra = limits.max_fee_rate.fee(tx.weight - checked.tx.weight + 200)
    assert intent.our_fee <= spent_on_extra + 2
    assert all(txin.witness or txin.script_sig for txin in tx.inputs)
    assert restore_proposal(checked, intent, meeting.draft.psbt.serialize(), meeting.draft.funding) == meeting.draft
    assert len(proposal.psbt) <= intent.reply_bytes <= MAX_REPLY_BYTES


@given(st.integers(0, 10**6), st.sampled_from(KINDS))
@settings(max_examples=25, deadline=None)
def test_a_chosen_coin_always_makes_an_intent(seed: int, kind: ScriptKind) -> None:
    dice = Dice(seed)
    payer = [purse(ScriptKind.P2WPKH, 2_000_000, 1)]
    checked = received(sent(payer, 100_000), payer)
    pool = [purse(kind, 1_000 + dice.below(300_000), 200 + n).coin() for n in range(4)]
    for plan in (None, ChannelPlan((order(None),))):
        chosen = choose_coins(checked, pool, plan=plan, rng=dice)
        if chosen:
            assert make_intent(checked, plan, chosen, SCRIPTS).coins == chosen


def test_an_input_that_is_not_ours_to_place_has_a_name() -> None:
    assert TxIn(Outpoint("11" * 32, 0)).weight == 164
