"""A cancellation that a library did not hear.

pyreqwest answers a request whose response had just come when its task was cancelled, and the cancellation is gone: whoever waits for
the task to end, on Ctrl-C for instance, waits in vain.

Law: what was cancelled is over, whatever it answered.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable
from typing import TypeVar

T = TypeVar("T")


async def heeding(work: Awaitable[T]) -> T:
    """What `work` answers or raises; asyncio.CancelledError where this task was cancelled meanwhile."""
    task = asyncio.current_task()
    before = 0 if task is None else task.cancelling()
    try:
        answer = await work
    except Exception as exc:
        if task is not None and task.cancelling() > before:
            raise asyncio.CancelledError from exc
        raise
    if task is not None and task.cancelling() > before:
        raise asyncio.CancelledError
    return answer
