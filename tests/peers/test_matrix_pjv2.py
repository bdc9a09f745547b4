"""pjv2 and payjoin-cli pay each other, over the reference's mailrooms and real wallets of a real node."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path

import pytest

from pjv2.app import PublicEvent
from pjv2.session.events import Outcome
from tests.peers.desk import CONFIRMED, Post, desk, driven
from tests.peers.programs import Bitcoind, NodeWallet, PayjoinCli

pytestmark = pytest.mark.xdist_group("peers")

Person = Callable[[str, NodeWallet, Post], PayjoinCli]
OVER = pytest.mark.parametrize("over", ["plain", "secure"])


@pytest.fixture
def post(over: str, request: pytest.FixtureRequest) -> Post:
    found: Post = request.getfixturevalue(over)
    return found


@pytest.fixture
def pair(node: Bitcoind) -> tuple[NodeWallet, NodeWallet]:
    """Two wallets with a coin each: who pays, and who is paid."""
    return node.wallet("payer", 300_000), node.wallet("payee", 200_000)


def spent_by(node: Bitcoind, txid: str) -> set[tuple[str, int]]:
    return {(txin["txid"], txin["vout"]) for txin in node.call("getrawtransaction", txid, 1)["vin"]}


def posted(payer: PayjoinCli, uri: str) -> str:
    """A payment that was interrupted after its Original was posted; its session."""
    with payer.run("send", uri, "--fee-rate", "2") as sender:
        session = sender.line(r"\[Sender +(\S+)\] Posted Original PSBT")[1]
        sender.interrupt()
    return session


async def told(facts: asyncio.Queue[PublicEvent], event: str) -> None:
    """Waits until a session tells an event of this name."""
    while (await facts.get()).event != event:
        pass


@OVER
async def test_the_reference_pays_our_request(
    pair: tuple[NodeWallet, NodeWallet], post: Post, node: Bitcoind, person: Person, tmp_path: Path
) -> None:
    payer, payee = pair
    coins = payer.coins() | payee.coins()
    alice = person("alice", payer, post)
    async with desk(tmp_path, payee, post) as bob:
        request = await bob.receive(50_000)
        async with driven(request) as ending:
            txid = await asyncio.to_thread(alice.send, request.uri)
            node.mine(CONFIRMED)
            closed = await ending
    assert (closed.outcome, closed.txid) == (Outcome.PAID, txid)
    assert spent_by(node, txid) == coins
    assert payee.balance() == 200_000 + closed.amount_received
    # The payer's share of the fee is what he offered; a satoshi of rounding is ours.
    assert closed.amount_received in (49_999, 50_000)


@OVER
async def test_we_pay_a_request_of_the_reference(
    pair: tuple[NodeWallet, NodeWallet], post: Post, node: Bitcoind, person: Person, tmp_path: Path
) -> None:
    payer, payee = pair
    coins = payer.coins() | payee.coins()
    with person("bob", payee, post).receiving(50_000) as (uri, receiver):
        async with desk(tmp_path, payer, post) as alice:
            payment = await alice.send(uri, fee_rate=2.0)
            async with driven(payment) as ending:
                await asyncio.to_thread(receiver.line, "Payjoin transaction detected in the mempool")
                node.mine(CONFIRMED)
                closed = await ending
        assert receiver.ended() == 0
    assert closed.outcome is Outcome.PAID
    assert closed.txid is not None
    assert spent_by(node, closed.txid) == coins
    assert payee.balance() == 250_000


@pytest.mark.parametrize("over", ["secure"])
async def test_a_payer_who_speaks_only_bip78_pays_our_request(
    pair: tuple[NodeWallet, NodeWallet], post: Post, node: Bitcoind, person: Person, tmp_path: Path
) -> None:
    payer, payee = pair
    coins = payer.coins() | payee.coins()
    alice = person("alice", payer, post)
    async with desk(tmp_path, payee, post) as bob:
        request = await bob.receive(50_000)
        async with driven(request) as ending:
            txid = await asyncio.to_thread(alice.send, request.uri, v1=True)
            node.mine(CONFIRMED)
            closed = await ending
    assert (closed.outcome, closed.txid) == (Outcome.PAID, txid)
    assert spent_by(node, txid) == coins


@pytest.mark.parametrize("over", ["plain"])
async def test_a_payer_with_legacy_coins_pays_our_request(
    post: Post, node: Bitcoind, person: Person, tmp_path: Path
) -> None:
    # payjoin-cli cannot pay from nested or taproot coins: it panics over the weight of inputs it lists, its own included.
    payer, payee = node.wallet("payer", 300_000, kind="legacy"), node.wallet("payee", 200_000)
    coins = payer.coins() | payee.coins()
    alice = person("alice", payer, post)
    async with desk(tmp_path, payee, post) as bob:
        request = await bob.receive(50_000)
        async with driven(request) as ending:
            txid = await asyncio.to_thread(alice.send, request.uri)
            node.mine(CONFIRMED)
            closed = await ending
    assert (closed.outcome, closed.txid) == (Outcome.PAID, txid)
    assert spent_by(node, txid) == coins


@pytest.mark.parametrize("kind", ["legacy", "p2sh-segwit", "bech32m"])
@pytest.mark.parametrize("over", ["plain"])
async def test_we_pay_with_every_kind_of_coin(
    kind: str, post: Post, node: Bitcoind, person: Person, tmp_path: Path
) -> None:
    payer, payee = node.wallet("payer", 300_000, kind=kind), node.wallet("payee", 200_000)
    coins = payer.coins() | payee.coins()
    with person("bob", payee, post).receiving(50_000) as (uri, _):
        async with desk(tmp_path, payer, post) as alice:
            payment = await alice.send(uri, fee_rate=2.0)
            async with alice.hub.listening(payment.session) as facts, driven(payment) as ending:
                # Not when payjoin-cli says so: where an input is no native segwit it does not look, and says it saw the payjoin at once.
                await told(facts, "Seen")
                node.mine(CONFIRMED)
                closed = await ending
    assert closed.outcome is Outcome.PAID
    assert closed.txid is not None
    assert spent_by(node, closed.txid) == coins


@pytest.mark.parametrize("over", ["secure"])
async def test_the_reference_sleeps_while_we_pay_it(
    pair: tuple[NodeWallet, NodeWallet], post: Post, node: Bitcoind, person: Person, tmp_path: Path
) -> None:
    payer, payee = pair
    coins = payer.coins() | payee.coins()
    bob = person("bob", payee, post)
    with bob.receiving(50_000) as (uri, receiver):
        receiver.line("Polling receive request")
        assert receiver.interrupt()
    async with desk(tmp_path, payer, post) as alice:
        payment = await alice.send(uri, fee_rate=2.0)
        async with driven(payment) as ending:
            printed = await asyncio.to_thread(bob.resume)
            assert any("Payjoin transaction detected in the mempool" in line for line in printed)
            node.mine(CONFIRMED)
            closed = await ending
    assert closed.outcome is Outcome.PAID
    assert closed.txid is not None
    assert spent_by(node, closed.txid) == coins


@pytest.mark.parametrize("over", ["secure"])
async def test_we_sleep_while_the_reference_pays_us(
    pair: tuple[NodeWallet, NodeWallet], post: Post, node: Bitcoind, person: Person, tmp_path: Path
) -> None:
    payer, payee = pair
    coins = payer.coins() | payee.coins()
    async with desk(tmp_path, payee, post) as bob:
        request = await bob.receive(50_000)
    with person("alice", payer, post).run("send", request.uri, "--fee-rate", "2") as sender:
        sender.line("Posted Original PSBT")
        async with desk(tmp_path, payee, post) as bob, driven(bob.session(request.session)) as ending:
            sent = await asyncio.to_thread(sender.line, r"Payjoin sent\. TXID: ([0-9a-f]{64})")
            node.mine(CONFIRMED)
            closed = await ending
    assert (closed.outcome, closed.txid) == (Outcome.PAID, sent[1])
    assert spent_by(node, sent[1]) == coins


@pytest.mark.parametrize("over", ["secure"])
async def test_a_payer_who_gives_up_pays_us_by_the_original(
    pair: tuple[NodeWallet, NodeWallet], post: Post, node: Bitcoind, person: Person, tmp_path: Path
) -> None:
    payer, payee = pair
    coins = payer.coins()
    alice = person("alice", payer, post)
    async with desk(tmp_path, payee, post) as bob:
        request = await bob.receive(50_000)
        session = posted(alice, request.uri)
        async with bob.hub.listening(request.session) as facts, driven(request) as ending:
            await told(facts, "ProposalPosted")
            with alice.run("cancel", session) as giving_up:
                txid = giving_up.line("Broadcasted fallback transaction txid: ([0-9a-f]{64})")[1]
                assert giving_up.ended() == 0
            node.mine(CONFIRMED)
            closed = await ending
    assert (closed.outcome, closed.txid, closed.amount_received) == (Outcome.PAID_BY_FALLBACK, txid, 50_000)
    assert spent_by(node, txid) == coins


@pytest.mark.parametrize("over", ["secure"])
async def test_a_payer_who_shows_the_same_coin_twice_is_refused_in_words_it_understands(
    pair: tuple[NodeWallet, NodeWallet], post: Post, person: Person, tmp_path: Path
) -> None:
    payer, payee = pair
    async with desk(tmp_path, payee, post) as bob:
        first, second = await bob.receive(50_000), await bob.receive(60_000)
        posted(person("alice", payer, post), first.uri)
        async with bob.hub.listening(first.session) as facts, driven(first):
            await told(facts, "ProposalPosted")
        payer.call("lockunspent", True)
        async with bob.hub.listening(second.session) as facts, driven(second):
            with person("mallory", payer, post).run("send", second.uri, "--fee-rate", "2") as sender:
                await told(facts, "RefusalPosted")
                await asyncio.to_thread(sender.line, "original-psbt-rejected")
                assert await asyncio.to_thread(sender.ended) == 1
