"""The contract of a chain source, as named checks that run over every implementation of `pjv2.ports.Chain`.

A check gets a rig: a chain source on regtest, and the power to pay a script and to mine. It says what is wrong by raising
`AssertionError`, and raises `unittest.SkipTest` (which pytest understands) when the rig lacks a power that it needs. Run all with
`check_chain(make)`, or one test per check over `CHAIN_CHECKS`. The checks spend a script that anyone can spend, so they need no keys.

Law: a check uses only what the protocol promises: facts, verdicts and NotNow, never a particular wording.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, replace
from typing import TypeAlias
from unittest import SkipTest

from pjv2.errors import NotNow
from pjv2.ports import Chain
from pjv2.psbt.scripts import p2wsh_script
from pjv2.psbt.tx import Tx, TxIn, TxOut
from pjv2.session.facts import ChainTx, ChainView
from pjv2.testing.contract import hold, nothing, run_checks
from pjv2.units import FeeRate, Network, Outpoint, Sats, Txid

ANYONE = p2wsh_script(b"\x51")
_OPENED = (b"\x51",)
_COIN: Sats = 100_000


@dataclass(frozen=True, slots=True)
class ChainRig:
    """A chain source and the world behind it.

    `fund(script, value)` pays a script and returns once that is confirmed; `mine(n)` confirms the mempool. `settle()` returns once
    the source has seen everything. `verifies` says whether `test` judges scripts and amounts, `packages` whether `broadcast` can
    lift a parent by its child. Optional powers: `reorg(depth)` puts the transactions of the last blocks back into the mempool,
    `evict(txid)` throws one out, `offline(bool)` stops the source answering.
    """

    chain: Chain
    fund: Callable[[bytes, Sats], Awaitable[Outpoint]]
    mine: Callable[[int], Awaitable[object]]
    network: Network = Network.REGTEST
    settle: Callable[[], Awaitable[None]] = nothing
    verifies: bool = True
    packages: bool = True
    reorg: Callable[[int], Awaitable[object]] | None = None
    evict: Callable[[Txid], Awaitable[object]] | None = None
    offline: Callable[[bool], Awaitable[object]] | None = None


ChainCheck: TypeAlias = Callable[[ChainRig], Awaitable[None]]
MakeChainRig: TypeAlias = Callable[[], AbstractAsyncContextManager[ChainRig]]
"""Makes a rig, and takes it down. Checks do not need a fresh chain: they may share one."""


async def check_chain(make: MakeChainRig) -> None:
    """Run the whole contract, each check over its own rig. Raises AssertionError naming the check that failed."""
    await run_checks(CHAIN_CHECKS, make)


# ---------------------------------------------------------------- blocks


async def it_is_the_chain_of_its_network(rig: ChainRig) -> None:
    hold(await rig.chain.genesis_hash() == rig.network.genesis_hash, "its genesis block is another network's")


async def the_tip_moves_with_every_block(rig: ChainRig) -> None:
    before = await rig.chain.tip()
    await rig.mine(3)
    await rig.settle()
    after = await rig.chain.tip()
    hold(after.height == before.height + 3, "the height is wrong")
    hold(after.hash != before.hash and len(after.hash) == 64, "the hash is wrong")
    hold(after.median_time > before.median_time, "the median time stands still")


async def fee_rates_fall_with_patience(rig: ChainRig) -> None:
    rates = [await rig.chain.fee_rate(blocks) for blocks in (1, 6, 144, 1008)]
    hold(rates == sorted(rates, reverse=True), "a longer wait costs more")
    hold(rates[-1] > FeeRate(0), "a confirmation costs nothing")


async def a_view_of_nothing_holds_the_tip_and_the_rates(rig: ChainRig) -> None:
    view = await _view(rig)
    hold(view.txs == (), "nothing was watched")
    hold(view.tip == await rig.chain.tip(), "the tip is another one")
    hold(view.rate == await rig.chain.fee_rate(6), "the rate is another one")
    hold(view.economy_rate == await rig.chain.fee_rate(144), "the economy rate is another one")


# ---------------------------------------------------------------- outputs


async def a_confirmed_output_is_told_as_it_is(rig: ChainRig) -> None:
    outpoint = await rig.fund(ANYONE, _COIN)
    await rig.settle()
    tip = await rig.chain.tip()
    unknown, beside = Outpoint("ab" * 32, 0), Outpoint(outpoint.txid, 7)
    found = await rig.chain.prevouts([outpoint, unknown, beside])
    hold(set(found) == {outpoint}, "an output was made up or is missing")
    told = found[outpoint]
    hold(told.txout == TxOut(_COIN, ANYONE), "value or script is wrong")
    hold(told.height == tip.height, "the height is wrong")
    hold(not told.coinbase and told.spent_by is None, "it is no coinbase and nobody spends it")


async def a_spend_is_told_from_the_mempool_on(rig: ChainRig) -> None:
    outpoint = await rig.fund(ANYONE, _COIN)
    tx = _spend([outpoint], _COIN - 1_000)
    await _send(rig, tx)
    for height in (False, True):
        found = await rig.chain.prevouts([outpoint, Outpoint(tx.txid, 0)])
        hold(found[outpoint].spent_by == tx.txid, "the spend is not told")
        fresh = found[Outpoint(tx.txid, 0)]
        hold(fresh.txout == tx.outputs[0] and fresh.spent_by is None, "the new output is wrong")
        hold((fresh.height is not None) == height, "the new output's height is wrong")
        await rig.mine(1)
        await rig.settle()


# ---------------------------------------------------------------- views


async def a_transaction_is_found_by_id_by_what_it_spends_and_by_what_it_pays(rig: ChainRig) -> None:
    outpoint = await rig.fund(ANYONE, _COIN)
    since = (await rig.chain.tip()).height
    paid = p2wsh_script(bytes.fromhex(outpoint.txid))  # nobody else pays this script
    tx = replace(_spend([outpoint], _COIN - 1_000), outputs=(TxOut(_COIN - 1_000, paid),))
    await _send(rig, tx)
    for confirmed in (False, True):
        height = (await rig.chain.tip()).height if confirmed else None
        expected = (ChainTx(tx.txid, tx.raw, height),)
        by_id = await _view(rig, txids=[tx.txid], since=since)
        hold(by_id.txs == expected, "it is not found by its id")
        hold(by_id.depth(by_id.txs[0]) == int(confirmed), "its depth is wrong")
        hold((await _view(rig, outpoints=[outpoint], since=since)).txs == expected, "it is not found by what it spends")
        hold((await _view(rig, scripts=[paid], since=since)).txs == expected, "it is not found by what it pays")
        both = await _view(rig, txids=[tx.txid], outpoints=[outpoint], scripts=[paid], since=since)
        hold(both.txs == expected, "it is told twice")
        await rig.mine(1)
        await rig.settle()


async def what_is_not_there_is_not_told(rig: ChainRig) -> None:
    view = await _view(rig, txids=["ab" * 32], outpoints=[Outpoint("ab" * 32, 0)], scripts=[p2wsh_script(b"nobody")])
    hold(view.txs == (), "something was made up")


# ---------------------------------------------------------------- verdicts


async def a_test_keeps_nothing(rig: ChainRig) -> None:
    outpoint = await rig.fund(ANYONE, _COIN)
    tx = _spend([outpoint], _COIN - 1_000)
    await rig.settle()
    for _ in range(2):
        verdict = (await rig.chain.test(tx.raw)).verdict
        hold(verdict in (("accepted",) if rig.verifies else ("accepted", "unverifiable")), f"it is {verdict}")
    hold((await _view(rig, txids=[tx.txid], outpoints=[outpoint])).txs == (), "a test left something behind")
    hold((await rig.chain.prevouts([outpoint]))[outpoint].spent_by is None, "a test left a spend behind")


async def a_transaction_that_cannot_stand_is_refused(rig: ChainRig) -> None:
    outpoint = await rig.fund(ANYONE, _COIN)
    await rig.settle()
    good = _spend([outpoint], _COIN - 1_000)
    tip = await rig.chain.tip()
    cases = {
        "a missing input": _spend([Outpoint("cd" * 32, 0)], _COIN - 1_000),
        "a wrong script": replace(good, inputs=(replace(good.inputs[0], witness=(b"\x52",)),)),
        "money out of nothing": _spend([outpoint], _COIN + 1),
        "no fee": _spend([outpoint], _COIN),
        "a lock time to come": replace(good, locktime=tip.height + 10),
        "a relative lock to come": replace(good, inputs=(replace(good.inputs[0], sequence=10),)),
    }
    for what, tx in cases.items():
        if rig.verifies:
            verdict = await rig.chain.test(tx.raw)
            hold(verdict.verdict == "refused" and bool(verdict.reason), f"a test of {what} is {verdict.verdict}")
        result = await rig.chain.broadcast(tx.raw)
        hold(result.verdict == "refused" and bool(result.reason), f"a broadcast of {what} is {result.verdict}")
        hold((await _view(rig, txids=[tx.txid])).txs == (), f"{what} got in")
    hold((await rig.chain.broadcast(b"no transaction")).verdict == "refused", "noise was taken")


async def what_is_there_is_known(rig: ChainRig) -> None:
    outpoint = await rig.fund(ANYONE, _COIN)
    tx = _spend([outpoint], _COIN - 1_000)
    await _send(rig, tx)
    for where in ("mempool", "chain"):
        hold((await rig.chain.broadcast(tx.raw)).verdict == "known", f"a broadcast does not know it in the {where}")
        verdict = (await rig.chain.test(tx.raw)).verdict
        hold(verdict == "known", f"a test says {verdict} of what is in the {where}")
        await rig.mine(1)
        await rig.settle()


async def a_better_fee_replaces_and_a_worse_one_does_not(rig: ChainRig) -> None:
    outpoint = await rig.fund(ANYONE, _COIN)
    middle, cheap, dear = (_spend([outpoint], _COIN - fee) for fee in (3_000, 2_000, 9_000))
    await _send(rig, middle)
    hold((await rig.chain.broadcast(cheap.raw)).verdict == "refused", "a lower fee replaced a higher one")
    await _send(rig, dear)
    view = await _view(rig, txids=[middle.txid, cheap.txid, dear.txid], outpoints=[outpoint])
    hold([tx.txid for tx in view.txs] == [dear.txid], "the replaced one is still there")
    await rig.mine(1)
    await rig.settle()
    hold((await rig.chain.broadcast(middle.raw)).verdict == "refused", "a spent input was taken again")


async def a_child_pays_for_its_parent(rig: ChainRig) -> None:
    if not rig.packages:
        raise SkipTest("this chain source takes no packages")
    parent = _spend([await rig.fund(ANYONE, _COIN)], _COIN)
    child = _spend([Outpoint(parent.txid, 0)], _COIN - 5_000)
    await rig.settle()
    hold((await rig.chain.broadcast(parent.raw)).verdict == "refused", "a parent without fee was taken alone")
    hold((await rig.chain.broadcast(child.raw)).verdict == "refused", "a child without its parent was taken")
    result = await rig.chain.broadcast(child.raw, parents=[parent.raw])
    hold(result.verdict == "accepted", f"the package was refused: {result.reason}")
    again = await rig.chain.broadcast(child.raw, parents=[parent.raw])
    hold(again.verdict == "known", f"the package again is {again.verdict}")
    await rig.mine(1)
    await rig.settle()
    view = await _view(rig, txids=[parent.txid, child.txid])
    hold([view.depth(tx) for tx in view.txs] == [1, 1], "the package did not confirm")


# ---------------------------------------------------------------- bad weather


async def a_reorganisation_takes_the_height_away(rig: ChainRig) -> None:
    if rig.reorg is None:
        raise SkipTest("this rig cannot reorganise")
    outpoint = await rig.fund(ANYONE, _COIN)
    tx = _spend([outpoint], _COIN - 1_000)
    await _send(rig, tx)
    await rig.mine(1)
    await rig.settle()
    before = await rig.chain.tip()
    await rig.reorg(1)
    await rig.settle()
    view = await _view(rig, txids=[tx.txid])
    hold(view.tip.hash != before.hash and view.tip.height > before.height, "the tip is the old one")
    hold(view.txs == (ChainTx(tx.txid, tx.raw, None),), "it is not back in the mempool")
    await rig.mine(1)
    await rig.settle()
    view = await _view(rig, txids=[tx.txid])
    hold(view.depth(view.txs[0]) == 1, "it did not confirm again")


async def an_evicted_transaction_is_gone_and_can_come_back(rig: ChainRig) -> None:
    if rig.evict is None:
        raise SkipTest("this rig cannot evict")
    outpoint = await rig.fund(ANYONE, _COIN)
    tx = _spend([outpoint], _COIN - 1_000)
    await _send(rig, tx)
    await rig.evict(tx.txid)
    await rig.settle()
    hold((await _view(rig, txids=[tx.txid], outpoints=[outpoint])).txs == (), "it is still told")
    hold((await rig.chain.prevouts([outpoint]))[outpoint].spent_by is None, "its spend is still told")
    await _send(rig, tx)


async def a_source_that_does_not_answer_is_not_now(rig: ChainRig) -> None:
    if rig.offline is None:
        raise SkipTest("this rig cannot go offline")
    outpoint = await rig.fund(ANYONE, _COIN)
    tx = _spend([outpoint], _COIN - 1_000)
    await rig.offline(True)
    calls: Sequence[Callable[[], Awaitable[object]]] = (
        rig.chain.genesis_hash,
        rig.chain.tip,
        lambda: rig.chain.test(tx.raw),
        lambda: rig.chain.prevouts([outpoint]),
        lambda: _view(rig),
        lambda: rig.chain.broadcast(tx.raw),
        lambda: rig.chain.fee_rate(6),
    )
    for call in calls:
        try:
            await call()
        except NotNow:
            continue
        raise AssertionError("something was answered")
    await rig.offline(False)
    hold((await _view(rig, txids=[tx.txid])).txs == (), "an unanswered broadcast got through")


CHAIN_CHECKS: tuple[ChainCheck, ...] = (
    it_is_the_chain_of_its_network,
    the_tip_moves_with_every_block,
    fee_rates_fall_with_patience,
    a_view_of_nothing_holds_the_tip_and_the_rates,
    a_confirmed_output_is_told_as_it_is,
    a_spend_is_told_from_the_mempool_on,
    a_transaction_is_found_by_id_by_what_it_spends_and_by_what_it_pays,
    what_is_not_there_is_not_told,
    a_test_keeps_nothing,
    a_transaction_that_cannot_stand_is_refused,
    what_is_there_is_known,
    a_better_fee_replaces_and_a_worse_one_does_not,
    a_child_pays_for_its_parent,
    a_reorganisation_takes_the_height_away,
    an_evicted_transaction_is_gone_and_can_come_back,
    a_source_that_does_not_answer_is_not_now,
)


# ---------------------------------------------------------------- small things


def _spend(outpoints: Sequence[Outpoint], value: Sats) -> Tx:
    """Spend coins that anyone can spend, to the same script."""
    inputs = tuple(TxIn(outpoint, witness=_OPENED) for outpoint in outpoints)
    return Tx(2, 0, inputs, (TxOut(value, ANYONE),))


async def _send(rig: ChainRig, tx: Tx) -> None:
    await rig.settle()
    result = await rig.chain.broadcast(tx.raw)
    hold(result.verdict == "accepted", f"a good transaction was refused: {result.reason}")
    await rig.settle()


async def _view(
    rig: ChainRig,
    *,
    txids: Sequence[Txid] = (),
    outpoints: Sequence[Outpoint] = (),
    scripts: Sequence[bytes] = (),
    since: int = 0,
) -> ChainView:
    return await rig.chain.view(frozenset(txids), frozenset(outpoints), frozenset(scripts), since)
