"""A whole small world on loopback: a chain, a directory, two relays, Lightning peers, and people with wallets and phones.

Everything that a payment touches is real: consensus, HTTP, OHTTP, signatures, the database on disk. Only time can be moved:
`world.clock.skip` carries everybody past a deadline. A `Party` is one person's installation; `restart` is what a crash leaves:
the disk, and nothing else.

Law: a party reaches another one only through the directory and the chain.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import shutil
import tempfile
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pjv2.backends.chain.esplora import EsploraChain
from pjv2.backends.channel.rehearsal import RehearsalNode
from pjv2.backends.channel.rehearsal_peer import RehearsalPeer
from pjv2.backends.mailroom import HttpMailroom, Service
from pjv2.backends.store.sql import SqlStore
from pjv2.backends.system import SystemEntropy
from pjv2.driver import Driver, Pace
from pjv2.lab.chain import LabChain
from pjv2.lab.directory import Directory
from pjv2.lab.esplora import EsploraServer
from pjv2.lab.relay import Relay
from pjv2.ports import Chain, Channels, Entropy, Mailroom, Store, Wallet
from pjv2.testing.paper_wallet import PaperKind, PaperWallet
from pjv2.units import Instant, Network, Outpoint, Sats, SessionId

if TYPE_CHECKING:
    from pjv2.backends.wallet.bdk import BdkWallet

LAB_PACE = Pace(watch=0.05, rebroadcast=0.5, retry=0.1, retry_max=1.0, poll_floor=0.0, node_timer=10.0, claim=30.0)
"""On loopback nothing is worth waiting for."""


class LabClock:
    """The wall clock, that can be moved: sleepers wake when their time has come, by whatever way. A clock that goes back lengthens
    nobody's sleep, for no time passed."""

    def __init__(self) -> None:
        self._ahead = 0.0
        self._passed = 0.0
        self._moved = asyncio.Event()

    def now(self) -> Instant:
        return time.time() + self._ahead

    async def sleep(self, seconds: float) -> None:
        until = time.monotonic() + self._passed + seconds
        while (left := until - time.monotonic() - self._passed) > 0:
            moved = self._moved
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(left):
                    await moved.wait()

    def skip(self, seconds: float) -> None:
        """Move everybody's clock ahead; with fewer than 0 seconds it only shows an earlier time."""
        self._ahead += seconds
        self._passed += max(0.0, seconds)
        self._moved.set()
        self._moved = asyncio.Event()


@dataclass(frozen=True, slots=True)
class Told:
    """A public fact, as hooks and logs see it."""

    event: str
    at: Instant
    session: SessionId | None
    facts: Mapping[str, Any]


@dataclass(slots=True)
class Diary:
    """A `Notify` that keeps what it was told, and wakes whoever waits for it."""

    entries: list[Told] = field(default_factory=list)
    listeners: list[Callable[[Told], None]] = field(default_factory=list)
    _more: asyncio.Event = field(default_factory=asyncio.Event)

    def told(self, event: str, at: Instant, session: SessionId | None, facts: Mapping[str, Any]) -> None:
        entry = Told(event, at, session, dict(facts))
        self.entries.append(entry)
        for listener in self.listeners:
            listener(entry)
        self._more.set()
        self._more = asyncio.Event()

    def of(self, event: str, session: SessionId | None = None) -> list[Told]:
        return [entry for entry in self.entries if entry.event == event and session in (None, entry.session)]

    async def until(self, event: str, session: SessionId | None = None, *, seconds: float = 30.0) -> Told:
        """The first entry of this name, waiting for it if need be. TimeoutError."""
        async with asyncio.timeout(seconds):
            while not (found := self.of(event, session)):
                await self._more.wait()
        return found[0]


class Party:
    """One person's installation: a home directory, and a driver over a wallet, a store, a mailroom and perhaps a node."""

    def __init__(
        self,
        world: World,
        name: str,
        *,
        kinds: Sequence[PaperKind],
        lightning: bool,
        pace: Pace,
        mailroom: Callable[[Party], Mailroom],
        store: Callable[[Party], Awaitable[Store]],
        wallet: Callable[[Party], Awaitable[Wallet]],
        chain: Callable[[Party], Awaitable[Chain]],
    ) -> None:
        self.world = world
        self.name = name
        self.kinds = tuple(kinds)
        self.lightning = lightning
        self.pace = pace
        self.home = world.home / name
        self.home.mkdir(mode=0o700, exist_ok=True)
        self.address = loopback(10 + len(world.parties))
        """Where this person's requests come from, as far as the system tells loopback addresses apart."""
        self.seed = hashlib.sha256(f"pjv2 lab party {name}".encode()).digest()
        self.diary = Diary()
        self.funded: dict[Outpoint, Sats] = {}
        self._make_mailroom = mailroom
        self._make_store = store
        self._make_wallet = wallet
        self._make_chain = chain
        self.chain: Chain
        self.wallet: Any
        """A `ports.Wallet`; a `PaperWallet` unless the world was asked for another."""
        self.store: Store
        self.mailroom: Mailroom
        self.node: RehearsalNode | None
        self.driver: Driver

    def __repr__(self) -> str:
        return f"Party({self.name})"

    async def start(self) -> None:
        """Open everything from disk, as a fresh process would."""
        self.chain = await self._make_chain(self)
        self.wallet = await self._make_wallet(self)
        self.node = (
            RehearsalNode.open(self.home / "node", self.world.chain, seed=self.seed, peers=self.world.home / "peers")
            if self.lightning
            else None
        )
        self.store = await self._make_store(self)
        self.mailroom = self._make_mailroom(self)
        self.driver = self.make_driver()

    def make_driver(
        self,
        *,
        store: Store | None = None,
        wallet: Wallet | None = None,
        chain: Chain | None = None,
        mailroom: Mailroom | None = None,
        channels: Channels | None = None,
        entropy: Entropy | None = None,
    ) -> Driver:
        """A driver over this party's ports, some of them replaced (to inject faults)."""
        return Driver(
            store=store or self.store,
            mailroom=mailroom or self.mailroom,
            wallet=wallet or self.wallet,
            chain=chain or self.chain,
            channels=channels or self.node,
            clock=self.world.clock,
            entropy=entropy or self.world.entropy,
            notify=self.diary,
            pace=self.pace,
        )

    async def close(self) -> None:
        await self.mailroom.close()
        await self.store.close()
        await self.wallet.close()
        if self.chain is not self.world.chain:
            await self.chain.close()

    async def scripts(self) -> frozenset[bytes]:
        """Every script that this person's wallet knows as its own."""
        if isinstance(self.wallet, PaperWallet):
            return self.wallet.scripts()
        return frozenset(await self.wallet.scripts())

    async def locked(self) -> frozenset[Outpoint]:
        """Every coin that the wallet has locked."""
        if isinstance(self.wallet, PaperWallet):
            return self.wallet.locked()
        return frozenset(await self.wallet.locked())

    async def another_wallet(self) -> Any:
        """The same wallet as another process of this person has it open; whoever asks closes it."""
        return await self._make_wallet(self)

    async def restart(self) -> None:
        """What a crash leaves is on disk; everything else is opened anew."""
        await self.close()
        await self.start()

    async def fund(self, *values: Sats) -> tuple[Outpoint, ...]:
        """Confirmed coins from the lab's faucet, one per value, in turn of the wallet's script kinds."""
        outpoints = []
        for index, value in enumerate(values):
            kind = {"kind": self.kinds[index % len(self.kinds)]} if isinstance(self.wallet, PaperWallet) else {}
            address = await self.wallet.new_address(**kind)
            outpoint = await self.world.chain.fund(address.script, value)
            self.funded[outpoint] = value
            outpoints.append(outpoint)
        return tuple(outpoints)


class World:
    """Everything there is. `async with World() as world:`; a `home` of its own is deleted at the end."""

    def __init__(self, home: Path | None = None, *, entropy: Entropy | None = None, long_poll: float = 5.0) -> None:
        self._own_home = home is None
        self.home = home or Path(tempfile.mkdtemp(prefix="pjv2-lab-"))
        self.entropy = entropy or SystemEntropy()
        self.clock = LabClock()
        self.chain = LabChain()
        self.directory = Directory(host=loopback(3), long_poll=long_poll, clock=self.clock.now, rng=self.entropy)
        self.relays = tuple(Relay(host=loopback(4 + number), clock=self.clock.now) for number in range(2))
        self.esplora: EsploraServer | None = None
        self.parties: dict[str, Party] = {}
        self.keys_file: Path | None = None
        """The directory's OHTTP key in a file, for mailrooms that shall not fetch it."""
        self.strangers: set[bytes] = set()
        """Scripts of people outside: a payment to them is no loss."""

    async def __aenter__(self) -> World:
        await self.directory.start()
        for relay in self.relays:
            await relay.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        for party in self.parties.values():
            await party.close()
        for relay in self.relays:
            await relay.stop()
        await self.directory.stop()
        if self.esplora is not None:
            await self.esplora.stop()
        await self.chain.close()
        if self._own_home:
            shutil.rmtree(self.home, ignore_errors=True)

    async def party(
        self,
        name: str,
        *,
        coins: Sequence[Sats] = (),
        kinds: Sequence[PaperKind] = ("p2wpkh",),
        lightning: bool = False,
        pace: Pace = LAB_PACE,
        mailroom: Callable[[Party], Mailroom] | None = None,
        store: Callable[[Party], Awaitable[Store]] | None = None,
        wallet: Callable[[Party], Awaitable[Wallet]] | None = None,
        chain: Callable[[Party], Awaitable[Chain]] | None = None,
    ) -> Party:
        """A new person with confirmed coins."""
        party = Party(
            self,
            name,
            kinds=kinds,
            lightning=lightning,
            pace=pace,
            mailroom=mailroom or http_mailroom,
            store=store or sqlite_store,
            wallet=wallet or paper_wallet,
            chain=chain or own_chain,
        )
        await party.start()
        self.parties[name] = party
        await party.fund(*coins)
        return party

    async def serve_chain(self) -> EsploraServer:
        """The chain as an Esplora server, started when it is first wanted."""
        if self.esplora is None:
            self.esplora = EsploraServer(self.chain, host=loopback(7))
            await self.esplora.start()
        return self.esplora

    def peers(self, count: int) -> tuple[RehearsalPeer, ...]:
        """The first `count` remote Lightning nodes of this world, made when there are too few."""
        from pjv2.backends.channel.rehearsal_peer import known_peers, make_peers

        known = known_peers(self.home / "peers")
        if len(known) < count:
            make_peers(self.home / "peers", count - len(known))
            known = known_peers(self.home / "peers")
        return known[:count]


def loopback(number: int) -> str:
    """127.0.0.`number`, where the system lets us bind it; else 127.0.0.1 (macOS has only that one)."""
    import socket

    address = f"127.0.0.{number}"
    with contextlib.suppress(OSError), socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        probe.bind((address, 0))
        return address
    return "127.0.0.1"


def http_mailroom(party: Party) -> Mailroom:
    """The real client over the world's relays."""
    world = party.world
    return HttpMailroom(
        [Service(relay.url, f"operator of relay {number}") for number, relay in enumerate(world.relays, 1)],
        [Service(world.directory.url, "operator of the directory")],
        keys_file=world.keys_file,
        source_address=party.address,
        cache=party.store,
        clock=world.clock,
        rng=world.entropy,
    )


async def own_chain(party: Party) -> Chain:
    """The world's chain itself, without a server in between."""
    return party.world.chain


async def esplora_chain(party: Party) -> Chain:
    """The world's chain as a light client sees it, through an Esplora server."""
    return EsploraChain((await party.world.serve_chain()).url, network=Network.REGTEST)


async def paper_wallet(party: Party) -> Wallet:
    return PaperWallet(
        party.world.chain,
        seed=party.seed,
        network=Network.REGTEST,
        store_path=party.home / "wallet.json",
        kinds=party.kinds,
        now=party.world.clock.now,
    )


async def bdk_party_wallet(party: Party) -> BdkWallet:
    """The embedded wallet over the world's Esplora server. Raises NotNow where its library has no wheel."""
    server = await party.world.serve_chain()
    return await bdk_home_wallet(party.home, server.url, party.seed, kind=party.kinds[0], now=party.world.clock.now)


async def bdk_home_wallet(
    home: Path, server: str, seed: bytes, *, kind: PaperKind = "p2wpkh", now: Callable[[], Instant] = time.time
) -> BdkWallet:
    """The embedded wallet of a party's `home` and `seed`, for a process that has nothing else of the world."""
    from pjv2.backends.wallet.bdk import bdk_wallet
    from pjv2.backends.wallet.bdk_keys import words_from_entropy
    from pjv2.backends.wallet.bdk_sync import Esplora

    return await bdk_wallet(home, Esplora(server), words_from_entropy(seed[:16]), kind=kind, now=now)


async def sqlite_store(party: Party) -> Store:
    """The real store, in the party's home."""
    return await SqlStore.open(f"sqlite:///{party.home / 'pjv2.sqlite'}")
