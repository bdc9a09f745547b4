"""The channel schedule: intentions to open a channel, kept until a payment is large enough to carry them.

```
waiting -> bound(session) -> opened(outpoint)
   ^            |
   +------------+   the session ended without this channel
```

It opens nothing and knows no node: a bound intention is an order in a session's channel plan, and only that session acts on it. What
became of it is read from the session's log whenever somebody looks, so no worker has to remember to tell.

Law: an intention is bound before the URI of its session is shown, under the schedule's own claim, so that no two payments carry it.
"""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from typing import Any, Literal

from pjv2 import session as model
from pjv2.errors import CannotRead, NotNow, WrongUsage
from pjv2.ports import Entropy, Store
from pjv2.psbt.plan import ChannelOrder, ChannelPlan, check_plan, format_channel_order, parse_channel_order
from pjv2.session.events import Policy
from pjv2.units import Instant, Outpoint, Sats, SessionId

NAME = "plans"
"""Under which the store keeps the schedule, and the claim of whoever changes it."""

CLAIM = 120.0


@dataclass(frozen=True, slots=True)
class Intention:
    """A channel that somebody wants. `session` is the one that carries it, `outpoint` the channel it became."""

    id: str
    order: ChannelOrder
    added: Instant
    session: SessionId | None = None
    outpoint: Outpoint | None = None

    @property
    def state(self) -> Literal["waiting", "bound", "opened"]:
        if self.outpoint is not None:
            return "opened"
        return "waiting" if self.session is None else "bound"


# ---------------------------------------------------------------- pure


def fitting(
    waiting: Sequence[Intention],
    given: Sequence[ChannelOrder],
    amount: Sats,
    policy: Policy,
    *,
    deposit: bool = False,
    reserves: Sequence[Sats] = (0,),
    away: frozenset[str] = frozenset(),
) -> tuple[Intention, ...]:
    """The waiting intentions that a payment of `amount` sats can carry beside the orders `given`, oldest first.

    `reserves[n]` is what the node's wallet must hold for n new public channels; peers in `away` cannot take a channel now.
    """
    chosen: list[Intention] = []
    for intention in sorted(waiting, key=lambda one: one.added):
        if intention.state != "waiting" or intention.order.peer in away:
            continue
        orders = (*given, *(one.order for one in chosen), intention.order)
        public = sum(not order.private for order in orders)
        if public >= len(reserves):
            continue
        plan = ChannelPlan(orders, deposit=deposit, reserve=reserves[public])
        try:
            check_plan(plan, amount, policy.max_fee_rate, policy.max_fee_share_ppm)
        except WrongUsage:
            continue
        chosen.append(intention)
    return tuple(chosen)


def bound(intentions: Sequence[Intention], state: model.State) -> tuple[Intention, ...]:
    """The intentions, those that the session's plan carries bound to it."""
    plan = state.created.plan if isinstance(state, model.Receiver) else None
    orders = list(plan.orders) if plan is not None else []
    for intention in intentions:
        if intention.session == state.session and intention.order in orders:
            orders.remove(intention.order)
    after = []
    for intention in intentions:
        if intention.state == "waiting" and intention.order in orders:
            orders.remove(intention.order)
            intention = replace(intention, session=state.session)  # noqa: PLW2901  the bound one takes its place
        after.append(intention)
    return tuple(after)


def settled(intentions: Sequence[Intention], states: Mapping[SessionId, model.State]) -> tuple[Intention, ...]:
    """The intentions as their sessions left them; one whose session is not in `states` (a restored store) waits again."""
    return tuple(_settle(one, states.get(one.session or "")) if one.state == "bound" else one for one in intentions)


def _settle(intention: Intention, state: model.State | None) -> Intention:
    if state is None:
        return replace(intention, session=None)
    if state.closed is None:
        return intention
    opened = opened_channels(state)
    if intention.order.peer in opened:
        return replace(intention, outpoint=opened[intention.order.peer])
    if set(state.closed.channels) - set(opened.values()):
        return intention  # channels of a proposal that the log lost: nobody here can say whose they are, a person looks
    return replace(intention, session=None)


def opened_channels(state: model.State) -> dict[str, Outpoint]:
    """The channels of a session that ended, by peer."""
    if not isinstance(state, model.Receiver) or state.closed is None or state.drafted is None:
        return {}
    orders, txid = state.drafted.intent.orders, state.drafted.txid
    found = {orders[entry.channel].peer: Outpoint(txid, entry.vout) for entry in state.drafted.funding}
    return {peer: outpoint for peer, outpoint in found.items() if outpoint in state.closed.channels}


# ---------------------------------------------------------------- stored


def encode(intentions: Sequence[Intention]) -> str:
    """As the store keeps them."""
    return json.dumps(
        [
            {
                "id": one.id,
                "order": format_channel_order(one.order),
                "added": one.added,
                "session": one.session,
                "outpoint": None if one.outpoint is None else str(one.outpoint),
            }
            for one in intentions
        ]
    )


def decode(text: str | None) -> tuple[Intention, ...]:
    """Raises CannotRead when it is not what `encode` wrote."""
    try:
        return tuple(_intention(entry) for entry in json.loads(text or "[]"))
    except (ValueError, TypeError, KeyError, WrongUsage) as exc:
        raise CannotRead("the stored channel schedule is not one that this version wrote") from exc


def _intention(entry: Mapping[str, Any]) -> Intention:
    outpoint = entry["outpoint"]
    return Intention(
        id=str(entry["id"]),
        order=parse_channel_order(entry["order"]),
        added=float(entry["added"]),
        session=entry["session"],
        outpoint=None if outpoint is None else Outpoint.parse(outpoint),
    )


async def read(store: Store) -> tuple[Intention, ...]:
    """The schedule as it is now; nothing is written. Raises CannotRead."""
    kept = decode(await store.get(NAME))
    states: dict[SessionId, model.State] = {}
    for session in {one.session for one in kept if one.session is not None and one.state == "bound"}:
        try:
            records = await store.load(session)
        except WrongUsage:
            continue  # unknown here: settled() lets it wait again
        states[session] = model.replay([(record.seq, record.name, record.data) for record in records])
    return settled(kept, states)


class Schedule:
    """The schedule while it is changed: nobody else changes it meanwhile."""

    def __init__(self, store: Store, intentions: tuple[Intention, ...]) -> None:
        self._store = store
        self.intentions = intentions

    async def _write(self, intentions: tuple[Intention, ...]) -> None:
        await self._store.put(NAME, encode(intentions))
        self.intentions = intentions

    async def add(self, order: ChannelOrder, now: Instant, rng: Entropy) -> Intention:
        """Keep an intention."""
        taken = {one.id for one in self.intentions}
        while (id := rng.token(4).hex()) in taken:
            pass
        intention = Intention(id, order, now)
        await self._write((*self.intentions, intention))
        return intention

    async def remove(self, beginning: str) -> Intention:
        """Forget the one intention whose id begins so. Raises WrongUsage: none, several, or carried by an open session."""
        found = [one for one in self.intentions if beginning and one.id.startswith(beginning.lower())]
        if len(found) != 1:
            raise WrongUsage(f"{len(found) or 'no'} plans begin with {beginning!r}: pjv2 plan list shows them")
        one = found[0]
        if one.session is not None and one.state == "bound" and (await self._store.row(one.session)).outcome is None:
            raise WrongUsage(
                f"plan {one.id} is carried by session {one.session}: cancel that first (pjv2 cancel {one.session[:8]})"
            )
        await self._write(tuple(other for other in self.intentions if other is not one))
        return one

    async def bind(self, state: model.State) -> tuple[Intention, ...]:
        """Bind what the session's plan carries; answers all that it carries now."""
        await self._write(bound(self.intentions, state))
        return tuple(one for one in self.intentions if one.session == state.session)


@asynccontextmanager
async def changing(store: Store, rng: Entropy) -> AsyncIterator[Schedule]:
    """The schedule to change. Raises NotNow while somebody else changes it, CannotRead."""
    owner = rng.token(8).hex()
    if not await store.claim(NAME, owner, CLAIM):
        raise NotNow("another command changes the channel schedule at this moment; try again", after=5)
    try:
        yield Schedule(store, await read(store))
    finally:
        await store.release(NAME, owner)
