"""What every remote chain source does alike, over a few questions that each protocol asks in its own way.

A server is believed about what is confirmed, where, and what is spent. It is not believed about contents: every raw transaction is
hashed, every claimed spend is looked up in the spending transaction, every payment in the paying one. Whatever contradicts itself
is NotNow, never a fact.

```
view, prevouts, test, broadcast ──► _sighting, _spender, _history, _submit … (esplora, electrum) ──► the server
```

Law: an answer is for one moment: when the tip moves while it is gathered, it is gathered again. Nothing was broadcast unless the
server took it, and nothing counts as refused that the server already shows.
"""

from __future__ import annotations

import asyncio
import re
from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Coroutine, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from pjv2.backends.chain.suitability import MAX_FAMILY, Judged, Outlook, ScriptVerifier, check_form, judge
from pjv2.errors import NotNow, PeerMistake, WrongUsage
from pjv2.psbt.original import Prevout, Suitability
from pjv2.psbt.tx import Tx
from pjv2.session.facts import BroadcastResult, ChainTx, ChainView, Tip
from pjv2.units import FeeRate, Network, Outpoint, Txid

T = TypeVar("T")

REQUEST_TIMEOUT = 20.0
DEFAULT_FLOOR = FeeRate(250)
"""1 sat/vB: what every node relays, where a server tells no rates at all."""

MAX_FEE_RATE = FeeRate(25_000_000)
"""100,000 sat/vB: an estimate above it is no estimate."""

MAX_TX_BYTES = 4_000_000
_CACHE_BYTES = 32_000_000
_MANY_INPUTS = 20
_MAX_TIMES = 10_000
_MAX_RELATIVES = 100
_NULL = Outpoint("0" * 64, 0xFFFFFFFF)
_TXID = re.compile(r"[0-9a-f]{64}\Z")
_RPC_MESSAGE = re.compile(r"""["']message["']: ?["'](.*?)["']\}?""")
_TEMPORARY = re.compile(
    r"does not answer|unavailable|warming|loading|time[d]? ?out|busy|connection|too many requests|excessive|overload|internal error",
    re.IGNORECASE,
)


@dataclass(frozen=True, slots=True)
class Sighting:
    """A transaction that the source shows; `height` None in the mempool, `block` the hash of its block where it is told."""

    tx: Tx
    height: int | None
    block: str = ""


class RemoteChain(ABC):
    """A `ports.Chain` over a server; `EsploraChain` and `ElectrumChain` add the protocol."""

    def __init__(self, host: str, network: Network) -> None:
        self.host = host
        self._network = network
        self._txs: OrderedDict[Txid, Tx] = OrderedDict()
        self._held = 0
        self._fetching: dict[Txid, asyncio.Event] = {}
        self._times: dict[str, float] = {}
        self._greeted = False
        self._closed = False
        self._verifier = ScriptVerifier.load()

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.host}, {self._network})"

    # ------------------------------------------------------------ what each protocol asks in its own way

    @abstractmethod
    async def genesis_hash(self) -> str: ...

    @abstractmethod
    async def fee_rate(self, blocks: int) -> FeeRate:
        """The estimate for a confirmation within `blocks`."""

    @abstractmethod
    async def _tip(self) -> Tip: ...

    @abstractmethod
    async def _raw(self, txid: Txid) -> bytes | None:
        """The transaction as the server has it; None when it has none."""

    @abstractmethod
    async def _sighting(self, txid: Txid) -> Sighting | None:
        """A transaction in the chain or the mempool now; None when it is in neither."""

    @abstractmethod
    async def _spender(self, outpoint: Outpoint, parent: Sighting) -> Txid | None:
        """Who spends an output, as the server says or as its history shows."""

    @abstractmethod
    async def _history(self, script: bytes, since: int) -> Iterable[Txid]:
        """What touches a script, at least from height `since` on, the mempool included."""

    @abstractmethod
    async def _time_before(self, height: int) -> float:
        """The median time past of the block below `height` (BIP68)."""

    @abstractmethod
    async def _submit(self, raw: bytes) -> str | None:
        """Hand a transaction over; None when it was taken, else the reason. NotNow when nobody judged it."""

    @abstractmethod
    async def _floor(self) -> FeeRate:
        """The least rate that the server's mempool is sure to take."""

    async def _submit_package(self, raws: Sequence[bytes]) -> str | None:
        """Parents and their child at once; as `_submit`. Here one after the other, for servers that take no packages."""
        for raw in raws:
            reason = await self._submit(raw)
            if reason is not None:
                return reason
        return None

    async def _server_test(self, raw: bytes) -> Suitability | None:
        """The server's own verdict; None when it gives none."""
        return None

    # ------------------------------------------------------------ ports.Chain

    async def tip(self) -> Tip:
        await self._greet()
        return await self._tip()

    async def test(self, tx: bytes) -> Suitability:
        """The server's own test where it has one, else `suitability.judge` over previous outputs read from it."""
        await self._greet()
        try:
            parsed = Tx.parse(tx)
        except PeerMistake as exc:
            return Suitability("refused", str(exc))
        if await self._sighting(parsed.txid) is not None:
            return Suitability("known", "it is in the mempool or in a block")
        told = await self._server_test(tx)
        return told if told is not None else await self._judge(parsed)

    async def prevouts(self, outpoints: Sequence[Outpoint]) -> Mapping[Outpoint, Prevout]:
        await self._greet()
        return await self._prevouts(outpoints)

    async def view(
        self, txids: frozenset[Txid], outpoints: frozenset[Outpoint], scripts: frozenset[bytes], since: int
    ) -> ChainView:
        """Everything watched, in chain order, the mempool last; payments to scripts are searched from height `since` on."""
        await self._greet()
        before = await self._tip()
        for _ in range(4):
            txs, rate, economy = await together(
                self._watched(txids, outpoints, scripts, since), self.fee_rate(6), self.fee_rate(144)
            )
            after = await self._tip()
            if after.hash == before.hash:
                if any(tx.height is not None and tx.height > after.height for tx in txs):
                    raise self._garbage("a transaction in a block above the tip")
                return ChainView(after, txs, rate, economy)
            before = after
        raise NotNow(f"the chain source {self.host} moved while it was read", after=1.0)

    async def broadcast(self, tx: bytes, *, parents: Sequence[bytes] = ()) -> BroadcastResult:
        """Hand over a transaction, its parents first; a parent that is refused alone goes with its child where the server can."""
        await self._greet()
        try:
            child = Tx.parse(tx)
            before = [Tx.parse(raw) for raw in parents]
        except PeerMistake as exc:
            return BroadcastResult("refused", str(exc))
        if await self._sighting(child.txid) is not None:
            return BroadcastResult("known", "it is in the mempool or in a block")
        held: list[bytes] = []
        for parent in before:
            if await self._sighting(parent.txid) is None and await self._submit(parent.raw) is not None:
                held.append(parent.raw)
        reason = await self._submit_package([*held, tx]) if held else await self._submit(tx)
        if reason is None:
            return BroadcastResult("accepted")
        # Somebody else may have been faster; nodes that know a transaction say "already" in one way or another.
        if "already" in reason.lower() or await self._sighting(child.txid) is not None:
            return BroadcastResult("known", reason)
        return BroadcastResult("refused", reason)

    async def close(self) -> None:
        self._closed = True

    # ------------------------------------------------------------ reading

    async def _greet(self) -> None:
        """Once: is this the network we were told?"""
        if not self._greeted:
            genesis = await self.genesis_hash()
            if genesis != self._network.genesis_hash:
                raise WrongUsage(f"the chain source {self.host} serves another network than {self._network}")
            self._greeted = True

    async def _tx(self, txid: Txid) -> Tx | None:
        """A transaction, hashed. What has an id never changes, so it is read once."""
        while txid not in self._txs and txid in self._fetching:
            await self._fetching[txid].wait()
        held = self._txs.get(txid)
        if held is not None:
            self._txs.move_to_end(txid)
            return held
        self._fetching[txid] = done = asyncio.Event()
        try:
            return await self._fetch(txid)
        finally:
            del self._fetching[txid]
            done.set()

    async def _fetch(self, txid: Txid) -> Tx | None:
        raw = await self._raw(txid)
        if raw is None:
            return None
        try:
            tx = Tx.parse(raw)
        except PeerMistake as exc:
            raise self._garbage("a transaction that cannot be read") from exc
        if tx.txid != txid or not tx.inputs:
            raise self._garbage("another transaction than the one asked for")
        self._txs[txid] = tx
        self._held += len(raw)
        while self._held > _CACHE_BYTES:
            _, gone = self._txs.popitem(last=False)
            self._held -= len(gone.raw)
        return tx

    async def _watched(
        self, txids: frozenset[Txid], outpoints: frozenset[Outpoint], scripts: frozenset[bytes], since: int
    ) -> tuple[ChainTx, ...]:
        spenders, *histories = await together(
            self._spends(outpoints), *(self._payments(script, since) for script in sorted(scripts))
        )
        wanted = sorted(txids.union(spenders.values(), *histories))
        found = await together(*(self._sighting(txid) for txid in wanted))
        seen = [ChainTx(one.tx.txid, one.tx.raw, one.height) for one in found if one is not None]
        seen.sort(key=lambda tx: (tx.height is None, tx.height or 0, tx.txid))
        return tuple(seen)

    async def _payments(self, script: bytes, since: int) -> set[Txid]:
        txids = sorted(set(await self._history(script, since)))
        txs = await together(*(self._tx(txid) for txid in txids))
        return {tx.txid for tx in txs if tx is not None and any(out.script == script for out in tx.outputs)}

    async def _spends(self, outpoints: Iterable[Outpoint]) -> dict[Outpoint, Txid]:
        return {
            outpoint: coin.spent_by
            for outpoint, coin in (await self._prevouts(sorted(outpoints), times=False)).items()
            if coin.spent_by is not None
        }

    async def _prevouts(self, outpoints: Sequence[Outpoint], *, times: bool = True) -> dict[Outpoint, Prevout]:
        txids = sorted({outpoint.txid for outpoint in outpoints})
        sightings = dict(zip(txids, await together(*(self._sighting(txid) for txid in txids)), strict=True))
        known: list[tuple[Outpoint, Sighting]] = []
        for outpoint in dict.fromkeys(outpoints):
            parent = sightings[outpoint.txid]
            if parent is not None and outpoint.vout < len(parent.tx.outputs):
                known.append((outpoint, parent))
        spenders = await together(*(self._proven_spender(outpoint, parent) for outpoint, parent in known))
        blocks = {parent.height: parent for _, parent in known} if times else {}
        medians = dict(zip(blocks, await together(*map(self._median_before, blocks.values())), strict=True))
        found = {}
        for (outpoint, parent), spender in zip(known, spenders, strict=True):
            found[outpoint] = Prevout(
                parent.tx.outputs[outpoint.vout],
                parent.height,
                parent.tx.inputs[0].outpoint == _NULL,
                spender,
                medians.get(parent.height),
            )
        return found

    async def _proven_spender(self, outpoint: Outpoint, parent: Sighting) -> Txid | None:
        spender = await self._spender(outpoint, parent)
        if spender is not None:
            tx = await self._tx(spender)
            if tx is None:
                return None  # evicted since
            if all(spend.outpoint != outpoint for spend in tx.inputs):
                raise self._garbage("a spend that is none")
        return spender

    async def _median_before(self, sighting: Sighting) -> float | None:
        if sighting.height is None:
            return None
        if not sighting.height:
            return 0.0
        found = self._times.get(sighting.block)
        if found is None:
            found = await self._time_before(sighting.height)
            if sighting.block:
                if len(self._times) >= _MAX_TIMES:
                    self._times.clear()
                self._times[sighting.block] = found
        return found

    # ------------------------------------------------------------ judging

    async def _judge(self, tx: Tx) -> Suitability:
        try:
            check_form(tx)  # before anything is asked about its inputs
        except Judged as judged:
            return judged.suitability
        tip, floor, prevouts = await together(
            self._tip(), self._floor(), self._prevouts([spend.outpoint for spend in tx.inputs])
        )
        family: tuple[Tx, ...] | None = ()
        unconfirmed = {outpoint.txid for outpoint, coin in prevouts.items() if coin.height is None}
        if unconfirmed:
            family = await self._family(tx.txid, unconfirmed)
        outlook = Outlook(tip, prevouts, floor, family)
        if len(tx.inputs) > _MANY_INPUTS:
            return await asyncio.to_thread(judge, tx, outlook, self._verifier)
        return judge(tx, outlook, self._verifier)

    async def _family(self, txid: Txid, parents: Iterable[Txid]) -> tuple[Tx, ...] | None:
        """The unconfirmed ancestors of `txid` and all that descends from them; None when they are too many."""
        family: dict[Txid, Tx] = {}
        queue = [*parents]
        looked = {txid, *queue}
        while queue:
            sighting = await self._sighting(queue.pop())
            if sighting is None or sighting.height is not None:
                continue
            relative = sighting.tx
            family[relative.txid] = relative
            outputs = [Outpoint(relative.txid, vout) for vout in range(len(relative.outputs))]
            if len(family) >= MAX_FAMILY or len(outputs) > _MAX_RELATIVES:
                return None
            near = {spend.outpoint.txid for spend in relative.inputs}
            near.update((await self._spends(outputs)).values())
            queue += near - looked
            looked |= near
            if len(looked) > _MAX_RELATIVES:
                return None
        return tuple(family.values())

    # ------------------------------------------------------------ words

    def _garbage(self, what: str) -> NotNow:
        return NotNow(f"the chain source {self.host} answered with {what}")

    def _open(self) -> None:
        if self._closed:
            raise NotNow(f"the chain source {self.host} is closed")

    def _refusal(self, text: str) -> str:
        """The node's reason out of what the server says. Raises NotNow when it says that nobody judged."""
        found = _RPC_MESSAGE.search(text)
        reason = " ".join((found[1] if found else text).split())[:200] or "no reason was given"
        if _TEMPORARY.search(reason):
            raise NotNow(f"the chain source {self.host} cannot broadcast now: {reason}")
        return reason


async def together(*questions: Coroutine[Any, Any, Any]) -> list[Any]:
    """All at once; the first error cancels the others and is raised as it is."""
    tasks = [asyncio.ensure_future(question) for question in questions]
    try:
        return list(await asyncio.gather(*tasks))
    except BaseException:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        raise


def is_txid(value: object) -> bool:
    """64 lower-case hex characters."""
    return isinstance(value, str) and _TXID.match(value) is not None
