"""A directory and a relay of one's own: the files of relay_config/mailroom are what the program takes, and carry a message."""

from __future__ import annotations

import asyncio
import io
import json
import re
import shlex
import tomllib
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest

from pjv2.backends.mailroom import load_services
from pjv2.backends.mailroom.directory_list import parse_services
from pjv2.backends.system import SystemEntropy
from pjv2.cli.app import run
from pjv2.cli.command import Cli
from pjv2.config import Config
from pjv2.errors import CannotRead, WrongUsage
from pjv2.opening import open_mailroom
from pjv2.units import Network
from pjv2.wire.mailbox import MailboxRequest, Method, short_id
from pjv2.wire.secp import SecretKey
from tests.peers.desk import Post
from tests.peers.install import MAILROOM
from tests.peers.peers import need
from tests.peers.programs import HOST, Certificates, Mailroom, Program, stopping

ROOT = Path(__file__).resolve().parents[2]
LISTS = ROOT / "relay_config"
FILES = LISTS / "mailroom"
PAGE = ROOT / "docs" / "howto" / "own-mailroom.md"
LISTENER = 'listener = "0.0.0.0:8080"'
MESSAGE_BYTES = 7168


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)


# ---------------------------------------------------------------- the files


def test_they_are_read_as_no_list_of_a_network() -> None:
    assert {file.stem for file in LISTS.glob("*.toml")} == {network.value for network in Network}
    assert not {file.stem for file in FILES.iterdir()} & {network.value for network in Network}
    for network in Network:
        assert not any("example" in service.url for service in load_services(network).relays)
        for file in FILES.glob("*.toml"):
            with pytest.raises(CannotRead):
                parse_services(file.read_text(encoding="utf-8"), network)


def test_the_services_are_pinned_to_the_version_under_test_and_nobody_is_root() -> None:
    compose = (FILES / "compose.yaml").read_text(encoding="utf-8")
    assert set(re.findall(r"\b\d+\.\d+\.\d+\b", compose)) == {MAILROOM}
    assert f"cargo install payjoin-mailroom --version ={MAILROOM} --locked" in compose
    assert ":latest" not in compose
    user = re.search(r'^  user: "(\d+):(\d+)"$', compose, re.MULTILINE)
    assert user is not None
    assert "0" not in user.groups()
    assert f"USER {user[1]}:{user[2]}" in compose
    assert f"version {MAILROOM}" in PAGE.read_text(encoding="utf-8")


@pytest.mark.parametrize("name", ["directory", "relay"])
def test_compose_proxy_and_configuration_name_the_same_places(name: str) -> None:
    compose = (FILES / "compose.yaml").read_text(encoding="utf-8")
    proxy = (FILES / "nginx.conf").read_text(encoding="utf-8")
    told = tomllib.loads((FILES / f"{name}.toml").read_text(encoding="utf-8"))
    host, _, port = told["listener"].rpartition(":")
    assert host == "0.0.0.0"
    assert f"server {name}:{port};" in proxy
    assert f"      - ./{name}.toml:/mailroom.toml:ro\n      - {name}:/mailroom/{told['storage_dir']}\n" in compose
    inside = re.search(r"listen (\d+) ssl;", proxy)
    assert inside is not None
    assert f'"443:{inside[1]}"' in compose
    for file in re.findall(r"/tls/([\w.]+);", proxy):
        assert f"`{file}`" in PAGE.read_text(encoding="utf-8")


# ---------------------------------------------------------------- running


@contextmanager
def own(name: str, home: Path, tls: Certificates | None) -> Iterator[Mailroom]:
    """The mailroom of relay_config/mailroom/NAME.toml, as it stands but for its port, in a directory of its own."""
    home.mkdir()
    told = (FILES / f"{name}.toml").read_text(encoding="utf-8")
    assert told.count(LISTENER) == 1
    config = home / "mailroom.toml"
    config.write_text(told.replace(LISTENER, f'listener = "{HOST}:0"'), encoding="utf-8")
    command: list[str | Path] = (
        [need("payjoin-mailroom"), "--config", config]
        if tls is None
        else [need("payjoin-mailroom-tls"), config, tls.chain, tls.key, tls.root_der]
    )
    with stopping(Program(name, command, home)) as program:
        port = program.line(r"Payjoin service listening on .*?(\d+)\)*(?: with TLS)?$")[1]
        scheme, root = ("http", None) if tls is None else ("https", tls.root_pem)
        yield Mailroom(program, f"{scheme}://{HOST}:{port}", home / tomllib.loads(told)["storage_dir"], root)


@pytest.fixture(params=["plain", "tls"])
def post(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Post]:
    tls: Certificates | None = request.getfixturevalue("certs") if request.param == "tls" else None
    with ExitStack() as stack:
        rooms = {name: stack.enter_context(own(name, tmp_path / name, tls)) for name in ("directory", "relay")}
        yield Post(**rooms, tls=tls)


def told_by_the_page(number: int, post: Post) -> dict[str, Any]:
    """One of the page's configurations, with these mailrooms at its names."""
    text = blocks("toml")[number]
    for name, room in (("directory", post.directory), ("relay", post.relay)):
        text = text.replace(f"https://{name}.example.org", room.url)
    table: dict[str, Any] = tomllib.loads(text)["payjoin"]
    return table if post.tls is None else table | {"ca_file": str(post.tls.root_pem)}


@pytest.mark.xdist_group("peers")
async def test_a_message_goes_through_both(post: Post) -> None:
    config = Config.load(None, {"network": "regtest", "payjoin": told_by_the_page(2, post)})
    mailroom = await open_mailroom(config)
    try:
        directory, keys = await mailroom.directory()
        assert directory == post.directory.url
        box, message = short_id(SecretKey.generate(SystemEntropy()).public), SystemEntropy().token(MESSAGE_BYTES)

        async def ask(method: Method, body: bytes = b"") -> tuple[int, bytes]:
            async with asyncio.timeout(60):
                carried = await mailroom.exchange(directory, keys, MailboxRequest(method, box, body), session="00" * 16)
            return carried.reply.status, carried.reply.body

        waiting = asyncio.create_task(ask("GET"))
        assert (await ask("POST", message))[0] == 200
        assert await waiting == (200, message)
    finally:
        await mailroom.close()
    assert json.loads(post.directory.get("/health")) == {"versions": [1, 2]}
    assert json.loads(post.relay.get("/health")) == {"versions": [2]}
    assert (post.directory.storage / "ohttp-keys").is_dir()


@pytest.mark.xdist_group("peers")
@pytest.mark.parametrize("post", ["tls"], indirect=True)
def test_the_commands_of_the_page_find_them(post: Post, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pjv2.config.data_directory", lambda: tmp_path / "data")
    rows = told_by_the_page(2, post)
    text = "".join(f"{key} = {written(value)}\n" for key, value in rows.items())
    config = tmp_path / "config.toml"
    config.write_text(f'network = "regtest"\n[payjoin]\n{text}', encoding="utf-8")
    typed = [line[2:] for block in blocks("console") for line in block.splitlines() if line.startswith("$ pjv2 ")]
    assert "pjv2 relays check" in typed
    out = io.StringIO()
    words = ["--config", str(config), "--json", *shlex.split("relays check")]
    assert run(words, cli=Cli(stdout=out, stderr=io.StringIO())) == 0
    found = {row["role"]: row for row in map(json.loads, out.getvalue().splitlines())}
    assert {role: (row["url"], row["operator"], row["health"]) for role, row in found.items()} == {
        "directory": (post.directory.url, "me, keeping", "good"),
        "relay": (post.relay.url, "me, carrying", "good"),
    }


def written(value: Any) -> str:
    """A value as TOML has it."""
    if isinstance(value, dict):
        return "{ " + ", ".join(f"{key} = {written(one)}" for key, one in value.items()) + " }"
    return "[" + ", ".join(map(written, value)) + "]" if isinstance(value, list) else json.dumps(value)


async def test_both_halves_under_one_operator_are_never_paired() -> None:
    both = [tomllib.loads(block)["payjoin"] for block in blocks("toml")[:2]]
    mapping = {"directories": both[0]["directories"], "relays": both[1]["relays"][:1]}
    mailroom = await open_mailroom(Config.load(None, {"network": "regtest", "payjoin": mapping}))
    with pytest.raises(WrongUsage, match="run by another operator"):
        await mailroom.directory()
    await mailroom.close()


@pytest.mark.parametrize("number", [0, 1])
async def test_each_half_goes_with_the_packaged_other_half(number: int) -> None:
    config = Config.load(None, {"network": "signet", "payjoin": tomllib.loads(blocks("toml")[number])["payjoin"]})
    mailroom = await open_mailroom(config)
    directories = [directory.url for directory in mailroom.directories]
    relays = {relay.url for url in directories for relay in mailroom.relays_for(url)}
    assert relays
    assert ("https://directory.example.org" in directories) == (number == 0)
    assert ("https://relay.example.org" in relays) == (number == 1)
    await mailroom.close()
