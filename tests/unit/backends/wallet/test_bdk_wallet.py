"""The embedded wallet's file: what is on disk, who may open it, locks, addresses, payments."""

from __future__ import annotations

import asyncio
import json
import sqlite3
import stat

import pytest

from pjv2.backends.wallet.bdk import BdkWallet, DescriptorKeys, MnemonicKeys, bdk_wallet, key_ring
from pjv2.config import Config
from pjv2.errors import CannotRead, NotNow, WrongUsage
from pjv2.opening import open_wallet
from pjv2.psbt.scripts import p2wsh_script
from pjv2.psbt.tx import Psbt, TxOut
from pjv2.units import FeeRate, Network, Outpoint

ANYONE = p2wsh_script(b"\x51")
RATE = FeeRate.from_sat_per_vb(3)
KINDS = ("p2wpkh", "p2tr", "p2sh-p2wpkh", "p2pkh")
A, B = b"\x01" * 32, b"\x02" * 32


def change_index(path):
    """The last revealed index of each branch, read from the file by somebody else."""
    with sqlite3.connect(f"file:{path}?mode=ro", uri=True) as file:
        rows = file.execute("SELECT last_revealed FROM bdk_descriptor_last_revealed ORDER BY 1").fetchall()
    file.close()
    return [row[0] for row in rows]


# ---------------------------------------------------------------- the file


async def test_the_files_are_private_and_hold_no_secret(make, pay, words, tmp_path, clock):
    wallet = await make()
    (coin,) = await pay(wallet, 100_000)
    await wallet.lock([coin], A, clock.now() + 600)
    ring = key_ring(MnemonicKeys(words(0)), Network.REGTEST)
    secrets = [ring.external.to_string_with_secret().split("(")[1].split("/")[0], words(0)]
    assert secrets[0].startswith("tprv")
    files = sorted(tmp_path.iterdir())
    assert [path.name.rpartition(".")[2] for path in files] == ["sqlite", "leases", "lock"]
    for path in files:
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        content = path.read_bytes()
        assert b"prv" not in content
        for secret in secrets:
            assert secret.encode() not in content
    assert json.loads(files[1].read_bytes())["leases"] == {str(coin): [A.hex(), clock.now() + 600]}


async def test_a_file_of_another_network_or_of_other_keys_is_refused_and_left_alone(make, tmp_path, words):
    path = tmp_path / "0-p2wpkh.sqlite"
    wallet = await make()
    await wallet.new_address()
    await wallet.close()
    before = path.read_bytes()
    with pytest.raises(WrongUsage, match="for another network"):
        await make(network=Network.SIGNET)
    with pytest.raises(WrongUsage, match="of other keys"):
        await make(path=path, keys=MnemonicKeys(words(1)))
    with pytest.raises(WrongUsage, match="of other keys"):
        await make(path=path, keys=MnemonicKeys(words(0), "p2tr"))
    assert path.read_bytes() == before
    await make()


async def test_what_is_no_wallet_file_is_refused_and_left_alone(make, tmp_path):
    path = tmp_path / "noise.sqlite"
    path.write_bytes(b"noise" * 1000)
    with pytest.raises(CannotRead, match="left as it was"):
        await make(path=path)
    assert path.read_bytes() == b"noise" * 1000
    (tmp_path / "file").write_text("")
    with pytest.raises(NotNow, match="cannot be opened now"):
        await make(path=tmp_path / "file" / "wallet.sqlite")


@pytest.mark.parametrize(
    ("text", "error", "message"),
    [
        ("noise", CannotRead, "not a file of coin locks"),
        ("[]", CannotRead, "not a file of coin locks"),
        ('{"version": 2, "wallet": "x", "leases": {}}', CannotRead, "of version 2"),
        ('{"version": 1, "wallet": "x", "leases": {}}', WrongUsage, "the coin locks of wallet x"),
    ],
)
async def test_locks_that_are_not_ours_or_not_understood_are_refused_and_left_alone(
    make, tmp_path, text, error, message
):
    leases = tmp_path / "0-p2wpkh.sqlite.leases"
    leases.write_text(text)
    with pytest.raises(error, match=message):
        await make()
    assert leases.read_text() == text
    leases.unlink()
    await make()  # the file is not held by the failed attempt


async def test_a_closed_wallet_says_so_and_closing_twice_is_fine(make):
    wallet = await make()
    await wallet.close()
    await wallet.close()
    for call in (wallet.coins(), wallet.new_address(), wallet.mine([]), wallet.sync(), wallet.balance()):
        with pytest.raises(NotNow, match="closed"):
            await call
    assert not await wallet.can_sign()


async def test_a_wallet_shows_its_public_name_and_is_not_pickled(make, words):
    wallet = await make(kind="p2tr")
    assert repr(wallet) == f"BdkWallet({await wallet.fingerprint()}, regtest, p2tr)"
    with pytest.raises(WrongUsage):
        __import__("pickle").dumps(wallet)


# ---------------------------------------------------------------- addresses


async def test_indexes_of_both_branches_are_on_disk_when_the_address_is_known(make, tmp_path):
    wallet = await make()
    for _ in range(3):
        address = await wallet.new_address()
    change = await wallet.new_address(change=True)
    assert (address.index, change.index) == (2, 0)
    assert change_index(tmp_path / "0-p2wpkh.sqlite") == [0, 2]


async def test_addresses_of_many_tasks_are_all_different(make):
    wallet = await make()
    addresses = await asyncio.gather(*(wallet.new_address(change=number % 2 == 0) for number in range(40)))
    assert len({address.script for address in addresses}) == 40


async def test_a_restored_wallet_asks_for_used_addresses_before_it_gives_one(make, pay, tmp_path):
    wallet = await make()
    await wallet.new_address()
    await pay(wallet, 50_000)
    await wallet.close()
    restored = await make(path=tmp_path / "restored.sqlite")
    assert (await restored.new_address()).index == 2
    assert await restored.balance() == 50_000


async def test_money_beyond_the_gap_is_found_by_a_wider_scan(make, chain, tmp_path):
    wallet = await make()
    for _ in range(12):
        address = await wallet.new_address()
    outpoint = await chain.fund(address.script, 70_000)
    await wallet.close()
    restored = await make(path=tmp_path / "restored.sqlite")
    assert await restored.balance() == 0
    await restored.rescan(20)
    assert [coin.outpoint for coin in await restored.coins()] == [outpoint]
    assert (await restored.new_address()).index == 12


async def test_an_address_waits_for_its_index_to_be_on_disk(make, tmp_path):
    wallet = await make()
    path = tmp_path / "0-p2wpkh.sqlite"
    first = await wallet.new_address()
    full = (
        "CREATE TRIGGER full BEFORE INSERT ON bdk_descriptor_last_revealed BEGIN SELECT RAISE(ABORT, 'disk full'); END"
    )
    with sqlite3.connect(path) as file:
        file.execute(full)
    with pytest.raises(NotNow, match="cannot be written now"):
        await wallet.new_address()
    assert change_index(path) == [first.index]
    with file:
        file.execute("DROP TRIGGER full")
    file.close()
    after = await wallet.new_address()
    assert after.index == first.index + 1  # the other one was never given out
    assert change_index(path) == [after.index]


# ---------------------------------------------------------------- coins and locks


@pytest.mark.parametrize("kind", KINDS)
async def test_a_coin_weighs_at_most_what_it_says_and_hardly_less(make, pay, kind, clock):
    wallet = await make(kind=kind)
    await pay(wallet, 100_000, 100_000)
    for coin in await wallet.coins():
        psbt = await wallet.fund([TxOut(50_000, ANYONE)], RATE, bytes.fromhex(coin.outpoint.txid), clock.now() + 9)
        real = Psbt.parse(psbt).extract().inputs[0].weight
        assert coin.weight - (12 if kind == "p2pkh" else 3) <= real <= coin.weight
        assert (coin.redeem_script is not None) == (kind == "p2sh-p2wpkh")
        assert (coin.non_witness is not None) == (kind == "p2pkh")


async def test_a_crash_between_lease_and_lock_leaves_the_coin_locked(make, pay, tmp_path, clock):
    wallet = await make()
    coin, other = await pay(wallet, 60_000, 60_000)
    name = await wallet.fingerprint()
    await wallet.close()
    leases = {"version": 1, "wallet": name, "leases": {str(coin): [A.hex(), clock.now() + 600]}}
    (tmp_path / "0-p2wpkh.sqlite.leases").write_text(json.dumps(leases))
    wallet = await make()
    assert [held.outpoint for held in await wallet.coins()] == [other]
    psbt = Psbt.parse(await wallet.fund([TxOut(20_000, ANYONE)], RATE, B, clock.now() + 600))
    assert [spend.outpoint for spend in psbt.tx.inputs] == [other]
    assert await wallet.lock([coin], A, clock.now() + 700) == ()


async def test_a_coin_that_somebody_froze_in_the_file_is_neither_offered_nor_locked_nor_freed(make, pay, clock):
    wallet = await make()
    frozen, free = await pay(wallet, 60_000, 60_000)
    await wallet._do(lambda file: (file._wallet.lock_outpoint(file._outpoint(frozen)), file._persist()))
    assert [coin.outpoint for coin in await wallet.coins()] == [free]
    assert await wallet.lock([frozen, free], A, clock.now() + 600) == (frozen,)
    await wallet.unlock([frozen], A)
    await wallet.close()
    wallet = await make()
    assert [coin.outpoint for coin in await wallet.coins()] == [free]


async def test_an_ended_lease_is_forgotten_on_disk_too(make, pay, tmp_path, clock):
    wallet = await make()
    (coin,) = await pay(wallet, 60_000)
    await wallet.lock([coin], A, clock.now() + 10)
    clock.advance(11)
    assert len(await wallet.coins()) == 1
    assert json.loads((tmp_path / "0-p2wpkh.sqlite.leases").read_text())["leases"] == {}
    await wallet.close()
    assert len(await (await make()).coins()) == 1


async def test_what_is_no_outpoint_is_not_ours(make):
    wallet = await make()
    assert (
        await wallet.mine([Outpoint("noise", 0), Outpoint("ab" * 32, 1 << 32), Outpoint("ab" * 32, -1)]) == frozenset()
    )


async def test_of_two_at_once_only_one_locks_a_coin(make, pay, clock):
    wallet = await make()
    coins = await pay(wallet, 60_000, 60_000)
    until = clock.now() + 600
    refused = await asyncio.gather(*(wallet.lock(coins, bytes([n]) * 32, until) for n in range(8)))
    assert sorted(map(len, refused)) == [0] + [2] * 7


# ---------------------------------------------------------------- paying


async def test_payments_at_once_take_different_coins(make, pay, clock):
    wallet = await make()
    await pay(wallet, 60_000, 60_000, 60_000)
    until = clock.now() + 600
    funded = await asyncio.gather(
        *(wallet.fund([TxOut(40_000, ANYONE)], RATE, bytes([n]) * 32, until) for n in range(3))
    )
    spent = [spend.outpoint for psbt in funded for spend in Psbt.parse(psbt).tx.inputs]
    assert len(spent) == len(set(spent)) == 3


async def test_a_payment_that_fails_uses_up_no_change_address_and_one_that_succeeds_stores_its_own(
    make, pay, tmp_path, clock
):
    wallet = await make()
    await pay(wallet, 60_000)
    path, until = tmp_path / "0-p2wpkh.sqlite", clock.now() + 600
    for value in (60_000, 10_000_000):
        with pytest.raises(WrongUsage, match="sat are missing"):
            await wallet.fund([TxOut(value, ANYONE)], RATE, A, until)
    with pytest.raises(WrongUsage, match="so small"):
        await wallet.fund([TxOut(100, ANYONE)], RATE, A, until)
    with pytest.raises(WrongUsage, match="needs an output"):
        await wallet.fund([], RATE, A, until)
    exact = Psbt.parse(await wallet.fund([TxOut(59_500, ANYONE)], RATE, A, until))
    assert len(exact.tx.outputs) == 1  # a rest below dust joins the fee
    await wallet.unlock([spend.outpoint for spend in exact.tx.inputs], A)
    assert change_index(path) == [0]
    psbt = Psbt.parse(await wallet.fund([TxOut(20_000, ANYONE)], RATE, A, until))
    assert change_index(path) == [0, 0]
    change = next(out.script for out in psbt.tx.outputs if out.script != ANYONE)
    await wallet.close()
    wallet = await make()
    assert (await wallet.new_address(change=True)).script != change


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rate", [1, 1.5, 7.25, 100])
async def test_the_fee_is_the_rate_by_weight(make, pay, kind, rate, clock):
    wallet = await make(kind=kind)
    await pay(wallet, 100_000, 100_000)
    asked = FeeRate.from_sat_per_vb(rate)
    psbt = Psbt.parse(await wallet.fund([TxOut(120_000, ANYONE)], asked, A, clock.now() + 600))
    weight = psbt.extract().weight
    assert asked.fee(weight) <= psbt.fee <= asked.fee(weight + 8 * len(psbt.inputs) + 4)
    assert psbt.inputs[0].is_final


async def test_others_unconfirmed_coins_are_never_spent_and_own_change_only_when_needed(make, pay, chain, clock):
    wallet, until = await make(), clock.now() + 600
    await pay(wallet, 100_000)
    await chain.fund((await wallet.new_address()).script, 500_000, confirm=False)
    tx = Psbt.parse(await wallet.fund([TxOut(20_000, ANYONE)], RATE, A, until)).extract()
    assert (await chain.broadcast(tx.raw)).verdict == "accepted"
    change = next(Outpoint(tx.txid, n) for n, out in enumerate(tx.outputs) if out.script != ANYONE)
    (small,) = await pay_unmined(wallet, chain, 30_000)
    psbt = Psbt.parse(await wallet.fund([TxOut(60_000, ANYONE)], RATE, B, until))
    assert [spend.outpoint for spend in psbt.tx.inputs] == [change]
    assert small not in {spend.outpoint for spend in psbt.tx.inputs}
    assert (await chain.test(psbt.extract().raw)).verdict == "accepted"
    with pytest.raises(WrongUsage, match="are missing"):
        await wallet.fund([TxOut(100_000, ANYONE)], RATE, b"\x03" * 32, until)


async def pay_unmined(wallet, chain, value):
    return [await chain.fund((await wallet.new_address()).script, value, confirm=False)]


# ---------------------------------------------------------------- watch-only


async def test_a_watch_only_wallet_sees_everything_and_signs_nothing(make, pay, words, tmp_path, clock):
    wallet = await make()
    (coin,) = await pay(wallet, 80_000)
    psbt = await wallet.fund([TxOut(20_000, ANYONE)], RATE, A, clock.now() + 60)
    await wallet.unlock([coin], A)
    name = await wallet.fingerprint()
    await wallet.close()
    ring = key_ring(MnemonicKeys(words(0)), Network.REGTEST)
    watching = await make(keys=DescriptorKeys(str(ring.external), str(ring.change)))  # the same file
    assert await watching.fingerprint() == name
    assert "watch-only" in repr(watching)
    assert not await watching.can_sign()
    assert await watching.balance() == 80_000
    assert await watching.mine([coin]) == {coin}
    assert await watching.coins() == ()
    with pytest.raises(NotNow, match="public keys only"):
        await watching.sign(psbt, [coin])
    with pytest.raises(WrongUsage, match="public keys only"):
        await watching.fund([TxOut(20_000, ANYONE)], RATE, A, clock.now() + 60)
    await watching.close()
    again = await make()
    assert await again.can_sign()
    assert [held.outpoint for held in await again.coins()] == [coin]


# ---------------------------------------------------------------- as a program opens it


async def test_the_configuration_opens_a_wallet_by_its_words(esplora, chain, words, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))
    file = tmp_path / "words"
    file.write_text(words(3) + "\n")
    file.chmod(0o600)
    told = {"wallet": {"mnemonic_file": str(file)}, "chain": {"url": esplora.url}}
    wallet = await open_wallet(Config.load(mapping=told))
    assert isinstance(wallet, BdkWallet)
    address = await wallet.new_address()
    await chain.fund(address.script, 40_000)
    await wallet.sync()
    assert await wallet.balance() == 40_000
    await wallet.close()
    with pytest.raises(WrongUsage, match="has no keys"):
        await open_wallet(Config.load(mapping={"chain": {"url": esplora.url}}))
    with pytest.raises(WrongUsage, match='"esplora" or "electrum"'):
        await open_wallet(Config.load(mapping=told | {"chain": {"backend": "bitcoind", "url": "http://127.0.0.1:1"}}))


async def test_a_lab_party_opens_a_wallet_in_its_home(esplora, chain, words, tmp_path, clock):
    from pjv2.backends.wallet.bdk import Esplora

    async def opened():
        return await bdk_wallet(tmp_path / "alice", Esplora(esplora.url), words(9), kind="p2tr", now=clock.now)

    wallet = await opened()
    await chain.fund((await wallet.new_address()).script, 40_000)
    assert await wallet.balance() == 40_000
    await wallet.close()
    wallet = await opened()
    assert len(await wallet.coins()) == 1
    await wallet.close()
