"""The sender's checklist: what makes an Original, and what makes a proposal safe to sign (BIP78, "Sender's payjoin proposal checklist").

It refuses a proposal that takes more from us than we offered, moves our inputs or outputs, or lowers the fee. Only our own inputs
are signed; what the wallet needs for that is put back from the stored Original, nothing is taken over from the peer but his inputs
and outputs.

Law: one function per step of the checklist, in the reference's order; only a proposal that passed, SafeToSign, may be signed. Live is
rebuilding plus the steps; a log is rebuilt without them, so that a step that comes later never makes an open session unreadable.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace

from pjv2.errors import BadProposal, CannotRead, NotNow, OurMistake, PeerMistake, ReplyCode, WrongUsage
from pjv2.psbt.coin import (
    P2TR_EXPLICIT_SIGHASH_WEIGHT,
    commits_to_all,
    count_overhead,
    declared_sighash_is_safe,
    predict_input_weight,
    whole_vbytes,
)
from pjv2.psbt.original import FeeContribution, check_previous_outputs, check_shape, is_nested
from pjv2.psbt.params import MAX_MIN_FEE_RATE, Params, format_params
from pjv2.psbt.tx import Psbt, PsbtInput, PsbtOutput, Tx, TxIn, TxOut, dust_limit, output_weight
from pjv2.units import MAX_MONEY, FeeRate, Outpoint, Sats, Txid, Weight

MAX_BODY_BYTES = 7055
_INCREMENTAL_RATE = FeeRate(250)
_SIGNATURE_SLACK: Weight = 8
"""How much an input of ours may grow when it is signed again: two bytes of a legacy signature."""

_SENTENCES = {
    ReplyCode.UNAVAILABLE: "The payjoin endpoint is not available for now.",
    ReplyCode.NOT_ENOUGH_MONEY: "The receiver added some inputs but could not bump the fee of the payjoin proposal.",
    ReplyCode.VERSION_UNSUPPORTED: "This version of payjoin is not supported.",
    ReplyCode.ORIGINAL_PSBT_REJECTED: "The receiver rejected the original PSBT.",
}


class BadReply(BadProposal):
    """The receiver answered with an error, or with nothing that can be read: the Original pays instead.

    `code` is the receiver's error code (None when undecodable), `debug` his text: for the log only, never for the user.
    """

    def __init__(self, message: str, code: str | None = None, supported: tuple[int, ...] = (), debug: str = "") -> None:
        super().__init__(message)
        self.code = code
        self.supported = supported
        self.debug = debug


@dataclass(frozen=True, slots=True)
class SentOriginal:
    """An Original of ours: `psbt` is signed and keeps the wallet's metadata, `tx` is the final transaction, the fallback."""

    psbt: bytes
    tx: Tx
    payee_script: bytes
    params: Params
    substitution: bool

    def __repr__(self) -> str:
        return f"SentOriginal(txid={self.tx.txid})"

    @property
    def contribution(self) -> FeeContribution | None:
        if self.params.fee_output is None or self.params.max_fee_contribution is None:
            return None
        return FeeContribution(self.params.fee_output, self.params.max_fee_contribution)


@dataclass(frozen=True, slots=True)
class SafeToSign:
    """A proposal that passed every check, our metadata restored: sign the inputs in `ours` and no other.

    `fee_paid_by_us` is what our fee output gave up, `fee` the whole fee by the PSBT's claims; `txid` is final if `txid_is_stable`.
    """

    psbt: Psbt
    ours: tuple[Outpoint, ...]
    txid: Txid
    txid_is_stable: bool
    fee_paid_by_us: Sats
    fee: Sats


# --- the Original ----------------------------------------------------------------------------------------------------


def make_sent_original(
    psbt: Psbt,
    payee_script: bytes,
    amount: Sats | None,
    *,
    min_fee_rate: FeeRate,
    substitution: bool = True,
    contribute: bool = True,
    max_contribution: Sats | None = None,
    version: int = 2,
) -> SentOriginal:
    """Make an Original of a PSBT that the wallet signed and finalised; `version` 1 is for a receiver's own server (BIP78).

    `contribute` offers the receiver the recommended fee for one input, taken from our change; `max_contribution` sets the maximum
    instead. The advertised minimum fee rate never exceeds the Original's own. Raises WrongUsage when it cannot be an Original.
    """
    try:
        check_shape(psbt)
        prevouts = check_previous_outputs(psbt)
        fee = psbt.fee
    except PeerMistake as exc:
        raise WrongUsage(f"the wallet's PSBT cannot be an Original: {exc}") from exc
    tx = psbt.extract()
    _ready_and_safe(psbt, tx, prevouts)
    _one_payee(tx, payee_script, amount)
    rate = FeeRate.of(fee, tx.weight)
    contribution = None
    if max_contribution is not None:
        contribution = explicit_contribution(tx, payee_script, max_contribution)
    elif contribute:
        contribution = recommended_contribution(tx, prevouts, payee_script, min_fee_rate)
    contribution = _no_dust_change(tx, contribution)
    params = Params(
        version=version,
        output_substitution=substitution,
        fee_output=contribution.vout if contribution else None,
        max_fee_contribution=contribution.max if contribution else None,
        # Honest receivers would be pushed into proposals that our own check rejects (protocol 4.8).
        min_fee_rate=min(min_fee_rate, rate, MAX_MIN_FEE_RATE),
    )
    sent = SentOriginal(psbt.serialize(), tx, payee_script, params, substitution)
    original_body(sent)
    return sent


# Reference: declared sighash types absent, ALL or DEFAULT; here the actual signatures too (UPBUG v).
def _ready_and_safe(psbt: Psbt, tx: Tx, prevouts: Sequence[TxOut]) -> None:
    for index, psbt_input in enumerate(psbt.inputs):
        if not psbt_input.is_final:
            raise WrongUsage(f"input {index} of the wallet's PSBT is not signed and finalised")
        if not declared_sighash_is_safe(psbt_input.sighash_type) or not commits_to_all(
            tx.inputs[index], prevouts[index]
        ):
            raise WrongUsage(
                f"input {index} is signed with another sighash type than ALL: a receiver could change more"
            )


# Reference: 0 -> MissingPayeeOutput, > 1 -> MultiplePayeeOutputs, other value -> PayeeValueNotEqual.
def _one_payee(tx: Tx, payee_script: bytes, amount: Sats | None) -> None:
    values = [txout.value for txout in tx.outputs if txout.script == payee_script]
    if len(values) != 1:
        raise WrongUsage(f"the Original must pay the payee with exactly one output, and has {len(values)}")
    if amount is not None and values[0] != amount:
        raise WrongUsage(f"the Original pays {values[0]} sat, and the URI asks for {amount}")


def recommended_contribution(
    tx: Tx, prevouts: Sequence[TxOut], payee_script: bytes, min_fee_rate: FeeRate
) -> FeeContribution | None:
    """ceil(min_fee_rate x weight of one more input), from the first output that is not the payee's, clamped to its value.

    The weight is that of our first input, or 231 when our inputs differ in kind (reference: build_recommended).
    """
    vout = next((vout for vout, txout in enumerate(tx.outputs) if txout.script != payee_script), None)
    if vout is None:
        return None
    weight: Weight = P2TR_EXPLICIT_SIGHASH_WEIGHT
    if len({prevout.kind for prevout in prevouts}) == 1:
        first = PsbtInput(
            final_script_sig=tx.inputs[0].script_sig or None, final_script_witness=tx.inputs[0].witness or None
        )
        weight = predict_input_weight(prevouts[0], first) or tx.inputs[0].weight
    return FeeContribution(vout, min(min_fee_rate.fee(weight), tx.outputs[vout].value))


def explicit_contribution(tx: Tx, payee_script: bytes, maximum: Sats) -> FeeContribution:
    """`maximum` from the one output that is not the payee's. Raises WrongUsage when there is none, several, or it holds less."""
    others = [vout for vout, txout in enumerate(tx.outputs) if txout.script != payee_script]
    if len(others) != 1:
        raise WrongUsage(f"a fee contribution needs exactly one change output, and the Original has {len(others)}")
    if maximum > tx.outputs[others[0]].value:
        raise WrongUsage(f"the change holds {tx.outputs[others[0]].value} sat, less than the contribution of {maximum}")
    return FeeContribution(others[0], maximum)


def _no_dust_change(tx: Tx, contribution: FeeContribution | None) -> FeeContribution | None:
    """What would leave dust is not offered; a contribution of zero is not sent at all (reference by 1.2.0)."""
    if contribution is None:
        return None
    txout = tx.outputs[contribution.vout]
    most = min(contribution.max, txout.value - dust_limit(txout.script))
    return FeeContribution(contribution.vout, most) if most > 0 else None


def original_body(sent: SentOriginal) -> bytes:
    """What leaves: base64 of a cleaned copy, for message A with a newline and the query behind it (BIP78 has that in the URL).

    Raises WrongUsage when message A cannot hold it (7055 bytes).
    """
    psbt = clean_original(_stored(sent))
    if sent.params.version == 1:
        return psbt.to_base64().encode("ascii")
    body = f"{psbt.to_base64()}\n{format_params(sent.params)}".encode("ascii")
    if len(body) > MAX_BODY_BYTES:
        raise WrongUsage(
            f"the Original takes {len(body)} bytes, and message A holds {MAX_BODY_BYTES}: use fewer inputs"
        )
    return body


def clean_original(psbt: Psbt) -> Psbt:
    """The copy that leaves: previous outputs, scripts and signatures, no key paths, no wallet data.

    The previous transaction of a segwit input is left out where `witness_utxo` tells the same in fewer bytes.
    """
    inputs = tuple(
        PsbtInput(
            witness_utxo=given.witness_utxo,
            non_witness_utxo=None if given.witness_utxo and given.final_script_witness else given.non_witness_utxo,
            redeem_script=None if given.is_final else given.redeem_script,
            witness_script=None if given.is_final else given.witness_script,
            final_script_sig=given.final_script_sig,
            final_script_witness=given.final_script_witness,
        )
        for given in psbt.inputs
    )
    outputs = tuple(PsbtOutput(given.redeem_script, given.witness_script) for given in psbt.outputs)
    return Psbt(psbt.tx, inputs, outputs)


def _stored(sent: SentOriginal) -> Psbt:
    try:
        return Psbt.parse(sent.psbt)
    except PeerMistake as exc:
        raise CannotRead(f"the stored Original cannot be read: {exc}") from exc


# --- the reply -------------------------------------------------------------------------------------------------------


def read_reply(payload: bytes) -> Psbt:
    """The proposal in message B's plaintext (zero padding included), or of a v1 body decoded from base64.

    Raises BadReply: the receiver's error with its `.code`, or something that is neither JSON nor a PSBT. The text for the user is
    ours; what the receiver wrote is never shown, it could be a lure.
    """
    head = payload.split(b"\0", 1)[0]
    try:
        message = json.loads(head)
    except (ValueError, RecursionError):
        pass
    else:
        raise _refusal(message)
    try:
        return Psbt.parse(payload, padded=True)
    except PeerMistake as exc:
        raise BadReply(f"the receiver's answer is neither a proposal nor an error message: {exc}") from exc


def _refusal(message: object) -> BadReply:
    code = message.get("errorCode") if isinstance(message, dict) else None
    if not isinstance(message, dict) or not isinstance(code, str):
        return BadReply("the receiver's answer is neither a proposal nor an error message")
    debug = str(message.get("message", ""))[:500]
    try:
        known = ReplyCode(code)
    except ValueError:
        return BadReply("The receiver sent an error that pjv2 does not know.", code[:100], (), debug)
    supported = _versions(message.get("supported")) if known is ReplyCode.VERSION_UNSUPPORTED else ()
    sentence = _SENTENCES[known] + (f" Use version {list(supported)}." if supported else "")
    return BadReply(sentence, known.value, supported, debug)


def _versions(supported: object) -> tuple[int, ...]:
    """The versions the receiver lists; the reference sends the list as a string (UPBUG o)."""
    if isinstance(supported, str):
        try:
            supported = json.loads(supported)
        except (ValueError, RecursionError):
            return ()
    if not isinstance(supported, list):
        return ()
    return tuple(number for number in supported if type(number) is int and 0 <= number < 1000)[:10]


# --- the proposal ----------------------------------------------------------------------------------------------------


def check_proposal(sent: SentOriginal, proposal: Psbt) -> SafeToSign:
    """Judge a proposal against the Original, in the reference's order. Raises BadProposal: then the Original pays."""
    original = _stored(sent)
    try:
        check_shape(proposal)
    except PeerMistake as exc:
        raise BadProposal(f"the proposal is refused: {exc}") from exc
    same_transaction_frame(sent, proposal)
    inputs_in_order(sent, proposal)
    check_inputs(sent, proposal)
    check_outputs(sent, proposal)
    try:
        safe, before = _safe_to_sign(sent, original, proposal), original.fee
    except PeerMistake as exc:
        raise BadProposal(f"the proposal's fee cannot be computed: {exc}") from exc
    check_fees(sent, before, safe)
    return safe


def restore_safe_to_sign(sent: SentOriginal, proposal: Psbt) -> SafeToSign:
    """What a proposal that was accepted once means for us, rebuilt without judging it again.

    Raises CannotRead when it is not a proposal for this Original: an input of ours is missing, or a fee cannot be computed.
    """
    spent = {txin.outpoint for txin in proposal.tx.inputs}
    if not all(txin.outpoint in spent for txin in sent.tx.inputs):
        raise CannotRead("the stored proposal belongs to another Original: it does not spend our inputs")
    try:
        return _safe_to_sign(sent, _stored(sent), proposal)
    except PeerMistake as exc:
        raise CannotRead(f"the stored proposal does not belong to this Original: {exc}") from exc


def _safe_to_sign(sent: SentOriginal, original: Psbt, proposal: Psbt) -> SafeToSign:
    """The value that the last steps judge and the wallet signs. Raises PeerMistake when the claimed amounts make no sense."""
    restored = restore_metadata(sent, original, proposal)
    fee = restored.fee
    known = _with_known_script_sigs(sent, original, restored)
    return SafeToSign(
        psbt=restored,
        ours=tuple(txin.outpoint for txin in sent.tx.inputs),
        txid=known.txid,
        txid_is_stable=all(not txin.script_sig for txin in known.inputs) and _all_native(restored),
        fee_paid_by_us=_contributed(sent, _successors(sent, proposal)),
        fee=fee,
    )


# BIP78: "Verify that the transaction version, and the nLockTime are unchanged."
def same_transaction_frame(sent: SentOriginal, proposal: Psbt) -> None:
    if proposal.tx.version != sent.tx.version:
        raise BadProposal("the proposal changes the transaction's version")
    if proposal.tx.locktime != sent.tx.locktime:
        raise BadProposal("the proposal changes the transaction's lock time")


# Reference 1.2.0 (#1836): the original outpoints occur in their order, tested before anything is classified.
def inputs_in_order(sent: SentOriginal, proposal: Psbt) -> None:
    ours = {txin.outpoint for txin in sent.tx.inputs}
    found = [txin.outpoint for txin in proposal.tx.inputs if txin.outpoint in ours]
    if found != [txin.outpoint for txin in sent.tx.inputs]:
        raise BadProposal("inputs of ours are missing from the proposal, or in another order")


# BIP78, "For each input in the proposal": steps a, b and c.
def check_inputs(sent: SentOriginal, proposal: Psbt) -> None:
    own = {txin.outpoint: txin for txin in sent.tx.inputs}
    for index, (txin, psbt_input) in enumerate(zip(proposal.tx.inputs, proposal.inputs, strict=True)):
        if psbt_input.has_derivation:
            raise BadProposal(f"input {index} of the proposal tells key paths")
        if psbt_input.partial_sigs or psbt_input.tap_script_sigs or psbt_input.tap_key_sig is not None:
            raise BadProposal(f"input {index} of the proposal holds partial signatures")
        if txin.outpoint in own:
            _check_our_input(index, own[txin.outpoint], txin, psbt_input)
        else:
            _check_their_input(index, sent.tx.inputs[0].sequence, txin, proposal)


# "If it is one of the sender's inputs: verify that the sequence is unchanged and that it is not finalized."
def _check_our_input(index: int, before: TxIn, after: TxIn, psbt_input: PsbtInput) -> None:
    if after.sequence != before.sequence:
        raise BadProposal(f"the proposal changes the sequence of our input {index}")
    if psbt_input.final_script_sig is not None or psbt_input.final_script_witness is not None:
        raise BadProposal(f"our input {index} of the proposal is already finalised")
    if not declared_sighash_is_safe(psbt_input.sighash_type):
        raise BadProposal(f"the proposal asks for another sighash type than ALL on our input {index}")


# "If it is one of the receiver's inputs: verify that it is finalized, and that its utxo is filled in"; "all inputs' sequence is the same".
def _check_their_input(index: int, sequence: int, txin: TxIn, proposal: Psbt) -> None:
    if not proposal.inputs[index].is_final:
        raise BadProposal(f"the receiver's input {index} is not signed")
    if txin.sequence != sequence:
        raise BadProposal(f"the receiver's input {index} has another sequence than our first input")
    try:
        known = proposal.prevout(index)
    except PeerMistake as exc:
        raise BadProposal(f"the receiver's input {index} is inconsistent: {exc}") from exc
    if known is None:
        raise BadProposal(f"the proposal does not tell which output the receiver's input {index} spends")


# BIP78, "For each output in the proposal".
def check_outputs(sent: SentOriginal, proposal: Psbt) -> None:
    for psbt_output in proposal.outputs:
        if psbt_output.has_derivation:
            raise BadProposal("an output of the proposal tells key paths")
    found = _successors(sent, proposal)
    contribution, contributed = sent.contribution, _contributed(sent, found)
    for vout, (expected, txout) in enumerate(zip(sent.tx.outputs, found, strict=False)):
        if contribution is not None and vout == contribution.vout and txout.script == expected.script:
            if contributed > contribution.max:
                raise BadProposal(
                    f"the proposal takes {contributed} sat from our change, and {contribution.max} were offered"
                )
        elif expected.script == sent.payee_script:
            if not sent.substitution and (txout.script != expected.script or txout.value < expected.value):
                raise BadProposal("the proposal changes the payee's output, which we did not allow")
        elif txout.value < expected.value:
            raise BadProposal(f"the proposal lowers our output {vout}")
    if len(found) < len(sent.tx.outputs):
        raise BadProposal("outputs of ours are missing from the proposal, or in another order")


# BIP78's cursor over the original outputs (written out literally: 759d0e81, 4062b567).
def _successors(sent: SentOriginal, proposal: Psbt) -> tuple[TxOut, ...]:
    """The outputs that take the place of the Original's, in its order, as far as they are found.

    The payee's may become any other, ours are known by their script; what is passed over is an additional one of the receiver's.
    """
    found: list[TxOut] = []
    for txout in proposal.tx.outputs:
        if len(found) == len(sent.tx.outputs):
            break
        expected = sent.tx.outputs[len(found)]
        if expected.script in (txout.script, sent.payee_script):
            found.append(txout)
    return tuple(found)


def _contributed(sent: SentOriginal, found: Sequence[TxOut]) -> Sats:
    """What our fee output gave up."""
    contribution = sent.contribution
    if contribution is None or contribution.vout >= len(found):
        return 0
    before, after = sent.tx.outputs[contribution.vout], found[contribution.vout]
    return max(0, before.value - after.value) if after.script == before.script else 0


def restore_metadata(sent: SentOriginal, original: Psbt, proposal: Psbt) -> Psbt:
    """The proposal with our own input and output maps; of the receiver's maps only previous output and final scripts are kept.

    The redeem script is restored too, which the reference forgets (UPBUG p). Output maps come back by script, as BIP78 prints it:
    a hardware signer recognises its change by them, also when the change paid a fee.
    """
    own = {txin.outpoint: psbt_input for txin, psbt_input in zip(original.tx.inputs, original.inputs, strict=True)}
    inputs = []
    for txin, given in zip(proposal.tx.inputs, proposal.inputs, strict=True):
        mine = own.get(txin.outpoint)
        if mine is None:
            kept = PsbtInput(
                witness_utxo=given.witness_utxo,
                non_witness_utxo=given.non_witness_utxo,
                final_script_sig=given.final_script_sig or None,
                final_script_witness=given.final_script_witness or None,
            )
        else:
            kept = replace(
                mine,
                partial_sigs=(),
                sighash_type=None,
                final_script_sig=None,
                final_script_witness=None,
                tap_key_sig=None,
                tap_script_sigs=(),
            )
        inputs.append(kept)
    waiting = list(zip(original.tx.outputs, original.outputs, strict=True))
    outputs = []
    for txout in proposal.tx.outputs:
        at = next((at for at, (known, _) in enumerate(waiting) if known.script == txout.script), None)
        outputs.append(PsbtOutput() if at is None else waiting.pop(at)[1])
    return Psbt(proposal.tx, tuple(inputs), tuple(outputs))


# BIP78: "absolute fee", "additional fee contribution", "effective fee rate"; by the receiver's claims about his inputs.
def check_fees(sent: SentOriginal, before: Sats, safe: SafeToSign) -> None:
    restored, fee, contributed = safe.psbt, safe.fee, safe.fee_paid_by_us
    claimed = sum(txout.value for txout in restored.prevouts())
    if claimed > MAX_MONEY:
        raise BadProposal("the proposal's inputs are worth more than all bitcoin")
    if fee < before:
        raise BadProposal(f"the proposal lowers the fee from {before} to {fee} sat")
    if contributed > fee - before:
        raise BadProposal(
            f"the payee keeps part of our contribution: {contributed} sat taken, fee raised by {fee - before}"
        )
    rate = FeeRate.of(before, sent.tx.weight)
    allowed = rate.fee(_additional_input_weight(sent, restored))
    if contributed > allowed:
        raise BadProposal(
            f"our contribution of {contributed} sat pays for more than the receiver's inputs ({allowed} sat)"
        )
    weight = _charged_weight(sent, _expected_final(sent, restored))
    if fee * 1000 < sent.params.min_fee_rate.sat_per_kwu * weight:
        raise BadProposal(f"the proposal pays less than {sent.params.min_fee_rate}")


def _additional_input_weight(sent: SentOriginal, restored: Psbt) -> Weight:
    ours = {txin.outpoint for txin in sent.tx.inputs}
    weight = 0
    for index, txin in enumerate(restored.tx.inputs):
        prevout = restored.prevout(index)
        if txin.outpoint in ours or prevout is None:
            continue
        predicted = predict_input_weight(prevout, restored.inputs[index])
        if predicted is None:
            raise BadProposal(f"the weight of the receiver's input {index} cannot be predicted ({prevout.kind})")
        weight += predicted
    return weight


def _expected_final(sent: SentOriginal, restored: Psbt) -> Tx:
    """The proposal as it will look signed: our inputs with the scripts they have in the Original."""
    own = {txin.outpoint: txin for txin in sent.tx.inputs}
    return replace(restored.tx, inputs=tuple(own.get(txin.outpoint, txin) for txin in restored.extract().inputs))


def _charged_weight(sent: SentOriginal, final: Tx) -> Weight:
    """The weight that the fee rate is measured by: without what no rule charges to anybody.

    Longer counts and the segwit marker that a witness of the receiver's brings to a legacy Original are nobody's (protocol 4.6).
    """
    ours = {txin.outpoint for txin in sent.tx.inputs}
    empty = sum(final.has_witness and not txin.witness and txin.outpoint not in ours for txin in final.inputs)
    return final.weight - empty - count_overhead(sent.tx, len(final.inputs), len(final.outputs), final.has_witness)


def _with_known_script_sigs(sent: SentOriginal, original: Psbt, restored: Psbt) -> Tx:
    nested = {
        txin.outpoint: txin.script_sig
        for txin, prevout in zip(sent.tx.inputs, original.prevouts(), strict=True)
        if is_nested(prevout, txin.witness)
    }
    return replace(
        restored.tx,
        inputs=tuple(
            replace(txin, script_sig=nested.get(txin.outpoint, psbt_input.final_script_sig or b""))
            for txin, psbt_input in zip(restored.tx.inputs, restored.inputs, strict=True)
        ),
    )


def _all_native(psbt: Psbt) -> bool:
    return all(prevout.kind.is_native_segwit for prevout in psbt.prevouts())


# --- after signing ---------------------------------------------------------------------------------------------------


def check_signed(sent: SentOriginal, safe: SafeToSign, signed: bytes) -> Tx:
    """The final transaction, ready to broadcast; the real fee rate is checked once more (BIP78: "after signing").

    Raises NotNow when the wallet left an input of ours unsigned, OurMistake when it changed anything or signed other than ALL,
    BadProposal when the signed transaction pays less than the minimum fee rate.
    """
    try:
        answer = Psbt.parse(signed)
    except PeerMistake as exc:
        raise OurMistake(f"our wallet returned something else than a PSBT: {exc}") from exc
    if answer.tx.stripped() != safe.psbt.tx:
        raise OurMistake("our wallet returned another transaction than it was asked to sign")
    txins: list[TxIn] = []
    grown = 0
    before = {txin.outpoint: txin for txin in sent.tx.inputs}
    prevouts = safe.psbt.prevouts()
    for index, (txin, given, asked) in enumerate(
        zip(safe.psbt.tx.inputs, answer.inputs, safe.psbt.inputs, strict=True)
    ):
        ours = txin.outpoint in safe.ours
        source = given if ours else asked
        if ours and not given.is_final:
            raise NotNow(f"our wallet did not sign input {index} of the proposal: unlock it, or let it sign PSBTs")
        final = replace(txin, script_sig=source.final_script_sig or b"", witness=source.final_script_witness or ())
        if ours:
            if not commits_to_all(final, prevouts[index]):
                raise OurMistake(f"our wallet's signature on input {index} does not commit to the whole transaction")
            grown += min(max(0, final.weight - before[txin.outpoint].weight), _SIGNATURE_SLACK)
        txins.append(final)
    tx = replace(safe.psbt.tx, inputs=tuple(txins))
    if safe.fee * 1000 < sent.params.min_fee_rate.sat_per_kwu * (_charged_weight(sent, tx) - grown):
        raise BadProposal(f"the signed proposal pays less than {sent.params.min_fee_rate}")
    if safe.txid_is_stable and tx.txid != safe.txid:
        raise OurMistake("our wallet's signature changed the transaction id")
    return tx


def build_reclaim(sent: SentOriginal, script: bytes, fee_rate: FeeRate) -> Psbt:
    """Spend the Original's inputs back to `script`, unsigned, at `fee_rate` and above the Original's fee, so that it replaces it.

    Raises WrongUsage when too little would be left.
    """
    original = _stored(sent)
    inputs_weight = sent.tx.weight - sent.tx.output_weight
    weight = whole_vbytes(inputs_weight + output_weight(script))
    fee = max(fee_rate.fee(weight), original.fee + _INCREMENTAL_RATE.fee(weight))
    value = sum(prevout.value for prevout in original.prevouts()) - fee
    if value < dust_limit(script):
        raise WrongUsage(f"a fee of {fee} sat would leave {max(value, 0)} sat, which is dust")
    tx = Tx(2, 0, tuple(TxIn(txin.outpoint) for txin in sent.tx.inputs), (TxOut(value, script),))
    unsigned = Psbt(tx, original.inputs, (PsbtOutput(),))
    return restore_metadata(sent, original, unsigned)
