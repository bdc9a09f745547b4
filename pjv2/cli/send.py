"""`pjv2 send`: pay a payment URI, as payjoin where it offers one, plainly where a person agrees to that."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Annotated

import typer

from pjv2.cli.command import Cli, DetachOption, DryRunOption, Until, UntilOption, YesOption
from pjv2.errors import Expired, WrongUsage

if TYPE_CHECKING:
    from pjv2.app import Payjoin
    from pjv2.start import Payment
    from pjv2.units import FeeRate, Sats
    from pjv2.wire.uri import PjUri


async def run(
    cli: Cli,
    uri: Annotated[str, typer.Argument(metavar="URI", help="A payment URI (bitcoin:…), in quotes.")],
    amount: Annotated[
        str | None, typer.Option("--amount", metavar="AMOUNT", help="What to pay, where the URI does not say.")
    ] = None,
    fee_rate: Annotated[
        str | None, typer.Option("--fee-rate", metavar="F", help="sat/vB; default: the estimate for six blocks.")
    ] = None,
    require_payjoin: Annotated[
        bool,
        typer.Option(
            "--require-payjoin", help="Never broadcast the Original ourselves. The receiver still can: he holds it."
        ),
    ] = False,
    fallback_after: Annotated[
        float | None,
        typer.Option("--fallback-after", metavar="S", help="Seconds from expiry until the Original is broadcast."),
    ] = None,
    again: Annotated[
        bool, typer.Option("--again", help="Pay a URI again whose payment ended with the money still ours.")
    ] = False,
    dry_run: DryRunOption = False,
    detach: DetachOption = False,
    until: UntilOption = Until.CONFIRMED,
    yes: YesOption = False,
) -> None:
    """Pay a payment URI; show what it costs first, and ask."""
    from pjv2.cli.amounts import parse_amount
    from pjv2.units import FeeRate
    from pjv2.wire.uri import V2Endpoint, parse_uri

    if require_payjoin and fallback_after is not None:
        raise WrongUsage("--require-payjoin broadcasts no Original, so --fallback-after has nothing to say: keep one")
    if fallback_after is not None:
        cli.overrides["policy"] = cli.overrides.get("policy", {}) | {"fallback_after": fallback_after}
    parsed = parse_uri(uri.strip())
    told = None if amount is None else parse_amount(amount)
    rate = None if fee_rate is None else FeeRate.from_sat_per_vb(fee_rate)
    asking = Asking(cli, yes=yes, dry_run=dry_run)
    async with cli.payjoin() as pj:
        rate = rate or await pj.driver.chain.fee_rate(6)
        endpoint = parsed.endpoint
        expired = isinstance(endpoint, V2Endpoint) and endpoint.expires <= pj.driver.clock.now()
        if endpoint is not None and not expired:
            code = await _payjoin(
                asking,
                pj,
                uri.strip(),
                parsed,
                rate,
                told,
                require=require_payjoin,
                again=again,
                until=until,
                detach=detach,
            )
        else:
            from pjv2.cli.plainly import pay

            reason = _why_plainly(parsed, require_payjoin=require_payjoin)
            await pay(asking, pj, parsed, rate, told, reason=reason, again=again)
            code = 0
    if code:
        raise typer.Exit(code)


@dataclass(frozen=True, slots=True)
class Asking:
    """How a person is asked before money leaves."""

    cli: Cli
    yes: bool
    dry_run: bool

    async def agreed(self, question: str, *, unasked: bool = True) -> bool:
        """Whether to go on. `unasked`: a program that reads JSON need not say --yes. Raises WrongUsage where nobody can be asked."""
        if self.yes or (self.cli.json and unasked):
            return True
        if self.cli.asks:
            if await self.cli.confirm(question):
                return True
            self.cli.out.say("Nothing was sent.")
            return False
        raise WrongUsage(f"nobody can be asked here ({question}): add --yes to agree beforehand")


def _why_plainly(parsed: PjUri, *, require_payjoin: bool) -> str:
    """Why this becomes an ordinary payment; "" where that is what the URI asks for. Raises WrongUsage, Expired."""
    from pjv2.wire.uri import V2Endpoint

    match parsed.endpoint:
        case V2Endpoint():
            reason = "This payjoin request has expired. Its address can still be paid"
            if require_payjoin:
                raise Expired("this payjoin request has expired: ask the payee for a new one")
        case _:
            reason = ""
    if require_payjoin:
        raise WrongUsage(f"--require-payjoin: {reason or 'this request offers no payjoin'}")
    return reason


async def _payjoin(
    asking: Asking,
    pj: Payjoin,
    uri: str,
    parsed: PjUri,
    rate: FeeRate,
    amount: Sats | None,
    *,
    require: bool,
    again: bool,
    until: Until,
    detach: bool,
) -> int:
    from pjv2 import start
    from pjv2.cli.preview import Composed, as_if, as_shown
    from pjv2.cli.progress import follow, resume_words

    cli = asking.cli
    policy = replace(pj.config.session_policy(), require_payjoin=require)
    wallet = Composed(pj.driver)
    try:
        shown = await start.send(
            as_if(pj.driver, wallet), pj.config.network, uri, policy=policy, rate=rate, amount=amount, again=again
        )
        show(cli, parsed, shown.amount, shown.fee, rate, shown.worst_contribution)
        if require:
            cli.out.say(
                "With --require-payjoin this wallet never broadcasts the Original. It cannot stop the receiver from doing that: "
                "he holds a complete payment."
            )
        if asking.dry_run:
            _dry(cli, parsed, shown, rate)
            return 0
        if not await asking.agreed(
            f"Pay {shown.amount:_} sat and up to {shown.fee + shown.worst_contribution:_} sat of fees?"
        ):
            return 0
        made = await start.send(
            as_shown(pj.driver, wallet), pj.config.network, uri, policy=policy, rate=rate, amount=amount, again=again
        )
    finally:
        await wallet.let_go()
    cli.resume = resume_words(cli, made.session)
    if detach:
        from pjv2.cli.progress import Follower

        if cli.json:
            await Follower(cli, pj, made.session).catch_up()
        else:
            cli.out.show(made.session)
        cli.out.say(cli.resume)
        return 0
    cli.out.say(f"Session {made.session[:8]}.")
    return await follow(cli, pj, made.session, until)


def show(cli: Cli, parsed: PjUri, amount: Sats, fee: Sats, rate: FeeRate, worst: Sats | None) -> None:
    """Payee, amount, fee and worst contribution, for people."""
    from pjv2.cli.output import facts

    if cli.json:
        return
    rows: dict[str, object] = {
        "pay to": parsed.address,
        "label": parsed.label,
        "message": parsed.message,
        "amount": f"{amount:_} sat",
        "fee": f"{fee:_} sat, at {rate}",
    }
    if worst is not None:
        rows["at worst"] = f"{worst:_} sat more, for the receiver's inputs"
    cli.out.say(facts(rows))


def _dry(cli: Cli, parsed: PjUri, shown: Payment, rate: FeeRate) -> None:
    cli.out.result(
        "DryRun",
        "Nothing was sent (dry run).",
        address=parsed.address,
        amount=shown.amount,
        fee=shown.fee,
        fee_rate=rate,
        worst_contribution=shown.worst_contribution,
        payjoin=True,
    )
