"""What the tests of pjv2.wire share: vectors, deterministic randomness, and the ways to damage bytes."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

VECTORS = Path(__file__).parents[2] / "vectors"
UNHEX = bytes.fromhex


class Seeded:
    """An endless deterministic stream; two of one seed are equal."""

    def __init__(self, seed: int = 0) -> None:
        self.seed = seed
        self.count = 0

    def token(self, size: int) -> bytes:
        self.count += 1
        return hashlib.shake_256(f"{self.seed}/{self.count}".encode()).digest(size)

    def below(self, limit: int) -> int:
        return int.from_bytes(self.token(16), "big") % limit


class Fixed:
    """The given draws, in this order and of these sizes, and no more. An int stands for one byte repeated as often as asked."""

    def __init__(self, *draws: bytes | int) -> None:
        self.draws = list(draws)

    def token(self, size: int) -> bytes:
        draw = self.draws.pop(0)
        if isinstance(draw, int):
            return bytes([draw]) * size
        assert len(draw) == size
        return draw

    def below(self, limit: int) -> int:
        raise AssertionError("pjv2.wire draws bytes only")


@cache
def _load(name: str) -> dict[str, Any]:
    return json.loads((VECTORS / name).read_text())


def vectors(*kinds: str) -> list[dict[str, Any]]:
    found = [v for name in ("wire.json", "wire_curve.json") for v in _load(name)["vectors"] if v["kind"] in kinds]
    assert found, f"no vector of {kinds}"
    return found


def named(name: str) -> list[dict[str, Any]]:
    found = [v for file in ("wire.json", "wire_curve.json") for v in _load(file)["vectors"] if v["name"] == name]
    assert found, f"no vector named {name}"
    return found


def derived(name: str) -> dict[str, Any]:
    return _load("wire_derived.json")["derived"][name]


def corrupted(data: bytes) -> Iterator[bytes]:
    """`data` with each byte changed in turn."""
    for at in range(len(data)):
        damaged = bytearray(data)
        damaged[at] ^= 1 << at % 8
        yield bytes(damaged)


def truncated(data: bytes) -> Iterator[bytes]:
    """Every proper prefix of `data`."""
    for end in range(len(data)):
        yield data[:end]
