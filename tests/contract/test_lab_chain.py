"""The lab's chain keeps the contract of a chain source."""

from contextlib import asynccontextmanager

import pytest

pytest.importorskip("pbk", reason="the lab needs libbitcoinkernel")

from pjv2.lab.chain import LabChain
from pjv2.testing.check_chain import CHAIN_CHECKS, ChainRig, check_chain


@asynccontextmanager
async def lab_rig():
    async with LabChain() as chain:

        async def switch(off):
            chain.offline = off

        yield ChainRig(chain, chain.fund, chain.mine, reorg=chain.reorg, evict=chain.evict, offline=switch)


@pytest.mark.parametrize("check", CHAIN_CHECKS, ids=lambda check: check.__name__)
async def test_the_lab_chain_keeps_the_contract(check):
    async with lab_rig() as rig:
        await check(rig)


async def test_a_chain_that_keeps_what_it_should_test_fails_the_contract_by_name():
    @asynccontextmanager
    async def broken_rig():
        async with lab_rig() as rig:
            rig.chain.test = lambda tx: _broadcast_instead(rig.chain, tx)
            yield rig

    async def _broadcast_instead(chain, tx):
        return await chain.broadcast(tx)

    with pytest.raises(AssertionError, match="a test keeps nothing"):
        await check_chain(broken_rig)
