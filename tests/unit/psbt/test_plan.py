"""Plans, fees and coins: every satoshi accounted for, every cap kept, every refusal with its reason."""

from __future__ import annotations

from dataclasses import replace

import pytest

from pjv2.errors import ReplyCode, WrongUsage
from pjv2.psbt.coin import Coin, input_weight
from pjv2.psbt.original import CheckedOriginal, FeeContribution
from pjv2.psbt.plan import (
    MAX_REPLY_BYTES,
    CannotPropose,
    ChannelOrder,
    ChannelPlan,
    Intent,
    OutputRole,
    ReceiverScripts,
    change_floor,
    check_plan,
    choose_coins,
    format_channel_order,
    make_intent,
    parse_channel_order,
    replan,
    uih_level,
)
from pjv2.psbt.tx import ScriptKind, TxOut, dust_limit
from pjv2.units import FeeRate, Outpoint
from tests.unit.psbt.payjoin_kit import (
    CHANGE,
    DEPOSIT,
    OUR_CHANGE,
    PAYEE,
    RESERVE,
    Dice,
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
from tests.unit.psbt.test_original import judged

PEERS = ["02" + f"{n:064x}" for n in range(1, 99)]
ALICE = purse(ScriptKind.P2WPKH, 2_000_000, 1)
BOB = purse(ScriptKind.P2WPKH, 80_000, 50)
SCRIPTS = ReceiverScripts(OUR_CHANGE, DEPOSIT, RESERVE)


def paid(pays: int = 1_000_000, payer: Purse = ALICE, **how: object) -> CheckedOriginal:
    their_terms = how.pop("terms", None) or terms(amount=pays)
    return received(sent([payer], pays, **how), [payer], their_terms)  # type: ignore[arg-type]


def order(capacity: int | None, n: int = 0, **more: object) -> ChannelOrder:
    return ChannelOrder(PEERS[n], "node.example:9735", capacity, **more)  # type: ignore[arg-type]


def roles(intent: Intent) -> dict[OutputRole, int]:
    return {output.role: output.value for output in intent.outputs}


def conserved(checked: CheckedOriginal, intent: Intent) -> bool:
    added = sum(coin.txout.value for coin in intent.coins)
    return (
        checked.paid + added + intent.sender_fee
        == sum(o.value for o in intent.outputs) + intent.our_fee + intent.sender_fee
    )


# --- channel orders and plans


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (f"{PEERS[0]}@node.example:9735=1_000_000", order(1_000_000)),
        (f"{PEERS[0].upper()}@node.example:9735=rest", order(None)),
        (
            f"{PEERS[0]}@[::1]:9735=50000,private,push=7,type=anchors,min=30_000",
            ChannelOrder(PEERS[0], "[::1]:9735", 50_000, True, 7, "anchors", 30_000),
        ),
    ],
)
def test_channel_orders_are_read_and_written(text: str, expected: ChannelOrder) -> None:
    assert parse_channel_order(text) == expected
    assert parse_channel_order(format_channel_order(expected)) == expected


@pytest.mark.parametrize(
    "text",
    [
        "",
        "nobody",
        f"{PEERS[0]}=5",
        f"{PEERS[0]}@host:9735",
        f"{PEERS[0]}@host=50000",
        f"{PEERS[0]}@host:0=50000",
        f"{PEERS[0]}@host:99999=50000",
        f"{PEERS[0][2:]}@host:9735=50000",
        f"{PEERS[0]}@host:9735=much",
        f"{PEERS[0]}@host:9735=19999",
        f"{PEERS[0]}@host:9735=50000,public",
        f"{PEERS[0]}@host:9735=50000,private=1",
        f"{PEERS[0]}@host:9735=50000,push",
        f"{PEERS[0]}@host:9735=50000,push=50001",
        f"{PEERS[0]}@host:9735=rest,min=100",
    ],
)
def test_malformed_channel_orders_are_refused(text: str) -> None:
    with pytest.raises(WrongUsage):
        parse_channel_order(text)


def test_a_plan_explains_itself() -> None:
    plan = ChannelPlan((order(500_000, private=True, push=3), order(None, 1)), reserve=10_000)
    explained = check_plan(plan, 1_000_000, FeeRate(12_500), 50_000)
    told = {row.what: row.value for row in explained.rows}
    assert told["anchor reserve"] == "10000 sat"
    assert "490000 sat" in told.values()
    assert explained.worst_fee == min(FeeRate(12_500).fee(272 + 172 * 4 - 124), 50_000)
    assert 0 < explained.reply_bytes < MAX_REPLY_BYTES
    for deposit in (True, False):
        other = ChannelPlan((order(500_000),), deposit=deposit)
        assert check_plan(other, None, FeeRate(250), 50_000).rows[1].value == "what is left"
        assert check_plan(other, 600_000, FeeRate(250), 50_000).rows[1].value == "100000 sat"
    assert "the rest" in {row.value for row in check_plan(ChannelPlan((order(None),)), None, FeeRate(250), 1).rows}


def test_a_plan_that_the_amount_cannot_carry_is_refused_with_the_missing_number() -> None:
    plan = ChannelPlan((order(900_000),), reserve=100_000)
    fee = FeeRate(250).fee(272 + 172 * 3 - 124)
    with pytest.raises(WrongUsage, match=f" {fee} sat more"):
        check_plan(plan, 1_000_000, FeeRate(250), 50_000)
    check_plan(plan, 1_000_000 + fee, FeeRate(250), 50_000)
    check_plan(replace(plan, top_up=True), 1_000_000, FeeRate(250), 50_000)


@pytest.mark.parametrize(
    ("plan", "why"),
    [
        (ChannelPlan(()), "at least one"),
        (ChannelPlan((order(50_000), order(60_000))), "each peer once"),
        (ChannelPlan((order(None), order(None, 1))), "only one"),
        (ChannelPlan((order(50_000),), reserve=5), "dust"),
        (ChannelPlan((replace(order(50_000), peer="x"),)), "public key"),
        (ChannelPlan(tuple(order(20_000, n) for n in range(98)) * 1, top_up=True), "bytes"),
    ],
)
def test_plans_that_cannot_be_are_refused(plan: ChannelPlan, why: str) -> None:
    if why == "bytes":
        orders = tuple(replace(plan.orders[0], peer="03" + f"{n:064x}") for n in range(170))
        plan = replace(plan, orders=orders)
    with pytest.raises(WrongUsage, match=why):
        check_plan(plan, None, FeeRate(250), 50_000)


def test_a_failed_peer_is_dropped_deposited_or_aborts() -> None:
    plan = ChannelPlan((order(100_000), order(None, 1), order(50_000, 2)))
    assert replan(plan, frozenset(), "abort") is plan
    assert replan(plan, frozenset([0]), "drop") == replace(plan, orders=plan.orders[1:])
    dropped = replan(plan, frozenset([1]), "drop")
    assert dropped is not None
    assert (dropped.deposit, dropped.rest, len(dropped.orders)) == (True, None, 2)
    assert replan(plan, frozenset([0, 1, 2]), "drop") is None
    assert replan(plan, frozenset([0]), "deposit") is None
    with pytest.raises(CannotPropose) as refusal:
        replan(plan, frozenset([0]), "abort")
    assert refusal.value.reply is ReplyCode.UNAVAILABLE


# --- plain payjoins


def test_a_plain_payjoin_pays_our_weight_at_the_originals_rate() -> None:
    checked = paid(contribute=False)
    intent = make_intent(checked, None, [BOB.coin()], SCRIPTS)
    assert intent.our_fee == checked.rate.fee(272)
    assert intent.sender_fee == 0
    assert intent.rate == checked.rate
    assert [(o.role, o.value, o.script) for o in intent.outputs] == [
        (OutputRole.PAYMENT, 1_000_000 + 80_000 - intent.our_fee, PAYEE)
    ]
    assert conserved(checked, intent)


def test_the_senders_part_is_the_smallest_of_his_maximum_our_inputs_fee_and_what_his_check_accepts() -> None:
    checked = paid(rate=2, min_rate=500)
    assert checked.contribution is not None
    intent = make_intent(checked, None, [BOB.coin()], SCRIPTS)
    assert intent.sender_fee == min(checked.contribution.max, checked.rate.fee(272))
    # protocol 4.6 TRAP: at 10 sat/vB on a 1 sat/vB Original the reference takes 91 of a sender who accepts 68.
    pushy = replace(checked, rate=FeeRate(250), contribution=FeeContribution(1, 91))
    params = replace(pushy.payload.params, min_fee_rate=FeeRate(2500))
    pushy = replace(pushy, payload=replace(pushy.payload, params=params))
    intent = make_intent(pushy, None, [BOB.coin()], SCRIPTS)
    assert intent.rate == FeeRate(2500)
    assert (intent.sender_fee, intent.our_fee) == (68, 680 - 68)


def test_the_senders_output_never_becomes_dust() -> None:
    change = purse(ScriptKind.P2WPKH, 1_000_000 + 900, 3)
    psbt_terms = terms(amount=1_000_000)
    checked = received(sent([change], 1_000_000, rate=1, contribute=False), [change], psbt_terms)
    value = checked.tx.outputs[1].value
    checked = replace(checked, contribution=FeeContribution(1, value))
    intent = make_intent(checked, None, [purse(ScriptKind.P2PKH, 90_000, 51).coin()], SCRIPTS)
    assert value - intent.sender_fee >= dust_limit(CHANGE)


def test_upbug_e_lighter_outputs_count_as_nothing_and_never_below() -> None:
    payee = purse(ScriptKind.P2TR, 1, 60).key.script
    checked = received(sent([ALICE], 1_000_000, payee=payee, contribute=False), [ALICE], terms(payee, 1_000_000))
    intent = make_intent(checked, None, [BOB.coin()], SCRIPTS, substitute=CHANGE)
    assert intent.our_fee == checked.rate.fee(272)
    heavier = make_intent(paid(contribute=False), None, [BOB.coin()], SCRIPTS, substitute=payee)
    assert heavier.our_fee == paid().rate.fee(272) + paid().rate.fee(48)


def test_a_fee_rate_demanded_beyond_our_cap_is_refused_and_at_the_cap_is_paid() -> None:
    base = paid(contribute=False)

    def demanding(per_vb: int, our_max: int) -> CheckedOriginal:
        params = replace(base.payload.params, min_fee_rate=FeeRate(per_vb * 250))
        limits = replace(base.terms, max_fee_rate=FeeRate(our_max * 250), max_fee_share_ppm=1_000_000)
        return replace(base, payload=replace(base.payload, params=params), terms=limits)

    assert make_intent(demanding(1000, 1000), None, [BOB.coin()], SCRIPTS).our_fee == 68_000
    with pytest.raises(CannotPropose, match="demands") as refusal:
        make_intent(demanding(1000, 995), None, [BOB.coin()], SCRIPTS)
    assert refusal.value.reply is ReplyCode.NOT_ENOUGH_MONEY


def test_our_cap_on_the_rate_holds_when_the_original_pays_more() -> None:
    checked = paid(rate=80, contribute=False)
    intent = make_intent(checked, None, [BOB.coin()], SCRIPTS)
    assert intent.rate == checked.terms.max_fee_rate
    assert intent.our_fee == FeeRate(12_500).fee(272)


def test_our_share_of_the_payment_lowers_the_rate_and_finally_refuses() -> None:
    checked = paid(100_000, rate=20, contribute=False, terms=terms(max_fee_share_ppm=1_000))
    intent = make_intent(checked, None, [BOB.coin()], SCRIPTS)
    assert intent.our_fee == 100
    assert intent.rate < checked.rate
    with pytest.raises(CannotPropose, match="at most 50"):
        make_intent(
            paid(100_000, rate=20, terms=terms(max_fee_share_ppm=500), contribute=False), None, [BOB.coin()], SCRIPTS
        )


def test_several_payment_outputs_stay_and_the_first_grows() -> None:
    outputs = [TxOut(60_000, PAYEE), TxOut(1_890_000, CHANGE), TxOut(40_000, PAYEE)]
    checked = judged(sign(unsigned([ALICE], outputs), [ALICE]), purses=[ALICE])
    checked = replace(checked, terms=replace(checked.terms, max_fee_share_ppm=500_000))
    intent = make_intent(checked, None, [BOB.coin()], SCRIPTS)
    assert [o.value for o in intent.outputs] == [60_000 + 80_000 - intent.our_fee, 40_000]
    many = [TxOut(20_000, PAYEE)] * 5 + [TxOut(1_890_000, CHANGE)]
    split = judged(sign(unsigned([ALICE], many), [ALICE]), purses=[ALICE])
    split = replace(split, terms=checked.terms)
    with pytest.raises(CannotPropose, match="split"):
        make_intent(split, ChannelPlan((order(None),)), [BOB.coin()], SCRIPTS)


def test_with_substitution_disabled_the_payment_keeps_its_script_and_never_shrinks() -> None:
    checked = paid(substitution=False, contribute=False)
    intent = make_intent(checked, None, [BOB.coin()], SCRIPTS, substitute=CHANGE)
    assert intent.outputs[0].script == PAYEE
    small = purse(ScriptKind.P2WPKH, 100, 52)
    with pytest.raises(CannotPropose, match="shrink"):
        make_intent(checked, None, [small.coin()], SCRIPTS)


def test_forwarding_the_payment_without_a_coin_is_legal_and_doing_nothing_is_not() -> None:
    checked = paid(contribute=False)
    intent = make_intent(checked, None, [], SCRIPTS, substitute=RESERVE)
    assert intent.our_fee == checked.rate.fee(48)
    with pytest.raises(CannotPropose, match="no coin"):
        make_intent(checked, None, [], SCRIPTS)
    with pytest.raises(CannotPropose, match="no coin"):
        make_intent(paid(substitution=False), None, [], SCRIPTS, substitute=RESERVE)


def test_still_in_the_reference_no_output_of_ours_becomes_dust() -> None:
    checked = paid(600, rate=1, terms=terms(amount=600, max_fee_share_ppm=1_000_000), contribute=False)
    poor = Coin(Outpoint("55" * 32, 0), TxOut(1, OUR_CHANGE), 2_000, 5)
    with pytest.raises(CannotPropose, match="dust"):
        make_intent(checked, None, [poor], SCRIPTS)


def test_a_coin_cannot_be_spent_twice_nor_taken_from_the_original() -> None:
    with pytest.raises(CannotPropose, match="twice"):
        make_intent(paid(), None, [BOB.coin(), BOB.coin()], SCRIPTS)
    with pytest.raises(CannotPropose, match="twice"):
        make_intent(paid(), None, [ALICE.coin()], SCRIPTS)


def test_a_coin_that_the_payer_could_not_weigh_is_not_offered() -> None:
    odd = Coin(Outpoint("55" * 32, 0), TxOut(50_000, b"\x52\x02ab"), 300, 5)
    with pytest.raises(CannotPropose, match="could not weigh"):
        make_intent(paid(), None, [odd], SCRIPTS)
    multisig = Coin(Outpoint("55" * 32, 0), TxOut(50_000, purse(ScriptKind.P2SH, 1, 5).key.script), 500, 5, b"\x51")
    with pytest.raises(CannotPropose, match="could not weigh"):
        make_intent(paid(), None, [multisig], SCRIPTS)


def test_the_relative_lock_trap_spares_young_coins() -> None:
    checked = paid(sequence=502)
    with pytest.raises(CannotPropose, match="too young"):
        make_intent(checked, None, [BOB.coin()], SCRIPTS)
    make_intent(checked, None, [BOB.coin(height=499)], SCRIPTS)
    assert choose_coins(checked, [BOB.coin()], plan=None, rng=Dice()) == ()


# --- channels


def test_channels_are_exact_and_our_coin_returns_whole_less_our_fee() -> None:
    checked = paid(contribute=False)
    plan = ChannelPlan((order(600_000), order(None, 1)), reserve=10_000, deposit=True)
    intent = make_intent(checked, plan, [BOB.coin()], SCRIPTS)
    assert [o.capacity for o in intent.orders] == [600_000, 390_000]
    assert [o.value for o in intent.outputs if o.role is OutputRole.FUNDING] == [600_000, 390_000]
    assert roles(intent)[OutputRole.RESERVE] == 10_000
    assert OutputRole.DEPOSIT not in roles(intent)
    assert roles(intent)[OutputRole.CHANGE] == 80_000 - intent.our_fee
    assert intent.our_fee == checked.rate.fee(272) + checked.rate.fee(4 * 172 - 124)
    assert conserved(checked, intent)


def test_more_than_asked_goes_to_the_rest_else_to_the_deposit_else_to_our_change() -> None:
    checked = paid(1_200_000, terms=terms(amount=1_000_000))
    to_rest = make_intent(checked, ChannelPlan((order(None),)), [BOB.coin()], SCRIPTS)
    assert to_rest.orders[0].capacity == 1_200_000
    to_deposit = make_intent(checked, ChannelPlan((order(900_000),), deposit=True), [BOB.coin()], SCRIPTS)
    assert roles(to_deposit)[OutputRole.DEPOSIT] == 300_000
    to_change = make_intent(checked, ChannelPlan((order(900_000),)), [BOB.coin()], SCRIPTS)
    assert roles(to_change)[OutputRole.CHANGE] == 380_000 - to_change.our_fee
    tiny = make_intent(checked, ChannelPlan((order(1_199_900),), deposit=True), [BOB.coin()], SCRIPTS)
    assert OutputRole.DEPOSIT not in roles(tiny)
    assert roles(tiny)[OutputRole.CHANGE] == 80_100 - tiny.our_fee


def test_a_shortfall_is_paid_by_our_coin_only_with_top_up() -> None:
    checked = paid(contribute=False)
    plan = ChannelPlan((order(1_020_000),))
    with pytest.raises(CannotPropose, match="20000 sat too small"):
        make_intent(checked, plan, [BOB.coin()], SCRIPTS)
    intent = make_intent(checked, replace(plan, top_up=True), [BOB.coin()], SCRIPTS)
    assert roles(intent)[OutputRole.CHANGE] == 60_000 - intent.our_fee
    rest = ChannelPlan((order(990_000), order(None, 1)))
    with pytest.raises(CannotPropose, match="10000 sat are left"):
        make_intent(checked, rest, [BOB.coin()], SCRIPTS)
    lifted = make_intent(checked, replace(rest, top_up=True), [BOB.coin()], SCRIPTS)
    assert lifted.orders[1].capacity == 20_000
    assert roles(lifted)[OutputRole.CHANGE] == 70_000 - lifted.our_fee


def test_change_keeps_room_for_a_child_that_pays_for_its_parent() -> None:
    checked = paid(contribute=False)
    floor = change_floor(OUR_CHANGE, checked.terms.max_fee_rate)
    assert floor == 2 * 330 + FeeRate(12_500).fee(450)
    plan = ChannelPlan((order(None),))
    fee = make_intent(checked, plan, [BOB.coin()], SCRIPTS).our_fee
    enough = purse(ScriptKind.P2WPKH, floor + fee, 53)
    assert roles(make_intent(checked, plan, [enough.coin()], SCRIPTS))[OutputRole.CHANGE] == floor
    with pytest.raises(CannotPropose, match="bump"):
        make_intent(checked, plan, [purse(ScriptKind.P2WPKH, floor + fee - 1, 53).coin()], SCRIPTS)


def test_without_a_coin_the_fee_comes_from_the_rest_the_deposit_or_the_remainder() -> None:
    checked = paid(contribute=False)
    rest = make_intent(checked, ChannelPlan((order(None),)), [], SCRIPTS)
    assert rest.orders[0].capacity == 1_000_000 - rest.our_fee
    deposit = make_intent(checked, ChannelPlan((order(900_000),), deposit=True), [], SCRIPTS)
    assert roles(deposit)[OutputRole.DEPOSIT] == 100_000 - deposit.our_fee
    change = make_intent(checked, ChannelPlan((order(900_000),)), [], SCRIPTS)
    assert roles(change)[OutputRole.CHANGE] == 100_000 - change.our_fee
    assert all(conserved(checked, intent) for intent in (rest, deposit, change))
    with pytest.raises(CannotPropose, match="nothing is left"):
        make_intent(checked, ChannelPlan((order(1_000_000),)), [], SCRIPTS)


def test_channels_need_substitution_and_native_segwit_on_both_sides() -> None:
    plan = ChannelPlan((order(None),))
    with pytest.raises(CannotPropose, match="substitution"):
        make_intent(paid(substitution=False), plan, [BOB.coin()], SCRIPTS)
    nested = purse(ScriptKind.P2SH, 2_000_000, 4)
    with pytest.raises(CannotPropose, match="native"):
        make_intent(paid(payer=nested), plan, [BOB.coin()], SCRIPTS)
    with pytest.raises(CannotPropose, match="not native"):
        make_intent(paid(), plan, [purse(ScriptKind.P2SH, 90_000, 5).coin()], SCRIPTS)


def test_a_plan_whose_scripts_were_not_given_is_our_mistake() -> None:
    with pytest.raises(WrongUsage, match="reserve"):
        make_intent(paid(), ChannelPlan((order(None),), reserve=1000), [BOB.coin()], ReceiverScripts(OUR_CHANGE))
    with pytest.raises(WrongUsage, match="deposit"):
        make_intent(paid(), ChannelPlan((order(50_000),), deposit=True), [BOB.coin()], ReceiverScripts(OUR_CHANGE))


def test_a_reply_that_would_not_fit_is_refused_before_anything_is_promised() -> None:
    crowd = [purse(ScriptKind.P2WPKH, 400_000, 100 + n) for n in range(15)]
    checked = received(sent(crowd, 4_000_000), crowd, terms(amount=4_000_000, max_fee_share_ppm=500_000))
    few = make_intent(checked, None, [BOB.coin()], SCRIPTS)
    assert few.reply_bytes < MAX_REPLY_BYTES
    orders = tuple(ChannelOrder("03" + f"{n:064x}", "node.example:9735", 20_000) for n in range(130))
    coin = purse(ScriptKind.P2WPKH, 900_000, 54).coin()
    with pytest.raises(CannotPropose, match="bytes"):
        make_intent(checked, ChannelPlan(orders), [coin], SCRIPTS)


# --- coins


def test_weights_are_the_references() -> None:
    assert [input_weight(k) for k in (ScriptKind.P2PKH, ScriptKind.P2SH, ScriptKind.P2WPKH, ScriptKind.P2TR)] == [
        592,
        364,
        272,
        230,
    ]
    with pytest.raises(WrongUsage):
        input_weight(ScriptKind.P2WSH)
    assert [purse(k, 5, 9).coin().weight for k in (ScriptKind.P2PKH, ScriptKind.P2SH)] == [592, 364]


def test_a_weight_is_given_exactly_where_it_cannot_be_told() -> None:
    wsh = purse(ScriptKind.P2WSH, 5, 9)
    with pytest.raises(WrongUsage, match="give it"):
        Coin.of(wsh.outpoint, wsh.txout, height=1)
    with pytest.raises(WrongUsage, match="do not give"):
        Coin.of(BOB.outpoint, BOB.txout, height=1, weight=272)
    with pytest.raises(WrongUsage, match="redeem script"):
        Coin(BOB.outpoint, purse(ScriptKind.P2SH, 5, 9).txout, 364, 1)
    with pytest.raises(WrongUsage, match="previous transaction"):
        Coin(BOB.outpoint, purse(ScriptKind.P2PKH, 5, 9).txout, 592, 1)
    with pytest.raises(WrongUsage, match="too small"):
        Coin(BOB.outpoint, BOB.txout, 100, 1)
    taproot = purse(ScriptKind.P2TR, 5, 9)
    assert Coin.of(taproot.outpoint, taproot.txout, height=1, weight=231).payer_weight == 230
    assert Coin.of(taproot.outpoint, taproot.txout, height=1, weight=400).payer_weight == 360


@pytest.mark.parametrize(
    ("value", "level"),
    [(2_000_000, 0), (2_000_001, 1), (95_983_069, 2), (1_999_999, 0), (50, 0)],
)
def test_the_bip78_vector_avoids_the_unnecessary_input_heuristic_strictly(value: int, level: int) -> None:
    # BIP78 vector: outputs 95,983,068 and 2,000,000 (ours), one input of 97,983,400: exactly 2,000,000 is not selected.
    base = paid()
    rich = replace(
        base,
        prevouts=(TxOut(97_983_400, CHANGE),),
        tx=replace(base.tx, outputs=(TxOut(95_983_068, CHANGE), TxOut(2_000_000, PAYEE))),
        paid_vouts=(1,),
    )
    assert uih_level(rich, purse(ScriptKind.P2WPKH, value, 55).coin()) == level


def test_a_coin_that_hides_the_payment_is_preferred_and_another_is_better_than_none() -> None:
    checked = paid(1_500_000, payer=purse(ScriptKind.P2WPKH, 1_900_000, 70))
    good, poor = purse(ScriptKind.P2WPKH, 600_000, 56), purse(ScriptKind.P2WPKH, 90_000, 57)
    assert uih_level(checked, good.coin()) == 2
    for seed in range(8):
        chosen = choose_coins(checked, [poor.coin(), good.coin()], plan=None, rng=Dice(seed))
        assert chosen == (good.coin(),)
        assert choose_coins(checked, [poor.coin()], plan=None, rng=Dice(seed)) == (poor.coin(),)
    assert choose_coins(checked, [], plan=None, rng=Dice()) == ()


def test_one_output_supports_no_heuristic() -> None:
    whole = purse(ScriptKind.P2WPKH, 101_000, 71)
    psbt = original_psbt([whole], pays=100_000, change=None)
    assert uih_level(judged(psbt, purses=[whole]), BOB.coin()) == 0


def test_confirmed_coins_and_the_payers_script_kind_come_first() -> None:
    checked = paid()
    young = replace(BOB.coin(), height=None)
    same, other = purse(ScriptKind.P2WPKH, 70_000, 58).coin(), purse(ScriptKind.P2TR, 70_000, 59).coin()
    for seed in range(6):
        assert choose_coins(checked, [young, other, same], plan=None, rng=Dice(seed)) == (same,)
        assert choose_coins(checked, [young, other], plan=None, rng=Dice(seed)) == (other,)
    assert choose_coins(checked, [young], plan=None, rng=Dice()) == (young,)
    assert choose_coins(checked, [young], plan=ChannelPlan((order(None),)), rng=Dice()) == ()


def test_below_the_least_amount_no_coin_is_offered() -> None:
    assert choose_coins(paid(terms=terms(min_amount=1_000_001)), [BOB.coin()], plan=None, rng=Dice()) == ()


def test_channels_take_several_coins_when_one_is_not_enough() -> None:
    checked = paid()
    plan = ChannelPlan((order(1_100_000),), top_up=True)
    coins = [purse(ScriptKind.P2WPKH, 60_000, 80 + n).coin() for n in range(4)]
    assert len(choose_coins(checked, coins, plan=plan, rng=Dice())) == 2
    assert choose_coins(checked, coins[:1], plan=plan, rng=Dice()) == ()
    native = choose_coins(checked, [purse(ScriptKind.P2PKH, 900_000, 90).coin()], plan=plan, rng=Dice())
    assert native == ()


def test_fixed_26_candidates_may_be_any_sequence_and_are_looked_at_again() -> None:
    checked = paid()
    assert choose_coins(checked, (BOB.coin(),), plan=None, rng=Dice()) == (BOB.coin(),)
    assert facts([ALICE]).tip == 1000
