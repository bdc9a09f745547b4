"""When to call the driver, and nothing else: one loop over all open sessions, and one bounded pass for short slots.

A session is driven by one task. New sessions, from this process or another one on the same store, are found by looking at the
store; a session that another worker holds, or whose world is not there just now, is tried again after a while. One session's
trouble never disturbs another.

Law: a job knows a session's id and nothing else.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass

from pjv2 import session as model
from pjv2.driver import Driver
from pjv2.errors import NotNow, PayjoinError
from pjv2.ports import SessionRow
from pjv2.units import Instant, SessionId


@dataclass(frozen=True, slots=True)
class Pass:
    """What a bounded pass did: sessions still open, those that moved on, and those left for a longer slot."""

    open: int
    progressed: int
    deferred: int


class Poller:
    """Drives every open session of a driver's store. `look` is how often the store is read for new ones, in seconds."""

    def __init__(self, driver: Driver, *, look: float = 2.0, retry: float = 15.0, max_in_flight: int = 256) -> None:
        self.driver = driver
        self.look = look
        self.retry = retry
        self._slots = asyncio.Semaphore(max_in_flight)
        self._tasks: dict[SessionId, asyncio.Task[None]] = {}
        self._not_before: dict[SessionId, Instant] = {}

    async def run(self) -> None:
        """Drive everything until cancelled; what is under way is left in the store, as a crash would."""
        try:
            while True:
                for row in await self._due():
                    if row.session not in self._tasks:
                        self._tasks[row.session] = asyncio.create_task(self._drive(row.session))
                await self.driver.clock.sleep(self.look)
        finally:
            for task in self._tasks.values():
                task.cancel()
            await asyncio.gather(*self._tasks.values(), return_exceptions=True)
            self._tasks.clear()

    async def _due(self) -> list[SessionRow]:
        now = self.driver.clock.now()
        try:
            rows = await self.driver.store.rows()
        except NotNow as exc:
            self.driver.notify.told("NotNow", now, None, {"what": "store", "why": str(exc)})
            return []
        return [
            row
            for row in rows
            if (row.outcome is None or (row.next_due is not None and row.next_due > now))
            and self._not_before.get(row.session, 0.0) <= now
        ]

    async def _drive(self, session: SessionId) -> None:
        clock = self.driver.clock
        try:
            async with self._slots:
                await self.driver.drive(session)
            self._not_before[session] = clock.now() + self.retry
        except NotNow as exc:
            self._not_before[session] = clock.now() + (exc.after if exc.after is not None else self.retry)
        except PayjoinError as exc:
            # This session cannot go on as it is; the others do, and it is tried again in case the cause was mended.
            self._not_before[session] = clock.now() + 60 * self.retry
            self.driver.notify.told("Error", clock.now(), session, {"error": type(exc).__name__, "why": str(exc)})
        finally:
            self._tasks.pop(session, None)

    async def run_once(self, budget: float | None = None, sessions: tuple[SessionId, ...] | None = None) -> Pass:
        """One pass over the open sessions (or these), each until it waits for the world; at most `budget` seconds."""
        clock = self.driver.clock
        deadline = None if budget is None else clock.now() + budget
        if sessions is None:
            sessions = tuple(row.session for row in await self.driver.store.rows(open_only=True))
        moved = await asyncio.gather(*(self._once(session, deadline) for session in sessions))
        left = await self.driver.store.rows(open_only=True)
        return Pass(
            open=len(left),
            progressed=sum(step is True for step in moved),
            deferred=sum(step is None for step in moved),
        )

    async def _once(self, session: SessionId, deadline: Instant | None) -> bool | None:
        """Whether the session moved on; None when it could not be worked on in this slot."""
        async with self._slots:
            try:
                before = await self.driver.load(session)
                after = await self.driver.drive(session, model.is_closed, deadline=deadline, once=True)
            except NotNow:
                return None
            except PayjoinError as exc:
                now = self.driver.clock.now()
                self.driver.notify.told("Error", now, session, {"error": type(exc).__name__, "why": str(exc)})
                return None
            return after.seq > before.seq
