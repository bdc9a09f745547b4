"""What a wallet's own file cannot hold: which coin is locked for whom and until when, and what we broadcast a moment ago.

Two small files beside it, which every process that uses the wallet reads and replaces in its turn. They refuse a file of another
wallet or version. A wallet's own notion of a locked coin has neither owner nor end, and both are needed: a lease of a session that
died must end by itself. And a broadcast that the server does not list yet is evicted by the next sync of any process.

Law: a change is on disk, whole, before it counts: a new file is written, synced and put in the old one's place.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, Generic, TypeVar

from pjv2.backends.files import replace_whole
from pjv2.errors import CannotRead, NotNow, WrongUsage
from pjv2.units import Instant, Outpoint, Txid

K = TypeVar("K")
V = TypeVar("V")


class _Table(Generic[K, V]):
    """A table in a JSON file: `rows` is its name there, `what` what a person calls it. Not for several threads at once."""

    def __init__(
        self,
        path: Path,
        wallet: str,
        rows: str,
        what: str,
        *,
        read: Callable[[str, Any], tuple[K, V]],
        write: Callable[[V], Any],
    ) -> None:
        self._path = path
        self._wallet = wallet
        self._rows = rows
        self._what = what
        self._read = read
        self._write = write
        self._text: bytes | None = None
        self._table: Mapping[K, V] = {}
        self.refresh()

    def __repr__(self) -> str:
        return f"{type(self).__name__}({len(self._table)} of {self._wallet})"

    def refresh(self) -> None:
        """Read what another process wrote since. Raises WrongUsage for another wallet's file, CannotRead, NotNow."""
        try:
            text: bytes | None = self._path.read_bytes()
        except FileNotFoundError:
            text = None
        except OSError as exc:
            raise NotNow(f"{self._path} cannot be read now: {exc.strerror or type(exc).__name__}") from exc
        if text != self._text:
            self._table = {} if text is None else self._parsed(text)
            self._text = text

    def _replace(self, table: Mapping[K, V]) -> None:
        if table == self._table:
            return
        rows = {str(key): self._write(value) for key, value in table.items()}
        text = json.dumps({"version": 1, "wallet": self._wallet, self._rows: rows}).encode("ascii")
        try:
            replace_whole(self._path, text)
        except OSError as exc:
            raise NotNow(
                f"{self._what} cannot be written to {self._path}: {exc.strerror or type(exc).__name__}"
            ) from exc
        self._table, self._text = dict(table), text

    def _parsed(self, text: bytes) -> dict[K, V]:
        try:
            data = json.loads(text.decode("ascii"))
            version, wallet = data["version"], data["wallet"]
            table = dict(self._read(key, value) for key, value in data[self._rows].items())
        except (ValueError, KeyError, TypeError, AttributeError, WrongUsage) as exc:
            raise CannotRead(f"{self._path} is not a file of {self._what}") from exc
        if version != 1:
            raise CannotRead(f"{self._path} is of version {version}, and only version 1 is known")
        if wallet != self._wallet:
            raise WrongUsage(f"{self._path} holds the {self._what} of wallet {wallet}, not of {self._wallet}")
        return table


class Leases(_Table[Outpoint, tuple[bytes, Instant]]):
    """Coin, lock id, end."""

    def __init__(self, path: Path, wallet: str) -> None:
        """Read the file at `path` where there is one. Raises WrongUsage for another wallet's, CannotRead, NotNow."""
        super().__init__(
            path,
            wallet,
            "leases",
            "coin locks",
            read=lambda coin, told: (Outpoint.parse(coin), _dated(*told)),
            write=lambda lease: [lease[0].hex(), lease[1]],
        )

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


class Broadcasts(_Table[Txid, tuple[bytes, Instant]]):
    """Transaction id, the transaction, and when it was broadcast, in seconds of real time."""

    def __init__(self, path: Path, wallet: str) -> None:
        """Read the file at `path` where there is one. Raises WrongUsage for another wallet's, CannotRead, NotNow."""
        super().__init__(
            path,
            wallet,
            "broadcasts",
            "own broadcasts",
            read=lambda txid, told: (txid, _dated(*told)),
            write=lambda sent: [sent[0].hex(), sent[1]],
        )

    def known(self) -> dict[Txid, tuple[bytes, Instant]]:
        return dict(self._table)

    def keep(self, table: Mapping[Txid, tuple[bytes, Instant]]) -> None:
        """These, and no others."""
        self._replace(table)


def _dated(data: str, at: float) -> tuple[bytes, Instant]:
    return bytes.fromhex(data), float(at)
