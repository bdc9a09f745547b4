"""The wire of a rehearsal node: messages lie in queues on disk, and whoever calls next delivers them.

It refuses nothing: a message arrives, waits, or is cut off with the connection, no matter whether the call that sent it is still
waited for.

Law: the peer's file is written first; dying in between leaves a channel at the peer that our node does not know, never the reverse.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import cast

from pjv2.backends.channel.rehearsal_funding import accepted, signed
from pjv2.backends.channel.rehearsal_memory import Document
from pjv2.backends.channel.rehearsal_peer import Message, PeerDocument, RehearsalPeer, hear, next_answer
from pjv2.backends.channel.rehearsal_peer import hang_up as forget_us


@dataclass(frozen=True, slots=True)
class Wire:
    """Everything between the node `pubkey` and the peers in the directory `peers`."""

    peers: Path
    pubkey: str

    def peer(self, name: str) -> RehearsalPeer | None:
        directory = self.peers / name
        return RehearsalPeer(directory) if (directory / "peer.json").exists() else None

    def pump(self, document: Document) -> None:
        """Deliver what can be delivered, peer by peer. The peer's file is written first: dying in between leaves a ghost."""
        for name in list(document["links"]):
            peer = self.peer(name)
            if peer is None:
                _drop(document, name)
                continue
            with peer.file.change() as raw:
                remote = cast(PeerDocument, raw)
                while _alive(document, name, remote) and self._deliver_one(document, name, remote):
                    pass
                alive = _alive(document, name, remote)
            if not alive:
                _drop(document, name)

    def _deliver_one(self, document: Document, name: str, remote: PeerDocument) -> bool:
        answer = next_answer(remote, self.pubkey)
        if answer is not None:
            self._heard(document, name, answer)
            return True
        message = next((message for message in document["queue"] if message["to"] == name), None)
        if message is None or not hear(remote, self.pubkey, message):
            return False
        document["queue"].remove(message)
        return True

    def _heard(self, document: Document, name: str, answer: Message) -> None:
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
            accepted(document, record, answer)
        elif answer["type"] == "signed" and record["stage"] == "verifying":
            signed(document, record, answer)

    def hang_up(self, document: Document, name: str) -> None:
        peer = self.peer(name)
        if peer is not None:
            with peer.file.change() as raw:
                forget_us(cast(PeerDocument, raw), self.pubkey)
        _drop(document, name)


def _alive(document: Document, name: str, remote: PeerDocument) -> bool:
    return not remote["offline"] and remote["boot"] == document["links"][name]["boot"]


def _drop(document: Document, name: str) -> None:
    """The connection is gone, and with it everything that was not on both disks."""
    document["links"].pop(name, None)
    document["queue"] = [message for message in document["queue"] if message["to"] != name]
    for id, record in list(document["records"].items()):
        if record["peer"] == name and record["stage"] != "failed":
            del document["records"][id]
