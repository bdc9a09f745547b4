"""HPKE (RFC 9180) in the one suite of BIP77: DHKEM(secp256k1, HKDF-SHA256), HKDF-SHA256, ChaCha20-Poly1305.

It refuses every other suite. All four modes are here, and the export-only AEAD, because they are the same twenty lines; the
protocol uses base (message A, OHTTP) and auth (message B).

Law: one context seals many messages, each under the next nonce (`base_nonce XOR seq`), and a nonce is never used twice; a message
that does not open is `BadCiphertext`, with no word on why.

The names are the RFC's: `enc`, `kem_context`, `key_schedule_context`, `exporter_secret`. Keys enter `kem_context` uncompressed.
"""

from __future__ import annotations

from enum import IntEnum
from functools import lru_cache
from hmac import digest as _hmac
from typing import NoReturn

from pjv2.errors import OurMistake, WrongUsage
from pjv2.units import Entropy
from pjv2.wire import _aead
from pjv2.wire._aead import NONCE_BYTES
from pjv2.wire.secp import PublicKey, SecretKey, ecdh_x

HASH_BYTES = 32
KEM_ID = b"\x00\x16"
KDF_ID = b"\x00\x01"


class Aead(IntEnum):
    """What a context can do besides exporting (RFC 9180, section 7.3)."""

    CHACHA20_POLY1305 = 0x0003
    EXPORT_ONLY = 0xFFFF

    @property
    def suite_id(self) -> bytes:
        return b"HPKE" + KEM_ID + KDF_ID + self.to_bytes(2, "big")


_NO_SALT = b""
_KEM_SUITE = b"KEM" + KEM_ID
_EAE_PRK = b"HPKE-v1" + _KEM_SUITE + b"eae_prk"
_SHARED_SECRET = b"\x00\x20HPKE-v1" + _KEM_SUITE + b"shared_secret"


def hkdf_expand(prk: bytes, info: bytes, length: int) -> bytes:
    """HKDF-Expand with SHA-256 (RFC 5869): `length` bytes, at most 255 * 32. Raises WrongUsage above."""
    if length <= HASH_BYTES:
        return _hmac(prk, info + b"\x01", "sha256")[:length]
    if length > 255 * HASH_BYTES:
        raise WrongUsage(f"HKDF-SHA256 yields at most {255 * HASH_BYTES} bytes, not {length}")
    blocks = [block := b""]
    for counter in range(1, -(-length // HASH_BYTES) + 1):
        block = _hmac(prk, block + info + bytes((counter,)), "sha256")
        blocks.append(block)
    return b"".join(blocks)[:length]


def hkdf_extract(salt: bytes, secret: bytes) -> bytes:
    """HKDF-Extract with SHA-256 (RFC 5869)."""
    return _hmac(salt, secret, "sha256")


def _labeled_extract(suite_id: bytes, salt: bytes, label: bytes, ikm: bytes) -> bytes:
    return _hmac(salt, b"HPKE-v1" + suite_id + label + ikm, "sha256")


def _labeled_expand(suite_id: bytes, prk: bytes, label: bytes, info: bytes, length: int) -> bytes:
    return hkdf_expand(prk, length.to_bytes(2, "big") + b"HPKE-v1" + suite_id + label + info, length)


def key_schedule_context(aead: Aead, mode: int, psk_id: bytes, info: bytes) -> bytes:
    """mode, psk_id_hash, info_hash (RFC 9180, section 5.1)."""
    suite_id = aead.suite_id
    psk_id_hash = _labeled_extract(suite_id, _NO_SALT, b"psk_id_hash", psk_id)
    return bytes((mode,)) + psk_id_hash + _labeled_extract(suite_id, _NO_SALT, b"info_hash", info)


@lru_cache(maxsize=512)
def _schedule(aead: Aead, mode: int, psk_id: bytes, info: bytes) -> tuple[bytes, bytes, bytes, bytes]:
    """The label of secret, and what it is expanded with to key, base_nonce and exporter_secret, one block of HKDF-Expand each.

    Nothing in it is secret, and a client uses a handful of infos all its life: so it is kept.
    """
    suite = b"HPKE-v1" + aead.suite_id
    context = key_schedule_context(aead, mode, psk_id, info) + b"\x01"
    return (
        suite + b"secret",
        b"\x00\x20" + suite + b"key" + context,
        b"\x00\x0c" + suite + b"base_nonce" + context,
        b"\x00\x20" + suite + b"exp" + context,
    )


class _Context:
    """A key schedule's outcome (RFC 9180, section 5.1)."""

    __slots__ = ("_aead", "_base_nonce", "_for_exporter", "_key", "_secret", "_sequence")

    def __init__(self, shared_secret: bytes, *, aead: Aead, mode: int, info: bytes, psk: bytes, psk_id: bytes) -> None:
        for_secret, for_key, for_nonce, for_exporter = _schedule(aead, mode, psk_id, info)
        self._aead = aead
        self._secret = _hmac(shared_secret, for_secret + psk, "sha256")
        self._for_exporter = for_exporter
        self._sequence = 0
        if aead is Aead.CHACHA20_POLY1305:
            self._key = _hmac(self._secret, for_key, "sha256")
            self._base_nonce = _hmac(self._secret, for_nonce, "sha256")[:NONCE_BYTES]

    def __repr__(self) -> str:
        return f"{type(self).__name__}(hidden)"

    def __reduce__(self) -> NoReturn:
        raise WrongUsage("an HPKE context holds keys and is not pickled")

    def export(self, exporter_context: bytes, length: int) -> bytes:
        """`length` bytes that only the two ends can compute (RFC 9180, section 5.3)."""
        # exporter_secret is derived when it is asked for: most requests that fail never need it.
        exporter_secret = _hmac(self._secret, self._for_exporter, "sha256")
        return _labeled_expand(self._aead.suite_id, exporter_secret, b"sec", exporter_context, length)

    def _next_nonce(self) -> bytes:
        if self._aead is not Aead.CHACHA20_POLY1305:
            raise WrongUsage("an export-only HPKE context neither seals nor opens")
        if not self._sequence:
            return self._base_nonce
        if self._sequence >= 1 << (8 * NONCE_BYTES):
            raise WrongUsage("this HPKE context has used every nonce it had")
        return (int.from_bytes(self._base_nonce, "big") ^ self._sequence).to_bytes(NONCE_BYTES, "big")


class SealingContext(_Context):
    """The sender's end: `enc` goes to the receiver, `seal` follows."""

    __slots__ = ("enc", "ephemeral")

    def __init__(
        self,
        ephemeral: PublicKey,
        shared_secret: bytes,
        *,
        aead: Aead,
        mode: int,
        info: bytes,
        psk: bytes,
        psk_id: bytes,
    ) -> None:
        super().__init__(shared_secret, aead=aead, mode=mode, info=info, psk=psk, psk_id=psk_id)
        self.ephemeral = ephemeral
        self.enc = ephemeral.uncompressed

    def seal(self, plaintext: bytes, aad: bytes = b"", prefix: bytes = b"") -> bytes:
        """The ciphertext, 16 bytes longer than `plaintext`, under the next nonce, after `prefix` in clear."""
        nonce = self._next_nonce()
        self._sequence += 1
        return _aead.seal(self._key, nonce, plaintext, aad, prefix)


class OpeningContext(_Context):
    """The receiver's end: opens what the sender sealed, in the same order."""

    __slots__ = ()

    def open(self, ciphertext: bytes, aad: bytes = b"") -> bytes:
        """The plaintext. Raises BadCiphertext and stays at the same message when it does not open."""
        nonce = self._next_nonce()
        plaintext = _aead.open_(self._key, nonce, ciphertext, aad)
        self._sequence += 1
        return plaintext


def setup_s(
    receiver: PublicKey,
    info: bytes,
    rng: Entropy,
    *,
    sender: SecretKey | None = None,
    psk: bytes = b"",
    psk_id: bytes = b"",
    aead: Aead = Aead.CHACHA20_POLY1305,
) -> SealingContext:
    """A context that seals to `receiver`: SetupBaseS, or SetupAuthS with `sender`; the PSK modes with `psk` and `psk_id`.

    Draws one ephemeral key (`SecretKey.generate(rng)`). Raises WrongUsage for half a PSK.
    """
    mode = _mode(sender is not None, psk, psk_id)
    ephemeral = SecretKey.generate(rng)
    public = ephemeral.public
    dh = ecdh_x(ephemeral, receiver)
    kem_context = public.uncompressed + receiver.uncompressed
    if sender is not None:
        dh += ecdh_x(sender, receiver)
        kem_context += sender.public.uncompressed
    shared_secret = _shared_secret(dh, kem_context)
    return SealingContext(public, shared_secret, aead=aead, mode=mode, info=info, psk=psk, psk_id=psk_id)


def setup_r(
    enc: PublicKey,
    receiver: SecretKey,
    info: bytes,
    *,
    sender: PublicKey | None = None,
    psk: bytes = b"",
    psk_id: bytes = b"",
    aead: Aead = Aead.CHACHA20_POLY1305,
) -> OpeningContext:
    """A context that opens what was sealed to `receiver`; with `sender`, only what that key's holder sealed."""
    mode = _mode(sender is not None, psk, psk_id)
    dh = ecdh_x(receiver, enc)
    kem_context = enc.uncompressed + receiver.public.uncompressed
    if sender is not None:
        dh += ecdh_x(receiver, sender)
        kem_context += sender.uncompressed
    shared_secret = _shared_secret(dh, kem_context)
    return OpeningContext(shared_secret, aead=aead, mode=mode, info=info, psk=psk, psk_id=psk_id)


def derive_key_pair(ikm: bytes) -> SecretKey:
    """The key that `ikm` (at least 32 secret bytes) stands for: RFC 9180, DeriveKeyPair of section 7.1.3."""
    dkp_prk = _labeled_extract(_KEM_SUITE, _NO_SALT, b"dkp_prk", ikm)
    for counter in range(256):
        candidate = _labeled_expand(_KEM_SUITE, dkp_prk, b"candidate", bytes((counter,)), 32)
        try:
            return SecretKey(candidate)
        except WrongUsage:  # zero or >= n: RFC 9180 goes on to the next counter
            continue
    raise OurMistake("no key can be derived from this input")


def _mode(auth: bool, psk: bytes, psk_id: bytes) -> int:
    if bool(psk) != bool(psk_id):
        raise WrongUsage("a pre-shared key comes with its id, and an id with its key")
    return 2 * auth + bool(psk)


def _shared_secret(dh: bytes, kem_context: bytes) -> bytes:
    """ExtractAndExpand (RFC 9180, section 4.1)."""
    return _hmac(_hmac(_NO_SALT, _EAE_PRK + dh, "sha256"), _SHARED_SECRET + kem_context + b"\x01", "sha256")
