"""`SqlStore`: the store on SQLite or PostgreSQL, one statement set for both.

It refuses databases that forget or that it does not understand (`databases`, `schema`), and changes that would not be read back
equal (`change`). Its errors hold no SQL and no values, for events hold keys.

Law: every call is one transaction in a worker thread. What was answered is on the disk. A cancelled call is over, stored or not, before
the cancellation goes on: the next `load` tells which, on any handle.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, fields
from types import TracebackType
from typing import Any, TypeVar

from sqlalchemy import Connection, Engine, Table, delete, insert, select, update

from pjv2.backends.store.change import (
    CLOCK_SLACK,
    check_change,
    check_claim,
    check_page,
    check_text,
    order_taken,
    unknown_session,
    uri_taken,
)
from pjv2.backends.store.databases import LOG_NAME, WRITE, Database, choose, translated
from pjv2.backends.store.schema import (
    BLOCKED_PEERS,
    CLAIMS,
    COINS,
    EVENTS,
    MIGRATIONS,
    PEERS,
    SEEN_INPUTS,
    SESSIONS,
    VALUES,
    Migration,
    migrate,
    recognise,
)
from pjv2.errors import CannotRead, OurMistake, WrongUsage
from pjv2.ports import (
    Appended,
    Change,
    CoinTakenBy,
    InputsSeenBy,
    LostRace,
    PeerTakenBy,
    Record,
    SessionRow,
    Stored,
)
from pjv2.units import Outpoint, SessionId

_T = TypeVar("_T")

_ROW = tuple(SESSIONS.c[field.name] for field in fields(SessionRow))


class SqlStore:
    """Sessions, their events and what they hold, in a SQL database. Open it with `SqlStore.open`, close it with `close`."""

    def __init__(self, database: Database, *, echo: bool) -> None:
        self._database = database
        # Rows hold keys: whoever turns on SQLAlchemy's debug log must not get them, only the statements.
        logging.getLogger(f"sqlalchemy.engine.Engine.{LOG_NAME}").setLevel(logging.INFO if echo else logging.WARNING)
        self._engine: Engine = database.engine(echo=echo)
        self._threads = ThreadPoolExecutor(database.workers, thread_name_prefix="pjv2-store")
        self._closed = False

    @classmethod
    async def open(
        cls,
        url: str,
        *,
        echo: bool = False,
        busy_seconds: float = 5.0,
        migrations: Sequence[Migration] = MIGRATIONS,
    ) -> SqlStore:
        """Open the database at `url`, making or migrating it where needed.

        `url` is `sqlite:///path` or `postgresql+psycopg://user@host/name`; `echo` logs statements, never values; `busy_seconds` is how
        long to wait for another writer. Raises WrongUsage (URL, permissions, a database that forgets), CannotRead (a foreign, damaged
        or newer database; nothing was touched), NotNow (locked, full, unreachable).
        """
        opening = asyncio.ensure_future(asyncio.to_thread(cls._open, url, echo, busy_seconds, tuple(migrations)))
        try:
            return await asyncio.shield(opening)
        except asyncio.CancelledError:
            opening.add_done_callback(_close_unwanted)
            raise

    @classmethod
    def _open(cls, url: str, echo: bool, busy_seconds: float, migrations: tuple[Migration, ...]) -> SqlStore:
        database = choose(url, busy_seconds=busy_seconds)
        look = database.looking()
        try:
            translated(lambda: _look(look, migrations))
        finally:
            look.dispose()
        store = cls(database, echo=echo)
        try:
            # In the worker thread, for a SQLite connection stays with the thread that made it.
            store._threads.submit(store._migrate, migrations).result()
        except BaseException:
            store._shut()
            raise
        return store

    async def __aenter__(self) -> SqlStore:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    # ---------------------------------------------------------------- sessions

    async def create(self, change: Change) -> Appended:
        """Insert a session with its first events; LostRace when it exists. Raises WrongUsage when `order` or `uri_id` is taken."""
        check_change(change, first=True)
        return await self._run(lambda connection: _store(connection, change, first=True), write=True)

    async def append(self, change: Change) -> Appended:
        """Store the change if the session has exactly `change.seq` events. Raises WrongUsage when there is no such session."""
        check_change(change, first=False)
        return await self._run(lambda connection: _store(connection, change, first=False), write=True)

    async def load(self, session: SessionId) -> tuple[Record, ...]:
        """All events of a session in order. Raises WrongUsage when it is unknown, CannotRead when one is missing."""
        # One statement, so that count and events belong together.
        query = (
            select(SESSIONS.c.events, EVENTS.c.seq, EVENTS.c.at, EVENTS.c.name, EVENTS.c.data)
            .select_from(SESSIONS.outerjoin(EVENTS, EVENTS.c.session == SESSIONS.c.session))
            .where(SESSIONS.c.session == check_text(session))
            .order_by(EVENTS.c.seq)
        )
        found = await self._run(lambda connection: connection.execute(query).all())
        if not found:
            raise unknown_session(session)
        if [row.seq for row in found] != list(range(found[0].events)):
            raise CannotRead(f"events of session {session} are missing: restore the database from a backup")
        return tuple(Record(row.seq, row.at, row.name, row.data) for row in found)

    async def row(self, session: SessionId) -> SessionRow:
        """The row of a session. Raises WrongUsage when it is unknown."""
        query = select(*_ROW).where(SESSIONS.c.session == check_text(session))
        found = await self._run(lambda connection: connection.execute(query).first())
        if found is None:
            raise unknown_session(session)
        return SessionRow(*found)

    async def rows(self, *, open_only: bool = False) -> tuple[SessionRow, ...]:
        """All rows, or those without an outcome, newest first."""
        query = select(*_ROW).order_by(SESSIONS.c.created.desc(), SESSIONS.c.id.desc())
        if open_only:
            query = query.where(SESSIONS.c.outcome.is_(None))
        return tuple(SessionRow(*row) for row in await self._run(lambda connection: connection.execute(query).all()))

    async def find(self, *, order: str | None = None, uri_id: str | None = None) -> SessionRow | None:
        """The session that carries this order, or this receiver key (or both); None when there is none."""
        if order is None and uri_id is None:
            raise OurMistake("a session is found by its order or its receiver key")
        query = select(*_ROW)
        if order is not None:
            query = query.where(SESSIONS.c.order == check_text(order))
        if uri_id is not None:
            query = query.where(SESSIONS.c.uri_id == check_text(uri_id))
        found = await self._run(lambda connection: connection.execute(query).first())
        return None if found is None else SessionRow(*found)

    async def since(self, cursor: int, limit: int) -> tuple[tuple[int, SessionId, Record], ...]:
        """Up to `limit` events of all sessions whose cursor is above `cursor`, in order of their storing."""
        check_page(cursor, limit)
        query = select(EVENTS).where(EVENTS.c.id > cursor).order_by(EVENTS.c.id).limit(limit)
        found = await self._run(lambda connection: connection.execute(query).all())
        return tuple((row.id, row.session, Record(row.seq, row.at, row.name, row.data)) for row in found)

    # ---------------------------------------------------------------- claims

    async def claim(self, session: SessionId, owner: str, seconds: float) -> bool:
        """Take or renew the claim by the database's clock; False when another holds it. The session need not exist yet."""
        check_claim(session, owner, seconds)
        clock = select(self._database.now)

        def work(connection: Connection) -> bool:
            now = connection.execute(clock).scalar_one()
            held = connection.execute(select(CLAIMS).where(CLAIMS.c.session == session)).first()
            values = {"owner": owner, "taken": now, "until": now + seconds}
            if held is None:
                connection.execute(insert(CLAIMS).values(session=session, **values))
                return True
            free = (CLAIMS.c.owner == owner) | (CLAIMS.c.until <= now) | (CLAIMS.c.taken > now + CLOCK_SLACK)
            done = connection.execute(update(CLAIMS).where(CLAIMS.c.session == session, free).values(**values))
            return done.rowcount == 1

        return await self._run(work, write=True)

    async def release(self, session: SessionId, owner: str) -> None:
        """Give up the claim if it is `owner`'s."""
        check_claim(session, owner, 0.0)
        query = delete(CLAIMS).where(CLAIMS.c.session == session, CLAIMS.c.owner == owner)
        await self._run(lambda connection: connection.execute(query), write=True)

    # ---------------------------------------------------------------- what sessions hold

    async def coins_in_use(self) -> Mapping[Outpoint, SessionId]:
        """The coins that open sessions pledged, and which session did."""
        found = await self._run(lambda connection: connection.execute(select(COINS)).all())
        return {_outpoint(row.outpoint): row.session for row in found}

    async def peers_in_use(self) -> Mapping[str, SessionId]:
        """The channel peers that sessions are opening a channel with, and which session is."""
        found = await self._run(lambda connection: connection.execute(select(PEERS)).all())
        return {row.peer: row.session for row in found}

    async def blocked_peers(self) -> Mapping[str, int]:
        """Peers that keep an abandoned channel, and the height until which they refuse another."""
        found = await self._run(lambda connection: connection.execute(select(BLOCKED_PEERS)).all())
        return {row.peer: row.until_height for row in found}

    # ---------------------------------------------------------------- small values

    async def get(self, name: str) -> str | None:
        """The value kept under `name`, or None."""
        query = select(VALUES.c.value).where(VALUES.c.name == check_text(name))
        value: str | None = await self._run(lambda connection: connection.execute(query).scalar())
        return value

    async def put(self, name: str, value: str | None) -> None:
        """Keep a small public value under `name`, or forget it (None)."""
        check_text(name)
        if value is not None:
            check_text(value)

        def work(connection: Connection) -> None:
            connection.execute(delete(VALUES).where(VALUES.c.name == name))
            if value is not None:
                connection.execute(insert(VALUES).values(name=name, value=value))

        await self._run(work, write=True)

    async def close(self) -> None:
        """Finish what runs and let go of the database; closing twice is fine."""
        if self._closed:
            return
        self._closed = True
        await asyncio.shield(asyncio.to_thread(self._shut))  # cancelled or not, it is let go of

    # ---------------------------------------------------------------- threads

    async def _run(self, work: Callable[[Connection], _T], *, write: bool = False) -> _T:
        if self._closed:
            raise OurMistake("this store is closed")
        job = self._threads.submit(self._transact, work, write)
        answer = asyncio.wrap_future(job)
        cancelled: asyncio.CancelledError | None = None
        while not answer.done():
            try:
                await asyncio.wait((answer,))
            except asyncio.CancelledError as exc:
                # Not begun: it never will. Running: it cannot be stopped, so its end is waited for, that no later load overtakes it.
                cancelled = exc
                job.cancel()
        if cancelled is not None:
            if not answer.cancelled():
                answer.exception()  # looked at, so that asyncio does not report it as lost
            raise cancelled
        return answer.result()

    def _transact(self, work: Callable[[Connection], _T], write: bool) -> _T:
        def transaction() -> _T:
            with self._engine.connect().execution_options(**{WRITE: write}) as connection, connection.begin():
                return work(connection)

        return translated(transaction)

    def _migrate(self, migrations: Sequence[Migration]) -> None:
        def work(connection: Connection) -> None:
            self._database.check_durable(connection)
            migrate(connection, migrations)

        self._transact(work, True)

    def _shut(self) -> None:
        self._threads.submit(self._engine.dispose).result()
        self._threads.shutdown()


def _look(engine: Engine, migrations: Sequence[Migration]) -> None:
    with engine.connect() as connection:
        recognise(connection, migrations)


def _close_unwanted(opening: asyncio.Task[SqlStore]) -> None:
    """Nobody waits for this store any more."""
    if not opening.cancelled() and opening.exception() is None:
        opening.result()._shut()


# ---------------------------------------------------------------- inside the writing transaction


def _store(connection: Connection, change: Change, *, first: bool) -> Appended:
    """Check everything, then write everything: the transaction is the only writer, so what was checked stays true."""
    row = change.row
    session = row.session
    count: int | None = connection.execute(select(SESSIONS.c.events).where(SESSIONS.c.session == session)).scalar()
    if count is None and not first:
        raise unknown_session(session)
    if count is not None and (first or count != change.seq):
        return LostRace()
    _check_unique(connection, row)
    refused = _refusal(connection, change)
    if refused is not None:
        return refused

    values = {**asdict(row), "events": change.seq + len(change.records)}
    if first:
        connection.execute(insert(SESSIONS).values(**values))
    else:
        connection.execute(update(SESSIONS).where(SESSIONS.c.session == session).values(**values))
    if change.records:
        records = [
            {"session": session, "seq": record.seq, "at": record.at, "name": record.name, "data": record.data}
            for record in change.records
        ]
        connection.execute(insert(EVENTS), records)
    if change.free_coins:
        connection.execute(delete(COINS).where(COINS.c.session == session))
    if change.free_peers:
        connection.execute(delete(PEERS).where(PEERS.c.session == session))
    _own(connection, SEEN_INPUTS, "outpoint", session, map(str, change.see_inputs))
    _own(connection, COINS, "outpoint", session, map(str, change.take_coins))
    _own(connection, PEERS, "peer", session, change.take_peers)
    for peer, height in change.block_peers:
        _block(connection, peer, height)
    return Stored()


def _check_unique(connection: Connection, row: SessionRow) -> None:
    others = select(SESSIONS.c.session).where(SESSIONS.c.session != row.session)
    if row.order is not None:
        other = connection.execute(others.where(SESSIONS.c.order == row.order)).scalar()
        if other is not None:
            raise order_taken(row.order, other)
    if row.uri_id is not None:
        other = connection.execute(others.where(SESSIONS.c.uri_id == row.uri_id)).scalar()
        if other is not None:
            raise uri_taken(other)


def _refusal(connection: Connection, change: Change) -> InputsSeenBy | CoinTakenBy | PeerTakenBy | None:
    session = change.row.session
    for outpoint in change.see_inputs:
        owner = _owner(connection, SEEN_INPUTS, "outpoint", str(outpoint))
        if owner not in (None, session):
            return InputsSeenBy(str(owner), outpoint)
    for outpoint in change.take_coins:
        owner = _owner(connection, COINS, "outpoint", str(outpoint))
        if owner not in (None, session):
            return CoinTakenBy(str(owner), outpoint)
    for peer in change.take_peers:
        owner = _owner(connection, PEERS, "peer", peer)
        if owner not in (None, session):
            return PeerTakenBy(str(owner), peer)
    return None


def _owner(connection: Connection, table: Table, key: str, value: str) -> SessionId | None:
    owner: SessionId | None = connection.execute(select(table.c.session).where(table.c[key] == value)).scalar()
    return owner


def _own(connection: Connection, table: Table, key: str, session: SessionId, values: Iterable[str]) -> None:
    """Write what is not ours yet; `_refusal` has shown that it is nobody else's."""
    for value in dict.fromkeys(values):
        if _owner(connection, table, key, value) is None:
            row: dict[str, Any] = {key: value, "session": session}
            connection.execute(insert(table).values(**row))


def _block(connection: Connection, peer: str, height: int) -> None:
    known = connection.execute(select(BLOCKED_PEERS.c.until_height).where(BLOCKED_PEERS.c.peer == peer)).scalar()
    if known is None:
        connection.execute(insert(BLOCKED_PEERS).values(peer=peer, until_height=height))
    elif height > known:
        connection.execute(update(BLOCKED_PEERS).where(BLOCKED_PEERS.c.peer == peer).values(until_height=height))


def _outpoint(value: str) -> Outpoint:
    try:
        return Outpoint.parse(value)
    except WrongUsage as exc:
        raise CannotRead("the session database holds a coin that is no outpoint: restore it from a backup") from exc
