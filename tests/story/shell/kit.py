"""A shell for the people of a story: commands as typed, run through the whole program, on the story's own loop and world.

Everything between the typed words and the exit code is the real thing; only the back ends that a configuration would name are a
party's of the lab.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import io
import json
import threading
from collections.abc import Callable, Coroutine
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, field
from importlib.util import find_spec
from typing import Any

from pjv2.app import Payjoin
from pjv2.cli.app import run
from pjv2.cli.command import Cli
from pjv2.config import Config
from pjv2.lab.world import Party, bdk_party_wallet, esplora_chain
from pjv2.units import Sats
from tests.story.lab.kit import PATIENCE, Story


class Screen(io.StringIO):
    """A stream that says when something was written to it. `terminal`: it passes for one."""

    def __init__(self, changed: Callable[[], None], *, terminal: bool) -> None:
        super().__init__()
        self._changed = changed
        self._terminal = terminal

    def isatty(self) -> bool:
        return self._terminal

    def write(self, text: str, /) -> int:
        count = super().write(text)
        self._changed()
        return count


class Keyboard(io.StringIO):
    """What is typed; None: a person who does not answer."""

    def __init__(self, typed: str | None, *, terminal: bool) -> None:
        super().__init__(typed or "")
        self._terminal = terminal
        self.left = threading.Event()
        if typed is not None:
            self.left.set()

    def readline(self, size: int | None = -1, /) -> str:
        self.left.wait(PATIENCE)
        return super().readline()

    def isatty(self) -> bool:
        return self._terminal


@dataclass
class Running:
    """A command under way."""

    words: tuple[str, ...]
    out: Screen
    err: Screen
    keyboard: Keyboard
    changed: asyncio.Event
    task: asyncio.Task[None] | None = None
    ended: asyncio.Task[int] | None = None

    @property
    def stdout(self) -> str:
        return self.out.getvalue()

    @property
    def stderr(self) -> str:
        return self.err.getvalue()

    @property
    def lines(self) -> list[dict[str, Any]]:
        """The JSON lines so far."""
        return [json.loads(line) for line in self.stdout.split("\n")[:-1]]

    @property
    def events(self) -> list[str]:
        return [line["event"] for line in self.lines]

    async def until(self, found: Callable[[Running], Any]) -> Any:
        """What `found` finds, as soon as the command wrote it."""
        assert self.ended is not None
        async with asyncio.timeout(PATIENCE):
            while not (answer := found(self)):
                assert not self.ended.done(), f"{self.words} ended: {self.ended.result()} {self.stdout}{self.stderr}"
                self.changed.clear()
                waiting = asyncio.create_task(self.changed.wait())
                await asyncio.wait({waiting, self.ended}, return_when=asyncio.FIRST_COMPLETED)
                waiting.cancel()
        return answer

    async def line(self, event: str, **facts: Any) -> dict[str, Any]:
        """The first JSON line of this name with these facts."""

        def found(self: Running) -> dict[str, Any] | None:
            fitting = (
                line
                for line in self.lines
                if line["event"] == event and all(line.get(name) == value for name, value in facts.items())
            )
            return next(fitting, None)

        return await self.until(found)

    async def says(self, text: str) -> None:
        await self.until(lambda self: text in self.stderr)

    async def code(self) -> int:
        assert self.ended is not None
        async with asyncio.timeout(PATIENCE):
            return await asyncio.shield(self.ended)

    def let_go(self) -> None:
        """The person who did not answer leaves."""
        self.keyboard.left.set()

    def interrupt(self) -> None:
        """Ctrl-C."""
        assert self.task is not None
        self.task.cancel()


@dataclass
class Shell:
    """A party's shell. `config` is laid over what the party is."""

    party: Party
    config: dict[str, Any] = field(default_factory=dict)
    terminal: bool = False
    running: list[Running] = field(default_factory=list)

    def opened(self, config: Config) -> AbstractAsyncContextManager[Payjoin]:
        party = self.party
        return Payjoin.open(
            config,
            wallet=party.wallet,
            chain=party.chain,
            channels=party.node,
            store=party.store,
            mailroom=party.mailroom,
            clock=party.world.clock,
            notify=party.diary,
            pace=party.pace,
        )

    def start(self, *words: str, typed: str | None = "") -> Running:
        """Begin a command, beside whatever else runs."""
        loop = asyncio.get_running_loop()
        changed = asyncio.Event()

        def wake() -> None:
            loop.call_soon_threadsafe(changed.set)

        out, err = (Screen(wake, terminal=self.terminal) for _ in range(2))
        keyboard = Keyboard(typed, terminal=self.terminal)
        running = Running(words, out, err, keyboard, changed)

        def runner(work: Coroutine[Any, Any, None]) -> None:
            ended: concurrent.futures.Future[asyncio.Task[None]] = concurrent.futures.Future()

            def begin() -> None:
                running.task = loop.create_task(work)
                running.task.add_done_callback(ended.set_result)

            loop.call_soon_threadsafe(begin)
            task = ended.result()
            if task.cancelled():
                raise KeyboardInterrupt
            task.result()

        url = f"sqlite:///{self.party.home / 'pjv2.sqlite'}"
        cli = Cli(
            overrides={"store": {"url": url}} | self.config,
            opened=self.opened,
            runner=runner,
            stdin=keyboard,
            stdout=out,
            stderr=err,
        )
        running.ended = asyncio.create_task(asyncio.to_thread(run, words, cli=cli))
        self.running.append(running)
        return running

    async def __call__(self, *words: str, typed: str | None = "") -> Running:
        """Run a command to its end."""
        running = self.start(*words, typed=typed)
        await running.code()
        return running


EMBEDDED: dict[str, Any] = (
    {"wallet": bdk_party_wallet, "chain": esplora_chain} if find_spec("bdkpython") is not None else {}
)
"""What the product's default is: the embedded wallet, that sees the chain through an Esplora server; where it has a wheel."""


async def people(
    s: Story, bob: dict[str, Any] | None = None, alice: dict[str, Any] | None = None, *, paper: bool = False
) -> tuple[Shell, Shell]:
    """A receiver with 200,000 sat and a payer with 500,000, as the product's default has them; with configurations of their own."""
    made = {} if paper else EMBEDDED
    return Shell(await s.bob(**made), bob or {}), Shell(await s.alice(**made), alice or {})


async def balance(shell: Shell) -> Sats:
    """What the wallet has now, to the satoshi."""
    wallet = shell.party.wallet
    if hasattr(wallet, "sync"):
        await wallet.sync()
    held: Sats = await wallet.balance()
    return held


@dataclass(frozen=True, slots=True)
class Books:
    """What the shell tells about a session afterwards: its facts, and its log as prose."""

    facts: dict[str, Any]
    prose: str

    def tells(self, *sentences: str) -> None:
        """The prose has these, in this order."""
        at = 0
        for sentence in sentences:
            found = self.prose.find(sentence, at)
            assert found >= 0, f"{sentence!r} is not told, or not here:\n{self.prose}"
            at = found + len(sentence)


async def books(shell: Shell, session: str) -> Books:
    """`history`, `show` and `explain` of a session, which agree, in JSON and in words."""
    listed, shown, told = [
        await shell("--json", *words) for words in (["history"], ["show", session], ["explain", session])
    ]
    [row] = [line for line in listed.lines if line["session"] == session]
    [facts] = shown.lines
    for name in ("role", "state", "outcome", "created", "expires", "amount_requested"):
        assert row[name] == facts[name] == told.lines[0][name], name
    table, page, prose = [await shell(*words) for words in (["history"], ["show", session], ["explain", session])]
    for running in (listed, shown, told, table, page, prose):
        assert (code(running), running.stderr) == (0, "")
    [line] = [line for line in table.stdout.splitlines() if line.startswith(session[:8])]
    assert f" {facts['role']} " in line
    assert (facts["outcome"] or facts["state"]) in line
    assert facts["status"] in page.stdout
    return Books(facts, prose.stdout)


def code(running: Running) -> int:
    assert running.ended is not None
    return running.ended.result()
