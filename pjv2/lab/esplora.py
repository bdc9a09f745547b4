"""An Esplora server over the lab's chain: the HTTP API that BDK's client and our own chain source speak, on loopback.

Paths and members are those of Blockstream's and mempool's servers. It has no addresses, assets or statistics beyond counts. Two
bonuses of mempool's servers can be switched off, because not every server has them: `POST /txs/test` and `POST /txs/package`.

Law: what it tells is what the chain tells at this moment; lies are told only on request, by `overrides`.
"""

from __future__ import annotations

import hashlib
import json
import re
import ssl
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from pjv2.errors import NotNow, PeerMistake
from pjv2.lab.chain import LabChain
from pjv2.lab.httpd import HttpRequest, HttpResponse, HttpServer, Tunnel
from pjv2.lab.ledger import LabBlock, LabTx
from pjv2.psbt.tx import Tx, TxOut, hash256
from pjv2.units import Outpoint

PAGE = 25
"""Confirmed transactions on a page of a script's history; of unconfirmed ones there are twice as many."""

BLOCKS = 10
"""Blocks in one answer of `/blocks`."""

TARGETS = (*range(1, 26), 144, 504, 1008)
"""The confirmation targets of `/fee-estimates`."""

_HASH = re.compile(r"[0-9a-fA-F]{64}\Z")
_NUMBER = re.compile(r"[0-9]{1,9}\Z")
_MAX_DIFFICULTY_TARGET = 0xFFFF << 208


class ScriptIndex:
    """Scripts by their SHA-256, as Esplora and Electrum name them; a chain names them by themselves."""

    def __init__(self, chain: LabChain) -> None:
        self._chain = chain
        self._seen: set[str] = set()
        self._scripts: dict[bytes, bytes] = {}

    def find(self, digest: bytes) -> bytes | None:
        """The script with this hash; None when no transaction ever paid it."""
        for height in range(self._chain.height, -1, -1):
            block = self._chain.block(height)
            if block.hash in self._seen:
                break  # and with it everything below
            self._seen.add(block.hash)
            self._note(block.txs)
        self._note(self._chain.mempool())
        return self._scripts.get(digest)

    def history(self, digest: bytes) -> tuple[LabTx, ...]:
        """What pays the script or spends from it: the mempool first, then from the tip down."""
        script = self.find(digest)
        return () if script is None else self._chain.history(script)

    def _note(self, txs: Sequence[LabTx]) -> None:
        for entry in txs:
            for out in entry.tx.outputs:
                self._scripts.setdefault(hashlib.sha256(out.script).digest(), out.script)


def merkle_branch(leaves: Sequence[bytes], position: int) -> list[bytes]:
    """The hashes that lead from a leaf to the root, from below."""
    branch = []
    row = list(leaves)
    while len(row) > 1:
        if len(row) % 2:
            row.append(row[-1])
        branch.append(row[position ^ 1])
        row = [hash256(row[n] + row[n + 1]) for n in range(0, len(row), 2)]
        position //= 2
    return branch


class EsploraServer(HttpServer):
    """The HTTP API of Esplora over a `LabChain`. `url` has no path; a client may put `/api` in front of every path.

    `tests` and `packages` switch `POST /txs/test` and `POST /txs/package`; `overrides` answers a path (without `/api`) with what it
    is given instead of the truth; `seen` lists every request as `METHOD path`. The faults of `HttpServer` strike GET requests too.
    """

    max_body = 4_000_000

    def __init__(
        self,
        chain: LabChain,
        *,
        tests: bool = True,
        packages: bool = True,
        host: str = "127.0.0.1",
        port: int = 0,
        ssl_context: ssl.SSLContext | None = None,
        name: str | None = None,
    ) -> None:
        super().__init__(host=host, port=port, ssl_context=ssl_context, name=name)
        self.chain = chain
        self.tests = tests
        self.packages = packages
        self.overrides: dict[str, HttpResponse | Callable[[], HttpResponse]] = {}
        self.seen: list[str] = []
        self._index = ScriptIndex(chain)

    async def respond(self, request: HttpRequest) -> HttpResponse | Tunnel:
        path = request.path.removeprefix("/api")
        self.seen.append(f"{request.method} {path}")
        if self.chain.offline:
            return _text(503, "the chain does not answer")
        lie = self.overrides.get(path)
        if lie is not None:
            return lie if isinstance(lie, HttpResponse) else lie()
        words = path.strip("/").split("/")
        try:
            if request.method == "POST":
                return await self._post(words, request.body)
            if request.method in {"GET", "HEAD"}:
                return await self._get(words)
        except NotNow as exc:
            return _text(503, str(exc))
        return _text(405, "Method Not Allowed")

    def _fault(self, request: HttpRequest) -> HttpResponse | None:
        return super()._fault(replace(request, method="POST"))

    # ------------------------------------------------------------ routes

    async def _get(self, words: list[str]) -> HttpResponse:
        found: HttpResponse | None = None
        match words:
            case ["blocks"]:
                found = self._blocks(self.chain.height)
            case ["blocks", "tip", "height"]:
                found = _text(200, str(self.chain.height))
            case ["blocks", "tip", "hash"]:
                found = _text(200, self.chain.block(self.chain.height).hash)
            case ["blocks", start] if _NUMBER.match(start):
                found = self._blocks(int(start))
            case ["block-height", height] if _NUMBER.match(height):
                if int(height) <= self.chain.height:
                    found = _text(200, self.chain.block(int(height)).hash)
            case ["block", hash, *rest] if _HASH.match(hash):
                found = self._block(hash.lower(), rest)
            case ["tx", txid, *rest] if _HASH.match(txid):
                found = self._tx(txid.lower(), rest)
            case ["scripthash", digest, *rest] if _HASH.match(digest):
                found = self._script(bytes.fromhex(digest), rest)
            case ["mempool"]:
                pool = self.chain.mempool()
                found = _json(
                    {
                        "count": len(pool),
                        "vsize": sum(entry.vsize for entry in pool),
                        "total_fee": sum(entry.fee for entry in pool),
                        "fee_histogram": [],
                    }
                )
            case ["mempool", "txids"]:
                found = _json([entry.txid for entry in self.chain.mempool()])
            case ["fee-estimates"]:
                found = _json({str(n): (await self.chain.fee_rate(n)).sat_per_vb for n in TARGETS})
        return found or _text(404, "not found")

    async def _post(self, words: list[str], body: bytes) -> HttpResponse:
        match words:
            case ["tx"]:
                return await self._broadcast(body)
            case ["txs", "test"] if self.tests:
                return await self._test(body)
            case ["txs", "package"] if self.packages:
                return await self._package(body)
        return _text(404, "endpoint does not exist")

    def _blocks(self, start: int) -> HttpResponse | None:
        if start > self.chain.height:
            return None
        heights = range(start, max(start - BLOCKS, -1), -1)
        return _json([_block_json(self.chain.block(height)) for height in heights])

    def _block(self, hash: str, rest: list[str]) -> HttpResponse | None:
        block = self.chain.find_block(hash)
        if block is None:
            return None
        found: HttpResponse | None = None
        match rest:
            case []:
                found = _json(_block_json(block))
            case ["header"]:
                found = _text(200, block.header.hex())
            case ["raw"]:
                found = _bytes(block.raw)
            case ["status"]:
                best = block.height <= self.chain.height and self.chain.block(block.height).hash == hash
                above = self.chain.block(block.height + 1).hash if best and block.height < self.chain.height else None
                found = _json({"in_best_chain": best, "height": block.height if best else None, "next_best": above})
            case ["txids"]:
                found = _json([entry.txid for entry in block.txs])
            case ["txid", place] if _NUMBER.match(place) and int(place) < len(block.txs):
                found = _text(200, block.txs[int(place)].txid)
        return found

    def _tx(self, txid: str, rest: list[str]) -> HttpResponse | None:
        entry = self.chain.tx(txid)
        if entry is None:
            # The deployed servers say this of transactions that they never heard of.
            return _json({"confirmed": False}) if rest == ["status"] else None
        found: HttpResponse | None = None
        match rest:
            case []:
                found = _json(self._tx_json(entry))
            case ["status"]:
                found = _json(self._status(entry))
            case ["raw"]:
                found = _bytes(entry.raw)
            case ["hex"]:
                found = _text(200, entry.raw.hex())
            case ["outspends"]:
                found = _json([self._outspend(entry, vout) for vout in range(len(entry.tx.outputs))])
            case ["outspend", vout] if _NUMBER.match(vout):
                found = _json(self._outspend(entry, int(vout)))
            case ["merkle-proof"] if entry.height is not None:
                leaves = [bytes.fromhex(t.txid)[::-1] for t in self.chain.block(entry.height).txs]
                branch = [node[::-1].hex() for node in merkle_branch(leaves, entry.position)]
                found = _json({"block_height": entry.height, "merkle": branch, "pos": entry.position})
        return found

    def _script(self, digest: bytes, rest: list[str]) -> HttpResponse | None:
        history = self._index.history(digest)
        waiting = [entry for entry in history if entry.height is None]
        confirmed = [entry for entry in history if entry.height is not None]
        match rest:
            case []:
                return _json(
                    {
                        "scripthash": digest.hex(),
                        "chain_stats": {"tx_count": len(confirmed)},
                        "mempool_stats": {"tx_count": len(waiting)},
                    }
                )
            case ["txs"]:
                return _json([self._tx_json(entry) for entry in (*waiting[: 2 * PAGE], *confirmed[:PAGE])])
            case ["txs", "mempool"]:
                return _json([self._tx_json(entry) for entry in waiting[: 2 * PAGE]])
            case ["txs", "chain", *last] if len(last) < 2:
                known = [entry.txid for entry in confirmed]
                start = known.index(last[0]) + 1 if last and last[0] in known else 0
                return _json([self._tx_json(entry) for entry in confirmed[start : start + PAGE]])
            case ["utxo"]:
                script = self._index.find(digest)
                return _json(
                    [
                        {"txid": entry.txid, "vout": vout, "status": self._status(entry), "value": out.value}
                        for entry in history
                        for vout, out in enumerate(entry.tx.outputs)
                        if out.script == script and self.chain.spender(Outpoint(entry.txid, vout)) is None
                    ]
                )
        return None

    # ------------------------------------------------------------ sending

    async def _broadcast(self, body: bytes) -> HttpResponse:
        raw = _from_hex(body.decode("ascii", "replace"))
        if raw is None:
            return _text(400, "invalid hex")
        result = await self.chain.broadcast(raw)
        if result.verdict == "refused":
            return _text(400, f'sendrawtransaction RPC error: {{"code":-26,"message":{json.dumps(result.reason)}}}')
        if result.verdict == "known" and result.reason == "txn-already-known":
            return _text(
                400, 'sendrawtransaction RPC error: {"code":-27,"message":"Transaction outputs already in utxo set"}'
            )
        return _text(200, txid_of(raw))

    async def _test(self, body: bytes) -> HttpResponse:
        raws = _hex_list(body)
        if raws is None or len(raws) > 25:
            return _text(400, "a list of at most 25 transactions in hex is needed")
        answers = []
        for raw in raws:
            verdict = await self.chain.test(raw)
            txid = txid_of(raw)
            if verdict.reason == "TX decode failed":
                return _text(400, 'testmempoolaccept RPC error: {"code":-22,"message":"TX decode failed"}')
            told: dict[str, Any] = {"txid": txid, "wtxid": hash256(raw)[::-1].hex()}
            told["allowed"] = verdict.verdict == "accepted"
            if verdict.verdict != "accepted":
                told["reject-reason"] = verdict.reason
            answers.append(told)
        return _json(answers)

    async def _package(self, body: bytes) -> HttpResponse:
        raws = _hex_list(body)
        if not raws or len(raws) > 25:
            return _text(400, "a list of at most 25 transactions in hex is needed")
        *parents, child = raws
        result = await self.chain.broadcast(child, parents=parents)
        done = result.verdict != "refused"
        told = {
            hash256(raw)[::-1].hex(): {"txid": txid_of(raw)} | ({} if done else {"error": result.reason})
            for raw in raws
        }
        return _json(
            {
                "package_msg": "success" if done else "transaction failed",
                "tx-results": told,
                "replaced-transactions": [],
            }
        )

    # ------------------------------------------------------------ members

    def _status(self, entry: LabTx) -> dict[str, Any]:
        if entry.height is None:
            return {"confirmed": False}
        block = self.chain.block(entry.height)
        return {
            "confirmed": True,
            "block_height": entry.height,
            "block_hash": block.hash,
            "block_time": block.time,
        }

    def _outspend(self, entry: LabTx, vout: int) -> dict[str, Any]:
        outpoint = Outpoint(entry.txid, vout)
        spender = self.chain.spender(outpoint)
        by = None if spender is None else self.chain.tx(spender)
        if by is None:
            return {"spent": False}
        vin = next(n for n, spend in enumerate(by.tx.inputs) if spend.outpoint == outpoint)
        return {"spent": True, "txid": by.txid, "vin": vin, "status": self._status(by)}

    def _tx_json(self, entry: LabTx) -> dict[str, Any]:
        tx = entry.tx
        inputs = []
        for n, spend in enumerate(tx.inputs):
            told: dict[str, Any] = {
                "txid": spend.outpoint.txid,
                "vout": spend.outpoint.vout,
                "prevout": _output_json(entry.prevouts[n]) if entry.prevouts else None,
                "scriptsig": spend.script_sig.hex(),
                "scriptsig_asm": "",
                "is_coinbase": entry.coinbase,
                "sequence": spend.sequence,
            }
            if spend.witness:
                told["witness"] = [item.hex() for item in spend.witness]
            inputs.append(told)
        return {
            "txid": entry.txid,
            "version": tx.version,
            "locktime": tx.locktime,
            "vin": inputs,
            "vout": [_output_json(out) for out in tx.outputs],
            "size": len(entry.raw),
            "weight": tx.weight,
            "fee": entry.fee,
            "status": self._status(entry),
        }


def txid_of(raw: bytes) -> str:
    """The id of a transaction, empty for bytes that are none."""
    try:
        return Tx.parse(raw).txid
    except PeerMistake:
        return ""


def _output_json(out: TxOut) -> dict[str, Any]:
    return {
        "scriptpubkey": out.script.hex(),
        "scriptpubkey_asm": "",
        "scriptpubkey_type": str(out.kind),
        "value": out.value,
    }


def _block_json(block: LabBlock) -> dict[str, Any]:
    bits = int.from_bytes(block.header[72:76], "little")
    target = (bits & 0x7FFFFF) << 8 * ((bits >> 24) - 3)
    return {
        "id": block.hash,
        "height": block.height,
        "version": int.from_bytes(block.header[:4], "little", signed=True),
        "timestamp": block.time,
        "tx_count": len(block.txs),
        "size": len(block.raw),
        "weight": block.weight,
        "merkle_root": block.header[36:68][::-1].hex(),
        "previousblockhash": None if block.height == 0 else block.previous,
        "mediantime": block.median_time,
        "nonce": int.from_bytes(block.header[76:80], "little"),
        "bits": bits,
        "difficulty": _MAX_DIFFICULTY_TARGET / target,
    }


def _from_hex(text: str) -> bytes | None:
    try:
        return bytes.fromhex(text.strip())
    except ValueError:
        return None


def _hex_list(body: bytes) -> list[bytes] | None:
    try:
        told = json.loads(body)
    except ValueError:
        return None
    if not isinstance(told, list) or not all(isinstance(item, str) for item in told):
        return None
    raws = [_from_hex(item) for item in told]
    return [raw for raw in raws if raw is not None] if None not in raws else None


def _text(status: int, text: str) -> HttpResponse:
    return HttpResponse(status, text.encode(), (("Content-Type", "text/plain"),))


def _bytes(data: bytes) -> HttpResponse:
    return HttpResponse(200, data, (("Content-Type", "application/octet-stream"),))


def _json(value: Mapping[str, Any] | Sequence[Any]) -> HttpResponse:
    return HttpResponse(200, json.dumps(value).encode(), (("Content-Type", "application/json"),))
