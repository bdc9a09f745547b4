"""The main job, shown as it happens: a payment becomes two Lightning channels, and a payment that its payer never finishes.

Nothing is staged: the payer, the receiver, the relays, the directory and the chain are the real programs of this package on
loopback, each at an address of its own where the system allows it. Everything that is shown is a `Fact`: it is read from one
place and checked against another, and the first one that is not true ends the demo with an error.

Law: what cannot be checked is not shown.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

from pjv2 import qr, start
from pjv2 import session as model
from pjv2.errors import OurMistake
from pjv2.lab.audit import audit
from pjv2.lab.world import Party, Told, World, bdk_party_wallet, esplora_chain
from pjv2.psbt.plan import ChannelOrder
from pjv2.psbt.tx import Tx
from pjv2.session.events import Policy
from pjv2.session.facts import BURIED
from pjv2.units import FeeRate, Network, Outpoint, Sats, SessionId
from pjv2.wire.uri import V2Endpoint, parse_uri

PAYMENT: Sats = 1_000_000
FIRST_CHANNEL: Sats = 400_000
PATIENCE = 30.0
"""Seconds that any step may take on loopback before the demo says that something is wrong."""


class Out(Protocol):
    """Where the demo talks to: people's text, and results as events."""

    json: bool

    def say(self, *what: Any) -> None: ...

    def result(
        self, event: str, view: Any = None, /, *, at: float | None = None, session: str | None = None, **fields: Any
    ) -> None: ...


class NotTrue(OurMistake):
    """Something the demo shows does not hold: this is a bug of pjv2, please report it."""


@dataclass(slots=True)
class Facts:
    """What was shown so far. `falsify` names one fact to get wrong on purpose: the demo must then fail."""

    falsify: str | None = None
    names: list[str] = field(default_factory=list)

    def __call__(self, name: str, seen: Any, expected: Any) -> Any:
        """What was seen, to be shown, once it equals what is expected. Raises NotTrue."""
        self.names.append(name)
        if self.falsify == name:
            seen = ("falsified", seen)
        if seen != expected:
            raise NotTrue(f"the demo shows {name} as {seen!r}, and it is {expected!r}")
        return seen


@dataclass(slots=True)
class Stage:
    """One showing: the world, the two people, and what has been said."""

    world: World
    payer: Party
    receiver: Party
    out: Out
    fact: Facts
    tasks: list[asyncio.Task[model.State]] = field(default_factory=list)

    def drive(self, party: Party, session: SessionId) -> asyncio.Task[model.State]:
        task = asyncio.create_task(party.driver.drive(session, model.is_closed))
        self.tasks.append(task)
        return task

    async def until(self, party: Party, event: str, session: SessionId) -> Told:
        """An event of a session, or the error that keeps it from coming."""
        waiting = asyncio.create_task(self._entry(party, event, session))
        await asyncio.wait(
            {waiting, *(task for task in self.tasks if not task.done())}, return_when=asyncio.FIRST_COMPLETED
        )
        for task in self.tasks:
            if task.done() and not task.cancelled() and task.exception() is not None:
                waiting.cancel()
                task.result()
        return await waiting

    async def _entry(self, party: Party, event: str, session: SessionId) -> Told:
        try:
            return await party.diary.until(event, session, seconds=PATIENCE)
        except TimeoutError as exc:
            told = ", ".join(entry.event for entry in party.diary.entries if entry.session == session)
            raise NotTrue(
                f"the {party.name} did not come to {event} within {PATIENCE:g} s; it came to: {told}"
            ) from exc

    async def stop(self) -> None:
        for task in self.tasks:
            task.cancel()
        await asyncio.gather(*self.tasks, return_exceptions=True)
        self.tasks.clear()

    def headline(self, text: str) -> None:
        self.out.say("", f"━━ {text} " + "━" * max(3, 74 - len(text)))

    def line(self, actor: str, text: str) -> None:
        self.out.say(f"  {actor:<10} {text}")


async def run(out: Out, *, falsify: str | None = None) -> list[str]:
    """Show both acts; answers the names of the facts that were shown. Raises NotTrue, and whatever went wrong."""
    started = time.monotonic()
    fact = Facts(falsify)
    async with World() as world:
        # As a wallet that ships the directory's key would: then nobody but relays ever speaks to the directory.
        world.keys_file = world.home / "ohttp-keys.bin"
        world.keys_file.write_bytes(world.directory.keys.encode())
        # The embedded default, where its library has a wheel: BDK wallets that see the chain through an Esplora server.
        embedded = find_spec("bdkpython") is not None
        made: dict[str, Any] = {"wallet": bdk_party_wallet, "chain": esplora_chain} if embedded else {}
        receiver = await world.party("receiver", coins=[250_000, 320_000], lightning=True, **made)
        payer = await world.party("payer", coins=[2_500_000, 1_800_000], **made)
        for party in (payer, receiver):
            party.diary.listeners.append(functools.partial(_tell, out, party.name))
        stage = Stage(world, payer, receiver, out, fact)
        try:
            done = await _first_act(stage)
            await stage.stop()
            await _second_act(stage)
        finally:
            await stage.stop()
        stage.headline("The books")
        await audit(world)
        stage.line("audit", "paid once · satoshis conserved · every 2-of-2 has its commitment · nothing left in use")
        seconds = round(time.monotonic() - started, 3)
        out.say("", f"Everything shown was checked ({len(fact.names)} facts, {seconds:.1f} s).")
        out.result("DemoDone", "demo: done", **done, seconds=seconds)
    return fact.names


def _tell(out: Out, name: str, told: Told) -> None:
    if out.json:
        facts = {key: value for key, value in told.facts.items() if key not in ("session", "event", "at")}
        out.result(told.event, at=told.at, session=told.session, who=name, **facts)


# ---------------------------------------------------------------- act one


async def _first_act(stage: Stage) -> dict[str, Any]:
    """A payment becomes two channels; answers what `DemoDone` reports."""
    world, payer, receiver, fact = stage.world, stage.payer, stage.receiver, stage.fact
    stage.headline("Act one: a payment becomes two Lightning channels")
    stage.out.say("  The receiver has no server and no open port: it only ever asks a relay.")
    stage.line("wallets", f"{type(receiver.wallet).__name__} on both sides, with real keys and signatures")
    with _quiet_ports(receiver, fact) as ports:
        stage.line("receiver", f"listening ports at {receiver.address}: {ports}")
    peers = world.peers(2)
    request = await _request(stage, [(peers[0], FIRST_CHANNEL), (peers[1], None)], picture=True)
    stage.drive(receiver, request.session)
    parsed = parse_uri(request.uri)
    if not isinstance(parsed.endpoint, V2Endpoint):
        raise NotTrue("the payment URI has no payjoin v2 endpoint")
    payment = await start.send(
        payer.driver, Network.REGTEST, request.uri, policy=Policy(), rate=FeeRate.from_sat_per_vb(3)
    )
    stage.drive(payer, payment.session)
    amount = fact("amount", parsed.amount, PAYMENT)
    stage.line(
        "payer", f"scans it, signs an ordinary payment of {amount:,} sat (the Original), and seals it for the mailbox"
    )
    await stage.until(receiver, "OriginalAccepted", request.session)
    stage.line("receiver", "picks it up: every check of BIP78 passed; from here it can be broadcast if all else fails")

    intended = await stage.until(receiver, "ChannelsIntended", request.session)
    capacities = [channel["capacity"] for channel in intended.facts["channels"]]
    capacities = fact("capacities", capacities, [FIRST_CHANNEL, PAYMENT - FIRST_CHANNEL])
    await stage.until(receiver, "ChannelsReserved", request.session)
    stage.line("peers", f"two peers agree to channels of {capacities[0]:,} and {capacities[1]:,} sat (reserved)")
    drafted = await stage.until(receiver, "ProposalDrafted", request.session)
    txid = drafted.facts["txid"]
    await stage.until(receiver, "ChannelsSecured", request.session)
    stage.line("peers", f"both signed commitments for {txid[:16]}… (secured: the money can leave again)")
    posted = await stage.until(receiver, "ProposalPosted", request.session)
    order = [
        entry.event for entry in receiver.diary.entries if entry.session == request.session and entry.at <= posted.at
    ]
    wanted = (
        "ChannelsReserved",
        "ProposalDrafted",
        "ChannelsSecured",
        "ProposalSigned",
        "ProposalPosting",
        "ProposalPosted",
    )
    fact("order", [event for event in order if event in wanted], list(wanted))
    stage.line("receiver", "signs its own coin, and only now posts the encrypted proposal (secure before post)")
    await stage.until(payer, "Broadcasting", payment.session)
    seen = await stage.until(receiver, "Seen", request.session)
    fact("broadcast", seen.facts["txid"], txid)
    stage.line("payer", f"checks that nothing was taken from him, signs, broadcasts {txid[:16]}…")

    original, payjoin = _original(await payer.driver.load(payment.session)), _mempool(world, txid)
    receiver_inputs = await _side_by_side(stage, original, payjoin)
    funding = _funding(stage, request.session, payjoin)
    await world.chain.mine(BURIED)
    await stage.until(receiver, "Closed", request.session)
    closed = await stage.until(payer, "Closed", payment.session)
    fact("paid", closed.facts["outcome"], "Paid")
    entry = world.chain.tx(txid)
    depth = fact("depth", world.chain.height - (entry.height if entry and entry.height else 0) + 1, BURIED)
    stage.line("miner", f"mined under Bitcoin's real consensus rules, {depth} blocks deep")
    await _show_channels(stage, funding)
    what_was_seen = _what_was_seen(stage, parsed.endpoint)
    await _recover(stage, funding)
    return {
        "txid": txid,
        "channels": [{"outpoint": outpoint, "capacity": value} for outpoint, value in funding.items()],
        "receiver_inputs": receiver_inputs,
        **what_was_seen,
    }


async def _request(stage: Stage, channels: Sequence[tuple[Any, Sats | None]], *, picture: bool) -> start.Request:
    orders = [ChannelOrder(peer.pubkey, peer.host, capacity, private=True) for peer, capacity in channels]
    request = await start.receive(
        stage.receiver.driver,
        Network.REGTEST,
        PAYMENT,
        policy=Policy(fallback_after=600),
        channels=orders,
        expire_in=3_600,
        label="two channels, please",
    )
    stage.line("receiver", f"asks for {PAYMENT:,} sat, to become two channels:")
    if request.plan is not None:
        for row in request.plan.rows:
            stage.out.say(f"             {row.what:<22} {row.value:<16} {row.note}".rstrip())
    if picture:
        stage.out.say("", qr.draw(request.uri))
    stage.out.say("", f"  {request.uri}", "")
    stage.fact("uri", parse_uri(request.uri).address, request.address)
    return request


@contextlib.contextmanager
def _quiet_ports(receiver: Party, fact: Facts) -> Iterator[int | str]:
    """How many sockets listen at the receiver's own address; only Linux tells."""
    table = Path("/proc/self/net/tcp")
    if receiver.address == "127.0.0.1" or not table.exists():
        yield "none that it opened (this system does not tell them apart)"
        return
    wanted = bytes(int(part) for part in reversed(receiver.address.split("."))).hex().upper()
    rows = [line.split() for line in table.read_text().splitlines()[1:]]
    yield fact("ports", sum(row[1].startswith(f"{wanted}:") and row[3] == "0A" for row in rows), 0)


def _original(state: model.State) -> Tx:
    if not isinstance(state, model.Sender):
        raise NotTrue("the payer's session is no sender")
    return state.sent.tx


def _mempool(world: World, txid: str) -> Tx:
    entry = world.chain.tx(txid)
    if entry is None:
        raise NotTrue(f"{txid} is not in the mempool")
    return entry.tx


async def _side_by_side(stage: Stage, original: Tx, payjoin: Tx) -> int:
    """The Original and the payjoin beside each other, whose is what, and who paid which fee; answers how many inputs are ours."""
    world, payer, receiver, fact = stage.world, stage.payer, stage.receiver, stage.fact
    owners = dict.fromkeys(await payer.scripts(), "payer") | dict.fromkeys(await receiver.scripts(), "receiver")
    values = {**payer.funded, **receiver.funded}

    def inputs(tx: Tx) -> list[str]:
        return [
            f"{values[i.outpoint]:>10,}  {'payer' if i.outpoint in payer.funded else 'receiver'}" for i in tx.inputs
        ]

    def outputs(tx: Tx) -> list[str]:
        return [f"{o.value:>10,}  {owners.get(o.script, 'channel (2-of-2)')}" for o in tx.outputs]

    def fee(tx: Tx) -> Sats:
        return sum(values[i.outpoint] for i in tx.inputs) - sum(o.value for o in tx.outputs)

    def share(tx: Tx, party: Party, name: str, *, gets: Sats = 0) -> Sats:
        """What a person put in, less what came back to scripts of his own and to his channels."""
        put = sum(values[i.outpoint] for i in tx.inputs if i.outpoint in party.funded)
        back = sum(o.value for o in tx.outputs if owners.get(o.script, "receiver") == name)
        return put + gets - back

    stage.out.say("")
    _columns(stage, "Original (never broadcast)", "Payjoin")
    _columns(stage, *(f"{len(tx.inputs)} in" for tx in (original, payjoin)))
    _pairs(stage, inputs(original), inputs(payjoin))
    _columns(stage, *(f"{len(tx.outputs)} out" for tx in (original, payjoin)))
    _pairs(stage, outputs(original), outputs(payjoin))
    ours = sum(i.outpoint in receiver.funded for i in payjoin.inputs)
    fact("receiver inputs", ours, 1)
    fact("channel outputs", sum(o.script not in owners for o in payjoin.outputs), 2)
    fact("original fee", fee(original), _entry_fee(world, original, values))
    by_payer = share(payjoin, payer, "payer", gets=-PAYMENT)
    by_receiver = share(payjoin, receiver, "receiver", gets=PAYMENT)
    fact("fees", by_payer + by_receiver, fee(payjoin))
    entry = world.chain.tx(payjoin.txid)
    fact("fee on chain", fee(payjoin), entry.fee if entry else None)
    _columns(
        stage, f"fee {fee(original):,} (payer)", f"fee {fee(payjoin):,} (payer {by_payer:,}, receiver {by_receiver:,})"
    )
    stage.out.say("")
    return ours


def _entry_fee(world: World, tx: Tx, values: Mapping[Outpoint, Sats]) -> Sats:
    """The fee by the chain's own previous outputs."""
    spent = []
    for txin in tx.inputs:
        entry = world.chain.tx(txin.outpoint.txid)
        spent.append(entry.tx.outputs[txin.outpoint.vout].value if entry else values[txin.outpoint])
    return sum(spent) - sum(txout.value for txout in tx.outputs)


def _columns(stage: Stage, left: str, right: str) -> None:
    stage.out.say(f"    {left:<36}{right}".rstrip())


def _pairs(stage: Stage, left: Sequence[str], right: Sequence[str]) -> None:
    for index in range(max(len(left), len(right))):
        _columns(stage, left[index] if index < len(left) else "", right[index] if index < len(right) else "")


def _funding(stage: Stage, session: SessionId, payjoin: Tx) -> dict[Outpoint, Sats]:
    """The channels' outpoints, as the log froze them, with the values that the transaction gives them."""
    drafted = stage.receiver.diary.of("ProposalDrafted", session)[-1]
    outpoints = [Outpoint.parse(text) for text in drafted.facts["channels"]]
    stage.fact("funding txid", {outpoint.txid for outpoint in outpoints}, {payjoin.txid})
    return {outpoint: payjoin.outputs[outpoint.vout].value for outpoint in outpoints}


async def _show_channels(stage: Stage, funding: Mapping[Outpoint, Sats]) -> None:
    node = stage.receiver.node
    if node is None:
        raise NotTrue("the receiver has no Lightning node")
    await node.sync()
    listed = {channel.outpoint: channel for channel in await node.channels()}
    for number, (outpoint, value) in enumerate(funding.items(), 1):
        channel = listed.get(outpoint)
        state = stage.fact(f"state of channel {number}", channel.state if channel else None, "open")
        capacity = stage.fact(f"capacity of channel {number}", channel.capacity if channel else None, value)
        stage.line("channel", f"{state}: {outpoint.txid[:16]}…:{outpoint.vout} with {capacity:,} sat")


def _what_was_seen(stage: Stage, endpoint: V2Endpoint) -> dict[str, Any]:
    """What the relays and the directory could tell, counted in their own logs."""
    world, fact = stage.world, stage.fact
    requests = sum(len(relay.log) for relay in world.relays)
    clients = sorted({record.client for relay in world.relays for record in relay.log})
    leaked = sum(relay.saw(endpoint.short_id.encode()) for relay in world.relays)
    peers = sorted({record.peer for record in world.directory.log})
    fact("relay requests", requests > 0, True)
    fact("relay clients", clients, sorted({stage.payer.address, stage.receiver.address}))
    fact("mailbox ids at relays", leaked, 0)
    fact("mailbox at directory", endpoint.short_id in {record.mailbox for record in world.directory.log}, True)
    fact("directory peers", [peer for peer in peers if peer not in {relay.host for relay in world.relays}], [])
    stage.line(
        "relays",
        f"saw {requests} sealed requests of 8,192 bytes from {', '.join(clients)}; the mailbox id in {leaked} bytes",
    )
    stage.line("directory", f"saw mailboxes and ciphertext, and only the relays' addresses: {', '.join(peers)}")
    return {
        "relay_requests": requests,
        "directory_peers": peers,
        "relay_bytes_with_mailbox_id": leaked,
    }


async def _recover(stage: Stage, funding: Mapping[Outpoint, Sats]) -> None:
    """The peer's commitment transaction goes out and is mined: whatever happens, the channel's money comes back."""
    node, chain = stage.receiver.node, stage.world.chain
    if node is None:
        raise NotTrue("the receiver has no Lightning node")
    outpoint = next(iter(funding))
    commitment = Tx.parse(node.commitment(outpoint))
    result = await chain.broadcast(commitment.raw)
    stage.fact("commitment", result.verdict, "accepted")
    await chain.mine(1)
    entry = chain.tx(commitment.txid)
    stage.fact("commitment mined", entry.height if entry else None, chain.height)
    stage.fact("commitment spends", [txin.outpoint for txin in commitment.inputs], [outpoint])
    back = sum(txout.value for txout in commitment.outputs if txout.script == node.home_script)
    fee = entry.fee if entry else 0
    back = stage.fact("recovered", back, funding[outpoint] - fee)
    stage.line("peer", f"is gone? The first channel's commitment was mined: {back:,} sat are back ({fee:,} sat fee)")


# ---------------------------------------------------------------- act two


async def _second_act(stage: Stage) -> None:
    """The payer never signs: the Original is broadcast at the deadline, and everything is given back."""
    world, payer, receiver, fact = stage.world, stage.payer, stage.receiver, stage.fact
    stage.headline("Act two: the payer never comes back")
    peers = world.peers(4)[2:]
    request = await _request(stage, [(peers[0], FIRST_CHANNEL), (peers[1], None)], picture=False)
    stage.drive(receiver, request.session)
    payment = await start.send(
        payer.driver, Network.REGTEST, request.uri, policy=Policy(), rate=FeeRate.from_sat_per_vb(3)
    )
    leaving = stage.drive(payer, payment.session)
    await stage.until(payer, "OriginalPosted", payment.session)
    leaving.cancel()
    await asyncio.gather(leaving, return_exceptions=True)
    stage.tasks.remove(leaving)
    stage.line("payer", "posted the Original, and is never heard of again")
    await stage.until(receiver, "ProposalPosted", request.session)
    node = receiver.node
    if node is None:
        raise NotTrue("the receiver has no Lightning node")
    pending = fact("pending channels", len(node.pending()), 2)
    in_use = fact("coins in use", len(await receiver.store.coins_in_use()), 1)
    stage.line("receiver", f"{pending} channels pending, {in_use} coin lent to the proposal, and nobody signs")
    early = fact("nothing broadcast before the deadline", len(world.chain.mempool()), 0)
    world.clock.skip(request.expires - world.clock.now() + 601)
    fallback = await stage.until(receiver, "FallbackBroadcasted", request.session)
    original = _original(await payer.driver.load(payment.session))
    txid = fact("fallback", fallback.facts["txid"], original.txid)
    stage.line("clock", f"the deadline passes ({early} transactions until now)")
    stage.line("receiver", f"broadcasts the payer's own Original {txid[:16]}…: the payment arrives without him")
    await world.chain.mine(1)
    fact("channels while the conflict is young", len(node.pending()), 2)
    stage.line("receiver", "one block deep: nothing is given back yet, a reorg could still undo it")
    await world.chain.mine(BURIED - 1)
    closed = await stage.until(receiver, "Closed", request.session)
    outcome = fact("fallback outcome", closed.facts["outcome"], "PaidByFallback")
    received = fact("received", closed.facts["amount_received"], PAYMENT)
    left = fact("channels after", len(node.pending()), 0)
    free = fact("coins after", len(await receiver.store.coins_in_use()), 0)
    locked = fact("locks after", len(await receiver.locked()), 0)
    stage.line(
        "receiver",
        f"six deep: {outcome}, {received:,} sat; channels pending {left}, coins in use {free}, locked {locked}",
    )
    back = stage.drive(payer, payment.session)
    await stage.until(payer, "Closed", payment.session)
    state = await back
    fact("payer's outcome", state.closed.outcome.value if state.closed else None, "PaidByFallback")
    stage.line("payer", "comes back at last, and finds that it paid exactly once")
