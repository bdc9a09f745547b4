"""Lives of sessions, each a story of its own; together they take every legal cell of both tables."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

from pjv2 import session as model
from pjv2.session import events as ev
from tests.unit.session.world import DAY, PLAN, TWO, Actor, World, kit, want

ASK = ev.Policy(approve="ask")
ABORT = ev.Policy(on_peer_failure="abort")


@dataclass(frozen=True)
class Step:
    before: model.State | None
    event: ev.Event
    after: model.State


def steps(actor: Actor) -> Iterator[Step]:
    """The log of an actor, event by event."""
    state: model.State | None = None
    for event in actor.events:
        after = model.evolve(state, event)
        yield Step(state, event, after)
        state = after


def bury(world: World, actor: Actor, tx: kit.Tx) -> None:
    world.chain.put(tx)
    actor.look()
    world.chain.mine(6)
    actor.run("Closed")


def paid(world: World) -> Actor:
    actor = world.receiving(TWO)
    actor.run("Monitor")
    bury(world, actor, world.payjoin(actor))
    return actor


def paid_plainly(world: World) -> Actor:
    actor = world.receiving(policy=ASK)
    actor.run(lambda state: state.stage == "CheckedOriginal")
    actor.feed(want.Approve())
    actor.run("Monitor")
    bury(world, actor, world.payjoin(actor))
    world.chain.put(world.payment(), depth=1)
    actor.look()
    return actor


def never_used(world: World) -> Actor:
    actor = world.receiver()
    world.now += DAY
    actor.run("Closed")
    return actor


def refused(world: World) -> Actor:
    world.chain.suitability = kit.Suitability("refused", "bad")
    actor = world.receiving()
    actor.run("Closed")
    return actor


def aborted(world: World) -> Actor:
    world.node.fail_reserve.add(PLAN.orders[0].peer)
    actor = world.receiving(PLAN, ABORT)
    actor.run("PendingFallback")
    actor.run(lambda state: state.refusal_posted and state.coins_released, skip=[want.Broadcast])
    actor.run(lambda state: state.fallback_broadcasted)
    world.chain.mine(6)
    actor.run("Closed")
    return actor


def fallback_in_every_way(world: World) -> Actor:
    """O is refused, taken, evicted and buried after a cancel in PendingFallback."""
    actor = world.receiving()
    actor.run("CheckedOriginal")
    actor.feed(want.Cancel())
    world.chain.refuses.add(world.original.txid)
    actor.run(lambda state: state.fallback_rejected is not None, skip=[want.ReadReply])
    world.chain.refuses.clear()
    actor.run(lambda state: state.fallback_broadcasted, skip=[want.ReadReply])
    world.chain.mine(6)
    actor.run("Closed")
    return actor


def peers_fail_then_plain(world: World) -> Actor:
    world.node.fail_secure.add(PLAN.orders[0].peer)
    actor = world.receiving(PLAN)
    actor.run("Monitor")
    bury(world, actor, world.payjoin(actor))
    return actor


def cancelled_while_reserved(world: World) -> Actor:
    actor = world.receiving(PLAN)
    actor.run("WantsProposal")
    actor.feed(want.Cancel(broadcast=False))
    actor.run("Closed")
    return actor


def cancelled_while_signing(world: World) -> Actor:
    actor = world.receiving(PLAN)
    actor.run("ProvisionalProposal")
    actor.feed(want.Cancel(broadcast=False))
    actor.run("Closed")
    return actor


def cancelled_before_post(world: World) -> Actor:
    actor = world.receiving(PLAN)
    actor.run("PayjoinProposal")
    actor.feed(want.Cancel(broadcast=False))
    actor.run("Closed")
    return actor


def plain_stopped_while_signing(world: World) -> Actor:
    actor = world.receiving()
    actor.run("ProvisionalProposal")
    actor.feed(want.BroadcastNow())
    actor.run(lambda state: state.fallback_broadcasted)
    world.chain.mine(6)
    actor.run("Closed")
    return actor


def plain_stopped_before_post(world: World) -> Actor:
    actor = world.receiving()
    actor.run("PayjoinProposal")
    actor.feed(want.Cancel())
    actor.run(lambda state: state.fallback_broadcasted)
    return actor


def worker_gone_while_reserving(world: World) -> Actor:
    actor = world.receiving(PLAN)
    actor.run("ReservingChannels")
    actor.restart()
    actor.run("ReleasingChannels")
    actor.run("Monitor")
    return actor


def dead_while_monitored(world: World) -> Actor:
    actor = world.receiving(PLAN)
    actor.run("Monitor")
    bury(world, actor, world.original)
    return actor


def dead_while_posting(world: World) -> Actor:
    """The directory never answers the post; the payer's Original is buried, then the way out of a second life."""
    actor = world.receiving(PLAN)
    actor.run("PostingProposal")
    world.chain.put(world.original, depth=6)
    actor.look()
    actor.run("Closed", skip=[want.PostReply])
    return actor


def way_out_while_posting(world: World) -> Actor:
    actor = world.receiving()
    actor.run("PostingProposal")
    actor.feed(want.Cancel(broadcast=False))
    world.chain.mine(1_000)
    actor.run(lambda state: bool(state.way_outs), skip=[want.PostReply])
    actor.run(lambda state: bool(state.way_outs) and state.sightings != (), skip=[want.PostReply])
    world.chain.mine(6)
    actor.run("Closed", skip=[want.PostReply])
    return actor


def fallback_while_posting(world: World) -> Actor:
    actor = world.receiving()
    actor.run("PostingProposal")
    actor.feed(want.Cancel())
    world.chain.refuses.add(world.original.txid)
    actor.run(lambda state: state.fallback_rejected is not None, skip=[want.PostReply])
    world.chain.refuses.clear()
    actor.run(lambda state: state.fallback_broadcasted, skip=[want.PostReply])
    return actor


def way_out_while_monitored(world: World) -> Actor:
    actor = world.receiving(PLAN)
    actor.run("Monitor")
    actor.feed(want.Cancel(broadcast=False))
    world.chain.mine(1_000)
    actor.look()
    actor.run(lambda state: bool(state.way_outs))
    actor.run(lambda state: state.sightings != ())
    world.chain.mine(6)
    actor.run("Closed")
    return actor


def fallback_while_monitored(world: World) -> Actor:
    actor = world.receiving()
    actor.run("Monitor")
    world.now += DAY + 600
    world.chain.refuses.add(world.original.txid)
    actor.run(lambda state: state.fallback_rejected is not None)
    world.chain.refuses.clear()
    actor.run(lambda state: state.fallback_broadcasted)
    return actor


def waiting_for_an_unreadable_mailbox(world: World) -> Actor:
    """Drafted, crash, directory gone: O is collected while the release waits, then our coin comes back."""
    actor = world.receiving(PLAN)
    actor.run("ProvisionalProposal")
    actor.restart()
    world.directory_gone = True
    actor.feed(want.Cancel())
    world.chain.refuses.add(world.original.txid)
    actor.run(lambda state: state.fallback_rejected is not None)
    world.chain.refuses.clear()
    actor.run(lambda state: state.fallback_broadcasted)
    world.chain.drop(world.original.txid)
    world.chain.refuses.add(world.original.txid)
    world.chain.mine(1_000)
    actor.run(lambda state: bool(state.way_outs))
    world.directory_gone = False
    actor.run("PendingFallback")
    world.chain.rate *= 10
    world.now += 7_300
    actor.run(lambda state: len(state.way_outs) == 2)  # fees rose
    return actor


def lost_proposal_found(kind: str) -> Callable[[World], Actor]:
    def run(world: World) -> Actor:
        actor = world.receiving(PLAN if kind in ("node", "node later", "sign", "post", "release") else None)
        match kind:
            case "node":
                world.node.pend(kit.Outpoint("cd" * 32, 0))
                actor.run("Monitor")
            case "node later":
                actor.run(lambda state: state.coins is not None)
                actor.feed(want.Cancel())
                world.node.pend(kit.Outpoint("cd" * 32, 0))
                actor.run("Monitor")
            case "sign":
                actor.run("ProvisionalProposal")
                world.node.pend(kit.Outpoint("cd" * 32, 0))
                actor.feed(world.inspection(()))
            case "post":
                actor.run("PayjoinProposal")
                world.node.pend(kit.Outpoint("cd" * 32, 0))
                actor.run("Monitor")
            case "release":
                actor.run("ProvisionalProposal")
                actor.restart()
                world.reply = b"\x01" * 7168
                actor.feed(want.Cancel())
                actor.run("Monitor")
            case "refused":  # after a restore, and an older log had posted
                world.reply = b"\x01" * 7168
                world.chain.suitability = kit.Suitability("refused", "min relay fee not met")
                actor.run("Monitor")
            case "mailbox":
                actor.run("ProvisionalProposal")
                world.reply = b"\x01" * 7168
                actor.feed(want.Cancel())
                actor.run("Monitor")
        bury(world, actor, world.original)
        return actor

    return run


def sold(world: World) -> Actor:
    """A sender's whole life."""
    actor = sending(world)
    actor.run("BroadcastingPayjoin")
    actor.run(lambda state: state.sightings != ())
    world.chain.mine(6)
    actor.run("Closed")
    return actor


def sending(world: World, policy: ev.Policy | None = None, proposal: bool = True) -> Actor:
    """A sender whose Original is posted, with a real proposal waiting for him."""
    actor = world.sender(policy)
    actor.run("PollingForProposal")
    if proposal:
        world.propose_to(actor)
    usual = world.answer
    world.answer = lambda a, need: (  # type: ignore[method-assign]
        want.Polled(world.reply, "https://relay-3.example") if isinstance(need, want.Poll) else usual(a, need)
    )
    return actor


def sender_cancelled_at_once(world: World) -> Actor:
    actor = world.sender()
    actor.append(*actor.decide(want.Cancel()))
    actor.run("Closed")
    return actor


def sender_refused(world: World) -> Actor:
    actor = sending(world, proposal=False)
    world.reply_with(b'{"errorCode":"unavailable","message":"no"}')
    world.chain.refuses.add(world.original.txid)
    actor.run(lambda state: state.fallback_rejected is not None)
    world.chain.refuses.clear()
    actor.run(lambda state: state.fallback_broadcasted)
    world.chain.mine(6)
    actor.run("Closed")
    return actor


def sender_too_late_to_broadcast(world: World) -> Actor:
    actor = sending(world)
    actor.run("WantsSignature")
    signed = actor.world.answer(actor, actor.need(want.Sign))
    actor.append(*actor.decide(signed))
    world.now += DAY + 601
    actor.run("PendingFallback")
    return actor


def sender_cancels_before_signing(world: World) -> Actor:
    actor = sending(world)
    actor.run("WantsSignature")
    actor.feed(want.Cancel())
    actor.run(lambda state: state.fallback_broadcasted)
    return actor


def sender_payjoin_refused(world: World) -> Actor:
    actor = sending(world)
    actor.run("BroadcastingPayjoin")
    actor.look()
    world.chain.refuses.add(actor.state.signed.txid)
    actor.do(want.Broadcast)
    world.chain.refuses.add(world.original.txid)
    actor.run(lambda state: state.fallback_rejected is not None)
    world.chain.refuses.clear()
    actor.run(lambda state: state.fallback_broadcasted)
    world.chain.mine(6)
    actor.run("Closed")
    return actor


def sender_reclaims(world: World) -> Actor:
    actor = sending(world, proposal=False)
    actor.feed(want.Reclaim(kit.CHANGE, kit.FeeRate(2_500)))
    actor.run(lambda state: bool(state.reclaims))
    actor.run(lambda state: state.sightings != ())
    world.chain.mine(6)
    actor.run("Closed")
    return actor


RECEIVER: dict[str, Callable[[World], Actor]] = {
    "paid": paid,
    "paid plainly": paid_plainly,
    "never used": never_used,
    "refused": refused,
    "aborted": aborted,
    "fallback": fallback_in_every_way,
    "peers fail": peers_fail_then_plain,
    "cancelled while reserved": cancelled_while_reserved,
    "cancelled while signing": cancelled_while_signing,
    "cancelled before post": cancelled_before_post,
    "plain stopped while signing": plain_stopped_while_signing,
    "plain stopped before post": plain_stopped_before_post,
    "worker gone": worker_gone_while_reserving,
    "dead while monitored": dead_while_monitored,
    "dead while posting": dead_while_posting,
    "way out while posting": way_out_while_posting,
    "fallback while posting": fallback_while_posting,
    "way out while monitored": way_out_while_monitored,
    "fallback while monitored": fallback_while_monitored,
    "unreadable mailbox": waiting_for_an_unreadable_mailbox,
    **{
        f"found: {kind}": lost_proposal_found(kind)
        for kind in ("node", "node later", "sign", "post", "release", "mailbox", "refused")
    },
}
SENDER: dict[str, Callable[[World], Actor]] = {
    "sold": sold,
    "cancelled at once": sender_cancelled_at_once,
    "refused": sender_refused,
    "too late": sender_too_late_to_broadcast,
    "cancelled before signing": sender_cancels_before_signing,
    "payjoin refused": sender_payjoin_refused,
    "reclaimed": sender_reclaims,
}


def all_actors() -> dict[str, Actor]:
    """Every story, told once."""
    if not _TOLD:
        for name, story in {**RECEIVER, **{f"sender {name}": story for name, story in SENDER.items()}}.items():
            _TOLD[name] = story(World())
    return _TOLD


_TOLD: dict[str, Actor] = {}


def later(actor: Actor, seconds: float) -> None:
    actor.world.now += seconds


__all__ = ["RECEIVER", "SENDER", "Step", "all_actors", "later", "replace", "sending", "steps"]
