"""`MemoryStore`: the store's semantics in memory, for tests.

It refuses what `SqlStore` refuses, with the same errors. What it does not do is survive the process: an app that keeps money uses
`pjv2.backends.store.sql.SqlStore`.

Law: a change is applied whole or not at all, and only after every check.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from pjv2.backends.store.change import (
    check_change,
    check_claim,
    check_page,
    check_text,
    lapsed,
    order_taken,
    unknown_session,
    uri_taken,
)
from pjv2.errors import OurMistake, WrongUsage
from pjv2.ports import (
    Appended,
    Change,
    CoinTakenBy,
    InputsSeenBy,
    LostRace,
    PeerTakenBy,
    Record,
    SessionRow,
    Stored,
)
from pjv2.units import Instant, Outpoint, SessionId


@dataclass(frozen=True, slots=True)
class _Claim:
    owner: str
    taken: Instant
    until: Instant


@dataclass(slots=True)
class _Data:
    """What a database would hold."""

    rows: dict[SessionId, SessionRow] = field(default_factory=dict)  # in the order of creation
    events: list[tuple[int, SessionId, Record]] = field(default_factory=list)
    last_id: int = 0
    seen: dict[Outpoint, SessionId] = field(default_factory=dict)
    coins: dict[Outpoint, SessionId] = field(default_factory=dict)
    peers: dict[str, SessionId] = field(default_factory=dict)
    blocked: dict[str, int] = field(default_factory=dict)
    claims: dict[SessionId, _Claim] = field(default_factory=dict)
    values: dict[str, str] = field(default_factory=dict)
    journal: list[Change] = field(default_factory=list)

    def copy(self) -> _Data:
        """Everything inside the containers is immutable."""
        return _Data(**{each.name: _copy(getattr(self, each.name)) for each in fields(self)})

    def count(self, session: SessionId) -> int:
        return sum(1 for _, owner, _ in self.events if owner == session)


@dataclass(slots=True)
class _Shelf:
    """The one place that all handles on the same data look at."""

    data: _Data


@dataclass(frozen=True, slots=True)
class Snapshot:
    """A copy of everything in a `MemoryStore`; only `restore` reads it."""

    _data: _Data = field(repr=False)


class MemoryStore:
    """A store in memory, for tests. `clock` is the database's clock, in seconds."""

    def __init__(self, clock: Callable[[], Instant] = time.time) -> None:
        self._clock = clock
        self._shelf = _Shelf(_Data())
        self._closed = False

    # ---------------------------------------------------------------- powers of a test

    def other(self) -> MemoryStore:
        """A second handle on the same data, as another process would have; closing one leaves the other open."""
        handle = MemoryStore(self._clock)
        handle._shelf = self._shelf
        return handle

    def snapshot(self) -> Snapshot:
        """A copy of everything now stored."""
        return Snapshot(self._shelf.data.copy())

    def restore(self, snapshot: Snapshot) -> None:
        """Put back a copy, on every handle: the store as it is after somebody restored an older backup."""
        self._shelf.data = snapshot._data.copy()

    def drop_tail(self, session: SessionId, appends: int = 1) -> None:
        """Forget the last `appends` changes of one session, with what they took and freed, as an older copy would.

        Changes are whole, so all events of a change go together; dropping its creation drops the session. Raises WrongUsage when the
        session has fewer, or when another session meanwhile took what it freed: then `snapshot` and `restore` all of it.
        """
        old = self._shelf.data
        places = [place for place, change in enumerate(old.journal) if change.row.session == session]
        if not 0 <= appends <= len(places):
            raise WrongUsage(f"session {session} has {len(places)} changes to drop, not {appends}")
        dropped = set(places[len(places) - appends :])
        new = _Data(claims=dict(old.claims), values=dict(old.values))
        for place, change in enumerate(old.journal):
            if place not in dropped and not isinstance(_store(new, change, first=change.seq == 0), Stored):
                raise WrongUsage(
                    f"session {change.row.session} built on what would be dropped: restore a snapshot instead"
                )
        kept = {(owner, record.seq) for _, owner, record in new.events}
        new.events = [entry for entry in old.events if (entry[1], entry[2].seq) in kept]
        new.last_id = old.last_id
        self._shelf.data = new

    # ---------------------------------------------------------------- the store

    async def create(self, change: Change) -> Appended:
        """Insert a session with its first events; LostRace when it exists. Raises WrongUsage when `order` or `uri_id` is taken."""
        check_change(change, first=True)
        return _store(await self._begin(), change, first=True)

    async def append(self, change: Change) -> Appended:
        """Store the change if the session has exactly `change.seq` events. Raises WrongUsage when there is no such session."""
        check_change(change, first=False)
        return _store(await self._begin(), change, first=False)

    async def load(self, session: SessionId) -> tuple[Record, ...]:
        """All events of a session in order. Raises WrongUsage when it is unknown."""
        data = await self._begin()
        if session not in data.rows:
            raise unknown_session(session)
        return tuple(record for _, owner, record in data.events if owner == session)

    async def row(self, session: SessionId) -> SessionRow:
        """The row of a session. Raises WrongUsage when it is unknown."""
        data = await self._begin()
        if session not in data.rows:
            raise unknown_session(session)
        return data.rows[session]

    async def rows(self, *, open_only: bool = False) -> tuple[SessionRow, ...]:
        """All rows, or those without an outcome, newest first."""
        newest = reversed((await self._begin()).rows.values())
        found = [row for row in newest if row.outcome is None or not open_only]
        return tuple(sorted(found, key=lambda row: row.created, reverse=True))

    async def find(self, *, order: str | None = None, uri_id: str | None = None) -> SessionRow | None:
        """The session that carries this order, or this receiver key (or both); None when there is none."""
        if order is None and uri_id is None:
            raise OurMistake("a session is found by its order or its receiver key")
        for row in (await self._begin()).rows.values():
            if order in (None, row.order) and uri_id in (None, row.uri_id):
                return row
        return None

    async def since(self, cursor: int, limit: int) -> tuple[tuple[int, SessionId, Record], ...]:
        """Up to `limit` events of all sessions whose cursor is above `cursor`, in order of their storing."""
        check_page(cursor, limit)
        data = await self._begin()
        return tuple([entry for entry in data.events if entry[0] > cursor][:limit])

    async def claim(self, session: SessionId, owner: str, seconds: float) -> bool:
        """Take or renew the claim by the store's clock; False when another holds it. The session need not exist yet."""
        check_claim(session, owner, seconds)
        data = await self._begin()
        now = self._clock()
        held = data.claims.get(session)
        if held is not None and held.owner != owner and not lapsed(now, held.taken, held.until):
            return False
        data.claims[session] = _Claim(owner, now, now + seconds)
        return True

    async def release(self, session: SessionId, owner: str) -> None:
        """Give up the claim if it is `owner`'s."""
        check_claim(session, owner, 0.0)
        data = await self._begin()
        held = data.claims.get(session)
        if held is not None and held.owner == owner:
            del data.claims[session]

    async def coins_in_use(self) -> Mapping[Outpoint, SessionId]:
        """The coins that open sessions pledged, and which session did."""
        return dict((await self._begin()).coins)

    async def peers_in_use(self) -> Mapping[str, SessionId]:
        """The channel peers that sessions are opening a channel with, and which session is."""
        return dict((await self._begin()).peers)

    async def blocked_peers(self) -> Mapping[str, int]:
        """Peers that keep an abandoned channel, and the height until which they refuse another."""
        return dict((await self._begin()).blocked)

    async def get(self, name: str) -> str | None:
        """The value kept under `name`, or None."""
        return (await self._begin()).values.get(check_text(name))

    async def put(self, name: str, value: str | None) -> None:
        """Keep a small public value under `name`, or forget it (None)."""
        check_text(name)
        data = await self._begin()
        if value is None:
            data.values.pop(name, None)
        else:
            data.values[name] = check_text(value)

    async def close(self) -> None:
        """Close this handle; the data lives on in the others. Closing twice is fine."""
        self._closed = True

    async def _begin(self) -> _Data:
        """Let others run first, as a real database does; from here to the answer nothing else happens."""
        if self._closed:
            raise OurMistake("this store is closed")
        await asyncio.sleep(0)
        return self._shelf.data


def _copy(value: Any) -> Any:
    return value if isinstance(value, int) else value.copy()


def _store(data: _Data, change: Change, *, first: bool) -> Appended:
    row = change.row
    session = row.session
    if session not in data.rows and not first:
        raise unknown_session(session)
    if session in data.rows and (first or data.count(session) != change.seq):
        return LostRace()
    refused = _refusal(data, change)
    if refused is not None:
        return refused

    data.rows[session] = row
    for record in change.records:
        data.last_id += 1
        data.events.append((data.last_id, session, record))
    if change.free_coins:
        data.coins = {outpoint: owner for outpoint, owner in data.coins.items() if owner != session}
    if change.free_peers:
        data.peers = {peer: owner for peer, owner in data.peers.items() if owner != session}
    data.seen |= dict.fromkeys(change.see_inputs, session)
    data.coins |= dict.fromkeys(change.take_coins, session)
    data.peers |= dict.fromkeys(change.take_peers, session)
    for peer, height in change.block_peers:
        data.blocked[peer] = max(height, data.blocked.get(peer, height))
    data.journal.append(change)
    return Stored()


def _refusal(data: _Data, change: Change) -> InputsSeenBy | CoinTakenBy | PeerTakenBy | None:
    row = change.row
    session = row.session
    others = [other for other in data.rows.values() if other.session != session]
    for other in others:
        if row.order is not None and other.order == row.order:
            raise order_taken(row.order, other.session)
    for other in others:
        if row.uri_id is not None and other.uri_id == row.uri_id:
            raise uri_taken(other.session)
    for outpoint in change.see_inputs:
        if data.seen.get(outpoint, session) != session:
            return InputsSeenBy(data.seen[outpoint], outpoint)
    for outpoint in change.take_coins:
        if data.coins.get(outpoint, session) != session:
            return CoinTakenBy(data.coins[outpoint], outpoint)
    for peer in change.take_peers:
        if data.peers.get(peer, session) != session:
            return PeerTakenBy(data.peers[peer], peer)
    return None
