"""A chain source over the Electrum protocol (1.4): JSON-RPC in lines, many requests at once on one TCP or TLS connection.

The connection is made when it is needed and made again after it broke. Electrum names scripts, not transactions or outputs: where a
transaction is, is read from the history of one of its outputs, and who spends an output from the history of its script. A
transaction in a block is proven to be in it by its merkle branch and the block's header; that headers were mined with the
network's real work is believed.

Law: an answer belongs to the request with its number; whatever else arrives is dropped, and a line that is no JSON ends the
connection.
"""

from __future__ import annotations

import asyncio
import hashlib
import itertools
import json
import re
import secrets
import ssl
from collections.abc import Callable, Iterable
from decimal import Decimal
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlsplit

from pjv2.backends.chain.remote import (
    DEFAULT_FLOOR,
    MAX_FEE_RATE,
    REQUEST_TIMEOUT,
    RemoteChain,
    Sighting,
    is_txid,
    together,
)
from pjv2.backends.mailroom.carrier import CONNECT_TIMEOUT
from pjv2.backends.mailroom.tunnel import Dialer, DirectDialer, SocksDialer, SocksProxy, tls_context
from pjv2.errors import NotNow, WrongUsage
from pjv2.psbt.tx import Tx, hash256
from pjv2.session.facts import Tip
from pjv2.units import FeeRate, Network, Outpoint, Txid

T = TypeVar("T")

PROTOCOL = "1.4"
IN_FLIGHT = 32
MAX_LINE = 16_000_000
MAX_PROVEN = 10_000
_CHUNK = 1 << 16
_PATIENT = 1_008
_METHOD_UNKNOWN = -32601
_MISSING = re.compile(r"no such mempool|no such transaction|missing transaction|not found|'code': -5|\"code\": ?-5")


class ServerSaid(Exception):
    """The server answered a request with an error; it does not leave this module."""

    def __init__(self, code: int, message: str) -> None:
        super().__init__(message)
        self.code = code


class _Lost(Exception):
    """The connection broke; its message says how."""


class _Wire:
    """One connection: requests out, answers matched by number, notifications dropped."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer
        self._waiting: dict[int, asyncio.Future[Any]] = {}
        self._number = 0
        self.lost = ""
        self._task = asyncio.get_running_loop().create_task(self._read())

    async def call(self, method: str, params: list[Any]) -> Any:
        """The result. Raises ServerSaid, _Lost."""
        if self._writer.transport.is_closing():
            self._end("closed the connection")
        if self.lost:
            raise _Lost(self.lost)
        self._number += 1
        number = self._number
        future: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        self._waiting[number] = future
        try:
            message = {"jsonrpc": "2.0", "id": number, "method": method, "params": params}
            self._writer.write(json.dumps(message).encode() + b"\n")
            await self._writer.drain()
            return await future
        except OSError as exc:
            self._end("broke the connection")
            raise _Lost(self.lost) from exc
        finally:
            self._waiting.pop(number, None)
            if future.done() and not future.cancelled():
                future.exception()  # read, so that a failure after the caller left is not reported as lost

    async def close(self) -> None:
        self._end("was closed")
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)

    def _end(self, how: str) -> None:
        self.lost = self.lost or how
        self._writer.transport.abort()
        for future in self._waiting.values():
            if not future.done():
                future.set_exception(_Lost(self.lost))

    async def _read(self) -> None:
        held = bytearray()
        try:
            while data := await self._reader.read(_CHUNK):
                start = len(held)
                held += data
                while (end := held.find(b"\n", start)) >= 0:
                    self._take(bytes(held[:end]))
                    del held[: end + 1]
                    start = 0
                if len(held) > MAX_LINE:
                    raise ValueError("a line is too long")
        except OSError:
            self._end("broke the connection")
        except (ValueError, RecursionError):
            self._end("sends what is not the Electrum protocol")
        finally:
            self._end("closed the connection")

    def _take(self, line: bytes) -> None:
        told = json.loads(line, parse_float=Decimal)
        for one in told if isinstance(told, list) else [told]:
            if not isinstance(one, dict):
                raise ValueError("no JSON-RPC")
            future = self._waiting.get(one["id"]) if isinstance(one.get("id"), int) else None
            if future is None or future.done():
                continue  # a notification, or nobody waits any more
            error = one.get("error")
            if error is None:
                future.set_result(one.get("result"))
            else:
                code, message = (error.get("code"), error.get("message")) if isinstance(error, dict) else (0, error)
                future.set_exception(ServerSaid(code if isinstance(code, int) else 0, str(message)))


class ElectrumChain(RemoteChain):
    """A `ports.Chain` over an Electrum server at `url`, which is `tcp://host:port` or `ssl://host:port`.

    `proxy` is `socks5h://host:port`, `ca_file` one more trust root in PEM (servers often sign their own certificate: name it here),
    `timeout` the seconds for one answer. Raises WrongUsage when one of them cannot be used. Every other refusal is NotNow, but for a
    server on another network (WrongUsage). Packages cannot be broadcast: protocol 1.4 has no word for them.
    """

    def __init__(
        self,
        url: str,
        *,
        network: Network,
        proxy: str | None = None,
        ca_file: Path | None = None,
        timeout: float = REQUEST_TIMEOUT,
    ) -> None:
        self._address, secure = _address_of(url)
        super().__init__(self._address[0], network)
        self._tls: ssl.SSLContext | None = tls_context(ca_file) if secure else None
        self._dialer: Dialer = DirectDialer() if proxy is None else SocksDialer(SocksProxy.parse(proxy))
        self._circuit = f"pjv2-{secrets.token_hex(8)}"
        self._timeout = timeout
        self._gate = asyncio.Semaphore(IN_FLIGHT)
        self._connecting = asyncio.Lock()
        self._wire: _Wire | None = None
        self._last: tuple[bytes, Tip] | None = None
        self._proven: dict[Txid, tuple[int, bytes]] = {}

    async def close(self) -> None:
        await super().close()
        if self._wire is not None:
            wire, self._wire = self._wire, None
            await wire.close()

    async def genesis_hash(self) -> str:
        return hash256(await self._header(0))[::-1].hex()

    async def fee_rate(self, blocks: int) -> FeeRate:
        """The server's estimate, never below what its node relays. NotNow when bitcoin's server has none."""
        found, floor = await together(self._estimate(blocks), self._relay_fee())
        if found is None and self._network is Network.BITCOIN:
            raise NotNow(f"the chain source {self.host} has no fee estimate now", after=60.0)
        rate: FeeRate = max(DEFAULT_FLOOR if found is None else found, floor)
        return rate

    # ------------------------------------------------------------ questions

    async def _tip(self) -> Tip:
        told = await self._ask_well("blockchain.headers.subscribe")
        height, header = self._read("the tip", lambda: (_whole(told["height"]), _hex(told["hex"], 80)))
        if self._last is not None and self._last[0] == header:
            return self._last[1]
        headers = await self._headers_to(height)
        if headers[-1] != header:
            raise NotNow(f"the chain source {self.host} moved while it was read", after=1.0)
        tip = Tip(height, hash256(header)[::-1].hex(), _median(headers))
        self._last = header, tip
        return tip

    async def _header(self, height: int) -> bytes:
        told = await self._ask_well("blockchain.block.header", height)
        header = self._read("a block header", lambda: _hex(told, 80))
        if not _is_worked(header):
            raise self._garbage("a block header without work")
        return header

    async def _headers_to(self, height: int) -> list[bytes]:
        """The last eleven headers up to `height`, linked."""
        start = max(height - 10, 0)
        count = height - start + 1
        told = await self._ask_well("blockchain.block.headers", start, count)
        data = self._read("block headers", lambda: _hex(told["hex"], 80 * count))
        headers = [data[n : n + 80] for n in range(0, len(data), 80)]
        linked = all(hash256(one) == after[4:36] for one, after in itertools.pairwise(headers))
        if not linked or not all(map(_is_worked, headers)):
            raise self._garbage("block headers that do not follow each other")
        return headers

    async def _time_before(self, height: int) -> float:
        return _median(await self._headers_to(height - 1))

    async def _raw(self, txid: Txid) -> bytes | None:
        try:
            told = await self._ask("blockchain.transaction.get", txid)
        except ServerSaid as exc:
            if _MISSING.search(str(exc).lower()):
                return None
            raise self._said(exc) from exc
        return self._read("a transaction", lambda: _hex(told))

    async def _sighting(self, txid: Txid) -> Sighting | None:
        tx = await self._tx(txid)
        if tx is None:
            return None
        height = await self._height_of(tx)
        if height is None:
            return None
        if height == 0:
            return Sighting(tx, None)
        header = await self._prove(txid, height)
        return Sighting(tx, height, hash256(header)[::-1].hex())

    async def _height_of(self, tx: Tx) -> int | None:
        """Where a transaction is, 0 for the mempool, from the history of one of its outputs; None when it is gone."""
        scripts = list(dict.fromkeys(out.script for out in tx.outputs if not out.script.startswith(b"\x6a")))
        trouble: ServerSaid | None = None
        for script in scripts:
            try:
                return dict(await self._listed(script)).get(tx.txid)
            except ServerSaid as exc:
                trouble = exc  # a history too long for this server; another output may have a shorter one
        if trouble is not None:
            raise self._said(trouble) from trouble
        parent = await self._tx(tx.inputs[0].outpoint.txid)
        if parent is None or tx.inputs[0].outpoint.vout >= len(parent.outputs):
            raise NotNow(f"the chain source {self.host} cannot tell where a transaction without spendable outputs is")
        return dict(await self._history_of(parent.outputs[tx.inputs[0].outpoint.vout].script)).get(tx.txid)

    async def _prove(self, txid: Txid, height: int) -> bytes:
        """The header of the block that holds a transaction, whose merkle root it is proven to lead to."""
        header = await self._header(height)
        if self._proven.get(txid) != (height, header):
            told = await self._ask_well("blockchain.transaction.get_merkle", txid, height)
            branch, place = self._read(
                "a merkle branch", lambda: ([_hex(node, 32)[::-1] for node in told["merkle"]], _whole(told["pos"]))
            )
            root = bytes.fromhex(txid)[::-1]
            for node in branch:
                root = hash256(node + root if place & 1 else root + node)
                place >>= 1
            if root != header[36:68] or place:
                raise self._garbage("a merkle branch that does not lead to its block")
            if len(self._proven) >= MAX_PROVEN:
                self._proven.clear()
            self._proven[txid] = (height, header)
        return header

    async def _spender(self, outpoint: Outpoint, parent: Sighting) -> Txid | None:
        script = parent.tx.outputs[outpoint.vout].script
        if script.startswith(b"\x6a"):
            return None
        # A spend stands in the parent's block or above it.
        low = parent.height or 0
        later = [
            txid
            for txid, height in await self._history_of(script)
            if txid != outpoint.txid and (height == 0 or (height >= low and parent.height is not None))
        ]
        txs = await together(*(self._tx(txid) for txid in later))
        return next((tx.txid for tx in txs if tx is not None and any(i.outpoint == outpoint for i in tx.inputs)), None)

    async def _history(self, script: bytes, since: int) -> Iterable[Txid]:
        return [txid for txid, height in await self._history_of(script) if height == 0 or height >= since]

    async def _history_of(self, script: bytes) -> list[tuple[Txid, int]]:
        try:
            return await self._listed(script)
        except ServerSaid as exc:
            raise self._said(exc) from exc

    async def _listed(self, script: bytes) -> list[tuple[Txid, int]]:
        """What touches a script, with heights, 0 for the mempool. Raises ServerSaid when there is too much of it."""
        told = await self._ask("blockchain.scripthash.get_history", hashlib.sha256(script).digest()[::-1].hex())
        return self._read("a history", lambda: [(_txid(one["tx_hash"]), _height(one["height"])) for one in _list(told)])

    async def _estimate(self, blocks: int) -> FeeRate | None:
        return self._read_rate(await self._ask_well("blockchain.estimatefee", blocks))

    async def _relay_fee(self) -> FeeRate:
        return self._read_rate(await self._ask_well("blockchain.relayfee")) or FeeRate(0)

    async def _floor(self) -> FeeRate:
        # A node never estimates below what its mempool takes now; its relay fee alone says nothing of a full mempool.
        patient, relay = await together(self._estimate(_PATIENT), self._relay_fee())
        floor: FeeRate = max(relay, DEFAULT_FLOOR if patient is None else patient)
        return floor

    def _read_rate(self, told: Any) -> FeeRate | None:
        """A rate in BTC/kB; None for the -1 of a server that has none."""
        rate = self._read("a fee rate", lambda: Decimal(told) if type(told) in (int, Decimal) else Decimal("NaN"))
        if rate == -1:
            return None
        if not rate.is_finite() or not 0 <= rate * 25_000_000 <= MAX_FEE_RATE.sat_per_kwu:
            raise self._garbage("a fee rate that cannot be")
        return FeeRate.from_sat_per_vb(rate * 100_000)

    async def _submit(self, raw: bytes) -> str | None:
        try:
            await self._ask("blockchain.transaction.broadcast", raw.hex())
        except ServerSaid as exc:
            if exc.code == _METHOD_UNKNOWN:
                raise self._said(exc) from exc
            # Servers repeat the whole transaction in brackets behind the reason.
            words = re.sub(r"\s*\[[0-9a-f]*\]\s*\Z", "", str(exc))
            return self._refusal(words.removeprefix("the transaction was rejected by network rules.").strip())
        return None

    # ------------------------------------------------------------ the connection

    async def _ask_well(self, method: str, *params: Any) -> Any:
        try:
            return await self._ask(method, *params)
        except ServerSaid as exc:
            raise self._said(exc) from exc

    async def _ask(self, method: str, *params: Any) -> Any:
        """The server's answer. Raises ServerSaid, NotNow; a connection found broken is made again once."""
        self._open()
        async with self._gate:
            for again in (True, False):
                fresh = self._wire is None or bool(self._wire.lost)
                wire = await self._connected()
                try:
                    async with asyncio.timeout(self._timeout):
                        return await wire.call(method, list(params))
                except TimeoutError as exc:
                    await wire.close()
                    raise NotNow(f"the chain source {self.host} does not answer in time") from exc
                except _Lost as exc:
                    if not again or fresh or method == "blockchain.transaction.broadcast":
                        raise NotNow(f"the chain source {self.host} {exc}") from exc
        raise NotNow(f"the chain source {self.host} cannot be reached")

    async def _connected(self) -> _Wire:
        async with self._connecting:
            self._open()
            if self._wire is not None and not self._wire.lost:
                return self._wire
            host, port = self._address
            try:
                async with asyncio.timeout(min(self._timeout, CONNECT_TIMEOUT)):
                    reader, writer = await self._dialer.dial(host, port, self._circuit)
                    try:
                        if self._tls is not None:
                            await writer.start_tls(self._tls, server_hostname=host)
                    except BaseException:
                        writer.transport.abort()
                        raise
            except ssl.SSLCertVerificationError as exc:
                raise NotNow(
                    f"the certificate of the chain source {host} does not verify: name its CA in ca_file"
                ) from exc
            except (OSError, EOFError) as exc:  # TimeoutError is an OSError
                raise NotNow(f"the chain source {host} cannot be reached") from exc
            self._wire = wire = _Wire(reader, writer)
            try:
                async with asyncio.timeout(self._timeout):
                    await wire.call("server.version", ["pjv2", PROTOCOL])
            except ServerSaid as exc:
                await wire.close()
                raise NotNow(
                    f"the chain source {host} does not speak version {PROTOCOL} of the Electrum protocol"
                ) from exc
            except (TimeoutError, _Lost) as exc:
                await wire.close()
                raise NotNow(f"the chain source {host} does not greet: it {exc or 'is silent'}") from exc
            except asyncio.CancelledError:
                await wire.close()
                raise
            return wire

    def _said(self, exc: ServerSaid) -> NotNow:
        return NotNow(f"the chain source {self.host} answers: {' '.join(str(exc).split())[:200]}")

    def _read(self, what: str, reading: Callable[[], T]) -> T:
        try:
            return reading()
        except (KeyError, IndexError, TypeError, ValueError, ArithmeticError) as exc:
            raise self._garbage(f"{what} that cannot be read") from exc


# ---------------------------------------------------------------- shapes of answers; all raise ValueError, TypeError or KeyError


def _hex(value: Any, size: int | None = None) -> bytes:
    if not isinstance(value, str):
        raise TypeError("no hex")
    data = bytes.fromhex(value)
    if size is not None and len(data) != size:
        raise ValueError("wrong size")
    return data


def _list(value: Any) -> list[Any]:
    if not isinstance(value, list):
        raise TypeError("no list")
    return value


def _whole(value: Any) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < 1 << 31:
        raise ValueError("no whole number")
    return value


def _height(value: Any) -> int:
    """Servers say -1 of a mempool transaction that has unconfirmed parents."""
    return 0 if value == -1 else _whole(value)


def _txid(value: Any) -> Txid:
    if not is_txid(value):
        raise ValueError("no hash")
    return str(value)


def _median(headers: list[bytes]) -> float:
    times = sorted(int.from_bytes(header[68:72], "little") for header in headers)
    return float(times[len(times) // 2])


def _is_worked(header: bytes) -> bool:
    """Its hash is below the target that it names itself."""
    bits = int.from_bytes(header[72:76], "little")
    target = (bits & 0x7FFFFF) << 8 * max((bits >> 24) - 3, 0)
    return int.from_bytes(hash256(header), "little") <= target


def _address_of(url: str) -> tuple[tuple[str, int], bool]:
    try:
        parts = urlsplit(url)
        host, port = parts.hostname, parts.port
    except ValueError as exc:
        raise WrongUsage("the URL of an Electrum server looks like ssl://host:50002") from exc
    plain = parts.path in {"", "/"} and not parts.query and parts.username is None
    if parts.scheme not in {"tcp", "ssl"} or not host or port is None or not plain:
        raise WrongUsage("the URL of an Electrum server looks like ssl://host:50002 or tcp://host:50001")
    return (host, port), parts.scheme == "ssl"
