"""Bitcoin Core's wallet and chain keep the contracts, over a real bitcoind on regtest."""

from __future__ import annotations

import pytest

from pjv2.testing.check_chain import CHAIN_CHECKS
from pjv2.testing.check_wallet import WALLET_CHECKS
from tests.contract.bitcoind_rig import PASSPHRASE, chain_rig, needs_bitcoind, running, wallet_rig

pytestmark = needs_bitcoind

KINDS = {
    "bech32": ("bech32", ""),
    "bech32m": ("bech32m", ""),
    "p2sh-segwit": ("p2sh-segwit", ""),
    "legacy": ("legacy", ""),
    "bech32 behind a passphrase": ("bech32", PASSPHRASE),
}


@pytest.fixture(scope="module")
def node():
    with running() as made:
        yield made


@pytest.fixture(scope="module")
def indexed():
    with running("-txindex=1") as made:
        yield made


@pytest.mark.parametrize("check", WALLET_CHECKS, ids=lambda check: check.__name__)
@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
async def test_the_wallet_of_bitcoind_keeps_the_contract(node, kind, check, tmp_path):
    address_type, passphrase = kind
    async with wallet_rig(node, tmp_path, address_type, passphrase=passphrase) as rig:
        await check(rig)


@pytest.mark.parametrize("check", CHAIN_CHECKS, ids=lambda check: check.__name__)
@pytest.mark.parametrize("way", ["without a wallet", "beside a wallet"])
async def test_bitcoind_keeps_the_contract_of_a_chain_source(node, way, check):
    async with chain_rig(node, wallet=way == "beside a wallet") as rig:
        await check(rig)


@pytest.mark.parametrize("check", CHAIN_CHECKS, ids=lambda check: check.__name__)
async def test_bitcoind_with_a_transaction_index_keeps_the_contract_of_a_chain_source(indexed, check):
    async with chain_rig(indexed) as rig:
        await check(rig)
