"""The one loop: claim, load, ask what the session needs, perform it, decide, append, again.

It has never heard of HTTP, SQL or LND: `errands` performs the needs over the ports. It decides nothing about money; every consequence
comes out of `pjv2.session`. It refuses a session whose wallet, chain or node is not the one it was made with.

Law: an effect is performed only by the holder of the session's claim, only after the event that announces it was stored, and
only as this worker's own snapshot of the log says. A worker that loses a race drops what it knew, undoes what it reserved at
the node, and loads again.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import assert_never

from pjv2 import session as model
from pjv2.errands import Errands, Run
from pjv2.errands import Pace as Pace
from pjv2.errors import KeyRotated, NotNow, PayjoinError
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
from pjv2.session import State
from pjv2.session.events import Event
from pjv2.session.monitor import LEASE
from pjv2.session.needs import (
    Answer,
    Broadcast,
    BroadcastAnswer,
    CoinTaken,
    Command,
    Input,
    InputsSeen,
    Need,
    PeerTaken,
    Poll,
    PostBip78,
    PostOriginal,
    PostReply,
    ReserveChannels,
    ReserveCoins,
    Sign,
    Tick,
    Watch,
)
from pjv2.session.send import Sender
from pjv2.session.send import Stage as SenderStage
from pjv2.units import Instant, SessionId


@dataclass(frozen=True, slots=True)
class Asked:
    """A want under way, the `seq` of the state that asked, and when: evidence older than its question is none."""

    task: asyncio.Task[Answer]
    seq: int
    at: Instant


class Driver(Errands):
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
        super().__init__(
            store=store,
            mailroom=mailroom,
            wallet=wallet,
            chain=chain,
            clock=clock,
            entropy=entropy,
            channels=channels,
            pace=pace or Pace(),
        )
        self.notify = notify
        self.worker = worker or entropy.token(8).hex()
        self._woken: dict[SessionId, asyncio.Event] = {}
        self._unreleased: dict[SessionId, str] = {}

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
        owner = self._unreleased.pop(session, None) or f"{self.worker}:{self.entropy.token(4).hex()}"
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
            try:
                await self.store.release(session, owner)
            except NotNow:
                self._unreleased[session] = owner  # the database was locked: the claim is still ours, and nobody else's

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


def _needless(tasks: Iterable[Need], wants: model.Needs) -> frozenset[Need]:
    """Wants under way that nobody has any more. What is on its way out to others is not called back half-way: its answer is
    heard, whatever became of the session meanwhile."""
    return frozenset(
        need
        for need in tasks
        if need not in wants.due and not isinstance(need, Broadcast | PostReply | PostOriginal | PostBip78)
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
