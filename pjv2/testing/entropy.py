"""Randomness that repeats: a `units.Entropy` from a seed, for tests that must come out the same twice.

It refuses to be mistaken for a source of secrets: everything it says follows from the seed.

Law: SHA-256 of the seed and a counter, read as one stream; `below` is uniform by rejection.
"""

from __future__ import annotations

import hashlib

from pjv2.errors import WrongUsage


class SeededEntropy:
    """A deterministic `Entropy`; two of the same seed say the same."""

    def __init__(self, seed: bytes | str | int = 0) -> None:
        text = seed if isinstance(seed, bytes) else str(seed).encode()
        self._seed = hashlib.sha256(b"pjv2 seeded entropy" + text).digest()
        self._counter = 0
        self._left = b""

    def __repr__(self) -> str:
        return "SeededEntropy()"

    def token(self, size: int) -> bytes:
        """The next `size` bytes of the stream. Raises WrongUsage below 0."""
        if size < 0:
            raise WrongUsage("a token has a size of at least 0 bytes")
        parts = [self._left]
        have = len(self._left)
        while have < size:
            block = hashlib.sha256(self._seed + self._counter.to_bytes(8, "big")).digest()
            self._counter += 1
            parts.append(block)
            have += len(block)
        stream = b"".join(parts)
        self._left = stream[size:]
        return stream[:size]

    def below(self, limit: int) -> int:
        """A uniform integer in `0 <= n < limit`. Raises WrongUsage for a limit below 1."""
        if limit < 1:
            raise WrongUsage("there is no number below a limit that is not positive")
        bits = (limit - 1).bit_length()
        size = (bits + 7) // 8
        while True:
            number = int.from_bytes(self.token(size), "big") >> (8 * size - bits)
            if number < limit:
                return number
