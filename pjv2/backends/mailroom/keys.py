"""The OHTTP keys of directories: fetched through two relays of different operators, used if both were told the same.

A directory that gives each client a key of its own can follow it through every relay. Two strangers who ask and hear the same key
make that visible. With one relay the key is used and the standing carries a warning; a directory on this machine is asked directly;
a key file asks nobody.

Keys are kept for the next run, renewed while they are young enough to be used still, and forgotten when the directory disowns them.

Law: two different answers are no answer.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Protocol

from pjv2.backends.mailroom.carrier import CarrierTrouble, Trouble
from pjv2.backends.mailroom.health import Health
from pjv2.backends.mailroom.operators import Operators, Service, is_loopback
from pjv2.backends.mailroom.tunnel import FetchRefused
from pjv2.errors import NotNow, PeerMistake, WrongUsage
from pjv2.ports import Clock
from pjv2.units import Instant
from pjv2.wire.ohttp import KeyConfig

RENEW_AFTER = 6 * 3600.0
KEEP_FOR = 48 * 3600.0
"""Keys that could not be renewed are used up to this age."""
_RENEW_ONE_RELAY_AFTER = 900.0
_DISAGREED_AFTER = 60.0


class KeyCache(Protocol):
    """Where public values are kept between runs, by name. The store is one."""

    async def get(self, name: str) -> str | None: ...

    async def put(self, name: str, value: str | None) -> None: ...


class Source(StrEnum):
    """How keys came to us."""

    TWO_RELAYS = "two relays"
    ONE_RELAY = "one relay"
    LOOPBACK = "this machine"
    FILE = "key file"


@dataclass(frozen=True, slots=True)
class KeyStanding:
    """How far the keys of a directory can be relied on; `warning` is a sentence for `doctor`, or empty."""

    directory: str
    keys: KeyConfig
    source: Source
    fetched: Instant
    relays: tuple[str, ...] = ()
    warning: str = ""


def relay_name(relay: str, directory: str | None = None) -> str:
    """What a relay is called in `Health`, alone or for one directory."""
    return f"relay {relay}" if directory is None else f"relay {relay} for {directory}"


def directory_name(directory: str) -> str:
    """What a directory is called in `Health`."""
    return f"directory {directory}"


def read_keys_file(path: Path) -> KeyConfig:
    """The keys in a file as a directory serves them (74 bytes). Raises WrongUsage."""
    try:
        return KeyConfig.parse(path.read_bytes())
    except OSError as exc:
        raise WrongUsage(f"ohttp_keys_file {str(path)!r} cannot be read") from exc
    except PeerMistake as exc:
        raise WrongUsage(f"ohttp_keys_file {str(path)!r} holds no usable OHTTP keys: {exc}") from exc


class KeyBook:
    """The keys we know, and how they are come by."""

    def __init__(
        self,
        *,
        fetch: Callable[[str, str], Awaitable[KeyConfig]],
        fetch_loopback: Callable[[str], Awaitable[KeyConfig]],
        relays_for: Callable[[Service], Sequence[Service]],
        operators: Operators,
        health: Callable[[], Health],
        clock: Clock,
        cache: KeyCache | None = None,
        fixed: KeyConfig | None = None,
    ) -> None:
        self._fetch = fetch
        self._fetch_loopback = fetch_loopback
        self._relays_for = relays_for
        self._operators = operators
        self._health = health
        self._clock = clock
        self._cache = cache
        self._fixed = fixed
        self._known: dict[str, KeyStanding] = {}
        self._locks: dict[str, asyncio.Lock] = {}

    def standings(self) -> tuple[KeyStanding, ...]:
        """What is known of each directory asked so far, with warnings."""
        return tuple(self._known.values())

    async def get(self, directory: Service) -> KeyStanding:
        """The keys to use for a new request to `directory`. Raises NotNow, WrongUsage."""
        if self._fixed is not None:
            standing = KeyStanding(directory.url, self._fixed, Source.FILE, self._clock.now())
            return self._known.setdefault(directory.url, standing)
        async with self._locks.setdefault(directory.url, asyncio.Lock()):
            known = self._known.get(directory.url) or await self._read_cache(directory.url)
            now = self._clock.now()
            age = None if known is None else now - known.fetched
            if known is not None and age is not None and 0 <= age < self._renew_after(directory, known):
                self._known[directory.url] = known
                return known
            try:
                standing = await self._fetch_standing(directory, now)
            except NotNow:
                if known is None or age is None or not 0 <= age < KEEP_FOR:
                    raise
                # Old keys are better than none: if the directory changed them, it says so at the first use.
                return known
            self._known[directory.url] = standing
            await self._write_cache(standing)
            return standing

    async def forget(self, directory: str, keys: KeyConfig) -> None:
        """Drop these keys: the directory does not know them any more."""
        known = self._known.get(directory) or await self._read_cache(directory)
        if known is not None and known.keys == keys and known.source is not Source.FILE:
            self._known.pop(directory, None)
            if self._cache is not None:
                await self._cache.put(_cache_name(directory), None)

    def _renew_after(self, directory: Service, known: KeyStanding) -> float:
        if known.source is Source.ONE_RELAY and self._has_two_operators(directory):
            return _RENEW_ONE_RELAY_AFTER
        return RENEW_AFTER

    def _has_two_operators(self, directory: Service) -> bool:
        relays = self._relays_for(directory)
        return any(self._operators.may_pair(one, other) for one in relays for other in relays)

    async def _fetch_standing(self, directory: Service, now: Instant) -> KeyStanding:
        if directory.url.startswith("http://"):
            if not is_loopback(directory.url):
                raise WrongUsage(
                    f"the keys of {directory.url} cannot be fetched safely over plain HTTP: give ohttp_keys_file, or use https"
                )
            return await self._ask_loopback(directory, now)
        answers, failures = await self._ask_relays(directory)
        self._blame(directory, bool(answers), failures)
        if not answers:
            raise _nobody(directory, failures)
        relays = tuple(relay.url for relay, _ in answers)
        keys = answers[0][1]
        if any(other != keys for _, other in answers):
            raise NotNow(
                f"{directory.url} gave different OHTTP keys through {' and '.join(relays)}: they could tell clients apart, so none is used",
                after=_DISAGREED_AFTER,
            )
        if len(answers) == 2:
            return KeyStanding(directory.url, keys, Source.TWO_RELAYS, now, relays)
        why = "the others could not be asked" if self._has_two_operators(directory) else "there is no second operator"
        warning = (
            f"the OHTTP keys of {directory.url} were fetched through one relay only, {relays[0]} ({why}): "
            "a directory that gives each client its own key would not be noticed. Add a relay of another operator."
        )
        return KeyStanding(directory.url, keys, Source.ONE_RELAY, now, relays, warning)

    async def _ask_loopback(self, directory: Service, now: Instant) -> KeyStanding:
        try:
            keys = await self._fetch_loopback(directory.url)
        except (CarrierTrouble, FetchRefused) as exc:
            raise NotNow(f"the directory {directory.url} on this machine gave no keys: {exc}") from exc
        return KeyStanding(directory.url, keys, Source.LOOPBACK, now)

    async def _ask_relays(
        self, directory: Service
    ) -> tuple[list[tuple[Service, KeyConfig]], list[tuple[Service, CarrierTrouble | FetchRefused]]]:
        answers: list[tuple[Service, KeyConfig]] = []
        failures: list[tuple[Service, CarrierTrouble | FetchRefused]] = []
        for relay in self._relays_for(directory):
            if answers and not self._operators.may_pair(relay, answers[0][0]):
                continue
            try:
                answers.append((relay, await self._fetch(relay.url, directory.url)))
            except (CarrierTrouble, FetchRefused) as exc:
                failures.append((relay, exc))
            if len(answers) == 2:
                break
        return answers, failures

    def _blame(
        self, directory: Service, answered: bool, failures: Sequence[tuple[Service, CarrierTrouble | FetchRefused]]
    ) -> None:
        """Count failures against relays only where the same was possible through another one."""
        health, now = self._health(), self._clock.now()
        for relay, exc in failures:
            if isinstance(exc, CarrierTrouble):
                if answered and exc.trouble is Trouble.CONNECT:
                    health.failed(relay_name(relay.url), now)
                elif answered:
                    health.failed(relay_name(relay.url, directory.url), now)
            elif not exc.by_directory:
                health.failed(relay_name(relay.url, directory.url), now, exc.retry_after)
        if not answered and any(isinstance(exc, FetchRefused) and exc.by_directory for _, exc in failures):
            health.failed(directory_name(directory.url), now)

    async def _read_cache(self, directory: str) -> KeyStanding | None:
        return None if self._cache is None else await kept_keys(self._cache, directory)

    async def _write_cache(self, standing: KeyStanding) -> None:
        if self._cache is not None:
            value = {
                "keys": standing.keys.encode().hex(),
                "source": standing.source.value,
                "fetched": standing.fetched,
                "relays": list(standing.relays),
                "warning": standing.warning,
            }
            await self._cache.put(_cache_name(standing.directory), json.dumps(value, sort_keys=True))


async def kept_keys(cache: KeyCache, directory: str) -> KeyStanding | None:
    """The keys that an earlier run kept for a directory, whatever their age; None where there are none that can be read."""
    text = await cache.get(_cache_name(directory))
    if text is None:
        return None
    try:
        match json.loads(text):
            case {
                "keys": str(keys),
                "source": str(source),
                "fetched": int() | float() as fetched,
                "relays": [*relays],
                "warning": str(warning),
            }:
                return KeyStanding(
                    directory,
                    KeyConfig.parse(bytes.fromhex(keys)),
                    Source(source),
                    float(fetched),
                    tuple(str(relay) for relay in relays),
                    warning,
                )
    except (ValueError, PeerMistake):
        pass  # a cache is fetched again, not repaired
    return None


def _cache_name(directory: str) -> str:
    return f"ohttp keys {directory}"


def _nobody(directory: Service, failures: Sequence[tuple[Service, CarrierTrouble | FetchRefused]]) -> NotNow:
    if not failures:
        return NotNow(f"no relay is free to ask for the keys of {directory.url}")
    if all(isinstance(exc, CarrierTrouble) and exc.trouble is Trouble.CONNECT for _, exc in failures):
        names = ", ".join(relay.url for relay, _ in failures)
        return NotNow(
            f"no relay could be reached to ask for the keys of {directory.url} ({names}): is this machine online?"
        )
    reasons = "; ".join(
        f"{relay.url} {exc}" if isinstance(exc, CarrierTrouble) else str(exc) for relay, exc in failures
    )
    waits = [exc.retry_after for _, exc in failures if isinstance(exc, FetchRefused) and exc.retry_after is not None]
    return NotNow(f"no relay brought the keys of {directory.url}: {reasons}", after=min(waits, default=None))
