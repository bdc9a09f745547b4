"""Which relays and directories to leave alone for a while, and for how long.

A back-off belongs to a relay, to a relay together with one directory (what it answers for that directory only), or to a directory.
It doubles with every failure in a row, ends by itself, and is forgotten on success: nothing is ever given up for good.

Law: a back-off is a time, not a verdict. The state is public facts and can be kept across runs as a dictionary.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pjv2.errors import CannotRead
from pjv2.units import Entropy, Instant

FIRST_BACK_OFF = 2.0
LONGEST_BACK_OFF = 600.0
LONGEST_RETRY_AFTER = 3600.0
"""A service may ask for more; it is asked again after an hour all the same."""
_FORGET_AFTER = 86_400.0
_MOST_ENTRIES = 1000


@dataclass(frozen=True, slots=True)
class BackOff:
    """Failures in a row, when the last one was, and until when to stay away."""

    failures: int
    last: Instant
    until: Instant


class Health:
    """The back-offs in force. Times are instants of the caller's clock, which may jump: none lasts longer than an hour from now."""

    def __init__(self, rng: Entropy, known: Mapping[str, BackOff] | None = None) -> None:
        self._rng = rng
        self._known = dict(known or {})

    def wait(self, now: Instant, *names: str) -> float:
        """Seconds until every one of `names` may be used; 0 when that is now."""
        return max((self._wait(name, now) for name in names), default=0.0)

    def _wait(self, name: str, now: Instant) -> float:
        entry = self._known.get(name)
        if entry is None or entry.last > now + 1.0:  # blamed in the future: the clock went back, so the time is unknown
            return 0.0
        return min(max(entry.until - now, 0.0), LONGEST_RETRY_AFTER)

    def failures(self, *names: str) -> int:
        """The most failures in a row that any of `names` has."""
        return max((entry.failures for name in names if (entry := self._known.get(name)) is not None), default=0)

    def failed(self, name: str, now: Instant, retry_after: float | None = None) -> float:
        """Count a failure and answer the seconds to stay away: doubling from 2 s to 10 min with jitter, or what was asked for."""
        before = self._known.get(name)
        failures = 1 if before is None or now - before.last > _FORGET_AFTER else before.failures + 1
        seconds = min(FIRST_BACK_OFF * 2.0 ** min(failures - 1, 20), LONGEST_BACK_OFF)
        seconds *= 0.75 + self._rng.below(1001) / 2000  # clients that failed together do not come back together
        if retry_after is not None:
            seconds = max(seconds, min(retry_after, LONGEST_RETRY_AFTER))
        self._known.pop(name, None)
        self._known[name] = BackOff(failures, now, now + seconds)
        while len(self._known) > _MOST_ENTRIES:
            del self._known[next(iter(self._known))]
        return seconds

    def worked(self, *names: str) -> bool:
        """Forget what was held against these; answers whether there was anything."""
        held = [name for name in names if name in self._known]
        for name in held:
            del self._known[name]
        return bool(held)

    def back_offs(self, now: Instant) -> dict[str, float]:
        """Who is left alone now, and for how many more seconds."""
        return {name: wait for name in self._known if (wait := self._wait(name, now)) > 0}

    def to_dict(self) -> dict[str, Any]:
        """A JSON value that `from_dict` reads."""
        return {name: [entry.failures, entry.last, entry.until] for name, entry in self._known.items()}

    @classmethod
    def from_dict(cls, data: Any, rng: Entropy) -> Health:
        """The health that `to_dict` wrote. Raises CannotRead."""
        if not isinstance(data, dict):
            raise CannotRead("the stored health of relays is not an object")
        known: dict[str, BackOff] = {}
        for name, value in data.items():
            match value:
                case [int(failures), int() | float() as last, int() | float() as until] if failures > 0:
                    known[str(name)] = BackOff(failures, float(last), float(until))
                case _:
                    raise CannotRead("an entry in the stored health of relays is not [failures, last, until]")
        return cls(rng, known)
