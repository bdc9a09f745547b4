"""The bitcoin side of a rehearsal channel: keys from a seed, a 2-of-2 funding script, and the commitment that spends it.

A rehearsal channel has one state for its whole life, so one commitment transaction serves both sides: it pays each side's
balance to a P2WPKH script of that side, the opener pays its fixed fee, and both signatures are SIGHASH_ALL. There are no
updates, hence no revocation, no delay and no HTLC.

It is the one module of the rehearsal that knows the curve.

Law: a signature is good for exactly one outpoint, script and amount, and is verified before it is kept.
"""

from __future__ import annotations

import hashlib
import hmac
from dataclasses import dataclass

from coincurve import PrivateKey as PrivateKey
from coincurve import PublicKey

from pjv2.errors import PeerMistake
from pjv2.psbt.scripts import p2wpkh_script, p2wsh_script, sighash_segwit_v0
from pjv2.psbt.tx import Tx, TxIn, TxOut, dust_limit
from pjv2.units import Outpoint, Sats

COMMITMENT_FEE: Sats = 2_810
"""What the opener pays for the commitment, about 16 sat/vB."""

SIGHASH_ALL = b"\x01"


def derive_key(seed: bytes, purpose: str, index: int = 0) -> PrivateKey:
    """A node's key for one purpose; the same seed always gives the same key."""
    counter = 0
    while True:
        text = f"rehearsal/{purpose}/{index}/{counter}".encode()
        try:
            return PrivateKey(hmac.new(seed, text, hashlib.sha256).digest())
        except ValueError:
            counter += 1  # Not a scalar of the curve: once in 2**128.


def public(key: PrivateKey) -> bytes:
    """Its compressed public key, 33 bytes."""
    data: bytes = key.public_key.format()
    return data


def is_public_key(text: str) -> bool:
    """Whether 66 hex characters name a point of the curve."""
    try:
        data = bytes.fromhex(text)
        PublicKey(data)
    except ValueError:
        return False
    return len(data) == 33 and text == text.lower()


def funding_witness_script(one: bytes, other: bytes) -> bytes:
    """2-of-2 over two compressed keys in lexicographic order (BOLT 3, "Funding Transaction Output")."""
    low, high = sorted((one, other))
    return b"\x52\x21" + low + b"\x21" + high + b"\x52\xae"


@dataclass(frozen=True, slots=True)
class ChannelTerms:
    """What both sides of a channel must agree on, byte for byte, for their signatures to fit. Public facts only."""

    opener_key: bytes
    peer_key: bytes
    opener_script: bytes
    peer_script: bytes
    capacity: Sats
    push: Sats

    @property
    def witness_script(self) -> bytes:
        return funding_witness_script(self.opener_key, self.peer_key)

    @property
    def script(self) -> bytes:
        """The funding output's script, 34 bytes."""
        return p2wsh_script(self.witness_script)

    @property
    def opener_balance(self) -> Sats:
        """What the opener gets back by the commitment; negative when `push` leaves too little for the fee."""
        return self.capacity - self.push - COMMITMENT_FEE

    def commitment(self, outpoint: Outpoint) -> Tx:
        """The unsigned commitment; a balance below dust goes to the fee. Its outputs are ordered as in BIP69."""
        outputs = [TxOut(self.opener_balance, self.opener_script), TxOut(self.push, self.peer_script)]
        kept = [output for output in outputs if output.value >= dust_limit(output.script)]
        kept.sort(key=lambda output: (output.value, output.script))
        return Tx(version=2, locktime=0, inputs=(TxIn(outpoint),), outputs=tuple(kept))

    def sign(self, outpoint: Outpoint, key: PrivateKey) -> bytes:
        """One side's signature over the commitment, DER and sighash byte."""
        signature: bytes = key.sign(self._digest(outpoint), hasher=None)
        return signature + SIGHASH_ALL

    def verify(self, outpoint: Outpoint, key: bytes, signature: bytes) -> None:
        """Raises PeerMistake unless `signature` is that of `key` over the commitment of exactly this outpoint."""
        good = False
        if signature.endswith(SIGHASH_ALL):
            try:
                good = PublicKey(key).verify(signature[:-1], self._digest(outpoint), hasher=None)
            except ValueError:  # Not DER.
                good = False
        if not good:
            raise PeerMistake("invalid commitment signature: it is not for this outpoint, script and amount")

    def signed(self, outpoint: Outpoint, opener_signature: bytes, peer_signature: bytes) -> Tx:
        """The commitment with both signatures, ready to be broadcast once `outpoint` exists."""
        bare = self.commitment(outpoint)
        in_order = (opener_signature, peer_signature)
        if self.peer_key < self.opener_key:
            in_order = (peer_signature, opener_signature)
        # The empty item is what CHECKMULTISIG pops too many.
        final = TxIn(outpoint, b"", bare.inputs[0].sequence, (b"", *in_order, self.witness_script))
        return Tx(bare.version, bare.locktime, (final,), bare.outputs)

    def _digest(self, outpoint: Outpoint) -> bytes:
        return sighash_segwit_v0(self.commitment(outpoint), 0, self.witness_script, self.capacity)


def home_script(seed: bytes) -> bytes:
    """The P2WPKH script of a node's own wallet: what commitments pay its balance to."""
    return p2wpkh_script(public(derive_key(seed, "wallet")))
