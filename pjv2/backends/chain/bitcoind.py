"""A Bitcoin Core node as `ports.Chain`: its own verdicts, its own fees, and what it keeps no index of read from its blocks.

No `txindex` is needed. Coins come from `gettxout`, spends in the mempool from `gettxspendingprevout`, the wallet's own payments
from the wallet that the URL names, if it names one. What none of them tells (a foreign spend in a block, a payment to a script of
another wallet) is read out of blocks from the session's start on, each once. With `txindex=1` transaction ids need no block.

```
view ─► one batch: tip, rates, txids, gettxout, gettxspendingprevout, wallet ─► (what was found, raw) ─► (blocks, for what was not)
facts of an Original: testmempoolaccept, gettxout, gettxspendingprevout, tip and rate travel in one request
```

It refuses another network, a node older than 29, one that is still downloading blocks, and one that pruned what it is asked about.

Law: an answer is for one moment: when the tip moves while it is gathered, it is gathered again.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from decimal import Decimal
from typing import Any, TypeVar

from pjv2.backends.bitcoind_rpc import (
    NO_METHOD,
    BitcoindRpc,
    Call,
    Refused,
    hash_of,
    items,
    place_of,
    rate_of,
    raw_of,
    text,
    txout_of,
    whole,
)
from pjv2.backends.chain.bitcoind_scan import Blocks, Mempool, Mined, Moved, Wanted
from pjv2.errors import NotNow, PeerMistake, WrongUsage
from pjv2.psbt.original import Prevout, Suitability
from pjv2.psbt.tx import Tx, script_to_address
from pjv2.session.facts import BroadcastResult, ChainTx, ChainView, Tip
from pjv2.units import FeeRate, Network, Outpoint, Txid

T = TypeVar("T")

DEFAULT_FLOOR = FeeRate(250)
"""1 sat/vB: where a node has no estimate yet."""

MAX_TARGET = 1_008
SETTLED = 100
"""Blocks below which no reorganisation is expected: the time of a block at a height is remembered from there on."""

MAX_REMEMBERED = 20_000
_ANYTHING_BURNED = "21000000"
_IN_MEMPOOL = frozenset({"txn-already-in-mempool", "txn-already-known", "txn-same-nonwitness-data-in-mempool"})
_SPENT = ("missing-inputs", "missingorspent")
_ALREADY_THERE = -27
_REJECTED = (-22, -25, -26)


@dataclass(frozen=True, slots=True)
class _Coin:
    """An output that was seen unspent in the chain or the mempool, and at which tip."""

    prevout: Prevout
    at: int


@dataclass(slots=True)
class _Sight:
    """What one look found: transactions with their heights, and what is still to be looked for in blocks."""

    found: dict[Txid, tuple[bytes, int | None]] = field(default_factory=dict)
    wanted: set[Wanted] = field(default_factory=set)


class BitcoindChain:
    """The chain as `rpc`'s node has it. No question is asked before the first use. Every refusal is NotNow, but for a node of
    another network or an old one (WrongUsage), and answers that are not understood (CannotRead)."""

    def __init__(self, rpc: BitcoindRpc) -> None:
        self._rpc = rpc
        self._blocks = Blocks(rpc)
        self._mempool = Mempool(rpc)
        self._seen: OrderedDict[Outpoint, _Coin] = OrderedDict()
        self._times: dict[int, float] = {}
        self._indexed = False
        self._epoch = -1

    def __repr__(self) -> str:
        return f"BitcoindChain({self._rpc.name}, {self._rpc.network})"

    # ------------------------------------------------------------ ports.Chain

    async def genesis_hash(self) -> str:
        await self._ready()
        (found,) = await self._told(Call("getblockhash", (0,)))
        return self._rpc.read("getblockhash", hash_of, found)

    async def tip(self) -> Tip:
        await self._ready()
        (info,) = await self._told(_INFO)
        return self._tip(info)

    async def test(self, tx: bytes) -> Suitability:
        """The node's own verdict, by its own policy."""
        try:
            parsed = Tx.parse(tx)
        except PeerMistake as exc:
            return Suitability("refused", str(exc))
        await self._ready()
        told, info = await self._ask(Call("testmempoolaccept", ([tx.hex()],)), _INFO)
        self._tip(self._rpc.told("getblockchaininfo", info))
        if isinstance(told, Refused) and told.code in _REJECTED:
            return Suitability("refused", told.message)
        allowed, reason = self._rpc.read("testmempoolaccept", _verdict, self._rpc.told("testmempoolaccept", told))
        if allowed:
            return Suitability("accepted")
        if reason in _IN_MEMPOOL or (any(word in reason for word in _SPENT) and await self._has(parsed.txid)):
            return Suitability("known", reason)
        return Suitability("refused", reason)

    async def prevouts(self, outpoints: Sequence[Outpoint]) -> Mapping[Outpoint, Prevout]:
        """Outputs of the UTXO set and the mempool, and spent ones that this object saw unspent before. One round trip for
        confirmed ones whose blocks are known, two more for the times of their blocks, one for spent unconfirmed parents."""
        await self._ready()
        return await self._settled(lambda: self._prevouts(tuple(dict.fromkeys(outpoints))))

    async def view(
        self, txids: frozenset[Txid], outpoints: frozenset[Outpoint], scripts: frozenset[bytes], since: int
    ) -> ChainView:
        """Everything watched, in chain order, the mempool last; what the node has no index of is read from height `since` on."""
        await self._ready()
        return await self._settled(lambda: self._view(txids, outpoints, scripts, since))

    async def broadcast(self, tx: bytes, *, parents: Sequence[bytes] = ()) -> BroadcastResult:
        """Hand over a transaction, its parents first; parents that are refused alone go with it as a package."""
        try:
            child = Tx.parse(tx)
            before = [Tx.parse(raw) for raw in parents]
        except PeerMistake as exc:
            return BroadcastResult("refused", str(exc))
        await self._ready()
        (there,) = await self._ask(Call("getmempoolentry", (child.txid,)))
        if not isinstance(there, Refused):
            return BroadcastResult("known", "it is in the mempool")
        held = [parent for parent in before if await self._submit(parent.raw) not in (None, *_IN_MEMPOOL)]
        reason = await (self._submit_package([*held, child]) if held else self._submit(tx))
        if reason is None:
            return BroadcastResult("accepted")
        if reason in _IN_MEMPOOL or await self._has(child.txid):
            return BroadcastResult("known", reason)
        return BroadcastResult("refused", reason)

    async def fee_rate(self, blocks: int) -> FeeRate:
        """The node's estimate, never below what its mempool takes. Without one: 1 sat/vB, but NotNow on bitcoin."""
        await self._ready()
        told, pool = await self._told(_estimate(blocks), _POOL)
        return self._rate(told, pool)

    async def close(self) -> None:
        await self._rpc.close()

    # ------------------------------------------------------------ the node

    async def _ready(self) -> None:
        """Once per start of the node: its network and version, and whether it has a transaction index."""
        if self._epoch == self._rpc.epoch:
            return
        await self._rpc.greet()
        epoch = self._rpc.epoch
        (indexes,) = await self._rpc.ask(Call("getindexinfo", ("txindex",)))
        index = {} if isinstance(indexes, Refused) else indexes
        self._indexed = self._rpc.read("getindexinfo", lambda: bool(index.get("txindex", {}).get("synced")))
        self._epoch = epoch

    async def _ask(self, *calls: Call) -> list[Any]:
        """As `rpc.ask`; after what may have been a restart it is looked who answered."""
        answers = await self._rpc.ask(*calls)
        if self._epoch != self._rpc.epoch:
            await self._ready()
        return answers

    async def _do(self, call: Call) -> Any:
        answer = await self._rpc.do(call)
        if self._epoch != self._rpc.epoch:
            await self._ready()
        return answer

    async def _told(self, *calls: Call) -> list[Any]:
        answers = await self._ask(*calls)
        return [self._rpc.told(call.method, answer) for call, answer in zip(calls, answers, strict=True)]

    def _tip(self, info: Any) -> Tip:
        tip, downloading, progress = self._rpc.read("getblockchaininfo", _tip_of, info)
        # A regtest node thinks so whenever its last block is a day old.
        if downloading and self._rpc.network is not Network.REGTEST:
            raise NotNow(
                f"{self._rpc.name} is still downloading blocks ({progress:.1%}): wait until it is done", after=60.0
            )
        return tip

    def _rate(self, told: Any, pool: Any) -> FeeRate:
        estimate = self._rpc.read("estimatesmartfee", lambda: rate_of(told["feerate"]) if "feerate" in told else None)
        floor = self._rpc.read(
            "getmempoolinfo", lambda: max(rate_of(pool["mempoolminfee"]), rate_of(pool["minrelaytxfee"]))
        )
        if estimate is None and self._rpc.network is Network.BITCOIN:
            raise NotNow(f"{self._rpc.name} has no fee estimates yet: it makes them while it runs", after=60.0)
        return max(estimate or DEFAULT_FLOOR, floor)

    async def _settled(self, look: Callable[[], Awaitable[T]]) -> T:
        for _ in range(4):
            try:
                return await look()
            except Moved:
                continue
        raise NotNow(f"{self._rpc.name} moved while it was read", after=1.0)

    async def _still_at(self, tip: Tip) -> None:
        (best,) = await self._told(_BEST)
        if best != tip.hash:
            raise Moved

    async def _has(self, txid: Txid) -> bool:
        """Whether a transaction is in the mempool or a block, as far as the node can tell without its blocks."""
        raw, known = await self._ask(Call("getrawtransaction", (txid, 1)), *self._of_wallet(txid))
        if not isinstance(raw, Refused):
            return self._rpc.read(
                "getrawtransaction", lambda: "blockhash" not in raw or whole(raw["confirmations"]) > 0
            )
        if isinstance(known, Refused):
            return False
        return self._rpc.read("gettransaction", _height_of, known) is not None

    def _of_wallet(self, txid: Txid) -> tuple[Call, ...]:
        return (Call("gettransaction", (txid,)),) if self._rpc.wallet is not None else (_NOTHING,)

    # ------------------------------------------------------------ previous outputs

    async def _prevouts(self, outpoints: tuple[Outpoint, ...]) -> dict[Outpoint, Prevout]:
        if not outpoints:
            return {}
        count = len(outpoints)
        info, spends, *coins, best = await self._told(
            _INFO,
            _spending(outpoints),
            *(Call("gettxout", (*outpoint, False), True) for outpoint in outpoints),
            *(Call("gettxout", (*outpoint, True), True) for outpoint in outpoints),
            _BEST,
        )
        tip = self._tip(info)
        if best != tip.hash:
            raise Moved
        spenders = self._rpc.read("gettxspendingprevout", _spenders, spends)
        found: dict[Outpoint, Prevout] = {}
        for outpoint, mined, pooled in zip(outpoints, coins[:count], coins[count:], strict=True):
            if mined is not None or pooled is not None:
                told = pooled if mined is None else mined
                found[outpoint] = self._rpc.read("gettxout", _prevout_of, told, tip, spenders.get(outpoint))
                self._remember(outpoint, found[outpoint], tip.height)
        found.update(await self._gone([one for one in outpoints if one not in found], spenders, tip))
        return await self._timed(found, tip)

    async def _gone(
        self, outpoints: Sequence[Outpoint], spenders: Mapping[Outpoint, Txid], tip: Tip
    ) -> dict[Outpoint, Prevout]:
        """Outputs that are spent: by the mempool, where the parent is there too, or by a block, where we saw them before."""
        found: dict[Outpoint, Prevout] = {}
        pooled = [one for one in outpoints if one in spenders]
        parents = await self._ask(*(Call("getrawtransaction", (one.txid, 1)) for one in pooled))
        for outpoint, told in zip(pooled, parents, strict=True):
            if not isinstance(told, Refused):
                raw, height = self._rpc.read("getrawtransaction", _raw_and_height, told, tip)
                parent = self._tx(raw, outpoint.txid)
                if height is None and outpoint.vout < len(parent.outputs):
                    found[outpoint] = Prevout(parent.outputs[outpoint.vout], None, False, spenders[outpoint])
        for outpoint in outpoints:
            coin = self._seen.get(outpoint)
            if outpoint in found or coin is None:
                continue
            mined = await self._blocks.find((outpoint, outpoint.txid), coin.at, tip)
            if spender := mined[outpoint]:
                made = mined[outpoint.txid]
                height = made[0].height if made else coin.prevout.height
                told = coin.prevout
                found[outpoint] = Prevout(told.txout, height, told.coinbase, spender[0].txid)
        return found

    def _remember(self, outpoint: Outpoint, prevout: Prevout, height: int) -> None:
        self._seen[outpoint] = _Coin(
            prevout, min(height, self._seen[outpoint].at) if outpoint in self._seen else height
        )
        self._seen.move_to_end(outpoint)
        while len(self._seen) > MAX_REMEMBERED:
            self._seen.popitem(last=False)

    async def _timed(self, found: dict[Outpoint, Prevout], tip: Tip) -> dict[Outpoint, Prevout]:
        """With the median time past of the block before each one's (BIP68)."""
        heights = {prevout.height for prevout in found.values() if prevout.height is not None}
        times = {0: 0.0} | {height: self._times[height] for height in heights if height in self._times}
        missing = sorted(heights - times.keys())
        if missing:
            hashes = await self._told(*(Call("getblockhash", (height - 1,)) for height in missing))
            headers = await self._told(*(Call("getblockheader", (one,)) for one in hashes), _BEST)
            if headers.pop() != tip.hash:
                raise Moved
            for height, header in zip(missing, headers, strict=True):
                times[height] = self._rpc.read("getblockheader", _median_of, header)
                if height <= tip.height - SETTLED:
                    self._times[height] = times[height]
            if len(self._times) > MAX_REMEMBERED:
                self._times.clear()
        return {
            outpoint: Prevout(
                one.txout, one.height, one.coinbase, one.spent_by, None if one.height is None else times[one.height]
            )
            for outpoint, one in found.items()
        }

    # ------------------------------------------------------------ views

    async def _view(
        self, txids: frozenset[Txid], outpoints: frozenset[Outpoint], scripts: frozenset[bytes], since: int
    ) -> ChainView:
        ids, coins = sorted(txids), sorted(outpoints)
        addresses = self._addresses(scripts)
        info, soon, late, pool, spends, *rest = await self._ask(
            _INFO,
            _estimate(6),
            _estimate(144),
            _POOL,
            _spending(coins) if coins else _NOTHING,
            *(Call("getrawtransaction", (txid, 1), True) for txid in ids),
            *(call for txid in ids for call in self._of_wallet(txid)),
            *(Call("gettxout", (*outpoint, True), True) for outpoint in coins),
            *(Call("listreceivedbyaddress", (0, True, True, address, True), True) for address in addresses.values()),
            _BEST,
        )
        tip = self._tip(self._rpc.told("getblockchaininfo", info))
        told = iter(rest)
        sight = _Sight()
        raws, known = [[next(told) for _ in ids] for _ in range(2)]
        for txid, raw, ours in zip(ids, raws, known, strict=True):
            self._see_txid(sight, txid, raw, ours, tip)
        unspent = [self._rpc.told("gettxout", next(told)) is not None for _ in coins]
        candidates, foreign = self._see_scripts(sight, scripts, addresses, told)
        moved = self._rpc.told("getbestblockhash", next(told)) != tip.hash
        if moved:
            raise Moved
        spenders = (
            self._rpc.read("gettxspendingprevout", _spenders, self._rpc.told("gettxspendingprevout", spends))
            if coins
            else {}
        )
        gone = {one for one, free in zip(coins, unspent, strict=True) if not free and one not in spenders}
        candidates.update(spenders.values())
        if foreign:
            candidates |= await self._mempool.paying(foreign)
        if candidates or foreign:  # after the mempool was read, too: what left it may be in a new block
            await self._see_candidates(sight, candidates, tip)
        # A spend that was found by another way needs no block.
        spent = {
            spend.outpoint
            for raw, height in sight.found.values()
            if height is not None
            for spend in Tx.parse(raw).inputs
        }
        sight.wanted |= (gone - spent) | foreign
        read = self._blocks.read
        if sight.wanted:
            for mined in _once(await self._blocks.find(sight.wanted, since, tip)):
                sight.found[mined.txid] = (mined.raw, mined.height)
        if self._blocks.read != read:
            await self._still_at(tip)
        txs = tuple(
            ChainTx(txid, raw, height)
            for txid, (raw, height) in sorted(sight.found.items(), key=_chain_order)
            if txid in txids or _concerns(Tx.parse(raw), outpoints, scripts)
        )
        soon, late, pool = (self._rpc.told(method, one) for method, one in zip(_RATES, (soon, late, pool), strict=True))
        return ChainView(tip, txs, self._rate(soon, pool), self._rate(late, pool))

    def _addresses(self, scripts: Iterable[bytes]) -> dict[bytes, str]:
        """Scripts that the wallet could be asked about."""
        found = {}
        if self._rpc.wallet is not None:
            for script in sorted(scripts):
                try:
                    found[script] = script_to_address(script, self._rpc.network)
                except WrongUsage:
                    continue
        return found

    def _see_txid(self, sight: _Sight, txid: Txid, raw: Any, ours: Any, tip: Tip) -> None:
        if not isinstance(raw, Refused):
            data, height = self._rpc.read("getrawtransaction", _raw_and_height, raw, tip)
            if height != _NOWHERE:
                sight.found[txid] = (self._tx(data, txid).raw, height)
        elif not isinstance(ours, Refused):
            # A transaction of the wallet: it knows the block, and without one it is nowhere.
            height = self._rpc.read("gettransaction", _height_of, ours)
            if height is not None:
                data = self._rpc.read("gettransaction", lambda: raw_of(ours["hex"]))
                sight.found[txid] = (self._tx(data, txid).raw, height)
        elif not self._indexed:
            sight.wanted.add(txid)

    def _see_scripts(
        self, sight: _Sight, scripts: frozenset[bytes], addresses: Mapping[bytes, str], told: Iterable[Any]
    ) -> tuple[set[Txid], frozenset[bytes]]:
        """What pays the wallet's own scripts, and the scripts that the wallet does not know."""
        candidates: set[Txid] = set()
        known: set[bytes] = set()
        for script, answer in zip(addresses, told, strict=False):
            if isinstance(answer, Refused):
                continue  # not loaded, or built without: the blocks have it all
            listed = self._rpc.read("listreceivedbyaddress", _received, answer, addresses[script])
            if listed is not None:
                known.add(script)
                candidates |= listed
        return candidates, scripts - known

    async def _see_candidates(self, sight: _Sight, candidates: Iterable[Txid], tip: Tip) -> None:
        """Fetch what is said to touch something watched; the mempool, the wallet or the index has it, else it is gone."""
        missing = sorted(set(candidates) - sight.found.keys())
        *answers, best = await self._ask(
            *(Call("getrawtransaction", (txid, 1), True) for txid in missing),
            *(call for txid in missing for call in self._of_wallet(txid)),
            _BEST,
        )
        if self._rpc.told("getbestblockhash", best) != tip.hash:
            raise Moved
        for txid, raw, ours in zip(missing, answers[: len(missing)], answers[len(missing) :], strict=True):
            apart = _Sight()
            self._see_txid(apart, txid, raw, ours, tip)
            sight.found.update(apart.found)

    def _tx(self, raw: bytes, txid: Txid) -> Tx:
        try:
            tx = Tx.parse(raw)
        except PeerMistake as exc:
            raise NotNow(f"{self._rpc.name} answers with a transaction that cannot be read") from exc
        if tx.txid != txid:
            raise NotNow(f"{self._rpc.name} answers with another transaction than the one asked for")
        return tx

    # ------------------------------------------------------------ broadcasting

    async def _submit(self, raw: bytes) -> str | None:
        """None when the node took it, or had it; else its reason."""
        answer = await self._do(Call("sendrawtransaction", (raw.hex(), None, _ANYTHING_BURNED)))
        if not isinstance(answer, Refused):
            return None
        if answer.code == _ALREADY_THERE:
            return "txn-already-known"
        if answer.code in _REJECTED or answer.code == -1:
            return answer.message
        raise self._rpc.refusal("sendrawtransaction", answer)

    async def _submit_package(self, txs: Sequence[Tx]) -> str | None:
        raws = [tx.raw.hex() for tx in txs]
        answer = await self._do(Call("submitpackage", (raws, None, _ANYTHING_BURNED)))
        if not isinstance(answer, Refused):
            return self._rpc.read("submitpackage", _package_reason, answer)
        if answer.code == NO_METHOD:
            return f"{self._rpc.name} takes no packages, and the parent is not taken alone"
        if answer.code in (*_REJECTED, -8):
            return answer.message
        raise self._rpc.refusal("submitpackage", answer)


# ---------------------------------------------------------------- questions

_INFO = Call("getblockchaininfo")
_POOL = Call("getmempoolinfo")
_BEST = Call("getbestblockhash", (), True)
_NOTHING = Call("getrawtransaction", ("0" * 64,))
"""A question without an answer, where one is not asked: the node refuses it at once."""

_RATES = ("estimatesmartfee", "estimatesmartfee", "getmempoolinfo")
_NOWHERE = -1


def _estimate(blocks: int) -> Call:
    return Call("estimatesmartfee", (max(1, min(blocks, MAX_TARGET)),))


def _spending(outpoints: Sequence[Outpoint]) -> Call:
    return Call("gettxspendingprevout", ([place_of(outpoint) for outpoint in outpoints],), True)


# ---------------------------------------------------------------- shapes of answers; all raise ValueError, TypeError or KeyError


def _tip_of(info: Any) -> tuple[Tip, bool, float]:
    tip = Tip(whole(info["blocks"]), hash_of(info["bestblockhash"]), float(whole(info["mediantime"])))
    return tip, info["initialblockdownload"] is True, float(Decimal(info["verificationprogress"]))


def _verdict(told: Any) -> tuple[bool, str]:
    (one,) = items(told)
    if one.get("allowed") is True:
        return True, ""
    return False, text(one.get("reject-reason") or one.get("package-error") or "no reason was given")[:200]


def _spenders(told: Any) -> dict[Outpoint, Txid]:
    return {
        Outpoint(hash_of(one["txid"]), whole(one["vout"])): hash_of(one["spendingtxid"])
        for one in items(told)
        if "spendingtxid" in one
    }


def _prevout_of(told: Any, tip: Tip, spender: Txid | None) -> Prevout:
    if hash_of(told["bestblock"]) != tip.hash:
        raise Moved
    depth = whole(told["confirmations"])
    return Prevout(
        txout_of(told), tip.height + 1 - depth if depth else None, told["coinbase"] is True and depth > 0, spender
    )


def _median_of(header: Any) -> float:
    return float(whole(header["mediantime"]))


def _raw_and_height(told: Any, tip: Tip) -> tuple[bytes, int | None]:
    """A transaction and its height: None in the mempool, -1 in a block that is not in the chain."""
    if "blockhash" not in told:
        return raw_of(told["hex"]), None
    depth = whole(told.get("confirmations", 0))
    return raw_of(told["hex"]), tip.height + 1 - depth if depth else _NOWHERE


def _height_of(told: Any) -> int | None:
    """The height of a wallet's transaction; None where it is in no block."""
    return whole(told["blockheight"]) if told["confirmations"] > 0 else None


def _received(told: Any, address: str) -> set[Txid] | None:
    """What paid an address of the wallet; None where the wallet does not know it."""
    for one in items(told):
        if one["address"] == address:
            return {hash_of(txid) for txid in items(one["txids"])}
    return None


def _package_reason(told: Any) -> str | None:
    results = list(dict(told["tx-results"]).values())
    errors = [text(one["error"]) for one in results if one.get("error")]
    if told["package_msg"] == "success" and not errors:
        return None
    # A child whose parent was refused misses its input: the parent's reason is the reason.
    reasons = [error for error in errors if not any(word in error for word in _SPENT)]
    return (reasons or errors or [text(told["package_msg"])])[0][:200]


def _once(found: Mapping[Wanted, Sequence[Mined]]) -> Iterable[Mined]:
    return {mined.txid: mined for each in found.values() for mined in each}.values()


def _chain_order(entry: tuple[Txid, tuple[bytes, int | None]]) -> tuple[bool, int, Txid]:
    txid, (_, height) = entry
    return height is None, height or 0, txid


def _concerns(tx: Tx, outpoints: frozenset[Outpoint], scripts: frozenset[bytes]) -> bool:
    return any(spend.outpoint in outpoints for spend in tx.inputs) or any(out.script in scripts for out in tx.outputs)
