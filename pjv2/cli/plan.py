"""`pjv2 plan add|list|remove`: the schedule of channels that wait for a payment large enough (`pjv2 receive --queue`)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from pjv2.cli.command import Cli

if TYPE_CHECKING:
    from pjv2.schedule import Intention


async def add(
    cli: Cli,
    channel: Annotated[
        str,
        typer.Argument(
            metavar="PEER=CAPACITY[,private][,push=N][,type=T][,min=N]",
            help="PEER is pubkey@host:port; CAPACITY in sats, or rest.",
        ),
    ],
) -> None:
    """Keep the intention to open a channel."""
    from pjv2.backends.system import SystemClock, SystemEntropy
    from pjv2.opening import open_store
    from pjv2.psbt.plan import parse_channel_order
    from pjv2.schedule import changing

    order = parse_channel_order(channel)
    rng = SystemEntropy()
    store = await open_store(cli.config)
    try:
        async with changing(store, rng) as schedule:
            one = await schedule.add(order, SystemClock().now(), rng)
    finally:
        await store.close()
    _tell(cli, one, f"Plan {one.id} waits for a payment: pjv2 receive AMOUNT --queue")


async def shown(cli: Cli) -> None:
    """List the schedule, oldest first."""
    from pjv2.cli.output import plain, table, utc
    from pjv2.cli.sessions import reading
    from pjv2.psbt.plan import format_channel_order
    from pjv2.schedule import read

    async with reading(cli.config) as store:
        intentions = () if store is None else await read(store)
    if cli.json:
        for one in intentions:
            _tell(cli, one, "")
        return
    if not intentions:
        cli.out.say("No plan yet: pjv2 plan add PEER=CAPACITY keeps one.")
        return
    drawn = table("id", "added (UTC)", "state", "channel", "carried by")
    for one in intentions:
        carrier = one.session[:8] if one.session is not None else ""
        where = carrier if one.outpoint is None else str(one.outpoint)
        added = utc(one.added)[:16].replace("T", " ")
        drawn.add_row(one.id, added, one.state, plain(format_channel_order(one.order)), where)
    cli.out.show(drawn)


async def remove(
    cli: Cli, id: Annotated[str, typer.Argument(metavar="ID", help="A plan's id, or the beginning of it.")]
) -> None:
    """Forget a plan that no open session carries."""
    from pjv2.backends.system import SystemEntropy
    from pjv2.cli.sessions import reading
    from pjv2.errors import WrongUsage
    from pjv2.schedule import changing

    async with reading(cli.config) as store:
        if store is None:
            raise WrongUsage(f"no plan begins with {id!r}: there is none yet")
        async with changing(store, SystemEntropy()) as schedule:
            one = await schedule.remove(id)
    _tell(cli, one, f"Plan {one.id} is forgotten.", removed=True)


def _tell(cli: Cli, one: Intention, view: str, **more: Any) -> None:
    order = one.order
    cli.out.result(
        "Plan",
        view,
        session=one.session,
        plan=one.id,
        state=one.state,
        added=one.added,
        peer=order.peer,
        capacity="rest" if order.capacity is None else order.capacity,
        private=order.private,
        push=order.push,
        type=order.kind,
        min=order.min_capacity,
        outpoint=one.outpoint,
        **more,
    )
