"""The paper wallet keeps the contract of a wallet, with every kind of script it speaks, under real consensus."""

import json
import stat
from contextlib import asynccontextmanager
from dataclasses import replace

import pytest

pytest.importorskip("pbk", reason="the lab needs libbitcoinkernel")

from pjv2.errors import CannotRead, NotNow, WrongUsage
from pjv2.lab.chain import LabChain
from pjv2.psbt.tx import Psbt, TxOut
from pjv2.testing.check_wallet import ANYONE, WALLET_CHECKS, WalletRig, check_wallet
from pjv2.testing.clock import ManualClock
from pjv2.testing.paper_wallet import PaperWallet
from pjv2.units import FeeRate, Network, Outpoint

SEED = b"a seed for tests and nothing else"
KINDS = ("p2wpkh", "p2tr", "p2sh-p2wpkh", "p2pkh")


@asynccontextmanager
async def paper_rig(kind, path):
    clock = ManualClock()
    async with LabChain() as chain:

        def opened():
            return PaperWallet(chain, seed=SEED, store_path=path, kinds=(kind,), now=clock.now)

        wallet = opened()

        async def reopen():
            await wallet.close()
            return opened()

        async def lock_signing(locked):
            wallet.locked_for_signing = locked

        async def advance(seconds):
            clock.advance(seconds)

        async def mine_to(script):
            await chain.mine(to=script)
            return Outpoint(chain.block(chain.height).txs[0].txid, 0)

        yield WalletRig(
            wallet,
            chain,
            chain.fund,
            chain.mine,
            now=clock.now,
            reopen=reopen,
            advance=advance,
            lock_signing=lock_signing,
            mine_to=mine_to,
        )


@pytest.mark.parametrize("check", WALLET_CHECKS, ids=lambda check: check.__name__)
@pytest.mark.parametrize("kind", KINDS)
async def test_the_paper_wallet_keeps_the_contract(kind, check, tmp_path):
    async with paper_rig(kind, tmp_path / "wallet.json") as rig:
        await check(rig)


async def test_a_wallet_that_offers_locked_coins_fails_the_contract_by_name(tmp_path):
    paths = iter(range(100))

    @asynccontextmanager
    async def broken_rig():
        async with paper_rig("p2wpkh", tmp_path / f"{next(paths)}.json") as rig:

            async def lock(coins, lock_id, until):
                return ()

            rig.wallet.lock = lock
            yield rig

    with pytest.raises(AssertionError, match="a coin of somebody else is not ours: a foreign coin was locked"):
        await check_wallet(broken_rig)


@pytest.fixture
async def chain():
    async with LabChain() as chain:
        yield chain


async def test_coins_of_all_four_kinds_are_spent_in_one_transaction_that_confirms(chain):
    wallet = PaperWallet(chain, seed=SEED, kinds=KINDS)
    for kind in KINDS:
        await chain.fund((await wallet.new_address(kind=kind)).script, 100_000)
    rate = FeeRate.from_sat_per_vb(3)
    psbt = Psbt.parse(await wallet.fund([TxOut(350_000, ANYONE)], rate, b"id", 2e9))
    tx = psbt.extract()
    assert len(tx.inputs) == 4
    assert psbt.fee >= rate.fee(tx.weight)
    assert (await chain.broadcast(tx.raw)).verdict == "accepted"
    await chain.mine()
    assert chain.tx(psbt.extract().txid).height == chain.height


@pytest.mark.parametrize("kind", KINDS)
async def test_a_coin_weighs_at_most_what_it_says_and_hardly_less(chain, kind):
    wallet = PaperWallet(chain, seed=SEED, kinds=(kind,))
    for _ in range(3):
        await chain.fund((await wallet.new_address()).script, 100_000)
    for coin in await wallet.coins():
        lock_id = bytes.fromhex(coin.outpoint.txid)
        tx = Psbt.parse(await wallet.fund([TxOut(50_000, ANYONE)], FeeRate(250), lock_id, 2e9)).extract()
        real = tx.inputs[0].weight
        scale = 4 if kind == "p2pkh" else 1
        assert coin.weight - 3 * scale <= real <= coin.weight


async def test_money_is_found_from_the_seed_alone_and_used_addresses_are_not_given_again(chain):
    first = PaperWallet(chain, seed=SEED)
    scripts = [(await first.new_address()).script for _ in range(5)]
    await chain.fund(scripts[4], 60_000)
    again = PaperWallet(chain, seed=SEED)
    assert await again.balance() == 60_000
    assert (await again.new_address()).script not in scripts


async def test_networks_seeds_and_kinds_have_keys_of_their_own(chain):
    addresses = set()
    for seed in (SEED, b"another seed for tests"):
        for network in (Network.REGTEST, Network.SIGNET):
            for kind in KINDS:
                wallet = PaperWallet(chain, seed=seed, network=network, kinds=(kind,))
                addresses.add((await wallet.new_address()).script)
    assert len(addresses) == 16


async def test_the_file_is_private_and_holds_indexes_and_locks_but_no_seed(chain, tmp_path):
    path = tmp_path / "wallet.json"
    wallet = PaperWallet(chain, seed=SEED, store_path=path)
    address = await wallet.new_address()
    outpoint = await chain.fund(address.script, 60_000)
    await wallet.lock([outpoint], b"\x07" * 32, 2e9)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    text = path.read_text()
    assert json.loads(text)["next"]["p2wpkh/0"] == address.index + 1
    assert json.loads(text)["locks"] == {str(outpoint): ["07" * 32, 2e9]}
    for secret in (SEED.decode(), SEED.hex()):
        assert secret not in text
    assert list(tmp_path.iterdir()) == [path]


async def test_a_file_of_another_wallet_version_or_kind_is_refused_and_left_alone(chain, tmp_path):
    path = tmp_path / "wallet.json"
    await PaperWallet(chain, seed=SEED, store_path=path).new_address()
    before = path.read_text()
    with pytest.raises(WrongUsage, match="belongs to wallet"):
        PaperWallet(chain, seed=b"another seed for tests", store_path=path)
    newer = json.dumps(json.loads(before) | {"version": 2})
    for text, what in ((newer, "version 2"), ("{}", "not the file"), ("noise", "not the file"), ("[]", "not the file")):
        path.write_text(text)
        with pytest.raises(CannotRead, match=what):
            PaperWallet(chain, seed=SEED, store_path=path)
        assert path.read_text() == text


async def test_no_secret_shows(chain):
    wallet = PaperWallet(chain, seed=SEED, kinds=KINDS)
    address = await wallet.new_address()
    key = wallet._by_script[address.script]
    for text in (repr(wallet), str(wallet), repr(key), repr(vars(wallet)["_memory"])):
        assert SEED.hex() not in text
        assert SEED.decode() not in text
        assert key.private.to_hex() not in text
    with pytest.raises(WrongUsage):
        __import__("pickle").dumps(wallet)


async def test_the_psbt_carries_the_wallets_metadata(chain):
    for kind in KINDS:
        wallet = PaperWallet(chain, seed=SEED, kinds=(kind,))
        await chain.fund((await wallet.new_address()).script, 100_000)
        psbt = Psbt.parse(await wallet.fund([TxOut(50_000, ANYONE)], FeeRate(500), b"id", 2e9))
        (known,) = psbt.inputs
        assert known.is_final
        assert known.has_derivation
        assert (known.witness_utxo is None) == (kind == "p2pkh")
        assert (known.non_witness_utxo is None) == (kind in ("p2wpkh", "p2tr"))
        assert sum(out.has_derivation for out in psbt.outputs) == 1


async def test_change_below_dust_joins_the_fee(chain):
    wallet = PaperWallet(chain, seed=SEED)
    await chain.fund((await wallet.new_address()).script, 100_000)
    psbt = Psbt.parse(await wallet.fund([TxOut(99_700, ANYONE)], FeeRate(250), b"id", 2e9))
    assert [out.value for out in psbt.tx.outputs] == [99_700]
    assert (await chain.test(psbt.extract().raw)).verdict == "accepted"


async def test_a_wallet_over_a_silent_chain_is_not_now(chain):
    wallet = PaperWallet(chain, seed=SEED)
    chain.offline = True
    for call in (wallet.coins(), wallet.balance(), wallet.mine([]), wallet.new_address()):
        with pytest.raises(NotNow):
            await call
    assert await wallet.can_sign()


async def test_a_taproot_signature_beside_a_foreign_coin_that_the_psbt_does_not_tell_uses_the_chain(chain):
    wallet = PaperWallet(chain, seed=SEED, kinds=("p2tr",))
    ours = await chain.fund((await wallet.new_address()).script, 100_000)
    theirs = await chain.fund(ANYONE, 50_000)
    (coin,) = await wallet.coins()
    from pjv2.psbt.tx import PsbtInput, PsbtOutput, Tx, TxIn

    tx = Tx(2, 0, (TxIn(theirs), TxIn(ours)), (TxOut(140_000, ANYONE),))
    psbt = Psbt(tx, (PsbtInput(final_script_witness=(b"\x51",)), coin.psbt_input()), (PsbtOutput(),))
    signed = Psbt.parse(await wallet.sign(psbt.serialize(), [ours]))
    assert (await chain.test(signed.extract().raw)).verdict == "accepted"
    lost = replace(tx, inputs=(TxIn(Outpoint("ef" * 32, 0)), TxIn(ours)))
    with pytest.raises(WrongUsage, match="nobody knows"):
        await wallet.sign(replace(psbt, tx=lost).serialize(), [ours])


@pytest.mark.parametrize("bad", [{"seed": b"short"}, {"kinds": ()}, {"kinds": ("p2wsh",)}])
async def test_a_wallet_that_cannot_be_is_refused(chain, bad):
    with pytest.raises(WrongUsage):
        PaperWallet(chain, **({"seed": SEED} | bad))
