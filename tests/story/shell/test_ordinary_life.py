"""What happens to payments on ordinary days, as both people's shells tell it: the last line, the exit code, the books, the balances."""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace

import pytest

from pjv2.cli.plainly import HELD
from pjv2.psbt.tx import Psbt, PsbtInput, PsbtOutput, Tx, TxIn, TxOut
from pjv2.psbt.verify import SentOriginal, make_sent_original
from pjv2.session.monitor import STUCK
from pjv2.units import FeeRate, Outpoint
from tests.story.lab.kit import AMOUNT, DAY, TWO, Story, Stranger, change_script, spend, stage
from tests.story.shell.kit import Running, Shell, balance, books, code, people


def ordinary(created: dict[str, object], amount: str = "0.0015") -> str:
    """What a wallet without payjoin reads of a request."""
    return f"bitcoin:{created['address']}?amount={amount}"


async def forget_locks(s: Story, payer: Shell) -> None:
    """An ordinary payment holds its coins for a day, so that no chain source that lags makes it spend them twice."""
    s.world.clock.skip(HELD + 1)
    await payer.party.wallet.coins()


# ---------------------------------------------------------------- other amounts, other ways


async def test_an_ordinary_wallet_pays_the_address_of_the_request() -> None:
    async with stage() as s:
        bob, alice = await people(s)
        receiving = bob.start("--json", "receive", "150_000", "--until", "closed")
        created = await receiving.line("Created")
        paying = await alice("--json", "send", ordinary(created), "--fee-rate", "2")
        assert code(paying) == 0
        first, last = paying.lines
        assert (last["event"], last["outcome"], last["payjoin"]) == ("Closed", "PaidOtherwise", False)
        await receiving.line("Seen", what="address", amount=AMOUNT, txid=last["txid"])
        await s.bury()
        assert await receiving.code() == 0
        closed = receiving.lines[-1]
        assert (closed["event"], closed["outcome"], closed["txid"]) == ("Closed", "PaidOtherwise", last["txid"])
        assert (closed["amount_requested"], closed["amount_received"]) == (AMOUNT, AMOUNT)
        his = await books(bob, created["session"])
        his.tells("The request was made.", f"address {last['txid']} is in sight, in block", "PaidOtherwise, 150000 sat")
        assert await balance(bob) == 200_000 + AMOUNT
        assert await balance(alice) == 500_000 - AMOUNT - first["fee"]
        await forget_locks(s, alice)


async def test_an_ordinary_wallet_pays_less_and_both_are_told_what_is_missing() -> None:
    async with stage() as s:
        bob, alice = await people(s)
        made = await bob("--json", "receive", "150_000", "--detach")
        created = made.lines[0]
        refused = await alice("--json", "send", created["uri"], "--amount", "149_999")
        assert (code(refused), refused.lines[-1]["error"]) == (2, "WrongUsage")
        assert "asks for 150000 sat, not 149999" in refused.stderr
        paying = await alice("--json", "send", ordinary(created, "0.001"), "--fee-rate", "2")
        assert code(paying) == 0
        await s.bury()
        receiving = await bob("--json", "resume")
        assert code(receiving) == 0
        closed = receiving.lines[-2]
        assert (closed["outcome"], closed["amount_requested"], closed["amount_received"]) == (
            "PaidOtherwise",
            AMOUNT,
            100_000,
        )
        his = await books(bob, created["session"])
        his.tells("PaidOtherwise, 100000 sat", "It paid 50000 sat less than was asked for")
        assert await balance(bob) == 300_000
        assert await balance(alice) == 400_000 - paying.lines[0]["fee"]
        await forget_locks(s, alice)


async def test_an_original_that_pays_less_is_refused_and_never_broadcast() -> None:
    async with stage() as s:
        bob, alice = await people(s)
        receiving = bob.start("--json", "receive", "150_000")
        created = await receiving.line("Created")
        payer = Stranger(s, alice.party, SimpleNamespace(uri=created["uri"]))
        await payer.post(await payer.original(AMOUNT - 1))
        assert await receiving.code() == 3
        closed = receiving.lines[-1]
        assert (closed["outcome"], closed["amount_received"], closed["txid"]) == ("Refused", 0, None)
        assert b"original-psbt-rejected" in await payer.reply()
        assert not s.in_mempool()
        his = await books(bob, created["session"])
        his.tells("The payer's Original arrived.", "refused (original-psbt-rejected)", "The payer was told.", "Refused")
        assert (await balance(bob), await balance(alice)) == (200_000, 500_000)


async def test_an_original_that_pays_more_is_taken_as_it_is() -> None:
    async with stage() as s:
        bob, alice = await people(s)
        receiving = bob.start("receive", "150_000", "--until", "closed")
        await receiving.until(lambda running: "\n" in running.stdout)
        payer = Stranger(s, alice.party, SimpleNamespace(uri=receiving.stdout.split("\n")[0]))
        sent = await payer.original(AMOUNT + 1_000)
        await payer.post(sent)
        tx = await payer.sign(sent, await payer.reply())
        await receiving.says("the payjoin is in the mempool: waiting for a block")
        await s.bury()
        assert await receiving.code() == 0
        (row,) = await bob.party.store.rows()
        his = (await books(bob, row.session)).facts
        assert (his["outcome"], his["txid"], his["amount_requested"]) == ("Paid", tx.txid, AMOUNT)
        assert AMOUNT < his["amount_received"] <= AMOUNT + 1_000
        assert f"Paid: {his['amount_received']:_} sat in {tx.txid}" in receiving.stdout
        assert "less than" not in receiving.stdout
        assert await balance(bob) == 200_000 + his["amount_received"]
        assert await balance(alice) == 500_000 - his["amount_received"] - s.fee(tx.txid)


async def paid(s: Story, bob: Shell, alice: Shell, *more: str) -> tuple[Running, Running, str]:
    """A request and its payment under way, both up to the payjoin in the mempool; and its txid."""
    receiving = bob.start("--json", "receive", "150_000", "--until", "closed", *more)
    uri = (await receiving.line("Created"))["uri"]
    sending = alice.start("--json", "send", uri, "--fee-rate", "2", "--until", "closed")
    await sending.line("Seen", what="payjoin")
    seen = await receiving.line("Seen", what="payjoin")
    return receiving, sending, seen["txid"]


async def test_who_pays_twice_is_stopped_by_his_wallet_or_told_of_by_the_payee() -> None:
    async with stage() as s:
        bob, alice = await people(s)
        receiving, sending, txid = await paid(s, bob, alice)
        created = receiving.lines[0]
        twice = await alice("--json", "send", created["uri"])
        assert (code(twice), twice.lines[-1]["error"]) == (2, "WrongUsage")
        assert sending.lines[0]["session"] in twice.stderr
        await s.bury(1)
        # A wallet without memory pays the address, and once more after the end.
        second = await alice("--json", "send", ordinary(created, "0.0004"), "--fee-rate", "1")
        assert code(second) == 0
        await receiving.line("Seen", what="address", amount=40_000)
        await s.bury()
        assert (await receiving.code(), await sending.code()) == (0, 0)
        his, hers = receiving.lines[-1], sending.lines[-1]
        assert (his["outcome"], his["txid"], hers["outcome"], hers["payjoin"]) == ("Paid", txid, "Paid", True)
        worker = bob.start("--json", "run")
        third = await alice("--json", "send", ordinary(created, "0.0003"), "--fee-rate", "1")
        await s.bury(1)
        late = await worker.line("LatePayment")
        assert (late["session"], late["amount"]) == (created["session"], 30_000)
        worker.interrupt()
        assert await worker.code() == 0
        told = await books(bob, created["session"])
        told.tells("address", "The session ended: Paid", "30000 sat arrived after the end")
        assert await balance(bob) == 200_000 + his["amount_received"] + 40_000 + 30_000
        fees = s.fee(txid) + second.lines[0]["fee"] + third.lines[0]["fee"]
        assert await balance(alice) + await balance(bob) == 700_000 - fees
        await forget_locks(s, alice)


async def test_the_payer_bumps_the_fee_of_his_original_while_the_payee_thinks() -> None:
    async with stage() as s:
        bob, alice = await people(s, {"policy": {"approve": "ask"}})
        receiving = bob.start("--json", "receive", "150_000", "--until", "closed")
        created = await receiving.line("Created")
        sending = alice.start("--json", "send", created["uri"], "--fee-rate", "2", "--until", "closed")
        session = (await sending.line("Created"))["session"]
        await receiving.line("OriginalAccepted")
        state = await alice.party.driver.load(session)
        inputs = [txin.outpoint for txin in state.sent.tx.inputs]
        script = next(out.script for out in state.sent.tx.outputs if out.value == AMOUNT)
        outputs = [TxOut(AMOUNT, script), TxOut(500_000 - AMOUNT - 5_000, await change_script(alice.party))]
        bumped = await spend(alice.party, inputs, outputs)
        assert (await s.world.chain.broadcast(bumped.raw)).verdict == "accepted"
        await receiving.line("Seen", what="bumped", txid=bumped.txid, amount=AMOUNT)
        await sending.line("Seen", txid=bumped.txid)
        await s.bury()
        assert await receiving.code() == 0
        his = receiving.lines[-1]
        assert (his["outcome"], his["txid"], his["amount_received"]) == ("PaidOtherwise", bumped.txid, AMOUNT)
        (await books(bob, created["session"])).tells(f"bumped {bumped.txid} is in sight", "PaidOtherwise, 150000 sat")
        await sending.code()
        hers = sending.lines[-1]
        assert (hers["event"], hers["txid"], hers["payjoin"]) == ("Closed", bumped.txid, False)
        (await books(alice, session)).tells(f"{bumped.txid} is in sight", "The session ended")
        again = await alice("send", created["uri"], "--again", "--yes")
        assert code(again) == 2, "he paid: --again does not pay once more"
        assert await balance(bob) == 200_000 + AMOUNT
        assert await balance(alice) == 500_000 - AMOUNT - 5_000


async def offer(payer: Stranger, coins: Sequence[Outpoint]) -> SentOriginal:
    """An Original of these very coins, whatever else they were offered to."""
    chain, wallet = payer.party.world.chain, payer.party.wallet
    prevouts = await chain.prevouts(coins)
    change = sum(prevouts[coin].txout.value for coin in coins) - AMOUNT - 500
    outputs = (TxOut(AMOUNT, payer.script), TxOut(change, await change_script(payer.party)))
    psbt = Psbt(
        Tx(2, 0, tuple(TxIn(coin, b"", 0xFFFFFFFD) for coin in coins), outputs),
        tuple(PsbtInput(witness_utxo=prevouts[coin].txout) for coin in coins),
        tuple(PsbtOutput() for _ in outputs),
    )
    signed = Psbt.parse(await wallet.sign(psbt.serialize(), coins))
    return make_sent_original(signed, payer.script, AMOUNT, min_fee_rate=TWO, substitution=True, contribute=True)


# ---------------------------------------------------------------- too late, away, in demand


async def test_what_arrives_after_the_end_of_an_expired_request_is_told() -> None:
    async with stage(long_poll=0.2) as s:
        bob, alice = await people(s)
        receiving = bob.start("--json", "receive", "150_000", "--expire-in", "60")
        created = await receiving.line("Created")
        s.world.clock.skip(61)
        assert await receiving.code() == 5
        assert (receiving.lines[-1]["event"], receiving.lines[-1]["outcome"]) == ("Closed", "Expired")
        late = await alice("--json", "send", created["uri"])
        assert (code(late), late.lines[-1]["error"]) == (5, "Expired")
        worker = bob.start("run")
        await worker.until(lambda running: "Driving 0 open sessions" in running.stdout)
        paying = await alice("--json", "send", created["uri"], "--yes", "--fee-rate", "2")
        assert (code(paying), paying.lines[-1]["outcome"]) == (0, "PaidOtherwise")
        await s.bury(1)
        await worker.says(f"{created['session'][:8]}  LatePayment {paying.lines[-1]['txid']}")
        worker.interrupt()
        assert await worker.code() == 0
        told = await books(bob, created["session"])
        told.tells("The request expired", "The session ended: Expired, 0 sat", "150000 sat arrived after the end")
        assert await balance(bob) == 200_000 + AMOUNT
        assert await balance(alice) == 500_000 - AMOUNT - paying.lines[0]["fee"]
        await forget_locks(s, alice)


async def test_the_payee_is_away_for_two_days_and_comes_back() -> None:
    async with stage(long_poll=0.2) as s:
        bob, alice = await people(s)
        created = (await bob("--json", "receive", "150_000", "--detach")).lines[0]
        sending = alice.start("--json", "send", created["uri"], "--fee-rate", "2", "--until", "closed")
        session = (await sending.line("Created"))["session"]
        await sending.line("OriginalPosted")
        s.world.clock.skip(2 * DAY)
        await sending.line("FallbackBroadcasted")
        txid = (await sending.line("Seen", what="original"))["txid"]
        await s.bury(2)
        back = await bob("resume")
        assert code(back) == 0
        assert "1 open, 1 moved on" in back.stdout
        await s.bury(4)
        assert await sending.code() == 0
        hers = sending.lines[-1]
        assert (hers["outcome"], hers["txid"], hers["payjoin"]) == ("PaidByFallback", txid, False)
        receiving = await bob("--json", "resume")
        assert code(receiving) == 0
        his = receiving.lines[-2]
        assert (his["event"], his["txid"], his["amount_received"]) == ("Closed", txid, AMOUNT)
        assert his["outcome"] in ("PaidByFallback", "PaidOtherwise")
        (await books(alice, session)).tells("There is no payjoin; the Original pays.", "The network took the Original")
        (await books(bob, created["session"])).tells("The request expired", txid, "150000 sat")
        assert await balance(bob) == 200_000 + AMOUNT
        assert await balance(alice) == 500_000 - AMOUNT - sending.lines[0]["fee"]


async def test_the_same_input_offered_to_two_requests_pays_one_of_them() -> None:
    async with stage() as s:
        bob, alice = await people(s)
        first = bob.start("--json", "receive", "150_000", "--until", "closed")
        second = bob.start("--json", "receive", "150_000")
        uris = [(await one.line("Created"))["uri"] for one in (first, second)]
        sending = alice.start("--json", "send", uris[0], "--fee-rate", "2", "--until", "closed")
        await sending.line("OriginalPosted")
        # pjv2 does not offer a coin twice …
        short = await alice("--json", "send", uris[1], "--fee-rate", "2")
        assert code(short) == 2
        assert "the wallet can spend 0 sat now" in short.stderr
        assert len(short.stderr.splitlines()) == 2, short.stderr
        await first.line("Seen", what="payjoin")
        # … and another wallet's second offer is refused.
        payer = Stranger(s, alice.party, SimpleNamespace(uri=uris[1]))
        await payer.post(await offer(payer, list(alice.party.funded)))
        assert await second.code() == 3
        assert second.lines[-1]["outcome"] == "Refused"
        (await books(bob, second.lines[0]["session"])).tells("The Original was refused (original-psbt-rejected)")
        await s.bury()
        assert (await first.code(), await sending.code()) == (0, 0)
        his = first.lines[-1]
        assert (his["outcome"], sending.lines[-1]["outcome"]) == ("Paid", "Paid")
        assert await balance(bob) == 200_000 + his["amount_received"]
        assert await balance(alice) == 500_000 - his["amount_received"] - s.fee(his["txid"])


async def test_where_every_coin_of_the_payee_is_taken_the_second_payment_arrives_plainly() -> None:
    async with stage() as s:
        bob, alice = await people(s)
        carol = Shell(await s.world.party("carol", coins=[600_000]))
        receiving, sending, _ = await paid(s, bob, alice)
        second = bob.start("--json", "receive", "150_000", "--until", "closed")
        uri = (await second.line("Created"))["uri"]
        paying = carol.start("--json", "send", uri, "--fee-rate", "2", "--until", "closed")
        await paying.line("Seen", what="original")
        await second.line("Seen", what="original")
        await s.bury()
        for one, outcome in (
            (receiving, "Paid"),
            (sending, "Paid"),
            (second, "PaidByFallback"),
            (paying, "PaidByFallback"),
        ):
            assert await one.code() == 0
            assert one.lines[-1]["outcome"] == outcome
        (await books(bob, second.lines[0]["session"])).tells(
            "Nothing is proposed any more", "PaidByFallback, 150000 sat"
        )
        (await books(carol, paying.lines[0]["session"])).tells("The directory took the Original.", "PaidByFallback")
        his = receiving.lines[-1]
        assert await balance(bob) == 200_000 + his["amount_received"] + AMOUNT
        assert await balance(carol) == 600_000 - AMOUNT - paying.lines[0]["fee"]
        assert await balance(alice) == 500_000 - his["amount_received"] - s.fee(his["txid"])


# ---------------------------------------------------------------- fees and blocks


def rate(sat_per_vb: float) -> FeeRate:
    return FeeRate.from_sat_per_vb(sat_per_vb)


@pytest.mark.parametrize("who", ["payee", "payer"])
async def test_a_stuck_payjoin_is_bumped_by_whoever_is_there(who: str) -> None:
    async with stage() as s:
        bob, alice = await people(s)
        s.world.chain.estimates |= {1: rate(20), 6: rate(20)}
        receiving, sending, txid = await paid(s, bob, alice)
        bumping, away, other = (receiving, sending, alice) if who == "payee" else (sending, receiving, bob)
        away.interrupt()
        assert await away.code() == 130
        s.world.clock.skip(STUCK + 60)
        child = await bumping.line("ChildBroadcasting")
        assert child["parent"] == txid
        while child["txid"] not in s.in_mempool():  # a child is no news of the session's
            await s.world.clock.sleep(0.01)
        family = [s.world.chain.tx(one) for one in (txid, child["txid"])]
        assert rate(19.5) <= FeeRate.of(sum(e.fee for e in family), sum(e.tx.weight for e in family)) <= rate(21)
        await s.bury()
        assert await bumping.code() == 0
        assert (bumping.lines[-1]["outcome"], bumping.lines[-1]["txid"]) == ("Paid", txid)
        told = await books(bob if who == "payee" else alice, bumping.lines[0]["session"])
        told.tells(f"{txid} is stuck: the child {child['txid']} pays {child['fee']} sat for it.", "ended: Paid")
        assert code(await other("resume")) == 0
        his = (await books(bob, receiving.lines[0]["session"])).facts
        assert his["outcome"] == "Paid"
        pays = {"payee": 0, "payer": 0} | {who: child["fee"]}
        assert await balance(bob) == 200_000 + his["amount_received"] - pays["payee"]
        assert await balance(alice) == 500_000 - his["amount_received"] - s.fee(txid) - pays["payer"]


async def test_in_a_fee_spike_the_payer_is_told_that_nothing_is_relayed_and_pays_when_it_is_over() -> None:
    async with stage(long_poll=0.2) as s:
        bob, alice = await people(s)
        created = (await bob("--json", "receive", "150_000", "--detach")).lines[0]
        sending = alice.start("send", created["uri"], "--fee-rate", "2", "--until", "closed", "--yes")
        await sending.says("waiting for a proposal, until")
        await s.world.chain.spike(rate(10))
        s.world.clock.skip(2 * DAY)
        await sending.says("the network does not take the Original now (")
        (row,) = await alice.party.store.rows()
        (await books(alice, row.session)).tells("There is no payjoin", "The network refused the Original: ")
        await s.bury(2)
        assert not s.in_mempool()
        assert not [record for record in await alice.party.store.load(row.session) if record.name == "Closed"]
        await s.world.chain.spike(FeeRate(0))
        s.world.clock.skip(600)
        await sending.says("the Original is in the mempool: waiting for a block")
        await s.bury()
        assert await sending.code() == 0
        txid = (await books(alice, row.session)).facts["txid"]
        assert f"PaidByFallback: 150_000 sat in {txid}" in sending.stdout
        assert code(await bob("resume")) == 0
        his = await books(bob, created["session"])
        assert (his.facts["txid"], his.facts["amount_received"]) == (txid, AMOUNT)
        assert (await balance(bob), await balance(alice)) == (200_000 + AMOUNT, 500_000 - AMOUNT - s.fee(txid))


async def test_a_fallback_that_nobody_relays_ends_by_the_way_out_and_is_paid_later() -> None:
    async with stage() as s:
        bob, alice = await people(s, {"policy": {"give_up_blocks": 3}})
        receiving = bob.start("--json", "receive", "150_000", "--until", "closed")
        created = await receiving.line("Created")
        payer = Stranger(s, alice.party, SimpleNamespace(uri=created["uri"]))
        sent = await payer.original()
        await payer.post(sent)
        await receiving.line("ProposalPosted")
        await s.world.chain.spike(rate(10))
        s.world.clock.skip(DAY + 601)
        refused = await receiving.line("FallbackRejected")
        await s.bury(3)
        way_out = await receiving.line("WayOutBroadcasting")
        await receiving.line("Seen", what="way_out", txid=way_out["txid"])
        await s.bury()
        await receiving.line("CoinsReleased")
        told = await books(bob, created["session"])
        told.tells(
            "from here only a burial ends it",
            f"The network refused the Original: {refused['reason']}.",
            f"Our coins are spent back to us in {way_out['txid']}.",
            "Our coins are free again.",
        )
        assert told.facts["outcome"] is None
        lost = s.fee(way_out["txid"])
        assert await balance(bob) == 200_000 - lost
        assert await balance(alice) == 500_000
        await s.world.chain.spike(FeeRate(0))
        await receiving.line("Seen", what="original", txid=sent.tx.txid)
        await s.bury()
        assert await receiving.code() == 0
        his = receiving.lines[-1]
        assert (his["outcome"], his["amount_received"]) == ("PaidByFallback", AMOUNT)
        assert await balance(bob) == 200_000 - lost + AMOUNT
        assert await balance(alice) == 500_000 - AMOUNT - s.fee(sent.tx.txid)


async def test_a_reorganisation_takes_a_confirmation_back_and_both_are_told() -> None:
    async with stage() as s:
        bob, alice = await people(s)
        receiving, sending, txid = await paid(s, bob, alice)
        await s.bury(5)
        height = s.world.chain.height - 4
        for one in (receiving, sending):
            await one.line("Seen", what="payjoin", height=height)
        await s.world.chain.reorg(5)
        for one in (receiving, sending):
            await one.until(lambda one: [line for line in one.lines if line["event"] == "Seen"][-1]["height"] is None)
            assert "Closed" not in one.events
        his = await books(bob, receiving.lines[0]["session"])
        his.tells(f"payjoin {txid} is in sight, in block {height}.", f"payjoin {txid} is in sight, in the mempool.")
        assert his.facts["outcome"] is None
        await s.bury()
        for one in (receiving, sending):
            assert await one.code() == 0
            assert (one.lines[-1]["outcome"], one.lines[-1]["txid"]) == ("Paid", txid)
        received = receiving.lines[-1]["amount_received"]
        assert (await balance(bob), await balance(alice)) == (200_000 + received, 500_000 - received - s.fee(txid))


async def test_a_reorganisation_that_puts_another_spend_in_its_place_conflicts_for_both() -> None:
    async with stage() as s:
        bob, alice = await people(s)
        receiving, sending, txid = await paid(s, bob, alice)
        back = [TxOut(497_000, await change_script(alice.party))]
        conflict = await spend(alice.party, list(alice.party.funded), back)
        await s.bury(3)
        for one in (receiving, sending):
            await one.line("Seen", what="payjoin", height=s.world.chain.height - 2)
        await s.world.chain.reorg(3, include=[conflict.raw], drop=[txid])
        for one in (receiving, sending):
            await one.line("Unseen", what="payjoin")
            await one.line("Seen", what="conflict", txid=conflict.txid)
        await s.bury()
        for shell, one in ((bob, receiving), (alice, sending)):
            assert await one.code() == 3
            assert (one.lines[-1]["outcome"], one.lines[-1]["txid"]) == ("Conflicted", conflict.txid)
            (await books(shell, one.lines[0]["session"])).tells(f"payjoin {txid} is out of sight.", "ended: Conflicted")
        assert (await balance(bob), await balance(alice)) == (200_000, 497_000)


# ---------------------------------------------------------------- strangers


async def test_a_spoiled_mailbox_costs_the_payjoin_and_not_the_payment() -> None:
    async with stage(long_poll=0.2) as s:
        bob, alice = await people(s)
        receiving = bob.start("receive", "150_000", "--until", "closed")
        await receiving.until(lambda running: "\n" in running.stdout)
        uri = receiving.stdout.split("\n")[0]
        vandal = Stranger(s, alice.party, SimpleNamespace(uri=uri))
        assert await vandal.put(s.world.entropy.token(7_168)) == 200
        await receiving.says("the mailbox holds junk: waiting for a payment to the address")
        sending = alice.start("--json", "send", uri, "--fee-rate", "2", "--until", "closed")
        await sending.line("OriginalPosted")
        s.world.clock.skip(DAY + 601)
        txid = (await sending.line("Seen", what="original"))["txid"]
        await receiving.says("is in the mempool: waiting for a block")
        # The audit counts contents per mailbox; this one was given a first one by the vandal.
        s.world.directory._mailboxes.posted.pop(vandal.endpoint.short_id)
        await s.bury()
        assert (await receiving.code(), await sending.code()) == (0, 0)
        assert f"PaidOtherwise: 150_000 sat in {txid}" in receiving.stdout
        assert (sending.lines[-1]["outcome"], sending.lines[-1]["payjoin"]) == ("PaidByFallback", False)
        (row,) = await bob.party.store.rows()
        (await books(bob, row.session)).tells("The mailbox holds junk", f"address {txid} is in sight", "PaidOtherwise")
        assert await balance(bob) == 200_000 + AMOUNT
        assert await balance(alice) == 500_000 - AMOUNT - sending.lines[0]["fee"]
