"""Receiving and sending from two shells, on the real lab."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from types import SimpleNamespace

import pytest

from pjv2.errors import NotNow
from pjv2.wire.uri import parse_uri
from tests.story.lab.kit import Story, Stranger, stage
from tests.story.shell.kit import Running, Shell, code


async def both(s: Story, **config: object) -> tuple[Shell, Shell]:
    return Shell(await s.bob(), dict(config)), Shell(await s.alice())


async def paid(s: Story, bob: Shell, alice: Shell, *more: str) -> tuple[Running, Running]:
    """A request and its payment under way, in JSON, both up to the payjoin in the mempool."""
    receiving = bob.start("--json", "receive", "150_000", *more)
    uri = (await receiving.line("Created"))["uri"]
    sending = alice.start("--json", "send", uri, "--fee-rate", "2", *more)
    await sending.line("Seen", what="payjoin")
    await receiving.line("Seen", what="payjoin")
    return receiving, sending


async def test_a_payment_between_two_shells_ends_when_it_is_confirmed() -> None:
    async with stage() as s:
        bob, alice = await both(s)
        receiving, sending = await paid(s, bob, alice)
        await s.bury(1)
        assert (await receiving.code(), await sending.code()) == (0, 0)
        first, *_, last = receiving.lines
        assert {"event", "at", "session", "uri", "address", "amount", "expires"} <= set(first)
        assert (first["event"], first["amount"]) == ("Created", 150_000)
        assert (last["event"], last["what"]) == ("Seen", "payjoin")
        assert last["height"] == s.world.chain.height
        assert sending.lines[0]["event"] == "Created"
        assert "uri" not in sending.lines[0]
        assert sending.lines[-1]["txid"] == last["txid"]
        assert all(line["session"] == first["session"] for line in receiving.lines)
        assert "resume" in receiving.stderr
        # What was left open is finished by a later pass.
        await s.bury(5)
        for shell in (bob, alice):
            passed = await shell("--json", "resume")
            assert code(passed) == 0
            assert passed.events[-1] == "PassDone"
            assert {key: passed.lines[-1][key] for key in ("open", "progressed", "deferred")} == {
                "open": 0,
                "progressed": 1,
                "deferred": 0,
            }
            assert "Closed" in passed.events


async def test_until_closed_ends_with_the_outcome_and_every_event_once_in_order() -> None:
    async with stage() as s:
        bob, alice = await both(s)
        receiving, sending = await paid(s, bob, alice, "--until", "closed")
        await s.bury(6)
        assert (await receiving.code(), await sending.code()) == (0, 0)
        last = receiving.lines[-1]
        assert last["event"] == "Closed"
        assert {"outcome", "txid", "amount_requested", "amount_received", "channels"} <= set(last)
        assert (last["outcome"], last["amount_requested"]) == ("Paid", 150_000)
        assert sending.lines[-1]["payjoin"] is True
        for shell, running in ((bob, receiving), (alice, sending)):
            log = [record.name for record in await shell.party.store.load(running.lines[0]["session"])]
            assert [event for event in running.events if event != "NotNow"] == log


async def test_until_seen_ends_in_the_mempool() -> None:
    async with stage() as s:
        bob, alice = await both(s)
        receiving, sending = await paid(s, bob, alice, "--until", "seen")
        assert (await receiving.code(), await sending.code()) == (0, 0)
        await s.bury(6)
        for shell in (bob, alice):
            await shell("resume")


async def test_confirmed_means_as_often_as_the_policy_says() -> None:
    async with stage() as s:
        bob, alice = await both(s, policy={"confirmations": 3})
        receiving, sending = await paid(s, bob, alice)
        await s.bury(1)
        assert await sending.code() == 0
        await receiving.line("Seen", height=s.world.chain.height)
        await s.bury(1)
        assert receiving.ended is not None
        assert not receiving.ended.done()
        await s.bury(1)
        assert await receiving.code() == 0
        await s.bury(3)
        for shell in (bob, alice):
            await shell("resume")


async def test_people_read_words_on_stderr_and_results_on_stdout(tmp_path: Path) -> None:
    async with stage() as s:
        bob, alice = await both(s)
        picture = tmp_path / "request.png"
        receiving = bob.start("receive", "0.0015btc", "--label", "a \x1b[2Jcoffee", "--qr-png", str(picture))
        await receiving.until(lambda running: "\n" in running.stdout)
        uri = receiving.stdout.split("\n")[0]
        assert parse_uri(uri).amount == 150_000
        assert picture.read_bytes().startswith(b"\x89PNG")
        qr = [line for line in receiving.stderr.splitlines() if "█" in line]
        assert qr
        assert max(map(len, qr)) <= 80
        assert "if the payer never signs" in receiving.stderr
        await receiving.says("waiting for the payer, until ")
        alice.terminal = True
        sending = alice.start("send", uri, "--until", "seen", typed="y\n")
        assert await sending.code() == 0
        assert "150_000 sat" in sending.stderr
        assert "at worst" in sending.stderr
        assert "[y/N]" in sending.stderr
        assert "[2J" not in sending.stderr.replace("\N{REPLACEMENT CHARACTER}[2J", "")
        await receiving.says("is in the mempool: waiting for a block")
        await s.bury(1)
        assert await receiving.code() == 0
        assert receiving.stdout.split("\n")[1].startswith("payjoin ")
        assert "\x1b" not in receiving.stderr + receiving.stdout
        await s.bury(5)
        for shell in (bob, alice):
            await shell("resume")


async def test_an_interrupted_command_leaves_the_session_and_says_how_it_goes_on() -> None:
    async with stage() as s:
        bob, alice = await both(s)
        receiving = bob.start("--json", "receive", "150_000")
        created = await receiving.line("Created")
        while await bob.party.store.claim(created["session"], "other", 0):  # noqa: ASYNC110  until its driver has taken it
            await asyncio.sleep(0)
        receiving.interrupt()
        assert await receiving.code() == 130
        assert f"pjv2 resume {created['session'][:8]}" in receiving.stderr
        assert "Traceback" not in receiving.stderr
        assert receiving.lines[-1]["error"] == "Interrupted"
        sending = alice.start("--json", "send", created["uri"], "--until", "closed")
        await sending.line("OriginalPosted")
        passed = await bob("--json", "resume", created["session"][:8])
        assert "ProposalPosted" in passed.events
        await sending.line("Seen", what="payjoin")
        await s.bury(6)
        assert await sending.code() == 0
        assert "Closed" in (await bob("--json", "resume")).events


async def test_a_session_that_another_worker_drives_is_followed_from_the_store() -> None:
    async with stage() as s:
        bob, alice = await both(s)
        worker = bob.start("--json", "run")
        await worker.line("Started")
        receiving = bob.start("--json", "receive", "150_000", "--until", "closed")
        uri = (await receiving.line("Created"))["uri"]
        sending = alice.start("--json", "send", uri, "--until", "closed")
        await sending.line("Seen", what="payjoin")
        await s.bury(6)
        assert (await receiving.code(), await sending.code()) == (0, 0)
        assert receiving.events[-1] == "Closed"
        worker.interrupt()
        assert await worker.code() == 0
        assert (worker.events[0], worker.events[-1]) == ("Started", "Stopped")


async def test_a_store_that_is_away_for_a_moment_ends_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    async with stage() as s:
        bob = Shell(await s.bob())
        receiving = bob.start("receive", "150_000")
        await receiving.says("waiting for the payer")
        load = bob.party.store.load

        async def away(session: str) -> None:
            raise NotNow("the database is locked")

        monkeypatch.setattr(bob.party.store, "load", away)
        await receiving.says("Trying again: the database is locked")
        monkeypatch.setattr(bob.party.store, "load", load)
        (row,) = await bob.party.store.rows()
        assert code(await bob("cancel", row.session)) == 0
        assert await receiving.code() == 0
        assert receiving.stdout.endswith("Cancelled\n")


async def test_run_drives_what_was_left_detached() -> None:
    async with stage() as s:
        bob, alice = await both(s)
        made = await bob("--json", "receive", "150_000", "--detach")
        assert (code(made), made.events) == (0, ["Created"])
        sent = await alice("--json", "send", made.lines[0]["uri"], "--detach")
        assert (code(sent), sent.events) == (0, ["Created"])
        workers = [shell.start("--json", "run") for shell in (bob, alice)]
        for worker in workers:
            await worker.line("Seen", what="payjoin")
        await s.bury(6)
        for worker in workers:
            await worker.line("Closed", outcome="Paid")
            worker.interrupt()
            assert await worker.code() == 0


async def test_an_order_is_asked_for_once() -> None:
    async with stage() as s:
        bob = Shell(await s.bob())
        first = await bob("--json", "receive", "150_000", "--order", "7", "--note", "mine", "--detach")
        again = await bob("--json", "receive", "150_000", "--order", "7", "--detach")
        assert first.lines == again.lines
        other = await bob("receive", "150_001", "--order", "7", "--detach")
        assert code(other) == 2
        assert "150000" in other.stderr
        assert code(await bob("cancel", first.lines[0]["session"][:8])) == 0


async def test_a_dry_run_stores_and_sends_nothing() -> None:
    async with stage() as s:
        bob, alice = await both(s)
        shown = await bob("--json", "receive", "150_000", "--dry-run")
        assert (code(shown), shown.events) == (0, ["DryRun"])
        assert not await bob.party.store.rows()
        assert not bob.party.diary.entries
        made = await bob("--json", "receive", "150_000", "--detach")
        uri = made.lines[0]["uri"]
        for words in (["--json"], []):
            shown = await alice(*words, "send", uri, "--fee-rate", "2", "--dry-run")
            assert code(shown) == 0
        assert "Nothing was sent" in shown.stdout
        assert not await alice.party.store.rows()
        assert not alice.party.wallet.locked()
        sent = await alice("--json", "send", uri, "--fee-rate", "2", "--detach")
        dry = alice.running[0].lines[0]
        assert (dry["payjoin"], dry["fee"]) == (True, sent.lines[0]["fee"])
        for shell, running in ((alice, sent), (bob, made)):
            assert code(await shell("cancel", running.lines[0]["session"])) == 0


async def test_a_request_that_nobody_pays_expires_with_its_exit_code() -> None:
    async with stage() as s:
        bob = Shell(await s.bob(), {"policy": {"watch_after_expiry": 60}})
        receiving = bob.start("--json", "receive", "150_000", "--expire-in", "60")
        await receiving.line("Created")
        while receiving.ended is not None and not receiving.ended.done():
            s.world.clock.skip(100)
            await s.bury(1)
            await bob.party.world.clock.sleep(0.05)
        assert code(receiving) == 5
        assert receiving.lines[-1]["outcome"] == "Expired"


@pytest.mark.parametrize("words", [["--json"], []])
async def test_a_payment_that_conflicts_exits_with_3(words: list[str]) -> None:
    from pjv2.psbt.tx import TxOut
    from tests.story.lab.kit import change_script, spend

    async with stage() as s:
        bob, alice = await both(s)
        made = await bob("--json", "receive", "150_000", "--detach")
        sending = alice.start("--json", "send", made.lines[0]["uri"], "--until", "closed")
        session = (await sending.line("Created"))["session"]
        await sending.line("OriginalPosted")
        state = await alice.party.driver.load(session)
        inputs = [txin.outpoint for txin in state.sent.tx.inputs]
        tx = await spend(alice.party, inputs, [TxOut(490_000, await change_script(alice.party))])
        assert (await s.world.chain.broadcast(tx.raw)).verdict == "accepted"
        await s.bury(6)
        assert await sending.code() == 3
        assert sending.lines[-1]["outcome"] == "Conflicted"
        code_ = code(await bob(*words, "cancel", made.lines[0]["session"]))
        assert code_ == 0


async def test_an_original_that_pays_too_little_is_refused_with_exit_code_3() -> None:
    async with stage() as s:
        bob = Shell(await s.bob())
        receiving = bob.start("--json", "receive", "150_000")
        created = await receiving.line("Created")
        payer = Stranger(s, await s.alice(), SimpleNamespace(uri=created["uri"]))
        await payer.post(await payer.original(20_000))
        assert await receiving.code() == 3
        assert receiving.lines[-1]["outcome"] == "Refused"


async def test_a_directory_that_is_away_is_told_and_nothing_else_happens() -> None:
    async with stage() as s:
        bob = Shell(await s.bob())
        await s.world.directory.stop()
        failed = await bob("--json", "receive", "150_000")
        assert code(failed) == 4
        assert failed.lines[-1]["error"] == "NotNow"
        assert not await bob.party.store.rows()


WRONG = [
    (["receive", "lots"], 2, "is not an amount"),
    (["receive", "0"], 2, "at least 1 sat"),
    (["receive", "1000", "--channel", "nonsense"], 2, "pubkey@host:port"),
    (["receive", "--queue"], 2, "--queue needs an AMOUNT"),
    (["receive", "1000", "--expire-in", "999999"], 2, "518_400"),
    (["receive", "1000", "--qr-png", "/nowhere/at/all.png"], 2, "no directory"),
    (["receive", "100000", "--channel", f"02{'11' * 32}@127.0.0.1:9735=50000"], 2, "configure [lightning]"),
    (["send", "nonsense"], 3, "bitcoin:"),
    (["send", "bitcoin:x", "--require-payjoin", "--fallback-after", "5"], 2, "keep one"),
    (["send", "bitcoin:x", "--fee-rate", "much"], 2, "sat/vB"),
    (["cancel", "aa"], 2, "pjv2 history"),
    (["approve", "zz"], 2, "no session id"),
    (["resume", "aa"], 2, "pjv2 history"),
    (["resume", "--budget", "0"], 2, "above 0"),
    (["channels"], 2, "configure [lightning]"),
    (["channels", "abandon"], 2, "abandon ID"),
    (["plan", "add", "nonsense"], 2, "pubkey@host:port"),
    (["plan", "remove", "aa"], 2, "no plan"),
]


async def test_what_cannot_be_asked_is_told_in_one_sentence() -> None:
    async with stage() as s:
        bob = Shell(await s.bob())
        for words, expected, says in WRONG:
            for json_too in ([], ["--json"]):
                failed = await bob(*json_too, *words)
                assert code(failed) == expected, failed.stderr
                assert says in failed.stderr
                assert "Traceback" not in failed.stderr
                assert len(failed.stderr.splitlines()) == 2, failed.stderr
            assert json.loads(failed.stdout.splitlines()[-1])["exit"] == expected
        assert not await bob.party.store.rows()
