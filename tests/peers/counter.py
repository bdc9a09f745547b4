"""More ways to stand at the counter than `desk` has: a clock that can be moved, several relays, a Lightning node, payers who write
their Originals by hand, a payee with a server of his own; and the books, which every story here has to balance.

Law: what a story ends with is read from bitcoind: the mempool, the outputs, the balances, the locks.
"""

from __future__ import annotations

import base64
import contextlib
import http.client
import ssl
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from decimal import Decimal
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from pjv2.app import Payjoin, PublicEvent, Session
from pjv2.backends.bitcoind_rpc import BitcoindRpc, cookie_login
from pjv2.backends.chain.bitcoind import BitcoindChain
from pjv2.backends.mailroom import HttpMailroom, Service
from pjv2.backends.store.sql import SqlStore
from pjv2.backends.wallet.bitcoind import BitcoindWallet
from pjv2.config import Config
from pjv2.ports import Channels, Clock
from pjv2.session import State
from pjv2.units import Network, Sats
from pjv2.wire.uri import V1Endpoint, V2Endpoint, parse_uri
from tests.peers.desk import PACE, Post
from tests.peers.programs import COIN, PATIENCE, Bitcoind, Mailroom, NodeWallet, PayjoinCli, Program

LOCAL = "https://127.0.0.1"


# ---------------------------------------------------------------- pjv2


def _made(home: Path) -> None:
    home.mkdir(exist_ok=True)


@asynccontextmanager
async def counter(
    home: Path,
    wallet: NodeWallet,
    post: Post,
    *,
    relays: Sequence[Mailroom] = (),
    ca_file: Path | None = None,
    channels: Channels | None = None,
    clock: Clock | None = None,
    policy: Mapping[str, Any] | None = None,
    config: Config | None = None,
) -> AsyncIterator[Payjoin]:
    """One person's pjv2 over `wallet`, as `desk`. `relays` are used instead of the post's own, `ca_file` instead of its
    root."""

    def rpc() -> BitcoindRpc:
        return BitcoindRpc(wallet.url, cookie_login(wallet.node.cookie.read_bytes), network=Network.REGTEST)

    _made(home)
    async with AsyncExitStack() as stack:
        store = await SqlStore.open(f"sqlite:///{home / 'pjv2.sqlite'}")
        stack.push_async_callback(store.close)
        chain, coins = BitcoindChain(rpc()), BitcoindWallet(rpc(), home)
        stack.push_async_callback(chain.close)
        stack.push_async_callback(coins.close)
        root = ca_file or (None if post.tls is None else post.tls.root_pem)
        mailroom = HttpMailroom(
            [Service(relay.url, f"operator of relay {number}") for number, relay in enumerate(relays or [post.relay])],
            [Service(post.directory.url, "operator of the directory")],
            ca_file=root,
            cache=store,
        )
        stack.push_async_callback(mailroom.close)
        told = config or Config.load(None, {"network": "regtest", "policy": dict(policy or {})})
        yield await stack.enter_async_context(
            Payjoin.open(
                told,
                wallet=coins,
                chain=chain,
                store=store,
                mailroom=mailroom,
                channels=channels,
                clock=clock,
                pace=PACE,
            )
        )


@dataclass
class Diary:
    """Everything that one session told, kept; `until` waits for an event, whether it came before or after."""

    entries: list[PublicEvent] = field(default_factory=list)
    queue: Any = None

    async def until(self, event: str) -> PublicEvent:
        while not (found := [entry for entry in self.entries if entry.event == event]):
            self.entries.append(await self.queue.get())
        return found[0]

    def told(self) -> list[str]:
        while not self.queue.empty():
            self.entries.append(self.queue.get_nowait())
        return [entry.event for entry in self.entries]


@asynccontextmanager
async def diary(pj: Payjoin, session: Session) -> AsyncIterator[Diary]:
    async with pj.hub.listening(session.session) as queue:
        yield Diary(queue=queue)


async def one_step(pj: Payjoin, session: str) -> State:
    """Drives a session until its log grew, and no further."""
    seq = (await pj.driver.load(session)).seq
    return await pj.driver.drive(session, lambda state: state.seq > seq)


def mailbox_url(uri: str) -> str:
    """Where a payer of the first version posts to: the mailbox itself."""
    endpoint = parse_uri(uri).endpoint
    assert isinstance(endpoint, V2Endpoint)
    return f"{endpoint.directory}/{endpoint.short_id}"


def server_url(uri: str) -> str:
    """Where a payer posts to whose payee has a server of his own."""
    endpoint = parse_uri(uri).endpoint
    assert isinstance(endpoint, V1Endpoint)
    return endpoint.url


def bip78_post(url: str, psbt: str, query: str = "v=1", root: Path | None = None) -> tuple[int, str]:
    """Status and body that answer a payer of the first version."""
    parts = urlsplit(url)
    connection = (
        http.client.HTTPConnection(parts.netloc, timeout=PATIENCE)
        if parts.scheme == "http"
        else http.client.HTTPSConnection(
            parts.netloc, timeout=PATIENCE, context=ssl.create_default_context(cafile=str(root))
        )
    )
    with contextlib.closing(connection):
        connection.request("POST", f"{parts.path or '/'}?{query}", psbt, {"Content-Type": "text/plain"})
        answer = connection.getresponse()
        return answer.status, answer.read().decode()


# ---------------------------------------------------------------- a payer who writes his Originals by hand


@dataclass(frozen=True, slots=True)
class Original:
    """A signed Original in base64, its transaction and its id; its coin is not locked, and `change` is the index of its change."""

    psbt: str
    raw: str
    txid: str
    change: int


def btc(sats: Sats) -> str:
    return str(Decimal(sats) / COIN)


def original(wallet: NodeWallet, payments: Mapping[str, Sats], rate: float = 2) -> Original:
    """An Original as bitcoind makes it; its change comes last."""
    made = wallet.call(
        "walletcreatefundedpsbt",
        [],
        [{address: btc(sats)} for address, sats in payments.items()],
        0,
        {"fee_rate": str(rate), "changePosition": len(payments)},
    )
    psbt = wallet.call("walletprocesspsbt", made["psbt"])["psbt"]
    raw = wallet.node.call("finalizepsbt", psbt)["hex"]
    return Original(psbt, raw, wallet.node.call("decoderawtransaction", raw)["txid"], made["changepos"])


def signed(wallet: NodeWallet, proposal: str) -> str:
    """Signs a proposal and broadcasts it; the payjoin's txid."""
    finished = wallet.node.call("finalizepsbt", wallet.call("walletprocesspsbt", proposal)["psbt"])
    assert finished["complete"]
    return str(wallet.node.call("sendrawtransaction", finished["hex"]))


# ---------------------------------------------------------------- a payee with a server of his own


def _der(pem: bytes) -> bytes:
    lines = pem.decode("ascii").strip().splitlines()
    return base64.b64decode("".join(lines[1:-1]))


@dataclass(frozen=True, slots=True)
class ShopCertificate:
    """A server's certificate and key as payjoin-cli reads them, and the root that payers trust for it, as PEM."""

    leaf: Path
    key: Path
    root: Path


def shop_certificate(directory: Path) -> ShopCertificate:
    import trustme

    authority = trustme.CA()
    issued = authority.issue_cert("127.0.0.1", "localhost")
    made = ShopCertificate(*(directory / name for name in ("shop.der", "shop-key.der", "shop-root.pem")))
    made.leaf.write_bytes(ssl.PEM_cert_to_DER_cert(issued.cert_chain_pems[0].bytes().decode("ascii")))
    made.key.write_bytes(_der(issued.private_key_pem.bytes()))
    made.root.write_bytes(authority.cert_pem.bytes())
    return made


@contextlib.contextmanager
def shop(payee: PayjoinCli, sats: Sats, certificate: ShopCertificate, *flags: str) -> Iterator[tuple[str, Program]]:
    """`payjoin-cli --bip78 receive`: an HTTPS server of its own, and the URI it asks to be paid at.

    It listens on every address of the machine, at a port that the system picks, and cannot be told otherwise.
    """
    with payee.run(
        "--bip78",
        f"--root-certificate={certificate.leaf}",
        f"--certificate-key={certificate.key}",
        "receive",
        str(sats),
        "--port=0",
        f"--pj-endpoint={LOCAL}",
        *flags,
    ) as program:
        yield program.line(r"(?i)^bitcoin:\S+")[0], program


# ---------------------------------------------------------------- the books


def sats(amount: Decimal) -> Sats:
    return int(amount * COIN)


@dataclass(frozen=True, slots=True)
class Paid:
    """A transaction as bitcoind knows it: its fee, what each address gets, and which coins it spends."""

    txid: str
    fee: Sats
    outputs: Mapping[str, Sats]
    spends: frozenset[tuple[str, int]]


def paid(node: Bitcoind, txid: str) -> Paid:
    tx = node.call("getrawtransaction", txid, 1)
    spent = 0
    for txin in tx["vin"]:
        before = node.call("getrawtransaction", txin["txid"], 1)
        spent += sats(before["vout"][txin["vout"]]["value"])
    outputs = {txout["scriptPubKey"]["address"]: sats(txout["value"]) for txout in tx["vout"]}
    spends = frozenset((txin["txid"], txin["vout"]) for txin in tx["vin"])
    return Paid(txid, spent - sum(outputs.values()), outputs, spends)


def nothing_is_locked(*wallets: NodeWallet) -> None:
    for wallet in wallets:
        assert wallet.call("listlockunspent") == [], wallet.name


def books_balance(tx: Paid, payer: NodeWallet, payee: NodeWallet, *, had: tuple[Sats, Sats], received: Sats) -> None:
    """Nothing but the fee left the two wallets, the payee's grew by `received`, and no coin stays locked."""
    assert payee.balance() == had[1] + received
    assert payer.balance() == had[0] - received - tx.fee
    nothing_is_locked(payer, payee)


def coins_of(*wallets: NodeWallet) -> frozenset[tuple[str, int]]:
    return frozenset().union(*(wallet.coins() for wallet in wallets))
