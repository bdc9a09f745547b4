"""The tables of the store, and the migrations that lead an older database to them.

It refuses, as `CannotRead` and before anything is written: a database that something else wrote, one whose version is not a number,
one that a newer pjv2 wrote.

Law: a migration that was released never changes. `TABLES` describes the newest layout, for queries; it creates nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from sqlalchemy import (
    BigInteger,
    Column,
    Connection,
    Double,
    Integer,
    MetaData,
    Table,
    Text,
    delete,
    insert,
    inspect,
    select,
)

from pjv2.errors import CannotRead

APPLICATION = "pjv2"

TABLES = MetaData()

META = Table("meta", TABLES, Column("name", Text, primary_key=True), Column("value", Text, nullable=False))

SESSIONS = Table(
    "sessions",
    TABLES,
    Column("id", Integer, primary_key=True),
    Column("session", Text, nullable=False),
    Column("events", Integer, nullable=False),  # how many there are: the next seq
    Column("role", Text, nullable=False),
    Column("state", Text, nullable=False),
    Column("outcome", Text),
    Column("created", Double, nullable=False),
    Column("expires", Double, nullable=False),
    Column("next_due", Double),
    Column("label", Text),
    Column("note", Text),
    Column("order", Text),
    Column("amount", BigInteger),
    Column("uri_id", Text),
)

EVENTS = Table(
    "events",
    TABLES,
    Column("id", Integer, primary_key=True),
    Column("session", Text, nullable=False),
    Column("seq", Integer, nullable=False),
    Column("at", Double, nullable=False),
    Column("name", Text, nullable=False),
    Column("data", Text, nullable=False),
)


def _owned(name: str, key: str) -> Table:
    """A table of things that belong to one session each."""
    return Table(name, TABLES, Column(key, Text, primary_key=True), Column("session", Text, nullable=False))


SEEN_INPUTS = _owned("seen_inputs", "outpoint")
COINS = _owned("coins_in_use", "outpoint")
PEERS = _owned("peers_in_use", "peer")

BLOCKED_PEERS = Table(
    "blocked_peers", TABLES, Column("peer", Text, primary_key=True), Column("until_height", BigInteger, nullable=False)
)

CLAIMS = Table(
    "claims",
    TABLES,
    Column("session", Text, primary_key=True),
    Column("owner", Text, nullable=False),
    Column("taken", Double, nullable=False),
    Column("until", Double, nullable=False),
)

VALUES = Table("kept_values", TABLES, Column("name", Text, primary_key=True), Column("value", Text, nullable=False))


@dataclass(frozen=True, slots=True)
class Migration:
    """One step: from the layout `version - 1` to the layout `version`, inside the caller's transaction."""

    version: int
    apply: Callable[[Connection], None]


def _version_1(connection: Connection) -> None:
    # `id` never repeats: hooks read on from the last one they saw.
    identity = {
        "sqlite": "INTEGER PRIMARY KEY AUTOINCREMENT",
        "postgresql": "BIGINT GENERATED ALWAYS AS IDENTITY PRIMARY KEY",
    }[connection.dialect.name]
    for statement in (
        f"""CREATE TABLE sessions (
            id {identity}, session TEXT NOT NULL UNIQUE, events INTEGER NOT NULL, role TEXT NOT NULL, state TEXT NOT NULL,
            outcome TEXT, created DOUBLE PRECISION NOT NULL, expires DOUBLE PRECISION NOT NULL, next_due DOUBLE PRECISION,
            label TEXT, note TEXT, "order" TEXT UNIQUE, amount BIGINT, uri_id TEXT UNIQUE)""",
        "CREATE INDEX open_sessions ON sessions (next_due) WHERE outcome IS NULL",
        "CREATE INDEX newest_sessions ON sessions (created, id)",
        f"""CREATE TABLE events (
            id {identity}, session TEXT NOT NULL REFERENCES sessions (session), seq INTEGER NOT NULL,
            at DOUBLE PRECISION NOT NULL, name TEXT NOT NULL, data TEXT NOT NULL, UNIQUE (session, seq))""",
        """CREATE TABLE seen_inputs (
            outpoint TEXT NOT NULL PRIMARY KEY, session TEXT NOT NULL REFERENCES sessions (session))""",
        """CREATE TABLE coins_in_use (
            outpoint TEXT NOT NULL PRIMARY KEY, session TEXT NOT NULL REFERENCES sessions (session))""",
        "CREATE INDEX coins_of_session ON coins_in_use (session)",
        """CREATE TABLE peers_in_use (
            peer TEXT NOT NULL PRIMARY KEY, session TEXT NOT NULL REFERENCES sessions (session))""",
        "CREATE INDEX peers_of_session ON peers_in_use (session)",
        "CREATE TABLE blocked_peers (peer TEXT NOT NULL PRIMARY KEY, until_height BIGINT NOT NULL)",
        """CREATE TABLE claims (
            session TEXT NOT NULL PRIMARY KEY, owner TEXT NOT NULL, taken DOUBLE PRECISION NOT NULL,
            until DOUBLE PRECISION NOT NULL)""",
        "CREATE TABLE kept_values (name TEXT NOT NULL PRIMARY KEY, value TEXT NOT NULL)",
    ):
        connection.exec_driver_sql(statement)


MIGRATIONS: tuple[Migration, ...] = (Migration(1, _version_1),)
"""Every layout there ever was, in order; the last one is what `TABLES` describes."""


def recognise(connection: Connection, migrations: Sequence[Migration] = MIGRATIONS) -> int:
    """The version of the layout in this database, 0 for an empty one. It only reads. Raises CannotRead."""
    look = inspect(connection)
    tables = look.get_table_names()
    if not tables and not look.get_view_names():
        return 0
    foreign = CannotRead("this database was not made by pjv2: nothing was changed; name another one in [store] url")
    if META.name not in tables or {column["name"] for column in look.get_columns(META.name)} != {"name", "value"}:
        raise foreign
    meta = {str(name): str(value) for name, value in connection.execute(select(META.c.name, META.c.value))}
    if meta.get("application") != APPLICATION:
        raise foreign
    version = meta.get("schema", "")
    if not version.isascii() or not version.isdigit() or int(version) < 1:
        raise CannotRead("this database does not say which version of pjv2 wrote it: nothing was changed")
    newest = migrations[-1].version
    if int(version) > newest:
        raise CannotRead(
            f"this database was written by a newer pjv2 (layout {int(version)}, this one knows {newest}): "
            "nothing was changed; use the newer pjv2"
        )
    return int(version)


def migrate(connection: Connection, migrations: Sequence[Migration] = MIGRATIONS) -> int:
    """Lead the database to the newest layout inside the caller's writing transaction; answers the version it had."""
    # Asked again here, under the writer's lock: two processes may open one new database at once.
    before = recognise(connection, migrations)
    if before == migrations[-1].version:
        return before
    if before == 0:
        connection.exec_driver_sql("CREATE TABLE meta (name TEXT NOT NULL PRIMARY KEY, value TEXT NOT NULL)")
        connection.execute(insert(META).values(name="application", value=APPLICATION))
    for migration in migrations:
        if migration.version > before:
            migration.apply(connection)
    connection.execute(delete(META).where(META.c.name == "schema"))
    connection.execute(insert(META).values(name="schema", value=str(migrations[-1].version)))
    return before
