"""Transactions and blocks as the lab holds them, and the indexes of the active chain.

It judges nothing: what is connected was judged by the kernel, what is in the mempool by its policy.

Law: the active chain changes by `connect` and `disconnect` alone, a block at a time and only at its tip.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace

from pjv2.errors import OurMistake, PeerMistake
from pjv2.psbt.tx import Tx, TxOut, hash256, varint
from pjv2.units import Outpoint, Sats, Txid, Weight

COINBASE_MATURITY = 100
FINAL_SEQUENCE = 0xFFFFFFFF
NULL = Outpoint("0" * 64, 0xFFFFFFFF)
"""What a coinbase spends."""


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
        return self.tx.inputs[0].outpoint == NULL

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
class Unspent:
    txout: TxOut
    height: int | None
    coinbase: bool


class Ledger:
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


class ActiveChain:
    """The blocks of the active chain with what they spend and leave unspent, and every block ever seen by its hash."""

    def __init__(self) -> None:
        self.ledger = Ledger()
        self.unspent: dict[Outpoint, Unspent] = {}
        self.blocks: list[LabBlock] = []
        self.seen: dict[str, LabBlock] = {}
        self._undo: dict[str, list[tuple[Outpoint, Unspent]]] = {}

    @property
    def tip(self) -> LabBlock:
        return self.blocks[-1]

    @property
    def height(self) -> int:
        return self.tip.height

    def begin(self, genesis: LabBlock) -> None:
        """Its coinbase cannot be spent: it is in no index."""
        self.blocks.append(self.remember(genesis))

    def remember(self, block: LabBlock) -> LabBlock:
        self.seen[block.hash] = block
        return block

    def connect(self, block: LabBlock) -> None:
        """Put a judged block on the tip. Raises OurMistake when it does not belong there."""
        if block.previous != self.tip.hash:
            raise OurMistake("the lab's indexes lost the kernel's chain")
        undo: list[tuple[Outpoint, Unspent]] = []
        placed = []
        for position, entry in enumerate(block.txs):
            spent: list[TxOut] = []
            if position > 0:
                for spend in entry.tx.inputs:
                    coin = self.unspent.pop(spend.outpoint)
                    undo.append((spend.outpoint, coin))
                    spent.append(coin.txout)
            held = replace(entry, prevouts=tuple(spent), height=block.height, block=block.hash, position=position)
            self.ledger.add(held)
            placed.append(held)
            for vout, out in enumerate(entry.tx.outputs):
                if not out.script.startswith(b"\x6a"):
                    self.unspent[Outpoint(entry.txid, vout)] = Unspent(out, block.height, position == 0)
        self.ledger.spent.pop(NULL, None)
        self._undo[block.hash] = undo
        self.blocks.append(self.remember(replace(block, txs=tuple(placed))))

    def disconnect(self, hash: str) -> list[LabTx]:
        """Take the tip away; answers its transactions. Raises OurMistake when the tip is another block."""
        block = self.blocks.pop()
        if block.hash != hash:
            raise OurMistake("the lab's indexes lost the kernel's chain")
        for entry in reversed(block.txs):
            self.ledger.remove(entry.txid)
            for vout in range(len(entry.tx.outputs)):
                self.unspent.pop(Outpoint(entry.txid, vout), None)
        for outpoint, coin in reversed(self._undo.pop(hash)):
            # What the same block created is gone with it.
            if outpoint.txid in self.ledger.txs:
                self.unspent[outpoint] = coin
        return list(block.txs)


def seal(tx: Tx) -> LabTx:
    """A transaction of our own making, as the lab holds it."""
    raw = tx.raw
    return LabTx(tx.txid, hash256(raw)[::-1].hex(), tx, raw)


def read_tx(raw: bytes) -> LabTx:
    """A transaction from outside. Raises PeerMistake."""
    tx = Tx.parse(raw)
    if not tx.inputs:
        raise PeerMistake("a transaction without inputs")
    return LabTx(tx.txid, hash256(raw)[::-1].hex(), tx, raw)


def place(entry: LabTx) -> tuple[int, int, str]:
    """Where a transaction stands: by height and place, the mempool after every block."""
    return (1 << 62 if entry.height is None else entry.height, entry.position, entry.txid)
