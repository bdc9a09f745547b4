"""A lab chain for whoever asks."""

from __future__ import annotations

import pytest

from pjv2.lab.chain import LabChain


@pytest.fixture
async def lab():
    async with LabChain() as lab:
        yield lab
