"""`pjv2 history`: the sessions of the store, newest first."""

from __future__ import annotations

from typing import Annotated

import typer

from pjv2.cli.command import Cli


async def run(
    cli: Cli,
    open_only: Annotated[bool, typer.Option("--open", help="Only sessions that are not closed.")] = False,
) -> None:
    """List the sessions, newest first."""
    from pjv2.cli.output import plain, table, utc
    from pjv2.cli.sessions import reading, row_facts, short_ids

    async with reading(cli.config) as store:
        every = () if store is None else await store.rows()
    rows = tuple(row for row in every if row.outcome is None) if open_only else every
    if cli.out.json:
        for row in rows:
            cli.out.result("Session", session=row.session, **row_facts(row))
        return
    if not rows:
        cli.out.say("No open session." if open_only and every else "No session yet.")
        return
    drawn = table("id", "created (UTC)", "role", "sats", "state", "outcome", "label")
    short = short_ids(every)
    for row in rows:
        amount = "" if row.amount is None else f"{row.amount:_}"
        note = row.label or row.note or row.order or ""
        created = utc(row.created)[:16].replace("T", " ")
        drawn.add_row(short[row.session], created, row.role, amount, row.state, row.outcome or "", plain(note))
    cli.out.show(drawn)
