"""Keys, coins, a signer and a pair of payjoiners for the tests of pjv2.psbt; every key is a small number and guards nothing."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from coincurve import PrivateKey, PublicKeyXOnly

from pjv2.psbt.coin import Coin, push
from pjv2.psbt.original import (
    CheckedOriginal,
    OriginalFacts,
    Prevout,
    ReceiverTerms,
    Suitability,
    check_original,
    parse_original,
)
from pjv2.psbt.scripts import (
    p2pkh_script,
    p2sh_script,
    p2tr_script,
    p2wpkh_script,
    p2wpkh_script_code,
    p2wsh_script,
    sighash_legacy,
    sighash_segwit_v0,
    sighash_taproot,
    taproot_tweak,
)
from pjv2.psbt.tx import Psbt, PsbtInput, PsbtOutput, ScriptKind, Tx, TxIn, TxOut
from pjv2.psbt.verify import SentOriginal, make_sent_original, original_body
from pjv2.units import FeeRate, Outpoint

ORDER = 0xFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFEBAAEDCE6AF48A03BBFD25E8CD0364141
KINDS = (ScriptKind.P2PKH, ScriptKind.P2SH, ScriptKind.P2WPKH, ScriptKind.P2WSH, ScriptKind.P2TR)
NATIVE = (ScriptKind.P2WPKH, ScriptKind.P2WSH, ScriptKind.P2TR)
TIP = 1000


class Dice:
    """Entropy that repeats itself."""

    def __init__(self, seed: int = 0) -> None:
        self._random = random.Random(seed)

    def token(self, size: int) -> bytes:
        return self._random.randbytes(size)

    def below(self, limit: int) -> int:
        return self._random.randrange(limit)


@dataclass(frozen=True)
class Key:
    """One key and everything that can be locked with it."""

    number: int
    kind: ScriptKind

    @property
    def private(self) -> PrivateKey:
        return PrivateKey(self.number.to_bytes(32, "big"))

    @property
    def public(self) -> bytes:
        return self.private.public_key.format()

    @property
    def witness_script(self) -> bytes:
        return push(self.public) + b"\xac"

    @property
    def redeem_script(self) -> bytes | None:
        return p2wpkh_script(self.public) if self.kind is ScriptKind.P2SH else None

    @property
    def tweaked(self) -> PrivateKey:
        number = self.number if self.public[0] == 2 else ORDER - self.number
        tweak = int.from_bytes(taproot_tweak(self.public[1:]), "big")
        return PrivateKey(((number + tweak) % ORDER).to_bytes(32, "big"))

    @property
    def script(self) -> bytes:
        match self.kind:
            case ScriptKind.P2PKH:
                return p2pkh_script(self.public)
            case ScriptKind.P2SH:
                return p2sh_script(p2wpkh_script(self.public))
            case ScriptKind.P2WPKH:
                return p2wpkh_script(self.public)
            case ScriptKind.P2WSH:
                return p2wsh_script(self.witness_script)
            case _:
                return p2tr_script(PublicKeyXOnly.from_secret(self.tweaked.secret).format())

    def sign(self, psbt: Psbt, index: int, sighash_type: int | None = None) -> PsbtInput:
        """The final input map for `index`."""
        tx, given = psbt.tx, psbt.inputs[index]
        prevouts = psbt.prevouts()
        hash_type = 1 if sighash_type is None else sighash_type
        value = prevouts[index].value
        script_sig: bytes | None = None
        witness: tuple[bytes, ...] | None = None
        if self.kind is ScriptKind.P2PKH:
            script_sig = push(self._der(sighash_legacy(tx, index, self.script), hash_type)) + push(self.public)
        elif self.kind is ScriptKind.P2TR:
            taproot_type = sighash_type or 0
            signature = self.tweaked.sign_schnorr(sighash_taproot(tx, index, prevouts, taproot_type), bytes(32))
            witness = (signature + (bytes([taproot_type]) if taproot_type else b""),)
        elif self.kind is ScriptKind.P2WSH:
            digest = sighash_segwit_v0(tx, index, self.witness_script, value, hash_type)
            witness = (self._der(digest, hash_type), self.witness_script)
        else:
            code = p2wpkh_script_code(p2wpkh_script(self.public))
            witness = (self._der(sighash_segwit_v0(tx, index, code, value, hash_type), hash_type), self.public)
            if self.redeem_script is not None:
                script_sig = push(self.redeem_script)
        return PsbtInput(
            witness_utxo=given.witness_utxo,
            non_witness_utxo=given.non_witness_utxo,
            final_script_sig=script_sig,
            final_script_witness=witness,
        )

    def _der(self, digest: bytes, hash_type: int) -> bytes:
        return self.private.sign(digest, hasher=None) + bytes([hash_type])


def parent(script: bytes, value: int, salt: int) -> Tx:
    """A transaction from nowhere with one output."""
    source = hashlib.sha256(salt.to_bytes(8, "big")).hexdigest()
    return Tx(2, 0, (TxIn(Outpoint(source, 0)),), (TxOut(value, script),))


@dataclass(frozen=True)
class Purse:
    """A key with one coin on it."""

    key: Key
    value: int

    @property
    def parent(self) -> Tx:
        return parent(self.key.script, self.value, self.key.number)

    @property
    def outpoint(self) -> Outpoint:
        return Outpoint(self.parent.txid, 0)

    @property
    def txout(self) -> TxOut:
        return TxOut(self.value, self.key.script)

    @property
    def psbt_input(self) -> PsbtInput:
        if self.key.kind is ScriptKind.P2PKH:
            return PsbtInput(non_witness_utxo=self.parent)
        return PsbtInput(witness_utxo=self.txout, redeem_script=self.key.redeem_script)

    def coin(self, height: int | None = 500) -> Coin:
        weight = 164 + 1 + 74 + 36 if self.key.kind is ScriptKind.P2WSH else None
        non_witness = self.parent.raw if self.key.kind is ScriptKind.P2PKH else None
        return Coin.of(
            self.outpoint,
            self.txout,
            height=height,
            weight=weight,
            redeem_script=self.key.redeem_script,
            non_witness=non_witness,
        )


def purse(kind: ScriptKind, value: int, number: int) -> Purse:
    return Purse(Key(number, kind), value)


def sign(psbt: Psbt, purses: Sequence[Purse], sighash_type: int | None = None) -> Psbt:
    """What a wallet does: its own inputs become final, everything else stays."""
    keys = {item.outpoint: item.key for item in purses}
    inputs = tuple(
        keys[txin.outpoint].sign(psbt, index, sighash_type) if txin.outpoint in keys else given
        for index, (txin, given) in enumerate(zip(psbt.tx.inputs, psbt.inputs, strict=True))
    )
    return replace(psbt, inputs=inputs)


PAYEE = Key(9001, ScriptKind.P2WPKH).script
CHANGE = Key(9002, ScriptKind.P2WPKH).script
OUR_CHANGE = Key(9003, ScriptKind.P2TR).script
DEPOSIT = Key(9004, ScriptKind.P2WPKH).script
RESERVE = Key(9005, ScriptKind.P2TR).script


def unsigned(
    purses: Sequence[Purse], outputs: Sequence[TxOut], *, sequence: int = 0xFFFFFFFD, version: int = 2
) -> Psbt:
    txins = tuple(TxIn(item.outpoint, b"", sequence) for item in purses)
    return Psbt(
        Tx(version, 0, txins, tuple(outputs)),
        tuple(item.psbt_input for item in purses),
        tuple(PsbtOutput() for _ in outputs),
    )


def original_psbt(
    purses: Sequence[Purse],
    pays: int = 100_000,
    *,
    payee: bytes = PAYEE,
    change: bytes | None = CHANGE,
    rate: int = 2,
    sequence: int = 0xFFFFFFFD,
    change_first: bool = False,
) -> Psbt:
    """A signed Original that pays `pays` at about `rate` sat/vB."""
    total = sum(item.value for item in purses)
    outputs = [TxOut(pays, payee)] + ([TxOut(total - pays, change)] if change else [])
    weight = sign(unsigned(purses, outputs), purses).extract().weight + 8 * len(purses)
    fee = FeeRate(rate * 250).fee(weight)
    if change:
        outputs[1] = TxOut(total - pays - fee, change)
    if change_first:
        outputs.reverse()
    return sign(unsigned(purses, outputs, sequence=sequence), purses)


def terms(script: bytes = PAYEE, amount: int | None = 100_000, **changes: object) -> ReceiverTerms:
    usual = ReceiverTerms(
        script=script,
        amount=amount,
        min_fee_rate=FeeRate(250),
        max_fee_rate=FeeRate(50 * 250),
        max_fee_share_ppm=50_000,
        min_amount=10_000,
    )
    return replace(usual, **changes)  # type: ignore[arg-type]


def facts(purses: Sequence[Purse], **changes: object) -> OriginalFacts:
    prevouts: Mapping[Outpoint, Prevout] = {item.outpoint: Prevout(item.txout, 500) for item in purses}
    usual = OriginalFacts(
        tip=TIP,
        suitability=Suitability("accepted"),
        prevouts=prevouts,
        owned=frozenset(),
        economy_rate=FeeRate(250),
        tip_time=1_700_000_000.0,
    )
    return replace(usual, **changes)  # type: ignore[arg-type]


def sent(
    purses: Sequence[Purse], pays: int = 100_000, *, payee: bytes = PAYEE, min_rate: int = 250, **how: object
) -> SentOriginal:
    shape = {key: how.pop(key) for key in ("change", "rate", "sequence", "change_first") if key in how}
    psbt = original_psbt(purses, pays, payee=payee, **shape)  # type: ignore[arg-type]
    return make_sent_original(psbt, payee, pays, min_fee_rate=FeeRate(min_rate), **how)  # type: ignore[arg-type]


def received(
    sender: SentOriginal, purses: Sequence[Purse], their_terms: ReceiverTerms | None = None
) -> CheckedOriginal:
    """The receiver's view of what the sender posts."""
    return check_original(parse_original(original_body(sender)), facts(purses), their_terms or terms())
