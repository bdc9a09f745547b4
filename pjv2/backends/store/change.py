"""What every store demands of its caller, whichever database stands behind it.

It refuses, as `OurMistake`, changes that a database would silently bend: events out of order, times that are not finite (SQLite
stores NaN as NULL), integers beyond 63 bits, text that is not Unicode or holds a NUL (PostgreSQL stores neither).

Law: nothing is stored that would not be read back equal.
"""

from __future__ import annotations

import math

from pjv2.errors import OurMistake, WrongUsage
from pjv2.ports import Change
from pjv2.units import Instant

CLOCK_SLACK = 3600.0
"""Seconds that the database's clock may have been set back before a claim taken in its future is no longer believed.

Without it a claim taken while the clock was wrong by years would stop its session for years.
"""


def check_change(change: Change, *, first: bool) -> None:
    """Raise OurMistake unless `change` can be stored and read back equal; `first` for the creation of a session."""
    if first and (change.seq != 0 or not change.records):
        raise OurMistake("a session is created with at least one event, numbered from 0")
    if change.seq < 0 or any(record.seq != change.seq + place for place, record in enumerate(change.records)):
        raise OurMistake(f"the events of a change are numbered without gaps from its seq {change.seq}")
    row = change.row
    texts = [row.session, row.role, row.state, row.outcome, row.label, row.note, row.order, row.uri_id]
    texts += [text for record in change.records for text in (record.name, record.data)]
    texts += [*change.take_peers, *(peer for peer, _ in change.block_peers)]
    texts += [outpoint.txid for outpoint in (*change.see_inputs, *change.take_coins)]
    for text in texts:
        if text is not None:
            check_text(text)
    if not row.session:
        raise OurMistake("a session has an id")
    for instant in (row.created, row.expires, row.next_due, *(record.at for record in change.records)):
        if instant is not None and not math.isfinite(instant):
            raise OurMistake("an instant in the store is a finite number of seconds")
    for number in (row.amount, *(height for _, height in change.block_peers)):
        if number is not None and not 0 <= number < 2**63:
            raise OurMistake("an amount or height in the store is between 0 and 2^63")


def check_text(text: str) -> str:
    """`text` as it is; raise OurMistake when a database could not give it back."""
    if "\0" in text:
        raise OurMistake("text in the store holds no NUL character")
    try:
        text.encode()
    except UnicodeEncodeError:
        unicode = False
    else:
        unicode = True
    if not unicode:  # raised here, so that the text does not hang on the error as its cause
        raise OurMistake("text in the store is valid Unicode")
    return text


def check_claim(session: str, owner: str, seconds: float) -> None:
    """Raise OurMistake for a claim without a session, an owner or a finite duration of at least 0 seconds."""
    if not check_text(session) or not check_text(owner):
        raise OurMistake("a claim names a session and its owner")
    if not math.isfinite(seconds) or seconds < 0:
        raise OurMistake("a claim lasts a finite number of seconds, at least 0")


def check_page(cursor: int, limit: int) -> None:
    """Raise OurMistake unless `cursor` and `limit` describe a page of events."""
    if not 0 <= cursor < 2**63 or not 1 <= limit < 2**31:
        raise OurMistake("a page of events starts after a cursor >= 0 and holds at least one event")


def lapsed(now: Instant, taken: Instant, until: Instant) -> bool:
    """Is a claim from `taken` to `until` over by a clock that says `now`?"""
    return until <= now or taken > now + CLOCK_SLACK


def unknown_session(session: str) -> WrongUsage:
    """The error for a session that the store does not hold."""
    return WrongUsage(f"there is no session {session!r} in this store")


def order_taken(order: str, session: str) -> WrongUsage:
    """The error for an order that another session carries."""
    return WrongUsage(f"order {order!r} belongs to session {session}: use that session, or another order")


def uri_taken(session: str) -> WrongUsage:
    """The error for a receiver key that another session pays or paid."""
    return WrongUsage(f"this payment URI was used by session {session}: ask the payee for another one")
