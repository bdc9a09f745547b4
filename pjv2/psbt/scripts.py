"""Small script and signature-hash helpers for whoever signs: tests, the lab, the shipped paper wallet; hashes only, no curve.

It refuses keys of the wrong length. Legacy signature hashes (P2PKH) are included for the lab's old-style payers.

Law: a signature hash commits to exactly what BIP143 and BIP341 say; both are tested against python-bitcointx.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Sequence
from dataclasses import replace

from pjv2.errors import WrongUsage
from pjv2.psbt.tx import SIGHASH_ALL, SIGHASH_DEFAULT, Tx, TxOut, hash160, hash256, varint
from pjv2.units import Sats

_NONE, _SINGLE, _ANYONE_CAN_PAY = 2, 3, 0x80


def tagged_hash(tag: str, data: bytes) -> bytes:
    """BIP340's tagged hash."""
    prefix = hashlib.sha256(tag.encode("ascii")).digest()
    return hashlib.sha256(prefix + prefix + data).digest()


def p2wpkh_script(public_key: bytes) -> bytes:
    """The output script of a 33-byte compressed public key (BIP141)."""
    return b"\x00\x14" + hash160(_length(public_key, 33, "compressed public key"))


def p2pkh_script(public_key: bytes) -> bytes:
    """The legacy output script of a 33-byte compressed public key."""
    return b"\x76\xa9\x14" + hash160(_length(public_key, 33, "compressed public key")) + b"\x88\xac"


def p2sh_script(redeem_script: bytes) -> bytes:
    """The output script that hides `redeem_script` (BIP16)."""
    return b"\xa9\x14" + hash160(redeem_script) + b"\x87"


def p2wsh_script(witness_script: bytes) -> bytes:
    """The output script that hides `witness_script` (BIP141)."""
    return b"\x00\x20" + hashlib.sha256(witness_script).digest()


def p2tr_script(output_key: bytes) -> bytes:
    """The output script of a 32-byte x-only output key, already tweaked (BIP341)."""
    return b"\x51\x20" + _length(output_key, 32, "x-only key")


def taproot_tweak(internal_key: bytes, merkle_root: bytes = b"") -> bytes:
    """The 32-byte scalar to add to an internal key, for a key-path-only output without `merkle_root` (BIP341, BIP86)."""
    return tagged_hash("TapTweak", _length(internal_key, 32, "x-only key") + merkle_root)


def _length(data: bytes, size: int, what: str) -> bytes:
    if len(data) != size:
        raise WrongUsage(f"a {what} has {size} bytes, not {len(data)}")
    return data


def sighash_legacy(tx: Tx, index: int, script_code: bytes, sighash_type: int = SIGHASH_ALL) -> bytes:
    """The hash that a legacy input signs; only SIGHASH_ALL is offered. Raises WrongUsage."""
    if sighash_type != SIGHASH_ALL or not 0 <= index < len(tx.inputs):
        raise WrongUsage("legacy signatures are made with SIGHASH_ALL, for an input of the transaction")
    inputs = tuple(
        replace(txin, script_sig=script_code if i == index else b"", witness=()) for i, txin in enumerate(tx.inputs)
    )
    return hash256(replace(tx, inputs=inputs).legacy + struct.pack("<I", sighash_type))


def sighash_segwit_v0(tx: Tx, index: int, script_code: bytes, value: Sats, sighash_type: int = SIGHASH_ALL) -> bytes:
    """The hash that a P2WPKH or P2WSH input signs (BIP143); for P2WPKH `script_code` is the P2PKH script of the key hash."""
    if not 0 <= index < len(tx.inputs):
        raise WrongUsage(f"the transaction has no input {index}")
    base, alone = sighash_type & 0x1F, bool(sighash_type & _ANYONE_CAN_PAY)
    zero = bytes(32)
    previous = zero if alone else hash256(b"".join(txin.serialize()[:36] for txin in tx.inputs))
    sequences = zero
    if not alone and base not in (_NONE, _SINGLE):
        sequences = hash256(b"".join(struct.pack("<I", txin.sequence) for txin in tx.inputs))
    outputs = zero
    if base not in (_NONE, _SINGLE):
        outputs = hash256(b"".join(txout.serialize() for txout in tx.outputs))
    elif base == _SINGLE and index < len(tx.outputs):
        outputs = hash256(tx.outputs[index].serialize())
    this = tx.inputs[index]
    return hash256(
        struct.pack("<i", tx.version)
        + previous
        + sequences
        + this.serialize()[:36]
        + varint(len(script_code))
        + script_code
        + struct.pack("<qI", value, this.sequence)
        + outputs
        + struct.pack("<II", tx.locktime, sighash_type)
    )


def p2wpkh_script_code(script: bytes) -> bytes:
    """The script code of a P2WPKH output script or nested redeem script (BIP143)."""
    return b"\x76\xa9\x14" + _length(script, 22, "P2WPKH script")[2:] + b"\x88\xac"


def sighash_taproot(tx: Tx, index: int, prevouts: Sequence[TxOut], sighash_type: int = SIGHASH_DEFAULT) -> bytes:
    """The hash that a P2TR key-path spend signs (BIP341, "Common signature message"); `prevouts` in the order of the inputs."""
    if not 0 <= index < len(tx.inputs) or len(prevouts) != len(tx.inputs):
        raise WrongUsage("a taproot signature needs the previous output of every input")
    base, alone = sighash_type & 0x03, bool(sighash_type & _ANYONE_CAN_PAY)
    if sighash_type not in (0, 1, 2, 3, 0x81, 0x82, 0x83) or (base == _SINGLE and index >= len(tx.outputs)):
        raise WrongUsage(f"sighash type {sighash_type:#x} cannot be signed here")
    sha = hashlib.sha256
    this = tx.inputs[index]
    message = struct.pack("<BiI", sighash_type, tx.version, tx.locktime)
    if not alone:
        message += sha(b"".join(txin.serialize()[:36] for txin in tx.inputs)).digest()
        message += sha(b"".join(struct.pack("<q", txout.value) for txout in prevouts)).digest()
        message += sha(b"".join(varint(len(txout.script)) + txout.script for txout in prevouts)).digest()
        message += sha(b"".join(struct.pack("<I", txin.sequence) for txin in tx.inputs)).digest()
    if base not in (_NONE, _SINGLE):
        message += sha(b"".join(txout.serialize() for txout in tx.outputs)).digest()
    message += b"\x00"  # key path, no annex
    if alone:
        message += this.serialize()[:36] + prevouts[index].serialize() + struct.pack("<I", this.sequence)
    else:
        message += struct.pack("<I", index)
    if base == _SINGLE:
        message += sha(tx.outputs[index].serialize()).digest()
    return tagged_hash("TapSighash", b"\x00" + message)
