"""`pjv2 completion SHELL`: the script that lets a shell complete commands."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated

import typer

from pjv2.cli.command import Cli


class Shell(StrEnum):
    """A shell that can be told how to complete."""

    BASH = "bash"
    ZSH = "zsh"
    FISH = "fish"


def run(cli: Cli, shell: Annotated[Shell, typer.Argument(metavar="SHELL", help="One of bash, zsh, fish.")]) -> None:
    """Print the script that completes commands in a shell; `pjv2 --install-completion` installs it for the one you use."""
    # What typer's own --show-completion prints; it has no public name.
    from typer._completion_shared import get_completion_script

    script = get_completion_script(prog_name="pjv2", complete_var="_PJV2_COMPLETE", shell=shell.value)
    cli.out.result("Completion", script, shell=shell.value, script=script)
