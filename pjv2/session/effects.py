"""What the store writes in the same transaction as an event, and the row by which a session is found and scheduled.

It refuses to know the store: these are plain facts, named as in `pjv2.ports.Change` and `SessionRow`.

Law: seen inputs are written with `OriginalAccepted`, coins in use with `CoinsReserved` or a sender's `Created`, and given back only
by `CoinsReleased`; a later `CoinsReserved` frees what it replaces.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

from pjv2.session import events as ev
from pjv2.session import receive, send
from pjv2.session.log import State
from pjv2.session.monitor import coin_outpoints
from pjv2.session.needs import Memory, Needs
from pjv2.session.receive import Receiver
from pjv2.units import Instant, Outpoint, Sats, SessionId


@dataclass(frozen=True, slots=True)
class Effects:
    """What goes into the store with one event; freeing comes before taking."""

    see_inputs: tuple[Outpoint, ...] = ()
    take_coins: tuple[Outpoint, ...] = ()
    free_coins: bool = False
    take_peers: tuple[str, ...] = ()
    free_peers: bool = False
    block_peers: tuple[tuple[str, int], ...] = ()


def effects(before: State | None, event: ev.Event) -> Effects:  # noqa: PLR0911  # one return per case
    """The store's part of an event that happens to `before`."""
    match event:
        case ev.SenderCreated(inputs=inputs):
            return Effects(take_coins=inputs)
        case ev.OriginalAccepted(inputs=inputs):
            return Effects(see_inputs=inputs)
        case ev.CoinsReserved(coins=coins):
            replaced = isinstance(before, Receiver) and before.coins is not None
            return Effects(take_coins=coin_outpoints(coins), free_coins=replaced)
        case ev.CoinsReleased():
            return Effects(free_coins=True)
        case ev.ChannelsIntended(intent=intent):
            return Effects(take_peers=tuple(order.peer for order in intent.orders))
        case ev.ChannelsReleased(blocked=blocked):
            return Effects(free_peers=True, block_peers=blocked)
        case ev.Closed():
            return Effects(free_coins=True, free_peers=True)
        case _:
            return Effects()


@dataclass(frozen=True, slots=True)
class RowFacts:
    """The public facts of a session's row; `next_due` None means that nothing is ever due again."""

    session: SessionId
    role: str
    state: str
    outcome: str | None
    created: Instant
    expires: Instant
    next_due: Instant | None
    label: str | None
    note: str | None
    order: str | None
    amount: Sats | None
    uri_id: str | None


def needs(state: State, now: Instant, memory: Memory) -> Needs:
    """What the session wants from the world now; the role knows."""
    return receive.needs(state, now, memory) if isinstance(state, Receiver) else send.needs(state, now, memory)


def row_facts(state: State, now: Instant, memory: Memory) -> RowFacts:
    """The row after an append at `now`."""
    wants = needs(state, now, memory)
    created = state.created
    note = order = uri_id = None
    if isinstance(created, ev.ReceiverCreated):
        note, order = created.note, created.order
    else:
        uri_id = hashlib.sha256(created.receiver).hexdigest()
    return RowFacts(
        session=state.session,
        role=state.role,
        state=state.stage.value,
        outcome=state.closed.outcome.value if state.closed is not None else None,
        created=created.at,
        expires=float(created.expires),
        next_due=now if wants.due else wants.wake_at,
        label=created.label,
        note=note,
        order=order,
        amount=created.amount,
        uri_id=uri_id,
    )
