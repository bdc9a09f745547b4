"""`SealedStore`: any store with its events encrypted, and the conversion of a database that was written in the clear.

Each record's data is sealed on its own (libsodium's secretbox, XSalsa20-Poly1305, a random nonce of 24 bytes) and stored as
`pjv2sealed1:` and base64. Session, number and name of the event are sealed along with it, so that nobody who can write to the
database can put one record in another one's place. Rows, names, times, outpoints and small public values stay readable: scheduling and
`history` need them. That records were removed from the end, or the whole file was set back, is not noticed.

Records in the clear are read beside sealed ones, so a conversion can stop anywhere and be run again. It refuses a key that is not the
one the database was encrypted with before anything is written, and an encrypted database without a key.

Law: with a key, nothing is written in the clear; no key and no event ever stands in an error.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import contextlib
import importlib
import re
import sqlite3
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Final, TypeVar

from nacl.exceptions import CryptoError
from nacl.secret import SecretBox
from sqlalchemy import Connection, Engine, delete, func, insert, select, update

from pjv2.backends.store.change import check_change
from pjv2.backends.store.databases import WRITE, choose, translated
from pjv2.backends.store.schema import EVENTS, VALUES
from pjv2.backends.store.sql import SqlStore
from pjv2.backends.system import SystemEntropy
from pjv2.errors import CannotRead, NotNow, WrongUsage
from pjv2.ports import Appended, Change, Entropy, Record, SessionRow, Store
from pjv2.units import Outpoint, SessionId

_T = TypeVar("_T")

PREFIX: Final = "pjv2sealed1:"
"""How sealed data begins; what `session.log` writes begins with a brace."""
KEY_BYTES: Final = 32
KEPT_NAME: Final = "store encryption"
"""The small value that says that a database is encrypted: a sealed constant, by which a wrong key is told."""
_KEPT: Final = ("", -1, KEPT_NAME, "pjv2")
_KEYRING_SERVICE = "pjv2"
_BATCH = 500
_HEX = re.compile(rb"[0-9a-fA-F]{64}\Z")

_NO_KEY = "this database is encrypted: give its key with [store] encryption_key_file or encryption_keyring; nothing was changed"
_WRONG_KEY = (
    "this database was encrypted with another key: give that one with [store] encryption_key_file or encryption_keyring; "
    "nothing was changed"
)


class StoreKey:
    """The key that events are sealed with. Its repr says nothing."""

    __slots__ = ("_box",)

    def __init__(self, secret: bytes) -> None:
        if len(secret) != KEY_BYTES:
            raise WrongUsage(f"the key of the session database has {KEY_BYTES} bytes, not {len(secret)}")
        self._box = SecretBox(secret)

    @classmethod
    def parse(cls, data: bytes, place: str) -> StoreKey:
        """A key as a file or keyring holds it: 32 raw bytes, or 64 hex characters. Raises WrongUsage."""
        if len(data) == KEY_BYTES:
            return cls(data)
        text = data.strip()
        if not _HEX.match(text):
            raise WrongUsage(f"{place} holds no key: 32 bytes, or 64 hex characters")
        return cls(bytes.fromhex(text.decode()))

    def seal(self, session: SessionId, seq: int, name: str, data: str, nonce: bytes) -> str:
        """The stored form of an event's data; `nonce` is 24 bytes that were never used before."""
        plain = "\0".join((session, str(seq), name, data))
        return PREFIX + base64.b64encode(self._box.encrypt(plain.encode(), nonce)).decode()

    def unseal(self, session: SessionId, seq: int, name: str, stored: str) -> str:
        """What was sealed; data in the clear is answered as it is. Raises CannotRead."""
        if not stored.startswith(PREFIX):
            return stored
        plain = self._open(stored)
        if plain is None:
            raise CannotRead(
                f"event {seq} of session {session} cannot be decrypted: it was changed, or sealed with another key"
            )
        bound = plain.split("\0", 3)
        if bound[:3] != [session, str(seq), name]:
            raise CannotRead(f"event {seq} of session {session} was put in the place of another one: restore a backup")
        return bound[3]

    def _open(self, stored: str) -> str | None:
        with contextlib.suppress(CryptoError, binascii.Error, ValueError):
            return self._box.decrypt(base64.b64decode(stored.removeprefix(PREFIX), validate=True)).decode()
        return None

    def fits(self, kept: str) -> bool:
        """Whether `kept`, the value under `KEPT_NAME`, was sealed with this key."""
        plain = self._open(kept) if kept.startswith(PREFIX) else None
        return plain is not None and plain.split("\0", 3) == [str(part) for part in _KEPT]

    def mark(self, nonce: bytes) -> str:
        """The value to keep under `KEPT_NAME`."""
        return self.seal(*_KEPT, nonce)

    def __repr__(self) -> str:
        return "StoreKey(hidden)"

    def __reduce__(self) -> tuple[object, ...]:
        raise WrongUsage("the key of the session database is not pickled")


def new_key(rng: Entropy | None = None) -> str:
    """A fresh key as 64 hex characters, for a key file."""
    return (rng or SystemEntropy()).token(KEY_BYTES).hex()


async def key_in_keyring(name: str) -> StoreKey:
    """The key that the system's keyring holds under the service `pjv2` and `name`. Raises WrongUsage, NotNow."""
    place = f"[store] encryption_keyring {name!r}"
    text = await _asked_keyring(lambda keyring: keyring.get_password(_KEYRING_SERVICE, name), place)
    if text is None:
        raise WrongUsage(f"{place}: the keyring holds no such key; pjv2 store encrypt --make-key puts one there")
    return StoreKey.parse(text.encode(), place)


async def put_key_in_keyring(name: str, key: str) -> None:
    """Have the system's keyring hold `key` (64 hex characters) under `name`. Raises WrongUsage when it holds one, NotNow."""
    place = f"[store] encryption_keyring {name!r}"
    if await _asked_keyring(lambda keyring: keyring.get_password(_KEYRING_SERVICE, name), place) is not None:
        raise WrongUsage(f"{place}: the keyring holds a key of that name, which may be the only one to older events")
    await _asked_keyring(lambda keyring: keyring.set_password(_KEYRING_SERVICE, name, key), place)


async def _asked_keyring(question: Callable[[Any], _T], place: str) -> _T:
    try:
        keyring = importlib.import_module("keyring")
        errors = importlib.import_module("keyring.errors")
    except ModuleNotFoundError as exc:
        raise WrongUsage(f"{place} needs a package that is not installed: pip install 'pjv2[keyring]'") from exc
    try:
        return await asyncio.to_thread(question, keyring)
    except errors.NoKeyringError as exc:
        raise WrongUsage(f"{place}: this system has no keyring; use [store] encryption_key_file") from exc
    except errors.KeyringError as exc:
        raise NotNow(f"{place}: the keyring does not answer ({type(exc).__name__}): unlock it") from exc


async def refuse_sealed(store: Store) -> None:
    """Raise CannotRead when `store` is encrypted: for whoever opens it without a key."""
    if await store.get(KEPT_NAME) is not None:
        raise CannotRead(_NO_KEY)


class SealedStore:
    """Implements `ports.Store` over another one. Use `SealedStore.open` where the store may have been written with another key."""

    def __init__(self, store: Store, key: StoreKey | bytes, *, rng: Entropy | None = None) -> None:
        self._store = store
        self._key = key if isinstance(key, StoreKey) else StoreKey(key)
        self._rng = rng or SystemEntropy()
        self._marked = False

    @classmethod
    async def open(cls, store: Store, key: StoreKey | bytes, *, rng: Entropy | None = None) -> SealedStore:
        """Over a store whose key is checked first. Raises CannotRead for another key."""
        sealed = cls(store, key, rng=rng)
        await sealed._check()
        return sealed

    def __repr__(self) -> str:
        return f"SealedStore({self._store!r})"

    async def _check(self) -> None:
        kept = await self._store.get(KEPT_NAME)
        if kept is not None and not self._key.fits(kept):
            raise CannotRead(_WRONG_KEY)
        self._marked = kept is not None

    async def _mark(self) -> None:
        """Say in the database that it is encrypted, before the first event is: reading alone changes nothing."""
        if not self._marked:
            await self._check()
        if not self._marked:
            await self._store.put(KEPT_NAME, self._key.mark(self._nonce()))
            await self._check()  # another process may have marked it at the same moment

    def _nonce(self) -> bytes:
        return self._rng.token(SecretBox.NONCE_SIZE)

    def _sealed(self, change: Change) -> Change:
        session = change.row.session
        return replace(
            change,
            records=tuple(
                replace(record, data=self._key.seal(session, record.seq, record.name, record.data, self._nonce()))
                for record in change.records
            ),
        )

    def _unsealed(self, session: SessionId, record: Record) -> Record:
        return replace(record, data=self._key.unseal(session, record.seq, record.name, record.data))

    # ---------------------------------------------------------------- events

    async def create(self, change: Change) -> Appended:
        check_change(change, first=True)  # what stands inside a seal is not seen by the store below
        await self._mark()
        return await self._store.create(self._sealed(change))

    async def append(self, change: Change) -> Appended:
        check_change(change, first=False)
        await self._mark()
        return await self._store.append(self._sealed(change))

    async def load(self, session: SessionId) -> tuple[Record, ...]:
        return tuple(self._unsealed(session, record) for record in await self._store.load(session))

    async def since(self, cursor: int, limit: int) -> tuple[tuple[int, SessionId, Record], ...]:
        found = await self._store.since(cursor, limit)
        return tuple((place, session, self._unsealed(session, record)) for place, session, record in found)

    async def in_the_clear(self) -> int:
        """How many events are not sealed yet; it reads them all."""
        count, cursor = 0, 0
        while page := await self._store.since(cursor, _BATCH):
            count += sum(not record.data.startswith(PREFIX) for _, _, record in page)
            cursor = page[-1][0]
        return count

    # ---------------------------------------------------------------- what is not sealed

    async def row(self, session: SessionId) -> SessionRow:
        return await self._store.row(session)

    async def rows(self, *, open_only: bool = False) -> tuple[SessionRow, ...]:
        return await self._store.rows(open_only=open_only)

    async def find(self, *, order: str | None = None, uri_id: str | None = None) -> SessionRow | None:
        return await self._store.find(order=order, uri_id=uri_id)

    async def claim(self, session: SessionId, owner: str, seconds: float) -> bool:
        return await self._store.claim(session, owner, seconds)

    async def release(self, session: SessionId, owner: str) -> None:
        await self._store.release(session, owner)

    async def coins_in_use(self) -> Mapping[Outpoint, SessionId]:
        return await self._store.coins_in_use()

    async def peers_in_use(self) -> Mapping[str, SessionId]:
        return await self._store.peers_in_use()

    async def blocked_peers(self) -> Mapping[str, int]:
        return await self._store.blocked_peers()

    async def get(self, name: str) -> str | None:
        return await self._store.get(name)

    async def put(self, name: str, value: str | None) -> None:
        await self._store.put(name, value)

    async def close(self) -> None:
        await self._store.close()


# ---------------------------------------------------------------- conversion


@dataclass(frozen=True, slots=True)
class Converted:
    """How many events were rewritten, and how many there are."""

    changed: int
    events: int


async def encrypt_database(url: str, key: StoreKey, *, rng: Entropy | None = None) -> Converted:
    """Seal every event of the database at `url` that is in the clear, and wipe what stood there.

    SQLite's file is rewritten for that; a PostgreSQL server keeps old versions of rows until its next vacuum, and logs longer.
    Batches of one transaction each: stopped anywhere, it goes on when it is run again, and meanwhile the database can be read with the
    key. The first batch marks the database as encrypted. Raises CannotRead for another key, and what `SqlStore.open` raises.
    """
    source = rng or SystemEntropy()

    def seal(session: str, seq: int, name: str, data: str) -> str:
        return key.seal(session, seq, name, data, source.token(SecretBox.NONCE_SIZE))

    return await _convert(url, key, seal, to_sealed=True, mark=key.mark(source.token(SecretBox.NONCE_SIZE)))


async def decrypt_database(url: str, key: StoreKey) -> Converted:
    """Write every sealed event of the database at `url` in the clear; the last batch takes the mark away.

    Raises CannotRead for another key or a damaged event (what was converted before it stays readable with the key).
    """
    return await _convert(url, key, key.unseal, to_sealed=False, mark=None)


async def _convert(
    url: str, key: StoreKey, rewrite: Callable[[str, int, str, str], str], *, to_sealed: bool, mark: str | None
) -> Converted:
    await (await SqlStore.open(url)).close()  # recognised, and led to the layout that `schema` describes
    stop = threading.Event()
    # In one thread: a SQLite connection stays with the thread that made it.
    working = asyncio.ensure_future(
        asyncio.to_thread(_converted, url, key, rewrite, to_sealed=to_sealed, mark=mark, stop=stop)
    )
    try:
        return await asyncio.shield(working)
    except asyncio.CancelledError:
        stop.set()  # after the batch that is being written
        await asyncio.wait((working,))
        raise


def _converted(
    url: str,
    key: StoreKey,
    rewrite: Callable[[str, int, str, str], str],
    *,
    to_sealed: bool,
    mark: str | None,
    stop: threading.Event,
) -> Converted:
    engine = choose(url, busy_seconds=10.0).engine(echo=False)
    sealed = EVENTS.c.data.startswith(PREFIX, autoescape=True)
    left = ~sealed if to_sealed else sealed

    def begin(connection: Connection) -> None:
        if engine.dialect.name == "sqlite":
            connection.exec_driver_sql("PRAGMA secure_delete = ON")  # what is overwritten is overwritten with zeros
        kept = connection.execute(select(VALUES.c.value).where(VALUES.c.name == KEPT_NAME)).scalar()
        if kept is not None and not key.fits(kept):
            raise CannotRead(_WRONG_KEY)
        if kept is None and mark is not None:
            connection.execute(insert(VALUES).values(name=KEPT_NAME, value=mark))

    def batch(connection: Connection) -> int:
        found = connection.execute(select(EVENTS).where(left).order_by(EVENTS.c.id).limit(_BATCH)).all()
        for row in found:
            data = rewrite(row.session, row.seq, row.name, row.data)
            connection.execute(update(EVENTS).where(EVENTS.c.id == row.id).values(data=data))
        if not found and not to_sealed:
            # In the transaction that found nothing sealed: a worker with the key cannot have written since.
            connection.execute(delete(VALUES).where(VALUES.c.name == KEPT_NAME))
        return len(found)

    changed = 0
    try:
        _write(engine, begin)
        while not stop.is_set() and (count := _write(engine, batch)):
            changed += count
        events = _write(
            engine, lambda connection: connection.execute(select(func.count()).select_from(EVENTS)).scalar_one()
        )
        if to_sealed and not stop.is_set():
            _wipe(engine)
    finally:
        engine.dispose()
    return Converted(changed, events)


def _write(engine: Engine, work: Callable[[Connection], _T]) -> _T:
    def transaction() -> _T:
        with engine.connect().execution_options(**{WRITE: True}) as connection, connection.begin():
            return work(connection)

    return translated(transaction)


def _wipe(engine: Engine) -> None:
    """Leave no old page behind in the file or its log. Raises NotNow when another process holds the database."""
    if engine.dialect.name != "sqlite":
        return

    def vacuum() -> None:
        raw = engine.raw_connection()
        try:
            connection = raw.driver_connection
            if isinstance(connection, sqlite3.Connection):
                connection.execute("VACUUM")
                connection.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()
        finally:
            raw.close()

    translated(vacuum)
