"""`pjv2 relays [check]`: whom mail goes through."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from pjv2.cli.command import Cli
from pjv2.errors import NotNow, PayjoinError, WrongUsage

if TYPE_CHECKING:
    from pjv2.backends.mailroom import HttpMailroom, KeyStanding, Service
    from pjv2.backends.mailroom.health import Health
    from pjv2.ports import Store
    from pjv2.units import Instant


class What(StrEnum):
    """What `pjv2 relays` is asked to do besides listing."""

    CHECK = "check"


@dataclass(frozen=True, slots=True)
class Line:
    """A relay or directory as it is listed. `works` is None where nobody tried; times in seconds since the epoch."""

    url: str
    role: Literal["relay", "directory"]
    operator: str | None
    health: Literal["good", "resting", "failed"]
    wait: float = 0.0
    failures: int = 0
    last_success: Instant | None = None
    key_age: float | None = None
    key_source: str | None = None
    works: bool | None = None
    said: str = ""


async def run(
    cli: Cli,
    what: Annotated[What | None, typer.Argument(metavar="[check]", help="Try each of them now.")] = None,
) -> None:
    """List the configured relays and directories: operator, health, last success, age of keys. `check` tries them."""
    from rich.text import Text

    from pjv2.backends.mailroom import HttpMailroom
    from pjv2.cli.output import plain, table, utc
    from pjv2.cli.sessions import reading
    from pjv2.opening import open_mailroom

    async with reading(cli.config) as store:
        mailroom = await open_mailroom(cli.config, store)
        try:
            if not isinstance(mailroom, HttpMailroom):
                raise WrongUsage("this mailroom has no relays of its own to list")
            found = await listed(mailroom, store, try_them=what is What.CHECK)
        finally:
            await mailroom.close()
    drawn = table("role", "url", "operator", "health", "last success (UTC)", "keys")
    for line in found:
        if cli.out.json:
            cli.out.result("Relay", **_facts(line))
        last = "" if line.last_success is None else utc(line.last_success)[:16].replace("T", " ")
        keys = "" if line.key_age is None else f"{_span(line.key_age)} old, {line.key_source}"
        health = Text(_health(line), {"good": "green", "resting": "yellow", "failed": "red"}[line.health])
        drawn.add_row(line.role, Text(line.url), Text(plain(line.operator or "unknown")), health, last, keys)
    if not cli.out.json:
        cli.out.show(drawn)
    if what is What.CHECK and not any(line.works for line in found):
        raise NotNow("no relay and no directory answered: is this machine online?")


def _facts(line: Line) -> dict[str, Any]:
    from pjv2.cli.output import utc

    return {
        "url": line.url,
        "role": line.role,
        "operator": line.operator,
        "health": line.health,
        "wait": round(line.wait, 1),
        "failures": line.failures,
        "last_success": None if line.last_success is None else utc(line.last_success),
        "key_age": None if line.key_age is None else round(line.key_age, 1),
        "key_source": line.key_source,
        "works": line.works,
        "said": line.said or None,
    }


def _health(line: Line) -> str:
    words: str = line.health
    if line.health == "resting":
        words = f"left alone for {_span(line.wait)} after {line.failures} failures"
    if line.works:
        words = f"answers{'' if line.health == 'good' else f', {words}'}"
    return f"{words}: {line.said}" if line.said else words


def _span(seconds: float) -> str:
    for size, unit in ((86_400, "d"), (3_600, "h"), (60, "min")):
        if seconds >= size:
            return f"{seconds / size:.0f} {unit}"
    return f"{seconds:.0f} s"


# ---------------------------------------------------------------- what is known, and what is tried


async def listed(
    mailroom: HttpMailroom, store: Store | None, *, try_them: bool = False, now: Instant | None = None
) -> tuple[Line, ...]:
    """Relays first, then directories, with what earlier runs learnt; `try_them` asks each of them now, and keeps when it answered."""
    from pjv2.backends.mailroom.mailroom import keep_answers, kept_answers
    from pjv2.backends.system import SystemClock

    at = SystemClock().now() if now is None else now
    tried: dict[str, str] = {}
    if try_them:
        tried = await _tried(mailroom)
        answered = {url: at for url, said in tried.items() if not said}
        if store is not None and answered:
            await keep_answers(store, answered)
    successes = await kept_answers(store)
    standings = [await _standing(mailroom, store, directory) for directory in mailroom.directories]
    for standing in standings:
        if standing is not None and standing.fetched:
            for url in (standing.directory, *standing.relays):
                successes[url] = max(successes.get(url, 0.0), standing.fetched)
    health = await _health_of(store)
    relays = [_line(relay, "relay", health, successes, tried, at) for relay in mailroom.relays]
    directories = [
        _line(directory, "directory", health, successes, tried, at, standing)
        for directory, standing in zip(mailroom.directories, standings, strict=True)
    ]
    return (*relays, *directories)


def _line(
    service: Service,
    role: Literal["relay", "directory"],
    health: Health,
    successes: Mapping[str, Instant],
    tried: Mapping[str, str],
    now: Instant,
    standing: KeyStanding | None = None,
) -> Line:
    # A relay may be left alone for one directory only: the name for that begins as its own does.
    own = f"{role} {service.url}"
    names = [name for name in health.to_dict() if name == own or name.startswith(f"{own} for ")]
    wait, works = health.wait(now, *names), None if service.url not in tried else not tried[service.url]
    return Line(
        url=service.url,
        role=role,
        operator=service.operator or service.domain,
        health="failed" if works is False else "resting" if wait > 0 else "good",
        wait=wait,
        failures=health.failures(*names),
        last_success=successes.get(service.url),
        key_age=None if standing is None else max(now - standing.fetched, 0.0),
        key_source=None if standing is None else standing.source.value,
        works=works,
        said=tried.get(service.url, ""),
    )


async def _tried(mailroom: HttpMailroom) -> dict[str, str]:
    """What each service said when it was tried; empty where it works. A relay works if it carries to any directory."""
    import asyncio

    from pjv2.backends.system import SystemEntropy
    from pjv2.doctor import round_trip

    said: dict[str, str] = {}

    async def asked(directory: Service) -> Sequence[tuple[str, str]]:
        try:
            keys = (await mailroom.check_keys(directory.url)).keys
            if not directory.url.startswith("https://"):
                # A directory on this machine gives its keys to nobody through a relay: a message has to go there instead.
                carried = await round_trip(mailroom, directory.url, keys, SystemEntropy())
                return [(directory.url, ""), *((url, "") for url in carried)]
            checks = await mailroom.check_relays(directory.url)
        except PayjoinError as exc:
            return [(directory.url, str(exc))]
        answers = [(check.relay.url, "" if check.works else check.said or "does not answer") for check in checks]
        # What a relay brought, the directory gave.
        answered = any(check.works for check in checks)
        return [(directory.url, "" if answered else "no relay could ask it"), *answers]

    for answers in await asyncio.gather(*(asked(directory) for directory in mailroom.directories)):
        for url, words in answers:
            said[url] = "" if said.get(url) == "" else words
    return said


async def _standing(mailroom: HttpMailroom, store: Store | None, directory: Service) -> KeyStanding | None:
    """The keys that are kept for a directory, asking nobody."""
    from pjv2.backends.mailroom.keys import kept_keys

    known = {standing.directory: standing for standing in mailroom.key_standings()}
    if directory.url in known or store is None:
        return known.get(directory.url)
    return await kept_keys(store, directory.url)


async def _health_of(store: Store | None) -> Health:
    from pjv2.backends.mailroom.mailroom import kept_health
    from pjv2.backends.system import SystemEntropy

    return await kept_health(store, SystemEntropy())
