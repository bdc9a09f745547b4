"""A clock that stands still until a test moves it: a `ports.Clock` for tests.

It refuses to run backwards by `advance`; a jump of the wall clock, either way, is `set`, and wakes nobody, as with real machines.

Law: nobody wakes before the time has passed that he asked to sleep; sleepers wake in the order of their times.
"""

from __future__ import annotations

import asyncio
import heapq
from itertools import count

from pjv2.errors import WrongUsage
from pjv2.units import Instant


class ManualClock:
    """A wall clock at `start` (seconds since the epoch) that only `advance` and `set` move."""

    def __init__(self, start: Instant = 1_750_000_000.0) -> None:
        self._now = start
        self._elapsed = 0.0
        self._order = count()
        self._sleepers: list[tuple[float, int, asyncio.Future[None]]] = []
        self._arrivals: list[tuple[int, asyncio.Future[None]]] = []

    def __repr__(self) -> str:
        return f"ManualClock({self._now!r}, {self.sleepers} asleep)"

    def now(self) -> Instant:
        return self._now

    async def sleep(self, seconds: float) -> None:
        """Return once `advance` has let `seconds` pass; zero or less only yields to other tasks."""
        if seconds <= 0:
            await asyncio.sleep(0)
            return
        awake: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        heapq.heappush(self._sleepers, (self._elapsed + seconds, next(self._order), awake))
        self._announce()
        await awake

    @property
    def sleepers(self) -> int:
        """How many tasks sleep now."""
        return sum(not awake.done() for _, _, awake in self._sleepers)

    @property
    def next_wake(self) -> float | None:
        """Seconds until the first sleeper wakes; None when nobody sleeps."""
        times = [when for when, _, awake in self._sleepers if not awake.done()]
        return min(times) - self._elapsed if times else None

    def advance(self, seconds: float) -> None:
        """Let time pass, and wake all whose time has come. They run when the caller next awaits. Raises WrongUsage below 0."""
        if seconds < 0:
            raise WrongUsage("time passes forwards: use set() for a jump of the wall clock")
        self._elapsed += seconds
        self._now += seconds
        while self._sleepers and self._sleepers[0][0] <= self._elapsed:
            awake = heapq.heappop(self._sleepers)[2]
            if not awake.done():
                awake.set_result(None)

    def set(self, now: Instant) -> None:
        """Jump the wall clock to `now`, either way; sleepers sleep on, because no time passed."""
        self._now = now

    async def until_asleep(self, tasks: int = 1) -> None:
        """Return once at least `tasks` tasks sleep: the way to know that a loop came round without waiting for real."""
        if self.sleepers >= tasks:
            return
        arrived: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._arrivals.append((tasks, arrived))
        await arrived

    def _announce(self) -> None:
        asleep = self.sleepers
        waiting, self._arrivals = self._arrivals, []
        for tasks, arrived in waiting:
            if tasks > asleep:
                self._arrivals.append((tasks, arrived))
            elif not arrived.done():
                arrived.set_result(None)
