"""The payment URI: BIP21 / BIP321 with BIP77's `pj` and its fragment, read strictly and written the one way deployed wallets do.

```
bitcoin:ADDRESS?amount=BTC&label=…&message=…&pjos=0&pj=HTTPS://HOST/SHORTID%23EX1…-OH1…-RK1…
    EX  4 bytes   expiry, Unix time, little-endian         OH  34 bytes  key id ‖ OHTTP key of the directory
    RK  33 bytes  the receiver's key; SHORTID is its short id
```

It refuses whatever two wallets could read differently: a parameter given twice, a required parameter nobody here knows, amounts that
are not exact satoshis, user names in URLs, lower case in the fragment, a short id without its fragment (cut off by an unescaped `#`),
a short id of another receiver key. Whether the address is one of this network is for the layers above.

`+` between the fragment's parameters is read (BIP77 asked for that "until 2026", and deployed payers still do) and never written.
`req-pj` is read and never written. Keys are read without regard to case, as BIP321 has it. The fragment's parameters are accepted in
any order and written in lexicographical order, BIP77's normative one.

Law: what cannot be understood completely is `BadUri`; a URI with money at the end is never guessed at.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from urllib.parse import quote, unquote_to_bytes

from pjv2.errors import BadUri, PeerMistake, WrongUsage
from pjv2.units import MAX_MONEY, Sats
from pjv2.wire import _bech32, _url
from pjv2.wire.mailbox import check_short_id, normalise_directory, short_id
from pjv2.wire.ohttp import KeyConfig
from pjv2.wire.secp import PublicKey

MAX_URI_CHARACTERS = 16384
MIN_EXPIRY = 500_000_000
"""Below this a lock time is a block height (BIP65), and BIP77's expiry is read by the same rule."""

_MAX_EXPIRY = 0xFFFFFFFF
_SAFE = "!$'()*+,;:@/?"
_ADDRESS = re.compile(r"[0-9A-Za-z]{1,200}")
_KEY = re.compile(r"[A-Za-z0-9._~!$'()*+,;:@/?-]+")
_AMOUNT = re.compile(r"(?P<whole>[0-9]{0,16})(?:\.(?P<part>[0-9]{0,8}))?")
_BAD_ESCAPE = re.compile(r"%(?![0-9A-Fa-f]{2})")
_FRAGMENT = re.compile(r"[0-9A-Z+-]*")
_LOWER_CASE = re.compile(r"[a-z]")


@dataclass(frozen=True, slots=True)
class V2Endpoint:
    """A mailbox at a directory (BIP77). `directory` is scheme://host[:port] in lower case, `expires` Unix seconds."""

    directory: str
    short_id: str = field(repr=False)
    expires: int
    keys: KeyConfig
    receiver: PublicKey


@dataclass(frozen=True, slots=True)
class V1Endpoint:
    """A receiver's own server (BIP78): an https URL, or http to an onion service, without fragment."""

    url: str


@dataclass(frozen=True, slots=True)
class PjUri:
    """A payment request. `amount` is in sats; `output_substitution` is what `pjos` says, True when it is silent.

    A v2 receiver always writes `pjos=0`, against payers that only know BIP78; a v2 payer does not mind it.
    """

    address: str
    amount: Sats | None = None
    label: str | None = None
    message: str | None = None
    endpoint: V2Endpoint | V1Endpoint | None = None
    output_substitution: bool = True
    other: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True, slots=True)
class Fragment:
    """The parameters of a mailbox URL's fragment; None where one is missing."""

    expires: int | None = None
    keys: KeyConfig | None = None
    receiver: PublicKey | None = None


def parse_uri(text: str) -> PjUri:
    """Read a payment URI. Raises BadUri on everything wrong with it (BIP21, BIP321, BIP77 "Payjoin URI")."""
    if len(text) > MAX_URI_CHARACTERS:
        raise BadUri(f"a payment URI of more than {MAX_URI_CHARACTERS} characters is not read")
    scheme, colon, rest = text.partition(":")
    if not colon or scheme.lower() != "bitcoin":
        raise BadUri("this is not a payment URI: it does not begin with bitcoin:")
    # A raw # ends the query (RFC 3986), and with it a pj whose own # was not escaped; the short id then misses its fragment.
    address, question, query = rest.partition("#")[0].partition("?")
    if not _ADDRESS.fullmatch(address):
        raise BadUri("the payment URI has no address, or one with characters that no Bitcoin address has")
    known: dict[str, str] = {}
    other: list[tuple[str, str]] = []
    for piece in query.split("&") if question else ():
        key, value = _split_parameter(piece)
        name = key.lower()
        required = name.startswith("req-")
        if required and name[4:] in ("pj", "pjos"):
            name = name[4:]
        if name in ("amount", "label", "message", "pj", "pjos"):
            if name in known:
                raise BadUri(f"the payment URI gives {name} twice")
            known[name] = value
        elif required:
            raise BadUri(f"the payment URI requires {key}, which this wallet does not know")
        else:
            other.append((key, value))
    pj, pjos = known.get("pj"), known.get("pjos")
    if pjos is not None and (pj is None or pjos not in ("0", "1")):
        raise BadUri("pjos is 0 or 1, and comes with pj")
    return PjUri(
        address=address,
        amount=_parse_amount(known["amount"]) if "amount" in known else None,
        label=known.get("label"),
        message=known.get("message"),
        endpoint=None if pj is None else _parse_endpoint(pj),
        output_substitution=pjos != "0",
        other=tuple(other),
    )


def format_uri(uri: PjUri) -> str:
    """Write a payment URI for people and QR codes: `pj` last, its scheme and host in upper case, `pjos=0` for every mailbox.

    Raises WrongUsage for values that could not be read back.
    """
    if not _ADDRESS.fullmatch(uri.address):
        raise WrongUsage("a payment URI needs the address to pay to")
    pieces = []
    if uri.amount is not None:
        pieces.append(f"amount={_format_amount(uri.amount)}")
    pieces += [
        f"{key}={_escape(text)}" for key, text in (("label", uri.label), ("message", uri.message)) if text is not None
    ]
    for key, value in uri.other:
        name = key.lower()
        if not _KEY.fullmatch(key) or name in ("amount", "label", "message", "pj", "pjos") or name.startswith("req-"):
            raise WrongUsage(f"{key!r} cannot be an additional parameter of a payment URI")
        pieces.append(f"{key}={_escape(value)}")
    if uri.endpoint is not None:
        if isinstance(uri.endpoint, V2Endpoint) or not uri.output_substitution:
            pieces.append("pjos=0")
        pieces.append(f"pj={_escape(format_endpoint(uri.endpoint))}")
    return f"bitcoin:{uri.address}" + ("?" + "&".join(pieces) if pieces else "")


def format_endpoint(endpoint: V2Endpoint | V1Endpoint) -> str:
    """The `pj` URL itself, before percent-encoding: scheme and host in upper case. Raises WrongUsage."""
    if isinstance(endpoint, V1Endpoint):
        try:
            url = _url.split(endpoint.url)
        except _url.BadUrl as exc:
            raise WrongUsage(f"the payjoin URL cannot be used: {exc}") from exc
        return url.origin.upper() + url.path + ("" if url.query is None else f"?{url.query}")
    if endpoint.short_id != short_id(endpoint.receiver):
        raise WrongUsage("the mailbox of a payment URI is the one that its receiver key reads")
    fragment = format_fragment(Fragment(endpoint.expires, endpoint.keys, endpoint.receiver))
    return f"{normalise_directory(endpoint.directory).upper()}/{endpoint.short_id}#{fragment}"


def parse_fragment(text: str) -> Fragment:
    """Read a mailbox URL's fragment; unknown parameters are passed over and the first of a name counts. Raises BadUri."""
    if _LOWER_CASE.search(text):
        raise BadUri("the payjoin URL's fragment has lower-case letters: it was damaged on the way")
    if not _FRAGMENT.fullmatch(text):
        raise BadUri("the payjoin URL's fragment has characters other than 0-9, A-Z, - and +")
    if "-" in text and "+" in text:
        raise BadUri("the payjoin URL's fragment is separated by - and by +: only one of them can be meant")
    found: dict[str, bytes] = {}
    for piece in text.split("+" if "+" in text else "-"):
        name = piece[:2]
        if piece[2:3] == "1" and name in ("EX", "OH", "RK") and name not in found:
            found[name] = _decode_parameter(name, piece)
    try:
        return Fragment(
            _parse_expiry(found["EX"]) if "EX" in found else None,
            KeyConfig.from_fragment(found["OH"]) if "OH" in found else None,
            _parse_receiver(found["RK"]) if "RK" in found else None,
        )
    except BadUri:
        raise
    except PeerMistake as exc:
        raise BadUri(f"a key in the payjoin URL is not valid: {exc}") from exc


def format_fragment(fragment: Fragment) -> str:
    """The fragment in lexicographical order, separated by `-`. Raises WrongUsage for an expiry that is no time."""
    pieces = []
    if fragment.expires is not None:
        if not MIN_EXPIRY <= fragment.expires <= _MAX_EXPIRY:
            raise WrongUsage(
                f"a payment URI's expiry is Unix time from {MIN_EXPIRY} to {_MAX_EXPIRY}, not {fragment.expires}"
            )
        pieces.append(_bech32.encode("EX", fragment.expires.to_bytes(4, "little")))
    if fragment.keys is not None:
        pieces.append(_bech32.encode("OH", fragment.keys.fragment()))
    if fragment.receiver is not None:
        pieces.append(_bech32.encode("RK", fragment.receiver.compressed))
    return "-".join(pieces)


def _split_parameter(piece: str) -> tuple[str, str]:
    key, equals, value = piece.partition("=")
    if not equals or not _KEY.fullmatch(key):
        raise BadUri("a parameter of the payment URI is not of the form key=value")
    if _BAD_ESCAPE.search(value):
        raise BadUri(f"{key} in the payment URI has a % that is not followed by two hexadecimal digits")
    try:
        # Not unquote_plus: + is a plus in these URIs.
        return key, unquote_to_bytes(value).decode("utf-8")
    except UnicodeError as exc:
        raise BadUri(f"{key} in the payment URI is not UTF-8 text") from exc


def _escape(text: str) -> str:
    try:
        return quote(text, safe=_SAFE)
    except UnicodeEncodeError as exc:
        raise WrongUsage("a text for the payment URI is not valid Unicode") from exc


def _parse_amount(text: str) -> Sats:
    number = _AMOUNT.fullmatch(text)
    if number is None or not (number["whole"] or number["part"]):
        raise BadUri("the amount of the payment URI is not a decimal number of bitcoin with at most 8 decimals")
    amount = int(number["whole"] or "0") * 100_000_000 + int((number["part"] or "").ljust(8, "0"))
    if amount > MAX_MONEY:
        raise BadUri("the amount of the payment URI is more than all bitcoin there can be")
    return amount


def _format_amount(amount: Sats) -> str:
    if not 0 <= amount <= MAX_MONEY:
        raise WrongUsage(f"{amount} sats cannot be asked for")
    whole, part = divmod(amount, 100_000_000)
    return f"{whole}.{part:08d}".rstrip("0") if part else str(whole)


def _parse_endpoint(text: str) -> V2Endpoint | V1Endpoint:
    """BIP77's decision between a mailbox and a receiver's own server, in the order deployed payers take it."""
    try:
        url = _url.split(text)
    except _url.BadUrl as exc:
        raise BadUri(f"the payjoin URL of the payment URI cannot be used: {exc}") from exc
    try:
        mailbox = check_short_id(url.path[1:])
    except PeerMistake:
        return _v1(url)
    if not url.fragment:
        raise BadUri("the payjoin URL names a mailbox without its keys: was a # in it not written as %23?")
    if _LOWER_CASE.search(url.fragment):
        raise BadUri("the payjoin URL's fragment has lower-case letters: it was damaged on the way")
    if any(name not in url.fragment for name in ("RK1", "OH1", "EX1")):
        return _v1(url)
    fragment = parse_fragment(url.fragment)
    if fragment.expires is None or fragment.keys is None or fragment.receiver is None:
        raise BadUri("the payjoin URL's fragment misses its expiry (EX), OHTTP key (OH) or receiver key (RK)")
    if short_id(fragment.receiver) != mailbox:
        raise BadUri("the payjoin URL's mailbox and receiver key do not belong together: one of them was damaged")
    return V2Endpoint(url.origin, mailbox, fragment.expires, fragment.keys, fragment.receiver)


def _v1(url: _url.Url) -> V1Endpoint:
    """BIP78: "an end-to-end encrypted or authenticated connection", that is https or an onion service."""
    if url.scheme != "https" and not url.host.endswith(".onion"):
        raise BadUri("the payjoin URL is not encrypted: it is neither https nor an onion service")
    return V1Endpoint(url.origin + url.path + ("" if url.query is None else f"?{url.query}"))


def with_query(endpoint: str, query: str) -> str:
    """The URL that a BIP78 request is sent to: the receiver's own parameters stay, the payer's follow."""
    return f"{endpoint}{'&' if '?' in endpoint else '?'}{query}"


def _decode_parameter(name: str, piece: str) -> bytes:
    try:
        prefix, data = _bech32.decode(piece)
    except ValueError as exc:
        raise BadUri(f"{name} in the payjoin URL is not bech32: {exc}") from exc
    if prefix != name:
        raise BadUri(f"{name} in the payjoin URL is not bech32: its prefix is {prefix}")
    if _bech32.encode(name, data) != piece:
        raise BadUri(f"{name} in the payjoin URL has a character too many")
    return data


def _parse_expiry(data: bytes) -> int:
    expires = int.from_bytes(data, "little")
    if len(data) != 4 or expires < MIN_EXPIRY:
        raise BadUri("the payjoin URL's expiry (EX) is not a time")
    return expires


def _parse_receiver(data: bytes) -> PublicKey:
    if len(data) != 33:
        raise BadUri(f"the receiver key (RK) in the payjoin URL is 33 bytes, not {len(data)}")
    return PublicKey.parse(data)
