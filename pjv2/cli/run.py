"""`pjv2 run`: drive every open session until told to stop."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pjv2.cli.command import Cli

if TYPE_CHECKING:
    from pjv2.app import Payjoin
    from pjv2.ports import Notify
    from pjv2.units import Instant, SessionId


async def run(cli: Cli) -> None:
    """Drive every open session until stopped; safe beside other commands and other workers on the same store and wallet."""
    import asyncio

    cli.resume = f"Start it again with: {cli.words('run')}"
    async with cli.payjoin() as pj:
        rows = await pj.driver.store.rows(open_only=True)
        cli.out.result(
            "Started", f"Driving {len(rows)} open sessions; Ctrl-C stops.", open=len(rows), network=pj.config.network
        )
        with hearing(pj, cli):
            try:
                await pj.run()
            except asyncio.CancelledError:
                # Stopping is how this command ends, and what was under way is in the store.
                left = len(await pj.driver.store.rows(open_only=True))
                cli.out.result("Stopped", f"Stopped; {left} sessions are open.", open=left)


@dataclass(frozen=True, slots=True)
class _Teller:
    """Passes every fact on, and tells it: a line for programs, a few words for people."""

    further: Notify
    tell: Callable[[str, Instant, SessionId | None, Mapping[str, Any]], None]

    def told(self, event: str, at: Instant, session: SessionId | None, facts: Mapping[str, Any]) -> None:
        self.further.told(event, at, session, facts)
        self.tell(event, at, session, facts)


@contextmanager
def hearing(pj: Payjoin, cli: Cli) -> Iterator[None]:
    """Tell what happens to any session meanwhile."""
    from pjv2.cli.output import utc

    said: set[str] = set()

    def tell(event: str, at: Instant, session: SessionId | None, told: Mapping[str, Any]) -> None:
        facts = {name: value for name, value in told.items() if name not in {"event", "at", "session"}}
        if cli.json:
            cli.out.result(event, at=at, session=session, **facts)
        elif event == "NotNow" and facts.get("what") in ("store", "session") and not cli.verbose:
            # The poller tells it once per session; a person hears it once, however many sessions wait for the same thing.
            if (why := str(facts["why"])) not in said:
                said.add(why)
                cli.out.say(f"{utc(at)[11:19]}  {(session or '')[:8]:8}  Trying again: {why}")
        elif event not in {"NotNow", "KeyRotated"} or cli.verbose:
            said.clear()
            shown = " ".join(
                str(facts[name]) for name in ("what", "outcome", "why", "txid", "detail") if facts.get(name)
            )
            cli.out.say(f"{utc(at)[11:19]}  {(session or '')[:8]:8}  {event} {shown}".rstrip())

    before = pj.driver.notify
    pj.driver.notify = _Teller(before, tell)
    try:
        yield
    finally:
        pj.driver.notify = before
