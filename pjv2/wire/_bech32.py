"""Bech32 without a checksum, as BIP77 uses it: short enough for a QR code, upper case, five bits a character.

It refuses characters outside the alphabet. It does not refuse left-over bits: whoever needs the one spelling compares with `encode`.
"""

from __future__ import annotations

_ALPHABET = "QPZRY9X8GF2TVDW0S3JN54KHCE6MUA7L"
_VALUES = {character: value for value, character in enumerate(_ALPHABET)}


def encode_data(data: bytes) -> str:
    """ceil(8 * len / 5) upper-case characters."""
    size = -(-8 * len(data) // 5)
    number = int.from_bytes(data, "big") << (5 * size - 8 * len(data))
    return "".join(_ALPHABET[number >> 5 * at & 31] for at in reversed(range(size)))


def decode_data(text: str) -> bytes:
    """floor(5 * len / 8) bytes; bits left over are ignored. Raises ValueError for a character outside the alphabet."""
    number = 0
    for character in text:
        value = _VALUES.get(character)
        if value is None:
            raise ValueError(f"{character!r} is not a bech32 character")
        number = number << 5 | value
    size = 5 * len(text) // 8
    return (number >> 5 * len(text) - 8 * size).to_bytes(size, "big")


def encode(prefix: str, data: bytes) -> str:
    """`prefix`, `1`, and the data."""
    return f"{prefix}1{encode_data(data)}"


def decode(text: str) -> tuple[str, bytes]:
    """The prefix before the last `1`, and the data after it. Raises ValueError."""
    prefix, separator, data = text.rpartition("1")
    if not separator or not prefix:
        raise ValueError("there is no 1 between a prefix and data")
    return prefix, decode_data(data)
