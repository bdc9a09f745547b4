"""`Payjoin`: what an app holds. It opens the back ends that the configuration names, or takes those an app brings, and hands out
requests and payments that can be awaited.

Law: there is no logic here; what a command of the shell does, a call here does.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

from pjv2 import session as model
from pjv2 import start
from pjv2.backends.system import SystemClock, SystemEntropy
from pjv2.config import Config
from pjv2.driver import Driver, Pace
from pjv2.errors import NotNow, WrongUsage
from pjv2.opening import open_chain, open_channels, open_cold, open_mailroom, open_store, open_wallet
from pjv2.poller import Pass, Poller
from pjv2.ports import Chain, Channels, Clock, Mailroom, Notify, Store, Wallet
from pjv2.psbt.plan import ChannelOrder, PlanExplanation
from pjv2.session.events import Closed
from pjv2.session.needs import Approve, BroadcastNow, Cancel, Command, Decline, Reclaim
from pjv2.units import FeeRate, Instant, Network, Sats, SessionId


@dataclass(frozen=True, slots=True)
class Channel:
    """A channel that a payment shall become: `peer` is `pubkey@host:port`, `capacity` in sats or "rest"."""

    peer: str
    capacity: Sats | str
    private: bool = False
    push: Sats = 0
    type: str | None = None
    min: Sats = 20_000

    def order(self) -> ChannelOrder:
        """As the plan has it. Raises WrongUsage."""
        pubkey, at, host = self.peer.partition("@")
        if not at or not host:
            raise WrongUsage(f"{self.peer!r} is not a peer of the form pubkey@host:port")
        if isinstance(self.capacity, str) and self.capacity != "rest":
            raise WrongUsage(f"a channel's capacity is a number of satoshis or 'rest', not {self.capacity!r}")
        capacity = None if isinstance(self.capacity, str) else self.capacity
        return ChannelOrder(pubkey, host, capacity, self.private, self.push, self.type, self.min)


@dataclass(frozen=True, slots=True)
class PublicEvent:
    """A public fact: name, instant, session, and values without secrets."""

    event: str
    at: Instant
    session: SessionId | None
    facts: Mapping[str, Any]


class Hub:
    """A `Notify` that passes every fact on to whoever listens."""

    def __init__(self, further: Notify | None = None) -> None:
        self._further = further
        self._listeners: list[Callable[[PublicEvent], None]] = []

    def told(self, event: str, at: Instant, session: SessionId | None, facts: Mapping[str, Any]) -> None:
        if self._further is not None:
            self._further.told(event, at, session, facts)
        for listener in tuple(self._listeners):
            listener(PublicEvent(event, at, session, facts))

    @asynccontextmanager
    async def listening(self, session: SessionId) -> AsyncIterator[asyncio.Queue[PublicEvent]]:
        """Facts of one session from now on."""
        queue: asyncio.Queue[PublicEvent] = asyncio.Queue()

        def listener(fact: PublicEvent) -> None:
            if fact.session == session:
                queue.put_nowait(fact)

        self._listeners.append(listener)
        try:
            yield queue
        finally:
            self._listeners.remove(listener)


class Session:
    """A session of this process: awaited, watched, commanded."""

    def __init__(self, app: Payjoin, session: SessionId) -> None:
        self.session = session
        self._app = app

    async def outcome(self) -> Closed:
        """How it ended; drives it meanwhile, or waits for the worker that does."""
        driver = self._app.driver
        while True:
            try:
                state = await driver.drive(self.session, model.is_closed)
            except NotNow as exc:
                if (state := await driver.load(self.session)).closed is None:
                    await driver.clock.sleep(exc.after if exc.after is not None else driver.pace.retry)
            if state.closed is not None:
                return state.closed

    async def events(self) -> AsyncIterator[PublicEvent]:
        """Its public facts as they happen, to the end; drives it meanwhile."""
        async with self._app.hub.listening(self.session) as queue:
            ending = asyncio.create_task(self.outcome())
            try:
                while not (ending.done() and queue.empty()):
                    following = asyncio.create_task(queue.get())
                    await asyncio.wait({following, ending}, return_when=asyncio.FIRST_COMPLETED)
                    if following.done():
                        yield following.result()
                    else:
                        following.cancel()
                        await asyncio.gather(following, return_exceptions=True)
                await ending
            finally:
                ending.cancel()
                await asyncio.gather(ending, return_exceptions=True)

    async def command(self, command: Command) -> None:
        await self._app.driver.command(self.session, command)

    async def cancel(self, *, broadcast: bool = True) -> None:
        """Stop it; unless told not to, the Original is broadcast where one was accepted. Raises WrongUsage."""
        await self.command(Cancel(broadcast))

    async def approve(self) -> None:
        await self.command(Approve())

    async def refuse(self) -> None:
        await self.command(Decline())

    async def broadcast(self) -> None:
        """Send the fallback now."""
        await self.command(BroadcastNow())


class Request(Session):
    """A payment request: show `uri`."""

    def __init__(self, app: Payjoin, made: start.Request) -> None:
        super().__init__(app, made.session)
        self.uri = made.uri
        self.address = made.address
        self.amount = made.amount
        self.expires = made.expires
        self.plan: PlanExplanation | None = made.plan
        self.cold = made.cold


class Payment(Session):
    """A payment under way."""

    def __init__(self, app: Payjoin, made: start.Payment) -> None:
        super().__init__(app, made.session)
        self.amount = made.amount
        self.fee = made.fee
        self.worst_contribution = made.worst_contribution

    async def reclaim(self, fee_rate: float) -> None:
        """Spend the inputs back to the own wallet at `fee_rate` sat/vB."""
        address = await self._app.driver.wallet.new_address(change=True)
        await self.command(Reclaim(address.script, FeeRate.from_sat_per_vb(fee_rate)))


class Payjoin:
    """A wallet's payjoin desk. `async with Payjoin.open(config) as pj:`; see `start` for what receive and send refuse."""

    def __init__(self, config: Config, driver: Driver, hub: Hub, *, cold: start.ColdSource | None = None) -> None:
        self.config = config
        self.driver = driver
        self.hub = hub
        self.cold = cold
        self.poller = Poller(driver, max_in_flight=config.poller.max_in_flight)

    @classmethod
    @asynccontextmanager
    async def open(
        cls,
        config: Config | Mapping[str, Any] | str | Path | None = None,
        *,
        wallet: Wallet | None = None,
        cold: start.ColdSource | None = None,
        chain: Chain | None = None,
        channels: Channels | None = None,
        store: Store | None = None,
        mailroom: Mailroom | None = None,
        http: httpx.AsyncClient | None = None,
        clock: Clock | None = None,
        notify: Notify | None = None,
        pace: Pace | None = None,
    ) -> AsyncIterator[Payjoin]:
        """Open what `config` (a path, a mapping, a Config; None: the platform's file) names, except what is handed in.

        What is handed in stays the caller's to close. Raises WrongUsage, NotNow, CannotRead.
        """
        told = config if isinstance(config, Config) else _load(config)
        async with AsyncExitStack() as stack:
            if store is None:
                store = await open_store(told)
                stack.push_async_callback(store.close)
            if mailroom is None:
                mailroom = await open_mailroom(told, store, http=http)
                stack.push_async_callback(mailroom.close)
            if chain is None:
                chain = await open_chain(told)
                stack.push_async_callback(chain.close)
            if wallet is None:
                wallet = await open_wallet(told)
                stack.push_async_callback(wallet.close)
            if cold is None and (opened := await open_cold(told, wallet)) is not None:
                cold = opened
                if opened is not wallet:
                    stack.push_async_callback(opened.close)
            if channels is None:
                channels = await open_channels(told, chain)
                if channels is not None:
                    stack.push_async_callback(channels.close)
            hub = Hub(notify)
            driver = Driver(
                store=store,
                mailroom=mailroom,
                wallet=wallet,
                chain=chain,
                channels=channels,
                clock=clock or SystemClock(),
                entropy=SystemEntropy(),
                notify=hub,
                pace=pace or _pace(told.network),
            )
            yield cls(told, driver, hub, cold=cold)

    async def receive(
        self,
        amount: Sats | None = None,
        *,
        channels: Sequence[Channel | ChannelOrder] = (),
        deposit: bool = False,
        top_up: bool = False,
        expire_in: int | None = None,
        label: str | None = None,
        note: str | None = None,
        order: str | None = None,
        cold: bool | None = None,
    ) -> Request:
        """A payment request over `amount` sats, to become these channels, or to arrive at the cold wallet (`cold`; by default where
        there is one and no channels are planned)."""
        policy = self.config.session_policy()
        made = await start.receive(
            self.driver,
            self.config.network,
            amount,
            policy=policy,
            channels=[one if isinstance(one, ChannelOrder) else one.order() for one in channels],
            deposit=deposit or policy.on_peer_failure == "drop",
            top_up=top_up,
            expire_in=self.config.policy.expire_in if expire_in is None else expire_in,
            label=label,
            note=note,
            order=order,
            cold=start.cold_for(self.cold, cold, channels),
        )
        return Request(self, made)

    async def send(
        self, uri: str, *, fee_rate: float | None = None, amount: Sats | None = None, again: bool = False
    ) -> Payment:
        """Pay a URI at `fee_rate` sat/vB (default: the chain source's estimate for six blocks)."""
        rate = await self.driver.chain.fee_rate(6) if fee_rate is None else FeeRate.from_sat_per_vb(fee_rate)
        made = await start.send(
            self.driver,
            self.config.network,
            uri,
            policy=self.config.session_policy(),
            rate=rate,
            amount=amount,
            again=again,
        )
        return Payment(self, made)

    def session(self, session: SessionId) -> Session:
        """A handle on a session of the store."""
        return Session(self, session)

    async def run_once(self, budget: float | None = None) -> Pass:
        """One bounded pass over all open sessions: for a background slot, cron, a timer."""
        return await self.poller.run_once(budget)

    async def run(self) -> None:
        """Drive every session until cancelled."""
        await self.poller.run()


def _pace(network: Network) -> Pace:
    """Blocks on regtest come when somebody wants them: there is no use in looking twice a minute."""
    return Pace(watch=1.0, poll_floor=0.5) if network is Network.REGTEST else Pace()


def _load(config: Mapping[str, Any] | str | Path | None) -> Config:
    if isinstance(config, Mapping):
        return Config.load(None, config)
    return Config.load(None if config is None else Path(config))
