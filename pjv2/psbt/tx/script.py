"""Output scripts: their standard kinds, what they weigh, and from which value on they are relayed.

It refuses nothing: a script of no standard kind is OTHER.
"""

from __future__ import annotations

from enum import StrEnum

from pjv2.psbt.tx.encoding import sized
from pjv2.units import Sats, Weight

DUST_RATE_SAT_PER_VB = 3


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
    return DUST_RATE_SAT_PER_VB * (8 + len(sized(script)) + spend)


def output_weight(script: bytes) -> Weight:
    """The weight of an output to `script`: P2WPKH 124, P2WSH and P2TR 172."""
    return 4 * (8 + len(sized(script)))
