"""A world for channel tests: a lab chain, a rehearsal node with peers, and a purse that makes and signs funding transactions."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path

from coincurve import PrivateKey

from pjv2.backends.channel.rehearsal import RehearsalNode, RehearsalPeer
from pjv2.lab.chain import LabChain
from pjv2.psbt.scripts import p2wpkh_script, p2wpkh_script_code, sighash_segwit_v0
from pjv2.psbt.tx import Psbt, Tx, TxIn, TxOut, build_psbt
from pjv2.testing.check_channels import PeerAddress

FEE = 2_000


class Purse:
    """One key on the lab chain: every payment gets a coin of its own, just big enough."""

    def __init__(self, chain: LabChain) -> None:
        self.chain = chain
        self._key = PrivateKey(b"\x05" * 32)
        self.script = p2wpkh_script(self._key.public_key.format())

    async def pay(self, outputs: Sequence[TxOut]) -> bytes:
        value = sum(output.value for output in outputs) + 10_000 + FEE
        coin = await self.chain.fund(self.script, value)
        tx = Tx(2, 0, (TxIn(coin),), (*outputs, TxOut(10_000, self.script)))
        return build_psbt(tx, {coin: TxOut(value, self.script)}).serialize()

    def sign(self, psbt: bytes) -> bytes:
        """The final transaction."""
        parsed = Psbt.parse(psbt)
        utxo = parsed.inputs[0].witness_utxo
        assert utxo is not None
        digest = sighash_segwit_v0(parsed.tx, 0, p2wpkh_script_code(utxo.script), utxo.value)
        witness = (self._key.sign(digest, hasher=None) + b"\x01", self._key.public_key.format())
        return replace(parsed.tx, inputs=(replace(parsed.tx.inputs[0], witness=witness),)).raw


class RehearsalRig:
    """A ChannelRig over RehearsalNode."""

    def __init__(self, directory: Path, chain: LabChain) -> None:
        self._directory = directory
        self.chain = chain
        self.purse = Purse(chain)
        self.node = RehearsalNode.open(directory, chain, seed=b"\x01" * 32)
        self.remote: tuple[RehearsalPeer, ...] = self.node.make_peers(3, seed=b"\x02" * 32)
        self.remote[2].go_offline()
        addresses = [PeerAddress(peer.pubkey, peer.host) for peer in self.remote]
        self.peers: Sequence[PeerAddress] = addresses[:2]
        self.offline_peer = addresses[2]

    async def pay(self, outputs: Sequence[TxOut]) -> bytes:
        return await self.purse.pay(outputs)

    async def confirm(self, psbt: bytes) -> None:
        result = await self.chain.broadcast(self.purse.sign(psbt))
        assert result.verdict == "accepted", result.reason
        await self.chain.mine()
        await self.node.sync()

    async def reopen(self) -> RehearsalNode:
        await self.node.close()
        self.node = RehearsalNode.open(self._directory, self.chain)
        return self.node


@asynccontextmanager
async def rehearsal_rig(directory: Path) -> AsyncIterator[RehearsalRig]:
    async with LabChain(premine=103) as chain:
        yield RehearsalRig(directory, chain)
