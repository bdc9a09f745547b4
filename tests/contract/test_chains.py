"""Esplora and Electrum chain sources keep the contract of a chain source, over servers on loopback."""

from contextlib import asynccontextmanager

import pytest

pytest.importorskip("pbk", reason="the lab needs libbitcoinkernel")

from pjv2.backends.chain import ElectrumChain, EsploraChain
from pjv2.lab.chain import LabChain
from pjv2.lab.electrum import ElectrumServer
from pjv2.lab.esplora import EsploraServer
from pjv2.testing.check_chain import CHAIN_CHECKS, ChainRig
from pjv2.units import Network


@asynccontextmanager
async def rig(kind):
    async with LabChain() as lab:
        if kind == "electrum":
            server = ElectrumServer(lab)
        else:
            bare = kind == "esplora without tests"
            server = EsploraServer(lab, tests=not bare)
        async with server:
            make = ElectrumChain if kind == "electrum" else EsploraChain
            chain = make(server.url, network=Network.REGTEST, timeout=5)

            async def switch(off):
                server.offline = off

            try:
                yield ChainRig(
                    chain,
                    lab.fund,
                    lab.mine,
                    packages=kind != "electrum",
                    reorg=lab.reorg,
                    evict=lab.evict,
                    offline=switch,
                )
            finally:
                await chain.close()


@pytest.mark.parametrize("check", CHAIN_CHECKS, ids=lambda check: check.__name__)
@pytest.mark.parametrize("kind", ["esplora", "esplora without tests", "electrum"])
async def test_a_remote_chain_source_keeps_the_contract(kind, check):
    async with rig(kind) as made:
        await check(made)
