"""The shipped clock and randomness: they do what a test tells them, and the same every time."""

import asyncio

import pytest

from pjv2.errors import WrongUsage
from pjv2.testing.clock import ManualClock
from pjv2.testing.entropy import SeededEntropy


async def test_sleepers_wake_in_the_order_of_their_times_and_not_before():
    clock, woken = ManualClock(1000.0), []

    async def sleeper(seconds):
        await clock.sleep(seconds)
        woken.append(seconds)

    tasks = [asyncio.create_task(sleeper(seconds)) for seconds in (30, 10, 20)]
    await clock.until_asleep(3)
    assert (clock.sleepers, clock.next_wake) == (3, 10)
    clock.advance(9.5)
    await asyncio.sleep(0)
    assert woken == []
    clock.advance(10.5)
    await asyncio.gather(tasks[1], tasks[2])
    assert woken == [10, 20]
    assert (clock.now(), clock.sleepers, clock.next_wake) == (1020.0, 1, 10)
    clock.advance(10)
    await tasks[0]
    assert clock.next_wake is None


async def test_a_jump_of_the_wall_clock_wakes_nobody():
    clock = ManualClock(1000.0)
    task = asyncio.create_task(clock.sleep(5))
    await clock.until_asleep()
    clock.set(9e9)
    await asyncio.sleep(0)
    assert not task.done()
    clock.set(1.0)
    clock.advance(5)
    await task
    assert clock.now() == 6.0


async def test_a_cancelled_sleeper_is_no_sleeper_and_nothing_to_sleep_returns_at_once():
    clock = ManualClock()
    task = asyncio.create_task(clock.sleep(5))
    waiting = asyncio.create_task(clock.until_asleep(2))
    await clock.until_asleep()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert clock.sleepers == 0
    await clock.sleep(0)
    second = [asyncio.create_task(clock.sleep(5)) for _ in range(2)]
    await waiting
    clock.advance(5)
    await asyncio.gather(*second)
    with pytest.raises(WrongUsage, match="forwards"):
        clock.advance(-1)


def test_the_same_seed_says_the_same_however_it_is_asked():
    one, two = SeededEntropy(7), SeededEntropy("7")
    assert one.token(100) == two.token(3) + two.token(0) + two.token(97)
    assert SeededEntropy(8).token(32) != SeededEntropy(7).token(32)
    assert "7" not in repr(one)


def test_numbers_below_a_limit_are_uniform():
    rng = SeededEntropy(b"dice")
    counts = [0] * 6
    for _ in range(6_000):
        counts[rng.below(6)] += 1
    assert all(850 < count < 1_150 for count in counts)
    assert {rng.below(1) for _ in range(10)} == {0}
    assert 0 <= rng.below(1 << 300) < 1 << 300
    for wrong in (0, -1):
        with pytest.raises(WrongUsage):
            rng.below(wrong)
    with pytest.raises(WrongUsage):
        rng.token(-1)
