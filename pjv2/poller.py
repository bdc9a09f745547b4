"""When to call the driver, and nothing else: one loop over all open sessions, and one bounded pass for short slots.

An open session is driven by one task. A closed one is looked at now and then until its watch is over, for a payment may come
after the end; thousands of those leave room for the open ones. New sessions, from this process or another one on the same store,
are found by looking at the store; a session that another worker holds, or whose world is not there just now, is tried again after
a while, and why is told once, not at every try. One session's trouble never disturbs another.

Law: a job knows a session's id and nothing else.
"""

from __future__ import annotations

import asyncio
import copy
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Any

from pjv2 import session as model
from pjv2.driver import Driver
from pjv2.errors import NotNow, PayjoinError
from pjv2.ports import Notify, SessionRow
from pjv2.session.needs import Memory
from pjv2.units import Instant, SessionId

_TROUBLES = ("NotNow", "KeyRotated", "Error")

_LATE_IN_FLIGHT = 8
"""Closed sessions that are looked at side by side."""

_LETTING_GO = 5.0

_SOUND = 60.0
"""Seconds of work after which the trouble before it counts as over."""


@dataclass(frozen=True, slots=True)
class Waited:
    """A session that something kept from going on, and what that was, for people."""

    session: SessionId
    why: str


@dataclass(frozen=True, slots=True)
class Pass:
    """What a bounded pass did: sessions still open, those that moved on, and those left for a longer slot.

    `waited`: the sessions that something away or refusing kept from going on, and why. `stalled`: that was so of every session asked
    for, and no other worker has them.
    """

    open: int
    progressed: int
    deferred: int
    waited: tuple[Waited, ...] = ()
    stalled: bool = False


class _Ear:
    """A `Notify` that passes everything on, and remembers the last trouble of each session until the session moves.

    `away`: the sessions that could not be worked on at all.
    """

    def __init__(self, driver: Driver) -> None:
        self._driver = driver
        self.last: dict[SessionId, str] = {}
        self.away: set[SessionId] = set()

    def told(self, event: str, at: Instant, session: SessionId | None, facts: Mapping[str, Any]) -> None:
        if session is not None:
            self.last.pop(session, None)
            if event in _TROUBLES:
                self.last[session] = str(facts.get("why", event))
        notify: Notify = self._driver.notify
        notify.told(event, at, session, facts)


class Poller:
    """Drives every open session of a driver's store, and watches the closed ones.

    In seconds: `look` is how often the store is read for new ones, `late` how often a closed one is looked at.
    """

    def __init__(
        self,
        driver: Driver,
        *,
        look: float = 2.0,
        retry: float = 15.0,
        late: float | None = None,
        max_in_flight: int = 256,
    ) -> None:
        self.driver = driver
        self.look = look
        self.retry = retry
        self.late = 20 * driver.pace.watch if late is None else late
        self._slots = asyncio.Semaphore(max_in_flight)
        self._late_slots = asyncio.Semaphore(_LATE_IN_FLIGHT)
        self._over: set[SessionId] = set()
        self._tasks: dict[SessionId, asyncio.Task[None]] = {}
        self._not_before: dict[SessionId, Instant] = {}
        self._said: dict[SessionId | None, str] = {}

    async def run(self) -> None:
        """Drive everything until cancelled; what is under way is left in the store, as a crash would."""
        try:
            while True:
                for row in await self._due():
                    if row.session not in self._tasks:
                        work = self._drive if row.outcome is None else self._look_again
                        self._tasks[row.session] = asyncio.create_task(self._looked_after(row.session, work))
                await self.driver.clock.sleep(self.look)
        finally:
            while going := [task for task in self._tasks.values() if not task.done()]:
                for task in going:
                    task.cancel()
                # Told again where it did not help: an HTTP client may answer and forget that it was told.
                await asyncio.wait(going, timeout=_LETTING_GO)
            self._tasks.clear()

    async def _due(self) -> list[SessionRow]:
        now = self.driver.clock.now()
        try:
            rows = await self.driver.store.rows()
        except NotNow as exc:
            self._away(None, "store", exc)
            return []
        self._said.pop(None, None)
        return [
            row
            for row in rows
            if (row.outcome is None or (row.next_due is not None and row.session not in self._over))
            and self._not_before.get(row.session, 0.0) <= now
        ]

    async def _drive(self, session: SessionId) -> float:
        """To its end; answers after how many seconds it may be looked at again."""
        clock = self.driver.clock
        began: list[tuple[int, Instant]] = []

        def under_way(state: model.State) -> bool:
            if not began:
                began.append((state.seq, clock.now()))
            seq, at = began[0]
            if state.seq > seq or clock.now() - at > _SOUND:
                self._said.pop(session, None)  # it works: whatever comes now is news
            return model.is_closed(state)

        async with self._slots:
            state = await self.driver.drive(session, under_way)
        return self.retry if state.closed is None else self.late

    async def _look_again(self, session: SessionId) -> float:
        """One look at a closed session."""
        async with self._late_slots:
            state = await self.driver.drive(session, once=True)
        wants = model.needs(state, self.driver.clock.now(), Memory())
        if not wants.due and wants.wake_at is None:
            self._over.add(session)
        return self.late

    async def _looked_after(self, session: SessionId, work: Callable[[SessionId], Awaitable[float]]) -> None:
        clock = self.driver.clock
        try:
            pause = await work(session)
            self._said.pop(session, None)
            self._not_before[session] = clock.now() + pause
        except NotNow as exc:
            self._not_before[session] = clock.now() + (exc.after if exc.after is not None else self.retry)
            self._away(session, "session", exc)
        except PayjoinError as exc:
            # This session cannot go on as it is; the others do, and it is tried again in case the cause was mended.
            self._not_before[session] = clock.now() + 60 * self.retry
            self.driver.notify.told("Error", clock.now(), session, {"error": type(exc).__name__, "why": str(exc)})
        finally:
            self._tasks.pop(session, None)

    def _away(self, session: SessionId | None, what: str, exc: NotNow) -> None:
        """Tell once what is waited for, however often it is tried in vain."""
        why = str(exc)
        if self._said.get(session) != why:
            self._said[session] = why
            self.driver.notify.told("NotNow", self.driver.clock.now(), session, {"what": what, "why": why})

    # ------------------------------------------------------------ a bounded pass

    async def run_once(self, budget: float | None = None, sessions: tuple[SessionId, ...] | None = None) -> Pass:
        """One pass over the open sessions (or these), each until it waits for the world; at most `budget` seconds."""
        clock = self.driver.clock
        deadline = None if budget is None else clock.now() + budget
        if sessions is None:
            sessions = tuple(row.session for row in await self.driver.store.rows(open_only=True))
        ear = _Ear(self.driver)
        # The same driver, heard by this pass alone: two passes at once must not hear each other's sessions.
        heard = copy.copy(self.driver)
        heard.notify = ear
        moved = await asyncio.gather(*(self._once(heard, ear, session, deadline) for session in sessions))
        left = await self.driver.store.rows(open_only=True)
        still = {row.session for row in left}
        stalled = bool(sessions) and ear.away.issuperset(sessions) and not await self._held_elsewhere(sessions)
        return Pass(
            open=len(left),
            progressed=sum(step is True for step in moved),
            deferred=sum(step is None for step in moved),
            waited=tuple(Waited(one, ear.last[one]) for one in sessions if one in ear.last and one in still),
            stalled=stalled,
        )

    async def _once(self, driver: Driver, ear: _Ear, session: SessionId, deadline: Instant | None) -> bool | None:
        """Whether the session moved on; None when it could not be worked on in this slot."""
        async with self._slots:
            if deadline is not None and driver.clock.now() >= deadline:
                ear.last[session] = "the time of this pass was over before its turn came"
                return None
            try:
                before = await driver.load(session)
                closed = before.closed is not None  # and asked for by name: what came after the end is looked for
                until = (lambda state: False) if closed else model.is_closed
                after = await driver.drive(session, until, deadline=deadline, once=True)
            except NotNow as exc:
                ear.last[session] = str(exc)
                ear.away.add(session)
                return None
            except PayjoinError as exc:
                why = {"error": type(exc).__name__, "why": str(exc)}
                driver.notify.told("Error", driver.clock.now(), session, why)
                return None
            return after.seq > before.seq

    async def _held_elsewhere(self, sessions: tuple[SessionId, ...]) -> bool:
        """Every one of these sessions has another worker."""
        store, owner = self.driver.store, f"{self.driver.worker}:look"
        try:
            for session in sessions:
                if await store.claim(session, owner, 1.0):
                    await store.release(session, owner)
                    return False
        except NotNow:
            return False
        return True
