"""A whole payjoin with two channels between two wallets of a real bitcoind, through the lab's directory and relays."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

pytest.importorskip("pbk", reason="the lab needs libbitcoinkernel")

from pjv2.backends.bitcoind_rpc import Call
from pjv2.backends.chain.bitcoind import BitcoindChain
from pjv2.backends.wallet.bitcoind import BitcoindWallet
from pjv2.lab.world import World
from pjv2.psbt.tx import Tx
from pjv2.session.needs import Cancel
from pjv2.testing import SeededEntropy
from pjv2.units import Outpoint, Sats
from tests.contract.bitcoind_rig import (
    PASSPHRASE,
    Bitcoind,
    Miner,
    miner_of,
    needs_bitcoind,
    new_wallet,
    rpc_of,
    running,
    unlock,
)
from tests.story.lab.kit import AMOUNT, SENT, WITH_CHANNELS, Story

pytestmark = needs_bitcoind


@pytest.fixture(scope="module")
def node():
    with running() as made:
        yield made


class MinedChain(BitcoindChain):
    """The world's chain: bitcoind, and a miner who pays people."""

    def __init__(self, miner: Miner) -> None:
        super().__init__(miner.node.rpc())
        self._miner = miner

    async def fund(self, script: bytes, value: Sats) -> Outpoint:
        return await self._miner.fund(script, value)

    async def mine(self, blocks: int = 1) -> None:
        await self._miner.mine(blocks)


class Town(Story):
    """A story whose people have wallets at a bitcoind."""

    node: Bitcoind
    miner: Miner
    names: dict[str, str]

    async def person(self, name: str, *coins: Sats, passphrase: str = "", **more):
        wallet = self.names[name] = await new_wallet(self.miner, passphrase=passphrase)

        async def open_wallet(party) -> BitcoindWallet:
            return BitcoindWallet(self.node.rpc(wallet), party.home, now=self.world.clock.now)

        async def open_chain(party) -> BitcoindChain:
            return BitcoindChain(self.node.rpc(wallet))

        return await self.world.party(name, coins=coins, wallet=open_wallet, chain=open_chain, **more)

    async def tx_of(self, txid: str) -> Tx:
        return Tx.parse(bytes.fromhex(await self.miner.call("getrawtransaction", txid)))

    async def nothing_is_locked(self, *parties) -> None:
        for party in parties:
            async with rpc_of(self.node, self.names[party.name]) as rpc:
                assert await rpc.do(Call("listlockunspent")) == []

    async def nothing_is_held(self, *parties) -> None:
        await self.nothing_is_locked(*parties)
        for party in parties:
            assert not await party.store.coins_in_use()
            assert not await party.store.peers_in_use()
            (leases,) = party.home.glob("*.leases")
            assert '"leases": {}' in leases.read_text()


@asynccontextmanager
async def town(node: Bitcoind, home: Path) -> AsyncIterator[Town]:
    async with miner_of(node) as miner:
        world = World(home, entropy=SeededEntropy("bitcoind"))
        await world.chain.close()
        world.chain = MinedChain(miner)
        async with world:
            story = Town(world)
            story.node, story.miner, story.names = node, miner, {}
            try:
                yield story
            finally:
                await story.stop()
                for wallet in story.names.values():
                    async with rpc_of(node, wallet) as rpc:
                        await rpc.do(Call("unloadwallet"))


async def test_a_payment_becomes_two_channels_in_the_mempool_of_a_bitcoind_and_nothing_stays_locked(node, tmp_path):
    async with town(node, tmp_path) as s:
        bob = await s.person("bob", 200_000, lightning=True)
        alice = await s.person("alice", 500_000)
        orders = [s.order(peer, capacity) for peer, capacity in zip(s.world.peers(2), (60_000, None), strict=True)]
        request = await s.request(bob, channels=orders)
        s.drive(bob, request.session)
        payment = await s.pay(alice, request)
        s.drive(alice, payment.session)
        seen = await s.both_seen(bob, request, alice, payment)
        txid = seen.facts["txid"]
        assert txid in await s.miner.in_mempool()
        tx = await s.tx_of(txid)
        await s.nothing_is_locked(bob, alice)
        await s.bury()
        his, hers = await s.closed(bob, request.session), await s.closed(alice, payment.session)
        assert (his.facts["outcome"], hers.facts["outcome"]) == ("Paid", "Paid")
        assert s.told(bob, request.session) == WITH_CHANNELS
        assert s.told(alice, payment.session) == SENT
        assert [tx.outputs[Outpoint.parse(point).vout].value for point in his.facts["channels"]] == [60_000, 90_000]
        our_fee = AMOUNT - his.facts["amount_received"]
        assert sum(coin.txout.value for coin in await bob.wallet.coins()) == 200_000 - our_fee
        assert 0 < our_fee <= AMOUNT // 20
        await s.nothing_is_held(bob, alice)


async def test_a_session_waits_for_a_locked_wallet_and_goes_on_over_a_restart_of_the_node(node, tmp_path):
    async with town(node, tmp_path) as s:
        bob = await s.person("bob", 200_000, passphrase=PASSPHRASE)
        alice = await s.person("alice", 500_000)
        request = await s.request(bob)
        payment = await s.pay(alice, request)
        assert len(await alice.wallet.locked()) == 1
        async with rpc_of(node, s.names["bob"]) as rpc:
            await rpc.do(Call("walletlock"))
        s.drive(bob, request.session)
        s.drive(alice, payment.session)
        waits = await s.until(bob, "NotNow")
        assert "lock" in waits.facts["why"] or "sign" in waits.facts["why"]
        await node.restart()
        await s.miner.call("getblockcount")
        async with rpc_of(node, s.names["bob"]) as rpc:
            await rpc.do(Call("loadwallet", (s.names["bob"],)))
        await unlock(node, s.names["bob"])
        seen = await s.both_seen(bob, request, alice, payment)
        assert seen.facts["txid"] in await s.miner.in_mempool()
        await s.bury()
        his, hers = await s.closed(bob, request.session), await s.closed(alice, payment.session)
        assert (his.facts["outcome"], hers.facts["outcome"]) == ("Paid", "Paid")
        await s.nothing_is_held(bob, alice)


async def test_a_cancelled_payment_gives_its_coins_back(node, tmp_path):
    async with town(node, tmp_path) as s:
        bob = await s.person("bob", 200_000)
        alice = await s.person("alice", 500_000)
        request = await s.request(bob)
        payment = await s.pay(alice, request)
        assert len(await alice.wallet.locked()) == 1
        await alice.driver.command(payment.session, Cancel(broadcast=False))
        s.drive(alice, payment.session)
        await s.until(alice, "CoinsReleased", payment.session)
        await s.nothing_is_held(alice)
