"""When it does not go well between pjv2 and payjoin-cli: refusals, silence, outages, and payers who change their mind.

Every story ends with a transaction in bitcoind, or with a precise refusal and nothing moved; nothing stays locked.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

pytest.importorskip("pbk", reason="the lab's clock comes with libbitcoinkernel")

from pjv2.lab.world import LabClock
from pjv2.session import is_closed
from pjv2.session.events import Outcome
from tests.peers.counter import (
    books_balance,
    coins_of,
    counter,
    diary,
    nothing_is_locked,
    one_step,
    paid,
)
from tests.peers.desk import CONFIRMED, Post, desk, driven
from tests.peers.peers import need
from tests.peers.programs import Bitcoind, Mailroom, NodeWallet, PayjoinCli, mailroom

pytestmark = pytest.mark.xdist_group("peers")

AMOUNT = 50_000
HAD = (300_000, 200_000)

Person = Callable[[str, NodeWallet, Post], PayjoinCli]


@pytest.fixture
def pair(node: Bitcoind) -> tuple[NodeWallet, NodeWallet]:
    """Two wallets with a coin each: who pays, and who is paid."""
    return node.wallet("payer", HAD[0]), node.wallet("payee", HAD[1])


class Rooms:
    """A directory and two relays that answer an empty poll after a second, and can be stopped and started where they were."""

    def __init__(self, home: Path) -> None:
        self._program = need("payjoin-mailroom")
        self._home = home
        self._stacks: dict[str, ExitStack] = {}
        self.rooms: dict[str, Mailroom] = {}
        for name in ("directory", "relay-1", "relay-2"):
            self.start(name)

    @property
    def post(self) -> Post:
        return Post(self.rooms["directory"], self.rooms["relay-1"])

    @property
    def relays(self) -> list[Mailroom]:
        return [self.rooms["relay-1"], self.rooms["relay-2"]]

    def start(self, name: str) -> None:
        port = (urlsplit(self.rooms[name].url).port or 0) if name in self.rooms else 0
        stack = self._stacks[name] = ExitStack()
        made = mailroom(self._program, self._home / name, name=name, long_poll=1, port=port)
        self.rooms[name] = stack.enter_context(made)

    def stop(self, name: str) -> None:
        self._stacks[name].close()

    def restart(self, name: str) -> None:
        self.stop(name)
        self.start(name)

    def close(self) -> None:
        for stack in self._stacks.values():
            stack.close()


@pytest.fixture
def rooms(tmp_path: Path) -> Iterator[Rooms]:
    made = Rooms(tmp_path)
    try:
        yield made
    finally:
        made.close()


def posted(payer: PayjoinCli, uri: str) -> str:
    """A payment that was interrupted after its Original was posted; its session."""
    with payer.run("send", uri, "--fee-rate", "2") as sender:
        session = sender.line(r"\[Sender +(\S+)\] Posted Original PSBT")[1]
        sender.interrupt()
    return session


def given_up(payer: PayjoinCli, session: str) -> str:
    """payjoin-cli broadcasts its Original; the txid."""
    with payer.run("cancel", session) as program:
        txid = program.line("Broadcasted fallback transaction txid: ([0-9a-f]{64})")[1]
        assert program.ended() == 0
    return txid


def kept_original(payer: PayjoinCli, session: str) -> str:
    """After a refusal payjoin-cli broadcasts nothing: it prints its Original for a person who does. The txid."""
    with payer.run("cancel", session) as program:
        program.line("Broadcast the original transaction manually")
        raw = program.line("^[0-9a-f]{100,}$")[0]
        assert program.ended() == 0
    return str(payer.wallet.node.call("sendrawtransaction", raw))


def went_on(payer: PayjoinCli) -> str:
    """payjoin-cli goes on with its payment; the payjoin's txid."""
    with payer.run("resume") as program:
        txid = program.line(r"Payjoin sent\. TXID: ([0-9a-f]{64})")[1]
        assert program.ended() == 0
    return txid


# ---------------------------------------------------------------- payjoin-cli pays us, and is refused


@pytest.mark.parametrize(
    ("policy", "asked", "write"),
    [
        ({}, AMOUNT + 1, lambda uri: uri.replace("amount=0.00050001", "amount=0.0005")),
        ({"min_fee_rate": 5}, AMOUNT, lambda uri: uri),
    ],
    ids=["less than was asked", "at a fee rate below ours"],
)
async def test_the_reference_shows_our_refusal_of_an_original_that_pays(
    policy: dict[str, Any],
    asked: int,
    write: Callable[[str], str],
    pair: tuple[NodeWallet, NodeWallet],
    plain: Post,
    node: Bitcoind,
    person: Person,
    tmp_path: Path,
) -> None:
    payer, payee = pair
    alice = person("alice", payer, plain)
    async with counter(tmp_path, payee, plain, policy=policy) as bob:
        request = await bob.receive(asked)
        async with driven(request) as ending:
            with alice.run("send", write(request.uri), "--fee-rate", "2") as sender:
                await asyncio.to_thread(sender.line, r"\] Fatal error: The receiver rejected the original PSBT\.")
                session = sender.line(r"Run `payjoin-cli cancel (\S+)`")[1]
                assert await asyncio.to_thread(sender.ended) == 1
            closed = await ending
    assert (closed.outcome, closed.txid, closed.amount_received) == (Outcome.REFUSED, None, 0)
    assert node.mempool() == []
    nothing_is_locked(payee)
    txid = kept_original(alice, session)
    assert node.mempool() == [txid]
    node.mine()
    books_balance(paid(node, txid), payer, payee, had=HAD, received=AMOUNT)


async def test_a_payment_that_is_too_small_for_a_payjoin_arrives_by_the_original(
    pair: tuple[NodeWallet, NodeWallet], plain: Post, node: Bitcoind, person: Person, tmp_path: Path
) -> None:
    """A request for any amount, and a payer who gives less than we would join: nobody refuses his money."""
    payer, payee = pair
    alice = person("alice", payer, plain)
    async with counter(tmp_path, payee, plain, policy={"min_amount": AMOUNT + 1}) as bob:
        request = await bob.receive(None)
        async with diary(bob, request) as facts, driven(request) as ending:
            await asyncio.to_thread(posted, alice, request.uri.replace("?", "?amount=0.0005&", 1))
            await facts.until("Seen")
            [txid] = node.mempool()
            node.mine(CONFIRMED)
            closed = await ending
            assert "ProposalPosting" not in facts.told()
    assert (closed.outcome, closed.txid, closed.amount_received) == (Outcome.PAID_BY_FALLBACK, txid, AMOUNT)
    books_balance(paid(node, txid), payer, payee, had=HAD, received=AMOUNT)


async def test_a_request_that_expired_gets_no_original_and_no_answer(
    pair: tuple[NodeWallet, NodeWallet], rooms: Rooms, node: Bitcoind, person: Person, tmp_path: Path
) -> None:
    payer, payee = pair
    earlier = LabClock()
    earlier.skip(-7_200)
    async with counter(tmp_path, payee, rooms.post, clock=earlier) as bob:
        request = await bob.receive(AMOUNT, expire_in=3_600)
    with person("alice", payer, rooms.post).run("send", request.uri, "--fee-rate", "2") as sender:
        sender.line("Broadcast the original transaction manually")
        assert sender.ended() == 0
        assert not [line for line in sender.lines if "Posted Original" in line]
    async with desk(tmp_path, payee, rooms.post) as bob:
        again = bob.session(request.session)
        async with diary(bob, again) as facts, driven(again) as ending:
            closed = await ending
            assert "OriginalReceived" not in facts.told()
    assert (closed.outcome, closed.txid) == (Outcome.EXPIRED, None)
    assert node.mempool() == []
    # payjoin-cli keeps the coin of a payment that it cannot make locked.
    assert payer.call("lockunspent", True)
    nothing_is_locked(payer, payee)
    assert (payer.balance(), payee.balance()) == HAD


async def test_a_payer_whom_nobody_answers_waits_and_then_pays_us_by_the_original(
    pair: tuple[NodeWallet, NodeWallet], rooms: Rooms, node: Bitcoind, person: Person, tmp_path: Path
) -> None:
    payer, payee = pair
    alice = person("alice", payer, rooms.post)
    async with desk(tmp_path, payee, rooms.post) as bob:
        request = await bob.receive(AMOUNT)
    with alice.run("send", request.uri, "--fee-rate", "2") as sender:
        session = sender.line(r"\[Sender +(\S+)\] No response yet")[1]
        sender.interrupt()
    txid = given_up(alice, session)
    assert node.mempool() == [txid]
    async with desk(tmp_path, payee, rooms.post) as bob:
        again = bob.session(request.session)
        async with diary(bob, again) as facts, driven(again) as ending:
            await facts.until("OriginalAccepted")
            await facts.until("Seen")
            node.mine(CONFIRMED)
            closed = await ending
            assert "ProposalPosting" not in facts.told()
    assert (closed.outcome, closed.txid, closed.amount_received) == (Outcome.PAID_BY_FALLBACK, txid, AMOUNT)
    books_balance(paid(node, txid), payer, payee, had=HAD, received=AMOUNT)


# ---------------------------------------------------------------- things stop and come back


async def test_we_stop_after_every_step_while_the_reference_waits_and_it_is_paid_from_once(
    pair: tuple[NodeWallet, NodeWallet], plain: Post, node: Bitcoind, person: Person, tmp_path: Path
) -> None:
    payer, payee = pair
    coins = coins_of(payer, payee)
    async with desk(tmp_path, payee, plain) as bob:
        request = await bob.receive(AMOUNT)
    stages: list[str] = []
    with person("alice", payer, plain).run("send", request.uri, "--fee-rate", "2") as sender:
        sender.line("Posted Original PSBT")
        while "Monitor" not in stages:
            # A fresh installation each time: nothing is left but what is on the disk.
            async with desk(tmp_path, payee, plain) as bob:
                stages.append((await one_step(bob, request.session)).stage.value)
        txid = sender.line(r"Payjoin sent\. TXID: ([0-9a-f]{64})")[1]
        assert sender.ended() == 0
    assert len(stages) >= 5, stages
    node.mine(CONFIRMED)
    async with desk(tmp_path, payee, plain) as bob:
        state = await bob.driver.drive(request.session, is_closed)
    closed = state.closed
    assert closed is not None
    assert (closed.outcome, closed.txid) == (Outcome.PAID, txid)
    tx = paid(node, txid)
    assert tx.spends == coins
    books_balance(tx, payer, payee, had=HAD, received=closed.amount_received)
    assert closed.amount_received in (AMOUNT - 1, AMOUNT)


async def test_a_directory_that_restarts_between_the_steps_loses_no_payment(
    pair: tuple[NodeWallet, NodeWallet], rooms: Rooms, node: Bitcoind, person: Person, tmp_path: Path
) -> None:
    payer, payee = pair
    alice = person("alice", payer, rooms.post)
    async with desk(tmp_path, payee, rooms.post) as bob:
        request = await bob.receive(AMOUNT)
        await bob.run_once(budget=2)
        async with diary(bob, request) as facts, driven(request) as ending:
            await asyncio.to_thread(rooms.stop, "directory")
            await facts.until("NotNow")
            await asyncio.to_thread(rooms.start, "directory")
            await asyncio.to_thread(posted, alice, request.uri)
            await asyncio.to_thread(rooms.restart, "directory")
            await facts.until("ProposalPosted")
            await asyncio.to_thread(rooms.restart, "directory")
            txid = await asyncio.to_thread(went_on, alice)
            assert node.mempool() == [txid]
            node.mine(CONFIRMED)
            closed = await ending
    assert (closed.outcome, closed.txid) == (Outcome.PAID, txid)
    books_balance(paid(node, txid), payer, payee, had=HAD, received=closed.amount_received)


async def test_the_second_relay_takes_over_when_the_first_is_gone(
    pair: tuple[NodeWallet, NodeWallet], rooms: Rooms, node: Bitcoind, tmp_path: Path
) -> None:
    payer, payee = pair
    directory = rooms.rooms["directory"]
    async with counter(tmp_path, payee, rooms.post, relays=rooms.relays) as bob:
        request = await bob.receive(AMOUNT)
        await bob.run_once(budget=2)
        async with driven(request) as ending:
            await asyncio.to_thread(rooms.stop, "relay-1")
            alice = PayjoinCli(
                need("payjoin-cli"),
                tmp_path / "alice",
                payer,
                relays=rooms.relays,
                directories=[directory],
                keys=directory.keys_file(),
            )
            txid = await asyncio.to_thread(alice.send, request.uri)
            assert node.mempool() == [txid]
            node.mine(CONFIRMED)
            closed = await ending
    assert (closed.outcome, closed.txid) == (Outcome.PAID, txid)
    books_balance(paid(node, txid), payer, payee, had=HAD, received=closed.amount_received)


# ---------------------------------------------------------------- payers who change their mind


@pytest.mark.parametrize("answered", [False, True], ids=["before we look", "after our proposal"])
async def test_a_payer_who_bumps_the_fee_of_his_original_pays_us_all_the_same(
    answered: bool,
    pair: tuple[NodeWallet, NodeWallet],
    plain: Post,
    node: Bitcoind,
    person: Person,
    tmp_path: Path,
) -> None:
    payer, payee = pair
    alice = person("alice", payer, plain)
    async with desk(tmp_path, payee, plain) as bob:
        request = await bob.receive(AMOUNT)
        session = posted(alice, request.uri)

        def bumped() -> str:
            return str(payer.call("bumpfee", given_up(alice, session), {"fee_rate": 10})["txid"])

        txid = "" if answered else bumped()
        async with diary(bob, request) as facts, driven(request) as ending:
            if answered:
                await facts.until("ProposalPosted")
                txid = await asyncio.to_thread(bumped)
            while not (seen := [fact for fact in facts.entries if fact.facts.get("txid") == txid]):
                facts.entries.append(await facts.queue.get())
            assert seen[0].event == "Seen"
            assert node.mempool() == [txid]
            node.mine(CONFIRMED)
            closed = await ending
    assert (closed.outcome, closed.txid, closed.amount_received) == (Outcome.PAID_OTHERWISE, txid, AMOUNT)
    books_balance(paid(node, txid), payer, payee, had=HAD, received=AMOUNT)


async def test_an_ordinary_wallet_pays_the_address_of_a_request(
    pair: tuple[NodeWallet, NodeWallet], rooms: Rooms, node: Bitcoind, tmp_path: Path
) -> None:
    payer, payee = pair
    async with desk(tmp_path, payee, rooms.post) as bob:
        request = await bob.receive(AMOUNT)
        async with diary(bob, request) as facts, driven(request) as ending:
            txid = payer.call("sendtoaddress", request.address, "0.0005")
            await facts.until("Seen")
            assert node.mempool() == [txid]
            node.mine(CONFIRMED)
            # The mailbox is asked once more before the request ends: an Original may lie there.
            closed = await ending
    assert (closed.outcome, closed.txid, closed.amount_received) == (Outcome.PAID_OTHERWISE, txid, AMOUNT)
    books_balance(paid(node, txid), payer, payee, had=HAD, received=AMOUNT)


# ---------------------------------------------------------------- we pay payjoin-cli, and it refuses
#
# Its receiver of version 2 can be made to say "original-psbt-rejected" only. What else goes wrong there (no coins, a fee above its
# limit) it takes for passing, and answers nothing; its server of version 1 says so, see test_bip78.


async def test_a_receiver_that_saw_our_coin_before_is_told_in_our_words_and_the_original_pays(
    pair: tuple[NodeWallet, NodeWallet], plain: Post, node: Bitcoind, person: Person, tmp_path: Path
) -> None:
    payer, payee = pair
    bob = person("bob", payee, plain)
    # An installation of ours that is lost after its Original left, and a new one that shows the same coin again.
    async with counter(tmp_path / "lost", payer, plain) as alice:
        with bob.receiving(AMOUNT) as (uri, receiver):
            payment = await alice.send(uri, fee_rate=2.0)
            while (await one_step(alice, payment.session)).stage.value != "PollingForProposal":
                pass
            await asyncio.to_thread(receiver.line, "Response successful")
    assert payer.call("lockunspent", True)
    async with counter(tmp_path / "alice", payer, plain) as alice:
        with bob.receiving(AMOUNT) as (uri, receiver):
            payment = await alice.send(uri, fee_rate=2.0)
            async with diary(alice, payment) as facts, driven(payment) as ending:
                await asyncio.to_thread(receiver.ended)
                printed = await asyncio.to_thread(bob.resume)
                assert any("Session delivered error reply" in line for line in printed), printed
                refused = await facts.until("ProposalRefused")
                await facts.until("Seen")
                node.mine(CONFIRMED)
                closed = await ending
    assert refused.facts["code"] == "original-psbt-rejected"
    assert closed.outcome is Outcome.PAID_BY_FALLBACK
    assert closed.txid is not None
    books_balance(paid(node, closed.txid), payer, payee, had=HAD, received=AMOUNT)


async def test_a_receiver_that_is_killed_is_paid_by_the_original_when_its_time_is_over(
    pair: tuple[NodeWallet, NodeWallet], plain: Post, node: Bitcoind, person: Person, tmp_path: Path
) -> None:
    payer, payee = pair
    clock = LabClock()
    with person("bob", payee, plain).receiving(AMOUNT) as (uri, receiver):
        receiver.line("Polling receive request")
        receiver.process.kill()
        receiver.ended()
    async with counter(tmp_path, payer, plain, clock=clock) as alice:
        payment = await alice.send(uri, fee_rate=2.0)
        async with diary(alice, payment) as facts, driven(payment) as ending:
            await facts.until("OriginalPosted")
            assert node.mempool() == []
            clock.skip(86_400 + 601)
            await facts.until("FallbackBroadcasted")
            await facts.until("Seen")
            node.mine(CONFIRMED)
            closed = await ending
    assert closed.outcome is Outcome.PAID_BY_FALLBACK
    assert closed.txid is not None
    tx = paid(node, closed.txid)
    assert tx.fee == payment.fee
    books_balance(tx, payer, payee, had=HAD, received=AMOUNT)
