"""One POST, carried by an HTTP client: the seam between the mailroom and pyreqwest or httpx.

Neither implementation follows redirects, keeps cookies, decompresses, reads proxies from the environment, or repeats a request by
itself: an envelope that is sent twice can be linked. (An HTTP/2 connection may carry a request again that the server said it never
processed; pyreqwest does so on the same connection, and nobody but the relay can tell.)

Law: whatever goes wrong is a `CarrierTrouble` that says how far the request came. Answers are read up to a limit and no further.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import timedelta
from enum import StrEnum
from pathlib import Path
from typing import Protocol

import httpx
from pyreqwest.client import Client, ClientBuilder
from pyreqwest.exceptions import BuilderError, PyreqwestError, RequestError, RequestTimeoutError
from pyreqwest.proxy import ProxyBuilder

from pjv2.backends.heed import heeding
from pjv2.errors import OurMistake, WrongUsage

CONNECT_TIMEOUT = 7.0
MAX_ANSWER_BYTES = 8192
"""An encapsulated answer. A longer one is cut to one byte more, so that its size tells."""


class Trouble(StrEnum):
    """How far a request came before it failed."""

    CONNECT = "cannot be reached"
    TIMEOUT = "did not answer in time"
    BROKEN = "broke the connection"


class CarrierTrouble(Exception):
    """A request did not end in an answer. The message holds neither URL nor body."""

    def __init__(self, trouble: Trouble) -> None:
        super().__init__(trouble.value)
        self.trouble = trouble


@dataclass(frozen=True, slots=True)
class Answer:
    """What came back; header names are lower case. The body is at most one byte longer than it may be."""

    status: int
    headers: Mapping[str, str]
    body: bytes = field(repr=False)


class Carrier(Protocol):
    """An HTTP client, as far as the mailroom needs one."""

    async def post(
        self, url: str, headers: Mapping[str, str], body: bytes, read_timeout: float, limit: int = MAX_ANSWER_BYTES
    ) -> Answer:
        """Send one request once; of the answer's body `limit` bytes are read and one more. Raises CarrierTrouble."""
        ...

    async def close(self) -> None: ...


class ReqwestCarrier:
    """The default: Rust's reqwest, HTTP/2 where a TLS relay offers it."""

    def __init__(
        self,
        *,
        ca_file: Path | None = None,
        proxy: str | None = None,
        source_address: str | None = None,
        http2: bool = True,
    ) -> None:
        builder = (
            ClientBuilder()
            .no_proxy()
            .follow_redirects(False)
            .referer(False)
            .default_cookie_store(False)
            .gzip(False)
            .brotli(False)
            .zstd(False)
            .deflate(False)
            .user_agent("")
            .http2(http2)
            # A connection that died silently would otherwise swallow one poll after another.
            .http2_keep_alive_interval(timedelta(seconds=20))
            .http2_keep_alive_timeout(timedelta(seconds=10))
            .connect_timeout(timedelta(seconds=CONNECT_TIMEOUT))
        )
        if ca_file is not None:
            builder = builder.add_root_certificate_pem(read_ca_file(ca_file).encode())
        if source_address is not None:
            builder = builder.local_address(source_address)
        if proxy is not None:
            builder = builder.proxy(ProxyBuilder.all(proxy))
        try:
            self._client: Client = builder.build()
        except (BuilderError, ValueError) as exc:
            raise WrongUsage("the HTTP client cannot be built: check ca_file and proxy") from exc

    async def post(
        self, url: str, headers: Mapping[str, str], body: bytes, read_timeout: float, limit: int = MAX_ANSWER_BYTES
    ) -> Answer:
        return await heeding(self._post(url, headers, body, read_timeout, limit))

    async def _post(self, url: str, headers: Mapping[str, str], body: bytes, read_timeout: float, limit: int) -> Answer:
        request = (
            self._client.post(url)
            .headers(dict(headers))
            .body_bytes(body)
            .timeout(timedelta(seconds=CONNECT_TIMEOUT + read_timeout))
            .build_streamed()
        )
        try:
            async with request as response:
                received = bytearray()
                while len(received) <= limit:
                    chunk = await response.body_reader.read(limit + 1 - len(received))
                    if not chunk:
                        break
                    received += bytes(chunk)
                answer = {name.lower(): value for name, value in response.headers.items()}
                return Answer(response.status, answer, bytes(received))
        except RequestError as exc:
            raise CarrierTrouble(_reqwest_trouble(exc)) from exc
        except PyreqwestError as exc:
            raise OurMistake("the HTTP client refused a request that the mailroom made") from exc

    async def close(self) -> None:
        await self._client.close()


def _reqwest_trouble(exc: RequestError) -> Trouble:
    # The class alone does not tell: a total timeout is a ConnectTimeoutError, a connection cut in mid-request a ConnectError.
    causes = [cause["message"] for cause in exc.details.get("causes") or ()]
    if "client error (Connect)" in causes:
        return Trouble.CONNECT
    return Trouble.TIMEOUT if isinstance(exc, RequestTimeoutError) else Trouble.BROKEN


class HttpxCarrier:
    """An application's own `httpx.AsyncClient`. Its cookies, authentication, redirects and base headers are left out; its proxies,
    trust and limits stay. It is not closed: it belongs to the application."""

    def __init__(self, client: httpx.AsyncClient) -> None:
        self._client = client

    async def post(
        self, url: str, headers: Mapping[str, str], body: bytes, read_timeout: float, limit: int = MAX_ANSWER_BYTES
    ) -> Answer:
        timeout = httpx.Timeout(read_timeout, connect=CONNECT_TIMEOUT, pool=CONNECT_TIMEOUT)
        # Built here and not by the client, which would add its cookies and headers.
        request = httpx.Request(
            "POST", url, headers=dict(headers), content=body, extensions={"timeout": timeout.as_dict()}
        )
        try:
            async with asyncio.timeout(CONNECT_TIMEOUT + read_timeout):
                response = await self._client.send(request, stream=True, auth=None, follow_redirects=False)
                try:
                    received = bytearray()
                    async for chunk in response.aiter_raw(min(limit + 1, 65_536)):
                        received += chunk
                        if len(received) > limit:
                            break
                finally:
                    await response.aclose()
        except (httpx.ConnectError, httpx.ConnectTimeout, httpx.ProxyError) as exc:
            raise CarrierTrouble(Trouble.CONNECT) from exc
        except (httpx.TimeoutException, TimeoutError) as exc:
            raise CarrierTrouble(Trouble.TIMEOUT) from exc
        except (httpx.TransportError, httpx.StreamError) as exc:
            raise CarrierTrouble(Trouble.BROKEN) from exc
        except (httpx.HTTPError, httpx.InvalidURL, RuntimeError) as exc:
            raise WrongUsage("the httpx client cannot be used: is it closed?") from exc
        names = {name.lower(): value for name, value in response.headers.items()}
        return Answer(response.status_code, names, bytes(received[: limit + 1]))

    async def close(self) -> None:
        """Nothing: the client belongs to the application."""


def read_ca_file(path: Path) -> str:
    """The text of an extra trust root in PEM. Raises WrongUsage."""
    try:
        text = path.read_text("ascii")
    except (OSError, UnicodeDecodeError) as exc:
        raise WrongUsage(f"ca_file {str(path)!r} cannot be read") from exc
    if "-----BEGIN CERTIFICATE-----" not in text:
        raise WrongUsage(f"ca_file {str(path)!r} holds no certificate in PEM form")
    return text
