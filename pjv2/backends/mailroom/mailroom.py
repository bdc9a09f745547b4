"""The mailroom over HTTP: directories behind oblivious relays.

Each request goes out in a fresh envelope, through a relay drawn at random from the healthy ones that the directory's operator does
not run. What fails is tried through other relays before anybody is blamed:

- another relay succeeds: the ones that failed are left alone for a while;
- all of them answer, and refuse: it is the directory's doing;
- none can be reached: it is probably our own network, and nobody is blamed;
- two say that the directory does not know the key: it changed it (one relay alone could end our sessions with a lie).

Law: an envelope is sent once. A relay learns our address and the directory's name; a directory learns the mailbox; nobody both.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
from collections import OrderedDict
from collections.abc import AsyncIterator, Iterable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx

from pjv2.backends.mailroom.carrier import Answer, Carrier, CarrierTrouble, HttpxCarrier, ReqwestCarrier, Trouble
from pjv2.backends.mailroom.directory_list import load_services
from pjv2.backends.mailroom.health import Health
from pjv2.backends.mailroom.keys import KeyBook, KeyCache, KeyStanding, directory_name, read_keys_file, relay_name
from pjv2.backends.mailroom.operators import Operators, Service
from pjv2.backends.mailroom.tunnel import (
    Dialer,
    DirectDialer,
    FetchRefused,
    SocksDialer,
    SocksProxy,
    fetch_keys_from_loopback,
    fetch_keys_through,
    retry_after,
    tls_context,
)
from pjv2.backends.system import SystemClock, SystemEntropy
from pjv2.errors import CannotRead, KeyRotated, NotNow, PeerMistake, WrongUsage
from pjv2.ports import Carried, Clock, ServerReply
from pjv2.units import Entropy, Instant, Network, SessionId
from pjv2.wire.mailbox import MailboxReply, MailboxRequest, PendingReply, encapsulate_request, relay_target
from pjv2.wire.ohttp import ENCAPSULATED_BYTES, KEY_PROBLEM_TYPE, REQUEST_MEDIA_TYPE, KeyConfig

POLL_TIMEOUT = 60.0
"""Seconds for the answer to a GET: directories hold it 30 s."""
POST_TIMEOUT = 20.0
MOST_RELAYS_PER_EXCHANGE = 3
_TIME_FOR_OTHERS = 15.0
"""No other relay is tried once an exchange took this long: its caller has other things to do."""
_LASTING_FAILURES = 5
"""A relay that failed so often in a row is no voice that a rotation must wait for (about a minute of back-offs)."""
_MOST_IDLE_CARRIERS = 64
_REQUESTS_PER_CARRIER = 100
"""Requests in flight that share one client: over HTTP/2 they share one connection, and servers allow about so many on it."""
_MOST_PLACES = 256
_SAVE_EVERY = 30.0
_SAVE_ANSWERS_EVERY = 900.0
_HEALTH_NAME = "mailroom health"
ANSWERS_NAME = "relays checked"
"""Under which the cache keeps when each relay and directory last did what it was asked."""
_HEADERS = {"Content-Type": REQUEST_MEDIA_TYPE}
_PLAIN_TEXT = {"Content-Type": "text/plain"}
BIP78_READ_TIMEOUT = 60.0
"""A payee's server may ask a person, or a slow node, before it answers."""
MAX_BIP78_BYTES = 4_000_000 * 4 // 3
"""Base64 of the largest PSBT that a block could hold (the reference's limit)."""

ServiceLike = str | Mapping[str, str] | Service
"""A relay or directory as a configuration has it: a URL, `{"url": …, "operator": …}`, or a Service."""


@dataclass(frozen=True, slots=True)
class _Failure:
    """What one relay did instead of carrying an answer."""

    route: _Route
    said: str
    trouble: Trouble | None = None
    status: int = 0
    key_problem: bool = False
    retry_after: float | None = None


@dataclass(frozen=True, slots=True)
class RelayCheck:
    """Whether a relay carries to a directory now, and if not, what it said."""

    relay: Service
    works: bool
    said: str = ""


@dataclass(frozen=True, slots=True)
class _Route:
    """One way to a directory: the relay, where to post, and what the relay is called in `Health`, in general and here."""

    relay: Service
    target: str
    name: str
    name_here: str


@dataclass(frozen=True, slots=True)
class _Place:
    """A directory, and every route to it through another operator's relay."""

    directory: Service
    routes: tuple[_Route, ...]


@dataclass(slots=True)
class _Lent:
    carrier: Carrier
    users: int = 0


class HttpMailroom:
    """Implements `ports.Mailroom`.

    `relays` and `directories`: URLs, mappings with `url` and `operator`, or `Service`s. `known`: further services whose operators are
    known (the packaged lists). `http`: an application's own client, used as it is; without one, traffic is carried by pyreqwest.
    `keys_file`: the directories' keys, so that they are not fetched. `ca_file`: an extra trust root in PEM. `proxy`:
    `socks5h://host:port` for everything, with a user name per session. `source_address`: the local address that relays see.
    `cache`: where keys and health are kept between runs.

    Raises WrongUsage for services and settings that cannot be used.
    """

    def __init__(
        self,
        relays: Iterable[ServiceLike],
        directories: Iterable[ServiceLike],
        *,
        known: Iterable[Service] = (),
        http: httpx.AsyncClient | None = None,
        keys_file: Path | None = None,
        ca_file: Path | None = None,
        proxy: str | None = None,
        source_address: str | None = None,
        cache: KeyCache | None = None,
        clock: Clock | None = None,
        rng: Entropy | None = None,
        dialer: Dialer | None = None,
        poll_timeout: float = POLL_TIMEOUT,
        post_timeout: float = POST_TIMEOUT,
    ) -> None:
        own_relays = tuple(service_from(item) for item in relays)
        own_directories = tuple(service_from(item) for item in directories)
        self._operators = Operators((*known, *own_relays, *own_directories))
        self._relays = _named(self._operators, own_relays)
        self._directories = _named(self._operators, own_directories)
        if not self._relays:
            raise WrongUsage("no relay is configured: give at least one, better two of different operators")
        if http is not None and proxy is not None:
            raise WrongUsage(
                "an httpx client of your own is used as it is: give it the proxy yourself, and a dialer for fetching keys"
            )
        if http is not None and ca_file is not None:
            raise WrongUsage(
                "an httpx client of your own is used as it is: give it the trust root yourself, without ca_file"
            )
        self._clock = clock or SystemClock()
        self._rng = rng or SystemEntropy()
        self._poll_timeout = poll_timeout
        self._post_timeout = post_timeout
        self._cache = cache
        self._ca_file = ca_file
        self._source_address = source_address
        self._socks = None if proxy is None else SocksProxy.parse(proxy)
        self._isolation = self._rng.token(16)
        self._dialer = dialer or (DirectDialer() if self._socks is None else SocksDialer(self._socks))
        self._tls = tls_context(ca_file)
        self._shared: Carrier | None = None if http is None else HttpxCarrier(http)
        self._carriers: OrderedDict[str, _Lent] = OrderedDict()
        self._health = Health(self._rng)
        self._health_loaded = False
        self._health_saved = 0.0
        self._answers: dict[str, Instant] = {}
        """When each relay and directory last did what it was asked, as far as the cache was not told yet."""
        self._answers_saved = self._clock.now()
        self._places: dict[str, _Place] = {}
        self._closed = False
        self._keys = KeyBook(
            fetch=self._fetch_keys,
            fetch_loopback=fetch_keys_from_loopback,
            relays_for=self._draw,
            operators=self._operators,
            health=lambda: self._health,
            clock=self._clock,
            cache=cache,
            fixed=None if keys_file is None else read_keys_file(keys_file),
        )

    @classmethod
    def for_network(
        cls,
        network: Network,
        *,
        relays: Iterable[ServiceLike] | None = None,
        directories: Iterable[ServiceLike] | None = None,
        http: httpx.AsyncClient | None = None,
        keys_file: Path | None = None,
        ca_file: Path | None = None,
        proxy: str | None = None,
        cache: KeyCache | None = None,
        clock: Clock | None = None,
        rng: Entropy | None = None,
    ) -> HttpMailroom:
        """A mailroom with the packaged services of a network where none are given; their operators are known either way."""
        packaged = load_services(network)
        return cls(
            packaged.relays if relays is None else relays,
            packaged.directories if directories is None else directories,
            known=(*packaged.relays, *packaged.directories),
            http=http,
            keys_file=keys_file,
            ca_file=ca_file,
            proxy=proxy,
            cache=cache,
            clock=clock,
            rng=rng,
        )

    # ------------------------------------------------------------ the port

    async def directory(self) -> tuple[str, KeyConfig]:
        """A directory for a new request, drawn at random from the healthy ones, and its keys. Raises NotNow, WrongUsage."""
        await self._begin()
        if not self._directories:
            raise WrongUsage("no directory is configured: a receiver needs one")
        usable = [directory for directory in self._directories if self._relays_for(directory)]
        if not usable:
            raise self._no_pair(self._directories[0])
        now = self._clock.now()
        usable = self._shuffled(usable)
        usable.sort(key=lambda directory: self._health.wait(now, directory_name(directory.url)))
        troubles: list[NotNow] = []
        for directory in usable:
            try:
                standing = await self._keys.get(directory)
            except NotNow as exc:
                troubles.append(exc)
                continue
            await self._save_health()
            return directory.url, standing.keys
        await self._save_health()
        waits = [exc.after for exc in troubles if exc.after is not None]
        raise NotNow(" · ".join(str(exc) for exc in troubles), after=min(waits, default=None)) from troubles[0]

    async def exchange(
        self, directory: str, keys: KeyConfig, request: MailboxRequest, *, session: SessionId, avoid: str = ""
    ) -> Carried:
        """Carry one request through a relay that the directory's operator does not run, trying up to three of them.

        `avoid` is used only when nothing else is left. Raises NotNow (with `after`), KeyRotated, WrongUsage.
        """
        await self._begin()
        place = self._place(directory)
        routes = self._candidates(place, avoid)
        loop = asyncio.get_running_loop()
        started = loop.time()
        failures: list[_Failure] = []
        async with self._carrier(session) as carrier:
            for route in routes[:MOST_RELAYS_PER_EXCHANGE]:
                outcome = await self._attempt(carrier, route, place.directory.url, keys, request)
                if isinstance(outcome, MailboxReply):
                    await self._settle(route, place.directory, failures)
                    return Carried(outcome, route.relay.url)
                failures.append(outcome)
                if loop.time() - started > _TIME_FOR_OTHERS:
                    break
        exc = self._verdict(place, failures)
        if isinstance(exc, KeyRotated):
            await self._keys.forget(place.directory.url, keys)
        await self._save_health()
        raise exc

    async def bip78(self, url: str, body: bytes, *, session: SessionId) -> ServerReply:
        """Send an Original to the payee's own server; he learns our address, unless a proxy is configured. Raises NotNow."""
        await self._begin()
        carrier = self._shared
        if carrier is None:
            proxy = None if self._socks is None else self._socks.url(self._isolate(session))
            # Small servers offer HTTP/2 and speak the first only (the reference's own does); one request gains nothing by it.
            carrier = ReqwestCarrier(
                ca_file=self._ca_file, proxy=proxy, source_address=self._source_address, http2=False
            )
        try:
            answer = await carrier.post(url, _PLAIN_TEXT, body, BIP78_READ_TIMEOUT, MAX_BIP78_BYTES)
        except CarrierTrouble as exc:
            raise NotNow(f"the payee's server {exc.trouble.value}, or its certificate is not trusted") from exc
        finally:
            if carrier is not self._shared:
                await carrier.close()
        if len(answer.body) > MAX_BIP78_BYTES:
            raise NotNow("the payee's server answered with more than a proposal can hold")
        return ServerReply(answer.status, answer.body)

    async def close(self) -> None:
        """Keep what was learnt about relays and close our own connections; an application's client stays open."""
        if self._closed:
            return
        self._closed = True
        await self._save_health(force=True)
        await self._save_answers()
        for lent in self._carriers.values():
            await lent.carrier.close()
        self._carriers.clear()

    # ------------------------------------------------------------ for doctor

    @property
    def relays(self) -> tuple[Service, ...]:
        """The relays in use, with their operators where these are known."""
        return self._relays

    @property
    def directories(self) -> tuple[Service, ...]:
        """The directories for new requests."""
        return self._directories

    def relays_for(self, directory: str) -> tuple[Service, ...]:
        """The relays that may carry requests to a directory. Raises WrongUsage for a URL that cannot be one."""
        return self._relays_for(self._operators.service(directory))

    def key_standings(self) -> tuple[KeyStanding, ...]:
        """How the keys of the directories asked so far were come by, and warnings about them."""
        return self._keys.standings()

    async def check_keys(self, directory: str) -> KeyStanding:
        """The keys of one directory as `directory()` would use them. Raises NotNow, WrongUsage."""
        await self._begin()
        where = self._operators.service(directory)
        if not self._relays_for(where):
            raise self._no_pair(where)
        return await self._keys.get(where)

    async def check_relays(self, directory: str) -> tuple[RelayCheck, ...]:
        """Try every relay that may be used for an https directory, at the same time, by asking for its keys through it.

        Raises WrongUsage for a directory that cannot be asked through relays. Nobody is blamed for what comes out.
        """
        await self._begin()
        place = self._place(directory)

        async def check(route: _Route) -> RelayCheck:
            try:
                await self._fetch_keys(route.relay.url, place.directory.url)
            except (CarrierTrouble, FetchRefused) as exc:
                return RelayCheck(route.relay, False, str(exc))
            return RelayCheck(route.relay, True)

        return tuple(await asyncio.gather(*(check(route) for route in place.routes)))

    def back_offs(self) -> dict[str, float]:
        """Who is left alone now, in words, and for how many more seconds."""
        return self._health.back_offs(self._clock.now())

    # ------------------------------------------------------------ choosing

    def _relays_for(self, directory: Service) -> tuple[Service, ...]:
        return tuple(relay for relay in self._relays if self._operators.may_pair(relay, directory))

    def _no_pair(self, directory: Service) -> WrongUsage:
        return WrongUsage(
            f"no configured relay is certainly run by another operator than {directory.url}: "
            "add a relay of somebody else, or write the operators of both into the configuration"
        )

    def _shuffled(self, services: Sequence[Service]) -> list[Service]:
        left = list(services)
        return [left.pop(self._rng.below(len(left))) for _ in range(len(left))]

    def _place(self, directory: str) -> _Place:
        """The routes to a directory, worked out once. Raises WrongUsage."""
        place = self._places.get(directory)
        if place is None:
            service = self._operators.service(directory)
            place = _Place(
                service,
                tuple(
                    _Route(
                        relay,
                        relay_target(relay.url, service.url),
                        relay_name(relay.url),
                        relay_name(relay.url, service.url),
                    )
                    for relay in self._relays_for(service)
                ),
            )
            if len(self._places) >= _MOST_PLACES:
                self._places.clear()
            self._places[directory] = place
        return place

    def _by_health(self, place: _Place) -> list[tuple[float, _Route]]:
        """Every route with the seconds until it may be used: the healthy ones first, in random order, then by their back-off."""
        now = self._clock.now()
        waits = [(self._health.wait(now, route.name, route.name_here), route) for route in place.routes]
        drawn = [waits.pop(self._rng.below(len(waits))) for _ in range(len(waits))]
        return sorted(drawn, key=lambda waiting: waiting[0])

    def _draw(self, directory: Service) -> list[Service]:
        """Every relay that may be asked for a directory's keys, in the order to try."""
        return [route.relay for _, route in self._by_health(self._place(directory.url))]

    def _candidates(self, place: _Place, avoid: str) -> list[_Route]:
        """The healthy routes to a directory in random order, the relay to avoid last. Raises NotNow, WrongUsage."""
        drawn = self._by_health(place)
        if not drawn:
            raise self._no_pair(place.directory)
        healthy = [route for wait, route in drawn if wait <= 0]
        if not healthy:
            wait = drawn[0][0]
            raise NotNow(
                f"every relay for {place.directory.url} failed lately and is left alone for {wait:.0f} s more",
                after=wait,
            )
        return sorted(healthy, key=lambda route: route.relay.url == avoid)

    # ------------------------------------------------------------ carrying

    async def _attempt(
        self, carrier: Carrier, route: _Route, directory: str, keys: KeyConfig, request: MailboxRequest
    ) -> MailboxReply | _Failure:
        envelope, pending = encapsulate_request(directory, keys, request, self._rng)
        timeout = self._poll_timeout if request.method == "GET" else self._post_timeout
        try:
            answer = await carrier.post(route.target, _HEADERS, envelope, timeout)
        except CarrierTrouble as exc:
            return _Failure(route, str(exc), trouble=exc.trouble)
        return _read_answer(route, answer, pending)

    async def _settle(self, route: _Route, directory: Service, failures: Sequence[_Failure]) -> None:
        """One relay succeeded, so those that failed before it are to blame."""
        now = self._clock.now()
        self._answers |= {route.relay.url: now, directory.url: now}
        for failure in failures:
            self._blame(failure, now)
        if abs(now - self._answers_saved) > _SAVE_ANSWERS_EVERY:
            await self._save_answers()
        if self._health.worked(route.name, route.name_here, directory_name(directory.url)) or failures:
            await self._save_health()

    def _blame(self, failure: _Failure, now: float) -> None:
        # A relay that cannot be reached is left alone altogether; one that was reached, for this directory only.
        wide = failure.trouble is Trouble.CONNECT
        self._health.failed(failure.route.name if wide else failure.route.name_here, now, failure.retry_after)

    def _verdict(self, place: _Place, failures: Sequence[_Failure]) -> NotNow:
        """Whose fault it is that no relay carried an answer."""
        now = self._clock.now()
        url = place.directory.url
        said = "; ".join(f"{failure.route.relay.url} {failure.said}" for failure in failures)
        reached = [failure for failure in failures if failure.trouble is not Trouble.CONNECT]
        if not reached:
            return NotNow(f"no relay can be reached ({said}): is this machine online?")
        for failure in failures:
            # A silent or broken connection is held against the relay, but for this directory only: it may be either's.
            if failure.trouble is not None:
                self._blame(failure, now)
        answered = [failure for failure in reached if failure.trouble is None]
        rotated = [failure for failure in answered if failure.key_problem]
        if rotated and rotated == answered and (len(rotated) > 1 or self._nobody_else(place, rotated[0].route)):
            return KeyRotated(f"{url} does not know the OHTTP key of this session any more ({said})")
        waits = [failure.retry_after for failure in answered if failure.retry_after is not None]
        if any(failure.status == 429 or failure.status >= 500 for failure in answered):
            waits.append(self._health.failed(directory_name(url), now))
        return NotNow(f"{url} gave no answer: {said}", after=max(waits, default=None))

    def _nobody_else(self, place: _Place, route: _Route) -> bool:
        """Whether no other relay's word about this directory can be had, now or soon."""
        return all(
            self._health.failures(other.name, other.name_here) >= _LASTING_FAILURES
            for other in place.routes
            if other is not route
        )

    @asynccontextmanager
    async def _carrier(self, session: SessionId) -> AsyncIterator[Carrier]:
        """The connections of a session: shared by all, or its own where a proxy could tell them apart."""
        if self._shared is not None:
            yield self._shared
            return
        name = self._free_carrier() if self._socks is None else session
        lent = self._carriers.get(name)
        if lent is None:
            proxy = None if self._socks is None else self._socks.url(self._isolate(session))
            carrier = ReqwestCarrier(ca_file=self._ca_file, proxy=proxy, source_address=self._source_address)
            lent = self._carriers[name] = _Lent(carrier)
        self._carriers.move_to_end(name)
        lent.users += 1
        try:
            yield lent.carrier
        finally:
            lent.users -= 1
            await self._drop_idle_carriers()

    def _free_carrier(self) -> str:
        """The first shared client that has room, or a new one."""
        number = 0
        while (lent := self._carriers.get(str(number))) is not None and lent.users >= _REQUESTS_PER_CARRIER:
            number += 1
        return str(number)

    async def _drop_idle_carriers(self) -> None:
        if len(self._carriers) <= _MOST_IDLE_CARRIERS:
            return
        for name in [name for name, lent in self._carriers.items() if not lent.users]:
            if len(self._carriers) <= _MOST_IDLE_CARRIERS:
                break
            await self._carriers.pop(name).carrier.close()

    def _isolate(self, name: str) -> str:
        """A user name for the proxy: one per session and run, and no session id."""
        return hashlib.blake2s(name.encode(), key=self._isolation, digest_size=12).hexdigest()

    async def _fetch_keys(self, relay: str, directory: str) -> KeyConfig:
        isolate = self._isolate(f"keys of {directory} through {relay}")
        return await fetch_keys_through(relay, directory, tls=self._tls, dialer=self._dialer, isolate=isolate)

    # ------------------------------------------------------------ memory

    async def _begin(self) -> None:
        if self._closed:
            raise WrongUsage("the mailroom is closed")
        if self._health_loaded:
            return
        self._health_loaded = True
        self._health = await kept_health(self._cache, self._rng)

    async def _save_health(self, *, force: bool = False) -> None:
        now = asyncio.get_running_loop().time()
        if self._cache is None or not self._health_loaded or (not force and now - self._health_saved < _SAVE_EVERY):
            return
        self._health_saved = now
        with contextlib.suppress(NotNow):  # advice: no letter is lost because it could not be kept
            await self._cache.put(_HEALTH_NAME, json.dumps(self._health.to_dict(), sort_keys=True))

    async def _save_answers(self) -> None:
        if self._cache is None or not self._answers:
            return
        self._answers_saved = self._clock.now()
        answers, self._answers = self._answers, {}
        try:
            await keep_answers(self._cache, answers)
        except NotNow:  # advice, too: kept another time
            self._answers = answers | self._answers


async def kept_answers(cache: KeyCache | None) -> dict[str, Instant]:
    """When each relay and directory, by its URL, last did what it was asked; nothing where it cannot be read."""
    text = None if cache is None else await cache.get(ANSWERS_NAME)
    try:
        found = json.loads(text) if text is not None else {}
    except ValueError:
        return {}  # advice, learnt again
    entries = found.items() if isinstance(found, dict) else ()
    return {str(url): float(at) for url, at in entries if isinstance(at, int | float)}


async def keep_answers(cache: KeyCache, answered: Mapping[str, Instant]) -> None:
    """Remember that these answered then. Raises NotNow."""
    await cache.put(ANSWERS_NAME, json.dumps((await kept_answers(cache)) | dict(answered), sort_keys=True))


async def kept_health(cache: KeyCache | None, rng: Entropy) -> Health:
    """What earlier runs learnt about relays and directories; nothing where it cannot be read."""
    text = None if cache is None else await cache.get(_HEALTH_NAME)
    if text is not None:
        # Advice from an earlier run, learnt again when it cannot be read.
        with contextlib.suppress(ValueError, CannotRead):
            return Health.from_dict(json.loads(text), rng)
    return Health(rng)


def service_from(item: ServiceLike) -> Service:
    """A service as configurations name it. Raises WrongUsage."""
    if isinstance(item, Service):
        return item
    if isinstance(item, str):
        return Service(item)
    unknown = set(item) - {"url", "operator"}
    if unknown or "url" not in item:
        raise WrongUsage("a relay or directory is a URL, or has `url` and `operator` and nothing else")
    return Service(item["url"], item.get("operator"))


def _named(operators: Operators, services: Sequence[Service]) -> tuple[Service, ...]:
    """Each service once, with the operator that any list knows."""
    return tuple({service.url: operators.service(service.url) for service in services}.values())


def _read_answer(route: _Route, answer: Answer, pending: PendingReply) -> MailboxReply | _Failure:
    """What an outer answer means. The outer status is the relay's or the gateway's, and only what opens is the directory's word."""
    wait = retry_after(answer.headers.get("retry-after"))
    if answer.status != 200:
        rotated = answer.status == 400 and _is_key_problem(answer)
        said = "says that the directory does not know the key" if rotated else f"answered {answer.status}"
        return _Failure(route, said, status=answer.status, key_problem=rotated, retry_after=wait)
    if len(answer.body) != ENCAPSULATED_BYTES:
        return _Failure(route, "brought an answer of the wrong size", status=200)
    try:
        return pending.open(answer.body)
    except PeerMistake as exc:
        return _Failure(route, f"brought an answer that cannot be read ({exc})", status=200)


def _is_key_problem(answer: Answer) -> bool:
    if answer.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/problem+json":
        return False
    try:
        problem = json.loads(answer.body)
    except ValueError:
        return False
    return isinstance(problem, dict) and problem.get("type") == KEY_PROBLEM_TYPE
