"""What only an Electrum server can do to its client."""

from __future__ import annotations

import asyncio
import json
import ssl

import pytest
import trustme

pytest.importorskip("pbk", reason="the lab needs libbitcoinkernel")

from pjv2.backends.chain import ElectrumChain
from pjv2.errors import NotNow, WrongUsage
from pjv2.lab.electrum import Refusal
from pjv2.psbt.scripts import p2wsh_script
from pjv2.psbt.tx import TxOut
from pjv2.units import FeeRate, Network
from tests.unit.backends.chain.remote_rig import ANYONE, COIN, rig_of, spend, view
from tests.unit.backends.mailroom.conftest import LabSocksProxy


@pytest.fixture
async def rig():
    async with rig_of("electrum") as rig:
        yield rig


def refusing(code, message):
    def answer(params):
        raise Refusal(code, message)

    return answer


async def test_a_raw_transaction_of_another_id_is_no_fact(rig):
    outpoint, other = [await rig.lab.fund(ANYONE, COIN + n) for n in range(2)]
    rig.server.overrides["blockchain.transaction.get"] = lambda params: rig.lab.tx(other.txid).raw.hex()
    with pytest.raises(NotNow, match="another transaction"):
        await rig.chain.prevouts([outpoint])


async def test_a_transaction_in_a_block_is_proven_once(rig):
    outpoint = await rig.lab.fund(ANYONE, COIN)
    for _ in range(3):
        await rig.chain.prevouts([outpoint])
    assert rig.server.seen.count("blockchain.transaction.get_merkle") == 1
    await rig.lab.reorg(1)
    await rig.lab.mine()
    await rig.chain.prevouts([outpoint])
    assert rig.server.seen.count("blockchain.transaction.get_merkle") == 2


async def test_a_block_that_does_not_hold_the_transaction_is_no_fact(rig):
    outpoint = await rig.lab.fund(ANYONE, COIN)
    await rig.lab.mine()
    history = [{"tx_hash": outpoint.txid, "height": rig.lab.height}]
    rig.server.overrides["blockchain.scripthash.get_history"] = lambda params: history
    proof = {"block_height": rig.lab.height, "merkle": ["ab" * 32], "pos": 1}
    rig.server.overrides["blockchain.transaction.get_merkle"] = lambda params: proof
    with pytest.raises(NotNow, match="merkle branch that does not lead"):
        await rig.chain.prevouts([outpoint])


async def test_headers_without_work_or_without_order_are_no_fact(rig):
    await rig.chain.tip()
    await rig.lab.mine()
    real = [rig.lab.block(n).header for n in range(rig.lab.height - 10, rig.lab.height + 1)]

    def spoilt(headers):
        data = b"".join(headers)
        return lambda params: {"count": len(headers), "hex": data.hex(), "max": 2016}

    lazy = next(real[-1][:-4] + n.to_bytes(4, "little") for n in range(99) if not _worked(real[-1], n))
    for headers in ([*real[:-1], lazy], [*real[:5], real[6], real[5], *real[7:]], real[1:]):
        rig.server.overrides["blockchain.block.headers"] = spoilt(headers)
        with pytest.raises(NotNow):
            await rig.chain.tip()
    rig.server.overrides.clear()
    assert await rig.chain.tip() == await rig.lab.tip()


def _worked(header, nonce):
    from pjv2.backends.chain.electrum import _is_worked

    return _is_worked(header[:-4] + nonce.to_bytes(4, "little"))


@pytest.mark.parametrize("nonsense", [None, 7, "", "zz", [], {}, [7], [{}], {"hex": 1, "height": -1}, True, 1e300, -5])
async def test_nonsense_is_not_now_wherever_it_is_told(rig, nonsense):
    outpoint = await rig.lab.fund(ANYONE, COIN)
    methods = [
        "blockchain.headers.subscribe",
        "blockchain.block.header",
        "blockchain.block.headers",
        "blockchain.transaction.get",
        "blockchain.transaction.get_merkle",
        "blockchain.scripthash.get_history",
        "blockchain.estimatefee",
        "blockchain.relayfee",
    ]
    for method in methods:
        rig.server.overrides = {method: lambda params: nonsense}
        chain = ElectrumChain(rig.server.url, network=Network.REGTEST, timeout=5)
        try:
            told = []
            for call in (chain.prevouts([outpoint]), chain.fee_rate(6), view(chain, scripts=[ANYONE])):
                try:
                    told.append(await call)
                except NotNow:
                    told.append(None)
            no_history = nonsense == [] and method == "blockchain.scripthash.get_history"
            a_rate = nonsense == 7 and method == "blockchain.relayfee"
            assert None in told or no_history or a_rate, method
            assert told[0] in (None, {}, await rig.lab.prevouts([outpoint]))
        finally:
            await chain.close()


async def test_an_output_with_too_long_a_history_is_passed_over_for_another(rig):
    busy = p2wsh_script(b"\x55")
    tx = spend(await rig.lab.fund(ANYONE, COIN), outputs=(TxOut(40_000, busy), TxOut(50_000, ANYONE)))
    await rig.lab.broadcast(tx.raw)
    server = rig.server
    honest = server._get_history
    import hashlib

    name = hashlib.sha256(busy).digest()[::-1].hex()

    async def limited(client, params):
        if params == [name]:
            raise Refusal(1, "history too large")
        return await honest(client, params)

    server._handlers = dict(server._handlers) | {"blockchain.scripthash.get_history": limited}
    assert [one.txid for one in (await view(rig.chain, txids=[tx.txid])).txs] == [tx.txid]
    with pytest.raises(NotNow, match="history too large"):
        await view(rig.chain, scripts=[busy])


async def test_a_transaction_without_spendable_outputs_is_placed_by_what_it_spends(rig):
    outpoint = await rig.lab.fund(ANYONE, COIN)
    tx = spend(outpoint, outputs=(TxOut(0, b"\x6a\x20" + bytes(32)),))
    await rig.lab.broadcast(tx.raw)
    assert [one.height for one in (await view(rig.chain, txids=[tx.txid])).txs] == [None]
    await rig.lab.mine()
    assert [one.height for one in (await view(rig.chain, txids=[tx.txid])).txs] == [rig.lab.height]


async def test_rates_are_never_below_the_relay_fee_and_have_a_default(rig):
    rig.server.overrides["blockchain.estimatefee"] = lambda params: -1
    assert await rig.chain.fee_rate(6) == FeeRate(250)
    rig.server.overrides["blockchain.relayfee"] = lambda params: 0.00005
    assert await rig.chain.fee_rate(6) == FeeRate(1250)
    real = ElectrumChain(rig.server.url, network=Network.BITCOIN)
    with pytest.raises(NotNow, match="no fee estimate"):
        await real.fee_rate(6)
    await real.close()


async def test_a_server_that_does_not_speak_our_version_is_named(rig):
    rig.server.overrides["server.version"] = refusing(1, "unsupported protocol version")
    with pytest.raises(NotNow, match=r"does not speak version 1\.4"):
        await rig.chain.tip()


async def test_other_errors_of_a_server_are_told_in_its_words(rig):
    outpoint = await rig.lab.fund(ANYONE, COIN)
    rig.server.overrides["blockchain.transaction.get"] = refusing(-101, "excessive\nresource usage")
    with pytest.raises(NotNow, match="answers: excessive resource usage"):
        await rig.chain.prevouts([outpoint])
    rig.server.overrides = {"blockchain.transaction.broadcast": refusing(-32601, "unknown method")}
    with pytest.raises(NotNow, match="unknown method"):
        await rig.chain.broadcast(spend(outpoint).raw)
    rig.server.overrides = {"blockchain.transaction.broadcast": refusing(1, "connection to the daemon was lost")}
    with pytest.raises(NotNow, match="cannot broadcast now"):
        await rig.chain.broadcast(spend(outpoint).raw)


async def test_one_connection_carries_everything_and_is_made_again_after_it_broke(rig):
    await asyncio.gather(*(rig.chain.tip() for _ in range(20)))
    assert rig.server.seen.count("server.version") == 1
    (client,) = rig.server._clients
    client.writer.transport.abort()
    await asyncio.gather(*(rig.chain.tip() for _ in range(20)))
    assert rig.server.seen.count("server.version") == 2


async def test_a_caller_that_leaves_disturbs_nobody(rig):
    await rig.chain.tip()
    rig.server.stall = True
    left = asyncio.ensure_future(rig.chain.tip())
    stays = asyncio.ensure_future(rig.chain.fee_rate(6))
    await asyncio.sleep(0)
    left.cancel()
    rig.server.stall = False
    assert await stays == FeeRate(500)
    with pytest.raises(asyncio.CancelledError):
        await left
    assert rig.server.seen.count("server.version") == 1


@pytest.mark.parametrize(
    "line", [b"HTTP/1.1 400 Bad Request\r\n", b"[1]\n", b'"x"\n', b"[" * 100_000 + b"\n", b"x" * 300_000]
)
async def test_what_is_not_the_protocol_ends_the_connection(line, monkeypatch):
    monkeypatch.setattr("pjv2.backends.chain.electrum.MAX_LINE", 200_000)
    served = []

    async def talk(reader, writer):
        served.append(1)
        await reader.readuntil(b"\n")
        writer.write(line)
        await writer.drain()
        await reader.read()
        writer.close()

    async with await asyncio.start_server(talk, "127.0.0.1", 0) as server:
        port = server.sockets[0].getsockname()[1]
        chain = ElectrumChain(f"tcp://127.0.0.1:{port}", network=Network.REGTEST, timeout=5)
        with pytest.raises(NotNow, match="not the Electrum protocol"):
            await chain.tip()
        await chain.close()
    assert served == [1]


async def test_answers_to_nobody_are_dropped():
    async def talk(reader, writer):
        while line := await reader.readline():
            asked = json.loads(line)
            strange = [{"id": 999, "result": 1}, {"id": "x"}, {"method": "news", "params": []}]
            writer.write(b"".join(json.dumps(one).encode() + b"\n" for one in strange))
            writer.write(json.dumps([{"id": asked["id"], "result": 0.00002}]).encode() + b"\n")
            await writer.drain()
        writer.close()

    async with await asyncio.start_server(talk, "127.0.0.1", 0) as server:
        port = server.sockets[0].getsockname()[1]
        chain = ElectrumChain(f"tcp://127.0.0.1:{port}", network=Network.REGTEST, timeout=5)
        assert await chain.fee_rate(6) == FeeRate(500)
        await chain.close()


async def test_through_a_proxy_names_are_resolved_there():
    async with LabSocksProxy() as socks:
        async with rig_of("electrum", url=lambda s: f"tcp://chain.example:{s.port}", proxy=socks.url) as rig:
            socks.route["chain.example"] = rig.server.port
            assert await rig.chain.tip() == await rig.lab.tip()
        assert [name for name, _ in socks.asked] == ["chain.example"]


async def test_a_private_authority_is_trusted_only_when_it_is_named(tmp_path):
    ca = trustme.CA()
    ca.cert_pem.write_to_path(str(tmp_path / "ca.pem"))
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    ca.issue_cert("127.0.0.1").configure_cert(context)
    async with rig_of("electrum", ssl_context=context, ca_file=tmp_path / "ca.pem") as rig:
        assert rig.server.url.startswith("ssl://")
        assert await rig.chain.tip() == await rig.lab.tip()
        stranger = ElectrumChain(rig.server.url, network=Network.REGTEST)
        with pytest.raises(NotNow, match="certificate"):
            await stranger.tip()
        await stranger.close()


@pytest.mark.parametrize(
    "url", ["host:1", "tcp://host", "http://host:1", "tcp://u:p@host:1", "ssl://host:1/x", "tcp://h:999999", "ssl://["]
)
def test_an_address_that_is_none_is_refused(url):
    with pytest.raises(WrongUsage):
        ElectrumChain(url, network=Network.REGTEST)
