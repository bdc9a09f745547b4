"""What only an Esplora server can do to its client."""

from __future__ import annotations

import json
import ssl
from pathlib import Path

import pytest
import trustme

pytest.importorskip("pbk", reason="the lab needs libbitcoinkernel")

from pjv2.backends.chain import EsploraChain
from pjv2.errors import NotNow, WrongUsage
from pjv2.lab.httpd import HttpResponse
from pjv2.units import FeeRate, Network, Outpoint
from tests.unit.backends.chain.remote_rig import ANYONE, COIN, rig_of, spend, view
from tests.unit.backends.mailroom.conftest import LabSocksProxy


@pytest.fixture
async def rig():
    async with rig_of("esplora") as rig:
        yield rig


def answer(value, status=200, **headers):
    body = value if isinstance(value, bytes) else json.dumps(value).encode()
    return HttpResponse(status, body, tuple(headers.items()))


async def test_a_path_prefix_is_kept():
    async with rig_of("esplora", url=lambda server: f"{server.url}/api/") as rig:
        assert await rig.chain.tip() == await rig.lab.tip()


async def test_a_raw_transaction_of_another_id_is_no_fact(rig):
    outpoint, other = [await rig.lab.fund(ANYONE, COIN + n) for n in range(2)]
    rig.server.overrides[f"/tx/{outpoint.txid}/raw"] = answer(rig.lab.tx(other.txid).raw)
    for call in (rig.chain.prevouts([outpoint]), view(rig.chain, txids=[outpoint.txid])):
        with pytest.raises(NotNow, match="another transaction"):
            await call


async def test_amounts_in_json_are_not_believed(rig):
    outpoint = await rig.lab.fund(ANYONE, COIN)
    status = {"confirmed": True, "block_height": 111, "block_hash": rig.lab.block(111).hash}
    rig.server.overrides[f"/tx/{outpoint.txid}"] = answer({"vout": [{"value": 10**15}], "status": status})
    assert (await rig.chain.prevouts([outpoint]))[outpoint].txout.value == COIN


async def test_a_spend_that_is_none_is_no_fact(rig):
    outpoint, other = [await rig.lab.fund(ANYONE, COIN) for _ in range(2)]
    rig.server.overrides[f"/tx/{outpoint.txid}/outspend/0"] = answer({"spent": True, "txid": other.txid, "vin": 0})
    with pytest.raises(NotNow, match="a spend that is none"):
        await rig.chain.prevouts([outpoint])


async def test_a_spender_that_vanished_meanwhile_spends_nothing(rig):
    outpoint = await rig.lab.fund(ANYONE, COIN)
    rig.server.overrides[f"/tx/{outpoint.txid}/outspend/0"] = answer({"spent": True, "txid": "ab" * 32, "vin": 0})
    assert (await rig.chain.prevouts([outpoint]))[outpoint].spent_by is None


async def test_a_height_above_the_tip_is_no_fact(rig):
    outpoint = await rig.lab.fund(ANYONE, COIN)
    status = {"confirmed": True, "block_height": 500, "block_hash": "ab" * 32}
    rig.server.overrides[f"/tx/{outpoint.txid}"] = answer({"status": status})
    with pytest.raises(NotNow, match="above the tip"):
        await view(rig.chain, txids=[outpoint.txid])


@pytest.mark.parametrize(
    "nonsense",
    [b"", b"<html>", b"null", b"[]", b"{}", b"[1]", b"[{}]", b'{"status": 1}', b"[[[", b"\xff\xfe", b'{"1": NaN}',
     b'{"1": -1}', b'{"x": 1}', b'{"1": 1e99}', b'{"1": "1"}'],
)  # fmt: skip
async def test_nonsense_is_not_now_wherever_it_is_told(rig, nonsense):
    outpoint = await rig.lab.fund(ANYONE, COIN)
    tx = spend(outpoint)
    await rig.chain.tip()
    paths = [
        "/blocks",
        f"/blocks/{rig.lab.height - 1}",
        "/fee-estimates",
        f"/tx/{outpoint.txid}",
        f"/tx/{outpoint.txid}/raw",
        f"/tx/{outpoint.txid}/outspend/0",
        "/txs/test",
    ]
    for path in paths:
        rig.server.overrides = {path: answer(nonsense)}
        chain = EsploraChain(rig.server.url, network=Network.REGTEST, timeout=5)
        try:
            told = []
            for call in (
                chain.prevouts([outpoint]),
                chain.fee_rate(6),
                chain.test(tx.raw),
                view(chain, scripts=[ANYONE]),
            ):
                try:
                    told.append(await call)
                except NotNow:
                    told.append(None)
            empty = nonsense == b"{}" and path == "/fee-estimates"
            assert None in told or empty, path
            assert told[0] in (None, await rig.lab.prevouts([outpoint]))
        finally:
            await chain.close()


async def test_estimates_are_the_cheapest_that_come_in_time_and_a_chain_without_any_has_a_default(rig):
    rig.server.overrides["/fee-estimates"] = answer({"2": 9.5, "6": 3, "144": 3.3, "1008": 1.0001})
    rates = [await rig.chain.fee_rate(blocks) for blocks in (1, 2, 6, 144, 1008)]
    assert rates == [FeeRate(2375), FeeRate(2375), FeeRate(750), FeeRate(750), FeeRate(251)]
    rig.server.overrides["/fee-estimates"] = answer({})
    assert await rig.chain.fee_rate(6) == FeeRate(250)
    real = EsploraChain(rig.server.url, network=Network.BITCOIN)
    with pytest.raises(NotNow, match="no fee estimates"):
        await real.fee_rate(6)
    await real.close()


async def test_a_server_that_asks_for_patience_gets_it(rig):
    rig.server.overrides["/blocks"] = answer(b"slow down", 429, **{"Retry-After": "30"})
    with pytest.raises(NotNow) as caught:
        await rig.chain.tip()
    assert caught.value.after == 30
    rig.server.overrides["/blocks"] = answer(b"", 503, **{"Retry-After": "Wed, 21 Oct 2015 07:28:00 GMT"})
    with pytest.raises(NotNow) as caught:
        await rig.chain.tip()
    assert caught.value.after is None


async def test_a_tip_that_never_rests_is_not_now(rig):
    blocks = []

    def another():
        blocks.append({"height": 110, "id": f"{len(blocks):064x}", "mediantime": 1})
        return answer(blocks[-1:])

    rig.server.overrides["/blocks"] = another
    with pytest.raises(NotNow, match="moved"):
        await view(rig.chain)


async def test_a_tip_that_moves_once_is_read_again(rig):
    await rig.chain.tip()
    told = []

    def first():
        told.append(1)
        if len(told) == 1:
            return answer([{"height": 109, "id": "ab" * 32, "mediantime": 1}])
        del rig.server.overrides["/blocks"]
        return answer([{"height": 110, "id": rig.lab.block(110).hash, "mediantime": (1)}])

    rig.server.overrides["/blocks"] = first
    assert (await view(rig.chain)).tip == await rig.lab.tip()


async def test_the_servers_own_test_is_asked_while_it_has_one(rig):
    tx = spend(await rig.lab.fund(ANYONE, COIN))
    assert (await rig.chain.test(tx.raw)).verdict == "accepted"
    rig.server.tests = False
    for _ in range(2):
        assert (await rig.chain.test(tx.raw)).verdict == "accepted"
    assert rig.server.seen.count("POST /txs/test") == 2


async def test_what_the_servers_test_calls_known_is_known(rig):
    tx = spend(await rig.lab.fund(ANYONE, COIN))
    for reason, verdict in (("txn-already-in-mempool", "known"), ("txn-already-known", "known"), ("dust", "refused")):
        told = [{"txid": tx.txid, "allowed": False, "reject-reason": reason}]
        rig.server.overrides["/txs/test"] = answer(told)
        assert (await rig.chain.test(tx.raw)).verdict == verdict
    rig.server.overrides["/txs/test"] = answer([{"txid": "ab" * 32, "allowed": True}])
    with pytest.raises(NotNow):
        await rig.chain.test(tx.raw)


async def test_a_transaction_that_others_broadcast_meanwhile_is_known(rig):
    tx = spend(await rig.lab.fund(ANYONE, COIN))
    await rig.lab.broadcast(tx.raw)
    looks = []

    def not_yet():
        looks.append(1)
        if len(looks) == 1:
            return answer(b"", 404)
        del rig.server.overrides[f"/tx/{tx.txid}"]
        return answer({"status": {"confirmed": False}})

    rig.server.overrides[f"/tx/{tx.txid}"] = not_yet
    rig.server.overrides["/tx"] = answer(b"already in block chain", 400)
    assert (await rig.chain.broadcast(tx.raw)).verdict == "known"


async def test_an_answer_without_end_is_cut(rig, monkeypatch):
    monkeypatch.setattr("pjv2.backends.chain.esplora.MAX_TX_BYTES", 100)
    outpoint = await rig.lab.fund(ANYONE, COIN)
    with pytest.raises(NotNow, match="more than 100 bytes"):
        await rig.chain.prevouts([outpoint])


async def test_through_a_proxy_names_are_resolved_there():
    async with LabSocksProxy() as socks:
        async with rig_of("esplora", url=lambda s: f"http://chain.example:{s.port}/api", proxy=socks.url) as rig:
            socks.route["chain.example"] = rig.server.port
            assert await rig.chain.tip() == await rig.lab.tip()
        assert {name for name, _ in socks.asked} == {"chain.example"}
        assert len(set(socks.users)) == 1


async def test_a_private_authority_is_trusted_only_when_it_is_named(tmp_path):
    ca = trustme.CA()
    ca.cert_pem.write_to_path(str(tmp_path / "ca.pem"))
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    ca.issue_cert("127.0.0.1").configure_cert(context)
    async with rig_of("esplora", ssl_context=context, ca_file=tmp_path / "ca.pem") as rig:
        assert await rig.chain.tip() == await rig.lab.tip()
        stranger = EsploraChain(rig.server.url, network=Network.REGTEST)
        with pytest.raises(NotNow):
            await stranger.tip()
        await stranger.close()


@pytest.mark.parametrize(
    "url", ["host", "ftp://host", "http://", "https://h/?token=x", "http://h:99999999", "https://["]
)
def test_a_url_that_is_none_is_refused(url):
    with pytest.raises(WrongUsage):
        EsploraChain(url, network=Network.REGTEST)


async def test_what_stands_in_the_url_is_told_to_nobody(rig):
    host = rig.server.url.removeprefix("http://")
    chain = EsploraChain(f"http://me:hunter2@{host}/hunter2", network=Network.REGTEST)
    rig.server.offline = True
    with pytest.raises(NotNow) as caught:
        await chain.prevouts([Outpoint("ab" * 32, 0)])
    assert "hunter2" not in str(caught.value) + repr(chain)
    await chain.close()
    for spoilt in ({"proxy": "http://127.0.0.1:1"}, {"proxy": "socks5://127.0.0.1:1"}, {"ca_file": Path("/nowhere")}):
        with pytest.raises(WrongUsage):
            EsploraChain(rig.server.url, network=Network.REGTEST, **spoilt)
