"""What a command says, to whom, and in which form."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest

from pjv2.cli.output import Output, ReaderGone, in_words, plain, table, utc
from pjv2.errors import NotNow
from pjv2.session.events import Outcome
from pjv2.units import FeeRate, Outpoint

TXID = "ab" * 32


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def outputs(*, json: bool = False) -> tuple[Output, io.StringIO, io.StringIO]:
    stdout, stderr = io.StringIO(), io.StringIO()
    return Output(json=json, stdout=stdout, stderr=stderr), stdout, stderr


def test_talk_goes_to_stderr_and_results_to_stdout() -> None:
    out, stdout, stderr = outputs()
    out.say("hello")
    out.result("Version", "pjv2 1")
    assert (stdout.getvalue(), stderr.getvalue()) == ("pjv2 1\n", "hello\n")


def test_a_json_line_holds_event_time_and_session_first_and_its_fields_after() -> None:
    out, stdout, stderr = outputs(json=True)
    out.show("for people only")
    out.result("Closed", "a view", at=1_700_000_000.5, session="ab", outcome=Outcome.PAID, txid=TXID)
    assert stdout.getvalue() == (
        '{"event":"Closed","at":"2023-11-14T22:13:20.500Z","session":"ab","outcome":"Paid","txid":"' + TXID + '"}\n'
    )
    assert stderr.getvalue() == ""


def test_values_of_our_own_have_their_form_in_json() -> None:
    out, stdout, _ = outputs(json=True)
    out.result(
        "X",
        channels=({"outpoint": Outpoint(TXID, 1), "capacity": 80_000},),
        rate=FeeRate(500),
        file=Path("a"),
        nothing=None,
        yes=True,
    )
    line = json.loads(stdout.getvalue())
    assert line["channels"] == [{"outpoint": f"{TXID}:1", "capacity": 80_000}]
    assert (line["rate"], line["file"], line["nothing"], line["yes"]) == (2.0, "a", None, True)
    assert "session" not in line


@pytest.mark.parametrize("value", [b"key", [b"key"], {"a": b"key"}, object(), {1, 2}])
def test_bytes_and_unknown_things_never_become_json(value: Any) -> None:
    out, stdout, _ = outputs(json=True)
    with pytest.raises(TypeError, match="has no form in JSON lines"):
        out.result("X", value=value)
    assert stdout.getvalue() == ""


def test_a_number_that_json_does_not_know_is_not_written() -> None:
    out, _, _ = outputs(json=True)
    with pytest.raises(ValueError, match="not JSON compliant"):
        out.result("X", value=float("nan"))


def test_a_field_cannot_take_the_place_of_the_session() -> None:
    out, stdout, _ = outputs(json=True)
    out.result("X", session="ab", event="Y")
    assert json.loads(stdout.getvalue())["event"] == "X"


def test_every_line_is_flushed_before_the_next_step() -> None:
    class Counting(io.StringIO):
        flushed = 0

        def flush(self) -> None:
            self.flushed += 1

    stdout = Counting()
    out = Output(json=True, stdout=stdout)
    for count in range(1, 4):
        out.result("X")
        assert stdout.flushed == count


def test_what_a_peer_wrote_cannot_steer_the_terminal() -> None:
    out, stdout, stderr = outputs()
    evil = "\x1b[2Jnice\x07 [red]label[/red] \u202eback :smile: \x9b31m"
    out.say(evil)
    out.result("X", label=evil)
    for text in (stdout.getvalue(), stderr.getvalue()):
        assert not set(text) & set("\x1b\x07\x9b\u202e")
        assert "[red]label[/red]" in text
        assert ":smile:" in text
    lines, json_stdout, _ = outputs(json=True)
    lines.result("X", label=evil)
    assert json_stdout.getvalue().isascii()
    assert json.loads(json_stdout.getvalue())["label"] == evil


def test_line_ends_stay_and_tabs_become_spaces() -> None:
    assert plain("a\r\nb\tc\nd") == "a\nb       c\nd"
    assert plain("a\rb") == "a\N{REPLACEMENT CHARACTER}b"


def test_a_pipe_gets_no_colours_no_padding_and_one_row_per_line() -> None:
    out, stdout, _ = outputs()
    drawn = table("id", "sats")
    drawn.add_row("ab" * 80, "[bold]1")
    out.show(drawn)
    lines = stdout.getvalue().splitlines()
    assert "ab" * 80 + "  [bold]1" in lines
    assert all(line == line.rstrip() for line in lines)
    assert "\x1b" not in stdout.getvalue()


def test_colours_are_for_terminals_and_never_with_no_color(monkeypatch: pytest.MonkeyPatch) -> None:
    from rich.text import Text

    for name in ("NO_COLOR", "FORCE_COLOR", "TTY_COMPATIBLE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLORTERM", "truecolor")

    def drawn() -> str:
        stderr = Terminal()
        Output(stdout=io.StringIO(), stderr=stderr).say(Text("hello", style="red"))
        return stderr.getvalue()

    assert "\x1b[31m" in drawn()
    monkeypatch.setenv("NO_COLOR", "1")
    assert "\x1b[31m" not in drawn()


def test_a_closed_pipe_means_that_nobody_reads() -> None:
    class Closed(io.StringIO):
        def write(self, text: str) -> int:
            raise BrokenPipeError

    with pytest.raises(ReaderGone):
        Output(json=True, stdout=Closed()).result("X")


def test_a_full_disk_is_told_as_such() -> None:
    class Full(io.StringIO):
        def flush(self) -> None:
            raise OSError(28, "No space left on device")

    with pytest.raises(NotNow, match="No space left"):
        Output(json=True, stdout=Full()).result("X")


def test_a_stream_that_was_closed_before_the_start_is_no_trouble(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdout", None)
    monkeypatch.setattr("sys.stderr", None)
    out = Output()
    out.say("a")
    out.result("X", a=1)
    Output(json=True).result("X")


def test_facts_are_shown_by_name_and_empty_ones_left_out() -> None:
    out, stdout, _ = outputs()
    out.result("X", session="ab", amount_received=100_000, txid=None, channels=(), done=True, peers=["a", "b"])
    assert stdout.getvalue() == (
        "session          ab\namount received  100_000\ndone             yes\npeers            a\n                 b\n"
    )
    assert in_words({"a": 1, "b": None, "c": False}) == "a 1, c no"
    assert in_words(None) == ""


def test_times_are_rfc_3339_in_utc() -> None:
    assert utc(0) == "1970-01-01T00:00:00.000Z"
