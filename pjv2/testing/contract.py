"""How a contract is run: named checks, each over its own rig.

Law: whoever breaks a promise reads its name and what was wrong.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from contextlib import AbstractAsyncContextManager
from typing import TypeVar
from unittest import SkipTest

Rig = TypeVar("Rig")


async def run_checks(
    checks: Sequence[Callable[[Rig], Awaitable[None]]], make: Callable[[], AbstractAsyncContextManager[Rig]]
) -> None:
    """Run every check over a rig of its own; what the rig cannot do is skipped. Raises AssertionError naming the check that failed."""
    for check in checks:
        async with make() as rig:
            try:
                await check(rig)
            except SkipTest:
                continue
            except AssertionError as exc:
                raise AssertionError(f"{_sentence(check)}: {exc}") from exc


def _sentence(check: Callable[..., object]) -> str:
    return getattr(check, "__name__", "a check").replace("_", " ")


def hold(condition: bool, what: str) -> None:
    """Raises AssertionError saying `what` when the condition does not hold."""
    if not condition:
        raise AssertionError(what)


async def nothing() -> None:
    """A power that a rig does not need."""
