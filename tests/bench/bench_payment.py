"""How long does one payment take? Run: python tests/bench/bench_payment.py [--json] [--rounds N]

From starting `send` to the payjoin in bitcoind's mempool, to a receiver that polls already; same directory and relay (over TLS), same
node, same run:

| case | who pays whom |
|---|---|
| `payjoin_cli` | payjoin-cli pays payjoin-cli |
| `warm` | pjv2 pays pjv2, both open in this process, which has paid before |
| `shell` | `pjv2 send` pays `pjv2 receive`, a process each |

The bars: `warm` takes as long as payjoin-cli, `shell` four times as long. The cases take turns, so that a slow moment hits all of them,
and a figure is a median. The rest says where the time goes: the stages of `warm` in their order, what of it was spent in calls of store,
wallet and chain (both people's: some at the same time), how long this process computed, when `shell` had made its session, and how many
requests the node had in each case.

The real programs come from `make peers`; without them every line says `skipped`. payjoin-cli is told its keys by nobody and fetches
them as pjv2 does. The node says itself when a transaction enters its mempool; it is not asked.
"""

from __future__ import annotations

import argparse
import asyncio
import inspect
import json
import statistics
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import AsyncExitStack, ExitStack, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from pjv2.app import Payjoin
from pjv2.backends.bitcoind_rpc import BitcoindRpc, cookie_login
from pjv2.backends.chain.bitcoind import BitcoindChain
from pjv2.backends.mailroom import HttpMailroom, Service
from pjv2.backends.store.sql import SqlStore
from pjv2.backends.wallet.bitcoind import BitcoindWallet
from pjv2.config import Config
from pjv2.units import Network
from tests.peers.desk import CONFIRMED, Post, driven
from tests.peers.peers import missing_because, need
from tests.peers.programs import (
    Bitcoind,
    Certificates,
    NodeWallet,
    PayjoinCli,
    Program,
    bitcoind,
    certificates,
    mailroom,
    stopping,
)

ROOT = Path(__file__).resolve().parents[2]
PEERS = ("bitcoind", "payjoin-mailroom-tls", "payjoin-cli")
ROUNDS = 9
WARM_UP = 1
AMOUNT = 50_000
FEE_RATE = 2
CASES = ("payjoin_cli", "warm", "shell")
BARS = {"warm": 1.0, "shell": 4.0}
"""Times payjoin-cli."""

STAGES = (
    ("composed", "Created"),
    ("original_carried", "OriginalReceived"),
    ("original_judged", "OriginalAccepted"),
    ("coins_reserved", "CoinsReserved"),
    ("proposal_drafted", "ProposalDrafted"),
    ("proposal_signed", "ProposalSigned"),
    ("proposal_announced", "ProposalPosting"),
    ("proposal_carried", "ProposalAccepted"),
    ("payjoin_signed", "Signed"),
    ("broadcast", "mempool"),
)
"""A payment's stages, and the fact that ends each: the payer's, the payee's, the payer's. Each causes the next, so none overlap."""

PORTS = ("store", "wallet", "chain")


class Line(NamedTuple):
    """One figure; without a value when a peer is missing."""

    name: str
    value: float | None
    unit: str
    bar: float | None = None

    @property
    def ok(self) -> bool | None:
        return None if self.value is None else self.bar is None or self.value <= self.bar

    def show(self, *, as_json: bool) -> str:
        if as_json:
            return json.dumps({"event": "Bench", **self._asdict(), "ok": self.ok})
        word = {None: "skipped", True: "ok", False: "short"}[self.ok]
        return "\t".join(str("-" if one is None else one) for one in (self.name, self.value, self.unit, self.bar, word))


# ---------------------------------------------------------------- the clocks


class Mempool:
    """When the next payment enters the node's mempool. What `payee` has now tells a payjoin from an Original."""

    def __init__(self, payee: NodeWallet) -> None:
        self._node = payee.node
        self._coins = payee.coins()
        self._after = len(self._node.program.lines)

    def entered(self) -> tuple[float, int]:
        """The moment, once it came, and how many requests the node had until then. Raises Trouble; RuntimeError when it is no payjoin."""
        line = self._node.program.line(r"Enqueuing TransactionAddedToMempool: txid=([0-9a-f]{64})", after=self._after)
        at, txid = time.perf_counter(), line[1]
        asked = 0
        for printed in self._node.program.lines[self._after :]:
            if printed == line.string:
                break
            asked += "Received a POST request" in printed
        spent = {(txin["txid"], txin["vout"]) for txin in self._node.call("getrawtransaction", txid, 1)["vin"]}
        if not spent & self._coins:
            raise RuntimeError(f"{txid} was broadcast, which is no payjoin: the figures would compare different things")
        return at, asked


@dataclass
class Log:
    """When what happened in this process: facts of sessions, and calls of ports."""

    facts: dict[str, float] = field(default_factory=dict)
    calls: dict[str, list[tuple[float, float]]] = field(default_factory=dict)
    polls: asyncio.Event = field(default_factory=asyncio.Event)

    def told(self, event: str, at: float, session: str | None, facts: Mapping[str, Any]) -> None:
        # The receiver's Created is older than the payment: the sender's takes its place.
        self.facts[event] = time.perf_counter()

    def clear(self) -> None:
        self.facts.clear()
        self.calls.clear()
        self.polls.clear()


class Timed:
    """A port whose calls are logged under a name."""

    def __init__(self, port: Any, name: str, log: Log) -> None:
        self._port, self._name, self._log = port, name, log

    def __getattr__(self, attribute: str) -> Any:
        found = getattr(self._port, attribute)
        if not inspect.iscoroutinefunction(found):
            return found

        async def timed(*words: Any, **named: Any) -> Any:
            began = time.perf_counter()
            if self._name == "mailroom":
                self._log.polls.set()
            try:
                return await found(*words, **named)
            finally:
                self._log.calls.setdefault(self._name, []).append((began, time.perf_counter()))

        return timed


# ---------------------------------------------------------------- the cases


@dataclass
class Scene:
    """Who pays whom, over what."""

    home: Path
    node: Bitcoind
    post: Post
    tls: Certificates
    rounds: int

    def pair(self, name: str) -> tuple[NodeWallet, NodeWallet]:
        """Two wallets with a coin for each payment: who pays, and who is paid."""
        payments = self.rounds + WARM_UP
        return self.node.wallet(f"{name}-payer", *[300_000] * payments), self.node.wallet(
            f"{name}-payee", *[200_000] * payments
        )


class ByPayjoinCli:
    """payjoin-cli pays payjoin-cli."""

    def __init__(self, scene: Scene) -> None:
        pair = scene.pair("cli")
        self._coins = pair[1]
        self._payer, self._payee = (
            PayjoinCli(
                need("payjoin-cli"),
                scene.home / wallet.name,
                wallet,
                relays=[scene.post.relay],
                directories=[scene.post.directory],
                tls=scene.tls,
            )
            for wallet in pair
        )

    def pay(self) -> dict[str, float]:
        with self._payee.receiving(AMOUNT) as (uri, receiver):
            receiver.line("Polling receive request")
            mempool = Mempool(self._coins)
            began = time.perf_counter()
            with self._payer.run("send", uri, "--fee-rate", str(FEE_RATE)) as sender:
                ended, asked = mempool.entered()
                sender.ended()
        return {"payjoin_cli": ended - began, "payjoin_cli_requests": asked}


class ByShell:
    """`pjv2 send` pays `pjv2 receive`."""

    def __init__(self, scene: Scene) -> None:
        self._scene = scene
        self._runs = 0
        pair = scene.pair("shell")
        self._coins = pair[1]
        self._payer, self._payee = map(self._person, pair)

    def _person(self, wallet: NodeWallet) -> Path:
        home = self._scene.home / wallet.name
        home.mkdir()
        (home / "config.toml").write_text(
            'network = "regtest"\n'
            f'[wallet]\nbackend = "bitcoind"\nurl = "{wallet.url}"\ncookie_file = "{wallet.node.cookie}"\n'
            '[chain]\nbackend = "bitcoind"\n'
            f'[payjoin]\ndirectories = ["{self._scene.post.directory.url}"]\nrelays = ["{self._scene.post.relay.url}"]\n'
            f'ca_file = "{self._scene.tls.root_pem}"\n'
        )
        return home

    def _run(self, home: Path, *words: str) -> Program:
        self._runs += 1
        command = [sys.executable, "-m", "pjv2.cli", "--config", home / "config.toml", "--json", *words]
        return Program(f"{self._runs}-pjv2-{words[0]}", command, home, {"PYTHONPATH": str(ROOT)})

    def pay(self) -> dict[str, float]:
        with stopping(self._run(self._payee, "receive", str(AMOUNT), "--yes", "--until", "seen")) as receiver:
            uri = json.loads(receiver.line(r'^\{.*"bitcoin:.*\}$')[0])["uri"]
            mempool = Mempool(self._coins)
            began = time.perf_counter()
            words = ("send", uri, "--fee-rate", str(FEE_RATE), "--yes", "--until", "seen")
            with stopping(self._run(self._payer, *words)) as sender, ThreadPoolExecutor(1) as aside:
                made = aside.submit(lambda: (sender.line('"event": ?"Created"'), time.perf_counter())[1])
                ended, asked = mempool.entered()
                created = made.result() - began
                sender.ended()
        return {"shell": ended - began, "shell_created": created, "shell_requests": asked}


class InProcess:
    """pjv2 pays pjv2, both open in this process."""

    def __init__(self, coins: NodeWallet, payer: Payjoin, payee: Payjoin, log: Log) -> None:
        self._coins, self._payer, self._payee, self._log = coins, payer, payee, log

    @classmethod
    @asynccontextmanager
    async def opened(cls, scene: Scene) -> AsyncIterator[InProcess]:
        log, pair = Log(), scene.pair("warm")
        async with AsyncExitStack() as stack:
            payer, payee = [await stack.enter_async_context(cls._desk(scene, wallet, log)) for wallet in pair]
            yield cls(pair[1], payer, payee, log)

    @staticmethod
    @asynccontextmanager
    async def _desk(scene: Scene, wallet: NodeWallet, log: Log) -> AsyncIterator[Payjoin]:
        """As an app has it, at the pace that regtest has by itself; only the clocks are added."""

        def rpc() -> BitcoindRpc:
            return BitcoindRpc(wallet.url, cookie_login(wallet.node.cookie.read_bytes), network=Network.REGTEST)

        home = scene.home / wallet.name
        home.mkdir()
        async with AsyncExitStack() as stack:
            store = await SqlStore.open(f"sqlite:///{home / 'pjv2.sqlite'}")
            stack.push_async_callback(store.close)
            chain, coins = BitcoindChain(rpc()), BitcoindWallet(rpc(), home)
            stack.push_async_callback(chain.close)
            stack.push_async_callback(coins.close)
            room = HttpMailroom(
                [Service(scene.post.relay.url, "operator of the relay")],
                [Service(scene.post.directory.url, "operator of the directory")],
                ca_file=scene.tls.root_pem,
                cache=store,
            )
            stack.push_async_callback(room.close)
            ports: dict[str, Any] = {"wallet": coins, "chain": chain, "store": store, "mailroom": room}
            timed = {name: Timed(port, name, log) for name, port in ports.items()}
            yield await stack.enter_async_context(Payjoin.open(Config(network=Network.REGTEST), notify=log, **timed))

    async def pay(self) -> dict[str, float]:
        request = await self._payee.receive(AMOUNT)
        self._log.clear()
        async with driven(request) as paid:
            await self._log.polls.wait()
            mempool = asyncio.create_task(asyncio.to_thread(Mempool(self._coins).entered))
            began, computed = time.perf_counter(), time.process_time()
            payment = await self._payer.send(request.uri, fee_rate=FEE_RATE)
            async with driven(payment) as sent:
                ended, asked = await mempool
                computed = time.process_time() - computed
                measured = self._measured(began, ended) | {
                    "warm": ended - began,
                    "warm_computed": computed,
                    "warm_requests": asked,
                }
                await asyncio.to_thread(self._coins.node.mine, CONFIRMED)
                await asyncio.gather(paid, sent)
        return measured

    def _measured(self, began: float, ended: float) -> dict[str, float]:
        """Its stages, and what of it was spent in the ports."""
        told, since = {}, began
        at = self._log.facts | {"mempool": ended}
        for stage, fact in STAGES:
            told[f"warm_{stage}"], since = at[fact] - since, at[fact]
        for port in PORTS:
            within = [(max(came, began), min(left, ended)) for came, left in self._log.calls.get(port, ())]
            within = [(came, left) for came, left in within if came < left]
            told[f"warm_in_{port}"] = sum(left - came for came, left in within)
            told[f"warm_calls_of_{port}"] = float(len(within))
        return told


# ---------------------------------------------------------------- the run


async def measure(home: Path, rounds: int) -> dict[str, float]:
    """The median of everything, in seconds or calls."""
    tls = certificates(home / "certificates")
    samples: dict[str, list[float]] = {}
    async with AsyncExitStack() as stack:
        with_programs = stack.enter_context(ExitStack())
        node = with_programs.enter_context(
            bitcoind(need("bitcoind"), home / "node", extra=["debug=validation", "debug=http"])
        )
        rooms = {
            name: with_programs.enter_context(mailroom(need("payjoin-mailroom-tls"), home / name, name=name, tls=tls))
            for name in ("directory", "relay")
        }
        scene = Scene(home, node, Post(**rooms, tls=tls), tls, rounds)
        cli, shell = ByPayjoinCli(scene), ByShell(scene)
        warm = await stack.enter_async_context(InProcess.opened(scene))
        for turn in range(WARM_UP + rounds):
            seen = await asyncio.to_thread(cli.pay) | await warm.pay() | await asyncio.to_thread(shell.pay)
            await asyncio.to_thread(node.mine)
            if turn >= WARM_UP:
                for name, value in seen.items():
                    samples.setdefault(name, []).append(value)
    return {name: statistics.median(values) for name, values in samples.items()}


def lines(medians: Mapping[str, float] | None) -> list[Line]:
    """Every figure in its order; without values when nothing could be measured."""

    def shown(name: str, unit: str, of: Callable[[Mapping[str, float]], float], bar: float | None = None) -> Line:
        return Line(name, None if medians is None else round(of(medians), 2), unit, bar)

    def ms(name: str) -> Line:
        return shown(name, "ms", lambda found: found[name] * 1000)

    def times(name: str) -> Line:
        return shown(f"{name}_per_payjoin_cli", "ratio", lambda found: found[name] / found["payjoin_cli"], BARS[name])

    return [
        *map(ms, CASES),
        *map(times, BARS),
        *(ms(f"warm_{stage}") for stage, _ in STAGES),
        *(ms(f"warm_in_{port}") for port in PORTS),
        *(shown(f"warm_calls_of_{p}", "calls", lambda found, p=p: found[f"warm_calls_of_{p}"]) for p in PORTS),
        *map(ms, ("warm_computed", "shell_created")),
        *(shown(f"{case}_requests", "requests", lambda found, c=case: found[f"{c}_requests"]) for case in CASES),
    ]


def main() -> int:
    """Print every figure; 0 when the bars hold, or nothing could be measured."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    told = parser.parse_args()
    if missing := missing_because(*PEERS):
        print(f"bench_payment: {missing}", file=sys.stderr)
        figures = lines(None)
    else:
        with tempfile.TemporaryDirectory() as home:
            figures = lines(asyncio.run(measure(Path(home), max(1, told.rounds))))
    for line in figures:
        print(line.show(as_json=told.json))
    return 0 if all(line.ok is not False for line in figures) else 1


if __name__ == "__main__":
    sys.exit(main())
