"""`pjv2 approve ID`: agree to propose, where the policy asks a person."""

from __future__ import annotations

from pjv2.cli.command import Cli, IdArgument


async def run(cli: Cli, id: IdArgument) -> None:
    """Agree to a proposal that waits for it (policy: approve = "ask")."""
    from pjv2.cli.progress import choose, step
    from pjv2.session.needs import Approve

    async with cli.payjoin() as pj:
        await step(cli, pj, await choose(pj, id), Approve())
