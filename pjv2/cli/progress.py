"""Following a session: its log as JSON lines, or in words what is being waited for and until when.

It refuses to trust its own driver: whoever works on the session, this process or another one on the same store, what is told is the
log, each event once and in order.

Law: whatever ends the following, an interruption too, leaves the session as it stands in the store, and says how to go on.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pjv2 import session as model
from pjv2.backends.heed import heeding
from pjv2.cli.command import Until
from pjv2.errors import NotNow
from pjv2.session.events import Alarm, Outcome
from pjv2.session.facts import BURIED
from pjv2.session.receive import Stage as ReceiverStage
from pjv2.session.receive import approve_until, awaits_approval
from pjv2.session.send import Stage as SenderStage
from pjv2.units import Instant, Sats, SessionId

if TYPE_CHECKING:
    from pjv2.app import Payjoin, PublicEvent
    from pjv2.cli.command import Cli
    from pjv2.session.events import Event
    from pjv2.session.monitor import Sighting
    from pjv2.session.needs import Command

EXIT_CODES: Mapping[Outcome, int] = {
    Outcome.PAID: 0,
    Outcome.PAID_BY_FALLBACK: 0,
    Outcome.PAID_OTHERWISE: 0,
    Outcome.CANCELLED: 0,
    Outcome.REFUSED: 3,
    Outcome.CONFLICTED: 3,
    Outcome.EXPIRED: 5,
}

STEP = 45.0
"""Seconds that a command may work on a session before it leaves the rest to `pjv2 run`: longer than a directory holds a poll."""

_LETTING_GO = 5.0


# ---------------------------------------------------------------- pure


@dataclass(frozen=True, slots=True)
class Waiting:
    """What a session waits for, until when, and what happens then."""

    what: str
    until: Instant | None = None
    then: str = ""

    def __str__(self) -> str:
        if self.until is None:
            return self.what
        return f"{self.what}, until {moment(self.until)}" + (f"; then {self.then}" if self.then else "")


def moment(at: Instant) -> str:
    """An instant for people."""
    from pjv2.cli.output import utc

    return f"{utc(at)[:16].replace('T', ' ')} UTC"


def payment_in_sight(state: model.State) -> Sighting | None:
    """The transaction in sight that pays, a confirmed one first."""
    paying = {"payjoin", "original", "bumped"} if isinstance(state, model.Receiver) else {"payjoin", "original"}
    if isinstance(state, model.Receiver) and state.accepted is None:
        paying.add("address")
    found = [entry for entry in state.sightings if entry.what in paying]
    return min(found, key=lambda entry: entry.height is None, default=None)


def reached(state: model.State, until: Until, tip: int) -> bool:
    """Whether the session came as far as that; `tip` is the height of the best block, as far as it is known."""
    if state.closed is not None:
        return True
    seen = payment_in_sight(state)
    if seen is None or until is Until.CLOSED:
        return False
    if until is Until.SEEN:
        return True
    return seen.height is not None and depth(seen, tip) >= state.created.policy.confirmations


def depth(seen: Sighting, tip: int) -> int:
    """Confirmations: at least one once it is in a block, however old the tip that we know is."""
    return 0 if seen.height is None else max(1, tip - seen.height + 1)


def short_of(state: model.State) -> Sats:
    """What a payment to us that ended the session lacks, beyond our own share of a payjoin's fee; 0: nothing."""
    closed = state.closed
    if closed is None or not isinstance(state, model.Receiver) or closed.outcome is not Outcome.PAID_OTHERWISE:
        return 0
    return max(0, (closed.amount_requested or 0) - closed.amount_received)


def waiting_for(state: model.State, tip: int = 0) -> Waiting:
    """In words, for a person who watches."""
    if state.closed is not None:
        return Waiting(model.status(state))
    seen = payment_in_sight(state)
    if seen is not None:
        name = {"payjoin": "the payjoin", "original": "the Original"}.get(seen.what, "the payment")
        if seen.height is None:
            return Waiting(f"{name} is in the mempool: waiting for a block")
        return Waiting(f"{name} has {depth(seen, tip)} of {BURIED} confirmations")
    if isinstance(state, model.Receiver):
        return _receiver_waits(state)
    return _sender_waits(state)


def _receiver_waits(state: model.Receiver) -> Waiting:  # noqa: PLR0911  one return per case
    created, stage = state.created, ReceiverStage
    match state.stage:
        case stage.INITIALIZED if state.spoiled is not None:
            return Waiting("the mailbox holds junk: waiting for a payment to the address", state.watch_over)
        case stage.INITIALIZED if state.expired:
            return Waiting("expired: looking into the mailbox once more")
        case stage.INITIALIZED:
            return Waiting("waiting for the payer", created.expires, "the request expires")
        case stage.CHECKED_ORIGINAL if awaits_approval(state):
            ways = f"pjv2 approve {state.session[:8]} or pjv2 refuse {state.session[:8]}"
            until = approve_until(state) or created.expires
            return Waiting(f"waiting for your approval ({ways})", until, "the Original is broadcast")
        case stage.MONITOR if not state.found and not state.fallback_broadcasting:
            return Waiting("waiting for the payer to sign", state.deadline, "his Original is broadcast")
        case stage.MONITOR | stage.PENDING_FALLBACK if state.fallback_rejected is not None:
            ours = "; our own coins are spent back to us" if state.way_outs else ""
            return Waiting(f"{_refused(state.fallback_rejected)}{ours}")
        case stage.MONITOR | stage.PENDING_FALLBACK if state.fallback_broadcasting:
            return Waiting("waiting for the network to take the Original")
        case _:
            return Waiting(model.status(state))


def _refused(reason: str) -> str:
    return f"the network does not take the Original now ({reason}): it is tried again"


def _sender_waits(state: model.Sender) -> Waiting:
    stage = SenderStage
    if state.fallback_rejected is not None and not state.reclaims:
        return Waiting(f"{_refused(state.fallback_rejected)}, and its coins stay leased")
    match state.stage:
        case stage.POLLING_FOR_PROPOSAL:
            then = "" if state.created.policy.require_payjoin else "the Original pays"
            return Waiting("waiting for a proposal", state.created.expires, then)
        case stage.PENDING_FALLBACK if state.no_broadcast or (
            state.created.policy.require_payjoin and not state.broadcast_now
        ):
            return Waiting(
                "there is no payjoin; the coins stay leased until the receiver broadcasts the Original, or you"
            )
        case _:
            return Waiting(model.status(state))


# ---------------------------------------------------------------- following


class Follower:
    """One session's log as it grows. `since`: how many events were told before."""

    def __init__(self, cli: Cli, pj: Payjoin, session: SessionId, *, since: int = 0) -> None:
        self.cli = cli
        self.pj = pj
        self.session = session
        self.tip = 0
        self._told = since
        self._state: model.State | None = None
        self._said = ""
        self._hinted = ("", "")

    @property
    def state(self) -> model.State:
        if self._state is None:
            raise RuntimeError("the log was not read yet")
        return self._state

    async def catch_up(self) -> None:
        """Tell what the log has and nobody was told yet."""
        records = await self.pj.driver.store.load(self.session)
        for record in records[0 if self._state is None else self._state.seq :]:
            event = model.decode(record.name, record.data)
            self._state = model.evolve(self._state, event)
            if record.seq >= self._told:
                self._tell(record.name, event)
        if payment_in_sight(self.state) is not None:
            with suppress(NotNow):  # as far as it is known
                self.tip = (await heeding(self.pj.driver.chain.tip())).height
        if not self.cli.json and (words := str(waiting_for(self.state, self.tip))) != self._said:
            self._said = words
            self.cli.out.say(words)

    async def caught_up(self) -> bool:
        """`catch_up`, unless the store is away: then that is told, and the log is read another time."""
        try:
            await self.catch_up()
        except NotNow as exc:
            self._retry("store", str(exc))
            return False
        return True

    def _tell(self, name: str, event: Event) -> None:
        if self.cli.json:
            facts = dict(model.public_event(self.state, event))
            self.cli.out.result(name, at=event.at, session=self.session, **_without_head(facts))
        elif self.cli.verbose or isinstance(event, Alarm):
            self.cli.out.say(model.explain(self.state, [event])[0])

    def hint(self, fact: PublicEvent) -> None:
        """What is no part of the log: a service is away, a directory changed its key."""
        if fact.event not in {"NotNow", "KeyRotated", "Error"}:
            return
        if self.cli.json:
            self.cli.out.result(fact.event, at=fact.at, session=self.session, **_without_head(fact.facts))
            return
        self._retry(str(fact.facts.get("what")), str(fact.facts.get("why")))

    def kept_waiting(self, why: str) -> None:
        """What keeps this process from working on the session; told once."""
        if self.cli.json and ("session", why) != self._hinted:
            self._hinted = ("session", why)
            self.cli.out.result("NotNow", session=self.session, what="session", why=why)
        elif not self.cli.json:
            self._retry("session", why)

    def _retry(self, what: str, why: str) -> None:
        if (what, why) != self._hinted:
            self._hinted = (what, why)
            self.cli.out.say(f"Trying again: {why}")

    def result(self) -> None:
        """How far it came, as a result for people."""
        closed, seen = self.state.closed, payment_in_sight(self.state)
        if self.cli.json:
            return
        if closed is not None:
            received = f": {closed.amount_received:_} sat" if closed.amount_received else ""
            self.cli.out.show(f"{closed.outcome.value}{received}" + (f" in {closed.txid}" if closed.txid else ""))
            if missing := short_of(self.state):
                self.cli.out.show(f"{missing:_} sat less than was asked for")
            for outpoint in closed.channels:
                self.cli.out.show(f"channel {outpoint}")
        elif seen is not None:
            where = "in the mempool" if seen.height is None else f"in block {seen.height}"
            self.cli.out.show(f"{seen.what} {seen.txid} {where}")


def _without_head(facts: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in facts.items() if name not in {"event", "at", "session"}}


def resume_words(cli: Cli, session: SessionId) -> str:
    """How a session goes on after this process."""
    return f"It goes on with: {cli.words('resume', session[:8])} (one pass), or {cli.words('run')}"


async def follow(cli: Cli, pj: Payjoin, session: SessionId, until: Until) -> int:
    """Drive a session until it came so far, and tell its log meanwhile; answers the exit code.

    Where another worker drives it, its log is read from the store.
    """
    cli.resume = resume_words(cli, session)
    driver = pj.driver
    follower = Follower(cli, pj, session)

    async def drive() -> None:
        while True:
            try:
                state = await driver.drive(session, lambda state: reached(state, until, follower.tip))
                if reached(state, until, follower.tip):
                    return
            except NotNow as exc:  # another worker has it, or its world is away
                follower.kept_waiting(str(exc))
                await driver.clock.sleep(exc.after if exc.after is not None else driver.pace.retry)

    async with pj.hub.listening(session) as queue:
        driving = asyncio.create_task(drive())
        try:
            while True:
                if await follower.caught_up() and reached(follower.state, until, follower.tip):
                    break
                if driving.done():
                    driving.result()
                    driving = asyncio.create_task(drive())
                await _news(follower, queue, driving)
            driver.wake(session)
            await asyncio.wait({driving}, timeout=_LETTING_GO)
        finally:
            await _let_go(driving)
    await follower.catch_up()
    follower.result()
    closed = follower.state.closed
    if closed is None:
        cli.out.say(resume_words(cli, session)) if until is not Until.CLOSED else None
        return 0
    return EXIT_CODES[closed.outcome]


async def _let_go(driving: asyncio.Task[Any]) -> None:
    """Stop a driver. It is told again when it does not end: an HTTP client may answer and forget that it was told."""
    while not driving.done():
        driving.cancel()
        await asyncio.wait({driving}, timeout=_LETTING_GO)
    if not driving.cancelled():
        driving.exception()  # looked at, so that asyncio does not report it as lost


async def _news(follower: Follower, queue: asyncio.Queue[PublicEvent], driving: asyncio.Task[None]) -> None:
    """Until this process tells something, its driver ends, or it is time to look what others did."""
    clock, pace = follower.pj.driver.clock, follower.pj.driver.pace
    following = asyncio.create_task(queue.get())
    looking = asyncio.create_task(clock.sleep(min(pace.watch, 5.0)))
    try:
        await asyncio.wait({following, looking, driving}, return_when=asyncio.FIRST_COMPLETED)
        if following.done():
            follower.hint(following.result())
            while not queue.empty():
                follower.hint(queue.get_nowait())
    finally:
        for task in (following, looking):
            task.cancel()
        await asyncio.gather(following, looking, return_exceptions=True)


async def step(cli: Cli, pj: Payjoin, session: SessionId, *commands: Command) -> model.State:
    """Apply what a person asks for, work on its consequences for a while, and tell them; the rest is `pjv2 run`'s."""
    cli.resume = resume_words(cli, session)
    driver = pj.driver
    follower = Follower(cli, pj, session, since=len(await driver.store.load(session)))
    for command in commands:
        await driver.command(session, command)
    await follower.catch_up()
    async with pj.hub.listening(session) as queue:
        deadline = driver.clock.now() + STEP
        driving = asyncio.create_task(driver.drive(session, model.is_closed, deadline=deadline, once=True))
        try:
            while not driving.done():
                following = asyncio.create_task(queue.get())
                await asyncio.wait({following, driving}, return_when=asyncio.FIRST_COMPLETED)
                if following.done():
                    follower.hint(following.result())
                    await follower.catch_up()
                following.cancel()
                await asyncio.gather(following, return_exceptions=True)
            driving.result()
        except NotNow as exc:
            cli.out.say(f"The rest is done later: {exc}")
        finally:
            await _let_go(driving)
    await follower.catch_up()
    follower.result()
    if follower.state.closed is None:
        cli.out.say(resume_words(cli, session))
    return follower.state


async def choose(pj: Payjoin, beginning: str) -> SessionId:
    """The one session whose id begins so. Raises WrongUsage."""
    from pjv2.cli.sessions import find

    _, row = await find(pj.driver.store, beginning)
    return row.session
