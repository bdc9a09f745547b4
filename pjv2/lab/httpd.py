"""A small HTTP/1.1 server for the lab: enough for a directory and a relay on loopback, and faults on request.

It speaks keep-alive, `Content-Length` bodies, `OPTIONS`, `CONNECT` and TLS. It refuses what a lab has no use for, each with its
own status: transfer codings (501), long heads (431), large bodies (413), anything that is no HTTP (400).

Law: it listens on loopback unless told otherwise, on a port the system picks, and it keeps that port while it is offline.
"""

from __future__ import annotations

import asyncio
import contextlib
import re
import socket
import ssl
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from http import HTTPStatus

from pjv2.errors import OurMistake, WrongUsage

MAX_HEAD_BYTES = 16_384
_REQUEST_LINE = re.compile(rb"([A-Z]{1,16}) ([!-~]{1,8192}) HTTP/1\.([01])\Z")
_FIELD = re.compile(rb"([!#$%&'*+.^_`|~0-9A-Za-z-]+):[ \t]*([\t -~\x80-\xff]*?)[ \t]*\Z")
_LENGTH = re.compile(r"[0-9]{1,12}")
_CORS = b"Access-Control-Allow-Origin: *\r\n"


@dataclass(frozen=True, slots=True)
class HttpRequest:
    """A request as it arrived; header names are lower case. `raw_head` is the head as sent, for those who keep what they saw."""

    peer: str
    method: str
    target: str
    headers: Mapping[str, str]
    body: bytes = field(default=b"", repr=False)
    raw_head: bytes = field(default=b"", repr=False)

    @property
    def path(self) -> str:
        return self.target.partition("?")[0]

    @property
    def query(self) -> str | None:
        _, mark, query = self.target.partition("?")
        return query if mark else None


@dataclass(frozen=True, slots=True)
class HttpResponse:
    """What to answer. `Content-Length` and the CORS header are added."""

    status: int
    body: bytes = field(default=b"", repr=False)
    headers: tuple[tuple[str, str], ...] = ()

    def encode(self, *, close: bool) -> bytes:
        """The response as HTTP/1.1 text and body."""
        try:
            phrase = HTTPStatus(self.status).phrase
        except ValueError:
            phrase = "Unknown"
        lines = [f"HTTP/1.1 {self.status} {phrase}\r\n".encode("latin-1"), _CORS]
        lines.extend(f"{name}: {value}\r\n".encode("latin-1") for name, value in self.headers)
        if self.status != HTTPStatus.NO_CONTENT:
            lines.append(b"Content-Length: %d\r\n" % len(self.body))
        if close:
            lines.append(b"Connection: close\r\n")
        return b"".join((*lines, b"\r\n", self.body))


@dataclass(frozen=True, slots=True)
class Tunnel:
    """Instead of an answer: the connection is handed over after a 200, until `run` returns."""

    run: Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]] = field(repr=False)


class BadHttp(Exception):
    """What arrived is not a request this server takes; `status` says why."""

    def __init__(self, status: int) -> None:
        super().__init__(f"refused with {status}")
        self.status = status


def parse_head(head: bytes) -> tuple[list[bytes], dict[str, str]]:
    """The words of the first line and the fields of a message head that ends in an empty line. Raises BadHttp."""
    first, *lines = head[:-4].split(b"\r\n")
    fields: dict[str, str] = {}
    for line in lines:
        match = _FIELD.match(line)
        if match is None:
            raise BadHttp(400)
        name, value = match[1].decode("ascii").lower(), match[2].decode("latin-1")
        if name in fields:
            if name in {"content-length", "host", "transfer-encoding"}:
                raise BadHttp(400)
            value = f"{fields[name]}, {value}"
        fields[name] = value
    return first.split(b" ", 2), fields


def content_length(fields: Mapping[str, str], limit: int) -> int:
    """The size of the body that follows a head. Raises BadHttp."""
    if "transfer-encoding" in fields:
        raise BadHttp(501)
    text = fields.get("content-length", "0")
    if not _LENGTH.fullmatch(text):
        raise BadHttp(400)
    size = int(text)
    if size > limit:
        raise BadHttp(413)
    return size


class HttpServer:
    """What the lab's directory and relay have in common: a listener, its connections, and switches that break it.

    `stall` holds every request until it is switched off; `status` answers every POST and CONNECT with that status;
    `cut_after` closes the connection after so many bytes of an answer to them; `refuse_next(n)` answers the next n with 503.
    `offline` closes the listener and every connection, and opens the same port again when it is set to False.
    """

    max_body = 65_536

    def __init__(
        self,
        *,
        host: str = "127.0.0.1",
        port: int = 0,
        ssl_context: ssl.SSLContext | None = None,
        name: str | None = None,
    ) -> None:
        self.host = host
        self._wanted_port = port
        self._ssl = ssl_context
        self._name = name or host
        self._port: int | None = None
        self._server: asyncio.Server | None = None
        self._opening: asyncio.Task[None] | None = None
        self._connections: set[asyncio.Task[None]] = set()
        self._moving = asyncio.Event()
        self._moving.set()
        self._refusals = 0
        self.status: int | None = None
        self.cut_after: int | None = None

    async def respond(self, request: HttpRequest) -> HttpResponse | Tunnel:
        """The answer to one request."""
        raise OurMistake("a server without routes has no answer")  # pragma: no cover

    # ------------------------------------------------------------ life

    async def start(self) -> None:
        """Listen. The port is known afterwards."""
        if self._server is None:
            await self._listen(self._bind())

    async def stop(self) -> None:
        """Close the listener and every connection; pending requests are cut, as by a killed process."""
        self._close()
        await asyncio.gather(*self._connections, return_exceptions=True)

    async def __aenter__(self) -> HttpServer:
        await self.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.stop()

    @property
    def port(self) -> int:
        if self._port is None:
            raise WrongUsage("the server has no port before it is started")
        return self._port

    @property
    def url(self) -> str:
        """scheme://host:port, without a slash."""
        scheme = "http" if self._ssl is None else "https"
        return f"{scheme}://{self._name}:{self.port}"

    # ------------------------------------------------------------ faults

    @property
    def offline(self) -> bool:
        return self._server is None and self._opening is None

    @offline.setter
    def offline(self, value: bool) -> None:
        if value:
            self._close()
        elif self.offline:
            # The socket listens from here on; connections queue until the loop serves them.
            self._opening = asyncio.get_running_loop().create_task(self._listen(self._bind()))

    @property
    def stall(self) -> bool:
        return not self._moving.is_set()

    @stall.setter
    def stall(self, value: bool) -> None:
        if value:
            self._moving.clear()
        else:
            self._moving.set()

    def refuse_next(self, n: int) -> None:
        """Answer the next `n` POST or CONNECT requests with 503."""
        self._refusals = n

    # ------------------------------------------------------------ inside

    def _bind(self) -> socket.socket:
        sock = socket.socket(socket.AF_INET6 if ":" in self.host else socket.AF_INET, socket.SOCK_STREAM)
        try:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            # Small answers in a row: the second must not wait until the first is acknowledged. Connections inherit it.
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            sock.bind((self.host, self._wanted_port if self._port is None else self._port))
            sock.listen(1024)
            sock.setblocking(False)
        except OSError as exc:
            sock.close()
            raise WrongUsage(f"the lab cannot listen on {self.host}: {exc.strerror}") from exc
        self._port = sock.getsockname()[1]
        return sock

    async def _listen(self, sock: socket.socket) -> None:
        self._server = await asyncio.start_server(
            self._accept, sock=sock, ssl=self._ssl, limit=MAX_HEAD_BYTES, backlog=1024
        )
        self._opening = None

    def _close(self) -> None:
        if self._opening is not None:
            self._opening.cancel()
            self._opening = None
        if self._server is not None:
            self._server.close()
            self._server = None
        for task in self._connections:
            task.cancel()

    def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.get_running_loop().create_task(self._serve(reader, writer))
        self._connections.add(task)
        task.add_done_callback(self._connections.discard)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        peer = writer.get_extra_info("peername")
        try:
            while await self._serve_one(reader, writer, peer[0] if peer else ""):
                pass
        except (OSError, EOFError, ssl.SSLError, asyncio.CancelledError):
            pass  # the other side left, or this server was stopped: the connection is cut below either way
        finally:
            writer.transport.abort()

    async def _serve_one(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, peer: str) -> bool:
        try:
            request = await self._read(reader, writer, peer)
        except (BadHttp, asyncio.LimitOverrunError) as exc:
            status = exc.status if isinstance(exc, BadHttp) else 431
            writer.write(HttpResponse(status).encode(close=True))
            await writer.drain()
            with contextlib.suppress(TimeoutError):
                # The rest of the refused body is read away, or a reset would overtake the answer.
                async with asyncio.timeout(1.0):
                    while await reader.read(65_536):
                        pass
            return False
        if request is None:
            return False
        await self._moving.wait()
        answer = self._fault(request) or await self.respond(request)
        if isinstance(answer, Tunnel):
            writer.write(b"HTTP/1.1 200 OK\r\n\r\n")
            await answer.run(reader, writer)
            return False
        close = request.headers.get("connection", "").lower() == "close"
        data = answer.encode(close=close)
        if self.cut_after is not None and request.method in {"POST", "CONNECT"}:
            writer.write(data[: self.cut_after])
            await writer.drain()
            writer.close()
            await writer.wait_closed()
            return False
        writer.write(data)
        await writer.drain()
        return not close

    async def _read(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, peer: str) -> HttpRequest | None:
        try:
            head = await reader.readuntil(b"\r\n\r\n")
        except asyncio.IncompleteReadError as exc:
            if not exc.partial:
                return None
            raise
        words, fields = parse_head(head)
        line = _REQUEST_LINE.match(b" ".join(words))
        if line is None:
            raise BadHttp(400)
        size = content_length(fields, self.max_body)
        if fields.get("expect", "").lower() == "100-continue":
            writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        body = await reader.readexactly(size) if size else b""
        if line[3] == b"0":
            fields["connection"] = "close"
        return HttpRequest(peer, line[1].decode(), line[2].decode(), fields, body, head)

    def _fault(self, request: HttpRequest) -> HttpResponse | None:
        if request.method not in {"POST", "CONNECT"}:
            return None
        if self._refusals > 0:
            self._refusals -= 1
            return HttpResponse(503)
        return None if self.status is None else HttpResponse(self.status)
