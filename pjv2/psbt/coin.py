"""Coins of ours, what spending one weighs, and what the signatures of an input commit to.

It refuses to guess: a weight that cannot be predicted from the script must be given, one that can must not differ.

Law: the same prediction serves the receiver, who charges for it, and the sender, who checks the charge (reference: InputPair).
"""

from __future__ import annotations

from dataclasses import dataclass

from pjv2.errors import WrongUsage
from pjv2.psbt.tx import (
    SIGHASH_ALL,
    SIGHASH_DEFAULT,
    PsbtInput,
    ScriptKind,
    Tx,
    TxIn,
    TxOut,
    input_weight_of,
    kind_of,
    varint,
)
from pjv2.units import Outpoint, Weight

# Key-path spends with the largest signature that is made today: 72 bytes ECDSA, 64 bytes Schnorr (reference: 4.5 weights).
_SIGNATURE, _PUBLIC_KEY, _SCHNORR = bytes(72), bytes(33), bytes(64)
_WEIGHTS = {ScriptKind.P2PKH: 592, ScriptKind.P2SH: 364, ScriptKind.P2WPKH: 272, ScriptKind.P2TR: 230}
P2TR_EXPLICIT_SIGHASH_WEIGHT: Weight = 231


def input_weight(kind: ScriptKind) -> Weight:
    """The weight of a key spend, 160 base included: P2PKH 592, P2SH (nested P2WPKH) 364, P2WPKH 272, P2TR 230. Raises WrongUsage."""
    try:
        return _WEIGHTS[kind]
    except KeyError:
        raise WrongUsage(f"the weight of a {kind} input depends on its script: give it") from None


def is_p2wpkh(script: bytes | None) -> bool:
    return script is not None and kind_of(script) is ScriptKind.P2WPKH


def script_pushes(script: bytes) -> tuple[bytes, ...] | None:
    """The data pushes of a push-only script such as a scriptSig; None when it does anything else or is cut short."""
    items, at = [], 0
    while at < len(script):
        opcode = script[at]
        at += 1
        if opcode <= 75:
            size = opcode
        elif opcode in (76, 77, 78):
            width = 1 << (opcode - 76)
            size = int.from_bytes(script[at : at + width], "little")
            at += width
        elif opcode == 79 or 81 <= opcode <= 96:
            items.append(b"\x81" if opcode == 79 else bytes([opcode - 80]))
            continue
        else:
            return None
        if at + size > len(script):
            return None
        items.append(script[at : at + size])
        at += size
    return tuple(items)


def push(data: bytes) -> bytes:
    """The script that pushes `data` (at most 255 bytes: redeem scripts)."""
    return bytes([len(data)]) + data if len(data) <= 75 else b"\x4c" + bytes([len(data)]) + data


def nested_program(txout: TxOut, psbt_input: PsbtInput) -> bytes | None:
    """The redeem script of a P2SH input, from its PSBT field or its final scriptSig."""
    if psbt_input.redeem_script is not None:
        return psbt_input.redeem_script
    pushes = script_pushes(psbt_input.final_script_sig or b"")
    return pushes[-1] if pushes else None


def predict_input_weight(txout: TxOut, psbt_input: PsbtInput) -> Weight | None:
    """What spending `txout` weighs, as the reference predicts it from the PSBT; None when it cannot be predicted.

    P2WSH and P2TR are measured by their final witness; P2SH is known only around P2WPKH (reference: InputPair::expected_weight).
    """
    kind = txout.kind
    if kind in (ScriptKind.P2PKH, ScriptKind.P2WPKH):
        return _WEIGHTS[kind]
    if kind is ScriptKind.P2SH:
        return _WEIGHTS[kind] if is_p2wpkh(nested_program(txout, psbt_input)) else None
    if kind in (ScriptKind.P2WSH, ScriptKind.P2TR) and psbt_input.final_script_witness:
        return input_weight_of(b"", psbt_input.final_script_witness)
    return None


@dataclass(frozen=True, slots=True)
class Coin:
    """A coin of ours that may be contributed to a payjoin.

    `weight` is that of the whole input in weight units, the 160 base included; `height` None means unconfirmed. A nested coin
    (P2SH) needs its `redeem_script`, a P2PKH coin the raw previous transaction in `non_witness`. Raises WrongUsage.
    """

    outpoint: Outpoint
    txout: TxOut
    weight: Weight
    height: int | None
    redeem_script: bytes | None = None
    non_witness: bytes | None = None

    def __post_init__(self) -> None:
        if self.weight < 164:
            raise WrongUsage(f"a weight of {self.weight} for coin {self.outpoint} is too small for any input")
        if self.kind is ScriptKind.P2SH and not self.redeem_script:
            raise WrongUsage(f"coin {self.outpoint} is a P2SH output: its redeem script is needed")
        if self.kind is ScriptKind.P2PKH and not self.non_witness:
            raise WrongUsage(f"coin {self.outpoint} is a P2PKH output: its previous transaction is needed")

    @classmethod
    def of(
        cls,
        outpoint: Outpoint,
        txout: TxOut,
        *,
        height: int | None,
        weight: Weight | None = None,
        redeem_script: bytes | None = None,
        non_witness: bytes | None = None,
    ) -> Coin:
        """A coin whose weight is predicted where the script allows it, and taken from `weight` where not (P2WSH). Raises WrongUsage."""
        nested_script = txout.kind is ScriptKind.P2SH and redeem_script is not None and not is_p2wpkh(redeem_script)
        predictable = txout.kind in _WEIGHTS and not nested_script
        if predictable and weight is not None and txout.kind is not ScriptKind.P2TR:
            raise WrongUsage(f"the weight of a {txout.kind} coin is known: do not give it")
        if weight is None:
            if not predictable:
                raise WrongUsage(f"the weight of coin {outpoint} cannot be told from its script: give it")
            weight = input_weight(txout.kind)
        return cls(outpoint, txout, weight, height, redeem_script, non_witness)

    @property
    def kind(self) -> ScriptKind:
        return self.txout.kind

    @property
    def is_usable(self) -> bool:
        """A reference sender can predict its weight; others make it refuse the proposal (protocol: inputs, receiver)."""
        if self.kind is ScriptKind.P2SH:
            return is_p2wpkh(self.redeem_script)
        return self.kind is not ScriptKind.OTHER

    @property
    def script_sig(self) -> bytes:
        """The final scriptSig as far as it is known before signing: the push of the redeem script of a nested coin."""
        return push(self.redeem_script) if self.kind is ScriptKind.P2SH and self.redeem_script else b""

    @property
    def payer_weight(self) -> Weight:
        """The most that the payer may be charged for.

        He bounds his part by his own prediction; for witness scripts that is the final witness, whose signatures may come out
        shorter than planned, so a tenth is left off.
        """
        known = _WEIGHTS.get(self.kind)
        if known is not None and (self.kind is not ScriptKind.P2TR or self.weight <= P2TR_EXPLICIT_SIGHASH_WEIGHT):
            return min(self.weight, known)
        return self.weight * 9 // 10

    def psbt_input(self) -> PsbtInput:
        """The input map to sign: previous output, and what the kind of script needs."""
        previous = Tx.parse(self.non_witness) if self.non_witness else None
        if self.kind is ScriptKind.P2PKH:
            return PsbtInput(non_witness_utxo=previous)
        return PsbtInput(witness_utxo=self.txout, non_witness_utxo=previous, redeem_script=self.redeem_script)

    def final_placeholder(self) -> PsbtInput:
        """The input map of the cleaned proposal with final scripts of the largest size this coin's kind produces."""
        if self.kind is ScriptKind.P2PKH:
            previous = Tx.parse(self.non_witness) if self.non_witness else None
            return PsbtInput(non_witness_utxo=previous, final_script_sig=push(_SIGNATURE) + push(_PUBLIC_KEY))
        witness: tuple[bytes, ...] = (_SIGNATURE, _PUBLIC_KEY)
        size = self.weight - 160 - 4 * (1 + len(self.script_sig))
        if self.kind is ScriptKind.P2TR:
            witness = (_SCHNORR,)
        if size > input_weight_of(b"", witness) - 164:
            # A script spend: one item as long as the whole stack, its own length included.
            witness = (bytes(size),)
        return PsbtInput(
            witness_utxo=self.txout, final_script_sig=self.script_sig or None, final_script_witness=witness
        )


def signature_hash_types(txin: TxIn, prevout: TxOut) -> tuple[int, ...]:
    """The sighash type of every signature found in a final input; empty when none is found.

    Taproot signatures are 64 bytes (DEFAULT) or 65; others are recognised by their DER frame, wherever they are pushed.
    """
    if prevout.kind is ScriptKind.P2TR:
        stack = txin.witness
        if len(stack) >= 2 and stack[-1][:1] == b"\x50":
            stack = stack[:-1]  # the annex (BIP341)
        items = stack if len(stack) == 1 else stack[:-2]
        return tuple(SIGHASH_DEFAULT if len(item) == 64 else item[64] for item in items if len(item) in (64, 65))
    items = (*(script_pushes(txin.script_sig) or ()), *txin.witness)
    return tuple(item[-1] for item in items if 9 <= len(item) <= 73 and item[0] == 0x30 and item[1] == len(item) - 3)


def commits_to_all(txin: TxIn, prevout: TxOut) -> bool:
    """Every signature of the input is ALL (or DEFAULT, for taproot), and there is one."""
    allowed = (SIGHASH_DEFAULT, SIGHASH_ALL) if prevout.kind is ScriptKind.P2TR else (SIGHASH_ALL,)
    types = signature_hash_types(txin, prevout)
    return bool(types) and all(hash_type in allowed for hash_type in types)


def declared_sighash_is_safe(sighash_type: int | None) -> bool:
    """A declared sighash type is absent, ALL or DEFAULT; anything else, unparsable values included, is not."""
    return sighash_type in (None, SIGHASH_DEFAULT, SIGHASH_ALL)


def whole_vbytes(weight: Weight) -> Weight:
    """The weight that nodes charge for: they round a transaction up to whole virtual bytes before they ask for its fee."""
    return -(-weight // 4) * 4


def count_overhead(before: Tx, inputs: int, outputs: int, adds_witness: bool) -> Weight:
    """The weight that a transaction of `inputs` and `outputs` has beyond its inputs and outputs, compared with `before`.

    Longer counts, the segwit marker when `before` has no witness, and the empty witness of inputs without one.
    """
    counts = (
        len(varint(inputs)) + len(varint(outputs)) - len(varint(len(before.inputs))) - len(varint(len(before.outputs)))
    )
    marker = 2 + len(before.inputs) if adds_witness and not before.has_witness else 0
    return 4 * counts + marker
