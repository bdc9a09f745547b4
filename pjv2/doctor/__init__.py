"""What a payment will need, tried beforehand: mailroom, wallet, chain source, Lightning node, store, clock and policy.

Every check is on its own: it has a deadline, what fails in it is its result, and no other check waits for it. What is opened is opened
once, when the first check asks. Nothing is signed, broadcast or reserved; the only traces are a mailbox of random bytes at each
directory, connections to channel peers, and the caches of keys and health.

It refuses to guess: a check that cannot be made says why, and is a warning or a failure, never ok.

Law: a result holds public facts only, and a failed check says what to do.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable, Coroutine, Iterable, Sequence
from typing import Any

from pjv2.doctor.chain import check_chain, check_clock, check_original
from pjv2.doctor.chain import made_up as made_up
from pjv2.doctor.installation import DEADLINE as DEADLINE
from pjv2.doctor.installation import Check as Check
from pjv2.doctor.installation import Installation as Installation
from pjv2.doctor.installation import failure as failure
from pjv2.doctor.lightning import check_lightning, check_peers
from pjv2.doctor.mailroom import check_directory, check_keys, check_relays
from pjv2.doctor.mailroom import round_trip as round_trip
from pjv2.doctor.policy import check_fees, check_policy
from pjv2.doctor.store import check_store
from pjv2.doctor.wallet import check_coins, check_gap, check_wallet
from pjv2.errors import NotNow, PayjoinError, WrongUsage

_log = logging.getLogger(__name__)

CHECKS: tuple[tuple[str, Callable[[Installation], Coroutine[Any, Any, Sequence[Check]]]], ...] = (
    ("policy", check_policy),
    ("store", check_store),
    ("relays", check_relays),
    ("keys", check_keys),
    ("directory", check_directory),
    ("wallet", check_wallet),
    ("coins", check_coins),
    ("gap", check_gap),
    ("chain", check_chain),
    ("original", check_original),
    ("clock", check_clock),
    ("fees", check_fees),
    ("lightning", check_lightning),
    ("peers", check_peers),
)


async def examine(it: Installation, *, deadline: float = DEADLINE) -> AsyncIterator[Check]:
    """Every check's results, in the order of `CHECKS`, as soon as they are there. `deadline` is for each check, in seconds."""
    tasks = [asyncio.create_task(_result(name, check(it), deadline)) for name, check in CHECKS]
    try:
        for task in tasks:
            for found in await task:
                yield found
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _result(name: str, work: Coroutine[Any, Any, Sequence[Check]], deadline: float) -> Sequence[Check]:
    try:
        async with asyncio.timeout(deadline):
            return await work
    except TimeoutError:
        return [Check(name, "failed", f"there was no answer within {deadline:g} s", "Try again, or give it more time.")]
    except PayjoinError as exc:
        return [failure(name, exc)]
    except Exception as exc:  # a bug in one check is its result: it must not hide what the others found
        _log.warning("the check %s broke: %s", name, type(exc).__name__, exc_info=True)
        why = f"this is a bug in pjv2: {type(exc).__name__}"
        return [Check(name, "failed", why, "Run it again with -v -v for the traceback, and report that.")]


def exit_code(checks: Iterable[Check]) -> int:
    """0 when nothing failed, 2 when the configuration is at fault, else 4."""
    failed = [check for check in checks if check.status == "failed"]
    if not failed:
        return 0
    return WrongUsage.exit_code if any(check.usage for check in failed) else NotNow.exit_code
