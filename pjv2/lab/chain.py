"""An embedded regtest chain: real consensus by libbitcoinkernel, with a mempool, a miner and a faucet of our own.

`LabChain` is a `ports.Chain` and, beside it, the power over a small world: mine, fund, reorganise, evict, raise fees, stop answering.
Blocks are judged by the kernel alone (`lab.kernel`), transactions by the mempool's policy (`lab.mempool`); `lab.miner` builds blocks
and `lab.ledger` holds what is known. It refuses what they refuse.

```
broadcast ─► examine (form, locks, inputs, scripts) ─► afford (fee, replacement) ─► mempool ─► miner ─► kernel
                                                                                       ▲                 │ events
                                                                                       └── disconnected ─┘
```

Law: the indexes change only by what the kernel reports as connected and disconnected, after it has returned.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Mapping, Sequence
from types import TracebackType
from typing import Literal, Self

from pjv2.errors import NotNow, WrongUsage
from pjv2.lab.kernel import Kernel, open_kernel
from pjv2.lab.ledger import ActiveChain, LabBlock, LabTx, place, read_tx
from pjv2.lab.mempool import Known, Mempool, Refused
from pjv2.lab.miner import Miner
from pjv2.psbt.original import Prevout, Suitability
from pjv2.psbt.tx import TxOut, hash256
from pjv2.session.facts import BroadcastResult, ChainTx, ChainView, Tip
from pjv2.units import FeeRate, Instant, Outpoint, Sats, Txid

_BIG = 100_000
"""Blocks of more bytes are judged in a worker thread; smaller ones take less than a few milliseconds."""

_PREMINED: dict[tuple[int, int], list[LabBlock]] = {}
"""The first blocks of every chain are the same by start and step: they are worked once in a process."""


class LabChain:
    """A regtest world of one node. Readings are plain calls, everything that changes the world is awaited.

    `min_relay` and `incremental` are bitcoind's relay fees (default 0.1 sat/vB), `mempool_min` the dynamic floor (`spike` raises
    it), `estimates` what `fee_rate` answers by target. Setting `offline` makes every port call raise NotNow; the lab's own powers
    go on. Blocks start at `start` (seconds since the epoch, in the past) and are `step` seconds apart. A `LabChain` belongs to one
    event loop. `kernel` judges (default: `open_kernel`). Raises NotNow where there is none.
    """

    def __init__(
        self,
        *,
        premine: int = 110,
        start: Instant = 1_735_689_600,
        step: int = 600,
        min_relay: FeeRate = FeeRate(25),
        estimates: Mapping[int, FeeRate] | None = None,
        kernel: Kernel | None = None,
    ) -> None:
        self.offline = False
        self.estimates: dict[int, FeeRate] = dict(estimates or {1: FeeRate(1250), 6: FeeRate(500), 144: FeeRate(250)})
        self._closed = False
        self._one_miner = asyncio.Lock()
        self._kernel = kernel or open_kernel()
        self._active = ActiveChain()
        self._pool = Mempool(self._active, self._kernel, min_relay)
        self._miner = Miner(self._active, self._pool, int(start), step)
        self.faucet_script = self._miner.script
        try:
            header, raws = self._kernel.genesis()
            when = int.from_bytes(header[68:72], "little")
            self._active.begin(
                LabBlock(
                    0, hash256(header)[::-1].hex(), "0" * 64, header, when, when, tuple(read_tx(raw) for raw in raws)
                )
            )
            known = _PREMINED.setdefault((int(start), step), [])
            for height in range(premine):
                self._miner.nonce = height
                if height == len(known):
                    known.append(self._miner.build(self._active.tip, None, ()))
                block = self._active.remember(known[height])
                self._settle(block, *self._kernel.submit(block.raw))
            self._miner.nonce = premine
        except BaseException:
            self._kernel.close()
            raise

    def __repr__(self) -> str:
        return f"LabChain(height={self.height}, mempool={len(self._pool.ledger.txs)}, offline={self.offline})"

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    # ------------------------------------------------------------ ports.Chain

    async def genesis_hash(self) -> str:
        self._answer()
        return self._active.blocks[0].hash

    async def tip(self) -> Tip:
        self._answer()
        return self._tip()

    async def test(self, tx: bytes) -> Suitability:
        """As bitcoind's testmempoolaccept: nothing is kept. `known` for what the mempool or the chain holds."""
        self._answer()
        try:
            self._pool.afford([self._pool.examine(tx, {})])
        except Known as known:
            return Suitability("known", known.reason)
        except Refused as no:
            missing = no.reason == "bad-txns-inputs-missingorspent"
            return Suitability("refused", "missing-inputs" if missing else no.reason)
        return Suitability("accepted")

    async def prevouts(self, outpoints: Sequence[Outpoint]) -> Mapping[Outpoint, Prevout]:
        self._answer()
        found = {}
        for outpoint in outpoints:
            entry = self.tx(outpoint.txid)
            if entry is not None and outpoint.vout < len(entry.tx.outputs):
                found[outpoint] = Prevout(
                    entry.tx.outputs[outpoint.vout],
                    entry.height,
                    entry.coinbase,
                    self.spender(outpoint),
                    None if entry.height is None else float(self._active.blocks[entry.height - 1].median_time),
                )
        return found

    async def view(
        self, txids: frozenset[Txid], outpoints: frozenset[Outpoint], scripts: frozenset[bytes], since: int
    ) -> ChainView:
        """Everything watched, in chain order, the mempool last. All is indexed, so `since` saves nothing and is not needed."""
        self._answer()
        found = {txid for txid in txids if self.tx(txid) is not None}
        for outpoint in outpoints:
            spender = self.spender(outpoint)
            if spender is not None:
                found.add(spender)
        for script in scripts:
            for ledger in (self._active.ledger, self._pool.ledger):
                for txid in ledger.scripts.get(script, ()):
                    if any(out.script == script for out in ledger.txs[txid].tx.outputs):
                        found.add(txid)
        entries = sorted((self._entry(txid) for txid in found), key=place)
        return ChainView(
            tip=self._tip(),
            txs=tuple(ChainTx(entry.txid, entry.raw, entry.height) for entry in entries),
            rate=self._estimate(6),
            economy_rate=self._estimate(144),
        )

    async def broadcast(self, tx: bytes, *, parents: Sequence[bytes] = ()) -> BroadcastResult:
        """As bitcoind's sendrawtransaction, and with `parents` as its submitpackage: a parent may need its child's fee."""
        self._answer()
        try:
            self._pool.accept(tx, parents)
        except Known as known:
            return BroadcastResult("known", known.reason)
        except Refused as no:
            return BroadcastResult("refused", no.reason)
        return BroadcastResult("accepted")

    async def fee_rate(self, blocks: int) -> FeeRate:
        """The estimate for the longest target that is not above `blocks`, never below what the mempool takes."""
        self._answer()
        return self._estimate(blocks)

    async def close(self) -> None:
        """Let the kernel go and delete its files; port calls raise NotNow from here on."""
        if not self._closed:
            self._closed = True
            self._kernel.close()

    # ------------------------------------------------------------ fees

    @property
    def min_relay(self) -> FeeRate:
        return self._pool.min_relay

    @min_relay.setter
    def min_relay(self, rate: FeeRate) -> None:
        self._pool.min_relay = rate

    @property
    def incremental(self) -> FeeRate:
        return self._pool.incremental

    @incremental.setter
    def incremental(self, rate: FeeRate) -> None:
        self._pool.incremental = rate

    @property
    def mempool_min(self) -> FeeRate:
        return self._pool.minimum

    @mempool_min.setter
    def mempool_min(self, rate: FeeRate) -> None:
        self._pool.minimum = rate

    # ------------------------------------------------------------ readings

    @property
    def height(self) -> int:
        return self._active.tip.height

    def block(self, height: int) -> LabBlock:
        """The block of the active chain at this height. Raises WrongUsage above the tip."""
        if not 0 <= height <= self.height:
            raise WrongUsage(f"the lab's chain has no block {height}: its tip is {self.height}")
        return self._active.blocks[height]

    def find_block(self, hash: str) -> LabBlock | None:
        """A block by its hash, stale ones too."""
        return self._active.seen.get(hash)

    def tx(self, txid: Txid) -> LabTx | None:
        """A transaction of the active chain or the mempool."""
        return self._pool.find(txid)

    def spender(self, outpoint: Outpoint) -> Txid | None:
        """Who spends this output, in the active chain or in the mempool."""
        return self._pool.spender(outpoint)

    def history(self, script: bytes) -> tuple[LabTx, ...]:
        """Everything that pays this script or spends from it: the mempool first, then the chain from its tip down."""
        txids = {**self._active.ledger.scripts.get(script, {}), **self._pool.ledger.scripts.get(script, {})}
        return tuple(sorted((self._entry(txid) for txid in txids), key=place, reverse=True))

    def mempool(self) -> tuple[LabTx, ...]:
        """Parents before children."""
        return tuple(self._pool.ledger.ordered())

    def utxos(self, script: bytes | None = None) -> dict[Outpoint, TxOut]:
        """The confirmed unspent outputs, of one script or of all."""
        return {
            outpoint: coin.txout
            for outpoint, coin in self._active.unspent.items()
            if script is None or coin.txout.script == script
        }

    # ------------------------------------------------------------ powers

    async def mine(
        self, n: int = 1, to: bytes | None = None, txs: Literal["all"] | Sequence[Txid | bytes] = "all"
    ) -> tuple[str, ...]:
        """Mine `n` blocks to the script `to` (default: the faucet); answers their hashes.

        `txs` goes into the first one: the whole mempool, or txids (their unconfirmed parents come along) and raw transactions
        that the mempool need not know. Raises WrongUsage with the kernel's reason when a block is refused.
        """
        async with self._one_miner:
            hashes: list[str] = []
            for _ in range(n):
                chosen = self._miner.template() if txs == "all" else self._miner.chosen(txs) if not hashes else []
                block = self._miner.build(self._active.tip, to, chosen)
                await self._extend_slowly(block)
                hashes.append(block.hash)
            return tuple(hashes)

    async def reorg(
        self,
        depth: int,
        *,
        blocks: int | None = None,
        include: Sequence[Txid | bytes] = (),
        drop: Iterable[Txid] = (),
        to: bytes | None = None,
    ) -> tuple[str, ...]:
        """Replace the last `depth` blocks by a branch of `blocks` (default `depth` + 1); answers the new hashes.

        The first new block holds `include` (txids or raw transactions, a double spend for instance). Disconnected transactions
        return to the mempool, except `drop` and what descends from it. Raises WrongUsage when the branch is refused.
        """
        async with self._one_miner:
            count = depth + 1 if blocks is None else blocks
            if not 1 <= depth <= self.height or count <= depth:
                raise WrongUsage("a reorganisation needs 1 to height blocks replaced, by a longer branch")
            parent = self._active.blocks[-1 - depth]
            chosen = self._miner.chosen(include)
            branch = []
            events: list[tuple[str, str]] = []
            reason = ""
            for _ in range(count):
                parent = self._miner.build(parent, to, chosen)
                chosen = []
                branch.append(parent)
                heard, said = await self._judge(parent)
                events += heard
                reason = reason or said
            self._apply(events, frozenset(drop))
            if self._active.tip.hash != parent.hash:
                raise WrongUsage(f"the branch was refused: {reason}")
            return tuple(block.hash for block in branch)

    async def fund(self, script: bytes, value: Sats, *, confirm: bool = True) -> Outpoint:
        """Pay a script from the faucet. `confirm` mines it in a block of its own, whatever the mempool thinks of fees."""
        return (await self.fund_many([TxOut(value, script)], confirm=confirm))[0]

    async def fund_many(self, outputs: Sequence[TxOut], *, confirm: bool = True) -> tuple[Outpoint, ...]:
        """Pay several scripts in one transaction of the faucet, in this order. Raises WrongUsage when the faucet is dry."""
        async with self._one_miner:
            entry = self._miner.pour(outputs)
            if confirm:
                await self._extend_slowly(self._miner.build(self._active.tip, None, [entry]))
            else:
                try:
                    self._pool.accept(entry.raw, ())
                except Refused as no:
                    raise WrongUsage(f"the faucet's payment was refused: {no.reason}") from no
            return tuple(Outpoint(entry.txid, n) for n in range(len(outputs)))

    async def evict(self, txid: Txid) -> tuple[Txid, ...]:
        """Throw a transaction and its descendants out of the mempool; answers what went."""
        if txid not in self._pool.ledger.txs:
            return ()
        return self._pool.remove([txid])

    async def spike(self, rate: FeeRate) -> tuple[Txid, ...]:
        """Raise (or lower) the mempool's floor; what pays less, even with its descendants, is evicted and named."""
        return self._pool.spike(rate)

    async def skip_time(self, seconds: float) -> None:
        """Let this much more time pass before the next block. A block more than two hours ahead of the clock is refused."""
        self._miner.skip += seconds

    async def submit_block(self, block: LabBlock) -> None:
        """Hand over a block made elsewhere on the active tip. Raises WrongUsage with the kernel's reason."""
        async with self._one_miner:
            await self._extend_slowly(block)

    # ------------------------------------------------------------ blocks in and out

    async def _extend_slowly(self, block: LabBlock) -> None:
        self._settle(block, *await self._judge(block))

    async def _judge(self, block: LabBlock) -> tuple[list[tuple[str, str]], str]:
        if self._closed:
            raise NotNow("the lab's chain is closed")
        raw = self._active.remember(block).raw
        if len(raw) <= _BIG:
            return self._kernel.submit(raw)
        return await asyncio.to_thread(self._kernel.submit, raw)

    def _settle(self, block: LabBlock, events: list[tuple[str, str]], reason: str) -> None:
        self._apply(events, frozenset())
        if self._active.tip.hash != block.hash:
            raise WrongUsage(f"the block was refused: {reason}")
        self._miner.skip = 0.0

    def _apply(self, events: Iterable[tuple[str, str]], drop: frozenset[Txid]) -> None:
        returned: list[LabTx] = []
        for kind, hash in events:
            if kind == "connected":
                block = self._active.seen[hash]
                self._active.connect(block)
                self._pool.confirmed(block)
            else:
                returned = [*self._active.disconnect(hash), *returned]
        if returned:
            self._pool.refill([entry for entry in returned if entry.txid not in self._active.ledger.txs], drop)

    # ------------------------------------------------------------ small things

    def _answer(self) -> None:
        if self._closed:
            raise NotNow("the lab's chain is closed")
        if self.offline:
            raise NotNow("the lab's chain does not answer: it was switched off", after=1.0)

    def _tip(self) -> Tip:
        block = self._active.tip
        return Tip(block.height, block.hash, float(block.median_time))

    def _entry(self, txid: Txid) -> LabTx:
        return self._active.ledger.txs.get(txid) or self._pool.ledger.txs[txid]

    def _estimate(self, blocks: int) -> FeeRate:
        targets = sorted(self.estimates)
        if not targets:
            raise NotNow("the lab's chain has no fee estimate")
        fitting = [target for target in targets if target <= blocks] or targets[:1]
        return max(self.estimates[fitting[-1]], self._pool.minimum, self._pool.min_relay)
