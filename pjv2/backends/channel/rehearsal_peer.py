"""The other side of a rehearsal channel: a remote node with its own keys, its own disk and its own idea of the truth.

It refuses what a remote LND refuses, in LND's words: one pending channel per peer (reservations and dead channels count), sizes
outside its limits, a commitment signature that does not fit. What it stored stays stored, whoever forgets it on our side: an
unconfirmed channel holds its slot for 2,016 blocks. Reservations and unsent answers live in the memory of its process: a
disconnect, a restart or a fall offline drops them.

Faults are switched per step and lie on disk as well, so that another process can throw them.

Law: the peer judges by its own file only; it never reads our node's.
"""

from __future__ import annotations

import asyncio
import secrets
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any, Literal, TypedDict, cast

from pjv2.backends.channel.rehearsal_commitment import (
    ChannelTerms,
    PrivateKey,
    derive_key,
    home_script,
    is_public_key,
    public,
)
from pjv2.backends.channel.rehearsal_state import StateFile
from pjv2.errors import NotNow, PeerMistake, WrongUsage
from pjv2.ports import Chain
from pjv2.units import Outpoint, Sats

FORGET_AFTER = 2_016
"""Blocks after which the peer forgets a channel that never confirmed."""

POLL = 0.01
"""Seconds between looks at the disk while something is held: only a file can carry a switch thrown by another process."""

MIN_CHANNEL: Sats = 20_000
MAX_CHANNEL: Sats = 16_777_215

Message = dict[str, Any]
ChannelState = Literal["pending", "open", "closed"]


class Step(StrEnum):
    """The three moments at which a peer can fail us."""

    CONNECT = "connect"
    RESERVE = "reserve"
    SECURE = "secure"


class Fault(StrEnum):
    """What goes wrong at a step."""

    REFUSE = "refuse"
    """The peer says no, and stores nothing."""
    STALL = "stall"
    """The peer does not read our message before `resume`; it lies in the wire until then, whether we wait or not."""
    STALL_ANSWER = "stall-answer"
    """The peer has acted and stored; its answer leaves it only after `resume`."""
    OFFLINE = "offline"
    """The peer dies on receiving the message, before it stores anything."""
    LOSE_ANSWER = "lose-answer"
    """The peer has acted and stored, and the connection dies before its answer: at `secure` that leaves a ghost."""
    ERROR = "error"
    """The peer has acted and answered, and our node reports an error all the same: at `secure` the channel is pending."""


STEP_OF = {"open": Step.RESERVE, "created": Step.SECURE}


class _Fault(TypedDict):
    fault: str
    once: bool
    words: str


class _Reservation(TypedDict):
    node: str
    id: str
    key: int
    node_key: str
    node_script: str
    capacity: int
    push: int


class _Channel(_Reservation):
    outpoint: str
    signature: str
    state: ChannelState
    since: int


class PeerDocument(TypedDict):
    """The peer's file."""

    seed: str
    number: int
    host: str
    pending_limit: int
    min_channel: int
    max_channel: int
    offline: bool
    boot: int
    next_key: int
    tip: int
    synced: bool
    skipped: int
    faults: dict[str, _Fault]
    held: list[str]
    reservations: list[_Reservation]
    outbox: list[Message]
    channels: list[_Channel]


@dataclass(frozen=True, slots=True)
class PeerChannel:
    """A channel as the peer lists it, and who opened it."""

    node: str
    outpoint: Outpoint
    capacity: Sats
    state: ChannelState


class RehearsalPeer:
    """A remote Lightning node for the lab: reachable under `uri`, with switches for everything that can go wrong."""

    def __init__(self, directory: Path) -> None:
        self.file = StateFile(directory / "peer.json", "rehearsal peer")
        document = self._read()
        self.pubkey = public(derive_key(bytes.fromhex(document["seed"]), "identity")).hex()
        self.number = document["number"]
        self.host = document["host"]

    @classmethod
    def create(
        cls,
        peers: Path,
        *,
        number: int,
        host: str,
        seed: bytes | None = None,
        pending_limit: int = 1,
        min_channel: Sats = MIN_CHANNEL,
        max_channel: Sats = MAX_CHANNEL,
    ) -> RehearsalPeer:
        """A new peer in a directory of its own under `peers`, or the one with this seed that is already there."""
        seed = secrets.token_bytes(32) if seed is None else seed
        directory = peers / public(derive_key(seed, "identity")).hex()
        first: PeerDocument = {
            "seed": seed.hex(),
            "number": number,
            "host": host,
            "pending_limit": pending_limit,
            "min_channel": min_channel,
            "max_channel": max_channel,
            "offline": False,
            "boot": 0,
            "next_key": 0,
            "tip": 0,
            "synced": False,
            "skipped": 0,
            "faults": {},
            "held": [],
            "reservations": [],
            "outbox": [],
            "channels": [],
        }
        StateFile(directory / "peer.json", "rehearsal peer").create(cast(dict[str, Any], first))
        return cls(directory)

    def __repr__(self) -> str:
        return f"RehearsalPeer({self.uri})"

    @property
    def uri(self) -> str:
        """`pubkey@host:port`, as an order names it."""
        return f"{self.pubkey}@{self.host}"

    def _read(self) -> PeerDocument:
        return cast(PeerDocument, self.file.read())

    # ------------------------------------------------------------ switches

    def fault(self, step: Step, fault: Fault | None, *, once: bool = False, words: str = "") -> None:
        """Let every call of ours fail at `step` from now on (`once`: the next one); None repairs the step."""
        with self.file.change() as raw:
            document = cast(PeerDocument, raw)
            document["faults"].pop(step.value, None)
            if fault is not None:
                document["faults"][step.value] = {"fault": fault.value, "once": once, "words": words}

    def resume(self, step: Step | None = None) -> None:
        """End the stalls at `step`, or all of them: held messages are read, held answers leave."""
        with self.file.change() as raw:
            document = cast(PeerDocument, raw)
            for one in [step] if step is not None else list(Step):
                fault = document["faults"].get(one.value)
                if fault is not None and fault["fault"] in (Fault.STALL, Fault.STALL_ANSWER):
                    del document["faults"][one.value]
                document["held"] = [held for held in document["held"] if held != one.value]
                for answer in document["outbox"]:
                    if answer["step"] == one.value:
                        answer["held"] = False

    async def until_held(self, step: Step, seconds: float = 10) -> None:
        """Return once a call of ours is stalled at `step`. TimeoutError when none is within `seconds`."""
        async with asyncio.timeout(seconds):
            while step.value not in self._read()["held"]:  # noqa: ASYNC110 - another process may be the one that calls
                await asyncio.sleep(POLL)

    def go_offline(self) -> None:
        """Die: reservations and unsent answers are gone, channels stay."""
        with self.file.change() as raw:
            die(cast(PeerDocument, raw))

    def come_back(self) -> None:
        """Be reachable again; a new connection is needed."""
        with self.file.change() as raw:
            cast(PeerDocument, raw)["offline"] = False

    def restart(self) -> None:
        """Die and come back."""
        with self.file.change() as raw:
            die(cast(PeerDocument, raw))
            cast(PeerDocument, raw)["offline"] = False

    def set_limits(
        self, *, pending: int | None = None, min_channel: Sats | None = None, max_channel: Sats | None = None
    ) -> None:
        """Change how many pending channels, and which sizes in satoshis, the peer takes."""
        with self.file.change() as raw:
            document = cast(PeerDocument, raw)
            document["pending_limit"] = document["pending_limit"] if pending is None else pending
            document["min_channel"] = document["min_channel"] if min_channel is None else min_channel
            document["max_channel"] = document["max_channel"] if max_channel is None else max_channel

    def drop_reservations(self) -> None:
        """What a remote LND does with a reservation that was idle for ten minutes."""
        with self.file.change() as raw:
            document = cast(PeerDocument, raw)
            for reservation in document["reservations"]:
                _answer_error(
                    document,
                    reservation["node"],
                    reservation["id"],
                    Step.RESERVE,
                    "funding failed due to internal error",
                )
            document["reservations"] = []

    # ------------------------------------------------------------ what it knows

    @property
    def offline(self) -> bool:
        return self._read()["offline"]

    def channels(self) -> tuple[PeerChannel, ...]:
        """Every channel on the peer's disk, oldest first."""
        return tuple(
            PeerChannel(channel["node"], Outpoint.parse(channel["outpoint"]), channel["capacity"], channel["state"])
            for channel in self._read()["channels"]
        )

    def pending(self) -> tuple[Outpoint, ...]:
        """The channels it waits for, those that we abandoned or never stored included."""
        return tuple(channel.outpoint for channel in self.channels() if channel.state == "pending")

    def slots_taken(self) -> int:
        """Reservations and pending channels: what counts against its limit."""
        return _slots_taken(self._read())

    def blocks_passed(self, blocks: int) -> None:
        """Pretend that so many more blocks passed; channels that did not confirm within 2,016 are forgotten."""
        with self.file.change() as raw:
            document = cast(PeerDocument, raw)
            document["skipped"] += blocks
            _forget(document)

    async def sync(self, chain: Chain) -> None:
        """See the chain: funding outputs that confirmed open their channels, and old unconfirmed channels are forgotten."""
        watched = [channel for channel in self._read()["channels"] if channel["state"] != "closed"]
        tip = (await chain.tip()).height
        found = await chain.prevouts([Outpoint.parse(channel["outpoint"]) for channel in watched]) if watched else {}
        with self.file.change() as raw:
            document = cast(PeerDocument, raw)
            if not document["synced"]:
                for channel in document["channels"]:
                    channel["since"] += tip
            document["synced"], document["tip"] = True, tip
            for channel in document["channels"]:
                prevout = found.get(Outpoint.parse(channel["outpoint"]))
                if prevout is None or prevout.height is None:
                    continue
                if prevout.txout.script == _terms(document, channel).script:
                    channel["state"] = "open" if prevout.spent_by is None else "closed"
            _forget(document)

    def force_close(self, node: str, outpoint: Outpoint) -> bytes:
        """The commitment with both signatures, for a node that lost its own copy. PeerMistake when the peer knows it no more."""
        document = self._read()
        if document["offline"]:
            raise NotNow(f"peer {self.pubkey} is not online")
        for channel in document["channels"]:
            if channel["node"] == node and channel["outpoint"] == str(outpoint):
                terms = _terms(document, channel)
                ours = terms.sign(outpoint, _funding_key(document, channel))
                return terms.signed(outpoint, bytes.fromhex(channel["signature"]), ours).raw
        raise PeerMistake(
            f"peer {self.pubkey} does not know the channel {outpoint} any more: only its consent can help"
        )

    # ------------------------------------------------------------ the wire, for our node

    def greet(self, node: str) -> tuple[int, bool] | None:
        """Take a connection: the number of the peer's run and whether our node is to report an error; None while it stalls.

        Raises NotNow in LND's words.
        """
        with self.file.change() as raw:
            document = cast(PeerDocument, raw)
            fault = None if document["offline"] else _fault_at(document, Step.CONNECT)
            if fault in (Fault.STALL, Fault.STALL_ANSWER):
                _hold(document, Step.CONNECT)
                return None
            if fault is Fault.OFFLINE:
                die(document)
            if not document["offline"] and fault in (None, Fault.ERROR):
                hang_up(document, node)
                return document["boot"], fault is Fault.ERROR
        raise NotNow(f"dial tcp {self.host}: connect: connection refused")


def make_peers(
    peers: Path,
    count: int,
    *,
    seed: bytes | None = None,
    pending_limit: int = 1,
    min_channel: Sats = MIN_CHANNEL,
    max_channel: Sats = MAX_CHANNEL,
) -> tuple[RehearsalPeer, ...]:
    """`count` more peers under the directory `peers`, at 127.0.0.1 from port 9735 up; with a seed always the same ones."""
    if count < 1 or min_channel > max_channel or pending_limit < 0:
        raise WrongUsage("make at least one peer, with limits that some channel meets")
    first = len(known_peers(peers))
    return tuple(
        RehearsalPeer.create(
            peers,
            number=number,
            host=f"127.0.0.1:{9735 + number}",
            seed=None if seed is None else seed + number.to_bytes(4, "big"),
            pending_limit=pending_limit,
            min_channel=min_channel,
            max_channel=max_channel,
        )
        for number in range(first, first + count)
    )


def known_peers(peers: Path) -> tuple[RehearsalPeer, ...]:
    """The peers that were made under this directory, in that order."""
    if not peers.is_dir():
        return ()
    found = [RehearsalPeer(path.parent) for path in peers.glob("*/peer.json")]
    return tuple(sorted(found, key=lambda peer: (peer.number, peer.pubkey)))


# ---------------------------------------------------------------- what the peer does with a message, under its lock


def hear(document: PeerDocument, node: str, message: Message) -> bool:
    """Act on one message of ours; its answers lie in the outbox. False when the peer does not read it now."""
    step = STEP_OF.get(message["type"])
    if step is None:
        _release(document, node, message["id"])
        return True
    switched = document["faults"].get(step.value)
    words = switched["words"] if switched is not None else ""
    fault = _fault_at(document, step)
    match fault:
        case Fault.STALL:
            _hold(document, step)
            return False
        case Fault.OFFLINE:
            die(document)
            return True
        case Fault.REFUSE:
            _release(document, node, message["id"])
            _answer_error(document, node, message["id"], step, words or "channels are not accepted at this time")
            return True
    try:
        answer = _open(document, node, message) if step is Step.RESERVE else _created(document, node, message)
    except PeerMistake as refusal:
        _answer_error(document, node, message["id"], step, str(refusal))
        return True
    held = fault is Fault.STALL_ANSWER
    if held:
        _hold(document, step)
    error = (words or "our node failed after the peer had answered") if fault is Fault.ERROR else ""
    tags = {"node": node, "id": message["id"], "step": step.value, "held": held, "error": error}
    document["outbox"].append({**answer, **tags})
    if fault is Fault.LOSE_ANSWER:
        document["boot"] += 1
        _lose_memory(document)
    return True


def next_answer(document: PeerDocument, node: str) -> Message | None:
    """Take the next answer for `node` out of the outbox; None while there is none, or it is held back."""
    for place, answer in enumerate(document["outbox"]):
        if answer["node"] == node:
            return None if answer["held"] else document["outbox"].pop(place)
    return None


def hang_up(document: PeerDocument, node: str) -> None:
    """The connection to `node` ended: its reservations and answers are forgotten, its channels are not."""
    document["reservations"] = [r for r in document["reservations"] if r["node"] != node]
    document["outbox"] = [answer for answer in document["outbox"] if answer["node"] != node]


def die(document: PeerDocument) -> None:
    """The peer's process ends: what was in memory is gone, and so is every connection."""
    document["offline"] = True
    document["boot"] += 1
    _lose_memory(document)


def _lose_memory(document: PeerDocument) -> None:
    document["reservations"], document["outbox"], document["held"] = [], [], []


def _open(document: PeerDocument, node: str, message: Message) -> Message:
    capacity, push = message["capacity"], message["push"]
    if _slots_taken(document) >= document["pending_limit"]:
        raise PeerMistake("Number of pending channels exceed maximum")
    if capacity < document["min_channel"]:
        raise PeerMistake(f"chan size of {_btc(capacity)} is below min chan size of {_btc(document['min_channel'])}")
    if capacity > document["max_channel"]:
        raise PeerMistake(f"chan size of {_btc(capacity)} exceeds maximum chan size of {_btc(document['max_channel'])}")
    if not is_public_key(message["node_key"]) or not 0 <= push < capacity:
        raise PeerMistake("the channel parameters make no sense")
    reservation: _Reservation = {
        "node": node,
        "id": message["id"],
        "key": document["next_key"],
        "node_key": message["node_key"],
        "node_script": message["node_script"],
        "capacity": capacity,
        "push": push,
    }
    document["next_key"] += 1
    document["reservations"].append(reservation)
    peer_key = public(_funding_key(document, reservation)).hex()
    return {"type": "accept", "peer_key": peer_key, "peer_script": home_script(bytes.fromhex(document["seed"])).hex()}


def _created(document: PeerDocument, node: str, message: Message) -> Message:
    found = [r for r in document["reservations"] if _is(r, node, message["id"])]
    if not found:
        raise PeerMistake("no reservation for this channel id")
    reservation = found[0]
    document["reservations"].remove(reservation)
    terms = _terms(document, reservation)
    outpoint = Outpoint.parse(message["outpoint"])
    # The peer never sees T: the signature alone tells whether we mean the same txid, output, script and amount.
    terms.verify(outpoint, terms.opener_key, bytes.fromhex(message["signature"]))
    document["channels"].append(
        {
            **reservation,
            "outpoint": str(outpoint),
            "signature": message["signature"],
            "state": "pending",
            "since": _height(document),
        }
    )
    return {"type": "signed", "signature": terms.sign(outpoint, _funding_key(document, reservation)).hex()}


def _answer_error(document: PeerDocument, node: str, id: str, step: Step, words: str) -> None:
    document["outbox"].append(
        {"type": "error", "node": node, "id": id, "words": words, "step": step.value, "held": False}
    )


def _release(document: PeerDocument, node: str, id: str) -> None:
    document["reservations"] = [r for r in document["reservations"] if not _is(r, node, id)]


def _fault_at(document: PeerDocument, step: Step) -> Fault | None:
    found = document["faults"].get(step.value)
    if found is None:
        return None
    fault = Fault(found["fault"])
    if found["once"] and fault is not Fault.STALL and not (step is Step.CONNECT and fault is Fault.STALL_ANSWER):
        del document["faults"][step.value]  # A stall is over when it is resumed, not when it is met.
    return fault


def _hold(document: PeerDocument, step: Step) -> None:
    if step.value not in document["held"]:
        document["held"].append(step.value)


def _is(reservation: _Reservation, node: str, id: str) -> bool:
    return reservation["node"] == node and reservation["id"] == id


def _terms(document: PeerDocument, of: _Reservation) -> ChannelTerms:
    return ChannelTerms(
        opener_key=bytes.fromhex(of["node_key"]),
        peer_key=public(_funding_key(document, of)),
        opener_script=bytes.fromhex(of["node_script"]),
        peer_script=home_script(bytes.fromhex(document["seed"])),
        capacity=of["capacity"],
        push=of["push"],
    )


def _funding_key(document: PeerDocument, of: _Reservation) -> PrivateKey:
    return derive_key(bytes.fromhex(document["seed"]), "funding", of["key"])


def _slots_taken(document: PeerDocument) -> int:
    pending = sum(1 for channel in document["channels"] if channel["state"] == "pending")
    return len(document["reservations"]) + pending


def _height(document: PeerDocument) -> int:
    return document["tip"] + document["skipped"]


def _forget(document: PeerDocument) -> None:
    height = _height(document)
    document["channels"] = [
        channel
        for channel in document["channels"]
        if channel["state"] != "pending" or height - channel["since"] < FORGET_AFTER
    ]


def _btc(amount: Sats) -> str:
    return f"{amount // 100_000_000}.{amount % 100_000_000:08d} BTC"
