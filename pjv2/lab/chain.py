"""An embedded regtest chain: real consensus by libbitcoinkernel, with a mempool, a miner and a faucet of our own.

`LabChain` is a `ports.Chain` and, beside it, the power over a small world: mine, fund, reorganise, evict, raise fees, stop answering.
Blocks are judged by the kernel alone. The mempool follows bitcoind's policy and speaks its words for everything a payjoin can
meet: scripts, fees, full replace-by-fee, packages of parents and a child, relative and absolute locks, maturity, dust, standard
scripts. It refuses nothing for the shape of version 3 transactions, knows no bare multisig, ephemeral dust or cluster limits, and
has no reason to give for a failed script, because the kernel gives none.

```
broadcast ─► _examine (form, locks, inputs, scripts) ─► _afford (fee, replacement) ─► mempool ─► mine ─► kernel
                                                                                          ▲                │ events
                                                                                          └── disconnected ┘
```

Law: the indexes change only by what the kernel reports as connected and disconnected. Its callbacks only take notes; they are
applied afterwards, because an exception inside a callback is lost.
"""

from __future__ import annotations

import asyncio
import hashlib
import re
import shutil
import tempfile
import threading
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Protocol, Self

from coincurve import PrivateKey

from pjv2.errors import NotNow, OurMistake, PeerMistake, WrongUsage
from pjv2.lab.bitcoind import BitcoindKernel
from pjv2.psbt.coin import script_pushes
from pjv2.psbt.original import Prevout, Suitability
from pjv2.psbt.scripts import p2wpkh_script, p2wpkh_script_code, sighash_segwit_v0
from pjv2.psbt.tx import ScriptKind, Tx, TxIn, TxOut, dust_limit, hash256, is_witness_program, kind_of, varint
from pjv2.session.facts import BroadcastResult, ChainTx, ChainView, Tip
from pjv2.units import MAX_MONEY, FeeRate, Instant, Outpoint, Sats, Txid, Weight

COINBASE_MATURITY = 100
SUBSIDY: Sats = 50 * 100_000_000
HALVING = 150
"""Blocks between two halvings on regtest."""

MAX_BLOCK_WEIGHT: Weight = 3_996_000
MAX_TX_WEIGHT: Weight = 400_000
MAX_ANCESTORS = 25
MAX_REPLACED = 100
LOCKTIME_THRESHOLD = 500_000_000
SEQUENCE_DISABLED = 1 << 31
SEQUENCE_TIME = 1 << 22
FINAL_SEQUENCE = 0xFFFFFFFF

_NULL = Outpoint("0" * 64, 0xFFFFFFFF)
_BITS = 0x207FFFFF
_TARGET = 0x7FFFFF << 232
_ORDER = 0xFFFFFFFF_FFFFFFFF_FFFFFFFF_FFFFFFFE_BAAEDCE6_AF48A03B_BFD25E8C_D0364141
_BIG = 100_000
"""Blocks of more bytes are judged in a worker thread; smaller ones take less than a few milliseconds."""

_REASON = re.compile(r"(?:Block validation error: |AcceptBlock FAILED \(|AcceptBlockHeader[^(]*\(|ERROR: )(.+?)\)?\s*$")
_PREMINED: dict[tuple[int, int], list[LabBlock]] = {}
"""The first blocks of every chain are the same by start and step: they are worked once in a process."""

_KERNEL_LOCK = threading.Lock()  # the kernel's log is one per process: a reason belongs to the block under this lock


def _btc(amount: Sats) -> str:
    return f"{amount // 100_000_000}.{amount % 100_000_000:08d}"


# ---------------------------------------------------------------- values


@dataclass(frozen=True, slots=True)
class LabTx:
    """A transaction as the lab holds it: in a block of the active chain, or (`height` None) in the mempool.

    `prevouts` are the outputs it spends, in input order; a coinbase has none.
    """

    txid: Txid
    wtxid: str
    tx: Tx
    raw: bytes
    prevouts: tuple[TxOut, ...] = ()
    height: int | None = None
    block: str | None = None
    position: int = 0

    @property
    def coinbase(self) -> bool:
        return self.tx.inputs[0].outpoint == _NULL

    @property
    def fee(self) -> Sats:
        """Inputs less outputs, 0 for a coinbase."""
        return 0 if self.coinbase else sum(o.value for o in self.prevouts) - sum(o.value for o in self.tx.outputs)

    @property
    def vsize(self) -> int:
        """Virtual bytes, rounded up (BIP141); bitcoind counts fee rates in these."""
        return -(-self.tx.weight // 4)


@dataclass(frozen=True, slots=True)
class LabBlock:
    """A block of the active chain, or one that a reorganisation left behind; `median_time` is BIP113's, this block included."""

    height: int
    hash: str
    previous: str
    header: bytes
    time: int
    median_time: int
    txs: tuple[LabTx, ...] = field(repr=False)

    @property
    def raw(self) -> bytes:
        return self.header + varint(len(self.txs)) + b"".join(t.raw for t in self.txs)

    @property
    def weight(self) -> Weight:
        return 4 * (80 + len(varint(len(self.txs)))) + sum(t.tx.weight for t in self.txs)


@dataclass(frozen=True, slots=True)
class _Unspent:
    txout: TxOut
    height: int | None
    coinbase: bool


class _Refused(Exception):
    """The mempool's no; `fee`: a child might still pay for it."""

    def __init__(self, reason: str, *, fee: bool = False) -> None:
        super().__init__(reason)
        self.reason = reason
        self.fee = fee


class _Known(Exception):
    """It is there already."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


class _Ledger:
    """Transactions with what they spend and which scripts they touch; one for the chain, one for the mempool."""

    def __init__(self) -> None:
        self.txs: dict[Txid, LabTx] = {}
        self.spent: dict[Outpoint, Txid] = {}
        self.scripts: dict[bytes, dict[Txid, None]] = {}

    def add(self, entry: LabTx) -> None:
        self.txs[entry.txid] = entry
        for spend in entry.tx.inputs:
            self.spent[spend.outpoint] = entry.txid
        for out in (*entry.prevouts, *entry.tx.outputs):
            self.scripts.setdefault(out.script, {})[entry.txid] = None

    def remove(self, txid: Txid) -> LabTx:
        entry = self.txs.pop(txid)
        for spend in entry.tx.inputs:
            if self.spent.get(spend.outpoint) == txid:
                del self.spent[spend.outpoint]
        for out in (*entry.prevouts, *entry.tx.outputs):
            held = self.scripts.get(out.script)
            if held is not None:
                held.pop(txid, None)
                if not held:
                    del self.scripts[out.script]
        return entry

    def children(self, txid: Txid) -> set[Txid]:
        entry = self.txs[txid]
        found = (self.spent.get(Outpoint(txid, n)) for n in range(len(entry.tx.outputs)))
        return {child for child in found if child is not None}

    def family(self, txids: Iterable[Txid]) -> set[Txid]:
        """These and all that descends from them."""
        found: set[Txid] = set()
        queue = list(txids)
        while queue:
            txid = queue.pop()
            if txid not in found:
                found.add(txid)
                queue.extend(self.children(txid))
        return found

    def ancestors(self, tx: Tx) -> set[Txid]:
        """Everything in here that `tx` descends from."""
        found: set[Txid] = set()
        queue = [tx]
        while queue:
            for spend in queue.pop().inputs:
                parent = spend.outpoint.txid
                if parent in self.txs and parent not in found:
                    found.add(parent)
                    queue.append(self.txs[parent].tx)
        return found

    def ordered(self) -> list[LabTx]:
        """Parents before children."""
        done: dict[Txid, LabTx] = {}
        for first in self.txs.values():
            stack = [first]
            while stack:
                entry = stack[-1]
                missing = [
                    self.txs[spend.outpoint.txid]
                    for spend in entry.tx.inputs
                    if spend.outpoint.txid in self.txs and spend.outpoint.txid not in done
                ]
                if missing:
                    stack.extend(missing)
                else:
                    done[stack.pop().txid] = entry
        return list(done.values())


# ---------------------------------------------------------------- the kernel


class Kernel(Protocol):
    """A consensus engine, as the lab uses one."""

    def genesis(self) -> tuple[bytes, list[bytes]]: ...

    def submit(self, raw: bytes) -> tuple[list[tuple[str, str]], str]: ...

    def first_bad_input(self, raw: bytes, prevouts: Sequence[TxOut]) -> int | None: ...

    def close(self) -> None: ...


def open_kernel() -> Kernel:
    """libbitcoinkernel in this process; where it has no wheel, a bitcoind on PATH. Raises NotNow when there is neither."""
    try:
        import pbk
    except ImportError as exc:
        program = shutil.which("bitcoind")
        if program is None:
            raise NotNow(
                "the lab's chain needs libbitcoinkernel, which is not installed: install pjv2[lab], or have bitcoind on PATH"
            ) from exc
        return BitcoindKernel(program)
    return _Kernel(pbk)


class _Kernel:
    """libbitcoinkernel on a temporary directory: submit blocks, hear what was connected, verify scripts."""

    def __init__(self, pbk: Any) -> None:
        self._pbk = pbk
        self._events: list[tuple[Literal["connected", "disconnected", "checked"], str]] = []
        self._lines: list[str] = []
        self._trouble: list[BaseException] = []
        self._directory = Path(tempfile.mkdtemp(prefix="pjv2-lab-"))
        try:
            self._open()
        except BaseException:
            self.close()
            raise

    def _open(self) -> None:
        pbk = self._pbk

        def note(kind: Literal["connected", "disconnected"]) -> Any:
            def callback(_user: object, block: Any, _entry: object) -> None:
                try:
                    self._events.append((kind, str(block.block_hash)))
                except BaseException as exc:  # ctypes would print and forget it; it is raised after the call
                    self._trouble.append(exc)

            return callback

        def heard(line: str) -> None:
            self._lines.append(line)

        try:
            self._log = pbk.LoggingConnection(cb=heard)
            self._callbacks = pbk.ValidationInterfaceCallbacks(
                block_connected=note("connected"), block_disconnected=note("disconnected")
            )
            self._context = pbk.make_context(pbk.ChainType.REGTEST, validation_callbacks=self._callbacks)
            options = pbk.ChainstateManagerOptions(self._context, str(self._directory), str(self._directory / "blocks"))
            options.update_block_tree_db_in_memory(True)
            options.update_chainstate_db_in_memory(True)
            options.set_worker_threads_num(0)
            self._manager = pbk.ChainstateManager(options)
        except (RuntimeError, pbk.KernelException) as exc:
            raise NotNow(f"the lab's chain could not be opened: {exc}") from exc
        self._events.clear()

    def genesis(self) -> tuple[bytes, list[bytes]]:
        """Header and transactions of block 0."""
        block = self._manager.blocks[self._manager.get_active_chain().block_tree_entries[0]]
        return bytes(block)[:80], [bytes(t) for t in block.transactions]

    def submit(self, raw: bytes) -> tuple[list[tuple[str, str]], str]:
        """Process a block; answers what was connected and disconnected, in order, and the reason logged for a refusal."""
        with _KERNEL_LOCK:
            self._events.clear()
            self._lines.clear()
            refused = False
            try:
                self._manager.process_block(self._pbk.Block(raw))
            except (RuntimeError, self._pbk.KernelException):
                refused = True
            if self._trouble:
                raise self._trouble.pop()
            reasons = [match[1] for line in self._lines if (match := _REASON.search(line))]
            reason = reasons[0] if reasons else ("the kernel refused it" if refused else "")
            return list(self._events), reason

    def first_bad_input(self, raw: bytes, prevouts: Sequence[TxOut]) -> int | None:
        """The first input whose script fails under all consensus flags; None when all are good."""
        pbk = self._pbk
        tx = pbk.Transaction(raw)
        scripts = [pbk.ScriptPubkey(out.script) for out in prevouts]
        spent = [pbk.TransactionOutput(script, out.value) for script, out in zip(scripts, prevouts, strict=True)]
        precomputed = pbk.script.PrecomputedTransactionData(tx, spent)
        flags = pbk.ScriptVerificationFlags.ALL
        for index, (script, out) in enumerate(zip(scripts, prevouts, strict=True)):
            if script.verify(out.value, tx, precomputed, index, flags) != 1:
                return index
        return None

    def close(self) -> None:
        # The manager goes first: it must not write into a directory that is gone.
        for name in ("_manager", "_context", "_callbacks", "_log"):
            if hasattr(self, name):
                delattr(self, name)
        shutil.rmtree(self._directory, ignore_errors=True)


# ---------------------------------------------------------------- the chain


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
        self.min_relay = min_relay
        self.incremental = FeeRate(25)
        self.mempool_min = FeeRate(0)
        self.estimates: dict[int, FeeRate] = dict(estimates or {1: FeeRate(1250), 6: FeeRate(500), 144: FeeRate(250)})
        self._step = step
        self._skip = 0.0
        self._start = int(start)
        self._nonce = 0
        self._closed = False
        self._one_miner = asyncio.Lock()
        self._faucet_key = PrivateKey(hashlib.sha256(b"pjv2 lab faucet").digest())
        self.faucet_script = p2wpkh_script(self._faucet_key.public_key.format())
        self._chain = _Ledger()
        self._pool = _Ledger()
        self._utxo: dict[Outpoint, _Unspent] = {}
        self._undo: dict[str, list[tuple[Outpoint, _Unspent]]] = {}
        self._active: list[LabBlock] = []
        self._blocks: dict[str, LabBlock] = {}
        self._kernel = kernel or open_kernel()
        try:
            header, raws = self._kernel.genesis()
            when = int.from_bytes(header[68:72], "little")
            genesis = LabBlock(
                0, hash256(header)[::-1].hex(), "0" * 64, header, when, when, tuple(_read(raw) for raw in raws)
            )
            self._active.append(self._remember(genesis))  # its coinbase cannot be spent: it is in no index
            known = _PREMINED.setdefault((self._start, step), [])
            for height in range(premine):
                self._nonce = height
                if height == len(known):
                    known.append(self._build(self._active[-1], None, ()))
                block = self._remember(known[height])
                self._settle(block, *self._kernel.submit(block.raw))
            self._nonce = premine
        except BaseException:
            self._kernel.close()
            raise

    def __repr__(self) -> str:
        return f"LabChain(height={self.height}, mempool={len(self._pool.txs)}, offline={self.offline})"

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    # ------------------------------------------------------------ ports.Chain

    async def genesis_hash(self) -> str:
        self._answer()
        return self._active[0].hash

    async def tip(self) -> Tip:
        self._answer()
        return self._tip()

    async def test(self, tx: bytes) -> Suitability:
        """As bitcoind's testmempoolaccept: nothing is kept. `known` for what the mempool or the chain holds."""
        self._answer()
        try:
            self._afford([self._examine(tx, {})])
        except _Known as known:
            return Suitability("known", known.reason)
        except _Refused as no:
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
                    None if entry.height is None else float(self._active[entry.height - 1].median_time),
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
            for ledger in (self._chain, self._pool):
                for txid in ledger.scripts.get(script, ()):
                    if any(out.script == script for out in ledger.txs[txid].tx.outputs):
                        found.add(txid)
        entries = sorted((self._entry(txid) for txid in found), key=_place)
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
            self._accept(tx, parents)
        except _Known as known:
            return BroadcastResult("known", known.reason)
        except _Refused as no:
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

    # ------------------------------------------------------------ readings

    @property
    def height(self) -> int:
        return self._active[-1].height

    def block(self, height: int) -> LabBlock:
        """The block of the active chain at this height. Raises WrongUsage above the tip."""
        if not 0 <= height <= self.height:
            raise WrongUsage(f"the lab's chain has no block {height}: its tip is {self.height}")
        return self._active[height]

    def find_block(self, hash: str) -> LabBlock | None:
        """A block by its hash, stale ones too."""
        return self._blocks.get(hash)

    def tx(self, txid: Txid) -> LabTx | None:
        """A transaction of the active chain or the mempool."""
        return self._chain.txs.get(txid) or self._pool.txs.get(txid)

    def spender(self, outpoint: Outpoint) -> Txid | None:
        """Who spends this output, in the active chain or in the mempool."""
        return self._chain.spent.get(outpoint) or self._pool.spent.get(outpoint)

    def history(self, script: bytes) -> tuple[LabTx, ...]:
        """Everything that pays this script or spends from it: the mempool first, then the chain from its tip down."""
        txids = {**self._chain.scripts.get(script, {}), **self._pool.scripts.get(script, {})}
        return tuple(sorted((self._entry(txid) for txid in txids), key=_place, reverse=True))

    def mempool(self) -> tuple[LabTx, ...]:
        """Parents before children."""
        return tuple(self._pool.ordered())

    def utxos(self, script: bytes | None = None) -> dict[Outpoint, TxOut]:
        """The confirmed unspent outputs, of one script or of all."""
        return {
            outpoint: coin.txout
            for outpoint, coin in self._utxo.items()
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
                chosen = self._template() if txs == "all" else self._chosen(txs) if not hashes else []
                block = self._build(self._active[-1], to, chosen)
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
            parent = self._active[-1 - depth]
            chosen = self._chosen(include)
            branch = []
            events: list[tuple[str, str]] = []
            reason = ""
            for _ in range(count):
                parent = self._build(parent, to, chosen)
                chosen = []
                branch.append(parent)
                heard, said = await self._judge(parent)
                events += heard
                reason = reason or said
            self._apply(events, frozenset(drop))
            if self._active[-1].hash != parent.hash:
                raise WrongUsage(f"the branch was refused: {reason}")
            return tuple(block.hash for block in branch)

    async def fund(self, script: bytes, value: Sats, *, confirm: bool = True) -> Outpoint:
        """Pay a script from the faucet. `confirm` mines it in a block of its own, whatever the mempool thinks of fees."""
        return (await self.fund_many([TxOut(value, script)], confirm=confirm))[0]

    async def fund_many(self, outputs: Sequence[TxOut], *, confirm: bool = True) -> tuple[Outpoint, ...]:
        """Pay several scripts in one transaction of the faucet, in this order. Raises WrongUsage when the faucet is dry."""
        async with self._one_miner:
            entry = self._pour(outputs)
            if confirm:
                await self._extend_slowly(self._build(self._active[-1], None, [entry]))
            else:
                try:
                    self._accept(entry.raw, ())
                except _Refused as no:
                    raise WrongUsage(f"the faucet's payment was refused: {no.reason}") from no
            return tuple(Outpoint(entry.txid, n) for n in range(len(outputs)))

    async def evict(self, txid: Txid) -> tuple[Txid, ...]:
        """Throw a transaction and its descendants out of the mempool; answers what went."""
        if txid not in self._pool.txs:
            return ()
        return self._remove([txid])

    async def spike(self, rate: FeeRate) -> tuple[Txid, ...]:
        """Raise (or lower) the mempool's floor; what pays less, even with its descendants, is evicted and named."""
        self.mempool_min = rate
        gone: list[Txid] = []
        for txid in list(self._pool.txs):
            if txid in self._pool.txs:
                family = [self._pool.txs[t] for t in self._pool.family([txid])]
                own = self._pool.txs[txid]
                alone = own.fee >= rate.fee(4 * own.vsize)
                together = sum(t.fee for t in family) >= rate.fee(4 * sum(t.vsize for t in family))
                if not alone and not together:
                    gone += self._remove([txid])
        return tuple(gone)

    async def skip_time(self, seconds: float) -> None:
        """Let this much more time pass before the next block. A block more than two hours ahead of the clock is refused."""
        self._skip += seconds

    async def submit_block(self, block: LabBlock) -> None:
        """Hand over a block made elsewhere on the active tip. Raises WrongUsage with the kernel's reason."""
        async with self._one_miner:
            await self._extend_slowly(block)

    # ------------------------------------------------------------ mempool

    def _accept(self, raw: bytes, parents: Sequence[bytes]) -> None:
        deferred: dict[Txid, LabTx] = {}
        conflicts: set[Txid] = set()
        for parent in parents:
            try:
                entry, against = self._examine(parent, deferred)
            except _Known:
                continue
            try:
                evicted = self._afford([(entry, against)])
            except _Refused as no:
                if not no.fee:
                    raise
                deferred[entry.txid] = entry
                conflicts |= against
                continue
            self._enter([entry], evicted)
        child, against = self._examine(raw, deferred)
        unused = [txid for txid in deferred if not any(i.outpoint.txid == txid for i in child.tx.inputs)]
        if unused:
            raise _Refused("package-not-child-with-parents")
        package = [*((entry, conflicts) for entry in deferred.values()), (child, against)]
        self._enter([entry for entry, _ in package], self._afford(package))

    def _examine(self, raw: bytes, package: Mapping[Txid, LabTx], *, scripts: bool = True) -> tuple[LabTx, set[Txid]]:
        """Everything but money: the transaction with its prevouts, and the mempool transactions it conflicts with."""
        try:
            entry = _read(raw)
        except PeerMistake as exc:
            raise _Refused("TX decode failed") from exc
        tx = entry.tx
        if entry.txid in self._chain.txs:
            raise _Known("txn-already-known")
        pooled = self._pool.txs.get(entry.txid)
        if pooled is not None:
            same = pooled.wtxid == entry.wtxid
            raise _Known("txn-already-in-mempool" if same else "txn-same-nonwitness-data-in-mempool")
        _check_form(entry)
        tip = self._active[-1]
        if not _is_final(tx, tip.height + 1, tip.median_time):
            raise _Refused("non-final")
        coins: list[_Unspent] = []
        conflicts: set[Txid] = set()
        claimed = {spend.outpoint for other in package.values() for spend in other.tx.inputs}
        for spend in tx.inputs:
            coin = self._coin(spend.outpoint, package)
            if coin is None or spend.outpoint in claimed:
                raise _Refused("bad-txns-inputs-missingorspent")
            coins.append(coin)
            if spend.outpoint in self._pool.spent:
                conflicts.add(self._pool.spent[spend.outpoint])
        if not self._locks_satisfied(tx, coins):
            raise _Refused("non-BIP68-final")
        self._check_amounts(tx, coins)
        entry = replace(entry, prevouts=tuple(coin.txout for coin in coins))
        ancestors = self._pool.ancestors(tx)
        if conflicts & ancestors:
            raise _Refused("bad-txns-spends-conflicting-tx")
        if len(ancestors) + len(package) >= MAX_ANCESTORS:
            raise _Refused(f"too-long-mempool-chain, too many unconfirmed ancestors [limit: {MAX_ANCESTORS}]")
        if scripts:
            self._check_scripts(entry)
        return entry, conflicts

    def _coin(self, outpoint: Outpoint, package: Mapping[Txid, LabTx]) -> _Unspent | None:
        parent = package.get(outpoint.txid) or self._pool.txs.get(outpoint.txid)
        if parent is not None:
            outputs = parent.tx.outputs
            return _Unspent(outputs[outpoint.vout], None, False) if outpoint.vout < len(outputs) else None
        return self._utxo.get(outpoint)

    def _locks_satisfied(self, tx: Tx, coins: Sequence[_Unspent]) -> bool:
        """BIP68, judged for the next block: an unconfirmed coin counts as confirmed in it."""
        if not 2 <= tx.version <= 0xFFFFFFFF:
            return True
        tip = self._active[-1]
        for spend, coin in zip(tx.inputs, coins, strict=True):
            if spend.sequence & SEQUENCE_DISABLED:
                continue
            height = tip.height + 1 if coin.height is None else coin.height
            value = spend.sequence & 0xFFFF
            if spend.sequence & SEQUENCE_TIME:
                if self._active[max(height - 1, 0)].median_time + value * 512 > tip.median_time:
                    return False
            elif height + value > tip.height + 1:
                return False
        return True

    def _check_amounts(self, tx: Tx, coins: Sequence[_Unspent]) -> None:
        for coin in coins:
            if coin.coinbase and coin.height is not None:
                depth = self.height + 1 - coin.height
                if depth < COINBASE_MATURITY:
                    raise _Refused(f"bad-txns-premature-spend-of-coinbase, tried to spend coinbase at depth {depth}")
        paid, spent = sum(out.value for out in tx.outputs), sum(coin.txout.value for coin in coins)
        if spent < paid:
            raise _Refused(f"bad-txns-in-belowout, value in ({_btc(spent)}) < value out ({_btc(paid)})")

    def _check_scripts(self, entry: LabTx) -> None:
        for index, (spend, out) in enumerate(zip(entry.tx.inputs, entry.prevouts, strict=True)):
            if not _is_standard(out.script) or _future_witness(out.script):
                raise _Refused(f"bad-txns-nonstandard-inputs, input {index}")
            if _has_high_s(spend, out):
                raise _Refused(
                    "mempool-script-verify-flag-failed (Non-canonical signature: S value is unnecessarily high), "
                    f"input {index} of {entry.txid}, spending {spend.outpoint}"
                )
        bad = self._kernel.first_bad_input(entry.raw, entry.prevouts)
        if bad is not None:
            raise _Refused(
                f"mempool-script-verify-flag-failed (the script does not hold), input {bad} of {entry.txid}, "
                f"spending {entry.tx.inputs[bad].outpoint}"
            )

    def _afford(self, package: Sequence[tuple[LabTx, set[Txid]]]) -> set[Txid]:
        """Money: relay fee and replacement for a transaction or a package as a whole; answers what it replaces."""
        fee = sum(entry.fee for entry, _ in package)
        size = 4 * sum(entry.vsize for entry, _ in package)
        for rate, name in ((self.mempool_min, "mempool min fee"), (self.min_relay, "min relay fee")):
            if fee < rate.fee(size):
                raise _Refused(f"{name} not met, {fee} < {rate.fee(size)}", fee=True)
        direct = set().union(*(against for _, against in package))
        if not direct:
            return set()
        replaced = self._pool.family(direct)
        last = package[-1][0]
        if len(replaced) > MAX_REPLACED:
            raise _Refused(
                f"too many potential replacements, rejecting replacement {last.txid}; "
                f"too many potential replacements ({len(replaced)} > {MAX_REPLACED})"
            )
        ours = {entry.txid for entry, _ in package}
        known = {spend.outpoint.txid for txid in direct for spend in self._pool.txs[txid].tx.inputs}
        for entry, _ in package:
            for spend in entry.tx.inputs:
                parent = spend.outpoint.txid
                if parent in replaced:
                    raise _Refused("bad-txns-spends-conflicting-tx")
                if parent in self._pool.txs and parent not in known | ours:
                    raise _Refused(
                        f"replacement-adds-unconfirmed, replacement {last.txid} adds unconfirmed input, parent {parent}"
                    )
        no = f"insufficient fee, rejecting replacement {last.txid}"
        for txid in direct:
            old = self._pool.txs[txid]
            if fee * 4 * old.vsize <= old.fee * size:
                new_rate, old_rate = _btc(fee * 4000 // size), _btc(old.fee * 1000 // old.vsize)
                raise _Refused(f"{no}; new feerate {new_rate} BTC/kvB <= old feerate {old_rate} BTC/kvB", fee=True)
        paid = sum(self._pool.txs[txid].fee for txid in replaced)
        if fee < paid:
            raise _Refused(f"{no}, less fees than conflicting txs; {_btc(fee)} < {_btc(paid)}", fee=True)
        relay = self.incremental.fee(size)
        if fee - paid < relay:
            raise _Refused(f"{no}, not enough additional fees to relay; {_btc(fee - paid)} < {_btc(relay)}", fee=True)
        return replaced

    def _enter(self, entries: Sequence[LabTx], replaced: set[Txid]) -> None:
        self._remove(replaced)
        for entry in entries:
            self._pool.add(entry)

    def _remove(self, txids: Iterable[Txid]) -> tuple[Txid, ...]:
        gone = tuple(self._pool.family(txid for txid in txids if txid in self._pool.txs))
        for txid in gone:
            self._pool.remove(txid)
        return gone

    def _refill(self, returned: Sequence[LabTx], drop: frozenset[Txid]) -> None:
        """After a reorganisation: the disconnected transactions return first, then what the mempool held and is still good."""
        waiting = [(entry, True) for entry in returned] + [(entry, False) for entry in self._pool.ordered()]
        self._pool = _Ledger()
        for entry, scripts in waiting:
            if entry.coinbase or entry.txid in drop:
                continue
            try:
                again, conflicts = self._examine(entry.raw, {}, scripts=scripts)
            except (_Known, _Refused):
                continue
            if not conflicts:
                self._pool.add(again)

    # ------------------------------------------------------------ miner

    def _template(self) -> list[LabTx]:
        chosen: list[LabTx] = []
        left = MAX_BLOCK_WEIGHT
        taken: set[Txid] = set()
        for entry in self._pool.ordered():
            parents = {spend.outpoint.txid for spend in entry.tx.inputs} & self._pool.txs.keys()
            if entry.tx.weight <= left and parents <= taken:
                chosen.append(entry)
                taken.add(entry.txid)
                left -= entry.tx.weight
        return chosen

    def _chosen(self, txs: Sequence[Txid | bytes]) -> list[LabTx]:
        wanted: dict[Txid, LabTx] = {}
        for item in txs:
            if isinstance(item, bytes):
                entry = _read(item)
            else:
                found = self.tx(item)
                if found is None:
                    raise WrongUsage(f"the lab knows no transaction {item}")
                entry = found
            family = self._pool.ancestors(entry.tx)
            for parent in self._pool.ordered():
                if parent.txid in family:
                    wanted.setdefault(parent.txid, parent)
            wanted.setdefault(entry.txid, entry)
        return list(wanted.values())

    def _build(self, parent: LabBlock, to: bytes | None, txs: Sequence[LabTx]) -> LabBlock:
        height = parent.height + 1
        made = {entry.txid: entry for entry in txs}
        fees = 0
        for entry in txs:
            spent = [self._known_output(spend.outpoint, made) for spend in entry.tx.inputs]
            if all(out is not None for out in spent):
                fees += sum(out.value for out in spent if out is not None) - sum(o.value for o in entry.tx.outputs)
        self._nonce += 1
        witness_root = _merkle([bytes(32), *(bytes.fromhex(entry.wtxid)[::-1] for entry in txs)])
        commitment = b"\x6a\x24\xaa\x21\xa9\xed" + hash256(witness_root + bytes(32))
        coinbase = _seal(
            Tx(
                2,
                0,
                (
                    TxIn(
                        _NULL,
                        _height_push(height) + b"\x08" + self._nonce.to_bytes(8, "little"),
                        FINAL_SEQUENCE,
                        (bytes(32),),
                    ),
                ),
                (
                    TxOut((SUBSIDY >> (height // HALVING)) + max(fees, 0), to or self.faucet_script),
                    TxOut(0, commitment),
                ),
            )
        )
        entries = (coinbase, *(replace(entry, height=None, block=None, position=0) for entry in txs))
        root = _merkle([bytes.fromhex(entry.txid)[::-1] for entry in entries])
        natural = self._start if parent.height == 0 else parent.time + self._step
        when = max(int(natural + self._skip), parent.median_time + 1)
        head = (0x20000000).to_bytes(4, "little") + bytes.fromhex(parent.hash)[::-1] + root
        head += when.to_bytes(4, "little") + _BITS.to_bytes(4, "little")
        header = _work(head)
        return LabBlock(
            height, hash256(header)[::-1].hex(), parent.hash, header, when, self._median(parent, when), entries
        )

    def _median(self, parent: LabBlock, when: int) -> int:
        times = [when]
        block: LabBlock | None = parent
        while block is not None and len(times) < 11:
            times.append(block.time)
            block = self._blocks.get(block.previous)
        return sorted(times)[len(times) // 2]

    def _known_output(self, outpoint: Outpoint, made: Mapping[Txid, LabTx]) -> TxOut | None:
        entry = made.get(outpoint.txid) or self.tx(outpoint.txid)
        return entry.tx.outputs[outpoint.vout] if entry and outpoint.vout < len(entry.tx.outputs) else None

    def _pour(self, outputs: Sequence[TxOut]) -> LabTx:
        """A signed payment of the faucet, its change last."""
        rate = max(FeeRate(2500), self.mempool_min, self.min_relay)
        wanted = sum(out.value for out in outputs)
        purse = sorted(
            (
                (outpoint, coin.txout)
                for outpoint, coin in self._utxo.items()
                if coin.txout.script == self.faucet_script
                and outpoint not in self._pool.spent
                and (not coin.coinbase or self.height + 1 - (coin.height or 0) >= COINBASE_MATURITY)
            ),
            key=lambda held: (-held[1].value, held[0]),
        )
        public = self._faucet_key.public_key.format()
        code = p2wpkh_script_code(self.faucet_script)
        taken: list[tuple[Outpoint, TxOut]] = []
        for held in purse:
            taken.append(held)
            inputs = tuple(TxIn(outpoint, witness=(bytes(72), public)) for outpoint, _ in taken)
            draft = Tx(2, 0, inputs, (*outputs, TxOut(0, self.faucet_script)))
            change = sum(out.value for _, out in taken) - wanted - rate.fee(draft.weight + 4)
            if change >= dust_limit(self.faucet_script):
                break
        else:
            raise WrongUsage(f"the lab's faucet cannot pay {wanted} sat now: mine 100 more blocks")
        draft = replace(draft, outputs=(*outputs, TxOut(change, self.faucet_script)))
        signed = []
        for index, (outpoint, out) in enumerate(taken):
            digest = sighash_segwit_v0(draft, index, code, out.value)
            signed.append(TxIn(outpoint, witness=(self._faucet_key.sign(digest, hasher=None) + b"\x01", public)))
        return _seal(replace(draft, inputs=tuple(signed)))

    # ------------------------------------------------------------ blocks in and out

    def _remember(self, block: LabBlock) -> LabBlock:
        self._blocks[block.hash] = block
        return block

    async def _extend_slowly(self, block: LabBlock) -> None:
        self._settle(block, *await self._judge(block))

    async def _judge(self, block: LabBlock) -> tuple[list[tuple[str, str]], str]:
        if self._closed:
            raise NotNow("the lab's chain is closed")
        raw = self._remember(block).raw
        if len(raw) <= _BIG:
            return self._kernel.submit(raw)
        return await asyncio.to_thread(self._kernel.submit, raw)

    def _settle(self, block: LabBlock, events: list[tuple[str, str]], reason: str) -> None:
        self._apply(events, frozenset())
        if self._active[-1].hash != block.hash:
            raise WrongUsage(f"the block was refused: {reason}")
        self._skip = 0.0

    def _apply(self, events: Iterable[tuple[str, str]], drop: frozenset[Txid]) -> None:
        returned: list[LabTx] = []
        for kind, hash in events:
            if kind == "connected":
                self._connect(self._blocks[hash])
            else:
                returned = [*self._disconnect(hash), *returned]
        if returned:
            self._refill([entry for entry in returned if entry.txid not in self._chain.txs], drop)

    def _connect(self, block: LabBlock) -> None:
        if block.previous != self._active[-1].hash:
            raise OurMistake("the lab's indexes lost the kernel's chain")
        undo: list[tuple[Outpoint, _Unspent]] = []
        placed = []
        for position, entry in enumerate(block.txs):
            spent: list[TxOut] = []
            if position > 0:
                for spend in entry.tx.inputs:
                    coin = self._utxo.pop(spend.outpoint)
                    undo.append((spend.outpoint, coin))
                    spent.append(coin.txout)
                    rival = self._pool.spent.get(spend.outpoint)
                    if rival is not None and rival != entry.txid:
                        self._remove([rival])
            if entry.txid in self._pool.txs:
                self._pool.remove(entry.txid)
            held = replace(entry, prevouts=tuple(spent), height=block.height, block=block.hash, position=position)
            self._chain.add(held)
            placed.append(held)
            for vout, out in enumerate(entry.tx.outputs):
                if not out.script.startswith(b"\x6a"):
                    self._utxo[Outpoint(entry.txid, vout)] = _Unspent(out, block.height, position == 0)
        self._chain.spent.pop(_NULL, None)
        self._undo[block.hash] = undo
        self._active.append(self._remember(replace(block, txs=tuple(placed))))

    def _disconnect(self, hash: str) -> list[LabTx]:
        block = self._active.pop()
        if block.hash != hash:
            raise OurMistake("the lab's indexes lost the kernel's chain")
        for entry in reversed(block.txs):
            self._chain.remove(entry.txid)
            for vout in range(len(entry.tx.outputs)):
                self._utxo.pop(Outpoint(entry.txid, vout), None)
        for outpoint, coin in reversed(self._undo.pop(hash)):
            # What the same block created is gone with it.
            if outpoint.txid in self._chain.txs:
                self._utxo[outpoint] = coin
        return list(block.txs)

    # ------------------------------------------------------------ small things

    def _answer(self) -> None:
        if self._closed:
            raise NotNow("the lab's chain is closed")
        if self.offline:
            raise NotNow("the lab's chain does not answer: it was switched off", after=1.0)

    def _tip(self) -> Tip:
        block = self._active[-1]
        return Tip(block.height, block.hash, float(block.median_time))

    def _entry(self, txid: Txid) -> LabTx:
        return self._chain.txs.get(txid) or self._pool.txs[txid]

    def _estimate(self, blocks: int) -> FeeRate:
        targets = sorted(self.estimates)
        if not targets:
            raise NotNow("the lab's chain has no fee estimate")
        fitting = [target for target in targets if target <= blocks] or targets[:1]
        return max(self.estimates[fitting[-1]], self.mempool_min, self.min_relay)


# ---------------------------------------------------------------- bytes and rules


def _seal(tx: Tx) -> LabTx:
    raw = tx.raw
    return LabTx(tx.txid, hash256(raw)[::-1].hex(), tx, raw)


def _read(raw: bytes) -> LabTx:
    tx = Tx.parse(raw)
    if not tx.inputs:
        raise PeerMistake("a transaction without inputs")
    return LabTx(tx.txid, hash256(raw)[::-1].hex(), tx, raw)


def _place(entry: LabTx) -> tuple[int, int, str]:
    """Where a transaction stands: by height and place, the mempool after every block."""
    return (1 << 62 if entry.height is None else entry.height, entry.position, entry.txid)


def _merkle(leaves: Sequence[bytes]) -> bytes:
    row = list(leaves)
    while len(row) > 1:
        if len(row) % 2:
            row.append(row[-1])
        row = [hash256(row[n] + row[n + 1]) for n in range(0, len(row), 2)]
    return row[0]


def _height_push(height: int) -> bytes:
    """The coinbase's first push (BIP34)."""
    if height <= 16:
        return bytes([0x50 + height])
    number = height.to_bytes((height.bit_length() + 8) // 8, "little")  # one bit to spare for the sign
    return bytes([len(number)]) + number


def _work(head: bytes) -> bytes:
    for nonce in range(1 << 32):
        header = head + nonce.to_bytes(4, "little")
        if int.from_bytes(hash256(header), "little") <= _TARGET:
            return header
    raise OurMistake("no nonce solves the block")


def _is_final(tx: Tx, height: int, median_time: int) -> bool:
    """BIP113: may it stand in the next block?"""
    limit = height if tx.locktime < LOCKTIME_THRESHOLD else median_time
    return tx.locktime == 0 or tx.locktime < limit or all(spend.sequence == FINAL_SEQUENCE for spend in tx.inputs)


def _check_form(entry: LabTx) -> None:
    """What can be said without a chain: bitcoind's CheckTransaction and IsStandardTx."""
    reason = _malformed(entry) or _nonstandard(entry.tx)
    if reason:
        raise _Refused(reason)


def _malformed(entry: LabTx) -> str | None:
    tx = entry.tx
    values = [out.value for out in tx.outputs]
    rules = (
        (not values, "bad-txns-vout-empty"),
        (any(value > MAX_MONEY for value in values), "bad-txns-vout-toolarge"),
        (sum(values) > MAX_MONEY, "bad-txns-txouttotal-toolarge"),
        (len({spend.outpoint for spend in tx.inputs}) != len(tx.inputs), "bad-txns-inputs-duplicate"),
        (entry.coinbase, "coinbase"),
    )
    return next((reason for broken, reason in rules if broken), None)


def _nonstandard(tx: Tx) -> str | None:
    rules = (
        (tx.version not in (1, 2, 3), "version"),
        (tx.weight > MAX_TX_WEIGHT, "tx-size"),
        (any(len(spend.script_sig) > 1650 for spend in tx.inputs), "scriptsig-size"),
        (any(script_pushes(spend.script_sig) is None for spend in tx.inputs), "scriptsig-not-pushonly"),
        (not all(_is_standard(out.script) for out in tx.outputs), "scriptpubkey"),
        (any(out.value < dust_limit(out.script) for out in tx.outputs), "dust"),
        (len(tx.legacy) < 65, "tx-size-small"),
    )
    return next((reason for broken, reason in rules if broken), None)


def _future_witness(script: bytes) -> bool:
    """A witness program that nobody can guard yet; pay-to-anchor is spendable."""
    return is_witness_program(script) and kind_of(script) is ScriptKind.OTHER and script != b"\x51\x02\x4e\x73"


def _is_standard(script: bytes) -> bool:
    if kind_of(script) is not ScriptKind.OTHER:
        return True
    if script.startswith(b"\x6a"):
        return script_pushes(script[1:]) is not None
    if len(script) in (35, 67) and script[0] == len(script) - 2 and script[-1] == 0xAC:
        return True
    return is_witness_program(script) and script[0] != 0


def _has_high_s(spend: TxIn, out: TxOut) -> bool:
    """Whether the signature of a single-key input has the malleable high S, which policy refuses and consensus does not."""
    stack: Sequence[bytes] = spend.witness
    if kind_of(out.script) is ScriptKind.P2PKH:
        stack = script_pushes(spend.script_sig) or ()
    elif kind_of(out.script) is ScriptKind.P2TR:
        return False
    if len(stack) != 2 or len(stack[0]) < 9 or stack[0][0] != 0x30:
        return False
    der = stack[0]
    start = 4 + der[3] + 2
    return int.from_bytes(der[start:-1], "big") > _ORDER // 2
