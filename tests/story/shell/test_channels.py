"""Channels from the shell: plans that wait, requests that carry them, what the node lists, and what may be abandoned."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from pjv2.backends.channel.rehearsal_peer import RehearsalPeer
from pjv2.psbt.tx import TxOut
from tests.story.lab.kit import Story, Stranger, change_script, stage
from tests.story.shell.kit import Running, Shell, code


def channel(peer: RehearsalPeer, capacity: int | str, *more: str) -> str:
    return ",".join((f"{peer.pubkey}@{peer.host}={capacity}", *more))


async def plans(shell: Shell) -> list[dict[str, Any]]:
    listed = await shell("--json", "plan", "list")
    assert code(listed) == 0
    return listed.lines


async def node_owner(s: Story) -> Shell:
    return Shell(await s.bob(lightning=True))


async def pay_and_bury(s: Story, receiving: Running) -> None:
    alice = Shell(await s.alice())
    sending = alice.start("--json", "send", (await receiving.line("Created"))["uri"], "--until", "closed")
    await sending.line("Seen", what="payjoin")
    await receiving.line("Seen", what="payjoin")
    await s.bury(6)
    assert (await receiving.code(), await sending.code()) == (0, 0)


async def test_waiting_plans_that_fit_are_bound_and_become_channels() -> None:
    async with stage() as s:
        bob = await node_owner(s)
        first, second, third = s.world.peers(3)
        for text in (channel(first, 60_000, "private"), channel(second, 900_000), channel(third, "rest", "private")):
            added = await bob("--json", "plan", "add", text)
            assert (code(added), added.lines[0]["state"]) == (0, "waiting")
        receiving = bob.start("--json", "receive", "150_000", "--queue", "--until", "closed")
        created = await receiving.line("Created")
        assert created["channels"] == 2
        listed = await plans(bob)
        assert [one["state"] for one in listed] == ["bound", "waiting", "bound"]
        assert [one.get("session") for one in listed] == [created["session"], None, created["session"]]
        busy = await bob("plan", "remove", listed[0]["plan"])
        assert code(busy) == 2
        assert "pjv2 cancel" in busy.stderr
        await pay_and_bury(s, receiving)
        opened = receiving.lines[-1]["channels"]
        listed = await plans(bob)
        assert [one["state"] for one in listed] == ["opened", "waiting", "opened"]
        assert [one["outpoint"] for one in listed if one["state"] == "opened"] == opened
        assert all("host" not in key and first.host not in str(value) for one in listed for key, value in one.items())
        removed = await bob("--json", "plan", "remove", listed[0]["plan"])
        assert (code(removed), removed.lines[0]["removed"]) == (0, True)
        assert len(await plans(bob)) == 2
        people = await bob("plan", "list")
        assert second.host in people.stdout


async def test_a_plan_waits_again_when_its_request_is_cancelled() -> None:
    async with stage() as s:
        bob = await node_owner(s)
        (peer,) = s.world.peers(1)
        assert code(await bob("plan", "add", channel(peer, 60_000))) == 0
        made = await bob("--json", "receive", "150_000", "--queue", "--order", "7", "--detach")
        assert [one["state"] for one in await plans(bob)] == ["bound"]
        again = await bob("--json", "receive", "150_000", "--queue", "--order", "7", "--detach")
        assert again.lines == made.lines
        none_left = await bob("--json", "receive", "150_000", "--queue", "--detach")
        assert none_left.lines[0]["channels"] == 0
        assert "No waiting plan fits" in none_left.stderr
        for running in (made, none_left):
            cancelled = await bob("--json", "cancel", running.lines[0]["session"])
            assert (cancelled.events[0], cancelled.lines[-1]["outcome"]) == ("CancelRequested", "Cancelled")
        assert [one["state"] for one in await plans(bob)] == ["waiting"]


async def test_channels_are_listed_by_session_and_not_abandoned_while_they_may_confirm() -> None:
    async with stage() as s:
        bob = await node_owner(s)
        (peer,) = s.world.peers(1)
        receiving = bob.start(
            "--json", "receive", "150_000", "--channel", channel(peer, "rest", "private"), "--until", "closed"
        )
        created = await receiving.line("Created")
        assert code(await bob("channels", "list")) == 0
        alice = Shell(await s.alice())
        sending = alice.start("--json", "send", created["uri"], "--until", "closed")
        await sending.line("Seen", what="payjoin")
        await receiving.line("Seen", what="payjoin")
        listed = await bob("--json", "channels")
        (line,) = listed.lines
        assert (line["event"], line["session"], line["state"]) == ("Channel", created["session"], "pending")
        assert line["outpoint"].split(":")[0] == (await receiving.line("Seen"))["txid"]
        refused = await bob("channels", "abandon", created["session"])
        assert code(refused) == 2
        assert "not proved dead" in refused.stderr
        await s.bury(6)
        assert (await receiving.code(), await sending.code()) == (0, 0)
        (line,) = (await bob("--json", "channels", "list")).lines
        assert line["outcome"] == "Paid"
        people = await bob("channels")
        assert created["session"][:8] in people.stdout
        nothing = await bob("channels", "abandon", created["session"])
        assert code(nothing) == 2


async def test_a_plan_explains_itself_and_its_risks_are_agreed_to() -> None:
    async with stage() as s:
        bob = await node_owner(s)
        (peer,) = s.world.peers(1)
        bob.terminal = True
        words = ["receive", "150_000", "--channel", channel(peer, "rest", "push=1000"), "--own-input", "prefer"]
        asked = await bob(*words, "--detach", typed="n\n")
        assert code(asked) == 0
        assert "Nothing was asked for." in asked.stderr
        assert "1_000 sat are given to the peer" in asked.stderr
        assert "own_input = prefer" in asked.stderr
        assert "anchor reserve" in asked.stderr
        assert not await bob.party.store.rows()
        made = await bob(*words, "--detach", typed="y\n")
        assert code(made) == 0
        assert "bitcoin:" in made.stdout
        unasked = await bob(*words, "--detach", "--yes")
        assert "[y/N]" not in unasked.stderr
        dry = await bob("--json", *words, "--dry-run")
        assert len(dry.lines[0]["risks"]) == 2
        for row in await bob.party.store.rows():
            assert (await bob.party.driver.load(row.session)).created.policy.own_input == "prefer"
            assert code(await bob("cancel", row.session)) == 0


async def test_a_plan_that_does_not_fit_is_refused_with_the_missing_number() -> None:
    async with stage() as s:
        bob = await node_owner(s)
        (peer,) = s.world.peers(1)
        refused = await bob("--json", "receive", "50_000", "--channel", channel(peer, 60_000, "private"))
        assert code(refused) == 2
        assert "more than the 50000 asked" in refused.stderr
        assert not await bob.party.store.rows()


async def test_a_channel_that_is_proved_dead_is_abandoned() -> None:
    async with stage() as s:
        bob = await node_owner(s)
        (peer,) = s.world.peers(1)
        receiving = bob.start("--json", "receive", "150_000", "--channel", channel(peer, "rest", "private"))
        created = await receiving.line("Created")
        alice = await s.alice()
        payer = Stranger(s, alice, SimpleNamespace(uri=created["uri"]))
        original = await payer.original()
        await payer.post(original)
        await receiving.line("ProposalPosted")
        receiving.interrupt()
        assert await receiving.code() == 130
        (line,) = (await bob("--json", "channels")).lines
        assert line["state"] == "pending"
        tx = await payer.spend(
            [txin.outpoint for txin in original.tx.inputs], [TxOut(490_000, await change_script(alice))]
        )
        assert (await s.world.chain.broadcast(tx.raw)).verdict == "accepted"
        await s.bury(5)
        assert code(await bob("channels", "abandon", created["session"])) == 2
        await s.bury(1)
        abandoned = await bob("--json", "channels", "abandon", created["session"])
        assert code(abandoned) == 0, abandoned.stderr
        (line,) = abandoned.lines
        assert (line["state"], line["session"]) == ("abandoned", created["session"])
        assert not (await bob("--json", "channels")).lines
        await bob("resume")
        assert (await bob.party.store.row(created["session"])).outcome == "Conflicted"
