"""secp256k1 for the wire: keys, x-only Diffie-Hellman and ElligatorSwift, all through libsecp256k1.

It refuses scalars outside 1..n-1, points off the curve, and the hybrid (06/07) form of a public key. No other module of pjv2's
wire touches the curve library, so replacing it touches this file.

Law: a secret scalar only ever enters functions of the library that run in constant time (key creation, ECDH, range check), and
leaves this module through `SecretKey.reveal` alone.
"""

from __future__ import annotations

import hmac
from typing import Any, NoReturn

from coincurve._libsecp256k1 import ffi, lib
from coincurve.context import Context

from pjv2.errors import BadCiphertext, OurMistake, WrongUsage
from pjv2.units import Entropy

SECRET_BYTES = 32
COMPRESSED_BYTES = 33
UNCOMPRESSED_BYTES = 65
ELLSWIFT_BYTES = 64

# One context for the process. The library's wrapper blinds it once, with the system's randomness, when it is made; it is never
# changed afterwards, which is what makes sharing it between threads safe.
_CONTEXT = Context(name="pjv2.wire.secp")
_CTX = _CONTEXT.ctx
_FORMS = {(COMPRESSED_BYTES, b"\x02"), (COMPRESSED_BYTES, b"\x03"), (UNCOMPRESSED_BYTES, b"\x04")}
_COMPRESSED = 0x102  # SECP256K1_EC_COMPRESSED
_UNCOMPRESSED = 0x002  # SECP256K1_EC_UNCOMPRESSED
_NULL = ffi.NULL
_new_point = ffi.typeof("secp256k1_pubkey *")
_new_size = ffi.typeof("size_t *")
_new_32 = ffi.typeof("unsigned char[32]")
_new_33 = ffi.typeof("unsigned char[33]")
_new_64 = ffi.typeof("unsigned char[64]")
_new_65 = ffi.typeof("unsigned char[65]")


@ffi.callback("int(unsigned char *, unsigned char *, unsigned char *, void *)", error=0)  # type: ignore[untyped-decorator]  # cffi has no types
def _x_only(output: Any, x: Any, y: Any, data: Any) -> int:
    """In place of a hash: the shared point's x, as DHKEM(secp256k1) wants it."""
    ffi.memmove(output, x, 32)
    return 1


class PublicKey:
    """A point of secp256k1 other than infinity. Immutable; equal and hashed by its 33 bytes."""

    __slots__ = ("_compressed", "_point", "_uncompressed")

    _compressed: bytes | None
    _uncompressed: bytes | None

    def __init__(self, point: Any) -> None:
        """For this module only: use `parse`, `SecretKey.public` or `ellswift_decode`."""
        self._point = point
        self._compressed = None
        self._uncompressed = None

    @classmethod
    def parse(cls, data: bytes) -> PublicKey:
        """A public key from its SEC1 form: 33 bytes (02, 03) or 65 (04). Raises BadCiphertext for anything else."""
        data = bytes(data)
        if (len(data), data[:1]) in _FORMS:
            point = ffi.new(_new_point)
            if lib.secp256k1_ec_pubkey_parse(_CTX, point, data, len(data)):
                key = cls(point)
                if len(data) == COMPRESSED_BYTES:
                    key._compressed = data
                else:
                    key._uncompressed = data
                return key
        raise BadCiphertext("what should be a public key is not a point of secp256k1 in its 33 or 65 byte form")

    @property
    def compressed(self) -> bytes:
        """33 bytes: 02 or 03, x."""
        if self._compressed is None:
            output = ffi.new(_new_33)
            lib.secp256k1_ec_pubkey_serialize(_CTX, output, ffi.new(_new_size, 33), self._point, _COMPRESSED)
            self._compressed = ffi.buffer(output)[:]
        return self._compressed

    @property
    def uncompressed(self) -> bytes:
        """65 bytes: 04, x, y."""
        if self._uncompressed is None:
            output = ffi.new(_new_65)
            lib.secp256k1_ec_pubkey_serialize(_CTX, output, ffi.new(_new_size, 65), self._point, _UNCOMPRESSED)
            self._uncompressed = ffi.buffer(output)[:]
        return self._uncompressed

    def __eq__(self, other: object) -> bool:
        return self.compressed == other.compressed if isinstance(other, PublicKey) else NotImplemented

    def __hash__(self) -> int:
        return hash(self.compressed)

    def __repr__(self) -> str:
        return f"PublicKey({self.compressed.hex()[:10]}…)"

    def __copy__(self) -> PublicKey:
        return self

    def __deepcopy__(self, memo: object) -> PublicKey:
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        return PublicKey.parse, (self.compressed,)


class SecretKey:
    """A scalar in 1..n-1 that nothing prints, pickles or compares in variable time."""

    __slots__ = ("_public", "_secret")

    _public: PublicKey | None

    def __init__(self, secret: bytes) -> None:
        """The key of these 32 bytes. Raises WrongUsage when they are no scalar of the curve."""
        if not isinstance(secret, bytes) or len(secret) != SECRET_BYTES:
            raise WrongUsage(f"a secret key is {SECRET_BYTES} bytes")
        if not lib.secp256k1_ec_seckey_verify(_CTX, secret):
            raise WrongUsage("these 32 bytes are not a secret key: zero, or not below the order of secp256k1")
        self._secret = secret
        self._public = None

    @classmethod
    def generate(cls, rng: Entropy) -> SecretKey:
        """A fresh key. Draws `rng.token(32)`, again only in the 1-in-2^128 case that it is no scalar."""
        while True:
            secret = rng.token(SECRET_BYTES)
            if len(secret) != SECRET_BYTES:
                raise OurMistake(
                    f"the source of randomness returned {len(secret)} bytes where {SECRET_BYTES} were asked"
                )
            if lib.secp256k1_ec_seckey_verify(_CTX, secret):
                key = cls.__new__(cls)  # __init__ would check the range again
                key._secret = bytes(secret)
                key._public = None
                return key

    @property
    def public(self) -> PublicKey:
        """The public key, computed once."""
        if self._public is None:
            point = ffi.new(_new_point)
            lib.secp256k1_ec_pubkey_create(_CTX, point, self._secret)
            self._public = PublicKey(point)
        return self._public

    def reveal(self) -> bytes:
        """The 32 secret bytes, for encrypted storage and nothing else."""
        return self._secret

    def __eq__(self, other: object) -> bool:
        return hmac.compare_digest(self._secret, other._secret) if isinstance(other, SecretKey) else NotImplemented

    def __hash__(self) -> int:
        return hash(self.public)

    def __repr__(self) -> str:
        return "SecretKey(hidden)"

    def __copy__(self) -> SecretKey:
        return self

    def __deepcopy__(self, memo: object) -> SecretKey:
        return self

    def __reduce__(self) -> NoReturn:
        raise WrongUsage("a secret key is not pickled: store what reveal() returns, encrypted")


def ecdh_x(secret: SecretKey, public: PublicKey) -> bytes:
    """The x coordinate of secret * public, 32 bytes big-endian, in constant time.

    It is never zero: secp256k1 has no point with x = 0, and neither key can be infinity.
    """
    output = ffi.new(_new_32)
    if not lib.secp256k1_ecdh(_CTX, output, public._point, secret._secret, _x_only, _NULL):
        raise OurMistake("the Diffie-Hellman computation was interrupted")
    shared: bytes = ffi.buffer(output)[:]
    return shared


def ellswift_encode(public: PublicKey, rng: Entropy) -> bytes:
    """64 bytes that look uniform and decode to exactly this point (BIP324, ElligatorSwift). Draws `rng.token(32)`.

    u is the library's hash of those 32 bytes and the point; the sign of t carries the parity of y.
    """
    output = ffi.new(_new_64)
    seed = rng.token(32)
    if len(seed) != 32:
        raise OurMistake(f"the source of randomness returned {len(seed)} bytes where 32 were asked")
    lib.secp256k1_ellswift_encode(_CTX, output, public._point, seed)
    encoded: bytes = ffi.buffer(output)[:]
    return encoded


def ellswift_decode(data: bytes) -> PublicKey:
    """The full point that 64 bytes stand for: y is odd iff t mod p is odd. Every 64 bytes stand for one.

    Raises BadCiphertext for another length. BIP324's own tables give x only; the parity rule is libsecp256k1's.
    """
    if len(data) != ELLSWIFT_BYTES:
        raise BadCiphertext(f"an ElligatorSwift key is {ELLSWIFT_BYTES} bytes, not {len(data)}")
    point = ffi.new(_new_point)
    lib.secp256k1_ellswift_decode(_CTX, point, bytes(data))
    return PublicKey(point)
