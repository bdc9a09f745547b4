"""What a rehearsal node remembers: the shape of its file, and what follows from it and from the seed in it.

It refuses a channel backup that this node did not make. Records, links and queue are the memory of the node's process, the rest is
its database; both lie in one file, so that any process can be the node.

Law: nothing here waits or writes: a document comes in, facts or a changed document go out.
"""

from __future__ import annotations

import hashlib
import hmac
import json
from typing import Any, Literal, TypedDict, cast

from pjv2.backends.channel.rehearsal_commitment import ChannelTerms, PrivateKey, derive_key, home_script, public
from pjv2.backends.channel.rehearsal_peer import Message
from pjv2.errors import CannotRead, NotNow, PayjoinError, PeerMistake
from pjv2.session.facts import SecuredChannel
from pjv2.units import Outpoint, Sats

ANCHOR_RESERVE: Sats = 10_000
ANCHOR_RESERVE_CAP: Sats = 100_000


class Link(TypedDict):
    boot: int
    host: str


class Record(TypedDict):
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


class Channel(TypedDict):
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


class Document(TypedDict):
    seed: str
    wallet: int
    stopped: bool
    why_not: str
    next_key: int
    channels: list[Channel]
    abandoned: list[str]
    # The memory of the node's process: gone with a restart.
    links: dict[str, Link]
    records: dict[str, Record]
    queue: list[Message]


# ---------------------------------------------------------------- readings


def failure(record: Record) -> PayjoinError:
    return PeerMistake(record["error"]) if record["peer_refused"] else NotNow(record["error"])


def by_id(document: Document, id: str) -> Channel | None:
    return next((channel for channel in document["channels"] if channel["id"] == id), None)


def public_count(document: Document) -> int:
    """Public channels that want an anchor reserve: those on disk, and those whose signatures are on the way."""
    securing = [r for r in document["records"].values() if r["stage"] == "verifying" and not r["private"]]
    return len(securing) + sum(1 for c in document["channels"] if not c["private"] and c["state"] != "closed")


def anchor_reserve(channels: int) -> Sats:
    """What the wallet must keep for fee bumps when so many public channels exist, in satoshis."""
    return min(ANCHOR_RESERVE_CAP, ANCHOR_RESERVE * channels)


# ---------------------------------------------------------------- keys


def funding_key(document: Document, index: int) -> PrivateKey:
    return derive_key(bytes.fromhex(document["seed"]), "funding", index)


def terms_of(document: Document, of: Record | Channel) -> ChannelTerms:
    return ChannelTerms(
        opener_key=public(funding_key(document, of["key"])),
        peer_key=bytes.fromhex(of["peer_key"]),
        opener_script=home_script(bytes.fromhex(document["seed"])),
        peer_script=bytes.fromhex(of["peer_script"]),
        capacity=of["capacity"],
        push=of["push"],
    )


def commitment_of(document: Document, channel: Channel) -> bytes:
    """The commitment with both signatures."""
    terms, outpoint = terms_of(document, channel), Outpoint.parse(channel["outpoint"])
    ours = terms.sign(outpoint, funding_key(document, channel["key"]))
    return terms.signed(outpoint, ours, bytes.fromhex(channel["signature"])).raw


def secured(document: Document, channel: Channel) -> SecuredChannel:
    outpoint = Outpoint.parse(channel["outpoint"])
    return SecuredChannel(bytes.fromhex(channel["id"]), outpoint, backup_of(document, channel))


def backup_of(document: Document, channel: Channel) -> bytes:
    """Outpoint, peer and the number of our keys, authenticated by the seed; no key."""
    facts = json.dumps({name: channel[name] for name in ("outpoint", "peer", "host", "key", "capacity")}).encode()
    return facts + b"\n" + _tag(document, facts)


def read_backup(document: Document, backup: bytes) -> dict[str, Any]:
    """What a backup of this node names. Raises CannotRead for any other."""
    facts, _, tag = backup.rpartition(b"\n")
    if not hmac.compare_digest(tag, _tag(document, facts)):
        raise CannotRead("this is not a channel backup of this node")
    return cast(dict[str, Any], json.loads(facts))


def _tag(document: Document, facts: bytes) -> bytes:
    key = derive_key(bytes.fromhex(document["seed"]), "backup").secret
    return hmac.new(key, facts, hashlib.sha256).hexdigest().encode()
