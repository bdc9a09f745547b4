"""Both roles against everything that can go wrong at once: an adversarial other side, chain, node and directory, crashes at any point,
a second worker, an older copy of the store. The invariants are those of session-model.md section 6, checked after every step; at the
end the world becomes fair, and every session has to close.

`PJV2_FUZZ=long` looks further and elsewhere each time; without it the same runs are repeated.
"""

from __future__ import annotations

import os
from dataclasses import replace
from functools import lru_cache
from typing import Any

from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule

from pjv2 import session as model
from pjv2.psbt.plan import ChannelOrder, ChannelPlan, ReceiverScripts, make_intent
from pjv2.psbt.proposal import draft_proposal, finish_proposal
from pjv2.psbt.tx import Psbt, Tx, TxOut, script_to_address
from pjv2.psbt.verify import original_body
from pjv2.session import events as ev
from pjv2.session.monitor import bare_txid
from pjv2.units import FeeRate, Network, Outpoint
from pjv2.wire.mailbox import short_id
from pjv2.wire.message import open_message_a, open_message_b, seal_message_a, seal_message_b
from pjv2.wire.ohttp import KeyConfig
from pjv2.wire.secp import SecretKey
from pjv2.wire.uri import parse_uri
from tests.fuzz.model import (
    BASE,
    BURIED,
    DAY,
    PAYEES,
    PAYS,
    Broken,
    Worker,
    World,
    double_spend,
    kit,
    original,
    own_coin,
    payer,
    stray_payment,
    want,
)

LONG = os.environ.get("PJV2_FUZZ") == "long"
PROFILE = settings(
    max_examples=3_000 if LONG else 80,
    stateful_step_count=120 if LONG else 50,
    derandomize=not LONG,
    phases=(Phase.generate, Phase.shrink) if LONG else (Phase.generate,),  # a red build says so at once
    database=None,
    deadline=None,
    suppress_health_check=list(HealthCheck),
)
PEERS = ("02" + "11" * 32, "03" + "22" * 32)
GIVE_UP = 8
TTL = 2 * DAY
ROUNDS = 120
REPLY_KEYS = tuple(SecretKey(bytes([0x33 + n]) * 32) for n in range(2))
POLICY = ev.Policy(give_up_blocks=GIVE_UP, watch_after_expiry=3 * DAY, mailbox_ttl=TTL)

pick = st.integers(0, 7)
jump = st.sampled_from([60.0, 60.0, 3_600.0, 7_300.0, DAY - 200.0, DAY + 1.0, TTL + 1.0, 3 * DAY])


@lru_cache(maxsize=1)
def key_config() -> KeyConfig:
    public = SecretKey(b"\x07" * 32).public
    return KeyConfig.parse(b"\x01\x00\x16" + public.uncompressed + b"\x00\x04\x00\x01\x00\x03")


def created(world: World, number: int, plan: ChannelPlan | None) -> ev.ReceiverCreated:
    return model.create_receiver(
        world.now,
        world.rng,
        network=Network.REGTEST,
        genesis=Network.REGTEST.genesis_hash,
        wallet="wallet-1",
        node="02" + "99" * 32 if plan is not None else None,
        address=script_to_address(PAYEES[number], Network.REGTEST),
        script=PAYEES[number],
        address_index=number,
        amount=PAYS,
        directory="https://directory.example",
        keys=key_config(),
        expires=int(world.now) + DAY,
        height=BASE,
        plan=plan,
        policy=POLICY,
    )


def countersigned(world: World, payload: bytes, number: int) -> Tx:
    """A proposal as its payer signs it."""
    psbt = Psbt.parse(payload, padded=True)
    inputs = tuple(
        replace(given, witness_utxo=world.chain.outputs[txin.outpoint])
        for txin, given in zip(psbt.tx.inputs, psbt.inputs, strict=True)
    )
    return kit.sign(replace(psbt, inputs=inputs), [payer(number)]).extract()


class Adversary(RuleBasedStateMachine):
    """The world's powers, shared by both roles' machines."""

    world: World
    workers: list[Worker]
    failed = False
    jumps = 0

    def head_start(self, steps: int) -> None:
        """Get somewhere before the trouble begins: needs one after the other, the decisive ones first."""
        self.workers[0].run(-1)  # a look at the chain, which is always the last of the wants
        for _ in range(steps):
            self.workers[0].settle()
            self.workers[0].run(0)
            self.between()
            self.step()

    def between(self) -> None:
        """What the other side does meanwhile."""

    def step(self) -> None:
        try:
            self.check()
        except Broken:
            self.failed = True
            raise

    def check(self) -> None:
        raise AssertionError

    def worker(self, who: int) -> Worker:
        return self.workers[who % len(self.workers)]

    # -- workers

    @rule(who=pick, what=pick, times=st.integers(1, 6))
    def work(self, who: int, what: int, times: int) -> None:
        worker = self.worker(who)
        for _ in range(times):
            worker.settle()
            worker.run(what)
            self.step()

    @rule(who=pick, times=st.integers(1, 3))
    def rounds(self, who: int, times: int) -> None:
        for _ in range(times):
            self.worker(who).round()
            self.step()

    @rule(who=pick, what=pick, perform=st.booleans())
    def begin_errand(self, who: int, what: int, perform: bool) -> None:
        worker = self.worker(who)
        errand = worker.start(what)
        if errand is not None and perform:
            worker.perform(errand)
        self.step()

    @rule(who=pick, what=pick, deliver=st.booleans())
    def go_on_with_errand(self, who: int, what: int, deliver: bool) -> None:
        worker = self.worker(who)
        if worker.errands:
            errand = worker.errands[what % len(worker.errands)]
            worker.perform(errand)
            self.step()
            if deliver:
                worker.deliver(errand)
        self.step()

    @rule(who=pick)
    def tick(self, who: int) -> None:
        self.worker(who).tick()
        self.step()

    @rule(who=pick)
    def crash(self, who: int) -> None:
        self.worker(who).crash()

    # -- chain and clock

    @rule(blocks=st.integers(1, BURIED))
    def mine(self, blocks: int) -> None:
        self.blocks_come(blocks)
        self.step()

    @rule(blocks=st.integers(1, GIVE_UP + 1))
    def mine_nothing_of_ours(self, blocks: int) -> None:
        self.blocks_come(blocks, only=())
        self.step()

    def blocks_come(self, blocks: int, **which: Any) -> None:
        """Blocks take their time: nobody sleeps through six of them and believes what he saw before."""
        self.world.now += 600.0 * blocks
        self.world.chain.mine(blocks, **which)

    @rule(what=pick)
    def evict(self, what: int) -> None:
        pool = list(self.world.chain.pool)
        if pool:
            self.world.chain.evict(pool[what % len(pool)])

    @rule(there=st.booleans(), reachable=st.booleans(), can_sign=st.booleans())
    def services(self, there: bool, reachable: bool, can_sign: bool) -> None:
        self.world.chain_there, self.world.reachable, self.world.can_sign = there or reachable, reachable, can_sign

    @rule(rate=st.sampled_from([500, 500, 5_000]))
    def fees(self, rate: int) -> None:
        self.world.chain.rate = FeeRate(rate)

    @precondition(lambda self: self.jumps < 3)
    @rule(seconds=jump)
    def time_passes(self, seconds: float) -> None:
        self.jumps += seconds > 60
        self.world.now += seconds
        self.world.prune(TTL)

    def become_fair(self) -> None:
        self.world.chain_there = self.world.reachable = self.world.can_sign = True
        self.world.chain.refuses.clear()
        self.world.chain.rate = FeeRate(500)


# ---------------------------------------------------------------- the receiver


class Receiving(Adversary):
    """One or two requests that share a wallet, a store and a node; two workers each; every payer is an enemy."""

    @initialize(
        sessions=st.sampled_from([1, 1, 2]),
        plan=st.sampled_from(["plain", "one", "one", "two"]),
        shared=st.booleans(),
        mood=st.sampled_from(["fine", "fine", "fine", "late", "lost"]),
        steps=st.integers(0, 14),
        finale=st.sampled_from(["silence", "payjoin", "payjoin", "conflict"]),
    )
    def begin(self, sessions: int, plan: str, shared: bool, mood: str, steps: int, finale: str) -> None:
        self.world = World([own_coin(0)] if shared else [own_coin(0), own_coin(1)])
        self.world.on_append, self.world.on_delivery = self.appended, self.delivered
        self.sessions: list[str] = []
        self.keys: dict[str, SecretKey] = {}
        self.out: dict[str, list[Tx]] = {}
        self.replies: dict[str, str] = {}
        self.robbed: set[str] = set()
        self.restored = False
        self.workers = []
        self.commanded = False
        for number in range(sessions):
            orders = [
                ChannelOrder(peer, f"10.0.0.{n}:9735", 80_000 if plan == "one" else 40_000)
                for n, peer in enumerate(PEERS[: 2 if plan == "two" else 1])
            ]
            wanted = ChannelPlan(tuple(orders), deposit=True) if plan != "plain" and number == 0 else None
            state = self.world.store.create(created(self.world, number, wanted))
            assert isinstance(state, model.Receiver)
            self.sessions.append(state.session)
            self.keys[state.session] = SecretKey(state.created.receiver_key)
            self.out[state.session] = []
            self.replies[short_id(REPLY_KEYS[number].public)] = state.session
            self.workers += [Worker(self.world, state.session), Worker(self.world, state.session)]
        self.finale = finale
        self.world.node.mood = mood
        if steps:
            self.payer_posts(0)
        self.head_start(steps)

    def receiver(self, session: str) -> model.Receiver:
        state = self.world.store.state(session)
        assert isinstance(state, model.Receiver)
        return state

    def chosen(self, who: int) -> tuple[int, str]:
        number = who % len(self.sessions)
        return number, self.sessions[number]

    # -- what the adversary does

    @rule(who=pick)
    def payer_posts(self, who: int) -> None:
        number, session = self.chosen(who)
        body = seal_message_a(
            self.keys[session].public, REPLY_KEYS[number].public, original_body(original(number)), self.world.rng
        )
        self.world.put(self.receiver(session).mailbox.short_id, body)

    @precondition(lambda self: any(self.out.values()))
    @rule(who=pick, what=pick, force=st.booleans(), blocks=st.sampled_from([0, 0, 1, 3, 6]))
    def payer_signs(self, who: int, what: int, force: bool, blocks: int) -> None:
        _, session = self.chosen(who)
        if self.out[session]:
            self.world.chain.submit(self.out[session][what % len(self.out[session])], force=force)
        self.step()
        self.blocks_come(blocks)
        self.step()

    @rule(who=pick, what=st.sampled_from(["original", "bumped", "conflict", "stray"]), force=st.booleans())
    def payer_does_otherwise(self, who: int, what: str, force: bool) -> None:
        number, session = self.chosen(who)
        tx = self.otherwise(number, what)
        if what == "conflict":
            self.robbed.add(session)
        self.world.chain.submit(tx, force=force)
        self.step()

    def otherwise(self, number: int, what: str) -> Tx:
        match what:
            case "original":
                tx: Tx = original(number).tx
                return tx
            case "bumped":
                return double_spend(number, PAYS)
            case "conflict":
                return double_spend(number, 0)
            case _:
                return stray_payment(number)

    @rule(
        depth=st.integers(1, BURIED - 1),
        who=pick,
        instead=st.sampled_from([None, None, "original", "bumped", "conflict", "payjoin"]),
    )
    def reorganise(self, depth: int, who: int, instead: str | None) -> None:
        number, session = self.chosen(who)
        tx = None
        if instead == "payjoin":
            tx = self.out[session][0] if self.out[session] else None
        elif instead is not None:
            tx = self.otherwise(number, instead)
        if instead == "conflict":
            self.robbed.add(session)
        self.world.chain.reorg(depth, tx)
        self.step()

    @rule(who=pick, refuse=st.booleans())
    def network_refuses_the_original(self, who: int, refuse: bool) -> None:
        number, _ = self.chosen(who)
        (self.world.chain.refuses.add if refuse else self.world.chain.refuses.discard)(original(number).tx.txid)

    @rule(mood=st.sampled_from(["fine", "fine", "refuse", "late", "lost"]))
    def node_mood(self, mood: str) -> None:
        self.world.node.mood = mood

    @rule()
    def node_completes_what_was_in_flight(self) -> None:
        self.world.node.complete()
        self.step()

    @rule()
    def node_restarts(self) -> None:
        self.world.node.restart()

    @precondition(lambda self: not self.commanded)
    @rule(who=pick, wish=st.sampled_from(["cancel", "silent", "broadcast"]))
    def person(self, who: int, wish: str) -> None:
        self.commanded = True
        wishes = {"cancel": want.Cancel(), "silent": want.Cancel(broadcast=False), "broadcast": want.BroadcastNow()}
        self.worker(who).command(wishes[wish])
        self.step()

    @precondition(lambda self: not self.restored and len(self.world.store.versions) > len(self.sessions))
    @rule(back=st.integers(1, 12))
    def store_is_restored(self, back: int) -> None:
        """The store comes back from an older copy; every program starts anew."""
        self.restored = True
        versions = self.world.store.versions
        self.world.store.now = versions[max(0, len(versions) - back)]
        for worker in self.workers:
            worker.crash()
        self.step()

    # -- what must hold

    def story(self, session: str) -> str:
        """The log of a session in words, for a failure."""
        return " · ".join(
            f"{type(entry.event).__name__}{[getattr(entry.event, n) for n in ('what', 'next', 'outcome') if hasattr(entry.event, n)] or ''}"
            for entry in self.world.store.now.logs[session]
        )

    def delivered(self, mailbox: str, message: bytes) -> None:
        session = self.replies.get(mailbox)
        if session is None:
            return
        number = self.sessions.index(session)
        payload = open_message_b(REPLY_KEYS[number], self.keys[session].public, message)
        if payload.startswith(b"{"):
            return  # a refusal
        tx = countersigned(self.world, payload, number)
        self.world.chain.know(tx)
        self.out[session].append(tx)
        if not self.dead(tx):
            self.secured(tx, f"S2: {session} delivered a proposal")

    def appended(self, session: str, event: ev.Event) -> None:
        state = self.receiver(session)
        if isinstance(event, ev.ProposalPosting):
            assert state.draft is not None
            self.secured(state.draft.tx, "S2: the proposal is announced")
        if isinstance(event, ev.Closed):
            self.closing(state, event)

    def secured(self, tx: Tx, when: str) -> None:
        for vout, txout in enumerate(tx.outputs):
            if txout.script in self.world.node.scripts and Outpoint(tx.txid, vout) not in self.world.node.channels:
                raise Broken(f"{when} while output {vout} has no commitment")

    def dead(self, tx: Tx) -> bool:
        spends = {txin.outpoint for txin in tx.inputs}
        buried = self.world.chain.buried()
        return any(t.txid != tx.txid and spends & {i.outpoint for i in t.inputs} for t in buried)

    def is_buried(self, tx: Tx) -> bool:
        return self.world.chain.depth(tx.txid) >= BURIED

    def burial(self, number: int) -> Tx | None:
        outpoint = payer(number).outpoint
        return next((t for t in self.world.chain.buried() if any(i.outpoint == outpoint for i in t.inputs)), None)

    def excused(self, session: str) -> bool:
        """After a restore, once the directory has pruned the only places that could tell of a plain proposal: an empty mailbox counts
        there (3.3), and nothing names the Original's inputs any more."""
        state = self.receiver(session)
        names = (state.mailbox.short_id, state.reply_mailbox.short_id)
        return self.restored and any(n in self.world.written and n not in self.world.mailboxes for n in names)

    def closing(self, state: model.Receiver, event: ev.Closed) -> None:
        number = self.sessions.index(state.session)
        burial = self.burial(number)
        match event.outcome:
            case ev.Outcome.PAID:
                fits = burial is not None and any(bare_txid(burial) == draft.bare for draft in state.drafts)
            case ev.Outcome.PAID_BY_FALLBACK:
                fits = burial is not None and burial.txid == original(number).tx.txid
            case ev.Outcome.CONFLICTED:
                fits = burial is not None and burial.txid == event.txid and not event.amount_received
            case ev.Outcome.PAID_OTHERWISE:
                fits = event.amount_received > 0 and self.world.chain.depth(event.txid or "") >= BURIED
            case _:
                fits = burial is None or state.accepted is None
        if not fits:
            raise Broken(f"S3: {event.outcome} does not fit what is buried: {burial}")

    def check(self) -> None:
        chain, node, store = self.world.chain, self.world.node, self.world.store
        for tx in chain.buried():
            self.secured(tx, "S1: a transaction is buried")
        holders: dict[Outpoint, str] = {}
        for session in self.sessions:
            state = self.receiver(session)
            for tx in self.out[session]:
                if self.dead(tx) or self.is_buried(tx):
                    continue
                self.secured(tx, "S4: a proposal can confirm")
                if self.excused(session):
                    continue
                if state.closed is not None:
                    raise Broken(f"S3: closed as {state.closed.outcome} while a proposal can confirm")
                for outpoint in {txin.outpoint for txin in tx.inputs} & {p.outpoint for p in self.world.purses}:
                    if store.now.coins.get(outpoint) != session and outpoint not in self.world.locks:
                        raise Broken("S4: a coin is free while a proposal that spends it can confirm")
                    if holders.setdefault(outpoint, session) != session:
                        raise Broken("S7: two sessions have a proposal with the same coin out")
            if state.closed is not None:
                if session in store.now.coins.values() or session in store.now.peers.values():
                    raise Broken("S4: a closed session holds a coin or a peer")
                for outpoint, channel in node.channels.items():
                    if channel.memo == state.memo and not chain.depth(outpoint.txid) and not self.excused(session):
                        raise Broken(f"S4: a closed session has a pending channel: {self.story(session)}")
        for session in self.sessions:
            for way_out in self.receiver(session).way_outs:
                tx = Tx.parse(way_out.raw)
                if self.dead(tx) or self.is_buried(tx):
                    continue
                for txin in tx.inputs:
                    if holders.get(txin.outpoint, session) != session:
                        raise Broken("S7: a way out races another session's proposal")
        for name in self.replies:
            # A restored log may propose again: the directory keeps the first, and nobody reads back (M10 is not adopted).
            if len(self.world.offered.get(name, ())) > 1 and not self.restored:
                raise Broken("S5: a mailbox was given two contents")

    # -- the end

    def teardown(self) -> None:
        if self.failed or not hasattr(self, "sessions"):
            return
        self.become_fair()
        self.world.node.mood = "fine"
        self.world.node.complete()
        for worker in self.workers:
            for errand in list(worker.errands):
                worker.perform(errand)  # whoever was paused wakes up at last
                worker.deliver(errand)
                self.check()
        # Progress must not need the payer; but he may be there, and he may still sign, or rob us.
        for number, session in enumerate(self.sessions):
            if self.finale == "payjoin" and self.out[session]:
                self.world.chain.submit(self.out[session][0], force=True)
            elif self.finale == "conflict":
                self.world.chain.submit(double_spend(number, 0), force=True)
                self.robbed.add(session)
            self.check()
        workers = [Worker(self.world, session) for session in self.sessions]
        for number in range(ROUNDS):
            for worker in workers:
                worker.round()
                self.check()
                silent = self.receiver(worker.session).no_broadcast
                if number == ROUNDS // 2 and silent and self.receiver(worker.session).closed is None:
                    worker.command(want.BroadcastNow())  # who said --no-broadcast decides; nobody else is needed
            if all(self.receiver(session).closed is not None for session in self.sessions) and number > 12:
                break
            self.world.now += 3 * 3_600.0
            self.world.prune(TTL)
            self.world.chain.mine(1)
            self.check()
        self.settled()

    def settled(self) -> None:
        chain = self.world.chain
        for number, session in enumerate(self.sessions):
            state = self.receiver(session)
            log = self.world.store.now.logs[session]
            records = [(n, model.event_name(e.event), model.encode(e.event)) for n, e in enumerate(log)]
            assert model.replay(records) == state
            assert state.closed is not None, (
                f"L1: {session} is still {state.stage}: {[type(e.event).__name__ for e in log]}"
            )
            refused_for_good = state.fallback_rejected is not None and state.closed.outcome is ev.Outcome.EXPIRED
            if state.accepted is not None and session not in self.robbed | (
                {session} if refused_for_good or state.no_broadcast else set()
            ):
                burial = self.burial(number)
                assert burial is not None, (
                    f"L2: nothing that spends the Original's inputs is buried, {state.closed.outcome}"
                )
            assert session not in self.world.store.now.coins.values(), "L3: a coin is still in use"
            assert session not in self.world.store.now.peers.values(), "L3: a peer is still in use"
            if self.restored and (state.accepted is None or state.closed.at + DAY >= state.watch_over):
                continue  # nothing names the Original's inputs any more, or nobody sweeps that long after the end
            for outpoint, channel in self.world.node.channels.items():
                assert channel.memo != state.memo or chain.depth(outpoint.txid), f"L3: {outpoint} is pending for ever"
        if not self.restored and not self.world.stale_locks:
            held = {o for o in self.world.locks if chain.spender(o) is None}
            assert not held, "L3: the wallet still locks a coin"
            assert not self.world.node.reservations, "L3: a reservation is left at the node"


# ---------------------------------------------------------------- the sender


@lru_cache(maxsize=1)
def proposal() -> bytes:
    """A real receiver's answer to payer 0's Original."""
    checked = kit.check_original(
        kit.parse_original(original_body(original(0))),
        kit.facts([payer(0)]),
        kit.terms(PAYEES[0], PAYS),
    )
    rng = World([own_coin(0)], seed=7).rng
    intent = make_intent(checked, None, [own_coin(0).coin()], ReceiverScripts(kit.OUR_CHANGE))
    drafted = draft_proposal(checked, intent, (), rng)
    return finish_proposal(drafted, kit.sign(drafted.psbt, [own_coin(0)]).serialize()).psbt


@lru_cache(maxsize=1)
def foreign_spend() -> Tx:
    """The receiver spends the coin of his proposal elsewhere."""
    coin = own_coin(0)
    return kit.sign(kit.unsigned([coin], [TxOut(coin.value - 9_000, kit.OUR_CHANGE)]), [coin]).extract()


class Sending(Adversary):
    """One payment, two workers, and a receiver who answers, lies, stays silent, spends his coin elsewhere, or cashes the Original."""

    @initialize(
        require=st.sampled_from([False, False, True]),
        answer=st.sampled_from(["proposal", "proposal", "proposal", "error", "junk", None]),
        steps=st.integers(0, 8),
    )
    def begin(self, require: bool, answer: str | None, steps: int) -> None:
        self.world = World([payer(0)])
        self.world.on_append = self.appended
        self.key = SecretKey(b"\x44" * 32)
        plain = replace(created(self.world, 0, None), receiver_key=self.key.reveal())
        state = model.evolve(None, plain)
        assert isinstance(state, model.Receiver)
        first = model.create_sender(
            self.world.now,
            self.world.rng,
            network=Network.REGTEST,
            genesis=Network.REGTEST.genesis_hash,
            wallet="wallet-2",
            uri=parse_uri(model.payment_uri(state)),
            sent=original(0),
            amount=PAYS,
            lock_id=b"\x55" * 32,
            height=BASE,
            policy=replace(POLICY, require_payjoin=require),
        )
        self.session = self.world.store.create(first).session
        self.world.lock(first.inputs, first.lock_id)
        self.workers = [Worker(self.world, self.session), Worker(self.world, self.session)]
        self.left = False
        self.commanded = False
        self.answer = answer
        self.head_start(steps)

    def between(self) -> None:
        if self.answer is not None:
            self.receiver_replies(self.answer)

    @property
    def sender(self) -> model.Sender:
        state = self.world.store.state(self.session)
        assert isinstance(state, model.Sender)
        return state

    @rule(what=st.sampled_from(["proposal", "proposal", "error", "junk"]))
    def receiver_replies(self, what: str) -> None:
        message = self.world.mailboxes.get(self.sender.mailbox.short_id)
        if message is None:
            return
        reply = open_message_a(self.key, message).reply
        payloads = {"proposal": proposal(), "error": b'{"errorCode":"unavailable","message":"no"}', "junk": b"\x00junk"}
        self.world.put(
            self.sender.reply_mailbox.short_id, seal_message_b(reply, self.key, payloads[what], self.world.rng)
        )

    @rule(what=st.sampled_from(["original", "foreign"]), force=st.booleans())
    def receiver_acts(self, what: str, force: bool) -> None:
        if self.sender.mailbox.short_id in self.world.written or what == "foreign":
            self.world.chain.submit(original(0).tx if what == "original" else foreign_spend(), force=force)
        self.step()

    @rule(depth=st.integers(1, BURIED - 1), instead=st.sampled_from([None, "original", "foreign"]))
    def reorganise(self, depth: int, instead: str | None) -> None:
        tx = foreign_spend() if instead == "foreign" else None
        if instead == "original" and self.sender.mailbox.short_id in self.world.written:
            tx = original(0).tx
        self.world.chain.reorg(depth, tx)
        self.step()

    @rule(what=st.sampled_from(["original", "payjoin"]), refuse=st.booleans())
    def network_refuses(self, what: str, refuse: bool) -> None:
        txid = original(0).tx.txid if what == "original" else bare_txid(Psbt.parse(proposal()).tx)
        (self.world.chain.refuses.add if refuse else self.world.chain.refuses.discard)(txid)

    @precondition(lambda self: not self.commanded)
    @rule(who=pick, wish=st.sampled_from(["cancel", "silent", "broadcast", "reclaim"]))
    def person(self, who: int, wish: str) -> None:
        self.commanded = True
        wishes = {
            "cancel": want.Cancel(),
            "silent": want.Cancel(broadcast=False),
            "broadcast": want.BroadcastNow(),
            "reclaim": want.Reclaim(kit.CHANGE, FeeRate(5_000)),
        }
        self.worker(who).command(wishes[wish])
        self.step()

    def appended(self, session: str, event: ev.Event) -> None:
        if isinstance(event, ev.Signed | ev.ProposalAccepted) and event.at >= self.sender.deadline:
            raise Broken("something new was accepted or signed after the deadline")

    def burial(self) -> Tx | None:
        outpoint = payer(0).outpoint
        return next((t for t in self.world.chain.buried() if any(i.outpoint == outpoint for i in t.inputs)), None)

    def check(self) -> None:
        state, burial = self.sender, self.burial()
        given_away = state.posting is not None
        leased = payer(0).outpoint in self.world.store.now.coins
        if given_away and burial is None and not leased:
            raise Broken("S4: the coins are free while the Original can confirm")
        if state.closed is not None:
            expected = {ev.Outcome.CANCELLED, ev.Outcome.EXPIRED}
            if given_away:
                if burial is None:
                    raise Broken("S3: closed without a burial after the Original was given away")
                expected = {ev.Outcome.CONFLICTED}
                if state.payjoin is not None and bare_txid(burial) == state.payjoin.bare:
                    expected = {ev.Outcome.PAID}
                elif burial.txid == original(0).tx.txid:
                    expected = {ev.Outcome.PAID_BY_FALLBACK}
                elif burial.txid in {entry.txid for entry in state.reclaims}:
                    expected = {ev.Outcome.CANCELLED}
            if state.closed.outcome not in expected:
                raise Broken(f"S3: closed as {state.closed.outcome}, and it is {expected}")
            if leased:
                raise Broken("S4: a closed payment holds a coin")
        if len(self.world.offered.get(state.mailbox.short_id, ())) > 1:
            raise Broken("S5: the receiver's mailbox was given two contents")
        if self.world.written and not given_away:
            raise Broken("the Original left before that was recorded")

    def teardown(self) -> None:
        if self.failed or not hasattr(self, "session"):
            return
        self.become_fair()
        for worker in self.workers:
            for errand in list(worker.errands):
                worker.perform(errand)
                worker.deliver(errand)
                self.check()
        worker = Worker(self.world, self.session)
        for number in range(ROUNDS):
            worker.round()
            self.check()
            if self.sender.closed is not None:
                break
            if number == ROUNDS // 2:
                worker.command(want.BroadcastNow())  # without broadcast, or with a payjoin required, a person decides
            self.world.now += 3 * 3_600.0
            self.world.chain.mine(1)
            self.check()
        state = self.sender
        log = self.world.store.now.logs[self.session]
        records = [(n, model.event_name(e.event), model.encode(e.event)) for n, e in enumerate(log)]
        assert model.replay(records) == state
        assert state.closed is not None, f"L1: still {state.stage}: {[type(e.event).__name__ for e in log]}"
        assert not self.world.store.now.coins, "L3: a coin is still leased"


Receiving.TestCase.settings = PROFILE
Sending.TestCase.settings = settings(PROFILE, max_examples=3_000 if LONG else 50)


class TestReceiving(Receiving.TestCase):  # type: ignore[name-defined,misc]
    """session-model.md S1 to S7 and L1 to L3 for receivers."""


class TestSending(Sending.TestCase):  # type: ignore[name-defined,misc]
    """The same for senders."""
