"""One contract over every store: the one in memory, SQLite in a file, and PostgreSQL where one is offered.

`PJV2_TEST_POSTGRESQL` names a PostgreSQL database (`postgresql+psycopg://user@host/name`) in which each test makes a schema of its own.
"""

from __future__ import annotations

import os
import uuid
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from sqlalchemy import create_engine, text
from sqlalchemy.engine import make_url

from pjv2.backends.store.sql import SqlStore
from pjv2.errors import WrongUsage
from pjv2.ports import Store
from pjv2.testing.check_store import STORE_CHECKS, MakeStore, StoreCheck, check_store, example_change
from pjv2.testing.memory_store import MemoryStore
from pjv2.units import Outpoint

POSTGRESQL = os.environ.get("PJV2_TEST_POSTGRESQL", "")


@pytest.fixture(params=["memory", "sqlite", "postgresql"])
def make(request: pytest.FixtureRequest, tmp_path: Path) -> MakeStore:
    @asynccontextmanager
    async def memory() -> AsyncIterator[tuple[Store, Store]]:
        store = MemoryStore()
        yield store, store.other()

    @asynccontextmanager
    async def sql(url: str) -> AsyncIterator[tuple[Store, Store]]:
        async with await SqlStore.open(url) as store, await SqlStore.open(url) as other:
            yield store, other

    def sqlite() -> object:
        return sql(f"sqlite:///{tmp_path}/{uuid.uuid4().hex}.sqlite")

    @asynccontextmanager
    async def postgresql() -> AsyncIterator[tuple[Store, Store]]:
        schema = f"pjv2_{uuid.uuid4().hex}"
        engine = create_engine(POSTGRESQL, isolation_level="AUTOCOMMIT")
        with engine.connect() as connection:
            connection.execute(text(f"CREATE SCHEMA {schema}"))
        try:
            url = make_url(POSTGRESQL).update_query_dict({"options": f"-csearch_path={schema}"})
            async with sql(url.render_as_string(hide_password=False)) as handles:
                yield handles
        finally:
            with engine.connect() as connection:
                connection.execute(text(f"DROP SCHEMA {schema} CASCADE"))
            engine.dispose()

    if request.param == "postgresql" and not POSTGRESQL:
        pytest.skip("PJV2_TEST_POSTGRESQL names no database")
    return {"memory": memory, "sqlite": sqlite, "postgresql": postgresql}[request.param]


@pytest.mark.parametrize("check", STORE_CHECKS, ids=lambda check: check.__name__)
async def test_a_store_keeps_its_contract(make: MakeStore, check: StoreCheck) -> None:
    async with make() as (store, other):
        await check(store, other)


async def test_the_suite_names_the_check_that_a_wrong_store_fails() -> None:
    class Forgetful(MemoryStore):
        async def put(self, name: str, value: str | None) -> None:
            await super().put(name, None)

    @asynccontextmanager
    async def forgetful() -> AsyncIterator[tuple[Store, Store]]:
        store = Forgetful()
        yield store, store

    with pytest.raises(AssertionError, match=r"a value is kept replaced and forgotten: expected '2', found None"):
        await check_store(forgetful)


async def test_the_store_in_memory_goes_back_to_an_older_copy_on_every_handle() -> None:
    store = MemoryStore()
    other = store.other()
    await store.create(example_change())
    await store.put("name", "old")
    copy = store.snapshot()
    await store.append(example_change(seq=1, events=2))
    await store.put("name", "new")
    store.restore(copy)
    assert len(await other.load("a" * 32)) == 1
    assert await other.get("name") == "old"
    await store.append(example_change(seq=1))
    store.restore(copy)
    assert len(await other.load("a" * 32)) == 1


async def test_the_store_in_memory_drops_the_tail_of_one_session_with_what_it_took() -> None:
    coin = Outpoint("11" * 32, 0)
    store = MemoryStore()
    await store.create(example_change("a" * 32))
    await store.append(example_change("a" * 32, 1, events=2, take_coins=(coin,), see_inputs=(coin,)))
    await store.create(example_change("b" * 32))
    store.drop_tail("a" * 32)
    assert [record.seq for record in await store.load("a" * 32)] == [0]
    assert len(await store.load("b" * 32)) == 1
    assert await store.coins_in_use() == {}
    await store.append(example_change("b" * 32, 1, take_coins=(coin,), see_inputs=(coin,)))
    await store.append(example_change("b" * 32, 2, free_coins=True))
    await store.append(example_change("a" * 32, 1, take_coins=(coin,)))
    with pytest.raises(WrongUsage, match="restore a snapshot"):
        store.drop_tail("b" * 32)
    store.drop_tail("a" * 32, 2)
    with pytest.raises(WrongUsage, match="no session"):
        await store.row("a" * 32)


async def test_the_store_in_memory_reads_its_clock_for_claims() -> None:
    now = [1000.0]
    store = MemoryStore(lambda: now[0])
    assert await store.claim("a" * 32, "one", 30)
    now[0] = 1029.9
    assert not await store.claim("a" * 32, "two", 30)
    now[0] = 1030.0
    assert await store.claim("a" * 32, "two", 30)
    now[0] -= 10_000  # the clock was set back: a claim from the future does not stop the session for hours
    assert await store.claim("a" * 32, "one", 30)
