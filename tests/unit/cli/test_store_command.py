"""`store encrypt` and `store decrypt`: a key is made, events go behind it and come back, and the next step is said."""

from __future__ import annotations

import asyncio
import json
import sqlite3
from pathlib import Path

import pytest

from pjv2.backends.store.sql import SqlStore
from pjv2.testing.check_store import example_change
from tests.unit.cli.conftest import Call


@pytest.fixture
def home(home: Path) -> Path:
    (home / "config.toml").write_text('[store]\nencryption_key_file = "store.key"\n')
    return home


@pytest.fixture
def database(home: Path) -> Path:
    path = home / "data" / "pjv2.sqlite"

    async def fill() -> None:
        async with await SqlStore.open(f"sqlite:///{path}") as store:
            await store.create(example_change(events=3))

    asyncio.run(fill())
    return path


def sealed(database: Path) -> int:
    connection = sqlite3.connect(database)
    (count,) = connection.execute("SELECT count(*) FROM events WHERE data LIKE 'pjv2sealed1:%'").fetchone()
    connection.close()
    return int(count)


def test_a_database_goes_behind_a_new_key_and_comes_back(pjv2: Call, home: Path, database: Path) -> None:
    code, stdout, stderr = pjv2("--json", "store", "encrypt", "--make-key")
    assert code == 0, stderr
    done = json.loads(stdout)
    assert (done["event"], done["changed"], done["events"]) == ("StoreEncrypted", 3, 3)
    key = home / "store.key"
    assert key.stat().st_mode & 0o777 == 0o600
    assert key.read_text().strip() not in stdout + stderr
    assert "Keep a copy" in stderr
    assert sealed(database) == 3
    assert json.loads(pjv2("--json", "store", "encrypt")[1])["changed"] == 0
    assert pjv2("history")[0] == 0
    code, stdout, _ = pjv2("store", "decrypt")
    assert (code, "take the key out" in stdout) == (0, True)
    assert sealed(database) == 0


def test_a_key_is_never_written_over(pjv2: Call, home: Path, database: Path) -> None:
    assert pjv2("store", "encrypt", "--make-key")[0] == 0
    key = (home / "store.key").read_bytes()
    code, _, stderr = pjv2("store", "encrypt", "--make-key")
    assert (code, "is not written over" in stderr) == (2, True)
    assert (home / "store.key").read_bytes() == key


def test_without_the_key_an_encrypted_database_says_what_to_give(pjv2: Call, home: Path, database: Path) -> None:
    assert pjv2("store", "encrypt", "--make-key")[0] == 0
    (home / "config.toml").write_text("")
    for words in (["history"], ["export"]):
        code, stdout, stderr = pjv2(*words)
        assert (code, stdout) == (6, "")
        assert "encryption_key_file" in stderr


@pytest.mark.parametrize("command", [["encrypt"], ["encrypt", "--make-key"], ["decrypt"]])
def test_without_a_configured_key_it_says_where_to_name_one(
    pjv2: Call, home: Path, database: Path, command: list[str]
) -> None:
    (home / "config.toml").write_text("")
    code, _, stderr = pjv2("store", *command)
    assert (code, "[store] encryption_key_file" in stderr) == (2, True)


def test_a_key_file_that_is_missing_is_named(pjv2: Call, home: Path, database: Path) -> None:
    code, _, stderr = pjv2("store", "encrypt")
    assert (code, "--make-key makes one" in stderr) == (2, True)


def test_where_nothing_is_stored_there_is_nothing_to_encrypt(pjv2: Call, home: Path) -> None:
    code, _, stderr = pjv2("store", "encrypt", "--make-key")
    assert (code, "encrypted from its first event on" in stderr) == (2, True)
    assert not (home / "data").exists()
