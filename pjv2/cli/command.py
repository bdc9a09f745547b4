"""What every command shares: the global options (before the command's name or after it), the configuration, the output.

A command is a module with a function `run(cli, …)`, plain or async; its docstring is the help, its annotated parameters are the
options.

Law: the configuration is read when a command first asks for it, and commands that need none work without one.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Coroutine, Iterator
from contextlib import AbstractAsyncContextManager, contextmanager, suppress
from dataclasses import dataclass, field
from enum import StrEnum
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TextIO, get_type_hints

import typer

from pjv2.cli.output import Output, ReaderGone
from pjv2.errors import NotNow, WrongUsage

if TYPE_CHECKING:
    from pjv2.app import Payjoin
    from pjv2.config import Config

ConfigOption = Annotated[
    Path | None, typer.Option("--config", metavar="FILE", envvar="PJV2_CONFIG", help="The configuration file.")
]
JsonOption = Annotated[bool, typer.Option("--json", help="Results as JSON lines on stdout.")]
VerboseOption = Annotated[
    int, typer.Option("-v", "--verbose", count=True, show_default=False, help="Say more; twice: tracebacks too.")
]


class Until(StrEnum):
    """How far a payment is followed: in sight, confirmed as often as the policy says, or six blocks deep."""

    SEEN = "seen"
    CONFIRMED = "confirmed"
    CLOSED = "closed"


IdArgument = Annotated[str, typer.Argument(metavar="ID", help="A session's id, or the beginning of it.")]
UntilOption = Annotated[Until, typer.Option("--until", help="How far to follow the payment; `pjv2 run` does the rest.")]
DetachOption = Annotated[bool, typer.Option("--detach", help="Do not follow it: `pjv2 run` or `pjv2 resume` does.")]
DryRunOption = Annotated[
    bool, typer.Option("--dry-run", help="Check and show everything; sign away, store and send nothing.")
]
YesOption = Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")]


@dataclass
class Cli:
    """One run of the program. `overrides` are flags that stand for configuration, `resume` is said after an interruption.

    A program that runs commands itself may hand in streams, `opened` (what opens the desk for a configuration), and `runner`
    (what runs a command's coroutine to its end).
    """

    config_path: Path | None = None
    json: bool = False
    verbose: int = 0
    overrides: dict[str, Any] = field(default_factory=dict)
    resume: str = ""
    opened: Callable[[Config], AbstractAsyncContextManager[Payjoin]] | None = None
    runner: Callable[[Coroutine[Any, Any, None]], None] | None = None
    stdin: TextIO | None = None
    stdout: TextIO | None = None
    stderr: TextIO | None = None

    @cached_property
    def out(self) -> Output:
        return Output(json=self.json, verbose=self.verbose, stdout=self.stdout, stderr=self.stderr)

    @cached_property
    def config(self) -> Config:
        """Read once. Raises WrongUsage, NotNow."""
        from pjv2.config import Config

        return Config.load(self.config_path, self.overrides)

    def payjoin(self) -> AbstractAsyncContextManager[Payjoin]:
        """The desk that the configuration describes: `async with cli.payjoin() as pj:`. Raises WrongUsage, NotNow, CannotRead."""
        from pjv2.app import Payjoin

        return (self.opened or Payjoin.open)(self.config)

    def words(self, *words: str) -> str:
        """A command of this program as a person would type it, with the configuration that this one was given."""
        import shlex

        config = [] if self.config_path is None else ["--config", str(self.config_path)]
        return shlex.join(["pjv2", *config, *words])

    @property
    def asks(self) -> bool:
        """There is a person at a terminal who can be asked."""
        streams = (self.stdin or sys.stdin, self.stderr or sys.stderr)
        return not self.json and all(stream is not None and stream.isatty() for stream in streams)

    async def confirm(self, question: str) -> bool:
        """Ask a person; only a yes is one."""
        self.out.say(f"{question} [y/N]")
        return (await _line(self.stdin or sys.stdin)).strip().lower() in {"y", "yes"}

    def told(self, config: Path | None, json: bool, verbose: int) -> None:
        """Take global options, wherever on the line they stood."""
        self.config_path = config if config is not None else self.config_path
        self.json = self.json or json
        self.verbose += verbose


async def _line(stream: TextIO) -> str:
    """One line, read beside the loop: an interruption ends the wait, and the thread holds nobody up."""
    import asyncio
    import threading

    loop = asyncio.get_running_loop()
    read: asyncio.Future[str] = loop.create_future()

    def hand_over(line: str) -> None:
        if not read.done():
            read.set_result(line)

    def reader() -> None:
        try:
            line = stream.readline()
        except (OSError, ValueError):  # closed meanwhile: nobody answered
            line = ""
        with suppress(RuntimeError):  # the loop is gone: nobody waits any more
            loop.call_soon_threadsafe(hand_over, line)

    threading.Thread(target=reader, daemon=True).start()
    return await read


@contextmanager
def explaining_what_the_lab_needs() -> Iterator[None]:
    """Import the lab: its Bitcoin kernel is an extra. Raises WrongUsage when it is not installed."""
    try:
        yield
    except ModuleNotFoundError as exc:
        if exc.name is None or exc.name.partition(".")[0] != "pbk":
            raise
        raise WrongUsage("the lab's Bitcoin kernel is not installed: pip install 'pjv2[lab]'") from exc


_GLOBALS = {"config": (ConfigOption, None), "json": (JsonOption, False), "verbose": (VerboseOption, 0)}


def as_typer(run: Callable[..., Any]) -> Callable[..., None]:
    """`run(cli, …)` as typer wants it: with the global options, and synchronous."""
    parameters = list(inspect.signature(run).parameters.values())[1:]
    hints = get_type_hints(run, include_extras=True)
    keyword = inspect.Parameter.KEYWORD_ONLY

    def call(**given: Any) -> None:
        context: typer.Context = given.pop("context")
        cli = context.find_object(Cli)
        if cli is None:
            raise TypeError("a command runs under pjv2's own application")
        cli.told(*(given.pop(name) for name in _GLOBALS))
        with _heard(cli):
            work = run(cli, **given)
            if inspect.iscoroutine(work):
                (cli.runner or _to_its_end)(work)

    shown = [
        inspect.Parameter("context", keyword, annotation=typer.Context),
        *(one.replace(kind=keyword, annotation=hints[one.name]) for one in parameters),
        *(
            inspect.Parameter(name, keyword, default=default, annotation=hint)
            for name, (hint, default) in _GLOBALS.items()
        ),
    ]
    call.__doc__ = run.__doc__
    call.__name__ = run.__name__
    call.__annotations__ = {one.name: one.annotation for one in shown}
    call.__signature__ = inspect.Signature(shown)  # type: ignore[attr-defined]  # inspect reads it, typeshed does not know it
    return call


def _to_its_end(work: Coroutine[Any, Any, None]) -> None:
    """Run a coroutine. Raises KeyboardInterrupt when the process was told to stop, after everything was let go of.

    A command that ends of its own accord when it is told to stop has done what it was there for.
    """
    import asyncio
    import signal

    async def until_told_to_stop() -> bool:
        told = False
        task = asyncio.current_task()

        def stop() -> None:
            nonlocal told
            told = True
            if task is not None:
                task.cancel()

        # A service manager's stop is an interruption like one by the keyboard. Not everywhere, and only in the main thread.
        with suppress(NotImplementedError, RuntimeError, ValueError):
            asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stop)
        try:
            await work
        except asyncio.CancelledError:
            if not told:
                raise
            return True
        return False

    main = until_told_to_stop()
    try:
        if asyncio.run(main):
            raise KeyboardInterrupt
    finally:
        # Stopped before they began: nobody shall complain that they never did.
        main.close()
        work.close()


@contextmanager
def _heard(cli: Cli) -> Iterator[None]:
    """Show what the library logs: warnings, with -v what it does, with -v -v all of it and tracebacks."""
    import logging

    class Said(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            with suppress(ReaderGone, NotNow):  # a log line that nobody can read stops no payment
                cli.out.say(self.format(record))

        def format(self, record: logging.LogRecord) -> str:
            text = f"{record.levelname.lower()}: {record.getMessage()}"
            if record.exc_info and cli.verbose > 1:
                text += "\n" + logging.Formatter().formatException(record.exc_info)
            return text

    said = Said()
    ours, everybody = logging.getLogger("pjv2"), logging.getLogger()
    level = ours.level
    # Others' details stay unheard: nobody promised that they hold no secret.
    everybody.addHandler(said)
    ours.setLevel({0: logging.WARNING, 1: logging.INFO}.get(cli.verbose, logging.DEBUG))
    try:
        yield
    finally:
        everybody.removeHandler(said)
        ours.setLevel(level)
