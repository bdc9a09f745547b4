"""What the driver itself guards: the order of a release, what a worker that lost gives back, and whose session it drives."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from typing import Any

import pytest

from pjv2 import session as model
from pjv2.driver import Asked, Driver, Run
from pjv2.errors import NotNow
from pjv2.ports import Change, NodeInfo, SessionRow, Stored
from pjv2.session.facts import NodeChannel, Tip
from pjv2.testing.clock import ManualClock
from pjv2.testing.memory_store import MemoryStore
from pjv2.units import FeeRate, Outpoint
from tests.unit.session.world import GENESIS, NOW, PEERS, PLAN, TWO, Actor, World, want

NODE = "02" + "99" * 32


@dataclass
class NodeThatWrites:
    """A Lightning node that writes down what it is asked, in order; a peer that is not cut off yet may still finish a channel."""

    calls: list[tuple[str, object]] = field(default_factory=list)
    listed: list[NodeChannel] = field(default_factory=list)
    late: NodeChannel | None = None

    async def node(self) -> NodeInfo:
        return NodeInfo(NODE, ready=True)

    async def connect(self, peer: str, host: str) -> None:
        self.calls.append(("connect", peer))

    async def cancel(self, id: bytes) -> None:
        self.calls.append(("cancel", id))

    async def disconnect(self, peer: str) -> None:
        if self.late is not None:
            self.listed.append(self.late)
            self.late = None
        self.calls.append(("disconnect", peer))

    async def channels(self, memo: str | None = None) -> tuple[NodeChannel, ...]:
        self.calls.append(("list", memo))
        return tuple(channel for channel in self.listed if memo in (None, channel.memo))

    async def abandon(self, outpoint: Outpoint) -> None:
        self.calls.append(("abandon", outpoint))
        self.listed = [channel for channel in self.listed if channel.outpoint != outpoint]


class Ground:
    """The few facts that a driver asks before it works."""

    def __init__(self) -> None:
        self.genesis = GENESIS
        self.wallet = "wallet-1"
        self.unlocked: list[Outpoint] = []

    async def genesis_hash(self) -> str:
        return self.genesis

    async def fingerprint(self) -> str:
        return self.wallet

    async def tip(self) -> Tip:
        return Tip(1_000, "00" * 32, NOW)

    async def fee_rate(self, blocks: int) -> FeeRate:
        return FeeRate(250)

    async def unlock(self, coins: tuple[Outpoint, ...], lock_id: bytes) -> None:
        self.unlocked += coins

    def told(self, *_: object) -> None:
        """Nobody listens."""


class Desk:
    """A driver over a store in memory, that holds the session of an actor."""

    def __init__(self, world: World) -> None:
        self.clock = ManualClock(world.now)
        self.store = MemoryStore(self.clock.now)
        self.node = NodeThatWrites()
        self.ground = Ground()
        ground: Any = self.ground
        node: Any = self.node
        self.driver = Driver(
            store=self.store,
            mailroom=ground,
            wallet=ground,
            chain=ground,
            channels=node,
            clock=self.clock,
            entropy=world.rng,
            notify=ground,
            worker="this worker",
        )

    async def holds(self, actor: Actor) -> Run:
        """The actor's log in the store, and this worker's snapshot of it."""
        first, *rest = actor.events
        state = await self.driver.create(first, lambda state: row(state, self.clock.now()))
        run = Run(state.session, state)
        if rest:
            assert isinstance(await self.driver._append(run, rest), Stored)
        assert run.state == actor.state
        return run


def row(state: model.State, now: float) -> SessionRow:
    facts = model.row_facts(state, now, want.Memory())
    return SessionRow(state.session, facts.role, facts.state, None, facts.created, facts.expires, facts.next_due)


async def reserving() -> tuple[Desk, Run, want.ReserveChannels, want.ChannelsOffered]:
    """A worker whose reservation has just been answered."""
    world = World()
    actor = world.receiving(TWO)
    actor.run("ReservingChannels")
    need = actor.need(want.ReserveChannels)
    desk = Desk(world)
    return desk, await desk.holds(actor), need, world.answer(actor, need)


async def _answered(answer: want.Answer) -> want.Answer:
    return answer


def pending(memo: str, outpoint: Outpoint) -> NodeChannel:
    return NodeChannel(PEERS[0], outpoint, 80_000, memo, "pending")


# ---------------------------------------------------------------- M8, M21


async def test_a_release_cancels_cuts_off_and_only_then_lists_what_it_abandons() -> None:
    desk = Desk(World())
    drafted = Outpoint("aa" * 32, 0)
    desk.node.late = pending("pj:x", drafted)  # it becomes pending while the peer is being cut off
    run: Any = None
    need = want.ReleaseChannels("pj:x", (b"1" * 32, b"2" * 32), PEERS, frozenset([drafted]))
    cleared = await desk.driver._perform(run, need)
    assert [what for what, _ in desk.node.calls] == [
        "cancel",
        "cancel",
        "disconnect",
        "disconnect",
        "list",
        "abandon",
        "list",
    ]
    assert {peer for what, peer in desk.node.calls if what == "disconnect"} == set(PEERS)
    assert isinstance(cleared, want.ChannelsCleared)
    assert cleared.abandoned == (drafted,)
    assert desk.node.listed == []


async def test_a_worker_abandons_only_what_its_own_snapshot_drafted() -> None:
    desk = Desk(World())
    drafted, newer = Outpoint("aa" * 32, 0), Outpoint("bb" * 32, 0)
    desk.node.listed = [pending("pj:x", drafted), pending("pj:x", newer)]
    run: Any = None
    cleared = await desk.driver._perform(run, want.ReleaseChannels("pj:x", (), (), frozenset([drafted])))
    assert isinstance(cleared, want.ChannelsCleared)
    assert [channel.outpoint for channel in desk.node.listed] == [newer]
    assert [channel.outpoint for channel in cleared.remaining] == [newer]


# ---------------------------------------------------------------- M17


async def test_a_worker_whose_answer_came_too_late_gives_its_reservation_back() -> None:
    desk, run, need, offered = await reserving()
    await desk.driver.command(run.session, want.Cancel())  # somebody else appended meanwhile
    task = asyncio.create_task(_answered(offered))
    await task
    await desk.driver._take(run, {need: Asked(task, run.state.seq, NOW)})
    assert isinstance(run.state, model.Receiver)
    assert run.state.reserved is None
    assert [peer for what, peer in desk.node.calls if what == "disconnect"] == [order.peer for _, order in need.orders]
    assert [id for what, id in desk.node.calls if what == "cancel"] == [id for id, _ in need.orders]


async def test_a_worker_whose_answer_came_in_time_keeps_its_reservation() -> None:
    desk, run, need, offered = await reserving()
    task = asyncio.create_task(_answered(offered))
    await task
    await desk.driver._take(run, {need: Asked(task, run.state.seq, NOW)})
    assert isinstance(run.state, model.Receiver)
    assert run.state.reserved is not None
    assert desk.node.calls == []


async def test_a_reservation_that_is_broken_off_half_way_is_given_back() -> None:
    desk, run, need, _ = await reserving()
    task = asyncio.create_task(asyncio.Event().wait())
    tasks: Any = {need: Asked(task, run.state.seq, NOW)}  # type: ignore[arg-type]  # it never answers anything
    await desk.driver._drop(run, tasks, frozenset([need]))
    assert task.cancelled()
    assert [id for what, id in desk.node.calls if what == "cancel"] == [id for id, _ in need.orders]


async def test_a_coin_that_was_locked_for_a_session_which_does_not_want_it_any_more_is_unlocked() -> None:
    world = World()
    actor = world.receiving()
    actor.run("PayjoinProposal")
    desk = Desk(world)
    run = await desk.holds(actor)
    [wanted] = actor.state.own_coins
    stray = Outpoint("cc" * 32, 0)
    need = want.ReserveCoins((wanted, stray), b"lock" * 8, world.now, (), actor.state.memo)
    task = asyncio.create_task(asyncio.Event().wait())
    tasks: Any = {need: Asked(task, run.state.seq, NOW)}  # type: ignore[arg-type]  # it never answers anything
    await desk.driver._drop(run, tasks, frozenset([need]))
    assert desk.ground.unlocked == [stray]


# ---------------------------------------------------------------- whose session, which peers


async def test_one_worker_drives_a_session() -> None:
    world = World()
    desk = Desk(world)
    run = await desk.holds(world.receiver())
    assert await desk.store.claim(run.session, "another worker", 60)
    with pytest.raises(NotNow, match="another worker drives"):
        await desk.driver.drive(run.session, deadline=desk.clock.now())


async def test_a_session_is_driven_on_its_own_chain_and_with_its_own_wallet_only() -> None:
    world = World()
    desk = Desk(world)
    run = await desk.holds(world.receiver())
    await desk.driver.drive(run.session, deadline=desk.clock.now())
    desk.ground.genesis = "11" * 32
    with pytest.raises(NotNow, match="belongs to the chain"):
        await desk.driver.drive(run.session, deadline=desk.clock.now())
    desk.ground.genesis, desk.ground.wallet = GENESIS, "another wallet"
    with pytest.raises(NotNow, match="belongs to the wallet"):
        await desk.driver.drive(run.session, deadline=desk.clock.now())


async def test_a_peer_that_still_holds_a_dead_channel_is_not_asked_in_any_session() -> None:
    world = World()
    actor = world.receiving(PLAN)
    actor.run("CheckedOriginal")
    desk = Desk(world)
    run = await desk.holds(actor)
    orders = TWO.orders
    assert await desk.driver._unreachable(run, orders) == ()
    other = await desk.driver.create(World(seed=2).receiver().events[0], lambda state: row(state, world.now))
    blocking = Change(row(other, world.now), 1, (), block_peers=((orders[0].peer, 1_001),))
    assert isinstance(await desk.store.append(blocking), Stored)
    assert await desk.driver._unreachable(run, orders) == (orders[0].peer,)


async def test_a_claim_that_could_not_be_given_back_is_still_our_own(monkeypatch: pytest.MonkeyPatch) -> None:
    world = World()
    desk = Desk(world)
    run = await desk.holds(world.receiver())
    release = desk.store.release

    async def locked(session: str, owner: str) -> None:
        raise NotNow("the database is locked")

    monkeypatch.setattr(desk.store, "release", locked)
    await desk.driver.drive(run.session, deadline=desk.clock.now())
    monkeypatch.setattr(desk.store, "release", release)
    await desk.driver.drive(run.session, deadline=desk.clock.now())
    assert await desk.store.claim(run.session, "another worker", 60)
