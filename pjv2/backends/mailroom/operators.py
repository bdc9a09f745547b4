"""Who runs what: a relay and a directory of the same operator are never paired.

An oblivious relay hides our address from the directory only while the two do not talk to each other. A service has the operator its
list names; one without is its registrable domain, and host:port for an IP address or localhost.

It refuses to guess. What cannot be decided (a bare name of a local network, an onion name, which may be anybody's) is nobody's in
particular, and is paired with nothing until its operator is written beside it.

Law: in doubt two services have the same operator. The domain rule errs to that side only: the last two labels always contain the
registrable domain's own end, and three are compared only under suffixes that are known to be registries'.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from ipaddress import ip_address

from pjv2.errors import WrongUsage
from pjv2.wire.mailbox import normalise_directory

_SECOND_LEVEL_REGISTRIES = frozenset(
    f"{label}.{country}"
    for country, labels in {
        "ar": "com net org",
        "at": "co or",
        "au": "com net org id",
        "br": "com net org",
        "cn": "com net org",
        "co": "com net",
        "cr": "co",
        "hk": "com net org",
        "id": "co or web",
        "il": "co org net",
        "in": "co net org firm",
        "jp": "co or ne ac",
        "ke": "co or",
        "kr": "co or ne",
        "mx": "com net org",
        "my": "com net org",
        "ng": "com",
        "nz": "co net org",
        "pe": "com",
        "ph": "com net org",
        "pk": "com",
        "pl": "com net org",
        "sg": "com net org",
        "sv": "com",
        "th": "co in or",
        "tr": "com net org",
        "tw": "com net org",
        "ua": "com net org",
        "uk": "co org me ltd plc net",
        "uy": "com",
        "ve": "com co",
        "vn": "com net",
        "za": "co net org",
    }.items()
    for label in labels.split()
)
"""Suffixes under which registries sell names. One that is missing here costs a possible pair, never a wrong one."""


@dataclass(frozen=True, slots=True)
class Service:
    """A relay or a directory: its URL (scheme://host[:port]) and who runs it, if somebody said."""

    url: str
    operator: str | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "url", normalise_directory(self.url))
        if self.operator is not None and not self.operator.strip():
            raise WrongUsage(f"the operator of {self.url} is an empty name: name it, or leave it out")

    @property
    def authority(self) -> str:
        """host[:port]."""
        return self.url.partition("://")[2]

    @property
    def host(self) -> str:
        """The host without a port; an IPv6 address stands in brackets."""
        authority = self.authority
        return authority if authority.endswith("]") else authority.rpartition(":")[0] or authority

    @property
    def domain(self) -> str | None:
        """Its registrable domain, host:port for an IP address or localhost, None when it cannot be told."""
        host = self.host.rstrip(".")
        if is_ip(host) or host == "localhost" or host.endswith(".localhost"):
            return self._host_port
        labels = host.split(".")
        if len(labels) < 2 or labels[-1] in _NO_REGISTRY or "xn--" in labels[-1]:
            return None
        size = 3 if ".".join(labels[-2:]) in _SECOND_LEVEL_REGISTRIES else 2
        return ".".join(labels[-size:]) if len(labels) >= size else None

    @property
    def _host_port(self) -> str:
        if self.authority != self.host:
            return self.authority
        return f"{self.host}:{443 if self.url.startswith('https:') else 80}"


_NO_REGISTRY = frozenset({"onion", "i2p", "local", "lan", "internal", "home", "corp", "arpa", "test", "localdomain"})
"""Endings under which a name says nothing about who runs it."""


def is_ip(host: str) -> bool:
    """Whether a host is an IP address (IPv6 in brackets)."""
    try:
        ip_address(host.strip("[]"))
    except ValueError:
        return False
    return True


def is_loopback(url: str) -> bool:
    """Whether a URL leads to this machine: localhost, 127.0.0.0/8 or ::1."""
    host = Service(url).host
    return ip_address(host.strip("[]")).is_loopback if is_ip(host) else host == "localhost"


class Operators:
    """What is known about who runs what, from every list at hand."""

    def __init__(self, services: Iterable[Service] = ()) -> None:
        self._by_url: dict[str, str] = {}
        self._by_domain: dict[str, set[str]] = {}
        for service in services:
            if service.operator is None:
                continue
            self._by_url[service.url] = service.operator
            if service.domain is not None:
                self._by_domain.setdefault(service.domain, set()).add(_key(service.operator))

    def service(self, url: str) -> Service:
        """The service at a URL, with its operator if a list names one. Raises WrongUsage."""
        service = Service(url)
        return Service(service.url, self._by_url.get(service.url))

    def may_pair(self, one: Service, other: Service) -> bool:
        """Whether the two are certainly run by different operators. Undecidable means no."""
        if one._host_port == other._host_port or one.url == other.url:
            return False
        if one.operator is not None and other.operator is not None:
            return _key(one.operator) != _key(other.operator)
        first, second = self._names(one), self._names(other)
        return bool(first) and bool(second) and not first & second

    def _names(self, service: Service) -> set[str]:
        """Every name an operator goes by; empty when there is none."""
        names = set() if service.operator is None else {_key(service.operator)}
        if service.domain is not None:
            names.add(service.domain)
            if service.operator is None:
                names |= self._by_domain.get(service.domain, set())
        return names


def _key(operator: str) -> str:
    return " ".join(operator.casefold().split())
