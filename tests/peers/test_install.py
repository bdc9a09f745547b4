"""`make peers` by its promises: it does a thing once, leaves nothing half done, and says why it cannot. Nothing is downloaded here."""

from __future__ import annotations

import json
import os
import select
import signal
import stat
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from tests.peers import install, peers
from tests.peers.install import CannotHave, Place, Step


@pytest.fixture(autouse=True)
def _a_cache_and_a_path_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("PJV2_PEERS", raising=False)
    (tmp_path / "bin").mkdir()
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.defpath}")
    peers.version_of.cache_clear()


def program(path: Path, version: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\necho '{version}'\n")
    path.chmod(0o755)
    return path


class Maker:
    """A step that works as often as it is asked, and counts."""

    def __init__(self, name: str = "payjoin-cli") -> None:
        self.name, self.made = name, 0
        self.trouble: BaseException | None = None

    def __call__(self, place: Place) -> Mapping[str, Any]:
        self.made += 1
        program(place.part / "bin" / self.name, f"{self.name} 1")
        (place.work / "objects").write_text("half")
        if self.trouble is not None:
            raise self.trouble
        return {"version": f"{self.name} 1"}

    def plan(self, recipe: str = "one") -> list[Step]:
        return [Step(self.name, recipe, "cargo", self)]


@pytest.fixture
def maker(monkeypatch: pytest.MonkeyPatch) -> Maker:
    maker = Maker()
    monkeypatch.setattr(install, "plan", maker.plan)
    return maker


def test_what_is_there_is_not_made_again(maker: Maker, capsys: pytest.CaptureFixture[str]) -> None:
    assert install.main([]) == 0
    assert install.main([]) == 0
    assert maker.made == 1
    assert "there already" in capsys.readouterr().out
    assert peers.need("payjoin-cli") == peers.cache_directory() / "payjoin-cli" / "bin" / "payjoin-cli"


def test_another_recipe_makes_it_anew(maker: Maker, monkeypatch: pytest.MonkeyPatch) -> None:
    assert install.main([]) == 0
    monkeypatch.setattr(install, "plan", lambda: maker.plan("two"))
    assert install.main([]) == 0
    assert maker.made == 2
    assert peers.stamp_of(peers.cache_directory() / "payjoin-cli")["recipe"] == "two"


@pytest.mark.parametrize("trouble", [CannotHave("the compiler is tired"), KeyboardInterrupt()])
def test_an_interruption_leaves_its_objects_and_no_program(maker: Maker, trouble: BaseException) -> None:
    maker.trouble = trouble
    assert install.main([]) == (4 if isinstance(trouble, CannotHave) else 130)
    assert peers.find("payjoin-cli").path is None
    assert (peers.cache_directory() / "work" / "cargo" / "objects").exists()
    maker.trouble = None
    assert install.main([]) == 0
    assert peers.find("payjoin-cli").version == "payjoin-cli 1"
    assert not (peers.cache_directory() / "work" / "cargo").exists()
    assert not list(peers.cache_directory().glob("*.part"))


def test_a_failed_renewal_keeps_what_stood_there(maker: Maker, monkeypatch: pytest.MonkeyPatch) -> None:
    assert install.main([]) == 0
    maker.trouble = CannotHave("no network")
    monkeypatch.setattr(install, "plan", lambda: maker.plan("two"))
    assert install.main([]) == 4
    assert peers.find("payjoin-cli").path is not None


def test_one_that_cannot_be_had_does_not_keep_the_others_away(
    maker: Maker, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def never(place: Place) -> Mapping[str, Any]:
        raise CannotHave("the archive is on fire")

    monkeypatch.setattr(install, "plan", lambda: [Step("bitcoind", "x", "apt", never), *maker.plan()])
    monkeypatch.setattr(install, "find", lambda name: peers.Peer(name, None, missing="it is not installed"))
    assert install.main([]) == 4
    assert capsys.readouterr().err == "bitcoind: the archive is on fire\n"
    assert peers.find("payjoin-cli").path is not None


def test_a_peer_nobody_knows_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        install.main(["payjoin-clii"])
    assert ended.value.code == 2
    assert "no such peer: payjoin-clii" in capsys.readouterr().err


def test_elsewhere_than_on_debian_one_sentence_says_so(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(install, "release", {"ID": "fedora"}.get)
    monkeypatch.setenv("PATH", os.environ["PATH"].partition(":")[0])
    assert install.main(["bitcoind"]) == 4
    told = capsys.readouterr().err
    assert told == (
        "bitcoind: no bitcoind 29 or newer is on PATH, and one can only be fetched on Debian (this is fedora): install one\n"
    )


def test_a_machine_without_rust_is_told(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("PATH", os.environ["PATH"].partition(":")[0])
    assert install.main(["payjoin-mailroom"]) == 4
    assert "is built with Rust, which needs `cargo`, which is not on PATH" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("version", "taken"),
    [
        ("Bitcoin Core version v29.1.0", True),
        ("Bitcoin Knots daemon version v30.0.0.knots20260101", True),
        ("Bitcoin Core daemon version v28.2.0", False),
        ("Bitcoin Core version v0.21.1", False),
        ("nonsense", False),
    ],
)
def test_the_bitcoind_of_the_system_is_taken_when_it_is_new_enough(version: str, taken: bool, tmp_path: Path) -> None:
    program(tmp_path / "bin" / "bitcoind", version)
    peer = peers.find("bitcoind")
    assert (peer.path == tmp_path / "bin" / "bitcoind") is taken
    assert taken or peer.missing == "the one on PATH is not 29 or newer"


def test_a_missing_peer_skips_by_name_and_fails_where_it_is_required(monkeypatch: pytest.MonkeyPatch) -> None:
    sentence = "missing: payjoin-cli (it is not installed); `make peers` installs it"
    with pytest.raises(pytest.skip.Exception) as skipped:
        peers.need("payjoin-cli")
    assert str(skipped.value) == sentence
    monkeypatch.setenv("PJV2_PEERS", "required")
    with pytest.raises(pytest.fail.Exception) as failed:
        peers.need("payjoin-cli")
    assert str(failed.value) == sentence


@pytest.mark.parametrize("stamp", ["", "[]", "{"])
def test_a_stamp_that_cannot_be_read_is_none(stamp: str) -> None:
    place = peers.cache_directory() / "payjoin-cli"
    program(place / "bin" / "payjoin-cli", "payjoin-cli 1")
    (place / "stamp.json").write_text(stamp)
    assert peers.find("payjoin-cli").path is None


def test_a_relative_cache_counts_as_unset(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "here")
    assert peers.cache_directory() == Path.home() / ".cache" / "pjv2-peers"


def test_apt_of_our_own_touches_nothing_of_the_machine(tmp_path: Path) -> None:
    place = Place("bitcoind", tmp_path, tmp_path / "work", tmp_path / "log", 1)
    text = install.apt_settings(place, "http://archive.invalid/debian").read_text()
    for name in ("Dir::State ", "Dir::State::status", "Dir::State::lists", "Dir::Cache", "Dir::Etc::sourcelist"):
        assert f'{name.strip()} "{tmp_path}/work' in text
    assert "#clear APT::Update;" in text
    assert 'AllowUnauthenticated "false"' in text
    assert "trusted=yes" not in (tmp_path / "work" / "sources.list").read_text()


def test_a_key_that_the_machine_does_not_have_is_named() -> None:
    told = "W: GPG error: http://a unstable InRelease: The following signatures couldn't be verified: NO_PUBKEY 6ED0E7B82643E131"
    assert "upgrade the package debian-archive-keyring" in install.why_apt_refused("http://a", told)


def test_a_command_that_fails_is_quoted_with_its_log(tmp_path: Path) -> None:
    place = Place("x", tmp_path, tmp_path, tmp_path / "x.log", 1)
    with pytest.raises(CannotHave, match=r"`sh` failed \(3\)\. Log: .*x\.log\n    too bad"):
        install.run(place, ["sh", "-c", "echo too bad; exit 3"])


def test_a_silent_command_shows_signs_of_life(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(install, "HEARTBEAT", 0.05)
    place = Place("slow", tmp_path, tmp_path, tmp_path / "x.log", 1)
    gate = tmp_path / "gate"
    os.mkfifo(gate)
    beats: list[str] = []

    def say(text: str) -> None:
        if "Compiling" in text:
            beats.append(text)
            if len(beats) == 1:
                gate.write_text("go\n")

    monkeypatch.setattr(install, "say", say)
    install.run(place, ["sh", "-c", f"echo Compiling everything; read go < {gate}"])
    assert any(line.startswith("  … slow: 0 min 00 s, now: Compiling everything") for line in beats)
    assert not capsys.readouterr().out


def test_the_wrapper_is_locked_to_what_the_reference_was_published_with() -> None:
    assert not (install.WRAPPER / "Cargo.lock").exists()  # the published one is taken out of the crate
    manifest = (install.WRAPPER / "Cargo.toml").read_text()
    assert f'payjoin-mailroom = {{ version = "={install.MAILROOM}"' in manifest


def test_the_real_plan_names_every_peer() -> None:
    plan = install.plan()
    assert tuple(step.name for step in plan) == peers.NAMES
    assert all(json.dumps(step.recipe) for step in plan)
    assert stat.S_ISDIR(install.WRAPPER.stat().st_mode)


def test_the_archive_is_the_one_that_the_machine_uses_for_its_own_release(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    apt = tmp_path / "bin" / "apt-get"
    apt.write_text(
        "#!/bin/sh\ncat <<END\n"
        "'http://mirror.invalid/debian/dists/bookworm/InRelease' mirror_InRelease 0 \n"
        "'http://mirror.invalid/debian/dists/bookworm-updates/InRelease' mirror_InRelease 0 \n"
        "'http://mirror.invalid/debian/dists/bookworm/main/binary-amd64/Packages.xz' mirror_Packages 0 \n"
        "'http://security.invalid/dists/bookworm-security/InRelease' security_InRelease 0 \n"
        "'https://shop.invalid/linux/dists/nodistro/InRelease' shop_InRelease 0 \n"
        "'http://second.invalid/debian//dists/sid/InRelease' second_InRelease 0 \n"
        "END\n"
    )
    apt.chmod(0o755)
    monkeypatch.setattr(install, "release", {"VERSION_CODENAME": "bookworm"}.get)
    place = Place("bitcoind", tmp_path, tmp_path / "work", tmp_path / "log", 1)
    assert install.archives_of_this_machine(place, str(apt)) == [
        "http://mirror.invalid/debian",
        "http://second.invalid/debian",
    ]


def test_an_installer_that_is_stopped_stops_the_compilers_too(tmp_path: Path) -> None:
    """Whoever holds the writing end of the pipe still runs: its end is the end of all of them."""
    cargo = tmp_path / "bin" / "cargo"
    cargo.write_text(
        '#!/bin/sh\n[ "$1" = --version ] && { echo cargo 1.99.0; exit; }\n'
        f'exec 3> "{tmp_path}/alive"\necho compiling >&3\nsleep 600 &\nwait\n'
    )
    cargo.chmod(0o755)
    program(tmp_path / "bin" / "cc", "cc")
    os.mkfifo(tmp_path / "alive")
    installer = subprocess.Popen(
        [sys.executable, "-m", "tests.peers.install", "payjoin-cli"],
        cwd=install.WRAPPER.parents[2],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    with (tmp_path / "alive").open() as alive:
        assert alive.readline() == "compiling\n"
        installer.terminate()
        assert installer.communicate(timeout=60)[1] == "interrupted; make peers picks up where it stopped\n"
        assert select.select([alive], [], [], 60)[0], "something still runs"
        assert not alive.read()
    assert installer.returncode == 130


def test_a_stop_while_a_program_is_being_started_is_heard_once_it_is_known() -> None:
    known: list[str] = []

    def start() -> None:
        with install.held_back():
            signal.raise_signal(signal.SIGINT)
            known.append("the process")

    with pytest.raises(KeyboardInterrupt):
        start()
    assert known
