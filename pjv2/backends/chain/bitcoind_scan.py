"""Reading a Core node's blocks and mempool for what it keeps no index of: spends of foreign coins, payments to foreign scripts.

`Blocks` remembers, for each thing that was ever looked for, up to which block it was looked for, and what was found. A block is
fetched once for everything that is looked for at the time. `Mempool` keeps an index by script, made only where somebody asks.

It refuses blocks that do not join the ones before (`Moved`: the chain was reorganised meanwhile), and a pruned node that no longer
has a block that must be read.

Law: what is remembered about a block is forgotten when that block leaves the chain; memory is bounded by what is looked for.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections import OrderedDict
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

from pjv2.backends.bitcoind_rpc import (
    MISC_ERROR,
    NOT_FOUND,
    BitcoindRpc,
    Call,
    Refused,
    hash_of,
    items,
    raw_of,
)
from pjv2.errors import NotNow
from pjv2.psbt.tx import hash256
from pjv2.session.facts import Tip
from pjv2.units import Outpoint, Txid

Wanted: TypeAlias = Txid | Outpoint | bytes
"""A transaction id, an output whose spend is looked for, or a script."""

MAX_WANTED = 100_000
MAX_BLOCKS = 20_000
"""Hashes of scanned blocks that are remembered, about four months."""

_HASHES_AT_ONCE = 500
_BLOCKS_AT_ONCE = 8
_FETCHED_AT_ONCE = 500
_LARGE = 100_000
"""Bytes of a block from which on it is read in another thread."""


class Moved(Exception):
    """The chain was reorganised while it was read; it does not leave this package."""


@dataclass(frozen=True, slots=True)
class Skimmed:
    """A transaction as it lies in a block: what it spends (36 bytes each), what it pays, and its bytes."""

    txid: Txid
    spends: tuple[bytes, ...]
    scripts: tuple[bytes, ...]
    raw: bytes = field(repr=False)


@dataclass(frozen=True, slots=True)
class Mined:
    """A transaction that was found in a block."""

    txid: Txid
    raw: bytes = field(repr=False)
    height: int


@dataclass(slots=True)
class _Search:
    """What is known about a wanted thing: every block in `since` .. `through` was read for it."""

    since: int
    through: int
    found: dict[Txid, Mined] = field(default_factory=dict)


# ---------------------------------------------------------------- bytes


def skim_block(raw: bytes) -> tuple[str, Iterator[Skimmed]]:
    """The previous block's hash, and the transactions. Raises ValueError for what is no block."""
    if len(raw) < 81:
        raise ValueError("no block")
    return raw[4:36][::-1].hex(), _skim_all(raw)


def _skim_all(raw: bytes) -> Iterator[Skimmed]:
    count, at = _count(raw, 80)
    for _ in range(count):
        tx, at = _skim(raw, at)
        yield tx
    if at != len(raw):
        raise ValueError("a block with something behind it")


def skim_hex(told: object) -> Skimmed:
    """One transaction in hex. Raises ValueError, TypeError."""
    raw = raw_of(told)
    tx, at = _skim(raw, 0)
    if at != len(raw):
        raise ValueError("a transaction with something behind it")
    return tx


def _skim(raw: bytes, start: int) -> tuple[Skimmed, int]:
    body = start + 4
    witness = raw[body : body + 2] == b"\x00\x01"
    if witness:
        body += 2
    count, at = _count(raw, body)
    spends = []
    for _ in range(count):
        spends.append(raw[at : at + 36])
        size, at = _count(raw, at + 36)
        at += size + 4
    count, at = _count(raw, at)
    scripts = []
    for _ in range(count):
        size, at = _count(raw, at + 8)
        scripts.append(raw[at : at + size])
        at += size
    end = at
    if witness:
        for _ in spends:
            count, at = _count(raw, at)
            for _ in range(count):
                size, at = _count(raw, at)
                at += size
    if at + 4 > len(raw):
        raise ValueError("a transaction that is cut short")
    txid = hash256(raw[start : start + 4] + raw[body:end] + raw[at : at + 4])[::-1].hex()
    return Skimmed(txid, tuple(spends), tuple(scripts), raw[start : at + 4]), at + 4


def _count(raw: bytes, at: int) -> tuple[int, int]:
    if at >= len(raw):
        raise ValueError("a block that is cut short")
    first = raw[at]
    if first < 0xFD:
        return first, at + 1
    width = 1 << (first - 0xFC)
    return int.from_bytes(raw[at + 1 : at + 1 + width], "little"), at + 1 + width


def _spent_bytes(outpoint: Outpoint) -> bytes:
    return bytes.fromhex(outpoint.txid)[::-1] + outpoint.vout.to_bytes(4, "little")


# ---------------------------------------------------------------- blocks


class Blocks:
    """What was found in blocks. One reader at a time; whoever waits for him is served by what he reads."""

    def __init__(self, rpc: BitcoindRpc) -> None:
        self._rpc = rpc
        self._searches: OrderedDict[Wanted, _Search] = OrderedDict()
        self._hashes: dict[int, str] = {}
        self._pruned = -1
        self.read = 0
        """Blocks that were fetched so far."""
        self._reading = asyncio.Lock()

    def __repr__(self) -> str:
        return f"Blocks({len(self._searches)} things, {len(self._hashes)} blocks)"

    async def find(self, wanted: Collection[Wanted], since: int, tip: Tip) -> dict[Wanted, tuple[Mined, ...]]:
        """What every one of these is in, in blocks from `since` to `tip`. Raises Moved, NotNow (pruned), CannotRead."""
        since = max(0, min(since, tip.height + 1))
        for one in wanted:
            known = self._searches.get(one)
            if known is None or known.since > since:
                self._searches[one] = _Search(since, since - 1)
            self._searches.move_to_end(one)
        async with self._reading:
            await self._read(tip)
            if not self._searches.keys() >= set(wanted):
                if since > self._pruned:
                    raise Moved  # dropped to make room for others: it is looked for again
                raise NotNow(
                    f"{self._rpc.name} has pruned block {max(since, 0)}, which a session still needs: "
                    "set prune= higher or 0, or name another [chain]",
                    after=600.0,
                )
            found = {one: tuple(self._searches[one].found.values()) for one in wanted}
        while len(self._searches) > max(MAX_WANTED, len(wanted)):
            self._searches.popitem(last=False)
        return found

    async def _read(self, tip: Tip) -> None:
        """Bring every search up to `tip`."""
        if self._hashes.get(tip.height) != tip.hash or max(self._hashes) != tip.height:
            await self._forget_lost(tip)
        start = min((search.through + 1 for search in self._searches.values()), default=tip.height + 1)
        while start <= tip.height:
            heights = range(start, min(start + _HASHES_AT_ONCE, tip.height + 1))
            told = await self._told([Call("getblockhash", (height,)) for height in heights])
            hashes = [self._rpc.read("getblockhash", hash_of, one) for one in told]
            if heights[-1] == tip.height and hashes[-1] != tip.hash:
                raise Moved
            for at in range(0, len(hashes), _BLOCKS_AT_ONCE):
                await self._scan(heights[at : at + _BLOCKS_AT_ONCE], hashes[at : at + _BLOCKS_AT_ONCE])
            start = heights[-1] + 1

    async def _forget_lost(self, tip: Tip) -> None:
        """Drop what was learned from blocks that are not below `tip`."""
        known = sorted((height for height in self._hashes if height <= tip.height), reverse=True)
        fork, at, step = -1, 0, 1
        while at < len(known) and fork < 0:
            part = known[at : at + step]
            told = await self._told([Call("getblockhash", (height,)) for height in part])
            # Of the first that is still there, everything below is still there as well.
            fork = next((height for height, one in zip(part, told, strict=True) if one == self._hashes[height]), -1)
            at, step = at + step, min(4 * step, _HASHES_AT_ONCE)
        for height in [height for height in self._hashes if height > fork]:
            del self._hashes[height]
        for search in self._searches.values():
            search.through = max(min(search.through, fork), search.since - 1)
            search.found = {txid: mined for txid, mined in search.found.items() if mined.height <= fork}

    async def _scan(self, heights: Sequence[int], hashes: Sequence[str]) -> None:
        if all(search.through >= heights[-1] for search in self._searches.values()):
            return
        told = await self._told([Call("getblock", (one, 0)) for one in hashes])
        for height, hash, one in zip(heights, hashes, told, strict=True):
            if isinstance(one, Refused):
                self._drop_behind(height)
                continue
            raw = self._rpc.read("getblock", raw_of, one)
            self.read += 1
            if hash256(raw[:80])[::-1].hex() != hash or self._hashes.get(height - 1) not in (
                None,
                raw[4:36][::-1].hex(),
            ):
                raise Moved
            behind = {thing: search for thing, search in self._searches.items() if search.through == height - 1}
            if len(raw) >= _LARGE:
                hits = await asyncio.to_thread(self._rpc.read, "getblock", _matches, raw, height, tuple(behind))
            else:
                hits = self._rpc.read("getblock", _matches, raw, height, tuple(behind))
            for thing, search in behind.items():
                for mined in hits.get(thing, ()):
                    search.found[mined.txid] = mined
                search.through = height
            self._hashes[height] = hash
        while len(self._hashes) > MAX_BLOCKS:
            del self._hashes[min(self._hashes)]

    def _drop_behind(self, height: int) -> None:
        """Block `height` is pruned: what had to be looked for in it cannot be answered. Others' searches go on."""
        self._pruned = max(self._pruned, height)
        for one in [one for one, search in self._searches.items() if search.through < height]:
            del self._searches[one]

    async def _told(self, calls: Sequence[Call]) -> list[object]:
        answers = await self._rpc.ask(*calls)
        for call, answer in zip(calls, answers, strict=True):
            if not isinstance(answer, Refused) or (call.method == "getblock" and answer.code == MISC_ERROR):
                continue  # the latter is a pruned block
            if answer.code == NOT_FOUND or call.method == "getblockhash":
                raise Moved
            raise self._rpc.refusal(call.method, answer)
        return answers


def _matches(raw: bytes, height: int, wanted: Iterable[Wanted]) -> dict[Wanted, list[Mined]]:
    """Which transactions of a block belong to which wanted thing."""
    txids: set[Txid] = set()
    spends: dict[bytes, Outpoint] = {}
    scripts: set[bytes] = set()
    for one in wanted:
        if isinstance(one, Outpoint):
            spends[_spent_bytes(one)] = one
        elif isinstance(one, bytes):
            scripts.add(one)
        else:
            txids.add(one)
    hits: dict[Wanted, list[Mined]] = {}
    for tx in skim_block(raw)[1]:
        things: set[Wanted] = {spends[spent] for spent in tx.spends if spent in spends}
        things.update(scripts.intersection(tx.scripts))
        if tx.txid in txids:
            things.add(tx.txid)
        for thing in things:
            hits.setdefault(thing, []).append(Mined(tx.txid, tx.raw, height))
    return hits


# ---------------------------------------------------------------- mempool


class Mempool:
    """The mempool by the scripts it pays, brought up to date by each question. Reading it all for the first time takes a while."""

    def __init__(self, rpc: BitcoindRpc) -> None:
        self._rpc = rpc
        self._scripts: dict[Txid, tuple[bytes, ...]] = {}
        self._paying: dict[bytes, set[Txid]] = {}
        self._reading = asyncio.Lock()

    def __repr__(self) -> str:
        return f"Mempool({len(self._scripts)} transactions)"

    async def paying(self, scripts: Collection[bytes]) -> frozenset[Txid]:
        """Transactions of the mempool that pay one of these. Raises NotNow, CannotRead."""
        async with self._reading:
            (told,) = await self._rpc.ask(Call("getrawmempool"))
            listed = self._rpc.read("getrawmempool", _txids, self._rpc.told("getrawmempool", told))
            for txid in self._scripts.keys() - listed:
                self._drop(txid)
            fresh = sorted(listed - self._scripts.keys())
            for at in range(0, len(fresh), _FETCHED_AT_ONCE):
                part = fresh[at : at + _FETCHED_AT_ONCE]
                answers = await self._rpc.ask(*(Call("getrawtransaction", (txid,)) for txid in part))
                for txid, answer in zip(part, answers, strict=True):
                    if not isinstance(answer, Refused):  # gone meanwhile
                        self._take(txid, self._rpc.read("getrawtransaction", skim_hex, answer))
            return frozenset().union(*(self._paying.get(_digest(script), ()) for script in scripts))

    def _take(self, txid: Txid, tx: Skimmed) -> None:
        digests = tuple({_digest(script) for script in tx.scripts})
        self._scripts[txid] = digests
        for digest in digests:
            self._paying.setdefault(digest, set()).add(txid)

    def _drop(self, txid: Txid) -> None:
        for digest in self._scripts.pop(txid):
            paying = self._paying[digest]
            paying.discard(txid)
            if not paying:
                del self._paying[digest]


def _txids(told: object) -> frozenset[Txid]:
    return frozenset(hash_of(one) for one in items(told))


def _digest(script: bytes) -> bytes:
    return hashlib.blake2b(script, digest_size=8).digest()
