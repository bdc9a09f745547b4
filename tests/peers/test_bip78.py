"""Version 1 against real programs: payers without a mailbox at our mailbox, and payees with a server of their own.

(`payjoin-cli --bip78 send` to our mailbox is in test_matrix_pjv2: it can address it, over https, because it posts to whatever `pj=` says
and leaves its fragment away.)
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from pathlib import Path

import pytest

pytest.importorskip("pbk", reason="the lab's clock comes with libbitcoinkernel")

from pjv2 import schedule
from pjv2.app import Channel
from pjv2.backends.channel.rehearsal import RehearsalNode
from pjv2.backends.channel.rehearsal_peer import make_peers
from pjv2.lab.world import LabClock
from pjv2.session.events import Outcome
from pjv2.wire.uri import parse_uri
from tests.peers.counter import (
    ShopCertificate,
    bip78_post,
    books_balance,
    coins_of,
    counter,
    diary,
    mailbox_url,
    original,
    paid,
    server_url,
    shop,
    shop_certificate,
    signed,
)
from tests.peers.desk import CONFIRMED, Post, desk, driven
from tests.peers.peers import need
from tests.peers.programs import Bitcoind, NodeWallet, PayjoinCli, mailroom

pytestmark = pytest.mark.xdist_group("peers")

AMOUNT = 50_000
HAD = (300_000, 200_000)
PATIENCE_OF_BIP78 = 120

Person = Callable[[str, NodeWallet, Post], PayjoinCli]


@pytest.fixture
def pair(node: Bitcoind) -> tuple[NodeWallet, NodeWallet]:
    """Two wallets with a coin each: who pays, and who is paid."""
    return node.wallet("payer", HAD[0]), node.wallet("payee", HAD[1])


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> ShopCertificate:
    return shop_certificate(tmp_path_factory.mktemp("shop"))


# ---------------------------------------------------------------- (a) at our mailbox


@pytest.mark.parametrize("offers", [0, 10_000], ids=["and offers nothing", "and offers a share of the fee"])
async def test_a_post_of_the_first_version_is_answered_while_it_waits_and_the_channel_plan_waits_on(
    offers: int, pair: tuple[NodeWallet, NodeWallet], plain: Post, node: Bitcoind, tmp_path: Path
) -> None:
    payer, payee = pair
    coins = coins_of(payer, payee)
    [peer] = make_peers(tmp_path / "peers", 1)
    lightning = RehearsalNode.open(tmp_path / "lightning", peers=tmp_path / "peers")
    async with counter(tmp_path, payee, plain, channels=lightning) as bob:
        order = Channel(f"{peer.pubkey}@{peer.host}", 25_000, private=True).order()
        driver = bob.driver
        async with schedule.changing(driver.store, driver.entropy) as waiting:
            await waiting.add(order, driver.clock.now(), driver.entropy)
            request = await bob.receive(AMOUNT, channels=[order])
            assert len(await waiting.bind(await driver.load(request.session))) == 1
        sent = original(payer, {request.address: AMOUNT})
        query = f"v=1&additionalfeeoutputindex={sent.change}&maxadditionalfeecontribution={offers}" if offers else "v=1"
        async with diary(bob, request) as facts, driven(request) as ending:
            # The directory gives up after 30 s and says "unavailable"; a proposal is an answer in time.
            status, body = await asyncio.to_thread(bip78_post, mailbox_url(request.uri), sent.psbt, query)
            assert status == 200, body
            txid = await asyncio.to_thread(signed, payer, body)
            assert node.mempool() == [txid]
            await facts.until("Seen")
            node.mine(CONFIRMED)
            closed = await ending
            assert not {"ChannelsIntended", "ChannelsReserved", "ChannelsSecured"} & set(facts.told())
        [intention] = await schedule.read(driver.store)
        memo = (await driver.load(request.session)).created.session
        assert await lightning.channels(memo) == ()
    assert (intention.state, intention.session) == ("waiting", None)
    assert (closed.outcome, closed.txid, closed.channels) == (Outcome.PAID, txid, ())
    tx = paid(node, txid)
    assert tx.spends == coins
    # The output that the payer knows is still there: the address of the request, and nothing of the payment moved elsewhere.
    share = sum(tx.outputs.values()) - tx.outputs[request.address]
    assert tx.outputs[request.address] == HAD[1] + closed.amount_received
    assert share + closed.amount_received + tx.fee == HAD[0]
    if offers:
        # A satoshi of rounding is ours.
        assert closed.amount_received in (AMOUNT - 1, AMOUNT)
    else:
        assert 0 < AMOUNT - closed.amount_received <= AMOUNT // 20
    books_balance(tx, payer, payee, had=HAD, received=closed.amount_received)


async def test_the_same_original_shown_to_two_requests_is_answered_once(
    pair: tuple[NodeWallet, NodeWallet], plain: Post, node: Bitcoind, tmp_path: Path
) -> None:
    payer, payee = pair
    async with desk(tmp_path, payee, plain) as bob:
        first, second = await bob.receive(AMOUNT), await bob.receive(AMOUNT + 1)
        sent = original(payer, {first.address: AMOUNT, second.address: AMOUNT + 1})
        async with diary(bob, first) as facts, driven(first) as ending, driven(second) as other:
            status, body = await asyncio.to_thread(bip78_post, mailbox_url(first.uri), sent.psbt)
            assert status == 200, body
            _, refused = await asyncio.to_thread(bip78_post, mailbox_url(second.uri), sent.psbt)
            assert json.loads(refused)["errorCode"] == "original-psbt-rejected"
            assert first.session not in refused
            # Its payer was told while he waited: nothing else can come of this request.
            late = await other
            txid = await asyncio.to_thread(signed, payer, body)
            assert node.mempool() == [txid]
            await facts.until("Seen")
            node.mine(CONFIRMED)
            closed = await ending
    assert (closed.outcome, closed.txid) == (Outcome.PAID, txid)
    assert (late.outcome, late.txid) == (Outcome.REFUSED, None)
    tx = paid(node, txid)
    books_balance(tx, payer, payee, had=HAD, received=closed.amount_received + AMOUNT + 1)


@pytest.mark.parametrize(
    ("query", "spoil", "code"),
    [
        ("v=3", False, "version-unsupported"),
        ("v=1&minfeerate=-1", False, "original-psbt-rejected"),
        ("v=1", True, "original-psbt-rejected"),
    ],
    ids=["of a version to come", "with a fee rate below nothing", "that is no PSBT"],
)
async def test_a_post_that_we_cannot_take_is_refused_while_it_waits_and_the_original_still_pays(
    query: str,
    spoil: bool,
    code: str,
    pair: tuple[NodeWallet, NodeWallet],
    plain: Post,
    node: Bitcoind,
    tmp_path: Path,
) -> None:
    payer, payee = pair
    async with desk(tmp_path, payee, plain) as bob:
        request = await bob.receive(AMOUNT)
        sent = original(payer, {request.address: AMOUNT})
        text = "cGF5bWVudA==" if spoil else sent.psbt
        async with driven(request) as ending:
            _, body = await asyncio.to_thread(bip78_post, mailbox_url(request.uri), text, query)
            assert json.loads(body)["errorCode"] == code
            closed = await ending
    assert (closed.outcome, closed.txid) == (Outcome.REFUSED, None)
    assert node.call("sendrawtransaction", sent.raw) == sent.txid
    node.mine(CONFIRMED)
    books_balance(paid(node, sent.txid), payer, payee, had=HAD, received=AMOUNT)


async def test_a_payer_who_found_nobody_is_told_so_and_what_he_pays_plainly_is_seen(
    pair: tuple[NodeWallet, NodeWallet], node: Bitcoind, tmp_path: Path
) -> None:
    """The directory hands on nothing that its payer does not wait for any more."""
    program = need("payjoin-mailroom")
    payer, payee = pair
    with (
        mailroom(program, tmp_path / "directory", name="directory", long_poll=1) as directory,
        mailroom(program, tmp_path / "relay", name="relay", long_poll=1) as relay,
    ):
        post = Post(directory, relay)
        async with desk(tmp_path, payee, post) as bob:
            request = await bob.receive(AMOUNT)
            sent = original(payer, {request.address: AMOUNT})
            status, body = await asyncio.to_thread(bip78_post, mailbox_url(request.uri), sent.psbt)
            assert status == 503, body
            assert "unavailable" in body
            async with diary(bob, request) as facts, driven(request) as ending:
                assert node.call("sendrawtransaction", sent.raw) == sent.txid
                await facts.until("Seen")
                node.mine(CONFIRMED)
                closed = await ending
                assert "OriginalReceived" not in facts.told()
    assert (closed.outcome, closed.txid, closed.amount_received) == (Outcome.PAID_OTHERWISE, sent.txid, AMOUNT)
    books_balance(paid(node, sent.txid), payer, payee, had=HAD, received=AMOUNT)


# ---------------------------------------------------------------- (c) at a payee's own server


async def test_we_pay_the_server_of_the_reference_by_a_payjoin(
    pair: tuple[NodeWallet, NodeWallet],
    plain: Post,
    node: Bitcoind,
    person: Person,
    certificate: ShopCertificate,
    tmp_path: Path,
) -> None:
    payer, payee = pair
    coins = coins_of(payer, payee)
    with shop(person("bob", payee, plain), AMOUNT, certificate) as (uri, server):
        async with counter(tmp_path, payer, plain, ca_file=certificate.root) as alice:
            payment = await alice.send(uri, fee_rate=2.0)
            async with diary(alice, payment) as facts, driven(payment) as ending:
                answered = await asyncio.to_thread(server.line, "Responded with Payjoin proposal ([0-9a-f]{64})")
                await facts.until("Seen")
                assert node.mempool() == [answered[1]]
                node.mine(CONFIRMED)
                closed = await ending
    assert (closed.outcome, closed.txid) == (Outcome.PAID, answered[1])
    tx = paid(node, answered[1])
    assert tx.spends == coins
    cost = HAD[0] - payer.balance()
    assert AMOUNT + payment.fee <= cost <= AMOUNT + payment.fee + payment.worst_contribution
    books_balance(tx, payer, payee, had=HAD, received=cost - tx.fee)
    assert payee.balance() == HAD[1] + AMOUNT


async def test_pjos_keeps_the_server_from_substituting_and_the_original_pays_the_address(
    pair: tuple[NodeWallet, NodeWallet],
    plain: Post,
    node: Bitcoind,
    person: Person,
    certificate: ShopCertificate,
    tmp_path: Path,
) -> None:
    """The reference's server always substitutes. Where the URI forbids that, it has nothing to offer, and says "unavailable"."""
    payer, payee = pair
    with shop(person("bob", payee, plain), AMOUNT, certificate) as (uri, server):
        async with counter(tmp_path, payer, plain, ca_file=certificate.root) as alice:
            payment = await alice.send(uri + "&pjos=0", fee_rate=2.0)
            async with diary(alice, payment) as facts, driven(payment) as ending:
                await asyncio.to_thread(server.line, "not allowed when output substitution is disabled")
                refused = await facts.until("ProposalRefused")
                await facts.until("Seen")
                node.mine(CONFIRMED)
                closed = await ending
    assert refused.facts["code"] == "unavailable"
    assert closed.outcome is Outcome.PAID_BY_FALLBACK
    assert closed.txid is not None
    tx = paid(node, closed.txid)
    assert tx.outputs[parse_uri(uri).address] == AMOUNT
    assert tx.fee == payment.fee
    books_balance(tx, payer, payee, had=HAD, received=AMOUNT)


async def test_a_server_without_coins_is_refused_in_our_words_and_the_original_pays(
    plain: Post,
    node: Bitcoind,
    person: Person,
    certificate: ShopCertificate,
    tmp_path: Path,
) -> None:
    payer, payee = node.wallet("payer", HAD[0]), node.wallet("payee")
    with shop(person("bob", payee, plain), AMOUNT, certificate) as (uri, server):
        async with counter(tmp_path, payer, plain, ca_file=certificate.root) as alice:
            payment = await alice.send(uri, fee_rate=2.0)
            async with diary(alice, payment) as facts, driven(payment) as ending:
                await asyncio.to_thread(server.line, "No spendable UTXOs")
                refused = await facts.until("ProposalRefused")
                await facts.until("Seen")
                node.mine(CONFIRMED)
                closed = await ending
    assert refused.facts["code"] == "unavailable"
    assert closed.outcome is Outcome.PAID_BY_FALLBACK
    assert closed.txid is not None
    books_balance(paid(node, closed.txid), payer, payee, had=(HAD[0], 0), received=AMOUNT)


async def test_a_server_that_finds_the_fee_too_high_is_told_in_our_words_and_the_original_pays(
    plain: Post, node: Bitcoind, person: Person, certificate: ShopCertificate, tmp_path: Path
) -> None:
    """A legacy coin weighs more than what a payer with segwit coins offers to pay for, and this server pays next to nothing itself."""
    payer, payee = node.wallet("payer", HAD[0]), node.wallet("payee", HAD[1], kind="legacy")
    bob = person("bob", payee, plain)
    config = bob.directory / "config.toml"
    config.write_text("max_fee_rate = 1\n" + config.read_text())
    with shop(bob, AMOUNT, certificate) as (uri, server):
        async with counter(tmp_path, payer, plain, ca_file=certificate.root) as alice:
            payment = await alice.send(uri, fee_rate=2.0)
            async with diary(alice, payment) as facts, driven(payment) as ending:
                await asyncio.to_thread(server.line, "exceeds maximum allowed feerate")
                refused = await facts.until("ProposalRefused")
                await facts.until("Seen")
                node.mine(CONFIRMED)
                closed = await ending
    assert refused.facts["code"] == "not-enough-money"
    assert closed.outcome is Outcome.PAID_BY_FALLBACK
    assert closed.txid is not None
    books_balance(paid(node, closed.txid), payer, payee, had=HAD, received=AMOUNT)


async def test_a_coin_that_the_server_saw_before_is_refused_in_our_words_and_the_original_pays(
    pair: tuple[NodeWallet, NodeWallet],
    plain: Post,
    node: Bitcoind,
    person: Person,
    certificate: ShopCertificate,
    tmp_path: Path,
) -> None:
    payer, payee = pair
    with shop(person("bob", payee, plain), AMOUNT, certificate) as (uri, server):
        probe = original(payer, {parse_uri(uri).address: AMOUNT})
        status, _ = await asyncio.to_thread(bip78_post, server_url(uri), probe.psbt, root=certificate.root)
        assert status == 200
        async with counter(tmp_path, payer, plain, ca_file=certificate.root) as alice:
            payment = await alice.send(uri, fee_rate=2.0)
            async with diary(alice, payment) as facts, driven(payment) as ending:
                refused = await facts.until("ProposalRefused")
                await facts.until("Seen")
                node.mine(CONFIRMED)
                closed = await ending
        assert server.process.poll() is None
    assert refused.facts["code"] == "original-psbt-rejected"
    assert closed.outcome is Outcome.PAID_BY_FALLBACK
    assert closed.txid is not None
    books_balance(paid(node, closed.txid), payer, payee, had=HAD, received=AMOUNT)


async def test_a_server_with_a_strangers_certificate_gets_no_original(
    pair: tuple[NodeWallet, NodeWallet],
    plain: Post,
    node: Bitcoind,
    person: Person,
    certificate: ShopCertificate,
    tmp_path: Path,
) -> None:
    payer, payee = pair
    stranger = tmp_path / "stranger"
    stranger.mkdir()
    clock = LabClock()
    with shop(person("bob", payee, plain), AMOUNT, certificate) as (uri, server):
        async with counter(tmp_path, payer, plain, ca_file=shop_certificate(stranger).root, clock=clock) as alice:
            payment = await alice.send(uri, fee_rate=2.0)
            async with diary(alice, payment) as facts, driven(payment) as ending:
                why = await facts.until("NotNow")
                assert "certificate" in why.facts["why"]
                await asyncio.to_thread(server.line, "TLS accept error")
                assert node.mempool() == []
                clock.skip(PATIENCE_OF_BIP78 + 1)
                refused = await facts.until("ProposalRefused")
                await facts.until("Seen")
                node.mine(CONFIRMED)
                closed = await ending
        assert not [line for line in server.lines if "Responded" in line or "Error handling request" in line]
    assert refused.facts["code"] is None
    assert closed.outcome is Outcome.PAID_BY_FALLBACK
    assert closed.txid is not None
    books_balance(paid(node, closed.txid), payer, payee, had=HAD, received=AMOUNT)


async def test_a_server_that_is_gone_is_waited_for_two_minutes_and_then_the_original_pays(
    pair: tuple[NodeWallet, NodeWallet],
    plain: Post,
    node: Bitcoind,
    person: Person,
    certificate: ShopCertificate,
    tmp_path: Path,
) -> None:
    payer, payee = pair
    clock = LabClock()
    with shop(person("bob", payee, plain), AMOUNT, certificate) as (uri, _):
        pass
    async with counter(tmp_path, payer, plain, ca_file=certificate.root, clock=clock) as alice:
        payment = await alice.send(uri, fee_rate=2.0)
        async with diary(alice, payment) as facts, driven(payment) as ending:
            await facts.until("NotNow")
            clock.skip(PATIENCE_OF_BIP78 - 20)
            # It is still asked, and nothing is broadcast.
            facts.entries.clear()
            await facts.until("NotNow")
            assert node.mempool() == []
            clock.skip(30)
            refused = await facts.until("ProposalRefused")
            await facts.until("Seen")
            node.mine(CONFIRMED)
            closed = await ending
    assert refused.facts["code"] is None
    assert closed.outcome is Outcome.PAID_BY_FALLBACK
    assert closed.txid is not None
    books_balance(paid(node, closed.txid), payer, payee, had=HAD, received=AMOUNT)
