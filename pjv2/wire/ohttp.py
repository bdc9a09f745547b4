"""Oblivious HTTP (RFC 9458): a request the relay cannot read, sealed to the directory's gateway, and the answer to it.

```
request    hdr 7 ‖ enc 65 (uncompressed) ‖ Seal(padded BHTTP request 8104) 8120                          = 8192
response   nonce 32 ‖ ChaCha20Poly1305(padded BHTTP response 8144) 8160                                   = 8192
hdr        key id 1 ‖ KEM 0016 ‖ KDF 0001 ‖ AEAD 0003
```

It refuses every size but these: all requests and all answers of BIP77 look alike.

Law: an envelope is never sent twice. A retry encapsulates afresh; nothing here can be stored or copied to make the old one again.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NoReturn

from pjv2.errors import BadCiphertext, OurMistake, PeerMistake, WrongUsage
from pjv2.units import Entropy
from pjv2.wire import _aead, hpke
from pjv2.wire.secp import COMPRESSED_BYTES, UNCOMPRESSED_BYTES, PublicKey, SecretKey

ENCAPSULATED_BYTES = 8192
PADDED_BHTTP_REQUEST_BYTES = 8104
PADDED_BHTTP_RESPONSE_BYTES = 8144
KEY_CONFIG_BYTES = 74
KEY_FRAGMENT_BYTES = 1 + COMPRESSED_BYTES
MAX_KEY_CONFIG_BYTES = 65602
"""The longest body that a key configuration may have: 1 + 2 + 65 + 2 + 65532."""

KEYS_MEDIA_TYPE = "application/ohttp-keys"
REQUEST_MEDIA_TYPE = "message/ohttp-req"
ALLOWED_PURPOSES_MEDIA_TYPE = "application/x-ohttp-allowed-purposes"
BIP77_PURPOSE = b"BIP77 454403bb-9f7b-4385-b31f-acd2dae20b7e"
ALLOWED_PURPOSES = b"\x00\x01" + bytes((len(BIP77_PURPOSE),)) + BIP77_PURPOSE
"""What a directory answers to `?allowed_purposes`: it lets itself be relayed to for BIP77 (45 bytes)."""

KEY_PROBLEM_TYPE = "https://iana.org/assignments/http-problem-types#ohttp-key"
"""The problem type of a gateway's 400: it does not know the key; fetch the keys again (RFC 9458, section 5.3)."""

_SYMMETRIC = hpke.KDF_ID + b"\x00\x03"
_SUITE = hpke.KEM_ID + _SYMMETRIC
_REQUEST_INFO = b"message/bhttp request\x00"
_RESPONSE_LABEL = b"message/bhttp response"
_HEADER_BYTES = 7
_ENC_END = _HEADER_BYTES + UNCOMPRESSED_BYTES
_RESPONSE_NONCE_BYTES = 32  # max(Nn, Nk) of ChaCha20-Poly1305; RFC 9458's own example has AES-128's 16


class WrongSize(BadCiphertext):
    """What came back is not an encapsulated answer at all (not 8192 bytes): ask again with a new envelope."""


@dataclass(frozen=True, slots=True)
class KeyConfig:
    """A gateway's key: what a client must know to talk to a directory (RFC 9458, section 3.1)."""

    key_id: int
    public: PublicKey

    def __post_init__(self) -> None:
        if not 0 <= self.key_id <= 0xFF:
            raise WrongUsage(f"an OHTTP key id is one byte, not {self.key_id}")

    @classmethod
    def parse(cls, data: bytes) -> KeyConfig:
        """The usable key in what a directory serves: one bare configuration, or RFC 9458's length-prefixed list of them.

        Other suites in the configuration are passed over, and so are other KEMs in a list. Raises PeerMistake when nothing usable
        remains, when bytes are left over, and above 65602 bytes.
        """
        if len(data) > MAX_KEY_CONFIG_BYTES:
            raise PeerMistake(f"OHTTP keys of {len(data)} bytes: more than {MAX_KEY_CONFIG_BYTES} are not read")
        data = bytes(data)
        # A list cannot look like this: its first length would be 256 n bytes and its KEM would have to begin with 04.
        if data[1:4] == hpke.KEM_ID + b"\x04":
            return cls._parse_one(data)
        problem = PeerMistake("the directory offers no OHTTP key of the kind BIP77 uses, DHKEM(secp256k1, HKDF-SHA256)")
        for config in _split_list(data):
            if config[1:3] == hpke.KEM_ID:
                try:
                    return cls._parse_one(config)
                except PeerMistake as exc:
                    problem = exc
        raise problem

    @classmethod
    def _parse_one(cls, data: bytes) -> KeyConfig:
        key_end = 3 + UNCOMPRESSED_BYTES
        suites = data[key_end + 2 :]
        if len(data) < key_end + 2 or int.from_bytes(data[key_end : key_end + 2], "big") != len(suites):
            raise PeerMistake("an OHTTP key configuration is cut short, or has bytes left over")
        if not suites or len(suites) % 4:
            raise PeerMistake("the list of suites in an OHTTP key configuration is empty, or not made of pairs")
        if _SYMMETRIC not in (suites[at : at + 4] for at in range(0, len(suites), 4)):
            raise PeerMistake(
                "the directory's OHTTP key does not offer HKDF-SHA256 with ChaCha20-Poly1305, which BIP77 uses"
            )
        return cls(data[0], PublicKey.parse(data[3:key_end]))

    def encode(self) -> bytes:
        """The bare configuration that directories serve: 74 bytes."""
        return bytes((self.key_id,)) + hpke.KEM_ID + self.public.uncompressed + b"\x00\x04" + _SYMMETRIC

    @classmethod
    def from_fragment(cls, data: bytes) -> KeyConfig:
        """The key in a URI's OH parameter: key id and compressed point, 34 bytes. Raises PeerMistake.

        BIP77's text says a "2-byte Key Identifier"; its own example and the deployed software have one byte.
        """
        if len(data) != KEY_FRAGMENT_BYTES:
            raise PeerMistake(f"an OHTTP key in a URI is {KEY_FRAGMENT_BYTES} bytes, not {len(data)}")
        return cls(data[0], PublicKey.parse(data[1:]))

    def fragment(self) -> bytes:
        """The 34 bytes of a URI's OH parameter."""
        return bytes((self.key_id,)) + self.public.compressed

    @property
    def _header(self) -> bytes:
        return bytes((self.key_id,)) + _SUITE


class ResponseOpener:
    """What opens the one answer to one encapsulated request."""

    __slots__ = ("_context",)

    def __init__(self, context: hpke.SealingContext) -> None:
        self._context = context

    def open(self, data: bytes) -> bytes:
        """The padded BHTTP response, 8144 bytes. Raises WrongSize (ask again) or BadCiphertext."""
        if len(data) != ENCAPSULATED_BYTES:
            raise WrongSize(f"an encapsulated answer is {ENCAPSULATED_BYTES} bytes, this one {len(data)}")
        nonce, sealed = bytes(data[:_RESPONSE_NONCE_BYTES]), bytes(data[_RESPONSE_NONCE_BYTES:])
        key, aead_nonce = _response_keys(self._context, self._context.enc, nonce)
        return _aead.open_(key, aead_nonce, sealed)

    def __repr__(self) -> str:
        return "ResponseOpener(hidden)"

    def __reduce__(self) -> NoReturn:
        raise WrongUsage("an encapsulated request is made again, never stored")


def encapsulate(keys: KeyConfig, request: bytes, rng: Entropy) -> tuple[bytes, ResponseOpener]:
    """A padded BHTTP request of 8104 bytes, sealed to the gateway: 8192 bytes, and what opens the answer.

    Draws one ephemeral key (`SecretKey.generate(rng)`). Raises WrongUsage for another size. RFC 9458, section 4.3.
    """
    if len(request) != PADDED_BHTTP_REQUEST_BYTES:
        raise WrongUsage(
            f"a request is padded to {PADDED_BHTTP_REQUEST_BYTES} bytes before it is sealed, not {len(request)}"
        )
    header = keys._header
    context = hpke.setup_s(keys.public, _REQUEST_INFO + header, rng)
    return context.seal(request, prefix=header + context.enc), ResponseOpener(context)


class ResponseSealer:
    """What seals the one answer to one request that a gateway opened."""

    __slots__ = ("_context", "_enc")

    def __init__(self, enc: bytes, context: hpke.OpeningContext) -> None:
        self._enc = enc
        self._context = context

    def seal(self, bhttp_response: bytes, rng: Entropy) -> bytes:
        """The encapsulated answer, 8192 bytes. Draws `rng.token(32)`. Raises WrongUsage unless given 8144 bytes."""
        if len(bhttp_response) != PADDED_BHTTP_RESPONSE_BYTES:
            raise WrongUsage(f"an answer is padded to {PADDED_BHTTP_RESPONSE_BYTES} bytes, not {len(bhttp_response)}")
        nonce = rng.token(_RESPONSE_NONCE_BYTES)
        if len(nonce) != _RESPONSE_NONCE_BYTES:
            raise OurMistake(
                f"the source of randomness returned {len(nonce)} bytes where {_RESPONSE_NONCE_BYTES} were asked"
            )
        key, aead_nonce = _response_keys(self._context, self._enc, nonce)
        return _aead.seal(key, aead_nonce, bhttp_response, prefix=nonce)

    def __repr__(self) -> str:
        return "ResponseSealer(hidden)"


class Gateway:
    """A directory's end of OHTTP: opens requests sealed to its key. It is here for the lab and for tests."""

    __slots__ = ("_secret", "keys")

    def __init__(self, secret: SecretKey, key_id: int = 1) -> None:
        self._secret = secret
        self.keys = KeyConfig(key_id, secret.public)

    def open(self, data: bytes) -> tuple[bytes, ResponseSealer]:
        """The padded BHTTP request (8104 bytes) and what seals the answer. Raises BadCiphertext: answer 400, KEY_PROBLEM_TYPE."""
        if len(data) != ENCAPSULATED_BYTES:
            raise WrongSize(f"an encapsulated request is {ENCAPSULATED_BYTES} bytes, this one {len(data)}")
        data = bytes(data)
        header = data[:_HEADER_BYTES]
        if header != self.keys._header:
            raise BadCiphertext("the request is sealed to a key or a suite that this gateway does not have")
        enc = data[_HEADER_BYTES:_ENC_END]
        context = hpke.setup_r(PublicKey.parse(enc), self._secret, _REQUEST_INFO + header)
        return context.open(data[_ENC_END:]), ResponseSealer(enc, context)

    def __repr__(self) -> str:
        return f"Gateway(key_id={self.keys.key_id})"


def decode_allowed_purposes(data: bytes) -> tuple[bytes, ...]:
    """The purposes a gateway lets itself be relayed to for. Raises PeerMistake.

    The leading u16 is the number of strings, as deployed relays and directories have it; the length in bytes that BIP77's text
    asks for is understood too, where the count makes no sense.
    """
    if len(data) < 2:
        raise PeerMistake("a list of allowed purposes begins with two bytes that count them")
    number, rest = int.from_bytes(data[:2], "big"), bytes(data[2:])
    purposes = []
    at = 0
    while at < len(rest):
        end = at + 1 + rest[at]
        if end > len(rest):
            raise PeerMistake("a list of allowed purposes ends in the middle of one")
        purposes.append(rest[at + 1 : end])
        at = end
    if number not in (len(purposes), len(rest)):
        raise PeerMistake(f"a list of allowed purposes announces {number} and holds {len(purposes)}")
    return tuple(purposes)


def _response_keys(context: hpke.SealingContext | hpke.OpeningContext, enc: bytes, nonce: bytes) -> tuple[bytes, bytes]:
    """Key and nonce of an answer: plain HKDF, without HPKE's labels (RFC 9458, section 4.4)."""
    prk = hpke.hkdf_extract(enc + nonce, context.export(_RESPONSE_LABEL, 32))
    return hpke.hkdf_expand(prk, b"key", 32), hpke.hkdf_expand(prk, b"nonce", _aead.NONCE_BYTES)


def _split_list(data: bytes) -> list[bytes]:
    configs = []
    at = 0
    while at < len(data):
        end = at + 2 + int.from_bytes(data[at : at + 2], "big")
        if at + 2 > len(data) or end > len(data):
            raise PeerMistake(
                "OHTTP keys are neither one key configuration of BIP77's kind nor a list of configurations"
            )
        configs.append(data[at + 2 : end])
        at = end
    return configs
