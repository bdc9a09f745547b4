"""The input and output maps of a PSBT version 0, and their key-value encoding (BIP174, BIP371).

It refuses what BIP174 calls invalid, and every field of PSBT version 2 (BIP370).

Law: nothing is dropped in silence: what is not known comes out again as it came in.
"""

from __future__ import annotations

import io
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from pjv2.errors import PeerMistake
from pjv2.psbt.tx.encoding import library, sized
from pjv2.psbt.tx.transaction import Tx, TxOut, view_txout, witness_stack

KeyValue = tuple[bytes, bytes]


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


# ---------------------------------------------------------------- entries


def read_map(stream: io.BytesIO) -> list[tuple[int, bytes, bytes, bytes]]:
    """One key-value map: (type, key data, whole key, value), in the order of the file."""
    lib = library()
    seen: set[bytes] = set()
    entries: list[tuple[int, bytes, bytes, bytes]] = []
    while key := lib.read_bytes(stream):
        if key in seen:
            raise PeerMistake("the PSBT has the same key twice")
        seen.add(key)
        key_type, rest = lib.varint.deserialize_partial(key, allow_full_range=True)
        entries.append((key_type, rest, key, lib.read_bytes(stream)))
    return entries


def write_map(pairs: list[KeyValue]) -> bytes:
    return b"".join(sized(key) + sized(value) for key, value in sorted(pairs, key=_key_type)) + b"\x00"


def _key_type(pair: KeyValue) -> int:
    key = pair[0]
    width = {0xFD: 2, 0xFE: 4, 0xFF: 8}.get(key[0], 0)
    return int.from_bytes(key[1 : 1 + width], "little") if width else key[0]


def keyed(key_type: int, pairs: tuple[KeyValue, ...]) -> list[KeyValue]:
    return [(bytes([key_type]) + key, value) for key, value in pairs]


def no_key_data(rest: bytes, what: str) -> None:
    if rest:
        raise PeerMistake(f"the PSBT's {what} key has data after its type")


# ---------------------------------------------------------------- values

# What a value must look like (BIP174 and BIP371, "Specification").
Check = Callable[[bytes], bool]


def _public_key(key: bytes) -> bool:
    return (len(key) == 33 and key[0] in (2, 3)) or (len(key) == 65 and key[0] == 4)


def key_path(value: bytes) -> bool:
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
        library().read_bytes(stream)
        leaves += 1
    return leaves > 0


def extended_key(key: bytes) -> bool:
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
    0x06: _Field("bip32_derivation", _public_key, key_path),
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
    0x02: _Field("bip32_derivation", _public_key, key_path),
    0x05: _Field("tap_internal_key", None, _x_only),
    0x06: _Field("tap_tree", None, _tap_tree),
    0x07: _Field("tap_bip32_derivation", _x_only, _leaf_path),
}
PROPRIETARY = 0xFC
_VERSION_2_INPUTS = range(0x0E, 0x13)
_VERSION_2_OUTPUTS = range(0x03, 0x05)
VERSION_2 = "it is a PSBT version 2 (BIP370) or mixes in its fields; a payjoin carries version 0 (BIP174)"


# ---------------------------------------------------------------- maps


def _read_fields(
    entries: list[tuple[int, bytes, bytes, bytes]], known: Mapping[int, _Field], refused: range, found: dict[str, Any]
) -> None:
    """Sort the entries of one map into `found`."""
    for key_type, rest, key, value in entries:
        spec = known.get(key_type)
        if spec is None:
            if key_type in refused:
                raise PeerMistake(VERSION_2)
            name = "proprietary" if key_type == PROPRIETARY else "unknown"
            found[name] = (*found.get(name, ()), (key, value))
            continue
        if spec.key is None:
            no_key_data(rest, spec.name)
        elif not spec.key(rest):
            raise PeerMistake(f"the PSBT has a malformed {spec.name} key")
        if not spec.value(value):
            raise PeerMistake(f"the PSBT has a malformed {spec.name}")
        found[spec.name] = value if spec.key is None else (*found.get(spec.name, ()), (rest, value))


def read_input(stream: io.BytesIO) -> PsbtInput:
    found: dict[str, Any] = {}
    others = []
    for entry in read_map(stream):
        key_type, rest, _, value = entry
        if key_type == 0x00:
            no_key_data(rest, "previous transaction")
            found["non_witness_utxo"] = Tx.parse(value)
        elif key_type == 0x01:
            no_key_data(rest, "previous output")
            found["witness_utxo"] = view_txout(library().read_txout(value))
        elif key_type == 0x03:
            no_key_data(rest, "sighash type")
            found["sighash_type"] = struct.unpack("<I", value)[0]
        elif key_type == 0x08:
            no_key_data(rest, "final witness")
            found["final_script_witness"] = _read_witness(value)
        else:
            others.append(entry)
    _read_fields(others, _INPUT_FIELDS, _VERSION_2_INPUTS, found)
    return PsbtInput(**found)


def _read_witness(value: bytes) -> tuple[bytes, ...]:
    lib = library()
    stream = io.BytesIO(value)
    count = lib.varint.stream_deserialize(stream)
    items = tuple(lib.read_bytes(stream) for _ in range(count))
    if stream.read(1):
        raise PeerMistake("the PSBT's final witness is followed by other data")
    return items


def read_output(stream: io.BytesIO) -> PsbtOutput:
    found: dict[str, Any] = {}
    _read_fields(read_map(stream), _OUTPUT_FIELDS, _VERSION_2_OUTPUTS, found)
    return PsbtOutput(**found)


def _known_pairs(psbt_map: PsbtInput | PsbtOutput, known: Mapping[int, _Field]) -> list[KeyValue]:
    pairs: list[KeyValue] = []
    for key_type, spec in known.items():
        value = getattr(psbt_map, spec.name)
        if spec.key is not None:
            pairs += keyed(key_type, value)
        elif value is not None:
            pairs.append((bytes([key_type]), value))
    return [*pairs, *psbt_map.proprietary, *psbt_map.unknown]


def input_pairs(psbt_input: PsbtInput) -> list[KeyValue]:
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


def output_pairs(psbt_output: PsbtOutput) -> list[KeyValue]:
    return _known_pairs(psbt_output, _OUTPUT_FIELDS)
