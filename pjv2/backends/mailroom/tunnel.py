"""Fetching a directory's OHTTP keys without showing it our address: CONNECT through a relay, TLS inside, one GET.

```
us ── TCP ── [SOCKS5 proxy] ── [TLS to the relay] ── CONNECT ── relay ── TCP ── directory
   └───────────────────────────── TLS to the directory, GET /.well-known/ohttp-gateway ──┘
```

It speaks just enough HTTP/1.1 for that, and refuses redirects, transfer codings it would not need, heads over 16 KiB and bodies
over 65602 bytes.

Law: the directory's name is checked against its certificate inside the tunnel, so a relay can refuse to carry, not lie.
"""

from __future__ import annotations

import asyncio
import contextlib
import re
import ssl
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol
from urllib.parse import unquote, urlsplit

from pjv2.backends.mailroom.carrier import CONNECT_TIMEOUT, CarrierTrouble, Trouble, read_ca_file
from pjv2.errors import PeerMistake, WrongUsage
from pjv2.wire.mailbox import GATEWAY_PATH, normalise_directory
from pjv2.wire.ohttp import KEYS_MEDIA_TYPE, MAX_KEY_CONFIG_BYTES, KeyConfig

FETCH_TIMEOUT = 10.0
_MAX_HEAD = 16_384
_STATUS = re.compile(rb"HTTP/1\.[01] ([0-9]{3})(?: |\r)")
_SOCKS_REASONS = {2: "does not allow it", 3: "finds no network", 4: "finds no such host", 5: "was refused"}


class FetchRefused(Exception):
    """Somebody on the way answered, and not with keys. `by_directory` tells who."""

    def __init__(self, message: str, *, by_directory: bool, status: int = 0, retry_after: float | None = None) -> None:
        super().__init__(message)
        self.by_directory = by_directory
        self.status = status
        self.retry_after = retry_after


Streams = tuple[asyncio.StreamReader, asyncio.StreamWriter]


class Dialer(Protocol):
    """How a TCP connection is made. `isolate` is a name: two names never share a circuit where there are circuits."""

    async def dial(self, host: str, port: int, isolate: str) -> Streams:
        """Raises OSError or EOFError."""
        ...


class DirectDialer:
    """Straight to the host."""

    async def dial(self, host: str, port: int, isolate: str) -> Streams:
        return await asyncio.open_connection(host, port, limit=_MAX_HEAD)


@dataclass(frozen=True, slots=True)
class SocksProxy:
    """A SOCKS5 proxy that resolves names (socks5h), as Tor's: host, port, and whether it was given a user of its own."""

    host: str
    port: int

    @classmethod
    def parse(cls, url: str) -> SocksProxy:
        """Read `socks5h://host:port`. Raises WrongUsage: other schemes leak names or see what they carry."""
        try:
            parts = urlsplit(url)
            host, port = parts.hostname, parts.port
        except ValueError as exc:
            raise WrongUsage("the proxy is not of the form socks5h://host:port") from exc
        if parts.scheme == "socks5":
            raise WrongUsage(
                "a socks5 proxy would leave the lookup of names to this machine: write socks5h://host:port"
            )
        if parts.scheme != "socks5h" or not host or port is None or parts.path not in {"", "/"} or parts.query:
            raise WrongUsage("the proxy is not of the form socks5h://host:port")
        if parts.username is not None or parts.password is not None:
            raise WrongUsage("each session brings its own user name to the proxy: leave it out of the proxy's URL")
        return cls(unquote(host), port)

    def url(self, user: str) -> str:
        """The URL with the credentials that keep one session's connections apart from another's."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"socks5h://{user}:{user}@{host}:{self.port}"


class SocksDialer:
    """Through a SOCKS5 proxy, names resolved there (RFC 1928), with a user name per circuit (RFC 1929)."""

    def __init__(self, proxy: SocksProxy) -> None:
        self._proxy = proxy

    async def dial(self, host: str, port: int, isolate: str) -> Streams:
        reader, writer = await asyncio.open_connection(self._proxy.host, self._proxy.port, limit=_MAX_HEAD)
        try:
            await self._ask(reader, writer, host, port, isolate.encode("ascii")[:255])
        except BaseException:
            writer.transport.abort()
            raise
        return reader, writer

    async def _ask(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, host: str, port: int, user: bytes
    ) -> None:
        writer.write(b"\x05\x02\x00\x02")
        version, method = await reader.readexactly(2)
        if version != 5 or method not in {0, 2}:
            raise ConnectionError("the proxy does not speak SOCKS5 with or without a user name")
        if method == 2:
            writer.write(bytes((1, len(user))) + user + bytes((len(user),)) + user)
            _, status = await reader.readexactly(2)
            if status:
                raise ConnectionError("the proxy refuses our user name")
        name = host.encode("ascii")
        writer.write(b"\x05\x01\x00\x03" + bytes((len(name),)) + name + port.to_bytes(2, "big"))
        _, status, _, kind = await reader.readexactly(4)
        if status:
            raise ConnectionError(f"the proxy {_SOCKS_REASONS.get(status, 'failed')}")
        size = {1: 4, 4: 16}.get(kind) or (await reader.readexactly(1))[0]
        await reader.readexactly(size + 2)


def tls_context(ca_file: Path | None = None) -> ssl.SSLContext:
    """The system's trust roots, and one more if given. Raises WrongUsage."""
    context = ssl.create_default_context()
    if ca_file is not None:
        try:
            context.load_verify_locations(cadata=read_ca_file(ca_file))
        except ssl.SSLError as exc:
            raise WrongUsage(f"ca_file {str(ca_file)!r} holds a certificate that cannot be read") from exc
    return context


async def fetch_keys_through(
    relay: str,
    directory: str,
    *,
    tls: ssl.SSLContext,
    dialer: Dialer,
    isolate: str,
    timeout_after: float = FETCH_TIMEOUT,
) -> KeyConfig:
    """A directory's keys, fetched through a relay by CONNECT. Raises CarrierTrouble, FetchRefused; WrongUsage for http directories."""
    if not directory.startswith("https://"):
        raise WrongUsage(f"the keys of {directory} cannot be fetched through a relay: only https directories can")
    host, port = _host_port(directory)
    async with _translated(timeout_after), _connected(relay, tls, dialer, isolate) as (reader, writer):
        target = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
        writer.write(f"CONNECT {target} HTTP/1.1\r\nHost: {target}\r\n\r\n".encode("ascii"))
        status, fields = await _read_head(reader)
        if not 200 <= status <= 299:
            raise FetchRefused(
                f"the relay {relay} refused to tunnel to {directory}: {status}",
                by_directory=False,
                status=status,
                retry_after=retry_after(fields.get("retry-after")),
            )
        await writer.start_tls(tls, server_hostname=host)
        return await _get_keys(reader, writer, directory)


async def fetch_keys_from_loopback(directory: str, *, timeout_after: float = FETCH_TIMEOUT) -> KeyConfig:
    """The keys of a directory on this machine, which has no address of ours to learn. Raises CarrierTrouble, FetchRefused."""
    async with _translated(timeout_after):
        reader, writer = await asyncio.open_connection(*_host_port(directory), limit=_MAX_HEAD)
        try:
            return await _get_keys(reader, writer, directory)
        finally:
            writer.transport.abort()


def retry_after(value: str | None) -> float | None:
    """The seconds form of `Retry-After`; the date form is not used by relays and directories, and would need their clock."""
    return float(value) if value is not None and value.isascii() and value.isdigit() and len(value) < 10 else None


@contextlib.asynccontextmanager
async def _connected(relay: str, tls: ssl.SSLContext, dialer: Dialer, isolate: str) -> AsyncIterator[Streams]:
    host, port = _host_port(relay)
    try:
        async with asyncio.timeout(CONNECT_TIMEOUT):
            reader, writer = await dialer.dial(host, port, isolate)
    except (OSError, EOFError) as exc:
        raise CarrierTrouble(Trouble.CONNECT) from exc
    try:
        if relay.startswith("https://"):
            try:
                await writer.start_tls(tls, server_hostname=host)
            except (OSError, EOFError) as exc:
                raise CarrierTrouble(Trouble.CONNECT) from exc
        yield reader, writer
    finally:
        writer.transport.abort()


@contextlib.asynccontextmanager
async def _translated(timeout_after: float) -> AsyncIterator[None]:
    try:
        async with asyncio.timeout(timeout_after):
            yield
    except TimeoutError as exc:
        raise CarrierTrouble(Trouble.TIMEOUT) from exc
    except ConnectionRefusedError as exc:
        raise CarrierTrouble(Trouble.CONNECT) from exc
    except ssl.SSLCertVerificationError as exc:
        raise FetchRefused("the directory's certificate does not verify", by_directory=True) from exc
    except (OSError, EOFError, asyncio.LimitOverrunError) as exc:
        raise CarrierTrouble(Trouble.BROKEN) from exc


async def _get_keys(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, directory: str) -> KeyConfig:
    authority = directory.partition("://")[2]
    writer.write(
        f"GET {GATEWAY_PATH} HTTP/1.1\r\nHost: {authority}\r\nAccept: {KEYS_MEDIA_TYPE}\r\nConnection: close\r\n\r\n".encode(
            "ascii"
        )
    )
    status, fields = await _read_head(reader)
    if status != 200:
        raise FetchRefused(
            f"the directory {directory} answered {status} when asked for its keys",
            by_directory=True,
            status=status,
            retry_after=retry_after(fields.get("retry-after")),
        )
    body = await _read_body(reader, fields, directory)
    try:
        return KeyConfig.parse(body)
    except PeerMistake as exc:
        raise FetchRefused(
            f"the directory {directory} serves keys that cannot be used: {exc}", by_directory=True
        ) from exc


async def _read_head(reader: asyncio.StreamReader) -> tuple[int, dict[str, str]]:
    while True:
        head = await reader.readuntil(b"\r\n\r\n")
        match = _STATUS.match(head)
        if match is None:
            raise ConnectionError("what answered does not speak HTTP/1.1")
        status = int(match[1])
        if status >= 200:
            lines = (line.partition(":") for line in head.decode("latin-1").split("\r\n")[1:])
            return status, {name.strip().lower(): value.strip() for name, _, value in lines}


async def _read_body(reader: asyncio.StreamReader, fields: dict[str, str], directory: str) -> bytes:
    too_large = FetchRefused(f"the directory {directory} serves keys that are too large", by_directory=True)
    if "chunked" in fields.get("transfer-encoding", "").lower():
        return await _read_chunks(reader, too_large)
    length = fields.get("content-length")
    if length is not None:
        if not length.isascii() or not length.isdigit():
            raise ConnectionError("the length of an answer is not a number")
        if len(length) > 9 or int(length) > MAX_KEY_CONFIG_BYTES:
            raise too_large
        return await reader.readexactly(int(length))
    body = bytearray()
    while data := await reader.read(MAX_KEY_CONFIG_BYTES + 1 - len(body)):
        body += data
        if len(body) > MAX_KEY_CONFIG_BYTES:
            raise too_large
    return bytes(body)


async def _read_chunks(reader: asyncio.StreamReader, too_large: FetchRefused) -> bytes:
    body = bytearray()
    while True:
        line = (await reader.readuntil(b"\r\n")).partition(b";")[0].strip()
        if not re.fullmatch(rb"[0-9A-Fa-f]{1,8}", line):
            raise ConnectionError("a chunked answer has a chunk without a size")
        size = int(line, 16)
        if size == 0:
            return bytes(body)
        if len(body) + size > MAX_KEY_CONFIG_BYTES:
            raise too_large
        body += await reader.readexactly(size)
        await reader.readexactly(2)


def _host_port(url: str) -> tuple[str, int]:
    origin = normalise_directory(url)
    scheme, _, authority = origin.partition("://")
    host, colon, port = authority.rpartition(":")
    if not colon or authority.endswith("]"):
        host, port = authority, "443" if scheme == "https" else "80"
    return host.strip("[]"), int(port)
