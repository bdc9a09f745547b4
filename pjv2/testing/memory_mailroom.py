"""A mailroom in memory: write-once mailboxes, long polls and faults, without HTTP and without envelopes.

It behaves as a directory behind relays does, in one process: what one party posts, the other reads. Hand the same object to both.
It is the fake that pjv2's own tests use, and passes the same contract suite (`check_mailroom`) as the mailroom over HTTP.

Law: it refuses what the real one refuses (an unknown key, a body that would not fit an envelope, a relay to avoid).
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass

from pjv2.backends.system import SystemClock, SystemEntropy
from pjv2.errors import KeyRotated, NotNow, PeerMistake, WrongUsage
from pjv2.lab.directory import MAILBOX_TTL, MAX_ANSWERED_BYTES, Mailboxes, Refused
from pjv2.ports import Carried, ServerReply
from pjv2.units import Entropy, Instant, SessionId
from pjv2.wire.mailbox import MailboxReply, MailboxRequest, check_short_id, encapsulate_request, normalise_directory
from pjv2.wire.ohttp import KeyConfig
from pjv2.wire.secp import SecretKey


@dataclass(frozen=True, slots=True)
class MemoryRecord:
    """One exchange as the fake saw it, which knows both ends."""

    session: SessionId
    method: str
    mailbox: str
    relay: str
    status: int


class MemoryMailroom:
    """Implements `ports.Mailroom` in memory. `long_poll` is how many seconds a GET waits; 0 answers at once.

    Faults: `offline = True` refuses everything, `fail_next(n)` the next n exchanges before they happen, `lose_replies(n)` lets the next n
    happen and loses the answer, `stall = True` holds everything, `rotate_keys()` makes sessions with the old key fail for good.
    """

    def __init__(
        self,
        *,
        url: str = "https://directory.example",
        relays: Sequence[str] = ("https://relay-a.example", "https://relay-b.example"),
        long_poll: float = 0.0,
        ttl: float = MAILBOX_TTL,
        clock: Callable[[], Instant] | None = None,
        rng: Entropy | None = None,
    ) -> None:
        if not relays:
            raise WrongUsage("a mailroom needs a relay")
        self.url = normalise_directory(url)
        self.relays = tuple(relays)
        self.long_poll = long_poll
        self.offline = False
        self._rng = rng or SystemEntropy()
        self._mailboxes = Mailboxes(clock or SystemClock().now, ttl=ttl)
        self._keys = self._fresh_keys()
        self._failures = 0
        self._lost_replies = 0
        self._moving = asyncio.Event()
        self._moving.set()
        self._closed = False
        self._log: list[MemoryRecord] = []
        self.servers: dict[str, Callable[[str, bytes], Awaitable[ServerReply]]] = {}
        """Payees' own servers (BIP78) by URL without query."""

    # ------------------------------------------------------------ the port

    async def directory(self) -> tuple[str, KeyConfig]:
        """The one directory there is. Raises NotNow while it is offline."""
        self._check_open()
        await self._moving.wait()
        if self.offline:
            raise NotNow("the mailroom is offline")
        return self.url, self._keys

    async def exchange(
        self, directory: str, keys: KeyConfig, request: MailboxRequest, *, session: SessionId, avoid: str = ""
    ) -> Carried:
        """Do to the mailbox what the request asks. Raises NotNow, KeyRotated, WrongUsage."""
        self._check_open()
        if normalise_directory(directory) != self.url:
            raise NotNow(f"{directory} cannot be reached: this mailroom has {self.url} only")
        # An envelope is made and dropped: what does not fit one is refused here as it is in earnest.
        encapsulate_request(self.url, keys, request, self._rng)
        await self._moving.wait()
        if self.offline:
            raise NotNow("the mailroom is offline")
        if self._failures > 0:
            self._failures -= 1
            raise NotNow("the mailroom was told to fail", after=0.0)
        if keys != self._keys:
            raise KeyRotated(f"{self.url} does not know the OHTTP key of this session any more")
        relay = self._relay(avoid)
        reply = await self._handle(request)
        self._log.append(MemoryRecord(session, request.method, request.short_id, relay, reply.status))
        if self._lost_replies > 0:
            self._lost_replies -= 1
            raise NotNow("the mailroom was told to lose the answer", after=0.0)
        return Carried(reply, relay)

    async def bip78(self, url: str, body: bytes, *, session: SessionId) -> ServerReply:
        """The answer of the server that was put there under this address. Raises NotNow where there is none."""
        self._check_open()
        await self._moving.wait()
        if self.offline or url.partition("?")[0] not in self.servers:
            raise NotNow("the payee's server cannot be reached")
        return await self.servers[url.partition("?")[0]](url, body)

    async def close(self) -> None:
        self._closed = True

    # ------------------------------------------------------------ what tests look at and break

    @property
    def keys(self) -> KeyConfig:
        """The OHTTP key that it knows."""
        return self._keys

    @property
    def log(self) -> tuple[MemoryRecord, ...]:
        """Every exchange that reached a mailbox, oldest first."""
        return tuple(self._log)

    @property
    def mailboxes(self) -> dict[str, bytes]:
        """What is stored now: mailbox to message."""
        return self._mailboxes.contents()

    @property
    def stall(self) -> bool:
        return not self._moving.is_set()

    @stall.setter
    def stall(self, value: bool) -> None:
        if value:
            self._moving.clear()
        else:
            self._moving.set()

    async def until_waiting(self, polls: int = 1) -> None:
        """Return once so many long polls wait here."""
        await self._mailboxes.until_waiting(polls)

    def fail_next(self, n: int) -> None:
        """Refuse the next `n` exchanges; nothing happens to a mailbox."""
        self._failures = n

    def lose_replies(self, n: int) -> None:
        """Let the next `n` exchanges happen and lose what they answer."""
        self._lost_replies = n

    def rotate_keys(self) -> KeyConfig:
        """Replace the OHTTP key, as a directory does that lost its storage."""
        self._keys = self._fresh_keys()
        return self._keys

    def prune(self, mailbox: str | None = None) -> None:
        """Forget a message before its time, or all of them."""
        self._mailboxes.prune(mailbox)

    async def post_v1(
        self, mailbox: str, body: str, query: str = "", *, timeout_after: float = 30.0
    ) -> tuple[int, bytes]:
        """A BIP78 payer's request: status and body of the answer, 503 when the receiver does not PUT one in time."""
        payload = f"{body}\n{query}".encode()
        try:
            return 200, await self._mailboxes.wait_for_reply(
                check_short_id(mailbox), payload, timeout_after=timeout_after
            )
        except Refused as exc:
            return exc.status, b'{"errorCode": "unavailable", "message": "The receiver did not answer in time"}'

    def _check_open(self) -> None:
        if self._closed:
            raise WrongUsage("the mailroom is closed")

    def _fresh_keys(self) -> KeyConfig:
        return KeyConfig(1, SecretKey.generate(self._rng).public)

    def _relay(self, avoid: str) -> str:
        others = [relay for relay in self.relays if relay != avoid] or list(self.relays)
        return others[self._rng.below(len(others))]

    async def _handle(self, request: MailboxRequest) -> MailboxReply:
        try:
            name = check_short_id(request.short_id)
            reply = await self._mailboxes.handle(request.method, name, request.body, long_poll=self.long_poll)
        except (Refused, PeerMistake) as exc:
            status = exc.status if isinstance(exc, Refused) else 400
            raise NotNow(f"{self.url} gave no answer: it answered {status}") from exc
        if len(reply.body) > MAX_ANSWERED_BYTES:
            raise NotNow(f"{self.url} gave no answer: what is in the mailbox does not fit an envelope")
        return reply
