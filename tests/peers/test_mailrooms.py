"""Our mailroom client keeps its contract over the reference's directory and relays, plain and over TLS."""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, ExitStack, asynccontextmanager
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from pjv2.backends.mailroom import HttpMailroom, Service
from pjv2.testing.check_mailroom import CHECKS, Check, MailroomWorld
from pjv2.wire.ohttp import REQUEST_MEDIA_TYPE
from tests.peers.peers import need
from tests.peers.programs import Certificates, Mailroom, mailroom

LONG_POLL = 2


class Switched:
    """A directory that can be stopped and started again where it was, and lose its key meanwhile."""

    def __init__(self, program: Path, home: Path, tls: Certificates | None) -> None:
        self._program, self._home, self._tls = program, home, tls
        self._stack = ExitStack()
        self.room: Mailroom
        self.start(0)

    def start(self, port: int) -> None:
        self.room = self._stack.enter_context(
            mailroom(self._program, self._home, name="directory", long_poll=LONG_POLL, tls=self._tls, port=port)
        )

    def stop(self) -> None:
        self._stack.close()

    async def set_offline(self, offline: bool) -> None:
        await asyncio.to_thread(self.stop if offline else lambda: self.start(urlsplit(self.room.url).port or 0))

    async def rotate(self) -> None:
        await self.set_offline(True)
        shutil.rmtree(self.room.storage / "ohttp-keys")
        await self.set_offline(False)


def introduce(relay: Mailroom, directory: Mailroom) -> None:
    """A message that the directory cannot open, carried to it."""
    status = relay.post(f"/{directory.url}/", b"sealed for nobody", REQUEST_MEDIA_TYPE)
    assert status != 404


@asynccontextmanager
async def world(home: Path, tls: Certificates | None) -> AsyncIterator[MailroomWorld]:
    program = need("payjoin-mailroom" if tls is None else "payjoin-mailroom-tls")
    async with AsyncExitStack() as stack:
        directory = Switched(program, home / "directory", tls)
        stack.callback(directory.stop)
        relays = [
            stack.enter_context(mailroom(program, home / name, name=name, tls=tls)) for name in ("relay-1", "relay-2")
        ]
        for relay in relays:
            # A relay asks a directory whether it takes payjoins before it first carries to it. Were that during an outage, it would
            # answer 404 for a while after, and the contract is about healing.
            await asyncio.to_thread(introduce, relay, directory.room)
        client = HttpMailroom(
            [Service(relay.url, f"operator of {relay.program.name}") for relay in relays],
            [Service(directory.room.url, "operator of the directory")],
            ca_file=None if tls is None else tls.root_pem,
        )
        stack.push_async_callback(client.close)
        yield MailroomWorld(client, LONG_POLL, len(relays), directory.rotate, directory.set_offline)


@pytest.mark.parametrize("over", ["plain", "tls"])
@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
async def test_the_reference_s_mailrooms_keep_the_contract(
    check: Check, over: str, certs: Certificates, tmp_path: Path
) -> None:
    async with world(tmp_path, certs if over == "tls" else None) as made:
        await check(made)
