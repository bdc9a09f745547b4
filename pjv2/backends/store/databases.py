"""What SQLite and PostgreSQL do differently: opening, durability, the writer's lock, the clock, error codes.

It refuses databases that forget: SQLite in memory, SQLite without a write-ahead log or with `synchronous` below FULL, PostgreSQL with
`synchronous_commit` or `fsync` off. It refuses a SQLite file that others than its owner can read, for events hold keys.

Law: one writer at a time. SQLite writes inside `BEGIN IMMEDIATE`, PostgreSQL under one advisory lock; so a check made in a writing
transaction still holds when it commits, and the ids of events become visible in their order.
"""

from __future__ import annotations

import errno
import os
import sqlite3
import stat
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol, TypeAlias, TypeVar
from urllib.parse import quote

from sqlalchemy import ColumnElement, Connection, Double, Engine, create_engine, event, literal_column, text
from sqlalchemy.engine import URL, make_url
from sqlalchemy.exc import ArgumentError, DBAPIError, NoSuchModuleError, SQLAlchemyError
from sqlalchemy.pool import NullPool, QueuePool

from pjv2.errors import CannotRead, NotNow, PayjoinError, WrongUsage

_T = TypeVar("_T")

WRITE = "pjv2_write"
"""The execution option of a connection whose transaction writes."""

LOG_NAME = "pjv2"

_ADVISORY_LOCK = 0x706A7632
"""`pjv2` as a number: the key of PostgreSQL's advisory lock."""


class Database(Protocol):
    """One of the two databases."""

    workers: int
    """Threads, and so connections, that may be busy at once."""

    def looking(self) -> Engine:
        """An engine that only reads, to recognise a database before it is touched."""
        ...

    def engine(self, *, echo: bool) -> Engine: ...

    def check_durable(self, connection: Connection) -> None:
        """Read back that a commit reaches the disk before it is answered. Raises WrongUsage."""
        ...

    @property
    def now(self) -> ColumnElement[float]:
        """The database's clock, in seconds since the epoch, at this statement."""
        ...


def choose(url: str, *, busy_seconds: float) -> Database:
    """The database behind `url`. Raises WrongUsage."""
    try:
        parsed: URL | None = make_url(url)
    except (ArgumentError, ValueError):
        parsed = None  # its message would repeat the URL, which may hold a password
    if parsed is None:
        raise WrongUsage(
            "[store] url is not a database URL: write sqlite:///path or postgresql+psycopg://user@host/name"
        )
    if parsed.drivername in ("sqlite", "sqlite+pysqlite"):
        return Sqlite(_sqlite_path(parsed), busy_seconds)
    if parsed.drivername in ("postgresql", "postgresql+psycopg"):
        return Postgresql(parsed.set(drivername="postgresql+psycopg"), busy_seconds)
    raise WrongUsage(
        f"[store] url names {parsed.drivername!r}, which pjv2 does not speak: "
        "write sqlite:///path or postgresql+psycopg://user@host/name"
    )


# ---------------------------------------------------------------- SQLite

_MAGIC = b"SQLite format 3\0"
"""How every SQLite file begins (SQLite, "Database File Format")."""


class Sqlite:
    """One file, private to its owner; one connection, in one thread, per handle."""

    workers = 1

    def __init__(self, path: Path, busy_seconds: float) -> None:
        self._path = path
        self._busy_seconds = busy_seconds
        make_private(path)

    @property
    def now(self) -> ColumnElement[float]:
        # unixepoch('subsec') would need SQLite 3.42; the day number is exact to the millisecond.
        return literal_column("((julianday('now') - 2440587.5) * 86400.0)", Double)

    def looking(self) -> Engine:
        # A plain look at sqlite_master would not change the file, but the last one to leave a WAL database rewrites it.
        def connect() -> sqlite3.Connection:
            connection = self._connect("ro")
            try:
                connection.execute("SELECT count(*) FROM sqlite_master").fetchone()
            except sqlite3.OperationalError as exc:
                connection.close()
                if exc.sqlite_errorcode & 0xFF != sqlite3.SQLITE_READONLY:
                    raise
                return self._connect("rw")  # a crash left a journal that has to be rolled back first
            except sqlite3.Error:
                connection.close()
                raise
            return connection

        return create_engine("sqlite://", creator=connect, poolclass=NullPool, hide_parameters=True)

    def engine(self, *, echo: bool) -> Engine:
        def connect() -> sqlite3.Connection:
            connection = self._connect("rw")
            try:
                make_durable(connection, self._busy_seconds)
            except BaseException:
                connection.close()
                raise
            return connection

        engine = create_engine(
            "sqlite://",
            creator=connect,
            poolclass=QueuePool,
            pool_size=self.workers,
            max_overflow=0,
            echo=echo,
            hide_parameters=True,
            logging_name=LOG_NAME,
        )

        @event.listens_for(engine, "begin")
        def begin(connection: Connection) -> None:
            # A deferred transaction that turns into a writing one later is refused at once, however long one would wait.
            write = connection.get_execution_options().get(WRITE, False)
            connection.exec_driver_sql("BEGIN IMMEDIATE" if write else "BEGIN")

        return engine

    def check_durable(self, connection: Connection) -> None:
        """`make_durable` read it back when the connection was made."""

    def _connect(self, mode: str) -> sqlite3.Connection:
        # isolation_level None: the driver begins nothing by itself.
        return sqlite3.connect(
            f"file:{quote(str(self._path))}?mode={mode}", uri=True, timeout=self._busy_seconds, isolation_level=None
        )


def make_durable(connection: sqlite3.Connection, busy_seconds: float) -> None:
    """Have a SQLite connection write ahead and wait for the disk, and read back that it does. Raises WrongUsage."""
    deadline = time.monotonic() + busy_seconds
    while True:
        try:
            journal = connection.execute("PRAGMA journal_mode = WAL").fetchone()[0]
            break
        except sqlite3.OperationalError as exc:
            # SQLite does not wait for its lock here when two processes open a new database at once.
            if exc.sqlite_errorcode & 0xFF != sqlite3.SQLITE_BUSY or time.monotonic() > deadline:
                raise
            time.sleep(0.02)
    connection.execute("PRAGMA synchronous = FULL")
    connection.execute("PRAGMA fullfsync = ON")  # macOS: fsync alone stops at the drive's cache; elsewhere no effect
    connection.execute("PRAGMA checkpoint_fullfsync = ON")
    connection.execute("PRAGMA foreign_keys = ON")
    connection.execute("PRAGMA trusted_schema = OFF")
    synchronous = connection.execute("PRAGMA synchronous").fetchone()[0]
    fullfsync = connection.execute("PRAGMA fullfsync").fetchone()[0]
    foreign_keys = connection.execute("PRAGMA foreign_keys").fetchone()[0]
    if str(journal).lower() != "wal" or synchronous < 2 or not fullfsync:
        raise WrongUsage(
            "this SQLite database would forget what it stored after a power cut "
            f"(journal_mode {journal}, synchronous {synchronous}): put it on a local disk that allows a write-ahead log"
        )
    if not foreign_keys:
        raise WrongUsage("this SQLite library was built without foreign keys: use another one")


def make_private(path: Path) -> None:
    """Create the file 0600, and missing directories 0700, before SQLite opens it; check one that exists. Raises WrongUsage, CannotRead."""
    try:
        for directory in reversed([parent for parent in path.parents if not parent.exists()]):
            _make_private_directory(directory)
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | getattr(os, "O_CLOEXEC", 0), 0o600)
        except FileExistsError:
            _check_private(path)
            return
        try:
            if os.name == "posix":
                os.fchmod(descriptor, 0o600)
        finally:
            os.close(descriptor)
        _sync_directory(path.parent)
    except OSError as exc:
        reason = exc.strerror or type(exc).__name__
        if exc.errno in (errno.ENOSPC, errno.EDQUOT):
            raise NotNow(
                f"the disk that would hold the session database {path} is full: free some space", 60.0
            ) from exc
        raise WrongUsage(f"the session database {path} cannot be opened: {reason}") from exc


def _make_private_directory(directory: Path) -> None:
    try:
        directory.mkdir(mode=0o700)
    except FileExistsError:
        return  # somebody else was faster, and chose its mode
    directory.chmod(0o700)  # whatever the umask took away


def _check_private(path: Path) -> None:
    if not path.is_file():
        raise WrongUsage(f"the session database {path} is not a file")
    with path.open("rb") as file:
        start = file.read(len(_MAGIC))
    # SQLite takes a file shorter than a page for an empty database and would write over it. A crash can leave such a file too, but
    # then with the journal that repairs it.
    if start and start != _MAGIC and not path.with_name(path.name + "-journal").exists():
        raise CannotRead(f"{path} is not a SQLite database: nothing was changed; name another file in [store] url")
    if os.name != "posix":
        return
    _check_modes(path)


def _check_modes(path: Path) -> None:
    for file in (path, *(path.with_name(path.name + suffix) for suffix in ("-wal", "-shm", "-journal"))):
        try:
            mode = stat.S_IMODE(file.stat().st_mode)
        except FileNotFoundError:
            continue
        if mode & 0o077:
            raise WrongUsage(
                f"others can read the session database, which holds keys ({file} has mode {mode:04o}): chmod 600 {file}"
            )


def _sync_directory(directory: Path) -> None:
    """A new name is durable only when its directory is."""
    if os.name != "posix":
        return
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _sqlite_path(url: URL) -> Path:
    if not url.database or url.database == ":memory:" or "mode" in url.query:
        raise WrongUsage(
            "a store in memory forgets payments: name a file, sqlite:///path; for tests there is pjv2.testing.MemoryStore"
        )
    if url.query or url.host or url.username or url.database.startswith("file:"):
        raise WrongUsage("a SQLite URL is sqlite:///path (an absolute path has four slashes) and nothing else")
    return Path(url.database).expanduser().absolute()


# ---------------------------------------------------------------- PostgreSQL


class Postgresql:
    """A server; several connections, for several workers."""

    workers = 4

    def __init__(self, url: URL, busy_seconds: float) -> None:
        self._url = url
        self._busy_seconds = busy_seconds

    @property
    def now(self) -> ColumnElement[float]:
        # clock_timestamp: now() stands still inside a transaction, which may have waited for the writer's lock.
        return literal_column("CAST(EXTRACT(EPOCH FROM clock_timestamp()) AS DOUBLE PRECISION)", Double)

    def looking(self) -> Engine:
        return self._engine(poolclass=NullPool)

    def engine(self, *, echo: bool) -> Engine:
        engine = self._engine(
            poolclass=QueuePool,
            pool_size=self.workers,
            max_overflow=0,
            pool_pre_ping=True,
            echo=echo,
            logging_name=LOG_NAME,
        )
        wait = max(1, round(self._busy_seconds * 1000))

        @event.listens_for(engine, "begin")
        def begin(connection: Connection) -> None:
            if connection.get_execution_options().get(WRITE, False):
                connection.exec_driver_sql(f"SET LOCAL lock_timeout = {wait}")
                connection.execute(text("SELECT pg_advisory_xact_lock(:key)"), {"key": _ADVISORY_LOCK})

        return engine

    def check_durable(self, connection: Connection) -> None:
        for setting in ("synchronous_commit", "fsync"):
            if connection.exec_driver_sql(f"SHOW {setting}").scalar() == "off":
                raise WrongUsage(
                    f"this PostgreSQL would forget what it stored after a power cut ({setting} is off): turn it on"
                )

    def _engine(self, **options: Any) -> Engine:
        # A cancelled call waits for its transaction to end, so a server that fell silent must be given up in bounded time.
        patience = {
            "connect_timeout": 10,
            "tcp_user_timeout": 15_000,
            "keepalives_idle": 15,
            "keepalives_interval": 5,
            "keepalives_count": 3,
        }
        connect_args = {name: value for name, value in patience.items() if name not in self._url.query}
        try:
            # READ COMMITTED: each statement sees what was committed before it, so before the lock was ours.
            return create_engine(
                self._url, isolation_level="READ COMMITTED", hide_parameters=True, connect_args=connect_args, **options
            )
        except (ModuleNotFoundError, NoSuchModuleError) as exc:
            raise WrongUsage("PostgreSQL needs its driver: pip install 'pjv2[postgresql]'") from exc


# ---------------------------------------------------------------- what went wrong

_Meaning: TypeAlias = tuple[type[NotNow] | type[CannotRead] | type[WrongUsage], str, float | None]

_LOCKED = NotNow, "another process keeps the session database locked: try again", 1.0
_FULL = NotNow, "the disk that holds the session database is full, nothing was stored: free some space", 60.0
_DAMAGED = CannotRead, "the session database is damaged or no database: restore it from a backup", None
_LAYOUT = CannotRead, "the session database does not have the layout it claims: restore it from a backup", None
_NOT_WRITABLE = NotNow, "the session database cannot be written: check its permissions and the disk", 60.0
_COLLISION = NotNow, "another writer changed the session database at the same time: load again", 0.0

_SQLITE: dict[int, _Meaning] = {
    sqlite3.SQLITE_BUSY: _LOCKED,
    sqlite3.SQLITE_LOCKED: _LOCKED,
    sqlite3.SQLITE_FULL: _FULL,
    sqlite3.SQLITE_CORRUPT: _DAMAGED,
    sqlite3.SQLITE_NOTADB: _DAMAGED,
    sqlite3.SQLITE_FORMAT: _DAMAGED,
    sqlite3.SQLITE_READONLY: _NOT_WRITABLE,
    sqlite3.SQLITE_PERM: _NOT_WRITABLE,
    sqlite3.SQLITE_CANTOPEN: _NOT_WRITABLE,
    sqlite3.SQLITE_AUTH: _NOT_WRITABLE,
    sqlite3.SQLITE_CONSTRAINT: _COLLISION,
    sqlite3.SQLITE_ERROR: _LAYOUT,
    sqlite3.SQLITE_SCHEMA: _LAYOUT,
    sqlite3.SQLITE_MISMATCH: _LAYOUT,
}
"""By primary result code (SQLite, "Result and Error Codes")."""

_SERVER_GONE = NotNow, "the PostgreSQL server of the session database is not available now, or refuses the login", 5.0
_SERVER_FULL = NotNow, "the PostgreSQL server of the session database is out of disk, memory or connections", 60.0
_SERVER_REFUSES = WrongUsage, "the PostgreSQL server refuses the user, password or database of [store] url", None
_NO_RIGHTS = (
    WrongUsage,
    "the PostgreSQL user of [store] url may not use the session database: grant it the rights",
    None,
)

_POSTGRESQL: dict[str, _Meaning] = {
    "08": _SERVER_GONE,
    "57": _SERVER_GONE,
    "40": _LOCKED,
    "55": _LOCKED,
    "23": _COLLISION,
    "53": _SERVER_FULL,
    "28": _SERVER_REFUSES,
    "3D": _SERVER_REFUSES,
    "25": _NOT_WRITABLE,
    "42501": _NO_RIGHTS,
    "42": _LAYOUT,
    "3F": _LAYOUT,
    "XX": _DAMAGED,
}
"""By SQLSTATE, whole or its class (PostgreSQL manual, appendix A "Error Codes")."""


def translate(error: SQLAlchemyError | sqlite3.Error) -> PayjoinError:
    """Our error for a database's. It repeats neither SQL nor values, for events hold keys."""
    origin = error.orig if isinstance(error, DBAPIError) else error
    if isinstance(origin, sqlite3.Error):
        code = getattr(origin, "sqlite_errorcode", None)
        code_name = getattr(origin, "sqlite_errorname", type(origin).__name__)
        said = f"the disk does not read or write the session database ({code_name}): look at its room and its limits"
        unread = NotNow, said, 30.0
        return _ours(unread if code is None else _SQLITE.get(code & 0xFF, unread))
    if not isinstance(error, DBAPIError):
        return NotNow(f"the session database cannot be used now ({type(error).__name__})", after=5.0)
    state = getattr(origin, "sqlstate", None)
    if state is None:
        return _ours(_SERVER_GONE)
    refused = NotNow, f"the PostgreSQL server of the session database refused (SQLSTATE {state})", 30.0
    return _ours(_POSTGRESQL.get(state) or _POSTGRESQL.get(state[:2]) or refused)


def _ours(meaning: _Meaning) -> PayjoinError:
    kind, sentence, after = meaning
    return NotNow(sentence, after) if kind is NotNow else kind(sentence)


def translated(work: Callable[[], _T]) -> _T:
    """Do database work; what goes wrong leaves as one of ours, with no foreign error and its values hanging on it."""
    try:
        return work()
    except (SQLAlchemyError, sqlite3.Error) as exc:
        ours = translate(exc)
    raise ours
