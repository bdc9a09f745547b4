"""The table of commands, and what is said when one fails.

Law: every way out of a command ends here, as one sentence, one next step and one exit code.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Sequence
from importlib import import_module
from typing import Annotated

import typer

from pjv2.cli.command import Cli, ConfigOption, JsonOption, VerboseOption, as_typer
from pjv2.cli.output import Output, ReaderGone
from pjv2.errors import NotNow, PayjoinError, WrongUsage

COMMANDS: dict[str, str] = {
    "init": "pjv2.cli.init",
    "doctor": "pjv2.cli.doctor",
    "receive": "pjv2.cli.receive",
    "send": "pjv2.cli.send",
    "run": "pjv2.cli.run",
    "resume": "pjv2.cli.resume",
    "cancel": "pjv2.cli.cancel",
    "approve": "pjv2.cli.approve",
    "refuse": "pjv2.cli.refuse",
    "plan add": "pjv2.cli.plan:add",
    "plan list": "pjv2.cli.plan:shown",
    "plan remove": "pjv2.cli.plan:remove",
    "channels": "pjv2.cli.channels",
    "history": "pjv2.cli.history",
    "show": "pjv2.cli.show",
    "explain": "pjv2.cli.explain",
    "relays": "pjv2.cli.relays",
    "export": "pjv2.cli.export",
    "store encrypt": "pjv2.cli.store:encrypt",
    "store decrypt": "pjv2.cli.store:decrypt",
    "completion": "pjv2.cli.completion",
    "demo": "pjv2.cli.demo",
    "lab up": "pjv2.cli.lab_up",
}
"""A command's words and the module whose `run` it is, or `module:function`."""

GROUPS = {
    "store": "The session database: stored events behind a key, or in the clear.",
    "lab": "A whole payjoin world on this machine; its coins are worth nothing.",
    "plan": "The channel schedule: channels that wait for a payment large enough.",
}

OUR_BUG = 1
WRONG_USAGE = 2
INTERRUPTED = 130


def build(commands: dict[str, str] | None = None) -> typer.Typer:
    """The application with these commands (default: all)."""
    app = _typer("pjv2")
    app.callback(invoke_without_command=True)(_root)
    groups: dict[str, typer.Typer] = {}
    for words, module in (COMMANDS if commands is None else commands).items():
        *group, name = words.split()
        parent = app
        if group:
            if group[0] not in groups:
                groups[group[0]] = _typer(group[0])
                app.add_typer(groups[group[0]])
            parent = groups[group[0]]
        path, _, function = module.partition(":")
        parent.command(name)(as_typer(getattr(import_module(path), function or "run")))
    return app


def _typer(name: str) -> typer.Typer:
    return typer.Typer(
        name=name,
        help=GROUPS.get(name),
        # Plain help: drawing it with rich would double the time to the first line.
        rich_markup_mode=None,
        pretty_exceptions_enable=False,
        pretty_exceptions_show_locals=False,
        context_settings={"help_option_names": ["-h", "--help"]},
    )


def _root(
    context: typer.Context,
    config: ConfigOption = None,
    json: JsonOption = False,
    verbose: VerboseOption = 0,
    version: Annotated[bool, typer.Option("--version", help="Say which version this is.")] = False,
) -> None:
    """Payjoin from the shell: receive behind NAT, send, and turn a payment into Lightning channels."""
    cli = context.ensure_object(Cli)
    cli.told(config, json, verbose)
    if version:
        found = _version()
        cli.out.result("Version", f"pjv2 {found}", version=found)
    elif context.invoked_subcommand is None:
        raise WrongUsage("name a command: pjv2 --help lists them")


def _version() -> str:
    from importlib.metadata import PackageNotFoundError
    from importlib.metadata import version as version_of

    try:
        return version_of("pjv2")
    except PackageNotFoundError:
        return "(not installed)"


def run(args: Sequence[str] | None = None, commands: dict[str, str] | None = None, *, cli: Cli | None = None) -> int:
    """Run a command and answer its exit code; a program that runs it itself hands in its own `cli`."""
    words = list(sys.argv[1:] if args is None else args)
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    cli = cli or Cli()
    try:
        command = typer.main.get_command(build(commands))
        code = command.main(words, prog_name="pjv2", standalone_mode=False, obj=cli)
        if code == INTERRUPTED:  # how typer hands on an interruption by the keyboard
            return _interrupted(_output(cli, words), cli)
        return code if isinstance(code, int) else 0
    except KeyboardInterrupt:
        return _interrupted(_output(cli, words), cli)
    except ReaderGone:
        return _nobody_reads()
    except Exception as exc:
        try:
            return _told(exc, cli, words)
        except (ReaderGone, NotNow):  # there is nowhere left to tell it
            return _nobody_reads()


def _output(cli: Cli, words: Sequence[str]) -> Output:
    """The output, also when the line could not be read far enough to see its --json."""
    if not cli.json and "--json" in words:
        return Output(json=True, verbose=cli.verbose, stdout=cli.stdout, stderr=cli.stderr)
    return cli.out


def _told(exc: Exception, cli: Cli, words: Sequence[str]) -> int:
    out = _output(cli, words)
    first = _leaf(exc)
    if isinstance(first, typer.Abort):
        return _interrupted(out, cli)
    if cli.verbose > 1:
        import traceback

        out.say("".join(traceback.format_exception(exc)))
    if isinstance(first, PayjoinError):
        return _fail(out, type(first).__name__, _sentence(str(first)), _next_step(first), first.exit_code)
    if isinstance(first, typer.TyperException):
        line = first.format_message()
        path = getattr(getattr(first, "ctx", None), "command_path", "pjv2")
        return _fail(out, "WrongUsage", _sentence(line), f"See {path} --help.", WRONG_USAGE)
    # What an unforeseen exception says may hold anything, a key too; its kind and place are enough to find it.
    return _fail(
        out,
        type(first).__name__,
        f"this is a bug in pjv2: {type(first).__name__} {_where(first)}",
        "Nothing that was stored is lost. Run it again with -v -v for the traceback, and report that.",
        OUR_BUG,
    )


def _fail(out: Output, kind: str, message: str, next_step: str, code: int) -> int:
    out.say(f"pjv2: {message}", next_step)
    if out.json:
        out.result("Error", error=kind, message=message, next=next_step, exit=code)
    return code


def _interrupted(out: Output, cli: Cli) -> int:
    return _fail(
        out,
        "Interrupted",
        "interrupted; what was stored stays",
        cli.resume or "Run the same command again.",
        INTERRUPTED,
    )


def _leaf(exc: Exception) -> Exception:
    """The first cause in a group of failed tasks; one that is no PayjoinError comes first, for it is a bug."""
    if not isinstance(exc, ExceptionGroup):
        return exc
    leaves = [_leaf(one) for one in exc.exceptions]
    return next((one for one in leaves if not isinstance(one, PayjoinError)), leaves[0])


def _sentence(message: str) -> str:
    return " ".join(message.split())


def _next_step(error: PayjoinError) -> str:
    """The part of its class's sentence that says what to do."""
    sentence = next((kind.__doc__ for kind in type(error).__mro__ if kind.__doc__), "")
    line = _sentence(sentence.partition("\n\n")[0])
    after = getattr(error, "after", None)
    return f"{line} It may work in {after:.0f} s." if after else line


def _where(exc: BaseException) -> str:
    trace = exc.__traceback__
    if trace is None:
        return ""
    while trace.tb_next is not None:
        trace = trace.tb_next
    return f"in {os.path.basename(trace.tb_frame.f_code.co_filename)} line {trace.tb_lineno}"


def _nobody_reads() -> int:
    # The interpreter flushes at exit and would complain about the closed pipe.
    with contextlib.suppress(OSError, ValueError, AttributeError):  # a stream without a file, or none at all
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return INTERRUPTED
