"""ChaCha20-Poly1305 (RFC 8439) through libsodium, one call each way.

PyNaCl's own function zeroes a buffer, fills it and copies it, and checks four types in Python: together as dear as the cipher on 8 KB,
and every poll seals 8 KB. So the library is called directly, and the lengths are checked here.

Law: a buffer given to C has exactly the size that C writes or reads.
"""

from __future__ import annotations

from nacl._sodium import ffi, lib  # type: ignore[import-not-found]  # PyNaCl's compiled part has no types

from pjv2.errors import BadCiphertext, OurMistake

KEY_BYTES = 32
NONCE_BYTES = 12
TAG_BYTES = 16

_NULL = ffi.NULL
_encrypt = lib.crypto_aead_chacha20poly1305_ietf_encrypt
_decrypt = lib.crypto_aead_chacha20poly1305_ietf_decrypt


def seal(key: bytes, nonce: bytes, plaintext: bytes, aad: bytes = b"", prefix: bytes = b"") -> bytes:
    """`prefix`, as it is, and the ciphertext: 16 bytes longer than the plaintext.

    The prefix is not sealed; it is here so that an envelope is put together without copying 8 KB once more.
    """
    _check(key, nonce)
    plaintext = bytes(plaintext)
    start = len(prefix)
    output = bytearray(start + len(plaintext) + TAG_BYTES)
    output[:start] = prefix
    if _encrypt(ffi.from_buffer(output) + start, _NULL, plaintext, len(plaintext), aad, len(aad), _NULL, nonce, key):
        raise OurMistake("libsodium did not seal a message")
    return bytes(output)


def open_(key: bytes, nonce: bytes, ciphertext: bytes, aad: bytes = b"") -> bytes:
    """The plaintext. Raises BadCiphertext, with no word on why."""
    _check(key, nonce)
    ciphertext = bytes(ciphertext)
    if len(ciphertext) < TAG_BYTES:
        raise BadCiphertext(f"a sealed message has at least {TAG_BYTES} bytes, this one {len(ciphertext)}")
    output = bytearray(len(ciphertext) - TAG_BYTES)
    if _decrypt(ffi.from_buffer(output), _NULL, _NULL, ciphertext, len(ciphertext), aad, len(aad), nonce, key):
        raise BadCiphertext("a message does not open: it was damaged, or sealed for or by another key")
    return bytes(output)


def _check(key: bytes, nonce: bytes) -> None:
    if len(key) != KEY_BYTES or len(nonce) != NONCE_BYTES:
        raise OurMistake(f"ChaCha20-Poly1305 takes a key of {KEY_BYTES} and a nonce of {NONCE_BYTES} bytes")
