"""The receiver's checklist: from bytes a stranger sent to an Original that we may answer (BIP78, "Receiver's original PSBT checklist").

It refuses what cannot be broadcast, pays too little, spends our own coins or contradicts the chain. What an input is worth is
read from the chain source, never from the PSBT. Inputs seen before are refused by the store, in the event's own transaction.

Law: one function per rule, the rule quoted above it; only a CheckedOriginal can be answered with a proposal. Live is rebuilding plus
the rules; a log is rebuilt without them, so that a rule that comes later never makes an open session unreadable.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from pjv2.errors import BadOriginal, CannotRead, PeerMistake, ReplyCode
from pjv2.psbt.coin import Coin, commits_to_all
from pjv2.psbt.params import Params, parse_params, restore_params
from pjv2.psbt.tx import Psbt, PsbtInput, ScriptKind, Tx, TxOut
from pjv2.units import MAX_MONEY, FeeRate, Instant, Outpoint, Sats, Txid

# Shown for owned and for seen inputs alike, so that a prober learns nothing.
INPUTS_REFUSED = "the receiver rejected the original PSBT"
CHANNEL_SECONDS = 300
_SEQUENCE_NO_LOCK, _SEQUENCE_BY_TIME, _SEQUENCE_VALUE = 1 << 31, 1 << 22, 0xFFFF


@dataclass(frozen=True, slots=True)
class OriginalPayload:
    """An Original PSBT that parses and is consistent in itself; nothing of it is believed yet. `v1`: it came in clear text."""

    psbt: Psbt
    params: Params
    v1: bool = False


@dataclass(frozen=True, slots=True)
class Suitability:
    """What the chain source said about broadcasting the Original; `known` means that it is under way already."""

    verdict: Literal["accepted", "known", "refused", "unverifiable"]
    reason: str = ""


@dataclass(frozen=True, slots=True)
class Prevout:
    """A previous output as the chain source tells it; `height` None means unconfirmed.

    `time` is the median time past of the block before the one that holds it (BIP68); needed only for time-based relative locks.
    """

    txout: TxOut
    height: int | None
    coinbase: bool = False
    spent_by: Txid | None = None
    time: float | None = None


@dataclass(frozen=True, slots=True)
class OriginalFacts:
    """What wallet and chain know about an Original, gathered in one trip.

    `prevouts` lacks what was not found; `owned` are the inputs that are ours, spent and locked coins too; `economy_rate` is the
    chain source's 144-block estimate; `tip_time` the median time past of the tip.
    """

    tip: int
    suitability: Suitability
    prevouts: Mapping[Outpoint, Prevout]
    owned: frozenset[Outpoint]
    economy_rate: FeeRate
    tip_time: float = 0.0


@dataclass(frozen=True, slots=True)
class ReceiverTerms:
    """What this session asks and allows: its own payment script, the amount asked (None: any), and the limits on what we pay."""

    script: bytes
    amount: Sats | None
    min_fee_rate: FeeRate
    max_fee_rate: FeeRate
    max_fee_share_ppm: int
    min_amount: Sats


@dataclass(frozen=True, slots=True)
class FeeContribution:
    """The output that the payer lets pay for our inputs, and up to how much."""

    vout: int
    max: Sats


@dataclass(frozen=True, slots=True)
class CheckedOriginal:
    """An Original that passed every rule: `tx` is the fallback transaction, and a proposal may be made for it.

    `prevouts` are per input and from the chain; `rate` is the floor of fee / weight; `txid_is_stable` says that no input has a
    scriptSig, so that a transaction's id is known before it is signed.
    """

    payload: OriginalPayload
    tx: Tx
    prevouts: tuple[TxOut, ...]
    paid: Sats
    paid_vouts: tuple[int, ...]
    fee: Sats
    rate: FeeRate
    contribution: FeeContribution | None
    substitution: bool
    txid_is_stable: bool
    terms: ReceiverTerms
    tip: int = 0
    tip_time: float = 0.0

    @property
    def sequence(self) -> int:
        """The sequence that every contributed input copies: that of the first input (BIP78, "Receiver's payjoin proposal PSBT")."""
        return self.tx.inputs[0].sequence

    @property
    def outpoints(self) -> frozenset[Outpoint]:
        return frozenset(txin.outpoint for txin in self.tx.inputs)

    def sender_input(self, index: int) -> PsbtInput:
        """The map of one of the payer's inputs in a proposal: its previous output and nothing else.

        A segwit input needs only `witness_utxo`; a legacy one keeps the previous transaction, which signers hash.
        """
        given = self.payload.psbt.inputs[index]
        if given.non_witness_utxo is not None and not self.tx.inputs[index].witness:
            return PsbtInput(non_witness_utxo=given.non_witness_utxo)
        return PsbtInput(witness_utxo=self.prevouts[index])


# --- parsing ---------------------------------------------------------------------------------------------------------


def parse_original(body: bytes, *, v1: bool = False) -> OriginalPayload:
    """Read the body of message A, or of a v1 request: base64 PSBT, newline, query; zero padding is ignored.

    Raises BadOriginal, whose `.reply` is what the payer is told (reference: unchecked_from_payload).
    """
    return _read_payload(body, v1, parse_params)


def restore_payload(body: bytes, *, v1: bool = False) -> OriginalPayload:
    """The body of an Original that was accepted once: as `parse_original`, but today's limits for the parameters are not asked.

    What stays refused is no PSBT, no transaction, or contradicts itself, and no version ever accepted that. Raises BadOriginal.
    """
    return _read_payload(body, v1, restore_params)


def _read_payload(body: bytes, v1: bool, read_params: Callable[..., Params]) -> OriginalPayload:
    try:
        text = body.decode("utf-8")
    except UnicodeDecodeError as exc:
        raise BadOriginal("the payer's message is not text") from exc
    encoded, newline, query = text.partition("\n")
    if not newline:
        raise BadOriginal("the payer's message has no line break between PSBT and parameters")
    params = read_params(query.strip("\0"), default_version=1 if v1 else 2)
    try:
        psbt = Psbt.from_base64(encoded.strip("\0"))
        check_shape(psbt)
        check_previous_outputs(psbt)
    except PeerMistake as exc:
        raise BadOriginal(f"the payer's PSBT is refused: {exc}") from exc
    return OriginalPayload(psbt, params, v1)


# "Duplicate inputs silently accepted" (reference, fixed 2026-01), zero inputs and sums beyond MAX_MONEY: none is a transaction.
def check_shape(psbt: Psbt) -> None:
    """The unsigned transaction has inputs and outputs, spends nothing twice, and pays no more than exists. Raises PeerMistake."""
    tx = psbt.tx
    if not tx.inputs or not tx.outputs:
        raise PeerMistake("a payment needs inputs and outputs")
    if len({txin.outpoint for txin in tx.inputs}) != len(tx.inputs):
        raise PeerMistake("an input is spent twice")
    if sum(txout.value for txout in tx.outputs) > MAX_MONEY:
        raise PeerMistake("the outputs are worth more than all bitcoin")


# BIP174: witness and non-witness utxo belong to the outpoint and agree. BIP78: "The PSBT MUST include complete UTXO data."
def check_previous_outputs(psbt: Psbt) -> tuple[TxOut, ...]:
    """Every input tells its previous output, without contradiction and within MAX_MONEY. Raises PeerMistake."""
    prevouts = psbt.prevouts()
    if sum(txout.value for txout in prevouts) > MAX_MONEY:
        raise PeerMistake("the inputs are worth more than all bitcoin")
    return prevouts


# --- judging and rebuilding ------------------------------------------------------------------------------------------


def check_original(payload: OriginalPayload, facts: OriginalFacts, terms: ReceiverTerms) -> CheckedOriginal:
    """Judge an Original by the facts. Raises BadOriginal: `.reply` is the code for the payer, the message is for us."""
    every_input_signed(payload)
    broadcast_suitability(facts)
    real_previous_outputs(payload, facts)
    no_money_from_nowhere(payload, facts)
    checked = restore_original(payload, facts.prevouts, terms, tip=facts.tip, tip_time=facts.tip_time)
    sufficient_fee(checked)
    inputs_not_owned(checked, facts)
    payment_is_there(checked)
    sufficient_amount(checked)
    return checked


def restore_original(
    payload: OriginalPayload, prevouts: Mapping[Outpoint, Prevout], terms: ReceiverTerms, *, tip: int, tip_time: float
) -> CheckedOriginal:
    """What an Original with these previous outputs means for us, without asking whether it should be accepted.

    `check_original` asks its rules about this value; a log, whose Original was accepted once, needs it only rebuilt. What is
    derived here is the meaning of old logs: a new refusal belongs into a rule. Raises CannotRead when a previous output is missing or
    they are worth less than the outputs: these facts belong to another Original.
    """
    tx = payload.psbt.extract()
    found = [prevouts.get(txin.outpoint) for txin in tx.inputs]
    spent = tuple(real.txout for real in found if real is not None)
    if len(spent) != len(found):
        raise CannotRead("the recorded facts lack a previous output of the Original")
    fee = _fee(tx, spent)
    if fee < 0:
        raise CannotRead("the recorded previous outputs are worth less than the Original pays out")
    paid_vouts = tuple(vout for vout, txout in enumerate(tx.outputs) if txout.script == terms.script)
    return CheckedOriginal(
        payload=payload,
        tx=tx,
        prevouts=spent,
        paid=sum(tx.outputs[vout].value for vout in paid_vouts),
        paid_vouts=paid_vouts,
        fee=fee,
        rate=FeeRate.of(fee, tx.weight),
        contribution=usable_contribution(payload.params, tx, paid_vouts),
        substitution=substitution_allowed(payload),
        txid_is_stable=txid_is_stable(tx, spent),
        terms=terms,
        tip=tip,
        tip_time=tip_time,
    )


def _fee(tx: Tx, spent: Sequence[TxOut]) -> Sats:
    return sum(txout.value for txout in spent) - sum(txout.value for txout in tx.outputs)


# BIP78, "Sender's original PSBT": "all the inputs ... MUST be finalized".
def every_input_signed(payload: OriginalPayload) -> None:
    for index, psbt_input in enumerate(payload.psbt.inputs):
        if not psbt_input.is_final:
            raise BadOriginal(f"input {index} of the Original is not signed")


# BIP78, receiver's checklist: "verify the original transaction can be broadcast". Known already = under way, never a refusal.
def broadcast_suitability(facts: OriginalFacts) -> None:
    verdict, reason = facts.suitability.verdict, facts.suitability.reason
    if verdict == "refused":
        raise BadOriginal(f"the network would not take the Original: {reason or 'no reason was given'}")
    if verdict == "unverifiable":
        raise BadOriginal(
            f"no chain source could test the Original ({reason or 'no reason was given'}): "
            "configure one that can, such as bitcoind's testmempoolaccept",
            ReplyCode.UNAVAILABLE,
        )


# Protocol: previous outputs come from the chain; a claimed script once got a receiver to sign its own coin away (1682f627).
def real_previous_outputs(payload: OriginalPayload, facts: OriginalFacts) -> None:
    for index, txin in enumerate(payload.psbt.tx.inputs):
        real = facts.prevouts.get(txin.outpoint)
        if real is None:
            raise BadOriginal(
                f"the chain source does not know {txin.outpoint}, which the Original spends", ReplyCode.UNAVAILABLE
            )
        if payload.psbt.prevout(index) not in (None, real.txout):
            raise BadOriginal(f"the Original tells another output for {txin.outpoint} than the chain holds")


# BIP78 expects a fee; what pays out more than it spends is no transaction.
def no_money_from_nowhere(payload: OriginalPayload, facts: OriginalFacts) -> None:
    tx = payload.psbt.tx
    if _fee(tx, [facts.prevouts[txin.outpoint].txout for txin in tx.inputs]) < 0:
        raise BadOriginal("the Original pays out more than it spends")


# Reference: check_broadcast_suitability(min_fee_rate): floor(fee / weight) >= min, "Original PSBT fee rate too low".
def sufficient_fee(checked: CheckedOriginal) -> None:
    if checked.rate < checked.terms.min_fee_rate:
        raise BadOriginal(
            f"the Original's fee rate is too low: {checked.rate}, and {checked.terms.min_fee_rate} is asked"
        )


# BIP78: "If the sender included inputs ... owned by the receiver, return original-psbt-rejected". By outpoint, not by script.
def inputs_not_owned(checked: CheckedOriginal, facts: OriginalFacts) -> None:
    for txin, prevout in zip(checked.tx.inputs, checked.prevouts, strict=True):
        if txin.outpoint in facts.owned or prevout.script == checked.terms.script:
            raise BadOriginal(INPUTS_REFUSED)


# Reference: identify_receiver_outputs, "Missing payment.". Only this session's own script counts; an older address of ours does not.
def payment_is_there(checked: CheckedOriginal) -> None:
    if not checked.paid_vouts:
        raise BadOriginal("the Original does not pay this session's address")


# The reference leaves it to the application: less than asked is no payment, more is accepted.
def sufficient_amount(checked: CheckedOriginal) -> None:
    asked = checked.terms.amount or 1
    if checked.paid < asked:
        raise BadOriginal(f"the Original pays {checked.paid} sat, and {asked} sat are asked")


# Protocol 4.2(6): the contribution is dropped, not clamped, when its index is out of range, points to an output of ours, or the
# maximum is larger than that output's value (equal is kept).
def usable_contribution(params: Params, tx: Tx, paid_vouts: Sequence[int]) -> FeeContribution | None:
    vout, most = params.fee_output, params.max_fee_contribution
    if vout is None or not most or vout >= len(tx.outputs) or vout in paid_vouts or most > tx.outputs[vout].value:
        return None
    return FeeContribution(vout, most)


# BIP78, `disableoutputsubstitution=true`; BIP77: a v1 sender never allows it.
def substitution_allowed(payload: OriginalPayload) -> bool:
    return payload.params.output_substitution and payload.params.version != 1 and not payload.v1


# #1718: "segwit therefore stable" is wrong for P2SH-P2WPKH; stable only if every input is native segwit, by the real outputs.
def txid_is_stable(tx: Tx, prevouts: Sequence[TxOut]) -> bool:
    return all(
        prevout.kind.is_native_segwit and not txin.script_sig for txin, prevout in zip(tx.inputs, prevouts, strict=True)
    )


# --- rule 2 of the channels ------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class RuleFacts:
    """What is looked up again right before channels are reserved, secured and posted.

    `prevouts` for every input of the Original and every coin of ours; `spends_seen` the inputs with any spend in sight.
    """

    tip: int
    tip_time: float
    prevouts: Mapping[Outpoint, Prevout]
    spends_seen: frozenset[Outpoint]
    can_sign: bool
    economy_rate: FeeRate


def channel_obstacle(
    checked: CheckedOriginal,
    coins: Sequence[Coin],
    recheck: RuleFacts,
    now: Instant,
    expires: Instant,
    *,
    own_input_required: bool = True,
) -> str | None:
    """Why no channel may be opened in this payjoin, in words for the log; None when nothing stands in the way.

    Every clause is asked again before reserve, secure and post. `own_input_required` False is the named risk `own_input = "prefer"`.
    """
    return (
        _no_own_input(coins, own_input_required)
        or _substitution_disabled(checked)
        or _too_late(now, expires)
        or _cannot_sign(recheck)
        or _unknown_or_changed(checked, coins, recheck)
        or _not_native_segwit(checked, coins)
        or _unconfirmed(checked, coins, recheck)
        or _spend_in_sight(checked, coins, recheck)
        or _signature_leaves_freedom(checked)
        or _relative_lock(checked, coins, recheck)
        or _rate_too_low(checked, recheck)
    )


# Rule 4: without an input of ours, signed ALL, the sender could re-make the transaction under another id.
def _no_own_input(coins: Sequence[Coin], required: bool) -> str | None:
    return "no coin of ours takes part" if required and not coins else None


def _substitution_disabled(checked: CheckedOriginal) -> str | None:
    return None if checked.substitution else "the payer does not allow output substitution"


def _too_late(now: Instant, expires: Instant) -> str | None:
    return None if expires - now >= CHANNEL_SECONDS else f"less than {CHANNEL_SECONDS} seconds remain"


def _cannot_sign(recheck: RuleFacts) -> str | None:
    return None if recheck.can_sign else "the wallet cannot sign now"


# "... its previous output read from the chain source, never from the PSBT"
def _unknown_or_changed(checked: CheckedOriginal, coins: Sequence[Coin], recheck: RuleFacts) -> str | None:
    for outpoint, expected in _spent(checked, coins):
        real = recheck.prevouts.get(outpoint)
        if real is None:
            return f"the chain source does not know {outpoint}"
        if real.txout != expected:
            return f"the chain source tells another output for {outpoint} than before"
    return None


# "every input, the sender's and ours, is native segwit"
def _not_native_segwit(checked: CheckedOriginal, coins: Sequence[Coin]) -> str | None:
    if not checked.txid_is_stable:
        return "an input of the payer is not native segwit"
    if not all(coin.kind.is_native_segwit for coin in coins):
        return "a coin of ours is not native segwit"
    return None


# "... confirmed"; a coinbase output must be mature too, or the parent is not final in practice.
def _unconfirmed(checked: CheckedOriginal, coins: Sequence[Coin], recheck: RuleFacts) -> str | None:
    for outpoint, _ in _spent(checked, coins):
        real = recheck.prevouts[outpoint]
        if real.height is None or real.height > recheck.tip:
            return f"{outpoint} is not confirmed"
        if real.coinbase and recheck.tip + 1 - real.height < 100:
            return f"{outpoint} is an immature coinbase output"
    return None


# "no spend of any input is seen", the Original itself included: once it is out, it races the proposal.
def _spend_in_sight(checked: CheckedOriginal, coins: Sequence[Coin], recheck: RuleFacts) -> str | None:
    for outpoint, _ in _spent(checked, coins):
        if outpoint in recheck.spends_seen or recheck.prevouts[outpoint].spent_by is not None:
            return f"a spend of {outpoint} is in sight"
    return None


# "the sender's signatures are ALL or DEFAULT": the byte of the actual signatures, not what the PSBT declares (UPBUG v).
def _signature_leaves_freedom(checked: CheckedOriginal) -> str | None:
    for index, (txin, prevout) in enumerate(zip(checked.tx.inputs, checked.prevouts, strict=True)):
        if not commits_to_all(txin, prevout):
            return f"the payer's signature on input {index} does not commit to the whole transaction"
    return None


# "no sequence is a relative lock that our coin does not already satisfy (our input copies the first input's sequence)"
def _relative_lock(checked: CheckedOriginal, coins: Sequence[Coin], recheck: RuleFacts) -> str | None:
    sequences = [(txin.outpoint, txin.sequence) for txin in checked.tx.inputs]
    sequences += [(coin.outpoint, checked.sequence) for coin in coins]
    for outpoint, sequence in sequences:
        real = recheck.prevouts[outpoint]
        if not lock_is_satisfied(
            checked.tx.version, sequence, real.height, real.time, tip=recheck.tip, tip_time=recheck.tip_time
        ):
            return f"the payer's sequence is a relative lock that {outpoint} does not satisfy yet"
    return None


# "the Original's rate is at least the chain source's 144-block estimate"
def _rate_too_low(checked: CheckedOriginal, recheck: RuleFacts) -> str | None:
    if checked.rate >= recheck.economy_rate:
        return None
    return f"the Original pays {checked.rate}, below the estimate of {recheck.economy_rate} for a day"


def _spent(checked: CheckedOriginal, coins: Sequence[Coin]) -> list[tuple[Outpoint, TxOut]]:
    sender = [(txin.outpoint, txout) for txin, txout in zip(checked.tx.inputs, checked.prevouts, strict=True)]
    return sender + [(coin.outpoint, coin.txout) for coin in coins]


def lock_is_satisfied(
    version: int, sequence: int, height: int | None, time: float | None, *, tip: int, tip_time: float
) -> bool:
    """A coin mined at `height` may be spent with `sequence` in the next block (BIP68); what is not known counts as unsatisfied."""
    value = sequence & _SEQUENCE_VALUE
    if version & 0xFFFFFFFF < 2 or sequence & _SEQUENCE_NO_LOCK or value == 0:
        return True
    if height is None:
        return False
    if sequence & _SEQUENCE_BY_TIME:
        return time is not None and time + value * 512 <= tip_time
    return height + value <= tip + 1


def is_nested(txin: TxOut, witness: tuple[bytes, ...]) -> bool:
    """A P2SH input whose signatures are in the witness: its scriptSig is fixed before it is signed."""
    return txin.kind is ScriptKind.P2SH and bool(witness)
