"""The commands of docs/howto/payjoin-cli.md, in its order, typed by two people; every line that the page shows is printed."""

from __future__ import annotations

import re
import shlex
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from tests.peers.desk import Post
from tests.peers.peers import need
from tests.peers.programs import Bitcoind, Certificates, NodeWallet, PayjoinCli, Program, mailroom, stopping

pytestmark = pytest.mark.xdist_group("peers")

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "howto" / "payjoin-cli.md"
Person = Callable[[str, NodeWallet, Post], PayjoinCli]


@dataclass
class Typed:
    """A command of the page, and the lines that it says will be printed; `…` stands for anything."""

    words: list[str]
    shown: list[str] = field(default_factory=list)

    def is_printed_by(self, program: Program) -> None:
        for line in self.shown:
            program.line(".*".join(map(re.escape, line.split("…"))))


def section(heading: str) -> list[Typed]:
    text = PAGE.read_text(encoding="utf-8").partition(f"## {heading}\n")[2].partition("\n## ")[0]
    found: list[Typed] = []
    for block in re.findall(r"```(?:console|text)\n(.*?)```", text, re.DOTALL):
        for line in block.splitlines():
            if line.startswith("$ "):
                found.append(Typed(shlex.split(line[2:])))
            else:
                found[-1].shown.append(line)
    return found


class Us:
    """A person with pjv2, at a shell."""

    def __init__(self, home: Path, wallet: NodeWallet, post: Post) -> None:
        home.mkdir()
        self._home = home
        self._runs = 0
        trusted = "" if post.tls is None else f'ca_file = "{post.tls.root_pem}"\n'
        (home / "config.toml").write_text(
            'network = "regtest"\n'
            f'[wallet]\nbackend = "bitcoind"\nurl = "{wallet.url}"\ncookie_file = "{wallet.node.cookie}"\n'
            '[chain]\nbackend = "bitcoind"\n'
            f'[payjoin]\ndirectories = ["{post.directory.url}"]\nrelays = ["{post.relay.url}"]\n{trusted}'
        )

    def run(self, words: list[str]) -> Program:
        """Started; nobody can be asked here, so that a payment is agreed to beforehand."""
        self._runs += 1
        agreed = ["--yes"] if words[0] == "send" else []
        command = [sys.executable, "-m", "pjv2.cli", "--config", self._home / "config.toml", *words, *agreed]
        return Program(
            f"{self._runs}-pjv2-{words[0]}", command, self._home, {"PYTHONPATH": str(ROOT), "COLUMNS": "400"}
        )


@dataclass
class Table:
    """Two people who type what the page says."""

    us: Us
    them: PayjoinCli
    node: Bitcoind
    stack: ExitStack

    def type(self, typed: Typed, uri: str = "") -> Program:
        program, *words = [uri if word == "URI" else word for word in typed.words]
        if program == "pjv2":
            return self.stack.enter_context(stopping(self.us.run(words)))
        assert program == "payjoin-cli"
        return self.stack.enter_context(self.them.run(*words))


@pytest.fixture
def ours(node: Bitcoind) -> NodeWallet:
    return node.wallet("ours", 300_000)


@pytest.fixture
def theirs(node: Bitcoind) -> NodeWallet:
    return node.wallet("theirs", 300_000)


@pytest.fixture
def table(
    ours: NodeWallet, theirs: NodeWallet, node: Bitcoind, certs: Certificates, person: Person, tmp_path: Path
) -> Iterator[Table]:
    program = need("payjoin-mailroom-tls")
    with ExitStack() as stack:
        # A bounded pass looks into each mailbox once, for as long as the directory lets it wait.
        rooms = {
            name: stack.enter_context(mailroom(program, tmp_path / name, name=name, tls=certs, long_poll=2))
            for name in ("directory", "relay")
        }
        post = Post(**rooms, tls=certs)
        yield Table(Us(tmp_path / "us", ours, post), person("them", theirs, post), node, stack)


def shown_uri(program: Program) -> str:
    return program.line(r"(?i)^bitcoin:\S+")[0]


def test_you_pay(table: Table, ours: NodeWallet, theirs: NodeWallet) -> None:
    receive, send = section("You pay")
    *asking, done = [Typed([], [line]) for line in [*receive.shown, *send.shown[1:]]]
    receiver = table.type(receive)
    for line in asking:
        line.is_printed_by(receiver)
    sender = table.type(send, shown_uri(receiver))
    done.is_printed_by(receiver)
    Typed([], send.shown[:1]).is_printed_by(sender)
    assert (sender.ended(), receiver.ended()) == (0, 0)
    table.node.mine()
    assert theirs.balance() == 350_000
    assert ours.balance() < 250_000


def test_you_are_paid(table: Table, ours: NodeWallet, theirs: NodeWallet) -> None:
    receive, send = section("You are paid")
    receiver = table.type(receive)
    sender = table.type(send, shown_uri(receiver))
    send.is_printed_by(sender)
    receive.is_printed_by(receiver)
    assert (sender.ended(), receiver.ended()) == (0, 0)
    table.node.mine()
    assert ours.balance() in (349_999, 350_000)
    assert theirs.balance() < 250_000


def test_one_of_you_sleeps(table: Table, ours: NodeWallet, theirs: NodeWallet) -> None:
    send, first, resume, second = section("One of you sleeps")
    receiver = table.type(section("You pay")[0])
    uri = shown_uri(receiver)
    receiver.line("Polling receive request")
    receiver.interrupt()
    for typed in (send, first):
        program = table.type(typed, uri)
        typed.is_printed_by(program)
        assert program.ended() == 0
    assert not table.node.mempool()
    back = table.type(resume)
    resume.is_printed_by(back)
    assert table.type(second).ended() == 0
    txid = back.lines and re.search(r"TXID: ([0-9a-f]{64})", "\n".join(back.lines))
    assert txid
    assert table.node.mempool() == [txid[1]]
    table.node.mine()
    assert theirs.balance() == 350_000
    assert ours.balance() < 250_000


def test_a_request_without_an_amount_is_not_paid_by_payjoin_cli(table: Table) -> None:
    receive, send = section("You are paid")
    receive.words.remove("50_000")
    receiver = table.type(receive)
    sender = table.type(send, shown_uri(receiver))
    sender.line("please specify the amount")
    assert sender.ended() == 1
