"""One wallet file, many processes: nothing is given out twice, nothing is lost, and nobody waits for the dead."""

from __future__ import annotations

import asyncio
import json
import os
import sqlite3
import time

import pytest

from pjv2.backends.wallet.bdk import BdkWallet, DescriptorKeys, Esplora, key_ring, library
from pjv2.backends.wallet.bdk_file import WalletFile
from pjv2.errors import CannotRead, NotNow
from pjv2.lab.electrum import ElectrumServer
from pjv2.psbt.tx import Psbt, Tx, TxOut
from pjv2.units import FeeRate, Network
from tests.unit.backends.wallet.sharer import ANYONE, Sharer

RATE = FeeRate.from_sat_per_vb(3)
A, B = b"\x01" * 32, b"\x02" * 32

pytestmark = pytest.mark.skipif(os.name != "posix", reason="signals are POSIX's")


@pytest.fixture(scope="module")
def sharers():
    """Four processes, which every test gives a file of its own."""
    started = [Sharer() for _ in range(4)]
    yield started
    for sharer in started:
        sharer.kill()


@pytest.fixture
def mortal():
    """A process of this test's own, that it may kill."""
    sharer = Sharer()
    yield sharer
    if sharer.process.returncode is None:
        sharer.kill()


@pytest.fixture
def path(tmp_path):
    return tmp_path / "wallet.sqlite"


@pytest.fixture
async def here(path, esplora, words, clock):
    """Opens the same wallet in this process."""
    from pjv2.backends.wallet.bdk import MnemonicKeys

    opened = []

    async def here(**how):
        settings = {"sync": Esplora(esplora.url), "max_age": 0.0, "gap": 5} | how
        opened.append(await BdkWallet.open(path, MnemonicKeys(words(0)), Network.REGTEST, **settings))
        return opened[-1]

    yield here
    for wallet in opened:
        await wallet.close()


async def every(sharers, **asked):
    """All of them at once."""
    return await asyncio.gather(*(sharer.ask(**asked) for sharer in sharers))


async def opened(sharers, path, server=None, **how):
    names = await every(sharers, do="open", path=str(path), server=server, **how)
    assert len(set(names)) == 1


def on_disk(path):
    with sqlite3.connect(f"file:{path}?mode=ro", uri=True) as file:
        rows = file.execute("SELECT last_revealed FROM bdk_descriptor_last_revealed ORDER BY 1").fetchall()
    file.close()
    return [row[0] for row in rows]


# ---------------------------------------------------------------- addresses


async def test_four_processes_give_out_a_hundred_addresses_and_none_twice(sharers, path):
    await opened(sharers, path)
    external = await every(sharers, do="addresses", count=25)
    change = await every(sharers, do="addresses", count=5, change=True)
    for given, count in ((external, 100), (change, 20)):
        indexes = [index for one in given for index, _ in one]
        assert sorted(indexes) == list(range(count))
        assert len({script for one in given for _, script in one}) == count
    assert on_disk(path) == [19, 99]


async def test_a_file_that_several_make_at_the_same_time_is_made_once(sharers, tmp_path):
    for number in range(5):
        await opened(sharers, tmp_path / f"{number}.sqlite")
        given = await every(sharers, do="addresses", count=1)
        assert sorted(one[0][0] for one in given) == [0, 1, 2, 3]


async def test_objects_of_one_process_take_turns_too(here):
    wallets = [await here(sync=None) for _ in range(3)]
    given = await asyncio.gather(*(wallet.new_address() for wallet in wallets for _ in range(10)))
    assert sorted(address.index for address in given) == list(range(30))
    scripts = {address.script for address in given}
    for wallet in wallets:
        assert await wallet.scripts() == scripts


async def test_a_file_with_a_write_ahead_log_is_read_in_every_turn(here, path):
    """SQLite's change counter may stand still in one."""
    first = await here(sync=None)
    await first.new_address()
    with sqlite3.connect(path) as file:
        assert file.execute("PRAGMA journal_mode = WAL").fetchone() == ("wal",)
    file.close()
    second = await here(sync=None)
    assert [(await wallet.new_address()).index for wallet in (first, second, first, second)] == [1, 2, 3, 4]


async def test_a_file_that_was_put_back_from_a_copy_is_read_again(here, path, tmp_path):
    wallet = await here(sync=None)
    await wallet.new_address()
    copy = tmp_path / "copy"
    copy.write_bytes(path.read_bytes())
    await wallet.new_address()
    copy.replace(path)
    assert (await wallet.new_address()).index == 1


# ---------------------------------------------------------------- coins and leases


async def test_a_coin_is_never_leased_to_two_of_them(sharers, path, here, pay):
    wallet = await here()
    coins = [str(coin) for coin in await pay(wallet, 60_000, 60_000)]
    await wallet.sync()
    await opened(sharers, path)
    until = time.time() + 600
    for turn in range(6):
        asked = [
            sharer.ask(do="lock", coins=coins, lock_id=bytes([turn, number] * 16).hex(), until=until)
            for number, sharer in enumerate(sharers)
        ]
        refused = await asyncio.gather(*asked)
        winners = [number for number, one in enumerate(refused) if not one]
        assert len(winners) == 1
        assert all(sorted(one) == sorted(coins) for one in refused if one)
        assert await every(sharers, do="coins") == [[]] * 4
        lock_id = bytes([turn, winners[0]] * 16).hex()
        other = sharers[winners[0] - 1]
        assert (
            await other.ask(do="lock", coins=coins, lock_id=lock_id, until=until + 60) == []
        )  # renewed by another process
        await other.ask(do="unlock", coins=coins, lock_id=lock_id)
        assert [sorted(one) for one in await every(sharers, do="coins")] == [sorted(coins)] * 4
    leases = json.loads(path.with_name("wallet.sqlite.leases").read_text())["leases"]
    assert leases == {}


async def test_payments_of_several_processes_take_different_coins_and_change_addresses(sharers, path, here, pay):
    wallet = await here()
    await pay(wallet, *[60_000] * 8)
    await wallet.sync()
    await opened(sharers, path)
    funded = []
    for number in range(2):
        asked = [
            sharer.ask(do="fund", value=40_000, lock_id=bytes([number, place] * 16).hex())
            for place, sharer in enumerate(sharers)
        ]
        funded += [Tx.parse(bytes.fromhex(tx)) for tx in await asyncio.gather(*asked)]
    assert len({spend.outpoint for tx in funded for spend in tx.inputs}) == sum(len(tx.inputs) for tx in funded) == 8
    assert len({out.script for tx in funded for out in tx.outputs} - {ANYONE}) == 8


@pytest.mark.parametrize("kind", ["esplora", "electrum"])
async def test_a_coin_that_one_process_heard_of_is_known_to_the_others(sharers, path, chain, esplora, kind):
    async with ElectrumServer(chain) as electrum:
        await opened(sharers[:3], path, (esplora if kind == "esplora" else electrum).url, max_age=3600.0)
        ((_, script),) = await sharers[0].ask(do="addresses", count=1)
        assert [await sharer.ask(do="coins") for sharer in sharers[:3]] == [[]] * 3
        outpoint = await chain.fund(bytes.fromhex(script), 50_000)
        await sharers[1].ask(do="sync")
        for sharer in sharers[:3]:
            assert await sharer.ask(do="coins") == [str(outpoint)]
            await sharer.ask(do="sync")
            assert await sharer.ask(do="balance") == 50_000


async def test_an_address_of_one_process_is_watched_by_the_others(sharers, path, chain, esplora):
    await opened(sharers[:2], path, esplora.url)
    await sharers[1].ask(do="sync")
    ((_, script),) = await sharers[0].ask(do="addresses", count=1)
    outpoint = await chain.fund(bytes.fromhex(script), 50_000)
    await sharers[1].ask(do="sync")
    assert await sharers[1].ask(do="coins") == [str(outpoint)]


async def test_a_broadcast_of_one_process_survives_the_syncs_of_another(sharers, path, esplora, here, pay):
    (coin,) = await pay(await here(), 90_000)
    await opened(sharers[:2], path, esplora.url)
    tx = await sharers[0].ask(do="fund", value=20_000, lock_id=A.hex())
    await sharers[0].ask(do="saw", tx=tx, ago=100)  # long enough for a server's silence to count
    await sharers[0].ask(do="unlock", coins=[str(coin)], lock_id=A.hex())
    for _ in range(2):
        await sharers[1].ask(do="sync")
        assert await every(sharers[:2], do="coins") == [[], []]
        assert await every(sharers[:2], do="balance") == [0, 0]


async def test_a_coin_that_another_program_froze_in_the_file_is_left_alone_at_once(here, path, pay):
    wallet = await here()
    frozen, free = await pay(wallet, 60_000, 60_000)
    with sqlite3.connect(path) as file:
        file.execute("INSERT INTO bdk_wallet_locked_outpoints (txid, vout) VALUES (?, ?)", (frozen.txid, frozen.vout))
    file.close()
    assert [coin.outpoint for coin in await wallet.coins()] == [free]


# ---------------------------------------------------------------- crashes


async def test_a_process_that_dies_in_its_turn_holds_up_nobody_and_leaves_nothing(mortal, path, here):
    wallet = await here(sync=None)
    await wallet.new_address()
    await mortal.ask(do="open", path=str(path))
    assert await mortal.ask(do="stay_in_a_turn") == "in a turn"
    waiting = asyncio.create_task(wallet.new_address())
    mortal.kill()
    assert (await waiting).index == 1
    assert on_disk(path) == [1]


async def test_a_process_that_dies_while_it_writes_leaves_a_readable_file(mortal, path, here, words):
    wallet = await here(sync=None)
    await wallet.new_address()
    await wallet.new_address()
    await mortal.ask(do="open", path=str(path))
    assert await mortal.ask(do="die_while_writing") == "half written"
    mortal.kill()
    assert path.with_name("wallet.sqlite-journal").stat().st_size > 0
    assert path.stat().st_size > 200 * 2000  # the unfinished change is in the file
    late = await here(sync=None)
    assert [(await one.new_address()).index for one in (wallet, late, wallet)] == [2, 3, 4]


async def test_a_process_that_was_stopped_in_its_turn_is_not_waited_for_for_ever(mortal, path, here):
    patient = await here(sync=None)
    wallet = await here(sync=None, patience=0.2)
    await mortal.ask(do="open", path=str(path))
    assert await mortal.ask(do="stay_in_a_turn") == "in a turn"
    beats = 0

    async def beat():
        nonlocal beats
        while True:
            await asyncio.sleep(0.01)
            beats += 1

    beating = asyncio.create_task(beat())
    began = time.monotonic()
    results = await asyncio.gather(*(wallet.new_address() for _ in range(20)), return_exceptions=True)
    took = time.monotonic() - began
    beating.cancel()
    assert {type(result) for result in results} == {NotNow}
    assert "held by another process for more than 0.2 s" in str(results[0])
    assert took < 2  # twenty who wait together wait once
    assert beats >= 3  # and nobody else waits with them
    with pytest.raises(NotNow, match="held by another process"):
        await here(patience=0.0)
    waiting = asyncio.create_task(patient.new_address())
    mortal.kill()
    assert (await waiting).index == 0
    assert (await wallet.new_address()).index == 1


async def test_closing_ends_the_wait_for_a_turn(mortal, path, here):
    wallet = await here(sync=None)
    await mortal.ask(do="open", path=str(path))
    assert await mortal.ask(do="stay_in_a_turn") == "in a turn"
    waiting = asyncio.create_task(wallet.new_address())
    await asyncio.sleep(0)
    await wallet.close()
    with pytest.raises(NotNow, match="is closed"):
        await waiting


async def test_what_a_turn_could_not_store_is_forgotten(here):
    wallet, other = await here(sync=None), await here(sync=None)

    def fails(file):
        file._wallet.reveal_next_address(file._branches[0])
        raise NotNow("no disk")

    with pytest.raises(NotNow, match="no disk"):
        await wallet._do(fails)
    assert (await wallet.new_address()).index == 0
    assert (await other.new_address()).index == 1


# ---------------------------------------------------------------- answers of servers that were overtaken


def overtaken(wallet, meanwhile):
    """The wallet's next answer from its server is delivered after `meanwhile`. Answers what it asked, by number."""
    true, asked = wallet._ask, []

    async def ask(source, work):
        answer = await true(source, work)
        asked.append(work)
        if len(asked) == 1:
            await meanwhile()
        return answer

    wallet._ask = ask
    return asked


async def test_an_older_answer_is_put_on_top_of_what_another_stored_meanwhile(here, chain):
    slow, quick = await here(max_age=3600.0), await here()
    first, second = await slow.new_address(), await quick.new_address()
    early = await chain.fund(first.script, 50_000)
    late = []

    async def meanwhile():
        late.append(await chain.fund(second.script, 60_000))
        await quick.sync()
        await quick.lock([early], A, time.time() + 600)

    asked = overtaken(slow, meanwhile)
    await slow.sync()
    assert len(asked) == 1
    assert await slow._do(WalletFile.tip) == chain.height
    for wallet in (slow, quick):
        assert await wallet.balance() == 110_000
        assert [coin.outpoint for coin in await wallet.coins()] == late
        assert await wallet.lock([early], B, time.time() + 600) == (early,)


async def test_an_answer_from_before_a_reorganisation_takes_nothing_back(here, chain):
    slow, quick = await here(max_age=3600.0), await here()
    address = await slow.new_address()
    gone = await chain.fund(address.script, 50_000)
    kept = []

    async def meanwhile():
        await chain.reorg(1, drop=[gone.txid])
        kept.append(await chain.fund(address.script, 60_000))
        await quick.sync()

    asked = overtaken(slow, meanwhile)
    await slow.sync()
    assert len(asked) == 2  # it asked again
    for wallet in (slow, quick, await here(sync=None)):
        assert [coin.outpoint for coin in await wallet.coins()] == kept
        assert await wallet.balance() == 60_000


# ---------------------------------------------------------------- reading again


async def test_what_others_stored_is_read_once_and_not_in_every_turn(here, monkeypatch):
    wallet, other = await here(sync=None), await here(sync=None)
    read, true = [], WalletFile._open
    monkeypatch.setattr(WalletFile, "_open", lambda file: read.append(file) or true(file))
    for _ in range(3):
        await other.new_address()
        await other.balance()
    assert read == []
    for _ in range(3):
        await wallet.balance()
    assert read == [wallet._file]
    await wallet.new_address()
    await wallet.balance()
    assert read == [wallet._file]


async def test_a_file_from_before_scripts_were_kept_is_read_and_from_then_on_quickly(path, words):
    """The library derives a quarter of a millisecond per script; a thousand of them are not derived at every turn."""
    from pjv2.backends.wallet.bdk import MnemonicKeys

    bdk, ring = library(), key_ring(MnemonicKeys(words(0)), Network.REGTEST)
    persister = bdk.Persister.new_sqlite(str(path))
    old = bdk.Wallet(ring.external, ring.change, bdk.Network.REGTEST, persister, 25)
    old.reveal_addresses_to(bdk.KeychainKind.EXTERNAL, 1999)
    old.persist(persister)
    del old, persister

    def seconds(work):
        began = time.process_time()
        work()
        return time.process_time() - began

    made = []
    first = seconds(lambda: made.append(WalletFile(path, ring, gap=25)))
    (file,) = made
    again = min(seconds(file._open) for _ in range(3))
    assert again < first / 4
    with file.alone(time.monotonic()):
        assert file.reveal(change=False).index == 2000
        assert len(file.scripts(file.revealed())) == 2001
    file.close()


async def test_an_address_that_the_file_knows_otherwise_than_the_keys_is_not_given_out(here, path, pay, clock):
    """A flipped bit in a script on disk would be an address whose coins nobody can spend."""
    wallet = await here()
    await pay(wallet, 90_000)
    await wallet.close()
    with sqlite3.connect(path) as file:
        kept = file.execute("SELECT rowid, spk FROM bdk_descriptor_derived_spks WHERE spk_index < 2").fetchall()
        assert len(kept) == 4
        for row, script in kept:
            flipped = script[:-1] + bytes([script[-1] ^ 1])
            file.execute("UPDATE bdk_descriptor_derived_spks SET spk = ? WHERE rowid = ?", (flipped, row))
    file.close()
    wallet = await here(max_age=3600.0)
    for _ in range(2):
        with pytest.raises(CannotRead, match="is damaged: what it holds as address 1 is not the one of these keys"):
            await wallet._do(WalletFile.reveal, change=False)
        with pytest.raises(CannotRead, match="is damaged: what it holds as address 0 is not the one of these keys"):
            await wallet._do(WalletFile.reveal, change=True)


async def test_a_watch_only_process_beside_one_that_signs(here, path, pay, words, esplora):
    from pjv2.backends.wallet.bdk import MnemonicKeys

    wallet = await here()
    ring = key_ring(MnemonicKeys(words(0)), Network.REGTEST)
    watching = await BdkWallet.open(path, DescriptorKeys(str(ring.external), str(ring.change)), Network.REGTEST)
    (coin,) = await pay(wallet, 80_000)
    await wallet.sync()
    assert await watching.mine([coin]) == {coin}
    assert await watching.balance() == 80_000
    index = (await watching.new_address()).index
    assert (await wallet.new_address()).index == index + 1
    psbt = await wallet.fund([TxOut(20_000, ANYONE)], RATE, A, time.time() + 600)
    assert await watching.locked() == {coin} == {spend.outpoint for spend in Psbt.parse(psbt).tx.inputs}
    await watching.close()
