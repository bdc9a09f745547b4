"""`lab.audit()` falsified: in small worlds each of its promises is broken on purpose, and it must say which one.

The chain, the wallets, the store and the node are the real ones of the lab. What a correct program cannot be made to do is done to
them from outside: a store that keeps a coin for a closed session, a payer who signs twice, a 2-of-2 whose commitment nobody has.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import replace
from hashlib import sha256
from typing import Any

import pytest

from pjv2 import session as model
from pjv2.errors import ReplyCode
from pjv2.lab import audit as auditing
from pjv2.lab.audit import BrokenPromise, Told, audit
from pjv2.lab.chain import LabChain
from pjv2.lab.httpd import HttpRequest
from pjv2.lab.world import Party, World
from pjv2.ports import Change, Record, SessionRow, Stored
from pjv2.psbt.plan import ChannelOrder
from pjv2.psbt.proposal import Funding
from pjv2.psbt.tx import Psbt, Tx, TxOut
from pjv2.psbt.verify import make_sent_original
from pjv2.session import events as ev
from pjv2.session.facts import ChainView
from pjv2.testing.entropy import SeededEntropy
from pjv2.testing.memory_mailroom import MemoryMailroom
from pjv2.testing.memory_store import MemoryStore
from pjv2.testing.paper_wallet import PaperWallet
from pjv2.units import FeeRate, Network, Outpoint, SessionId
from pjv2.wire.uri import parse_uri
from tests.story.lab.kit import PAPER, Pair, both_pairs, unsigned
from tests.story.lab.kit import spend as signed
from tests.unit.session.world import PEERS, PLAN, Actor, kit
from tests.unit.session.world import World as PaperWorld

FAR = 4_000_000_000.0


@pytest.fixture
async def world() -> AsyncIterator[World]:
    """A chain, people and their disks; no relay or directory runs, for nobody sends anything."""
    made = World(entropy=SeededEntropy("audit"))
    try:
        yield made
    finally:
        for party in made.parties.values():
            await party.close()
        if made.esplora is not None:
            await made.esplora.stop()
        await made.chain.close()


async def person(world: World, name: str, *coins: int, lightning: bool = False, pair: Pair = PAPER) -> Party:
    async def store(_: Party) -> MemoryStore:
        return MemoryStore(world.clock.now)

    return await world.party(
        name, coins=coins, lightning=lightning, mailroom=lambda _: MemoryMailroom(), store=store, **pair.ports
    )


async def complaint(world: World) -> str:
    """What the audit finds."""
    with pytest.raises(BrokenPromise) as broken:
        await audit(world)
    return str(broken.value)


async def spend(party: Party, outpoints: Sequence[Outpoint], outputs: Sequence[TxOut]) -> Tx:
    """A confirmed transaction of a party's own coins."""
    tx = await signed(party, outpoints, outputs)
    result = await party.world.chain.broadcast(tx.raw)
    assert result.verdict == "accepted", result.reason
    await party.world.chain.mine()
    return tx


async def keep(party: Party, events: Sequence[ev.Event], *, outcome: str | None = None, **more: Any) -> SessionId:
    """A session in a party's store, with whatever `more` the store is told beside its events."""
    records = tuple(
        Record(seq, event.at, model.event_name(event), model.encode(event)) for seq, event in enumerate(events)
    )
    state = model.replay([(record.seq, record.name, record.data) for record in records])
    row = SessionRow(state.session, state.role, state.stage.value, outcome, state.created.at, FAR, None)
    assert isinstance(await party.store.create(Change(row, 0, records, **more)), Stored)
    return state.session


def paper_receiver(stage: str) -> Actor:
    """A receiver with a channel plan, as far as `stage`; its payment never reaches a real chain."""
    actor = PaperWorld().receiving(PLAN)
    actor.run(stage)
    return actor


# ---------------------------------------------------------------- paid at most once


async def payer_with_two_coins(world: World, pair: Pair) -> tuple[Party, ev.SenderCreated]:
    alice = await person(world, "alice", 80_000, 90_000, pair=pair)
    payee = PaperWorld()
    uri = parse_uri(payee.uri_for(kit_key(), int(payee.now) + 3_600))
    amount = uri.amount or 0
    funded = await alice.wallet.fund([TxOut(amount, kit.PAYEE)], FeeRate(500), b"\x01" * 32, FAR)
    await alice.wallet.unlock([txin.outpoint for txin in Psbt.parse(funded).tx.inputs], b"\x01" * 32)
    sent = make_sent_original(Psbt.parse(funded), kit.PAYEE, amount, min_fee_rate=FeeRate(250))
    assert len(sent.tx.inputs) == 2
    created = model.create_sender(
        payee.now,
        world.entropy,
        network=Network.REGTEST,
        genesis=await world.chain.genesis_hash(),
        wallet=await alice.wallet.fingerprint(),
        uri=uri,
        sent=sent,
        amount=amount,
        lock_id=b"\x01" * 32,
        height=world.chain.height,
    )
    await keep(alice, [created])
    world.strangers.add(kit.PAYEE)
    return alice, created


def kit_key() -> Any:
    from pjv2.wire.secp import SecretKey

    return SecretKey(b"\x44" * 32)


@both_pairs
async def test_a_payer_who_paid_one_receiver_key_twice_is_found(world: World, pair: Pair) -> None:
    alice, created = await payer_with_two_coins(world, pair)
    await audit(world)
    first, second = created.inputs
    values = [alice.funded[first], alice.funded[second]]
    await spend(alice, [first], [TxOut(values[0] - 500, kit.PAYEE)])
    await audit(world)
    await spend(alice, [second], [TxOut(values[1] - 500, kit.PAYEE)])
    assert "2 times" in await complaint(world)


@both_pairs
async def test_a_payer_who_took_his_second_coin_back_paid_once(world: World, pair: Pair) -> None:
    alice, created = await payer_with_two_coins(world, pair)
    first, second = created.inputs
    await spend(alice, [first], [TxOut(alice.funded[first] - 500, kit.PAYEE)])
    home = (await alice.wallet.new_address()).script
    await spend(alice, [second], [TxOut(alice.funded[second] - 500, home)])
    await audit(world)


# ---------------------------------------------------------------- satoshis


@both_pairs
async def test_satoshis_that_went_to_a_script_of_nobody_are_found(world: World, pair: Pair) -> None:
    bob = await person(world, "bob", 50_000, pair=pair)
    [coin] = bob.funded
    home = (await bob.wallet.new_address()).script
    tx = await spend(bob, [coin], [TxOut(20_000, home), TxOut(29_000, b"\x00\x14" + b"\x07" * 20)])
    assert f"{tx.txid}:1 pays 29000 sat to a script that nobody knows" in await complaint(world)
    world.strangers.add(b"\x00\x14" + b"\x07" * 20)
    await audit(world)


async def test_satoshis_that_were_given_and_are_nowhere_are_found(world: World) -> None:
    bob, carol = await person(world, "bob", 50_000), await person(world, "carol")
    carol.funded.update(bob.funded)  # the same coin was promised to two people
    assert "satoshis: 100000 given, 50000 kept" in await complaint(world)


async def test_a_transaction_that_mixes_our_coins_with_strangers_is_found_because_it_cannot_be_followed(
    world: World,
) -> None:
    bob = await person(world, "bob", 50_000)
    [ours] = bob.funded
    home = (await bob.wallet.new_address()).script
    unknown = await world.chain.fund(home, 60_000)
    tx = await spend(bob, [ours, unknown], [TxOut(109_000, home)])
    found = await complaint(world)
    assert f"{tx.txid} spends coins of strangers beside ours" in found
    assert "satoshis" in found


# ---------------------------------------------------------------- what a wallet counts


class StandsStill:
    """A chain source that tells of no transaction that it did not know when it was made."""

    def __init__(self, chain: LabChain) -> None:
        self._chain = chain
        self._known = {entry.txid for height in range(chain.height + 1) for entry in chain.block(height).txs}

    def __getattr__(self, name: str) -> Any:
        return getattr(self._chain, name)

    async def view(self, *asked: Any) -> ChainView:
        view = await self._chain.view(*asked)
        return replace(view, txs=tuple(tx for tx in view.txs if tx.txid in self._known))


async def told_nothing_more(party: Party, script: bytes) -> None:
    """From now on the wallet hears nothing new about a script of its own."""
    world = party.world
    if isinstance(party.wallet, PaperWallet):
        path = party.home / "wallet.json"
        party.wallet = PaperWallet(
            StandsStill(world.chain), seed=party.seed, network=Network.REGTEST, store_path=path, kinds=party.kinds
        )
        return
    assert world.esplora is not None
    path = f"/scripthash/{sha256(script).hexdigest()}/txs"
    world.esplora.overrides[path] = await world.esplora.respond(HttpRequest("127.0.0.1", "GET", path, {}))


@both_pairs
async def test_a_coin_that_the_wallet_does_not_know_is_found(world: World, pair: Pair) -> None:
    bob = await person(world, "bob", 30_000, pair=pair)
    home = (await bob.wallet.new_address()).script
    await told_nothing_more(bob, home)
    await audit(world)
    coin = await world.chain.fund(home, 50_000)
    bob.funded[coin] = 50_000
    found = await complaint(world)
    assert f"bob: the wallet does not know its coin {coin} of 50000 sat" in found
    assert "bob: the wallet counts 30000 sat, and the chain holds 80000 sat for it" in found


@both_pairs
async def test_a_coin_that_the_wallet_counts_and_that_is_spent_is_found(world: World, pair: Pair) -> None:
    bob = await person(world, "bob", pair=pair)
    home = (await bob.wallet.new_address()).script
    coin = await world.chain.fund(home, 50_000)
    bob.funded[coin] = 50_000
    await audit(world)
    await told_nothing_more(bob, home)
    world.strangers.add(kit.PAYEE)
    await spend(bob, [coin], [TxOut(49_000, kit.PAYEE)])
    assert await complaint(world) == "bob: the wallet counts 50000 sat, and the chain holds 0 sat for it"


# ---------------------------------------------------------------- channels


async def channel(world: World, bob: Party, memo: str, value: int = 80_000) -> tuple[Tx, Outpoint]:
    """A secured channel of bob's node, and the signed transaction that would fund it."""
    assert bob.node is not None
    [peer] = world.peers(1)
    id = world.entropy.token(32)
    await bob.node.connect(peer.pubkey, peer.host)
    reserved = await bob.node.reserve(id, ChannelOrder(peer.pubkey, peer.host, value, private=True), memo)
    [coin] = bob.funded
    change = (await bob.wallet.new_address(change=True)).script
    outputs = (TxOut(value, reserved.script), TxOut(bob.funded[coin] - value - 500, change))
    psbt = await unsigned(bob, [coin], outputs)
    await bob.node.secure(id, psbt.serialize(), psbt.tx.txid, Funding(0, 0, value, reserved.script))
    tx = Psbt.parse(await bob.wallet.sign(psbt.serialize(), [coin])).extract()
    return tx, Outpoint(tx.txid, 0)


async def test_a_funding_output_without_a_stored_commitment_is_found(world: World) -> None:
    bob = await person(world, "bob", lightning=True)
    actor = paper_receiver("WantsProposal")
    await keep(bob, actor.events)
    await audit(world)
    [script] = [reserved.script for reserved in actor.state.reserved.channels]
    funded = await world.chain.fund(script, 80_000)
    assert f"{funded} holds 80000 sat in a 2-of-2 without commitment" in await complaint(world)


async def test_a_funding_output_with_its_commitment_is_fine_until_the_node_forgets_it(world: World) -> None:
    bob = await person(world, "bob", 200_000, lightning=True)
    actor = paper_receiver("WantsProposal")
    session = await keep(bob, actor.events)
    tx, outpoint = await channel(world, bob, f"pj:{session}")
    log = Told(bob, actor.state, (reserved_for(tx.outputs[0].script),))
    assert (await world.chain.broadcast(tx.raw)).verdict == "accepted"
    await world.chain.mine()
    assert auditing._funding_is_committed(world, [log]) == []
    assert bob.node is not None
    await bob.node.abandon(outpoint)
    found = auditing._funding_is_committed(world, [log])
    assert f"{outpoint} holds 80000 sat in a 2-of-2 without commitment" in found


async def test_a_channel_that_the_peer_has_and_our_node_forgot_is_found_without_any_log(world: World) -> None:
    bob = await person(world, "bob", 200_000, lightning=True)
    assert bob.node is not None
    disk = world.home / "bob" / "node" / "node.json"
    before = disk.read_text()
    tx, outpoint = await channel(world, bob, "pj:lost")
    assert (await world.chain.broadcast(tx.raw)).verdict == "accepted"
    await world.chain.mine()
    await audit(world)  # the log is gone, the node knows the channel: nothing is lost
    disk.write_text(before)  # the node came back from an older copy
    assert outpoint not in bob.node.commitments()
    found = await complaint(world)
    assert f"{outpoint} is confirmed, the peer" in found
    assert f"{outpoint} pays 80000 sat to a script that nobody knows" in found


def reserved_for(script: bytes) -> ev.ChannelsReserved:
    """The event that names a funding script, of whatever session."""
    [event] = [event for event in paper_receiver("WantsProposal").events if isinstance(event, ev.ChannelsReserved)]
    return replace(event, channels=tuple(replace(channel, script=script) for channel in event.channels))


async def test_a_pending_channel_without_an_open_session_is_found(world: World) -> None:
    bob = await person(world, "bob", 200_000, lightning=True)
    session = await keep(bob, paper_receiver("WantsProposal").events)
    _, outpoint = await channel(world, bob, f"pj:{session}")
    await audit(world)
    row = await bob.store.row(session)
    seq = len(await bob.store.load(session))
    assert isinstance(await bob.store.append(Change(replace(row, outcome="Expired"), seq, ())), Stored)
    assert f"channel {outpoint} is pending without an open session" in await complaint(world)


async def test_a_pending_channel_that_no_session_ever_asked_for_is_found(world: World) -> None:
    bob = await person(world, "bob", 200_000, lightning=True)
    _, outpoint = await channel(world, bob, "pj:somebody")
    assert f"bob: channel {outpoint} is pending without an open session" in await complaint(world)


async def test_a_reservation_that_is_left_at_the_node_is_found(world: World) -> None:
    bob = await person(world, "bob", lightning=True)
    assert bob.node is not None
    [peer] = world.peers(1)
    await bob.node.connect(peer.pubkey, peer.host)
    order = ChannelOrder(peer.pubkey, peer.host, 80_000, private=True)
    await bob.node.reserve(b"\x01" * 32, order, "pj:somebody")
    assert "bob: 1 reservations are left at the node" in await complaint(world)
    await bob.node.cancel(b"\x01" * 32)
    await audit(world)


# ---------------------------------------------------------------- what closed sessions hold


Breaks = Callable[[Party], Awaitable[str]]


async def coin_of_a_closed_session(bob: Party) -> str:
    [coin] = bob.funded
    session = await keep(bob, PaperWorld().receiver().events, outcome="Expired", take_coins=(coin,))
    return f"bob: coin {coin} is in use by the closed session {session}"


async def peer_of_a_closed_session(bob: Party) -> str:
    session = await keep(bob, PaperWorld().receiver().events, outcome="Expired", take_peers=(PEERS[0],))
    return f"is in use by the closed session {session}"


@pytest.mark.parametrize("broken", [coin_of_a_closed_session, peer_of_a_closed_session])
async def test_what_nobody_uses_any_more_and_is_still_held_is_found(world: World, broken: Breaks) -> None:
    bob = await person(world, "bob", 50_000)
    await audit(world)
    assert await broken(bob) in await complaint(world)


@both_pairs
async def test_a_lock_that_no_session_knows_is_found_until_it_ends(world: World, pair: Pair) -> None:
    bob = await person(world, "bob", 50_000, pair=pair)
    [coin] = bob.funded
    assert await bob.wallet.lock([coin], b"\x02" * 32, world.clock.now() + 600) == ()
    finding = f"bob: the wallet still locks {coin}, and no session uses it"
    assert await complaint(world) == finding
    await bob.restart()
    assert await complaint(world) == finding
    world.clock.skip(601)
    await audit(world)


@both_pairs
async def test_what_an_open_session_holds_is_no_finding(world: World, pair: Pair) -> None:
    bob = await person(world, "bob", 50_000, pair=pair)
    [coin] = bob.funded
    assert await bob.wallet.lock([coin], b"\x02" * 32, FAR) == ()
    await keep(bob, PaperWorld().receiver().events, take_coins=(coin,), take_peers=(PEERS[0],))
    await audit(world)


# ---------------------------------------------------------------- one content per mailbox


async def test_a_mailbox_that_was_given_two_contents_is_found(world: World) -> None:
    mailboxes = world.directory._mailboxes
    await mailboxes.handle("POST", "A" * 13, b"\x01" * 7_168, long_poll=0)
    await audit(world)
    await mailboxes.handle("POST", "A" * 13, b"\x02" * 7_168, long_poll=0)
    assert f"mailbox {'A' * 13} was given 2 different contents" in await complaint(world)


async def test_a_session_that_announced_a_proposal_and_a_refusal_is_found(world: World) -> None:
    bob = await person(world, "bob")
    actor = paper_receiver("Monitor")
    refusal = ev.RefusalPosting(0.0, ReplyCode.UNAVAILABLE, b"{}")
    assert auditing._one_content_per_mailbox(world, [Told(bob, actor.state, tuple(actor.events))]) == []
    both = Told(bob, actor.state, (*actor.events, refusal))  # no log that can be replayed holds both
    [finding] = auditing._one_content_per_mailbox(world, [both])
    assert "announced a proposal and a refusal" in finding


async def test_every_finding_is_told_at_once(world: World) -> None:
    bob = await person(world, "bob", 50_000)
    coin = await coin_of_a_closed_session(bob)
    world.directory._mailboxes.posted["B" * 13] = {b"1", b"2"}
    found = await complaint(world)
    assert coin in found
    assert "2 different contents" in found
