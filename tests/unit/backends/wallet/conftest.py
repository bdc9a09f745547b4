"""A lab chain with an Esplora server, and embedded wallets of any kind and words over it."""

from __future__ import annotations

from contextlib import suppress

import pytest

pytest.importorskip("bdkpython")

from pjv2.backends.wallet.bdk import BdkWallet, Esplora, MnemonicKeys, words_from_entropy
from pjv2.lab.chain import LabChain
from pjv2.lab.esplora import EsploraServer
from pjv2.testing.clock import ManualClock
from pjv2.units import Network


@pytest.fixture
async def chain():
    async with LabChain() as chain:
        yield chain


@pytest.fixture
async def esplora(chain):
    async with EsploraServer(chain) as server:
        yield server


@pytest.fixture
def clock():
    return ManualClock()


@pytest.fixture
def words():
    """Mnemonics by number."""
    return lambda number: words_from_entropy(bytes([number]) * 16)


@pytest.fixture
async def make(tmp_path, esplora, clock, words):
    """Opens a wallet: by default number 0, P2WPKH, synced before each answer; the same number has the same file."""
    opened = []

    async def make(number=0, kind="p2wpkh", *, keys=None, network=Network.REGTEST, path=None, **how):
        settings = {"sync": Esplora(esplora.url), "max_age": 0.0, "gap": 5, "now": clock.now} | how
        wallet = await BdkWallet.open(
            path or tmp_path / f"{number}-{kind}.sqlite", keys or MnemonicKeys(words(number), kind), network, **settings
        )
        opened.append(wallet)
        return wallet

    yield make
    for wallet in opened:
        with suppress(Exception):
            await wallet.close()


@pytest.fixture
def pay(chain):
    """Confirmed coins on fresh addresses of a wallet."""

    async def pay(wallet, *values):
        return [await chain.fund((await wallet.new_address()).script, value) for value in values]

    return pay
