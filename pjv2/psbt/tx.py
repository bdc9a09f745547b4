"""Transactions, PSBTs, scripts and addresses as frozen values; the only module that knows python-bitcointx.

It refuses what BIP174 calls invalid, PSBT version 2, and amounts outside 0..21e14 sat. bitcointx reads transactions, length-prefixed
fields and addresses; its PSBT objects are not used, because they drop fields that the protocol must see (a final scriptSig that is
present but empty) and consult chain parameters that are global. What bitcointx raises is translated here, by a table.

Law: what was parsed comes out again byte for byte in canonical order; nothing is dropped in silence.
"""

from __future__ import annotations

import base64
import contextvars
import hashlib
import io
import struct
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from enum import StrEnum
from functools import cache
from typing import Any, NamedTuple, TypeVar

from pjv2.errors import BadUri, PeerMistake, WrongUsage
from pjv2.units import MAX_MONEY, Network, Outpoint, Sats, Txid, Weight

T = TypeVar("T")
KeyValue = tuple[bytes, bytes]

MAGIC = b"psbt\xff"
SIGHASH_DEFAULT = 0x00
SIGHASH_ALL = 0x01
DUST_RATE_SAT_PER_VB = 3


class _Library(NamedTuple):
    """The parts of bitcointx in use; loaded once, on first use, because the import takes about 100 ms."""

    read_transaction: Callable[[bytes], Any]
    read_txout: Callable[[bytes], Any]
    read_txouts: Callable[[io.BytesIO], Any]
    read_bytes: Callable[[io.BytesIO], bytes]
    varint: Any
    decode_segwit: Callable[[str, str], tuple[int | None, bytes | None]]
    encode_segwit: Callable[[str, int, bytes], str | None]
    decode_base58: Callable[[str], bytes]
    encode_base58: Callable[[bytes], str]
    hash160: Callable[[bytes], bytes]
    faults: tuple[type[Exception], ...]


@cache
def _lib() -> _Library:
    from bitcointx import base58, segwit_addr
    from bitcointx.core import AddressDataEncodingError, CBitcoinTransaction, CBitcoinTxOut
    from bitcointx.core.serialize import (
        BytesSerializer,
        Hash160,
        SerializationError,
        VarIntSerializer,
        VectorSerializer,
    )

    # bitcointx keeps the chain's classes in context variables that are set where it is imported: another task or thread does
    # not see them. Its readers therefore run in a copy of this context, whoever calls, and no chain is ever selected globally.
    home = contextvars.copy_context()
    return _Library(
        read_transaction=lambda data: home.copy().run(CBitcoinTransaction.deserialize, data),
        read_txout=lambda data: home.copy().run(CBitcoinTxOut.deserialize, data),
        read_txouts=lambda stream: home.copy().run(
            lambda: VectorSerializer.stream_deserialize(stream, element_class=CBitcoinTxOut)
        ),
        read_bytes=BytesSerializer.stream_deserialize,
        varint=VarIntSerializer,
        decode_segwit=segwit_addr.decode,
        encode_segwit=segwit_addr.encode,
        decode_base58=base58.decode,
        encode_base58=base58.encode,
        hash160=Hash160,
        # What bitcointx raises on hostile input: its own two trees, struct's error for an integer that is cut short, ValueError for a
        # superfluous witness or bad base64, UnboundLocalError for a transaction without inputs, IndexError for an empty bech32 body.
        faults=(SerializationError, AddressDataEncodingError, ValueError, struct.error, UnboundLocalError, IndexError),
    )


@contextmanager
def _reading(what: str) -> Iterator[None]:
    """Turn bitcointx's errors into PeerMistake; errors of ours pass."""
    try:
        yield
    except PeerMistake:
        raise
    except _lib().faults as exc:
        raise PeerMistake(f"{what} cannot be read: {exc}") from exc


# --- scripts ---------------------------------------------------------------------------------------------------------


class ScriptKind(StrEnum):
    """The standard kinds of output script; everything else is OTHER."""

    P2PKH = "p2pkh"
    P2SH = "p2sh"
    P2WPKH = "p2wpkh"
    P2WSH = "p2wsh"
    P2TR = "p2tr"
    OTHER = "other"

    @property
    def is_native_segwit(self) -> bool:
        """Its spends carry no scriptSig, so the spending transaction's id is known before it is signed (BIP141)."""
        return self in (ScriptKind.P2WPKH, ScriptKind.P2WSH, ScriptKind.P2TR)


def kind_of(script: bytes) -> ScriptKind:
    """The kind of an output script."""
    size = len(script)
    if size == 25 and script[:3] == b"\x76\xa9\x14" and script[23:] == b"\x88\xac":
        return ScriptKind.P2PKH
    if size == 23 and script[:2] == b"\xa9\x14" and script[22:] == b"\x87":
        return ScriptKind.P2SH
    if size == 22 and script[:2] == b"\x00\x14":
        return ScriptKind.P2WPKH
    if size == 34 and script[:2] == b"\x00\x20":
        return ScriptKind.P2WSH
    if size == 34 and script[:2] == b"\x51\x20":
        return ScriptKind.P2TR
    return ScriptKind.OTHER


def is_witness_program(script: bytes) -> bool:
    """True for any witness program, future versions included (BIP141)."""
    return 4 <= len(script) <= 42 and (script[0] == 0 or 0x51 <= script[0] <= 0x60) and script[1] == len(script) - 2


def dust_limit(script: bytes) -> Sats:
    """The smallest value that nodes relay for an output to `script`: Bitcoin Core's rule at 3 sat/vB, 0 for OP_RETURN."""
    if script[:1] == b"\x6a" or len(script) > 10_000:
        return 0
    spend = 67 if is_witness_program(script) else 148
    return DUST_RATE_SAT_PER_VB * (8 + len(_sized(script)) + spend)


def output_weight(script: bytes) -> Weight:
    """The weight of an output to `script`: P2WPKH 124, P2WSH and P2TR 172."""
    return 4 * (8 + len(_sized(script)))


# --- transactions ----------------------------------------------------------------------------------------------------


def varint(number: int) -> bytes:
    """Bitcoin's CompactSize."""
    if number < 0xFD:
        return bytes([number])
    if number <= 0xFFFF:
        return b"\xfd" + struct.pack("<H", number)
    return b"\xfe" + struct.pack("<I", number)


def _sized(data: bytes) -> bytes:
    return varint(len(data)) + data


def _money(value: int, what: str) -> Sats:
    # Range-checked at ingestion, so that no sum can mislead later (reference 1.1.0, #1897).
    if not 0 <= value <= MAX_MONEY:
        raise PeerMistake(f"{what} of {value} sat is outside what bitcoin allows")
    return value


@dataclass(frozen=True, slots=True)
class TxOut:
    """A transaction output: satoshis and the script that guards them."""

    value: Sats
    script: bytes

    @property
    def kind(self) -> ScriptKind:
        return kind_of(self.script)

    def serialize(self) -> bytes:
        return struct.pack("<q", self.value) + _sized(self.script)


@dataclass(frozen=True, slots=True)
class TxIn:
    """A transaction input; `script_sig` and `witness` are empty while it is unsigned."""

    outpoint: Outpoint
    script_sig: bytes = b""
    sequence: int = 0xFFFFFFFD
    witness: tuple[bytes, ...] = ()

    def serialize(self) -> bytes:
        previous = bytes.fromhex(self.outpoint.txid)[::-1] + struct.pack("<I", self.outpoint.vout)
        return previous + _sized(self.script_sig) + struct.pack("<I", self.sequence)

    def serialize_witness(self) -> bytes:
        return witness_stack(self.witness)

    @property
    def weight(self) -> Weight:
        """The weight of this input in a segwit transaction, as the reference predicts it: 160 base, 4 per scriptSig byte."""
        return input_weight_of(self.script_sig, self.witness)


def witness_stack(items: tuple[bytes, ...]) -> bytes:
    """The serialised witness of one input."""
    return varint(len(items)) + b"".join(_sized(item) for item in items)


def input_weight_of(script_sig: bytes, witness: tuple[bytes, ...]) -> Weight:
    """160 + 4 per scriptSig byte with its length + the witness bytes, if any (reference: InputWeightPrediction)."""
    return 160 + 4 * len(_sized(script_sig)) + (len(witness_stack(witness)) if witness else 0)


@dataclass(frozen=True, slots=True)
class Tx:
    """A transaction, signed or not; `locktime` and `sequence` are the raw 32-bit numbers."""

    version: int
    locktime: int
    inputs: tuple[TxIn, ...]
    outputs: tuple[TxOut, ...]
    _raw: bytes = field(default=b"", init=False, repr=False, compare=False)
    _txid: Txid = field(default="", init=False, repr=False, compare=False)

    @classmethod
    def parse(cls, data: bytes) -> Tx:
        """Read a serialised transaction, with or without witnesses. Raises PeerMistake."""
        with _reading("the transaction"):
            parsed = _lib().read_transaction(data)
            tx = cls._view(parsed)
        object.__setattr__(tx, "_raw", bytes(data))
        return tx

    @classmethod
    def parse_unsigned(cls, data: bytes) -> Tx:
        """Read the unsigned transaction of a PSBT: never in witness form, inputs may be missing (BIP174). Raises PeerMistake."""
        if data[4:5] != b"\x00":
            tx = cls.parse(data)
        else:
            with _reading("the unsigned transaction"):
                stream = io.BytesIO(data)
                version = struct.unpack("<i", stream.read(4))[0]
                stream.read(1)
                outputs = _lib().read_txouts(stream)
                locktime = struct.unpack("<I", stream.read())[0]
                tx = cls(version, locktime, (), tuple(map(_txout, outputs)))
        if any(txin.script_sig or txin.witness for txin in tx.inputs):
            raise PeerMistake("the PSBT's unsigned transaction carries signatures")
        return tx

    @classmethod
    def _view(cls, parsed: Any) -> Tx:
        witnesses = [tuple(map(bytes, w.scriptWitness.stack)) for w in parsed.wit.vtxinwit] or [()] * len(parsed.vin)
        inputs = tuple(
            TxIn(
                Outpoint(txin.prevout.hash[::-1].hex(), txin.prevout.n), bytes(txin.scriptSig), txin.nSequence, witness
            )
            for txin, witness in zip(parsed.vin, witnesses, strict=True)
        )
        return cls(parsed.nVersion, parsed.nLockTime, inputs, tuple(map(_txout, parsed.vout)))

    def _body(self) -> bytes:
        return b"".join(
            (
                varint(len(self.inputs)),
                *(txin.serialize() for txin in self.inputs),
                varint(len(self.outputs)),
                *(txout.serialize() for txout in self.outputs),
            )
        )

    @property
    def has_witness(self) -> bool:
        return any(txin.witness for txin in self.inputs)

    @property
    def legacy(self) -> bytes:
        """The serialisation without witnesses: what the transaction id is the hash of."""
        return struct.pack("<i", self.version) + self._body() + struct.pack("<I", self.locktime)

    @property
    def raw(self) -> bytes:
        """The serialisation with witnesses (BIP144)."""
        if not self._raw:
            raw = self.legacy
            if self.has_witness:
                witnesses = b"".join(txin.serialize_witness() for txin in self.inputs)
                raw = raw[:4] + b"\x00\x01" + raw[4:-4] + witnesses + raw[-4:]
            object.__setattr__(self, "_raw", raw)
        return self._raw

    @property
    def txid(self) -> Txid:
        """The transaction id, as people write it."""
        if not self._txid:
            object.__setattr__(self, "_txid", hash256(self.legacy)[::-1].hex())
        return self._txid

    @property
    def weight(self) -> Weight:
        """Weight units (BIP141): three times the stripped size plus the total size."""
        return 3 * len(self.legacy) + len(self.raw)

    @property
    def output_weight(self) -> Weight:
        """The weight of all outputs, without their count."""
        return sum(output_weight(txout.script) for txout in self.outputs)

    def stripped(self) -> Tx:
        """The same transaction with every scriptSig and witness empty."""
        return replace(self, inputs=tuple(TxIn(txin.outpoint, b"", txin.sequence) for txin in self.inputs))


def _txout(parsed: Any) -> TxOut:
    return TxOut(_money(parsed.nValue, "an output"), bytes(parsed.scriptPubKey))


def hash256(data: bytes) -> bytes:
    """Bitcoin's double SHA-256."""
    return hashlib.sha256(hashlib.sha256(data).digest()).digest()


def hash160(data: bytes) -> bytes:
    """RIPEMD-160 of SHA-256; bitcointx brings its own RIPEMD-160, because OpenSSL may come without it."""
    return bytes(_lib().hash160(data))


# --- PSBT ------------------------------------------------------------------------------------------------------------


class _Face:
    """PSBT maps may hold derivations and signatures: their repr names the fields, never the contents."""

    __slots__ = ()

    def __repr__(self) -> str:
        fields: Mapping[str, Any] = getattr(self, "__dataclass_fields__", {})
        present = [name for name in fields if getattr(self, name) not in (None, ())]
        return f"{type(self).__name__}({', '.join(present)})"


@dataclass(frozen=True, slots=True, repr=False)
class PsbtInput(_Face):
    """One input map (BIP174, BIP371). None means absent; pairs are (key data, value), `unknown` and `proprietary` with the whole key."""

    witness_utxo: TxOut | None = None
    non_witness_utxo: Tx | None = None
    partial_sigs: tuple[KeyValue, ...] = ()
    sighash_type: int | None = None
    redeem_script: bytes | None = None
    witness_script: bytes | None = None
    bip32_derivation: tuple[KeyValue, ...] = ()
    final_script_sig: bytes | None = None
    final_script_witness: tuple[bytes, ...] | None = None
    tap_key_sig: bytes | None = None
    tap_script_sigs: tuple[KeyValue, ...] = ()
    tap_leaf_scripts: tuple[KeyValue, ...] = ()
    tap_bip32_derivation: tuple[KeyValue, ...] = ()
    tap_internal_key: bytes | None = None
    tap_merkle_root: bytes | None = None
    proprietary: tuple[KeyValue, ...] = ()
    unknown: tuple[KeyValue, ...] = ()

    @property
    def is_final(self) -> bool:
        """A final scriptSig or witness is there and not empty."""
        return bool(self.final_script_sig) or bool(self.final_script_witness)

    @property
    def has_signature(self) -> bool:
        """Any of the five kinds of signature material is present, empty ones included."""
        return (
            self.final_script_sig is not None
            or self.final_script_witness is not None
            or bool(self.partial_sigs)
            or self.tap_key_sig is not None
            or bool(self.tap_script_sigs)
        )

    @property
    def has_derivation(self) -> bool:
        """It tells key paths (BIP32), which a peer should never see."""
        return bool(self.bip32_derivation) or bool(self.tap_bip32_derivation)


@dataclass(frozen=True, slots=True, repr=False)
class PsbtOutput(_Face):
    """One output map (BIP174, BIP371); conventions as in PsbtInput."""

    redeem_script: bytes | None = None
    witness_script: bytes | None = None
    bip32_derivation: tuple[KeyValue, ...] = ()
    tap_internal_key: bytes | None = None
    tap_tree: bytes | None = None
    tap_bip32_derivation: tuple[KeyValue, ...] = ()
    proprietary: tuple[KeyValue, ...] = ()
    unknown: tuple[KeyValue, ...] = ()

    @property
    def has_derivation(self) -> bool:
        return bool(self.bip32_derivation) or bool(self.tap_bip32_derivation)


@dataclass(frozen=True, slots=True, repr=False)
class Psbt:
    """A PSBT version 0 (BIP174): the unsigned transaction and one map per input and output."""

    tx: Tx
    inputs: tuple[PsbtInput, ...]
    outputs: tuple[PsbtOutput, ...]
    xpubs: tuple[KeyValue, ...] = ()
    proprietary: tuple[KeyValue, ...] = ()
    unknown: tuple[KeyValue, ...] = ()

    def __repr__(self) -> str:
        return f"Psbt(txid={self.tx.txid}, inputs={len(self.inputs)}, outputs={len(self.outputs)})"

    @classmethod
    def parse(cls, data: bytes, *, padded: bool = False) -> Psbt:
        """Read a binary PSBT version 0; `padded` allows trailing zero bytes, as in message B. Raises PeerMistake."""
        with _reading("the PSBT"):
            stream = io.BytesIO(data)
            if stream.read(5) != MAGIC:
                raise PeerMistake("this is not a PSBT: it does not begin with the magic bytes")
            psbt = _read_psbt(stream)
            tail = stream.read()
        if tail and (not padded or tail.strip(b"\x00")):
            raise PeerMistake("the PSBT is followed by other data")
        return psbt

    @classmethod
    def from_base64(cls, text: str | bytes) -> Psbt:
        """Read a base64 PSBT; white space around it is ignored. Raises PeerMistake."""
        with _reading("the base64 of the PSBT"):
            data = base64.b64decode(text.strip(), validate=True)
        return cls.parse(data)

    def serialize(self) -> bytes:
        """The binary PSBT, keys in ascending order of type."""
        parts = [
            MAGIC,
            _write_map([(b"\x00", self.tx.legacy), *_keyed(1, self.xpubs), *self.proprietary, *self.unknown]),
        ]
        parts += [_write_map(_input_pairs(psbt_input)) for psbt_input in self.inputs]
        parts += [_write_map(_output_pairs(psbt_output)) for psbt_output in self.outputs]
        return b"".join(parts)

    def to_base64(self) -> str:
        return base64.b64encode(self.serialize()).decode("ascii")

    def prevout(self, index: int) -> TxOut | None:
        """The output that input `index` spends, as the PSBT tells it; None when it does not tell.

        The previous transaction is preferred, because its id authenticates it. Raises PeerMistake when it is another transaction,
        has no such output, or contradicts `witness_utxo` (BIP174, "Signer").
        """
        psbt_input, outpoint = self.inputs[index], self.tx.inputs[index].outpoint
        previous = psbt_input.non_witness_utxo
        if previous is None:
            return psbt_input.witness_utxo
        if previous.txid != outpoint.txid:
            raise PeerMistake(f"the previous transaction given for input {index} is another one")
        if outpoint.vout >= len(previous.outputs):
            raise PeerMistake(f"the previous transaction given for input {index} has no output {outpoint.vout}")
        txout = previous.outputs[outpoint.vout]
        if psbt_input.witness_utxo not in (None, txout):
            raise PeerMistake(f"the two previous outputs given for input {index} contradict each other")
        return txout

    def prevouts(self) -> tuple[TxOut, ...]:
        """The previous output of every input. Raises PeerMistake when one is missing or contradictory."""
        found = []
        for index in range(len(self.inputs)):
            txout = self.prevout(index)
            if txout is None:
                raise PeerMistake(f"the PSBT does not tell which output input {index} spends")
            found.append(txout)
        return tuple(found)

    def extract(self) -> Tx:
        """The transaction with the final scripts filled in; inputs that are not final stay empty."""
        inputs = tuple(
            replace(txin, script_sig=psbt_input.final_script_sig or b"", witness=psbt_input.final_script_witness or ())
            for txin, psbt_input in zip(self.tx.inputs, self.inputs, strict=True)
        )
        return replace(self.tx, inputs=inputs)

    @property
    def fee(self) -> Sats:
        """Inputs less outputs, by the PSBT's own claims. Raises PeerMistake when it cannot be computed or is negative."""
        fee = sum(txout.value for txout in self.prevouts()) - sum(txout.value for txout in self.tx.outputs)
        if fee < 0:
            raise PeerMistake("the PSBT's outputs are worth more than its inputs")
        return fee


def build_psbt(tx: Tx, prevouts: Mapping[Outpoint, TxOut]) -> Psbt:
    """An unsigned PSBT of `tx`, with `witness_utxo` filled in where `prevouts` knows it."""
    unsigned = tx.stripped()
    return Psbt(
        unsigned,
        tuple(PsbtInput(witness_utxo=prevouts.get(txin.outpoint)) for txin in unsigned.inputs),
        tuple(PsbtOutput() for _ in unsigned.outputs),
    )


def _read_map(stream: io.BytesIO) -> list[tuple[int, bytes, bytes, bytes]]:
    """One key-value map: (type, key data, whole key, value), in the order of the file."""
    lib = _lib()
    seen: set[bytes] = set()
    entries: list[tuple[int, bytes, bytes, bytes]] = []
    while key := lib.read_bytes(stream):
        if key in seen:
            raise PeerMistake("the PSBT has the same key twice")
        seen.add(key)
        key_type, rest = lib.varint.deserialize_partial(key, allow_full_range=True)
        entries.append((key_type, rest, key, lib.read_bytes(stream)))
    return entries


def _write_map(pairs: list[KeyValue]) -> bytes:
    return b"".join(_sized(key) + _sized(value) for key, value in sorted(pairs, key=_key_type)) + b"\x00"


def _key_type(pair: KeyValue) -> int:
    key = pair[0]
    width = {0xFD: 2, 0xFE: 4, 0xFF: 8}.get(key[0], 0)
    return int.from_bytes(key[1 : 1 + width], "little") if width else key[0]


def _keyed(key_type: int, pairs: tuple[KeyValue, ...]) -> list[KeyValue]:
    return [(bytes([key_type]) + key, value) for key, value in pairs]


# What a value must look like (BIP174 and BIP371, "Specification").
Check = Callable[[bytes], bool]


def _public_key(key: bytes) -> bool:
    return (len(key) == 33 and key[0] in (2, 3)) or (len(key) == 65 and key[0] == 4)


def _key_path(value: bytes) -> bool:
    return len(value) >= 4 and len(value) % 4 == 0


def _x_only(data: bytes) -> bool:
    return len(data) == 32


def _schnorr(data: bytes) -> bool:
    return len(data) in (64, 65)


def _leaf_signer(key: bytes) -> bool:
    return len(key) == 64


def _control_block(key: bytes) -> bool:
    return len(key) >= 33 and (len(key) - 33) % 32 == 0 and len(key) <= 33 + 32 * 128


def _leaf_script(value: bytes) -> bool:
    return len(value) >= 1


def _leaf_path(value: bytes) -> bool:
    if not value or value[0] >= 0xFD:
        return False
    rest = len(value) - 1 - 32 * value[0]
    return rest >= 4 and rest % 4 == 0


def _tap_tree(value: bytes) -> bool:
    stream, leaves = io.BytesIO(value), 0
    while header := stream.read(2):
        if len(header) < 2 or header[0] > 128 or header[1] & 1:
            return False
        _lib().read_bytes(stream)
        leaves += 1
    return leaves > 0


def _extended_key(key: bytes) -> bool:
    return len(key) == 78


def _anything(data: bytes) -> bool:
    return True


@dataclass(frozen=True, slots=True)
class _Field:
    """One known key type: the attribute that holds it, whether its key has data, and what key data and value must look like."""

    name: str
    key: Check | None
    value: Check


_INPUT_FIELDS = {
    0x02: _Field("partial_sigs", _public_key, _leaf_script),
    0x04: _Field("redeem_script", None, _anything),
    0x05: _Field("witness_script", None, _anything),
    0x06: _Field("bip32_derivation", _public_key, _key_path),
    0x07: _Field("final_script_sig", None, _anything),
    0x13: _Field("tap_key_sig", None, _schnorr),
    0x14: _Field("tap_script_sigs", _leaf_signer, _schnorr),
    0x15: _Field("tap_leaf_scripts", _control_block, _leaf_script),
    0x16: _Field("tap_bip32_derivation", _x_only, _leaf_path),
    0x17: _Field("tap_internal_key", None, _x_only),
    0x18: _Field("tap_merkle_root", None, _x_only),
}
_OUTPUT_FIELDS = {
    0x00: _Field("redeem_script", None, _anything),
    0x01: _Field("witness_script", None, _anything),
    0x02: _Field("bip32_derivation", _public_key, _key_path),
    0x05: _Field("tap_internal_key", None, _x_only),
    0x06: _Field("tap_tree", None, _tap_tree),
    0x07: _Field("tap_bip32_derivation", _x_only, _leaf_path),
}
_PROPRIETARY = 0xFC
_VERSION_2_GLOBALS = range(0x02, 0x07)
_VERSION_2_INPUTS = range(0x0E, 0x13)
_VERSION_2_OUTPUTS = range(0x03, 0x05)
_VERSION_2 = "it is a PSBT version 2 (BIP370) or mixes in its fields; a payjoin carries version 0 (BIP174)"


def _no_key_data(rest: bytes, what: str) -> None:
    if rest:
        raise PeerMistake(f"the PSBT's {what} key has data after its type")


def _read_psbt(stream: io.BytesIO) -> Psbt:
    tx: Tx | None = None
    version_2 = False
    xpubs: list[KeyValue] = []
    proprietary: list[KeyValue] = []
    unknown: list[KeyValue] = []
    for key_type, rest, key, value in _read_map(stream):
        if key_type == 0x00:
            _no_key_data(rest, "transaction")
            tx = Tx.parse_unsigned(value)
        elif key_type == 0x01:
            if not _extended_key(rest) or not _key_path(value):
                raise PeerMistake("the PSBT has a malformed global extended key")
            xpubs.append((rest, value))
        elif key_type == 0xFB:
            _no_key_data(rest, "version")
            if len(value) != 4:
                raise PeerMistake("the PSBT's version is not four bytes")
            version_2 = version_2 or value != bytes(4)
        elif key_type in _VERSION_2_GLOBALS:
            version_2 = True
        elif key_type == _PROPRIETARY:
            proprietary.append((key, value))
        else:
            unknown.append((key, value))
    if version_2:
        raise PeerMistake(_VERSION_2)
    if tx is None:
        raise PeerMistake("the PSBT holds no unsigned transaction")
    inputs = tuple(_read_input(stream) for _ in tx.inputs)
    outputs = tuple(_read_output(stream) for _ in tx.outputs)
    return Psbt(tx, inputs, outputs, tuple(xpubs), tuple(proprietary), tuple(unknown))


def _read_fields(
    entries: list[tuple[int, bytes, bytes, bytes]], known: Mapping[int, _Field], refused: range, found: dict[str, Any]
) -> None:
    """Sort the entries of one map into `found`."""
    for key_type, rest, key, value in entries:
        spec = known.get(key_type)
        if spec is None:
            if key_type in refused:
                raise PeerMistake(_VERSION_2)
            name = "proprietary" if key_type == _PROPRIETARY else "unknown"
            found[name] = (*found.get(name, ()), (key, value))
            continue
        if spec.key is None:
            _no_key_data(rest, spec.name)
        elif not spec.key(rest):
            raise PeerMistake(f"the PSBT has a malformed {spec.name} key")
        if not spec.value(value):
            raise PeerMistake(f"the PSBT has a malformed {spec.name}")
        found[spec.name] = value if spec.key is None else (*found.get(spec.name, ()), (rest, value))


def _read_input(stream: io.BytesIO) -> PsbtInput:
    found: dict[str, Any] = {}
    others = []
    for entry in _read_map(stream):
        key_type, rest, _, value = entry
        if key_type == 0x00:
            _no_key_data(rest, "previous transaction")
            found["non_witness_utxo"] = Tx.parse(value)
        elif key_type == 0x01:
            _no_key_data(rest, "previous output")
            found["witness_utxo"] = _txout(_lib().read_txout(value))
        elif key_type == 0x03:
            _no_key_data(rest, "sighash type")
            found["sighash_type"] = struct.unpack("<I", value)[0]
        elif key_type == 0x08:
            _no_key_data(rest, "final witness")
            found["final_script_witness"] = _read_witness(value)
        else:
            others.append(entry)
    _read_fields(others, _INPUT_FIELDS, _VERSION_2_INPUTS, found)
    return PsbtInput(**found)


def _read_witness(value: bytes) -> tuple[bytes, ...]:
    lib = _lib()
    stream = io.BytesIO(value)
    count = lib.varint.stream_deserialize(stream)
    items = tuple(lib.read_bytes(stream) for _ in range(count))
    if stream.read(1):
        raise PeerMistake("the PSBT's final witness is followed by other data")
    return items


def _read_output(stream: io.BytesIO) -> PsbtOutput:
    found: dict[str, Any] = {}
    _read_fields(_read_map(stream), _OUTPUT_FIELDS, _VERSION_2_OUTPUTS, found)
    return PsbtOutput(**found)


def _known_pairs(psbt_map: PsbtInput | PsbtOutput, known: Mapping[int, _Field]) -> list[KeyValue]:
    pairs: list[KeyValue] = []
    for key_type, spec in known.items():
        value = getattr(psbt_map, spec.name)
        if spec.key is not None:
            pairs += _keyed(key_type, value)
        elif value is not None:
            pairs.append((bytes([key_type]), value))
    return [*pairs, *psbt_map.proprietary, *psbt_map.unknown]


def _input_pairs(psbt_input: PsbtInput) -> list[KeyValue]:
    pairs = _known_pairs(psbt_input, _INPUT_FIELDS)
    if psbt_input.non_witness_utxo is not None:
        pairs.append((b"\x00", psbt_input.non_witness_utxo.raw))
    if psbt_input.witness_utxo is not None:
        pairs.append((b"\x01", psbt_input.witness_utxo.serialize()))
    if psbt_input.sighash_type is not None:
        pairs.append((b"\x03", struct.pack("<I", psbt_input.sighash_type)))
    if psbt_input.final_script_witness is not None:
        pairs.append((b"\x08", witness_stack(psbt_input.final_script_witness)))
    return pairs


def _output_pairs(psbt_output: PsbtOutput) -> list[KeyValue]:
    return _known_pairs(psbt_output, _OUTPUT_FIELDS)


# --- addresses -------------------------------------------------------------------------------------------------------

_BASE58_VERSIONS = {Network.BITCOIN: (0x00, 0x05)}
_BASE58_TEST_VERSIONS = (0x6F, 0xC4)


def address_to_script(address: str, network: Network) -> bytes:
    """The output script of an address on `network`. Raises BadUri when it is no address, or one of another network."""
    lib = _lib()
    try:
        version, program = lib.decode_segwit(network.hrp, address)
        if version is not None and program is not None:
            return bytes([version + 0x50 if version else 0, len(program)]) + program
        if len(address) > 60:
            raise BadUri(f"{address[:90]!r} is not an address of {network}")
        data = lib.decode_base58(address)
    except lib.faults as exc:
        raise BadUri(f"{address[:90]!r} is not an address of {network}") from exc
    body, checksum = data[:-4], data[-4:]
    pay_to_key, pay_to_script = _BASE58_VERSIONS.get(network, _BASE58_TEST_VERSIONS)
    if len(body) == 21 and hash256(body)[:4] == checksum:
        if body[0] == pay_to_key:
            return b"\x76\xa9\x14" + body[1:] + b"\x88\xac"
        if body[0] == pay_to_script:
            return b"\xa9\x14" + body[1:] + b"\x87"
    raise BadUri(f"{address[:90]!r} is not an address of {network}")


def script_to_address(script: bytes, network: Network) -> str:
    """The address of an output script on `network`. Raises WrongUsage when the script has none."""
    lib = _lib()
    kind = kind_of(script)
    versions = _BASE58_VERSIONS.get(network, _BASE58_TEST_VERSIONS)
    if kind in (ScriptKind.P2PKH, ScriptKind.P2SH):
        body = bytes([versions[0]]) + script[3:23] if kind is ScriptKind.P2PKH else bytes([versions[1]]) + script[2:22]
        return lib.encode_base58(body + hash256(body)[:4])
    if is_witness_program(script):
        version = script[0] - 0x50 if script[0] else 0
        address = lib.encode_segwit(network.hrp, version, script[2:])
        if address is not None:
            return address
    raise WrongUsage("this output script has no address")
