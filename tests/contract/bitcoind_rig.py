"""A bitcoind on regtest of the tests' own, and the worlds around it that the contract suites ask for.

Without a bitcoind (on PATH, or from `make peers`) the tests that need one skip by name; with PJV2_PEERS=required they fail instead.
"""

from __future__ import annotations

import asyncio
import itertools
import os
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from pjv2.backends.bitcoind_rpc import BitcoindRpc, Call, Refused, cookie_login, in_btc
from pjv2.backends.chain.bitcoind import BitcoindChain
from pjv2.backends.wallet.bitcoind import BitcoindWallet
from pjv2.errors import NotNow
from pjv2.psbt.tx import Tx, script_to_address
from pjv2.testing.check_chain import ChainRig
from pjv2.testing.check_wallet import WalletRig
from pjv2.testing.clock import ManualClock
from pjv2.units import Network, Outpoint
from tests.peers.peers import find, missing_because, need, required

PATIENCE = 60.0
PASSPHRASE = "correct horse"
_numbers = itertools.count()


needs_bitcoind = pytest.mark.skipif(
    find("bitcoind").path is None and not required(), reason=missing_because("bitcoind") or "there is one"
)


class Bitcoind:
    """A regtest node in a directory of its own; `restart` writes another cookie."""

    def __init__(self, home: Path, *options: str) -> None:
        self.home = home
        self.options = options
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self.process: subprocess.Popen[bytes] | None = None

    @property
    def cookie(self) -> Path:
        return self.home / "regtest" / ".cookie"

    def url(self, wallet: str | None = None) -> str:
        return f"http://127.0.0.1:{self.port}" + (f"/wallet/{wallet}" if wallet is not None else "")

    def rpc(self, wallet: str | None = None, **more: Any) -> BitcoindRpc:
        def read() -> bytes:
            try:
                return self.cookie.read_bytes()
            except OSError as exc:
                raise NotNow(f"{self.cookie} cannot be read now") from exc

        return BitcoindRpc(
            self.url(wallet),
            more.pop("login", cookie_login(read)),
            network=more.pop("network", Network.REGTEST),
            **more,
        )

    async def start(self, *options: str) -> None:
        found = str(need("bitcoind"))
        # A build with other defaults of its own is given Core's.
        policy = ["-mempooltruc=enforce"] if "Knots" in find("bitcoind").version else []
        self.process = subprocess.Popen(  # noqa: ASYNC220  it only starts it
            [
                found, "-regtest", f"-datadir={self.home}", "-server=1", "-daemon=0", "-printtoconsole=0", "-listen=0",
                "-dnsseed=0", "-connect=0", "-keypool=5", "-fallbackfee=0.00001", "-rpcbind=127.0.0.1",
                "-rpcallowip=127.0.0.1", f"-rpcport={self.port}", *policy, *self.options, *options,
            ],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )  # fmt: skip
        rpc, until = self.rpc(), time.monotonic() + PATIENCE
        try:
            while True:
                try:
                    await rpc.greet()
                    return
                except NotNow:
                    assert self.process.poll() is None, "bitcoind ended"
                    assert time.monotonic() < until, "bitcoind did not come up"
                    await asyncio.sleep(0.05)
        finally:
            await rpc.close()

    def stop(self) -> None:
        if self.process is not None:
            self.process.terminate()
            try:
                self.process.wait(PATIENCE)
            finally:
                self.process.kill()
            self.process = None

    async def restart(self, *options: str) -> None:
        self.stop()
        await self.start(*options)


@contextmanager
def running(*options: str) -> Iterator[Bitcoind]:
    """A node with a miner who has mature coins."""
    home = Path(tempfile.mkdtemp(prefix="pjv2-bitcoind-"))
    node = Bitcoind(home, *options)

    async def begin() -> None:
        await node.start()
        async with miner_of(node) as miner:
            await miner.call("createwallet", "miner")
            miner.address = await miner.call("getnewaddress", "", "bech32")
            await miner.mine(101)

    try:
        asyncio.run(begin())
        yield node
    finally:
        node.stop()
        shutil.rmtree(home, ignore_errors=True)


class Miner:
    """The rest of the world: it mines, pays, and undoes blocks."""

    def __init__(self, node: Bitcoind) -> None:
        self.node = node
        self.rpc = node.rpc("miner")
        self.address = ""

    async def call(self, method: str, *params: Any, wallet: BitcoindRpc | None = None) -> Any:
        rpc = wallet or self.rpc
        answer = await rpc.do(Call(method, params))
        if isinstance(answer, Refused) and answer.code == -18 and method != "loadwallet" and wallet is None:
            await rpc.do(Call("loadwallet", ("miner",)))
            answer = await rpc.do(Call(method, params))
        assert not isinstance(answer, Refused), f"{method}: {answer}"
        return answer

    async def mine(self, blocks: int = 1) -> None:
        if not self.address:
            self.address = await self.call("getnewaddress", "", "bech32")
        await self.call("generatetoaddress", blocks, self.address)

    async def mine_empty(self, blocks: int = 1) -> None:
        """Blocks that leave the mempool as it is."""
        if not self.address:
            self.address = await self.call("getnewaddress", "", "bech32")
        for _ in range(blocks):
            await self.call("generateblock", self.address, [])

    async def mine_to(self, script: bytes) -> Outpoint:
        (block,) = await self.call("generatetoaddress", 1, script_to_address(script, Network.REGTEST))
        found = await self.call("getblock", block, 1)
        return Outpoint(found["tx"][0], 0)

    async def pay(self, script: bytes, value: int) -> Outpoint:
        """An unconfirmed payment."""
        address = script_to_address(script, Network.REGTEST)
        txid = await self.call("sendtoaddress", address, in_btc(value))
        tx = Tx.parse(bytes.fromhex((await self.call("gettransaction", txid))["hex"]))
        return Outpoint(txid, [(out.value, out.script) for out in tx.outputs].index((value, script)))

    async def fund(self, script: bytes, value: int) -> Outpoint:
        outpoint = await self.pay(script, value)
        await self.mine()
        return outpoint

    async def reorg(self, depth: int = 1) -> None:
        height = await self.call("getblockcount")
        lost = await self.call("getblockhash", height - depth + 1)
        await self.call("invalidateblock", lost)
        await self.mine_empty(depth + 1)

    async def settle(self) -> None:
        await self.call("syncwithvalidationinterfacequeue")

    async def in_mempool(self) -> set[str]:
        return set(await self.call("getrawmempool"))


@asynccontextmanager
async def miner_of(node: Bitcoind) -> AsyncIterator[Miner]:
    miner = Miner(node)
    try:
        yield miner
    finally:
        await miner.rpc.close()


@asynccontextmanager
async def rpc_of(node: Bitcoind, wallet: str | None = None, **more: Any) -> AsyncIterator[BitcoindRpc]:
    rpc = node.rpc(wallet, **more)
    try:
        yield rpc
    finally:
        await rpc.close()


async def new_wallet(miner: Miner, *, passphrase: str = "", **more: Any) -> str:
    """A fresh wallet at the node; unlocked when it has a passphrase. Its name."""
    name = f"w{next(_numbers)}-{os.getpid()}"
    params = {"wallet_name": name, "passphrase": passphrase or None, **more}
    answer = await miner.rpc.do(Call("createwallet", {k: v for k, v in params.items() if v is not None}))
    assert not isinstance(answer, Refused), answer
    if passphrase:
        await unlock(miner.node, name)
    return name


async def unlock(node: Bitcoind, name: str, seconds: int = 600) -> None:
    async with rpc_of(node, name) as rpc:
        answer = await rpc.do(Call("walletpassphrase", (PASSPHRASE, seconds)))
    assert not isinstance(answer, Refused), answer


@asynccontextmanager
async def wallet_rig(node: Bitcoind, home: Path, kind: Any, *, passphrase: str = "") -> AsyncIterator[WalletRig]:
    clock = ManualClock()
    async with miner_of(node) as miner:
        name = await new_wallet(miner, passphrase=passphrase)
        chain = BitcoindChain(node.rpc())
        opened: list[BitcoindWallet] = []

        async def reopen() -> BitcoindWallet:
            if opened:
                await opened[-1].close()
            opened.append(BitcoindWallet(node.rpc(name), home, address_type=kind, now=clock.now))
            return opened[-1]

        async def advance(seconds: float) -> None:
            clock.advance(seconds)

        async def lock_signing(locked: bool) -> None:
            if locked:
                async with rpc_of(node, name) as rpc:
                    await rpc.do(Call("walletlock"))
            else:
                await unlock(node, name)

        wallet = await reopen()
        try:
            yield WalletRig(
                wallet,
                chain,
                miner.fund,
                miner.mine,
                settle=miner.settle,
                now=clock.now,
                reopen=reopen,
                advance=advance,
                lock_signing=lock_signing if passphrase else None,
                mine_to=miner.mine_to,
            )
        finally:
            await opened[-1].close()
            await chain.close()
            async with rpc_of(node, name) as rpc:
                await rpc.do(Call("unloadwallet"))


class Switch(httpx.AsyncHTTPTransport):
    """A cable that can be pulled."""

    off = False

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        if self.off:
            raise httpx.ConnectError("pulled")
        return await super().handle_async_request(request)


@asynccontextmanager
async def chain_rig(node: Bitcoind, *, wallet: bool = False) -> AsyncIterator[ChainRig]:
    cable = Switch()
    async with miner_of(node) as miner:
        name = await new_wallet(miner) if wallet else None
        chain = BitcoindChain(node.rpc(name, transport=cable))

        async def evict(txid: str) -> None:
            """No node throws out what it likes: it forgets its mempool over a restart."""
            await node.restart("-persistmempool=0")

        async def offline(off: bool) -> None:
            cable.off = off

        async def mine(blocks: int) -> None:
            """Each block a second after the one before, however fast they are made."""
            best = await miner.call("getblockheader", await miner.call("getbestblockhash"))
            at = max(best["time"], int(time.time()))
            for _ in range(blocks):
                at += 1
                await miner.call("setmocktime", at)
                await miner.mine()
            await miner.call("setmocktime", 0)

        await mine(11)  # blocks of one second have one median time for a while
        try:
            yield ChainRig(
                chain,
                miner.fund,
                mine,
                settle=miner.settle,
                packages=False,  # nodes take a parent without any fee only in transactions of version 3
                reorg=miner.reorg,
                evict=evict,
                offline=offline,
            )
        finally:
            await chain.close()
