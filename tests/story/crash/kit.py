"""The crash story's workshop: a process that can be stopped before and after every event and every effect, and the world around it.

A `Switch` stands between a driver and its ports. It names every point at which money, a peer or the log changes ("append
ProposalPosting", "lock (2)", "POST reply"), and at one of them it ends the process: from then on no call of that process goes
through, its claim stays behind, and `Play` starts the person's installation again from disk.

Nature is part of the play: blocks come when every session that must see a transaction has written down that it saw it, clocks move
when a session has written down what the story waits for. Nobody sleeps.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import shutil
import sqlite3
import time
import uuid
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping
from contextlib import AsyncExitStack
from dataclasses import dataclass, field, replace
from hashlib import sha256
from pathlib import Path
from typing import Any

from pjv2 import session as model
from pjv2 import start
from pjv2.backends.files import TurnLock
from pjv2.driver import Driver
from pjv2.errors import PayjoinError
from pjv2.lab.audit import BrokenPromise, audit
from pjv2.lab.world import LAB_PACE, Party, World
from pjv2.ports import Stored, Wallet
from pjv2.psbt.plan import ChannelOrder
from pjv2.session.events import Policy
from pjv2.testing.entropy import SeededEntropy
from pjv2.testing.memory_mailroom import MemoryMailroom
from pjv2.units import FeeRate, Network, SessionId
from tests.story.lab.kit import PAPER, Pair, wallet_files

PACE = replace(LAB_PACE, watch=0.5, retry=0.05, retry_max=0.2, node_timer=60.0)
"""Nobody waits half a second: whenever the chain moved, nature moves the clock to the next look at it."""
LONG_POLL = 0.15
"""Seconds that an empty mailbox keeps a reader waiting: real time, for the readers of a story are few."""
EXPIRE_IN = 3_600
PAST_DEADLINE = EXPIRE_IN + 1_400.0
AMOUNT = 150_000
PATIENCE = 240.0
"""Real seconds before a story counts as hanging; none takes more than a few."""


class Killed(BaseException):
    """The process ended here. Not an Exception: nothing of it may catch this."""


# ---------------------------------------------------------------- where a process can be stopped


class Switch:
    """One run of one process: it names the points that pass by, and ends the run at `armed` ("before append Seen").

    With `pauses` the run is only held there, until `resumed` is set: a worker that the scheduler forgot for a while.
    """

    def __init__(
        self, armed: str | None = None, *, end: Callable[[], None] | None = None, pauses: bool = False
    ) -> None:
        self.armed = armed
        self.pauses = pauses
        self.paused, self.resumed = asyncio.Event(), asyncio.Event()
        self.points: list[str] = []
        self.dead = False
        self.owner: tuple[SessionId, str] | None = None
        self._end = end
        self._counts: Counter[str] = Counter()

    async def through(
        self, what: str | None, act: Callable[[], Awaitable[Any]], done: Callable[[Any], Awaitable[None]] | None = None
    ) -> Any:
        if self.paused.is_set():
            await self.resumed.wait()
        if self.dead:
            raise Killed(self.armed)
        label = None
        if what is not None:
            self._counts[what] += 1
            label = what if self._counts[what] == 1 else f"{what} ({self._counts[what]})"
            self.points.append(label)
            await self._maybe("before", label)
        answer = await act()
        if done is not None:
            await done(answer)
        if label is not None:
            await self._maybe("after", label)
        if self.dead:
            raise Killed(self.armed)
        return answer

    async def _maybe(self, when: str, label: str) -> None:
        if self.armed == f"{when} {label}":
            if self.pauses:
                self.paused.set()
                await self.resumed.wait()
                return
            if self._end is not None:
                self._end()
            self.dead = True
            raise Killed(self.armed)


class Watched:
    """A port behind a switch. `effects` names the calls that are points; every other call passes unless the process is dead."""

    def __init__(
        self,
        port: Any,
        switch: Switch,
        effects: Mapping[str, Callable[..., str | None]],
        done: Mapping[str, Callable[..., Awaitable[None]]] | None = None,
    ) -> None:
        self._port = port
        self._switch = switch
        self._effects = effects
        self._done = done or {}

    def __getattr__(self, name: str) -> Any:
        method = getattr(self._port, name)
        if not asyncio.iscoroutinefunction(method):
            return method
        label, done = self._effects.get(name), self._done.get(name)

        async def call(*args: Any, **kwargs: Any) -> Any:
            if name == "claim":
                self._switch.owner = (args[0], args[1])

            async def after(answer: Any) -> None:
                if done is not None:
                    await done(answer, *args, **kwargs)

            return await self._switch.through(
                label(*args, **kwargs) if label is not None else None, lambda: method(*args, **kwargs), after
            )

        return call


def plain(name: str) -> Callable[..., str | None]:
    return lambda *_args, **_kwargs: name


def once_each(name: Callable[..., tuple[str, Any]]) -> Callable[..., str | None]:
    """A point the first time that something is done to this very thing: repetitions depend on the time, the first does not."""
    met: set[tuple[str, Any]] = set()

    def label(*args: Any, **kwargs: Any) -> str | None:
        found = name(*args, **kwargs)
        if found in met:
            return None
        met.add(found)
        return found[0]

    return label


def _change(change: Any) -> str:
    return " + ".join(record.name for record in change.records)


def _mail(first: str, second: str) -> Callable[..., tuple[str, Any]]:
    boxes: list[str] = []

    def name(_directory: str, _keys: Any, request: Any, **_: Any) -> tuple[str, Any]:
        if request.short_id not in boxes:
            boxes.append(request.short_id)
        box = first if boxes.index(request.short_id) == 0 else second
        return f"{request.method} {box}", request.short_id

    return name


WALLET = {name: plain(name) for name in ("new_address", "lock", "unlock", "sign", "fund")}
CHANNELS = {name: plain(name) for name in ("connect", "reserve", "secure", "cancel", "disconnect", "abandon")}


def watched_ports(
    switch: Switch,
    *,
    store: Any,
    wallet: Any,
    chain: Any,
    mailroom: Any,
    channels: Any = None,
    stored: Callable[..., Awaitable[None]] | None = None,
    sent: Callable[..., Awaitable[None]] | None = None,
) -> dict[str, Any]:
    """Every port of a driver behind the switch; `stored` and `sent` are told what became durable and what was broadcast."""
    told = {"create": stored, "append": stored} if stored is not None else {}
    ports = {
        "store": Watched(
            store,
            switch,
            {"create": plain("create"), "append": lambda change: f"append {_change(change)}"},
            told,
        ),
        "wallet": Watched(wallet, switch, WALLET),
        "chain": Watched(
            chain,
            switch,
            {"broadcast": once_each(lambda tx, **_: ("broadcast", tx))},
            {"broadcast": sent} if sent is not None else {},
        ),
        "mailroom": Watched(mailroom, switch, {"exchange": once_each(_mail("mailbox", "reply"))}),
    }
    if channels is not None:
        ports["channels"] = Watched(channels, switch, CHANNELS)
    return ports


# ---------------------------------------------------------------- people and the world


class PostOffice:
    """One person's way into the shared mailroom; it tells the lab's directory what was posted, for the audit."""

    def __init__(self, mailroom: MemoryMailroom, world: World) -> None:
        self._mailroom = mailroom
        self._world = world

    async def directory(self) -> Any:
        return await self._mailroom.directory()

    async def exchange(self, directory: str, keys: Any, request: Any, **more: Any) -> Any:
        carried = await self._mailroom.exchange(directory, keys, request, **more)
        if request.method != "GET" and carried.reply.status == 200:
            posted: dict[str, set[bytes]] = self._world.directory.posted  # type: ignore[assignment]  # the lab's own dict
            posted.setdefault(request.short_id, set()).add(sha256(request.body).digest())
        return carried

    async def close(self) -> None:
        """The room is shared and stays open."""


@dataclass(slots=True)
class Person:
    """A party, its one session, and the run of its process."""

    party: Party
    begin: Callable[[Driver], Awaitable[SessionId]]
    switch: Switch
    session: SessionId | None = None
    state: model.State | None = None
    crashes: int = 0


@dataclass(frozen=True, slots=True)
class Copy:
    """Where older copies lie: of the database, and of the folder with the wallet's files."""

    database: Path
    wallet: Path


Told = Callable[["Play", str, str], Awaitable[None]]


@dataclass(frozen=True, slots=True)
class Ending:
    """How it ended for both, and how many channels are open at the end."""

    bob: str
    alice: str
    channels: int = 0


@dataclass(slots=True)
class Play:
    """Bob asks for money, Alice pays, and `victim`'s process ends at `armed`.

    `on(play, name, event)` is called after each event became durable, before the process can die of it.
    """

    victim: str = "bob"
    armed: str | None = None
    pair: Pair = PAPER
    both: bool = True
    """Whether both have this pair; else who is not stopped has a wallet on paper."""
    channels: int = 0
    policy: Policy = field(default_factory=Policy)
    witnesses: tuple[str, ...] = ("bob", "alice")
    on: Told | None = None
    held_until: str = ""
    """No block comes before Bob wrote down this event."""
    lapse: float = 0.0
    """Seconds to wait before the audit."""
    http: bool = False
    backups: bool = False
    """Keep a copy of the victim's disk from before each append: `copies[label]`."""

    world: World = field(init=False)
    people: dict[str, Person] = field(init=False, default_factory=dict)
    uri: asyncio.Future[str] = field(init=False)
    seen: set[tuple[str, str]] = field(init=False, default_factory=set)
    told: list[tuple[str, str]] = field(init=False, default_factory=list)
    copies: dict[str, Copy] = field(init=False, default_factory=dict)
    revive: Callable[[Person], Awaitable[None]] | None = None
    watch: Callable[[Person, model.State], None] | None = None
    two_contents: bool = False
    """A restored log may post a second content: the directory keeps the first one, and answers 200 (M10)."""
    mailroom: MemoryMailroom = field(init=False)
    _stack: AsyncExitStack = field(init=False, default_factory=AsyncExitStack)

    async def __aenter__(self) -> Play:
        entropy = SeededEntropy("the crash story")
        self.world = await self._stack.enter_async_context(World(entropy=entropy, long_poll=LONG_POLL))
        self.mailroom = MemoryMailroom(long_poll=LONG_POLL, clock=self.world.clock.now, rng=entropy)
        self.uri = asyncio.get_running_loop().create_future()
        make = None if self.http else (lambda _party: PostOffice(self.mailroom, self.world))
        for name, coins in (("bob", (200_000, 180_000)), ("alice", (500_000, 300_000))):
            lightning = name == "bob" and self.channels > 0
            party = await self.world.party(
                name,
                coins=coins,
                lightning=lightning,
                pace=PACE,
                mailroom=make,
                **(self.pair if self.both or name == self.victim else PAPER).ports,
            )
            begin = self._ask if name == "bob" else self._pay
            armed = self.armed if name == self.victim else None
            self.people[name] = Person(party, begin, Switch(armed))
        return self

    async def __aexit__(self, *exc: Any) -> None:
        await self._stack.aclose()

    @property
    def bob(self) -> Person:
        return self.people["bob"]

    @property
    def alice(self) -> Person:
        return self.people["alice"]

    # ------------------------------------------------------------ acts

    async def _ask(self, driver: Driver) -> SessionId:
        orders = [
            ChannelOrder(peer.pubkey, peer.host, 60_000 if n else None, private=True)
            for n, peer in enumerate(self.world.peers(self.channels))
        ][::-1]
        request = await start.receive(
            driver,
            Network.REGTEST,
            AMOUNT,
            policy=self.policy,
            channels=orders,
            expire_in=EXPIRE_IN,
            order="the order",
        )
        if not self.uri.done():
            self.uri.set_result(request.uri)
        return request.session

    async def _pay(self, driver: Driver) -> SessionId:
        open_rows = await driver.store.rows(open_only=True)
        if open_rows:  # what she asked for before the crash is there: nobody pays twice
            return open_rows[0].session
        uri = await self.uri
        payment = await start.send(
            driver, Network.REGTEST, uri, policy=self.policy, rate=FeeRate.from_sat_per_vb(2), amount=AMOUNT
        )
        return payment.session

    def driver(self, person: Person, switch: Switch | None = None, wallet: Wallet | None = None) -> Driver:
        party = person.party

        async def stored(answer: Any, change: Any) -> None:
            if isinstance(answer, Stored):
                await self._stored(party.name, change)

        async def sent(_answer: Any, *_args: Any, **_kwargs: Any) -> None:
            await self._mine_what_was_seen()
            self.look_again()

        ports = watched_ports(
            switch or person.switch,
            store=_Copying(self, person) if self.backups and party.name == self.victim else party.store,
            wallet=wallet or party.wallet,
            chain=party.chain,
            mailroom=party.mailroom,
            channels=party.node,
            stored=stored,
            sent=sent,
        )
        return party.make_driver(**ports)

    async def another_wallet(self, person: Person) -> Wallet:
        """The wallet as a second process has it: another object on the same file, where the kind can do that."""
        if not self.pair.shared:
            return person.party.wallet  # type: ignore[no-any-return]  # a wallet of this kind
        wallet: Wallet = await person.party.another_wallet()
        self._stack.push_async_callback(wallet.close)
        return wallet

    async def live(self, name: str, until: Callable[[model.State], bool] = model.is_closed) -> model.State:
        """Drive one person's session to its end, through every crash."""
        person = self.people[name]
        while True:
            driver = self.driver(person)
            try:
                if person.session is None:
                    person.session = await person.begin(driver)
                person.state = await driver.drive(person.session, self._until(person, until))
                return person.state
            except Killed:
                await self._restart(person)

    def _until(self, person: Person, until: Callable[[model.State], bool]) -> Callable[[model.State], bool]:
        def reached(state: model.State) -> bool:
            if self.watch is not None:
                self.watch(person, state)
            return until(state)

        return reached

    async def _restart(self, person: Person) -> None:
        """The disk is left, and a claim that lapses: what a new process finds."""
        person.crashes += 1
        owner, person.switch = person.switch.owner, Switch()
        if self.revive is not None:
            await self.revive(person)
        else:
            await reopen(person.party)
        if owner is not None:
            await person.party.store.release(*owner)

    async def together(self, *names: str) -> None:
        await side_by_side(*(self.live(name) for name in names))

    # ------------------------------------------------------------ nature

    async def _stored(self, name: str, change: Any) -> None:
        for record in change.records:
            self.told.append((name, record.name))
            if record.name == "Seen":
                self.seen.add((name, json.loads(record.data)["txid"]))
        for record in change.records:
            if self.on is not None:
                await self.on(self, name, record.name)
        await self._mine_what_was_seen()

    async def _mine_what_was_seen(self) -> None:
        """Six blocks, once every witness wrote down that the transaction is in sight."""
        if self.held_until and ("bob", self.held_until) not in self.told:
            return
        for tx in self.world.chain.mempool():
            if all((name, tx.txid) in self.seen for name in self.witnesses):
                await self.world.chain.mine(6)
                self.look_again()
                return

    def look_again(self) -> None:
        """Time passes until everybody looks at the chain again."""
        self.world.clock.skip(PACE.watch + 0.01)

    def first(self, name: str, event: str) -> bool:
        """Whether the event that was just told is the first of its kind for this person."""
        return self.told.count((name, event)) == 1

    # ------------------------------------------------------------ what is left

    async def ending(self) -> Ending:
        outcomes = {}
        for name, person in self.people.items():
            rows = await person.party.store.rows()
            outcomes[name] = " ".join(str(row.outcome or row.state) for row in rows)
        node = self.bob.party.node
        opened = sum(channel.state == "open" for channel in await node.channels()) if node is not None else 0
        return Ending(outcomes["bob"], outcomes["alice"], opened)

    async def audit(self) -> None:
        try:
            await audit(self.world)
        except BrokenPromise as exc:
            left = [line for line in str(exc).splitlines() if not (self.two_contents and "different contents" in line)]
            if left:
                raise


async def side_by_side(*acts: Awaitable[object]) -> None:
    """All of them to their ends, or none of them any further."""
    tasks = [asyncio.ensure_future(act) for act in acts]
    try:
        await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


class _Copying:
    """A store that keeps a copy of the disk from before each kind of append: what a power cut or a backup can throw it back to."""

    def __init__(self, play: Play, person: Person) -> None:
        self._play = play
        self._person = person

    def __getattr__(self, name: str) -> Any:
        return getattr(self._person.party.store, name)

    async def append(self, change: Any) -> Any:
        label = _change(change)
        if label not in self._play.copies:
            name = f"before-{len(self._play.copies)}"
            party = self._person.party
            self._play.copies[label] = Copy(copy_database(party, name), copy_wallet(party, f"{name}-wallet"))
        return await self._person.party.store.append(change)


def database(party: Party) -> Path:
    return party.home / "pjv2.sqlite"


def copy_database(party: Party, name: str) -> Path:
    """A whole copy through SQLite's own backup, for the file alone lacks what is still in the write-ahead log."""
    target = party.home / f"{name}.copy"
    source, copy = sqlite3.connect(database(party)), sqlite3.connect(target)
    with source, copy:
        source.backup(copy)
    source.close()
    copy.close()
    target.chmod(0o600)
    return target


def copy_wallet(party: Party, name: str) -> Path:
    """The wallet's files as they lie on disk between two of its turns, in a folder of their own."""
    target = party.home / name
    target.mkdir(mode=0o700)
    with contextlib.ExitStack() as stack:
        if (turn := party.home / "wallet.sqlite.lock").exists():
            stack.enter_context(TurnLock(turn).held(time.monotonic() + PATIENCE))
        for file in wallet_files(party.home):
            shutil.copy2(file, target)
    return target


async def reopen(party: Party, *, older_database: Path | None = None, older_wallet: Path | None = None) -> None:
    """The installation starts again, from what its disk held in the moment of death, or from older copies of that.

    What the dead process's objects still write when they are let go of is undone: a dead process lets go of nothing.
    """
    left = copy_wallet(party, f"left-{uuid.uuid4().hex}")
    await party.close()
    for file in wallet_files(party.home):
        file.unlink()
    for file in (older_wallet or left).iterdir():
        shutil.copy2(file, party.home)
    if older_database is not None:
        for suffix in ("", "-wal", "-shm"):
            database(party).with_name(database(party).name + suffix).unlink(missing_ok=True)
        shutil.copy(older_database, database(party))
        database(party).chmod(0o600)
    await party.start()


# ---------------------------------------------------------------- a whole play


async def play_out(play: Play, story: Callable[[Play], Awaitable[None]]) -> Ending:
    """The whole story, its ending, and a clean audit; what goes wrong names the point."""
    async with play:
        try:
            async with asyncio.timeout(PATIENCE):
                await story(play)
            ending = await play.ending()
            play.world.clock.skip(play.lapse)
            await play.audit()
        except (PayjoinError, AssertionError, TimeoutError) as exc:
            log = ", ".join(f"{name}: {event}" for name, event in play.told)
            raise AssertionError(f"stopped {play.armed}: {exc!r}; so far {log}") from exc
        return ending
