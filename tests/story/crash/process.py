"""A receiver as a process of its own: everything from its disk, the directory behind the real relays, the chain in the test's process.

A wallet on paper has the chain over a socket: a JSON object per line, a call in, an answer out. BDK has it over Esplora.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import astuple, replace
from pathlib import Path
from typing import Any

from pjv2 import session as model
from pjv2.backends.chain.esplora import EsploraChain
from pjv2.backends.channel.rehearsal import RehearsalNode
from pjv2.backends.mailroom import HttpMailroom, Service
from pjv2.backends.store.sql import SqlStore
from pjv2.backends.system import SystemClock, SystemEntropy
from pjv2.driver import Driver
from pjv2.errors import NotNow
from pjv2.lab.chain import LabChain
from pjv2.lab.world import Diary, bdk_home_wallet
from pjv2.ports import Stored
from pjv2.psbt.original import Prevout, Suitability
from pjv2.psbt.tx import TxOut
from pjv2.session.facts import BroadcastResult, ChainTx, ChainView, Tip
from pjv2.testing.paper_wallet import PaperWallet
from pjv2.units import FeeRate, Network, Outpoint, Txid
from tests.story.crash.kit import PACE, Switch, watched_ports
from tests.story.lab.kit import BDK

CLAIM = 0.5
"""Seconds: what a dead process leaves behind lapses before anybody gets impatient."""
PROCESS_PACE = replace(PACE, watch=0.05, claim=CLAIM)


# ---------------------------------------------------------------- the chain over a socket


async def serve(chain: LabChain) -> asyncio.Server:
    """`chain` on a port of the loopback."""

    async def answer(call: str, args: list[Any]) -> Any:
        match call, args:
            case "genesis_hash", []:
                return await chain.genesis_hash()
            case "tip", []:
                return astuple(await chain.tip())
            case "test", [tx]:
                found = await chain.test(bytes.fromhex(tx))
                return [found.verdict, found.reason]
            case "prevouts", [outpoints]:
                known = await chain.prevouts([Outpoint.parse(text) for text in outpoints])
                return {
                    str(outpoint): [prevout.txout.value, prevout.txout.script.hex(), *astuple(prevout)[1:]]
                    for outpoint, prevout in known.items()
                }
            case "view", [txids, outpoints, scripts, since]:
                view = await chain.view(
                    frozenset(txids),
                    frozenset(Outpoint.parse(text) for text in outpoints),
                    frozenset(bytes.fromhex(script) for script in scripts),
                    since,
                )
                txs = [[tx.txid, tx.raw.hex(), tx.height] for tx in view.txs]
                return [astuple(view.tip), txs, view.rate.sat_per_kwu, view.economy_rate.sat_per_kwu]
            case "broadcast", [tx]:
                result = await chain.broadcast(bytes.fromhex(tx))
                return [result.verdict, result.reason]
            case "fee_rate", [blocks]:
                return (await chain.fee_rate(blocks)).sat_per_kwu
            case _:
                raise ValueError(call)

    async def client(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while line := await reader.readline():
            call, args = json.loads(line)
            writer.write(json.dumps(await answer(call, args)).encode() + b"\n")
            await writer.drain()
        writer.close()

    return await asyncio.start_server(client, "127.0.0.1", 0, limit=2**24)


class SocketChain:
    """A `ports.Chain` at the other end."""

    def __init__(self, port: int) -> None:
        self._port = port
        self._turn = asyncio.Lock()
        self._line: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None

    async def _call(self, call: str, *args: Any) -> Any:
        # A call that is cancelled would leave its answer for the next one: it is carried to its end.
        return await asyncio.shield(asyncio.ensure_future(self._ask(call, args)))

    async def _ask(self, call: str, args: Sequence[Any]) -> Any:
        async with self._turn:
            try:
                if self._line is None:
                    self._line = await asyncio.open_connection("127.0.0.1", self._port, limit=2**24)
                reader, writer = self._line
                writer.write(json.dumps([call, list(args)]).encode() + b"\n")
                await writer.drain()
                return json.loads(await reader.readline())
            except (OSError, ValueError) as exc:
                raise NotNow("the chain source is away") from exc

    async def genesis_hash(self) -> str:
        return str(await self._call("genesis_hash"))

    async def tip(self) -> Tip:
        return Tip(*await self._call("tip"))

    async def test(self, tx: bytes) -> Suitability:
        return Suitability(*await self._call("test", tx.hex()))

    async def prevouts(self, outpoints: Sequence[Outpoint]) -> Mapping[Outpoint, Prevout]:
        known = await self._call("prevouts", [str(outpoint) for outpoint in outpoints])
        return {
            Outpoint.parse(text): Prevout(TxOut(value, bytes.fromhex(script)), *rest)
            for text, (value, script, *rest) in known.items()
        }

    async def view(
        self, txids: frozenset[Txid], outpoints: frozenset[Outpoint], scripts: frozenset[bytes], since: int
    ) -> ChainView:
        wanted = [sorted(txids), sorted(map(str, outpoints)), sorted(script.hex() for script in scripts), since]
        tip, txs, rate, economy = await self._call("view", *wanted)
        found = tuple(ChainTx(txid, bytes.fromhex(raw), height) for txid, raw, height in txs)
        return ChainView(Tip(*tip), found, FeeRate(rate), FeeRate(economy))

    async def broadcast(self, tx: bytes, *, parents: Sequence[bytes] = ()) -> BroadcastResult:
        if parents:
            raise NotNow("packages do not go over this socket")
        return BroadcastResult(*await self._call("broadcast", tx.hex()))

    async def fee_rate(self, blocks: int) -> FeeRate:
        return FeeRate(await self._call("fee_rate", blocks))

    async def close(self) -> None:
        if self._line is not None:
            self._line[1].close()


# ---------------------------------------------------------------- the process


async def live(home: Path, end: Callable[[], None]) -> None:
    """Drive the session of `orders.json` to its end, or to the point where `end` ends the process.

    On stdout it names every event that became durable, a line each.
    """
    orders = json.loads((home / "orders.json").read_text())
    store = await SqlStore.open(f"sqlite:///{home / 'pjv2.sqlite'}")
    seed = bytes.fromhex(orders["seed"])
    clock, entropy = SystemClock(), SystemEntropy()
    mailroom = HttpMailroom(
        [Service(url, f"operator of relay {number}") for number, url in enumerate(orders["relays"], 1)],
        [Service(orders["directory"], "operator of the directory")],
        cache=store,
        clock=clock,
        rng=entropy,
    )
    chain, wallet = await opened(home, orders, seed)
    node = None
    if orders["lightning"]:
        node = RehearsalNode.open(home / "node", chain, seed=seed, peers=home.parent / "peers")
    ports = watched_ports(
        Switch(orders["armed"], end=end),
        store=store,
        wallet=wallet,
        chain=chain,
        mailroom=mailroom,
        channels=node,
        stored=stored,
    )
    driver = Driver(**ports, clock=clock, entropy=entropy, notify=Diary(), pace=PROCESS_PACE)
    while True:
        try:
            await driver.drive(orders["session"], model.is_closed)
            break
        except NotNow:  # the claim of the process that died
            await clock.sleep(CLAIM / 5)
    await mailroom.close()
    await store.close()
    await wallet.close()
    await chain.close()


async def stored(answer: Any, change: Any) -> None:
    if isinstance(answer, Stored):
        for record in change.records:
            print(record.name, flush=True)


async def opened(home: Path, orders: Mapping[str, Any], seed: bytes) -> tuple[Any, Any]:
    """The chain source and the wallet."""
    if orders["pair"] == BDK.name:
        chain = EsploraChain(orders["chain"], network=Network.REGTEST)
        return chain, await bdk_home_wallet(home, orders["chain"], seed)
    socket = SocketChain(orders["chain"])
    path = home / "wallet.json"
    return socket, PaperWallet(socket, seed=seed, network=Network.REGTEST, store_path=path, kinds=("p2wpkh",))
