"""The lab's Electrum server tells what the chain tells, answers batches, and tells subscribers what is new."""

from __future__ import annotations

import asyncio
import hashlib
import json

import pytest

pytest.importorskip("pbk", reason="the lab needs libbitcoinkernel")

from pjv2.lab.electrum import PROTOCOL, ElectrumServer
from pjv2.psbt.scripts import p2wsh_script
from pjv2.psbt.tx import Tx, TxIn, TxOut, hash256
from pjv2.units import Outpoint

ANYONE = p2wsh_script(b"\x51")
NAME = hashlib.sha256(ANYONE).digest()[::-1].hex()
COIN = 100_000


class Talker:
    """One connection, one line at a time."""

    def __init__(self, reader, writer):
        self.reader, self.writer = reader, writer

    async def line(self):
        return json.loads(await asyncio.wait_for(self.reader.readuntil(b"\n"), 5))

    async def send(self, message):
        self.writer.write(json.dumps(message).encode() + b"\n")
        await self.writer.drain()

    async def ask(self, method, *params):
        await self.send({"id": 1, "method": method, "params": list(params)})
        answer = await self.line()
        assert answer["id"] == 1
        return answer["result"] if "result" in answer else answer["error"]


@pytest.fixture
async def server(lab):
    async with ElectrumServer(lab, watch=60) as server:
        yield server


@pytest.fixture
async def talker(server):
    reader, writer = await asyncio.open_connection(server.host, server.port)
    yield Talker(reader, writer)
    writer.close()
    await writer.wait_closed()


def spend(outpoint, value=COIN - 1_000) -> Tx:
    return Tx(2, 0, (TxIn(outpoint, witness=(b"\x51",)),), (TxOut(value, ANYONE),))


async def test_it_greets_in_version_1_4_only(lab, server, talker):
    for wanted in (PROTOCOL, ["1.2", "1.6"], "1.4.0"):
        assert (await talker.ask("server.version", "test", wanted))[1] == PROTOCOL
    for wanted in ("1.5", ["0.9", "1.3"], "x"):
        assert (await talker.ask("server.version", "test", wanted))["code"] == 1
    assert (await talker.ask("server.features"))["genesis_hash"] == await lab.genesis_hash()
    assert await talker.ask("server.ping") is None
    assert "worth nothing" in await talker.ask("server.banner")
    assert server.url == f"tcp://127.0.0.1:{server.port}"


async def test_headers_are_told_one_by_one_in_rows_and_with_proofs(lab, talker):
    assert await talker.ask("blockchain.block.header", 5) == lab.block(5).header.hex()
    row = await talker.ask("blockchain.block.headers", 108, 10)
    assert (row["count"], row["max"]) == (3, 2016)
    assert row["hex"] == "".join(lab.block(n).header.hex() for n in (108, 109, 110))
    proven = await talker.ask("blockchain.block.header", 5, 8)
    root = hash256(lab.block(5).header)
    for place, node in zip((5, 2, 1, 0), map(bytes.fromhex, proven["branch"]), strict=True):
        root = hash256(node[::-1] + root if place & 1 else root + node[::-1])
    assert root[::-1].hex() == proven["root"]
    assert (await talker.ask("blockchain.block.headers", 4, 2, 8))["root"] == proven["root"]
    assert (await talker.ask("blockchain.block.header", 111))["code"] == 1
    assert (await talker.ask("blockchain.block.header", 5, 111))["code"] == 1


async def test_a_history_is_in_chain_order_with_the_mempool_last(lab, talker):
    assert await talker.ask("blockchain.scripthash.get_history", NAME) == []
    outpoint = await lab.fund(ANYONE, COIN)
    first = spend(outpoint)
    second = spend(Outpoint(first.txid, 0), COIN - 2_000)
    for tx in (first, second):
        assert await talker.ask("blockchain.transaction.broadcast", tx.raw.hex()) == tx.txid
    history = await talker.ask("blockchain.scripthash.get_history", NAME)
    assert history[0] == {"tx_hash": outpoint.txid, "height": lab.height}
    assert {(one["tx_hash"], one["height"], one["fee"]) for one in history[1:]} == {
        (first.txid, 0, 1_000),
        (second.txid, -1, 1_000),
    }
    assert len(await talker.ask("blockchain.scripthash.get_mempool", NAME)) == 2
    assert await talker.ask("blockchain.scripthash.listunspent", NAME) == [
        {"tx_hash": second.txid, "tx_pos": 0, "height": 0, "value": COIN - 2_000}
    ]
    assert await talker.ask("blockchain.scripthash.get_balance", NAME) == {"confirmed": COIN, "unconfirmed": -2_000}


async def test_a_transaction_is_told_raw_or_at_length_and_proven(lab, talker):
    outpoint = await lab.fund(ANYONE, COIN)
    entry = lab.tx(outpoint.txid)
    assert await talker.ask("blockchain.transaction.get", outpoint.txid) == entry.raw.hex()
    told = await talker.ask("blockchain.transaction.get", outpoint.txid, True)
    assert (told["hex"], told["confirmations"], told["blockhash"]) == (entry.raw.hex(), 1, entry.block)
    proof = await talker.ask("blockchain.transaction.get_merkle", outpoint.txid, lab.height)
    node = hash256(bytes.fromhex(proof["merkle"][0])[::-1] + bytes.fromhex(outpoint.txid)[::-1])
    assert (proof["pos"], node) == (1, lab.block(lab.height).header[36:68])
    assert await talker.ask("blockchain.transaction.id_from_pos", lab.height, 1) == outpoint.txid
    placed = await talker.ask("blockchain.transaction.id_from_pos", lab.height, 1, True)
    assert placed == {"tx_hash": outpoint.txid, "merkle": proof["merkle"]}
    assert "No such mempool" in (await talker.ask("blockchain.transaction.get", "ab" * 32))["message"]
    assert (await talker.ask("blockchain.transaction.get_merkle", outpoint.txid, 1))["code"] == 1
    assert (await talker.ask("blockchain.transaction.id_from_pos", lab.height, 9))["code"] == 1


async def test_a_refused_broadcast_has_the_nodes_words(lab, talker):
    tx = spend(await lab.fund(ANYONE, COIN), COIN)
    assert "min relay fee not met" in (await talker.ask("blockchain.transaction.broadcast", tx.raw.hex()))["message"]
    assert (await talker.ask("blockchain.transaction.broadcast", "no hex"))["code"] == 1
    known = lab.tx(next(iter(lab.utxos())).txid)
    message = (await talker.ask("blockchain.transaction.broadcast", known.raw.hex()))["message"]
    assert "already in block chain" in message


async def test_fees_are_in_bitcoin_per_thousand_bytes(talker):
    assert await talker.ask("blockchain.estimatefee", 6) == 0.00002
    assert await talker.ask("blockchain.relayfee") == 0.000001
    assert await talker.ask("mempool.get_fee_histogram") == []


async def test_subscribers_are_told_of_new_blocks_and_new_histories_once(lab, server, talker):
    tip = await talker.ask("blockchain.headers.subscribe")
    assert tip == {"height": 110, "hex": lab.block(110).header.hex()}
    assert await talker.ask("blockchain.scripthash.subscribe", NAME) is None
    await lab.fund(ANYONE, COIN)
    server.announce()
    server.announce()
    news = await talker.line()
    assert (news["method"], news["params"][0]["height"]) == ("blockchain.headers.subscribe", 111)
    news = await talker.line()
    assert (news["method"], news["params"][0]) == ("blockchain.scripthash.subscribe", NAME)
    assert news["params"][1] == await talker.ask("blockchain.scripthash.subscribe", NAME)
    assert await talker.ask("blockchain.scripthash.unsubscribe", NAME) is True
    await lab.fund(ANYONE, COIN)
    server.announce()
    assert (await talker.line())["method"] == "blockchain.headers.subscribe"
    assert await talker.ask("server.ping") is None


async def test_subscribers_are_told_without_being_asked_for(lab):
    async with ElectrumServer(lab, watch=0.01) as server:
        reader, writer = await asyncio.open_connection(server.host, server.port)
        talker = Talker(reader, writer)
        await talker.ask("blockchain.headers.subscribe")
        await lab.mine()
        assert (await talker.line())["params"][0]["height"] == 111
        writer.close()
        await writer.wait_closed()


async def test_a_batch_is_answered_as_a_batch_and_nonsense_with_an_error(talker):
    await talker.send([{"id": n, "method": "blockchain.block.header", "params": [n]} for n in range(3)])
    assert [one["id"] for one in await talker.line()] == [0, 1, 2]
    for nonsense, code in (([], -32600), (7, -32600), ({"id": 1, "method": "x"}, -32601)):
        await talker.send(nonsense)
        assert (await talker.line())["error"]["code"] == code
    talker.writer.write(b"{\n")
    assert (await talker.line())["error"]["code"] == -32700
    await talker.send({"id": 1, "method": "server.ping", "params": {}})
    assert (await talker.line())["error"]["code"] == -32602
    assert (await talker.ask("blockchain.scripthash.get_history", "zz"))["code"] == 1


async def test_it_breaks_and_lies_on_request(lab, server, talker):
    server.overrides["server.banner"] = lambda params: "another"
    assert await talker.ask("server.banner") == "another"
    lab.offline = True
    assert (await talker.ask("server.ping"))["code"] == 2
    lab.offline = False
    assert server.seen == ["server.banner", "server.ping"]
    server.offline = True
    assert await talker.reader.read() == b""


# ---------------------------------------------------------------- the client that wallets use


@pytest.mark.parametrize("kind", ["esplora", "electrum"])
async def test_a_bdk_wallet_scans_syncs_and_broadcasts(lab, server, kind):
    bdk = pytest.importorskip("bdkpython.bdk", reason="the embedded wallet is not installed")
    from pjv2.lab.esplora import EsploraServer

    words = bdk.Mnemonic.from_string("abandon " * 11 + "about")
    secret = bdk.DescriptorSecretKey(bdk.NetworkKind.TEST, words, None)
    kinds = (bdk.KeychainKind.EXTERNAL, bdk.KeychainKind.INTERNAL)
    descriptors = [bdk.Descriptor.new_bip84(secret, kind, bdk.NetworkKind.TEST) for kind in kinds]
    wallet = bdk.Wallet(*descriptors, bdk.Network.REGTEST, bdk.Persister.new_in_memory())
    address = wallet.reveal_next_address(kinds[0]).address.script_pubkey().to_bytes()
    await lab.fund(address, COIN)
    async with EsploraServer(lab) as web:
        if kind == "esplora":
            client, more = await asyncio.to_thread(bdk.EsploraClient, web.url), (4,)
        else:
            client, more = await asyncio.to_thread(bdk.ElectrumClient, server.url), (10, True)

        def scan():
            wallet.apply_update(client.full_scan(wallet.start_full_scan().build(), 20, *more))

        def sync():
            wallet.apply_update(client.sync(wallet.start_sync_with_revealed_spks().build(), *more))

        await asyncio.to_thread(scan)
        assert wallet.balance().confirmed.to_sat() == COIN
        builder = bdk.TxBuilder().add_recipient(bdk.Script(ANYONE), bdk.Amount.from_sat(20_000))
        psbt = builder.fee_rate(bdk.FeeRate.from_sat_per_vb(2)).finish(wallet)
        assert wallet.sign(psbt, None)
        tx = psbt.extract_tx()
        await asyncio.to_thread(client.broadcast if kind == "esplora" else client.transaction_broadcast, tx)
        assert lab.tx(str(tx.compute_txid())) is not None
        await asyncio.to_thread(sync)
        assert 0 < wallet.balance().trusted_pending.to_sat() < COIN - 20_000
        await lab.mine()
        await asyncio.to_thread(sync)
        assert 0 < wallet.balance().confirmed.to_sat() < COIN - 20_000
