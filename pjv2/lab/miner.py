"""The lab's miner and its faucet: which transactions go into the next block, the block with its work, and who pays for coins.

It builds what it is told, valid or not: whether a block holds is for the kernel to say.

Law: two miners with the same start and step build the same blocks; the nonce, not the clock or chance, tells coinbases apart.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import replace

from coincurve import PrivateKey

from pjv2.errors import OurMistake, WrongUsage
from pjv2.lab.ledger import COINBASE_MATURITY, FINAL_SEQUENCE, NULL, ActiveChain, LabBlock, LabTx, read_tx, seal
from pjv2.lab.mempool import Mempool
from pjv2.psbt.scripts import p2wpkh_script, p2wpkh_script_code, sighash_segwit_v0
from pjv2.psbt.tx import Tx, TxIn, TxOut, dust_limit, hash256
from pjv2.units import FeeRate, Outpoint, Sats, Txid, Weight

SUBSIDY: Sats = 50 * 100_000_000
HALVING = 150
"""Blocks between two halvings on regtest."""

MAX_BLOCK_WEIGHT: Weight = 3_996_000
_BITS = 0x207FFFFF
_TARGET = 0x7FFFFF << 232


class Miner:
    """Builds blocks from a mempool, and payments from the coins of its own script.

    `nonce` tells coinbases apart, `skip` is time that passes before the next block, in seconds.
    """

    def __init__(self, active: ActiveChain, pool: Mempool, start: int, step: int) -> None:
        self.nonce = 0
        self.skip = 0.0
        self._active = active
        self._pool = pool
        self._start = start
        self._step = step
        self._key = PrivateKey(hashlib.sha256(b"pjv2 lab faucet").digest())
        self.script = p2wpkh_script(self._key.public_key.format())

    def template(self) -> list[LabTx]:
        """The whole mempool, as far as a block holds it."""
        chosen: list[LabTx] = []
        left = MAX_BLOCK_WEIGHT
        taken: set[Txid] = set()
        for entry in self._pool.ledger.ordered():
            parents = {spend.outpoint.txid for spend in entry.tx.inputs} & self._pool.ledger.txs.keys()
            if entry.tx.weight <= left and parents <= taken:
                chosen.append(entry)
                taken.add(entry.txid)
                left -= entry.tx.weight
        return chosen

    def chosen(self, txs: Sequence[Txid | bytes]) -> list[LabTx]:
        """These, by txid or as raw transactions, after their unconfirmed parents. Raises WrongUsage for a txid that is unknown."""
        wanted: dict[Txid, LabTx] = {}
        for item in txs:
            if isinstance(item, bytes):
                entry = read_tx(item)
            else:
                found = self._pool.find(item)
                if found is None:
                    raise WrongUsage(f"the lab knows no transaction {item}")
                entry = found
            family = self._pool.ledger.ancestors(entry.tx)
            for parent in self._pool.ledger.ordered():
                if parent.txid in family:
                    wanted.setdefault(parent.txid, parent)
            wanted.setdefault(entry.txid, entry)
        return list(wanted.values())

    def build(self, parent: LabBlock, to: bytes | None, txs: Sequence[LabTx]) -> LabBlock:
        """A block with its work on `parent`; subsidy and fees go to the script `to` (None: the faucet)."""
        height = parent.height + 1
        made = {entry.txid: entry for entry in txs}
        fees = 0
        for entry in txs:
            spent = [self._known_output(spend.outpoint, made) for spend in entry.tx.inputs]
            if all(out is not None for out in spent):
                fees += sum(out.value for out in spent if out is not None) - sum(o.value for o in entry.tx.outputs)
        self.nonce += 1
        witness_root = _merkle([bytes(32), *(bytes.fromhex(entry.wtxid)[::-1] for entry in txs)])
        commitment = b"\x6a\x24\xaa\x21\xa9\xed" + hash256(witness_root + bytes(32))
        coinbase = seal(
            Tx(
                2,
                0,
                (
                    TxIn(
                        NULL,
                        _height_push(height) + b"\x08" + self.nonce.to_bytes(8, "little"),
                        FINAL_SEQUENCE,
                        (bytes(32),),
                    ),
                ),
                (
                    TxOut((SUBSIDY >> (height // HALVING)) + max(fees, 0), to or self.script),
                    TxOut(0, commitment),
                ),
            )
        )
        entries = (coinbase, *(replace(entry, height=None, block=None, position=0) for entry in txs))
        root = _merkle([bytes.fromhex(entry.txid)[::-1] for entry in entries])
        natural = self._start if parent.height == 0 else parent.time + self._step
        when = max(int(natural + self.skip), parent.median_time + 1)
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
            block = self._active.seen.get(block.previous)
        return sorted(times)[len(times) // 2]

    def _known_output(self, outpoint: Outpoint, made: Mapping[Txid, LabTx]) -> TxOut | None:
        entry = made.get(outpoint.txid) or self._pool.find(outpoint.txid)
        return entry.tx.outputs[outpoint.vout] if entry and outpoint.vout < len(entry.tx.outputs) else None

    def pour(self, outputs: Sequence[TxOut]) -> LabTx:
        """A signed payment of the faucet, its change last."""
        rate = max(FeeRate(2500), self._pool.minimum, self._pool.min_relay)
        wanted = sum(out.value for out in outputs)
        purse = sorted(
            (
                (outpoint, coin.txout)
                for outpoint, coin in self._active.unspent.items()
                if coin.txout.script == self.script
                and outpoint not in self._pool.ledger.spent
                and (not coin.coinbase or self._active.height + 1 - (coin.height or 0) >= COINBASE_MATURITY)
            ),
            key=lambda held: (-held[1].value, held[0]),
        )
        public = self._key.public_key.format()
        code = p2wpkh_script_code(self.script)
        taken: list[tuple[Outpoint, TxOut]] = []
        for held in purse:
            taken.append(held)
            inputs = tuple(TxIn(outpoint, witness=(bytes(72), public)) for outpoint, _ in taken)
            draft = Tx(2, 0, inputs, (*outputs, TxOut(0, self.script)))
            change = sum(out.value for _, out in taken) - wanted - rate.fee(draft.weight + 4)
            if change >= dust_limit(self.script):
                break
        else:
            raise WrongUsage(f"the lab's faucet cannot pay {wanted} sat now: mine 100 more blocks")
        draft = replace(draft, outputs=(*outputs, TxOut(change, self.script)))
        signed = []
        for index, (outpoint, out) in enumerate(taken):
            digest = sighash_segwit_v0(draft, index, code, out.value)
            signed.append(TxIn(outpoint, witness=(self._key.sign(digest, hasher=None) + b"\x01", public)))
        return seal(replace(draft, inputs=tuple(signed)))


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
