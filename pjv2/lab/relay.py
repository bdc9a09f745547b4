"""An OHTTP relay for the lab: it forwards envelopes it cannot read, and remembers every byte it saw so that this can be checked.

It probes a gateway's allowed purposes before it forwards or tunnels, as deployed relays do, and refuses gateways that have not
opted in (404), its own (403, from the gateway), other content types (415) and unreachable gateways (502).

Law: one arriving request is at most one forwarded request. A connection that breaks under an envelope is not tried again.
"""

from __future__ import annotations

import asyncio
import ssl
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from pjv2.backends.system import SystemEntropy
from pjv2.errors import OurMistake, PeerMistake
from pjv2.lab.directory import SELF_LOOP_HEADER
from pjv2.lab.httpd import (
    MAX_HEAD_BYTES,
    BadHttp,
    HttpRequest,
    HttpResponse,
    HttpServer,
    Tunnel,
    content_length,
    parse_head,
)
from pjv2.units import Instant
from pjv2.wire.mailbox import GATEWAY_PATH, parse_gateway_path
from pjv2.wire.ohttp import ALLOWED_PURPOSES_MEDIA_TYPE, BIP77_PURPOSE, REQUEST_MEDIA_TYPE, decode_allowed_purposes

_WEEK = 7 * 86_400.0
_DAY = 86_400.0
_MAX_TUNNELS = 1024
_TUNNEL_LIFETIME = 60.0
_PROBES = 1000
_CONNECT_TIMEOUT = 5.0
_GATEWAY_TIMEOUT = 120.0
_MAX_ANSWER = 262_144
_LOG_LENGTH = 100_000
_MEMORY = 256 * 1024 * 1024
_HOP_BY_HOP = {"connection", "content-length", "keep-alive", "transfer-encoding", "access-control-allow-origin"}


@dataclass(frozen=True, slots=True)
class RelayRecord:
    """One request as the relay saw it: who came, where it went, how many bytes each way, and how it ended."""

    client: str
    method: str
    target: str
    bytes_in: int
    bytes_out: int
    status: int


@dataclass(frozen=True, slots=True)
class _Answer:
    status: int
    headers: dict[str, str]
    body: bytes
    raw_head: bytes


class _Connection:
    """One keep-alive connection to a gateway."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer

    @property
    def usable(self) -> bool:
        return not self._reader.at_eof() and not self._writer.is_closing()

    async def ask(self, request: bytes) -> _Answer:
        """Send one request and read its answer. Raises OSError, EOFError, BadHttp; the connection is then useless."""
        self._writer.write(request)
        await self._writer.drain()
        head = await self._reader.readuntil(b"\r\n\r\n")
        words, fields = parse_head(head)
        if len(words) < 2 or not words[0].startswith(b"HTTP/1.") or not words[1].isdigit():
            raise BadHttp(502)
        body = await self._reader.readexactly(content_length(fields, _MAX_ANSWER))
        if fields.get("connection", "").lower() == "close":
            self.close()
        return _Answer(int(words[1]), fields, body, head)

    def close(self) -> None:
        self._writer.transport.abort()


class Relay(HttpServer):
    """A relay on loopback. `async with Relay() as relay: relay.url`.

    `gateway_tls` is how it trusts https gateways; without it the system's roots are used. `saw(needle)` counts a byte string in
    everything that passed through it.
    """

    max_body = 65_536

    def __init__(
        self,
        *,
        host: str = "127.0.0.1",
        port: int = 0,
        name: str | None = None,
        ssl_context: ssl.SSLContext | None = None,
        gateway_tls: ssl.SSLContext | None = None,
        clock: Callable[[], Instant] = time.time,
        self_loop_tag: str | None = None,
        memory: int = _MEMORY,
    ) -> None:
        super().__init__(host=host, port=port, ssl_context=ssl_context, name=name)
        self._gateway_tls = gateway_tls
        self._clock = clock
        self.self_loop_tag = self_loop_tag or SystemEntropy().token(32).hex()
        self._idle: dict[str, list[_Connection]] = {}
        self._probes: dict[str, tuple[Instant, bool]] = {}
        self._probing: dict[str, asyncio.Lock] = {}
        self._tunnels = 0
        self._log: deque[RelayRecord] = deque(maxlen=_LOG_LENGTH)
        self._memory = memory
        self._kept: list[bytes | bytearray] = []
        self._kept_bytes = 0
        self._forgot = False

    async def __aenter__(self) -> Relay:
        await super().__aenter__()
        return self

    async def stop(self) -> None:
        await super().stop()
        for connections in self._idle.values():
            for connection in connections:
                connection.close()
        self._idle.clear()

    @property
    def log(self) -> tuple[RelayRecord, ...]:
        """What it did, oldest first: the last 100,000 requests. A tunnel is told when it ends."""
        return tuple(self._log)

    @property
    def bytes_seen(self) -> int:
        """How many bytes passed through it and are remembered."""
        return sum(len(kept) for kept in self._kept)

    def saw(self, needle: bytes) -> int:
        """How often `needle` occurs in what passed through it, in either direction, message by message.

        Raises OurMistake when more passed through it than it remembers (256 MiB unless told otherwise): the count would be no proof.
        """
        if not needle:
            raise OurMistake("an empty needle occurs everywhere")
        if self._forgot:
            raise OurMistake("the relay saw more than it remembers: give it more memory")
        return sum(kept.count(needle) for kept in self._kept)

    def forget_probes(self) -> None:
        """Ask every gateway again whether it has opted in."""
        self._probes.clear()

    # ------------------------------------------------------------ routes

    async def respond(self, request: HttpRequest) -> HttpResponse | Tunnel:
        self._keep(request.raw_head, request.body)
        match request.method, request.path:
            case "CONNECT", _:
                return await self._connect(request)
            case "OPTIONS", _:
                answer = HttpResponse(
                    204,
                    headers=(
                        ("Access-Control-Allow-Methods", "CONNECT, GET, OPTIONS, POST"),
                        ("Access-Control-Allow-Headers", "Content-Type, Content-Length"),
                    ),
                )
                return self._done(request, "", answer)
            case "GET", "/health":
                return self._done(request, "", HttpResponse(200))
            case "POST", _:
                return await self._relay(request)
            case _:
                return self._done(request, "", HttpResponse(405))

    async def _relay(self, request: HttpRequest) -> HttpResponse:
        try:
            gateway = parse_gateway_path(request.target)
        except PeerMistake:
            return self._done(request, "", HttpResponse(400))
        if request.headers.get("content-type") != REQUEST_MEDIA_TYPE:
            return self._done(request, gateway, HttpResponse(415))
        refusal = await self._refusal(gateway)
        if refusal is not None:
            return self._done(request, gateway, refusal)
        authority = gateway.partition("://")[2]
        head = (
            f"POST {GATEWAY_PATH} HTTP/1.1\r\nHost: {authority}\r\nContent-Type: {REQUEST_MEDIA_TYPE}\r\n"
            f"{SELF_LOOP_HEADER}: {self.self_loop_tag}\r\nContent-Length: {len(request.body)}\r\n\r\n"
        )
        try:
            answer = await self._ask(gateway, head.encode("latin-1") + request.body)
        except (OSError, EOFError, BadHttp, asyncio.LimitOverrunError):  # TimeoutError and SSLError are OSErrors
            return self._done(request, gateway, HttpResponse(502))
        self._keep(answer.raw_head, answer.body)
        passed = tuple((name, value) for name, value in answer.headers.items() if name not in _HOP_BY_HOP)
        return self._done(request, gateway, HttpResponse(answer.status, answer.body, passed))

    async def _connect(self, request: HttpRequest) -> HttpResponse | Tunnel:
        try:
            gateway = parse_gateway_path(f"/https://{request.target}/")
        except PeerMistake:
            return self._done(request, "", HttpResponse(400))
        refusal = await self._refusal(gateway)
        if refusal is not None:
            return self._done(request, gateway, refusal)
        if self._tunnels >= _MAX_TUNNELS:
            return self._done(request, gateway, HttpResponse(503))
        try:
            async with asyncio.timeout(_CONNECT_TIMEOUT):
                host, port = _host_port(gateway)
                there = await asyncio.open_connection(host, port, local_addr=self._local(host))
        except OSError:
            return self._done(request, gateway, HttpResponse(502))

        async def run(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            self._tunnels += 1
            up, down = bytearray(), bytearray()
            self._kept += [up, down]
            try:
                async with asyncio.timeout(_TUNNEL_LIFETIME), asyncio.TaskGroup() as group:
                    group.create_task(_pump(reader, there[1], up))
                    group.create_task(_pump(there[0], writer, down))
            except* (OSError, EOFError):
                pass  # one end was reset: the tunnel is over
            finally:
                self._tunnels -= 1
                self._account(len(up) + len(down))
                there[1].transport.abort()
                self._log.append(RelayRecord(request.peer, "CONNECT", gateway, len(up), len(down), 200))

        return Tunnel(run)

    async def _refusal(self, gateway: str) -> HttpResponse | None:
        """None when the gateway has opted in to be relayed to for BIP77."""
        async with self._probing.setdefault(gateway, asyncio.Lock()):
            known = self._probes.get(gateway)
            if known is None or known[0] <= self._clock():
                if known is None and len(self._probes) >= _PROBES:
                    return HttpResponse(503, headers=(("Retry-After", "5"),))
                seconds, allowed = await self._probe(gateway)
                known = (self._clock() + seconds, allowed)
                self._probes[gateway] = known
        return None if known[1] else HttpResponse(404)

    async def _probe(self, gateway: str) -> tuple[float, bool]:
        """How long the verdict holds, and the verdict."""
        authority = gateway.partition("://")[2]
        head = f"GET {GATEWAY_PATH}?allowed_purposes HTTP/1.1\r\nHost: {authority}\r\n{SELF_LOOP_HEADER}: {self.self_loop_tag}\r\n\r\n"
        try:
            answer = await self._ask(gateway, head.encode("latin-1"))
        except (OSError, EOFError, BadHttp, asyncio.LimitOverrunError):
            return 0.0, False
        if answer.status == 403:
            return 0.0, True  # a gateway of its own operator: let it refuse the request itself, as it does in the open
        wait = answer.headers.get("retry-after", "")
        if answer.status in {429, 503} and wait.isdigit():
            return min(float(wait), _DAY), False
        if answer.status >= 500:
            return (0.0 if answer.status == 504 else 5.0), False
        return _WEEK, answer.status == 200 and _opted_in(answer)

    async def _ask(self, gateway: str, request: bytes) -> _Answer:
        connection = await self._connection(gateway)
        try:
            async with asyncio.timeout(_GATEWAY_TIMEOUT):
                answer = await connection.ask(request)
        except BaseException:
            connection.close()
            raise
        if connection.usable:
            self._idle.setdefault(gateway, []).append(connection)
        return answer

    async def _connection(self, gateway: str) -> _Connection:
        idle = self._idle.get(gateway, [])
        while idle:
            connection = idle.pop()
            if connection.usable:
                return connection
            connection.close()
        tls: ssl.SSLContext | None = None
        if gateway.startswith("https:"):
            tls = self._gateway_tls or ssl.create_default_context()
        host, port = _host_port(gateway)
        async with asyncio.timeout(_CONNECT_TIMEOUT):
            streams = await asyncio.open_connection(
                host, port, ssl=tls, limit=MAX_HEAD_BYTES, local_addr=self._local(host)
            )
        return _Connection(*streams)

    def _local(self, gateway_host: str) -> tuple[str, int] | None:
        """It goes out from the address it listens at, so that a directory on loopback can tell who came."""
        return (self.host, 0) if gateway_host.startswith("127.") and self.host.startswith("127.") else None

    # ------------------------------------------------------------ memory

    def _done(self, request: HttpRequest, target: str, answer: HttpResponse) -> HttpResponse:
        self._log.append(
            RelayRecord(request.peer, request.method, target, len(request.body), len(answer.body), answer.status)
        )
        return answer

    def _keep(self, head: bytes, body: bytes) -> None:
        self._kept.append(head + body)
        self._account(len(head) + len(body))

    def _account(self, size: int) -> None:
        self._kept_bytes += size
        if self._kept_bytes > self._memory:
            self._kept.clear()
            self._kept_bytes = 0
            self._forgot = True


def _opted_in(answer: _Answer) -> bool:
    if answer.headers.get("content-type") != ALLOWED_PURPOSES_MEDIA_TYPE:
        return False
    try:
        return BIP77_PURPOSE in decode_allowed_purposes(answer.body)
    except PeerMistake:
        return False


def _host_port(gateway: str) -> tuple[str, int]:
    host, _, port = gateway.partition("://")[2].rpartition(":")
    return host.strip("[]"), int(port)


async def _pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, kept: bytearray) -> None:
    while data := await reader.read(65_536):
        kept += data
        writer.write(data)
        await writer.drain()
    if writer.can_write_eof():
        writer.write_eof()
    else:
        writer.close()
