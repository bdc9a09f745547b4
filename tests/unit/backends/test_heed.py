"""Cancellations are heard, also those that the work did not hear."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

import pytest

from pjv2.backends.heed import heeding


async def deaf() -> str:
    """Answers although it was cancelled, as an HTTP client does whose response has just come."""
    try:
        await asyncio.Event().wait()
    except asyncio.CancelledError:
        return "an answer"
    return "never"


async def clumsy() -> str:
    try:
        await asyncio.Event().wait()
    except asyncio.CancelledError:
        raise OSError("the connection broke") from None
    return "never"


@pytest.mark.parametrize("work", [deaf, clumsy])
async def test_what_was_cancelled_is_over_whatever_it_answered(work: Callable[[], Awaitable[str]]) -> None:
    task = asyncio.create_task(heeding(work()))
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


async def test_a_time_limit_over_deaf_work_ends_it() -> None:
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.01):
            await heeding(deaf())


async def test_who_was_cancelled_before_is_answered_all_the_same() -> None:
    async def cleaning_up() -> str:
        try:
            await asyncio.Event().wait()
        finally:
            assert await heeding(_value()) == "kept"
        return "never"

    task = asyncio.create_task(cleaning_up())
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


async def test_without_a_cancellation_nothing_is_changed() -> None:
    assert await heeding(_value()) == "kept"
    with pytest.raises(OSError, match="broke"):
        await heeding(_broken())


async def _value() -> str:
    return "kept"


async def _broken() -> str:
    raise OSError("the connection broke")
