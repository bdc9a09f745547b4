"""The contract of a wallet over the embedded one, kept current by an Esplora and by an Electrum server of the lab."""

from __future__ import annotations

from contextlib import asynccontextmanager
from itertools import cycle

import pytest

pytest.importorskip("bdkpython")

from pjv2.backends.wallet.bdk import BdkWallet, Electrum, Esplora, MnemonicKeys
from pjv2.lab.chain import LabChain
from pjv2.lab.electrum import ElectrumServer
from pjv2.lab.esplora import EsploraServer
from pjv2.testing.check_wallet import WALLET_CHECKS, WalletRig
from pjv2.testing.clock import ManualClock
from pjv2.units import Network, Outpoint

WORDS = "abandon " * 11 + "about"
KINDS = ("p2wpkh", "p2tr", "p2sh-p2wpkh", "p2pkh")


class InTurns:
    """Objects over one file, as two processes have them: each call goes to the other one."""

    def __init__(self, *wallets):
        self._wallets = cycle(wallets)
        self._all = wallets

    def __getattr__(self, name):
        return getattr(next(self._wallets), name)

    async def close(self):
        for wallet in self._all:
            await wallet.close()


@asynccontextmanager
async def bdk_rig(home, kind, server, max_age, objects=1):
    """`max_age` 0: the wallet looks at its server before each answer about coins. Else only `settle` makes it look."""
    clock = ManualClock()
    async with LabChain() as chain, server(chain) as running:
        source = (Esplora if server is EsploraServer else Electrum)(running.url)
        opened = []

        async def reopen():
            if opened:
                await opened[-1].close()
            wallets = [
                await BdkWallet.open(
                    home / "wallet.sqlite",
                    MnemonicKeys(WORDS, kind),
                    Network.REGTEST,
                    sync=source,
                    max_age=max_age,
                    gap=5,
                    now=clock.now,
                )
                for _ in range(objects)
            ]
            opened.append(InTurns(*wallets))
            return opened[-1]

        async def settle():
            await opened[-1].sync()

        async def advance(seconds):
            clock.advance(seconds)

        async def mine_to(script):
            await chain.mine(to=script)
            return Outpoint(chain.block(chain.height).txs[0].txid, 0)

        wallet = await reopen()
        yield WalletRig(
            wallet,
            chain,
            chain.fund,
            chain.mine,
            settle=settle,
            now=clock.now,
            reopen=reopen,
            advance=advance,
            mine_to=mine_to,
        )
        await opened[-1].close()


# Each kind once, over each way to be kept current at least once.
WAYS = {
    "p2wpkh over esplora": ("p2wpkh", EsploraServer, 0.0),
    "p2pkh over esplora": ("p2pkh", EsploraServer, 0.0),
    "p2sh-p2wpkh over electrum": ("p2sh-p2wpkh", ElectrumServer, 0.0),
    "p2tr over esplora only when told": ("p2tr", EsploraServer, 3600.0),
    "p2wpkh over electrum in turns": ("p2wpkh", ElectrumServer, 0.0, 2),
}


@pytest.mark.parametrize("check", WALLET_CHECKS, ids=lambda check: check.__name__)
@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
async def test_the_embedded_wallet_keeps_the_contract(way, check, tmp_path):
    async with bdk_rig(tmp_path, *way) as rig:
        await check(rig)
