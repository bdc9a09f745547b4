"""The proposal: from an Intent to a PSBT that is safe to sign, and from the signed one to what is posted.

It refuses a wallet's answer that changes the transaction, signs an input of the payer or leaves one of ours unsigned, and a reply
that outgrew what was planned. Also here: the two transactions that need nobody, the way out and the child that pays for its parent.

Law: inputs and outputs are placed once, at random, and then frozen; what is posted is copied field by field from an allow-list.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace

from pjv2.errors import CannotRead, NotNow, OurMistake, PeerMistake, ReplyCode, WrongUsage
from pjv2.psbt.coin import Coin, commits_to_all, whole_vbytes
from pjv2.psbt.original import CheckedOriginal, is_nested
from pjv2.psbt.params import SUPPORTED_VERSIONS
from pjv2.psbt.plan import FUNDING_PLACEHOLDER, MAX_REPLY_BYTES, Intent, OutputRole, PlannedOutput
from pjv2.psbt.tx import Psbt, PsbtInput, PsbtOutput, ScriptKind, Tx, TxIn, TxOut, dust_limit, kind_of, output_weight
from pjv2.units import Entropy, FeeRate, Outpoint, Sats, Txid, Weight

INCREMENTAL_RATE = FeeRate(250)
"""What a replacement pays at least for its own weight on top of what it replaces (BIP125 rule 4)."""

_REPLY_MESSAGES = {
    ReplyCode.UNAVAILABLE: "The payjoin endpoint is not available for now.",
    ReplyCode.NOT_ENOUGH_MONEY: "The receiver could not bump the fee of the payjoin proposal.",
    ReplyCode.VERSION_UNSUPPORTED: "This version of payjoin is not supported.",
    ReplyCode.ORIGINAL_PSBT_REJECTED: "The receiver rejected the original PSBT.",
}


@dataclass(frozen=True, slots=True)
class Funding:
    """A channel's output in the proposal: which order, at which index, with which value and script."""

    channel: int
    vout: int
    value: Sats
    script: bytes


@dataclass(frozen=True, slots=True)
class ProvisionalProposal:
    """A proposal whose inputs and outputs are frozen; `psbt` is to be signed by our wallet, for `ours` only.

    `txid` counts the scriptSigs that are known already (`script_sigs`, per input); it is final only if `txid_is_stable`.
    """

    psbt: Psbt
    ours: tuple[Outpoint, ...]
    txid: Txid
    txid_is_stable: bool
    funding: tuple[Funding, ...]
    change_vout: int | None
    script_sigs: tuple[bytes, ...] = ()


@dataclass(frozen=True, slots=True)
class PayjoinProposal:
    """The cleaned proposal as it is posted (`psbt`), and its transaction with our final scripts and none of the payer's witnesses."""

    psbt: bytes
    txid: Txid
    tx: Tx


# --- drafting --------------------------------------------------------------------------------------------------------


def draft_proposal(
    checked: CheckedOriginal, intent: Intent, funding_scripts: Sequence[bytes], rng: Entropy
) -> ProvisionalProposal:
    """Place inputs and outputs and freeze them; `funding_scripts` are the channels' output scripts, in the order of `intent.orders`.

    Raises OurMistake when the scripts do not fit the intent, or the amounts do not add up.
    """
    own = _own_outputs(intent, funding_scripts)
    outputs = _place_outputs(checked, intent, own, rng)
    txins, maps = _place_inputs(checked, intent.coins, rng)
    tx = Tx(checked.tx.version, checked.tx.locktime, tuple(txins), tuple(txout for txout, _ in outputs))
    psbt = Psbt(tx, tuple(maps), tuple(PsbtOutput() for _ in outputs))
    _conserved(checked, intent, tx)
    return _provisional(checked, intent, psbt, tuple(planned for _, planned in outputs))


def _own_outputs(intent: Intent, funding_scripts: Sequence[bytes]) -> list[tuple[TxOut, PlannedOutput]]:
    if len(funding_scripts) != len(intent.orders):
        raise OurMistake(f"{len(intent.orders)} funding scripts are needed, and {len(funding_scripts)} were given")
    placed = []
    for planned in intent.outputs:
        script = planned.script
        if script is None and planned.channel is not None:
            script = funding_scripts[planned.channel]
            if kind_of(script) not in (ScriptKind.P2WSH, ScriptKind.P2TR):
                raise OurMistake("a funding script must be P2WSH or P2TR (34 bytes): the fee was computed for that")
        placed.append((TxOut(planned.value, script or FUNDING_PLACEHOLDER), planned))
    return placed


def _below(rng: Entropy, limit: int) -> int:
    return rng.below(limit) if limit > 1 else 0


# BIP78: "the receiver ... SHOULD insert them at a random index"; the payer's outputs keep their order, and one of ours stands in
# each of the payment's slots, because the payer's check consumes whatever it finds there (protocol 4.4).
def _place_outputs(
    checked: CheckedOriginal, intent: Intent, own: list[tuple[TxOut, PlannedOutput]], rng: Entropy
) -> list[tuple[TxOut, PlannedOutput | None]]:
    slots = len(checked.paid_vouts)
    in_place = all(planned.role is OutputRole.PAYMENT for _, planned in own)
    if len(own) < slots or (not checked.substitution and (len(own) != slots or not in_place)):
        raise OurMistake("the payer does not allow these outputs: this intent was made for another Original")
    pool = list(own) if in_place else [own.pop(_below(rng, len(own))) for _ in range(len(own))]
    outputs: list[tuple[TxOut, PlannedOutput | None]] = []
    for vout, txout in enumerate(checked.tx.outputs):
        if vout in checked.paid_vouts:
            outputs.append(pool.pop(0))
        elif checked.contribution is not None and vout == checked.contribution.vout:
            # By its index in the Original, never searched by script (reference, fixed by 1.2.0).
            outputs.append((replace(txout, value=txout.value - intent.sender_fee), None))
        else:
            outputs.append((txout, None))
    for extra in pool:
        outputs.insert(_below(rng, len(outputs) + 1), extra)
    return outputs


# Reference contribute_inputs: every input gets the sequence of the Original's first input, at a uniformly random index; all in one
# call, because a second call loses value (UPBUG d).
def _place_inputs(checked: CheckedOriginal, coins: Sequence[Coin], rng: Entropy) -> tuple[list[TxIn], list[PsbtInput]]:
    txins = [TxIn(txin.outpoint, b"", txin.sequence) for txin in checked.tx.inputs]
    maps = [checked.sender_input(index) for index in range(len(txins))]
    for coin in coins:
        if coin.outpoint in {txin.outpoint for txin in txins}:
            raise OurMistake(f"coin {coin.outpoint} would be spent twice")
        at = _below(rng, len(txins) + 1)
        txins.insert(at, TxIn(coin.outpoint, b"", checked.sequence))
        maps.insert(at, coin.psbt_input())
    return txins, maps


def _conserved(checked: CheckedOriginal, intent: Intent, tx: Tx) -> None:
    spent = sum(txout.value for txout in checked.prevouts) + sum(coin.txout.value for coin in intent.coins)
    fee = spent - sum(txout.value for txout in tx.outputs)
    if fee != checked.fee + intent.our_fee + intent.sender_fee:
        raise OurMistake(f"the proposal would pay a fee of {fee} sat, which is not what the intent says")


def _provisional(
    checked: CheckedOriginal, intent: Intent, psbt: Psbt, planned: Sequence[PlannedOutput | None]
) -> ProvisionalProposal:
    script_sigs = _known_script_sigs(checked, intent.coins, psbt.tx)
    known = replace(
        psbt.tx,
        inputs=tuple(
            replace(txin, script_sig=script) for txin, script in zip(psbt.tx.inputs, script_sigs, strict=True)
        ),
    )
    funding = [
        Funding(output.channel, vout, psbt.tx.outputs[vout].value, psbt.tx.outputs[vout].script)
        for vout, output in enumerate(planned)
        if output is not None and output.channel is not None
    ]
    change = [vout for vout, output in enumerate(planned) if output is not None and output.role is OutputRole.CHANGE]
    return ProvisionalProposal(
        psbt=psbt,
        ours=tuple(coin.outpoint for coin in intent.coins),
        txid=known.txid,
        txid_is_stable=checked.txid_is_stable and all(coin.kind.is_native_segwit for coin in intent.coins),
        funding=tuple(sorted(funding, key=lambda item: item.channel)),
        change_vout=change[0] if change else None,
        script_sigs=script_sigs,
    )


def _known_script_sigs(checked: CheckedOriginal, coins: Sequence[Coin], tx: Tx) -> tuple[bytes, ...]:
    """A nested input's scriptSig is its redeem script, ours and the payer's; it belongs to the transaction id (UPBUG c)."""
    known = {coin.outpoint: coin.script_sig for coin in coins}
    for txin, prevout in zip(checked.tx.inputs, checked.prevouts, strict=True):
        known[txin.outpoint] = txin.script_sig if is_nested(prevout, txin.witness) else b""
    return tuple(known[txin.outpoint] for txin in tx.inputs)


def restore_proposal(
    checked: CheckedOriginal, intent: Intent, psbt: bytes, funding: Sequence[Funding]
) -> ProvisionalProposal:
    """The proposal of the log, as drafted; nothing random is made again. Raises CannotRead when its parts do not belong together."""
    try:
        stored = Psbt.parse(psbt)
        scripts = {item.channel: item.script for item in funding}
        own = _own_outputs(intent, [scripts[index] for index in range(len(intent.orders))])
        planned = _recognise(checked, intent, stored.tx, own)
        _conserved(checked, intent, stored.tx)
    except (PeerMistake, OurMistake, KeyError) as exc:
        raise CannotRead(f"the stored proposal does not belong to this session: {exc}") from exc
    maps = {coin.outpoint: coin.psbt_input() for coin in intent.coins}
    for index, txin in enumerate(checked.tx.inputs):
        maps[txin.outpoint] = checked.sender_input(index)
    rebuilt = Psbt(stored.tx, tuple(maps[txin.outpoint] for txin in stored.tx.inputs), stored.outputs)
    proposal = _provisional(checked, intent, rebuilt, planned)
    if proposal.funding != tuple(sorted(funding, key=lambda item: item.channel)):
        raise CannotRead("the stored proposal has other funding outputs than the log says")
    return proposal


def _recognise(
    checked: CheckedOriginal, intent: Intent, tx: Tx, own: list[tuple[TxOut, PlannedOutput]]
) -> list[PlannedOutput | None]:
    """Which output of the stored transaction is which of ours; the rest must be the payer's, in his order."""
    coins = {coin.outpoint for coin in intent.coins}
    senders = [txin.outpoint for txin in tx.inputs if txin.outpoint not in coins]
    if senders != [txin.outpoint for txin in checked.tx.inputs] or len(tx.inputs) != len(senders) + len(coins):
        raise OurMistake("it spends other inputs")
    fee_vout = checked.contribution.vout if checked.contribution else None
    theirs = [
        replace(txout, value=txout.value - (intent.sender_fee if vout == fee_vout else 0))
        for vout, txout in enumerate(checked.tx.outputs)
        if vout not in checked.paid_vouts
    ]
    waiting = list(own)
    planned: list[PlannedOutput | None] = []
    for txout in tx.outputs:
        mine = next((item for item in waiting if item[0] == txout), None)
        if mine is not None:
            waiting.remove(mine)
            planned.append(mine[1])
        elif theirs and theirs[0] == txout:
            theirs.pop(0)
            planned.append(None)
        else:
            raise OurMistake("it has other outputs")
    if waiting or theirs:
        raise OurMistake("it lacks outputs")
    return planned


# --- finishing -------------------------------------------------------------------------------------------------------


def finish_proposal(provisional: ProvisionalProposal, signed: bytes) -> PayjoinProposal:
    """Check what the wallet signed and clean it for the payer.

    Raises NotNow when an input of ours is not final, OurMistake when the wallet changed the transaction, signed an input of the
    payer, or signed ours with another sighash type than ALL or DEFAULT.
    """
    try:
        answer = Psbt.parse(signed)
    except PeerMistake as exc:
        raise OurMistake(f"our wallet returned something else than a PSBT: {exc}") from exc
    if answer.tx.stripped() != provisional.psbt.tx:
        raise OurMistake("our wallet returned another transaction than it was asked to sign")
    maps: list[PsbtInput] = []
    txins: list[TxIn] = []
    for index, (txin, given, asked) in enumerate(
        zip(answer.tx.inputs, answer.inputs, provisional.psbt.inputs, strict=True)
    ):
        if txin.outpoint in provisional.ours:
            maps.append(_our_final_map(provisional, index, given, asked))
            txins.append(
                replace(txin, script_sig=given.final_script_sig or b"", witness=given.final_script_witness or ())
            )
        elif given.has_signature:
            raise OurMistake(f"our wallet signed input {index}, which is the payer's")
        else:
            maps.append(_cleaned(asked))
            script_sig = provisional.script_sigs[index] if provisional.script_sigs else b""
            txins.append(replace(txin, script_sig=script_sig))
    tx = replace(answer.tx, inputs=tuple(txins))
    cleaned = Psbt(provisional.psbt.tx, tuple(maps), tuple(PsbtOutput() for _ in tx.outputs)).serialize()
    if len(cleaned) > MAX_REPLY_BYTES:
        raise OurMistake(f"the signed proposal takes {len(cleaned)} bytes, and message B holds {MAX_REPLY_BYTES}")
    if provisional.txid_is_stable and tx.txid != provisional.txid:
        raise OurMistake("our wallet's signature changed the transaction id")
    return PayjoinProposal(cleaned, tx.txid, tx)


def _our_final_map(provisional: ProvisionalProposal, index: int, given: PsbtInput, asked: PsbtInput) -> PsbtInput:
    outpoint = provisional.psbt.tx.inputs[index].outpoint
    if not given.is_final:
        raise NotNow(f"our wallet did not sign its coin {outpoint}: unlock it, or let it sign PSBTs")
    prevout = provisional.psbt.prevout(index)
    final = TxIn(
        outpoint,
        given.final_script_sig or b"",
        provisional.psbt.tx.inputs[index].sequence,
        given.final_script_witness or (),
    )
    if prevout is None or not commits_to_all(final, prevout):
        raise OurMistake(
            f"our wallet's signature for {outpoint} does not commit to the whole transaction (SIGHASH_ALL)"
        )
    return replace(
        _cleaned(asked),
        final_script_sig=given.final_script_sig or None,
        final_script_witness=given.final_script_witness or None,
    )


def _cleaned(psbt_input: PsbtInput) -> PsbtInput:
    """The allow-list of what leaves: one form of the previous output (reference: prepare_psbt)."""
    if psbt_input.witness_utxo is not None:
        return PsbtInput(witness_utxo=psbt_input.witness_utxo)
    return PsbtInput(non_witness_utxo=psbt_input.non_witness_utxo)


# --- transactions that need nobody -----------------------------------------------------------------------------------


def build_way_out(coins: Sequence[Coin], script: bytes, fee_rate: FeeRate, above: Sats = 0) -> Psbt:
    """Spend coins of ours back to `script`, unsigned, at `fee_rate` and, if they are in another transaction in sight, above its fee.

    `above` is that transaction's absolute fee in satoshis (BIP125 rules 3 and 4). Raises WrongUsage when too little would be left.
    """
    if not coins:
        raise WrongUsage("there is no coin to bring back")
    witness = any(coin.kind is not ScriptKind.P2PKH for coin in coins)
    weight = (
        40
        + (2 + sum(coin.kind is ScriptKind.P2PKH for coin in coins)) * witness
        + sum(coin.weight for coin in coins)
        + output_weight(script)
    )
    weight = whole_vbytes(weight)
    fee = max(fee_rate.fee(weight), above + INCREMENTAL_RATE.fee(weight) if above else 0)
    value = sum(coin.txout.value for coin in coins) - fee
    if value < dust_limit(script):
        raise WrongUsage(f"a fee of {fee} sat would leave {max(value, 0)} sat, which is dust")
    tx = Tx(2, 0, tuple(TxIn(coin.outpoint) for coin in coins), (TxOut(value, script),))
    return Psbt(tx, tuple(coin.psbt_input() for coin in coins), (PsbtOutput(),))


def build_child(
    parent: Tx,
    vout: int,
    prevout: TxOut,
    script: bytes,
    target: FeeRate,
    package_fee: Sats,
    package_weight: Weight,
    *,
    redeem_script: bytes | None = None,
) -> Psbt:
    """A child of our output `vout` that lifts its unconfirmed package to `target`; unsigned.

    `package_fee` and `package_weight` are those of the parent with its unconfirmed ancestors. Raises WrongUsage when the output is
    not the one meant, or too small to pay for it.
    """
    if vout >= len(parent.outputs) or parent.outputs[vout] != prevout:
        raise WrongUsage(f"output {vout} of {parent.txid} is not the one to spend")
    coin = Coin.of(
        Outpoint(parent.txid, vout), prevout, height=None, non_witness=parent.raw, redeem_script=redeem_script
    )
    weight = whole_vbytes(42 + coin.weight + output_weight(script))
    fee = max(target.fee(whole_vbytes(package_weight) + weight) - package_fee, INCREMENTAL_RATE.fee(weight))
    if prevout.value - fee < dust_limit(script):
        raise WrongUsage(
            f"output {vout} of {parent.txid} holds {prevout.value} sat, too little for a child at {target}"
        )
    tx = Tx(2, 0, (TxIn(coin.outpoint),), (TxOut(prevout.value - fee, script),))
    return Psbt(tx, (replace(coin.psbt_input(), non_witness_utxo=parent),), (PsbtOutput(),))


# --- refusals --------------------------------------------------------------------------------------------------------


def reply_payload_error(code: ReplyCode, message: str | None = None) -> bytes:
    """The JSON that tells the payer why there is no proposal (BIP78, "Receiver's well known errors").

    Leave `message` out: the default says no more than the code does, the same for owned and for seen inputs.
    """
    reply: dict[str, object] = {"errorCode": code.value, "message": message or _REPLY_MESSAGES[code]}
    if code is ReplyCode.VERSION_UNSUPPORTED:
        reply["supported"] = list(SUPPORTED_VERSIONS)  # a real array (UPBUG o)
    return json.dumps(reply, separators=(",", ":")).encode("utf-8")
