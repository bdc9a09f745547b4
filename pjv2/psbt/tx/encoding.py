"""The border to python-bitcointx, and Bitcoin's smallest encodings.

bitcointx reads transactions, length-prefixed fields and addresses; its PSBT objects are not used, because they drop fields that the
protocol must see (a final scriptSig that is present but empty) and consult chain parameters that are global. What it raises is
translated here, by a table.

Law: this is the only module that knows python-bitcointx.
"""

from __future__ import annotations

import contextvars
import hashlib
import io
import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any, NamedTuple

from pjv2.errors import PeerMistake


class Library(NamedTuple):
    """The parts of bitcointx in use; loaded once, on first use, because the import takes about 100 ms."""

    read_transaction: Callable[[bytes], Any]
    read_txout: Callable[[bytes], Any]
    read_txouts: Callable[[io.BytesIO], Any]
    read_bytes: Callable[[io.BytesIO], bytes]
    varint: Any
    decode_segwit: Callable[[str, str], tuple[int | None, bytes | None]]
    encode_segwit: Callable[[str, int, bytes], str | None]
    decode_base58: Callable[[str], bytes]
    encode_base58: Callable[[bytes], str]
    hash160: Callable[[bytes], bytes]
    faults: tuple[type[Exception], ...]


@cache
def library() -> Library:
    """Loaded on first use."""
    from bitcointx import base58, segwit_addr
    from bitcointx.core import AddressDataEncodingError, CBitcoinTransaction, CBitcoinTxOut
    from bitcointx.core.serialize import (
        BytesSerializer,
        Hash160,
        SerializationError,
        VarIntSerializer,
        VectorSerializer,
    )

    # bitcointx keeps the chain's classes in context variables that are set where it is imported: another task or thread does
    # not see them. Its readers therefore run in a copy of this context, whoever calls, and no chain is ever selected globally.
    home = contextvars.copy_context()
    return Library(
        read_transaction=lambda data: home.copy().run(CBitcoinTransaction.deserialize, data),
        read_txout=lambda data: home.copy().run(CBitcoinTxOut.deserialize, data),
        read_txouts=lambda stream: home.copy().run(
            lambda: VectorSerializer.stream_deserialize(stream, element_class=CBitcoinTxOut)
        ),
        read_bytes=BytesSerializer.stream_deserialize,
        varint=VarIntSerializer,
        decode_segwit=segwit_addr.decode,
        encode_segwit=segwit_addr.encode,
        decode_base58=base58.decode,
        encode_base58=base58.encode,
        hash160=Hash160,
        # What bitcointx raises on hostile input: its own two trees, struct's error for an integer that is cut short, ValueError for a
        # superfluous witness or bad base64, UnboundLocalError for a transaction without inputs, IndexError for an empty bech32 body.
        faults=(SerializationError, AddressDataEncodingError, ValueError, struct.error, UnboundLocalError, IndexError),
    )


@contextmanager
def reading(what: str) -> Iterator[None]:
    """Turn bitcointx's errors into PeerMistake; errors of ours pass."""
    try:
        yield
    except PeerMistake:
        raise
    except library().faults as exc:
        raise PeerMistake(f"{what} cannot be read: {exc}") from exc


def varint(number: int) -> bytes:
    """Bitcoin's CompactSize."""
    if number < 0xFD:
        return bytes([number])
    if number <= 0xFFFF:
        return b"\xfd" + struct.pack("<H", number)
    return b"\xfe" + struct.pack("<I", number)


def sized(data: bytes) -> bytes:
    """Data after its length as a CompactSize."""
    return varint(len(data)) + data


def hash256(data: bytes) -> bytes:
    """Bitcoin's double SHA-256."""
    return hashlib.sha256(hashlib.sha256(data).digest()).digest()


def hash160(data: bytes) -> bytes:
    """RIPEMD-160 of SHA-256; bitcointx brings its own RIPEMD-160, because OpenSSL may come without it."""
    return bytes(library().hash160(data))
