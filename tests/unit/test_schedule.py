"""The channel schedule: what fits a payment, who carries it, and what became of it."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest

from pjv2.errors import CannotRead, NotNow, WrongUsage
from pjv2.psbt.plan import ChannelOrder, ChannelPlan
from pjv2.schedule import (
    NAME,
    Intention,
    bound,
    changing,
    decode,
    encode,
    fitting,
    opened_channels,
    read,
    settled,
)
from pjv2.session import events as ev
from pjv2.session.events import Outcome, Policy
from pjv2.session.receive import Receiver
from pjv2.testing import MemoryStore, SeededEntropy
from pjv2.units import Outpoint

SESSION, OTHER, TXID = "aa" * 16, "bb" * 16, "cd" * 32


def order(number: int, capacity: int | None = 50_000, **more: Any) -> ChannelOrder:
    return ChannelOrder(
        f"02{number:02x}{'11' * 31}", f"peer{number}.example:9735", capacity, **{"private": True, **more}
    )


def plan(number: int, capacity: int | None = 50_000, **more: Any) -> Intention:
    wish = {name: more.pop(name) for name in ("private", "push") if name in more}
    return Intention(f"{number:08x}", order(number, capacity, **wish), float(number), **more)


def names(found: tuple[Intention, ...]) -> list[int]:
    return [int(one.id, 16) for one in found]


# ---------------------------------------------------------------- what fits


def test_the_oldest_plans_come_first_as_long_as_the_payment_carries_them() -> None:
    waiting = [plan(3), plan(1), plan(2, 900_000), plan(4)]
    assert names(fitting(waiting, [], 150_000, Policy())) == [1, 3]
    assert names(fitting(waiting, [], 60_000, Policy())) == [1]
    assert fitting(waiting, [], 20_000, Policy()) == ()


def test_what_was_asked_for_by_hand_takes_its_share_first() -> None:
    assert names(fitting([plan(1), plan(2)], [order(9, 80_000)], 150_000, Policy())) == [1]
    assert fitting([plan(9)], [order(9, 50_000)], 500_000, Policy()) == (), "a peer opens one channel at a time"


def test_one_channel_takes_the_rest() -> None:
    assert names(fitting([plan(1, None), plan(2, None), plan(3)], [], 500_000, Policy())) == [1, 3]


def test_peers_that_are_away_and_plans_that_are_carried_are_passed_over() -> None:
    away = frozenset({order(1).peer})
    waiting = [plan(1), plan(2, session=SESSION), plan(3)]
    assert names(fitting(waiting, [], 500_000, Policy(), away=away)) == [3]


def test_a_public_channel_needs_the_nodes_reserve_too() -> None:
    public = [plan(1, 50_000, private=False)]
    assert fitting(public, [], 500_000, Policy()) == (), "nobody said what the reserve is"
    assert names(fitting(public, [], 500_000, Policy(), reserves=(0, 10_000))) == [1]
    assert fitting(public, [], 60_000, Policy(), reserves=(0, 10_000)) == ()


# ---------------------------------------------------------------- who carries it


def session(orders: tuple[ChannelOrder, ...], *, id: str = SESSION, **more: Any) -> Any:
    """A receiver with this plan; what no rule here looks at is left out."""
    made = object.__new__(Receiver)
    created = SimpleNamespace(session=id, plan=ChannelPlan(orders) if orders else None)
    for name in Receiver.__dataclass_fields__:
        object.__setattr__(made, name, {"created": created, **more}.get(name))
    return made


def test_a_session_binds_what_its_plan_carries_and_nothing_twice() -> None:
    intentions = (plan(1), plan(2), replace(plan(3), order=order(1)))
    carried = bound(intentions, session((order(1), order(7))))
    assert [one.session for one in carried] == [SESSION, None, None]
    assert bound(carried, session((order(1), order(7)))) == carried
    assert bound(intentions, session(())) == intentions


def ended(opened: dict[int, int], channels: tuple[Outpoint, ...]) -> Any:
    """A session that drafted these channels (number -> vout), closed with `channels`."""
    orders = tuple(order(number) for number in opened)
    funding = tuple(SimpleNamespace(channel=index, vout=vout) for index, vout in enumerate(opened.values()))
    drafted = SimpleNamespace(txid=TXID, funding=funding, intent=SimpleNamespace(orders=orders))
    closed = ev.Closed(0.0, Outcome.PAID if channels else Outcome.EXPIRED, TXID, 1, 1, channels)
    return session(orders, drafted=drafted, closed=closed)


def test_a_carried_plan_is_opened_or_waits_again() -> None:
    one, two = (replace(plan(number), session=SESSION) for number in (1, 2))
    states = {SESSION: ended({1: 4}, (Outpoint(TXID, 4),))}
    assert opened_channels(states[SESSION]) == {order(1).peer: Outpoint(TXID, 4)}
    after = settled((one, two, plan(3)), states)
    assert [entry.state for entry in after] == ["opened", "waiting", "waiting"]
    assert after[0].outpoint == Outpoint(TXID, 4)
    assert settled(after, {}) == after, "what is opened stays opened"


def test_while_its_session_is_open_a_plan_stays_bound() -> None:
    one = replace(plan(1), session=SESSION)
    assert settled((one,), {SESSION: session((order(1),))}) == (one,)


def test_a_plan_of_an_unknown_session_waits_again() -> None:
    assert settled((replace(plan(1), session=OTHER),), {}) == (plan(1),)


def test_a_channel_that_the_log_cannot_name_keeps_its_plan_bound() -> None:
    one = replace(plan(1), session=SESSION)
    assert settled((one,), {SESSION: ended({}, (Outpoint(TXID, 4),))}) == (one,)


# ---------------------------------------------------------------- stored


def test_the_schedule_is_read_back_as_it_was_written() -> None:
    intentions = (
        plan(1, None, push=7),
        replace(plan(2), session=SESSION, outpoint=Outpoint(TXID, 1)),
        replace(plan(3, private=False), session=OTHER),
    )
    assert decode(encode(intentions)) == intentions
    assert decode(None) == ()


@pytest.mark.parametrize(
    "text", ["{", "7", "[7]", "[{}]", '[{"id": "1", "order": "x", "added": 1, "session": null, "outpoint": null}]']
)
def test_a_schedule_of_somebody_else_is_not_touched(text: str) -> None:
    with pytest.raises(CannotRead, match="schedule"):
        decode(text)


async def test_plans_are_added_removed_and_bound_by_one_command_at_a_time() -> None:
    store, rng = MemoryStore(), SeededEntropy("schedule")
    async with changing(store, rng) as schedule:
        first = await schedule.add(order(1), 1.0, rng)
        second = await schedule.add(order(2), 2.0, rng)
        with pytest.raises(NotNow, match="another command"):
            async with changing(store, rng):
                raise AssertionError("nobody else changes it meanwhile")
    assert await read(store) == (first, second)
    async with changing(store, rng) as schedule:
        with pytest.raises(WrongUsage, match="no plans begin"):
            await schedule.remove("")
        with pytest.raises(WrongUsage, match="no plan"):
            await schedule.remove("zz")
        assert await schedule.remove(first.id) == first
        assert await schedule.bind(session((order(2),))) == (replace(second, session=SESSION),)
    kept = decode(await store.get(NAME))
    assert [one.session for one in kept] == [SESSION]
    assert await read(store) == (second,), "its session is unknown to this store"
