"""What happens to a Core node and its wallets in the course of a year: locked, missing, restarted, reorganised, shared."""

from __future__ import annotations

import asyncio
import json
from contextlib import asynccontextmanager
from dataclasses import replace

import httpx
import pytest

from pjv2.backends.bitcoind_rpc import Call, Refused, in_btc, password_login
from pjv2.backends.chain.bitcoind import BitcoindChain
from pjv2.backends.wallet.bitcoind import BitcoindWallet
from pjv2.errors import NotNow, WrongUsage
from pjv2.psbt.scripts import p2wsh_script
from pjv2.psbt.tx import Psbt, PsbtOutput, ScriptKind, Tx, TxIn, TxOut, script_to_address
from pjv2.testing.check_chain import ANYONE
from pjv2.units import FeeRate, Network, Outpoint
from tests.contract.bitcoind_rig import PASSPHRASE, miner_of, needs_bitcoind, new_wallet, rpc_of, running, unlock

pytestmark = needs_bitcoind

RATE = FeeRate.from_sat_per_vb(5)
ID, OTHER = b"\x01" * 32, b"\x02" * 32
LATER = 4_000_000_000.0


@pytest.fixture(scope="module")
def node():
    with running() as made:
        yield made


@pytest.fixture
async def miner(node):
    async with miner_of(node) as made:
        yield made


class Counting(httpx.AsyncHTTPTransport):
    """Writes down which methods each request asked for."""

    def __init__(self):
        super().__init__()
        self.requests = []

    async def handle_async_request(self, request):
        body = b"".join([part async for part in request.stream])
        self.requests.append([call["method"] for call in json.loads(body)])
        return await super().handle_async_request(
            httpx.Request(request.method, request.url, headers=request.headers, content=body)
        )


@asynccontextmanager
async def wallet_of(node, name, home, **more):
    rpc_more = {key: more.pop(key) for key in ("transport", "network", "login") if key in more}
    wallet = BitcoindWallet(node.rpc(name, **rpc_more), home, **more)
    try:
        yield wallet
    finally:
        await wallet.close()


@asynccontextmanager
async def chain_of(node, name=None, **more):
    chain = BitcoindChain(node.rpc(name, **more))
    try:
        yield chain
    finally:
        await chain.close()


async def funded(wallet, miner, *values):
    return [await miner.fund((await wallet.new_address()).script, value) for value in values or (200_000,)]


def spend(outpoints, value, script=ANYONE, version=2):
    return Tx(version, 0, tuple(TxIn(outpoint, witness=(b"\x51",)) for outpoint in outpoints), (TxOut(value, script),))


async def view(chain, *, txids=(), outpoints=(), scripts=(), since=0):
    return await chain.view(frozenset(txids), frozenset(outpoints), frozenset(scripts), since)


# ---------------------------------------------------------------- wallets as people have them


async def test_a_locked_wallet_says_how_to_unlock_it_and_takes_no_lock(node, miner, tmp_path):
    name = await new_wallet(miner, passphrase=PASSPHRASE)
    async with wallet_of(node, name, tmp_path) as wallet, rpc_of(node, name) as rpc:
        (coin,) = await funded(wallet, miner)
        psbt = await wallet.fund([TxOut(20_000, ANYONE)], RATE, ID, LATER)
        await wallet.unlock([coin], ID)
        await rpc.do(Call("walletlock"))
        assert not await wallet.can_sign()
        assert [one.outpoint for one in await wallet.coins()] == [coin]
        with pytest.raises(NotNow, match=f"bitcoin-cli -rpcwallet={name} walletpassphrase"):
            await wallet.fund([TxOut(20_000, ANYONE)], RATE, ID, LATER)
        with pytest.raises(NotNow, match="walletpassphrase"):
            await wallet.sign(psbt, [coin])
        assert await wallet.locked() == frozenset()
        await unlock(node, name)
        assert await wallet.can_sign()


async def test_a_wallet_that_is_not_there_is_named_with_what_makes_it(node, tmp_path):
    async with wallet_of(node, "nobody's", tmp_path) as wallet:
        with pytest.raises(WrongUsage, match="has no wallet nobody's: make it with bitcoin-cli createwallet"):
            await wallet.fingerprint()
        with pytest.raises(WrongUsage):
            await wallet.can_sign()


async def test_a_wallet_that_is_not_loaded_is_loaded_at_the_start_and_later(node, miner, tmp_path):
    name = await new_wallet(miner)
    async with rpc_of(node, name) as rpc:
        await rpc.do(Call("unloadwallet"))
        async with wallet_of(node, name, tmp_path) as wallet:
            fingerprint = await wallet.fingerprint()
            await rpc.do(Call("unloadwallet"))
            assert await wallet.coins() == ()
            await rpc.do(Call("unloadwallet"))
            assert (await wallet.new_address()).script
            assert await wallet.fingerprint() == fingerprint


async def test_several_wallets_without_a_name_in_the_url_are_refused_with_the_way_to_say_it(node, miner, tmp_path):
    await new_wallet(miner)
    async with wallet_of(node, None, tmp_path) as wallet:
        with pytest.raises(WrongUsage, match="/wallet/NAME"):
            await wallet.coins()


async def test_a_node_of_another_network_is_refused_by_wallet_and_chain(node, miner, tmp_path):
    name = await new_wallet(miner)
    async with (
        wallet_of(node, name, tmp_path, network=Network.BITCOIN) as wallet,
        chain_of(node, network=Network.BITCOIN) as chain,
    ):
        for asking in (
            wallet.network(),
            wallet.coins(),
            chain.tip(),
            chain.prevouts([]),
            chain.broadcast(spend([Outpoint("ab" * 32, 0)], 1_000).raw),
        ):
            with pytest.raises((WrongUsage, NotNow), match="another network than bitcoin"):
                await asking
    assert list(tmp_path.iterdir()) == []


async def test_a_wallet_that_only_watches_offers_nothing_and_says_why_it_does_not_sign(node, miner, tmp_path):
    name, watching = await new_wallet(miner), await new_wallet(miner, disable_private_keys=True)
    async with (
        wallet_of(node, name, tmp_path / "a") as wallet,
        rpc_of(node, name) as rpc,
        rpc_of(node, watching) as watch,
    ):
        (listed,) = await rpc.ask(Call("listdescriptors"))
        wanted = [
            {
                "desc": one["desc"],
                "active": True,
                "internal": one["internal"],
                "range": [0, 5],
                "timestamp": one["timestamp"],
            }
            for one in listed["descriptors"]
            if one["desc"].startswith("wpkh")
        ]
        await watch.do(Call("importdescriptors", (wanted,)))
        (coin,) = await funded(wallet, miner)
        psbt = await wallet.fund([TxOut(20_000, ANYONE)], RATE, ID, LATER)
        async with wallet_of(node, watching, tmp_path / "b") as cold:
            assert not await cold.can_sign()
            assert await cold.coins() == ()
            assert await cold.mine([coin]) == {coin}
            assert await cold.balance() == 200_000
            for asking in (cold.sign(psbt, [coin]), cold.fund([TxOut(20_000, ANYONE)], RATE, ID, LATER)):
                with pytest.raises(WrongUsage, match="no private keys"):
                    await asking


async def test_a_login_that_the_node_does_not_know_is_not_now(node, tmp_path):
    wrong = password_login("nobody", lambda: "wrong")
    async with wallet_of(node, "miner", tmp_path, login=wrong) as wallet, chain_of(node, login=wrong) as chain:
        for asking in (wallet.fingerprint(), chain.tip()):
            with pytest.raises(NotNow, match="does not accept the login"):
                await asking
        assert not await wallet.can_sign()


async def test_coins_of_every_kind_are_offered_together_with_what_each_needs(node, miner, tmp_path):
    name = await new_wallet(miner)
    async with wallet_of(node, name, tmp_path) as wallet, rpc_of(node, name) as rpc:
        for kind in ("bech32", "bech32m", "p2sh-segwit", "legacy"):
            address = await rpc.do(Call("getnewaddress", ("", kind)))
            await miner.call("sendtoaddress", address, in_btc(50_000))
        await miner.mine()
        coins = {coin.kind: coin for coin in await wallet.coins()}
        weights = {kind: coin.weight for kind, coin in coins.items()}
        assert weights == {
            ScriptKind.P2WPKH: 272, ScriptKind.P2TR: 230, ScriptKind.P2SH: 364, ScriptKind.P2PKH: 592,
        }  # fmt: skip
        # All of them in one transaction that the network takes.
        tx = Tx(2, 0, tuple(TxIn(coin.outpoint) for coin in coins.values()), (TxOut(195_000, ANYONE),))
        psbt = Psbt(tx, tuple(coin.psbt_input() for coin in coins.values()), _outputs(tx))
        signed = Psbt.parse(await wallet.sign(psbt.serialize(), [coin.outpoint for coin in coins.values()])).extract()
        for coin, txin in zip(coins.values(), signed.inputs, strict=True):
            assert coin.weight - 8 <= txin.weight <= coin.weight
        async with chain_of(node) as chain:
            assert (await chain.test(signed.raw)).verdict == "accepted"


def _outputs(tx):
    return tuple(PsbtOutput() for _ in tx.outputs)


async def test_every_script_that_was_handed_out_is_known(node, miner, tmp_path):
    name = await new_wallet(miner)
    async with wallet_of(node, name, tmp_path) as wallet:
        made = {(await wallet.new_address(change=change)).script for change in (False, True, False)}
        assert made <= await wallet.scripts()
        assert ANYONE not in await wallet.scripts()


# ---------------------------------------------------------------- restarts


async def test_a_restart_in_the_middle_is_survived_new_cookie_unloaded_wallet_and_all(node, miner, tmp_path):
    name = await new_wallet(miner)
    async with wallet_of(node, name, tmp_path) as wallet, chain_of(node, name) as chain:
        first, second = await funded(wallet, miner, 200_000, 90_000)
        assert await wallet.lock([first], ID, LATER) == ()
        tip, cookie = await chain.tip(), node.cookie.read_text()
        node.stop()
        for asking in (wallet.coins(), chain.tip(), wallet.lock([second], ID, LATER)):
            with pytest.raises(NotNow):
                await asking
        assert not await wallet.can_sign()
        await node.start()
        assert node.cookie.read_text() != cookie
        assert await chain.tip() == tip
        assert [coin.outpoint for coin in await wallet.coins()] == [second]
        assert await wallet.mine([first, second]) == {first, second}
        assert await wallet.locked() == {first}
        assert await wallet.lock([first], OTHER, LATER) == (first,)
        await wallet.unlock([first], ID)
        assert await wallet.locked() == frozenset()


async def test_a_node_that_is_another_one_after_its_restart_is_refused(node, miner, tmp_path):
    name, other = await new_wallet(miner), await new_wallet(miner)
    async with wallet_of(node, name, tmp_path) as wallet:
        await wallet.fingerprint()
        async with rpc_of(node, name) as rpc:
            backup = str(tmp_path / "other.dat")
            async with rpc_of(node, other) as source:
                await source.do(Call("backupwallet", (backup,)))
            await rpc.do(Call("unloadwallet"))
            await rpc.do(Call("unloadwallet", (other,)))
        (node.home / "regtest" / "wallets" / name / "wallet.dat").unlink()
        (node.home / "regtest" / "wallets" / name / "wallet.dat").write_bytes((tmp_path / "other.dat").read_bytes())
        await node.restart()
        for _ in range(2):
            with pytest.raises(WrongUsage, match="is another one than before"):
                await wallet.new_address()


# ---------------------------------------------------------------- locks


async def test_leases_are_reconciled_with_the_nodes_locks_and_what_a_person_locked_is_left_alone(node, miner, tmp_path):
    name = await new_wallet(miner)
    now = 1_000_000.0
    async with wallet_of(node, name, tmp_path, now=lambda: now) as wallet, rpc_of(node, name) as rpc:
        ended, lost, gone, by_hand, free = await funded(wallet, miner, 10_000, 20_000, 30_000, 40_000, 50_000)
        await rpc.do(Call("lockunspent", (False, [{"txid": by_hand.txid, "vout": by_hand.vout}])))
        assert await wallet.lock([by_hand], ID, now + 600) == (by_hand,)
        await wallet.unlock([by_hand], ID)
        assert await wallet.lock([ended], ID, now + 10) == ()
        assert await wallet.lock([lost, gone], ID, now + 600) == ()
        # A person unlocks two of ours by hand, and spends one of them.
        await rpc.do(Call("lockunspent", (True, [{"txid": one.txid, "vout": one.vout} for one in (lost, gone)])))
        inputs = [{"txid": gone.txid, "vout": gone.vout}]
        raw = await rpc.do(
            Call("createrawtransaction", (inputs, {script_to_address(ANYONE, Network.REGTEST): "0.0002"}))
        )
        signed = await rpc.do(Call("signrawtransactionwithwallet", (raw,)))
        await rpc.do(Call("sendrawtransaction", (signed["hex"],)))
    now += 60
    async with wallet_of(node, name, tmp_path, now=lambda: now) as wallet:
        assert {coin.outpoint for coin in await wallet.coins()} == {ended, free}
        assert await wallet.locked() == {lost, by_hand}
        assert await wallet.lock([ended], OTHER, now + 600) == ()
        assert await wallet.lock([lost], OTHER, now + 600) == (lost,)
        assert await wallet.lock([lost], ID, now + 900) == ()
        (file,) = tmp_path.glob("*.leases")
        assert str(gone) not in file.read_text()
        assert str(by_hand) not in file.read_text()


async def test_two_programs_share_a_wallet_and_its_leases(node, miner, tmp_path):
    name = await new_wallet(miner)
    async with wallet_of(node, name, tmp_path) as one, wallet_of(node, name, tmp_path) as two:
        first, second = await funded(one, miner, 200_000, 90_000)
        assert await two.lock([first], ID, LATER) == ()
        assert await one.lock([first, second], OTHER, LATER) == (first,)
        assert [coin.outpoint for coin in await one.coins()] == [second]
        await one.unlock([first], ID)
        assert len(await two.coins()) == 2


async def test_a_refused_lock_at_the_node_leaves_no_lease(node, miner, tmp_path):
    name = await new_wallet(miner)
    async with wallet_of(node, name, tmp_path) as wallet:
        (coin,) = await funded(wallet, miner)

        async def refuse(coins):
            return Refused(-8, "Invalid parameter, output already locked")

        wallet._lock_at_node = refuse
        assert await wallet.lock([coin], ID, LATER) == (coin,)
        del wallet._lock_at_node
        assert await wallet.lock([coin], OTHER, LATER) == ()


async def test_a_payment_that_cannot_be_signed_gives_its_coins_back(node, miner, tmp_path):
    name = await new_wallet(miner)
    async with wallet_of(node, name, tmp_path) as wallet:
        (coin,) = await funded(wallet, miner)

        async def locked(psbt, *, derivations):
            raise NotNow("locked in this very moment")

        wallet._process = locked
        with pytest.raises(NotNow, match="this very moment"):
            await wallet.fund([TxOut(20_000, ANYONE)], RATE, ID, LATER)
        assert await wallet.locked() == frozenset()
        assert [one.outpoint for one in await wallet.coins()] == [coin]


async def test_a_signature_that_is_none_is_not_believed(node, miner, tmp_path):
    name = await new_wallet(miner)
    async with wallet_of(node, name, tmp_path) as wallet:
        (coin,) = await funded(wallet, miner)
        (held,) = await wallet.coins()
        psbt = Psbt(Tx(2, 0, (TxIn(coin),), (TxOut(150_000, ANYONE),)), (held.psbt_input(),), ())
        psbt = replace(psbt, outputs=_outputs(psbt.tx))
        honest = wallet._process

        async def forged(psbt, *, derivations):
            signed = await honest(psbt, derivations=derivations)
            (one,) = signed.inputs
            witness = (one.final_script_witness[0][:-2] + b"\x00\x01", one.final_script_witness[1])
            return replace(signed, inputs=(replace(one, final_script_witness=witness),))

        wallet._process = forged
        with pytest.raises(NotNow, match="does not hold"):
            await wallet.sign(psbt.serialize(), [coin])


# ---------------------------------------------------------------- facts and views


async def test_the_facts_of_an_original_take_one_request_of_the_wallet_and_three_of_the_chain(node, miner, tmp_path):
    name = await new_wallet(miner)
    coins = [await miner.fund(ANYONE, 60_000) for _ in range(3)]
    tx = spend(coins, 170_000).raw
    counted, asked = Counting(), Counting()
    async with (
        wallet_of(node, name, tmp_path, transport=asked) as wallet,
        chain_of(node, name, transport=counted) as chain,
    ):
        await wallet.fingerprint()
        await chain.tip()
        for _ in range(2):
            counted.requests.clear()
            asked.requests.clear()
            verdict, prevouts, mine, tip, _ = await asyncio.gather(
                chain.test(tx), chain.prevouts(coins), wallet.mine(coins), chain.tip(), chain.fee_rate(144)
            )
            assert verdict.verdict == "accepted"
            assert [prevouts[coin].txout for coin in coins] == [TxOut(60_000, ANYONE)] * 3
            assert all(prevouts[coin].time is not None for coin in coins)
            assert mine == frozenset()
            assert tip.height == prevouts[coins[-1]].height
            assert asked.requests == [["gettransaction"] * 3]
            assert sorted(counted.requests[0]) == sorted(
                ["testmempoolaccept", "getblockchaininfo", "gettxspendingprevout", *["gettxout"] * 6, "getbestblockhash",
                 "estimatesmartfee", "getmempoolinfo"]
            )  # fmt: skip
            assert len(counted.requests) == 3
        await miner.mine(100)
        await chain.prevouts(coins)
        counted.requests.clear()
        await chain.prevouts(coins)
        assert len(counted.requests) == 1  # the times of settled blocks are remembered


async def test_a_payment_to_the_wallet_is_found_without_reading_mempool_or_blocks(node, miner, tmp_path):
    name = await new_wallet(miner)
    counted = Counting()
    async with wallet_of(node, name, tmp_path) as wallet, chain_of(node, name, transport=counted) as chain:
        script = (await wallet.new_address()).script
        since = (await chain.tip()).height
        assert (await view(chain, scripts=[script], since=since)).txs == ()
        paid = await miner.pay(script, 77_000)
        await miner.settle()
        found = await view(chain, scripts=[script], txids=[paid.txid], since=since)
        assert [(tx.txid, tx.height) for tx in found.txs] == [(paid.txid, None)]
        await miner.mine()
        found = await view(chain, scripts=[script], txids=[paid.txid], outpoints=[paid], since=since)
        assert [(tx.txid, tx.height) for tx in found.txs] == [(paid.txid, since + 1)]
        methods = {method for request in counted.requests for method in request}
        assert not methods & {"getrawmempool", "getblock"}


async def test_blocks_are_read_once_for_everything_that_is_watched(node, miner, tmp_path):
    counted = Counting()
    async with chain_of(node, transport=counted) as chain:
        since = (await chain.tip()).height + 1
        await miner.mine(3)
        scripts = [p2wsh_script(bytes([number])) for number in range(3)]
        for _ in range(2):
            await view(chain, scripts=scripts, txids=["cd" * 32], since=since)
        assert sum(request.count("getblock") for request in counted.requests) == 3
        await miner.mine()
        await view(chain, scripts=scripts[:1], since=since)
        assert sum(request.count("getblock") for request in counted.requests) == 4
        await view(chain, scripts=scripts, since=since)
        assert sum(request.count("getblock") for request in counted.requests) == 4


async def test_a_double_spend_that_wins_by_a_reorganisation_takes_the_place_of_the_payment(node, miner, tmp_path):
    async with chain_of(node) as chain:
        coin = await miner.fund(ANYONE, 80_000)
        assert (await chain.prevouts([coin]))[coin].spent_by is None
        since = (await chain.tip()).height
        ours, theirs = spend([coin], 70_000), spend([coin], 60_000, p2wsh_script(b"theirs"))
        assert (await chain.broadcast(ours.raw)).verdict == "accepted"
        await miner.mine(2)
        watched = {"txids": [ours.txid], "outpoints": [coin], "since": since}
        before = await view(chain, **watched)
        assert [(tx.txid, before.depth(tx)) for tx in before.txs] == [(ours.txid, 2)]
        lost = await miner.call("getblockhash", since + 1)
        await miner.call("invalidateblock", lost)
        again = await view(chain, **watched)
        assert [(tx.txid, tx.height) for tx in again.txs] == [(ours.txid, None)]
        await miner.call("generateblock", miner.address, [theirs.raw.hex()])
        await miner.mine_empty(2)
        after = await view(chain, **watched)
        assert [(tx.txid, after.depth(tx)) for tx in after.txs] == [(theirs.txid, 3)]
        prevout = (await chain.prevouts([coin]))[coin]
        assert prevout.spent_by == theirs.txid


async def test_a_conflict_in_the_mempool_is_seen_and_the_one_before_is_gone(node, miner, tmp_path):
    async with chain_of(node) as chain:
        coin = await miner.fund(ANYONE, 80_000)
        since = (await chain.tip()).height
        ours, theirs = spend([coin], 78_000), spend([coin], 60_000, p2wsh_script(b"theirs"))
        assert (await chain.broadcast(ours.raw)).verdict == "accepted"
        assert (await chain.broadcast(theirs.raw)).verdict == "accepted"
        found = await view(chain, txids=[ours.txid], outpoints=[coin], since=since)
        assert [(tx.txid, tx.height) for tx in found.txs] == [(theirs.txid, None)]
        assert (await chain.broadcast(ours.raw)).verdict == "refused"
        assert (await chain.prevouts([coin]))[coin].spent_by == theirs.txid


async def test_a_spent_unconfirmed_parent_is_told_as_it_was(node, miner, tmp_path):
    async with chain_of(node) as chain:
        coin = await miner.fund(ANYONE, 80_000)
        parent = spend([coin], 70_000)
        child = spend([Outpoint(parent.txid, 0)], 60_000)
        for tx in (parent, child):
            assert (await chain.broadcast(tx.raw)).verdict == "accepted"
        told = (await chain.prevouts([Outpoint(parent.txid, 0)]))[Outpoint(parent.txid, 0)]
        assert (told.txout, told.height, told.spent_by, told.time) == (parent.outputs[0], None, child.txid, None)


async def test_a_child_pays_for_a_parent_that_pays_nothing_where_nodes_allow_that(node, miner, tmp_path):
    async with chain_of(node) as chain:
        parent = spend([await miner.fund(ANYONE, 80_000)], 80_000, version=3)
        child = spend([Outpoint(parent.txid, 0)], 70_000, version=3)
        assert (await chain.broadcast(child.raw, parents=[parent.raw])).verdict == "accepted"
        assert (await chain.broadcast(child.raw, parents=[parent.raw])).verdict == "known"
        plain = spend([await miner.fund(ANYONE, 80_000)], 80_000)
        heir = spend([Outpoint(plain.txid, 0)], 70_000)
        told = await chain.broadcast(heir.raw, parents=[plain.raw])
        assert told.verdict == "refused"
        assert "fee not met" in told.reason
        confirmed = spend([await miner.fund(ANYONE, 80_000)], 79_000)
        assert (await chain.broadcast(confirmed.raw)).verdict == "accepted"
        await miner.mine()
        late = spend([Outpoint(confirmed.txid, 0)], 70_000)
        assert (await chain.broadcast(late.raw, parents=[confirmed.raw])).verdict == "accepted"


async def test_a_transaction_from_elsewhere_is_handed_to_the_node(node, miner, tmp_path):
    name = await new_wallet(miner)
    async with wallet_of(node, name, tmp_path) as wallet:
        await funded(wallet, miner)
        tx = Psbt.parse(await wallet.fund([TxOut(20_000, ANYONE)], RATE, ID, LATER)).extract()
        for _ in range(2):
            await wallet.saw(tx.raw)
        assert tx.txid in await miner.in_mempool()
        with pytest.raises(WrongUsage):
            await wallet.saw(b"no transaction")


async def test_a_payment_to_a_script_without_an_address_and_one_of_dust(node, miner, tmp_path):
    name = await new_wallet(miner)
    async with wallet_of(node, name, tmp_path) as wallet:
        await funded(wallet, miner)
        bare = TxOut(20_000, b"\x51\x21" + b"\x02" + b"\x11" * 32 + b"\x51\xae")
        tx = Psbt.parse(await wallet.fund([bare], RATE, ID, LATER)).extract()
        assert bare in tx.outputs
        await wallet.unlock([txin.outpoint for txin in tx.inputs], ID)
        for payments in ([TxOut(20, ANYONE)], []):
            with pytest.raises(WrongUsage):
                await wallet.fund(payments, RATE, ID, LATER)
        assert await wallet.locked() == frozenset()
