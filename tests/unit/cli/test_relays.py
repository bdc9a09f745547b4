"""`relays`: what is configured and what earlier runs learnt, without asking anybody; and `relays check`, which asks."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from pjv2.backends.mailroom import HttpMailroom, Service
from pjv2.backends.mailroom.mailroom import ANSWERS_NAME
from pjv2.backends.store.sql import SqlStore
from pjv2.backends.system import SystemEntropy
from pjv2.cli.relays import listed
from pjv2.doctor import round_trip
from pjv2.errors import NotNow
from pjv2.lab.directory import Directory
from pjv2.lab.relay import Relay
from tests.unit.cli.conftest import Call, lines


def test_the_packaged_services_are_listed_without_asking_anybody(pjv2: Call, tmp_path: Path, database: Path) -> None:
    (tmp_path / "config.toml").write_text('network = "signet"\n')
    code, stdout, stderr = pjv2("--json", "relays")
    assert (code, stderr) == (0, "")
    found = lines(stdout)
    assert {line["event"] for line in found} == {"Relay"}
    assert {line["role"] for line in found} == {"relay", "directory"}
    assert all(line["operator"] and line["health"] == "good" for line in found)
    assert all(line["works"] is None and line["last_success"] is None and line["key_age"] is None for line in found)
    assert not database.exists(), "looking makes no database"
    code, stdout, _ = pjv2("relays")
    assert (code, stdout.splitlines()[0].split()[:4]) == (0, ["role", "url", "operator", "health"])
    assert len(stdout.splitlines()) == len(found) + 1


def test_without_relays_it_says_what_to_configure(pjv2: Call) -> None:
    code, stdout, stderr = pjv2("relays")
    assert (code, stdout) == (2, "")
    assert "no relay is configured" in stderr


def test_what_is_asked_is_list_or_check(pjv2: Call) -> None:
    assert pjv2("relays", "nonsense")[0] == 2


@pytest.fixture
async def services() -> AsyncIterator[tuple[Directory, list[Relay]]]:
    async with Directory(long_poll=0.2) as directory, Relay() as one, Relay() as two:
        yield directory, [one, two]


def mailroom(services: tuple[Directory, list[Relay]], store: SqlStore) -> HttpMailroom:
    directory, relays = services
    named = [Service(relay.url, f"operator {number}") for number, relay in enumerate(relays)]
    return HttpMailroom(named, [Service(directory.url, "the directory's")], cache=store)


async def test_a_check_tells_who_answers_and_is_remembered(
    database: Path, services: tuple[Directory, list[Relay]]
) -> None:
    before = time.time()
    async with await SqlStore.open(f"sqlite:///{database}") as store:
        first = mailroom(services, store)
        found = await listed(first, store, try_them=True)
        assert [(line.role, line.works, line.health) for line in found] == [
            ("relay", True, "good"),
            ("relay", True, "good"),
            ("directory", True, "good"),
        ]
        assert found[2].key_source == "this machine"
        await first.close()
        # Another run, that asks nobody:
        (again := services[0]).rotate_keys()
        asked = len(again.log)
        later = mailroom(services, store)
        for line in await listed(later, store, now=before + 3600):
            assert line.works is None
            assert line.last_success is not None
            assert line.last_success >= before
        assert (await listed(later, store, now=before + 3600))[2].key_age == pytest.approx(3600, abs=30)
        assert len(again.log) == asked
        await later.close()


async def test_who_failed_lately_is_left_alone_and_that_is_shown(
    database: Path, services: tuple[Directory, list[Relay]]
) -> None:
    directory, relays = services
    now = time.time()
    async with await SqlStore.open(f"sqlite:///{database}") as store:
        await store.put(
            "mailroom health",
            json.dumps(
                {
                    f"relay {relays[0].url}": [3, now, now + 60],
                    f"relay {relays[1].url} for {directory.url}": [1, now, now + 2],
                }
            ),
        )
        room = mailroom(services, store)
        found = await listed(room, store, now=now)
        assert [(line.health, line.failures, round(line.wait)) for line in found] == [
            ("resting", 3, 60),
            ("resting", 1, 2),
            ("good", 0, 0),
        ]
        assert [line.health for line in await listed(room, store, now=now + 61)] == ["good"] * 3
        await room.close()


@pytest.mark.parametrize("kept", ["nonsense", "[]", '{"https://x": "soon"}'])
async def test_a_memory_that_cannot_be_read_is_learnt_again(
    database: Path, services: tuple[Directory, list[Relay]], kept: str
) -> None:
    async with await SqlStore.open(f"sqlite:///{database}") as store:
        for name in (ANSWERS_NAME, "mailroom health", f"ohttp keys {services[0].url}"):
            await store.put(name, kept)
        room = mailroom(services, store)
        assert [line.last_success for line in await listed(room, store)] == [None] * 3
        assert all(line.works for line in await listed(room, store, try_them=True))
        await room.close()


async def test_an_ordinary_request_is_a_success_too_and_remembered(
    database: Path, services: tuple[Directory, list[Relay]]
) -> None:
    directory, relays = services
    relays[1].offline = True
    before = time.time()
    async with await SqlStore.open(f"sqlite:///{database}") as store:
        first = mailroom(services, store)
        await round_trip(first, directory.url, directory.keys, SystemEntropy())
        await first.close()
        later = mailroom(services, store)
        one, other, where = await listed(later, store)
        assert other.last_success is None
        for line in (one, where):
            assert line.last_success is not None
            assert line.last_success >= before
        await later.close()


async def test_what_cannot_be_remembered_costs_no_request(
    database: Path, services: tuple[Directory, list[Relay]]
) -> None:
    directory, relays = services
    async with await SqlStore.open(f"sqlite:///{database}") as store:

        class Full:
            async def get(self, name: str) -> str | None:
                return await store.get(name)

            async def put(self, name: str, value: str | None) -> None:
                raise NotNow("the disk is full")

        named = [Service(relay.url, f"operator {number}") for number, relay in enumerate(relays)]
        room = HttpMailroom(named, [Service(directory.url, "the directory's")], cache=Full())
        relays[0].offline = True
        for _ in range(4):  # one of them meets the relay that is away, and learns something
            assert await round_trip(room, directory.url, directory.keys, SystemEntropy())
        await room.close()


async def test_the_command_checks_and_says_so(
    pjv2: Call, tmp_path: Path, database: Path, services: tuple[Directory, list[Relay]]
) -> None:
    directory, relays = services
    urls = ", ".join(f'{{ url = "{relay.url}", operator = "o{n}" }}' for n, relay in enumerate(relays))
    (tmp_path / "config.toml").write_text(f'[payjoin]\ndirectories = ["{directory.url}"]\nrelays = [{urls}]\n')
    async with await SqlStore.open(f"sqlite:///{database}"):
        pass
    code, stdout, stderr = await asyncio.to_thread(pjv2, "--json", "relays", "check")
    assert (code, stderr) == (0, "")
    assert [line["works"] for line in lines(stdout)] == [True, True, True]
    code, stdout, _ = await asyncio.to_thread(pjv2, "relays")
    assert code == 0
    assert "this machine" in stdout
    await directory.stop()
    code, stdout, stderr = await asyncio.to_thread(pjv2, "--json", "relays", "check")
    assert (code, "is this machine online?" in stderr) == (4, True)
    *found, error = lines(stdout)
    assert (found[2]["works"], found[2]["health"], error["event"]) == (False, "failed", "Error")
    assert found[2]["said"]
