"""Every back end that opens channels keeps the contract of `pjv2.testing.check_channels`."""

from __future__ import annotations

from contextlib import AbstractAsyncContextManager
from itertools import count
from pathlib import Path

import pytest

from pjv2.backends.channel.rehearsal import RehearsalNode
from pjv2.ports import Channels
from pjv2.psbt.proposal import Funding
from pjv2.session.facts import SecuredChannel
from pjv2.testing.check_channels import CHANNEL_CHECKS, BrokenContract, Check, check_channels
from pjv2.units import Outpoint, Txid
from tests.contract.channel_rig import RehearsalRig, rehearsal_rig


@pytest.mark.parametrize("check", CHANNEL_CHECKS, ids=lambda check: check.__name__)
async def test_the_rehearsal_node_keeps_the_contract(check: Check, tmp_path: Path) -> None:
    async with rehearsal_rig(tmp_path) as rig:
        await check(rig)


def test_the_rehearsal_node_is_a_channels_port_by_its_types(tmp_path: Path) -> None:
    port: Channels = RehearsalNode.open(tmp_path)
    assert port is not None


async def test_the_suite_names_the_promise_that_is_broken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    numbers = count()

    def make() -> AbstractAsyncContextManager[RehearsalRig]:
        return rehearsal_rig(tmp_path / str(next(numbers)))

    async def hasty(self: RehearsalNode, id: bytes, psbt: bytes, txid: Txid, funding: Funding) -> SecuredChannel:
        return SecuredChannel(id, Outpoint(txid, funding.vout), b"not on any disk")

    monkeypatch.setattr(RehearsalNode, "secure", hasty)
    with pytest.raises(BrokenContract, match="a secured channel is pending with its memo outpoint and backup"):
        await check_channels(make)
