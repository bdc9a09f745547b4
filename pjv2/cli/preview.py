"""The same request or payment, made as if: every check is real, and nothing of it stays.

`start.receive` and `start.send` run over a store that forgets, a wallet that reveals no address, and nobody who is told. What comes out
is what a person is shown before he agrees, and all that `--dry-run` does.

Law: a preview writes nothing; the only trace is a short lock on the coins that the person is asked about, given back by whoever asks.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, cast

from pjv2.errors import NotNow
from pjv2.ports import Appended, Change, Notify, Store, Stored, Wallet, WalletAddress
from pjv2.psbt.tx import Psbt, TxOut, script_to_address
from pjv2.units import FeeRate, Instant, Outpoint, SessionId

if TYPE_CHECKING:
    from pjv2.driver import Driver

ASKING = 900.0
"""Seconds that coins stay locked while a person thinks, should the process die meanwhile."""

_NOBODYS = b"\x00\x14" + bytes(20)


class _Forgetful:
    """A store that keeps no new session."""

    def __init__(self, store: Store) -> None:
        self._store = store

    def __getattr__(self, name: str) -> Any:
        return getattr(self._store, name)

    async def create(self, change: Change) -> Appended:
        return Stored()


class _Deaf:
    def told(self, event: str, at: Instant, session: SessionId | None, facts: Mapping[str, Any]) -> None:
        """Nothing happened."""


class Composed:
    """A wallet that composes a payment once: what was shown is what is sent. Addresses it gives out are nobody's until then."""

    def __init__(self, driver: Driver) -> None:
        self._wallet = driver.wallet
        self._clock = driver.clock
        self._psbt: bytes | None = None
        self._inputs: tuple[Outpoint, ...] = ()
        self._lock_id = b""
        self._payments: tuple[TxOut, ...] = ()
        self._agreed = False

    def __getattr__(self, name: str) -> Any:
        return getattr(self._wallet, name)

    async def new_address(self, *, change: bool = False) -> WalletAddress:
        if self._agreed:
            return await self._wallet.new_address(change=change)
        return WalletAddress(script_to_address(_NOBODYS, await self._wallet.network()), _NOBODYS, 0)

    async def fund(
        self,
        payments: Sequence[TxOut],
        rate: FeeRate,
        lock_id: bytes,
        until: Instant,
        *,
        avoid: frozenset[Outpoint] = frozenset(),
    ) -> bytes:
        if self._psbt is None or self._payments != tuple(payments):
            short = self._clock.now() + ASKING
            self._psbt = await self._wallet.fund(payments, rate, lock_id, short, avoid=avoid)
            self._inputs = tuple(txin.outpoint for txin in Psbt.parse(self._psbt).tx.inputs)
            self._lock_id, self._payments = lock_id, tuple(payments)
            return self._psbt
        await self._wallet.unlock(self._inputs, self._lock_id)
        self._lock_id = b""
        if await self._wallet.lock(self._inputs, lock_id, until):
            raise NotNow("the coins of this payment were taken by another one meanwhile; try again", after=1)
        return self._psbt

    def agree(self) -> None:
        """From here on addresses and locks are meant."""
        self._agreed = True

    async def let_go(self) -> None:
        """Give back the lock of the preview, if nothing took it over."""
        if self._lock_id:
            lock_id, self._lock_id = self._lock_id, b""
            await self._wallet.unlock(self._inputs, lock_id)


def as_if(driver: Driver, wallet: Composed) -> Driver:
    """A driver that checks everything and keeps nothing."""
    rehearsing = copy.copy(driver)
    rehearsing.store = cast(Store, _Forgetful(driver.store))
    rehearsing.wallet = cast(Wallet, wallet)
    rehearsing.notify = cast(Notify, _Deaf())
    return rehearsing


def as_shown(driver: Driver, wallet: Composed) -> Driver:
    """A driver that sends what `wallet` composed."""
    wallet.agree()
    meant = copy.copy(driver)
    meant.wallet = cast(Wallet, wallet)
    return meant
