"""Starting and stopping the real programs: bitcoind on regtest, mailrooms plain and over TLS, runs of payjoin-cli.

What comes in: a program's path (`tests.peers.peers.need`) and an empty directory. What leaves: a running process that has said it is
ready, its address, and everything it printed, kept in that directory and shown by a failed test.

Nothing sleeps: a program is ready when it prints so, and whoever waits is woken by its next line or by its end. Ports are picked by
the system. A program is stopped by its pid, politely first. Each gets an environment of its own: a home in its directory, no proxy,
no variable of the person who runs the tests. (payjoin-cli would read a configuration from the real home, the mailroom one from PJ_*
variables, and both would send loopback traffic through a proxy from the environment.)

Law: everything listens on 127.0.0.1, speaks to nobody else, and is gone when its `with` ends.
"""

from __future__ import annotations

import base64
import contextlib
import http.client
import itertools
import json
import os
import re
import signal
import socket
import ssl
import subprocess
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from decimal import Decimal
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

PATIENCE = 60.0
"""Seconds that anything may take on a busy machine before something is wrong. Nobody waits that long for what goes well."""

HOST = "127.0.0.1"
COIN = Decimal(100_000_000)
RUNNING: list[Program] = []
"""Programs in the order they were started, so that a test that fails can show what they printed; `forget_ended` keeps it short."""


class Trouble(Exception):
    """A program ended, or did not say in time what was waited for. The text ends with what it printed last."""


class Program:
    """One process of somebody else's, and what it prints (stdout and stderr, in order)."""

    def __init__(
        self, name: str, command: Sequence[str | Path], directory: Path, env: Mapping[str, str] | None = None
    ) -> None:
        self.name = name
        self.directory = directory
        self.log = directory / f"{name}.log"
        self.lines: list[str] = []
        self._more = threading.Condition()
        self._closed = False
        self.process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            cwd=directory,
            env={
                "PATH": os.environ.get("PATH", os.defpath),
                "HOME": str(directory),
                "LC_ALL": "C",
                "NO_COLOR": "1",
                **(env or {}),
            },
        )
        self._reader = threading.Thread(target=self._read, name=f"reads {name}", daemon=True)
        self._reader.start()
        RUNNING.append(self)

    @property
    def pid(self) -> int:
        return self.process.pid

    def _read(self) -> None:
        if self.process.stdout is None:
            return
        with self.process.stdout as printed, self.log.open("ab") as log:
            for raw in printed:
                log.write(raw)
                log.flush()
                with self._more:
                    self.lines.append(raw.decode("utf-8", "replace").rstrip("\n"))
                    self._more.notify_all()
        with self._more:
            self._closed = True
            self._more.notify_all()

    def line(self, pattern: str, *, after: int = 0, seconds: float = PATIENCE) -> re.Match[str]:
        """The first line from number `after` on that matches, waiting for it. Raises Trouble."""
        seen = after

        def found() -> re.Match[str] | None:
            nonlocal seen
            for line in self.lines[seen:]:
                if match := re.search(pattern, line):
                    return match
                seen += 1
            return None

        with self._more:
            self._more.wait_for(lambda: (match := found()) is not None or self._closed, seconds)
            match = found()
        if match is None:
            what = f"ended ({self.process.poll()})" if self._closed else f"took more than {seconds:.0f} s"
            raise Trouble(f"{self.name} {what} before it printed {pattern!r}:\n{self.tail()}")
        return match

    def ended(self, seconds: float = PATIENCE) -> int:
        """Its exit code, once it has ended by itself and everything it printed is here. Raises Trouble."""
        try:
            code = self.process.wait(seconds)
        except subprocess.TimeoutExpired as exc:
            raise Trouble(f"{self.name} still runs after {seconds:.0f} s:\n{self.tail()}") from exc
        self._reader.join(seconds)
        return code

    def interrupt(self) -> int:
        """Ctrl-C, and its exit code."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGINT)
        return self.ended()

    def stop(self) -> None:
        """SIGTERM, and after a while SIGKILL. A process that is gone already is fine."""
        if self.process.poll() is None:
            self.process.terminate()
            try:
                self.process.wait(PATIENCE)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()
        self._reader.join(PATIENCE)

    def tail(self, count: int = 30) -> str:
        return "\n".join(self.lines[-count:]) or "(it printed nothing)"


@contextlib.contextmanager
def stopping(program: Program) -> Iterator[Program]:
    try:
        yield program
    finally:
        program.stop()


def forget_ended() -> None:
    RUNNING[:] = [program for program in RUNNING if program.process.poll() is None]


def free_port() -> int:
    """A port that was free a moment ago, for programs that cannot be told to take any."""
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        return int(probe.getsockname()[1])


def ask(method: str, url: str, body: bytes, fields: Mapping[str, str], ca: Path | None) -> tuple[int, bytes]:
    """Status and body of one HTTP exchange, without proxies or redirects."""
    parts = urlsplit(url)
    connection = (
        http.client.HTTPConnection(parts.netloc, timeout=PATIENCE)
        if parts.scheme == "http"
        else http.client.HTTPSConnection(
            parts.netloc, timeout=PATIENCE, context=ssl.create_default_context(cafile=None if ca is None else str(ca))
        )
    )
    with contextlib.closing(connection):
        connection.request(method, parts.path or "/", body, dict(fields))
        answer = connection.getresponse()
        return answer.status, answer.read()


# ---------------------------------------------------------------- bitcoind


class RpcError(Exception):
    """bitcoind answered a call with an error; `code` is its number."""

    def __init__(self, code: int, message: str) -> None:
        super().__init__(f"{message} ({code})")
        self.code = code


@dataclass(frozen=True, slots=True)
class Bitcoind:
    """A regtest node of one's own. It accepts its cookie, which is a password like any other: `user` and `password` hold it too."""

    program: Program
    url: str
    cookie: Path
    user: str
    password: str = field(repr=False)

    def call(self, method: str, *params: Any, wallet: str = "") -> Any:
        """The result of an RPC call; amounts are Decimals in bitcoin. Raises RpcError."""
        connection = http.client.HTTPConnection(urlsplit(self.url).netloc, timeout=PATIENCE)
        login = base64.b64encode(f"{self.user}:{self.password}".encode()).decode()
        body = json.dumps({"jsonrpc": "1.0", "id": 0, "method": method, "params": params}, default=str)
        with contextlib.closing(connection):
            connection.request(
                "POST", f"/wallet/{wallet}" if wallet else "/", body, {"Authorization": f"Basic {login}"}
            )
            answer = json.loads(connection.getresponse().read(), parse_float=Decimal)
        if answer["error"] is not None:
            raise RpcError(answer["error"]["code"], answer["error"]["message"])
        return answer["result"]

    def wallet(self, name: str, *coins: int, kind: str = "bech32") -> NodeWallet:
        """A new wallet `name-NUMBER`, with one confirmed coin for each given amount of satoshi, each at an address of its own.

        `kind` is the address type of the coins: legacy, p2sh-segwit, bech32, bech32m.
        """
        name = f"{name}-{next(_NUMBERS)}"
        self.call("createwallet", name)
        wallet = NodeWallet(self, name, f"{self.url}/wallet/{name}")
        if coins:
            self.call("sendmany", "", {wallet.address(kind): str(Decimal(sats) / COIN) for sats in coins}, wallet=MINER)
            self.mine()
        return wallet

    def mine(self, blocks: int = 1) -> str:
        """The hash of the last of some new blocks, whose coins are the miner's."""
        last = str(self.call("generatetoaddress", blocks, self.call("getnewaddress", wallet=MINER))[-1])
        self.call("syncwithvalidationinterfacequeue")  # the wallets hear of blocks a moment later
        return last

    def mempool(self) -> list[str]:
        return list(self.call("getrawmempool"))


@dataclass(frozen=True, slots=True)
class NodeWallet:
    """A wallet of the node: native segwit, keys and all."""

    node: Bitcoind
    name: str
    url: str

    def call(self, method: str, *params: Any) -> Any:
        return self.node.call(method, *params, wallet=self.name)

    def address(self, kind: str = "bech32") -> str:
        return str(self.call("getnewaddress", "", kind))

    def balance(self) -> int:
        """Satoshi, unconfirmed ones of its own making included."""
        balances = self.call("getbalances")["mine"]
        return int((balances["trusted"] + balances["untrusted_pending"]) * COIN)

    def coins(self) -> set[tuple[str, int]]:
        return {(coin["txid"], coin["vout"]) for coin in self.call("listunspent", 0)}


MINER = "miner"
_NUMBERS = itertools.count(1)


@contextlib.contextmanager
def bitcoind(program: Path, directory: Path, *, extra: Sequence[str] = ()) -> Iterator[Bitcoind]:
    """A regtest node with a funded miner's wallet, at height 101.

    Called as `bitcoind -datadir=DIR`, with everything else in DIR/bitcoin.conf; `extra` are lines before ours, and the
    first of a name counts. It listens for RPC alone. (Bitcoin Knots hands out legacy addresses unless told otherwise, Core native
    segwit ones; here both hand out native segwit.) Readiness: its `Done loading`, which comes when RPC answers calls.
    """
    directory.mkdir(parents=True, exist_ok=True)
    for attempt in range(3):
        port = free_port()
        (directory / "bitcoin.conf").write_text(
            "".join(f"{line}\n" for line in extra)
            + "regtest=1\nserver=1\nprinttoconsole=1\ndnsseed=0\nnatpmp=0\nlistenonion=0\nfallbackfee=0.00001\ntxindex=1\nkeypool=5\n"
            "addresstype=bech32\nchangetype=bech32\n"
            f"[regtest]\nlisten=0\nconnect=0\nrpcbind={HOST}\nrpcallowip={HOST}\nrpcport={port}\n"
        )
        with stopping(Program("bitcoind", [program, f"-datadir={directory}"], directory)) as process:
            try:
                process.line("Done loading")
            except Trouble:
                # Somebody else took the port between our look and its.
                if attempt < 2 and any("Unable to bind" in line for line in process.lines):
                    continue
                raise
            cookie = directory / "regtest" / ".cookie"
            user, _, password = cookie.read_text().partition(":")
            node = Bitcoind(process, f"http://{HOST}:{port}", cookie, user, password)
            node.call("createwallet", MINER)
            node.mine(101)
            yield node
            return


# ---------------------------------------------------------------- certificates


@dataclass(frozen=True, slots=True)
class Certificates:
    """A certificate for 127.0.0.1 and localhost, its key, and the root that signed it, as PEM and as DER."""

    chain: Path
    key: Path
    root_pem: Path
    root_der: Path


def certificates(directory: Path) -> Certificates:
    import trustme

    directory.mkdir(parents=True, exist_ok=True)
    authority = trustme.CA()
    issued = authority.issue_cert(HOST, "localhost")
    made = Certificates(*(directory / name for name in ("chain.pem", "key.pem", "root.pem", "root.der")))
    made.chain.write_bytes(b"".join(blob.bytes() for blob in issued.cert_chain_pems))
    made.key.write_bytes(issued.private_key_pem.bytes())
    made.root_pem.write_bytes(authority.cert_pem.bytes())
    made.root_der.write_bytes(ssl.PEM_cert_to_DER_cert(authority.cert_pem.bytes().decode("ascii")))
    return made


# ---------------------------------------------------------------- payjoin-mailroom


@dataclass(frozen=True, slots=True)
class Mailroom:
    """A payjoin-mailroom. Each is directory and relay at once, but refuses to be both for one request: a payjoin needs two."""

    program: Program
    url: str
    storage: Path
    root: Path | None = None

    def get(self, path: str) -> bytes:
        """The body of a GET that answers 200. Raises Trouble."""
        status, body = ask("GET", self.url + path, b"", {}, self.root)
        if status != 200:
            raise Trouble(f"GET {self.url}{path} answered {status}")
        return body

    def post(self, path: str, body: bytes, media_type: str) -> int:
        """The status that answers a POST."""
        return ask("POST", self.url + path, body, {"Content-Type": media_type}, self.root)[0]

    def keys(self) -> bytes:
        """Its OHTTP keys, as `application/ohttp-keys`."""
        return self.get("/.well-known/ohttp-gateway")

    def keys_file(self) -> Path:
        """Its OHTTP keys in a file, for clients that are not to fetch them."""
        file = self.program.directory / "ohttp-keys.bin"
        file.write_bytes(self.keys())
        return file


@contextlib.contextmanager
def mailroom(
    program: Path,
    directory: Path,
    *,
    name: str = "payjoin-mailroom",
    long_poll: int = 30,
    mailbox_ttl: int = 604_800,
    v1: bool = True,
    tls: Certificates | None = None,
    port: int = 0,
) -> Iterator[Mailroom]:
    """A mailroom, plain or over TLS. `long_poll` and `mailbox_ttl` are whole seconds; `v1` lets BIP78 senders post to it.
    What it stores stays in `directory`: started there again, at the same `port`, it is the same mailroom.

    Called as `payjoin-mailroom --config FILE`; over TLS as `payjoin-mailroom-tls FILE CHAIN.pem KEY.pem ROOT.der`, because the
    published program takes its certificates from ACME only and its relay trusts the public roots only. A plain relay therefore
    carries to plain directories, `POST /http://127.0.0.1:PORT/`, and a TLS one to TLS ones. Keys can be bootstrapped through TLS
    ones only: CONNECT means https.

    Readiness: it prints the port it listens on, and then `/health` answers.
    """
    directory.mkdir(parents=True, exist_ok=True)
    storage = directory / "storage"
    config = directory / "mailroom.toml"
    config.write_text(
        f'listener = "{HOST}:{port}"\nstorage_dir = "{storage}"\ntimeout = {long_poll}\nmailbox_ttl = {mailbox_ttl}\n'
        + ("[v1]\n" if v1 else "")
    )
    command: list[str | Path] = (
        [program, "--config", config] if tls is None else [program, config, tls.chain, tls.key, tls.root_der]
    )
    with stopping(Program(name, command, directory)) as process:
        heard = process.line(r"Payjoin service listening on .*?(\d+)\)*(?: with TLS)?$")[1]
        scheme, root = ("http", None) if tls is None else ("https", tls.root_pem)
        room = Mailroom(process, f"{scheme}://{HOST}:{heard}", storage, root)
        room.get("/health")
        yield room


# ---------------------------------------------------------------- payjoin-cli


class PayjoinCli:
    """One person's payjoin-cli: a directory with its config.toml and its database, over a wallet of the node.

    Called as `payjoin-cli COMMAND` in that directory:

        send URI --fee-rate SAT_PER_VB    until the payjoin is broadcast: `Payjoin sent. TXID: …`, exit 0
        receive SATS [--expire-in S]      prints the URI, then polls; `Payjoin transaction detected in the mempool!`, exit 0
        resume [--session-id ID]          goes on with everything that is open; exits 0 even when a session failed: read its lines
        history                           a table of sessions
        cancel ID [--no-broadcast]        broadcasts the fallback

    `--bip78` before the command speaks version 1 instead, and only over https: `send` posts to the `pj=` URL itself, which may be a
    mailbox of version 2. (A `receive` of version 1 is an HTTPS server at 0.0.0.0; nothing here starts one.)

    Before the command: `--root-certificate FILE.der`, a trust root for relay and directory. Its config.toml has a key of that name,
    which the flag always overrides, given or not. What else config.toml wants, learnt from its source: `bitcoind.rpchost` is the
    wallet's URL, `bitcoind.cookie` and `v2.ohttp_keys` are paths of files. Without the latter, keys are fetched through a relay,
    which works with https directories only. Its `max_fee_rate` is counted in sat per 1000 weight units, not sat/vB. After posting,
    a receiver watches the mempool for 5 s only, then exits 1; `resume` goes on.

    A wallet with nested segwit or taproot coins makes it panic, as payer and as payee: it cannot tell the weight of such inputs.
    """

    def __init__(
        self,
        program: Path,
        directory: Path,
        wallet: NodeWallet,
        *,
        relays: Sequence[Mailroom],
        directories: Sequence[Mailroom],
        tls: Certificates | None = None,
        keys: Path | None = None,
    ) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        self._program = program
        self._runs = 0
        self.directory = directory
        self.wallet = wallet
        self._flags = [] if tls is None else ["--root-certificate", str(tls.root_der)]
        v2: dict[str, Any] = {
            "pj_directories": [room.url for room in directories],
            "ohttp_relays": [room.url for room in relays],
        }
        if keys is not None:
            v2["ohttp_keys"] = str(keys)
        tables = {"bitcoind": {"rpchost": wallet.url, "cookie": str(wallet.node.cookie)}, "v2": v2}
        (directory / "config.toml").write_text(
            "\n".join(
                f"[{table}]\n" + "".join(f"{key} = {json.dumps(value)}\n" for key, value in rows.items())
                for table, rows in tables.items()
            )
        )

    @contextlib.contextmanager
    def run(self, *arguments: str) -> Iterator[Program]:
        """A run in the background, stopped at the end of the `with` if it has not ended by itself."""
        self._runs += 1
        command = next((word for word in arguments if not word.startswith("-")), "run")
        name = f"{self.directory.name}-{self._runs}-payjoin-cli-{command}"
        with stopping(
            Program(
                name, [self._program, *self._flags, *arguments], self.directory, {"RUST_LOG": "info,payjoin_cli=debug"}
            )
        ) as program:
            yield program

    @contextlib.contextmanager
    def receiving(self, sats: int, *flags: str) -> Iterator[tuple[str, Program]]:
        """A `receive` that polls, and the URI it asks to be paid at."""
        with self.run("receive", str(sats), *flags) as program:
            yield program.line(r"(?i)^bitcoin:\S+")[0], program

    def resume(self) -> list[str]:
        """Goes on with everything that is open, to the end; what it printed, because its exit code tells nothing."""
        with self.run("resume") as program:
            program.ended()
            return program.lines

    def send(self, uri: str, fee_rate: int = 2, *, v1: bool = False) -> str:
        """Pays a URI, to the end; the payjoin's txid. Raises Trouble."""
        with self.run(*(["--bip78"] if v1 else []), "send", uri, "--fee-rate", str(fee_rate)) as program:
            txid = program.line(r"Payjoin sent\. TXID: ([0-9a-f]{64})")[1]
            if program.ended():
                raise Trouble(f"payjoin-cli broadcast {txid} and failed nevertheless:\n{program.tail()}")
            return txid
