"""Bitcoin's real consensus by a bitcoind of one's own, for machines where libbitcoinkernel has no wheel.

The lab's chain needs three things of a consensus engine: judge a block, tell what it connected and disconnected, and verify
scripts against given previous outputs. A bitcoind on PATH does them over JSON-RPC: `submitblock`, block headers, and
`signrawtransactionwithkey` without a key, which verifies the signatures that are there. It runs on regtest in a temporary
directory, listens on loopback for RPC alone, speaks to nobody, and ends with the lab.

Law: it is the same engine behind the same three calls; the lab does not know which one judges.
"""

from __future__ import annotations

import base64
import http.client
import json
import os
import select
import shutil
import socket
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pjv2.errors import NotNow
from pjv2.psbt.coin import script_pushes
from pjv2.psbt.tx import ScriptKind, Tx, TxOut, kind_of

_START = 60.0
"""Seconds that a bitcoind may take to be ready on a busy machine."""

_USER = "pjv2"


class BitcoindKernel:
    """A private regtest bitcoind. Raises NotNow when `program` cannot be started."""

    def __init__(self, program: str) -> None:
        self._directory = Path(tempfile.mkdtemp(prefix="pjv2-lab-"))
        self._password = os.urandom(16).hex()
        self._connection: http.client.HTTPConnection | None = None
        self._process: subprocess.Popen[bytes] | None = None
        try:
            self._start(program)
        except BaseException:
            self.close()
            raise

    def _start(self, program: str) -> None:
        ready = self._directory / "ready"
        os.mkfifo(ready)
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self._port = probe.getsockname()[1]
        config = self._directory / "bitcoin.conf"
        config.touch(mode=0o600)
        config.write_text(
            f"regtest=1\nserver=1\nlisten=0\ndnsseed=0\nnatpmp=0\ndisablewallet=1\nprinttoconsole=0\npersistmempool=0\n"
            f"rpcuser={_USER}\nrpcpassword={self._password}\nstartupnotify=echo ready > {ready}\n"
            f"[regtest]\nconnect=0\nrpcbind=127.0.0.1\nrpcallowip=127.0.0.1\nrpcport={self._port}\n"
        )
        # Opened for both, so that neither side waits for the other to open it.
        notified = os.open(ready, os.O_RDWR | os.O_NONBLOCK)
        try:
            self._process = subprocess.Popen(  # noqa: S603  the program that the person has on PATH
                [program, f"-datadir={self._directory}", "-daemon=0"],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
            )
            if not self._comes_up(notified):
                raise NotNow(f"{program} did not come up: see that it is a bitcoind 29 or newer")
        except OSError as exc:
            raise NotNow(f"{program} cannot be started: {exc.strerror}") from exc
        finally:
            os.close(notified)

    def _comes_up(self, notified: int) -> bool:
        """Whether it says that it is ready, before it ends or the time is over."""
        if self._process is None:
            return False
        ended = os.pidfd_open(self._process.pid) if hasattr(os, "pidfd_open") else os.dup(notified)
        try:
            return notified in select.select({notified, ended}, [], [], _START)[0]
        finally:
            os.close(ended)

    def _call(self, method: str, *params: Any) -> Any:
        """The result of an RPC call, or RpcError."""
        body = json.dumps({"jsonrpc": "1.0", "id": 0, "method": method, "params": params})
        login = base64.b64encode(f"{_USER}:{self._password}".encode()).decode()
        if self._connection is None:
            self._connection = http.client.HTTPConnection("127.0.0.1", self._port, timeout=_START)
        try:
            self._connection.request("POST", "/", body, {"Authorization": f"Basic {login}"})
            answer = json.loads(self._connection.getresponse().read())
        except (OSError, http.client.HTTPException, ValueError) as exc:
            self._connection.close()
            self._connection = None
            raise NotNow(f"the lab's bitcoind does not answer: {type(exc).__name__}") from exc
        if answer.get("error") is not None:
            raise RpcError(str(answer["error"].get("message", "")))
        return answer["result"]

    # ------------------------------------------------------------ what the lab asks

    def genesis(self) -> tuple[bytes, list[bytes]]:
        """Header and transactions of block 0."""
        raw = bytes.fromhex(self._call("getblock", self._call("getblockhash", 0), 0))
        return raw[:80], [raw[81:]]

    def submit(self, raw: bytes) -> tuple[list[tuple[str, str]], str]:
        """Process a block; answers what was connected and disconnected, in order, and the reason of a refusal."""
        before = self._call("getbestblockhash")
        try:
            reason = self._call("submitblock", raw.hex()) or ""
        except RpcError as exc:
            return [], str(exc) or "the block cannot be decoded"
        after = self._call("getbestblockhash")
        if after == before:
            # A side branch that is only kept is no refusal.
            return [], "" if reason in ("inconclusive", "duplicate", "duplicate-inconclusive") else reason
        return self._path(before, after), ""

    def _path(self, before: str, after: str) -> list[tuple[str, str]]:
        """From one tip to another: disconnected blocks, the tip first, then connected ones in order."""
        gone: list[str] = []
        come: list[str] = []
        old, new = self._call("getblockheader", before), self._call("getblockheader", after)
        while old["hash"] != new["hash"]:
            if old["height"] >= new["height"]:
                gone.append(old["hash"])
                old = self._call("getblockheader", old["previousblockhash"])
            else:
                come.append(new["hash"])
                new = self._call("getblockheader", new["previousblockhash"])
        return [("disconnected", hash) for hash in gone] + [("connected", hash) for hash in reversed(come)]

    def first_bad_input(self, raw: bytes, prevouts: Sequence[TxOut]) -> int | None:
        """The first input whose script fails; None when all are good."""
        tx = Tx.parse(raw)
        given = [_prevout(tx, index, prevout) for index, prevout in enumerate(prevouts)]
        answer = self._call("signrawtransactionwithkey", raw.hex(), [], given)
        if answer["complete"]:
            return None
        failed = {(error["txid"], error["vout"]) for error in answer.get("errors", [])}
        bad = [index for index, txin in enumerate(tx.inputs) if tuple(txin.outpoint) in failed]
        return bad[0] if bad else 0

    def close(self) -> None:
        if self._connection is not None:
            self._connection.close()
        if self._process is not None:
            self._process.terminate()
            try:
                self._process.wait(_START)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
            self._process = None
        shutil.rmtree(self._directory, ignore_errors=True)


class RpcError(Exception):
    """bitcoind answered a call with an error."""


def _prevout(tx: Tx, index: int, prevout: TxOut) -> dict[str, Any]:
    """A previous output as bitcoind wants it told, with the script behind a hash, which the input itself reveals."""
    txin = tx.inputs[index]
    told: dict[str, Any] = {
        "txid": txin.outpoint.txid,
        "vout": txin.outpoint.vout,
        "scriptPubKey": prevout.script.hex(),
        "amount": f"{prevout.value // 100_000_000}.{prevout.value % 100_000_000:08d}",
    }
    kind = kind_of(prevout.script)
    pushes = script_pushes(txin.script_sig) if kind is ScriptKind.P2SH else None
    redeem = pushes[-1] if pushes else b""
    if kind is ScriptKind.P2SH:
        told["redeemScript"] = redeem.hex()
    if (kind is ScriptKind.P2WSH or kind_of(redeem) is ScriptKind.P2WSH) and txin.witness:
        told["witnessScript"] = txin.witness[-1].hex()
    return told
