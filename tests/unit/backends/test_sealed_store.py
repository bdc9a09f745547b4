"""Events encrypted at rest: the store's contract, what stands on the disk, wrong keys, and conversion that can stop anywhere."""
# ruff: noqa: ASYNC240 - files are what is tested here, and nothing else runs on the loop meanwhile

from __future__ import annotations

import asyncio
import pickle
import sqlite3
import sys
import traceback
import uuid
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest

from pjv2.backends.store import sealed as module
from pjv2.backends.store.sealed import (
    KEPT_NAME,
    PREFIX,
    SealedStore,
    StoreKey,
    decrypt_database,
    encrypt_database,
    key_in_keyring,
    new_key,
    put_key_in_keyring,
    refuse_sealed,
)
from pjv2.backends.store.sql import SqlStore
from pjv2.config import Config
from pjv2.errors import CannotRead, NotNow, WrongUsage
from pjv2.opening import open_store
from pjv2.ports import Change, Record, Store
from pjv2.testing.check_store import STORE_CHECKS, MakeStore, StoreCheck, example_change, example_row
from pjv2.testing.memory_store import MemoryStore

KEY = bytes(range(32))
OTHER = bytes(32)
A, B = "a" * 32, "b" * 32
SECRET = "5ec2e7-event-of-a-session"


@pytest.fixture(params=["memory", "sqlite"])
def make(request: pytest.FixtureRequest, tmp_path: Path) -> MakeStore:
    @asynccontextmanager
    async def memory() -> AsyncIterator[tuple[Store, Store]]:
        store = MemoryStore()
        yield SealedStore(store, KEY), SealedStore(store.other(), KEY)

    @asynccontextmanager
    async def sqlite() -> AsyncIterator[tuple[Store, Store]]:
        url = f"sqlite:///{tmp_path}/{uuid.uuid4().hex}.sqlite"
        async with await SqlStore.open(url) as store, await SqlStore.open(url) as other:
            yield await SealedStore.open(store, KEY), await SealedStore.open(other, KEY)

    return {"memory": memory, "sqlite": sqlite}[request.param]


@pytest.mark.parametrize("check", STORE_CHECKS, ids=lambda check: check.__name__)
async def test_a_sealed_store_keeps_the_contract_of_stores(make: MakeStore, check: StoreCheck) -> None:
    async with make() as (store, other):
        await check(store, other)


# ---------------------------------------------------------------- a database and its file


def secret_change(session: str = A, events: int = 3) -> Change:
    records = tuple(Record(seq, 1_700_000_000.0, "Seen", f"{SECRET} {seq}") for seq in range(events))
    return Change(example_row(session), 0, records)


def on_disk(path: Path) -> bytes:
    return b"".join(file.read_bytes() for file in path.parent.iterdir() if file.name.startswith(path.name))


def stored(path: Path) -> list[str]:
    with sqlite3.connect(path) as connection:
        found = [data for (data,) in connection.execute("SELECT data FROM events ORDER BY id")]
    connection.close()
    return found


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "pjv2.sqlite"


def url(path: Path) -> str:
    return f"sqlite:///{path}"


async def make_plain(path: Path, events: int = 3) -> None:
    async with await SqlStore.open(url(path)) as store:
        await store.create(secret_change(A, events))


@asynccontextmanager
async def opened(path: Path, key: bytes = KEY) -> AsyncIterator[SealedStore]:
    async with await SqlStore.open(url(path)) as store:
        yield await SealedStore.open(store, key)


async def test_nothing_of_an_event_stands_on_the_disk(path: Path) -> None:
    async with opened(path) as store:
        await store.create(secret_change())
        assert SECRET.encode() not in on_disk(path)
        assert [record.data for record in await store.load(A)] == [f"{SECRET} {seq}" for seq in range(3)]
        assert [record.data for _, _, record in await store.since(0, 10)] == [f"{SECRET} {seq}" for seq in range(3)]
        assert await store.in_the_clear() == 0
    assert SECRET.encode() not in on_disk(path)
    assert all(data.startswith(PREFIX) for data in stored(path))


async def test_equal_events_are_sealed_differently_each_time(path: Path) -> None:
    async with opened(path) as store:
        for session in (A, B):
            await store.create(Change(example_row(session, order=None, uri_id=None), 0, secret_change().records))
    assert len(set(stored(path))) == 6


async def test_another_key_is_told_at_opening_and_nothing_is_written(path: Path) -> None:
    async with opened(path) as store:
        await store.create(secret_change())
    with pytest.raises(CannotRead, match="another key"):
        async with opened(path, OTHER):
            pass
    assert len(stored(path)) == 3


async def test_a_key_that_was_not_checked_at_opening_is_checked_before_the_first_write() -> None:
    shared = MemoryStore()
    await SealedStore(shared, KEY).create(secret_change())
    careless = SealedStore(shared, OTHER)
    with pytest.raises(CannotRead, match="another key"):
        await careless.create(example_change(B))
    with pytest.raises(CannotRead, match="cannot be decrypted") as caught:
        await careless.load(A)
    assert SECRET not in "".join(traceback.format_exception(caught.value))


async def test_an_encrypted_database_is_refused_without_a_key(path: Path) -> None:
    async with opened(path) as store:
        await refuse_sealed(store)  # opening alone marks nothing
        await store.create(secret_change())
        with pytest.raises(CannotRead, match="give its key with"):
            await refuse_sealed(store)


@pytest.mark.parametrize("where", ["session", "seq", "name"])
async def test_a_record_in_the_place_of_another_one_is_refused(path: Path, where: str) -> None:
    async with opened(path) as store:
        await store.create(secret_change())
        await store.create(Change(example_row(B, order=None, uri_id=None), 0, secret_change().records))
    statement = {
        "session": f"UPDATE events SET data = (SELECT data FROM events WHERE session = '{A}' AND seq = 1)"
        f" WHERE session = '{B}' AND seq = 1",
        "seq": "UPDATE events SET data = (SELECT data FROM events AS o WHERE o.session = events.session AND o.seq = 0)"
        " WHERE seq = 1",
        "name": "UPDATE events SET name = 'Closed' WHERE seq = 1",
    }[where]
    with sqlite3.connect(path) as connection:
        connection.execute(statement)
    connection.close()
    async with opened(path) as store:
        with pytest.raises(CannotRead, match="in the place of another one"):
            await store.load(B)


@pytest.mark.parametrize("damage", ["", "AAAA", "not base64!", "é"])
async def test_a_damaged_record_is_told_by_session_and_number(damage: str) -> None:
    below = MemoryStore()
    store = SealedStore(below, KEY)
    await store.create(secret_change())
    await below.append(Change(example_row(A), 3, (Record(3, 1.0, "Seen", PREFIX + damage),)))
    with pytest.raises(CannotRead, match=f"event 3 of session {A} cannot be decrypted"):
        await store.load(A)


async def test_one_flipped_bit_is_noticed() -> None:
    key = StoreKey(KEY)
    text = key.seal(A, 0, "Seen", SECRET, bytes(24))
    flipped = text[:40] + ("A" if text[40] != "A" else "B") + text[41:]
    assert key.unseal(A, 0, "Seen", text) == SECRET
    with pytest.raises(CannotRead):
        key.unseal(A, 0, "Seen", flipped)


# ---------------------------------------------------------------- keys


def test_a_key_is_32_bytes_or_64_hex_characters_and_has_no_face() -> None:
    text = StoreKey(KEY).seal(A, 0, "Seen", SECRET, bytes(24))
    for form in (KEY, KEY.hex().encode(), KEY.hex().upper().encode() + b"\r\n"):
        assert StoreKey.parse(form, "here").unseal(A, 0, "Seen", text) == SECRET
    for form in (b"", KEY[:-1], KEY + b"\n", b"zz" * 32, KEY.hex().encode()[:-2]):
        with pytest.raises(WrongUsage, match="here holds no key"):
            StoreKey.parse(form, "here")
    with pytest.raises(WrongUsage):
        StoreKey(b"short")
    assert repr(StoreKey(KEY)) == "StoreKey(hidden)"
    assert KEY.hex() not in repr(SealedStore(MemoryStore(), KEY))
    with pytest.raises(WrongUsage):
        pickle.dumps(StoreKey(KEY))
    assert new_key() != new_key()
    StoreKey.parse(new_key().encode(), "here")


class Ring(ModuleType):
    """A keyring of the system, as the package of that name shows it."""

    def __init__(self) -> None:
        super().__init__("keyring")
        self.kept: dict[tuple[str, str], str] = {}
        self.trouble: Exception | None = None

    def get_password(self, service: str, name: str) -> str | None:
        if self.trouble is not None:
            raise self.trouble
        return self.kept.get((service, name))

    def set_password(self, service: str, name: str, value: str) -> None:
        self.kept[service, name] = value


@pytest.fixture
def ring(monkeypatch: pytest.MonkeyPatch) -> Ring:
    class KeyringError(Exception):
        pass

    class NoKeyringError(KeyringError):
        pass

    found, errors = Ring(), ModuleType("keyring.errors")
    errors.KeyringError, errors.NoKeyringError = KeyringError, NoKeyringError  # type: ignore[attr-defined]  # a stand-in
    found.errors = errors  # type: ignore[attr-defined]  # as a package has it
    monkeypatch.setitem(sys.modules, "keyring", found)
    monkeypatch.setitem(sys.modules, "keyring.errors", errors)
    return found


async def test_the_keyring_of_the_system_can_hold_the_key(ring: Ring) -> None:
    with pytest.raises(WrongUsage, match="holds no such key"):
        await key_in_keyring("shop")
    await put_key_in_keyring("shop", KEY.hex())
    assert ring.kept == {("pjv2", "shop"): KEY.hex()}
    text = StoreKey(KEY).seal(A, 0, "Seen", SECRET, bytes(24))
    assert (await key_in_keyring("shop")).unseal(A, 0, "Seen", text) == SECRET
    with pytest.raises(WrongUsage, match="may be the only one"):
        await put_key_in_keyring("shop", new_key())


async def test_a_keyring_that_is_locked_or_not_there_is_told_apart(ring: Ring) -> None:
    ring.trouble = ring.errors.KeyringError("locked")  # type: ignore[attr-defined]  # see the fixture
    with pytest.raises(NotNow, match="unlock it"):
        await key_in_keyring("shop")
    ring.trouble = ring.errors.NoKeyringError("none")  # type: ignore[attr-defined]  # see the fixture
    with pytest.raises(WrongUsage, match="use \\[store\\] encryption_key_file"):
        await key_in_keyring("shop")


async def test_without_the_package_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "keyring", None)
    with pytest.raises(WrongUsage, match=r"pip install 'pjv2\[keyring\]'"):
        await key_in_keyring("shop")


# ---------------------------------------------------------------- the configuration


async def test_a_key_file_in_the_configuration_encrypts_and_its_absence_is_noticed(tmp_path: Path, path: Path) -> None:
    key_file = tmp_path / "store.key"
    key_file.write_text(KEY.hex())
    key_file.chmod(0o600)
    with_key = Config.load(None, {"store": {"url": url(path), "encryption_key_file": str(key_file)}})
    store = await open_store(with_key)
    await store.create(secret_change())
    await store.close()
    assert SECRET.encode() not in on_disk(path)
    with pytest.raises(CannotRead, match="is encrypted"):
        await open_store(Config.load(None, {"store": {"url": url(path)}}))
    key_file.write_text(OTHER.hex())
    with pytest.raises(CannotRead, match="another key"):
        await open_store(with_key)
    key_file.chmod(0o604)
    with pytest.raises(WrongUsage, match="other users can read"):
        await open_store(with_key)


def test_a_key_comes_from_a_file_or_from_the_keyring_not_both(tmp_path: Path) -> None:
    with pytest.raises(WrongUsage, match="keep one of them"):
        Config.load(None, {"store": {"encryption_key_file": "a", "encryption_keyring": "b"}})


async def test_the_configuration_can_name_the_keyring(ring: Ring, path: Path) -> None:
    ring.kept["pjv2", "shop"] = KEY.hex()
    store = await open_store(Config.load(None, {"store": {"url": url(path), "encryption_keyring": "shop"}}))
    await store.create(secret_change())
    await store.close()
    assert SECRET.encode() not in on_disk(path)


# ---------------------------------------------------------------- conversion


async def test_a_database_in_the_clear_is_encrypted_in_place_and_back(path: Path) -> None:
    await make_plain(path, 1200)
    before = stored(path)
    assert SECRET.encode() in on_disk(path)
    done = await encrypt_database(url(path), StoreKey(KEY))
    assert (done.changed, done.events) == (1200, 1200)
    assert SECRET.encode() not in on_disk(path), "not in old pages either"
    assert path.stat().st_mode & 0o777 == 0o600
    async with opened(path) as store:
        assert [record.data for record in await store.load(A)] == before
    assert (await encrypt_database(url(path), StoreKey(KEY))).changed == 0
    assert (await decrypt_database(url(path), StoreKey(KEY))).changed == 1200
    assert stored(path) == before
    async with await SqlStore.open(url(path)) as store:
        await refuse_sealed(store)
        assert await store.get(KEPT_NAME) is None


async def test_the_cursor_of_hooks_survives_a_conversion(path: Path) -> None:
    await make_plain(path)
    async with await SqlStore.open(url(path)) as store:
        before = [(place, session, record.seq) for place, session, record in await store.since(0, 10)]
    await encrypt_database(url(path), StoreKey(KEY))
    async with opened(path) as store:
        assert [(place, session, record.seq) for place, session, record in await store.since(0, 10)] == before


async def test_records_in_the_clear_are_read_beside_sealed_ones(path: Path) -> None:
    await make_plain(path)
    async with opened(path) as store:
        await store.append(Change(example_row(A), 3, (Record(3, 1.0, "Seen", f"{SECRET} 3"),)))
        assert [record.data for record in await store.load(A)] == [f"{SECRET} {seq}" for seq in range(4)]
        assert await store.in_the_clear() == 3
    assert (await encrypt_database(url(path), StoreKey(KEY))).changed == 3
    assert (await decrypt_database(url(path), StoreKey(KEY))).changed == 4


@pytest.mark.parametrize("there", [True, False], ids=["encrypting", "decrypting"])
async def test_a_conversion_that_died_half_way_goes_on_when_it_is_run_again(
    path: Path, monkeypatch: pytest.MonkeyPatch, there: bool
) -> None:
    await make_plain(path, 10)
    convert = encrypt_database if there else decrypt_database
    if not there:
        await encrypt_database(url(path), StoreKey(KEY))
    monkeypatch.setattr(module, "_BATCH", 3)
    writing, batches = module._write, [0]

    def dying(engine: object, work: object) -> object:
        batches[0] += 1
        if batches[0] == 4:
            raise KeyboardInterrupt
        return writing(engine, work)  # type: ignore[arg-type]  # handed on as it came

    monkeypatch.setattr(module, "_write", dying)
    half: BaseException | None = None
    try:
        # The interruption happens in the thread that converts, as a process's death would.
        module._converted(
            url(path),
            StoreKey(KEY),
            (lambda *event: StoreKey(KEY).seal(*event, module.SystemEntropy().token(24)))
            if there
            else StoreKey(KEY).unseal,
            to_sealed=there,
            mark=StoreKey(KEY).mark(bytes(24)) if there else None,
            stop=module.threading.Event(),
        )
    except KeyboardInterrupt as exc:
        half = exc
    assert half is not None
    assert sum(data.startswith(PREFIX) for data in stored(path)) == (6 if there else 4)
    async with opened(path) as store:
        assert [record.data for record in await store.load(A)] == [f"{SECRET} {seq}" for seq in range(10)]
    monkeypatch.setattr(module, "_write", writing)
    await convert(url(path), StoreKey(KEY))
    assert sum(data.startswith(PREFIX) for data in stored(path)) == (10 if there else 0)


async def test_a_cancelled_conversion_ends_after_its_batch(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    await make_plain(path, 10)
    monkeypatch.setattr(module, "_BATCH", 1)
    loop, writing, cancelled = asyncio.get_running_loop(), module._write, module.threading.Event()
    first: list[object] = []

    def cancelling(engine: object, work: object) -> object:
        found = writing(engine, work)  # type: ignore[arg-type]  # handed on as it came
        if len(first) == 1:
            loop.call_soon_threadsafe(converting.cancel)
            loop.call_soon_threadsafe(cancelled.set)
            assert cancelled.wait(10)
        first.append(None)
        return found

    monkeypatch.setattr(module, "_write", cancelling)
    converting = asyncio.create_task(encrypt_database(url(path), StoreKey(KEY)))
    with pytest.raises(asyncio.CancelledError):
        await converting
    count = sum(data.startswith(PREFIX) for data in stored(path))
    assert 1 <= count < 10
    async with opened(path) as store:
        assert len(await store.load(A)) == 10


@pytest.mark.parametrize("convert", [encrypt_database, decrypt_database])
async def test_another_key_converts_nothing(path: Path, convert: object) -> None:
    await make_plain(path)
    await encrypt_database(url(path), StoreKey(KEY))
    before = stored(path)
    with pytest.raises(CannotRead, match="another key"):
        await convert(url(path), StoreKey(OTHER))  # type: ignore[operator]  # one of the two
    assert stored(path) == before


async def test_a_worker_with_the_key_may_write_while_a_database_is_encrypted(path: Path) -> None:
    await make_plain(path, 40)
    async with opened(path) as store:
        await asyncio.gather(
            encrypt_database(url(path), StoreKey(KEY)),
            *(store.create(replace(secret_change(f"{n:032x}"), row=example_row(f"{n:032x}", order=None, uri_id=None))) for n in range(10)),
        )  # fmt: skip
        assert await store.in_the_clear() == 0
        assert len(await store.rows()) == 11
