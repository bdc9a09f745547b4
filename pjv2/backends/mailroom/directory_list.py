"""The packaged lists of relays and directories: `relay_config/<network>.toml`, in the wheel and in a checkout.

They are defaults, not endorsements: where each entry was read, and when, stands beside it. It refuses a list it does not understand
as a whole, because a half-read list could pair the wrong services.

Law: every packaged service names its operator and its source.
"""

from __future__ import annotations

import re
import tomllib
from dataclasses import dataclass
from importlib import resources
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Any

from pjv2.backends.mailroom.operators import Service
from pjv2.errors import CannotRead
from pjv2.units import Network

_DATE = re.compile(r"\d{4}-\d{2}-\d{2}")
_FIELDS = {"url", "operator", "source", "last_checked", "note"}


@dataclass(frozen=True, slots=True)
class Provenance:
    """Where an entry was read, and on which day."""

    url: str
    source: str
    last_checked: str
    note: str = ""


@dataclass(frozen=True, slots=True)
class ServiceList:
    """What a list holds for one network."""

    network: Network
    directories: tuple[Service, ...]
    relays: tuple[Service, ...]
    provenance: tuple[Provenance, ...]


def load_services(network: Network) -> ServiceList:
    """The packaged services of a network. Raises CannotRead when the list is missing or not understood."""
    name = f"{network.value}.toml"
    for folder in (resources.files("pjv2") / "relay_config", Path(__file__).parents[3] / "relay_config"):
        if (file := folder / name).is_file():
            return parse_services(_read(file), network)
    raise CannotRead(f"the list of relays and directories for {network.value} is missing from this installation")


def parse_services(text: str, network: Network) -> ServiceList:
    """Read a list. Raises CannotRead; WrongUsage for a URL that cannot be used."""
    try:
        data = tomllib.loads(text)
    except tomllib.TOMLDecodeError as exc:
        raise CannotRead(f"the list of relays and directories for {network.value} is not TOML") from exc
    if data.get("network") != network.value or set(data) - {"network", "same_as", "directories", "relays"}:
        raise CannotRead(
            f"the list of relays and directories for {network.value} has parts that this version does not know"
        )
    other = data.get("same_as")
    if other is not None:
        if other not in {item.value for item in Network} or other == network.value or len(data) != 2:
            raise CannotRead(f"the list for {network.value} refers to {other!r}, which is no other network")
        same = load_services(Network(other))
        return ServiceList(network, same.directories, same.relays, same.provenance)
    directories = [_entry(item, network) for item in data.get("directories", ())]
    relays = [_entry(item, network) for item in data.get("relays", ())]
    return ServiceList(
        network,
        tuple(service for service, _ in directories),
        tuple(service for service, _ in relays),
        tuple(provenance for _, provenance in (*directories, *relays)),
    )


def _entry(item: Any, network: Network) -> tuple[Service, Provenance]:
    if (
        not isinstance(item, dict)
        or set(item) - _FIELDS
        or not all(isinstance(item.get(name, ""), str) for name in _FIELDS)
        or not all(item.get(name) for name in _FIELDS - {"note"})
        or not _DATE.fullmatch(item["last_checked"])
    ):
        raise CannotRead(f"an entry in the list for {network.value} lacks url, operator, source or last_checked")
    service = Service(item["url"], item["operator"])
    return service, Provenance(service.url, item["source"], item["last_checked"], item.get("note", ""))


def _read(file: Traversable | Path) -> str:
    try:
        return file.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as exc:
        raise CannotRead("a packaged list of relays and directories cannot be read") from exc
