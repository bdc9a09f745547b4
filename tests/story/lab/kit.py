"""A stage for stories on the real lab: people, requests, payments, and waiting for what the diaries tell.

Everything is the real thing on loopback (consensus, HTTP, OHTTP, signatures, the database); a story moves the clock and mines, and
waits for events, never for time. Whoever leaves the stage is audited: `async with stage() as s` ends with `lab.audit`.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass, field, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import httpx
import pytest
from _pytest.mark import ParameterSet

from pjv2 import session as model
from pjv2 import start
from pjv2.backends.channel.rehearsal_peer import RehearsalPeer
from pjv2.errors import PayjoinError
from pjv2.lab.audit import audit
from pjv2.lab.world import LAB_PACE, Party, Told, World, bdk_party_wallet, esplora_chain, own_chain, paper_wallet
from pjv2.ports import Chain, Wallet
from pjv2.psbt.params import format_params
from pjv2.psbt.plan import ChannelOrder
from pjv2.psbt.tx import Psbt, PsbtInput, PsbtOutput, Tx, TxIn, TxOut, address_to_script
from pjv2.psbt.verify import SentOriginal, check_proposal, check_signed, make_sent_original, original_body, read_reply
from pjv2.session import events as ev
from pjv2.session.events import Policy
from pjv2.testing import SeededEntropy
from pjv2.units import FeeRate, Network, Outpoint, Sats, SessionId
from pjv2.wire.mailbox import MailboxRequest, short_id
from pjv2.wire.message import open_message_b, seal_message_a
from pjv2.wire.secp import SecretKey
from pjv2.wire.uri import V2Endpoint, parse_uri

PATIENCE = 30.0
DAY = 86_400
AMOUNT: Sats = 150_000
TWO = FeeRate.from_sat_per_vb(2)
NOISE = ("Seen", "Unseen", "NotNow", "KeyRotated", "Alarm")
PLAIN = [
    "Created",
    "OriginalReceived",
    "OriginalAccepted",
    "CoinsReserved",
    "ProposalDrafted",
    "ProposalSigned",
    "ProposalPosting",
    "ProposalPosted",
    "CoinsReleased",
    "Closed",
]
WITH_CHANNELS = [
    "Created",
    "OriginalReceived",
    "OriginalAccepted",
    "CoinsReserved",
    "ChannelsIntended",
    "ChannelsReserved",
    "ProposalDrafted",
    "ChannelsSecured",
    "ProposalSigned",
    "ProposalPosting",
    "ProposalPosted",
    "CoinsReleased",
    "Closed",
]
SENT = [
    "Created",
    "OriginalPosting",
    "OriginalPosted",
    "ProposalAccepted",
    "Signed",
    "Broadcasting",
    "CoinsReleased",
    "Closed",
]
FAST = replace(LAB_PACE, node_timer=0.3)
"""For peers that never answer."""


@dataclass(frozen=True, slots=True)
class Pair:
    """A kind of wallet, and where it and its owner learn of the chain."""

    name: str
    wallet: Callable[[Party], Awaitable[Wallet]]
    chain: Callable[[Party], Awaitable[Chain]]

    @property
    def ports(self) -> dict[str, Any]:
        """For `World.party`."""
        return {"wallet": self.wallet, "chain": self.chain}

    @property
    def shared(self) -> bool:
        """Whether another process has a wallet of its own on the same file."""
        return self is BDK

    @property
    def marks(self) -> tuple[pytest.MarkDecorator, ...]:
        missing = self is BDK and find_spec("bdkpython") is None
        return (pytest.mark.skip(reason="the embedded wallet is not installed"),) if missing else ()

    def case(self, *values: Any, id: str) -> ParameterSet:
        """A test's parameters, this pair last."""
        return pytest.param(*values, self, id=f"{id}, {self.name}" if self is not PAPER else id, marks=self.marks)


_SCANNED: dict[tuple[bytes, str], dict[str, bytes]] = {}
"""Wallet files by seed and tip, as the first look for old money left them."""


async def scanned_wallet(party: Party) -> Wallet:
    """A BDK wallet that has looked for old money: once in a process for each seed and each chain that it may lie on."""
    chain = party.world.chain
    key = (party.seed, chain.block(chain.height).hash)
    fresh = not (party.home / "wallet.sqlite").exists()
    if fresh:
        for name, content in _SCANNED.get(key, {}).items():
            (party.home / name).write_bytes(content)
            (party.home / name).chmod(0o600)
    wallet = await bdk_party_wallet(party)
    if fresh and key not in _SCANNED:
        await wallet.sync()
        _SCANNED[key] = {file.name: file.read_bytes() for file in wallet_files(party.home)}
    return wallet


def wallet_files(home: Path) -> list[Path]:
    return [file for file in home.glob("wallet*") if file.suffix != ".lock"]


PAPER = Pair("paper", paper_wallet, own_chain)
"""Keys of its own, a file of locks and indexes, and the chain itself."""
BDK = Pair("bdk", scanned_wallet, esplora_chain)
"""A descriptor wallet in a SQLite file of its own, everything over an Esplora server: an installation without a node."""
both_pairs = pytest.mark.parametrize(
    "pair", [pytest.param(pair, id=pair.name, marks=pair.marks) for pair in (PAPER, BDK)]
)


@dataclass
class Story:
    world: World
    tasks: dict[tuple[str, SessionId], asyncio.Task[model.State]] = field(default_factory=dict)
    staying: set[tuple[str, SessionId]] = field(default_factory=set)

    # ------------------------------------------------------------ people

    async def bob(self, *coins: Sats, **more: Any) -> Party:
        """A receiver; without coins he has one of 200,000 sat. `bob(0)` has none."""
        return await self.world.party("bob", coins=[c for c in coins or (200_000,) if c], **more)

    async def alice(self, *coins: Sats, **more: Any) -> Party:
        """A payer; without coins she has one of 500,000 sat."""
        return await self.world.party("alice", coins=coins or (500_000,), **more)

    async def request(self, bob: Party, amount: Sats | None = AMOUNT, **more: Any) -> start.Request:
        return await start.receive(bob.driver, Network.REGTEST, amount, policy=more.pop("policy", Policy()), **more)

    async def pay(self, alice: Party, request: start.Request | str, **more: Any) -> start.Payment:
        uri = request if isinstance(request, str) else request.uri
        policy, rate = more.pop("policy", Policy()), more.pop("rate", TWO)
        return await start.send(alice.driver, Network.REGTEST, uri, policy=policy, rate=rate, **more)

    def order(self, peer: RehearsalPeer, capacity: Sats | None = None, **more: Any) -> ChannelOrder:
        return ChannelOrder(peer.pubkey, peer.host, capacity, private=more.pop("private", True), **more)

    # ------------------------------------------------------------ driving

    def drive(self, party: Party, session: SessionId, *, stay: bool = False) -> None:
        """Start the party's program for one session: until it is closed, or (`stay`) beyond that."""
        key = (party.name, session)
        assert key not in self.tasks or self.tasks[key].done()
        until: Callable[[model.State], bool] = (lambda state: False) if stay else model.is_closed
        (self.staying.add if stay else self.staying.discard)(key)
        self.tasks[key] = asyncio.create_task(party.driver.drive(session, until))

    async def leave(self, party: Party, session: SessionId) -> None:
        """The party's program ends here; `drive` starts it again with nothing but the log."""
        task = self.tasks.pop((party.name, session))
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)

    async def stop(self) -> None:
        tasks = list(self.tasks.values())
        for task in tasks:
            task.cancel()
        for outcome in await asyncio.gather(*tasks, return_exceptions=True):
            if isinstance(outcome, Exception):
                raise outcome
        self.tasks.clear()

    async def until(
        self, party: Party, event: str, session: SessionId | None = None, *, count: int = 1, **facts: Any
    ) -> Told:
        """The `count`th entry of this name with these facts; whatever breaks a driver meanwhile breaks the story."""

        def found() -> list[Told]:
            return [
                entry
                for entry in party.diary.of(event, session)
                if all(entry.facts.get(name) == value for name, value in facts.items())
            ]

        more = asyncio.Event()

        def listener(_: Told) -> None:
            more.set()

        party.diary.listeners.append(listener)
        try:
            async with asyncio.timeout(PATIENCE):
                while len(found()) < count:
                    for task in self.tasks.values():
                        if task.done() and not task.cancelled() and task.exception() is not None:
                            task.result()
                    more.clear()
                    waiting = asyncio.ensure_future(more.wait())
                    await asyncio.wait(
                        {waiting, *(task for task in self.tasks.values() if not task.done())},
                        return_when=asyncio.FIRST_COMPLETED,
                    )
                    waiting.cancel()
        except TimeoutError:
            told = [f"{entry.event}{dict(entry.facts)}" for entry in party.diary.entries[-25:]]
            raise AssertionError(f"{party.name} did not come to {event} {facts}; it came to: {told}") from None
        finally:
            party.diary.listeners.remove(listener)
        return found()[count - 1]

    async def closed(self, party: Party, session: SessionId) -> Told:
        """The session's end, and the end of the program that drove it, unless that stays to watch."""
        told = await self.until(party, "Closed", session)
        if (party.name, session) in self.tasks and (party.name, session) not in self.staying:
            await self.tasks[party.name, session]
        return told

    async def both_seen(self, bob: Party, request: start.Request, alice: Party, payment: start.Payment) -> Told:
        """The payjoin is in the mempool, and both know."""
        await self.until(alice, "Seen", payment.session, what="payjoin")
        return await self.until(bob, "Seen", request.session, what="payjoin")

    async def begin(self, bob: Party, alice: Party, request: start.Request, **more: Any) -> start.Payment:
        """Alice pays the request, and both programs run."""
        self.drive(bob, request.session)
        payment = await self.pay(alice, request, **more)
        self.drive(alice, payment.session)
        return payment

    async def propose(self, bob: Party, alice: Party, request: start.Request, **more: Any) -> start.Payment:
        """The proposal is posted, and Alice's program has ended before it could read it."""
        payment = await self.begin(bob, alice, request, **more)
        await self.until(alice, "OriginalPosted", payment.session)
        await self.leave(alice, payment.session)
        await self.until(bob, "ProposalPosted", request.session)
        return payment

    async def both_ended(
        self, outcome: str, bob: Party, request: start.Request, alice: Party, payment: start.Payment
    ) -> None:
        """Both sessions close with this outcome."""
        assert (await self.closed(bob, request.session)).facts["outcome"] == outcome
        assert (await self.closed(alice, payment.session)).facts["outcome"] == outcome

    async def payjoin(
        self, bob: Party, alice: Party, request: start.Request, **more: Any
    ) -> tuple[Told, Told, start.Payment]:
        """A payment from beginning to end: bob's and alice's `Closed`."""
        payment = await self.begin(bob, alice, request, **more)
        await self.both_seen(bob, request, alice, payment)
        await self.bury()
        return await self.closed(bob, request.session), await self.closed(alice, payment.session), payment

    async def bury(self, blocks: int = 6) -> None:
        await self.world.chain.mine(blocks)

    def past(self, request: start.Request, seconds: float = 1.0) -> None:
        """Move the clock to `seconds` after the request's expiry."""
        self.world.clock.skip(max(0.0, request.expires + seconds - self.world.clock.now()))

    # ------------------------------------------------------------ looking

    async def log(self, party: Party, session: SessionId) -> tuple[ev.Event, ...]:
        return tuple(model.decode(record.name, record.data) for record in await party.store.load(session))

    async def event(self, party: Party, session: SessionId, kind: type[ev.Event]) -> Any:
        return [event for event in await self.log(party, session) if isinstance(event, kind)][-1]

    def told(self, party: Party, session: SessionId) -> list[str]:
        """The names of what was told about a session, in order, without what the chain or the network does in between."""
        return [e.event for e in party.diary.entries if e.session == session and e.event not in NOISE]

    def tx(self, txid: str | None) -> Tx:
        entry = self.world.chain.tx(txid or "")
        assert entry is not None, f"{txid} is nowhere"
        return entry.tx

    def fee(self, txid: str | None) -> Sats:
        entry = self.world.chain.tx(txid or "")
        assert entry is not None
        return entry.fee

    def in_mempool(self) -> set[str]:
        return {entry.txid for entry in self.world.chain.mempool()}

    async def original_of(self, alice: Party, payment: start.Payment) -> Tx:
        state = await alice.driver.load(payment.session)
        assert isinstance(state, model.Sender)
        return state.sent.tx

    async def all_free(self, *parties: Party) -> None:
        """No coin, peer, lock or reservation is held by anybody."""
        for party in parties:
            assert not await party.store.coins_in_use()
            assert not await party.store.peers_in_use()
            assert not await party.locked()
            if party.node is not None:
                await party.node.sync()
                assert not party.node.reserved()
                assert not party.node.pending()


@contextlib.asynccontextmanager
async def stage(*, seed: object = "story", **world: Any) -> AsyncIterator[Story]:
    """A world for one story; the same random numbers each time. The audit at the end is part of every story."""
    async with World(entropy=SeededEntropy(str(seed)), **world) as made:
        story = Story(made)
        try:
            yield story
            await story.stop()
            await audit(made)
        finally:
            for task in story.tasks.values():
                task.cancel()
            await asyncio.gather(*story.tasks.values(), return_exceptions=True)


# ---------------------------------------------------------------- payers with other software


class Stranger:
    """A payer who does by hand what no polite program does. He uses a party's wallet, so that the audit knows his coins."""

    def __init__(self, story: Story, party: Party, request: start.Request) -> None:
        self.story = story
        self.party = party
        parsed = parse_uri(request.uri)
        assert isinstance(parsed.endpoint, V2Endpoint)
        self.endpoint = parsed.endpoint
        self.script = address_to_script(parsed.address, Network.REGTEST)
        self.rng = story.world.entropy
        self.reply_key = SecretKey.generate(self.rng)

    async def original(
        self,
        pays: Sats = AMOUNT,
        *,
        rate: FeeRate = TWO,
        substitution: bool = True,
        contribute: bool = True,
    ) -> SentOriginal:
        lock_id = self.rng.token(32)
        psbt = await self.party.wallet.fund(
            [TxOut(pays, self.script)], rate, lock_id, self.story.world.clock.now() + DAY
        )
        parsed = Psbt.parse(psbt)
        await self.party.wallet.unlock([txin.outpoint for txin in parsed.tx.inputs], lock_id)
        return make_sent_original(
            parsed, self.script, pays, min_fee_rate=rate, substitution=substitution, contribute=contribute
        )

    async def put(self, body: bytes) -> int:
        """Anything into the receiver's mailbox."""
        request = MailboxRequest("POST", self.endpoint.short_id, body)
        carried = await self.party.mailroom.exchange(
            self.endpoint.directory, self.endpoint.keys, request, session="ff" * 16
        )
        return carried.reply.status

    async def post(self, sent: SentOriginal) -> None:
        body = seal_message_a(self.endpoint.receiver, self.reply_key.public, original_body(sent), self.rng)
        assert await self.put(body) == 200

    async def reply(self) -> bytes:
        """The payload that comes back, in clear."""
        request = MailboxRequest("GET", short_id(self.reply_key.public))
        async with asyncio.timeout(PATIENCE):
            while True:
                carried = await self.party.mailroom.exchange(
                    self.endpoint.directory, self.endpoint.keys, request, session="ff" * 16
                )
                if carried.reply.status == 200:
                    return open_message_b(self.reply_key, self.endpoint.receiver, carried.reply.body)

    async def post_v1(self, sent: SentOriginal) -> httpx.Response:
        """A BIP78 payer: a plain POST to the `pj=` URL, which the directory holds until the receiver answers."""
        params = format_params(replace(sent.params, version=1))
        body = original_body(sent).split(b"\n")[0]
        url = f"{self.endpoint.directory}/{self.endpoint.short_id}?{params}"
        async with httpx.AsyncClient(timeout=PATIENCE) as client:
            return await client.post(url, content=body, headers={"Content-Type": "text/plain"})

    async def sign(self, sent: SentOriginal, payload: bytes, *, taken: bool = True) -> Tx:
        """Check a proposal as BIP78 says, sign it, broadcast it (`taken`: what the network has to say to it)."""
        psbt = payload if payload.startswith(b"psbt") else base64.b64decode(payload, validate=True)
        safe = check_proposal(sent, read_reply(psbt))
        signed = await self.party.wallet.sign(safe.psbt.serialize(), safe.ours)
        tx = check_signed(sent, safe, signed)
        verdict = (await self.story.world.chain.broadcast(tx.raw)).verdict
        assert verdict == ("accepted" if taken else "refused")
        return tx

    async def spend(self, outpoints: Sequence[Outpoint], outputs: Sequence[TxOut], *, sequence: int = 0xFFFFFFFD) -> Tx:
        """A signed transaction of the party's own coins, not broadcast."""
        return await spend(self.party, outpoints, outputs, sequence=sequence)


async def spend(
    party: Party, outpoints: Sequence[Outpoint], outputs: Sequence[TxOut], *, sequence: int = 0xFFFFFFFD
) -> Tx:
    """A signed transaction of a party's own coins, not broadcast."""
    psbt = await unsigned(party, outpoints, outputs, sequence=sequence)
    return Psbt.parse(await party.wallet.sign(psbt.serialize(), outpoints)).extract()


async def unsigned(
    party: Party, outpoints: Sequence[Outpoint], outputs: Sequence[TxOut], *, sequence: int = 0xFFFFFFFD
) -> Psbt:
    """What `spend` signs."""
    prevouts = await party.world.chain.prevouts(outpoints)
    return Psbt(
        Tx(2, 0, tuple(TxIn(outpoint, b"", sequence) for outpoint in outpoints), tuple(outputs)),
        tuple(PsbtInput(witness_utxo=prevouts[outpoint].txout) for outpoint in outpoints),
        tuple(PsbtOutput() for _ in outputs),
    )


async def change_script(party: Party) -> bytes:
    return (await party.wallet.new_address(change=True)).script


async def refused(work: Any) -> PayjoinError:
    """The typed error that something ends with."""
    try:
        await work
    except PayjoinError as exc:
        return exc
    raise AssertionError("it was not refused")
