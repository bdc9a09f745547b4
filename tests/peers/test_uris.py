"""`pjv2 send` as typed, over bitcoind's wallet: payment URIs that offer no payjoin, an unusable one, or ask for what we do not know."""

from __future__ import annotations

import io
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from pjv2.cli.app import run
from pjv2.cli.command import Cli
from tests.peers.counter import books_balance, coins_of, counter, nothing_is_locked, paid
from tests.peers.desk import Post
from tests.peers.programs import Bitcoind, NodeWallet, PayjoinCli

pytestmark = pytest.mark.xdist_group("peers")

AMOUNT = 50_000
HAD = (300_000, 200_000)
MAILBOX = "https://127.0.0.1:1/TQ8DSCYQSQGLN"

Person = Callable[[str, NodeWallet, Post], PayjoinCli]


@dataclass(frozen=True, slots=True)
class Said:
    """How a command ended, and what it said: results, and words for people."""

    code: int
    out: str
    err: str


class Shell:
    """A person's shell, with nobody at the terminal. Everything between the words and the exit code is the real thing."""

    def __init__(self, home: Path, wallet: NodeWallet, post: Post) -> None:
        self.home, self.wallet, self.post = home, wallet, post

    def __call__(self, *words: str) -> Said:
        out, err = io.StringIO(), io.StringIO()
        cli = Cli(
            overrides={"network": "regtest", "store": {"url": f"sqlite:///{self.home / 'pjv2.sqlite'}"}},
            opened=lambda config: counter(self.home, self.wallet, self.post, config=config),
            stdin=io.StringIO(),
            stdout=out,
            stderr=err,
        )
        return Said(run(words, cli=cli), out.getvalue(), err.getvalue())


@pytest.fixture
def payer(node: Bitcoind) -> NodeWallet:
    return node.wallet("payer", HAD[0])


@pytest.fixture
def payee(node: Bitcoind) -> NodeWallet:
    return node.wallet("payee", HAD[1])


@pytest.fixture
def shell(payer: NodeWallet, plain: Post, tmp_path: Path) -> Shell:
    return Shell(tmp_path, payer, plain)


def nothing_was_paid(node: Bitcoind, *wallets: NodeWallet) -> None:
    assert node.mempool() == []
    nothing_is_locked(*wallets)


def test_a_uri_without_payjoin_is_paid_plainly_and_once(
    shell: Shell, payer: NodeWallet, payee: NodeWallet, node: Bitcoind
) -> None:
    uri = f"bitcoin:{payee.address()}?amount=0.0005&label=Shop"
    said = shell("send", uri, "--fee-rate", "2", "--yes")
    assert said.code == 0, said
    [txid] = re.findall("Paid without payjoin, in transaction ([0-9a-f]{64})", said.out)
    assert node.mempool() == [txid]
    again = shell("send", uri, "--fee-rate", "2", "--yes")
    assert again.code == 2
    assert f"this request was paid before, without payjoin, in transaction {txid}" in again.err
    assert node.mempool() == [txid]
    node.mine()
    books_balance(paid(node, txid), payer, payee, had=HAD, received=AMOUNT)


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        ([], "nobody can be asked here"),
        (["--yes", "--require-payjoin"], "--require-payjoin: this request offers no payjoin"),
        (["--yes", "--amount", "40000"], "the request asks for 50000 sat, not 40000"),
    ],
    ids=["and nobody agreed", "and a payjoin is required", "and another amount was named"],
)
def test_a_uri_without_payjoin_is_not_paid(
    flags: list[str], sentence: str, shell: Shell, payer: NodeWallet, payee: NodeWallet, node: Bitcoind
) -> None:
    said = shell("send", f"bitcoin:{payee.address()}?amount=0.0005", "--fee-rate", "2", *flags)
    assert said.code == 2, said
    assert sentence in said.err
    nothing_was_paid(node, payer)


@pytest.mark.parametrize(
    ("parameters", "sentence"),
    [
        ("pj=http://127.0.0.1:1/pay", "the payjoin URL is not encrypted: it is neither https nor an onion service"),
        ("pj=nonsense", "the payjoin URL of the payment URI cannot be used"),
        (f"pj={MAILBOX}", "the payjoin URL names a mailbox without its keys"),
        (f"pj={MAILBOX}%23ex1damaged", "the payjoin URL's fragment has lower-case letters"),
        ("pj=https://127.0.0.1:1/a&pj=https://127.0.0.1:1/b", "the payment URI gives pj twice"),
        ("pjos=0", "pjos is 0 or 1, and comes with pj"),
        ("req-tip=1", "the payment URI requires req-tip, which this wallet does not know"),
        ("req-pj=http://127.0.0.1:1/pay", "the payjoin URL is not encrypted"),
    ],
)
def test_a_uri_that_cannot_be_followed_is_refused_before_anything_is_signed(
    parameters: str, sentence: str, shell: Shell, payer: NodeWallet, payee: NodeWallet, node: Bitcoind
) -> None:
    said = shell("send", f"bitcoin:{payee.address()}?amount=0.0005&{parameters}", "--fee-rate", "2", "--yes")
    assert said.code == 3, said
    assert sentence in said.err
    assert "ask the payee for another one" in said.err
    nothing_was_paid(node, payer)


def test_a_uri_without_an_amount_is_paid_when_somebody_says_how_much(
    shell: Shell, payer: NodeWallet, payee: NodeWallet, node: Bitcoind
) -> None:
    uri = f"bitcoin:{payee.address()}"
    said = shell("send", uri, "--fee-rate", "2", "--yes")
    assert said.code == 2, said
    assert "the request names no amount: say how much to pay with --amount" in said.err
    nothing_was_paid(node, payer)
    said = shell("send", uri, "--fee-rate", "2", "--yes", "--amount", str(AMOUNT))
    assert said.code == 0, said
    [txid] = node.mempool()
    assert txid in said.out
    node.mine()
    books_balance(paid(node, txid), payer, payee, had=HAD, received=AMOUNT)


def test_a_request_of_the_reference_without_an_amount_is_paid_by_a_payjoin_when_somebody_says_how_much(
    shell: Shell, payer: NodeWallet, payee: NodeWallet, plain: Post, node: Bitcoind, person: Person
) -> None:
    coins = coins_of(payer, payee)
    with person("bob", payee, plain).receiving(AMOUNT) as (asked, receiver):
        uri = re.sub(r"amount=[0-9.]+&", "", asked)
        assert "amount" not in uri
        said = shell("send", uri, "--fee-rate", "2", "--yes")
        assert said.code == 2, said
        assert "the request names no amount: say how much to pay" in said.err
        nothing_was_paid(node, payer)
        said = shell("send", uri, "--fee-rate", "2", "--yes", "--amount", str(AMOUNT), "--until", "seen")
        assert said.code == 0, said
        [txid] = node.mempool()
        receiver.line("Payjoin transaction detected in the mempool")
        again = shell("send", uri, "--fee-rate", "2", "--yes", "--amount", str(AMOUNT))
    assert again.code == 2, again
    assert "this request was paid before by session" in again.err
    node.mine()
    tx = paid(node, txid)
    assert tx.spends == coins
    books_balance(tx, payer, payee, had=HAD, received=AMOUNT)
