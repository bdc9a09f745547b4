"""The seams: everything pjv2 asks of the world, as small protocols. One contract suite in `pjv2.testing` runs over every
implementation of each.

A port refuses by raising `NotNow` (unavailable, nothing happened or it can be repeated), `WrongUsage` (misconfigured) or
`CannotRead`; foreign exceptions never cross it. Every effect is idempotent: doing it twice is doing it once.

Law: a port answers facts and performs effects; it never decides.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeAlias

from pjv2.psbt.original import Prevout, Suitability
from pjv2.psbt.plan import ChannelOrder, Coin
from pjv2.psbt.proposal import Funding
from pjv2.psbt.tx import TxOut
from pjv2.session.facts import BroadcastResult, ChainView, NodeChannel, ReservedChannel, SecuredChannel, Tip
from pjv2.units import Entropy as Entropy
from pjv2.units import FeeRate, Instant, Network, Outpoint, Sats, SessionId, Txid
from pjv2.wire.mailbox import MailboxReply, MailboxRequest
from pjv2.wire.ohttp import KeyConfig


class Clock(Protocol):
    """Wall-clock time and waiting; the clock may jump either way."""

    def now(self) -> Instant: ...

    async def sleep(self, seconds: float) -> None: ...


# ---------------------------------------------------------------- mailroom


@dataclass(frozen=True, slots=True)
class Carried:
    """A mailbox reply and the relay that carried it."""

    reply: MailboxReply
    relay: str


@dataclass(frozen=True, slots=True)
class ServerReply:
    """What a payee's own server answered (BIP78)."""

    status: int
    body: bytes = field(repr=False)


class Mailroom(Protocol):
    """Directories behind oblivious relays; and for payees of the first version, their own servers."""

    async def directory(self) -> tuple[str, KeyConfig]:
        """A directory for a new request, and its keys, fetched through relays. NotNow when there is none."""
        ...

    async def exchange(
        self, directory: str, keys: KeyConfig, request: MailboxRequest, *, session: SessionId, avoid: str = ""
    ) -> Carried:
        """Carry one request in a fresh envelope through a relay that is not run by the directory's operator.

        `avoid` names a relay not to use where there is another. `session` isolates connections where a proxy is used.
        NotNow: relay or directory trouble (`KeyRotated` when the directory no longer knows `keys`).
        """
        ...

    async def bip78(self, url: str, body: bytes, *, session: SessionId) -> ServerReply:
        """One POST of an Original to the payee's own server, over TLS or to an onion service; no redirect is followed.

        NotNow: the server cannot be reached, or its certificate is not trusted.
        """
        ...

    async def close(self) -> None: ...


# ---------------------------------------------------------------- store


@dataclass(frozen=True, slots=True)
class Record:
    """An event as it is stored: name and JSON text (`session.log` writes and reads it). Its data can hold secrets."""

    seq: int
    at: Instant
    name: str
    data: str = field(repr=False)


@dataclass(frozen=True, slots=True)
class SessionRow:
    """What scheduling and history need without replay. Public facts only."""

    session: SessionId
    role: str
    state: str
    outcome: str | None
    created: Instant
    expires: Instant
    next_due: Instant | None
    label: str | None = None
    note: str | None = None
    order: str | None = None
    amount: Sats | None = None
    uri_id: str | None = None
    """Sender: hex of SHA-256 over the receiver key, unique for ever over sessions that were not reopened with --again."""


@dataclass(frozen=True, slots=True)
class Change:
    """One append: events from `seq` on, the new row, and what is written in the same transaction."""

    row: SessionRow
    seq: int
    records: tuple[Record, ...]
    see_inputs: tuple[Outpoint, ...] = ()
    take_coins: tuple[Outpoint, ...] = ()
    free_coins: bool = False
    take_peers: tuple[str, ...] = ()
    free_peers: bool = False
    block_peers: tuple[tuple[str, int], ...] = ()
    """Peers that keep an abandoned channel, with the height until which they refuse another."""


@dataclass(frozen=True, slots=True)
class Stored:
    """The append is durable."""


@dataclass(frozen=True, slots=True)
class LostRace:
    """Another worker appended first: load again."""


@dataclass(frozen=True, slots=True)
class InputsSeenBy:
    """One of `see_inputs` was seen by `session`; nothing was stored."""

    session: SessionId
    outpoint: Outpoint


@dataclass(frozen=True, slots=True)
class CoinTakenBy:
    """One of `take_coins` is in use by `session`; nothing was stored."""

    session: SessionId
    outpoint: Outpoint


@dataclass(frozen=True, slots=True)
class PeerTakenBy:
    """One of `take_peers` is in use by `session`; nothing was stored."""

    session: SessionId
    peer: str


Appended: TypeAlias = Stored | LostRace | InputsSeenBy | CoinTakenBy | PeerTakenBy


class Store(Protocol):
    """The durable memory: sessions, their events, seen inputs, coins and peers in use, claims, queued plans, small caches."""

    async def create(self, change: Change) -> Appended:
        """Insert a session with its first events (`seq` 0). WrongUsage when `order` or `uri_id` exists (naming the session)."""
        ...

    async def append(self, change: Change) -> Appended:
        """Compare-and-swap on (session, seq), durable when it answers `Stored`."""
        ...

    async def load(self, session: SessionId) -> tuple[Record, ...]:
        """All events in order; WrongUsage when the session is unknown."""
        ...

    async def row(self, session: SessionId) -> SessionRow: ...

    async def rows(self, *, open_only: bool = False) -> tuple[SessionRow, ...]:
        """Newest first."""
        ...

    async def find(self, *, order: str | None = None, uri_id: str | None = None) -> SessionRow | None: ...

    async def since(self, cursor: int, limit: int) -> tuple[tuple[int, SessionId, Record], ...]:
        """Events of all sessions after a cursor (a global, gapless-enough sequence), for hooks."""
        ...

    async def claim(self, session: SessionId, owner: str, seconds: float) -> bool:
        """Take or renew the claim on a session until `seconds` from now by the database's clock; False when another holds it."""
        ...

    async def release(self, session: SessionId, owner: str) -> None: ...

    async def coins_in_use(self) -> Mapping[Outpoint, SessionId]: ...

    async def peers_in_use(self) -> Mapping[str, SessionId]: ...

    async def blocked_peers(self) -> Mapping[str, int]:
        """Peers and the height until which they are blocked."""
        ...

    async def get(self, name: str) -> str | None:
        """A small public value (key cache, relay health, hook cursor, plans), by name."""
        ...

    async def put(self, name: str, value: str | None) -> None: ...

    async def close(self) -> None: ...


# ---------------------------------------------------------------- wallet


@dataclass(frozen=True, slots=True)
class WalletAddress:
    """A fresh receiving address; its derivation index is on disk before it is returned."""

    address: str
    script: bytes
    index: int


class Wallet(Protocol):
    """Keys and coins. It signs only what it is asked to sign."""

    async def fingerprint(self) -> str:
        """A public, stable name of this wallet; a session refuses to go on with another."""
        ...

    async def network(self) -> Network: ...

    async def new_address(self, *, change: bool = False) -> WalletAddress: ...

    async def mine(self, outpoints: Sequence[Outpoint]) -> frozenset[Outpoint]:
        """Which of these are coins of ours: locked, unconfirmed and already spent ones too."""
        ...

    async def coins(self) -> tuple[Coin, ...]:
        """Confirmed, mature, unlocked coins that we can sign for, with the weight of the input that spends each."""
        ...

    async def balance(self) -> Sats:
        """Everything confirmed, locked coins included."""
        ...

    async def lock(self, coins: Sequence[Outpoint], lock_id: bytes, until: Instant) -> tuple[Outpoint, ...]:
        """Lock or renew under our id; answers the coins that could not be locked. All or nothing. Survives restarts."""
        ...

    async def unlock(self, coins: Sequence[Outpoint], lock_id: bytes) -> None: ...

    async def can_sign(self) -> bool:
        """False while the wallet is locked or unreachable."""
        ...

    async def sign(self, psbt: bytes, ours: Sequence[Outpoint]) -> bytes:
        """The PSBT with exactly these inputs final, SIGHASH_ALL or DEFAULT. NotNow when it cannot sign now."""
        ...

    async def fund(
        self,
        payments: Sequence[TxOut],
        rate: FeeRate,
        lock_id: bytes,
        until: Instant,
        *,
        avoid: frozenset[Outpoint] = frozenset(),
    ) -> bytes:
        """A signed PSBT that pays `payments`, with metadata, its inputs locked. WrongUsage when the money does not suffice."""
        ...

    async def saw(self, tx: bytes) -> None:
        """The network took this transaction from us: coins that it spends or makes are known without asking anybody."""
        ...

    async def close(self) -> None: ...


# ---------------------------------------------------------------- chain


class Chain(Protocol):
    """A source of truth about blocks, mempool and fees."""

    async def genesis_hash(self) -> str: ...

    async def tip(self) -> Tip: ...

    async def test(self, tx: bytes) -> Suitability:
        """Would the network take this transaction now? Nothing is broadcast."""
        ...

    async def prevouts(self, outpoints: Sequence[Outpoint]) -> Mapping[Outpoint, Prevout]:
        """Each output as the chain source has it; a missing key means that it is unknown."""
        ...

    async def view(
        self, txids: frozenset[Txid], outpoints: frozenset[Outpoint], scripts: frozenset[bytes], since: int
    ) -> ChainView: ...

    async def broadcast(self, tx: bytes, *, parents: Sequence[bytes] = ()) -> BroadcastResult: ...

    async def fee_rate(self, blocks: int) -> FeeRate: ...

    async def close(self) -> None: ...


# ---------------------------------------------------------------- channels


@dataclass(frozen=True, slots=True)
class NodeInfo:
    """Our Lightning node: public key, whether it can open channels now, and why not."""

    pubkey: str
    ready: bool
    why_not: str = ""
    min_capacity: Sats = 20_000
    max_capacity: Sats = 16_777_215


class Channels(Protocol):
    """A Lightning node that funds channels from a transaction it did not make. Neutral enough for LND, CLN and LDK.

    `id` is 32 random bytes that we wrote down before the call.
    """

    async def node(self) -> NodeInfo: ...

    async def connect(self, peer: str, host: str) -> None:
        """NotNow in words when the peer cannot be reached."""
        ...

    async def anchor_reserve(self, public_channels: int) -> Sats:
        """What the node's own wallet must additionally hold for so many new public channels."""
        ...

    async def reserve_script(self) -> bytes:
        """A script of the node's own wallet."""
        ...

    async def reserve(self, id: bytes, order: ChannelOrder, memo: str) -> ReservedChannel:
        """Negotiate up to the funding script. PeerMistake when the peer refuses, NotNow when it is silent."""
        ...

    async def secure(self, id: bytes, psbt: bytes, txid: Txid, funding: Funding) -> SecuredChannel:
        """The safe point: the peer's commitment signature for exactly this outpoint is on our disk.

        After an error the channel may still have become pending: list before judging.
        """
        ...

    async def channels(self, memo: str | None = None) -> tuple[NodeChannel, ...]:
        """What the node lists, pending and open, optionally only those with this memo."""
        ...

    async def cancel(self, id: bytes) -> None:
        """Drop a reservation; an unknown id is fine."""
        ...

    async def disconnect(self, peer: str) -> None:
        """Cut the peer off and return once it left."""
        ...

    async def abandon(self, outpoint: Outpoint) -> None:
        """Forget a pending channel; an unknown one is fine."""
        ...

    async def close(self) -> None: ...


# ---------------------------------------------------------------- notify


class Notify(Protocol):
    """Where public facts go: logs, hooks, JSON lines. It never sees a key, a PSBT, a mailbox id or a peer's host."""

    def told(self, event: str, at: Instant, session: SessionId | None, facts: Mapping[str, Any]) -> None: ...
