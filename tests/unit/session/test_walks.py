"""Random lives: answers that fit nothing, and an adversary who owns payer, mempool, clock and process, against the invariants.

The invariants are those of session-model.md section 6 that one session can show: S1, S2, S4, S5, and that it always settles.
"""

from __future__ import annotations

import contextlib
import os

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pjv2 import session as model
from pjv2.errors import PayjoinError
from pjv2.session import events as ev
from pjv2.session.facts import BURIED, BroadcastResult
from tests.unit.session.scenarios import all_actors, sending, steps
from tests.unit.session.world import DAY, NOW, PLAN, TWO, Actor, World, finish, kit, want

EXAMPLES = int(os.environ.get("PJV2_WALKS", "25"))
FOREVER = 40 * DAY


def pool():
    """Every state of every story, every answer that was ever given, and some that never were."""
    states = [step.after for actor in all_actors().values() for step in steps(actor)]
    answers: list = []
    for plan in (None, PLAN, TWO):
        world = World()
        usual = world.answer
        world.answer = lambda a, need, usual=usual: answers.append(usual(a, need)) or answers[-1]
        actor = world.receiving(plan)
        actor.run("Monitor")
        world.chain.put(world.payjoin(actor), depth=3)
        actor.look()
        world.chain.put(world.payment(), depth=6)
        actor.look()
    answers += [
        want.Polled(None),
        want.Polled(b""),
        want.Polled(b"\xff"),
        want.ReplyRead(False),
        want.ReplyRead(True, b"x"),
        want.Delivered(200),
        want.Delivered(404),
        want.InputsSeen("x"),
        want.CoinsFreed(()),
        want.CoinTaken(kit.Outpoint("00" * 32, 0), "x"),
        want.PeerTaken("02" * 33, "x"),
        want.Tick(),
        want.SignedPsbt("payjoin", b""),
        want.SignedPsbt("way_out", b"junk"),
        want.SignedPsbt("child", b"\x00"),
        want.BroadcastAnswer("fallback", world.original.txid, BroadcastResult("refused")),
        want.BroadcastAnswer("payjoin", "00" * 32, BroadcastResult("refused")),
        want.ChannelsOffered((), ()),
        want.ChannelsCommitted((), ()),
        want.ChannelsCleared((), (), 5),
        want.CoinsHeld((kit.Outpoint("00" * 32, 0),), world.inspection(())),
        world.inspection(()),
        want.Cancel(),
        want.Cancel(broadcast=False),
        want.Approve(),
        want.Decline(),
        want.BroadcastNow(),
        want.Reclaim(b"\x00\x14" + b"\x01" * 20, kit.FeeRate(500)),
    ]
    watches = [need for actor in all_actors().values() for need in actor.done if isinstance(need, want.Watch)]
    views = [answer for answer in answers if isinstance(answer, want.ChainView)]
    inspections = [answer for answer in answers if isinstance(answer, want.Inspection)]
    return states, answers, watches, views, inspections


STATES, ANSWERS, WATCHES, VIEWS, INSPECTIONS = pool()


@settings(max_examples=EXAMPLES * 10, deadline=None)
@given(data=st.data())
def test_no_answer_to_any_state_yields_an_illegal_event_or_a_foreign_exception(data):
    state = data.draw(st.sampled_from(STATES))
    answer = data.draw(st.sampled_from(ANSWERS))
    now = NOW + data.draw(st.sampled_from([0, DAY - 100, DAY, DAY + 700, 8 * DAY, FOREVER]))
    memory = want.Memory(
        own=data.draw(st.sampled_from([frozenset(), frozenset(range(state.seq))])),
        view=data.draw(st.none() | st.sampled_from(VIEWS)),
        watched=data.draw(st.none() | st.sampled_from(WATCHES)),
        reply=data.draw(
            st.sampled_from([None, want.ReplyRead(False), want.ReplyRead(True), want.ReplyRead(True, b"x")])
        ),
        reply_seq=state.seq,
        inspection=data.draw(st.none() | st.sampled_from(INSPECTIONS)),
        inspection_seq=state.seq,
    )
    try:
        events = model.decide(state, answer, now, kit.Dice(3), memory)
        model.needs(state, now, memory)
    except PayjoinError:
        return
    after = state
    for event in events:
        after = model.evolve(after, event)
    assert after.seq == state.seq + len(events)


# ---------------------------------------------------------------- the adversary


class Life:
    """A session and its adversary; every step is checked."""

    def __init__(self, actor: Actor, world: World) -> None:
        self.actor, self.world = actor, world
        self.signed: list[kit.Tx] = []
        self.messages: set[bytes] = set()
        self.delivered: model.Receiver | None = None
        self.restored = False

    # -- moves

    def inject(self, tx: kit.Tx) -> None:
        """Into the mempool, replacing what conflicts there; a confirmed conflict wins."""
        chain = self.world.chain
        rivals = [t for t, (other, _) in chain.txs.items() if t != tx.txid and conflicts(other, tx)]
        if tx.txid in chain.txs or any(chain.txs[t][1] is not None for t in rivals):
            return
        for txid in rivals:
            chain.drop(txid)
        chain.put(tx)

    def evict(self) -> None:
        chain = self.world.chain
        for txid, (_, height) in list(chain.txs.items()):
            if height is None:
                chain.drop(txid)

    def reorganise(self) -> None:
        """Everything that is not buried goes back to nowhere."""
        chain = self.world.chain
        for txid, (_, height) in list(chain.txs.items()):
            if height is not None and chain.tip - height + 1 < BURIED:
                chain.drop(txid)

    def payers_payjoin(self) -> None:
        """The payer signs what he found in his mailbox, whatever our log says meanwhile."""
        if self.delivered is not None and self.delivered.signed is not None:
            self.inject(finish(self.world, self.delivered.signed.psbt, (self.world.payer,)))

    def perform(self, choice: int) -> None:
        due = self.actor.due
        if due:
            need = due[choice % len(due)]
            with contextlib.suppress(PayjoinError):
                self.actor.perform(need)

    def move(self, name: str, choice: int) -> None:
        world, actor = self.world, self.actor
        match name:
            case "perform":
                self.perform(choice)
            case "work":
                for _ in range(6):
                    self.perform(choice)
                    choice += 1
            case "look":
                if actor.need(want.Watch):
                    actor.look()
            case "mine":
                world.chain.mine(1 + choice % 3)
            case "bury":
                world.chain.mine(6)
            case "epoch":
                world.chain.mine(1_000)
            case "original":
                self.inject(world.original)
            case "conflict":
                self.inject(world.conflict(pays=5_000 * (choice % 2)))
            case "payment":
                self.inject(world.payment())
            case "our coin":
                self.inject(world.spend_of_ours())
            case "payjoin":
                self.payers_payjoin()
            case "evict":
                self.evict()
            case "reorg":
                self.reorganise()
            case "restart":
                actor.restart()
            case "restore" if not self.restored and len(actor.events) > 3:
                self.restored = True
                actor.restore_to(3 + choice % (len(actor.events) - 2))
            case "cancel":
                self.command(want.Cancel(broadcast=bool(choice % 2)))
            case "broadcast":
                self.command(want.BroadcastNow())
            case "reclaim":
                self.command(want.Reclaim(kit.CHANGE, kit.FeeRate(1_000)))
            case "time":
                world.now += (10, DAY / 2, DAY, 7 * DAY, FOREVER)[choice % 5]
            case "directory":
                world.directory_gone = not world.directory_gone
            case "refuse":
                refused = world.chain.refuses
                (refused.discard if world.original.txid in refused else refused.add)(world.original.txid)
            case "peer fails":
                world.node.fail_secure ^= {PLAN.orders[0].peer}
                world.node.pending_all_the_same = bool(choice % 2)
        actor.settle()
        self.check()

    def command(self, wish) -> None:
        with contextlib.suppress(PayjoinError):
            self.actor.feed(wish)

    # -- invariants

    def check(self) -> None:
        actor, world = self.actor, self.world
        state = actor.state
        if isinstance(state, model.Receiver) and state.posting is not None and world.reply == state.posting.message:
            self.delivered = state
        for event in actor.events:
            if isinstance(event, ev.ProposalPosting):
                self.messages.add(event.message)
        assert self.restored or len(self.messages) <= 1, "S5: one reply content per mailbox"
        if not isinstance(state, model.Receiver):
            self.check_sender()
            return
        listed = {channel.outpoint for channel in world.node.listed}
        posted = self.delivered.drafts[-1] if self.delivered is not None else None
        if posted is not None:
            sight = next((t for t, (tx, _) in world.chain.txs.items() if t == posted.txid), None)
            alive = not any(
                height is not None and world.chain.tip - height + 1 >= BURIED and tx.txid != posted.txid
                for tx, height in world.chain.txs.values()
                if {txin.outpoint for txin in tx.inputs} & posted.inputs
            )
            if alive:
                assert set(posted.channels) <= listed, "S1: a channel of a live proposal is at our node"
            if alive and not buried(world, sight):
                assert posted.ours <= world.locked, "S4: no coin of a live proposal is released"
        if state.closed is not None:
            assert self.restored or not world.locked, "S4: no coin is leased after the end"
            pending = {channel.outpoint for channel in world.node.listed}
            assert self.restored or pending <= set(state.closed.channels), "S4: no channel is pending after the end"
            if posted is not None and state.closed.txid != posted.txid:
                assert not alive, "S3: a posted proposal cannot contradict the outcome"

    def check_sender(self) -> None:
        state, world = self.actor.state, self.world
        if state.coins_released and state.posting is not None:
            spends = [
                height
                for tx, height in world.chain.txs.values()
                if {txin.outpoint for txin in tx.inputs} & set(state.created.inputs)
            ]
            assert any(h is not None and world.chain.tip - h + 1 >= BURIED for h in spends), "coins stay until a burial"


def conflicts(one: kit.Tx, two: kit.Tx) -> bool:
    return bool({txin.outpoint for txin in one.inputs} & {txin.outpoint for txin in two.inputs})


def buried(world: World, txid: str | None) -> bool:
    if txid is None:
        return False
    height = world.chain.txs[txid][1]
    return height is not None and world.chain.tip - height + 1 >= BURIED


RECEIVER_MOVES = [
    "perform",
    "perform",
    "work",
    "work",
    "work",
    "look",
    "look",
    "mine",
    "bury",
    "epoch",
    "original",
    "conflict",
    "payment",
    "our coin",
    "payjoin",
    "payjoin",
    "evict",
    "reorg",
    "restart",
    "cancel",
    "broadcast",
    "time",
    "directory",
    "refuse",
    "peer fails",
]
SENDER_MOVES = [
    "perform",
    "work",
    "work",
    "look",
    "mine",
    "bury",
    "original",
    "conflict",
    "our coin",
    "evict",
    "reorg",
    "restart",
]
SENDER_MOVES += ["cancel", "broadcast", "reclaim", "time", "refuse"]
MOVE = st.tuples(st.sampled_from(RECEIVER_MOVES), st.integers(0, 11))
SENDER_MOVE = st.tuples(st.sampled_from(SENDER_MOVES), st.integers(0, 11))


@pytest.mark.parametrize("plan", [None, PLAN, TWO], ids=["plain", "one channel", "two channels"])
@settings(max_examples=EXAMPLES, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(moves=st.lists(MOVE, min_size=4, max_size=40), started=st.sampled_from(["", "Monitor", "PostingProposal"]))
def test_no_adversary_breaks_an_invariant_of_the_receiver(plan, moves, started):
    world = World()
    actor = world.receiving(plan)
    if started:
        actor.run(started)
    life = Life(actor, world)
    for name, choice in moves:
        life.move(name, choice)


RESTORE = st.tuples(st.just("restore"), st.integers(0, 40))


@pytest.mark.parametrize("plan", [None, PLAN], ids=["plain", "one channel"])
@settings(max_examples=EXAMPLES, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    before=st.lists(MOVE, max_size=6),
    restore=RESTORE,
    after=st.lists(MOVE, min_size=4, max_size=40),
    started=st.sampled_from(["ProvisionalProposal", "Monitor", "Monitor", "PostingProposal"]),
)
def test_a_store_that_came_back_from_an_older_copy_loses_no_money(plan, before, restore, after, started):
    world = World()
    actor = world.receiving(plan)
    actor.run(started)
    life = Life(actor, world)
    life.check()
    for name, choice in [*before, restore, *after]:
        life.move(name, choice)


@settings(max_examples=EXAMPLES, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    moves=st.lists(SENDER_MOVE, min_size=4, max_size=40),
    proposal=st.booleans(),
    required=st.booleans(),
)
def test_no_adversary_breaks_an_invariant_of_the_sender(moves, proposal, required):
    world = World()
    actor = sending(world, ev.Policy(require_payjoin=required), proposal=proposal)
    life = Life(actor, world)
    for name, choice in moves:
        life.move(name, choice)


@settings(max_examples=EXAMPLES, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(moves=st.lists(MOVE, min_size=4, max_size=30), plan=st.sampled_from([None, PLAN]))
def test_from_wherever_it_got_to_a_session_ends_without_the_payer(moves, plan):
    """L1 and L3: with a directory that answers and a network that takes our transactions, our moves alone reach `Closed`."""
    world = World()
    actor = world.receiving(plan)
    life = Life(actor, world)
    for name, choice in moves:
        if name != "our coin":  # a foreign spend of our coin has no business in a fair world
            life.move(name, choice)
    world.directory_gone = False
    world.chain.refuses.clear()
    world.node.fail_secure.clear()
    for _ in range(60):
        if actor.state.closed is not None:
            break
        world.now += DAY
        actor.settle()
        for _ in range(4):
            for need in actor.due:
                if need in actor.due and actor.state.closed is None:
                    actor.perform(need)
        world.chain.mine(6 if actor.state.accepted is None or world.now < NOW + 30 * DAY else 300)
    assert actor.state.closed is not None, (actor.state.stage, actor.names(), [type(n).__name__ for n in actor.due])
    life.check()
