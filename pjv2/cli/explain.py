"""`pjv2 explain ID`: a session's log as prose, and its place on the state diagram."""

from __future__ import annotations

from typing import Annotated

import typer

from pjv2.cli.command import Cli


async def run(
    cli: Cli, id: Annotated[str, typer.Argument(metavar="ID", help="A session's id, or the beginning of it.")]
) -> None:
    """Tell a session's log as prose, and its place on the state diagram."""
    from pjv2.cli.output import utc
    from pjv2.cli.progress import short_of
    from pjv2.cli.sessions import look_up
    from pjv2.session import explain

    found = await look_up(cli.config, id)
    prose = explain(found.state, found.events)
    path = found.path
    if missing := short_of(found.state):
        prose.append(f"It paid {missing} sat less than was asked for.")
    # The first sentences belong to the events, one each; what follows is the place on the diagram.
    told = [f"{utc(event.at)}  {sentence}" for event, sentence in zip(found.events, prose, strict=False)]
    view = "\n".join([*told, "", f"States: {' -> '.join(path)}", *prose[len(found.events) :]])
    cli.out.result("Session", view, session=found.row.session, **found.facts, states=path, explanation=prose)
