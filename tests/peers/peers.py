"""The real programs that pjv2 is tested against: where they are, or why they are not.

They live outside the checkout, in `pjv2-peers` under `$XDG_CACHE_HOME` (or ~/.cache), one directory each:

| peer | what it is | found |
|---|---|---|
| `bitcoind` | the node, 29 or newer | on PATH, if it is new enough; else in the cache |
| `payjoin-mailroom` | directory and OHTTP relay of the reference, as published | in the cache |
| `payjoin-mailroom-tls` | the same, with a certificate and a trust root of one's own | in the cache |
| `payjoin-cli` | the reference client, over bitcoind's wallet | in the cache |

Law: what is found has been run once by whoever installed it, and its stamp says what it is. Nothing is installed from here.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest

OLDEST_BITCOIND = 29
STAMP = "stamp.json"
NAMES = ("bitcoind", "payjoin-mailroom", "payjoin-mailroom-tls", "payjoin-cli")


@dataclass(frozen=True, slots=True)
class Peer:
    """A program that can be started, or the reason why there is none."""

    name: str
    path: Path | None
    version: str = ""
    missing: str = ""


def cache_directory() -> Path:
    """Where `make peers` puts what it installs. A relative $XDG_CACHE_HOME counts as unset, as its specification says."""
    given = Path(os.environ.get("XDG_CACHE_HOME", ""))
    return (given if given.is_absolute() else Path.home() / ".cache") / "pjv2-peers"


def stamp_of(directory: Path) -> dict[str, Any]:
    """What stands installed in a directory; empty where nothing whole does."""
    try:
        stamp = json.loads((directory / STAMP).read_text())
    except (OSError, ValueError):
        return {}
    return stamp if isinstance(stamp, dict) else {}


@cache
def version_of(program: Path) -> str:
    """The first line that `program --version` prints, without the rest. Empty when it does not run."""
    try:
        done = subprocess.run(
            [program, "--version"], capture_output=True, text=True, timeout=30, check=True, stdin=subprocess.DEVNULL
        )
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout.partition("\n")[0].strip()


def bitcoind_major(version: str) -> int:
    """29 of `Bitcoin Core version v29.1.0`; 0 when it cannot be told."""
    match = re.search(r"\bv(\d+)\.", version)
    return int(match[1]) if match else 0


def find(name: str) -> Peer:
    """A peer by name. Raises KeyError for a name that is none of ours."""
    if name not in NAMES:
        raise KeyError(name)
    why_not = "it is not installed"
    if name == "bitcoind" and (here := shutil.which("bitcoind")):
        version = version_of(Path(here))
        if bitcoind_major(version) >= OLDEST_BITCOIND:
            return Peer(name, Path(here), version)
        why_not = f"the one on PATH is not {OLDEST_BITCOIND} or newer"
    place = cache_directory() / name
    stamp = stamp_of(place)
    if not stamp or not os.access(place / "bin" / name, os.X_OK):
        return Peer(name, None, missing=why_not)
    return Peer(name, place / "bin" / name, str(stamp.get("version", "")))


def missing_because(*names: str) -> str:
    """A sentence that names the peers that are missing and what helps; empty when all are there."""
    gone = [peer for peer in map(find, names) if peer.path is None]
    if not gone:
        return ""
    told = ", ".join(f"{peer.name} ({peer.missing})" for peer in gone)
    return f"missing: {told}; `make peers` installs {'it' if len(gone) == 1 else 'them'}"


def required() -> bool:
    """Whether a missing peer is a failure here: PJV2_PEERS=required."""
    return os.environ.get("PJV2_PEERS") == "required"


def need(name: str) -> Path:
    """A peer's program for a test that cannot do without: skips by name, or fails with PJV2_PEERS=required."""
    peer = find(name)
    if peer.path is not None:
        return peer.path
    give_up = pytest.fail if required() else pytest.skip
    raise give_up.Exception(missing_because(name), pytrace=False)
