"""Two people with configuration files, embedded wallets and processes of their own: nothing is handed in."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("bdkpython")

from pjv2.backends.wallet import bdk
from pjv2.lab.esplora import EsploraServer
from pjv2.lab.world import World
from pjv2.units import Network

pytestmark = pytest.mark.skipif(os.name != "posix", reason="signals are POSIX's")

PATIENCE = 90.0
WORDS = {
    "bob": "abandon " * 11 + "about",
    "alice": "legal winner thank year wave sausage worth useful legal winner thank yellow",
}
CONFIG = """\
network = "regtest"
[payjoin]
directories = ["{directory}"]
relays = ["{relay}"]
ohttp_keys_file = "{keys}"
[wallet]
backend = "bdk"
mnemonic_file = "words"
[chain]
backend = "esplora"
url = "{chain}"
"""


@dataclass
class Person:
    name: str
    home: Path
    environment: dict[str, str] = field(default_factory=dict)

    async def start(self, *words: str) -> asyncio.subprocess.Process:
        return await asyncio.create_subprocess_exec(
            sys.executable, "-m", "pjv2.cli", "--config", str(self.home / "config.toml"), "--json", *words,
            stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE, env=self.environment, limit=1 << 20,
        )  # fmt: skip

    async def run(self, *words: str) -> tuple[int | None, list[dict[str, Any]], str]:
        process = await self.start(*words)
        async with asyncio.timeout(PATIENCE):
            out, err = await process.communicate()
        return process.returncode, [json.loads(line) for line in out.splitlines()], err.decode()


async def person(world: World, chain: str, name: str, home: Path) -> Person:
    home.mkdir()  # noqa: ASYNC240  nothing else runs yet
    (home / "words").write_text(WORDS[name])
    (home / "words").chmod(0o600)
    keys = world.home / "keys.bin"
    keys.write_bytes(world.directory.keys.encode())
    told = {"directory": world.directory.url, "relay": world.relays[0].url, "keys": keys, "chain": chain}
    (home / "config.toml").write_text(CONFIG.format(**told))
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("PJV2_", "XDG_", "COV_"))}
    places = {"HOME": str(home), "XDG_DATA_HOME": str(home), "XDG_CONFIG_HOME": str(home)}
    wallet = await bdk.BdkWallet.open(
        home / "look.sqlite", bdk.keys_from(None, None, WORDS[name].encode()), Network.REGTEST, sync=bdk.Esplora(chain)
    )
    address = await wallet.new_address()
    await wallet.close()
    await world.chain.fund(address.script, 500_000)
    return Person(name, home, kept | places)


async def line(process: asyncio.subprocess.Process, event: str) -> dict[str, Any]:
    assert process.stdout is not None
    assert process.stderr is not None
    async with asyncio.timeout(PATIENCE):
        while raw := await process.stdout.readline():
            found: dict[str, Any] = json.loads(raw)
            if found["event"] == event:
                return found
        raise AssertionError(f"ended before {event}: {(await process.stderr.read()).decode()}")


async def interrupted(process: asyncio.subprocess.Process) -> str:
    process.send_signal(signal.SIGINT)
    async with asyncio.timeout(PATIENCE):
        _, err = await process.communicate()
    assert process.returncode == 130
    assert b"Traceback" not in err
    return err.decode()


async def test_two_processes_pay_each_other_and_finish_after_an_interruption(tmp_path: Path) -> None:
    async with World() as world, EsploraServer(world.chain) as server:
        bob, alice = [await person(world, server.url, name, tmp_path / name) for name in ("bob", "alice")]
        receiving = await bob.start("receive", "150_000")
        created = await line(receiving, "Created")
        sending = await alice.start("send", created["uri"], "--fee-rate", "2")
        session = (await line(sending, "Created"))["session"]
        await line(receiving, "ProposalPosted")
        await line(sending, "Broadcasting")
        while not world.chain.mempool():  # noqa: ASYNC110  another process broadcasts: nothing here can be waited for
            await asyncio.sleep(0.01)
        for process, id in ((receiving, created["session"]), (sending, session)):
            assert f"resume {id[:8]}" in await interrupted(process)
        await world.chain.mine(6)
        for one, id in ((bob, created["session"]), (alice, session)):
            code, lines, _ = await one.run("resume", id[:8])
            assert (code, lines[-1]["event"], lines[-1]["open"]) == (0, "PassDone", 0)
            assert lines[-2]["outcome"] == "Paid"
        code, lines, told = await alice.run("send", created["uri"])
        assert code == 2
        assert "was paid before" in told
        worker = await alice.start("run")
        assert (await line(worker, "Started"))["open"] == 0
        worker.send_signal(signal.SIGTERM)
        assert (await line(worker, "Stopped"))["open"] == 0
        async with asyncio.timeout(PATIENCE):
            assert await worker.wait() == 0
