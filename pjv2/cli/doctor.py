"""`pjv2 doctor`: everything a payment will need, tried beforehand."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import TYPE_CHECKING, Annotated

import typer

from pjv2.cli.command import Cli
from pjv2.errors import NotNow, WrongUsage

if TYPE_CHECKING:
    from pjv2.doctor import Check

_COLOURS = {"ok": "green", "warning": "yellow", "failed": "red"}


async def run(
    cli: Cli,
    deadline: Annotated[float, typer.Option("--deadline", min=0.1, help="Seconds for each check.")] = 10.0,
) -> None:
    """Try everything a payment will need: mailroom, wallet, chain, node, coins, clock, store, policy."""
    from rich.text import Text

    from pjv2.cli.output import plain, table
    from pjv2.doctor import exit_code

    found = []
    drawn = table("check", "status", "why", "what to do")
    async for check in _examined(cli, deadline):
        found.append(check)
        drawn.add_row(
            check.name, Text(check.status, _COLOURS[check.status]), Text(plain(check.why)), Text(plain(check.todo))
        )
        if cli.out.json:
            cli.out.result("Check", name=check.name, status=check.status, why=check.why, todo=check.todo)
    code = exit_code(found)
    counts = {status: sum(check.status == status for check in found) for status in _COLOURS}
    if not cli.out.json:
        cli.out.show(drawn)
    words = "Ready to pay and be paid." if not code else "Not ready: see what failed."
    cli.out.result(
        "DoctorDone",
        f"{words} {counts['ok']} ok, {counts['warning']} to know of, {counts['failed']} failed.",
        ok=code == 0,
        warnings=counts["warning"],
        failed=counts["failed"],
    )
    if code:
        raise typer.Exit(code)


async def _examined(cli: Cli, deadline: float) -> AsyncIterator[Check]:
    from pjv2.doctor import Installation, examine, failure

    try:
        config = cli.config
    except (WrongUsage, NotNow) as exc:
        yield failure("configuration", exc, "Correct it, or write a new one with pjv2 init.")
        return
    if cli.opened is None:
        async with Installation(config) as it:
            async for check in examine(it, deadline=deadline):
                yield check
        return
    async with cli.payjoin() as desk, Installation.of(config, desk.driver) as it:
        async for check in examine(it, deadline=deadline):
            yield check
