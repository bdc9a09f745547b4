"""An ordinary payment to the address of a URI: where it offers no payjoin, and where a person agrees to do without.

It refuses to pay the same request twice, and a payment whose broadcast was interrupted is broadcast again, not made again.

Law: the signed transaction is in the store before it is broadcast; whoever comes next finds it there.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

from pjv2.errors import CannotRead, Expired, NotNow, PayjoinError, WrongUsage
from pjv2.psbt.tx import Psbt, Tx, TxOut, address_to_script
from pjv2.units import FeeRate, Instant, Sats, Txid
from pjv2.wire.uri import PjUri, V2Endpoint, format_uri

if TYPE_CHECKING:
    from pjv2.app import Payjoin
    from pjv2.cli.send import Asking
    from pjv2.ports import Store

HELD = 86_400.0
"""Seconds that the coins stay locked at the wallet; by then it has seen that they are spent."""

ASKING = 900.0


@dataclass(frozen=True, slots=True)
class Kept:
    """An ordinary payment in the store; `sent`: the network was seen to take it."""

    txid: Txid
    raw: str
    address: str
    amount: Sats
    fee: Sats
    at: Instant
    sent: bool


def name_of(parsed: PjUri) -> str:
    """Where the payment of a request is kept: by the receiver's key where there is one, else by the URI itself."""
    return f"payment:{_uri_id(parsed)}"


def _uri_id(parsed: PjUri) -> str:
    if isinstance(parsed.endpoint, V2Endpoint):
        return hashlib.sha256(parsed.endpoint.receiver.compressed).hexdigest()
    return hashlib.sha256(format_uri(parsed).encode()).hexdigest()


async def kept(store: Store, name: str) -> Kept | None:
    """Raises CannotRead when it is not what this version wrote."""
    text = await store.get(name)
    if text is None:
        return None
    try:
        found = Kept(**json.loads(text))
        if Tx.parse(bytes.fromhex(found.raw)).txid != found.txid:
            raise ValueError
    except (ValueError, TypeError, PayjoinError) as exc:
        raise CannotRead("the store holds an earlier payment of this request that this version cannot read") from exc
    return found


async def pay(
    asking: Asking, pj: Payjoin, parsed: PjUri, rate: FeeRate, amount: Sats | None, *, reason: str, again: bool
) -> None:
    """Show an ordinary payment, ask, and broadcast it. `reason`: why it is one although the URI offers payjoin."""
    cli, driver = asking.cli, pj.driver
    network = pj.config.network
    script = address_to_script(parsed.address, network)
    pays = _amount(parsed, amount)
    await _right_network(pj)
    name = name_of(parsed)
    earlier = await kept(driver.store, name)
    if earlier is not None and not earlier.sent and not again:
        await _again(asking, pj, name, earlier)
        return
    if earlier is not None and not earlier.sent:
        cli.out.say(f"Risk: the earlier payment {earlier.txid} may have been sent; this would pay a second time.")
    await _refuse_paid(pj, parsed, earlier, again=again)
    expired = isinstance(parsed.endpoint, V2Endpoint)
    if expired and not (asking.yes or asking.dry_run or cli.asks):
        raise Expired(f"{reason[:1].lower()}{reason[1:]} plainly with --yes; better ask the payee for a new one")
    if reason:
        cli.out.say(f"{reason}.")
    lock_id = driver.entropy.token(32)
    in_use = frozenset(await driver.store.coins_in_use())
    payments = [TxOut(pays, script)]
    psbt = Psbt.parse(await driver.wallet.fund(payments, rate, lock_id, driver.clock.now() + ASKING, avoid=in_use))
    inputs = tuple(txin.outpoint for txin in psbt.tx.inputs)
    going = False
    try:
        from pjv2.cli.send import show

        show(cli, parsed, pays, psbt.fee, rate, None)
        told: dict[str, Any] = {"address": parsed.address, "amount": pays, "fee": psbt.fee, "payjoin": False}
        if asking.dry_run:
            cli.out.result("DryRun", "Nothing was sent (dry run).", fee_rate=rate, **told)
            return
        if not await asking.agreed(
            f"Pay {pays:_} sat and {psbt.fee:_} sat of fee, without payjoin?", unasked=not reason
        ):
            return
        tx = psbt.extract()
        await driver.wallet.lock(inputs, lock_id, driver.clock.now() + HELD)
        record = Kept(tx.txid, tx.raw.hex(), parsed.address, pays, psbt.fee, driver.clock.now(), sent=False)
        await _keep(driver.store, name, record)
        going = True
        _created(asking, record)
        try:
            await _broadcast(asking, pj, name, record)
        except Refused:
            going = False
            await driver.store.put(name, None if earlier is None else json.dumps(asdict(earlier)))
            raise
    finally:
        if not going:
            await driver.wallet.unlock(inputs, lock_id)


class Refused(NotNow):
    """The network did not take the payment, so nothing was paid: try again later, or at another fee rate."""


def _amount(parsed: PjUri, amount: Sats | None) -> Sats:
    if parsed.amount is not None and amount is not None and amount != parsed.amount:
        raise WrongUsage(f"the request asks for {parsed.amount} sat, not {amount}")
    pays = parsed.amount if parsed.amount is not None else amount
    if not pays:
        raise WrongUsage("the request names no amount: say how much to pay with --amount")
    return pays


async def _right_network(pj: Payjoin) -> None:
    network = pj.config.network
    if await pj.driver.chain.genesis_hash() != network.genesis_hash or await pj.driver.wallet.network() is not network:
        raise WrongUsage(f"wallet and chain source do not both serve {network}, which the configuration names")


async def _refuse_paid(pj: Payjoin, parsed: PjUri, earlier: Kept | None, *, again: bool) -> None:
    if earlier is not None and not again:
        raise WrongUsage(
            f"this request was paid before, without payjoin, in transaction {earlier.txid}; --again pays it once more"
        )
    row = await pj.driver.store.find(uri_id=_uri_id(parsed))
    if row is not None and not (again and row.outcome in ("Cancelled", "Expired")):
        raise WrongUsage(
            f"this request was paid before by session {row.session} ({row.outcome or row.state}); "
            f"see `pjv2 show {row.session[:8]}`"
        )


async def _again(asking: Asking, pj: Payjoin, name: str, record: Kept) -> None:
    """A payment that was signed, and perhaps broadcast: the same transaction goes out, never a second one."""
    asking.cli.out.say(
        f"This request was paid before, in transaction {record.txid}, and the broadcast was interrupted. "
        "The same transaction is sent again; it cannot pay twice."
    )
    if asking.dry_run:
        asking.cli.out.result(
            "DryRun",
            "Nothing was sent (dry run).",
            txid=record.txid,
            amount=record.amount,
            fee=record.fee,
            payjoin=False,
        )
        return
    if await asking.agreed(f"Send {record.amount:_} sat again?"):
        _created(asking, record)
        await _broadcast(asking, pj, name, record)


def _created(asking: Asking, record: Kept) -> None:
    if asking.cli.json:
        told: dict[str, Any] = asdict(record)
        del told["raw"], told["at"], told["sent"]
        asking.cli.out.result("Created", role="sender", payjoin=False, **told)


async def _keep(store: Store, name: str, record: Kept) -> None:
    await store.put(name, json.dumps(asdict(record)))


async def _broadcast(asking: Asking, pj: Payjoin, name: str, record: Kept) -> None:
    asking.cli.resume = "It may be on its way: the same command sends the same transaction again, never a second one."
    answer = await pj.driver.chain.broadcast(bytes.fromhex(record.raw))
    if answer.verdict == "refused":
        raise Refused(f"the network refused the payment: {answer.reason or 'it did not say why'}")
    await _keep(pj.driver.store, name, replace(record, sent=True))
    asking.cli.out.result(
        "Closed",
        f"Paid without payjoin, in transaction {record.txid}",
        outcome="PaidOtherwise",
        txid=record.txid,
        amount_requested=record.amount,
        amount_received=record.amount,
        channels=[],
        payjoin=False,
    )
