"""From the shell: payments that arrive at keys kept elsewhere, and a person's time to approve."""

from __future__ import annotations

import json
from typing import Any

import pytest

from pjv2.cli.output import utc
from pjv2.session import events as ev
from pjv2.start import Request
from tests.story.lab.kit import Story, Stranger, stage
from tests.story.shell.kit import Running, Shell, code

ASK = {"policy": {"approve": "ask", "approve_within": 120}}


async def with_cold_keys(s: Story) -> tuple[Shell, Shell, Any]:
    """Bob with embedded wallet and a cold descriptor in his configuration, Alice, and the wallet that holds the cold keys."""
    pytest.importorskip("bdkpython")
    from tests.story.lab.test_cold import BDK, descriptor, vault

    keys = await vault(s)
    url = (await s.world.serve_chain()).url
    config = {"wallet": {"cold_descriptor": descriptor(keys)}, "chain": {"backend": "esplora", "url": url}}
    return Shell(await s.bob(**BDK), config), Shell(await s.alice(**BDK)), keys


async def paid(s: Story, receiving: Running, alice: Shell) -> Running:
    uri = (await receiving.line("Created"))["uri"]
    sending = alice.start("--json", "send", uri, "--fee-rate", "2", "--until", "closed")
    await sending.line("Seen", what="payjoin")
    await receiving.line("Seen", what="payjoin")
    await s.bury(6)
    assert (await receiving.code(), await sending.code()) == (0, 0)
    return sending


async def test_a_request_is_cold_where_the_configuration_names_cold_keys_and_every_command_tells_the_same() -> None:
    async with stage() as s:
        bob, alice, keys = await with_cold_keys(s)
        receiving = bob.start("--json", "receive", "150_000", "--label", "tea", "--until", "closed")
        sending = await paid(s, receiving, alice)
        first, last = receiving.lines[0], receiving.lines[-1]
        assert (last["outcome"], last["amount_received"]) == ("Paid", 150_000)
        assert (sending.lines[-1]["payjoin"], sending.lines[-1]["txid"]) == (True, last["txid"])
        assert next(line for line in receiving.lines if line["event"] == "ProposalDrafted")["cold"] is True
        assert "CoinsReserved" not in receiving.events
        assert await keys.wallet.balance() == 150_000
        assert await bob.party.wallet.balance() == 200_000
        address = first["cold_address"]
        assert address not in first["uri"]
        shown = await bob("--json", "show", first["session"])
        assert shown.lines[0]["cold"] is True
        assert address not in shown.stdout
        told = await bob("explain", first["session"])
        assert "to the cold address, and spends no coin of ours" in told.stdout.replace("\n", " ")
        exported = await bob("--json", "export")
        account = next(line for line in exported.lines if line["event"] == "Account")
        assert {
            key: account[key] for key in ("contributed", "returned", "amount_received", "fee_ours", "cold_address")
        } == {
            "contributed": 0,
            "returned": 150_000,
            "amount_received": 150_000,
            "fee_ours": 0,
            "cold_address": address,
        }
        labels = [json.loads(line) for line in (await bob("export", "--format", "bip329")).stdout.splitlines()]
        assert {"type": "addr", "ref": address, "label": "tea"} in labels
        table = (await bob("export", "--format", "csv")).stdout.splitlines()
        assert table[0].endswith(",cold_address")
        assert table[1].endswith(f",{address}")
        assert code(await bob("history")) == 0


async def test_no_cold_is_an_ordinary_payjoin_and_a_dry_run_takes_no_address() -> None:
    async with stage() as s:
        bob, alice, keys = await with_cold_keys(s)
        for words, cold in (((), True), (("--cold",), True), (("--no-cold",), False)):
            dry = await bob("--json", "receive", "150_000", "--dry-run", *words)
            assert (code(dry), dry.lines[0]["cold"]) == (0, cold)
        people = await bob("receive", "150_000", "--detach")
        assert "to a fresh address of your cold wallet" in people.stderr
        assert "Give that address to nobody" in people.stderr
        (row,) = await bob.party.store.rows()
        state = await bob.party.driver.load(row.session)
        assert (state.created.cold.index, state.created.cold.address in people.stderr) == (0, True)
        assert code(await bob("cancel", row.session)) == 0
        receiving = bob.start("--json", "receive", "150_000", "--no-cold", "--until", "closed")
        await paid(s, receiving, alice)
        assert receiving.lines[0]["cold_address"] is None
        assert "CoinsReserved" in receiving.events
        assert await keys.wallet.balance() == 0


async def test_what_cannot_be_cold_is_refused_before_anything_is_made() -> None:
    async with stage() as s:
        bob = Shell(await s.bob())
        channel = "02" + "11" * 32 + "@127.0.0.1:9735=80_000"
        for words, why in (
            (("--cold",), "[wallet] cold_descriptor"),
            (("--cold", "--channel", channel), "exclude each other"),
            (("--cold", "--queue"), "exclude each other"),
        ):
            refused = await bob("receive", "150_000", *words)
            assert (code(refused), why in refused.stderr) == (2, True)
        private = Shell(bob.party, {"wallet": {"cold_descriptor": "wpkh(tprvSECRET/0/*)"}})
        refused = await private("receive", "150_000")
        assert code(refused) == 2
        assert "private key" in refused.stderr
        assert "SECRET" not in refused.stderr
        assert not await bob.party.store.rows()


async def test_an_order_that_was_asked_for_before_keeps_its_cold_address() -> None:
    async with stage() as s:
        bob, _, _ = await with_cold_keys(s)
        made = [await bob("--json", "receive", "150_000", "--order", "A-1", "--detach") for _ in range(2)]
        first, second = (running.lines[0]["cold_address"] for running in made)
        assert first == second
        assert first is not None
        assert code(await bob("cancel", made[0].lines[0]["session"])) == 0


async def test_a_payer_who_forbids_it_is_told_of_in_words() -> None:
    async with stage() as s:
        bob, alice, keys = await with_cold_keys(s)
        receiving = bob.start("--json", "receive", "150_000", "--until", "closed")
        created = await receiving.line("Created")
        request = Request(created["session"], created["uri"], created["address"], 150_000, created["expires"])
        payer = Stranger(s, alice.party, request)
        sent = await payer.original(substitution=False)
        await payer.post(sent)
        await payer.sign(sent, await payer.reply())
        await receiving.line("Seen", what="payjoin")
        await s.bury(6)
        assert await receiving.code() == 0
        told = await bob("explain", created["session"])
        words = " ".join(told.stdout.split())
        assert "does not go to the cold address: the payer does not let the address be replaced" in words
        assert await keys.wallet.balance() == 0


# ---------------------------------------------------------------- a person's time to approve


async def asked(s: Story, bob: Shell, alice: Shell) -> tuple[str, Running]:
    """A session that waits for a word, and the payer who waits for an answer."""
    made = await bob("--json", "receive", "150_000", "--detach")
    session, uri = made.lines[0]["session"], made.lines[0]["uri"]
    sending = alice.start("--json", "send", uri, "--fee-rate", "2", "--until", "closed")
    await sending.line("OriginalPosted")
    passed = await bob("--json", "resume", session)
    assert "OriginalAccepted" in passed.events
    return session, sending


async def test_without_a_word_a_later_pass_refuses_and_the_original_arrives() -> None:
    async with stage() as s:
        bob, alice = Shell(await s.bob(), ASK), Shell(await s.alice())
        session, sending = await asked(s, bob, alice)
        accepted = (await s.event(bob.party, session, ev.OriginalAccepted)).at
        shown = await bob("--json", "show", session)
        assert (shown.lines[0]["status"], shown.lines[0]["approve_until"]) == ("waiting for approval", accepted + 120)
        assert utc(accepted + 120)[:16] in (await bob("show", session)).stdout
        await bob.party.restart()
        s.world.clock.skip(121)
        late = await bob("approve", session)
        assert code(late) == 2
        assert "could be approved until" in late.stderr
        passed = await bob("--json", "resume", session)
        alarm = next(line for line in passed.lines if line["event"] == "Alarm")
        assert (alarm["what"], "within 120 seconds" in alarm["detail"]) == ("approval", True)
        assert next(line for line in passed.lines if line["event"] == "RefusalPosting")["code"] == "unavailable"
        shown = await bob("--json", "show", session)
        assert shown.lines[0]["status"].startswith("nobody approved in time")
        assert (shown.lines[0]["approve_until"], shown.lines[0]["alarms"]) == (None, ["approval"])
        await sending.line("Seen", what="original")
        await s.bury(6)
        assert await sending.code() == 0
        assert (await bob("--json", "resume", session)).lines[-2]["outcome"] == "PaidByFallback"
        await s.all_free(bob.party, alice.party)


async def test_a_running_worker_refuses_by_itself_when_the_time_has_passed() -> None:
    async with stage() as s:
        bob, alice = Shell(await s.bob(), ASK), Shell(await s.alice())
        session, sending = await asked(s, bob, alice)
        running = bob.start("--json", "run")
        await running.line("Started")
        s.world.clock.skip(121)
        await sending.line("Seen", what="original")
        await s.until(bob.party, "RefusalPosted", session)
        await s.bury(6)
        await s.until(bob.party, "Closed", session)
        assert await sending.code() == 0
        running.interrupt()
        await running.code()


async def test_a_word_in_time_says_until_when_it_could_be_given() -> None:
    async with stage() as s:
        bob, alice = Shell(await s.bob(), ASK), Shell(await s.alice())
        session, sending = await asked(s, bob, alice)
        s.world.clock.skip(60)
        agreed = await bob("--json", "approve", session)
        assert code(agreed) == 0
        shown = next(line for line in agreed.lines if line["event"] == "Approved")
        assert shown["approve_until"] > s.world.clock.now()
        assert "It could be approved until" in agreed.stderr
        await sending.line("Seen", what="payjoin")
        await bob("resume", session)
        await s.bury(6)
        assert await sending.code() == 0
        assert (await bob("--json", "resume", session)).lines[-2]["outcome"] == "Paid"
