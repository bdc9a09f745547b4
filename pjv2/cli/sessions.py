"""Reading stored sessions for the commands that only look: `history`, `show`, `explain`.

Law: looking changes nothing. No claim is taken, no event is written, and a database that is not there is not made.
"""

from __future__ import annotations

import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pjv2.errors import WrongUsage

if TYPE_CHECKING:
    from pjv2.config import Config
    from pjv2.ports import SessionRow, Store
    from pjv2.session import State
    from pjv2.session.events import Event

_SHOWN = 10
_SHORT = 8


@asynccontextmanager
async def reading(config: Config) -> AsyncIterator[Store | None]:
    """The store of the configuration; None while nothing was ever stored."""
    from pjv2.opening import open_store

    file = config.store_file
    if file is not None and not file.exists():
        yield None
        return
    store = await open_store(config)
    try:
        yield store
    finally:
        await store.close()


async def find(store: Store | None, beginning: str) -> tuple[Store, SessionRow]:
    """The one session whose id begins so, and the store it is in. Raises WrongUsage when there is none, or more than one."""
    wanted = beginning.strip().lower()
    if not re.fullmatch(r"[0-9a-f]{1,32}", wanted):
        raise WrongUsage(f"{beginning!r} is no session id: an id is 32 hex characters, its beginning is enough")
    rows = () if store is None else await store.rows()
    found = [row for row in rows if row.session.startswith(wanted)]
    if store is None or not found:
        raise WrongUsage(f"no session begins with {wanted}: pjv2 history lists them")
    if len(found) > 1:
        ids = ", ".join(row.session for row in found[:_SHOWN])
        more = f" and {len(found) - _SHOWN} more" if len(found) > _SHOWN else ""
        raise WrongUsage(f"{len(found)} sessions begin with {wanted}: {ids}{more}")
    return store, found[0]


def short_ids(rows: tuple[SessionRow, ...]) -> dict[str, str]:
    """The beginning of each id that is enough to name it, at least eight characters."""
    size = _SHORT
    while size < 32 and len({row.session[:size] for row in rows}) < len(rows):
        size += 1
    return {row.session: row.session[:size] for row in rows}


def row_facts(row: SessionRow) -> dict[str, Any]:
    """A row as JSON lines tell it, with the names of `public_session`; times in seconds since the epoch."""
    return {
        "role": row.role,
        "state": row.state,
        "outcome": row.outcome,
        "created": row.created,
        "expires": row.expires,
        "next_due": row.next_due,
        "amount_requested": row.amount,
        "label": row.label,
        "note": row.note,
        "order": row.order,
    }


@dataclass(frozen=True, slots=True)
class Found:
    """A session out of its log."""

    row: SessionRow
    state: State
    events: tuple[Event, ...]

    @property
    def facts(self) -> dict[str, Any]:
        """What is public about it, and what its owner noted beside it."""
        from pjv2.session import public_session

        beside = {"next_due": self.row.next_due, "note": self.row.note, "order": self.row.order}
        facts = {**public_session(self.state), **beside}
        del facts["session"]
        return facts

    @property
    def path(self) -> list[str]:
        """The states it went through, in order."""
        from pjv2.session import evolve

        path: list[str] = []
        state: State | None = None
        for event in self.events:
            state = evolve(state, event)
            if not path or path[-1] != state.stage.value:
                path.append(state.stage.value)
        return path


async def look_up(config: Config, beginning: str) -> Found:
    """The one session whose id begins so, out of its log. Raises WrongUsage, NotNow, CannotRead."""
    from pjv2.session import decode, replay

    async with reading(config) as there:
        store, row = await find(there, beginning)
        records = await store.load(row.session)
    state = replay([(record.seq, record.name, record.data) for record in records])
    return Found(row, state, tuple(decode(record.name, record.data) for record in records))
