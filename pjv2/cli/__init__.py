"""The command line: the library with manners. It refuses nothing itself; it tells what the library refused, and how to go on.

Law: one sentence and a next step on stderr, an exit code by the branch of the error tree, and never a traceback unless asked for
with `-v -v`; no traceback shows values.
"""

from __future__ import annotations


def main(args: list[str] | None = None) -> int:
    """Run a command and answer its exit code. `args` defaults to the process's own."""
    from pjv2.cli.app import run

    return run(args)
