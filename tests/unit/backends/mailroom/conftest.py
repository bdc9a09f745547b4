"""A SOCKS5 proxy, certificates, and a world of a TLS directory behind TLS relays, all on loopback."""

from __future__ import annotations

import asyncio
import ssl
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import trustme

from pjv2.lab.directory import Directory
from pjv2.lab.relay import Relay
from pjv2.units import Instant


class StepClock:
    """Wall-clock time that moves when told to."""

    def __init__(self) -> None:
        self.time = 1_700_000_000.0

    def now(self) -> Instant:
        return self.time

    async def sleep(self, seconds: float) -> None:
        self.time += seconds


class DictCache(dict):
    async def get(self, name):
        return dict.get(self, name)

    async def put(self, name, value):
        if value is None:
            self.pop(name, None)
        else:
            self[name] = value


class LabSocksProxy:
    """SOCKS5 with user names. Every name leads to `route[name]`, a port on loopback; what was asked is kept."""

    def __init__(self) -> None:
        self.users: list[str] = []
        self.asked: list[tuple[str, int]] = []
        self.route: dict[str, int] = {}
        self._tasks: set[asyncio.Task] = set()

    async def __aenter__(self):
        self._server = await asyncio.start_server(self._accept, "127.0.0.1", 0)
        self.url = f"socks5h://127.0.0.1:{self._server.sockets[0].getsockname()[1]}"
        return self

    async def __aexit__(self, *_):
        self._server.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def _accept(self, reader, writer):
        task = asyncio.get_running_loop().create_task(self._serve(reader, writer))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _serve(self, reader, writer):
        far = None
        try:
            _, count = await reader.readexactly(2)
            assert 2 in await reader.readexactly(count)
            writer.write(b"\x05\x02")
            _, size = await reader.readexactly(2)
            self.users.append((await reader.readexactly(size)).decode())
            await reader.readexactly((await reader.readexactly(1))[0])
            writer.write(b"\x01\x00")
            _, _, _, kind = await reader.readexactly(4)
            assert kind == 3, "names are resolved by the proxy"
            name = (await reader.readexactly((await reader.readexactly(1))[0])).decode()
            port = int.from_bytes(await reader.readexactly(2), "big")
            self.asked.append((name, port))
            if name not in self.route:
                writer.write(b"\x05\x04\x00\x01" + bytes(6))
                await writer.drain()
                return
            far = await asyncio.open_connection("127.0.0.1", self.route[name])
            writer.write(b"\x05\x00\x00\x01" + bytes(6))
            await asyncio.wait(
                [asyncio.ensure_future(self._pump(reader, far[1])), asyncio.ensure_future(self._pump(far[0], writer))],
                return_when=asyncio.FIRST_COMPLETED,
            )
        except (OSError, EOFError):
            pass
        finally:
            for end in (writer, *(far[1:] if far else ())):
                end.transport.abort()

    @staticmethod
    async def _pump(reader, writer):
        try:
            while data := await reader.read(65536):
                writer.write(data)
                await writer.drain()
        except OSError:
            pass


@dataclass
class TlsWorld:
    directory: Directory
    relays: list[Relay]
    trust: ssl.SSLContext
    ca_file: Path
    stack: AsyncExitStack = field(repr=False)


@pytest.fixture(scope="session")
def authority(tmp_path_factory):
    ca = trustme.CA()
    path = tmp_path_factory.mktemp("ca") / "ca.pem"
    ca.cert_pem.write_to_path(str(path))
    return ca, path


@pytest.fixture
def server_tls(authority):
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    authority[0].issue_cert("127.0.0.1", "localhost", "relay.example.com", "directory.example.org").configure_cert(
        context
    )
    return context


@pytest.fixture
def trust(authority):
    context = ssl.create_default_context()
    authority[0].configure_trust(context)
    return context


@pytest.fixture
async def tls_world(server_tls, trust, authority):
    async with AsyncExitStack() as stack:
        directory = await stack.enter_async_context(Directory(ssl_context=server_tls, long_poll=0.2))
        relays = [await stack.enter_async_context(Relay(ssl_context=server_tls, gateway_tls=trust)) for _ in range(3)]
        yield TlsWorld(directory, relays, trust, authority[1], stack)


@pytest.fixture
async def socks():
    async with LabSocksProxy() as proxy:
        yield proxy


@pytest.fixture
def clock():
    return StepClock()


@pytest.fixture
def cache():
    return DictCache()
