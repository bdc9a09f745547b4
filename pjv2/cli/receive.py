"""`pjv2 receive`: ask for a payment, show how, and follow it."""

from __future__ import annotations

from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from pjv2.cli.command import Cli, DetachOption, DryRunOption, Until, UntilOption, YesOption
from pjv2.errors import WrongUsage

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Sequence

    from pjv2.app import Payjoin
    from pjv2.ports import WalletAddress
    from pjv2.psbt.plan import ChannelOrder
    from pjv2.schedule import Schedule
    from pjv2.session.events import Policy
    from pjv2.start import ColdSource, Request
    from pjv2.units import Network, Sats

COLUMNS = 80


async def run(
    cli: Cli,
    amount: Annotated[
        str | None,
        typer.Argument(metavar="[AMOUNT]", help="Satoshis (100_000), or bitcoin (0.001btc); none: any amount."),
    ] = None,
    channel: Annotated[
        list[str] | None,
        typer.Option(
            "--channel",
            metavar="PEER=CAPACITY[,private][,push=N][,type=T][,min=N]",
            help="Open a channel with the payment; PEER is pubkey@host:port, one CAPACITY may be rest. Repeatable.",
        ),
    ] = None,
    queue: Annotated[
        bool, typer.Option("--queue", help="Also open the waiting channels that fit (pjv2 plan).")
    ] = False,
    top_up: Annotated[bool, typer.Option("--top-up", help="Let a coin of our own add what the channels miss.")] = False,
    expire_in: Annotated[int | None, typer.Option("--expire-in", metavar="S", help="Seconds; at most 518400.")] = None,
    label: Annotated[str | None, typer.Option("--label", metavar="T", help="In the URI; the payer reads it.")] = None,
    note: Annotated[str | None, typer.Option("--note", metavar="T", help="Stays here.")] = None,
    order: Annotated[
        str | None,
        typer.Option("--order", metavar="ID", help="Unique; asking again gives the same request. Stays here."),
    ] = None,
    own_input: Annotated[
        Literal["require", "prefer"] | None,
        typer.Option("--own-input", help="Channels only beside a coin of our own, or also (a risk) without one."),
    ] = None,
    cold: Annotated[
        bool | None,
        typer.Option(
            "--cold/--no-cold",
            help="Let the payment arrive at the cold wallet ([wallet] cold_descriptor); by default where there is one, without channels.",
        ),
    ] = None,
    fallback_after: Annotated[
        float | None,
        typer.Option("--fallback-after", metavar="S", help="Seconds from expiry until the Original is broadcast."),
    ] = None,
    qr_png: Annotated[
        Path | None, typer.Option("--qr-png", metavar="FILE", help="Write the QR code as a picture, too.")
    ] = None,
    dry_run: DryRunOption = False,
    detach: DetachOption = False,
    until: UntilOption = Until.CONFIRMED,
    yes: YesOption = False,
) -> None:
    """Ask for a payment: print its URI, then follow it until it is confirmed."""
    from pjv2.cli.amounts import parse_amount
    from pjv2.cli.progress import follow, resume_words
    from pjv2.psbt.plan import parse_channel_order

    asked = None if amount is None else parse_amount(amount)
    orders = [parse_channel_order(text) for text in channel or ()]
    if cold and (orders or queue):
        raise WrongUsage("--cold and channels exclude each other: a channel takes the payment into the Lightning node")
    if queue and asked is None:
        raise WrongUsage("--queue needs an AMOUNT: without one nobody can tell which plans fit")
    if qr_png is not None and not qr_png.absolute().parent.is_dir():
        raise WrongUsage(f"the picture cannot be written: there is no directory {qr_png.absolute().parent}")
    told = {"own_input": own_input, "fallback_after": fallback_after, "expire_in": expire_in}
    policy = {name: value for name, value in told.items() if value is not None}
    if policy:
        cli.overrides["policy"] = cli.overrides.get("policy", {}) | policy
    wish: dict[str, Any] = {"top_up": top_up, "label": label, "note": note, "order": order, "cold": cold}
    async with cli.payjoin() as pj:
        known = None if order is None else await pj.driver.store.find(order=order)
        if known is None:
            made = await _made(cli, pj, asked, orders, wish, queue=queue, ask=not yes, dry_run=dry_run)
            if made is None:
                return
        else:
            if asked is not None and known.amount != asked:
                raise WrongUsage(
                    f"order {order!r} was asked for before, over {known.amount} sat (session {known.session[:8]}): "
                    "another amount needs another order"
                )
            if dry_run:
                cli.out.result("DryRun", "Nothing was asked for (dry run).", session=known.session, amount=known.amount)
                return
            made = await _start(pj, asked, orders, wish)
            cli.out.say(f"This order was asked for before: session {made.session[:8]}")
            if queue:
                await _bind_again(pj, made.session)
        cli.resume = resume_words(cli, made.session)
        _show(cli, made, qr_png)
        if detach:
            await _created(cli, pj, made.session)
            cli.out.say(cli.resume)
            return
        code = await follow(cli, pj, made.session, until)
    raise typer.Exit(code)


async def _created(cli: Cli, pj: Payjoin, session: str) -> None:
    """The first line of the log, for programs."""
    from pjv2 import session as model

    if cli.out.json:
        record = (await pj.driver.store.load(session))[0]
        event = model.decode(record.name, record.data)
        facts = dict(model.public_event(model.evolve(None, event), event))
        del facts["session"]
        cli.out.result(record.name, at=event.at, session=session, **facts)


async def _start(
    pj: Payjoin, amount: Sats | None, orders: Sequence[ChannelOrder], wish: dict[str, Any], driver: Any = None
) -> Request:
    from pjv2 import start

    policy = pj.config.session_policy()
    source = start.cold_for(pj.cold, wish["cold"], orders)
    return await start.receive(
        driver or pj.driver,
        pj.config.network,
        amount,
        policy=policy,
        channels=orders,
        deposit=policy.on_peer_failure == "drop",
        expire_in=pj.config.policy.expire_in,
        **wish | {"cold": source if driver is None or source is None else _Unnamed(source)},
    )


class _Unnamed:
    """A cold wallet whose addresses are nobody's: nothing is given out for a request that is only shown."""

    def __init__(self, source: ColdSource) -> None:
        self._source = source

    async def network(self) -> Network:
        return await self._source.network()

    async def new_address(self) -> WalletAddress:
        from pjv2.ports import WalletAddress
        from pjv2.psbt.tx import script_to_address

        script = b"\x00\x14" + bytes([1]) * 20
        return WalletAddress(script_to_address(script, await self.network()), script, 0)


async def _made(
    cli: Cli,
    pj: Payjoin,
    amount: Sats | None,
    given: list[ChannelOrder],
    wish: dict[str, Any],
    *,
    queue: bool,
    ask: bool,
    dry_run: bool,
) -> Request | None:
    """A new request, explained and agreed to; None when it was only shown, or not agreed to."""
    from pjv2.cli.preview import Composed, as_if

    policy = pj.config.session_policy()
    async with _schedule(pj, queue and not dry_run) as schedule:
        orders = [*given]
        if queue and amount is not None:
            orders += await _queued(cli, pj, amount, given, policy)
        # Everything that can be known is asked before the URI exists, so that payjoin is not offered when it cannot work.
        shown = await _start(pj, amount, orders, wish | {"order": None}, as_if(pj.driver, Composed(pj.driver)))
        risks = _risks(orders, policy)
        _explain(cli, pj, amount, shown, risks)
        if dry_run:
            _dry(cli, pj, amount, orders, shown, risks)
            return None
        if risks and ask and cli.asks and not await cli.confirm("Go on?"):
            cli.out.say("Nothing was asked for.")
            return None
        made = await _start(pj, amount, orders, wish)
        if schedule is not None:
            # Before the URI is shown: nobody can pay a session whose plans another request could take.
            await schedule.bind(await pj.driver.load(made.session))
    return made


@asynccontextmanager
async def _schedule(pj: Payjoin, wanted: bool) -> AsyncIterator[Schedule | None]:
    from pjv2.schedule import changing

    if not wanted:
        yield None
        return
    async with changing(pj.driver.store, pj.driver.entropy) as schedule:
        yield schedule


async def _bind_again(pj: Payjoin, session: str) -> None:
    """A crash between the session and its binding: the plans that it carries are bound now."""
    from pjv2.schedule import changing

    async with changing(pj.driver.store, pj.driver.entropy) as schedule:
        await schedule.bind(await pj.driver.load(session))


async def _queued(cli: Cli, pj: Payjoin, amount: Sats, given: list[ChannelOrder], policy: Policy) -> list[ChannelOrder]:
    """Orders of waiting plans that fit beside those given, with peers that answer now."""
    from pjv2.errors import NotNow
    from pjv2.schedule import fitting, read

    driver = pj.driver
    if driver.channels is None:
        raise WrongUsage("channels need a Lightning node: configure [lightning]")
    waiting = [one for one in await read(driver.store) if one.state == "waiting"]
    height = (await driver.chain.tip()).height
    away = set(await driver.store.peers_in_use())
    away |= {peer for peer, until in (await driver.store.blocked_peers()).items() if until > height}
    node = await driver.channels.node()
    for order in (one.order for one in waiting):
        least = order.min_capacity if order.capacity is None else order.capacity
        if not node.min_capacity <= least <= node.max_capacity:
            away.add(order.peer)
        if order.peer not in away:
            try:
                await driver.channels.connect(order.peer, order.host)
            except NotNow as exc:
                away.add(order.peer)
                cli.out.say(f"A plan goes on waiting: {exc}")
    public = sum(not order.private for order in (*given, *(one.order for one in waiting)))
    reserves = [0, *[await driver.channels.anchor_reserve(count) for count in range(1, public + 1)]]
    deposit = policy.on_peer_failure == "drop"
    chosen = fitting(waiting, given, amount, policy, deposit=deposit, reserves=reserves, away=frozenset(away))
    if not chosen:
        cli.out.say("No waiting plan fits this payment.")
    return [one.order for one in chosen]


# ---------------------------------------------------------------- showing


def _risks(orders: Sequence[ChannelOrder], policy: Policy) -> list[str]:
    found = [
        f"{order.push:_} sat are given to the peer {order.peer[:10]}… when the channel opens"
        for order in orders
        if order.push
    ]
    if orders and policy.own_input == "prefer":
        found.append(
            "own_input = prefer: without a coin of ours the payer can re-make the transaction under another id, and the money ends "
            "where only the peer's consent gets it out"
        )
    return found


def _explain(cli: Cli, pj: Payjoin, amount: Sats | None, shown: Request, risks: list[str]) -> None:
    """Who gets what, before anybody sees a URI."""
    from pjv2.cli.output import plain, table

    plan = shown.plan
    if cli.out.json:
        return
    drawn = table("what", "value", "note")
    drawn.show_header = False
    if plan is not None:
        for row in plan.rows:
            drawn.add_row(plain(row.what), row.value, row.note)
    else:
        policy = pj.config.policy
        asked = "any amount" if amount is None else f"{amount:_} sat"
        if shown.cold is not None:
            drawn.add_row("asked", asked, "to a fresh address of your cold wallet, beside no coin of yours")
            drawn.add_row("if the payer forbids that", "an ordinary request", "to an address of your wallet")
        else:
            drawn.add_row("asked", asked, "to an address of your wallet")
        drawn.add_row(
            "fee", f"at most {policy.max_fee_rate:g} sat/vB", "for your own input and output, if one takes part"
        )
        drawn.add_row("if the payer never signs", "the plain payment", "his Original is broadcast")
    cli.out.say(drawn)
    for risk in risks:
        cli.out.say(f"Risk: {risk}.")


def _dry(
    cli: Cli,
    pj: Payjoin,
    amount: Sats | None,
    orders: Sequence[ChannelOrder],
    shown: Request,
    risks: list[str],
) -> None:
    plan = shown.plan
    cli.out.result(
        "DryRun",
        "Nothing was asked for (dry run).",
        amount=amount,
        expire_in=pj.config.policy.expire_in,
        channels=[{"peer": order.peer, "capacity": order.capacity} for order in orders],
        cold=shown.cold is not None,
        worst_fee=None if plan is None else plan.worst_fee,
        reply_bytes=None if plan is None else plan.reply_bytes,
        risks=risks,
    )


def _show(cli: Cli, made: Request, qr_png: Path | None) -> None:
    """The URI as the result; the QR code beside it, where it fits."""
    from pjv2.cli.progress import moment
    from pjv2.qr import draw, save_png

    if qr_png is not None:
        try:
            save_png(made.uri, qr_png)
        except OSError as exc:
            cli.out.say(f"The picture {qr_png} was not written: {exc.strerror or type(exc).__name__}")
    if cli.out.json:
        return
    picture = draw(made.uri)
    if max(map(len, picture.splitlines())) <= COLUMNS:
        cli.out.say("", picture, "")
    else:
        cli.out.say("The QR code is too wide for a terminal: --qr-png FILE writes it as a picture.")
    cli.out.show(made.uri)
    cli.out.say(f"Session {made.session[:8]}; good until {moment(made.expires)}.")
    if made.cold is not None:
        cli.out.say(
            f"A payjoin pays {made.cold} of your cold wallet. Give that address to nobody: the URI is what is paid."
        )
