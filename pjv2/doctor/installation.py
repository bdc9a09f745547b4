"""What is examined: a configuration with its ports, opened once and on demand; and what a check answers.

It opens nothing that no check asks for, and closes what it opened.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any, Generic, Literal, TypeVar

from pjv2.backends.system import SystemClock, SystemEntropy
from pjv2.config import Config
from pjv2.driver import Driver
from pjv2.errors import PayjoinError, WrongUsage
from pjv2.opening import open_chain, open_channels, open_mailroom, open_store, open_wallet
from pjv2.ports import Chain, Channels, Clock, Entropy, Mailroom, Store, Wallet

Status = Literal["ok", "warning", "failed"]
T = TypeVar("T")

DEADLINE = 10.0
"""Seconds for one check."""


@dataclass(frozen=True, slots=True)
class Check:
    """One result: what was looked at, whether it is good, why, and what to do. `usage`: the configuration is at fault."""

    name: str
    status: Status
    why: str
    todo: str = ""
    usage: bool = field(default=False, compare=False)


def failure(name: str, exc: PayjoinError, todo: str = "") -> Check:
    """A check that ended in one of our errors."""
    usage = isinstance(exc, WrongUsage)
    step = "Correct the configuration." if usage else "Try again later; if it stays, look at the service that is named."
    return Check(name, "failed", str(exc), todo or step, usage=usage)


class Once(Generic[T]):
    """Something that is made when it is first asked for, for everybody."""

    def __init__(self, make: Callable[[], Awaitable[T]]) -> None:
        self._make = make
        self._making: asyncio.Future[T] | None = None

    async def __call__(self) -> T:
        """It, or what went wrong when it was made. Whoever stops waiting does not stop the making."""
        if self._making is None:
            self._making = asyncio.ensure_future(self._make())
        return await asyncio.shield(self._making)

    async def end(self) -> T | None:
        """What was made, to be closed; what is still being made is stopped."""
        if self._making is None:
            return None
        self._making.cancel()
        (made,) = await asyncio.gather(self._making, return_exceptions=True)
        return None if isinstance(made, BaseException) else made


class Installation:
    """What is examined: a configuration, and the ports, opened on demand. `async with Installation(config) as it:`"""

    def __init__(
        self,
        config: Config,
        *,
        store: Callable[[], Awaitable[Store]] | None = None,
        mailroom: Callable[[], Awaitable[Mailroom]] | None = None,
        wallet: Callable[[], Awaitable[Wallet]] | None = None,
        chain: Callable[[], Awaitable[Chain]] | None = None,
        channels: Callable[[], Awaitable[Channels | None]] | None = None,
        clock: Clock | None = None,
        rng: Entropy | None = None,
        keep: bool = False,
    ) -> None:
        self.config = config
        self.clock = clock or SystemClock()
        self.rng = rng or SystemEntropy()
        self.store = Once(store or (lambda: open_store(config)))
        self.mailroom = Once(mailroom or self._open_mailroom)
        self.chain = Once(chain or (lambda: open_chain(config)))
        self.wallet = Once(wallet or (lambda: open_wallet(config)))
        self.channels = Once(channels or self._open_channels)
        self._keep = keep

    @classmethod
    def of(cls, config: Config, driver: Driver) -> Installation:
        """The ports that a running program holds; they stay open."""

        async def given(port: T) -> T:
            return port

        return cls(
            config,
            store=lambda: given(driver.store),
            mailroom=lambda: given(driver.mailroom),
            wallet=lambda: given(driver.wallet),
            chain=lambda: given(driver.chain),
            channels=lambda: given(driver.channels),
            clock=driver.clock,
            keep=True,
        )

    async def _open_mailroom(self) -> Mailroom:
        try:
            store: Store | None = await self.store()
        except PayjoinError:
            store = None  # its own check tells; keys are then fetched afresh
        return await open_mailroom(self.config, store)

    async def _open_channels(self) -> Channels | None:
        if self.config.lightning.backend == "none":
            return None
        return await open_channels(self.config, await self.chain())

    async def __aenter__(self) -> Installation:
        return self

    async def __aexit__(self, *_: object) -> None:
        ports: tuple[Once[Any], ...] = (self.channels, self.wallet, self.mailroom, self.chain, self.store)
        for port in ports:
            made = await port.end()
            if made is not None and not self._keep:
                await made.close()
