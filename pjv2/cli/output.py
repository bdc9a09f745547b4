"""Where a command's words go: people's text to stderr, results to stdout, and with `--json` nothing but JSON lines on stdout.

Text that came from a peer or a person is shown as text: no markup is read in it, and characters that could steer a terminal are
replaced. Colours appear only on a terminal, and never with NO_COLOR.

Law: one JSON object per line, flushed before the next step is taken; it never holds bytes, for bytes are keys or transactions.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from enum import Enum
from pathlib import PurePath
from typing import TYPE_CHECKING, Any, TextIO

from pjv2.errors import NotNow
from pjv2.units import FeeRate, Instant, Outpoint

if TYPE_CHECKING:
    from rich.console import Console, RenderableType

_WIDE = 1_000
"""Columns where nobody looks: a pipe gets each row on one line."""

_STEERING = (*range(0x20), *range(0x7F, 0xA0), 0x61C, 0x200E, 0x200F, *range(0x2028, 0x202F), *range(0x2066, 0x206A))
_PLAIN = {code: "\N{REPLACEMENT CHARACTER}" for code in _STEERING if code != 0x0A}


class ReaderGone(Exception):
    """Whoever read our output has closed it: there is nobody left to tell."""


def plain(text: str) -> str:
    """`text` without control and direction characters; line ends stay."""
    return text.expandtabs().replace("\r\n", "\n").translate(_PLAIN)


def utc(at: Instant) -> str:
    """An instant as RFC 3339 in UTC with milliseconds."""
    return datetime.fromtimestamp(at, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


class Output:
    """Says things to people and hands over results.

    `json`: results are JSON lines. `verbose`: how often -v was given. The streams are looked up when they are written to.
    """

    def __init__(
        self, *, json: bool = False, verbose: int = 0, stdout: TextIO | None = None, stderr: TextIO | None = None
    ) -> None:
        self.json = json
        self.verbose = verbose
        self._people: Console | None = None
        self._results: Console | None = None
        # None: the program was started with a closed stream.
        self._stdout: TextIO | None = stdout or sys.stdout
        self._stderr: TextIO | None = stderr or sys.stderr

    def say(self, *what: str | RenderableType) -> None:
        """Talk to people: text, or anything that rich can draw, on stderr."""
        if self._stderr is not None:
            self._people = self._people or _console(self._stderr)
            self._draw(self._people, self._stderr, what)

    def show(self, *what: str | RenderableType) -> None:
        """A result drawn for people, on stdout; with `--json` nothing."""
        if not self.json and self._stdout is not None:
            self._results = self._results or _console(self._stdout)
            self._draw(self._results, self._stdout, what)

    def result(
        self,
        event: str,
        view: str | RenderableType | None = None,
        /,
        *,
        at: Instant | None = None,
        session: str | None = None,
        **fields: Any,
    ) -> None:
        """A result: with `--json` one line {"event", "at", "session"?, …fields}, else `view`, or the fields one below the other.

        `at` is the time of what happened, by default now. Amounts are integer satoshis.
        """
        if self.json:
            line: dict[str, Any] = {"event": event, "at": utc(time.time() if at is None else at)}
            if session is not None:
                line["session"] = session
            # ASCII only: nothing in it can steer a terminal, whatever its encoding is.
            text = json.dumps(line | _jsonable(fields) | line, separators=(",", ":"), allow_nan=False)
            self._write(self._stdout, text + "\n")
        elif view is not None:
            self.show(view)
        else:
            self.show(facts({"session": session} | fields if session is not None else fields))

    # ------------------------------------------------------------ the two streams

    def _draw(self, console: Console, stream: TextIO, what: Sequence[str | RenderableType]) -> None:
        from rich.text import Text

        with console.capture() as drawn:
            for thing in what:
                if isinstance(thing, str):
                    console.print(Text(plain(thing)), soft_wrap=not console.is_terminal)
                else:
                    console.print(thing)
        # A pipe needs no padding up to the width of a table.
        text = drawn.get()
        self._write(
            stream, text if console.is_terminal else "".join(f"{row.rstrip()}\n" for row in text.split("\n")[:-1])
        )

    def _write(self, stream: TextIO | None, text: str) -> None:
        if stream is None:
            return
        try:
            stream.write(text)
            stream.flush()
        except BrokenPipeError as exc:
            raise ReaderGone from exc
        except OSError as exc:
            raise NotNow(f"the output cannot be written: {exc.strerror or type(exc).__name__}") from exc


def facts(fields: Mapping[str, Any]) -> RenderableType:
    """Names and values below each other."""
    from rich.table import Table
    from rich.text import Text

    grid = Table.grid(padding=(0, 2))
    grid.add_column(style="dim", no_wrap=True)
    grid.add_column(overflow="fold")
    for name, value in fields.items():
        if value is None or value in ((), []):
            continue
        grid.add_row(Text(plain(name.replace("_", " "))), Text(plain(in_words(value))))
    return grid


def in_words(value: Any) -> str:
    """A value as a person reads it."""
    match _jsonable(value):
        case bool() as truth:
            return "yes" if truth else "no"
        case int() as number:
            return f"{number:_}"
        case list() as values:
            return "\n".join(in_words(one) for one in values)
        case dict() as table:
            return ", ".join(f"{name} {in_words(one)}" for name, one in table.items() if one is not None)
        case None:
            return ""
        case other:
            return str(other)


def table(*columns: str) -> Any:
    """An empty table for `add_row`; cells are given as text."""
    from rich.table import Table

    drawn = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for column in columns:
        drawn.add_column(column, overflow="fold", justify="right" if column == "sats" else "left")
    return drawn


def _console(stream: TextIO) -> Console:
    from rich.console import Console

    wide = None if stream.isatty() or "COLUMNS" in os.environ else _WIDE
    return Console(file=stream, width=wide, markup=False, highlight=False, emoji=False, soft_wrap=False)


def _jsonable(value: Any) -> Any:
    """`value` in JSON's own types. Raises TypeError for bytes and for anything without an agreed form."""
    match value:
        case Mapping():
            return {str(name): _jsonable(one) for name, one in value.items()}
        case Outpoint() | PurePath():
            return str(value)
        case FeeRate():
            return value.sat_per_vb
        case list() | tuple():
            return [_jsonable(one) for one in value]
        case Enum():
            return value.value
        case None | bool() | int() | float() | str():
            return value
    raise TypeError(f"{type(value).__name__} has no form in JSON lines")
