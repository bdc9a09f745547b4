"""A process that shares a wallet file: it does what one line of JSON after the other asks, and answers each with a line.

Run as a module; `Sharer` is the other end. No line is sent before it is ready, and nothing is waited for by time.
"""

from __future__ import annotations

import asyncio
import json
import signal
import sqlite3
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from pjv2.backends.wallet.bdk import BdkWallet, Electrum, Esplora, MnemonicKeys, words_from_entropy
from pjv2.backends.wallet.bdk_file import WalletFile
from pjv2.errors import PayjoinError
from pjv2.psbt.tx import Psbt, TxOut
from pjv2.units import FeeRate, Network, Outpoint

ROOT = Path(__file__).parents[4]
RATE = FeeRate.from_sat_per_vb(3)
ANYONE = bytes.fromhex("0020" + "11" * 32)


class Sharer:
    """The process, seen from the test. Its calls block."""

    def __init__(self) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.unit.backends.wallet.sharer"],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def tell(self, **asked: Any) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(asked) + "\n")
        self.process.stdin.flush()

    def hear(self) -> Any:
        assert self.process.stdout is not None
        answer = json.loads(self.process.stdout.readline())
        if "error" in answer:
            raise RuntimeError(answer["error"])
        return answer["is"]

    async def ask(self, **asked: Any) -> Any:
        def both() -> Any:
            self.tell(**asked)
            return self.hear()

        return await asyncio.to_thread(both)

    def signal(self, number: int) -> None:
        self.process.send_signal(number)

    def kill(self) -> None:
        """And wait until it is gone."""
        self.process.kill()
        self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout):
            assert pipe is not None
            pipe.close()


class _Server:
    def __init__(self) -> None:
        self.wallet: BdkWallet = None  # type: ignore[assignment]  # `open` comes first
        self.path = Path()

    async def open(self, path: str, server: str | None = None, **how: Any) -> str:
        if self.wallet is not None:
            await self.wallet.close()
        self.path = Path(path)
        source = None if server is None else (Esplora if server.startswith("http") else Electrum)(server)
        self.wallet = await BdkWallet.open(
            self.path, MnemonicKeys(words_from_entropy(bytes(16))), Network.REGTEST, sync=source, **how
        )
        return await self.wallet.fingerprint()

    async def close(self) -> None:
        await self.wallet.close()

    async def addresses(self, count: int, change: bool = False) -> list[tuple[int, str]]:
        given = [await self.wallet.new_address(change=change) for _ in range(count)]
        return [(address.index, address.script.hex()) for address in given]

    async def lock(self, coins: list[str], lock_id: str, until: float) -> list[str]:
        refused = await self.wallet.lock([Outpoint.parse(coin) for coin in coins], bytes.fromhex(lock_id), until)
        return [str(coin) for coin in refused]

    async def unlock(self, coins: list[str], lock_id: str) -> None:
        await self.wallet.unlock([Outpoint.parse(coin) for coin in coins], bytes.fromhex(lock_id))

    async def coins(self) -> list[str]:
        return [str(coin.outpoint) for coin in await self.wallet.coins()]

    async def fund(self, value: int, lock_id: str) -> str:
        psbt = await self.wallet.fund([TxOut(value, ANYONE)], RATE, bytes.fromhex(lock_id), time.time() + 600)
        return Psbt.parse(psbt).extract().raw.hex()

    async def saw(self, tx: str, ago: float) -> None:
        await self.wallet._do(WalletFile.saw, bytes.fromhex(tx), time.time() - ago)

    async def balance(self) -> int:
        return await self.wallet.balance()

    async def sync(self) -> None:
        await self.wallet.sync()

    async def stay_in_a_turn(self) -> None:
        """Reveals without storing, says that it is there, and does not end."""

        def stay(file: Any) -> None:
            file._wallet.reveal_next_address(file._branches[0])
            _say("in a turn")
            signal.pause()

        await self.wallet._do(stay)

    async def die_while_writing(self) -> None:
        """Leaves pages of an unfinished change in the file, and the journal to undo it, as a crash of the disk's owner does."""

        def write(file: Any) -> None:
            with sqlite3.connect(self.path, isolation_level=None) as half:
                half.execute("PRAGMA cache_size = 1")
                half.execute("BEGIN")
                half.execute("UPDATE bdk_descriptor_last_revealed SET last_revealed = 4000")
                half.execute("CREATE TABLE noise (line)")
                for _ in range(200):
                    half.execute("INSERT INTO noise VALUES (zeroblob(2000))")
                _say("half written")
                signal.pause()

        await self.wallet._do(write)


def _say(answer: Any) -> None:
    print(json.dumps({"is": answer}), flush=True)


async def _serve() -> None:
    server = _Server()
    while line := await asyncio.to_thread(sys.stdin.readline):
        asked = json.loads(line)
        try:
            _say(await getattr(server, asked.pop("do"))(**asked))
        except PayjoinError as exc:
            print(json.dumps({"error": f"{type(exc).__name__}: {exc}"}), flush=True)


if __name__ == "__main__":
    asyncio.run(_serve())
