"""The lab's Esplora server tells what the chain tells, in the shapes that clients read."""

from __future__ import annotations

import hashlib

import httpx
import pytest

pytest.importorskip("pbk", reason="the lab needs libbitcoinkernel")

from pjv2.lab.esplora import PAGE, EsploraServer
from pjv2.lab.httpd import HttpResponse
from pjv2.psbt.scripts import p2wsh_script
from pjv2.psbt.tx import Tx, TxIn, TxOut, hash256
from pjv2.units import FeeRate, Outpoint

ANYONE = p2wsh_script(b"\x51")
NAME = hashlib.sha256(ANYONE).hexdigest()
COIN = 100_000


@pytest.fixture
async def server(lab):
    async with EsploraServer(lab) as server:
        yield server


@pytest.fixture
async def client(server):
    async with httpx.AsyncClient(base_url=server.url, trust_env=False) as client:
        yield client


def spend(outpoint, value=COIN - 1_000, script=ANYONE) -> Tx:
    return Tx(2, 0, (TxIn(outpoint, witness=(b"\x51",)),), (TxOut(value, script),))


async def told(client, path):
    response = await client.get(path)
    assert response.status_code == 200, path
    return response.json() if "json" in response.headers["content-type"] else response.text


async def test_blocks_are_told_newest_first_ten_at_a_time(lab, client):
    assert await told(client, "/blocks/tip/height") == "110"
    tip = lab.block(110)
    assert await told(client, "/blocks/tip/hash") == tip.hash
    blocks = await told(client, "/blocks")
    assert [block["height"] for block in blocks] == list(range(110, 100, -1))
    assert blocks[0]["id"] == tip.hash
    assert blocks[0]["mediantime"] == (await lab.tip()).median_time
    assert blocks[0]["previousblockhash"] == blocks[1]["id"]
    assert [block["height"] for block in await told(client, "/blocks/3")] == [3, 2, 1, 0]
    assert blocks[0]["difficulty"] > 0
    assert (await client.get("/blocks/111")).status_code == 404


async def test_a_block_is_told_by_hash_and_by_height(lab, client):
    block = lab.block(7)
    assert await told(client, "/block-height/7") == block.hash
    assert (await client.get("/block-height/111")).status_code == 404
    header = bytes.fromhex(await told(client, f"/block/{block.hash}/header"))
    assert hash256(header)[::-1].hex() == block.hash
    assert (await client.get(f"/block/{block.hash}/raw")).content == block.raw
    assert (await told(client, f"/block/{block.hash}"))["tx_count"] == 1
    assert await told(client, f"/block/{block.hash}/txids") == [block.txs[0].txid]
    assert await told(client, f"/block/{block.hash}/txid/0") == block.txs[0].txid
    assert (await client.get(f"/block/{block.hash}/txid/1")).status_code == 404
    assert (await client.get(f"/block/{'ab' * 32}")).status_code == 404


async def test_a_block_that_a_reorganisation_left_behind_says_so(lab, client):
    left = lab.block(110)
    status = await told(client, f"/block/{left.hash}/status")
    assert status == {"in_best_chain": True, "height": 110, "next_best": None}
    await lab.reorg(1)
    status = await told(client, f"/block/{left.hash}/status")
    assert status == {"in_best_chain": False, "height": None, "next_best": None}


async def test_a_transaction_is_told_in_the_mempool_and_in_its_block(lab, client):
    outpoint = await lab.fund(ANYONE, COIN)
    tx = spend(outpoint)
    await lab.broadcast(tx.raw)
    seen = await told(client, f"/tx/{tx.txid}")
    assert (seen["fee"], seen["weight"], seen["size"]) == (1_000, tx.weight, len(tx.raw))
    assert seen["vin"][0]["prevout"] == {
        "scriptpubkey": ANYONE.hex(), "scriptpubkey_asm": "", "scriptpubkey_type": "p2wsh", "value": COIN
    }  # fmt: skip
    assert seen["vin"][0]["witness"] == ["51"]
    assert seen["status"] == {"confirmed": False}
    assert await told(client, "/mempool/txids") == [tx.txid]
    assert (await told(client, "/mempool"))["count"] == 1
    assert (await client.get(f"/tx/{tx.txid}/merkle-proof")).status_code == 404
    await lab.mine()
    tip = lab.block(lab.height)
    status = await told(client, f"/tx/{tx.txid}/status")
    assert (status["confirmed"], status["block_height"], status["block_hash"]) == (True, lab.height, tip.hash)
    assert bytes.fromhex(await told(client, f"/tx/{tx.txid}/hex")) == (await client.get(f"/tx/{tx.txid}/raw")).content
    proof = await told(client, f"/tx/{tx.txid}/merkle-proof")
    node = hash256(bytes.fromhex(proof["merkle"][0])[::-1] + bytes.fromhex(tx.txid)[::-1])
    assert (proof["pos"], node) == (1, tip.header[36:68])
    for path in ("", "/raw", "/outspend/0"):
        assert (await client.get(f"/tx/{'ab' * 32}{path}")).status_code == 404
    assert await told(client, f"/tx/{'ab' * 32}/status") == {"confirmed": False}


async def test_a_spend_is_told_from_the_mempool_on(lab, client):
    outpoint = await lab.fund(ANYONE, COIN)
    path = f"/tx/{outpoint.txid}/outspend"
    assert await told(client, f"{path}/0") == {"spent": False}
    tx = spend(outpoint)
    await lab.broadcast(tx.raw)
    spent = {"spent": True, "txid": tx.txid, "vin": 0, "status": {"confirmed": False}}
    assert await told(client, f"{path}/0") == spent
    assert await told(client, f"{path}s") == [spent, {"spent": False}]
    assert await told(client, f"{path}/9") == {"spent": False}


async def test_a_history_comes_in_pages_the_mempool_first(lab, client):
    assert await told(client, f"/scripthash/{NAME}/txs") == []
    outpoints = [await lab.fund(ANYONE, COIN) for _ in range(PAGE + 5)]
    tx = spend(outpoints[0], script=p2wsh_script(b"\x52"))  # it only spends from the script
    await lab.broadcast(tx.raw)
    page = await told(client, f"/scripthash/{NAME}/txs")
    newest_first = [outpoint.txid for outpoint in reversed(outpoints)]
    assert [one["txid"] for one in page] == [tx.txid, *newest_first[:PAGE]]
    assert [one["txid"] for one in await told(client, f"/scripthash/{NAME}/txs/mempool")] == [tx.txid]
    rest = await told(client, f"/scripthash/{NAME}/txs/chain/{page[-1]['txid']}")
    assert [one["txid"] for one in rest] == newest_first[PAGE:]
    assert await told(client, f"/scripthash/{NAME}/txs/chain/{rest[-1]['txid']}") == []
    unspent = await told(client, f"/scripthash/{NAME}/utxo")
    assert {(one["txid"], one["vout"]) for one in unspent} == {(o.txid, o.vout) for o in outpoints[1:]}
    assert (await told(client, f"/scripthash/{NAME}"))["chain_stats"]["tx_count"] == PAGE + 5
    await lab.reorg(1)
    assert len(await told(client, f"/scripthash/{NAME}/txs/mempool")) == 2


async def test_a_script_first_seen_after_a_reorganisation_is_found(lab, client):
    script = p2wsh_script(b"\x53")
    name = hashlib.sha256(script).hexdigest()
    assert await told(client, f"/scripthash/{name}/txs") == []
    await lab.reorg(2, blocks=3)
    outpoint = await lab.fund(script, COIN)
    assert [one["txid"] for one in await told(client, f"/scripthash/{name}/txs")] == [outpoint.txid]


async def test_a_broadcast_is_answered_with_the_id_or_the_nodes_words(lab, client):
    outpoint = await lab.fund(ANYONE, COIN)
    tx = spend(outpoint)
    refused = await client.post("/tx", content=spend(outpoint, COIN).raw.hex())
    assert refused.status_code == 400
    assert "min relay fee not met" in refused.text
    for _ in range(2):
        taken = await client.post("/tx", content=tx.raw.hex())
        assert (taken.status_code, taken.text) == (200, tx.txid)
    await lab.mine()
    again = await client.post("/tx", content=tx.raw.hex())
    assert (again.status_code, "already in utxo set" in again.text) == (400, True)
    assert (await client.post("/tx", content="no hex")).status_code == 400


async def test_tests_and_packages_can_be_switched_off(lab, server, client):
    parent = spend(await lab.fund(ANYONE, COIN), COIN)
    child = spend(Outpoint(parent.txid, 0), COIN - 5_000)
    (verdict,) = (await client.post("/txs/test", json=[parent.raw.hex()])).json()
    assert (verdict["txid"], verdict["allowed"]) == (parent.txid, False)
    assert "min relay fee" in verdict["reject-reason"]
    package = [parent.raw.hex(), child.raw.hex()]
    answer = (await client.post("/txs/package", json=package)).json()
    assert answer["package_msg"] == "success"
    assert {one["txid"] for one in answer["tx-results"].values()} == {parent.txid, child.txid}
    (verdict,) = (await client.post("/txs/test", json=[child.raw.hex()])).json()
    assert verdict["reject-reason"] == "txn-already-in-mempool"
    assert (await client.post("/txs/test", json="nonsense")).status_code == 400
    assert (await client.post("/txs/test", json=["00"])).status_code == 400
    assert (await client.post("/txs/package", content=b"[")).status_code == 400
    server.tests = server.packages = False
    for path in ("/txs/test", "/txs/package"):
        assert (await client.post(path, json=package)).status_code == 404


async def test_estimates_are_the_chains(lab, client):
    await lab.spike(FeeRate(1_000))
    rates = await told(client, "/fee-estimates")
    assert (rates["1"], rates["144"], rates["1008"]) == (5.0, 4.0, 4.0)


async def test_it_breaks_and_lies_on_request_and_only_then(lab, server, client):
    assert await told(client, "/api/blocks/tip/height") == "110"
    server.overrides["/blocks/tip/height"] = HttpResponse(200, b"7")
    assert (await client.get("/blocks/tip/height")).text == "7"
    server.overrides["/blocks/tip/height"] = lambda: HttpResponse(429)
    assert (await client.get("/blocks/tip/height")).status_code == 429
    del server.overrides["/blocks/tip/height"]
    server.refuse_next(1)
    assert (await client.get("/blocks/tip/height")).status_code == 503
    lab.offline = True
    assert (await client.get("/blocks/tip/height")).status_code == 503
    lab.offline = False
    assert await told(client, "/blocks/tip/height") == "110"
    assert (await client.get("/nothing")).status_code == 404
    assert (await client.put("/tx", content="")).status_code == 405
    assert server.seen[0] == "GET /blocks/tip/height"
