"""A Lightning node for rehearsals: real 2-of-2 scripts, real commitment signatures, regtest only.

It stands where LND stands, and fails where LND fails: reservations live in the memory of the node (they survive a restart of
our program, not one of the node, and not a disconnect); a cancel does not stop a `secure` in flight; an error of `secure` can
be followed by a pending channel; an abandoned channel keeps its slot at the peer. What is not modelled: routing, updates,
invoices, more than one connection per peer.

Everything is on disk in one directory: `node.json` is the node, memory and database, and `peers/<pubkey>/peer.json` one remote
node each (`rehearsal_peer`). Several processes may use the directory at once. Messages between node and peer lie in queues in
those files, and whoever calls the node next delivers them: so a message in flight arrives, or is cut off, no matter whether
the call that sent it is still waited for.

Backup. `SecuredChannel.backup` names the outpoint, the peer and the number of our keys, authenticated by the seed; it holds no
key. With the seed alone, and a peer that still knows the channel, `rescue` gives the signed commitment: the money comes back.

It refuses to work on any chain but regtest.

Law: `secure` answers only after the peer's signature for exactly this outpoint was verified and is on disk.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import json
import secrets
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal, TypedDict, TypeVar, cast

from pjv2.backends.channel.rehearsal_commitment import (
    ChannelTerms,
    PrivateKey,
    derive_key,
    home_script,
    is_public_key,
    public,
)
from pjv2.backends.channel.rehearsal_peer import (
    MAX_CHANNEL,
    MIN_CHANNEL,
    POLL,
    Message,
    PeerDocument,
    RehearsalPeer,
    hang_up,
    hear,
    known_peers,
    next_answer,
)
from pjv2.backends.channel.rehearsal_peer import Fault as Fault
from pjv2.backends.channel.rehearsal_peer import PeerChannel as PeerChannel
from pjv2.backends.channel.rehearsal_peer import Step as Step
from pjv2.backends.channel.rehearsal_peer import make_peers as make_peers
from pjv2.backends.channel.rehearsal_state import StateFile
from pjv2.errors import CannotRead, NotNow, PayjoinError, PeerMistake, WrongUsage
from pjv2.ports import Chain, NodeInfo
from pjv2.psbt.plan import ChannelOrder
from pjv2.psbt.proposal import Funding
from pjv2.psbt.tx import Psbt, PsbtInput, ScriptKind, TxOut, kind_of
from pjv2.session.facts import NodeChannel, ReservedChannel, SecuredChannel
from pjv2.units import Network, Outpoint, Sats, Txid

ANCHOR_RESERVE: Sats = 10_000
ANCHOR_RESERVE_CAP: Sats = 100_000
MAX_MEMO = 500
NODE_DOWN = "the RPC server is in the process of starting up, but not yet ready to accept calls"
RESERVE_ERROR = (
    "reserved wallet balance invalidated: transaction would leave insufficient funds for fee bumping anchor channel "
    "closings (see debug log for details)"
)

T = TypeVar("T")


class _Link(TypedDict):
    boot: int
    host: str


class _Record(TypedDict):
    """A funding intent in the node's memory."""

    peer: str
    capacity: int
    push: int
    private: bool
    memo: str
    key: int
    stage: Literal["opening", "reserved", "verifying", "failed"]
    cancelled: bool
    peer_key: str
    peer_script: str
    outpoint: str
    error: str
    peer_refused: bool


class _Channel(TypedDict):
    """A channel in the node's database."""

    id: str
    peer: str
    host: str
    capacity: int
    push: int
    private: bool
    memo: str
    key: int
    peer_key: str
    peer_script: str
    outpoint: str
    signature: str
    state: Literal["pending", "open", "closed"]


class _Document(TypedDict):
    seed: str
    wallet: int
    stopped: bool
    why_not: str
    next_key: int
    channels: list[_Channel]
    abandoned: list[str]
    # The memory of the node's process: gone with a restart.
    links: dict[str, _Link]
    records: dict[str, _Record]
    queue: list[Message]


class RehearsalNode:
    """Our Lightning node in the lab; it implements `Channels` and shows its disk to audits."""

    def __init__(self, file: StateFile, chain: Chain | None, peers: Path) -> None:
        self._file = file
        self._chain = chain
        self._peers = peers
        self._regtest = chain is None
        self._closed = False
        self.pubkey = public(derive_key(self._seed(), "identity")).hex()

    @classmethod
    def open(
        cls,
        directory: Path,
        chain: Chain | None = None,
        *,
        seed: bytes | None = None,
        peers: Path | None = None,
        wallet: Sats = 1_000_000,
    ) -> RehearsalNode:
        """The node in `directory`, made there if there is none.

        `chain`: where funding outputs are seen to confirm; without one channels stay pending. `seed` (default: random) and
        `wallet` (satoshis in the node's own wallet, for anchor reserves) count for a new node only. `peers`: where the remote
        nodes live (default: `directory/peers`). Raises CannotRead, and WrongUsage when another seed is stored there.
        """
        file = StateFile(directory / "node.json", "rehearsal node")
        first: _Document = {
            "seed": (secrets.token_bytes(32) if seed is None else seed).hex(),
            "wallet": wallet,
            "stopped": False,
            "why_not": "",
            "next_key": 0,
            "channels": [],
            "abandoned": [],
            "links": {},
            "records": {},
            "queue": [],
        }
        if not file.create(cast(dict[str, Any], first)) and seed is not None and file.read()["seed"] != seed.hex():
            raise WrongUsage(f"the rehearsal node in {directory} was made from another seed")
        return cls(file, chain, directory / "peers" if peers is None else peers)

    def __repr__(self) -> str:
        return f"RehearsalNode({self.pubkey})"

    def make_peers(self, count: int, *, seed: bytes | None = None, pending_limit: int = 1) -> tuple[RehearsalPeer, ...]:
        """`count` more remote nodes that this node can reach."""
        return make_peers(self._peers, count, seed=seed, pending_limit=pending_limit)

    def peers(self) -> tuple[RehearsalPeer, ...]:
        """All remote nodes that this node could reach, in the order of their making."""
        return known_peers(self._peers)

    # ------------------------------------------------------------ the port

    async def node(self) -> NodeInfo:
        """The node's key and whether it can open channels now. NotNow while it is down."""
        await self._awake()
        why_not = self._read()["why_not"]
        return NodeInfo(self.pubkey, not why_not, why_not, MIN_CHANNEL, MAX_CHANNEL)

    async def connect(self, peer: str, host: str) -> None:
        """Dial a peer; fine when it is connected already. NotNow in LND's words when it cannot be reached."""
        await self._awake()
        if not is_public_key(peer):
            raise WrongUsage(f"invalid public key: {peer}")
        if peer == self.pubkey:
            raise WrongUsage("cannot connect to self")
        found = self._peer(peer)
        if found is None or found.host != host:
            raise NotNow(f"dial tcp {host}: connect: connection refused")
        while not self._dial(found, host):
            await asyncio.sleep(POLL)
            await self._awake()

    async def anchor_reserve(self, public_channels: int) -> Sats:
        """10,000 sat for each new public channel; with those that exist never more than 100,000 in all."""
        await self._awake()
        existing = _public(self._read())
        return _anchor_reserve(existing + max(public_channels, 0)) - _anchor_reserve(existing)

    async def reserve_script(self) -> bytes:
        """The P2WPKH script of the node's wallet."""
        await self._awake()
        return self.home_script

    async def reserve(self, id: bytes, order: ChannelOrder, memo: str) -> ReservedChannel:
        """Negotiate up to the funding script; the same id and order again answer the same.

        PeerMistake when the peer refuses, NotNow when it is silent or the node cannot, WrongUsage for a call that makes no sense.
        """
        await self._awake()
        wanted = self._record_of(id, order, memo)
        self._deliver()
        with self._change() as document:
            refusal, key = self._begin_reserve(document, id.hex(), wanted)
        if refusal is not None:
            raise refusal

        def answered(document: _Document) -> ReservedChannel | PayjoinError | None:
            record = document["records"].get(id.hex())
            if record is None or record["key"] != key:
                return NotNow("peer disconnected")
            if record["stage"] == "failed":
                del document["records"][id.hex()]
                return _failure(record)
            if record["stage"] == "opening":
                return None
            return ReservedChannel(id, self._terms(document, record).script, record["capacity"])

        return await self._until(answered)

    async def secure(self, id: bytes, psbt: bytes, txid: Txid, funding: Funding) -> SecuredChannel:
        """The safe point for the output `funding` of the transaction `txid`; the same call again answers the same.

        WrongUsage: the PSBT is not what we said it is; the reservation is kept. PeerMistake: the peer refused. NotNow: the
        reservation is gone, the peer left, or the node failed. After any error the channel may have become pending.
        """
        await self._awake()
        outpoint = Outpoint(txid, funding.vout)
        try:
            offered = Psbt.parse(psbt)
        except PeerMistake as exc:
            raise WrongUsage("error verifying PSBT: it cannot be decoded") from exc
        self._deliver()
        with self._change() as document:
            outcome = self._begin_secure(document, id, outpoint, funding, offered)
        if isinstance(outcome, PayjoinError):
            raise outcome
        if isinstance(outcome, SecuredChannel):
            return outcome
        key = outcome

        def answered(document: _Document) -> SecuredChannel | PayjoinError | None:
            record = document["records"].get(id.hex())
            if record is not None and record["key"] == key:
                if record["stage"] != "failed":
                    return None
                del document["records"][id.hex()]
                return _failure(record)
            channel = _by_id(document, id.hex())
            if channel is None or channel["outpoint"] != str(outpoint):
                return NotNow("peer disconnected")
            return self._secured(channel)

        return await self._until(answered)

    async def channels(self, memo: str | None = None) -> tuple[NodeChannel, ...]:
        """Pending, open and closed channels, oldest first. As with LND neither reservations nor abandoned channels are listed."""
        await self._awake()
        self._deliver()
        await self.sync()
        return tuple(
            NodeChannel(
                peer=channel["peer"],
                outpoint=Outpoint.parse(channel["outpoint"]),
                capacity=channel["capacity"],
                memo=channel["memo"],
                state=channel["state"],
                backup=self._backup(channel),
            )
            for channel in self._read()["channels"]
            if memo is None or channel["memo"] == memo
        )

    async def cancel(self, id: bytes) -> None:
        """Drop a reservation. Without effect on a `secure` in flight and on a pending channel: only `disconnect` is a cut-off."""
        await self._awake()
        with self._change() as document:
            record = document["records"].get(id.hex())
            if record is not None and record["stage"] == "opening":
                record["cancelled"] = True
            elif record is not None and record["stage"] != "verifying":
                del document["records"][id.hex()]
                if record["stage"] == "reserved":
                    document["queue"].append({"type": "cancel", "to": record["peer"], "id": id.hex()})
        self._deliver()

    async def disconnect(self, peer: str) -> None:
        """Cut the peer off: nothing it says afterwards completes a channel. Reservations with it are gone on both sides."""
        await self._awake()
        with self._change() as document:
            self._hang_up(document, peer)

    async def abandon(self, outpoint: Outpoint) -> None:
        """Forget a pending channel. The peer is not told; if the transaction confirms, only the backup brings the money back."""
        await self._awake()
        open_already = False
        with self._change() as document:
            for channel in [c for c in document["channels"] if c["outpoint"] == str(outpoint)]:
                open_already = channel["state"] != "pending"
                if not open_already:
                    document["channels"].remove(channel)
                    document["abandoned"].append(str(outpoint))
        if open_already:
            raise WrongUsage(f"the channel {outpoint} is confirmed and holds money: close it instead of abandoning it")

    async def close(self) -> None:
        """Let go of the node, which lives on; calls that still wait end with NotNow."""
        self._closed = True

    # ------------------------------------------------------------ the lab's hands

    def stop(self) -> None:
        """The node's process ends: reservations, connections and messages in flight are gone, channels stay. Calls get NotNow."""
        with self._change() as document:
            for peer in list(document["links"]):
                self._hang_up(document, peer)
            document["records"], document["queue"] = {}, []
            document["stopped"] = True

    def start(self) -> None:
        """The node's process starts, and dials the peers it has channels with."""
        with self._change() as document:
            document["stopped"] = False
            for host, name in {(channel["host"], channel["peer"]) for channel in document["channels"]}:
                peer = self._peer(name)
                if peer is not None and not peer.offline:
                    try:
                        greeting = peer.greet(self.pubkey)
                    except NotNow:
                        continue  # It will be dialled when it is needed.
                    if greeting is not None:
                        document["links"][name] = {"boot": greeting[0], "host": host}

    def restart(self) -> None:
        """Stop and start: what a restart of LND does to a payment in progress."""
        self.stop()
        self.start()

    def set_why_not(self, words: str) -> None:
        """Let the node answer that it is not ready, and why; empty words make it ready again."""
        with self._change() as document:
            document["why_not"] = words

    def set_wallet(self, balance: Sats) -> None:
        """Satoshis in the node's own wallet; too few for the anchor reserve make `secure` of a public channel fail as LND does:
        with an error, and a pending channel."""
        with self._change() as document:
            document["wallet"] = balance

    async def sync(self) -> None:
        """See the chain on both sides: funding outputs that confirmed open their channels. Without a chain source: nothing."""
        if self._chain is None:
            return
        watched = [Outpoint.parse(channel["outpoint"]) for channel in self._read()["channels"]]
        try:
            found = await self._chain.prevouts(watched) if watched else {}
            for peer in self.peers():
                if peer.slots_taken() or peer.channels():
                    await peer.sync(self._chain)
        except NotNow:
            return  # A node whose chain source is away lists what it last knew.
        with self._change() as document:
            for channel in document["channels"]:
                prevout = found.get(Outpoint.parse(channel["outpoint"]))
                if prevout is None or prevout.height is None:
                    continue
                if prevout.txout == TxOut(channel["capacity"], self._terms(document, channel).script):
                    channel["state"] = "open" if prevout.spent_by is None else "closed"

    def rescue(self, backup: bytes) -> bytes:
        """The signed commitment of the channel in `backup`, from the peer, ready to broadcast once its funding output exists.

        Needs this node's seed and nothing else of its disk. CannotRead: not a backup of this node. NotNow: the peer is away.
        PeerMistake: the peer knows the channel no more.
        """
        facts, _, tag = backup.rpartition(b"\n")
        if not hmac.compare_digest(tag, self._tag(facts)):
            raise CannotRead("this is not a channel backup of this node")
        named = json.loads(facts)
        peer = self._peer(named["peer"])
        if peer is None:
            raise NotNow(f"peer {named['peer']} is not online")
        return peer.force_close(self.pubkey, Outpoint.parse(named["outpoint"]))

    # ------------------------------------------------------------ audits

    @property
    def home_script(self) -> bytes:
        """The script of the node's wallet, where commitments pay our balance."""
        return home_script(self._seed())

    def pending(self) -> tuple[Outpoint, ...]:
        """The channels that wait for their funding transaction, as the node's disk has them."""
        return tuple(Outpoint.parse(c["outpoint"]) for c in self._read()["channels"] if c["state"] == "pending")

    def abandoned(self) -> tuple[Outpoint, ...]:
        """The channels that the node was made to forget."""
        return tuple(Outpoint.parse(text) for text in self._read()["abandoned"])

    def reserved(self) -> tuple[bytes, ...]:
        """The ids in the node's memory, whatever stage they are in."""
        return tuple(bytes.fromhex(id) for id in self._read()["records"])

    def peer_pending(self) -> Mapping[str, tuple[Outpoint, ...]]:
        """By peer: the channels of ours that the peer waits for, the ones that we do not know included."""
        return {
            peer.pubkey: tuple(c.outpoint for c in peer.channels() if c.state == "pending" and c.node == self.pubkey)
            for peer in self.peers()
        }

    def commitments(self) -> Mapping[Outpoint, bytes]:
        """By funding outpoint: the commitment with both signatures, for every channel the node knows."""
        document = self._read()
        return {
            Outpoint.parse(channel["outpoint"]): self._commitment(document, channel) for channel in document["channels"]
        }

    def commitment(self, outpoint: Outpoint) -> bytes:
        """The signed commitment of one channel. WrongUsage when the node does not know it."""
        found = self.commitments().get(outpoint)
        if found is None:
            raise WrongUsage(f"the node has no commitment for {outpoint}")
        return found

    # ------------------------------------------------------------ calls

    async def _awake(self) -> None:
        if self._closed:
            raise NotNow("this connection to the node was closed")
        if not self._regtest and self._chain is not None:
            if await self._chain.genesis_hash() != Network.REGTEST.genesis_hash:
                raise WrongUsage("the rehearsal node opens no channels outside regtest: its peers are not real")
            self._regtest = True
        if self._read()["stopped"]:
            raise NotNow(NODE_DOWN)

    async def _until(self, answered: Callable[[_Document], T | PayjoinError | None]) -> T:
        """Deliver messages until `answered` has something; polled, for another process may be what moves them."""
        while True:
            self._deliver()
            with self._change() as document:
                outcome = answered(document)
            if isinstance(outcome, PayjoinError):
                raise outcome
            if outcome is not None:
                return outcome
            await asyncio.sleep(POLL)
            await self._awake()

    def _record_of(self, id: bytes, order: ChannelOrder, memo: str) -> _Record:
        if len(id) != 32 or not any(id):
            raise WrongUsage("pending chan ID not set: it is 32 random bytes")
        if len(memo.encode()) > MAX_MEMO:
            raise WrongUsage(f"the memo is of length {len(memo.encode())}, exceeds {MAX_MEMO}")
        if order.capacity is None:
            raise WrongUsage("the capacity of a channel must be settled before it is reserved")
        if not is_public_key(order.peer):
            raise WrongUsage(f"invalid public key: {order.peer}")
        if order.peer == self.pubkey:
            raise WrongUsage("cannot open channel to self")
        if order.kind is not None and order.kind.lower() != "anchors":
            raise WrongUsage(f"the rehearsal node opens channels of the type anchors only, not {order.kind}")
        return {
            "peer": order.peer,
            "capacity": order.capacity,
            "push": order.push,
            "private": order.private,
            "memo": memo,
            "key": -1,
            "stage": "opening",
            "cancelled": False,
            "peer_key": "",
            "peer_script": "",
            "outpoint": "",
            "error": "",
            "peer_refused": False,
        }

    def _begin_reserve(self, document: _Document, id: str, wanted: _Record) -> tuple[PayjoinError | None, int]:
        """Send the request, or find the one that is under way: why not, or the number of its key."""
        present = document["records"].get(id)
        if _by_id(document, id) is not None or (present is not None and present["stage"] == "verifying"):
            return WrongUsage("this id already names a pending channel"), -1
        if present is not None and present["stage"] != "failed":
            same = all(present[name] == wanted[name] for name in ("peer", "capacity", "push", "private", "memo"))
            if not same:
                return WrongUsage("this id already names another reservation"), -1
            return None, present["key"]
        if (refusal := self._unfit(document, wanted)) is not None:
            return refusal, -1
        wanted["key"] = document["next_key"]
        document["next_key"] += 1
        document["records"][id] = wanted
        document["queue"].append(
            {
                "type": "open",
                "to": wanted["peer"],
                "id": id,
                "node_key": public(self._funding_key(document, wanted["key"])).hex(),
                "node_script": home_script(bytes.fromhex(document["seed"])).hex(),
                "capacity": wanted["capacity"],
                "push": wanted["push"],
            }
        )
        return None, wanted["key"]

    def _unfit(self, document: _Document, wanted: _Record) -> PayjoinError | None:
        capacity, push = wanted["capacity"], wanted["push"]
        balance = ChannelTerms(b"", b"", b"", b"", capacity, push).opener_balance
        reasons = [
            (bool(document["why_not"]), document["why_not"]),
            (wanted["peer"] not in document["links"], f"peer {wanted['peer']} is not online"),
            (capacity < MIN_CHANNEL, f"channel is too small, the minimum channel size is: {MIN_CHANNEL} SAT"),
            (
                capacity > MAX_CHANNEL,
                f"funding amount is too large, the max channel size is: 0.{MAX_CHANNEL:08d} BTC",
            ),
            (
                not 0 <= push < capacity,
                "amount pushed to remote peer for initial state must be below the local funding amount",
            ),
            (balance < 0, "the amount pushed leaves too little of the capacity for the commitment fee"),
        ]
        # NotNow, not WrongUsage: capacities follow from the payment, and a payment degrades instead of failing.
        return next((NotNow(words) for unfit, words in reasons if unfit), None)

    def _begin_secure(
        self, document: _Document, id: bytes, outpoint: Outpoint, funding: Funding, offered: Psbt
    ) -> SecuredChannel | PayjoinError | int:
        """Send our signature, or find what is under way: the channel, why not, or the number of its key."""
        channel, record = _by_id(document, id.hex()), document["records"].get(id.hex())
        begun = channel if channel is not None else record
        if begun is not None and begun["outpoint"] not in ("", str(outpoint)):
            return WrongUsage(f"this channel is being secured for {begun['outpoint']}, not for {outpoint}")
        if channel is not None:
            return self._secured(channel)
        if record is None or record["stage"] == "opening":
            return NotNow(f"no funding intent found for pendingChannelID({id.hex()})")
        if record["stage"] == "reserved":
            return self._send_created(document, id, record, outpoint, funding, offered)
        return record["key"] if record["stage"] == "verifying" else _failure(record)

    def _send_created(
        self, document: _Document, id: bytes, record: _Record, outpoint: Outpoint, funding: Funding, offered: Psbt
    ) -> PayjoinError | int:
        terms = self._terms(document, record)
        try:
            outputs = _verify_psbt(offered, outpoint, funding, terms)
        except WrongUsage as refusal:
            return refusal
        if not record["private"]:
            ours = sum(
                output.value for output in outputs if output.script == home_script(bytes.fromhex(document["seed"]))
            )
            if document["wallet"] + ours < _anchor_reserve(_public(document) + 1):
                record["error"] = RESERVE_ERROR
        record["stage"], record["outpoint"] = "verifying", str(outpoint)
        signature = terms.sign(outpoint, self._funding_key(document, record["key"]))
        document["queue"].append(
            {
                "type": "created",
                "to": record["peer"],
                "id": id.hex(),
                "outpoint": str(outpoint),
                "signature": signature.hex(),
            }
        )
        return record["key"]

    # ------------------------------------------------------------ the wire

    def _dial(self, peer: RehearsalPeer, host: str) -> bool:
        """Connect unless we are; False while the peer does not answer. Raises NotNow."""
        self._deliver()
        with self._change() as document:
            if peer.pubkey in document["links"]:
                return True
            greeting = peer.greet(self.pubkey)
            if greeting is None:
                return False
            document["links"][peer.pubkey] = {"boot": greeting[0], "host": host}
        if greeting[1]:
            raise NotNow(f"connecting to {peer.pubkey}: EOF")
        return True

    def _deliver(self) -> None:
        # A block of its own: what was delivered is kept, whatever the call that follows is refused for.
        with self._change() as document:
            self._pump(document)

    def _pump(self, document: _Document) -> None:
        """Deliver what can be delivered, peer by peer. The peer's file is written first: dying in between leaves a ghost."""
        for name in list(document["links"]):
            peer = self._peer(name)
            if peer is None:
                self._drop(document, name)
                continue
            with peer.file.change() as raw:
                remote = cast(PeerDocument, raw)
                while self._alive(document, name, remote) and self._deliver_one(document, name, remote):
                    pass
                alive = self._alive(document, name, remote)
            if not alive:
                self._drop(document, name)

    @staticmethod
    def _alive(document: _Document, name: str, remote: PeerDocument) -> bool:
        return not remote["offline"] and remote["boot"] == document["links"][name]["boot"]

    def _deliver_one(self, document: _Document, name: str, remote: PeerDocument) -> bool:
        answer = next_answer(remote, self.pubkey)
        if answer is not None:
            self._heard(document, name, answer)
            return True
        message = next((message for message in document["queue"] if message["to"] == name), None)
        if message is None or not hear(remote, self.pubkey, message):
            return False
        document["queue"].remove(message)
        return True

    def _heard(self, document: _Document, name: str, answer: Message) -> None:
        record = document["records"].get(answer["id"])
        if record is None or record["peer"] != name:
            return
        if answer["type"] == "error":
            if record["stage"] != "failed":
                chan_id, words = answer["id"], answer["words"]
                record["stage"], record["peer_refused"] = "failed", True
                record["error"] = (
                    "remote canceled funding, possibly timed out: received funding error from "
                    f"{name}: chan_id={chan_id}, err={words}"
                )
        elif answer["type"] == "accept" and record["stage"] == "opening":
            self._accepted(document, record, answer)
        elif answer["type"] == "signed" and record["stage"] == "verifying":
            self._signed(document, record, answer)

    def _accepted(self, document: _Document, record: _Record, answer: Message) -> None:
        record["peer_key"], record["peer_script"] = answer["peer_key"], answer["peer_script"]
        record["stage"] = "reserved"
        if record["cancelled"] or answer["error"]:
            record["stage"] = "failed"
            record["error"] = "user canceled funding" if record["cancelled"] else answer["error"]
            document["queue"].append({"type": "cancel", "to": record["peer"], "id": answer["id"]})
        elif not is_public_key(answer["peer_key"]):
            record["stage"], record["peer_refused"] = "failed", True
            record["error"] = "the peer's funding key is not a point of the curve"

    def _signed(self, document: _Document, record: _Record, answer: Message) -> None:
        terms, outpoint = self._terms(document, record), Outpoint.parse(record["outpoint"])
        try:
            terms.verify(outpoint, terms.peer_key, bytes.fromhex(answer["signature"]))
        except PeerMistake as mistake:
            record["stage"], record["peer_refused"], record["error"] = "failed", True, str(mistake)
            return
        document["channels"].append(
            {
                "id": answer["id"],
                "peer": record["peer"],
                "host": document["links"][record["peer"]]["host"],
                "capacity": record["capacity"],
                "push": record["push"],
                "private": record["private"],
                "memo": record["memo"],
                "key": record["key"],
                "peer_key": record["peer_key"],
                "peer_script": record["peer_script"],
                "outpoint": record["outpoint"],
                "signature": answer["signature"],
                "state": "pending",
            }
        )
        record["error"] = record["error"] or answer["error"]
        if record["error"]:
            record["stage"] = "failed"
        else:
            del document["records"][answer["id"]]

    def _hang_up(self, document: _Document, name: str) -> None:
        peer = self._peer(name)
        if peer is not None:
            with peer.file.change() as raw:
                hang_up(cast(PeerDocument, raw), self.pubkey)
        self._drop(document, name)

    @staticmethod
    def _drop(document: _Document, name: str) -> None:
        """The connection is gone, and with it everything that was not on both disks."""
        document["links"].pop(name, None)
        document["queue"] = [message for message in document["queue"] if message["to"] != name]
        for id, record in list(document["records"].items()):
            if record["peer"] == name and record["stage"] != "failed":
                del document["records"][id]

    # ------------------------------------------------------------ disk and keys

    def _read(self) -> _Document:
        return cast(_Document, self._file.read())

    def _change(self) -> Any:
        return self._file.change()

    def _seed(self) -> bytes:
        return bytes.fromhex(self._read()["seed"])

    def _peer(self, name: str) -> RehearsalPeer | None:
        directory = self._peers / name
        return RehearsalPeer(directory) if (directory / "peer.json").exists() else None

    def _funding_key(self, document: _Document, index: int) -> PrivateKey:
        return derive_key(bytes.fromhex(document["seed"]), "funding", index)

    def _terms(self, document: _Document, of: _Record | _Channel) -> ChannelTerms:
        return ChannelTerms(
            opener_key=public(self._funding_key(document, of["key"])),
            peer_key=bytes.fromhex(of["peer_key"]),
            opener_script=home_script(bytes.fromhex(document["seed"])),
            peer_script=bytes.fromhex(of["peer_script"]),
            capacity=of["capacity"],
            push=of["push"],
        )

    def _commitment(self, document: _Document, channel: _Channel) -> bytes:
        terms, outpoint = self._terms(document, channel), Outpoint.parse(channel["outpoint"])
        ours = terms.sign(outpoint, self._funding_key(document, channel["key"]))
        return terms.signed(outpoint, ours, bytes.fromhex(channel["signature"])).raw

    def _secured(self, channel: _Channel) -> SecuredChannel:
        outpoint = Outpoint.parse(channel["outpoint"])
        return SecuredChannel(bytes.fromhex(channel["id"]), outpoint, self._backup(channel))

    def _backup(self, channel: _Channel) -> bytes:
        facts = json.dumps({name: channel[name] for name in ("outpoint", "peer", "host", "key", "capacity")}).encode()
        return facts + b"\n" + self._tag(facts)

    def _tag(self, facts: bytes) -> bytes:
        key = derive_key(self._seed(), "backup").secret
        return hmac.new(key, facts, hashlib.sha256).hexdigest().encode()


def _verify_psbt(parsed: Psbt, outpoint: Outpoint, funding: Funding, terms: ChannelTerms) -> tuple[TxOut, ...]:
    """What LND's verify looks at, in its words, and that the transaction is the one we were told; answers its outputs."""
    tx = parsed.tx
    total = 0
    for index, (spent, given) in enumerate(zip(tx.inputs, parsed.inputs, strict=True)):
        prevout = _utxo(spent.outpoint, given)
        if prevout is None:
            raise WrongUsage(
                f"error verifying PSBT: error determining input sum: input {index} has no UTXO information"
            )
        total += prevout.value
        # As LND does, a witness_utxo is believed: whether the real output is native segwit is not checked here.
        programs = (given.redeem_script or b"", prevout.script)
        if given.witness_utxo is None and not any(_is_witness_program(script) for script in programs):
            raise WrongUsage(
                "error verifying PSBT: not all inputs are SegWit spends, risk of malleability: "
                f"input {index} is non-SegWit spend or missing redeem script"
            )
    if sum(output.value for output in tx.outputs) >= total:
        raise WrongUsage("error verifying PSBT: input amount sum must be larger than output amount sum")
    matching = [vout for vout, output in enumerate(tx.outputs) if output.script == terms.script]
    if not matching or tx.outputs[matching[0]].value != terms.capacity:
        raise WrongUsage("error verifying PSBT: funding output not found in PSBT")
    if (funding.vout, funding.value, funding.script) != (matching[0], terms.capacity, terms.script):
        raise WrongUsage(f"the channel is funded by output {matching[0]}, which is not the output that was announced")
    if tx.txid != outpoint.txid:
        raise WrongUsage(f"the PSBT is transaction {tx.txid}, not {outpoint.txid}")
    return tx.outputs


def _utxo(outpoint: Outpoint, given: PsbtInput) -> TxOut | None:
    if given.witness_utxo is not None:
        return given.witness_utxo
    previous = given.non_witness_utxo
    if previous is None or previous.txid != outpoint.txid or outpoint.vout >= len(previous.outputs):
        return None
    return previous.outputs[outpoint.vout]


def _is_witness_program(script: bytes) -> bool:
    return kind_of(script) in (ScriptKind.P2WPKH, ScriptKind.P2WSH, ScriptKind.P2TR)


def _failure(record: _Record) -> PayjoinError:
    return PeerMistake(record["error"]) if record["peer_refused"] else NotNow(record["error"])


def _by_id(document: _Document, id: str) -> _Channel | None:
    return next((channel for channel in document["channels"] if channel["id"] == id), None)


def _public(document: _Document) -> int:
    """Public channels that want an anchor reserve: those on disk, and those whose signatures are on the way."""
    securing = [r for r in document["records"].values() if r["stage"] == "verifying" and not r["private"]]
    return len(securing) + sum(1 for c in document["channels"] if not c["private"] and c["state"] != "closed")


def _anchor_reserve(channels: int) -> Sats:
    return min(ANCHOR_RESERVE_CAP, ANCHOR_RESERVE * channels)
