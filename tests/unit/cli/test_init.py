"""`init`: what is asked, what is written, what is never written over, and that words and keys are shown to nobody who did not ask."""

from __future__ import annotations

import io
import itertools
import json
import re
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest

from pjv2.cli import init
from pjv2.cli.command import Cli
from pjv2.config import SECTIONS, Config
from pjv2.units import Network
from tests.unit.cli.conftest import Call

WORDS = "abandon abandon abandon abandon abandon abandon abandon abandon abandon abandon abandon about"
SECRET_DESCRIPTOR = f"wpkh(tprv8{'Zgx' * 30}/0/*)"


@pytest.fixture
def path(home: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr("pjv2.config.default_path", lambda: home / "etc" / "config.toml")
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setattr(init, "new_mnemonic", lambda: WORDS)
    return home / "etc" / "config.toml"


@pytest.fixture
def pjv2(path: Path, pjv2: Call) -> Call:
    return pjv2


def line(text: str) -> dict[str, Any]:
    (only,) = [json.loads(found) for found in text.splitlines()]
    return only


# ---------------------------------------------------------------- what is written

CHOICES: dict[str, list[str]] = {
    "bdk and esplora": ["--network", "signet"],
    "bdk on the real network": ["--network", "bitcoin"],
    "bdk and electrum": ["--network", "testnet4", "--chain", "electrum", "--chain-url", "ssl://electrum.example:50002"],
    "regtest": ["--chain-url", "http://127.0.0.1:3002"],
    "services": [
        "--chain-url", "http://127.0.0.1:3002", "--directory", "https://d.example", "--relay", "https://r.example",
        "--relay", "https://s.example", "--proxy", "socks5h://127.0.0.1:9050",
    ],
    "a descriptor": ["--network", "signet", "--descriptor", SECRET_DESCRIPTOR, "--change-descriptor", "wpkh(xpub/1/*)"],
    "bitcoind": ["--wallet", "bitcoind", "--wallet-url", "http://127.0.0.1:18443/wallet/w", "--cookie-file", "cookie"],
    "bitcoind with a password": ["--wallet", "bitcoind", "--user", "u", "--password-file", "rpc.password"],
    "bdk behind bitcoind": ["--chain", "bitcoind", "--user", "u", "--password-file", "rpc.password"],
    "lnd": ["--network", "signet", "--wallet", "lnd", "--lightning", "lnd", "--tls-cert", "t", "--macaroon-file", "m"],
    "lnd's wallet alone": ["--network", "signet", "--wallet", "lnd"],
    "cln": ["--network", "signet", "--lightning", "cln", "--socket", "lightning-rpc"],
    "rehearsal": ["--chain-url", "http://127.0.0.1:3002", "--lightning", "rehearsal"],
    "quotes": ["--network", "signet", "--descriptor", 'wpkh("\\\'é)'],
    "encrypted": ["--network", "signet", "--encrypt"],
}  # fmt: skip


@pytest.mark.parametrize("choice", CHOICES)
def test_what_is_written_is_read_back_as_it_was_chosen(pjv2: Call, path: Path, choice: str) -> None:
    words = CHOICES[choice]
    code, stdout, stderr = pjv2("--json", "init", "--yes", *words)
    assert code == 0, stderr
    told = line(stdout)
    assert (told["event"], told["path"]) == ("ConfigWritten", str(path))
    assert path.stat().st_mode & 0o777 == 0o600
    found = Config.load(path)
    assert (found.network.value, found.wallet.backend, found.lightning.backend) == (
        told["network"],
        told["wallet"],
        told["lightning"],
    )
    assert found.chain_backend == told["chain"] != "lnd"
    given = dict(itertools.pairwise(words))
    if "--descriptor" in given:
        assert found.wallet.secret("descriptor") == given["--descriptor"]
    if "--chain-url" in given:
        assert found.chain.url == given["--chain-url"]
    if "--relay" in given:
        assert [relay.url for relay in found.payjoin.relays] == ["https://r.example", "https://s.example"]
    if "--macaroon-file" in given:
        assert found.lightning.macaroon_file == Path.cwd() / "m"
    if choice == "encrypted":
        assert len(found.store.secret("encryption_key") or "") == 64
    assert sorted(file.name for file in path.parent.iterdir() if file.name.startswith(".")) == []


def test_every_key_there_is_stands_in_the_file_and_no_other(pjv2: Call, path: Path) -> None:
    assert pjv2("init", "--yes", "--network", "signet")[0] == 0
    text = path.read_text(encoding="utf-8")
    shown = re.sub(r"^# (\w+ = )", r"\1", text, flags=re.MULTILINE)
    tables = tomllib.loads(shown)
    alternatives = {"password", "webhook_secret", "macaroon", "descriptor_file", "change_descriptor_file", "directory"}
    for name, section in SECTIONS.items():
        known = set(section.model_fields)
        assert set(tables[name]) <= known
        assert known - set(tables[name]) <= alternatives | {"ca_file"}, name
    assert set(tables) - set(SECTIONS) == {"network", "proxy"}


def test_the_limits_that_are_shown_are_the_ones_in_force(pjv2: Call, path: Path) -> None:
    assert pjv2("init", "--yes", "--network", "signet")[0] == 0
    shown = re.sub(r"^# (\w+ = )", r"\1", path.read_text(encoding="utf-8"), flags=re.MULTILINE)
    policy = tomllib.loads(shown)["policy"]
    assert policy == Config().policy.model_dump()


# ---------------------------------------------------------------- what is not written over


def test_a_configuration_is_written_over_only_by_force(pjv2: Call, path: Path) -> None:
    assert pjv2("init", "--yes", "--network", "signet")[0] == 0
    before = path.read_bytes()
    code, _, stderr = pjv2("init", "--yes", "--network", "testnet4")
    assert (code, path.read_bytes()) == (2, before)
    assert "--force" in stderr
    assert pjv2("init", "--yes", "--network", "testnet4", "--force")[0] == 0
    assert Config.load(path).network is Network.TESTNET4
    assert path.stat().st_mode & 0o777 == 0o600


def test_words_that_are_there_are_taken_and_never_written_over(pjv2: Call, path: Path, tmp_path: Path) -> None:
    words = tmp_path / "mine"
    words.write_text("my words\n")
    words.chmod(0o600)
    for force in ([], ["--force"]):
        code, stdout, _ = pjv2("--json", "init", "--yes", "--network", "signet", "--mnemonic-file", str(words), *force)
        assert (code, line(stdout)["new_words"]) == (0, None)
    assert words.read_text() == "my words\n"
    words.chmod(0o644)
    code, _, stderr = pjv2("init", "--yes", "--force", "--network", "signet", "--mnemonic-file", str(words))
    assert code == 2
    assert "other users can read" in stderr


def test_the_file_can_be_elsewhere(pjv2: Call, tmp_path: Path) -> None:
    there = tmp_path / "new" / "my.toml"
    code, _, stderr = pjv2("--config", str(there), "init", "--yes", "--network", "signet")
    assert code == 0, stderr
    assert Config.load(there).wallet.mnemonic_file == there.parent / "wallet.words"
    assert there.parent.stat().st_mode & 0o777 == 0o700


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ([], "--chain-url"),
        (["--network", "mainnet"], "mainnet"),
        (["--network", "signet", "--chain-url", "ftp://x"], "must be a URL"),
        (["--network", "signet", "--lightning", "rehearsal"], "regtest"),
        (["--network", "signet", "--proxy", "socks5://127.0.0.1:1"], "socks5h"),
        (["--network", "signet", "--descriptor", "a", "--mnemonic-file", "b"], "not both"),
        (["--network", "signet", "--change-descriptor", "a"], "goes with --descriptor"),
        (["--network", "signet", "--descriptor", "a\nb"], "control character"),
        (["--wallet", "bitcoind", "--user", "u"], "go together"),
    ],
)
def test_what_cannot_be_is_refused_and_leaves_nothing(pjv2: Call, path: Path, words: list[str], says: str) -> None:
    code, stdout, stderr = pjv2("init", "--yes", *words)
    assert (code, stdout) == (2, "")
    assert says in stderr
    assert not path.parent.exists() or list(path.parent.iterdir()) == []


def test_a_directory_that_cannot_be_written_is_told(pjv2: Call, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    words = ["--config", str(tmp_path / "file" / "c.toml"), "init", "--yes", "--network", "signet"]
    code, _, stderr = pjv2(*words, "--descriptor", "wpkh(xpub)")
    assert code == 4
    assert "cannot be written" in stderr


# ---------------------------------------------------------------- secrets


def test_new_words_are_in_a_private_file_and_nowhere_else(pjv2: Call, path: Path) -> None:
    code, stdout, stderr = pjv2("--json", "init", "--yes", "--network", "signet")
    assert code == 0
    words = Path(line(stdout)["new_words"])
    assert words.read_text() == WORDS + "\n"
    assert words.stat().st_mode & 0o777 == 0o600
    assert "abandon" not in stdout + stderr + path.read_text()
    assert Config.load(path).wallet.secret_bytes("mnemonic") == words.read_bytes()


def test_new_words_are_shown_to_a_person_who_asks_and_never_in_json(pjv2: Call) -> None:
    code, stdout, stderr = pjv2("init", "--yes", "--network", "signet", "--show-words")
    assert (code, WORDS in stderr, WORDS in stdout) == (0, True, False)
    code, stdout, stderr = pjv2("--json", "init", "--yes", "--force", "--network", "signet", "--show-words")
    assert (code, "leave out --json" in stderr) == (2, True)
    assert "abandon" not in stdout + stderr


def test_a_private_descriptor_is_never_repeated(pjv2: Call, path: Path) -> None:
    code, stdout, stderr = pjv2("init", "--yes", "--network", "signet", "--descriptor", SECRET_DESCRIPTOR)
    assert code == 0
    assert "your shell's history" in stderr
    assert "tprv" not in stdout + stderr
    answers = init.Answers(Network.SIGNET, {"descriptor": SECRET_DESCRIPTOR}, {}, {})
    assert "tprv" not in repr(answers)


def test_a_failure_takes_new_words_away_again(pjv2: Call, path: Path) -> None:
    assert pjv2("init", "--yes", "--network", "signet", "--encrypt", "--proxy", "nonsense")[0] == 2
    assert list(path.parent.iterdir()) == []


def test_without_the_library_it_says_what_is_missing(monkeypatch: pytest.MonkeyPatch, pjv2: Call, path: Path) -> None:
    monkeypatch.undo()
    monkeypatch.setattr("pjv2.config.default_path", lambda: path)
    monkeypatch.setitem(sys.modules, "bdkpython", None)
    code, _, stderr = pjv2("init", "--yes", "--network", "signet")
    assert code == 2
    assert "pip install 'pjv2[bdk]'" in stderr
    assert "--mnemonic-file" in stderr
    assert not path.exists()


def test_new_words_are_twelve_and_differ(monkeypatch: pytest.MonkeyPatch) -> None:
    library = pytest.importorskip("bdkpython")
    first, second = init.new_mnemonic(), init.new_mnemonic()
    assert first != second
    assert len(first.split()) == 12
    library.Mnemonic.from_string(first)


# ---------------------------------------------------------------- questions


class Terminal(io.StringIO):
    """A stream with a person at it."""

    def isatty(self) -> bool:
        return True


def asked(*answers: str) -> tuple[Cli, Terminal]:
    said = Terminal()
    return Cli(stdin=Terminal("".join(f"{answer}\n" for answer in answers)), stdout=io.StringIO(), stderr=said), said


def test_a_person_is_asked_and_an_empty_answer_takes_what_is_suggested(pjv2: Call, path: Path) -> None:
    cli, said = asked("signet", "", "", "", "", "")
    assert pjv2("init", cli=cli)[0] == 0
    found = Config.load(path)
    assert (found.network, found.wallet.backend, found.chain.url) == (
        Network.SIGNET,
        "bdk",
        "https://mempool.space/signet/api",
    )
    assert found.wallet.mnemonic_file == path.parent / "wallet.words"
    assert "a public server sees all your addresses" in said.getvalue()


def test_an_answer_that_is_none_of_the_choices_is_asked_again(pjv2: Call, path: Path) -> None:
    cli, said = asked(
        "mainnet", "REGTEST", "bitcoind", "", "", "", "", "https://d.example", "https://a.example https://b.example"
    )
    assert pjv2("init", cli=cli)[0] == 0, said.getvalue()
    found = Config.load(path)
    assert found.network is Network.REGTEST
    assert (found.wallet.backend, found.chain_backend) == ("bitcoind", "bitcoind")
    assert [relay.url for relay in found.payjoin.relays] == ["https://a.example", "https://b.example"]
    assert "'mainnet' is none of them" in said.getvalue()


def test_flags_are_not_asked_for_again(pjv2: Call, path: Path) -> None:
    flags = ["--network", "signet", "--wallet", "bdk", "--chain", "electrum", "--chain-url", "ssl://e.example:50002"]
    cli, said = asked("")
    assert pjv2("init", *flags, "--lightning", "none", cli=cli)[0] == 0
    assert said.getvalue().count("words (made") == 1
    assert "Which" not in said.getvalue()


def test_nobody_is_asked_where_nobody_is(pjv2: Call, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(init.Questions, "_line", lambda *_: pytest.fail("asked"))
    assert pjv2("init")[0] == 2
    assert pjv2("--json", "init", "--network", "signet")[0] == 0


def test_an_end_of_input_is_no_answer(pjv2: Call, path: Path) -> None:
    cli, said = asked("signet")
    assert pjv2("init", cli=cli)[0] == 2
    assert "nobody to ask any more" in said.getvalue()
    assert not path.exists()
