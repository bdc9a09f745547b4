"""`pjv2 resume`: one bounded pass over open sessions, for cron, timers and background slots."""

from __future__ import annotations

from typing import Annotated

import typer

from pjv2.cli.command import Cli
from pjv2.errors import NotNow, WrongUsage


async def run(
    cli: Cli,
    ids: Annotated[
        list[str] | None,
        typer.Argument(metavar="[ID]...", help="Sessions, by the beginning of their ids; none: all open ones."),
    ] = None,
    budget: Annotated[
        float | None, typer.Option("--budget", metavar="S", help="Seconds that the pass may take.")
    ] = None,
) -> None:
    """Work on open sessions once, until each waits for somebody else; then exit. Code 4: none of them could be worked on."""
    from pjv2.cli.progress import choose
    from pjv2.cli.run import hearing

    if budget is not None and not 0 < budget < float("inf"):
        raise WrongUsage("a budget is a number of seconds above 0")
    cli.resume = f"What was done is stored; go on with: {cli.words('resume')}"
    async with cli.payjoin() as pj:
        chosen = tuple([await choose(pj, beginning) for beginning in ids]) if ids else None
        with hearing(pj, cli):
            done = await pj.poller.run_once(budget, chosen)
        waiting = [f"{one.session[:8]} waits: {one.why}" for one in done.waited]
        cli.out.result(
            "PassDone",
            "\n".join(
                [f"{done.open} open, {done.progressed} moved on, {done.deferred} left for later", *waiting],
            ),
            open=done.open,
            progressed=done.progressed,
            deferred=done.deferred,
            waited=[{"session": one.session, "why": one.why} for one in done.waited],
        )
        if done.stalled:
            cli.out.say(f"Nothing could be worked on, and nothing is lost. Try again later with: {cli.words('resume')}")
            raise typer.Exit(NotNow.exit_code)
