"""One request to a mailbox of a directory, and the answer: short ids, addresses, and BHTTP inside OHTTP.

A mailbox is a place named by 13 characters, the short id of the key that reads it (BIP77, "Short ID"). It is written once, and read
as often as one likes. POST leaves a message, GET asks for one (a long poll), PUT answers a BIP78 payer who waits.

It refuses directories with a path (payer and receiver would not agree on where mailboxes are) and ids that are not 13 upper-case
characters (deployed directories tolerate more spellings of one id; nobody needs them).

Law: the relay learns the directory's origin and nothing else; method, mailbox and message are inside the envelope.
"""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Literal, TypeAlias, get_args

from pjv2.errors import PeerMistake, WrongUsage
from pjv2.units import Entropy
from pjv2.wire import _bech32, _url, bhttp
from pjv2.wire.ohttp import (
    PADDED_BHTTP_REQUEST_BYTES,
    PADDED_BHTTP_RESPONSE_BYTES,
    KeyConfig,
    ResponseOpener,
    encapsulate,
)
from pjv2.wire.secp import PublicKey

Method: TypeAlias = Literal["GET", "POST", "PUT"]
_METHODS: dict[str, Method] = {method: method for method in get_args(Method)}

SHORT_ID_CHARACTERS = 13
_SHORT_ID_BYTES = 8
_SHORT_ID = re.compile(r"[02-9AC-HJ-NP-Z]{13}")
GATEWAY_PATH = "/.well-known/ohttp-gateway"
"""Where a directory serves its keys (GET) and takes encapsulated requests (POST)."""


@dataclass(frozen=True, slots=True)
class MailboxRequest:
    """What to ask of the mailbox `short_id`."""

    method: Method
    short_id: str
    body: bytes = field(default=b"", repr=False)


@dataclass(frozen=True, slots=True)
class MailboxReply:
    """What the directory answered: 200 done or here it is, 202 nothing yet, anything else refused."""

    status: int
    body: bytes = field(default=b"", repr=False)


class PendingReply:
    """What opens the one answer to one mailbox request."""

    __slots__ = ("_opener",)

    def __init__(self, opener: ResponseOpener) -> None:
        self._opener = opener

    def open(self, data: bytes) -> MailboxReply:
        """The answer in 8192 bytes. Raises ohttp.WrongSize (ask again) or BadCiphertext."""
        response = bhttp.decode_response(self._opener.open(data))
        return MailboxReply(response.status, response.body)

    def __repr__(self) -> str:
        return "PendingReply(hidden)"


def short_id(public: PublicKey) -> str:
    """The name of the mailbox that this key reads: bech32 of the first 8 bytes of SHA-256 of its 33 bytes, 13 characters."""
    return _bech32.encode_data(hashlib.sha256(public.compressed).digest()[:_SHORT_ID_BYTES])


def check_short_id(text: str) -> str:
    """`text` if it is a short id: 13 upper-case bech32 characters. Raises PeerMistake."""
    if not _SHORT_ID.fullmatch(text):
        raise PeerMistake(f"a mailbox id is {SHORT_ID_CHARACTERS} upper-case bech32 characters")
    return text


@lru_cache(maxsize=1024)
def normalise_directory(url: str) -> str:
    """scheme://host[:port] of a directory, in lower case and without a slash. Raises WrongUsage.

    http or https; no user name, query or fragment, and no path but `/`.
    """
    return _origin("directory", url)


def relay_target(relay_base: str, directory: str) -> str:
    """The URL to post an envelope to: the directory's origin as the path on the relay's origin, with a slash at the end.

    A path that the relay's own URL may have is replaced, as deployed clients do. Raises WrongUsage.
    """
    try:
        relay = _url.split(relay_base)
    except _url.BadUrl as exc:
        raise WrongUsage(f"the relay's URL cannot be used: {exc}") from exc
    return f"{relay.origin}/{normalise_directory(directory)}/"


def parse_gateway_path(path: str) -> str:
    """A relay's side of `relay_target`: the gateway that a request path names, as scheme://host:port. Raises PeerMistake.

    The path is `/http://host[:port]/` or `/https://host[:port]/`; the last slash may be missing, and a default port is written out.
    """
    if not path.startswith("/"):
        raise PeerMistake("the path of a relayed request begins with a slash")
    try:
        url = _url.split(path[1:])
    except _url.BadUrl as exc:
        raise PeerMistake(f"the path of a relayed request is not the URL of a gateway: {exc}") from exc
    if url.path != "/" or url.query is not None or url.fragment is not None:
        raise PeerMistake("a gateway is named by scheme, host and port alone")
    return f"{url.scheme}://{url.host}:{_url.DEFAULT_PORTS[url.scheme] if url.port is None else url.port}"


def encapsulate_request(
    directory: str, keys: KeyConfig, request: MailboxRequest, rng: Entropy
) -> tuple[bytes, PendingReply]:
    """The envelope for `request`, 8192 bytes, and what opens the answer. Made anew for every attempt, never sent twice.

    Draws the padding (`rng.token(8104 - used)`), then one ephemeral key. Raises WrongUsage when the body is too large: at most
    8104 bytes less the address (about 40).
    """
    scheme, _, authority = normalise_directory(directory).partition("://")
    padded = bhttp.encode_request(
        request.method, scheme, authority, f"/{request.short_id}", request.body, PADDED_BHTTP_REQUEST_BYTES, rng
    )
    envelope, opener = encapsulate(keys, padded, rng)
    return envelope, PendingReply(opener)


def decode_request(data: bytes) -> MailboxRequest:
    """A directory's side of `encapsulate_request`: what the opened envelope asks. Raises PeerMistake."""
    request = bhttp.decode_request(data)
    method = _METHODS.get(request.method)
    if method is None:
        raise PeerMistake("a mailbox understands GET, POST and PUT")
    if not request.path.startswith("/"):
        raise PeerMistake("the path of a mailbox request begins with a slash")
    return MailboxRequest(method, check_short_id(request.path[1:]), request.body)


def encode_reply(reply: MailboxReply) -> bytes:
    """A directory's answer as padded BHTTP, 8144 bytes, ready to be sealed. Raises WrongUsage when the body is too large."""
    return bhttp.encode_response(reply.status, reply.body, PADDED_BHTTP_RESPONSE_BYTES)


def _origin(what: str, url: str) -> str:
    try:
        parts = _url.split(url)
    except _url.BadUrl as exc:
        raise WrongUsage(f"the {what}'s URL cannot be used: {exc}") from exc
    if parts.path != "/" or parts.query is not None or parts.fragment is not None:
        raise WrongUsage(
            f"the {what}'s URL must end after the host and port: payer and receiver could not agree on a path"
        )
    return parts.origin
