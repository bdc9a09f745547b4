"""A lab's chain, a server over it and a chain source that asks the server, for either protocol."""

from __future__ import annotations

from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

from pjv2.backends.chain import ElectrumChain, EsploraChain
from pjv2.lab.chain import LabChain
from pjv2.lab.electrum import ElectrumServer
from pjv2.lab.esplora import EsploraServer
from pjv2.psbt.scripts import p2wsh_script
from pjv2.psbt.tx import Tx, TxIn, TxOut
from pjv2.units import Network, Outpoint

ANYONE = p2wsh_script(b"\x51")
COIN = 100_000


@dataclass
class Rig:
    lab: LabChain
    server: Any
    chain: Any


@asynccontextmanager
async def rig_of(kind, *, network=Network.REGTEST, patience=5.0, url=None, ssl_context=None, **options):
    """`kind` is esplora (without its own tests and packages: bare) or electrum."""
    async with LabChain() as lab:
        bare = kind == "bare"
        make, over = (ElectrumChain, ElectrumServer) if kind == "electrum" else (EsploraChain, EsploraServer)
        switches = {} if kind == "electrum" else {"tests": not bare, "packages": not bare}
        async with over(lab, ssl_context=ssl_context, **switches) as server:
            address = server.url if url is None else url(server)
            chain = make(address, network=network, timeout=patience, **options)
            try:
                yield Rig(lab, server, chain)
            finally:
                await chain.close()


def spend(*outpoints: Outpoint, value=COIN - 1_000, script=ANYONE, sequence=0xFFFFFFFD, outputs=None) -> Tx:
    inputs = tuple(TxIn(outpoint, sequence=sequence, witness=(b"\x51",)) for outpoint in outpoints)
    return Tx(2, 0, inputs, outputs or (TxOut(value, script),))


async def view(chain, *, txids=(), outpoints=(), scripts=(), since=0):
    return await chain.view(frozenset(txids), frozenset(outpoints), frozenset(scripts), since)
