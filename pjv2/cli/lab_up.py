"""`pjv2 lab up`: a world that stays."""

from __future__ import annotations

from pjv2.cli.command import Cli, explaining_what_the_lab_needs


async def run(cli: Cli) -> None:
    """Start a payjoin world that stays up until interrupted, and print a configuration for it."""
    with explaining_what_the_lab_needs():
        from pjv2.lab import up

    cli.resume = "Start it again with: pjv2 lab up"
    await up.run(cli.out)
