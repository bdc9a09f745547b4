"""The embedded wallet: `ports.Wallet` over bdkpython, with a file of its own and an Esplora or Electrum server.

It speaks single-key descriptors (BIP44, BIP49, BIP84, BIP86), private or public; with public ones it watches, and offers no coins.
It refuses to sign what was not named, to take a previous output of ours from a PSBT, and to answer about coins from what it knew
long ago: before coins, a balance or a payment it asks its server, unless it did within `max_age` seconds. Its file is shared: other
objects and other processes use it in turns, and what one of them stored the others know in their next turn.

```
driver ─► BdkWallet ──► one worker thread ──► in turns with others: WalletFile (SQLite, leases)
             └─ sync ─► a daemon thread ────► server          one at a time; who waits for a deadline joins the one under way
```

Law: what must survive is on disk before it is answered; the server is asked outside of the worker thread and of any turn, so that a
silent server never delays a signature.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, Concatenate, ParamSpec, TypeVar

from pjv2.backends.wallet.bdk_file import PATIENCE, WalletFile
from pjv2.backends.wallet.bdk_keys import (
    BdkKind,
    DescriptorKeys,
    KeyRing,
    Keys,
    MnemonicKeys,
    key_ring,
    keys_from,
    library,
    words_from_entropy,
)
from pjv2.backends.wallet.bdk_sync import Electrum, Esplora, Link, Source, ask, connect, in_daemon, source_for
from pjv2.errors import NotNow, PeerMistake, WrongUsage
from pjv2.ports import WalletAddress
from pjv2.psbt.coin import Coin
from pjv2.psbt.tx import Psbt, Tx, TxOut
from pjv2.units import FeeRate, Instant, Network, Outpoint, Sats, Txid

__all__ = [
    "BdkKind",
    "BdkWallet",
    "DescriptorKeys",
    "Electrum",
    "Esplora",
    "KeyRing",
    "MnemonicKeys",
    "bdk_wallet",
    "key_ring",
    "keys_from",
    "library",
    "source_for",
    "words_from_entropy",
]

GAP = 50
"""Unused addresses in a row after which a first scan stops looking. Requests that were never paid make such rows."""

P = ParamSpec("P")
T = TypeVar("T")


class BdkWallet:
    """A wallet file, shared in turns with whoever else has it open. Made by `BdkWallet.open`."""

    def __init__(
        self,
        file: WalletFile,
        worker: ThreadPoolExecutor,
        *,
        sync: Source | None,
        max_age: float,
        deadline: float,
        gap: int,
        now: Callable[[], Instant],
    ) -> None:
        """For `open` only."""
        self._file = file
        self._worker = worker
        self._source = sync
        self._max_age = max_age
        self._deadline = deadline
        self._gap = gap
        self._now = now
        self._link: Link | None = None
        self._syncing: asyncio.Task[None] | None = None
        self._synced: float | None = None
        self._took = 0.0
        self._closed = False

    @classmethod
    async def open(
        cls,
        path: Path,
        keys: Keys | KeyRing,
        network: Network,
        *,
        sync: Source | None = None,
        max_age: float = 10.0,
        deadline: float = 60.0,
        gap: int = GAP,
        patience: float = PATIENCE,
        now: Callable[[], Instant] = time.time,
    ) -> BdkWallet:
        """Open the wallet file at `path` (made 0600 when missing) with its keys. No server is asked yet.

        `sync` is the server; None means that only `saw` brings news. Answers about coins are at most `max_age` seconds old (or
        four times as old as a sync takes; 0: always asked anew);
        whoever waits for the server waits `deadline` seconds at most, and for another process's turn `patience` seconds. `gap` ends
        the first scan. `now` dates locks.
        Raises WrongUsage (keys, other keys' or another network's file), NotNow (no turn, disk), CannotRead.
        """
        worker = ThreadPoolExecutor(1, thread_name_prefix="pjv2-wallet")

        def opened() -> WalletFile:
            ring = keys if isinstance(keys, KeyRing) else key_ring(keys, network)
            if ring.network is not network:
                raise WrongUsage(f"these keys were read for {ring.network}, not for {network}")
            return WalletFile(path.absolute(), ring, gap=max(gap, 25), patience=patience)

        try:
            file = await asyncio.get_running_loop().run_in_executor(worker, opened)
        except BaseException:
            worker.shutdown(wait=False)
            raise
        return cls(file, worker, sync=sync, max_age=max_age, deadline=deadline, gap=gap, now=now)

    def __repr__(self) -> str:
        keys = self._file.keys
        return f"BdkWallet({keys.name}, {keys.network}, {keys.kinds[0]}{'' if keys.signs else ', watch-only'})"

    def __reduce__(self) -> tuple[Any, ...]:
        raise WrongUsage("a wallet is not pickled: open its file")

    # ------------------------------------------------------------ ports.Wallet

    async def fingerprint(self) -> str:
        """16 hex characters over network and public descriptors: the same for a watch-only copy."""
        return self._file.keys.name

    async def network(self) -> Network:
        return self._file.keys.network

    async def new_address(self, *, change: bool = False) -> WalletAddress:
        """The next address, never given out before. A file without history asks its server first which ones were used."""
        if self._source is not None and await self._do(WalletFile.never_synced):
            await self._fresh(self._age)
        return await self._do(WalletFile.reveal, change=change)

    async def mine(self, outpoints: Sequence[Outpoint]) -> frozenset[Outpoint]:
        """Which of these are ours; the server is asked only when one is unknown."""
        known = await self._do(WalletFile.mine, outpoints)
        if known != frozenset(outpoints) and self._is_stale():
            await self._fresh(self._age)
            known = await self._do(WalletFile.mine, outpoints)
        return known

    async def coins(self) -> tuple[Coin, ...]:
        await self._fresh(self._age)
        return await self._do(WalletFile.coins, self._now())

    async def balance(self) -> Sats:
        """Everything confirmed, mature and unspent, locked coins included."""
        await self._fresh(self._age)
        return await self._do(WalletFile.balance)

    async def lock(self, coins: Sequence[Outpoint], lock_id: bytes, until: Instant) -> tuple[Outpoint, ...]:
        """All or nothing: the coins that are not ours, spent, or locked otherwise are answered, and none is locked then."""
        await self.mine(coins)
        return await self._do(WalletFile.hold, coins, lock_id, until, self._now())

    async def unlock(self, coins: Sequence[Outpoint], lock_id: bytes) -> None:
        """Coins that are locked under another id, or not at all, are left as they are."""
        await self._do(WalletFile.drop, coins, lock_id)

    async def locked(self) -> frozenset[Outpoint]:
        """Every coin that is locked now, under whatever id."""
        return await self._do(WalletFile.locked, self._now())

    async def scripts(self) -> frozenset[bytes]:
        """Every script this wallet has handed out."""
        revealed = await self._do(WalletFile.revealed)
        return await self._on_thread(lambda: self._file.scripts(revealed))

    async def can_sign(self) -> bool:
        return self._file.keys.signs and not self._closed

    async def sign(self, psbt: bytes, ours: Sequence[Outpoint]) -> bytes:
        """The PSBT with exactly these inputs final and every other map as it was.

        Works without a server, except for a coin it has not seen yet, and for a taproot signature beside an input whose previous
        output the PSBT does not tell. Raises NotNow (watch-only; server; a signature that does not hold), WrongUsage (an input
        that is not ours, a foreign sighash type).
        """
        try:
            parsed = Psbt.parse(psbt)
        except PeerMistake as exc:
            raise WrongUsage(f"the wallet was given no PSBT to sign: {exc}") from exc
        await self.mine(ours)
        unknown = await self._do(WalletFile.unknown_prevouts, parsed, ours)
        found = await self._find(unknown) if unknown else {}
        return (await self._do(WalletFile.sign, parsed, ours, found)).serialize()

    async def fund(
        self,
        payments: Sequence[TxOut],
        rate: FeeRate,
        lock_id: bytes,
        until: Instant,
        *,
        avoid: frozenset[Outpoint] = frozenset(),
    ) -> bytes:
        """A signed version 2 transaction to `payments` as PSBT, its inputs locked, its change index on disk.

        The fee is `rate` on the weight before signing, at most a few units above the signed one; a rest below dust joins it.
        Coins of others' unconfirmed transactions are never used. Raises WrongUsage (too little, dust, watch-only), NotNow.
        """
        await self._fresh(self._age)
        return await self._do(WalletFile.build, payments, rate, lock_id, until, self._now(), avoid)

    async def close(self) -> None:
        """Let go of the file. A request to the server that is under way is left to end unheard."""
        if self._closed:
            return
        self._closed = True
        if self._syncing is not None:
            self._syncing.cancel()
            await asyncio.wait({self._syncing})
        await asyncio.get_running_loop().run_in_executor(self._worker, self._file.close)
        self._worker.shutdown(wait=False)
        self._link = None

    # ------------------------------------------------------------ beyond the port

    async def sync(self) -> None:
        """Ask the server now: what it knew at the time of the call is known afterwards. Raises NotNow, WrongUsage (other network)."""
        await self._fresh(0.0)

    async def rescan(self, gap: int) -> None:
        """Look for money beyond the addresses that this file has given out, until `gap` unused ones in a row on both branches."""
        if self._source is None:
            raise WrongUsage("this wallet has no server to ask")
        if gap < 1:
            raise WrongUsage("a scan needs a gap of at least 1")
        if self._closed:
            raise NotNow("the wallet is closed")
        while self._syncing is not None and not self._syncing.done():
            await asyncio.wait({self._syncing})
        await self._join(self._begin(self._source, gap))

    async def saw(self, tx: bytes) -> None:
        """A transaction that was just broadcast: counted at once, and again after each sync until the server lists it (10 minutes)."""
        try:
            Tx.parse(tx)
        except PeerMistake as exc:
            raise WrongUsage(f"the wallet was told of no transaction: {exc}") from exc
        await self._do(WalletFile.saw, tx, time.time())

    # ------------------------------------------------------------ one thread for the file

    async def _do(self, work: Callable[Concatenate[WalletFile, P], T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Run a method of the file on its thread, in a turn. A caller that is cancelled leaves it running to its end."""
        asked = time.monotonic()

        def run() -> T:
            with self._file.alone(asked, lambda: self._closed):
                return work(self._file, *args, **kwargs)

        return await self._on_thread(run)

    async def _on_thread(self, work: Callable[[], T]) -> T:
        if self._closed:
            raise NotNow("the wallet is closed")

        def run() -> T:
            try:
                return work()
            except library().InternalError as exc:
                failed = type(exc).__name__
            raise NotNow(f"the wallet's library failed ({failed}): nothing is lost, try again")

        return await asyncio.get_running_loop().run_in_executor(self._worker, run)

    # ------------------------------------------------------------ the server

    @property
    def _age(self) -> float:
        """How old an answer may be. A sync asks for every address ever given out: where that takes long, it is done less often."""
        return max(self._max_age, 4 * self._took) if self._max_age else 0.0

    def _is_stale(self) -> bool:
        if self._source is None:
            return False
        return self._synced is None or time.monotonic() - self._synced > self._age

    async def _fresh(self, max_age: float) -> None:
        """Return once a sync has succeeded that began at most `max_age` seconds before this call."""
        if self._closed:
            raise NotNow("the wallet is closed")
        if self._source is None:
            return
        asked = time.monotonic() - max_age
        try:
            async with asyncio.timeout(self._deadline):
                while self._synced is None or self._synced < asked:
                    syncing = self._syncing
                    if syncing is None or syncing.done():
                        syncing = self._begin(self._source)
                    await self._join(syncing)
        except TimeoutError as exc:
            raise NotNow(
                f"the wallet's server {self._source.host} did not answer within {self._deadline:g} s; it is still asked"
            ) from exc

    def _begin(self, source: Source, gap: int | None = None) -> asyncio.Task[None]:
        self._syncing = asyncio.create_task(self._sync(source, gap))
        self._syncing.add_done_callback(_heard)
        return self._syncing

    @staticmethod
    async def _join(syncing: asyncio.Task[None]) -> None:
        """Wait for a sync without owning it: who waits may be cancelled, and it goes on for the others."""
        await asyncio.wait({syncing})
        if syncing.cancelled():
            raise NotNow("the wallet was closed meanwhile")
        syncing.result()

    async def _sync(self, source: Source, gap: int | None) -> None:
        """One trip to the server; with a `gap` for every script, else for the revealed ones (or every, the first time)."""
        began = time.monotonic()
        link = await self._linked(source)
        taken = False
        while not taken:
            everything, request, tip = await self._do(WalletFile.request, everything=gap is not None)
            ask_for = partial(link.scan, request, gap or self._gap) if everything else partial(link.refresh, request)
            update = await self._ask(source, ask_for)
            taken = await self._do(WalletFile.apply, update, tip, time.time())
        self._synced, self._took = began, 0.0 if everything else time.monotonic() - began

    async def _linked(self, source: Source) -> Link:
        """The client, connected, and of our network: nothing of a server of another one is kept."""
        if self._link is not None:
            return self._link

        def made() -> tuple[Link, str]:
            link = connect(source)
            return link, link.genesis()

        link, genesis = await self._ask(source, made)
        network = self._file.keys.network
        if genesis != network.genesis_hash:
            raise WrongUsage(
                f"the wallet's server {source.host} does not serve {network}: point [chain] at one that does"
            )
        self._link = link
        return link

    async def _ask(self, source: Source, work: Callable[[], T]) -> T:
        try:
            return await in_daemon(lambda: ask(source, work))
        except NotNow:
            self._link = None  # an Electrum connection may be dead: the next attempt makes its own
            raise

    async def _find(self, outpoints: Sequence[Outpoint]) -> dict[Outpoint, TxOut]:
        """Previous outputs from the server, each out of a transaction whose id was recomputed. Raises WrongUsage when unknown."""
        source = self._source
        if source is None:
            raise WrongUsage(f"nobody knows the output {outpoints[0]}, which the PSBT spends")
        parents: dict[Txid, Tx] = {}
        try:
            async with asyncio.timeout(self._deadline):
                link = await self._linked(source)
                for txid in sorted({outpoint.txid for outpoint in outpoints}):
                    raw = await self._ask(source, lambda txid=txid: link.transaction(txid))  # type: ignore[misc]  # bound now
                    if raw is not None:
                        parents[txid] = Tx.parse(raw)
        except TimeoutError as exc:
            raise NotNow(f"the wallet's server {source.host} did not answer within {self._deadline:g} s") from exc
        except PeerMistake as exc:
            raise NotNow(f"the wallet's server {source.host} answered no transaction") from exc
        found = {}
        for outpoint in outpoints:
            parent = parents.get(outpoint.txid)
            if parent is None or parent.txid != outpoint.txid or outpoint.vout >= len(parent.outputs):
                raise WrongUsage(f"nobody knows the output {outpoint}, which the PSBT spends")
            found[outpoint] = parent.outputs[outpoint.vout]
        return found


def _heard(task: asyncio.Task[None]) -> None:
    """Take note of a sync's failure when nobody waits for it any more; whoever waits hears it as well."""
    if not task.cancelled():
        task.exception()


async def bdk_wallet(
    home: Path,
    server: Source,
    words: str,
    *,
    network: Network = Network.REGTEST,
    kind: BdkKind = "p2wpkh",
    max_age: float = 0.0,
    now: Callable[[], Instant] = time.time,
) -> BdkWallet:
    """A wallet in `home/wallet.sqlite` by its words, as a small installation or the lab has it; by default synced before each answer."""
    return await BdkWallet.open(
        home / "wallet.sqlite", MnemonicKeys(words, kind), network, sync=server, max_age=max_age, gap=20, now=now
    )
