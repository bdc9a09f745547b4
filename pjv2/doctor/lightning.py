"""Lightning: whether the node can open channels now, and whether the peers of planned channels can be reached."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from pjv2 import schedule
from pjv2.doctor.installation import DEADLINE, Check, Installation
from pjv2.doctor.store import state_of
from pjv2.errors import PayjoinError
from pjv2.ports import Store
from pjv2.psbt.plan import ChannelOrder
from pjv2.session.receive import Receiver


async def check_lightning(it: Installation) -> Sequence[Check]:
    """The node answers, can open channels now, and its wallet holds what they must keep in reserve."""
    node = await it.channels()
    if node is None:
        return [Check("lightning", "ok", "none configured: payments become payjoins without channels")]
    info = await node.node()
    if not info.ready:
        why = f"the node {info.pubkey[:16]}… cannot open channels now: {info.why_not or 'it does not say why'}"
        return [Check("lightning", "failed", why, "Bring the node into order; until then payments get no channels.")]
    missing = await node.anchor_reserve(1)
    if missing > 0:
        why = f"the node's own wallet lacks {missing:_} sat that one more public channel must keep in reserve"
        return [Check("lightning", "warning", why, "Send that to the node's wallet, or open private channels.")]
    span = f"{info.min_capacity:_} to {info.max_capacity:_} sat"
    return [Check("lightning", "ok", f"the node {info.pubkey[:16]}… is ready for channels of {span}")]


async def check_peers(it: Installation) -> Sequence[Check]:
    """The peers that channels are planned with can be reached, and none still holds an abandoned channel."""
    node = await it.channels()
    if node is None:
        return []
    store = await it.store()
    orders = await _planned(store)
    if not orders:
        return [Check("peers", "ok", "no channel is planned; peers are tried when one is")]
    blocked, tip = await store.blocked_peers(), (await (await it.chain()).tip()).height

    async def problem(order: ChannelOrder) -> str | None:
        if blocked.get(order.peer, 0) > tip:
            return f"{order.peer[:16]}… may refuse until block {blocked[order.peer]:_}: it holds an abandoned channel"
        try:
            async with asyncio.timeout(DEADLINE * 0.8):
                await node.connect(order.peer, order.host)
        except TimeoutError:
            return f"{order.peer[:16]}… does not answer"
        except PayjoinError as exc:
            return f"{order.peer[:16]}… cannot be reached: {exc}"
        return None

    troubles = [said for said in await asyncio.gather(*(problem(order) for order in orders)) if said is not None]
    if troubles:
        todo = "Their channels are left out or deferred, as on_peer_failure says; plan with other peers if it stays."
        return [Check("peers", "warning", "; ".join(troubles), todo)]
    return [Check("peers", "ok", f"all {len(orders)} peers of planned channels are connected")]


async def _planned(store: Store) -> tuple[ChannelOrder, ...]:
    """Channels that open requests and the schedule wait for, one per peer."""
    found = {plan.order.peer: plan.order for plan in await schedule.read(store) if plan.state == "waiting"}
    for row in await store.rows(open_only=True):
        if row.role == "receiver":
            state = await state_of(store, row.session)
            plan = state.created.plan if isinstance(state, Receiver) and not state.channels_pending else None
            found |= {order.peer: order for order in (plan.orders if plan is not None else ())}
    return tuple(found.values())
