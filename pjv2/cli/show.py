"""`pjv2 show ID`: what is public about one session."""

from __future__ import annotations

from typing import Annotated

import typer

from pjv2.cli.command import Cli

TIMES = frozenset({"created", "expires", "next_due", "approve_until"})


async def run(
    cli: Cli, id: Annotated[str, typer.Argument(metavar="ID", help="A session's id, or the beginning of it.")]
) -> None:
    """Show what is public about one session."""
    from pjv2.cli.output import facts, utc
    from pjv2.cli.sessions import look_up

    found = await look_up(cli.config, id)
    shown = {name: utc(value) if name in TIMES and value is not None else value for name, value in found.facts.items()}
    cli.out.result("Session", facts({"session": found.row.session, **shown}), session=found.row.session, **found.facts)
