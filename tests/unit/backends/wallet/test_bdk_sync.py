"""The embedded wallet and its server: when it asks, what it does with silence, lies, reorganisations, and its own broadcasts."""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from dataclasses import replace as altered

import pytest

from pjv2.backends.wallet import bdk_file
from pjv2.backends.wallet.bdk import Electrum, Esplora, source_for
from pjv2.errors import NotNow, WrongUsage
from pjv2.lab.electrum import ElectrumServer
from pjv2.lab.httpd import HttpResponse
from pjv2.psbt.scripts import p2wsh_script
from pjv2.psbt.tx import Psbt, TxOut
from pjv2.units import FeeRate, Network, Outpoint

ANYONE = p2wsh_script(b"\x51")
RATE = FeeRate.from_sat_per_vb(3)
A, B = b"\x01" * 32, b"\x02" * 32


@pytest.fixture
async def electrum(chain):
    async with ElectrumServer(chain) as server:
        yield server


def asking(wallet):
    """An event that is set when the wallet turns to its server the next time."""
    event, true = asyncio.Event(), wallet._ask

    def ask(*args):
        event.set()
        return true(*args)

    wallet._ask = ask
    return event


# ---------------------------------------------------------------- when it asks


async def test_within_its_age_an_answer_asks_nobody_and_many_at_once_ask_once(make, esplora):
    wallet = await make(max_age=3600.0)
    await asyncio.gather(*(wallet.coins() for _ in range(6)), wallet.balance(), wallet.new_address())
    assert esplora.seen.count("GET /blocks") == 1
    asked = len(esplora.seen)
    await wallet.coins()
    await wallet.balance()
    await wallet.mine([])
    assert len(esplora.seen) == asked
    await wallet.sync()
    assert esplora.seen.count("GET /blocks") == 2


async def test_telling_it_to_sync_shows_what_happened_before_even_while_another_sync_is_under_way(make, esplora, chain):
    wallet = await make(max_age=3600.0)
    address = await wallet.new_address()
    esplora.stall = True
    under_way = asking(wallet)
    early = asyncio.create_task(wallet.sync())
    await under_way.wait()
    outpoint = await chain.fund(address.script, 50_000)
    late = asyncio.create_task(wallet.sync())
    await asyncio.sleep(0)
    esplora.stall = False
    await asyncio.gather(early, late)
    assert [coin.outpoint for coin in await wallet.coins()] == [outpoint]


async def test_where_a_sync_takes_long_it_is_done_less_often(make, esplora):
    wallet = await make(max_age=0.001)
    await wallet.sync()
    await wallet.sync()
    wallet._took = 900.0
    asked = len(esplora.seen)
    await wallet.coins()
    assert len(esplora.seen) == asked
    await wallet.sync()
    assert len(esplora.seen) > asked
    assert wallet._took < 60


async def test_an_unknown_coin_is_looked_for_before_it_is_called_foreign(make, chain, esplora):
    wallet = await make(max_age=3600.0)
    outpoint = await chain.fund((await wallet.new_address()).script, 50_000)
    assert await wallet.mine([outpoint]) == frozenset()  # known as of an hour ago at most
    wallet._max_age = 0.0
    assert await wallet.mine([outpoint]) == {outpoint}
    asked = len(esplora.seen)
    assert await wallet.mine([outpoint]) == {outpoint}
    assert len(esplora.seen) == asked


# ---------------------------------------------------------------- silence and lies


@pytest.mark.parametrize("kind", ["esplora", "electrum"])
async def test_a_silent_server_delays_nobody_beyond_the_deadline_and_no_signature_at_all(
    make, pay, esplora, electrum, clock, kind
):
    server = esplora if kind == "esplora" else electrum
    source = Esplora(server.url) if kind == "esplora" else Electrum(server.url, timeout=5)
    wallet = await make(sync=source)
    (coin,) = await pay(wallet, 80_000)
    psbt = await wallet.fund([TxOut(20_000, ANYONE)], RATE, A, clock.now() + 60)
    server.stall = True
    wallet._deadline = 0.3
    began = time.monotonic()
    for _ in range(2):
        with pytest.raises(NotNow, match=r"did not answer within 0\.3 s"):
            await wallet.coins()
    assert time.monotonic() - began < 3
    asked = len(server.seen)
    signed = Psbt.parse(await wallet.sign(psbt, [coin]))
    assert signed.inputs[0].is_final
    assert await wallet.mine([coin]) == {coin}
    assert await wallet.lock([coin], A, clock.now() + 600) == ()
    assert (await wallet.new_address()).index == 1
    assert len(server.seen) - asked <= 1  # two callers gave up, and one sync is under way
    server.stall = False
    wallet._deadline = 30.0
    assert await wallet.balance() == 80_000


@pytest.mark.parametrize("kind", ["esplora", "electrum"])
async def test_a_server_that_is_away_is_not_now_and_is_found_again(make, pay, esplora, electrum, kind):
    server = esplora if kind == "esplora" else electrum
    wallet = await make(sync=Esplora(server.url) if kind == "esplora" else Electrum(server.url))
    await pay(wallet, 80_000)
    server.offline = True
    for call in (wallet.coins(), wallet.balance(), wallet.sync()):
        with pytest.raises(NotNow, match=r"the wallet's server 127\.0\.0\.1 cannot be reached"):
            await call
    server.offline = False
    assert await wallet.balance() == 80_000


async def test_a_first_address_waits_for_the_server(make, esplora):
    esplora.offline = True
    wallet = await make()
    with pytest.raises(NotNow):
        await wallet.new_address()
    esplora.offline = False
    assert (await wallet.new_address()).index == 0


@pytest.mark.parametrize("kind", ["esplora", "electrum"])
async def test_a_server_of_another_network_is_refused_before_anything_is_kept(make, esplora, electrum, kind):
    if kind == "esplora":
        esplora.overrides["/block-height/0"] = HttpResponse(200, Network.SIGNET.genesis_hash.encode())
        wallet = await make(sync=Esplora(esplora.url + "/api"))
    else:
        true = bytes.fromhex("01000000" + "00" * 76)
        electrum.overrides["blockchain.block.header"] = lambda params: true.hex()
        wallet = await make(sync=Electrum(electrum.url))
    with pytest.raises(WrongUsage, match="does not serve regtest"):
        await wallet.sync()
    with pytest.raises(WrongUsage, match="does not serve regtest"):
        await wallet.new_address()
    assert await wallet._do(lambda file: file.never_synced())
    assert not any("scripthash" in asked for asked in [*esplora.seen, *electrum.seen])


@pytest.mark.parametrize(
    ("answer", "message"), [((200, b"[not blocks"), "does not answer sensibly"), ((403, b"go away"), "answered 403")]
)
async def test_a_server_that_talks_nonsense_is_not_now_without_quoting_the_url(make, esplora, answer, message):
    wallet = await make(sync=Esplora(f"{esplora.url}/swordfish"))
    esplora.overrides["/swordfish/block-height/0"] = HttpResponse(200, Network.REGTEST.genesis_hash.encode())
    esplora.overrides["/swordfish/blocks"] = HttpResponse(*answer)
    with pytest.raises(NotNow, match=message) as caught:
        await wallet.sync()
    assert caught.value.__context__ is None
    assert "swordfish" not in str(caught.value)
    assert "swordfish" not in repr(wallet._source)


async def test_closing_while_a_sync_is_under_way_tells_whoever_waits(make, esplora):
    wallet = await make()
    esplora.stall = True
    under_way = asking(wallet)
    waiting = [asyncio.create_task(wallet.coins()) for _ in range(2)]
    await under_way.wait()
    await wallet.close()
    for result in await asyncio.gather(*waiting, return_exceptions=True):
        assert isinstance(result, NotNow)
    esplora.stall = False


async def test_a_cancelled_caller_does_not_take_the_sync_of_others_with_him(make, esplora, pay):
    wallet = await make()
    await pay(wallet, 50_000)
    esplora.stall = True
    under_way = asking(wallet)
    impatient, patient = asyncio.create_task(wallet.balance()), asyncio.create_task(wallet.balance())
    await under_way.wait()
    impatient.cancel()
    with pytest.raises(asyncio.CancelledError):
        await impatient
    esplora.stall = False
    assert await patient == 50_000


async def test_a_library_that_panics_is_not_now(make):
    from pjv2.backends.wallet.bdk import library

    wallet = await make()

    def panics(file):
        raise library().InternalError("rust panic")

    with pytest.raises(NotNow, match="library failed"):
        await wallet._do(panics)


async def test_a_scan_waits_for_the_sync_under_way_and_needs_a_server(make, esplora):
    wallet = await make()
    esplora.stall = True
    under_way = asking(wallet)
    syncing = asyncio.create_task(wallet.sync())
    await under_way.wait()
    scanning = asyncio.create_task(wallet.rescan(7))
    await asyncio.sleep(0)
    esplora.stall = False
    await asyncio.gather(syncing, scanning)
    with pytest.raises(WrongUsage, match="gap of at least 1"):
        await wallet.rescan(0)
    with pytest.raises(WrongUsage, match="no server"):
        await (await make(1, sync=None)).rescan(7)
    await wallet.close()
    with pytest.raises(NotNow, match="closed"):
        await wallet.rescan(7)


async def test_the_endless_wait_of_the_librarys_client_is_switched_off(make, monkeypatch):
    import os

    monkeypatch.delenv("MINREQ_TIMEOUT", raising=False)
    await (await make()).sync()
    assert os.environ["MINREQ_TIMEOUT"] == "20"


# ---------------------------------------------------------------- what the chain does


async def test_after_a_reorganisation_a_coin_is_no_longer_offered(make, chain):
    wallet = await make()
    outpoint = await chain.fund((await wallet.new_address()).script, 50_000)
    assert await wallet.balance() == 50_000
    await chain.reorg(1, drop=[outpoint.txid])
    assert await wallet.balance() == 0
    assert await wallet.coins() == ()
    with pytest.raises(WrongUsage, match="can spend 0 sat now"):
        await wallet.fund([TxOut(20_000, ANYONE)], RATE, A, 2e9)


def broadcasts(wallet):
    """Those of our own that are repeated, read from the disk."""
    path = wallet._file._path
    return set(json.loads(path.with_name(path.name + ".broadcasts").read_text())["broadcasts"])


async def spend(wallet, value, lock_id, clock, chain=None):
    tx = Psbt.parse(await wallet.fund([TxOut(value, ANYONE)], RATE, lock_id, clock.now() + 600)).extract()
    if chain is not None:
        assert (await chain.broadcast(tx.raw)).verdict == "accepted"
    return tx


async def test_our_own_broadcast_is_known_at_once_and_survives_syncs_that_do_not_list_it(make, pay, clock, chain):
    wallet = await make()
    (coin,) = await pay(wallet, 90_000)
    tx = await spend(wallet, 20_000, A, clock)
    await wallet.saw(tx.raw)
    change = next(Outpoint(tx.txid, n) for n, out in enumerate(tx.outputs) if out.script != ANYONE)
    for _ in range(3):
        await wallet.sync()
        assert await wallet.mine([coin, change]) == {coin, change}
        assert await wallet.coins() == ()
        assert await wallet.balance() == 0  # spent; the change is not confirmed
    assert (await chain.broadcast(tx.raw)).verdict == "accepted"
    await chain.mine()
    assert [held.outpoint for held in await wallet.coins()] == [change]
    await wallet.sync()
    assert broadcasts(wallet) <= {tx.txid}


async def test_a_broadcast_that_nobody_lists_is_forgotten_after_ten_minutes(make, pay, clock, monkeypatch):
    wallet = await make()
    (coin,) = await pay(wallet, 90_000)
    tx = await spend(wallet, 20_000, A, clock)
    with monkeypatch.context() as patched:
        ago = time.time() - 700
        patched.setattr("pjv2.backends.wallet.bdk.time.time", lambda: ago)
        await wallet.saw(tx.raw)
        await wallet.unlock([coin], A)
        assert await wallet._do(lambda file: file.coins(0)) == ()
    assert [held.outpoint for held in await wallet.coins()] == [coin]
    assert broadcasts(wallet) == set()


async def test_a_rival_that_the_server_lists_ends_the_memory_of_our_broadcast(make, pay, clock, chain, monkeypatch):
    """As when our Original was broadcast, and the payjoin replaced it."""
    wallet = await make()
    (coin,) = await pay(wallet, 90_000)
    original = await spend(wallet, 20_000, A, clock)
    await wallet.unlock([coin], A)
    rival = Psbt.parse(
        await wallet.fund([TxOut(30_000, ANYONE)], FeeRate.from_sat_per_vb(30), B, clock.now() + 600)
    ).extract()
    with monkeypatch.context() as patched:
        ago = time.time() - 100  # the server's word is newer by a whole second: the library counts in seconds
        patched.setattr("pjv2.backends.wallet.bdk.time.time", lambda: ago)
        await wallet.saw(original.raw)
    assert (await chain.broadcast(rival.raw)).verdict == "accepted"
    change = next(Outpoint(rival.txid, n) for n, out in enumerate(rival.outputs) if out.script != ANYONE)
    await wallet.sync()
    assert broadcasts(wallet) == set()
    assert await wallet.mine([change]) == {change}


async def test_a_later_broadcast_of_the_same_coin_takes_the_place_of_the_earlier(make, pay, clock):
    wallet = await make(sync=None)
    raw = bytes.fromhex("02000000") + b"\x01" + b"\x11" * 36 + b"\x00" + b"\xff" * 4 + b"\x01"
    script = (await wallet.new_address()).script
    raw += (90_000).to_bytes(8, "little") + bytes([len(script)]) + script + bytes(4)
    await wallet.saw(raw)
    from pjv2.psbt.tx import Tx

    parent = Tx.parse(raw)
    assert await wallet.mine([Outpoint(parent.txid, 0)]) == {Outpoint(parent.txid, 0)}
    rival = altered(parent, locktime=1)
    await wallet.saw(rival.legacy)
    assert broadcasts(wallet) == {rival.txid}
    with pytest.raises(WrongUsage, match="no transaction"):
        await wallet.saw(b"noise")


# ---------------------------------------------------------------- which server


@pytest.mark.parametrize(
    ("told", "message"),
    [
        (("lnd", "https://x", None), "kept current by an Esplora or Electrum server"),
        (("esplora", None, None), "url is missing"),
        (("esplora", "tcp://x:1", None), "http:// or https://"),
        (("electrum", "https://x", None), "tcp:// or ssl://"),
        (("esplora", "https://user:swordfish@host/api", None), "neither a user name nor a password"),
        (("esplora", "https://blockstream.info/api", "socks5h://127.0.0.1:9050"), "does not go around it"),
    ],
)
def test_a_server_that_cannot_serve_is_refused(told, message):
    with pytest.raises(WrongUsage, match=message):
        source_for(*told)


def test_a_server_is_reached_through_the_proxy_unless_it_is_this_machine():
    proxy = "socks5h://127.0.0.1:9050"
    assert source_for("electrum", "ssl://x:50002", proxy) == Electrum("ssl://x:50002", socks5="127.0.0.1:9050")
    assert source_for("esplora", "http://localhost:3000", proxy) == Esplora("http://localhost:3000")
    assert source_for("esplora", "http://[::1]:3000", proxy) == Esplora("http://[::1]:3000")
    assert source_for("electrum", "tcp://127.0.0.1:1", proxy) == Electrum("tcp://127.0.0.1:1")
    assert "token" not in repr(source_for("esplora", "https://host/token"))


async def test_names_are_looked_up_by_the_socks_proxy(make):
    asked = asyncio.get_running_loop().create_future()

    async def proxy(reader, writer):
        with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError):
            head = await reader.readexactly(2)
            await reader.readexactly(head[1])
            writer.write(b"\x05\x00")
            await reader.readexactly(3)
            kind = await reader.readexactly(1)
            if kind == b"\x03":
                size = (await reader.readexactly(1))[0]
                name = await reader.readexactly(size)
                if not asked.done():
                    asked.set_result(name)
            elif not asked.done():
                asked.set_result(b"an address")
        writer.close()

    async with await asyncio.start_server(proxy, "127.0.0.1", 0) as server:
        port = server.sockets[0].getsockname()[1]
        wallet = await make(sync=Electrum("tcp://electrum.invalid:50001", socks5=f"127.0.0.1:{port}", timeout=3))
        with pytest.raises(NotNow, match=r"electrum\.invalid cannot be reached"):
            await wallet.sync()
        assert await asked == b"electrum.invalid"


def test_the_own_chain_of_unconfirmed_coins_is_followed_less_far_than_nodes_do():
    assert bdk_file.MAX_OWN_CHAIN < 25
