"""A small world in memory for the fuzz tests: chain, node, directory, wallet and store, each of which may turn against the session.

Transactions and PSBTs are real (events hold real bytes); signatures are real where pjv2 looks at them. Nothing sleeps and nothing
is random here: whoever drives the world decides every move. `Worker` does what `pjv2.driver` does, one step at a time, so that a
worker can be paused between any two of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from importlib import import_module
from typing import Any

from pjv2 import session as model
from pjv2.errors import NotNow, PayjoinError
from pjv2.psbt.original import OriginalFacts, Prevout, RuleFacts, Suitability
from pjv2.psbt.plan import ReceiverScripts
from pjv2.psbt.scripts import p2wsh_script
from pjv2.psbt.tx import Psbt, ScriptKind, Tx, TxOut
from pjv2.session import events as ev
from pjv2.session.facts import (
    BURIED,
    BroadcastResult,
    ChainTx,
    ChainView,
    ChannelFailure,
    Inspection,
    NodeChannel,
    ReservedChannel,
    SecuredChannel,
    Tip,
)
from pjv2.testing import SeededEntropy
from pjv2.units import FeeRate, Outpoint, Txid
from tests.unit.psbt import payjoin_kit as kit

want = import_module("pjv2.session.needs")  # the room's function `needs` hides the module of that name

NOW = 1_800_000_000.0
DAY = 86_400
BASE = 1_000
"""The height of the chain before anything happens."""

PAYEES = tuple(kit.Key(9_100 + n, ScriptKind.P2WPKH).script for n in range(2))
PAYS = 100_000


@cache
def payer(number: int) -> kit.Purse:
    return kit.purse(ScriptKind.P2WPKH, 500_000, 11 + number)


@cache
def own_coin(number: int) -> kit.Purse:
    return kit.purse(ScriptKind.P2WPKH, 250_000, 21 + number)


STRANGER = kit.purse(ScriptKind.P2WPKH, 400_000, 31)


@cache
def original(number: int) -> Any:
    """The prepared Original of payer `number`."""
    return kit.sent([payer(number)], PAYS, payee=PAYEES[number])


@cache
def double_spend(number: int, pays: int) -> Tx:
    """Another spend of the payer's coin: D, or B when it pays the address."""
    outputs = [TxOut(480_000 - pays, kit.CHANGE)] + ([TxOut(pays, PAYEES[number])] if pays else [])
    return kit.sign(kit.unsigned([payer(number)], outputs, sequence=0xFFFFFFFC), [payer(number)]).extract()


@cache
def stray_payment(number: int) -> Tx:
    """A: a stranger pays the address."""
    return kit.sign(kit.unsigned([STRANGER], [TxOut(700 + number, PAYEES[number])]), [STRANGER]).extract()


PURSES = {p.outpoint: p for p in (payer(0), payer(1), own_coin(0), own_coin(1), STRANGER)}


class Broken(AssertionError):
    """An invariant of session-model.md section 6 does not hold."""


# ---------------------------------------------------------------- chain


class Chain:
    """Blocks above BASE and a mempool. What is six deep stays."""

    def __init__(self) -> None:
        self.blocks: list[list[Tx]] = []
        self.pool: dict[Txid, Tx] = {}
        self.refuses: set[Txid] = set()
        self.outputs: dict[Outpoint, TxOut] = {outpoint: purse.txout for outpoint, purse in PURSES.items()}
        self.rate = FeeRate(500)

    @property
    def tip(self) -> int:
        return BASE + len(self.blocks)

    def know(self, tx: Tx) -> None:
        for vout, txout in enumerate(tx.outputs):
            self.outputs[Outpoint(tx.txid, vout)] = txout

    def confirmed(self) -> Iterable[tuple[int, Tx]]:
        for index, block in enumerate(self.blocks):
            for tx in block:
                yield BASE + 1 + index, tx

    def depth(self, txid: Txid) -> int:
        return next((self.tip - height + 1 for height, tx in self.confirmed() if tx.txid == txid), 0)

    def buried(self) -> list[Tx]:
        return [tx for height, tx in self.confirmed() if self.tip - height + 1 >= BURIED]

    def spender(self, outpoint: Outpoint) -> tuple[Txid, int | None] | None:
        for height, tx in self.confirmed():
            if any(txin.outpoint == outpoint for txin in tx.inputs):
                return tx.txid, height
        for tx in self.pool.values():
            if any(txin.outpoint == outpoint for txin in tx.inputs):
                return tx.txid, None
        return None

    def _made(self, outpoint: Outpoint) -> bool:
        if outpoint in PURSES:
            return True
        return outpoint.txid in self.pool or any(tx.txid == outpoint.txid for _, tx in self.confirmed())

    def fits(self, tx: Tx) -> bool:
        """No confirmed conflict, and every parent is there."""
        for txin in tx.inputs:
            spender = self.spender(txin.outpoint)
            if spender is not None and spender[1] is not None and spender[0] != tx.txid:
                return False
            if not self._made(txin.outpoint):
                return False
        return True

    def fee(self, tx: Tx) -> int:
        return sum(self.outputs[i.outpoint].value for i in tx.inputs) - sum(o.value for o in tx.outputs)

    def submit(self, tx: Tx, *, force: bool = False) -> BroadcastResult:
        """As a node: conflicts are replaced by a higher fee; `force`: whatever the fee is."""
        self.know(tx)
        if tx.txid in self.pool or self.depth(tx.txid):
            return BroadcastResult("known")
        if tx.txid in self.refuses:
            return BroadcastResult("refused", "min relay fee not met")
        if not self.fits(tx):
            return BroadcastResult("refused", "bad-txns-inputs-missingorspent")
        spends = {txin.outpoint for txin in tx.inputs}
        against = [o for o in self.pool.values() if spends & {i.outpoint for i in o.inputs}]
        if against and not force and self.fee(tx) <= sum(self.fee(other) for other in against):
            return BroadcastResult("refused", "insufficient fee")
        for other in against:
            self.evict(other.txid)
        self.pool[tx.txid] = tx
        return BroadcastResult("accepted")

    def evict(self, txid: Txid) -> None:
        self.pool.pop(txid, None)
        for child in [t for t in self.pool.values() if any(i.outpoint.txid == txid for i in t.inputs)]:
            self.evict(child.txid)

    def mine(self, blocks: int = 1, only: Sequence[Txid] | None = None) -> None:
        """Confirm the mempool (or `only` these, and what they need) in the next block, then empty ones."""
        if not blocks:
            return
        chosen = [tx for tx in self.pool.values() if only is None or tx.txid in only]
        block: list[Tx] = []
        for tx in chosen:
            parents = {i.outpoint.txid for i in tx.inputs} & set(self.pool)
            if parents <= {t.txid for t in block}:
                block.append(tx)
        for tx in block:
            del self.pool[tx.txid]
        self.blocks.append(block)
        self.blocks += [[] for _ in range(blocks - 1)]

    def reorg(self, depth: int, instead: Tx | None) -> None:
        """Replace fewer than BURIED blocks by one more; `instead` is confirmed first, the others return to the mempool if they fit."""
        depth = min(depth, len(self.blocks), BURIED - 1)
        if not depth:
            return
        back = [tx for block in self.blocks[-depth:] for tx in block]
        del self.blocks[-depth:]
        self.pool, waiting = {}, back + list(self.pool.values())
        first = [instead] if instead is not None and self.fits(instead) else []
        if instead is not None:
            self.know(instead)
        self.blocks.append(first)
        self.blocks += [[] for _ in range(depth)]
        for tx in waiting:
            if self.fits(tx) and not any(self.spender(txin.outpoint) for txin in tx.inputs):
                self.pool[tx.txid] = tx

    def prevout(self, outpoint: Outpoint) -> Prevout:
        spender = self.spender(outpoint)
        return Prevout(self.outputs[outpoint], 500, spent_by=spender[0] if spender else None, time=NOW - 10 * DAY)

    def view(self, watch: Any) -> ChainView:
        def matters(tx: Tx) -> bool:
            spends = {txin.outpoint for txin in tx.inputs}
            pays = {txout.script for txout in tx.outputs}
            return tx.txid in watch.txids or bool(spends & watch.outpoints) or bool(pays & watch.scripts)

        found = [ChainTx(tx.txid, tx.raw, height) for height, tx in self.confirmed() if matters(tx)]
        found += [ChainTx(tx.txid, tx.raw, None) for tx in self.pool.values() if matters(tx)]
        return ChainView(Tip(self.tip, "00" * 32, NOW), tuple(found), self.rate, FeeRate(250))


# ---------------------------------------------------------------- node


@dataclass
class Pending:
    peer: str
    capacity: int
    memo: str


class Node:
    """Reservations in memory, channels on disk; `secure` in flight completes later unless the peer is cut off (M8)."""

    def __init__(self, chain: Chain) -> None:
        self.chain = chain
        self.mood = "fine"  # fine, refuse, late: the call fails and the channel is pending later, lost: fails and is pending now
        self.reservations: dict[bytes, tuple[str, int, str]] = {}
        self.verifying: dict[bytes, tuple[Outpoint, Pending]] = {}
        self.channels: dict[Outpoint, Pending] = {}
        self.scripts: set[bytes] = set()

    def reserve(self, id: bytes, order: Any, memo: str) -> ReservedChannel | str:
        if self.mood == "refuse" or order.capacity is None:
            return "the peer said no"
        self.reservations[id] = (order.peer, order.capacity, memo)
        script = p2wsh_script(id)
        self.scripts.add(script)
        return ReservedChannel(id, script, order.capacity)

    def secure(self, id: bytes, outpoint: Outpoint) -> SecuredChannel | str:
        if outpoint in self.channels:
            return SecuredChannel(id, outpoint, b"backup")
        if id not in self.reservations:
            return "no reservation for this channel id"
        if self.mood == "refuse":
            return "the peer said no"
        peer, capacity, memo = self.reservations.pop(id)
        pending = Pending(peer, capacity, memo)
        if self.mood == "late":
            self.verifying[id] = (outpoint, pending)
            return "timeout"
        self.channels[outpoint] = pending
        return "the connection died" if self.mood == "lost" else SecuredChannel(id, outpoint, b"backup")

    def complete(self) -> None:
        """What was in flight arrives."""
        for outpoint, pending in self.verifying.values():
            self.channels[outpoint] = pending
        self.verifying.clear()

    def listed(self, memo: str) -> tuple[NodeChannel, ...]:
        return tuple(
            NodeChannel(p.peer, at, p.capacity, p.memo, "open" if self.chain.depth(at.txid) else "pending", b"backup")
            for at, p in self.channels.items()
            if p.memo == memo
        )

    def cut(self, peer: str) -> None:
        self.reservations = {id: r for id, r in self.reservations.items() if r[0] != peer}
        self.verifying = {id: v for id, v in self.verifying.items() if v[1].peer != peer}

    def restart(self) -> None:
        self.reservations.clear()
        self.verifying.clear()

    def release(self, need: Any) -> tuple[tuple[NodeChannel, ...], tuple[Outpoint, ...]]:
        for id in need.ids:
            self.reservations.pop(id, None)
        for peer in need.peers:
            self.cut(peer)
        gone = tuple(c.outpoint for c in self.listed(need.memo) if c.state == "pending" and c.outpoint in need.drafted)
        for outpoint in gone:
            if outpoint is not None:
                del self.channels[outpoint]
        left = tuple(c for c in self.listed(need.memo) if c.state == "pending" and c.outpoint not in need.drafted)
        return left, tuple(o for o in gone if o is not None)


# ---------------------------------------------------------------- store


@dataclass
class Entry:
    event: ev.Event
    state: model.State


@dataclass
class Shelf:
    logs: dict[str, list[Entry]] = field(default_factory=dict)
    coins: dict[Outpoint, str] = field(default_factory=dict)
    peers: dict[str, str] = field(default_factory=dict)
    seen: dict[Outpoint, str] = field(default_factory=dict)

    def copy(self) -> Shelf:
        return Shelf(
            {s: list(log) for s, log in self.logs.items()}, dict(self.coins), dict(self.peers), dict(self.seen)
        )


class Store:
    """Compare-and-swap on (session, seq), with what is written in the same transaction; every version is kept for a restore."""

    def __init__(self) -> None:
        self.now = Shelf()
        self.versions: list[Shelf] = []

    def state(self, session: str) -> model.State:
        return self.now.logs[session][-1].state

    def create(self, first: ev.Event) -> model.State:
        state = model.evolve(None, first)
        self.now.logs[state.session] = [Entry(first, state)]
        for outpoint in model.effects(None, first).take_coins:
            self.now.coins[outpoint] = state.session
        return state

    def append(self, session: str, seq: int, before: model.State, events: Sequence[ev.Event]) -> object:
        """True, "lost", or the input that tells the session why its event was not stored."""
        log = self.now.logs[session]
        if len(log) != seq:
            return "lost"
        shelf, state = self.now.copy(), before
        for event in events:
            effects = model.effects(state, event)
            if effects.free_coins:
                shelf.coins = {o: s for o, s in shelf.coins.items() if s != session}
            if effects.free_peers:
                shelf.peers = {p: s for p, s in shelf.peers.items() if s != session}
            for outpoint in effects.see_inputs:
                if shelf.seen.setdefault(outpoint, session) != session:
                    return want.InputsSeen(shelf.seen[outpoint])
            for outpoint in effects.take_coins:
                if shelf.coins.setdefault(outpoint, session) != session:
                    return want.CoinTaken(outpoint, shelf.coins[outpoint])
            for peer in effects.take_peers:
                if shelf.peers.setdefault(peer, session) != session:
                    return want.PeerTaken(peer, shelf.peers[peer])
            state = model.evolve(state, event)
            shelf.logs[session].append(Entry(event, state))
        self.versions.append(self.now)
        self.now = shelf
        return True


# ---------------------------------------------------------------- the world


class World:
    """Everything outside the sessions, and what they tell it."""

    def __init__(self, coins: Sequence[kit.Purse], *, seed: int = 0) -> None:
        self.rng = SeededEntropy(seed)
        self.now = NOW
        self.chain = Chain()
        self.node = Node(self.chain)
        self.store = Store()
        self.purses = tuple(coins)
        self.locks: dict[Outpoint, bytes] = {}
        self.can_sign = True
        self.mailboxes: dict[str, bytes] = {}
        self.written: dict[str, float] = {}
        self.offered: dict[str, set[bytes]] = {}
        self.reachable = True
        self.chain_there = True
        self.stale_locks = False
        self.on_append: Callable[[str, ev.Event], None] = lambda session, event: None
        self.on_delivery: Callable[[str, bytes], None] = lambda mailbox, message: None

    # -- directory

    def prune(self, ttl: float) -> None:
        for name in [name for name, at in self.written.items() if self.now - at >= ttl]:
            self.mailboxes.pop(name, None)

    def put(self, name: str, message: bytes) -> None:
        self.offered.setdefault(name, set()).add(message)
        if name not in self.written:
            self.mailboxes[name], self.written[name] = message, self.now
            self.on_delivery(name, message)

    # -- answers

    def lock(self, coins: Sequence[Outpoint], lock_id: bytes) -> tuple[Outpoint, ...]:
        missing = tuple(o for o in coins if self.locks.get(o, lock_id) != lock_id or self.chain.spender(o) is not None)
        if not missing:
            self.locks.update(dict.fromkeys(coins, lock_id))
        return missing

    def facts(self, outpoints: Sequence[Outpoint]) -> RuleFacts:
        prevouts = {o: self.chain.prevout(o) for o in outpoints}
        spent = frozenset(o for o, p in prevouts.items() if p.spent_by is not None)
        return RuleFacts(self.chain.tip, self.now, prevouts, spent, self.can_sign, FeeRate(250))

    def inspection(self, memo: str, outpoints: Sequence[Outpoint]) -> Inspection:
        return Inspection(self.node.listed(memo), self.facts(outpoints))

    def _online(self, up: bool) -> None:
        if not up:
            raise NotNow("away")

    def answer(self, session: str, need: Any) -> Any:
        match need:
            case want.Poll(mailbox=mailbox):
                self._online(self.reachable)
                return want.Polled(self.mailboxes.get(mailbox.short_id), "https://relay-1.example")
            case want.ReadReply(mailbox=mailbox):
                if not self.reachable:
                    return want.ReplyRead(readable=False)
                return want.ReplyRead(True, self.mailboxes.get(mailbox.short_id))
            case want.PostReply(mailbox=mailbox, message=message) | want.PostOriginal(mailbox=mailbox, message=message):
                self._online(self.reachable)
                self.put(mailbox.short_id, message)
                return want.Delivered(200, "https://relay-2.example")
            case want.Watch():
                self._online(self.chain_there)
                return self.chain.view(need)
            case want.GatherFacts(tx=raw, outpoints=outpoints):
                self._online(self.chain_there)
                return self._original_facts(Tx.parse(raw), outpoints)
            case want.FindCoins(inputs=inputs, exclude=exclude, memo=memo):
                self._online(self.chain_there)
                in_use = self.store.now.coins
                coins = tuple(
                    p.coin()
                    for p in self.purses
                    if p.outpoint not in exclude
                    and in_use.get(p.outpoint, session) == session
                    and p.outpoint not in self.locks
                    and self.chain.spender(p.outpoint) is None
                )
                scripts = ReceiverScripts(kit.OUR_CHANGE, kit.DEPOSIT, kit.RESERVE)
                outpoints = (*inputs, *(coin.outpoint for coin in coins))
                return want.CoinsFound(coins, scripts, self.inspection(memo, outpoints))
            case want.ReserveCoins(coins=coins, lock_id=lock_id, inputs=inputs, memo=memo):
                self._online(self.chain_there)
                if self.store.now.coins.get(coins[0]) != session:
                    self.stale_locks = True  # a paused worker: the lock lasts until its lease ends
                return want.CoinsHeld(self.lock(coins, lock_id), self.inspection(memo, (*inputs, *coins)))
            case want.InspectChannels(memo=memo, inputs=inputs, coins=coins):
                self._online(self.chain_there)
                return self.inspection(memo, (*inputs, *coins))
            case want.ReserveChannels(memo=memo, orders=orders):
                offers = [(id, order, self.node.reserve(id, order, memo)) for id, order in orders]
                return want.ChannelsOffered(
                    tuple(offer for _, _, offer in offers if not isinstance(offer, str)),
                    tuple(ChannelFailure(id, o.peer, offer) for id, o, offer in offers if isinstance(offer, str)),
                )
            case want.SecureChannels(txid=txid, funding=funding):
                done = [(id, self.node.secure(id, Outpoint(txid, f.vout))) for id, f in funding]
                return want.ChannelsCommitted(
                    tuple(answer for _, answer in done if not isinstance(answer, str)),
                    tuple(ChannelFailure(id, "", answer) for id, answer in done if isinstance(answer, str)),
                )
            case want.ReleaseChannels():
                left, gone = self.node.release(need)
                return want.ChannelsCleared(left, gone, self.chain.tip)
            case want.Sign(purpose=purpose, psbt=psbt, ours=ours):
                self._online(self.can_sign)
                return want.SignedPsbt(purpose, self.signed(Psbt.parse(psbt), ours).serialize())
            case want.Broadcast(purpose=purpose, txid=txid, raw=raw):
                self._online(self.chain_there)
                return want.BroadcastAnswer(purpose, txid, self.chain.submit(Tx.parse(raw)))
            case want.ReleaseCoins(coins=coins, lock_id=lock_id):
                self.locks = {o: id for o, id in self.locks.items() if o not in coins or id != lock_id}
                return want.CoinsFreed(coins)
        raise AssertionError(need)

    def _original_facts(self, tx: Tx, outpoints: Sequence[Outpoint]) -> OriginalFacts:
        spenders = {self.chain.spender(o) for o in outpoints} - {None}
        verdict = "accepted"
        if tx.txid in self.chain.pool or self.chain.depth(tx.txid):
            verdict = "known"
        elif spenders or tx.txid in self.chain.refuses:
            verdict = "refused"
        return OriginalFacts(
            tip=self.chain.tip,
            suitability=Suitability(verdict, "txn-mempool-conflict" if verdict == "refused" else ""),  # type: ignore[arg-type]
            prevouts={o: self.chain.prevout(o) for o in outpoints},
            owned=frozenset(o for o in outpoints if o in {p.outpoint for p in self.purses}),
            economy_rate=FeeRate(250),
            tip_time=self.now,
        )

    def signed(self, psbt: Psbt, ours: Sequence[Outpoint]) -> Psbt:
        """Sign our inputs: a coin that has a key, or an output of ours in an unconfirmed parent (any bytes do for that)."""
        known = [PURSES[o] for o in ours if o in PURSES]
        inputs = list(kit.sign(psbt, known).inputs)
        for index, txin in enumerate(psbt.tx.inputs):
            if txin.outpoint in ours and txin.outpoint not in PURSES:
                inputs[index] = replace(inputs[index], final_script_witness=(b"\x01" * 64,))
        return replace(psbt, inputs=tuple(inputs))


# ---------------------------------------------------------------- workers


@dataclass
class Errand:
    """A need under way: asked of a state with this `seq`; performed once there is an answer."""

    need: Any
    seq: int
    answer: Any = None
    performed: bool = False
    at: float = 0.0


class Worker:
    """One process at one session, step by step as `pjv2.driver.Driver.drive` does it."""

    def __init__(self, world: World, session: str) -> None:
        self.world = world
        self.session = session
        self.crash()

    def crash(self) -> None:
        """The memory is gone, the log stays; what was asked may have happened."""
        self.memory = want.Memory()
        self.errands: list[Errand] = []
        self.load()

    def load(self) -> None:
        self.state = self.world.store.state(self.session)

    def decide(self, input: Any) -> list[ev.Event]:
        try:
            return model.decide(self.state, input, self.world.now, self.world.rng, self.memory)
        except NotNow:
            return []

    def append(self, events: Sequence[ev.Event]) -> bool:
        state = self.state
        for event in events:
            state = model.evolve(state, event)
        answer = self.world.store.append(self.session, self.state.seq, self.state, events)
        if answer is True:
            self.memory = self.memory.appended(self.state.seq, len(events))
            self.state = state
            for event in events:
                self.world.on_append(self.session, event)
            return True
        if answer == "lost":
            self.load()
            return False
        consequence = self.decide(answer)
        if consequence:
            self.append(consequence)
        return False

    def tick(self) -> bool:
        events = self.decide(want.Tick())
        return bool(events) and (self.append(events) or True)

    def settle(self) -> None:
        for _ in range(60):
            if not self.tick():
                return
        raise Broken(f"{self.session} never settles in {self.state.stage}")

    @property
    def due(self) -> tuple[Any, ...]:
        return model.needs(self.state, self.world.now, self.memory).due

    def start(self, pick: int) -> Errand | None:
        due = [need for need in self.due if need not in [errand.need for errand in self.errands]]
        if not due:
            return None
        errand = Errand(due[pick % len(due)], self.state.seq)
        self.errands.append(errand)
        return errand

    def perform(self, errand: Errand) -> None:
        if errand.performed:
            return
        try:
            errand.answer, errand.at = self.world.answer(self.session, errand.need), self.world.now
            errand.performed = True
        except NotNow:
            self.errands.remove(errand)
            if isinstance(errand.need, want.Watch):
                self.memory = replace(self.memory, view=None)

    def deliver(self, errand: Errand) -> None:
        if not errand.performed:
            return
        self.errands.remove(errand)
        self.memory = self.memory.learned(errand.need, errand.answer, errand.seq, errand.at)
        if isinstance(errand.need, want.Watch):
            self.load()
        events = self.decide(errand.answer)
        stored = self.append(events) if events else True
        if not stored and isinstance(errand.need, want.ReserveChannels):
            self.undo(errand)

    def undo(self, errand: Errand) -> None:
        for id, order in errand.need.orders:
            self.world.node.reservations.pop(id, None)
            self.world.node.cut(order.peer)

    def run(self, pick: int) -> None:
        """One need from beginning to end, with nobody in between."""
        errand = self.start(pick)
        if errand is not None:
            self.perform(errand)
            self.deliver(errand)

    def drop_needless(self) -> None:
        """What the driver does with wants that are no longer due."""
        due = self.due
        for errand in [errand for errand in self.errands if errand.need not in due]:
            self.errands.remove(errand)
            if isinstance(errand.need, want.ReserveChannels):
                self.undo(errand)

    def round(self) -> None:
        """Everything that is due, once, in order; and what became due by that, as often as the driver would turn."""
        self.load()
        self.settle()
        self.drop_needless()
        asked: list[Any] = []
        while new := [need for need in self.due if need not in asked]:
            for need in new:
                asked.append(need)
                if need in self.due and need not in [errand.need for errand in self.errands]:
                    errand = Errand(need, self.state.seq)
                    self.errands.append(errand)
                    self.perform(errand)
                    if errand.performed:
                        self.deliver(errand)
                    self.settle()
        for errand in list(self.errands):
            self.perform(errand)
            self.deliver(errand)

    def command(self, wish: Any) -> None:
        self.load()
        try:
            events = model.decide(self.state, wish, self.world.now, self.world.rng, self.memory)
        except PayjoinError:
            return
        if events:
            self.append(events)
