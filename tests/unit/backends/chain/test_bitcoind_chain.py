"""A Core node as chain source, where a real one is hard to bring into the state: other networks, downloads, a tip that never rests."""

from __future__ import annotations

from contextlib import asynccontextmanager

import pytest

from pjv2.backends.chain.bitcoind import BitcoindChain
from pjv2.errors import CannotRead, NotNow
from pjv2.psbt.scripts import p2wsh_script
from pjv2.psbt.tx import Tx, TxIn, TxOut
from pjv2.units import FeeRate, Network, Outpoint
from tests.unit.backends.fake_node import Error, fake_node

HASH, OTHER = "ab" * 32, "cd" * 32
SCRIPT = p2wsh_script(b"\x51")
COIN = Outpoint("ef" * 32, 1)
TX = Tx(2, 0, (TxIn(COIN, witness=(b"\x51",)),), (TxOut(50_000, SCRIPT),))
INFO = {
    "blocks": 200, "bestblockhash": HASH, "mediantime": 1_700_000_000, "initialblockdownload": False, "verificationprogress": 1,
}  # fmt: skip
POOL = {"mempoolminfee": 0.00001, "minrelaytxfee": 0.00001}


def genesis(network):
    return lambda params: network.genesis_hash if params[0] == 0 else OTHER


@asynccontextmanager
async def chain_over(results=None, network=Network.REGTEST, wallet=None):
    known = {
        "getblockhash": genesis(network),
        "getblockchaininfo": INFO,
        "getbestblockhash": HASH,
        "getmempoolinfo": POOL,
        "estimatesmartfee": {"errors": ["Insufficient data"], "blocks": 2},
        "getrawtransaction": Error(-5, "No such mempool transaction"),
        "getmempoolentry": Error(-5, "Transaction not in mempool"),
        "gettxspendingprevout": lambda params: [dict(one) for one in params[0]],
        "gettxout": None,
    }
    async with fake_node(results=known | (results or {})) as node:
        chain = BitcoindChain(node.rpc(wallet, network=network))
        try:
            yield node, chain
        finally:
            await chain.close()


async def test_a_node_that_downloads_blocks_is_not_now_but_on_regtest_where_it_always_says_so():
    told = {"getblockchaininfo": INFO | {"initialblockdownload": True, "verificationprogress": 0.4567}}
    async with chain_over(told, Network.SIGNET) as (_, chain):
        for asking in (chain.tip(), chain.test(TX.raw), chain.prevouts([COIN]), view(chain)):
            with pytest.raises(NotNow, match=r"still downloading blocks \(45.7%\)"):
                await asking
    async with chain_over(told) as (_, chain):
        assert (await chain.tip()).height == 200


async def view(chain, **more):
    return await chain.view(more.get("txids", frozenset()), more.get("outpoints", frozenset()), frozenset(), 200)


@pytest.mark.parametrize(
    ("network", "told", "pool", "rate"),
    [
        (Network.BITCOIN, {"feerate": 0.00012345}, POOL, FeeRate(3087)),
        (Network.BITCOIN, {"feerate": 0.00000100}, POOL, FeeRate(250)),
        (Network.BITCOIN, {"feerate": 0.00002}, POOL | {"mempoolminfee": 0.0005}, FeeRate(12_500)),
        (Network.SIGNET, {"errors": ["none"]}, POOL, FeeRate(250)),
        (Network.REGTEST, {"errors": ["none"]}, POOL | {"minrelaytxfee": 0.00002}, FeeRate(500)),
    ],
)
async def test_a_rate_is_the_estimate_but_never_below_what_the_mempool_takes(network, told, pool, rate):
    results = {"estimatesmartfee": told, "getmempoolinfo": pool}
    async with chain_over(results, network) as (node, chain):
        assert await chain.fee_rate(6) == rate
        assert await chain.fee_rate(100_000) == rate
        asked = [
            call["params"] for request in node.requests for call in request if call["method"] == "estimatesmartfee"
        ]
        assert asked == [[6], [1008]]


async def test_a_node_of_bitcoin_without_estimates_is_not_now():
    async with chain_over(network=Network.BITCOIN) as (_, chain):
        with pytest.raises(NotNow, match="no fee estimates yet"):
            await chain.fee_rate(6)


async def test_a_tip_that_never_rests_is_not_now():
    async with chain_over({"getbestblockhash": OTHER}) as (_, chain):
        for asking in (view(chain), chain.prevouts([COIN])):
            with pytest.raises(NotNow, match="moved while it was read"):
                await asking


@pytest.mark.parametrize(
    ("method", "told"),
    [
        ("getblockchaininfo", {}),
        ("getblockchaininfo", INFO | {"blocks": "200"}),
        ("getblockchaininfo", INFO | {"bestblockhash": "ab"}),
        ("gettxspendingprevout", {"a": 1}),
        ("gettxspendingprevout", [{"txid": COIN.txid, "vout": 1, "spendingtxid": "xx"}]),
        ("gettxout", {}),
        (
            "gettxout",
            {"bestblock": HASH, "confirmations": 1, "value": "1", "scriptPubKey": {"hex": ""}, "coinbase": False},
        ),
    ],
)
async def test_nonsense_cannot_be_read_and_is_no_fact(method, told):
    async with chain_over({method: told}) as (_, chain):
        with pytest.raises(CannotRead, match=method):
            await chain.prevouts([COIN])


@pytest.mark.parametrize("told", [[], [{}, {}], [{"allowed": False, "reject-reason": 7}], None])
async def test_a_verdict_that_is_none_cannot_be_read(told):
    async with chain_over({"testmempoolaccept": told}) as (_, chain):
        with pytest.raises(CannotRead, match="testmempoolaccept"):
            await chain.test(TX.raw)


async def test_what_is_refused_for_spent_inputs_is_known_where_the_node_shows_it():
    spent = {"testmempoolaccept": [{"allowed": False, "reject-reason": "bad-txns-inputs-missingorspent"}]}
    async with chain_over(spent) as (node, chain):
        assert (await chain.test(TX.raw)).verdict == "refused"
        node.results["getrawtransaction"] = {"hex": TX.raw.hex(), "blockhash": HASH, "confirmations": 3}
        assert (await chain.test(TX.raw)).verdict == "known"
        node.results["getrawtransaction"] = {"hex": TX.raw.hex(), "blockhash": HASH, "confirmations": 0}
        assert (await chain.test(TX.raw)).verdict == "refused"
    async with chain_over(spent | {"gettransaction": {"confirmations": 2, "blockheight": 199}}, wallet="w") as (
        _,
        chain,
    ):
        assert (await chain.test(TX.raw)).verdict == "known"


async def test_a_node_that_takes_no_packages_says_so_as_the_reason():
    low = {"sendrawtransaction": Error(-26, "min relay fee not met")}
    async with chain_over(low) as (_, chain):
        told = await chain.broadcast(TX.raw, parents=[TX.raw])
        assert told.verdict == "refused"
        assert "takes no packages" in told.reason


async def test_a_broadcast_that_nobody_judged_is_not_now():
    async with chain_over({"sendrawtransaction": Error(-4, "P2P functionality missing or disabled")}) as (_, chain):
        with pytest.raises(NotNow, match="refuses sendrawtransaction"):
            await chain.broadcast(TX.raw)


async def test_an_answer_with_another_transaction_is_no_answer():
    async with chain_over({"getrawtransaction": {"hex": TX.raw.hex()}}) as (_, chain):
        with pytest.raises(NotNow, match="another transaction"):
            await view(chain, txids=frozenset({OTHER}))
        found = await view(chain, txids=frozenset({TX.txid}))
        assert [(tx.txid, tx.height) for tx in found.txs] == [(TX.txid, None)]


async def test_an_index_tells_where_a_transaction_is_and_that_it_is_nowhere_without_reading_blocks():
    indexed = {"getindexinfo": {"txindex": {"synced": True, "best_block_height": 200}}}
    async with chain_over(indexed) as (node, chain):
        assert (await view(chain, txids=frozenset({TX.txid}))).txs == ()
        node.results["getrawtransaction"] = {"hex": TX.raw.hex(), "blockhash": OTHER, "confirmations": 3}
        found = await view(chain, txids=frozenset({TX.txid}))
        assert [(tx.txid, tx.height) for tx in found.txs] == [(TX.txid, 198)]
        assert not any(call["method"] == "getblock" for request in node.requests for call in request)


async def test_the_memory_of_seen_outputs_and_times_is_bounded(monkeypatch):
    from pjv2.backends.chain import bitcoind

    monkeypatch.setattr(bitcoind, "MAX_REMEMBERED", 2)
    coin = {
        "bestblock": HASH,
        "confirmations": 150,
        "value": 1,
        "scriptPubKey": {"hex": "51"},
        "coinbase": True,
    }
    results = {
        "gettxout": lambda params: coin | {"confirmations": 101 + params[1]},
        "getblockheader": {"mediantime": 5},
    }
    async with chain_over(results) as (_, chain):
        outpoints = [Outpoint("ef" * 32, vout) for vout in range(6)]
        found = await chain.prevouts(outpoints)
        assert [found[one].height for one in outpoints] == [100, 99, 98, 97, 96, 95]
        assert all(one.coinbase and one.time == 5.0 for one in found.values())
        assert len(chain._seen) <= 2
        assert len(chain._times) <= 2
