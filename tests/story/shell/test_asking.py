"""What a person is asked before money leaves, and ordinary payments."""

from __future__ import annotations

import json
from typing import Any

import pytest

from pjv2.cli.plainly import HELD, name_of
from pjv2.errors import NotNow
from pjv2.psbt.tx import address_to_script
from pjv2.session.facts import BroadcastResult
from pjv2.units import Network
from pjv2.wire.uri import parse_uri
from tests.story.lab.kit import Story, stage
from tests.story.shell.kit import Shell, code


async def plain_uri(s: Story, more: str = "?amount=0.0015") -> str:
    """A stranger's address, without payjoin."""
    bob = s.world.parties.get("bob") or await s.bob()
    address = await bob.wallet.new_address()
    return f"bitcoin:{address.address}{more}"


async def request(s: Story) -> tuple[Shell, str, str]:
    bob = Shell(s.world.parties.get("bob") or await s.bob())
    made = await bob("--json", "receive", "150_000", "--detach")
    return bob, made.lines[0]["uri"], made.lines[0]["session"]


async def received(s: Story, uri: str) -> int:
    script = address_to_script(parse_uri(uri).address, Network.REGTEST)
    found = [entry.tx for entry in s.world.chain.mempool()]
    return sum(out.value for tx in found for out in tx.outputs if out.script == script)


def forget_locks(s: Story) -> None:
    """An ordinary payment holds its coins for a day, so that no chain source that lags makes it spend them twice."""
    assert s.world.parties["alice"].wallet.locked()
    s.world.clock.skip(HELD + 1)


async def test_a_no_sends_nothing_and_lets_the_coins_go() -> None:
    async with stage() as s:
        bob, uri, session = await request(s)
        alice = Shell(await s.alice(), terminal=True)
        for typed in ("n\n", "\n", ""):
            asked = await alice("send", uri, typed=typed)
            assert code(asked) == 0
            assert "Nothing was sent." in asked.stderr
        assert not await alice.party.store.rows()
        assert not alice.party.wallet.locked()
        assert code(await bob("cancel", session)) == 0


async def test_an_interruption_while_asking_lets_the_coins_go() -> None:
    async with stage() as s:
        bob, uri, session = await request(s)
        alice = Shell(await s.alice(), terminal=True)
        asked = alice.start("send", uri, typed=None)
        await asked.says("[y/N]")
        assert alice.party.wallet.locked()
        asked.interrupt()
        assert await asked.code() == 130
        assert not alice.party.wallet.locked()
        assert not await alice.party.store.rows()
        asked.let_go()
        assert code(await bob("cancel", session)) == 0


async def test_without_a_terminal_and_without_yes_nobody_can_be_asked() -> None:
    async with stage() as s:
        bob, uri, session = await request(s)
        alice = Shell(await s.alice())
        for link in (uri, await plain_uri(s)):
            refused = await alice("send", link)
            assert code(refused) == 2
            assert "add --yes" in refused.stderr
        assert not alice.party.wallet.locked()
        sent = await alice("send", uri, "--yes", "--detach")
        assert code(sent) == 0
        assert len(sent.stdout.strip()) == 32
        twice = await alice("--json", "send", uri)
        assert code(twice) == 2
        assert "was paid before" in twice.stderr
        assert code(await alice("cancel", sent.stdout.strip())) == 0
        again = await alice("--json", "send", uri, "--again", "--detach")
        assert code(again) == 0
        assert code(await alice("cancel", again.lines[0]["session"])) == 0
        assert code(await bob("cancel", session)) == 0


async def test_a_required_payjoin_says_what_it_cannot_prevent() -> None:
    async with stage() as s:
        bob, uri, session = await request(s)
        alice = Shell(await s.alice())
        sent = await alice("--json", "send", uri, "--require-payjoin", "--detach")
        assert code(sent) == 0
        assert "cannot stop the receiver" in sent.stderr
        state = await alice.party.driver.load(sent.lines[0]["session"])
        assert state.created.policy.require_payjoin
        assert code(await alice("cancel", sent.lines[0]["session"])) == 0
        refused = await alice("send", await plain_uri(s), "--require-payjoin", "--yes")
        assert code(refused) == 2
        assert code(await bob("cancel", session)) == 0


async def test_a_request_without_payjoin_becomes_an_ordinary_payment_once() -> None:
    async with stage() as s:
        uri = await plain_uri(s)
        alice = Shell(await s.alice())
        dry = await alice("--json", "send", uri, "--dry-run")
        assert (code(dry), dry.lines[0]["payjoin"]) == (0, False)
        assert not alice.party.wallet.locked()
        sent = await alice("--json", "send", uri, "--fee-rate", "2")
        assert code(sent) == 0
        first, last = sent.lines
        assert (first["event"], first["amount"]) == ("Created", 150_000)
        assert (last["event"], last["outcome"], last["payjoin"]) == ("Closed", "PaidOtherwise", False)
        assert last["txid"] in s.in_mempool()
        assert await received(s, uri) == 150_000
        twice = await alice("--json", "send", uri)
        assert code(twice) == 2
        assert last["txid"] in twice.stderr
        await s.bury(1)
        open_amount = await plain_uri(s, "")
        assert code(await alice("--json", "send", open_amount)) == 2
        people = await alice("send", open_amount, "--amount", "1000", "--yes", "--fee-rate", "1")
        assert code(people) == 0
        assert "Paid without payjoin" in people.stdout
        assert code(await alice("--json", "send", uri, "--amount", "7")) == 2
        forget_locks(s)


@pytest.mark.parametrize("answer", ["refused", "away"])
async def test_a_broadcast_that_fails_is_never_a_second_payment(answer: str, monkeypatch: pytest.MonkeyPatch) -> None:
    async with stage() as s:
        uri = await plain_uri(s)
        alice = Shell(await s.alice())
        store, chain = alice.party.store, s.world.chain
        real = chain.broadcast
        at_broadcast: list[bool] = []

        async def broadcast(tx: bytes, **more: Any) -> BroadcastResult:
            kept = json.loads(await store.get(name_of(parse_uri(uri))) or "{}")
            at_broadcast.append(kept.get("raw") == tx.hex())
            if answer == "refused":
                return BroadcastResult("refused", "min relay fee not met")
            await real(tx)
            raise NotNow("the chain source hung up")

        monkeypatch.setattr(chain, "broadcast", broadcast)
        failed = await alice("--json", "send", uri)
        assert code(failed) == 4
        assert at_broadcast == [True], "the transaction was in the store before it was broadcast"
        monkeypatch.setattr(chain, "broadcast", real)
        if answer == "refused":
            assert not alice.party.wallet.locked()
            assert await store.get(name_of(parse_uri(uri))) is None
        else:
            assert alice.party.wallet.locked()
        sent = await alice("--json", "send", uri)
        assert code(sent) == 0
        assert await received(s, uri) == 150_000
        if answer == "away":
            assert sent.lines[-1]["txid"] == failed.lines[0]["txid"]
            assert "cannot pay twice" in sent.stderr
        forget_locks(s)


async def test_an_expired_request_is_paid_plainly_only_when_somebody_says_so() -> None:
    async with stage() as s:
        bob = Shell(await s.bob())
        made = await bob("--json", "receive", "150_000", "--expire-in", "60", "--detach")
        uri = made.lines[0]["uri"]
        s.world.clock.skip(120)
        alice = Shell(await s.alice())
        for words in ([], ["--json"]):
            late = await alice(*words, "send", uri)
            assert code(late) == 5
            assert "expired" in late.stderr
        assert code(await alice("send", uri, "--require-payjoin", "--yes")) == 5
        alice.terminal = True
        asked = await alice("send", uri, typed="y\n")
        assert code(asked) == 0
        assert "has expired" in asked.stderr
        assert await received(s, uri) == 150_000
        assert code(await alice("send", uri, "--yes")) == 2
        receiving = bob.start("--json", "resume")
        await receiving.code()
        await s.bury(6)
        closed = await bob("--json", "resume")
        assert closed.lines[-2]["outcome"] == "PaidOtherwise"
        forget_locks(s)


async def test_a_server_of_the_first_version_that_is_down_is_paid_by_the_original() -> None:
    async with stage() as s:
        uri = await plain_uri(s, "?amount=0.0015&pj=https://127.0.0.1:1/pj")  # nobody listens there
        alice = Shell(await s.alice())
        sent = await alice("--json", "send", uri, "--yes", "--detach")
        assert code(sent) == 0
        session = sent.lines[0]["session"]
        assert code(await alice("resume")) == 0
        assert code(await alice("cancel", session)) == 0
        assert await received(s, uri) == 150_000
        await s.bury(6)
        closed = await alice("--json", "resume")
        assert closed.lines[-2]["outcome"] == "PaidByFallback"
