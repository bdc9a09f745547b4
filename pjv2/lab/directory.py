"""A BIP77 directory for the lab: write-once mailboxes behind an OHTTP gateway, with long polls, a TTL and the way for BIP78 payers.

It answers as the deployed directories do, refusals included, with two exceptions: its JSON is valid, and a request that is not
8192 bytes long is refused like any other that does not open.

Law: the first message in a mailbox stays; whoever reads it takes nothing away. What the directory saw is in its log, and only there.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import ssl
import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from pjv2.backends.system import SystemEntropy
from pjv2.errors import BadCiphertext, PeerMistake
from pjv2.lab.httpd import HttpRequest, HttpResponse, HttpServer
from pjv2.units import Entropy, Instant
from pjv2.wire import bhttp
from pjv2.wire.mailbox import GATEWAY_PATH, MailboxReply, check_short_id, encode_reply
from pjv2.wire.ohttp import (
    ALLOWED_PURPOSES,
    ALLOWED_PURPOSES_MEDIA_TYPE,
    KEY_PROBLEM_TYPE,
    KEYS_MEDIA_TYPE,
    PADDED_BHTTP_RESPONSE_BYTES,
    Gateway,
    KeyConfig,
)
from pjv2.wire.secp import SecretKey

MAX_MAILBOX_BYTES = 65_536
MAX_ANSWERED_BYTES = PADDED_BHTTP_RESPONSE_BYTES - 9
"""What fits an answer: framing, status, empty headers, a 4-byte length and empty trailers take at most 9 bytes."""
MAILBOX_TTL = 7 * 86_400.0
SELF_LOOP_HEADER = "x-ohttp-self-loop-tag"
_LOG_LENGTH = 100_000


class Refused(Exception):
    """The directory refuses an inner request in the clear, with an outer status (as deployed directories do)."""

    def __init__(self, status: int) -> None:
        super().__init__(f"refused with {status}")
        self.status = status


@dataclass(slots=True)
class _V1Request:
    """A BIP78 payer who waits: his message is read once, and the answer goes to him."""

    payload: bytes | None
    reply: asyncio.Future[bytes]


class Mailboxes:
    """Write-once mailboxes in memory, with waiting readers and waiting BIP78 payers. Shared by the directory and `MemoryMailroom`."""

    def __init__(
        self, clock: Callable[[], Instant], *, ttl: float = MAILBOX_TTL, capacity: int = 2**21, v1: bool = True
    ) -> None:
        self._clock = clock
        self._ttl = ttl
        self._capacity = capacity
        self._v1 = v1
        self._stored: dict[str, tuple[Instant, bytes]] = {}
        self._readers: dict[str, set[asyncio.Future[None]]] = {}
        self._v1_requests: dict[str, _V1Request] = {}
        self._arrival = asyncio.Event()
        self.posted: dict[str, set[bytes]] = {}
        """SHA-256 of every content that was ever offered to a mailbox, the dropped ones too."""

    def __len__(self) -> int:
        return len(self._stored) + self.waiting + len(self._v1_requests)

    @property
    def waiting(self) -> int:
        """How many readers wait for a message now."""
        return sum(len(waiting) for waiting in self._readers.values())

    async def until_waiting(self, readers: int = 1) -> None:
        """Return once so many readers wait."""
        while self.waiting < readers:
            self._arrival.clear()
            await self._arrival.wait()

    def contents(self) -> dict[str, bytes]:
        """What is stored now, by mailbox."""
        self._expire()
        return {name: data for name, (_, data) in self._stored.items()}

    async def handle(self, method: str, name: str, body: bytes, *, long_poll: float) -> MailboxReply:
        """Answer one request to one mailbox. Raises Refused."""
        if len(body) > MAX_MAILBOX_BYTES:
            raise Refused(413)
        match method:
            case "POST":
                self._post(name, body)
                return MailboxReply(200)
            case "GET":
                data = await self._get(name, long_poll)
                return MailboxReply(202) if data is None else MailboxReply(200, data)
            case "PUT" if self._v1:
                self._put(name, body)
                return MailboxReply(200)
            case _:
                return MailboxReply(404)

    async def wait_for_reply(self, name: str, payload: bytes, *, timeout_after: float) -> bytes:
        """Hold a BIP78 payer until the receiver PUTs an answer. Raises Refused(503): nobody answered, or another payer waits."""
        self._expire()
        if name in self._v1_requests or name in self._stored or len(self) >= self._capacity:
            raise Refused(503)
        request = _V1Request(payload, asyncio.get_running_loop().create_future())
        self._v1_requests[name] = request
        self._wake(name)
        try:
            async with asyncio.timeout(timeout_after):
                return await request.reply
        except TimeoutError as exc:
            raise Refused(503) from exc
        finally:
            del self._v1_requests[name]

    def prune(self, name: str | None = None) -> None:
        """Forget a mailbox, or all of them, whatever their age."""
        if name is None:
            self._stored.clear()
        else:
            self._stored.pop(name, None)

    def _expire(self) -> None:
        # Stored in order of creation: only the front can have expired, unless the clock went backwards, which delays it.
        now = self._clock()
        while self._stored:
            name = next(iter(self._stored))
            if self._stored[name][0] + self._ttl > now:
                return
            del self._stored[name]

    def _post(self, name: str, body: bytes) -> None:
        self._expire()
        self.posted.setdefault(name, set()).add(hashlib.sha256(body).digest())
        if name in self._stored:
            return  # the first writer wins; the second is told 200 all the same
        if len(self) >= self._capacity:
            raise Refused(500)
        self._stored[name] = (self._clock(), body)
        self._wake(name)

    def _wake(self, name: str) -> None:
        for waiting in self._readers.pop(name, ()):
            if not waiting.done():
                waiting.set_result(None)

    def _read(self, name: str) -> bytes | None:
        self._expire()
        request = self._v1_requests.get(name)
        if request is not None and request.payload is not None:
            payload, request.payload = request.payload, None
            return payload
        stored = self._stored.get(name)
        return None if stored is None else stored[1]

    async def _get(self, name: str, long_poll: float) -> bytes | None:
        data = self._read(name)
        if data is not None or name in self._v1_requests or long_poll <= 0:
            return data  # a payer's request that was read already is awaiting its reply: 202 at once
        if len(self) >= self._capacity:
            raise Refused(503)
        waiting: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._readers.setdefault(name, set()).add(waiting)
        self._arrival.set()
        try:
            async with asyncio.timeout(long_poll):
                await waiting
        except TimeoutError:
            return None
        finally:
            readers = self._readers.get(name)
            if readers is not None:
                readers.discard(waiting)
                if not readers:
                    del self._readers[name]
        return self._read(name)

    def _put(self, name: str, body: bytes) -> None:
        request = self._v1_requests.get(name)
        if request is None or request.reply.done():
            raise Refused(400)
        request.reply.set_result(body)


@dataclass(frozen=True, slots=True)
class DirectoryRecord:
    """One request as the directory saw it: where it came from, and, if it opened, what was inside."""

    peer: str
    method: str
    path: str
    size: int
    status: int
    inner_method: str | None = None
    mailbox: str | None = None


@dataclass(slots=True)
class _Seen:
    inner_method: str | None = None
    mailbox: str | None = None


def _json(status: int, value: object, media_type: str = "application/json") -> HttpResponse:
    return HttpResponse(status, json.dumps(value).encode(), (("Content-Type", media_type),))


@dataclass(frozen=True, slots=True)
class _Settings:
    long_poll: float
    ttl: float
    capacity: int
    v1: bool
    clock: Callable[[], Instant] = field(repr=False)


class Directory(HttpServer):
    """A directory on loopback. `async with Directory(long_poll=0.5) as directory: directory.url`.

    `long_poll` is how long a GET or a BIP78 payer waits, in seconds; `ttl` the life of a message; `clock` tells its age. `secret` is
    the OHTTP key. `self_loop_tag` is what a relay of the same operator sends along.
    """

    max_body = MAX_MAILBOX_BYTES + 1024

    def __init__(
        self,
        *,
        host: str = "127.0.0.1",
        port: int = 0,
        name: str | None = None,
        ssl_context: ssl.SSLContext | None = None,
        long_poll: float = 30.0,
        ttl: float = MAILBOX_TTL,
        capacity: int = 2**21,
        v1: bool = True,
        clock: Callable[[], Instant] = time.time,
        rng: Entropy | None = None,
        secret: SecretKey | None = None,
        self_loop_tag: str | None = None,
    ) -> None:
        super().__init__(host=host, port=port, ssl_context=ssl_context, name=name)
        self._rng = rng or SystemEntropy()
        self._settings = _Settings(long_poll, ttl, capacity, v1, clock)
        self.long_poll = long_poll
        self.self_loop_tag = self_loop_tag or self._rng.token(32).hex()
        self._gateway = Gateway(secret or SecretKey.generate(self._rng))
        self._mailboxes = self._new_mailboxes()
        self._log: deque[DirectoryRecord] = deque(maxlen=_LOG_LENGTH)

    async def __aenter__(self) -> Directory:
        await super().__aenter__()
        return self

    @property
    def keys(self) -> KeyConfig:
        """The OHTTP key it serves now."""
        return self._gateway.keys

    @property
    def log(self) -> tuple[DirectoryRecord, ...]:
        """What it saw, oldest first: the last 100,000 requests."""
        return tuple(self._log)

    @property
    def mailboxes(self) -> dict[str, bytes]:
        """What is stored now: mailbox to message."""
        return self._mailboxes.contents()

    async def until_waiting(self, polls: int = 1) -> None:
        """Return once so many long polls wait here."""
        await self._mailboxes.until_waiting(polls)

    @property
    def posted(self) -> Mapping[str, set[bytes]]:
        """SHA-256 of every content that was ever offered to a mailbox: more than one is a broken client."""
        return self._mailboxes.posted

    def rotate_keys(self) -> KeyConfig:
        """Replace the OHTTP key by a fresh one under the same key id, as directories that lost their storage do."""
        self._gateway = Gateway(SecretKey.generate(self._rng))
        return self.keys

    def prune(self, mailbox: str | None = None) -> None:
        """Forget a message before its time, or all of them."""
        self._mailboxes.prune(mailbox)

    async def restart(self) -> None:
        """Stop as a killed process does, and come back on the same port with the same key and the same messages.

        Waiting readers and BIP78 payers are cut off.
        """
        await self.stop()
        await self.start()

    def _new_mailboxes(self) -> Mailboxes:
        s = self._settings
        return Mailboxes(s.clock, ttl=s.ttl, capacity=s.capacity, v1=s.v1)

    # ------------------------------------------------------------ routes

    async def respond(self, request: HttpRequest) -> HttpResponse:
        seen = _Seen()
        try:
            answer = await self._route(request, seen)
        except Refused as exc:
            answer = HttpResponse(exc.status)
        self._log.append(
            DirectoryRecord(
                request.peer,
                request.method,
                request.path,
                len(request.body),
                answer.status,
                seen.inner_method,
                seen.mailbox,
            )
        )
        return answer

    async def _route(self, request: HttpRequest, seen: _Seen) -> HttpResponse:
        if request.headers.get(SELF_LOOP_HEADER) == self.self_loop_tag:
            return HttpResponse(403)
        if request.method == "GET":
            return self._get(request)
        if request.method == "POST" and request.path in {"/", GATEWAY_PATH}:
            return await self._gateway_request(request, seen)
        if request.method == "POST" and request.path.count("/") == 1:
            return await self._v1_request(request.path[1:], request, seen)
        return HttpResponse(404)

    def _get(self, request: HttpRequest) -> HttpResponse:
        if request.target == f"{GATEWAY_PATH}?allowed_purposes":
            return HttpResponse(200, ALLOWED_PURPOSES, (("Content-Type", ALLOWED_PURPOSES_MEDIA_TYPE),))
        match request.path:
            case "/.well-known/ohttp-gateway" | "/ohttp-keys":
                return HttpResponse(200, self.keys.encode(), (("Content-Type", KEYS_MEDIA_TYPE),))
            case "/health":
                return _json(200, {"versions": [1, 2] if self._settings.v1 else [2]})
            case "/":
                page = b"<!doctype html><title>directory</title><p>A BIP77 directory of the lab.</p>"
                return HttpResponse(200, page, (("Content-Type", "text/html"),))
            case _:
                return HttpResponse(404)

    async def _gateway_request(self, request: HttpRequest, seen: _Seen) -> HttpResponse:
        if len(request.body) > MAX_MAILBOX_BYTES:
            return HttpResponse(413)
        try:
            opened, sealer = self._gateway.open(request.body)
        except PeerMistake:
            problem = {"type": KEY_PROBLEM_TYPE, "title": "key identifier unknown"}
            return _json(400, problem, "application/problem+json")
        try:
            inner = bhttp.decode_request(opened)
        except BadCiphertext as exc:
            raise Refused(400) from exc
        if not inner.authority:
            raise Refused(500)
        reply = await self._inner_request(inner, seen)
        if len(reply.body) > MAX_ANSWERED_BYTES:
            # Deployed directories cut such a message; the reader then cannot parse the answer.
            cut = bhttp.encode_response(reply.status, reply.body, PADDED_BHTTP_RESPONSE_BYTES + MAX_MAILBOX_BYTES)
            return HttpResponse(200, sealer.seal(cut[:PADDED_BHTTP_RESPONSE_BYTES], self._rng))
        return HttpResponse(200, sealer.seal(encode_reply(reply), self._rng))

    async def _inner_request(self, inner: bhttp.Request, seen: _Seen) -> MailboxReply:
        seen.inner_method = inner.method
        if inner.method not in {"GET", "POST", "PUT"} or not inner.path.startswith("/") or inner.path.count("/") != 1:
            return MailboxReply(404)
        try:
            seen.mailbox = check_short_id(inner.path[1:])
        except PeerMistake as exc:
            raise Refused(400) from exc
        return await self._mailboxes.handle(inner.method, seen.mailbox, inner.body, long_poll=self.long_poll)

    async def _v1_request(self, name: str, request: HttpRequest, seen: _Seen) -> HttpResponse:
        if not self._settings.v1:
            return _json(400, {"errorCode": "version-unsupported", "supported": [2], "message": "V1 is not supported"})
        try:
            seen.mailbox = check_short_id(name)
            text = request.body.decode("utf-8")
        except PeerMistake:
            return HttpResponse(400)
        except UnicodeDecodeError:
            return _json(400, {"errorCode": "original-psbt-rejected", "message": "The body is not text"})
        payload = f"{text}\n{request.query or ''}".encode()
        if len(payload) > MAX_MAILBOX_BYTES:
            return HttpResponse(413)
        try:
            reply = await self._mailboxes.wait_for_reply(seen.mailbox, payload, timeout_after=self.long_poll)
        except Refused as exc:
            return _json(exc.status, {"errorCode": "unavailable", "message": "The receiver did not answer in time"})
        return HttpResponse(200, reply, (("Content-Type", "text/plain"),))
