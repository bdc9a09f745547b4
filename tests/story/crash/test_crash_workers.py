"""Several hands on one thing: two workers on a session, two sessions on a coin, two requests for an input, a clock that goes back."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

import pytest
from _pytest.mark import ParameterSet

from pjv2 import session as model
from pjv2 import start
from pjv2.driver import Driver
from pjv2.lab.audit import audit
from pjv2.lab.world import Party, World
from pjv2.session.events import Policy
from pjv2.testing.entropy import SeededEntropy
from pjv2.testing.memory_mailroom import MemoryMailroom
from pjv2.units import FeeRate, Network, SessionId
from tests.story.crash.kit import LONG_POLL, PACE, PATIENCE, Ending, Play, PostOffice, Switch, play_out
from tests.story.crash.stories import CHANNELS, FALLBACK, PLAIN, PLAIN_INSTEAD, SENDER, WHOLE, Story, whole_tales
from tests.story.lab.kit import BDK, PAPER, Pair, both_pairs, wallet_files


class EveryClaim:
    """A store that gives the claim to whoever asks: nothing may rest on it (session-model.md 1)."""

    def __init__(self, store: Any) -> None:
        self._store = store

    def __getattr__(self, name: str) -> Any:
        return getattr(self._store, name)

    async def claim(self, *_: Any) -> bool:
        return True


# ---------------------------------------------------------------- one worker sleeps, another one goes on


async def overtaken(story: Story, point: str, pair: Pair) -> Ending:
    """The first worker is held before `point`; a second one carries the session to its end; then the first one wakes up."""
    play = story.play(f"before {point}", pair)

    async def act(play: Play) -> None:
        victim = play.people[story.victim]
        other = "alice" if story.victim == "bob" else "bob"
        victim.switch = Switch(f"before {point}", pauses=True)

        async def second() -> None:
            await victim.switch.paused.wait()
            assert victim.session is not None
            first = victim.switch
            driver = play.driver(victim, Switch(), await play.another_wallet(victim))
            driver.store = EveryClaim(driver.store)  # type: ignore[assignment]  # a port by its methods
            await driver.drive(victim.session, model.is_closed)
            first.resumed.set()

        async def payer() -> None:
            if story is FALLBACK:
                await play.live("alice", lambda state: state.stage == "PollingForProposal")
                await victim.switch.resumed.wait()
            await play.live(other)

        async with asyncio.TaskGroup() as group:
            group.create_task(play.live(story.victim))
            group.create_task(second())
            group.create_task(payer())

    return await play_out(play, act)


def held_at(story: Story) -> list[str]:
    """Every point of the drive itself: before it there is no session that a second worker could take up."""
    points = [point for point in story.points if not point.startswith(("GET", "fund", "create", "connect"))]
    return [point for point in points if point != "new_address"]


def holds(story: Story, points: Sequence[str] = ()) -> list[ParameterSet]:
    """On paper everywhere, on BDK where the wallet takes part: a worker that wakes up has another one's wallet file before it."""
    return [
        pair.case(point, id=point)
        for pair in (PAPER, BDK)
        for point in points or held_at(story)
        if pair is PAPER or WHOLE or point.startswith(("lock", "unlock", "sign", "broadcast"))
    ]


@pytest.mark.parametrize(("point", "pair"), holds(PLAIN))
async def test_a_plain_receiver_that_was_overtaken_does_no_harm(point: str, pair: Pair) -> None:
    assert await overtaken(PLAIN, point, pair) == PLAIN.ending


@pytest.mark.parametrize(("point", "pair"), holds(CHANNELS))
async def test_a_receiver_with_channels_that_was_overtaken_does_no_harm(point: str, pair: Pair) -> None:
    assert await overtaken(CHANNELS, point, pair) in (CHANNELS.ending, PLAIN_INSTEAD)


@pytest.mark.parametrize(
    ("point", "pair"),
    holds(
        FALLBACK,
        (
            *("lock", "reserve", "reserve (2)", "secure", "secure (2)", "lock (2)"),
            *("append ProposalPosting", "POST reply", "append FallbackBroadcasting"),
            *("cancel", "disconnect", "abandon", "unlock"),
        ),
    ),
)
async def test_a_receiver_that_was_overtaken_by_the_fallback_does_no_harm(point: str, pair: Pair) -> None:
    """Nothing of ours was spent here: what the first worker takes when it wakes up, nobody else would give back."""
    assert await overtaken(FALLBACK, point, pair) == FALLBACK.ending


@pytest.mark.parametrize(("point", "pair"), holds(SENDER))
async def test_a_sender_that_was_overtaken_does_no_harm(point: str, pair: Pair) -> None:
    assert await overtaken(SENDER, point, pair) == SENDER.ending


# ---------------------------------------------------------------- two workers side by side


@pytest.mark.parametrize(("story", "pair"), whole_tales(PLAIN, CHANNELS))
async def test_two_workers_on_one_session_end_as_one_does(story: Story, pair: Pair) -> None:
    play = story.play(pair=pair)

    async def act(play: Play) -> None:
        bob = play.bob
        bob.session = await bob.begin(play.driver(bob))
        drivers = [play.driver(bob), play.driver(bob, wallet=await play.another_wallet(bob))]
        for driver in drivers:
            driver.store = EveryClaim(driver.store)  # type: ignore[assignment]  # a port by its methods
        async with asyncio.TaskGroup() as group:
            for driver in drivers:
                group.create_task(driver.drive(bob.session, model.is_closed))
            group.create_task(play.live("alice"))

    assert await play_out(play, act) in (story.ending, PLAIN_INSTEAD)


# ---------------------------------------------------------------- a clock that goes back


@pytest.mark.parametrize(("story", "pair"), whole_tales(CHANNELS, SENDER, FALLBACK))
async def test_a_clock_that_goes_back_after_every_event_changes_nothing(story: Story, pair: Pair) -> None:
    play = story.play(pair=pair)
    script = story.on

    async def back(play: Play, name: str, event: str) -> None:
        if script is not None:
            await script(play, name, event)
        play.world.clock.skip(-20.0)

    play.on = back
    assert await play_out(play, story.act) == story.ending


# ---------------------------------------------------------------- one coin, one input


class Town:
    """A world with several sessions; blocks come when everybody who must see a transaction saw it."""

    def __init__(self, pair: Pair) -> None:
        self.pair = pair
        self.entropy = SeededEntropy("the town")
        self.world = World(entropy=self.entropy, long_poll=LONG_POLL)
        self.mailroom = MemoryMailroom(long_poll=LONG_POLL, clock=self.world.clock.now, rng=self.entropy)

    async def __aenter__(self) -> Town:
        await self.world.__aenter__()
        return self

    async def __aexit__(self, *exc: Any) -> None:
        await self.world.__aexit__(*exc)

    def post_office(self, _party: Party) -> PostOffice:
        return PostOffice(self.mailroom, self.world)

    async def party(self, name: str, *coins: int) -> Party:
        return await self.world.party(name, coins=coins, pace=PACE, mailroom=self.post_office, **self.pair.ports)

    async def twin(self, of: Party) -> Party:
        """The same wallet, restored from its seed on another machine: another log, other locks, the same coins."""
        twin = await self.party("twin")
        await twin.close()
        for file in wallet_files(twin.home):
            file.unlink()
        twin.seed = of.seed
        await twin.start()
        return twin

    async def until_mined(self, txs: int, *sessions: tuple[Party, SessionId]) -> None:
        """`txs` transactions wait in the mempool, and every session saw one of them there; then six blocks."""
        for party, session in sessions:
            await party.diary.until("Seen", session)
        assert len(self.world.chain.mempool()) == txs
        await self.world.chain.mine(6)
        self.world.clock.skip(PACE.watch + 0.01)


async def ask(driver: Driver, amount: int) -> start.Request:
    return await start.receive(driver, Network.REGTEST, amount, policy=Policy(), expire_in=3_600)


async def pay(driver: Driver, uri: str) -> SessionId:
    rate = FeeRate.from_sat_per_vb(2)
    return (await start.send(driver, Network.REGTEST, uri, policy=Policy(), rate=rate)).session


async def outcome(party: Party, session: SessionId) -> str | None:
    return (await party.store.row(session)).outcome


@both_pairs
async def test_two_sessions_that_want_one_coin_share_nothing(pair: Pair) -> None:
    """The second one pays plainly: its Original is collected."""
    async with Town(pair) as town, asyncio.timeout(PATIENCE):
        bob = await town.party("bob", 200_000)
        payers = [await town.party(name, 400_000) for name in ("alice", "carol")]
        requests = [await ask(bob.driver, 100_000) for _ in payers]
        payments = [
            (payer, await pay(payer.driver, request.uri)) for payer, request in zip(payers, requests, strict=True)
        ]
        sessions = [(bob, request.session) for request in requests] + payments
        async with asyncio.TaskGroup() as group:
            for party, session in sessions:
                group.create_task(party.driver.drive(session, model.is_closed))
            await town.until_mined(2, *sessions)
        assert sorted([str(await outcome(*session)) for session in sessions[:2]]) == ["Paid", "PaidByFallback"]
        for one, payment in zip(sessions[:2], payments, strict=True):
            assert await outcome(*one) == await outcome(*payment)
        await audit(town.world)


@both_pairs
async def test_an_input_that_is_offered_to_two_sessions_buys_one_proposal(pair: Pair) -> None:
    """The second request refuses it, with the words that a prober always gets."""
    async with Town(pair) as town, asyncio.timeout(PATIENCE):
        bob = await town.party("bob", 200_000, 180_000)
        alice = await town.party("alice", 400_000)
        twin = await town.twin(alice)
        first, second = await ask(bob.driver, 100_000), await ask(bob.driver, 100_000)
        payment = await pay(alice.driver, first.uri)
        await alice.driver.drive(payment, lambda state: state.stage == "PollingForProposal")
        await bob.driver.drive(first.session, lambda state: state.stage == "Monitor")

        again = await pay(twin.driver, second.uri)
        async with asyncio.TaskGroup() as group:
            group.create_task(twin.driver.drive(again, lambda state: state.stage == "PendingFallback"))
            group.create_task(bob.driver.drive(second.session, model.is_closed))
        assert await outcome(bob, second.session) == "Refused"

        sessions = [(bob, first.session), (alice, payment)]
        async with asyncio.TaskGroup() as group:
            for party, session in sessions:
                group.create_task(party.driver.drive(session, model.is_closed))
            await town.until_mined(1, *sessions)
        await twin.driver.drive(again, model.is_closed)
        assert [await outcome(*session) for session in sessions] == ["Paid", "Paid"]
        assert await outcome(twin, again) == "Conflicted"
        await audit(town.world)
