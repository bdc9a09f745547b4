"""Exit codes, sentences and next steps: every way out of a command."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Annotated, Any

import pytest
import typer

from pjv2 import lab
from pjv2.cli.app import COMMANDS, run
from pjv2.cli.command import Cli, explaining_what_the_lab_needs
from pjv2.cli.output import Output, ReaderGone
from pjv2.errors import (
    BadCiphertext,
    BadOriginal,
    BadProposal,
    BadUri,
    CannotRead,
    Expired,
    IllegalEvent,
    KeyRotated,
    NotNow,
    OurMistake,
    PeerMistake,
    WrongUsage,
)
from tests.unit.cli.conftest import Call

SECRET = "hunter2"


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Call:
    """Run a function as the command `try`, as `pjv2 WORDS…` would."""

    def call(function: Callable[..., Any], *words: str) -> tuple[int, str, str]:
        module = ModuleType("a_command")
        module.run = function  # type: ignore[attr-defined]  # a command module is anything with a run
        monkeypatch.setitem(sys.modules, "a_command", module)
        code = run(list(words) or ["try"], {"try": "a_command"})
        told = capsys.readouterr()
        return code, told.out, told.err

    return call


def raising(error: BaseException) -> Callable[[Cli], None]:
    def run(cli: Cli) -> None:
        raise error

    return run


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (OurMistake("x"), 1),
        (IllegalEvent("x"), 1),
        (WrongUsage("x"), 2),
        (PeerMistake("x"), 3),
        (BadUri("x"), 3),
        (BadCiphertext("x"), 3),
        (BadOriginal("x"), 3),
        (BadProposal("x"), 3),
        (NotNow("x"), 4),
        (KeyRotated("x"), 4),
        (Expired("x"), 5),
        (CannotRead("x"), 6),
        (KeyboardInterrupt(), 130),
        (typer.Abort(), 130),
        (asyncio.CancelledError(), None),
        (ZeroDivisionError(SECRET), 1),
    ],
    ids=lambda value: type(value).__name__,
)
def test_every_branch_of_the_error_tree_has_its_exit_code(
    command: Call, error: BaseException, code: int | None
) -> None:
    if code is None:
        with pytest.raises(asyncio.CancelledError):
            command(raising(error))
        return
    found, stdout, stderr = command(raising(error))
    assert found == code
    assert stdout == ""
    assert len(stderr.splitlines()) == 2
    assert "Traceback" not in stderr
    assert SECRET not in stderr


def test_a_command_that_returns_has_done_it(command: Call) -> None:
    def run(cli: Cli) -> None:
        cli.out.result("Done", "it is done")

    assert command(run) == (0, "it is done\n", "")


@pytest.mark.parametrize("code", [0, 3, 5])
def test_a_command_may_end_with_the_exit_code_of_its_outcome(command: Call, code: int) -> None:
    assert command(raising(typer.Exit(code))) == (code, "", "")


def log(cli: Cli) -> None:
    logger = logging.getLogger("pjv2.somewhere")
    logger.debug("a detail")
    logger.info("a step")
    try:
        raise ValueError("a cause")
    except ValueError:
        logger.warning("a \x1b[2Jwarning", exc_info=True)
    logging.getLogger("foreign").info("a foreign step")
    logging.getLogger("foreign").debug("a foreign detail")


@pytest.mark.parametrize(
    ("words", "heard"),
    [
        (["try"], ["warning"]),
        (["try", "-v"], ["info", "warning"]),
        (["try", "-vv"], ["debug", "info", "warning"]),
    ],
)
def test_the_more_v_the_more_of_the_log_is_heard(command: Call, words: list[str], heard: list[str]) -> None:
    before = logging.getLogger().handlers[:]
    code, stdout, stderr = command(log, *words)
    assert (code, stdout) == (0, "")
    assert [line.partition(":")[0] for line in stderr.splitlines() if line.partition(":")[0].islower()] == heard
    assert ("Traceback" in stderr) is ("-vv" in words)
    assert "foreign" not in stderr
    assert "\x1b" not in stderr
    assert logging.getLogger().handlers == before


def test_an_error_is_one_sentence_and_one_next_step(command: Call) -> None:
    _, _, stderr = command(raising(NotNow("the relay\n  is away", after=90)))
    sentence, step = stderr.splitlines()
    assert sentence == "pjv2: the relay is away"
    assert step == ("A service we need is not available; nothing was recorded: try again later. It may work in 90 s.")


def test_with_json_an_error_is_a_line_too(command: Call) -> None:
    code, stdout, stderr = command(raising(Expired("too late")), "--json", "try")
    line = json.loads(stdout)
    assert line.pop("at").endswith("Z")
    assert line == {
        "event": "Error",
        "error": "Expired",
        "message": "too late",
        "next": "The session's time is over: nothing more is proposed, and the fallback payment is still good.",
        "exit": code,
    }
    assert stderr.startswith("pjv2: too late\n")


def test_what_a_peer_wrote_in_an_error_cannot_steer_the_terminal(command: Call) -> None:
    _, _, stderr = command(raising(BadProposal("the receiver says: \x1b[2J[red]pay me[/red]")))
    assert "\x1b" not in stderr
    assert "[red]pay me[/red]" in stderr


@pytest.mark.parametrize("words", [["-v", "-v", "try"], ["-vv", "try"], ["try", "-vv"], ["-v", "try", "-v"]])
def test_a_traceback_must_be_asked_for_twice_and_shows_no_values(command: Call, words: list[str]) -> None:
    def run(cli: Cli) -> None:
        key = SECRET
        raise NotNow(f"a key of {len(key)} letters")

    code, _, stderr = command(run, *words)
    assert code == 4
    assert "Traceback (most recent call last)" in stderr
    assert SECRET not in stderr
    assert stderr.splitlines()[-2].startswith("pjv2: a key of 7 letters")


def test_a_bug_is_told_by_kind_and_place_for_its_words_may_hold_a_key(command: Call) -> None:
    code, stdout, stderr = command(raising(ValueError(SECRET)), "try", "-v", "--json")
    assert code == 1
    assert "this is a bug in pjv2: ValueError in test_app.py line " in stderr
    assert SECRET not in stderr + stdout
    assert json.loads(stdout)["exit"] == 1


def test_the_first_of_failed_tasks_is_told_and_a_bug_before_all(command: Call) -> None:
    group = ExceptionGroup("tasks", [NotNow("away"), ExceptionGroup("more", [Expired("late")])])
    assert command(raising(group))[0] == 4
    with_bug = ExceptionGroup("tasks", [NotNow("away"), ExceptionGroup("more", [KeyError("x")])])
    assert command(raising(with_bug))[0] == 1


def test_nobody_reading_is_not_an_error(command: Call) -> None:
    assert command(raising(ReaderGone()))[1:] == ("", "")


def test_an_interruption_says_how_to_go_on(command: Call) -> None:
    def run(cli: Cli) -> None:
        cli.resume = "pjv2 resume 0123"
        raise KeyboardInterrupt

    code, _, stderr = command(run)
    assert code == 130
    assert stderr == "pjv2: interrupted; what was stored stays\npjv2 resume 0123\n"


# ---------------------------------------------------------------- the line


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["nonsense"], "No such command 'nonsense'"),
        (["hisotry"], "Did you mean"),
        (["--nonsense", "history"], "--nonsense"),
        (["history", "--nonsense"], "--nonsense"),
        (["show"], "ID"),
        (["lab"], "Missing command"),
        (["--config"], "--config"),
        ([], "name a command"),
    ],
)
@pytest.mark.parametrize("json_too", [False, True])
def test_a_line_that_cannot_be_read_is_wrong_usage(
    capsys: pytest.CaptureFixture[str], words: list[str], says: str, json_too: bool
) -> None:
    assert run(["--json", *words] if json_too else words) == 2
    told = capsys.readouterr()
    assert says in told.err
    assert len(told.err.splitlines()) == 2
    assert [json.loads(line)["exit"] for line in told.out.splitlines()] == ([2] if json_too else [])


@pytest.mark.parametrize("words", [["--json", "try"], ["try", "--json"]])
def test_global_options_stand_before_the_command_or_after_it(command: Call, words: list[str], tmp_path: Path) -> None:
    seen: list[Path | None] = []

    def run(cli: Cli) -> None:
        seen.append(cli.config_path)
        cli.out.result("Done")

    assert json.loads(command(run, *words)[1])["event"] == "Done"
    command(run, "--config", "a", "try")
    command(run, "try", "--config", "b")
    command(run, "--config", "a", "try", "--config", "b")
    assert seen == [None, Path("a"), Path("b"), Path("b")]


def test_the_configuration_file_can_be_named_by_the_environment(
    command: Call, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    file = tmp_path / "mine.toml"
    file.write_text("[poller]\nmax_in_flight = 7\n")
    monkeypatch.setenv("PJV2_CONFIG", str(file))
    seen: list[int] = []

    def run(cli: Cli) -> None:
        seen.append(cli.config.poller.max_in_flight)

    assert command(run)[0] == 0
    assert seen == [7]


def test_flags_of_a_command_override_the_configuration(command: Call) -> None:
    seen: list[int] = []

    def run(cli: Cli, expire_in: Annotated[int | None, typer.Option("--expire-in")] = None) -> None:
        if expire_in is not None:
            cli.overrides["policy"] = {"expire_in": expire_in}
        seen.append(cli.config.policy.expire_in)

    assert command(run, "try", "--expire-in", "60")[0] == 0
    assert command(run, "try", "--expire-in", "999999")[0] == 2
    assert seen == [60]


async def test_an_async_command_is_run_to_its_end(command: Call) -> None:
    async def run(cli: Cli) -> None:
        await asyncio.sleep(0)
        cli.out.result("Done", "done")

    # A command has an event loop of its own, as in a process of its own.
    assert await asyncio.to_thread(command, run) == (0, "done\n", "")


def test_every_command_of_the_table_has_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["--help"]) == 0
    overview = capsys.readouterr().out
    for words in COMMANDS:
        assert words.split()[0] in overview
        assert run([*words.split(), "--help"]) == 0
        text = capsys.readouterr().out
        assert f"Usage: pjv2 {words}" in text
        assert "--json" in text


@pytest.mark.parametrize("words", [["--version"], ["--json", "--version"], ["--version", "--json"]])
def test_the_version_is_a_result(capsys: pytest.CaptureFixture[str], words: list[str]) -> None:
    assert run(words) == 0
    told = capsys.readouterr()
    assert told.err == ""
    if "--json" in words:
        assert json.loads(told.out)["event"] == "Version"
    else:
        assert told.out.startswith("pjv2 ")


# ---------------------------------------------------------------- the lab


@pytest.mark.parametrize(("words", "name"), [(["demo"], "demo"), (["lab", "up"], "up")])
def test_the_lab_is_given_the_output_and_its_end_is_the_commands_end(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], words: list[str], name: str
) -> None:
    async def done(out: Output) -> None:
        out.say("on the way")
        out.result("DemoDone", seconds=1.5)

    async def failed(out: Output) -> None:
        raise NotNow("the relay is away")

    monkeypatch.setattr(lab, name, SimpleNamespace(run=done), raising=False)
    assert run([*words, "--json"]) == 0
    told = capsys.readouterr()
    assert json.loads(told.out)["event"] == "DemoDone"
    assert told.err == "on the way\n"
    monkeypatch.setattr(lab, name, SimpleNamespace(run=failed))
    assert run(words) == 4


def test_a_lab_without_its_kernel_says_what_to_install() -> None:
    with pytest.raises(WrongUsage, match=r"pip install 'pjv2\[lab\]'"), explaining_what_the_lab_needs():
        raise ModuleNotFoundError("No module named 'pbk'", name="pbk")
    with pytest.raises(ModuleNotFoundError), explaining_what_the_lab_needs():
        raise ModuleNotFoundError("No module named 'pjv2.nonsense'", name="pjv2.nonsense")


# ---------------------------------------------------------------- as a process


def process(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)


def test_the_module_is_a_program_too() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "pjv2.cli", "--version"], capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stdout.startswith("pjv2 ")


COMMAND = """
import sys, types
from pjv2.cli.app import run
import pjv2.cli.app as app
async def wait(cli):
    import asyncio
    cli.out.result("Started")
    try:
        await asyncio.Event().wait()
    finally:
        await asyncio.sleep(0)
        cli.out.result("Released")
def command(cli):
    secret = "hun" + "ter2"
    {body}
module = types.ModuleType("a_command")
module.run = command
sys.modules["a_command"] = module
app.COMMANDS = {{"try": "a_command"}}
from pjv2.cli import main
sys.exit(main(["try", *sys.argv[1:]]))
"""


def test_no_traceback_and_no_locals_leave_a_process() -> None:
    done = process(COMMAND.format(body="raise RuntimeError(secret)"))
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert "hunter2" not in done.stderr + done.stdout


def test_a_reader_that_leaves_early_gets_no_complaint() -> None:
    body = "[cli.out.result('X', n=n) for n in range(100000)]"
    with subprocess.Popen(
        [sys.executable, "-c", COMMAND.format(body=body), "--json"], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as running:
        assert running.stdout is not None
        assert running.stderr is not None
        assert b'"event":"X"' in running.stdout.readline()
        running.stdout.close()
        assert running.stderr.read() == b""
        assert running.wait(60) == 130


@pytest.mark.skipif(os.name != "posix", reason="signals are POSIX's")
@pytest.mark.parametrize(
    ("how", "before"),
    [
        (signal.SIGINT, ""),
        (signal.SIGTERM, ""),
        # A shell's background job ignores interruptions by the keyboard.
        (signal.SIGTERM, "import signal; signal.signal(signal.SIGINT, signal.SIG_IGN); "),
    ],
)
def test_a_stopped_process_says_that_it_was_interrupted(how: signal.Signals, before: str) -> None:
    body = f"{before}return wait(cli)"
    with subprocess.Popen(
        [sys.executable, "-c", COMMAND.format(body=body), "--json"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as running:
        assert running.stdout is not None
        assert json.loads(running.stdout.readline())["event"] == "Started"
        running.send_signal(how)
        stdout, stderr = running.communicate(timeout=60)
    assert running.returncode == 130
    released, told = stdout.splitlines()
    assert json.loads(released)["event"] == "Released"
    assert json.loads(told)["error"] == "Interrupted"
    assert stderr.startswith("pjv2: interrupted")
