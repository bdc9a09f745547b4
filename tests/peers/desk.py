"""pjv2 as an app opens it, over a wallet of the real node, its chain, and the real mailrooms."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

from pjv2.app import Payjoin, Session
from pjv2.backends.bitcoind_rpc import BitcoindRpc, cookie_login
from pjv2.backends.chain.bitcoind import BitcoindChain
from pjv2.backends.mailroom import HttpMailroom, Service
from pjv2.backends.store.sql import SqlStore
from pjv2.backends.wallet.bitcoind import BitcoindWallet
from pjv2.config import Config
from pjv2.driver import Pace
from pjv2.session.events import Closed
from pjv2.units import Network
from tests.peers.programs import PATIENCE, Certificates, Mailroom, NodeWallet

PACE = Pace(watch=0.2, rebroadcast=1.0, retry=0.2, retry_max=1.0, poll_floor=0.0, claim=30.0)
CONFIRMED = 6


@dataclass(frozen=True, slots=True)
class Post:
    """A directory, and a relay that somebody else runs."""

    directory: Mailroom
    relay: Mailroom
    tls: Certificates | None = None


@asynccontextmanager
async def desk(home: Path, wallet: NodeWallet, post: Post) -> AsyncIterator[Payjoin]:
    """One person's pjv2 over `wallet`. What it keeps is in `home`, a directory: opened again there, it goes on."""

    def rpc() -> BitcoindRpc:
        return BitcoindRpc(wallet.url, cookie_login(wallet.node.cookie.read_bytes), network=Network.REGTEST)

    async with AsyncExitStack() as stack:
        store = await SqlStore.open(f"sqlite:///{home / 'pjv2.sqlite'}")
        stack.push_async_callback(store.close)
        chain, coins = BitcoindChain(rpc()), BitcoindWallet(rpc(), home)
        stack.push_async_callback(chain.close)
        stack.push_async_callback(coins.close)
        mailroom = HttpMailroom(
            [Service(post.relay.url, "operator of the relay")],
            [Service(post.directory.url, "operator of the directory")],
            ca_file=None if post.tls is None else post.tls.root_pem,
            cache=store,
        )
        stack.push_async_callback(mailroom.close)
        config = Config(network=Network.REGTEST)
        yield await stack.enter_async_context(
            Payjoin.open(config, wallet=coins, chain=chain, store=store, mailroom=mailroom, pace=PACE)
        )


@asynccontextmanager
async def driven(session: Session) -> AsyncIterator[asyncio.Task[Closed]]:
    """The session's outcome, on its way while the `with` lasts."""
    ending = asyncio.create_task(session.outcome())
    try:
        async with asyncio.timeout(PATIENCE):
            yield ending
    finally:
        ending.cancel()
        await asyncio.gather(ending, return_exceptions=True)
