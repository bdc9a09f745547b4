"""What every command shares: the global options (before the command's name or after it), the configuration, the output.

A command is a module with a function `run(cli, …)`, plain or async; its docstring is the help, its annotated parameters are the
options.

Law: the configuration is read when a command first asks for it, and commands that need none work without one.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_type_hints

import typer

from pjv2.cli.output import Output, ReaderGone
from pjv2.errors import NotNow, WrongUsage

if TYPE_CHECKING:
    from pjv2.config import Config

ConfigOption = Annotated[
    Path | None, typer.Option("--config", metavar="FILE", envvar="PJV2_CONFIG", help="The configuration file.")
]
JsonOption = Annotated[bool, typer.Option("--json", help="Results as JSON lines on stdout.")]
VerboseOption = Annotated[
    int, typer.Option("-v", "--verbose", count=True, show_default=False, help="Say more; twice: tracebacks too.")
]


@dataclass
class Cli:
    """One run of the program. `overrides` are flags that stand for configuration, `resume` is said after an interruption."""

    config_path: Path | None = None
    json: bool = False
    verbose: int = 0
    overrides: dict[str, Any] = field(default_factory=dict)
    resume: str = ""

    @cached_property
    def out(self) -> Output:
        return Output(json=self.json, verbose=self.verbose)

    @cached_property
    def config(self) -> Config:
        """Read once. Raises WrongUsage, NotNow."""
        from pjv2.config import Config

        return Config.load(self.config_path, self.overrides)

    def told(self, config: Path | None, json: bool, verbose: int) -> None:
        """Take global options, wherever on the line they stood."""
        self.config_path = config if config is not None else self.config_path
        self.json = self.json or json
        self.verbose += verbose


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
                _to_its_end(work)

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
    """Run a coroutine. Raises KeyboardInterrupt when the process was told to stop, after everything was let go of."""
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
        return told

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
