"""What both remote chain sources do alike, whatever the server says."""

from __future__ import annotations

import random

import pytest

pytest.importorskip("pbk", reason="the lab needs libbitcoinkernel")

from pjv2.backends.chain.suitability import MAX_FAMILY
from pjv2.config import Config
from pjv2.errors import NotNow, WrongUsage
from pjv2.opening import open_chain
from pjv2.psbt.scripts import p2wsh_script
from pjv2.psbt.tx import TxOut
from pjv2.units import FeeRate, Network, Outpoint
from tests.unit.backends.chain.remote_rig import ANYONE, COIN, rig_of, spend, view
from tests.unit.backends.chain.spends import KINDS, SPOILINGS, Purse, World

BOTH = pytest.mark.parametrize("kind", ["esplora", "electrum"])
OWN = pytest.mark.parametrize("kind", ["bare", "electrum"])
"""Those that judge by themselves."""


@pytest.fixture
async def rig(kind):
    async with rig_of(kind) as rig:
        yield rig


# ---------------------------------------------------------------- facts


@BOTH
async def test_previous_outputs_are_told_as_a_node_tells_them(rig):
    outpoint = await rig.lab.fund(ANYONE, COIN)
    spent = await rig.lab.fund(ANYONE, COIN)
    await rig.lab.mine(3)
    tx = spend(spent)
    await rig.lab.broadcast(tx.raw)
    coinbase = Outpoint(rig.lab.block(40).txs[0].txid, 0)
    asked = [outpoint, spent, coinbase, Outpoint(tx.txid, 0), Outpoint(tx.txid, 1), Outpoint("ab" * 32, 0)]
    asked += [Outpoint(outpoint.txid, 1), Outpoint(rig.lab.block(1).txs[0].txid, 1)]
    told = await rig.chain.prevouts(asked)
    assert told == await rig.lab.prevouts(asked)
    assert told[spent].spent_by == tx.txid
    assert told[coinbase].coinbase
    assert await rig.chain.tip() == await rig.lab.tip()


@BOTH
async def test_a_view_is_what_a_node_sees(rig):
    outpoints = await rig.lab.fund_many([TxOut(COIN, p2wsh_script(bytes([0x51 + n]))) for n in range(3)])
    first = spend(outpoints[0])
    second = spend(Outpoint(first.txid, 0), value=COIN - 3_000)
    await rig.lab.broadcast(first.raw)
    await rig.lab.mine()
    await rig.lab.broadcast(second.raw)
    told = await view(
        rig.chain, txids=[outpoints[0].txid], outpoints=[Outpoint(first.txid, 0), outpoints[1]], scripts=[ANYONE]
    )
    node = await view(
        rig.lab, txids=[outpoints[0].txid], outpoints=[Outpoint(first.txid, 0), outpoints[1]], scripts=[ANYONE]
    )
    assert told == node
    assert [tx.txid for tx in told.txs] == [outpoints[0].txid, first.txid, second.txid]


@BOTH
async def test_what_only_spends_from_a_watched_script_is_not_a_payment_to_it(rig):
    outpoint = await rig.lab.fund(ANYONE, COIN)
    tx = spend(outpoint, script=p2wsh_script(b"\x52"))
    await rig.lab.broadcast(tx.raw)
    assert [one.txid for one in (await view(rig.chain, scripts=[ANYONE])).txs] == [outpoint.txid]


@BOTH
async def test_a_long_history_is_read_to_its_end_and_no_further_than_asked(rig):
    paid = await rig.lab.fund_many([TxOut(COIN, ANYONE)] * 30)
    txids = set()
    script = p2wsh_script(b"\x54")
    for outpoint in paid:
        tx = spend(outpoint, script=script)
        await rig.lab.broadcast(tx.raw)
        txids.add(tx.txid)
        if len(txids) % 4 == 0:
            await rig.lab.mine()
    assert {tx.txid for tx in (await view(rig.chain, scripts=[script])).txs} == txids
    await rig.lab.mine()
    more = [spend(outpoint, script=script) for outpoint in await rig.lab.fund_many([TxOut(COIN, ANYONE)] * 30)]
    for tx in more:
        await rig.lab.broadcast(tx.raw)
    assert {tx.txid for tx in (await view(rig.chain, scripts=[script])).txs} == txids | {tx.txid for tx in more}
    rig.server.seen.clear()
    recent = await view(rig.chain, scripts=[script], since=rig.lab.height + 1)
    assert {tx.txid for tx in more} <= {tx.txid for tx in recent.txs}
    assert not [path for path in rig.server.seen if "/chain/" in path]


@BOTH
async def test_a_transaction_is_fetched_once(rig, kind):
    outpoint = await rig.lab.fund(ANYONE, COIN)
    for _ in range(3):
        await view(rig.chain, txids=[outpoint.txid], outpoints=[outpoint], scripts=[ANYONE])
    raw = f"GET /tx/{outpoint.txid}/raw" if kind == "esplora" else "blockchain.transaction.get"
    assert rig.server.seen.count(raw) == 1


# ---------------------------------------------------------------- judging without a node


@OWN
async def test_verdicts_over_a_server_are_never_kinder_than_the_nodes(kind):
    dice = random.Random(f"over {kind}")
    told = set()
    async with rig_of(kind) as rig:
        for purse in map(Purse, KINDS):
            outpoints = await rig.lab.fund_many([TxOut(COIN + n, purse.script) for n in range(7)])
            coins = {outpoint: rig.lab.utxos()[outpoint] for outpoint in outpoints}
            *good, taken = outpoints
            gone = purse.sign(spend(taken), [coins[taken]])
            assert (await rig.chain.broadcast(gone.raw)).verdict == "accepted"
            (block,) = await rig.lab.mine(to=purse.script)
            immature = Outpoint(rig.lab.find_block(block).txs[0].txid, 0)
            tip = await rig.lab.tip()
            coins[immature] = rig.lab.utxos()[immature]
            world = World(purse, tuple(good), (taken,), immature, tip.height, tip.median_time, coins)
            tx = world.signed(world.draft(dice))
            assert (await rig.chain.test(tx.raw)).verdict == "accepted"
            for spoiling in SPOILINGS:
                tx = spoiling(world, world.draft(dice), dice)
                ours = await rig.chain.test(tx.raw)
                told.add(ours.verdict)
                assert ours.verdict != "accepted" or (await rig.lab.test(tx.raw)).verdict == "accepted"
    assert told == {"accepted", "refused", "unverifiable"}


@OWN
async def test_an_unconfirmed_coin_with_a_small_family_is_judged_and_one_with_a_large_family_is_not(rig):
    outpoint = await rig.lab.fund(ANYONE, COIN, confirm=False)
    assert (await rig.chain.test(spend(outpoint).raw)).verdict == "accepted"
    for n in range(MAX_FAMILY - 3):
        tx = spend(outpoint, value=COIN - 1_000 * (n + 1))
        assert (await rig.lab.broadcast(tx.raw)).verdict == "accepted"
        outpoint = Outpoint(tx.txid, 0)
    last = spend(outpoint, value=COIN - 23_000)
    assert (await rig.chain.test(last.raw)).verdict == "accepted"
    await rig.lab.broadcast(last.raw)
    next_one = spend(Outpoint(last.txid, 0), value=COIN - 24_000)
    await rig.lab.broadcast(next_one.raw)
    one_more = spend(Outpoint(next_one.txid, 0), value=COIN - 25_000)
    assert (await rig.chain.test(one_more.raw)).verdict == "unverifiable"
    await rig.lab.mine()
    assert (await rig.chain.test(one_more.raw)).verdict == "accepted"


@OWN
async def test_a_rate_below_what_the_server_tells_is_refused(rig):
    outpoint = await rig.lab.fund(ANYONE, COIN)
    await rig.lab.spike(FeeRate(5_000))
    assert (await rig.chain.test(spend(outpoint).raw)).verdict == "refused"
    assert (await rig.chain.test(spend(outpoint, value=COIN - 5_000).raw)).verdict == "accepted"


@OWN
async def test_relative_locks_by_time_are_judged_by_the_blocks_times(rig):
    outpoint = await rig.lab.fund(ANYONE, COIN)
    tx = spend(outpoint, sequence=(1 << 22) | 3)
    for _ in range(12):
        ours, theirs = (await rig.chain.test(tx.raw)).verdict, (await rig.lab.test(tx.raw)).verdict
        assert ours == theirs
        await rig.lab.mine()
    assert ours == "accepted"


@BOTH
async def test_noise_is_refused(rig):
    assert (await rig.chain.test(b"noise")).verdict == "refused"
    assert (await rig.chain.broadcast(b"noise")).verdict == "refused"


@OWN
async def test_without_the_kernel_a_test_is_unverifiable(rig):
    rig.chain._verifier = None
    tx = spend(await rig.lab.fund(ANYONE, COIN))
    assert (await rig.chain.test(tx.raw)).verdict == "unverifiable"


@OWN
async def test_many_inputs_are_judged_beside_the_loop(rig):
    outpoints = await rig.lab.fund_many([TxOut(COIN, ANYONE)] * 30)
    tx = spend(*outpoints, value=30 * COIN - 20_000)
    assert (await rig.chain.test(tx.raw)).verdict == "accepted"


# ---------------------------------------------------------------- broadcasting


@BOTH
async def test_parents_go_before_their_child(rig):
    parent = spend(await rig.lab.fund(ANYONE, COIN))
    child = spend(Outpoint(parent.txid, 0), value=COIN - 2_000)
    assert (await rig.chain.broadcast(child.raw, parents=[parent.raw])).verdict == "accepted"
    assert {entry.txid for entry in rig.lab.mempool()} == {parent.txid, child.txid}
    grandchild = spend(Outpoint(child.txid, 0), value=COIN - 3_000)
    assert (await rig.chain.broadcast(grandchild.raw, parents=[parent.raw, child.raw])).verdict == "accepted"


@OWN
async def test_where_no_packages_are_taken_a_parent_without_fee_keeps_its_child_out(rig):
    parent = spend(await rig.lab.fund(ANYONE, COIN), value=COIN)
    child = spend(Outpoint(parent.txid, 0), value=COIN - 5_000)
    result = await rig.chain.broadcast(child.raw, parents=[parent.raw])
    assert result.verdict == "refused"
    assert "min relay fee not met" in result.reason
    assert rig.lab.mempool() == ()


@BOTH
async def test_a_refusal_is_told_in_the_nodes_words(rig):
    tx = spend(await rig.lab.fund(ANYONE, COIN), value=COIN)
    result = await rig.chain.broadcast(tx.raw)
    assert result.reason.startswith("min relay fee not met, 0 <")


@BOTH
async def test_a_node_behind_the_server_that_does_not_answer_has_refused_nothing(rig):
    tx = spend(await rig.lab.fund(ANYONE, COIN))
    await rig.chain.tip()
    rig.lab.offline = True
    with pytest.raises(NotNow):
        await rig.chain.broadcast(tx.raw)
    rig.lab.offline = False
    assert (await rig.chain.broadcast(tx.raw)).verdict == "accepted"


# ---------------------------------------------------------------- bad weather


@BOTH
async def test_a_server_of_another_network_is_named(kind):
    async with rig_of(kind, network=Network.SIGNET) as rig:
        assert await rig.chain.genesis_hash() == Network.REGTEST.genesis_hash
        for call in (rig.chain.tip, lambda: view(rig.chain), lambda: rig.chain.test(b"")):
            with pytest.raises(WrongUsage, match="another network than signet"):
                await call()


@BOTH
async def test_a_silent_server_is_given_up(kind):
    async with rig_of(kind, patience=0.2) as rig:
        before = await rig.chain.tip()
        rig.server.stall = True
        with pytest.raises(NotNow):
            await rig.chain.tip()
        rig.server.stall = False
        assert await rig.chain.tip() == before


@BOTH
async def test_it_comes_back_with_the_server(rig):
    before = await rig.chain.tip()
    for _ in range(3):
        rig.server.offline = True
        with pytest.raises(NotNow) as caught:
            await rig.chain.tip()
        assert "127.0.0.1" in str(caught.value)
        rig.server.offline = False
        assert await rig.chain.tip() == before


@BOTH
async def test_a_closed_chain_source_does_not_answer(rig):
    await rig.chain.tip()
    await rig.chain.close()
    with pytest.raises(NotNow, match="closed"):
        await rig.chain.tip()
    await rig.chain.close()


@BOTH
async def test_the_configuration_opens_it_by_name(kind):
    async with rig_of(kind) as rig:
        chain = await open_chain(Config.load(None, {"chain": {"backend": kind, "url": rig.server.url}}))
        try:
            assert await chain.tip() == await rig.lab.tip()
        finally:
            await chain.close()
    with pytest.raises(WrongUsage, match=r"\[chain\] url is missing"):
        await open_chain(Config.load(None, {"chain": {"backend": kind}}))
