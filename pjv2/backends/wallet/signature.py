"""Whether the signature of a single-key input holds: recomputed from the transaction and our own knowledge of the coin.

It knows P2WPKH, P2WPKH nested in P2SH, P2PKH, and P2TR by its key path, signed ALL or DEFAULT; everything else is refused.

Law: what a wallet library calls signed is believed when the curve agrees, not before.
"""

from __future__ import annotations

from collections.abc import Sequence

from coincurve import PublicKey, PublicKeyXOnly

from pjv2.errors import NotNow
from pjv2.psbt.coin import push, script_pushes
from pjv2.psbt.scripts import (
    p2pkh_script,
    p2sh_script,
    p2wpkh_script,
    p2wpkh_script_code,
    sighash_legacy,
    sighash_segwit_v0,
    sighash_taproot,
)
from pjv2.psbt.tx import ScriptKind, Tx, TxOut


def check_signed_input(tx: Tx, index: int, prevouts: Sequence[TxOut | None]) -> None:
    """The final scripts of input `index` spend `prevouts[index]` under SIGHASH_ALL or DEFAULT. Raises NotNow otherwise.

    Only a P2TR input needs the other inputs' previous outputs.
    """
    if not _holds(tx, index, prevouts):
        raise NotNow(f"the wallet's signature for {tx.inputs[index].outpoint} does not hold: nothing was signed")


def _holds(tx: Tx, index: int, prevouts: Sequence[TxOut | None]) -> bool:
    spend, prevout = tx.inputs[index], prevouts[index]
    if prevout is None:
        return False
    if prevout.kind is ScriptKind.P2TR:
        return _taproot_holds(tx, index, prevout, [out for out in prevouts if out is not None])
    legacy = prevout.kind is ScriptKind.P2PKH
    items = (script_pushes(spend.script_sig) or ()) if legacy else spend.witness
    if len(items) != 2 or len(items[1]) != 33 or items[0][-1:] != b"\x01":
        return False
    signature, key = items[0][:-1], items[1]
    program = p2wpkh_script(key)
    if prevout.script == p2pkh_script(key):
        return not spend.witness and _ecdsa_holds(key, signature, sighash_legacy(tx, index, prevout.script))
    expected_sig = {program: b"", p2sh_script(program): push(program)}.get(prevout.script)
    if expected_sig is None or spend.script_sig != expected_sig:
        return False
    return _ecdsa_holds(key, signature, sighash_segwit_v0(tx, index, p2wpkh_script_code(program), prevout.value))


def _taproot_holds(tx: Tx, index: int, prevout: TxOut, prevouts: Sequence[TxOut]) -> bool:
    spend = tx.inputs[index]
    if spend.script_sig or len(spend.witness) != 1 or len(prevouts) != len(tx.inputs):
        return False
    (signature,) = spend.witness
    if len(signature) not in (64, 65) or signature[64:] not in (b"", b"\x01"):
        return False
    digest = sighash_taproot(tx, index, prevouts, signature[64] if len(signature) == 65 else 0)
    try:
        return bool(PublicKeyXOnly(prevout.script[2:]).verify(signature[:64], digest))
    except ValueError:  # not a point
        return False


def _ecdsa_holds(key: bytes, signature: bytes, digest: bytes) -> bool:
    try:
        return bool(PublicKey(key).verify(signature, digest, hasher=None))
    except ValueError:  # not DER, or not a point
        return False
