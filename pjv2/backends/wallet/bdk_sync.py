"""The servers that keep the embedded wallet current: Esplora over HTTP, or Electrum, through the library's own clients.

It refuses what the library cannot do in private: its Esplora client speaks no SOCKS, so a configured SOCKS proxy and a remote
Esplora server are not combined; Electrum goes through SOCKS, names included. A server learns which scripts belong together.

The library's calls block and cannot be cancelled. Each runs in a daemon thread of its own, so that a silent server keeps neither
the event loop nor the end of the process waiting; MINREQ_TIMEOUT ends its Esplora requests, Electrum has a timeout of its own.

Law: a server of another network is refused before anything it says is kept; its errors name its host and nothing else of its URL.
"""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import os
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeAlias, TypeVar
from urllib.parse import urlsplit

from pjv2.backends.wallet.bdk_keys import library
from pjv2.errors import NotNow, WrongUsage
from pjv2.psbt.tx import hash256
from pjv2.units import Txid

T = TypeVar("T")

REQUEST_TIMEOUT = 20
"""Seconds that one request may take. For Esplora it is set as MINREQ_TIMEOUT, one for the process, unless that is set already."""


@dataclass(frozen=True, slots=True)
class Esplora:
    """An Esplora server: `url` as in https://host/api, `proxy` an HTTP CONNECT proxy as in http://host:port."""

    url: str = field(repr=False)
    proxy: str | None = field(default=None, repr=False)
    parallel: int = 4

    @property
    def host(self) -> str:
        return _host(self.url)


@dataclass(frozen=True, slots=True)
class Electrum:
    """An Electrum server: `url` as in ssl://host:50002 or tcp://host:50001, `socks5` a proxy as host:port."""

    url: str = field(repr=False)
    socks5: str | None = field(default=None, repr=False)
    timeout: int = REQUEST_TIMEOUT
    batch: int = 20

    @property
    def host(self) -> str:
        return _host(self.url)


Source: TypeAlias = Esplora | Electrum


def source_for(backend: str, url: str | None, proxy: str | None = None) -> Source:
    """The server that `[chain]` names, for the wallet's own use. `proxy` is socks5h://host:port. Raises WrongUsage."""
    if backend not in ("esplora", "electrum"):
        raise WrongUsage(
            f'the embedded wallet is kept current by an Esplora or Electrum server, and [chain] backend is "{backend}": '
            'choose "esplora" or "electrum", or another [wallet] backend'
        )
    if url is None:
        raise WrongUsage(f"[chain] url is missing: the embedded wallet needs an {backend} server")
    schemes = ("http", "https") if backend == "esplora" else ("tcp", "ssl")
    if urlsplit(url).scheme not in schemes:
        raise WrongUsage(
            f"[chain] url must begin with {' or '.join(f'{scheme}://' for scheme in schemes)} for {backend}"
        )
    if urlsplit(url).username is not None:
        raise WrongUsage("[chain] url: the embedded wallet's client sends neither a user name nor a password")
    if proxy is not None and not _is_loopback(url):
        if backend == "esplora":
            raise WrongUsage(
                "the embedded wallet cannot reach an Esplora server through a SOCKS proxy, and does not go around it: "
                'choose [chain] backend = "electrum"'
            )
        return Electrum(url, socks5=urlsplit(proxy).netloc)
    return Esplora(url) if backend == "esplora" else Electrum(url)


def _host(url: str) -> str:
    return urlsplit(url).hostname or "the server"


def _is_loopback(url: str) -> bool:
    host = _host(url)
    with contextlib.suppress(ValueError):
        return ipaddress.ip_address(host).is_loopback
    return host == "localhost"


# ---------------------------------------------------------------- links


class Link(Protocol):
    """A client of one server; every call blocks."""

    def genesis(self) -> str:
        """The hash of the server's block 0."""
        ...

    def scan(self, request: Any, gap: int) -> Any:
        """An update by every script until `gap` unused ones in a row, on both branches."""
        ...

    def refresh(self, request: Any) -> Any:
        """An update by the revealed scripts."""
        ...

    def transaction(self, txid: Txid) -> bytes | None: ...


class EsploraLink:
    """The library's Esplora client. Opens a connection for each request."""

    def __init__(self, source: Esplora) -> None:
        # The client takes no timeout, and without this variable waits for ever.
        os.environ.setdefault("MINREQ_TIMEOUT", str(REQUEST_TIMEOUT))
        self._parallel = source.parallel
        self._client = library().EsploraClient(source.url.rstrip("/"), source.proxy)

    def genesis(self) -> str:
        return str(self._client.get_block_hash(0))

    def scan(self, request: Any, gap: int) -> Any:
        return self._client.full_scan(request, gap, self._parallel)

    def refresh(self, request: Any) -> Any:
        return self._client.sync(request, self._parallel)

    def transaction(self, txid: Txid) -> bytes | None:
        found = self._client.get_tx(library().Txid.from_string(txid))
        return None if found is None else bytes(found.serialize())


class ElectrumLink:
    """The library's Electrum client. Connects when it is made, and keeps the connection."""

    def __init__(self, source: Electrum) -> None:
        self._batch = source.batch
        self._client = library().ElectrumClient(source.url, source.socks5, source.timeout, 1, True)

    def genesis(self) -> str:
        header = self._client.block_header(0)
        fields = (
            header.version.to_bytes(4, "little", signed=True),
            header.prev_blockhash.serialize(),
            header.merkle_root.serialize(),
            *(number.to_bytes(4, "little") for number in (header.time, header.bits, header.nonce)),
        )
        return hash256(b"".join(fields))[::-1].hex()

    def scan(self, request: Any, gap: int) -> Any:
        return self._client.full_scan(request, gap, self._batch, False)

    def refresh(self, request: Any) -> Any:
        return self._client.sync(request, self._batch, False)

    def transaction(self, txid: Txid) -> bytes | None:
        # A protocol error is the answer of a server that does not know the transaction.
        with contextlib.suppress(library().ElectrumError.Protocol):
            return bytes(self._client.fetch_tx(library().Txid.from_string(txid)).serialize())
        return None


def connect(source: Source) -> Link:
    """A client of the server; blocks. Raises the library's errors: call it through `ask`."""
    return EsploraLink(source) if isinstance(source, Esplora) else ElectrumLink(source)


# ---------------------------------------------------------------- asking


def ask(source: Source, work: Callable[[], T]) -> T:
    """Do `work` with the library's clients; what they raise becomes NotNow, naming the server's host. Blocks."""
    bdk = library()
    try:
        return work()
    except (bdk.EsploraError, bdk.ElectrumError, bdk.RequestBuilderError, bdk.InternalError) as exc:
        words = _in_words(exc)
    # Outside of the except block: the library's error can quote the whole URL, and must not be the context of ours.
    raise NotNow(f"the wallet's server {source.host} {words}")


def _in_words(error: Any) -> str:
    bdk = library()
    if isinstance(error, bdk.EsploraError.HttpResponse):
        return f"answered {error.status}"
    if isinstance(error, bdk.EsploraError.Minreq):
        return "cannot be reached, or does not answer sensibly"
    if isinstance(error, bdk.ElectrumError) and not isinstance(
        error, bdk.ElectrumError.Protocol | bdk.ElectrumError.InvalidResponse | bdk.ElectrumError.Json
    ):
        return "cannot be reached, or does not answer"
    return f"answered what the wallet's library does not understand ({type(error).__name__})"


async def in_daemon(work: Callable[[], T]) -> T:
    """Run blocking `work` in a daemon thread of its own; its result or exception. When the caller is cancelled it runs on, unheard."""
    loop = asyncio.get_running_loop()
    heard: asyncio.Future[T] = loop.create_future()

    def tell(result: T | None, error: BaseException | None) -> None:
        if heard.done():
            return
        if error is not None:
            heard.set_exception(error)
        else:
            heard.set_result(result)  # type: ignore[arg-type]  # T may be None; without an error this is the result

    def run() -> None:
        result, error = None, None
        try:
            result = work()
        except BaseException as exc:
            error = exc  # handed over whole to the task that waits
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits
            loop.call_soon_threadsafe(tell, result, error)

    threading.Thread(target=run, name="pjv2-wallet-server", daemon=True).start()
    return await heard
