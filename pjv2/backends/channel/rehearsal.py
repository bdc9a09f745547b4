"""A Lightning node for rehearsals: real 2-of-2 scripts, real commitment signatures, regtest only.

It stands where LND stands, and fails where LND fails: reservations live in the memory of the node (they survive a restart of
our program, not one of the node, and not a disconnect); a cancel does not stop a `secure` in flight; an error of `secure` can
be followed by a pending channel; an abandoned channel keeps its slot at the peer. What is not modelled: routing, updates,
invoices, more than one connection per peer.

Everything is on disk in one directory: `node.json` is the node, memory and database, and `peers/<pubkey>/peer.json` one remote
node each (`rehearsal_peer`). Several processes may use the directory at once. Messages between node and peer lie in queues in
those files, and whoever calls the node next delivers them: so a message in flight arrives, or is cut off, no matter whether
the call that sent it is still waited for (`rehearsal_wire`). What our node says and checks at each step of a funding stands in
`rehearsal_funding`, the shape of its file in `rehearsal_memory`.

Backup. `SecuredChannel.backup` names the outpoint, the peer and the number of our keys, authenticated by the seed; it holds no
key. With the seed alone, and a peer that still knows the channel, `rescue` gives the signed commitment: the money comes back.

It refuses to work on any chain but regtest.

Law: `secure` answers only after the peer's signature for exactly this outpoint was verified and is on disk.
"""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar, cast

from pjv2.backends.channel.rehearsal_commitment import derive_key, home_script, is_public_key, public
from pjv2.backends.channel.rehearsal_funding import RESERVE_ERROR as RESERVE_ERROR
from pjv2.backends.channel.rehearsal_funding import begin_reserve, begin_secure, record_of
from pjv2.backends.channel.rehearsal_memory import ANCHOR_RESERVE as ANCHOR_RESERVE
from pjv2.backends.channel.rehearsal_memory import (
    Document,
    anchor_reserve,
    backup_of,
    by_id,
    commitment_of,
    failure,
    public_count,
    read_backup,
    secured,
    terms_of,
)
from pjv2.backends.channel.rehearsal_peer import MAX_CHANNEL, MIN_CHANNEL, POLL, RehearsalPeer, known_peers
from pjv2.backends.channel.rehearsal_peer import Fault as Fault
from pjv2.backends.channel.rehearsal_peer import PeerChannel as PeerChannel
from pjv2.backends.channel.rehearsal_peer import Step as Step
from pjv2.backends.channel.rehearsal_peer import make_peers as make_peers
from pjv2.backends.channel.rehearsal_state import StateFile
from pjv2.backends.channel.rehearsal_wire import Wire
from pjv2.errors import NotNow, PayjoinError, PeerMistake, WrongUsage
from pjv2.ports import Chain, NodeInfo
from pjv2.psbt.plan import ChannelOrder
from pjv2.psbt.proposal import Funding
from pjv2.psbt.tx import Psbt, TxOut
from pjv2.session.facts import NodeChannel, ReservedChannel, SecuredChannel
from pjv2.units import Network, Outpoint, Sats, Txid

NODE_DOWN = "the RPC server is in the process of starting up, but not yet ready to accept calls"

T = TypeVar("T")


class RehearsalNode:
    """Our Lightning node in the lab; it implements `Channels` and shows its disk to audits."""

    def __init__(self, file: StateFile, chain: Chain | None, peers: Path) -> None:
        self._file = file
        self._chain = chain
        self._regtest = chain is None
        self._closed = False
        self.pubkey = public(derive_key(self._seed(), "identity")).hex()
        self._wire = Wire(peers, self.pubkey)

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
        first: Document = {
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
        return make_peers(self._wire.peers, count, seed=seed, pending_limit=pending_limit)

    def peers(self) -> tuple[RehearsalPeer, ...]:
        """All remote nodes that this node could reach, in the order of their making."""
        return known_peers(self._wire.peers)

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
        found = self._wire.peer(peer)
        if found is None or found.host != host:
            raise NotNow(f"dial tcp {host}: connect: connection refused")
        while not self._dial(found, host):
            await asyncio.sleep(POLL)
            await self._awake()

    async def anchor_reserve(self, public_channels: int) -> Sats:
        """10,000 sat for each new public channel; with those that exist never more than 100,000 in all."""
        await self._awake()
        existing = public_count(self._read())
        return anchor_reserve(existing + max(public_channels, 0)) - anchor_reserve(existing)

    async def reserve_script(self) -> bytes:
        """The P2WPKH script of the node's wallet."""
        await self._awake()
        return self.home_script

    async def reserve(self, id: bytes, order: ChannelOrder, memo: str) -> ReservedChannel:
        """Negotiate up to the funding script; the same id and order again answer the same.

        PeerMistake when the peer refuses, NotNow when it is silent or the node cannot, WrongUsage for a call that makes no sense.
        """
        await self._awake()
        wanted = record_of(self.pubkey, id, order, memo)
        self._deliver()
        with self._change() as document:
            refusal, key = begin_reserve(document, id.hex(), wanted)
        if refusal is not None:
            raise refusal

        def answered(document: Document) -> ReservedChannel | PayjoinError | None:
            record = document["records"].get(id.hex())
            if record is None or record["key"] != key:
                return NotNow("peer disconnected")
            if record["stage"] == "failed":
                del document["records"][id.hex()]
                return failure(record)
            if record["stage"] == "opening":
                return None
            return ReservedChannel(id, terms_of(document, record).script, record["capacity"])

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
            outcome = begin_secure(document, id, outpoint, funding, offered)
        if isinstance(outcome, PayjoinError):
            raise outcome
        if isinstance(outcome, SecuredChannel):
            return outcome
        key = outcome

        def answered(document: Document) -> SecuredChannel | PayjoinError | None:
            record = document["records"].get(id.hex())
            if record is not None and record["key"] == key:
                if record["stage"] != "failed":
                    return None
                del document["records"][id.hex()]
                return failure(record)
            channel = by_id(document, id.hex())
            if channel is None or channel["outpoint"] != str(outpoint):
                return NotNow("peer disconnected")
            return secured(document, channel)

        return await self._until(answered)

    async def channels(self, memo: str | None = None) -> tuple[NodeChannel, ...]:
        """Pending, open and closed channels, oldest first. As with LND neither reservations nor abandoned channels are listed."""
        await self._awake()
        self._deliver()
        await self.sync()
        document = self._read()
        return tuple(
            NodeChannel(
                peer=channel["peer"],
                outpoint=Outpoint.parse(channel["outpoint"]),
                capacity=channel["capacity"],
                memo=channel["memo"],
                state=channel["state"],
                backup=backup_of(document, channel),
            )
            for channel in document["channels"]
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
            self._wire.hang_up(document, peer)

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
                self._wire.hang_up(document, peer)
            document["records"], document["queue"] = {}, []
            document["stopped"] = True

    def start(self) -> None:
        """The node's process starts, and dials the peers it has channels with."""
        with self._change() as document:
            document["stopped"] = False
            for host, name in {(channel["host"], channel["peer"]) for channel in document["channels"]}:
                peer = self._wire.peer(name)
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
                if prevout.txout == TxOut(channel["capacity"], terms_of(document, channel).script):
                    channel["state"] = "open" if prevout.spent_by is None else "closed"

    def rescue(self, backup: bytes) -> bytes:
        """The signed commitment of the channel in `backup`, from the peer, ready to broadcast once its funding output exists.

        Needs this node's seed and nothing else of its disk. CannotRead: not a backup of this node. NotNow: the peer is away.
        PeerMistake: the peer knows the channel no more.
        """
        named = read_backup(self._read(), backup)
        peer = self._wire.peer(named["peer"])
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
            Outpoint.parse(channel["outpoint"]): commitment_of(document, channel) for channel in document["channels"]
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

    async def _until(self, answered: Callable[[Document], T | PayjoinError | None]) -> T:
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
            self._wire.pump(document)

    # ------------------------------------------------------------ disk and keys

    def _read(self) -> Document:
        return cast(Document, self._file.read())

    def _change(self) -> Any:
        return self._file.change()

    def _seed(self) -> bytes:
        return bytes.fromhex(self._read()["seed"])
