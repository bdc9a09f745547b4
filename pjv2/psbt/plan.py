"""What we would pay for, in satoshis: channel plans, coin choice, fees, and the Intent that fixes every amount before anything is promised.

It refuses dust, negative amounts, fees beyond `max_fee_rate` and `max_fee_share`, and replies that do not fit into message B.

Law: inputs = outputs + fee, to the satoshi; our weight is paid at the Original's rate, never beyond our caps, whatever the payer asks.
The payer pays only for inputs of ours, and no more than his own check accepts.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Literal

from pjv2.errors import PayjoinError, ReplyCode, WrongUsage
from pjv2.psbt.coin import Coin as Coin
from pjv2.psbt.coin import count_overhead
from pjv2.psbt.original import CheckedOriginal, lock_is_satisfied
from pjv2.psbt.tx import Psbt, PsbtInput, PsbtOutput, ScriptKind, Tx, TxIn, TxOut, dust_limit, output_weight
from pjv2.units import Entropy, FeeRate, Outpoint, Sats, Weight

MAX_REPLY_BYTES = 7088
FUNDING_PLACEHOLDER = b"\x00\x20" + bytes(32)
CHILD_WEIGHT: Weight = 450
"""A child that spends our change alone: P2WPKH or P2TR in, one output, rounded up."""

RELAY_RATE = FeeRate(250)
_MAX_COINS = 8
_MIN_CAPACITY: Sats = 20_000
_P2TR_PLACEHOLDER = b"\x51\x20" + bytes(32)
_PPM = 1_000_000
_PEER = re.compile(r"0[23][0-9a-f]{64}\Z")
_HOST = re.compile(r"(\[[0-9a-fA-F:.]+\]|[A-Za-z0-9._-]+):(\d{1,5})\Z")


class CannotPropose(PayjoinError):
    """No proposal can be made for this payment: the Original itself pays."""

    exit_code = 4

    def __init__(self, reason: str, reply: ReplyCode = ReplyCode.NOT_ENOUGH_MONEY) -> None:
        super().__init__(reason)
        self.reason = reason
        self.reply = reply


# --- channel plans ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class ChannelOrder:
    """One channel to open: peer's public key (66 hex characters), its host:port, and the capacity in satoshis (None: the rest)."""

    peer: str
    host: str
    capacity: Sats | None
    private: bool = False
    push: Sats = 0
    kind: str | None = None
    min_capacity: Sats = _MIN_CAPACITY


@dataclass(frozen=True, slots=True)
class ChannelPlan:
    """Channels to open with one payment; `reserve` goes to the node's wallet, `deposit` collects what no channel takes."""

    orders: tuple[ChannelOrder, ...]
    deposit: bool = False
    reserve: Sats = 0
    top_up: bool = False

    @property
    def fixed(self) -> Sats:
        """What the channels of a fixed capacity and the reserve take."""
        return self.reserve + sum(order.capacity or 0 for order in self.orders)

    @property
    def rest(self) -> int | None:
        """The index of the order that takes the rest."""
        return next((index for index, order in enumerate(self.orders) if order.capacity is None), None)


def parse_channel_order(text: str) -> ChannelOrder:
    """Read `pubkey@host:port=CAPACITY[,private][,push=N][,type=T][,min=N]`; CAPACITY is in satoshis or `rest`. Raises WrongUsage."""
    target, equals, wishes = text.strip().partition("=")
    peer, at, host = target.partition("@")
    capacity, *options = wishes.split(",")
    if not equals or not at:
        raise WrongUsage(f"{text!r} is not a channel of the form pubkey@host:port=CAPACITY")
    order = ChannelOrder(peer.lower(), host, None if capacity.strip() == "rest" else _sats(capacity, text))
    for option in options:
        name, has_value, value = (part.strip() for part in option.partition("="))
        match name, bool(has_value):
            case "private", False:
                order = replace(order, private=True)
            case "push", True:
                order = replace(order, push=_sats(value, text))
            case "type", True:
                order = replace(order, kind=value)
            case "min", True:
                order = replace(order, min_capacity=_sats(value, text))
            case _:
                raise WrongUsage(f"{option!r} in {text!r} is not one of private, push=N, type=T, min=N")
    _check_order(order)
    return order


def format_channel_order(order: ChannelOrder) -> str:
    """The text that parse_channel_order reads back."""
    parts = [f"{order.peer}@{order.host}={'rest' if order.capacity is None else order.capacity}"]
    parts += ["private"] if order.private else []
    parts += [f"push={order.push}"] if order.push else []
    parts += [f"type={order.kind}"] if order.kind else []
    parts += [f"min={order.min_capacity}"] if order.min_capacity != _MIN_CAPACITY else []
    return ",".join(parts)


def _sats(text: str, where: str) -> Sats:
    digits = text.strip().replace("_", "")
    if not re.fullmatch(r"[0-9]{1,16}", digits):
        raise WrongUsage(f"{text!r} in {where!r} is not an amount in satoshis")
    return int(digits)


def _check_order(order: ChannelOrder) -> None:
    port = _HOST.match(order.host)
    if not _PEER.match(order.peer):
        raise WrongUsage(f"{order.peer!r} is not a node's public key (66 hex characters)")
    if not port or not 0 < int(port[2]) < 65536:
        raise WrongUsage(f"{order.host!r} is not of the form host:port")
    if order.min_capacity < dust_limit(FUNDING_PLACEHOLDER):
        raise WrongUsage(f"a channel of {order.min_capacity} sat would be dust")
    if order.capacity is not None and order.capacity < order.min_capacity:
        raise WrongUsage(
            f"the channel with {order.peer[:10]}… would have {order.capacity} sat: {order.min_capacity} is the least"
        )
    if order.push > (order.min_capacity if order.capacity is None else order.capacity):
        raise WrongUsage(f"the channel with {order.peer[:10]}… cannot push {order.push} sat: it is more than it holds")


@dataclass(frozen=True, slots=True)
class PlanRow:
    """One line of the explanation of a plan."""

    what: str
    value: str
    note: str = ""


@dataclass(frozen=True, slots=True)
class PlanExplanation:
    """Who gets what, in words, before a payment URI is shown; fees in satoshis, `reply_bytes` of at most 7088."""

    rows: tuple[PlanRow, ...]
    worst_fee: Sats
    reply_bytes: int


def check_plan(
    plan: ChannelPlan, amount: Sats | None, max_fee_rate: FeeRate, max_fee_share_ppm: int
) -> PlanExplanation:
    """Can `amount` carry the plan, even at the highest fee we allow? Raises WrongUsage with the number that is missing.

    Without an amount only the plan's form and the size of the reply are checked; a payment too small then becomes a plain payjoin.
    """
    if not plan.orders:
        raise WrongUsage("a channel plan needs at least one channel")
    for order in plan.orders:
        _check_order(order)
    if len({order.peer for order in plan.orders}) != len(plan.orders):
        raise WrongUsage("a node opens one pending channel per peer: name each peer once")
    if sum(order.capacity is None for order in plan.orders) > 1:
        raise WrongUsage("only one channel can take the rest")
    if plan.reserve and plan.reserve < dust_limit(FUNDING_PLACEHOLDER):
        raise WrongUsage(f"a reserve of {plan.reserve} sat would be dust")

    outputs = len(plan.orders) + bool(plan.reserve) + bool(plan.deposit and plan.rest is None)
    weight = 272 + 172 * (outputs + 1) - 124
    worst_fee = max_fee_rate.fee(weight)
    if amount is not None:
        worst_fee = min(worst_fee, amount * max_fee_share_ppm // _PPM)
    least = plan.fixed + sum(order.min_capacity for order in plan.orders if order.capacity is None)
    if amount is not None and not plan.top_up and least + worst_fee > amount:
        raise WrongUsage(
            f"the plan needs {least + worst_fee} sat ({least} for channels and reserve, up to {worst_fee} for fees): "
            f"{least + worst_fee - amount} sat more than the {amount} asked; lower a capacity, ask for more, or use --top-up"
        )
    reply = _typical_reply_bytes(outputs)
    if reply > MAX_REPLY_BYTES:
        raise WrongUsage(
            f"the encrypted reply would take {reply} of {MAX_REPLY_BYTES} bytes: open fewer channels at once"
        )
    return PlanExplanation(_plan_rows(plan, amount, worst_fee, reply), worst_fee, reply)


def _plan_rows(plan: ChannelPlan, amount: Sats | None, worst_fee: Sats, reply: int) -> tuple[PlanRow, ...]:
    rows = []
    left = None if amount is None else amount - plan.fixed
    for order in plan.orders:
        value = (
            f"{order.capacity} sat" if order.capacity is not None else ("the rest" if left is None else f"{left} sat")
        )
        note = ", ".join((["private"] if order.private else []) + ([f"pushes {order.push} sat"] if order.push else []))
        rows.append(PlanRow(f"channel with {order.peer[:10]}… at {order.host}", value, note))
    if plan.reserve:
        rows.append(PlanRow("anchor reserve", f"{plan.reserve} sat", "to the node's wallet"))
    if plan.rest is None:
        keeper = "deposit" if plan.deposit else "change"
        rows.append(PlanRow(keeper, "what is left" if left is None else f"{max(left, 0)} sat", "to your wallet"))
    rows.append(PlanRow("fee", f"at most {worst_fee} sat", "taken from your own coin's change"))
    rows.append(PlanRow("encrypted reply", f"about {reply} of {MAX_REPLY_BYTES} bytes", "with one input of the payer"))
    rows.append(PlanRow("if the payer never signs", "the plain payment", "his Original is broadcast; no channel opens"))
    return tuple(rows)


def _typical_reply_bytes(outputs: int) -> int:
    payer = PsbtInput(witness_utxo=TxOut(0, _P2TR_PLACEHOLDER))
    own = Coin(Outpoint("00" * 32, 0), TxOut(0, b"\x00\x14" + bytes(20)), 272, 1)
    scripts = [_P2TR_PLACEHOLDER] * (outputs + 2)
    return _reply_bytes([payer], [own], [TxOut(0, script) for script in scripts])


def replan(
    plan: ChannelPlan, failed: frozenset[int], policy: Literal["drop", "deposit", "abort"]
) -> ChannelPlan | None:
    """The plan without the orders that failed (indices); None means no channels, a plain payjoin.

    `drop` leaves their satoshis to the rest, else to the deposit; `deposit` gives up all channels; `abort` raises CannotPropose
    with the reply `unavailable`.
    """
    if not failed:
        return plan
    if policy == "abort":
        raise CannotPropose("a channel peer failed, and the plan says to abort then", ReplyCode.UNAVAILABLE)
    orders = tuple(order for index, order in enumerate(plan.orders) if index not in failed)
    if policy == "deposit" or not orders:
        return None
    kept = replace(plan, orders=orders)
    return kept if kept.rest is not None else replace(kept, deposit=True)


# --- intents ---------------------------------------------------------------------------------------------------------


class OutputRole(StrEnum):
    """What an output of ours is for."""

    PAYMENT = "payment"
    FUNDING = "funding"
    RESERVE = "reserve"
    DEPOSIT = "deposit"
    CHANGE = "change"


@dataclass(frozen=True, slots=True)
class PlannedOutput:
    """An output of ours; `script` None is a funding script not known yet (34 bytes), `channel` indexes the intent's orders."""

    role: OutputRole
    value: Sats
    script: bytes | None
    channel: int | None = None


@dataclass(frozen=True, slots=True)
class Intent:
    """Everything decided before anybody is called: our coins, our outputs, who pays which fee, and the size of the reply.

    `our_fee` and `sender_fee` (what his contribution pays) come on top of the Original's fee; `rate` is what our weight is paid at.
    """

    coins: tuple[Coin, ...]
    outputs: tuple[PlannedOutput, ...]
    orders: tuple[ChannelOrder, ...]
    our_fee: Sats
    sender_fee: Sats
    rate: FeeRate
    reply_bytes: int


@dataclass(frozen=True, slots=True)
class ReceiverScripts:
    """Fresh scripts of ours: change and deposit from the configured wallet, reserve from the node's."""

    change: bytes
    deposit: bytes | None = None
    reserve: bytes | None = None


@dataclass(frozen=True, slots=True)
class _Fees:
    rate: FeeRate
    ours: Sats
    senders: Sats


def make_intent(
    checked: CheckedOriginal,
    plan: ChannelPlan | None,
    coins: Sequence[Coin],
    scripts: ReceiverScripts,
    *,
    substitute: bytes | None = None,
) -> Intent:
    """Decide every amount of a proposal; nothing is promised yet. Raises CannotPropose when caps, dust or size forbid it.

    Without a plan the payment output takes what was paid and our coins, less our fee; `substitute` replaces the script of every
    payment output where the payer allows that, and then no coin of ours is needed. With a plan, channels take the payment and our
    coins return whole, less our fee, as change.
    """
    chosen = tuple(coins)
    _usable_coins(checked, chosen, channels=plan is not None)
    if plan is None:
        orders: tuple[ChannelOrder, ...] = ()
        outputs, fees = _plain_outputs(checked, chosen, substitute)
    else:
        outputs, orders, fees = _channel_outputs(checked, plan, chosen, scripts)
    _no_dust(outputs)
    reply = _reply_bytes(
        [checked.sender_input(index) for index in range(len(checked.tx.inputs))],
        chosen,
        [*_sender_outputs(checked), *(TxOut(output.value, output.script or FUNDING_PLACEHOLDER) for output in outputs)],
    )
    if reply > MAX_REPLY_BYTES:
        raise CannotPropose(f"the encrypted reply would take {reply} of {MAX_REPLY_BYTES} bytes")
    return Intent(chosen, outputs, orders, fees.ours, fees.senders, fees.rate, reply)


# "DuplicateInput, against all current inputs and within the call"; design rule 2: the relative-lock trap.
def _usable_coins(checked: CheckedOriginal, coins: Sequence[Coin], *, channels: bool) -> None:
    if len({coin.outpoint for coin in coins} | checked.outpoints) != len(coins) + len(checked.outpoints):
        raise CannotPropose("a coin would be spent twice")
    for coin in coins:
        if not coin.is_usable:
            raise CannotPropose(f"the payer could not weigh coin {coin.outpoint} ({coin.kind}), and would refuse it")
        if channels and not coin.kind.is_native_segwit:
            raise CannotPropose(f"coin {coin.outpoint} is not native segwit: the funding outpoint would not be known")
        if not _lock_satisfied(checked, coin):
            raise CannotPropose(
                f"coin {coin.outpoint} is too young for the relative lock that the payer's inputs carry"
            )


def _lock_satisfied(checked: CheckedOriginal, coin: Coin) -> bool:
    return lock_is_satisfied(
        checked.tx.version, checked.sequence, coin.height, None, tip=checked.tip, tip_time=checked.tip_time
    )


def _plain_outputs(
    checked: CheckedOriginal, coins: Sequence[Coin], substitute: bytes | None
) -> tuple[tuple[PlannedOutput, ...], _Fees]:
    first, *others = checked.paid_vouts
    script = substitute if substitute is not None and checked.substitution else checked.terms.script
    if not coins and script == checked.terms.script:
        raise CannotPropose("there is no coin of ours to contribute")
    fees = _fees(checked, coins, [script] * len(checked.paid_vouts))
    original = checked.tx.outputs[first].value
    value = original + sum(coin.txout.value for coin in coins) - fees.ours
    if not checked.substitution and value < original:
        raise CannotPropose("the payment output would shrink, which the payer does not allow")
    outputs = [PlannedOutput(OutputRole.PAYMENT, value, script)]
    outputs += [PlannedOutput(OutputRole.PAYMENT, checked.tx.outputs[vout].value, script) for vout in others]
    return tuple(outputs), fees


def _channel_outputs(
    checked: CheckedOriginal, plan: ChannelPlan, coins: Sequence[Coin], scripts: ReceiverScripts
) -> tuple[tuple[PlannedOutput, ...], tuple[ChannelOrder, ...], _Fees]:
    """The value rule: channels and reserve are exact; the rest, else the deposit, takes what is left of the payment.

    Our coins return whole as change, less our fee, plus any remainder that nothing else takes, less a shortfall under top-up.
    """
    if not checked.substitution or not checked.txid_is_stable:
        raise CannotPropose("channels need output substitution and native segwit inputs of the payer")
    returned = sum(coin.txout.value for coin in coins)
    left, change = checked.paid - plan.fixed, returned
    extras: list[tuple[OutputRole, bytes]] = []
    if plan.reserve:
        extras.append((OutputRole.RESERVE, _script(scripts.reserve, "reserve")))
    deposit = _deposit_script(plan, scripts, left)
    if deposit is not None:
        extras.append((OutputRole.DEPOSIT, deposit))
    elif plan.rest is None:
        if left < 0 and not plan.top_up:
            raise CannotPropose(f"the payment is {-left} sat too small for the channels and the reserve")
        left, change = 0, change + left
    if coins or change:
        extras.append((OutputRole.CHANGE, scripts.change))
    elif deposit is None and plan.rest is None:
        raise CannotPropose("without a coin of ours, nothing is left of the payment to pay the fee from")

    fees = _fees(checked, coins, [FUNDING_PLACEHOLDER] * len(plan.orders) + [script for _, script in extras])
    with_change = any(role is OutputRole.CHANGE for role, _ in extras)
    left, change = (left, change - fees.ours) if with_change else (left - fees.ours, 0)
    orders, left, change = _fill_rest(plan, left, change, with_change)
    if with_change and change < (floor := change_floor(scripts.change, checked.terms.max_fee_rate)):
        raise CannotPropose(f"our change would be {max(change, 0)} sat, and {floor} are needed to bump the fee later")

    values = {OutputRole.RESERVE: plan.reserve, OutputRole.DEPOSIT: left, OutputRole.CHANGE: change}
    outputs = [
        PlannedOutput(OutputRole.FUNDING, order.capacity or 0, None, index) for index, order in enumerate(orders)
    ]
    outputs += [PlannedOutput(role, values[role], script) for role, script in extras]
    if len(outputs) < len(checked.paid_vouts):
        raise CannotPropose("the payer split the payment over more outputs than we have")
    return tuple(outputs), orders, fees


def _deposit_script(plan: ChannelPlan, scripts: ReceiverScripts, left: Sats) -> bytes | None:
    """Where the remainder goes: a deposit if the plan has one, no channel takes the rest, and it would not be dust."""
    if not plan.deposit or plan.rest is not None:
        return None
    script = _script(scripts.deposit, "deposit")
    return script if left >= dust_limit(script) else None


def _fill_rest(
    plan: ChannelPlan, left: Sats, change: Sats, with_change: bool
) -> tuple[tuple[ChannelOrder, ...], Sats, Sats]:
    """The orders with the rest resolved; under top-up our change lifts it to its least capacity."""
    if plan.rest is None:
        return plan.orders, left, change
    least = plan.orders[plan.rest].min_capacity
    if left < least and plan.top_up and with_change:
        change, left = change - (least - left), least
    if left < least:
        raise CannotPropose(f"{max(left, 0)} sat are left for the last channel, and {least} is the least it may have")
    orders = tuple(replace(order, capacity=left) if order.capacity is None else order for order in plan.orders)
    return orders, left, change


def _script(script: bytes | None, what: str) -> bytes:
    if script is None:
        raise WrongUsage(f"the plan has a {what}, and no script for it was given")
    return script


def change_floor(script: bytes, max_fee_rate: FeeRate) -> Sats:
    """The least our change may hold: dust, and a child of it at the highest fee rate we allow, whose output is no dust either."""
    return 2 * dust_limit(script) + max_fee_rate.fee(CHILD_WEIGHT)


def _no_dust(outputs: Sequence[PlannedOutput]) -> None:
    for output in outputs:
        if output.value < dust_limit(output.script or FUNDING_PLACEHOLDER):
            raise CannotPropose(f"the {output.role} output would be dust ({output.value} sat)")


def _sender_outputs(checked: CheckedOriginal) -> list[TxOut]:
    return [txout for vout, txout in enumerate(checked.tx.outputs) if vout not in checked.paid_vouts]


# --- fees ------------------------------------------------------------------------------------------------------------


def _fees(checked: CheckedOriginal, coins: Sequence[Coin], own_scripts: Sequence[bytes]) -> _Fees:
    """Who pays what for our weight (reference: apply_fee_range).

    Inputs: ceil(weight x rate), the payer's part first. Outputs beyond the Original's, and the overhead of more of both: ours.
    """
    in_weight = sum(coin.weight for coin in coins)
    out_weight = _extra_weight(checked, coins, own_scripts)
    floor = max(checked.payload.params.min_fee_rate, min(checked.rate, RELAY_RATE))
    rate = min(max(checked.rate, floor), checked.terms.max_fee_rate)
    if rate < floor:
        raise CannotPropose(f"the payer demands {floor}, and we pay at most {checked.terms.max_fee_rate}")
    share = checked.paid * checked.terms.max_fee_share_ppm // _PPM
    cap = min(share, checked.terms.max_fee_rate.fee(in_weight + out_weight))

    def at(sat_per_kwu: int) -> _Fees:
        tried = FeeRate(sat_per_kwu)
        for_inputs = tried.fee(in_weight)
        senders = _sender_part(checked, coins, for_inputs)
        return _Fees(tried, for_inputs - senders + tried.fee(out_weight), senders)

    fees = at(rate.sat_per_kwu)
    if fees.ours <= cap:
        return fees
    # Our share cap binds: the highest rate it allows, but never below what the payer asks and nodes relay.
    low, high = floor.sat_per_kwu, rate.sat_per_kwu
    if at(low).ours > cap:
        raise CannotPropose(f"the fee would be {at(low).ours} sat, and we pay at most {cap} for this payment")
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if at(middle).ours <= cap else (low, middle)
    return at(low)


def _extra_weight(checked: CheckedOriginal, coins: Sequence[Coin], own_scripts: Sequence[bytes]) -> Weight:
    """What the outputs weigh more than the Original's, at least 0 (lighter ones: reference 1.1.0), and the overhead of more of both."""
    paid_scripts = output_weight(checked.terms.script) * len(checked.paid_vouts)
    outputs = sum(output_weight(script) for script in own_scripts) - paid_scripts
    overhead = count_overhead(
        checked.tx,
        len(checked.tx.inputs) + len(coins),
        len(checked.tx.outputs) - len(checked.paid_vouts) + len(own_scripts),
        any(coin.kind is not ScriptKind.P2PKH for coin in coins),
    )
    if checked.tx.has_witness or len({coin.kind is ScriptKind.P2PKH for coin in coins}) > 1:
        overhead += sum(coin.kind is ScriptKind.P2PKH for coin in coins)  # their empty witness
    return max(0, outputs) + overhead


def _sender_part(checked: CheckedOriginal, coins: Sequence[Coin], for_inputs: Sats) -> Sats:
    """min(his maximum, the fee of our inputs, ceil(original rate x their weight)), and never so much that his output becomes dust."""
    if checked.contribution is None:
        return 0
    output = checked.tx.outputs[checked.contribution.vout]
    accepted = checked.rate.fee(sum(coin.payer_weight for coin in coins))
    spare = max(0, output.value - dust_limit(output.script))
    return min(checked.contribution.max, for_inputs, accepted, spare)


def _reply_bytes(sender: Sequence[PsbtInput], coins: Sequence[Coin], outputs: Sequence[TxOut]) -> int:
    """The exact size of the cleaned proposal with the largest signatures; its order does not matter."""
    nowhere = Outpoint("00" * 32, 0)
    inputs = [*sender, *(coin.final_placeholder() for coin in coins)]
    tx = Tx(2, 0, tuple(TxIn(nowhere) for _ in inputs), tuple(outputs))
    return len(Psbt(tx, tuple(inputs), tuple(PsbtOutput() for _ in outputs)).serialize())


# --- coins -----------------------------------------------------------------------------------------------------------


def choose_coins(
    checked: CheckedOriginal, candidates: Sequence[Coin], *, plan: ChannelPlan | None, rng: Entropy
) -> tuple[Coin, ...]:
    """Our coins for this payment; empty when none fits, or when the payment is below `min_amount`.

    One coin where one is enough: confirmed ones first, then those that avoid the unnecessary-input heuristic (BIP78, "Unnecessary
    input heuristic"), then those of the payer's script kind; otherwise at random. Channels may need several.
    """
    if checked.paid < checked.terms.min_amount:
        return ()
    pool = [coin for coin in candidates if plan is None or (coin.height is not None and coin.kind.is_native_segwit)]
    ranked = sorted(_shuffled(pool, rng), key=lambda coin: _preference(checked, coin, plan))
    for coin in ranked:
        if _fits(checked, plan, (coin,)):
            return (coin,)
    if plan is None:
        return ()
    several: tuple[Coin, ...] = ()
    for coin in sorted(ranked, key=lambda coin: -coin.txout.value)[:_MAX_COINS]:
        several = (*several, coin)
        if _fits(checked, plan, several):
            return several
    return ()


def _shuffled(coins: Sequence[Coin], rng: Entropy) -> list[Coin]:
    left = list(coins)
    return [left.pop(rng.below(len(left))) for _ in range(len(left))]


def _fits(checked: CheckedOriginal, plan: ChannelPlan | None, coins: tuple[Coin, ...]) -> bool:
    # P2TR stands for scripts that are not known yet: nothing standard that we hand out is heavier.
    scripts = ReceiverScripts(_P2TR_PLACEHOLDER, _P2TR_PLACEHOLDER, _P2TR_PLACEHOLDER)
    try:
        make_intent(checked, plan, coins, scripts)
    except CannotPropose:
        return False
    return True


def _preference(checked: CheckedOriginal, coin: Coin, plan: ChannelPlan | None) -> tuple[bool, int, bool]:
    if plan is not None:
        return (False, 0, coin.kind is not checked.prevouts[0].kind)
    return (coin.height is None, 2 - uih_level(checked, coin), coin.kind is not checked.prevouts[0].kind)


def uih_level(checked: CheckedOriginal, coin: Coin) -> int:
    """How well a coin avoids the unnecessary-input heuristic: 2 by the finished transaction, 1 by the reference's test, 0 not.

    The reference: min(inputs, coin) > min(outputs, payment + coin), strictly, over the outputs as they are before it is added.
    """
    least_in = min(coin.txout.value, *(prevout.value for prevout in checked.prevouts))
    before = [txout.value for txout in checked.tx.outputs]
    payment = before[checked.paid_vouts[0]] + coin.txout.value
    after = [payment if vout == checked.paid_vouts[0] else value for vout, value in enumerate(before)]
    if len(before) < 2:
        return 0
    return (least_in > min(after)) + (least_in > min(before))
