"""Reading blocks and transactions as bytes, against our own codec; and what is remembered when the chain moves."""

from __future__ import annotations

import asyncio
from contextlib import asynccontextmanager

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pjv2.backends.chain import bitcoind_scan
from pjv2.backends.chain.bitcoind_scan import Blocks, Mempool, Moved, skim_block, skim_hex
from pjv2.errors import CannotRead, NotNow
from pjv2.psbt.scripts import p2wsh_script
from pjv2.psbt.tx import Tx, TxIn, TxOut, hash256, varint
from pjv2.session.facts import Tip
from pjv2.units import Outpoint
from tests.unit.backends.fake_node import Error, fake_node

outpoints = st.builds(
    lambda txid, vout: Outpoint(txid.hex(), vout), st.binary(min_size=32, max_size=32), st.integers(0, 2**32 - 1)
)
transactions = st.builds(
    lambda version, locktime, inputs, outputs: Tx(version, locktime, tuple(inputs), tuple(outputs)),
    st.integers(1, 3),
    st.integers(0, 2**32 - 1),
    st.lists(
        st.builds(
            TxIn,
            outpoints,
            st.binary(max_size=300),
            st.integers(0, 2**32 - 1),
            st.lists(st.binary(max_size=300), max_size=3).map(tuple),
        ),
        min_size=1,
        max_size=4,
    ),
    st.lists(st.builds(TxOut, st.integers(0, 10**14), st.binary(max_size=300)), min_size=1, max_size=4),
)


def spends_of(tx):
    return tuple(txin.serialize()[:36] for txin in tx.inputs)


def block_of(previous, txs, nonce=0):
    header = (
        (4).to_bytes(4, "little") + bytes.fromhex(previous)[::-1] + bytes(32) + bytes(8) + nonce.to_bytes(4, "little")
    )
    return header + varint(len(txs)) + b"".join(tx.raw for tx in txs)


def hash_of(block):
    return hash256(block[:80])[::-1].hex()


@given(transactions)
def test_a_skimmed_transaction_is_the_one_that_our_codec_reads(tx):
    found = skim_hex(tx.raw.hex())
    assert (found.txid, found.raw) == (tx.txid, tx.raw)
    assert found.scripts == tuple(out.script for out in tx.outputs)
    assert found.spends == spends_of(tx)


@given(st.lists(transactions, max_size=5))
def test_a_block_is_read_transaction_by_transaction(txs):
    previous, found = skim_block(block_of("ab" * 32, txs))
    assert previous == "ab" * 32
    assert [one.txid for one in found] == [tx.txid for tx in txs]


@given(transactions, st.data())
def test_what_is_cut_short_or_goes_on_is_refused(tx, data):
    raw = tx.raw[: data.draw(st.integers(0, len(tx.raw) - 1))] if data.draw(st.booleans()) else tx.raw + b"\x00"
    with pytest.raises(ValueError, match=r"cut short|behind it"):
        skim_hex(raw.hex())


def test_what_is_no_block_is_refused():
    good = block_of("ab" * 32, [coinbase(1)])
    for raw in (b"", good[:80], good[:-1], good + b"\x00"):
        with pytest.raises(ValueError, match=r"block|cut short"):
            list(skim_block(raw)[1])


# ---------------------------------------------------------------- a chain that can be rewritten


def coinbase(number, script=b"\x51"):
    return Tx(2, number, (TxIn(Outpoint("0" * 64, 0xFFFFFFFF)),), (TxOut(5_000, script),))


class Chain:
    """Blocks by height, as a node serves them; `script_at` says which script a height pays."""

    def __init__(self):
        self.blocks = []
        self.pruned = -1

    def extend(self, *scripts, nonce=0):
        for script in scripts:
            previous = hash_of(self.blocks[-1]) if self.blocks else "00" * 32
            self.blocks.append(block_of(previous, [coinbase(len(self.blocks), script)], nonce))

    def results(self):
        def block_hash(params):
            return hash_of(self.blocks[params[0]]) if params[0] < len(self.blocks) else Error(-8, "out of range")

        def block(params):
            for height, raw in enumerate(self.blocks):
                if hash_of(raw) == params[0]:
                    return Error(-1, "Block not available (pruned data)") if height <= self.pruned else raw.hex()
            return Error(-5, "Block not found")

        return {"getblockhash": block_hash, "getblock": block}

    @property
    def tip(self):
        return Tip(len(self.blocks) - 1, hash_of(self.blocks[-1]), 0.0)


@asynccontextmanager
async def reader(*scripts):
    chain = Chain()
    chain.extend(*scripts)
    async with fake_node(results=chain.results()) as node:
        rpc = node.rpc()
        try:
            yield chain, node, Blocks(rpc)
        finally:
            await rpc.close()


def read(node):
    return [call["params"][0] for request in node.requests for call in request if call["method"] == "getblock"]


def heights(found, wanted):
    return [mined.height for mined in found[wanted]]


A, B = p2wsh_script(b"a"), p2wsh_script(b"b")


async def test_things_are_found_in_blocks_from_where_they_are_wanted_on():
    async with reader(A, B, A, A) as (chain, _, blocks):
        spent = Outpoint("0" * 64, 0xFFFFFFFF)
        assert heights(await blocks.find([A], 0, chain.tip), A) == [0, 2, 3]
        assert heights(await blocks.find([A], 1, chain.tip), A) == [0, 2, 3]  # more than asked for is known already
        found = await blocks.find([B, coinbase(1, B).txid, spent], 1, chain.tip)
        assert heights(found, B) == heights(found, coinbase(1, B).txid) == [1]
        assert heights(found, spent) == [1, 2, 3]
        assert heights(await blocks.find([p2wsh_script(b"late")], 99, chain.tip), p2wsh_script(b"late")) == []


async def test_a_block_is_fetched_once_until_something_older_is_wanted():
    async with reader(A, B, A) as (chain, node, blocks):
        await blocks.find([A], 1, chain.tip)
        await blocks.find([A], 1, chain.tip)
        assert len(read(node)) == 2
        chain.extend(A)
        assert heights(await blocks.find([A], 1, chain.tip), A) == [2, 3]
        assert len(read(node)) == 3
        assert heights(await blocks.find([A], 0, chain.tip), A) == [0, 2, 3]


@pytest.mark.parametrize("depth", [1, 2, 5, 8])
async def test_what_was_found_in_blocks_that_left_the_chain_is_forgotten(depth):
    async with reader(A, *[B] * 9) as (chain, _, blocks):
        before = await blocks.find([A, B], 0, chain.tip)
        assert heights(before, B) == list(range(1, 10))
        del chain.blocks[-depth:]
        chain.extend(*[A] * (depth + 1), nonce=7)
        after = await blocks.find([A, B], 0, chain.tip)
        assert heights(after, B) == list(range(1, 10 - depth))
        assert heights(after, A) == [0, *range(10 - depth, 11)]


async def test_a_chain_that_became_shorter_is_believed():
    async with reader(A, B, B) as (chain, _, blocks):
        await blocks.find([B], 0, chain.tip)
        del chain.blocks[-1:]
        assert heights(await blocks.find([B], 0, chain.tip), B) == [1]


async def test_blocks_that_do_not_join_are_a_chain_that_moved():
    async with reader(A, B, B) as (chain, _, blocks):
        old = chain.tip
        chain.blocks[-1] = block_of(hash_of(chain.blocks[-2]), [coinbase(9)], 9)
        with pytest.raises(Moved):
            await blocks.find([B], 0, old)
        chain.blocks[-1] = block_of("cd" * 32, [coinbase(9)], 9)
        with pytest.raises(Moved):
            await blocks.find([B], 0, chain.tip)


async def test_a_pruned_block_that_is_needed_is_not_now_in_words_that_help():
    async with reader(A, B, B) as (chain, _, blocks):
        chain.pruned = 1
        for _ in range(2):
            with pytest.raises(NotNow, match=r"has pruned block 1, which a session still needs: set prune= higher"):
                await blocks.find([B], 1, chain.tip)
            assert heights(await blocks.find([A], 2, chain.tip), A) == []
        old, young = await asyncio.gather(
            blocks.find([A, B], 0, chain.tip), blocks.find([B], 2, chain.tip), return_exceptions=True
        )
        assert isinstance(old, NotNow)
        assert isinstance(young, dict | Moved)


async def test_nonsense_from_a_node_cannot_be_read():
    async with reader(A) as (chain, node, blocks):
        for told in ("zz", 7, chain.blocks[0].hex() + "00"):
            node.results["getblock"] = lambda params, told=told: told
            with pytest.raises((CannotRead, Moved)):
                await blocks.find([A], 0, chain.tip)


async def test_large_blocks_are_read_beside_the_event_loop(monkeypatch):
    monkeypatch.setattr(bitcoind_scan, "_LARGE", 1)
    async with reader(A, B) as (chain, _, blocks):
        assert heights(await blocks.find([B], 0, chain.tip), B) == [1]


async def test_what_is_looked_for_is_bounded(monkeypatch):
    monkeypatch.setattr(bitcoind_scan, "MAX_WANTED", 3)
    monkeypatch.setattr(bitcoind_scan, "MAX_BLOCKS", 2)
    async with reader(A, B, A) as (chain, _, blocks):
        for number in range(10):
            await blocks.find([p2wsh_script(bytes([number]))], 0, chain.tip)
        assert repr(blocks) == "Blocks(3 things, 2 blocks)"
        assert heights(await blocks.find([A], 0, chain.tip), A) == [0, 2]


# ---------------------------------------------------------------- mempool


async def test_the_mempool_is_indexed_by_script_and_follows_what_comes_and_goes():
    pool = {}

    def raw(params):
        return pool[params[0]].raw.hex() if params[0] in pool else Error(-5, "No such mempool transaction")

    def put(tx):
        pool[tx.txid] = tx
        return tx.txid

    async with fake_node(results={"getrawmempool": lambda params: list(pool), "getrawtransaction": raw}) as node:
        rpc = node.rpc()
        mempool = Mempool(rpc)
        assert await mempool.paying([A]) == frozenset()
        first, second = put(coinbase(1, A)), put(coinbase(2, B))
        assert await mempool.paying([A]) == {first}
        assert await mempool.paying([A, B]) == {first, second}
        assert [len(request) for request in node.requests if request[0]["method"] == "getrawtransaction"] == [2]
        del pool[first]
        third = put(coinbase(3, A))
        assert await mempool.paying([A]) == {third}
        node.results["getrawmempool"] = lambda params: [*pool, "ab" * 32]  # gone before it was fetched
        assert await mempool.paying([A, B]) == {third, second}
        node.results["getrawmempool"] = ["short"]
        with pytest.raises(CannotRead):
            await mempool.paying([A])
        await rpc.close()
