"""A chain source over the HTTP API of Esplora (Blockstream's, mempool's and electrs' servers).

`POST /txs/test` and `POST /txs/package` are used where the server has them. Redirects are not followed, cookies not kept, proxies
not read from the environment. Through a SOCKS5 proxy names are resolved there, on a circuit of this chain source's own.

Law: whatever a server answers that is not what was asked for is NotNow; a URL, which may hold a token, is in no message.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import secrets
from collections.abc import Callable, Iterable, Sequence
from datetime import timedelta
from decimal import Decimal
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlsplit

from pyreqwest.client import Client, ClientBuilder
from pyreqwest.exceptions import BuilderError, PyreqwestError, RequestError
from pyreqwest.proxy import ProxyBuilder

from pjv2.backends.chain.remote import (
    DEFAULT_FLOOR,
    MAX_FEE_RATE,
    MAX_TX_BYTES,
    REQUEST_TIMEOUT,
    RemoteChain,
    Sighting,
    is_txid,
)
from pjv2.backends.heed import heeding
from pjv2.backends.mailroom.carrier import CONNECT_TIMEOUT, read_ca_file
from pjv2.backends.mailroom.tunnel import SocksProxy
from pjv2.errors import NotNow, WrongUsage
from pjv2.psbt.original import Suitability
from pjv2.psbt.tx import Tx
from pjv2.session.facts import Tip
from pjv2.units import FeeRate, Network, Outpoint, Txid

T = TypeVar("T")

IN_FLIGHT = 8
PAGE = 25
MAX_PAGES = 400
MAX_ANSWER = 16_000_000
_MAX_TARGET = 1_008
_KNOWN = {"txn-already-in-mempool", "txn-already-known", "txn-same-nonwitness-data-in-mempool"}


class EsploraChain(RemoteChain):
    """A `ports.Chain` over an Esplora server at `url`, a path prefix such as `/api` included.

    `proxy` is `socks5h://host:port`, `ca_file` one more trust root in PEM, `timeout` the seconds for one answer. Raises WrongUsage
    when url, proxy or ca_file cannot be used. Every other refusal is NotNow, but for a server on another network (WrongUsage).
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
        super().__init__(_host_of(url), network)
        self._url = url.rstrip("/")
        self._timeout = timedelta(seconds=timeout)
        self._gate = asyncio.Semaphore(IN_FLIGHT)
        self._tests = True
        self._packages = True
        builder = (
            ClientBuilder()
            .no_proxy()
            .follow_redirects(False)
            .referer(False)
            .default_cookie_store(False)
            .user_agent("pjv2")
            .connect_timeout(timedelta(seconds=min(timeout, CONNECT_TIMEOUT)))
        )
        if ca_file is not None:
            builder = builder.add_root_certificate_pem(read_ca_file(ca_file).encode())
        if proxy is not None:
            circuit = f"pjv2-{secrets.token_hex(8)}"
            builder = builder.proxy(ProxyBuilder.all(SocksProxy.parse(proxy).url(circuit)))
        try:
            self._client: Client = builder.build()
        except (BuilderError, ValueError) as exc:
            raise WrongUsage("the HTTP client cannot be built: check ca_file and proxy of the chain source") from exc

    async def close(self) -> None:
        if not self._closed:
            await super().close()
            await self._client.close()

    async def genesis_hash(self) -> str:
        return await self._block_hash(0)

    async def fee_rate(self, blocks: int) -> FeeRate:
        """The cheapest estimate for a target that is not above `blocks`. NotNow when bitcoin's server has none."""
        estimates = await self._estimates()
        fitting = [rate for target, rate in estimates.items() if target <= blocks]
        if fitting:
            return min(fitting)
        if estimates:
            return estimates[min(estimates)]
        if self._network is Network.BITCOIN:
            raise NotNow(f"the chain source {self.host} has no fee estimates now", after=60.0)
        return DEFAULT_FLOOR

    # ------------------------------------------------------------ questions

    async def _tip(self) -> Tip:
        blocks = await self._get_json("/blocks", _list)
        if not blocks:
            raise self._garbage("no blocks")
        return self._read("a block", lambda: _tip_of(blocks[0]))

    async def _block_hash(self, height: int) -> str:
        found = await self._get(f"/block-height/{height}")
        text = "" if found is None else found.decode("ascii", "replace").strip()
        if not is_txid(text):
            raise self._garbage("no block hash")
        return text

    async def _raw(self, txid: Txid) -> bytes | None:
        return await self._get(f"/tx/{txid}/raw", limit=MAX_TX_BYTES)

    async def _sighting(self, txid: Txid) -> Sighting | None:
        # Not /status, which deployed servers answer for transactions that they never heard of.
        found = await self._get(f"/tx/{txid}")
        if found is None:
            return None
        told = self._read("a transaction", lambda: _dict(_json(found)))
        height, block = self._read("the status of a transaction", lambda: _place_of(told["status"]))
        tx = await self._tx(txid)
        return None if tx is None else Sighting(tx, height, block)

    async def _spender(self, outpoint: Outpoint, parent: Sighting) -> Txid | None:
        found = await self._get(f"/tx/{outpoint.txid}/outspend/{outpoint.vout}")
        if found is None:
            return None
        return self._read("the spend of an output", lambda: _spender_of(_dict(_json(found))))

    async def _history(self, script: bytes, since: int) -> Iterable[Txid]:
        path = f"/scripthash/{hashlib.sha256(script).hexdigest()}/txs"
        page = await self._page(path)
        seen = [txid for txid, _ in page]
        confirmed = [(txid, height) for txid, height in page if height is not None]
        if len(page) - len(confirmed) >= PAGE:
            seen += [txid for txid, _ in await self._page(f"{path}/mempool")]
        for _ in range(MAX_PAGES):
            if len(confirmed) < PAGE or confirmed[-1][1] < since:
                return seen
            page = await self._page(f"{path}/chain/{confirmed[-1][0]}")
            confirmed = [(txid, height) for txid, height in page if height is not None]
            seen += [txid for txid, _ in confirmed]
        raise NotNow(f"the chain source {self.host} lists too many transactions of one script")

    async def _page(self, path: str) -> list[tuple[Txid, int | None]]:
        told = await self._get_json(path, _list)
        return self._read("a history", lambda: [(_txid(one["txid"]), _place_of(one["status"])[0]) for one in told])

    async def _time_before(self, height: int) -> float:
        blocks = await self._get_json(f"/blocks/{height - 1}", _list)
        tip = self._read("a block", lambda: _tip_of(blocks[0]))
        if tip.height != height - 1:
            raise self._garbage("another block than the one asked for")
        return tip.median_time

    async def _estimates(self) -> dict[int, FeeRate]:
        told = await self._get_json("/fee-estimates", _dict)
        return self._read("fee estimates", lambda: _rates_of(told))

    async def _floor(self) -> FeeRate:
        # A node never estimates below what its mempool takes now.
        estimates = await self._estimates()
        return min(estimates.values(), default=DEFAULT_FLOOR)

    async def _submit(self, raw: bytes) -> str | None:
        status, body = await self._ask("POST", "/tx", raw.hex().encode())
        return None if status == 200 else self._refusal(body.decode("utf-8", "replace"))

    async def _submit_package(self, raws: Sequence[bytes]) -> str | None:
        if self._packages:
            status, body = await self._ask("POST", "/txs/package", _hex_list(raws))
            if status == 200:
                return self._read("the verdict on a package", lambda: _package_reason(_dict(_json(body))))
            if status == 400:
                return self._refusal(body.decode("utf-8", "replace"))
            self._packages = False
        return await super()._submit_package(raws)

    async def _server_test(self, raw: bytes) -> Suitability | None:
        if not self._tests:
            return None
        status, body = await self._ask("POST", "/txs/test", _hex_list([raw]))
        if status == 200:
            return self._read(
                "the verdict on a transaction", lambda: _verdict_of(_list(_json(body)), Tx.parse(raw).txid)
            )
        if status == 400:
            return Suitability("refused", self._refusal(body.decode("utf-8", "replace")))
        self._tests = False  # this server has no such thing
        return None

    # ------------------------------------------------------------ HTTP

    async def _get(self, path: str, limit: int = MAX_ANSWER) -> bytes | None:
        """The answer; None for what the server does not have."""
        status, body = await self._ask("GET", path, limit=limit)
        if status == 404 or (status == 400 and b"not found" in body.lower()):
            return None
        if status != 200:
            raise NotNow(f"the chain source {self.host} answered {status}")
        return body

    async def _get_json(self, path: str, shape: Callable[[Any], T]) -> T:
        body = await self._get(path)
        if body is None:
            raise self._garbage("404 where every server has something")
        return self._read("JSON", lambda: shape(_json(body)))

    async def _ask(self, method: str, path: str, body: bytes = b"", limit: int = MAX_ANSWER) -> tuple[int, bytes]:
        return await heeding(self._asked(method, path, body, limit))

    async def _asked(self, method: str, path: str, body: bytes, limit: int) -> tuple[int, bytes]:
        self._open()
        ask = self._client.post if method == "POST" else self._client.get
        async with self._gate:
            try:
                builder = ask(self._url + path).timeout(self._timeout)
                request = (builder.body_bytes(body) if body else builder).build_streamed()
                async with request as response:
                    received = bytearray()
                    while len(received) <= limit:
                        chunk = await response.body_reader.read(min(limit + 1 - len(received), 1 << 18))
                        if not chunk:
                            break
                        received += bytes(chunk)
                    status, after = response.status, response.headers.get("retry-after")
            except RequestError as exc:
                raise NotNow(f"the chain source {self.host} cannot be reached or does not answer") from exc
            except PyreqwestError as exc:
                raise WrongUsage("the URL of the chain source cannot be used") from exc
        if len(received) > limit:
            raise self._garbage(f"more than {limit} bytes")
        if status == 429 or status >= 500:
            wait = (
                float(after) if after is not None and after.isascii() and after.isdigit() and len(after) < 6 else None
            )
            if status != 501:
                raise NotNow(f"the chain source {self.host} answered {status}", after=wait)
        return status, bytes(received)

    def _read(self, what: str, reading: Callable[[], T]) -> T:
        try:
            return reading()
        except (KeyError, IndexError, TypeError, ValueError, ArithmeticError) as exc:
            raise self._garbage(f"{what} that cannot be read") from exc


# ---------------------------------------------------------------- shapes of answers; all raise ValueError, TypeError or KeyError


def _json(body: bytes) -> Any:
    return json.loads(body, parse_float=Decimal)


def _list(value: Any) -> list[Any]:
    if not isinstance(value, list):
        raise TypeError("no list")
    return value


def _dict(value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise TypeError("no object")
    return value


def _whole(value: Any) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < 1 << 53:
        raise ValueError("no whole number")
    return value


def _txid(value: Any) -> Txid:
    if not is_txid(value):
        raise ValueError("no hash")
    return str(value)


def _tip_of(block: Any) -> Tip:
    return Tip(_whole(block["height"]), _txid(block["id"]), float(_whole(block["mediantime"])))


def _place_of(status: Any) -> tuple[int | None, str]:
    if status["confirmed"] is False:
        return None, ""
    if status["confirmed"] is not True:
        raise ValueError("neither confirmed nor not")
    return _whole(status["block_height"]), _txid(status["block_hash"])


def _spender_of(told: dict[str, Any]) -> Txid | None:
    if told["spent"] is False:
        return None
    return _txid(told["txid"])


def _rates_of(told: dict[str, Any]) -> dict[int, FeeRate]:
    rates = {}
    for target, rate in told.items():
        number = Decimal(rate) if type(rate) in (int, Decimal) else Decimal("NaN")
        found = FeeRate.from_sat_per_vb(number) if number.is_finite() and number > 0 else None
        if found is None or found > MAX_FEE_RATE or not 0 < int(target) <= _MAX_TARGET:
            raise ValueError("no fee rate")
        rates[int(target)] = found
    return rates


def _verdict_of(told: list[Any], txid: Txid) -> Suitability:
    (one,) = told
    if one["txid"] != txid:
        raise ValueError("another transaction")
    if one["allowed"] is True:
        return Suitability("accepted")
    reason = str(one.get("reject-reason") or "no reason was given")[:200]
    return Suitability("known" if reason in _KNOWN else "refused", reason)


def _package_reason(told: dict[str, Any]) -> str | None:
    results = _dict(told["tx-results"]).values()
    errors = [str(one["error"]) for one in results if one.get("error")]
    if told["package_msg"] == "success" and not errors:
        return None
    return (errors or [str(told["package_msg"])])[-1][:200]


def _hex_list(raws: Sequence[bytes]) -> bytes:
    return json.dumps([raw.hex() for raw in raws]).encode()


def _host_of(url: str) -> str:
    try:
        parts = urlsplit(url)
        host, _ = parts.hostname, parts.port
    except ValueError as exc:
        raise WrongUsage("the URL of the Esplora server cannot be read") from exc
    if parts.scheme not in {"http", "https"} or not host or parts.query or parts.fragment:
        raise WrongUsage("the URL of an Esplora server looks like https://host/api")
    return host
