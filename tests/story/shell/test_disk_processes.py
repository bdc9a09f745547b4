"""Processes that the kernel refuses every write to a file, as on a disk that is full: at the beginning, and in the middle of `run`."""

from __future__ import annotations

import asyncio
import json
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("bdkpython")
pytest.importorskip("resource", reason="limits are POSIX's")

import resource

from pjv2.lab.esplora import EsploraServer
from pjv2.lab.world import World
from tests.story.shell.test_processes import PATIENCE, Person, line, person

pytestmark = pytest.mark.skipif(not hasattr(resource, "prlimit"), reason="only Linux limits a process that runs")


async def without_room(one: Person, *words: str) -> tuple[int | None, list[dict[str, Any]], str]:
    """A command whose every write to a file fails."""
    process = await asyncio.create_subprocess_exec(
        "sh", "-c", 'ulimit -S -f 0; exec "$@"', "sh",
        sys.executable, "-m", "pjv2.cli", "--config", str(one.home / "config.toml"), "--json", *words,
        stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE, env=one.environment,
    )  # fmt: skip
    async with asyncio.timeout(PATIENCE):
        out, err = await process.communicate()
    return process.returncode, [json.loads(text) for text in out.splitlines()], err.decode()


def room(process: asyncio.subprocess.Process, size: int) -> None:
    _, hard = resource.prlimit(process.pid, resource.RLIMIT_FSIZE)
    resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (size, hard))


def refused(answer: tuple[int | None, list[dict[str, Any]], str]) -> None:
    """Not now: one sentence, one next step, and nothing of what was asked."""
    code, lines, told = answer
    assert code == 4, told
    assert [one["event"] for one in lines] == ["Error"]
    assert lines[0]["error"] == "NotNow"
    assert "try again later" in lines[0]["next"]
    assert len(told.splitlines()) == 2, told
    assert "Traceback" not in told


async def ended(one: Person) -> dict[str, Any]:
    """The session's end. A pass looks once, and a chain source that hesitates is asked in the next one, as cron would."""
    told = []
    for _ in range(4):
        code, lines, err = await one.run("resume")
        told += [*lines, err]
        assert code == 0, told
        if found := [entry for entry in lines if entry["event"] == "Closed"]:
            return found[0]
        assert lines[-1]["waited"], told
    raise AssertionError(told)


async def test_a_disk_without_room_refuses_and_loses_nothing(tmp_path: Path) -> None:
    async with World(long_poll=0.2) as world, EsploraServer(world.chain) as server:
        bob, alice = [await person(world, server.url, name, tmp_path / name) for name in ("bob", "alice")]
        asked = ("receive", "150_000", "--detach")
        refused(await without_room(bob, *asked))
        code, [created], _ = await bob.run(*asked)
        assert code == 0
        paying = ("send", created["uri"], "--fee-rate", "2", "--detach")
        code, [sent], _ = await alice.run(*paying)
        assert code == 0
        worker = await bob.start("run")
        assert (await line(worker, "Started"))["open"] == 1
        room(worker, 0)
        code, lines, _ = await alice.run("resume")
        assert (code, "OriginalPosted" in [one["event"] for one in lines]) == (0, True)
        trouble = await line(worker, "NotNow")
        assert trouble["why"].startswith("the disk does not read or write the session database")
        assert worker.returncode is None, "the poller lives on"
        room(worker, resource.RLIM_INFINITY)
        worker.terminate()
        assert (await line(worker, "Stopped"))["open"] == 1
        async with asyncio.timeout(PATIENCE):
            assert await worker.wait() == 0
        code, lines, _ = await without_room(bob, "resume")
        assert code == 4, lines
        for one, event in ((bob, "ProposalPosted"), (alice, "Broadcasting")):
            code, lines, told = await one.run("resume")
            assert (code, event in [entry["event"] for entry in lines]) == (0, True), (lines, told)
        await world.chain.mine(6)
        ends = []
        for one, session in ((bob, created["session"]), (alice, sent["session"])):
            ends.append(await ended(one))
            assert (ends[-1]["session"], ends[-1]["outcome"]) == (session, "Paid")
        assert ends[0]["txid"] == ends[1]["txid"]
