"""`pjv2 demo`: the main job on a world of its own."""

from __future__ import annotations

from pjv2.cli.command import Cli, explaining_what_the_lab_needs


async def run(cli: Cli) -> None:
    """Watch a payment become two Lightning channels, on a world of its own: no server, no node, no account."""
    with explaining_what_the_lab_needs():
        from pjv2.lab import demo

    await demo.run(cli.out)
