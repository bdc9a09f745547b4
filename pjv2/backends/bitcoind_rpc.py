"""Bitcoin Core's JSON-RPC: one connection that is kept, questions that travel together, and errors of ours.

```
BitcoindWallet ─┐ ask(…)                       merged: what is asked in the same moment is one HTTP request
BitcoindChain  ─┴► BitcoindRpc ─► POST / or /wallet/NAME ─► bitcoind
                     │ 401: the cookie is read again        (a restarted bitcoind wrote a new one)
                     │ -28: asked again, for a while        (warm-up)
                     └ cut: asked again, once               (an idle connection that bitcoind closed)
```

It refuses a node of another network or one older than version 29, redirects, proxies of the environment, and a URL that holds a
password. A call that bitcoind refuses is an answer (`Refused`), for often the refusal is the fact that was asked for.

Law: login and parameters are in no message, repr or log; what is not understood is `CannotRead`, who does not answer is `NotNow`.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import ipaddress
import json
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from decimal import Decimal
from typing import Any, ParamSpec, TypeVar
from urllib.parse import unquote, urlsplit

import httpx

from pjv2.errors import CannotRead, NotNow, WrongUsage
from pjv2.psbt.tx import TxOut
from pjv2.units import MAX_MONEY, FeeRate, Network, Outpoint, Sats

P = ParamSpec("P")
T = TypeVar("T")

LEAST_VERSION = 290_000
TIMEOUT = 30.0
LOAD_TIMEOUT = 300.0
"""Seconds for `loadwallet`, which reads a whole wallet and perhaps some blocks."""

WARM_UP = 5.0
"""How long a node that is starting is asked again before it is not now."""

MAX_ANSWER = 128_000_000
MAX_BATCH = 1_000
_IDLE = 15.0
"""Below the 30 s after which bitcoind closes an idle connection, so that none is used in the moment it dies."""

# bitcoind's error codes (src/rpc/protocol.h).
NO_METHOD = -32601
MISC_ERROR = -1
WALLET_ERROR = -4
NOT_FOUND = -5
INSUFFICIENT_FUNDS = -6
INVALID_PARAMETER = -8
KEYPOOL_RAN_OUT = -12
UNLOCK_NEEDED = -13
WALLET_NOT_FOUND = -18
WALLET_NOT_NAMED = -19
WARMING_UP = -28
ALREADY_LOADED = -35


@dataclass(frozen=True, slots=True)
class Call:
    """A method and its parameters. `fresh`: asked for itself even where the same is asked at the same time."""

    method: str
    params: Any = field(default=(), repr=False)
    fresh: bool = False

    def body(self, number: int) -> dict[str, Any]:
        return {"jsonrpc": "2.0", "id": number, "method": self.method, "params": self.params}


@dataclass(frozen=True, slots=True)
class Refused:
    """bitcoind's error as an answer."""

    code: int
    message: str


class _Bus:
    """Questions that travel together, the same one once."""

    def __init__(self) -> None:
        self.calls: list[Call] = []
        self.ride: asyncio.Task[list[Any]]
        self._seats: dict[str, int] = {}

    def take(self, call: Call) -> int:
        """Where its answer will be."""
        known = None if call.fresh else json.dumps([call.method, call.params])
        if known is not None and known in self._seats:
            return self._seats[known]
        self.calls.append(call)
        if known is not None:
            self._seats[known] = len(self.calls) - 1
        return len(self.calls) - 1


Login = Callable[[], str]
"""What HTTP Basic authentication wants, `user:password`, read anew whenever it may have changed. Raises NotNow, WrongUsage."""


def password_login(user: str, read: Callable[[], str]) -> Login:
    """A user and his password (`rpcauth`, `rpcuser`), which `read` answers."""
    return lambda: f"{user}:{read()}"


def cookie_login(read: Callable[[], bytes]) -> Login:
    """bitcoind's own cookie, which is another one after each start. `read` answers the file's content."""

    def login() -> str:
        try:
            text = read().decode("ascii").strip()
        except UnicodeDecodeError as exc:
            raise WrongUsage("the cookie file of bitcoind does not hold a cookie") from exc
        if ":" not in text:
            raise NotNow("the cookie file of bitcoind is empty or not yet written", after=1.0)
        return text

    return login


class BitcoindRpc:
    """A bitcoind at `url`, of `network`. Not connected before the first question; `close` when done.

    A path `/wallet/NAME` chooses a wallet. `timeout` is for one request in seconds, `warm_up` for a node that is starting.
    `transport` replaces httpx's own. Raises WrongUsage when the URL cannot be used.
    """

    def __init__(
        self,
        url: str,
        login: Login,
        *,
        network: Network,
        proxied: bool = False,
        timeout: float = TIMEOUT,
        warm_up: float = WARM_UP,
        transport: httpx.AsyncBaseTransport | None = None,
    ) -> None:
        self.network = network
        self.host, self.wallet, self._url = _place(url, proxied=proxied)
        self.epoch = 0
        """Counts what may have been a restart: whoever learned something about the node learns it again."""
        self._login = login
        self._header = ""
        self._timeout = timeout
        self._warm_up = warm_up
        self._greeted = -1
        self._bus: _Bus | None = None
        self._rides: set[asyncio.Task[list[Any]]] = set()
        self._closed = False
        self._client = httpx.AsyncClient(
            trust_env=False,
            verify=self._url.startswith("https:"),  # without it, no certificates are loaded in vain
            follow_redirects=False,
            limits=httpx.Limits(max_connections=8, max_keepalive_connections=4, keepalive_expiry=_IDLE),
            transport=transport,
        )

    def __repr__(self) -> str:
        return f"BitcoindRpc({self.name}, {self.network})"

    @property
    def name(self) -> str:
        """The node in words, for messages."""
        return f"bitcoind at {self.host}"

    async def close(self) -> None:
        if self._closed:
            return
        self._closed = True
        rides = list(self._rides)
        for ride in rides:
            ride.cancel()
        await asyncio.gather(*rides, return_exceptions=True)
        await self._client.aclose()

    # ------------------------------------------------------------ questions

    async def ask(self, *calls: Call) -> list[Any]:
        """One answer per call, in order: its result, or `Refused`. Reading only: it travels with others' questions.

        Raises NotNow (nobody answers), WrongUsage (login), CannotRead.
        """
        if not calls:
            return []
        self._open()
        if self._bus is None:
            self._bus = _Bus()
            self._bus.ride = asyncio.create_task(self._drive(self._bus))
            self._rides.add(self._bus.ride)
            self._bus.ride.add_done_callback(self._left)
        bus = self._bus
        seats = [bus.take(call) for call in calls]
        ride = bus.ride
        try:
            answers = await asyncio.shield(ride)
        except asyncio.CancelledError:
            if ride.cancelled():
                raise NotNow(f"the connection to {self.name} was closed meanwhile") from None
            raise
        return [answers[seat] for seat in seats]

    async def do(self, call: Call, *, within: float | None = None) -> Any:
        """The answer to a call that changes something: sent by itself."""
        self._open()
        (answer,) = await self._send([call], within or self._timeout)
        return answer

    async def greet(self) -> None:
        """Once per `epoch`: is this the network we were told, and a node that is new enough? Raises WrongUsage."""
        if self._greeted == self.epoch:
            return
        epoch = self.epoch
        genesis, node = await self.ask(Call("getblockhash", (0,)), Call("getnetworkinfo"))
        genesis, node = self.told("getblockhash", genesis), self.told("getnetworkinfo", node)
        version = self.read("getnetworkinfo", lambda: whole(node["version"]))
        if genesis != self.network.genesis_hash:
            raise WrongUsage(
                f"{self.name} serves another network than {self.network}: correct network, or the URL (each has its own port)"
            )
        if version < LEAST_VERSION:
            raise WrongUsage(f"{self.name} is version {version // 10_000}: pjv2 needs Bitcoin Core 29 or newer")
        self._greeted = epoch

    def told(self, method: str, answer: Any) -> Any:
        """The answer itself; what bitcoind refused becomes one of our errors."""
        if isinstance(answer, Refused):
            raise self.refusal(method, answer)
        return answer

    def refusal(self, method: str, refused: Refused) -> NotNow | WrongUsage:
        """bitcoind's refusal as an error that says what to do."""
        wallet = self.wallet or "NAME"
        match refused.code:
            case -32601:
                return WrongUsage(f"{self.name} does not know {method}: pjv2 needs version 29, built with its wallet")
            case -13:
                return NotNow(
                    f"the wallet {wallet} of {self.name} is encrypted and locked: unlock it with "
                    f"bitcoin-cli -rpcwallet={wallet} walletpassphrase, for as long as payments are expected"
                )
            case -18 if self.wallet is None:
                return WrongUsage(f"{self.name} has no wallet loaded: end the URL with /wallet/NAME")
            case -18:
                return NotNow(f"the wallet {wallet} of {self.name} is not loaded")
            case -19:
                return WrongUsage(f"{self.name} has several wallets: end the URL with /wallet/NAME")
        return NotNow(f"{self.name} refuses {method}: {refused.message}")

    def read(self, what: str, reading: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Take a value out of an answer. Raises CannotRead when it has another shape."""
        try:
            return reading(*args, **kwargs)
        except (KeyError, IndexError, TypeError, ValueError, ArithmeticError, AttributeError, WrongUsage) as exc:
            raise CannotRead(f"{self.name} answers {what} in a way that this version does not understand") from exc

    # ------------------------------------------------------------ one request

    async def _drive(self, bus: _Bus) -> list[Any]:
        """Whatever is asked before the event loop comes round, each question once, in as few requests as it takes."""
        await asyncio.sleep(0)
        self._bus = None
        answers: list[Any] = []
        for at in range(0, len(bus.calls), MAX_BATCH):
            answers += await self._send(bus.calls[at : at + MAX_BATCH], self._timeout)
        return answers

    def _left(self, ride: asyncio.Task[list[Any]]) -> None:
        self._rides.discard(ride)
        if not ride.cancelled():
            ride.exception()  # heard, though everybody who asked may have gone

    async def _send(self, calls: Sequence[Call], within: float) -> list[Any]:
        """The answers of one request; a node that warms up is asked again for a while."""
        body = json.dumps([call.body(number) for number, call in enumerate(calls)]).encode()
        loop = asyncio.get_running_loop()
        until, pause = loop.time() + self._warm_up, 0.1
        while True:
            answers = _in_order(await self._post(body, within), len(calls))
            if answers is None:
                raise CannotRead(f"{self.name} does not answer as JSON-RPC: is the URL that of a bitcoind?")
            warming = next((one for one in answers if isinstance(one, Refused) and one.code == WARMING_UP), None)
            if warming is None:
                return answers
            self.epoch += 1
            if loop.time() + pause > until:
                raise NotNow(f"{self.name} is starting: {warming.message}", after=5.0)
            await asyncio.sleep(pause)
            pause = min(2 * pause, 1.0)

    async def _post(self, body: bytes, within: float) -> Any:
        again = {"cut", "login"}
        while True:
            if not self._header:
                self._header = f"Basic {base64.b64encode(self._login().encode()).decode()}"
            try:
                async with asyncio.timeout(within):
                    status, content = await self._exchange(body, within)
            except (httpx.TimeoutException, TimeoutError) as exc:
                self.epoch += 1
                raise NotNow(f"{self.name} does not answer") from exc
            except (httpx.ConnectError, httpx.UnsupportedProtocol) as exc:
                self.epoch += 1
                raise NotNow(f"{self.name} cannot be reached: is it running, and is the port right?") from exc
            except httpx.HTTPError as exc:
                self.epoch += 1
                if "cut" not in again:
                    raise NotNow(f"{self.name} cut the connection") from exc
                again.remove("cut")
                continue
            if status == 401 and "login" in again:
                self.epoch += 1
                self._header = ""
                again.remove("login")
                continue
            return self._content(status, content)

    async def _exchange(self, body: bytes, within: float) -> tuple[int, bytes]:
        headers = {"Authorization": self._header, "Content-Type": "application/json"}
        limit = httpx.Timeout(within, connect=min(within, 5.0))
        received = bytearray()
        async with self._client.stream("POST", self._url, content=body, headers=headers, timeout=limit) as response:
            async for chunk in response.aiter_bytes():
                received += chunk
                if len(received) > MAX_ANSWER:
                    raise NotNow(f"{self.name} answers with more than {MAX_ANSWER} bytes")
        return response.status_code, bytes(received)

    def _content(self, status: int, content: bytes) -> Any:
        if status == 401:
            self._header = ""
            raise NotNow(f"{self.name} does not accept the login: check user and password, or whose cookie_file it is")
        if status == 403:
            raise WrongUsage(f"{self.name} forbids this to us: see its rpcallowip and rpcwhitelist")
        if status == 503:
            raise NotNow(f"{self.name} has more to do than it takes (rpcworkqueue)", after=1.0)
        try:
            return json.loads(content, parse_float=Decimal)
        except ValueError as exc:
            if status == 200:
                raise CannotRead(f"{self.name} does not answer as JSON-RPC: is the URL that of a bitcoind?") from exc
            if status == 404:
                raise WrongUsage(f"{self.name} serves no JSON-RPC at this URL: is it that of a bitcoind?") from exc
            raise NotNow(f"{self.name} answers {status}") from exc

    def _open(self) -> None:
        if self._closed:
            raise NotNow(f"the connection to {self.name} is closed")


def _in_order(told: Any, count: int) -> list[Any] | None:
    """The answers by their numbers; None when they are none. An error about the whole request answers every call."""
    if isinstance(told, dict) and isinstance(told.get("error"), dict):
        whole_request = _refused(told["error"])
        return None if whole_request is None else [whole_request] * count
    if not isinstance(told, list):
        return None
    answers: dict[int, Any] = {}
    for one in told:
        if not isinstance(one, dict) or type(one.get("id")) is not int:
            return None
        error = one.get("error")
        if error is not None:
            refused = _refused(error)
            if refused is None:
                return None
            answers[one["id"]] = refused
        elif "result" in one:
            answers[one["id"]] = one["result"]
    if set(answers) != set(range(count)) or len(told) != count:
        return None
    return [answers[number] for number in range(count)]


def _refused(error: Any) -> Refused | None:
    if not isinstance(error, dict) or type(error.get("code")) is not int:
        return None
    return Refused(error["code"], " ".join(str(error.get("message") or "no reason was given").split())[:300])


def _place(url: str, *, proxied: bool) -> tuple[str, str | None, str]:
    """Host and port for messages, the wallet's name, and the URL to post to. Raises WrongUsage."""
    try:
        parts = urlsplit(url)
        host, port = parts.hostname, parts.port
    except ValueError as exc:
        raise WrongUsage("the URL of bitcoind cannot be read") from exc
    path = parts.path.rstrip("/")
    wallet = unquote(path.removeprefix("/wallet/")) if path.startswith("/wallet/") else None
    if parts.scheme not in {"http", "https"} or not host or parts.query or parts.fragment or (path and not wallet):
        raise WrongUsage("the URL of bitcoind looks like http://127.0.0.1:8332/wallet/NAME")
    if parts.username is not None:
        raise WrongUsage("the URL of bitcoind holds a login: write user and password_file instead")
    if proxied and not _is_near(host):
        raise WrongUsage(
            f"bitcoind at {host} is asked directly, not through the proxy: give the address of a machine of yours, "
            "or a chain source that the proxy reaches"
        )
    return f"{host}:{port}" if port else host, wallet, url.rstrip("/") or url


def _is_near(host: str) -> bool:
    """This machine, or an address of a private network."""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_private
    except ValueError:
        return False


# ---------------------------------------------------------------- shapes of answers; all raise ValueError, TypeError or KeyError


def whole(value: Any) -> int:
    if type(value) is not int or not 0 <= value < 1 << 53:
        raise ValueError("no whole number")
    return value


def flag(value: Any) -> bool:
    if type(value) is not bool:
        raise ValueError("neither true nor false")
    return value


def items(value: Any) -> list[Any]:
    if not isinstance(value, list):
        raise TypeError("no list")
    return value


def text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError("no text")
    return value


def hash_of(value: Any) -> str:
    found = text(value)
    if len(found) != 64 or len(raw_of(found)) != 32 or found != found.lower():
        raise ValueError("no hash")
    return found


def raw_of(value: Any) -> bytes:
    try:
        return binascii.unhexlify(text(value))
    except binascii.Error as exc:
        raise ValueError("no hex") from exc


def sats_of(value: Any) -> Sats:
    """Satoshis out of an amount in BTC."""
    if type(value) not in (int, Decimal):
        raise TypeError("no amount")
    sats = Decimal(value) * 100_000_000
    if not sats.is_finite() or sats != int(sats) or not 0 <= sats <= MAX_MONEY:
        raise ValueError("no amount")
    return int(sats)


def rate_of(value: Any) -> FeeRate:
    """A fee rate out of BTC per 1000 vbytes, rounded up."""
    if type(value) not in (int, Decimal):
        raise TypeError("no fee rate")
    rate = Decimal(value)
    if not rate.is_finite() or not 0 <= rate <= 1:
        raise ValueError("no fee rate")
    return FeeRate(math.ceil(rate * 25_000_000))


def in_btc(sats: Sats) -> str:
    """An amount as bitcoind takes it without a rounding error."""
    return f"{sats // 100_000_000}.{sats % 100_000_000:08d}"


def place_of(outpoint: Outpoint) -> dict[str, Any]:
    return {"txid": outpoint.txid, "vout": outpoint.vout}


def places_of(outpoints: Iterable[Outpoint]) -> list[dict[str, Any]]:
    return [place_of(outpoint) for outpoint in outpoints]


def outpoint_of(told: Any) -> Outpoint:
    return Outpoint(hash_of(told["txid"]), whole(told["vout"]))


def txout_of(told: Any) -> TxOut:
    """An output as `gettxout` tells it."""
    return TxOut(sats_of(told["value"]), raw_of(told["scriptPubKey"]["hex"]))
