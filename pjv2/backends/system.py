"""The machine's own clock and randomness, as ports. Nothing else in pjv2 reads either."""

from __future__ import annotations

import asyncio
import secrets
import time

from pjv2.units import Instant

_LONGEST_NAP = 3600.0
"""Sleepers look at the wall clock at least this often, so that a clock that jumped does not leave them behind."""


class SystemClock:
    """Wall-clock time (UTC) and asyncio's sleep."""

    def now(self) -> Instant:
        return time.time()

    async def sleep(self, seconds: float) -> None:
        await asyncio.sleep(min(max(seconds, 0.0), _LONGEST_NAP))


class SystemEntropy:
    """The operating system's random source (`secrets`)."""

    def token(self, size: int) -> bytes:
        return secrets.token_bytes(size)

    def below(self, limit: int) -> int:
        return secrets.randbelow(limit)
