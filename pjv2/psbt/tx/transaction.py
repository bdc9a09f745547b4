"""Transactions, their inputs and outputs, as frozen values.

It refuses what cannot be read, and amounts outside 0..21e14 sat.

Law: what was parsed comes out again byte for byte.
"""

from __future__ import annotations

import io
import struct
from dataclasses import dataclass, field, replace
from typing import Any

from pjv2.errors import PeerMistake
from pjv2.psbt.tx.encoding import hash256, library, reading, sized, varint
from pjv2.psbt.tx.script import ScriptKind, kind_of, output_weight
from pjv2.units import MAX_MONEY, Outpoint, Sats, Txid, Weight


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
        return struct.pack("<q", self.value) + sized(self.script)


@dataclass(frozen=True, slots=True)
class TxIn:
    """A transaction input; `script_sig` and `witness` are empty while it is unsigned."""

    outpoint: Outpoint
    script_sig: bytes = b""
    sequence: int = 0xFFFFFFFD
    witness: tuple[bytes, ...] = ()

    def serialize(self) -> bytes:
        previous = bytes.fromhex(self.outpoint.txid)[::-1] + struct.pack("<I", self.outpoint.vout)
        return previous + sized(self.script_sig) + struct.pack("<I", self.sequence)

    def serialize_witness(self) -> bytes:
        return witness_stack(self.witness)

    @property
    def weight(self) -> Weight:
        """The weight of this input in a segwit transaction, as the reference predicts it: 160 base, 4 per scriptSig byte."""
        return input_weight_of(self.script_sig, self.witness)


def witness_stack(items: tuple[bytes, ...]) -> bytes:
    """The serialised witness of one input."""
    return varint(len(items)) + b"".join(sized(item) for item in items)


def input_weight_of(script_sig: bytes, witness: tuple[bytes, ...]) -> Weight:
    """160 + 4 per scriptSig byte with its length + the witness bytes, if any (reference: InputWeightPrediction)."""
    return 160 + 4 * len(sized(script_sig)) + (len(witness_stack(witness)) if witness else 0)


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
        with reading("the transaction"):
            parsed = library().read_transaction(data)
            tx = cls._view(parsed)
        object.__setattr__(tx, "_raw", bytes(data))
        return tx

    @classmethod
    def parse_unsigned(cls, data: bytes) -> Tx:
        """Read the unsigned transaction of a PSBT: never in witness form, inputs may be missing (BIP174). Raises PeerMistake."""
        if data[4:5] != b"\x00":
            tx = cls.parse(data)
        else:
            with reading("the unsigned transaction"):
                stream = io.BytesIO(data)
                version = struct.unpack("<i", stream.read(4))[0]
                stream.read(1)
                outputs = library().read_txouts(stream)
                locktime = struct.unpack("<I", stream.read())[0]
                tx = cls(version, locktime, (), tuple(map(view_txout, outputs)))
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
        return cls(parsed.nVersion, parsed.nLockTime, inputs, tuple(map(view_txout, parsed.vout)))

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


def view_txout(parsed: Any) -> TxOut:
    return TxOut(_money(parsed.nValue, "an output"), bytes(parsed.scriptPubKey))
