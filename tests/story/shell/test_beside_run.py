"""Two services that run all the time, and what their owners do beside them: on the same configuration, wallet file and store."""

from __future__ import annotations

import asyncio
import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("bdkpython")

from pjv2.backends.channel.rehearsal_peer import make_peers
from pjv2.backends.wallet import bdk
from pjv2.lab.esplora import EsploraServer
from pjv2.lab.world import World
from pjv2.units import Network
from tests.story.shell.test_processes import PATIENCE, WORDS, Person, person

pytestmark = pytest.mark.skipif(os.name != "posix", reason="signals are POSIX's")


class Service:
    """`pjv2 run` of a person, and every line it wrote."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self.process = process
        self.lines: list[dict[str, Any]] = []
        self._more = asyncio.Event()
        self._reading = asyncio.create_task(self._read())

    @classmethod
    async def of(cls, one: Person) -> Service:
        service = cls(await one.start("run"))
        await service.line("Started")
        return service

    async def _read(self) -> None:
        assert self.process.stdout is not None
        while raw := await self.process.stdout.readline():
            self.lines.append(json.loads(raw))
            self._more.set()
        self._more.set()

    async def line(self, event: str, **facts: Any) -> dict[str, Any]:
        async with asyncio.timeout(PATIENCE):
            while True:
                for told in self.lines:
                    if told["event"] == event and all(told.get(name) == value for name, value in facts.items()):
                        return told
                assert not self._reading.done(), f"it ended before {event} {facts}: {self.lines}"
                self._more.clear()
                await self._more.wait()

    async def stop(self) -> str:
        assert self.process.stderr is not None
        self.process.send_signal(signal.SIGTERM)
        async with asyncio.timeout(PATIENCE):
            err = await self.process.stderr.read()
            await self._reading
            assert await self.process.wait() == 0
        return err.decode()


async def more_coins(world: World, chain: str, one: Person, *values: int) -> None:
    wallet = await bdk.BdkWallet.open(
        one.home / "look.sqlite", bdk.MnemonicKeys(WORDS[one.name]), Network.REGTEST, sync=bdk.Esplora(chain)
    )
    for value in values:
        await world.chain.fund((await wallet.new_address()).script, value)
    await wallet.close()


async def test_everything_can_be_done_beside_a_run_on_the_same_wallet(tmp_path: Path) -> None:
    async with World() as world, EsploraServer(world.chain) as server:
        bob, alice = [await person(world, server.url, name, tmp_path / name) for name in ("bob", "alice")]
        for one in (bob, alice):
            await more_coins(world, server.url, one, 400_000, 300_000)
        with (bob.home / "config.toml").open("a") as config:
            config.write(f'[lightning]\nbackend = "rehearsal"\ndirectory = "{bob.home}/node"\n')
        (peer,) = make_peers(bob.home / "node" / "peers", 1)
        serving, paying = await asyncio.gather(Service.of(bob), Service.of(alice))

        async def done(one: Person, *words: str) -> list[dict[str, Any]]:
            code, lines, err = await one.run(*words)
            assert code == 0, (words, code, lines, err)
            return lines

        plain, wanted = await asyncio.gather(
            done(bob, "receive", "150_000", "--detach"),
            done(bob, "receive", "120_000", "--channel", f"{peer.pubkey}@{peer.host}=60_000,private", "--detach"),
        )
        received = [lines[0] for lines in (plain, wanted)]
        # One after the other: two at once may choose the same coin, and the later one says "try again" (exit 4).
        sent = [
            await done(alice, "send", created["uri"], "--fee-rate", "2", "--detach", "--yes") for created in received
        ]
        paid = [lines[0] for lines in sent]
        unwanted = (await done(bob, "receive", "70_000", "--detach"))[0]
        cancelled = await done(bob, "cancel", unwanted["session"])
        assert cancelled[0]["event"] == "CancelRequested"
        # Whoever holds the session ends it: the command itself, where the service had not begun with it yet.
        own = [line for line in cancelled if line["event"] == "Closed"]
        closed = own[0] if own else await serving.line("Closed", session=unwanted["session"])
        assert closed["outcome"] == "Cancelled"

        for service, sessions in ((serving, received), (paying, paid)):
            for created in sessions:
                await service.line("Seen", session=created["session"], what="payjoin")
        checks = await done(bob, "doctor", "--deadline", "60")
        found = {check["name"]: check["status"] for check in checks if check["event"] == "Check"}
        assert (found["wallet"], found["store"], checks[-1]["failed"]) == ("ok", "ok", 0)
        rows = await done(alice, "history", "--open")
        assert {row["session"] for row in rows} == {created["session"] for created in paid}
        passed = (await done(alice, "resume"))[-1]
        assert (passed["event"], passed["open"]) == ("PassDone", 2)
        listed = await done(bob, "channels")
        assert [channel["session"] for channel in listed] == [received[1]["session"]]

        await world.chain.mine(6)
        for service, sessions in ((serving, received), (paying, paid)):
            for created in sessions:
                closed = await service.line("Closed", session=created["session"])
                assert closed["outcome"] == "Paid"
        for service in (serving, paying):
            err = await service.stop()
            assert "Traceback" not in err
            assert service.lines[-1] | {"at": 0} == {"event": "Stopped", "open": 0, "at": 0}
            assert not [told for told in service.lines if told["event"] in ("Error", "Alarm")]
