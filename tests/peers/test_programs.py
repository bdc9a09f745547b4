"""The peers themselves: each starts, says what it is, does one thing, and is gone afterwards."""

from __future__ import annotations

import json
import os
import re
import sys
from pathlib import Path

import pytest

from pjv2.wire.ohttp import KeyConfig
from tests.peers.desk import Post
from tests.peers.peers import find, need
from tests.peers.programs import Bitcoind, Program, Trouble, bitcoind, mailroom, stopping

pytestmark = pytest.mark.xdist_group("peers")


def test_bitcoind_mines_and_pays(node: Bitcoind) -> None:
    height = node.call("getblockcount")
    wallet = node.wallet("paid", 150_000, 70_000)
    assert (wallet.balance(), len(wallet.coins())) == (220_000, 2)
    assert node.call("getblockcount") == height + 1
    assert not node.mempool()


def test_bitcoind_is_gone_when_its_with_ends(tmp_path: Path) -> None:
    with bitcoind(need("bitcoind"), tmp_path / "node") as node:
        pid = node.program.pid
        assert node.call("getblockchaininfo")["chain"] == "regtest"
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)
    assert re.search("Shutdown:? done", node.program.log.read_text())


def test_a_plain_mailroom_serves_keys_that_we_read(plain: Post) -> None:
    assert json.loads(plain.directory.get("/health")) == {"versions": [1, 2]}
    KeyConfig.parse(plain.directory.keys())
    assert plain.directory.keys() != plain.relay.keys()


def test_a_mailroom_over_tls_serves_keys_that_we_read(secure: Post) -> None:
    assert secure.directory.url.startswith("https://")
    KeyConfig.parse(secure.directory.keys())
    assert secure.directory.get("/ohttp-keys") == secure.directory.keys()


def test_a_mailroom_keeps_its_keys_over_a_restart(tmp_path: Path) -> None:
    program = need("payjoin-mailroom")
    with mailroom(program, tmp_path, v1=False) as room:
        keys = room.keys()
        assert json.loads(room.get("/health")) == {"versions": [2]}
    with mailroom(program, tmp_path) as room:
        assert room.keys() == keys


@pytest.mark.parametrize(
    ("name", "version"),
    [("payjoin-cli", "payjoin-cli 1.0.0"), ("payjoin-mailroom", "payjoin-mailroom 0.1.3")],
)
def test_the_reference_is_the_release_we_say(name: str, version: str) -> None:
    need(name)
    assert find(name).version == version


def test_payjoin_cli_speaks_both_versions(tmp_path: Path) -> None:
    with stopping(Program("help", [need("payjoin-cli"), "--help"], tmp_path)) as program:
        assert program.ended() == 0
    text = "\n".join(program.lines)
    assert "--root-certificate" in text
    assert "--pj-endpoint" in text
    assert "--ohttp-relays" in text


# ---------------------------------------------------------------- the keeper of programs, without any peer


def python(tmp_path: Path, source: str) -> Program:
    return Program("python", [sys.executable, "-u", "-c", source], tmp_path)


def test_a_line_is_waited_for_and_kept_in_the_log(tmp_path: Path) -> None:
    with stopping(python(tmp_path, "print('one'); print('port 42'); input()")) as program:
        assert program.line(r"port (\d+)")[1] == "42"
    assert program.log.read_text().startswith("one\nport 42\n")


def test_a_program_that_ends_too_early_is_quoted(tmp_path: Path) -> None:
    with (
        stopping(python(tmp_path, "print('no such wallet'); raise SystemExit(3)")) as program,
        pytest.raises(Trouble, match=r"python ended \(.*\) before it printed 'ready':\nno such wallet"),
    ):
        program.line("ready")


def test_a_program_that_says_nothing_is_not_waited_for_for_ever(tmp_path: Path) -> None:
    with (
        stopping(python(tmp_path, "import signal; signal.pause()")) as program,
        pytest.raises(Trouble, match="took more than 0 s"),
    ):
        program.line("ready", seconds=0.05)
    assert program.process.returncode is not None


def test_a_program_sees_neither_our_home_nor_our_proxies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HTTPS_PROXY", "http://127.0.0.1:1")
    monkeypatch.setenv("PJ_TIMEOUT", "1")
    with stopping(python(tmp_path, "import os; print(sorted(os.environ), os.environ['HOME'])")) as program:
        line = program.line("HOME")[0], program.lines[0]
    assert "PROXY" not in line[1]
    assert "PJ_" not in line[1]
    assert str(tmp_path) in line[1]
