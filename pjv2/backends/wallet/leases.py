"""Which coin is locked for whom and until when: a small file beside a wallet's own.

It refuses a file of another wallet or version. A wallet's own notion of a locked coin has neither owner nor end, and both are
needed: a lease of a session that died must end by itself.

Law: a change is on disk, whole, before it counts: a new file is written, synced and put in the old one's place.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path

from pjv2.errors import CannotRead, NotNow, WrongUsage
from pjv2.units import Instant, Outpoint


class Leases:
    """The table: coin, lock id, end. Not for several threads at once."""

    def __init__(self, path: Path, wallet: str) -> None:
        """Read the file at `path` where there is one. Raises WrongUsage for another wallet's, CannotRead, NotNow."""
        self._path = path
        self._wallet = wallet
        self._table = self._load()

    def __repr__(self) -> str:
        return f"Leases({len(self._table)} coins of {self._wallet})"

    def held(self) -> frozenset[Outpoint]:
        return frozenset(self._table)

    def owner(self, coin: Outpoint) -> bytes | None:
        """The lock id under which the coin is locked; None when it is not."""
        lease = self._table.get(coin)
        return None if lease is None else lease[0]

    def expired(self, now: Instant) -> frozenset[Outpoint]:
        return frozenset(coin for coin, (_, until) in self._table.items() if until <= now)

    def add(self, coins: Iterable[Outpoint], lock_id: bytes, until: Instant) -> None:
        self._replace({**self._table, **dict.fromkeys(coins, (lock_id, until))})

    def remove(self, coins: Iterable[Outpoint]) -> None:
        gone = frozenset(coins)
        self._replace({coin: lease for coin, lease in self._table.items() if coin not in gone})

    def _replace(self, table: Mapping[Outpoint, tuple[bytes, Instant]]) -> None:
        if table == self._table:
            return
        rows = {str(coin): [lock_id.hex(), until] for coin, (lock_id, until) in table.items()}
        text = json.dumps({"version": 1, "wallet": self._wallet, "leases": rows})
        try:
            _write(self._path, text.encode("ascii"))
        except OSError as exc:
            raise NotNow(f"locks cannot be written to {self._path}: {exc.strerror or type(exc).__name__}") from exc
        self._table = dict(table)

    def _load(self) -> dict[Outpoint, tuple[bytes, Instant]]:
        try:
            text = self._path.read_text(encoding="ascii")
        except FileNotFoundError:
            return {}
        except OSError as exc:
            raise NotNow(f"{self._path} cannot be read now: {exc.strerror or type(exc).__name__}") from exc
        except UnicodeDecodeError as exc:
            raise CannotRead(f"{self._path} is not a file of coin locks") from exc
        try:
            data = json.loads(text)
            version, wallet = data["version"], data["wallet"]
            table = {
                Outpoint.parse(coin): (bytes.fromhex(lock_id), float(until))
                for coin, (lock_id, until) in data["leases"].items()
            }
        except (ValueError, KeyError, TypeError, AttributeError, WrongUsage) as exc:
            raise CannotRead(f"{self._path} is not a file of coin locks") from exc
        if version != 1:
            raise CannotRead(f"{self._path} is of version {version}, and only version 1 is known")
        if wallet != self._wallet:
            raise WrongUsage(f"{self._path} holds the locks of wallet {wallet}, not of {self._wallet}")
        return table


def _write(path: Path, data: bytes) -> None:
    beside = path.with_name(path.name + ".new")
    with contextlib.suppress(FileNotFoundError):
        beside.unlink()
    handle = os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        with os.fdopen(handle, "wb", closefd=False) as file:
            file.write(data)
        os.fsync(handle)
    finally:
        os.close(handle)
    beside.replace(path)
    if os.name == "posix":
        directory = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(directory)
        finally:
            os.close(directory)
