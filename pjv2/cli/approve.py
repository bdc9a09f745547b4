"""`pjv2 approve ID`: agree to propose, where the policy asks a person."""

from __future__ import annotations

from pjv2.cli.command import Cli, IdArgument


async def run(cli: Cli, id: IdArgument) -> None:
    """Agree to a proposal that waits for it (policy: approve = "ask", and until when: approve_within)."""
    from pjv2.cli.progress import choose, moment, step
    from pjv2.session.needs import Approve
    from pjv2.session.receive import Receiver, approve_until

    async with cli.payjoin() as pj:
        session = await choose(pj, id)
        state = await pj.driver.load(session)
        until = approve_until(state) if isinstance(state, Receiver) else None
        await step(cli, pj, session, Approve())
        if until is not None:
            cli.out.say(f"It could be approved until {moment(until)}.")
