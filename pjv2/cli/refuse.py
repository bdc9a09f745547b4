"""`pjv2 refuse ID`: no proposal, where the policy asks a person; the payment arrives plainly."""

from __future__ import annotations

from pjv2.cli.command import Cli, IdArgument


async def run(cli: Cli, id: IdArgument) -> None:
    """Refuse to propose (policy: approve = "ask"): the payer's Original is broadcast instead."""
    from pjv2.cli.progress import choose, step
    from pjv2.session.needs import Decline

    async with cli.payjoin() as pj:
        await step(cli, pj, await choose(pj, id), Decline())
