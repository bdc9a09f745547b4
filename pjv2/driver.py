"""The one loop: claim, load, ask what the session needs, perform it, decide, append, again.

It has never heard of HTTP, SQL or LND: it knows the ports and one `match` over needs. It decides nothing about money; every
consequence comes out of `pjv2.session`. It refuses a session whose wallet, chain or node is not the one it was made with.

Law: an effect is performed only by the holder of the session's claim, only after the event that announces it was stored, and
only as this worker's own snapshot of the log says. A worker that loses a race drops what it knew, undoes what it reserved at
the node, and loads again.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import TypeVar, assert_never

from pjv2 import session as model
from pjv2.errors import KeyRotated, NotNow, PayjoinError, PeerMistake
from pjv2.ports import (
    Appended,
    Chain,
    Change,
    Channels,
    Clock,
    CoinTakenBy,
    Entropy,
    InputsSeenBy,
    LostRace,
    Mailroom,
    Notify,
    PeerTakenBy,
    Record,
    SessionRow,
    Store,
    Stored,
    Wallet,
)
from pjv2.psbt.original import OriginalFacts, RuleFacts
from pjv2.psbt.plan import ChannelOrder, ReceiverScripts
from pjv2.session import State
from pjv2.session.events import Event
from pjv2.session.facts import ChannelFailure, Inspection, ReservedChannel, SecuredChannel
from pjv2.session.monitor import LEASE
from pjv2.session.needs import (
    Answer,
    Bip78Answer,
    Broadcast,
    BroadcastAnswer,
    ChannelsCleared,
    ChannelsCommitted,
    ChannelsOffered,
    CoinsFound,
    CoinsFreed,
    CoinsHeld,
    CoinTaken,
    Command,
    Delivered,
    FindCoins,
    GatherFacts,
    Input,
    InputsSeen,
    InspectChannels,
    Memory,
    Need,
    PeerTaken,
    Poll,
    Polled,
    PostBip78,
    PostOriginal,
    PostReply,
    ReadReply,
    ReleaseChannels,
    ReleaseCoins,
    ReplyRead,
    ReserveChannels,
    ReserveCoins,
    SecureChannels,
    Sign,
    SignedPsbt,
    Tick,
    Watch,
)
from pjv2.session.send import Sender
from pjv2.session.send import Stage as SenderStage
from pjv2.units import Instant, Outpoint, SessionId
from pjv2.wire.mailbox import MailboxReply, MailboxRequest
from pjv2.wire.message import seal_message_a
from pjv2.wire.ohttp import KeyConfig
from pjv2.wire.secp import PublicKey

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Pace:
    """How often a want that stays due is performed again, in seconds. Nothing here is a rule of money."""

    watch: float = 30.0
    rebroadcast: float = 120.0
    retry: float = 2.0
    retry_max: float = 120.0
    poll_floor: float = 5.0
    """A poll that came back empty sooner than this waits for the rest (a directory that answers 202 at once)."""
    node_timer: float = 60.0
    """How long a peer may take to reserve or to secure a channel."""
    claim: float = 60.0


@dataclass(slots=True)
class Run:
    """A session as one worker holds it: its snapshot of the log, and what it remembers of this run."""

    session: SessionId
    state: State
    memory: Memory = field(default_factory=Memory)
    excluded: set[Outpoint] = field(default_factory=set)
    scripts: ReceiverScripts | None = None
    not_before: dict[object, Instant] = field(default_factory=dict)
    failures: dict[object, int] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Asked:
    """A want under way, the `seq` of the state that asked, and when: evidence older than its question is none."""

    task: asyncio.Task[Answer]
    seq: int
    at: Instant


class Driver:
    """Drives sessions over the ports it is given. One driver serves any number of sessions and is used from one event loop.

    `worker` names this process in claims. Every method raises only `PayjoinError`s.
    """

    def __init__(
        self,
        *,
        store: Store,
        mailroom: Mailroom,
        wallet: Wallet,
        chain: Chain,
        clock: Clock,
        entropy: Entropy,
        notify: Notify,
        channels: Channels | None = None,
        worker: str = "",
        pace: Pace | None = None,
    ) -> None:
        self.store = store
        self.mailroom = mailroom
        self.wallet = wallet
        self.chain = chain
        self.channels = channels
        self.clock = clock
        self.entropy = entropy
        self.notify = notify
        self.worker = worker or entropy.token(8).hex()
        self.pace = pace or Pace()
        self._woken: dict[SessionId, asyncio.Event] = {}
        self._coin_choice = asyncio.Lock()

    # ------------------------------------------------------------ the log

    async def create(self, first: Event, row_facts: Callable[[State], SessionRow]) -> State:
        """Store a new session with its `Created` event. WrongUsage when its order or URI exists already."""
        trail = _trail(None, [first])
        state = trail[-1].after
        answer = await self.store.create(_change(trail, 0, row_facts(state)))
        match answer:
            case Stored():
                self._tell(trail)
                return state
            case CoinTakenBy(session=by, outpoint=outpoint):
                raise NotNow(f"the coin {outpoint} was just taken by session {by}; try again", after=1)
            case _:
                raise NotNow(
                    "the session could not be stored because another one was written at the same time; try again"
                )

    async def load(self, session: SessionId) -> State:
        """The session's state, replayed from its log. WrongUsage when unknown, CannotRead when the log is not understood."""
        records = await self.store.load(session)
        return model.replay([(record.seq, record.name, record.data) for record in records])

    async def command(self, session: SessionId, command: Command) -> State:
        """Apply what a person asks for; the holder of the claim draws the consequences. WrongUsage when it cannot be."""
        for _ in range(20):
            run = Run(session, await self.load(session))
            events = model.decide(run.state, command, self.clock.now(), self.entropy, run.memory)
            if not events:
                return run.state
            if isinstance(await self._append(run, events), Stored):
                self.wake(session)
                return run.state
        raise NotNow(f"session {session} is busy; try again", after=1)

    def wake(self, session: SessionId) -> None:
        """Tell a driver of this process that the session's log has changed."""
        if session in self._woken:
            self._woken[session].set()

    async def _append(self, run: Run, events: Sequence[Event]) -> Appended:
        """Store events on top of the run's snapshot; the snapshot advances only when they are stored."""
        trail = _trail(run.state, events)
        state = trail[-1].after
        row = await self.store.row(run.session)
        facts = model.row_facts(state, self.clock.now(), run.memory)
        row = replace(row, state=facts.state, outcome=facts.outcome, next_due=facts.next_due)
        answer = await self.store.append(_change(trail, run.state.seq, row))
        if isinstance(answer, Stored):
            run.memory = run.memory.appended(run.state.seq, len(events))
            run.state = state
            self._tell(trail)
        return answer

    def _tell(self, trail: Sequence[Step]) -> None:
        for step in trail:
            facts = model.public_event(step.after, step.event)
            self.notify.told(model.event_name(step.event), step.event.at, step.after.session, facts)

    # ------------------------------------------------------------ the loop

    async def drive(
        self,
        session: SessionId,
        until: Callable[[State], bool] = lambda state: False,
        *,
        deadline: Instant | None = None,
        once: bool = False,
    ) -> State:
        """Work on one session until `until` says so, it has nothing left to do, or `deadline` (by the clock) passed.

        `once`: also until everything that is due was asked once without leading any further.

        Raises NotNow when another worker holds the session's claim, or its wallet, chain or node is not the one it belongs to.
        """
        async with self._claimed(session):
            run = Run(session, await self.load(session))
            await self._same_world(run.state)
            await self._keep_lease(run.state)
            woken = self._woken.setdefault(session, asyncio.Event())
            tasks: dict[Need, Asked] = {}
            asked: set[Need] = set()
            seq = run.state.seq
            try:
                while True:
                    await self._settle(run)
                    if until(run.state):
                        return run.state
                    if run.state.seq != seq:
                        asked, seq = set(), run.state.seq
                    now = self.clock.now()
                    if deadline is not None and now >= deadline:
                        return run.state
                    wants = model.needs(run.state, now, run.memory)
                    if not wants.due and wants.wake_at is None:
                        return run.state
                    if once and not tasks and asked.issuperset(wants.due):
                        return run.state
                    await self._drop(run, tasks, _needless(tasks, wants))
                    for need in wants.due:
                        if need not in tasks and self._ready_at(run, need, now) <= now:
                            if once and need in asked:
                                continue
                            asked.add(need)
                            tasks[need] = Asked(asyncio.create_task(self._perform(run, need)), run.state.seq, now)
                    if await self._wait(run, tasks, woken, wants, deadline):
                        await self._reload(run)
                    await self._take(run, tasks)
            finally:
                await self._drop(run, tasks, frozenset(tasks))

    async def _settle(self, run: Run) -> None:
        """Draw every consequence of time and flags that needs no answer from the world."""
        while events := model.decide(run.state, Tick(), self.clock.now(), self.entropy, run.memory):
            await self._store_or_reload(run, events)

    async def _store_or_reload(self, run: Run, events: Sequence[Event]) -> bool:
        """Append; on a refusal by the store hand its answer to the session, on a lost race load again. True when stored."""
        answer = await self._append(run, events)
        match answer:
            case Stored():
                return True
            case LostRace():
                await self._reload(run)
                return False
            case InputsSeenBy(session=by):
                told: Input = InputsSeen(by)
            case CoinTakenBy(session=by, outpoint=outpoint):
                run.excluded.add(outpoint)
                told = CoinTaken(outpoint, by)
            case PeerTakenBy(session=by, peer=peer):
                told = PeerTaken(peer, by)
            case _:
                assert_never(answer)
        consequence = model.decide(run.state, told, self.clock.now(), self.entropy, run.memory)
        if consequence:
            await self._store_or_reload(run, consequence)
        return False

    async def _reload(self, run: Run) -> None:
        records = await self.store.load(run.session)
        if (
            len(records) != run.state.seq
        ):  # the log only grows: of the same length, it is the one that the snapshot was made of
            run.state = model.replay([(record.seq, record.name, record.data) for record in records])

    async def _wait(
        self,
        run: Run,
        tasks: dict[Need, Asked],
        woken: asyncio.Event,
        wants: model.Needs,
        deadline: Instant | None,
    ) -> bool:
        """Until a task ends, somebody wakes us, or time is up; True when the log may have changed behind our back."""
        now = self.clock.now()
        times = [self._ready_at(run, need, now) for need in wants.due if need not in tasks]
        times += [at for at in (wants.wake_at, deadline) if at is not None]
        times.append(now + self.pace.watch)
        waker = asyncio.create_task(woken.wait())
        sleeper = asyncio.create_task(self.clock.sleep(max(0.0, min(times) - now)))
        try:
            await asyncio.wait(
                {waker, sleeper, *(asked.task for asked in tasks.values())}, return_when=asyncio.FIRST_COMPLETED
            )
            return waker.done()
        finally:
            woken.clear()
            for helper in (waker, sleeper):
                helper.cancel()
            await asyncio.gather(waker, sleeper, return_exceptions=True)

    async def _take(self, run: Run, tasks: dict[Need, Asked]) -> None:
        """Hand every finished answer to the session, each judged by the snapshot as it now is."""
        for need in [need for need, asked in tasks.items() if asked.task.done()]:
            asked = tasks.pop(need)
            kind = _kind(need)
            try:
                answer = asked.task.result()
            except NotNow as exc:
                self._back_off(run, need, exc)
                continue
            run.failures.pop(kind, None)
            run.memory = run.memory.learned(need, answer, asked.seq, asked.at)
            if isinstance(answer, BroadcastAnswer):
                for watch in [kind for kind in run.not_before if isinstance(kind, Watch)]:
                    del run.not_before[watch]  # what we just sent is looked for at once
            if isinstance(need, Watch):
                await self._reload(run)  # another process may have appended, a command for instance
            try:
                events = model.decide(run.state, answer, self.clock.now(), self.entropy, run.memory)
            except NotNow as exc:
                self._back_off(run, need, exc)
                continue
            if not events:
                run.not_before[kind] = self.clock.now() + self._repeat_after(need)
                continue
            run.not_before.pop(kind, None)
            if isinstance(need, Watch | Broadcast):
                run.not_before[kind] = self.clock.now() + self._repeat_after(need)
            if not await self._store_or_reload(run, events):
                await self._undo(run, need)

    def _back_off(self, run: Run, need: Need, exc: NotNow) -> None:
        kind = _kind(need)
        count = run.failures[kind] = run.failures.get(kind, 0) + 1
        pause = exc.after if exc.after is not None else self.pace.retry * 2 ** min(count - 1, 8)
        run.not_before[kind] = self.clock.now() + min(pause, self.pace.retry_max)
        if isinstance(need, Watch):
            run.memory = replace(run.memory, view=None)  # a view that cannot be refreshed is no ground for a broadcast
        name = "KeyRotated" if isinstance(exc, KeyRotated) else "NotNow"
        self.notify.told(
            name, self.clock.now(), run.session, {"what": type(need).__name__, "why": str(exc), "tries": count}
        )

    def _ready_at(self, run: Run, need: Need, now: Instant) -> Instant:
        """When a want may be performed again: at once if the clock went back, for no pause is longer than these."""
        at = run.not_before.get(_kind(need), now)
        return at if at - now <= max(self.pace.watch, self.pace.rebroadcast, self.pace.retry_max) else now

    def _repeat_after(self, need: Need) -> float:
        match need:
            case Watch():
                return self.pace.watch
            case Broadcast():
                return self.pace.rebroadcast
            case Poll():
                return 0.0
            case _:
                return self.pace.retry

    async def _undo(self, run: Run, need: Need) -> None:
        """M17: a worker that lost the race gives back what it reserved: at the node, and at the wallet what is not the session's."""
        if isinstance(need, ReserveCoins):
            held = frozenset(run.state.own_coins)
            stray = tuple(coin for coin in need.coins if coin not in held)
            if stray:
                with contextlib.suppress(NotNow):
                    await self.wallet.unlock(stray, need.lock_id)
        if isinstance(need, ReserveChannels) and self.channels is not None:
            for id, order in need.orders:
                with contextlib.suppress(NotNow):
                    await self.channels.cancel(id)
                    await self.channels.disconnect(order.peer)

    async def _drop(self, run: Run, tasks: dict[Need, Asked], needless: frozenset[Need]) -> None:
        trouble: BaseException | None = None
        for need in needless:
            task = tasks.pop(need).task
            task.cancel()
            outcome = (await asyncio.gather(task, return_exceptions=True))[0]
            if isinstance(outcome, BaseException) and not isinstance(outcome, PayjoinError | asyncio.CancelledError):
                trouble = trouble or outcome
            elif isinstance(need, ReserveChannels | ReserveCoins):
                await self._undo(run, need)  # done or not: nobody will hear the answer
        if trouble is not None:
            raise trouble  # only now: the other tasks must not work on behind the caller's back

    @contextlib.asynccontextmanager
    async def _claimed(self, session: SessionId) -> AsyncIterator[None]:
        owner = f"{self.worker}:{self.entropy.token(4).hex()}"
        renewal: asyncio.Task[None] | None = None
        try:
            if not await self.store.claim(session, owner, self.pace.claim):
                raise NotNow(f"another worker drives session {session}; it will go on there", after=self.pace.claim / 2)
            renewal = asyncio.create_task(self._renew(session, owner))
            yield
        finally:
            # Also when the claim itself was interrupted: it may have been taken before we heard of it.
            if renewal is not None:
                renewal.cancel()
                await asyncio.gather(renewal, return_exceptions=True)
            with contextlib.suppress(NotNow):
                await self.store.release(session, owner)

    async def _renew(self, session: SessionId, owner: str) -> None:
        # A lapsed claim is harmless (every append is fenced); renewing only keeps two workers from doing the same reading.
        while True:
            await self.clock.sleep(self.pace.claim / 3)
            with contextlib.suppress(NotNow):
                await self.store.claim(session, owner, self.pace.claim)

    async def _same_world(self, state: State) -> None:
        created = state.created
        genesis = await self.chain.genesis_hash()
        if genesis != created.genesis:
            raise NotNow(
                f"session {state.session} belongs to the chain {created.genesis[:16]}…, the chain source serves {genesis[:16]}…"
            )
        wallet = await self.wallet.fingerprint()
        if wallet != created.wallet:
            raise NotNow(f"session {state.session} belongs to the wallet {created.wallet}, this is {wallet}")
        node = getattr(created, "node", None)
        if node is not None:
            ours = (await self.channels.node()).pubkey if self.channels is not None else "none"
            if ours != node:
                raise NotNow(f"session {state.session} belongs to the Lightning node {node}, this is {ours}")

    async def _keep_lease(self, state: State) -> None:
        """`Created` of a sender announces the lease of its coins; whoever wrote it may have died before the wallet was told."""
        if isinstance(state, Sender) and state.stage is SenderStage.CREATED and state.own_coins:
            await self.wallet.lock(state.own_coins, state.created.lock_id, state.created.at + LEASE)

    # ------------------------------------------------------------ answers

    async def _perform(self, run: Run, need: Need) -> Answer:  # noqa: PLR0911, PLR0912  one match over needs, nothing else
        """Get one answer from the world."""
        match need:
            case Poll():
                return await self._poll(run, need)
            case ReadReply(mailbox=mailbox):
                try:
                    reply, _ = await self._exchange(
                        run, mailbox.directory, mailbox.keys, MailboxRequest("GET", mailbox.short_id)
                    )
                except NotNow:
                    return ReplyRead(readable=False)
                if reply.status == 200:
                    return ReplyRead(readable=True, body=reply.body)
                return ReplyRead(readable=reply.status == 202)
            case PostOriginal(mailbox=mailbox, message=message):
                request = MailboxRequest("POST", mailbox.short_id, message)
                reply, relay = await self._exchange(run, mailbox.directory, mailbox.keys, request)
                return Delivered(reply.status, relay)
            case PostBip78(url=url, body=body):
                answer = await self.mailroom.bip78(url, body, session=run.session)
                return Bip78Answer(answer.status, answer.body)
            case PostReply(mailbox=mailbox, method=method, message=message, avoid_relay=avoid):
                request = MailboxRequest(method, mailbox.short_id, message)
                reply, relay = await self._exchange(run, mailbox.directory, mailbox.keys, request, avoid)
                return Delivered(reply.status, relay)
            case Watch(txids=txids, outpoints=outpoints, scripts=scripts, since=since):
                return await self.chain.view(txids, outpoints, scripts, since)
            case Broadcast(purpose=purpose, txid=txid, raw=raw):
                result = await self.chain.broadcast(raw)
                if result.verdict == "accepted":
                    await self.wallet.saw(raw)
                return BroadcastAnswer(purpose, txid, result)
            case GatherFacts():
                return await self._facts(need)
            case FindCoins():
                return await self._find_coins(run, need)
            case ReserveCoins(coins=coins, lock_id=lock_id, until=until, inputs=inputs, memo=memo):
                missing = await self.wallet.lock(coins, lock_id, until)
                return CoinsHeld(missing, await self._inspect(memo, inputs, coins))
            case ReleaseCoins(coins=coins, lock_id=lock_id):
                await self.wallet.unlock(coins, lock_id)
                return CoinsFreed(coins)
            case Sign(purpose=purpose, psbt=psbt, ours=ours):
                return SignedPsbt(purpose, await self.wallet.sign(psbt, ours))
            case InspectChannels(memo=memo, inputs=inputs, coins=coins):
                return await self._inspect(memo, inputs, coins)
            case ReserveChannels():
                return await self._reserve_channels(need)
            case SecureChannels():
                return await self._secure_channels(need)
            case ReleaseChannels():
                return await self._release_channels(need)
            case _:
                assert_never(need)

    async def _exchange(
        self, run: Run, directory: str, keys: bytes, request: MailboxRequest, avoid: str = ""
    ) -> tuple[MailboxReply, str]:
        try:
            carried = await self.mailroom.exchange(
                directory, KeyConfig.parse(keys), request, session=run.session, avoid=avoid
            )
        except PeerMistake as exc:
            # What the directory or a relay garbled is not the session's fault: the next attempt is a fresh envelope.
            raise NotNow(f"the directory's answer could not be read: {exc}") from exc
        if carried.reply.status >= 500:
            raise NotNow(f"the directory answered {carried.reply.status}")
        return carried.reply, carried.relay

    async def _poll(self, run: Run, need: Poll) -> Polled:
        body = b""
        if need.cover is not None:
            receiver, reply_key = (PublicKey.parse(key) for key in need.cover)
            body = seal_message_a(receiver, reply_key, b"", self.entropy)
        started = self.clock.now()
        request = MailboxRequest("GET", need.mailbox.short_id, body)
        reply, relay = await self._exchange(run, need.mailbox.directory, need.mailbox.keys, request)
        if reply.status == 200:
            return Polled(reply.body, relay)
        if reply.status != 202:
            raise NotNow(f"the directory answered {reply.status} to a poll", after=self.pace.retry_max)
        early = self.pace.poll_floor - (self.clock.now() - started)
        if early > 0:
            await self.clock.sleep(min(early, self.pace.poll_floor))
        return Polled(None, relay)

    async def _facts(self, need: GatherFacts) -> OriginalFacts:
        suitability, prevouts, owned, tip, rate = await asyncio.gather(
            self.chain.test(need.tx),
            self.chain.prevouts(need.outpoints),
            self.wallet.mine(need.outpoints),
            self.chain.tip(),
            self.chain.fee_rate(144),
        )
        return OriginalFacts(
            tip=tip.height,
            suitability=suitability,
            prevouts=prevouts,
            owned=owned,
            economy_rate=rate,
            tip_time=tip.median_time,
        )

    async def _rule_facts(self, outpoints: Sequence[Outpoint]) -> RuleFacts:
        prevouts, tip, rate, can_sign = await asyncio.gather(
            self.chain.prevouts(outpoints), self.chain.tip(), self.chain.fee_rate(144), self.wallet.can_sign()
        )
        return RuleFacts(
            tip=tip.height,
            tip_time=tip.median_time,
            prevouts=prevouts,
            spends_seen=frozenset(at for at, prevout in prevouts.items() if prevout.spent_by is not None),
            can_sign=can_sign,
            economy_rate=rate,
        )

    async def _inspect(self, memo: str, inputs: Sequence[Outpoint], coins: Sequence[Outpoint]) -> Inspection:
        facts = await self._rule_facts([*inputs, *coins])
        if self.channels is None:
            return Inspection((), facts, listed=False)
        return Inspection(await self.channels.channels(memo), facts)

    async def _find_coins(self, run: Run, need: FindCoins) -> CoinsFound:
        async with self._coin_choice:
            in_use = await self.store.coins_in_use()
            candidates = [
                coin
                for coin in await self.wallet.coins()
                if in_use.get(coin.outpoint, run.session) == run.session
                and coin.outpoint not in need.exclude
                and coin.outpoint not in run.excluded
            ]
        if run.scripts is None:
            change = await self.wallet.new_address(change=True)
            deposit = await self.wallet.new_address() if need.orders else None
            reserve = await self.channels.reserve_script() if need.orders and self.channels is not None else None
            run.scripts = ReceiverScripts(change.script, deposit.script if deposit else None, reserve)
        unreachable = await self._unreachable(run, need.orders)
        inspection = await self._inspect(need.memo, need.inputs, [coin.outpoint for coin in candidates])
        return CoinsFound(tuple(candidates), run.scripts, inspection, unreachable)

    async def _unreachable(self, run: Run, orders: Sequence[ChannelOrder]) -> tuple[str, ...]:
        """Peers of the plan that cannot open a channel now: offline, busy for another session, or still holding a dead one."""
        if not orders or self.channels is None:
            return tuple(order.peer for order in orders)
        channels = self.channels
        in_use = await self.store.peers_in_use()
        blocked = await self.store.blocked_peers()
        height = (await self.chain.tip()).height

        async def unreachable(order: ChannelOrder) -> bool:
            if in_use.get(order.peer, run.session) != run.session or blocked.get(order.peer, 0) > height:
                return True
            return isinstance(await self._timed(channels.connect(order.peer, order.host)), str)

        answers = await asyncio.gather(*(unreachable(order) for order in orders))
        return tuple(order.peer for order, away in zip(orders, answers, strict=True) if away)

    async def _timed(self, work: Awaitable[T]) -> T | str:
        """The answer, or in words why there is none within the node timer."""
        try:
            async with asyncio.timeout(self.pace.node_timer):
                return await work
        except TimeoutError:
            return f"no answer within {self.pace.node_timer:g} s"
        except (
            PayjoinError
        ) as exc:  # whoever's fault: this channel failed, the payment goes on without it (money rule 7)
            return str(exc)

    def _node(self) -> Channels:
        if self.channels is None:
            raise NotNow("this session opens channels, and no Lightning node is configured")
        return self.channels

    async def _reserve_channels(self, need: ReserveChannels) -> ChannelsOffered:
        node = self._node()

        async def reserve(id: bytes, order: ChannelOrder) -> ReservedChannel:
            # Connected before, perhaps: an earlier attempt ended by cutting every peer off, the ones that did nothing wrong too.
            await node.connect(order.peer, order.host)
            return await node.reserve(id, order, need.memo)

        answers = await asyncio.gather(*(self._timed(reserve(id, order)) for id, order in need.orders))
        reserved: list[ReservedChannel] = []
        failed: list[ChannelFailure] = []
        for (id, order), answer in zip(need.orders, answers, strict=True):
            if isinstance(answer, str):
                failed.append(ChannelFailure(id, order.peer, answer))
            else:
                reserved.append(answer)
        return ChannelsOffered(tuple(reserved), tuple(failed))

    async def _secure_channels(self, need: SecureChannels) -> ChannelsCommitted:
        node = self._node()
        answers = await asyncio.gather(
            *(self._timed(node.secure(id, need.psbt, need.txid, funding)) for id, funding in need.funding)
        )
        secured: list[SecuredChannel] = []
        failed: list[ChannelFailure] = []
        for (id, _), answer in zip(need.funding, answers, strict=True):
            if isinstance(answer, str):
                failed.append(ChannelFailure(id, "", answer))
            else:
                secured.append(answer)
        return ChannelsCommitted(tuple(secured), tuple(failed))

    async def _release_channels(self, need: ReleaseChannels) -> ChannelsCleared:
        """session-model.md 3.2, steps 3 and 4: cancel, cut off, list, abandon what this log drafted, in that order."""
        node = self._node()
        for id in need.ids:
            await node.cancel(id)
        await asyncio.gather(*(node.disconnect(peer) for peer in need.peers))
        listed = await node.channels(need.memo)
        abandoned: list[Outpoint] = []
        for channel in listed:
            if channel.state == "pending" and channel.outpoint is not None and channel.outpoint in need.drafted:
                await node.abandon(channel.outpoint)
                abandoned.append(channel.outpoint)
        remaining = tuple(
            channel
            for channel in await node.channels(need.memo)
            if channel.state == "pending" and channel.outpoint not in need.drafted
        )
        return ChannelsCleared(remaining, tuple(abandoned), (await self.chain.tip()).height)


def _needless(tasks: Iterable[Need], wants: model.Needs) -> frozenset[Need]:
    """Wants under way that nobody has any more. What is on its way out to others is not called back half-way: its answer is
    heard, whatever became of the session meanwhile."""
    return frozenset(
        need for need in tasks if need not in wants.due and not isinstance(need, Broadcast | PostReply | PostOriginal | PostBip78)
    )


@dataclass(frozen=True, slots=True)
class Step:
    """An event, and the states on both sides of it."""

    before: State | None
    event: Event
    after: State


def _trail(before: State | None, events: Sequence[Event]) -> list[Step]:
    """The states that events lead through. Raises IllegalEvent; nothing was stored then."""
    trail: list[Step] = []
    for event in events:
        after = model.evolve(before, event)
        trail.append(Step(before, event, after))
        before = after
    return trail


def _change(trail: Sequence[Step], seq: int, row: SessionRow) -> Change:
    """What one append writes: the records, the row, and what the events take, free and block."""
    effects = [model.effects(step.before, step.event) for step in trail]
    return Change(
        row=row,
        seq=seq,
        records=tuple(
            Record(seq + index, step.event.at, model.event_name(step.event), model.encode(step.event))
            for index, step in enumerate(trail)
        ),
        see_inputs=tuple(outpoint for each in effects for outpoint in each.see_inputs),
        take_coins=tuple(outpoint for each in effects for outpoint in each.take_coins),
        free_coins=any(each.free_coins for each in effects),
        take_peers=tuple(peer for each in effects for peer in each.take_peers),
        free_peers=any(each.free_peers for each in effects),
        block_peers=tuple(entry for each in effects for entry in each.block_peers),
    )


def _kind(need: Need) -> object:
    """What back-off is kept by: a retry of the same kind of want, whatever its details have become."""
    if isinstance(need, Broadcast):
        return (Broadcast, need.txid)
    if isinstance(need, Watch):
        return need
    if isinstance(need, Sign):
        return (Sign, need.purpose)
    return type(need)
