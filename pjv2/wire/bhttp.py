"""Binary HTTP (RFC 9292): an HTTP message as bytes, to be sealed by `ohttp`.

It writes known-length messages only, with every length explicit, and reads known-length and indeterminate-length ones.

It deviates from the RFC in one place, because BIP77 does: what follows the trailers may be anything. A request is padded with
random bytes to its fixed size (the RFC calls non-zero padding invalid), so an omitted empty section could not be told from padding;
that is why nothing is ever omitted here.

Law: reading is bounded by the bytes that are there; a length is compared before anything is allocated for it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

from pjv2.errors import BadCiphertext, WrongUsage
from pjv2.units import Entropy

Fields: TypeAlias = tuple[tuple[str, str], ...]
"""Header or trailer lines in order; names and values are Latin-1 text."""

_KNOWN_REQUEST, _KNOWN_RESPONSE, _INDETERMINATE_REQUEST, _INDETERMINATE_RESPONSE = range(4)


@dataclass(frozen=True, slots=True)
class Request:
    """A request as its control data, body and fields (RFC 9292, section 3.4)."""

    method: str
    scheme: str
    authority: str
    path: str
    body: bytes = b""
    headers: Fields = ()
    trailers: Fields = ()


@dataclass(frozen=True, slots=True)
class Response:
    """A final response (200 to 599); `informational` lists the 1xx statuses that came before it."""

    status: int
    body: bytes = b""
    headers: Fields = ()
    trailers: Fields = ()
    informational: tuple[int, ...] = ()


def encode_varint(number: int) -> bytes:
    """A QUIC variable-length integer (RFC 9000, section 16), in its shortest form. Raises WrongUsage outside 0..2^62-1."""
    for size, prefix in ((1, 0x00), (2, 0x40), (4, 0x80), (8, 0xC0)):
        if 0 <= number < 1 << (8 * size - 2):
            return (number | prefix << (8 * (size - 1))).to_bytes(size, "big")
    raise WrongUsage(f"{number} does not fit a variable-length integer")


def encode_request(  # the order of the wire, which reads best without keywords
    method: str, scheme: str, authority: str, path: str, body: bytes, size: int, rng: Entropy
) -> bytes:
    """A request of exactly `size` bytes: no headers, no trailers, padded with `rng.token(size - used)`.

    Raises WrongUsage when it does not fit. The one draw is left out when there is nothing to pad.
    """
    control = b"".join(_sized(part) for part in (method, scheme, authority, path))
    message = b"".join((b"\x00", control, b"\x00", encode_varint(len(body)), body, b"\x00"))
    spare = _spare("request", message, size)
    return message + rng.token(spare) if spare else message


def encode_response(status: int, body: bytes, size: int) -> bytes:
    """A response of exactly `size` bytes: no headers, no trailers, padded with zeros. Raises WrongUsage when it does not fit."""
    if not 200 <= status <= 599:
        raise WrongUsage(f"{status} is not the status of a final response")
    message = b"".join((b"\x01", encode_varint(status), b"\x00", encode_varint(len(body)), body, b"\x00"))
    return message + bytes(_spare("response", message, size))


def decode_request(data: bytes) -> Request:
    """The request at the front of `data`; whatever follows it is padding. Raises BadCiphertext."""
    reader = _Reader(data)
    framing = reader.varint()
    if framing not in (_KNOWN_REQUEST, _INDETERMINATE_REQUEST):
        raise BadCiphertext(f"a binary HTTP request begins with 0 or 2, not {framing}")
    try:
        method, scheme, authority, path = (reader.sized().decode("ascii") for _ in range(4))
    except UnicodeDecodeError as exc:
        raise BadCiphertext("the method, scheme, authority and path of a request are ASCII") from exc
    return Request(method, scheme, authority, path, *reader.sections(known=framing == _KNOWN_REQUEST))


def decode_response(data: bytes) -> Response:
    """The response at the front of `data`; whatever follows it is padding. Raises BadCiphertext."""
    reader = _Reader(data)
    framing = reader.varint()
    if framing not in (_KNOWN_RESPONSE, _INDETERMINATE_RESPONSE):
        raise BadCiphertext(f"a binary HTTP response begins with 1 or 3, not {framing}")
    known = framing == _KNOWN_RESPONSE
    informational = []
    while 100 <= (status := reader.varint()) <= 199:
        informational.append(status)
        reader.fields(known)
    if not 200 <= status <= 599:
        raise BadCiphertext(f"{status} is not the status of an HTTP response")
    body, headers, trailers = reader.sections(known)
    return Response(status, body, headers, trailers, tuple(informational))


class _Reader:
    __slots__ = ("at", "data")

    def __init__(self, data: bytes) -> None:
        self.data = bytes(data)
        self.at = 0

    @property
    def done(self) -> bool:
        return self.at == len(self.data)

    def take(self, size: int) -> bytes:
        end = self.at + size
        if end > len(self.data):
            raise BadCiphertext("a binary HTTP message ends before it is complete")
        taken = self.data[self.at : end]
        self.at = end
        return taken

    def varint(self) -> int:
        first = self.take(1)[0]
        size = 1 << (first >> 6)
        return int.from_bytes(bytes((first & 0x3F,)) + self.take(size - 1), "big")

    def sized(self) -> bytes:
        return self.take(self.varint())

    def line(self, name: bytes) -> tuple[str, str]:
        if not name or name.startswith(b":"):
            raise BadCiphertext("a field of a binary HTTP message has no name, or that of a pseudo-field")
        return name.decode("latin-1"), self.sized().decode("latin-1")

    def fields(self, known: bool) -> Fields:
        """A field section (RFC 9292, section 3.6). One that is missing at the end of the message is empty (section 3.8)."""
        if self.done:
            return ()
        lines = []
        if known:
            section = _Reader(self.sized())
            while not section.done:
                lines.append(section.line(section.sized()))
        else:
            while name := self.sized():
                lines.append(self.line(name))
        return tuple(lines)

    def content(self, known: bool) -> bytes:
        if self.done:
            return b""
        if known:
            return self.sized()
        chunks = []
        while chunk := self.sized():
            chunks.append(chunk)
        return b"".join(chunks)

    def sections(self, known: bool) -> tuple[bytes, Fields, Fields]:
        headers = self.fields(known)
        body = self.content(known)
        return body, headers, self.fields(known)


def _sized(text: str) -> bytes:
    try:
        data = text.encode("ascii")
    except UnicodeEncodeError as exc:
        raise WrongUsage(f"{text!r} cannot stand in an HTTP request: it is not ASCII") from exc
    return encode_varint(len(data)) + data


def _spare(kind: str, message: bytes, size: int) -> int:
    if len(message) > size:
        raise WrongUsage(f"the binary HTTP {kind} takes {len(message)} bytes, and only {size} are allowed")
    return size - len(message)
