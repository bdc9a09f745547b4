"""`pjv2 cancel ID`: stop a session, as far as it can still be stopped."""

from __future__ import annotations

from typing import Annotated

import typer

from pjv2.cli.command import Cli, IdArgument
from pjv2.errors import WrongUsage


async def run(
    cli: Cli,
    id: IdArgument,
    no_broadcast: Annotated[
        bool,
        typer.Option("--no-broadcast", help="Do not broadcast the payer's Original, or our own, as the end of it."),
    ] = False,
    reclaim: Annotated[
        str | None,
        typer.Option("--reclaim", metavar="F", help="A payment's inputs go back to the wallet, at F sat/vB."),
    ] = None,
) -> None:
    """Stop a session: what is ours is released, and what was promised is paid plainly unless told otherwise."""
    from pjv2 import session as model
    from pjv2.cli.progress import choose, step
    from pjv2.session.needs import Cancel, Command, Reclaim
    from pjv2.session.send import Stage
    from pjv2.units import FeeRate

    rate = None if reclaim is None else FeeRate.from_sat_per_vb(reclaim)
    async with cli.payjoin() as pj:
        driver = pj.driver
        session = await choose(pj, id)
        before = await driver.load(session)
        commands: tuple[Command, ...] = (Cancel(broadcast=not no_broadcast),)
        sent = isinstance(before, model.Sender) and before.stage is not Stage.CREATED
        if rate is not None:
            if not isinstance(before, model.Sender):
                raise WrongUsage(
                    "only a payment that this wallet sends can be reclaimed: cancel the request without --reclaim"
                )
            if sent:
                address = await driver.wallet.new_address(change=True)
                wish = Reclaim(address.script, rate)
                # Asked of the rules first: a rate that cannot be must not leave half a cancellation behind.
                model.decide(before, wish, driver.clock.now(), driver.entropy, model.Memory())
                commands = (Cancel(broadcast=False), wish)
        if isinstance(before, model.Receiver) and before.original is None and before.closed is None:
            cli.out.say(
                "Asking the directory whether a payment is under way already; an empty mailbox answers after half a minute."
            )
        after = await step(cli, pj, session, *commands)
        if after.closed is not None or cli.json:
            return
        if isinstance(after, model.Sender) and sent and no_broadcast and rate is None:
            cli.out.say(
                "The Original was given away and the receiver may broadcast it at any time: its coins stay leased, and paying again "
                f"may pay twice. To take the coins back: {cli.words('cancel', session[:8], '--reclaim', 'FEERATE')}"
            )
        elif isinstance(after, model.Receiver) and after.posting is not None:
            cli.out.say("The proposal had left: nothing is released before a transaction is buried.")
