"""An Electrum server over the lab's chain: JSON-RPC in lines over TCP (or TLS), protocol 1.4, on loopback.

It speaks what BDK's client and our own chain source ask for, batches included, and tells subscribers of new blocks and histories.
It refuses unknown methods and wrong parameters with JSON-RPC errors, as deployed servers do.

Law: what it tells is what the chain tells at this moment; lies are told only on request, by `overrides`.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import socket
import ssl
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeAlias

from pjv2.errors import NotNow
from pjv2.lab.chain import LabChain
from pjv2.lab.esplora import ScriptIndex, merkle_branch, txid_of
from pjv2.lab.httpd import HttpServer
from pjv2.lab.ledger import LabTx
from pjv2.psbt.tx import hash256
from pjv2.units import Outpoint

SOFTWARE = "pjv2 lab 1.4"
PROTOCOL = "1.4"
MAX_HEADERS = 2016
MAX_LINE = 8_000_000
_PARSE, _REQUEST, _METHOD, _PARAMS, _BAD, _DAEMON = -32700, -32600, -32601, -32602, 1, 2

Handler: TypeAlias = Callable[["_Client", list[Any]], Awaitable[Any]]


class Refusal(Exception):
    """A request that is answered with a JSON-RPC error."""

    def __init__(self, code: int, message: str) -> None:
        super().__init__(message)
        self.code = code


@dataclass(eq=False)
class _Client:
    writer: asyncio.StreamWriter
    tip: str | None = None
    """Hash of the tip that was told last; None without a subscription."""
    scripts: dict[str, str | None] = field(default_factory=dict)
    """Script hashes under subscription and the status told last."""

    def send(self, message: object) -> None:
        self.writer.write(json.dumps(message).encode() + b"\n")


class ElectrumServer(HttpServer):
    """The Electrum protocol over a `LabChain`; `url` is `tcp://host:port` or `ssl://host:port`.

    Subscribers are told of news at the latest `watch` seconds after they happened, at once by `announce()`. `overrides` answers a
    method with what it makes of the parameters instead of the truth; `seen` lists the methods that were called. `offline` and
    `stall` work as in `HttpServer`; its HTTP faults have no meaning here.
    """

    def __init__(
        self,
        chain: LabChain,
        *,
        watch: float = 0.2,
        host: str = "127.0.0.1",
        port: int = 0,
        ssl_context: ssl.SSLContext | None = None,
        name: str | None = None,
    ) -> None:
        super().__init__(host=host, port=port, ssl_context=ssl_context, name=name)
        self.chain = chain
        self.overrides: dict[str, Callable[[list[Any]], Any]] = {}
        self.seen: list[str] = []
        self._tls = ssl_context is not None
        self._watch = watch
        self._watcher: asyncio.Task[None] | None = None
        self._clients: set[_Client] = set()
        self._index = ScriptIndex(chain)
        self._handlers: Mapping[str, Handler] = {
            "server.version": self._version,
            "server.banner": self._banner,
            "server.donation_address": self._nothing_to_tell,
            "server.features": self._features,
            "server.ping": self._ping,
            "server.peers.subscribe": self._peers,
            "blockchain.headers.subscribe": self._headers_subscribe,
            "blockchain.block.header": self._header,
            "blockchain.block.headers": self._headers,
            "blockchain.scripthash.subscribe": self._subscribe,
            "blockchain.scripthash.unsubscribe": self._unsubscribe,
            "blockchain.scripthash.get_history": self._get_history,
            "blockchain.scripthash.get_mempool": self._get_mempool,
            "blockchain.scripthash.listunspent": self._listunspent,
            "blockchain.scripthash.get_balance": self._get_balance,
            "blockchain.transaction.get": self._transaction,
            "blockchain.transaction.get_merkle": self._get_merkle,
            "blockchain.transaction.id_from_pos": self._id_from_pos,
            "blockchain.transaction.broadcast": self._broadcast,
            "blockchain.estimatefee": self._estimatefee,
            "blockchain.relayfee": self._relayfee,
            "mempool.get_fee_histogram": self._histogram,
        }

    @property
    def url(self) -> str:
        """tcp://host:port or ssl://host:port."""
        return f"{'ssl' if self._tls else 'tcp'}://{self._name}:{self.port}"

    async def start(self) -> None:
        await super().start()
        if self._watcher is None:
            self._watcher = asyncio.get_running_loop().create_task(self._watching())

    async def stop(self) -> None:
        if self._watcher is not None:
            self._watcher.cancel()
            await asyncio.gather(self._watcher, return_exceptions=True)
            self._watcher = None
        await super().stop()

    def announce(self) -> None:
        """Tell every subscriber what is new since it was last told."""
        for client in self._clients:
            tip = self.chain.block(self.chain.height)
            if client.tip is not None and client.tip != tip.hash:
                client.tip = tip.hash
                client.send(_notice("blockchain.headers.subscribe", [{"height": tip.height, "hex": tip.header.hex()}]))
            for name, told in client.scripts.items():
                status = self._status(name)
                if status != told:
                    client.scripts[name] = status
                    client.send(_notice("blockchain.scripthash.subscribe", [name, status]))

    async def _watching(self) -> None:
        while True:
            await asyncio.sleep(self._watch)
            self.announce()

    # ------------------------------------------------------------ lines

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        client = _Client(writer)
        self._clients.add(client)
        # Many small answers in a row: the second must not wait until the first is acknowledged.
        writer.get_extra_info("socket").setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        try:
            await self._talk(client, reader)
        except (OSError, EOFError, ssl.SSLError, asyncio.CancelledError):
            pass  # the other side left, or this server was stopped: the connection is cut below either way
        finally:
            self._clients.discard(client)
            writer.transport.abort()

    async def _talk(self, client: _Client, reader: asyncio.StreamReader) -> None:
        held = bytearray()
        while data := await reader.read(65_536):
            held += data
            while (end := held.find(b"\n")) >= 0:
                line = bytes(held[:end])
                del held[: end + 1]
                await self._moving.wait()
                answer = await self._answer(client, line)
                if answer is not None:
                    client.send(answer)
                    await client.writer.drain()
            if len(held) > MAX_LINE:
                return

    async def _answer(self, client: _Client, line: bytes) -> object:
        try:
            asked = json.loads(line)
        except ValueError:
            return _error(None, _PARSE, "invalid JSON")
        if not isinstance(asked, list):
            return await self._call(client, asked)
        if not asked:
            return _error(None, _REQUEST, "empty batch")
        answers = [await self._call(client, one) for one in asked]
        return [answer for answer in answers if answer is not None] or None

    async def _call(self, client: _Client, asked: object) -> dict[str, Any] | None:
        if not isinstance(asked, dict) or not isinstance(asked.get("method"), str):
            return _error(None, _REQUEST, "no request")
        id, method, params = asked.get("id"), asked["method"], asked.get("params", [])
        self.seen.append(method)
        handler = self._handlers.get(method)
        try:
            if handler is None:
                raise Refusal(_METHOD, f'unknown method "{method}"')
            if not isinstance(params, list):
                raise Refusal(_PARAMS, "parameters must be a list")
            if self.chain.offline:
                raise Refusal(_DAEMON, "daemon error: the chain does not answer")
            lie = self.overrides.get(method)
            result = await handler(client, params) if lie is None else lie(params)
        except Refusal as exc:
            return _error(id, exc.code, str(exc))
        except NotNow as exc:
            return _error(id, _DAEMON, f"daemon error: {exc}")
        return None if id is None else {"jsonrpc": "2.0", "result": result, "id": id}

    # ------------------------------------------------------------ server.*

    async def _version(self, client: _Client, params: list[Any]) -> list[str]:
        wanted = params[1] if len(params) > 1 else PROTOCOL
        low, high = wanted if isinstance(wanted, list) and len(wanted) == 2 else (wanted, wanted)
        if not _version_of(low) <= _version_of(PROTOCOL) <= _version_of(high):
            raise Refusal(_BAD, f"unsupported protocol version: {wanted}")
        return [SOFTWARE, PROTOCOL]

    async def _banner(self, client: _Client, params: list[Any]) -> str:
        return "A laboratory: its coins are worth nothing."

    async def _nothing_to_tell(self, client: _Client, params: list[Any]) -> str:
        return ""

    async def _features(self, client: _Client, params: list[Any]) -> dict[str, Any]:
        return {
            "genesis_hash": self.chain.block(0).hash,
            "hosts": {},
            "protocol_max": PROTOCOL,
            "protocol_min": PROTOCOL,
            "pruning": None,
            "server_version": SOFTWARE,
            "hash_function": "sha256",
        }

    async def _ping(self, client: _Client, params: list[Any]) -> None:
        return None

    async def _peers(self, client: _Client, params: list[Any]) -> list[Any]:
        return []

    # ------------------------------------------------------------ blocks

    async def _headers_subscribe(self, client: _Client, params: list[Any]) -> dict[str, Any]:
        tip = self.chain.block(self.chain.height)
        client.tip = tip.hash
        return {"height": tip.height, "hex": tip.header.hex()}

    async def _header(self, client: _Client, params: list[Any]) -> object:
        height = self._height(params, 0)
        header = self.chain.block(height).header.hex()
        checkpoint = _int(params, 1, 0)
        return header if not checkpoint else self._proof(height, checkpoint) | {"header": header}

    async def _headers(self, client: _Client, params: list[Any]) -> dict[str, Any]:
        start, count = _int(params, 0), min(_int(params, 1), MAX_HEADERS)
        checkpoint = _int(params, 2, 0)
        heights = range(start, min(start + count, self.chain.height + 1))
        told: dict[str, Any] = {
            "count": len(heights),
            "hex": "".join(self.chain.block(height).header.hex() for height in heights),
            "max": MAX_HEADERS,
        }
        return told | (self._proof(heights[-1], checkpoint) if checkpoint and heights else {})

    def _proof(self, height: int, checkpoint: int) -> dict[str, Any]:
        if not height <= checkpoint <= self.chain.height:
            raise Refusal(
                _BAD, f"header height {height:,d} must be <= cp_height {checkpoint:,d} which must be <= the tip"
            )
        leaves = [hash256(self.chain.block(n).header) for n in range(checkpoint + 1)]
        branch = merkle_branch(leaves, height)
        root, place = leaves[height], height
        for node in branch:
            root = hash256(node + root if place & 1 else root + node)
            place >>= 1
        return {"branch": [node[::-1].hex() for node in branch], "root": root[::-1].hex()}

    # ------------------------------------------------------------ scripts

    async def _subscribe(self, client: _Client, params: list[Any]) -> str | None:
        name = _hash(params, 0)
        client.scripts[name] = self._status(name)
        return client.scripts[name]

    async def _unsubscribe(self, client: _Client, params: list[Any]) -> bool:
        name = _hash(params, 0)
        known = name in client.scripts
        client.scripts.pop(name, None)
        return known

    async def _get_history(self, client: _Client, params: list[Any]) -> list[dict[str, Any]]:
        return [self._listed(entry) for entry in self._ordered(_hash(params, 0))]

    async def _get_mempool(self, client: _Client, params: list[Any]) -> list[dict[str, Any]]:
        return [self._listed(entry) for entry in self._ordered(_hash(params, 0)) if entry.height is None]

    async def _listunspent(self, client: _Client, params: list[Any]) -> list[dict[str, Any]]:
        return [
            {"tx_hash": entry.txid, "tx_pos": vout, "height": entry.height or 0, "value": value}
            for entry, vout, value in self._unspent(_hash(params, 0))
        ]

    async def _get_balance(self, client: _Client, params: list[Any]) -> dict[str, int]:
        """Confirmed coins, and by how much the mempool changes them."""
        name = _hash(params, 0)
        script = self._index.find(_digest(name))
        confirmed = 0 if script is None else sum(out.value for out in self.chain.utxos(script).values())
        return {
            "confirmed": confirmed,
            "unconfirmed": sum(value for _, _, value in self._unspent(name)) - confirmed,
        }

    def _ordered(self, name: str) -> list[LabTx]:
        """In chain order, the mempool last."""
        return list(reversed(self._index.history(_digest(name))))

    def _unspent(self, name: str) -> list[tuple[LabTx, int, int]]:
        script = self._index.find(_digest(name))
        return [
            (entry, vout, out.value)
            for entry in self._ordered(name)
            for vout, out in enumerate(entry.tx.outputs)
            if out.script == script and self.chain.spender(Outpoint(entry.txid, vout)) is None
        ]

    def _listed(self, entry: LabTx) -> dict[str, Any]:
        if entry.height is not None:
            return {"tx_hash": entry.txid, "height": entry.height}
        parents = (self.chain.tx(spend.outpoint.txid) for spend in entry.tx.inputs)
        unconfirmed = any(parent is not None and parent.height is None for parent in parents)
        return {"tx_hash": entry.txid, "height": -1 if unconfirmed else 0, "fee": entry.fee}

    def _status(self, name: str) -> str | None:
        listed = [self._listed(entry) for entry in self._ordered(name)]
        text = "".join(f"{one['tx_hash']}:{one['height']}:" for one in listed)
        return hashlib.sha256(text.encode()).hexdigest() if text else None

    # ------------------------------------------------------------ transactions

    async def _transaction(self, client: _Client, params: list[Any]) -> object:
        entry = self._known(_hash(params, 0))
        if len(params) < 2 or not params[1]:
            return entry.raw.hex()
        told: dict[str, Any] = {"hex": entry.raw.hex(), "txid": entry.txid, "hash": entry.wtxid, "size": len(entry.raw)}
        if entry.height is not None:
            block = self.chain.block(entry.height)
            told |= {
                "blockhash": block.hash,
                "confirmations": self.chain.height - entry.height + 1,
                "time": block.time,
                "blocktime": block.time,
            }
        return told

    async def _get_merkle(self, client: _Client, params: list[Any]) -> dict[str, Any]:
        entry = self.chain.tx(_hash(params, 0))
        height = self._height(params, 1)
        if entry is None or entry.height != height:
            raise Refusal(_BAD, f"tx {params[0]} not in block at height {height:,d}")
        return {"block_height": height, "merkle": self._branch(height, entry.position), "pos": entry.position}

    async def _id_from_pos(self, client: _Client, params: list[Any]) -> object:
        height, place = self._height(params, 0), _int(params, 1)
        txs = self.chain.block(height).txs
        if place >= len(txs):
            raise Refusal(_BAD, f"no tx at position {place:,d} in block at height {height:,d}")
        if len(params) < 3 or not params[2]:
            return txs[place].txid
        return {"tx_hash": txs[place].txid, "merkle": self._branch(height, place)}

    async def _broadcast(self, client: _Client, params: list[Any]) -> str:
        try:
            raw = bytes.fromhex(params[0])
        except (IndexError, TypeError, ValueError):
            raise Refusal(_BAD, "the transaction must be hex") from None
        result = await self.chain.broadcast(raw)
        if result.verdict == "refused":
            raise Refusal(_BAD, f"the transaction was rejected by network rules.\n\n{result.reason}\n[{raw.hex()}]")
        if result.verdict == "known" and result.reason == "txn-already-known":
            raise Refusal(_BAD, "the transaction was rejected by network rules.\n\ntransaction already in block chain")
        return txid_of(raw)

    def _known(self, txid: str) -> LabTx:
        entry = self.chain.tx(txid)
        if entry is None:
            raise Refusal(
                _DAEMON,
                "daemon error: DaemonError({'code': -5, 'message': 'No such mempool or blockchain transaction. "
                "Use gettransaction for wallet transactions.'})",
            )
        return entry

    def _branch(self, height: int, position: int) -> list[str]:
        leaves = [bytes.fromhex(entry.txid)[::-1] for entry in self.chain.block(height).txs]
        return [node[::-1].hex() for node in merkle_branch(leaves, position)]

    def _height(self, params: list[Any], place: int) -> int:
        height = _int(params, place)
        if height > self.chain.height:
            raise Refusal(_BAD, f"height {height:,d} out of range")
        return height

    # ------------------------------------------------------------ fees

    async def _estimatefee(self, client: _Client, params: list[Any]) -> float:
        return (await self.chain.fee_rate(_int(params, 0))).sat_per_kwu * 4 / 100_000_000

    async def _relayfee(self, client: _Client, params: list[Any]) -> float:
        return self.chain.min_relay.sat_per_kwu * 4 / 100_000_000

    async def _histogram(self, client: _Client, params: list[Any]) -> list[list[float]]:
        rates = sorted(((entry.fee / entry.vsize, entry.vsize) for entry in self.chain.mempool()), reverse=True)
        return [[rate, size] for rate, size in rates]


# ---------------------------------------------------------------- small things


def _version_of(text: object) -> tuple[int, ...]:
    try:
        parts = tuple(int(part) for part in str(text).split("."))
    except ValueError:
        raise Refusal(_BAD, f"invalid protocol version: {text}") from None
    return parts + (0,) * (3 - len(parts))


def _int(params: list[Any], place: int, default: int | None = None) -> int:
    value = params[place] if place < len(params) else default
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise Refusal(_BAD, f"{value} should be a non-negative integer")
    return value


def _hash(params: list[Any], place: int) -> str:
    value = params[place] if place < len(params) else None
    if isinstance(value, str) and len(value) == 64:
        try:
            return bytes.fromhex(value).hex()
        except ValueError:
            pass
    raise Refusal(_BAD, f"{value} should be a hash of 64 hex characters")


def _digest(name: str) -> bytes:
    """Electrum names scripts by their hash in reverse."""
    return bytes.fromhex(name)[::-1]


def _notice(method: str, params: list[Any]) -> dict[str, Any]:
    return {"jsonrpc": "2.0", "method": method, "params": params}


def _error(id: object, code: int, message: str) -> dict[str, Any]:
    return {"jsonrpc": "2.0", "error": {"code": code, "message": message}, "id": id}
