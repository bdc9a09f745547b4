"""The session database when its disk is full or another process keeps it locked: nothing is lost, and what happens is said once.

Full is real: SQLite may not grow the file, or the kernel refuses a process every write. Locked is a second connection that writes.
"""

from __future__ import annotations

import sqlite3
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import replace
from typing import Any

import pytest

from pjv2.backends.store.sql import SqlStore
from pjv2.errors import NotNow
from pjv2.lab.world import LAB_PACE, Party
from tests.story.lab.kit import Story, stage
from tests.story.shell.kit import Running, Shell, balance, books, code

LOCKED = "another process keeps the session database locked"
FULL = "the disk that holds the session database is full"

BRIEF = replace(LAB_PACE, claim=1.0)
"""A claim that could not be given back, for the database was locked, lapses soon; it does so by the database's own clock."""


async def impatient(party: Party) -> SqlStore:
    """The party's store, that waits for another writer only a moment."""
    return await SqlStore.open(f"sqlite:///{party.home / 'pjv2.sqlite'}", busy_seconds=0.05)


async def both(s: Story) -> tuple[Shell, Shell]:
    return Shell(await s.bob(store=impatient, pace=BRIEF)), Shell(await s.alice(store=impatient, pace=BRIEF))


@contextmanager
def locked(*shells: Shell) -> Iterator[None]:
    """Another process writes, and does not come to an end."""
    others = [sqlite3.connect(shell.party.home / "pjv2.sqlite", isolation_level=None) for shell in shells]
    for other in others:
        other.execute("BEGIN IMMEDIATE")
    try:
        yield
    finally:
        for other in others:
            other.execute("ROLLBACK")
            other.close()


@asynccontextmanager
async def full(*shells: Shell) -> AsyncIterator[None]:
    """The file may not grow, and what room it has is filled."""
    for shell in shells:
        store: Any = shell.party.store
        pages = await store._run(lambda connection: connection.exec_driver_sql("PRAGMA page_count").scalar())
        await _limit(store, pages)
        with pytest.raises(NotNow, match=FULL):
            await _fill(store)
    try:
        yield
    finally:
        for shell in shells:
            await _limit(shell.party.store, 1 << 30)


async def _fill(store: Any) -> None:
    for number in range(1_000):
        await store.put(f"filler {number}", "x" * 500)


async def _limit(store: Any, pages: int) -> None:
    await store._run(lambda connection: connection.exec_driver_sql(f"PRAGMA max_page_count = {pages}").scalar())


def told_once(running: Running, what: str) -> None:
    assert running.stderr.count(what) == 1, running.stderr
    assert "Traceback" not in running.stderr


async def ends_paid(s: Story, bob: Shell, alice: Shell, receiving: Running, sending: Running) -> None:
    """Both commands come to the right end, to the satoshi."""
    assert (await receiving.code(), await sending.code()) == (0, 0)
    his, hers = [(await books(shell, (await shell.party.store.rows())[0].session)).facts for shell in (bob, alice)]
    assert (hers["outcome"], hers["txid"]) == ("Paid", his["txid"])
    assert his["outcome"] == "Paid"
    received = his["amount_received"]
    assert await balance(bob) == 200_000 + received
    assert await balance(alice) == 500_000 - received - s.fee(his["txid"])
    await s.all_free(bob.party, alice.party)


async def test_nothing_is_made_while_the_database_is_locked_and_afterwards_everything_is() -> None:
    async with stage() as s:
        bob, alice = await both(s)
        made = await bob("--json", "receive", "150_000", "--detach")
        uri = made.lines[0]["uri"]
        with locked(bob, alice):
            for shell, words in ((bob, ["receive", "150_000"]), (alice, ["send", uri, "--yes"])):
                for json_too in ([], ["--json"]):
                    failed = await shell(*json_too, *words)
                    assert code(failed) == 4, failed.stderr
                    sentence, step = failed.stderr.splitlines()[-2:]
                    assert sentence == f"pjv2: {LOCKED}: try again"
                    assert "try again later" in step
                    assert "Traceback" not in failed.stderr
                assert [line["event"] for line in failed.lines] == ["Error"]
            assert not alice.party.wallet.locked(), "a payment that was not stored holds no coin"
        assert len(await bob.party.store.rows()) == 1
        assert not await alice.party.store.rows()
        for shell, words in ((bob, ["receive", "150_000"]), (alice, ["send", uri])):
            done = await shell("--json", *words, "--detach")
            assert code(done) == 0
            assert code(await shell("cancel", done.lines[0]["session"])) == 0
        assert code(await bob("cancel", made.lines[0]["session"])) == 0


@pytest.mark.parametrize("trouble", ["locked", "full"])
async def test_commands_under_way_wait_for_the_database_and_go_on(trouble: str) -> None:
    async with stage() as s:
        bob, alice = await both(s)
        receiving = bob.start("receive", "150_000", "--until", "closed")
        await receiving.until(lambda running: "\n" in running.stdout)
        if trouble == "full":
            async with full(bob):
                sending = alice.start("send", receiving.stdout.split("\n")[0], "--yes", "--until", "closed")
                await receiving.says(FULL)
            async with full(alice):
                s.world.clock.skip(61)
                await sending.says(FULL)
            s.world.clock.skip(61)
            said = FULL
        else:
            sending = alice.start("send", receiving.stdout.split("\n")[0], "--yes", "--until", "closed")
            for running in (receiving, sending):
                await running.says("the payjoin is in the mempool")
            with locked(bob, alice):
                await s.bury()
                for running in (receiving, sending):
                    await running.says(LOCKED)
            said = LOCKED
        await sending.says("the payjoin")
        await receiving.says("the payjoin is")
        await s.bury()
        await ends_paid(s, bob, alice, receiving, sending)
        for running in (receiving, sending):
            told_once(running, said)


@pytest.mark.parametrize("trouble", ["locked", "full"])
async def test_a_pass_that_can_store_nothing_says_why_and_the_next_one_goes_on(trouble: str) -> None:
    async with stage(long_poll=0.2) as s:
        bob, alice = await both(s)
        made = (await bob("--json", "receive", "150_000", "--detach")).lines[0]
        sent = (await alice("--json", "send", made["uri"], "--detach", "--fee-rate", "2")).lines[0]
        if trouble == "locked":
            with locked(bob, alice):
                for shell, session in ((bob, made["session"]), (alice, sent["session"])):
                    passed = await shell("--json", "resume")
                    assert code(passed) == 4
                    assert passed.lines[-1]["event"] == "PassDone"
                    assert passed.lines[-1]["waited"] == [{"session": session, "why": f"{LOCKED}: try again"}]
                    assert (passed.lines[-1]["open"], passed.lines[-1]["deferred"]) == (1, 1)
                    people = await shell("resume")
                    assert code(people) == 4
                    assert f"{session[:8]} waits: {LOCKED}" in people.stdout
                    assert "nothing is lost" in people.stderr
                    assert "pjv2 resume" in people.stderr
                    assert len(people.stderr.splitlines()) == 1
        else:
            assert "OriginalPosted" in (await alice("--json", "resume")).events
            async with full(bob):
                passed = await bob("--json", "resume")
                assert code(passed) == 4, passed.stdout
                [waited] = passed.lines[-1]["waited"]
                assert (waited["session"], FULL in waited["why"]) == (made["session"], True)
        assert (await alice("--json", "resume")).events[-1] == "PassDone"
        assert code(await bob("resume")) == 0
        last = await alice("--json", "resume")
        assert (code(last), "Broadcasting" in last.events) == (0, True)
        await s.bury()
        receiving, sending = [shell.start("--json", "resume") for shell in (bob, alice)]
        await ends_paid(s, bob, alice, receiving, sending)
        assert sending.lines[-1]["waited"] == []


@pytest.mark.parametrize("trouble", ["locked", "full"])
async def test_the_poller_lives_on_and_says_it_once(trouble: str) -> None:
    async with stage() as s:
        bob, alice = await both(s)
        made = [(await bob("--json", "receive", "150_000", "--detach")).lines[0] for _ in range(2)]
        first = None
        if trouble == "locked":
            with locked(bob):
                worker = bob.start("run")
                await worker.says(f"Trying again: {LOCKED}")
                for _ in range(3):
                    s.world.clock.skip(20)
                    await tried(bob, made[0]["session"])
        else:
            async with full(bob):
                worker = bob.start("run")
                first = alice.start("--json", "send", made[0]["uri"], "--fee-rate", "2", "--until", "closed")
                await worker.says(f"Trying again: {FULL}")
                s.world.clock.skip(61)
        told_once(worker, "Trying again")
        s.world.clock.skip(61)
        sending = first or alice.start("--json", "send", made[0]["uri"], "--fee-rate", "2", "--until", "closed")
        await sending.line("Seen", what="payjoin")
        await worker.says("ProposalPosted")
        await s.bury()
        await worker.says("Closed Paid")
        assert await sending.code() == 0
        worker.interrupt()
        assert await worker.code() == 0
        assert "Stopped; 1 sessions are open." in worker.stdout
        his = await books(bob, made[0]["session"])
        assert his.facts["outcome"] == "Paid"
        assert await balance(bob) == 200_000 + his.facts["amount_received"]
        assert await balance(alice) == 500_000 - his.facts["amount_received"] - s.fee(his.facts["txid"])
        assert code(await bob("cancel", made[1]["session"])) == 0


async def tried(shell: Shell, session: str) -> None:
    """Return when the store has answered somebody who came after everybody who waited for it."""
    await shell.party.store.load(session)
