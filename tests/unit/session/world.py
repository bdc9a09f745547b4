"""A payer, a receiver, a chain, a node and a directory in memory, for the tests of pjv2.session: every answer can be staged.

An `Actor` holds one session the way a driver does: it settles, performs needs and appends. Every append is checked three ways: the
record survives the codec, and the replayed log equals the live state.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from importlib import import_module
from typing import Any

from pjv2 import session as model
from pjv2.psbt.original import OriginalFacts, Prevout, RuleFacts, Suitability
from pjv2.psbt.plan import ChannelOrder, ChannelPlan, ReceiverScripts
from pjv2.psbt.scripts import p2wsh_script
from pjv2.psbt.tx import Psbt, Tx, TxIn, TxOut
from pjv2.psbt.verify import original_body
from pjv2.session import events as ev
from pjv2.session.facts import (
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
from pjv2.units import FeeRate, Network, Outpoint
from pjv2.wire.message import open_message_a, open_message_b, seal_message_a, seal_message_b
from pjv2.wire.ohttp import KeyConfig
from pjv2.wire.secp import PublicKey, SecretKey
from pjv2.wire.uri import parse_uri
from tests.unit.psbt import payjoin_kit as kit

want = import_module("pjv2.session.needs")  # the room's function `needs` hides the module of that name

NOW = 1_800_000_000.0
DAY = 86_400
TIP = 1_000
PEERS = ("02" + "11" * 32, "03" + "22" * 32)
GENESIS = Network.REGTEST.genesis_hash


def key_config() -> KeyConfig:
    public = SecretKey(b"\x07" * 32).public
    body = b"\x01\x00\x16" + public.uncompressed + (4).to_bytes(2, "big") + b"\x00\x01\x00\x03"
    return KeyConfig.parse(body)


def order(peer: int = 0, capacity: int | None = 80_000, **more: Any) -> ChannelOrder:
    return ChannelOrder(peer=PEERS[peer], host=f"10.0.0.{peer}:9735", capacity=capacity, **more)


PLAN = ChannelPlan((order(),), deposit=True)
TWO = ChannelPlan((order(0, 40_000), order(1, 40_000)), deposit=True)


@dataclass
class Chain:
    """Blocks and mempool as one dictionary: transaction to height, None for the mempool."""

    tip: int = TIP
    txs: dict[str, tuple[Tx, int | None]] = field(default_factory=dict)
    rate: int = 500
    refuses: set[str] = field(default_factory=set)
    suitability: Suitability = field(default_factory=lambda: Suitability("accepted"))
    broadcasts: list[str] = field(default_factory=list)

    def put(self, tx: Tx, *, depth: int = 0) -> Tx:
        """Put `tx` in sight, `depth` blocks deep (0: mempool)."""
        self.txs[tx.txid] = (tx, None if depth == 0 else self.tip - depth + 1)
        return tx

    def drop(self, txid: str) -> None:
        del self.txs[txid]

    def mine(self, blocks: int = 1) -> None:
        """Confirm the mempool in the next block, then `blocks - 1` more."""
        self.tip += 1
        self.txs = {txid: (tx, self.tip if height is None else height) for txid, (tx, height) in self.txs.items()}
        self.tip += blocks - 1

    def view(self, watch: want.Watch) -> ChainView:
        def matters(tx: Tx) -> bool:
            spends = {txin.outpoint for txin in tx.inputs}
            pays = {txout.script for txout in tx.outputs}
            return tx.txid in watch.txids or bool(spends & watch.outpoints) or bool(pays & watch.scripts)

        found = tuple(ChainTx(txid, tx.raw, height) for txid, (tx, height) in self.txs.items() if matters(tx))
        return ChainView(Tip(self.tip, "00" * 32, NOW), found, FeeRate(self.rate), FeeRate(250))

    def spender(self, outpoint: Outpoint) -> str | None:
        for txid, (tx, _) in self.txs.items():
            if any(txin.outpoint == outpoint for txin in tx.inputs):
                return txid
        return None


@dataclass
class Node:
    """A Lightning node: reservations in memory, pending channels on disk."""

    memo: str = ""
    offers: dict[bytes, ReservedChannel] = field(default_factory=dict)
    peers: dict[bytes, str] = field(default_factory=dict)
    listed: list[NodeChannel] = field(default_factory=list)
    fail_reserve: set[str] = field(default_factory=set)
    fail_secure: set[str] = field(default_factory=set)
    pending_all_the_same: bool = False
    calls: list[str] = field(default_factory=list)

    def reserve(self, id: bytes, wanted: ChannelOrder) -> ReservedChannel | None:
        self.calls.append("reserve")
        if wanted.peer in self.fail_reserve or wanted.capacity is None:
            return None
        self.offers[id] = ReservedChannel(id, p2wsh_script(id), wanted.capacity)
        self.peers[id] = wanted.peer
        return self.offers[id]

    def secure(self, id: bytes, outpoint: Outpoint, capacity: int) -> SecuredChannel | None:
        self.calls.append("secure")
        failed = self.peers.get(id, "") in self.fail_secure
        if not failed or self.pending_all_the_same:
            self.pend(outpoint, capacity, self.peers.get(id, PEERS[0]))
        return None if failed else SecuredChannel(id, outpoint, b"backup" + id[:4])

    def pend(self, outpoint: Outpoint, capacity: int = 80_000, peer: str = PEERS[0]) -> None:
        self.listed.append(NodeChannel(peer, outpoint, capacity, self.memo, "pending", b"backup"))

    def release(self, need: want.ReleaseChannels) -> tuple[tuple[NodeChannel, ...], tuple[Outpoint, ...]]:
        self.calls += ["cancel", "disconnect", "list"]
        for id in need.ids:
            self.offers.pop(id, None)
        gone = tuple(c.outpoint for c in self.listed if c.outpoint in need.drafted and c.state == "pending")
        if gone:
            self.calls.append("abandon")
        self.listed = [c for c in self.listed if c.outpoint not in gone]
        return tuple(self.listed), tuple(o for o in gone if o is not None)


class Actor:
    """One session in one worker's hands."""

    def __init__(self, world: World, first: ev.Event) -> None:
        self.world = world
        self.rng = world.rng
        self.records: list[tuple[int, str, str]] = []
        self.events: list[ev.Event] = []
        self.memory = want.Memory()
        self.done: list[want.Need] = []
        self.state: model.State
        self._append(None, first)

    # -- the log

    def _append(self, before: model.State | None, event: ev.Event) -> None:
        after = model.evolve(before, event)
        data = model.encode(event)
        name = model.event_name(event)
        assert model.decode(name, data) == event
        self.records.append((len(self.records), name, data))
        self.events.append(event)
        self.memory = self.memory.appended(len(self.records) - 1, 1)
        self.state = after
        assert after.seq == len(self.records)
        model.public_event(after, event)
        model.effects(before, event)

    def append(self, *events: ev.Event) -> None:
        for event in events:
            self._append(self.state, event)

    def decide(self, input: want.Input) -> list[ev.Event]:
        return model.decide(self.state, input, self.world.now, self.rng, self.memory)

    def feed(self, input: want.Input) -> list[ev.Event]:
        """Decide, append, and draw the consequences."""
        events = self.decide(input)
        self.append(*events)
        return events + self.settle()

    def settle(self) -> list[ev.Event]:
        drawn: list[ev.Event] = []
        for _ in range(30):
            events = self.decide(want.Tick())
            if not events:
                return drawn
            self.append(*events)
            drawn += events
        raise AssertionError("it never settles")

    def replayed(self) -> model.State:
        return model.replay(self.records)

    def restart(self) -> None:
        """The process is gone: the log stays, the memory does not."""
        assert self.replayed() == self.state
        self.memory = want.Memory()
        self.state = self.replayed()

    def restore(self, kind: type[ev.Event]) -> None:
        """The store comes back from an older copy: the log ends right before the last event of this kind."""
        self.restore_to(max(i for i, event in enumerate(self.events) if isinstance(event, kind)))

    def restore_to(self, index: int) -> None:
        """The same, by the number of records that are left."""
        del self.events[index:]
        del self.records[index:]
        self.memory = want.Memory()
        self.state = self.replayed()

    # -- needs

    @property
    def needs(self) -> want.Needs:
        return model.needs(self.state, self.world.now, self.memory)

    @property
    def due(self) -> tuple[want.Need, ...]:
        return self.needs.due

    def need(self, kind: type[want.Need]) -> Any:
        found = [need for need in self.due if isinstance(need, kind)]
        return found[0] if found else None

    def perform(self, need: want.Need, answer: want.Answer | None = None) -> list[ev.Event]:
        self.done.append(need)
        answer = self.world.answer(self, need) if answer is None else answer
        self.memory = self.memory.learned(need, answer, self.state.seq, self.world.now)
        return self.feed(answer)

    def do(self, kind: type[want.Need], answer: want.Answer | None = None) -> list[ev.Event]:
        need = self.need(kind)
        assert need is not None, (
            f"{kind.__name__} is not due in {self.state.stage}: {[type(n).__name__ for n in self.due]}"
        )
        return self.perform(need, answer)

    def look(self) -> list[ev.Event]:
        return self.do(want.Watch)

    def run(
        self, until: str | Callable[[model.State], bool], *, skip: Sequence[type[want.Need]] = (), steps: int = 80
    ) -> None:
        """Perform whatever is due, in order, until the stage is reached."""
        reached = (lambda state: state.stage == until) if isinstance(until, str) else until
        self.settle()
        for _ in range(steps):
            if reached(self.state):
                return
            due = [need for need in self.due if not isinstance(need, tuple(skip))]
            for need in due:
                if need in self.due and not reached(self.state):
                    self.perform(need)
        raise AssertionError(f"{until} was not reached: {self.state.stage}, due {[type(n).__name__ for n in self.due]}")

    def names(self) -> list[str]:
        return [type(event).__name__ for event in self.events]

    def has(self, kind: type[ev.Event]) -> bool:
        return any(isinstance(event, kind) for event in self.events)

    def last(self, kind: type[ev.Event]) -> Any:
        return [event for event in self.events if isinstance(event, kind)][-1]


class World:
    """Everything outside the session."""

    def __init__(
        self, *, seed: int = 1, pays: int = 100_000, our_value: int = 250_000, sender_kind: str = "p2wpkh"
    ) -> None:
        self.rng = kit.Dice(seed)
        self.now = NOW
        self.chain = Chain()
        self.node = Node()
        self.pays = pays
        kinds = {"p2wpkh": kit.ScriptKind.P2WPKH, "p2sh": kit.ScriptKind.P2SH, "p2pkh": kit.ScriptKind.P2PKH}
        self.payer = kit.purse(kinds[sender_kind], 500_000, 11)
        self.spare = kit.purse(kit.ScriptKind.P2WPKH, 400_000, 12)
        self.ours = [kit.purse(kit.ScriptKind.P2WPKH, our_value, 21)]
        self.sent = kit.sent([self.payer], pays)
        self.original = self.sent.tx
        self.reply_key = SecretKey(b"\x33" * 32)
        self.mailbox: bytes | None = None
        self.reply: bytes | None = None
        self.directory_gone = False
        self.status = 200
        self.locks: dict[Outpoint, bytes] = {}
        self.not_lockable: set[Outpoint] = set()
        self.can_sign = True
        self.unlocked: list[tuple[Outpoint, ...]] = []
        self.unreachable: tuple[str, ...] = ()
        self.posts = 0

    @property
    def locked(self) -> set[Outpoint]:
        return set(self.locks)

    # -- sessions

    def receiver(self, plan: ChannelPlan | None = None, policy: ev.Policy | None = None, **more: Any) -> Actor:
        created = model.create_receiver(
            self.now,
            self.rng,
            network=Network.REGTEST,
            genesis=GENESIS,
            wallet="wallet-1",
            node="02" + "99" * 32 if plan is not None else None,
            address=kit_address(kit.PAYEE),
            script=kit.PAYEE,
            address_index=7,
            amount=more.pop("amount", self.pays),
            directory="https://directory.example",
            keys=key_config(),
            expires=int(self.now) + more.pop("lifetime", DAY),
            height=TIP,
            plan=plan,
            policy=policy,
            label="coffee",
            note="table 4",
            order="A-1",
            **more,
        )
        actor = Actor(self, created)
        self.node.memo = f"pj:{created.session}"
        return actor

    def post_original(self, actor: Actor, *, v1: bool = False, body: bytes | None = None) -> None:
        body = original_body(self.sent) if body is None else body
        key = SecretKey(actor.state.created.receiver_key).public
        self.mailbox = body if v1 else seal_message_a(key, self.reply_key.public, body, self.rng)

    def receiving(self, plan: ChannelPlan | None = None, policy: ev.Policy | None = None, **more: Any) -> Actor:
        """A receiver whose payer has posted."""
        v1 = more.pop("v1", False)
        actor = self.receiver(plan, policy, **more)
        self.post_original(actor, v1=v1)
        return actor

    def sender(self, policy: ev.Policy | None = None, lifetime: int = DAY) -> Actor:
        self.receiver_key = SecretKey(b"\x44" * 32)
        uri = parse_uri(self.uri_for(self.receiver_key, int(self.now) + lifetime))
        created = model.create_sender(
            self.now,
            self.rng,
            network=Network.REGTEST,
            genesis=GENESIS,
            wallet="wallet-2",
            uri=uri,
            sent=self.sent,
            amount=self.pays,
            lock_id=b"\x55" * 32,
            height=TIP,
            policy=policy,
            label="rent",
        )
        return Actor(self, created)

    def uri_for(self, key: SecretKey, expires: int) -> str:
        created = model.create_receiver(
            self.now,
            self.rng,
            network=Network.REGTEST,
            genesis=GENESIS,
            wallet="other",
            node=None,
            address=kit_address(kit.PAYEE),
            script=kit.PAYEE,
            address_index=1,
            amount=self.pays,
            directory="https://directory.example",
            keys=key_config(),
            expires=expires,
            height=TIP,
        )
        state = model.evolve(None, replace(created, receiver_key=key.reveal()))
        assert isinstance(state, model.Receiver)
        return model.payment_uri(state)

    # -- answers

    def answer(self, actor: Actor, need: want.Need) -> want.Answer:
        match need:
            case want.Poll():
                return want.Polled(self.mailbox, "https://relay-1.example")
            case want.ReadReply():
                return want.ReplyRead(not self.directory_gone, None if self.directory_gone else self.reply)
            case want.Watch():
                return self.chain.view(need)
            case want.GatherFacts(outpoints=outpoints):
                return OriginalFacts(
                    tip=self.chain.tip,
                    suitability=self.chain.suitability,
                    prevouts={o: self.prevout(o) for o in outpoints},
                    owned=frozenset(o for o in outpoints if o in {purse.outpoint for purse in self.ours}),
                    economy_rate=FeeRate(250),
                    tip_time=self.now,
                )
            case want.FindCoins(inputs=inputs, exclude=exclude):
                coins = tuple(p.coin() for p in self.ours if p.outpoint not in exclude)
                outpoints = (*inputs, *(coin.outpoint for coin in coins))
                scripts = ReceiverScripts(kit.OUR_CHANGE, kit.DEPOSIT, kit.RESERVE)
                return want.CoinsFound(coins, scripts, self.inspection(outpoints), self.unreachable)
            case want.ReserveCoins(coins=coins, inputs=inputs, lock_id=lock_id):
                missing = tuple(o for o in coins if o in self.not_lockable or self.locks.get(o, lock_id) != lock_id)
                if not missing:
                    self.locks.update(dict.fromkeys(coins, lock_id))
                return want.CoinsHeld(missing, self.inspection((*inputs, *coins)))
            case want.InspectChannels(inputs=inputs, coins=coins):
                return self.inspection((*inputs, *coins))
            case want.ReserveChannels(orders=orders):
                answers = [(id, o, self.node.reserve(id, o)) for id, o in orders]
                return want.ChannelsOffered(
                    tuple(a for _, _, a in answers if a is not None),
                    tuple(ChannelFailure(id, o.peer, "the peer said no") for id, o, a in answers if a is None),
                )
            case want.SecureChannels(txid=txid, funding=funding):
                done = [(id, self.node.secure(id, Outpoint(txid, f.vout), f.value)) for id, f in funding]
                return want.ChannelsCommitted(
                    tuple(a for _, a in done if a is not None),
                    tuple(ChannelFailure(id, "", "verify failed") for id, a in done if a is None),
                )
            case want.ReleaseChannels():
                remaining, gone = self.node.release(need)
                return want.ChannelsCleared(remaining, gone, self.chain.tip)
            case want.Sign(purpose=purpose, psbt=psbt, ours=ours):
                return want.SignedPsbt(purpose, self.signed(Psbt.parse(psbt), ours).serialize())
            case want.PostReply(message=message):
                self.posts += 1
                if self.reply is None and self.status == 200:
                    self.reply = message
                return want.Delivered(self.status, "https://relay-2.example")
            case want.PostOriginal(message=message):
                self.mailbox = self.mailbox or message
                return want.Delivered(self.status, "https://relay-2.example")
            case want.Broadcast(purpose=purpose, txid=txid, raw=raw):
                self.chain.broadcasts.append(purpose)
                return want.BroadcastAnswer(purpose, txid, self.broadcast(Tx.parse(raw)))
            case want.ReleaseCoins(coins=coins, lock_id=lock_id):
                self.unlocked.append(coins)
                self.locks = {o: id for o, id in self.locks.items() if not (o in coins and id == lock_id)}
                return want.CoinsFreed(coins)
        raise AssertionError(need)

    def broadcast(self, tx: Tx) -> BroadcastResult:
        if tx.txid in self.chain.txs:
            return BroadcastResult("known")
        if tx.txid in self.chain.refuses or any(self.chain.spender(txin.outpoint) for txin in tx.inputs):
            return BroadcastResult("refused", "txn-mempool-conflict")
        self.chain.put(tx)
        return BroadcastResult("accepted")

    def purse_of(self, outpoint: Outpoint) -> kit.Purse | None:
        return next((p for p in (self.payer, self.spare, *self.ours) if p.outpoint == outpoint), None)

    def prevout(self, outpoint: Outpoint) -> Prevout:
        purse = self.purse_of(outpoint)
        txout = purse.txout if purse is not None else TxOut(1_000, kit.CHANGE)
        return Prevout(txout, 500, spent_by=self.chain.spender(outpoint), time=NOW - 10 * DAY)

    def inspection(self, outpoints: Sequence[Outpoint]) -> Inspection:
        prevouts = {o: self.prevout(o) for o in outpoints}
        spent = frozenset(o for o, p in prevouts.items() if p.spent_by is not None)
        facts = RuleFacts(self.chain.tip, self.now, prevouts, spent, self.can_sign, FeeRate(250))
        return Inspection(tuple(self.node.listed), facts)

    def signed(self, psbt: Psbt, ours: Sequence[Outpoint]) -> Psbt:
        """Sign our own inputs: coins we know, or an output of ours in an unconfirmed parent (any key will do for that)."""
        known = [p for o in ours if (p := self.purse_of(o)) is not None]
        inputs = list(kit.sign(psbt, known).inputs)
        for index, txin in enumerate(psbt.tx.inputs):
            if txin.outpoint in ours and self.purse_of(txin.outpoint) is None:
                inputs[index] = replace(inputs[index], final_script_witness=(b"\x01" * 64,))
        return replace(psbt, inputs=tuple(inputs))

    # -- transactions of the adversary

    def payjoin(self, actor: Actor) -> Tx:
        """T as the payer signs and broadcasts it."""
        return finish(self, actor.state.signed.psbt, (self.payer,))

    def conflict(self, *, pays: int = 0, value: int = 400_000) -> Tx:
        """Another spend of the payer's coin: D, or B when it pays our address."""
        outputs = (TxOut(value, kit.CHANGE), *([TxOut(pays, kit.PAYEE)] if pays else []))
        return kit.sign(kit.unsigned([self.payer], outputs, sequence=0xFFFFFFFC), [self.payer]).extract()

    def payment(self, value: int = 100_000) -> Tx:
        """A: somebody pays our address."""
        return kit.sign(kit.unsigned([self.spare], [TxOut(value, kit.PAYEE)]), [self.spare]).extract()

    def spend_of_ours(self) -> Tx:
        """Our coin, spent by something that is none of this session's business."""
        coin = self.ours[0]
        return kit.sign(kit.unsigned([coin], [TxOut(coin.value - 1_000, kit.CHANGE)]), [coin]).extract()

    def lost_proposal(self, value: int = 80_000, salt: bytes = b"\x0f" * 32) -> Tx:
        """A proposal of ours that a log which lost its end does not know: it spends the payer's coin and ours."""
        ours = self.ours[0]
        outputs = [
            TxOut(value, p2wsh_script(salt)),
            TxOut(self.payer.value + ours.value - value - 2_000, kit.OUR_CHANGE),
        ]
        purses = [self.payer, ours]
        return kit.sign(kit.unsigned(purses, outputs), purses).extract()

    # -- the other side

    def read_proposal(self, actor: Actor) -> bytes:
        """What the payer finds in the reply mailbox."""
        receiver = SecretKey(actor.state.created.receiver_key).public
        assert self.reply is not None
        return open_message_b(self.reply_key, receiver, self.reply)

    def propose_to(self, actor: Actor) -> Psbt:
        """A real receiver answers a sender: the proposal lands in his reply mailbox."""
        assert self.mailbox is not None
        message = open_message_a(self.receiver_key, self.mailbox)
        purses = self.ours
        checked = kit.check_original(
            kit.parse_original(message.body), kit.facts([self.payer]), kit.terms(amount=self.pays)
        )
        from pjv2.psbt.plan import make_intent
        from pjv2.psbt.proposal import draft_proposal, finish_proposal

        intent = make_intent(checked, None, [purses[0].coin()], ReceiverScripts(kit.OUR_CHANGE))
        drafted = draft_proposal(checked, intent, (), self.rng)
        signed = kit.sign(drafted.psbt, purses)
        finished = finish_proposal(drafted, signed.serialize())
        self.reply = seal_message_b(message.reply, self.receiver_key, finished.psbt, self.rng)
        return Psbt.parse(finished.psbt)

    def reply_with(self, payload: bytes) -> None:
        """Put any payload into the sender's reply mailbox, sealed by the receiver's key."""
        assert self.mailbox is not None
        message = open_message_a(self.receiver_key, self.mailbox)
        self.reply = seal_message_b(message.reply, self.receiver_key, payload, self.rng)


def finish(world: World, psbt: bytes, purses: Sequence[kit.Purse]) -> Tx:
    """A proposal with the payer's signatures put in."""
    parsed = Psbt.parse(psbt)
    inputs = tuple(
        replace(given, witness_utxo=world.prevout(txin.outpoint).txout)
        for txin, given in zip(parsed.tx.inputs, parsed.inputs, strict=True)
    )
    return kit.sign(replace(parsed, inputs=inputs), purses).extract()


def kit_address(script: bytes) -> str:
    from pjv2.psbt.tx import script_to_address

    return script_to_address(script, Network.REGTEST)


def unrelated(value: int = 1_000) -> Tx:
    return Tx(2, 0, (TxIn(Outpoint("ab" * 32, 0), b"", 0xFFFFFFFD, (b"\x01",)),), (TxOut(value, kit.CHANGE),))


__all__ = [
    "DAY",
    "NOW",
    "PEERS",
    "PLAN",
    "TIP",
    "TWO",
    "Actor",
    "PublicKey",
    "World",
    "kit",
    "order",
    "unrelated",
    "want",
]
