"""A PSBT version 0 as a frozen value (BIP174).

It refuses what BIP174 calls invalid, and PSBT version 2 (BIP370).

Law: what was parsed comes out again byte for byte in canonical order; nothing is dropped in silence.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping
from dataclasses import dataclass, replace

from pjv2.errors import PeerMistake
from pjv2.psbt.tx.encoding import reading
from pjv2.psbt.tx.maps import (
    PROPRIETARY,
    VERSION_2,
    KeyValue,
    PsbtInput,
    PsbtOutput,
    extended_key,
    input_pairs,
    key_path,
    keyed,
    no_key_data,
    output_pairs,
    read_input,
    read_map,
    read_output,
    write_map,
)
from pjv2.psbt.tx.transaction import Tx, TxOut
from pjv2.units import Outpoint, Sats

MAGIC = b"psbt\xff"
_VERSION_2_GLOBALS = range(0x02, 0x07)


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
        with reading("the PSBT"):
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
        with reading("the base64 of the PSBT"):
            data = base64.b64decode(text.strip(), validate=True)
        return cls.parse(data)

    def serialize(self) -> bytes:
        """The binary PSBT, keys in ascending order of type."""
        parts = [
            MAGIC,
            write_map([(b"\x00", self.tx.legacy), *keyed(1, self.xpubs), *self.proprietary, *self.unknown]),
        ]
        parts += [write_map(input_pairs(psbt_input)) for psbt_input in self.inputs]
        parts += [write_map(output_pairs(psbt_output)) for psbt_output in self.outputs]
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


def _read_psbt(stream: io.BytesIO) -> Psbt:
    tx: Tx | None = None
    version_2 = False
    xpubs: list[KeyValue] = []
    proprietary: list[KeyValue] = []
    unknown: list[KeyValue] = []
    for key_type, rest, key, value in read_map(stream):
        if key_type == 0x00:
            no_key_data(rest, "transaction")
            tx = Tx.parse_unsigned(value)
        elif key_type == 0x01:
            if not extended_key(rest) or not key_path(value):
                raise PeerMistake("the PSBT has a malformed global extended key")
            xpubs.append((rest, value))
        elif key_type == 0xFB:
            no_key_data(rest, "version")
            if len(value) != 4:
                raise PeerMistake("the PSBT's version is not four bytes")
            version_2 = version_2 or value != bytes(4)
        elif key_type in _VERSION_2_GLOBALS:
            version_2 = True
        elif key_type == PROPRIETARY:
            proprietary.append((key, value))
        else:
            unknown.append((key, value))
    if version_2:
        raise PeerMistake(VERSION_2)
    if tx is None:
        raise PeerMistake("the PSBT holds no unsigned transaction")
    inputs = tuple(read_input(stream) for _ in tx.inputs)
    outputs = tuple(read_output(stream) for _ in tx.outputs)
    return Psbt(tx, inputs, outputs, tuple(xpubs), tuple(proprietary), tuple(unknown))
