"""What the SQL store does beyond the contract: private and durable files, layouts, errors without secrets, cancellation, scale."""
# ruff: noqa: ASYNC220, ASYNC240 - files and processes are what is tested here, and nothing else runs on the loop meanwhile

from __future__ import annotations

import asyncio
import logging
import os
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
import traceback
from dataclasses import replace
from pathlib import Path

import pytest
from sqlalchemy import Connection, create_engine, inspect
from sqlalchemy.exc import OperationalError

from pjv2.backends.store import databases, schema
from pjv2.backends.store.databases import make_durable, translate
from pjv2.backends.store.schema import MIGRATIONS, TABLES, Migration
from pjv2.backends.store.sql import SqlStore
from pjv2.errors import CannotRead, NotNow, OurMistake, PayjoinError, WrongUsage
from pjv2.ports import Record, Stored
from pjv2.testing.check_store import example_change, example_row
from pjv2.units import Outpoint

A, B = "a" * 32, "b" * 32
SECRET = "5ec2e75ec2e7"


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "pjv2.sqlite"


def url(path: Path) -> str:
    return f"sqlite:///{path}"


def mode(path: Path) -> int:
    return path.stat().st_mode & 0o777


async def make_one(path: Path, migrations: tuple[Migration, ...] = MIGRATIONS) -> None:
    async with await SqlStore.open(url(path), migrations=migrations) as store:
        await store.create(example_change())


# ---------------------------------------------------------------- files


@pytest.mark.parametrize("umask", [0o000, 0o022, 0o777])
async def test_files_are_private_whatever_the_umask(tmp_path: Path, umask: int) -> None:
    path = tmp_path / "new" / "deeper" / "pjv2.sqlite"
    tmp_path.chmod(0o755)
    before = os.umask(umask)
    try:
        async with await SqlStore.open(url(path)) as store:
            await store.create(example_change())
            assert {file.name: mode(file) for file in path.parent.iterdir()} == dict.fromkeys(
                ("pjv2.sqlite", "pjv2.sqlite-wal", "pjv2.sqlite-shm"), 0o600
            )
    finally:
        os.umask(before)
    assert mode(path.parent) & 0o077 == 0
    assert mode(path.parent.parent) & 0o077 == 0
    assert mode(tmp_path) == 0o755


@pytest.mark.parametrize("bits", [0o644, 0o640, 0o604, 0o660])
async def test_a_file_that_others_can_read_is_refused_with_the_remedy(path: Path, bits: int) -> None:
    await make_one(path)
    path.chmod(bits)
    with pytest.raises(WrongUsage, match=f"chmod 600 {path}$"):
        await SqlStore.open(url(path))
    path.chmod(0o600)
    async with await SqlStore.open(url(path)) as store:
        assert len(await store.rows()) == 1


async def test_a_journal_that_others_can_read_is_refused(path: Path) -> None:
    await make_one(path)
    Path(f"{path}-wal").touch(0o644)
    Path(f"{path}-wal").chmod(0o644)
    with pytest.raises(WrongUsage, match=r"chmod 600 .*-wal"):
        await SqlStore.open(url(path))


@pytest.mark.parametrize(
    "bad",
    [
        "sqlite://",
        "sqlite:///",
        "sqlite:///:memory:",
        "sqlite+pysqlite:///:memory:",
        "sqlite:///file:x?mode=memory&uri=true",
    ],
)
async def test_a_store_in_memory_is_refused_with_the_alternative(bad: str) -> None:
    with pytest.raises(WrongUsage, match=r"pjv2\.testing\.MemoryStore"):
        await SqlStore.open(bad)


@pytest.mark.parametrize(
    "bad", ["", "pjv2.sqlite", "mysql://u:hunter2@h/d", "sqlite:///x?vfs=none", "sqlite+aiosqlite:///x", "://hunter2"]
)
async def test_another_url_is_refused_without_repeating_a_password(
    bad: str, tmp_path: Path, monkeypatch: object
) -> None:
    with pytest.raises(WrongUsage, match="sqlite:///path") as caught:
        await SqlStore.open(bad)
    assert "hunter2" not in "".join(traceback.format_exception(caught.value))


async def test_a_path_that_cannot_be_a_file_is_wrong_usage(tmp_path: Path) -> None:
    (tmp_path / "plain").write_text("")
    for bad in (tmp_path, tmp_path / "plain" / "x.sqlite"):
        with pytest.raises(WrongUsage, match="session database"):
            await SqlStore.open(url(bad))


async def test_a_path_with_odd_characters_is_one_file(tmp_path: Path) -> None:
    path = tmp_path / "a #b%20&c=é.sqlite"
    async with await SqlStore.open(f"sqlite:///{str(path).replace('%', '%25')}") as store:
        await store.put("name", "value")
    assert [file.name for file in tmp_path.iterdir()] == [path.name]


# ---------------------------------------------------------------- durability


async def test_every_connection_writes_ahead_and_waits_for_the_disk(path: Path) -> None:
    async with await SqlStore.open(url(path)) as store:

        def look(connection: Connection) -> dict[str, object]:
            names = ("journal_mode", "synchronous", "fullfsync", "foreign_keys", "busy_timeout", "trusted_schema")
            return {name: connection.exec_driver_sql(f"PRAGMA {name}").scalar() for name in names}

        assert await store._run(look) == {
            "journal_mode": "wal",
            "synchronous": 2,
            "fullfsync": 1,
            "foreign_keys": 1,
            "busy_timeout": 5000,
            "trusted_schema": 0,
        }


def test_a_disk_without_a_write_ahead_log_is_refused(path: Path) -> None:
    connection = sqlite3.connect(f"file:{path}?vfs=unix-none", uri=True)  # no shared memory, hence no WAL
    try:
        with pytest.raises(WrongUsage, match="power cut"):
            make_durable(connection, 0)
    finally:
        connection.close()


WRITER = """
import asyncio, sys
from pjv2.backends.store.sql import SqlStore
from pjv2.testing.check_store import example_change

async def main():
    store = await SqlStore.open(sys.argv[1])
    await store.create(example_change())
    seq = 1
    while True:
        await store.append(example_change(seq=seq, events=2))
        seq += 2
        print(seq, flush=True)

asyncio.run(main())
"""


async def test_what_was_answered_survives_a_kill(path: Path) -> None:
    process = subprocess.Popen([sys.executable, "-c", WRITER, url(path)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    with process.stdout:
        answered = [process.stdout.readline() for _ in range(20)]
        process.send_signal(signal.SIGKILL)
        answered += process.stdout.readlines()
        process.wait()
    async with await SqlStore.open(url(path)) as store:
        loaded = await store.load(A)
        assert len(loaded) >= int(answered[-1]) >= 41
        assert len(loaded) % 2 == 1
        assert await store.append(example_change(seq=len(loaded))) == Stored()


async def test_a_restored_older_copy_goes_on_from_where_it_was(path: Path, tmp_path: Path) -> None:
    await make_one(path)
    copy = tmp_path / "copy.sqlite"
    shutil.copy(path, copy)
    async with await SqlStore.open(url(path)) as store:
        await store.append(example_change(seq=1, events=5))
    shutil.copy(copy, path)
    async with await SqlStore.open(url(path)) as store:
        assert len(await store.load(A)) == 1
        assert await store.append(example_change(seq=1)) == Stored()


# ---------------------------------------------------------------- layouts


def test_the_migrations_lead_to_the_tables_that_are_queried() -> None:
    migrated, declared = create_engine("sqlite://"), create_engine("sqlite://")
    with migrated.begin() as connection:
        schema.migrate(connection)
    TABLES.create_all(declared)
    left, right = inspect(migrated), inspect(declared)
    assert sorted(left.get_table_names()) == sorted(right.get_table_names())

    def columns(look: object, table: str) -> list[tuple[str, str, bool]]:
        found = look.get_columns(table)  # type: ignore[attr-defined]
        return [
            (each["name"], str(each["type"].as_generic()).replace("FLOAT", "DOUBLE"), each["nullable"])
            for each in found
        ]

    for table in left.get_table_names():
        left_columns, right_columns = columns(left, table), columns(right, table)
        # SQLite says that a primary key INTEGER may be null, which it never is.
        assert [each for each in left_columns if each[0] != "id"] == [each for each in right_columns if each[0] != "id"]
    migrated.dispose()
    declared.dispose()


def _older_layout(connection: Connection) -> None:
    """A layout that never was: without notes, and without a peers' table."""
    MIGRATIONS[0].apply(connection)
    connection.exec_driver_sql("ALTER TABLE sessions DROP COLUMN note")
    connection.exec_driver_sql("DROP TABLE blocked_peers")


def _newer_layout(connection: Connection) -> None:
    connection.exec_driver_sql("ALTER TABLE sessions ADD COLUMN note TEXT")
    connection.exec_driver_sql("UPDATE sessions SET note = 'migrated'")
    connection.exec_driver_sql(
        "CREATE TABLE blocked_peers (peer TEXT NOT NULL PRIMARY KEY, until_height BIGINT NOT NULL)"
    )


OLD = (Migration(1, _older_layout),)
NEW = (*OLD, Migration(2, _newer_layout))


async def older_database(path: Path) -> None:
    async with await SqlStore.open(url(path), migrations=OLD):
        pass
    with sqlite3.connect(path) as connection:
        connection.execute(
            "INSERT INTO sessions (session, events, role, state, created, expires) VALUES (?, 1, 'sender', 'Created', 1, 2)",
            (A,),
        )
        connection.execute("INSERT INTO events (session, seq, at, name, data) VALUES (?, 0, 1, 'Created', '{}')", (A,))
    connection.close()


async def test_an_older_layout_is_migrated_with_its_sessions(path: Path) -> None:
    await older_database(path)
    for _ in range(2):
        async with await SqlStore.open(url(path), migrations=NEW) as store:
            assert (await store.row(A)).note == "migrated"
            assert await store.load(A) == (Record(0, 1.0, "Created", "{}"),)
            assert await store.blocked_peers() == {}


async def test_a_migration_that_fails_leaves_the_older_layout(path: Path) -> None:
    await older_database(path)

    def broken(connection: Connection) -> None:
        _newer_layout(connection)
        connection.exec_driver_sql("DROP TABLE no_such_table")

    with pytest.raises(CannotRead, match="layout"):
        await SqlStore.open(url(path), migrations=(*OLD, Migration(2, broken)))
    async with await SqlStore.open(url(path), migrations=NEW) as store:
        assert (await store.row(A)).note == "migrated"


async def test_a_database_of_a_newer_pjv2_is_left_alone(path: Path) -> None:
    await make_one(path, NEW)
    before = path.read_bytes()
    with pytest.raises(CannotRead, match=r"written by a newer pjv2 \(layout 2, this one knows 1\)"):
        await SqlStore.open(url(path))
    assert path.read_bytes() == before


@pytest.mark.parametrize(
    "script",
    [
        "CREATE TABLE wallet (x)",
        "CREATE TABLE meta (name TEXT, value TEXT)",
        "CREATE TABLE meta (id INTEGER, value TEXT)",
        "CREATE TABLE meta (name, value); INSERT INTO meta VALUES ('application', 'other'), ('schema', '1')",
        "CREATE TABLE meta (name, value); INSERT INTO meta VALUES ('application', 'pjv2')",
        "CREATE TABLE meta (name, value); INSERT INTO meta VALUES ('application', 'pjv2'), ('schema', 'one')",
        "CREATE TABLE meta (name, value); INSERT INTO meta VALUES ('application', 'pjv2'), ('schema', '0')",
        "CREATE VIEW v AS SELECT 1",
        "PRAGMA journal_mode = WAL; CREATE TABLE wallet (x)",
    ],
)
async def test_a_foreign_database_is_left_alone(path: Path, script: str) -> None:
    connection = sqlite3.connect(path)
    connection.executescript(script)
    connection.close()
    path.chmod(0o600)
    before = path.read_bytes()
    with pytest.raises(CannotRead, match="nothing was changed"):
        await SqlStore.open(url(path))
    assert path.read_bytes() == before


async def test_a_foreign_database_with_a_pending_write_ahead_log_is_left_alone(path: Path, tmp_path: Path) -> None:
    connection = sqlite3.connect(tmp_path / "theirs.sqlite")
    connection.executescript("PRAGMA journal_mode = WAL; CREATE TABLE wallet (x)")
    files = {path: tmp_path / "theirs.sqlite", Path(f"{path}-wal"): tmp_path / "theirs.sqlite-wal"}
    for ours, theirs in files.items():
        shutil.copy(theirs, ours)
        ours.chmod(0o600)
    with pytest.raises(CannotRead, match="nothing was changed"):
        await SqlStore.open(url(path))
    for ours, theirs in files.items():
        assert ours.read_bytes() == theirs.read_bytes()
    connection.close()


async def test_a_store_with_a_journal_left_by_a_crash_is_repaired(path: Path, tmp_path: Path) -> None:
    await make_one(path)
    crashed = tmp_path / "crashed.sqlite"
    connection = sqlite3.connect(path, isolation_level=None)
    connection.executescript("PRAGMA journal_mode = DELETE; PRAGMA cache_size = 1; BEGIN")
    connection.execute("UPDATE sessions SET state = 'half written'")
    connection.executemany("INSERT INTO kept_values VALUES (?, ?)", [(str(n), "x" * 1000) for n in range(100)])
    for suffix in ("", "-journal"):
        shutil.copy(f"{path}{suffix}", f"{crashed}{suffix}")
        Path(f"{crashed}{suffix}").chmod(0o600)
    connection.close()
    async with await SqlStore.open(url(crashed)) as store:
        assert await store.row(A) == example_row()
        assert await store.get("1") is None
        assert len(await store.load(A)) == 1


@pytest.mark.parametrize("content", [b"\x89PNG not a database " * 300, b"SQLite format 3\0" + b"\xff" * 5000, b"x"])
async def test_a_file_that_is_no_database_is_left_alone(path: Path, content: bytes) -> None:
    path.write_bytes(content)
    path.chmod(0o600)
    with pytest.raises(CannotRead):
        await SqlStore.open(url(path))
    assert path.read_bytes() == content


async def test_an_empty_file_becomes_a_store(path: Path) -> None:
    path.touch(0o600)
    await make_one(path)


async def test_many_handles_may_open_a_new_file_at_once(path: Path) -> None:
    stores = await asyncio.gather(*(SqlStore.open(url(path)) for _ in range(6)))
    assert [await store.rows() for store in stores] == [()] * 6
    for store in stores:
        await store.close()


# ---------------------------------------------------------------- errors


async def test_a_locked_database_is_not_now_and_nothing_is_stored(path: Path) -> None:
    await make_one(path)
    async with await SqlStore.open(url(path), busy_seconds=0.05) as store:
        lock = sqlite3.connect(path, isolation_level=None)
        lock.execute("BEGIN IMMEDIATE")
        change = replace(example_change(seq=1), records=(Record(1, 0.0, "Created", SECRET),))
        with pytest.raises(NotNow, match="locked") as caught:
            await store.append(change)
        assert caught.value.after == 1.0
        assert_bare(caught.value)
        assert len(await store.load(A)) == 1  # readers do not wait for a writer
        lock.execute("ROLLBACK")
        lock.close()
        assert await store.append(change) == Stored()


async def test_a_full_disk_is_not_now_and_nothing_is_stored(path: Path) -> None:
    await make_one(path)
    async with await SqlStore.open(url(path)) as store:
        await store._run(lambda connection: connection.exec_driver_sql("PRAGMA max_page_count = 1"))
        big = replace(
            example_change(seq=1, take_coins=(Outpoint("11" * 32, 0),)),
            records=(Record(1, 0.0, "Created", SECRET * 100_000),),
        )
        with pytest.raises(NotNow, match="is full, nothing was stored") as caught:
            await store.append(big)
        assert_bare(caught.value)
        assert len(await store.load(A)) == 1
        assert await store.coins_in_use() == {}
        await store._run(lambda connection: connection.exec_driver_sql("PRAGMA max_page_count = 1000000"))
        assert await store.append(big) == Stored()


async def test_a_damaged_page_cannot_be_read(path: Path) -> None:
    async with await SqlStore.open(url(path)) as store:
        await store.create(replace(example_change(), records=(Record(0, 0.0, "Created", SECRET * 10_000),)))
    content = bytearray(path.read_bytes())
    for page in range(4096, len(content), 4096):
        content[page : page + 100] = b"\xff" * 100
    path.write_bytes(content)
    with pytest.raises(CannotRead, match="damaged") as caught:
        async with await SqlStore.open(url(path)) as store:
            await store.load(A)
    assert_bare(caught.value)


async def test_a_missing_event_or_table_cannot_be_read(path: Path) -> None:
    await make_one(path)
    async with await SqlStore.open(url(path)) as store:
        await store.append(example_change(seq=1, events=3))
        other = sqlite3.connect(path, isolation_level=None)
        other.execute("DELETE FROM events WHERE seq = 1")
        with pytest.raises(CannotRead, match="missing"):
            await store.load(A)
        other.execute("INSERT INTO coins_in_use VALUES ('no outpoint', ?)", (A,))
        with pytest.raises(CannotRead, match="no outpoint"):
            await store.coins_in_use()
        other.execute("DROP TABLE events")
        other.close()
        with pytest.raises(CannotRead, match="layout") as caught:
            await store.since(0, 1)
        assert_bare(caught.value)


def assert_bare(error: PayjoinError) -> None:
    """Nothing foreign hangs on the error, and no value or statement shows."""
    assert error.__cause__ is None
    assert error.__context__ is None
    told = "".join(traceback.format_exception(error))
    for secret in (SECRET, "INSERT INTO", "[SQL", "parameters"):
        assert secret not in told


class Refused(Exception):
    def __init__(self, sqlstate: str | None) -> None:
        super().__init__(SECRET)
        self.sqlstate = sqlstate


@pytest.mark.parametrize(
    ("sqlstate", "kind"),
    [
        (None, NotNow),
        ("08006", NotNow),
        ("57P01", NotNow),
        ("40P01", NotNow),
        ("55P03", NotNow),
        ("53100", NotNow),
        ("25006", NotNow),
        ("23505", NotNow),
        ("99999", NotNow),
        ("28P01", WrongUsage),
        ("3D000", WrongUsage),
        ("42501", WrongUsage),
        ("42P01", CannotRead),
        ("XX001", CannotRead),
    ],
)
def test_errors_of_postgresql_are_told_without_values(sqlstate: str | None, kind: type[PayjoinError]) -> None:
    error = translate(OperationalError(f"INSERT {SECRET}", {"data": SECRET}, Refused(sqlstate)))
    assert type(error) is kind
    assert SECRET not in str(error)


async def test_logs_show_statements_on_request_and_never_values(path: Path, caplog: pytest.LogCaptureFixture) -> None:
    root = logging.getLogger("sqlalchemy.engine")
    before = root.level
    root.setLevel(logging.DEBUG)
    try:
        for echo in (False, True):
            caplog.clear()
            async with await SqlStore.open(url(path), echo=echo) as store:
                session = f"{int(echo):032x}"
                await store.create(
                    replace(example_change(session), records=(Record(0, 0.0, "Created", SECRET),), seq=0)
                )
                assert (await store.load(session))[0].data == SECRET
            assert SECRET not in caplog.text
            assert ("INSERT INTO events" in caplog.text) is echo
    finally:
        root.setLevel(before)


def test_a_record_does_not_show_its_data() -> None:
    assert SECRET not in repr(Record(0, 0.0, "Created", SECRET))


# ---------------------------------------------------------------- cancellation


async def test_a_cancelled_append_ends_before_its_cancellation_goes_on(path: Path) -> None:
    await make_one(path)
    async with await SqlStore.open(url(path)) as store, await SqlStore.open(url(path)) as other:
        lock = sqlite3.connect(path, isolation_level=None)
        lock.execute("BEGIN IMMEDIATE")
        began = asyncio.Event()
        loop = asyncio.get_running_loop()
        transact = store._transact

        def observed(*arguments: object) -> object:
            loop.call_soon_threadsafe(began.set)
            return transact(*arguments)  # type: ignore[arg-type]

        store._transact = observed  # type: ignore[method-assign, assignment]
        running = asyncio.create_task(store.append(example_change(seq=1)))
        queued = asyncio.create_task(store.append(example_change(seq=2)))
        await began.wait()
        running.cancel()
        queued.cancel()
        await asyncio.wait((queued,))
        assert queued.cancelled()
        running.cancel()  # an impatient caller
        await asyncio.sleep(0)
        assert not running.done()
        lock.execute("ROLLBACK")
        lock.close()
        await asyncio.wait((running,))
        assert running.cancelled()
        assert len(await other.load(A)) == 2
        assert await other.append(example_change(seq=2)) == Stored()


async def test_a_timeout_around_a_locked_append_stores_nothing_and_frees_the_connection(path: Path) -> None:
    await make_one(path)
    async with await SqlStore.open(url(path), busy_seconds=0.1) as store:
        lock = sqlite3.connect(path, isolation_level=None)
        lock.execute("BEGIN IMMEDIATE")
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.01):
                await store.append(example_change(seq=1))
        lock.execute("ROLLBACK")
        lock.close()
        assert len(await store.load(A)) == 1
        assert await store.append(example_change(seq=1)) == Stored()


async def test_a_cancelled_opening_leaves_no_thread_and_no_lock(path: Path) -> None:
    for yields in (0, 1, 3):
        task = asyncio.create_task(SqlStore.open(url(path)))
        for _ in range(yields):
            await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
    await make_one(path)


# ---------------------------------------------------------------- claims and scale


async def test_claims_lapse_by_the_clock_of_the_database(path: Path) -> None:
    async with await SqlStore.open(url(path)) as store:
        assert await store.claim(A, "one", 1000)
        other = sqlite3.connect(path, isolation_level=None)
        [(taken, until)] = other.execute("SELECT taken, until FROM claims").fetchall()
        assert abs(taken - time.time()) < 60
        assert until == pytest.approx(taken + 1000, abs=0.001)
        other.execute("UPDATE claims SET taken = taken - 990, until = until - 990")
        assert not await store.claim(A, "two", 1000)
        other.execute("UPDATE claims SET taken = taken - 10, until = until - 10")
        assert await store.claim(A, "two", 1000)
        other.execute("UPDATE claims SET taken = taken + 1e8, until = until + 1e8")  # taken while the clock was wrong
        assert await store.claim(A, "three", 1000)
        other.close()


async def test_ten_thousand_sessions_are_listed_in_a_second(path: Path) -> None:
    async with await SqlStore.open(url(path)) as store:
        other = sqlite3.connect(path)
        with other:
            other.executemany(
                "INSERT INTO sessions (session, events, role, state, outcome, created, expires, next_due, label)"
                " VALUES (?, 0, 'receiver', 'Monitor', ?, ?, 2e9, ?, 'label')",
                [(f"{n:032x}", None if n % 100 == 0 else "Paid", 1.7e9 + n, 1.7e9 + n) for n in range(10_000)],
            )
        plan = other.execute(
            "EXPLAIN QUERY PLAN SELECT session FROM sessions WHERE outcome IS NULL AND next_due <= 1"
        ).fetchall()
        other.close()
        assert "open_sessions" in str(plan)
        began = time.perf_counter()
        rows = await store.rows()
        took = time.perf_counter() - began
        assert len(rows) == 10_000
        assert rows[0].session == f"{9999:032x}"
        assert took < 1
        assert len(await store.rows(open_only=True)) == 100


async def test_a_closed_store_refuses_and_lets_the_file_go(path: Path) -> None:
    store = await SqlStore.open(url(path))
    await store.close()
    await store.close()
    with pytest.raises(OurMistake, match="closed"):
        await store.rows()
    assert [file.name for file in path.parent.iterdir()] == [path.name]  # checkpointed: one file is the whole backup


def test_postgresql_without_its_driver_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "psycopg", None)
    database = databases.choose("postgresql://user:hunter2@127.0.0.1/name", busy_seconds=1)
    with pytest.raises(WrongUsage, match=r"pjv2\[postgresql\]"):
        database.looking()


async def test_a_change_to_the_row_of_a_session_keeps_its_place_in_history(path: Path) -> None:
    async with await SqlStore.open(url(path)) as store:
        await store.create(example_change(A))
        await store.create(example_change(B))
        await store.append(example_change(A, 1, row=example_row(A, label="later")))
        assert [row.session for row in await store.rows()] == [B, A]
