"""URLs as BIP77 uses them: `http` or `https`, a plain host, an optional port.

It refuses what clients read differently: user-info (`http://x.onion:1@evil.com` goes to evil.com), backslashes, spaces, control
characters, percent-encoded or non-ASCII hosts, ports that are not numbers. The standard library's parser accepts all of these.

Law: the host here is the host that will be connected to.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from ipaddress import AddressValueError, IPv4Address, IPv6Address

_URL = re.compile(
    r"(?P<scheme>[A-Za-z][A-Za-z0-9+.-]*)://(?P<authority>[^/?#]*)(?P<path>[^?#]*)(?P<query>\?[^#]*)?(?P<fragment>#.*)?"
)
_AUTHORITY = re.compile(r"(?P<host>[A-Za-z0-9.-]+|\[[0-9A-Fa-f:.]+\])(?::(?P<port>[0-9]{0,5}))?")
_UNSAFE = re.compile(r"[^!-~]|\\")
_LABELS = re.compile(r"(?!-)[a-z0-9-]{1,63}(?<!-)(?:\.(?!-)[a-z0-9-]{1,63}(?<!-))*\.?")
_NUMBER = re.compile(r"[0-9]+|0x[0-9a-f]*")
DEFAULT_PORTS = {"http": 80, "https": 443}


class BadUrl(ValueError):
    """A URL that is refused; the message says why. Callers translate it to whose mistake it was."""


@dataclass(frozen=True, slots=True)
class Url:
    """The parts of a URL. `scheme` and `host` are lower case; `query` and `fragment` come without `?` and `#`, None if absent."""

    scheme: str
    host: str
    port: int | None
    path: str
    query: str | None
    fragment: str | None

    @property
    def authority(self) -> str:
        """host, and the port if the URL named one."""
        return self.host if self.port is None else f"{self.host}:{self.port}"

    @property
    def origin(self) -> str:
        """scheme://authority, without a slash."""
        return f"{self.scheme}://{self.authority}"


def split(text: str) -> Url:
    """The parts of an http or https URL. An empty path becomes `/`, an empty port none. Raises BadUrl."""
    if _UNSAFE.search(text):
        raise BadUrl("it contains a space, a backslash, or a character that is not printable ASCII")
    parts = _URL.fullmatch(text)
    if parts is None:
        raise BadUrl("it is not of the form https://host/…")
    scheme = parts["scheme"].lower()
    if scheme not in DEFAULT_PORTS:
        raise BadUrl(f"its scheme is {scheme}, not http or https")
    if "@" in parts["authority"]:
        raise BadUrl("it contains a user name, which could hide the host it leads to")
    authority = _AUTHORITY.fullmatch(parts["authority"])
    if authority is None:
        raise BadUrl("its host or port is not valid")
    port = int(authority["port"]) if authority["port"] else None
    if port is not None and port > 0xFFFF:
        raise BadUrl("its port is above 65535")
    query, fragment = parts["query"], parts["fragment"]
    return Url(
        scheme,
        _host(authority["host"].lower()),
        port,
        parts["path"] or "/",
        None if query is None else query[1:],
        None if fragment is None else fragment[1:],
    )


def _host(host: str) -> str:
    try:
        if host.startswith("["):
            return f"[{IPv6Address(host[1:-1])}]"
        if _NUMBER.fullmatch(host.rstrip(".").rpartition(".")[2]):
            # Other spellings of an IPv4 address (127.1, 2130706433) mean different hosts to different programs.
            return str(IPv4Address(host))
    except AddressValueError as exc:
        raise BadUrl("its host is not a valid IP address") from exc
    if len(host) > 253 or not _LABELS.fullmatch(host):
        raise BadUrl("its host is not a valid name")
    return host
