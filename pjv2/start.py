"""How a session begins: a payment request is made, or a URI is paid.

It asks beforehand everything that a payment will need (keys, wallet, chain, node, peers, coins, amounts), so that payjoin is
not offered when it cannot work, and refuses in one sentence with the missing number. After this module, only the driver works
on a session.

Law: every address and its derivation index are on disk before the URI exists; coins of an Original are leased in the same
append that creates its session; channels are not opened here (money rule 1), their peers are only greeted.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from pjv2 import session as model
from pjv2.driver import Driver
from pjv2.errors import Expired, NotNow, PayjoinError, WrongUsage
from pjv2.ports import SessionRow, WalletAddress
from pjv2.psbt.plan import ChannelOrder, ChannelPlan, PlanExplanation, check_plan
from pjv2.psbt.tx import Psbt, TxOut, address_to_script
from pjv2.psbt.verify import make_sent_original
from pjv2.session.events import ColdAddress, Policy
from pjv2.units import FeeRate, Network, Sats, SessionId
from pjv2.wire.uri import PjUri, V1Endpoint, V2Endpoint, parse_uri

MAX_EXPIRE_IN = 518_400
"""Six days: proposing never outlives the mailbox, which a directory keeps for seven."""

FUND_LEASE = 600.0
"""Coins are locked this long while the session is written: a process that dies in between must not bind them for a month.
The driver takes the long lease when it first works on the session."""


class ColdSource(Protocol):
    """Public keys of a wallet that is kept elsewhere. All it does is to name its next address, once."""

    async def network(self) -> Network: ...

    async def new_address(self) -> WalletAddress:
        """Its index is on disk before it is answered. NotNow, WrongUsage, CannotRead."""
        ...


@dataclass(frozen=True, slots=True)
class Request:
    """A payment request: show `uri` to the payer. `plan` explains the channels, if any; `cold` is the address of the cold wallet that
    a proposal sends the payment to, which is shown to nobody else."""

    session: SessionId
    uri: str
    address: str
    amount: Sats | None
    expires: int
    plan: PlanExplanation | None = None
    cold: str | None = None


@dataclass(frozen=True, slots=True)
class Payment:
    """A payment under way: what leaves the wallet if nothing is added (`amount` + `fee`), and the worst addition."""

    session: SessionId
    amount: Sats
    fee: Sats
    worst_contribution: Sats


async def receive(
    driver: Driver,
    network: Network,
    amount: Sats | None,
    *,
    policy: Policy,
    channels: Sequence[ChannelOrder] = (),
    deposit: bool = False,
    top_up: bool = False,
    expire_in: int = 86_400,
    label: str | None = None,
    note: str | None = None,
    order: str | None = None,
    cold: ColdSource | None = None,
) -> Request:
    """Make a payment request, with or without a channel plan.

    `amount` in sats, `expire_in` in seconds (1 to 518,400). With `order`, asking again answers the same request. With `cold`, a
    proposal sends the payment to an address of that wallet, where the payer lets it; `cold_for` chooses it.
    Raises WrongUsage (a plan or amount that cannot be), NotNow (a part that a payment needs is not there).
    """
    if not 0 < expire_in <= MAX_EXPIRE_IN:
        raise WrongUsage(f"a request expires after 1 to {MAX_EXPIRE_IN} seconds (six days), not {expire_in}")
    if order is not None and (row := await driver.store.find(order=order)) is not None:
        return await _request_again(driver, row.session)
    genesis = await _right_network(driver, network)
    if cold is not None and await cold.network() is not network:
        raise WrongUsage(f"the cold wallet is for {await cold.network()}, the configuration says {network}")
    plan, explanation, node = None, None, None
    if channels:
        plan, explanation, node = await _check_channels(driver, channels, amount, policy, deposit, top_up)
    tip = await driver.chain.tip()
    directory, keys = await driver.mailroom.directory()
    address = await driver.wallet.new_address()
    kept = await cold.new_address() if cold is not None else None
    now = driver.clock.now()
    created = model.create_receiver(
        now,
        driver.entropy,
        network=network,
        genesis=genesis,
        wallet=await driver.wallet.fingerprint(),
        node=node,
        address=address.address,
        script=address.script,
        address_index=address.index,
        amount=amount,
        directory=directory,
        keys=keys,
        expires=int(now) + expire_in,
        height=tip.height,
        plan=plan,
        policy=policy,
        label=label,
        note=note,
        order=order,
        cold=ColdAddress(kept.address, kept.script, kept.index) if kept is not None else None,
    )

    def row_of(state: model.State) -> SessionRow:
        facts = model.row_facts(state, now, model.Memory())
        return SessionRow(
            session=created.session,
            role="receiver",
            state=facts.state,
            outcome=facts.outcome,
            created=now,
            expires=created.expires,
            next_due=facts.next_due,
            label=label,
            note=note,
            order=order,
            amount=amount,
        )

    state = await driver.create(created, row_of)
    paid_to = kept.address if kept is not None else None
    return Request(state.session, _uri_of(state), address.address, amount, created.expires, explanation, paid_to)


def cold_for(source: ColdSource | None, wanted: bool | None, channels: Sequence[object]) -> ColdSource | None:
    """The cold wallet that a request is made with: where there is one and no channels are planned, unless somebody says otherwise.

    Raises WrongUsage when it is wanted and cannot be.
    """
    if wanted and channels:
        raise WrongUsage("channels take the payment into the Lightning node: ask for channels, or for a cold address")
    if wanted and source is None:
        raise WrongUsage("there is no cold wallet: name its public descriptor in [wallet] cold_descriptor")
    return None if channels or wanted is False else source


async def _request_again(driver: Driver, session: SessionId) -> Request:
    state = await driver.load(session)
    uri, created = _uri_of(state), state.created
    cold = state.created.cold if isinstance(state, model.Receiver) else None
    return Request(
        session, uri, created.address, created.amount, created.expires, cold=cold.address if cold is not None else None
    )


def _uri_of(state: model.State) -> str:
    if not isinstance(state, model.Receiver):
        raise WrongUsage(f"session {state.session} is not a payment request")
    return model.payment_uri(state)


async def _right_network(driver: Driver, network: Network) -> str:
    genesis = await driver.chain.genesis_hash()
    if genesis != network.genesis_hash:
        raise WrongUsage(f"the chain source does not serve {network}: point [chain] at a server of that network")
    ours = await driver.wallet.network()
    if ours is not network:
        raise WrongUsage(f"the wallet is for {ours}, the configuration says {network}")
    return genesis


async def _check_channels(
    driver: Driver, orders: Sequence[ChannelOrder], amount: Sats | None, policy: Policy, deposit: bool, top_up: bool
) -> tuple[ChannelPlan, PlanExplanation, str]:
    """Everything that can be known about a channel plan before its URI is shown."""
    if driver.channels is None:
        raise WrongUsage("channels need a Lightning node: configure [lightning]")
    node = await driver.channels.node()
    if not node.ready:
        raise NotNow(f"the Lightning node cannot open channels now: {node.why_not}")
    for order in orders:
        low = order.capacity if order.capacity is not None else order.min_capacity
        if not node.min_capacity <= low <= node.max_capacity:
            raise WrongUsage(f"a channel holds {node.min_capacity} to {node.max_capacity} sat at this node, not {low}")
    public = sum(not order.private for order in orders)
    reserve = await driver.channels.anchor_reserve(public) if public else 0
    plan = ChannelPlan(tuple(orders), deposit=deposit, reserve=reserve, top_up=top_up)
    explanation = check_plan(plan, amount, policy.max_fee_rate, policy.max_fee_share_ppm)
    if policy.own_input == "require" and not await driver.wallet.coins():
        raise NotNow(
            "a channel is only opened beside a confirmed coin of our own, and the wallet has none: fund the wallet, or accept "
            "the risk with own_input = prefer"
        )
    blocked = await driver.store.blocked_peers()
    height = (await driver.chain.tip()).height
    for order in orders:
        if (until := blocked.get(order.peer, 0)) > height:
            raise NotNow(
                f"the peer {order.peer[:16]}… still holds an abandoned channel until block {until}: choose another"
            )
        await driver.channels.connect(order.peer, order.host)
    return plan, explanation, node.pubkey


async def send(
    driver: Driver,
    network: Network,
    uri: str,
    *,
    policy: Policy,
    rate: FeeRate,
    amount: Sats | None = None,
    again: bool = False,
) -> Payment:
    """Pay a BIP77 or BIP78 URI: fund and sign the Original, lease its coins, and store the session; the driver does the rest.

    Raises BadUri, Expired, WrongUsage (amount missing or different, money short, URI paid before), NotNow.
    """
    parsed = parse_uri(uri)
    endpoint = parsed.endpoint
    if endpoint is None:
        raise WrongUsage("this URI offers no payjoin: pay it with an ordinary wallet")
    script = address_to_script(parsed.address, network)
    if parsed.amount is not None and amount is not None and amount != parsed.amount:
        raise WrongUsage(f"the request asks for {parsed.amount} sat, not {amount}")
    pays = parsed.amount if parsed.amount is not None else amount
    if pays is None:
        raise WrongUsage("the request names no amount: say how much to pay")
    now = driver.clock.now()
    if isinstance(endpoint, V2Endpoint) and endpoint.expires <= now:
        raise Expired("this payment request has expired: ask the payee for a new one")
    uri_id = await _never_paid(driver, _request_id(parsed, endpoint), again)
    genesis = await _right_network(driver, network)
    in_use = frozenset(await driver.store.coins_in_use())
    lock_id = driver.entropy.token(32)
    funded = await driver.wallet.fund([TxOut(pays, script)], rate, lock_id, now + FUND_LEASE, avoid=in_use)
    inputs = [txin.outpoint for txin in Psbt.parse(funded).tx.inputs]
    try:
        first = isinstance(endpoint, V1Endpoint)
        original = make_sent_original(
            Psbt.parse(funded),
            script,
            pays,
            min_fee_rate=rate,
            # A mailbox's answer is authenticated; a server's is not, and its URI may forbid substitution (BIP78 `pjos`).
            substitution=parsed.output_substitution or not first,
            version=1 if first else 2,
        )
        created = model.create_sender(
            now,
            driver.entropy,
            network=network,
            genesis=genesis,
            wallet=await driver.wallet.fingerprint(),
            uri=parsed,
            sent=original,
            amount=pays,
            lock_id=lock_id,
            height=(await driver.chain.tip()).height,
            policy=policy,
            label=parsed.label,
        )

        def row_of(state: model.State) -> SessionRow:
            facts = model.row_facts(state, now, model.Memory())
            return SessionRow(
                session=created.session,
                role="sender",
                state=facts.state,
                outcome=facts.outcome,
                created=now,
                expires=created.expires,
                next_due=facts.next_due,
                label=parsed.label,
                amount=pays,
                uri_id=uri_id,
            )

        await driver.create(created, row_of)
    except PayjoinError:
        await driver.wallet.unlock(inputs, lock_id)
        raise
    return Payment(created.session, pays, created.fee, original.params.max_fee_contribution or 0)


def _request_id(uri: PjUri, endpoint: V2Endpoint | V1Endpoint) -> str:
    """What is paid once only: a receiver key, or an address at a server."""
    if isinstance(endpoint, V2Endpoint):
        return hashlib.sha256(endpoint.receiver.compressed).hexdigest()
    return hashlib.sha256(f"bip78 {uri.address} {endpoint.url}".encode()).hexdigest()


async def _never_paid(driver: Driver, uri_id: str, again: bool) -> str:
    """A URI or receiver key is paid once, ever; `again` only after a session that ended with its inputs still ours."""
    tries = 0
    while True:
        tries += 1
        name = uri_id if tries == 1 else f"{uri_id}:{tries}"
        row = await driver.store.find(uri_id=name)
        if row is None:
            return name
        # Every earlier payment counts, not only the first one: the one made with --again may have arrived.
        if not again or row.outcome not in ("Cancelled", "Expired"):
            raise WrongUsage(
                f"this request was paid before by session {row.session} ({row.outcome or row.state}); see `pjv2 show {row.session[:8]}`"
            )
