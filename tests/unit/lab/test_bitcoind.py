"""The lab's chain judged by a bitcoind: the same world, for machines where libbitcoinkernel has no wheel."""

from __future__ import annotations

import builtins
import sys
from typing import Any

import pytest

from pjv2.errors import NotNow, WrongUsage
from pjv2.lab.bitcoind import BitcoindKernel
from pjv2.lab.chain import LabChain
from pjv2.lab.kernel import open_kernel
from pjv2.psbt.tx import Psbt, Tx, TxOut
from pjv2.testing import PaperWallet
from pjv2.units import FeeRate, Instant
from tests.peers.peers import find, missing_because, need, required

BITCOIND = find("bitcoind").path
needs_bitcoind = pytest.mark.skipif(
    BITCOIND is None and not required(), reason=missing_because("bitcoind") or "there is one"
)
UNTIL: Instant = 4_000_000_000.0


@pytest.fixture
def no_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine without libbitcoinkernel."""
    real = builtins.__import__

    def imported(name: str, *args: Any, **kwargs: Any) -> Any:
        if name == "pbk":
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.delitem(sys.modules, "pbk", raising=False)
    monkeypatch.setattr(builtins, "__import__", imported)


def test_without_both_the_lab_says_what_it_needs(no_kernel: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    with pytest.raises(NotNow, match=r"pjv2\[lab\], or have bitcoind on PATH"):
        open_kernel()


def test_a_program_that_is_no_bitcoind_is_named(tmp_path: Any) -> None:
    with pytest.raises(NotNow, match="cannot be started"):
        BitcoindKernel(str(tmp_path / "nothing"))


@needs_bitcoind
async def test_a_bitcoind_judges_blocks_scripts_and_reorganisations(
    no_kernel: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(need("bitcoind").parent), prepend=":")
    chain = LabChain()
    async with chain:
        wallet = PaperWallet(chain, seed=b"judged by bitcoind", kinds=("p2wpkh", "p2tr", "p2sh-p2wpkh", "p2pkh"))
        for kind in ("p2wpkh", "p2tr", "p2sh-p2wpkh", "p2pkh"):
            address = await wallet.new_address(kind=kind)
            await chain.fund(address.script, 100_000)
        target = (await wallet.new_address()).script
        signed = Psbt.parse(await wallet.fund([TxOut(350_000, target)], FeeRate(500), bytes(32), UNTIL)).extract()
        assert len(signed.inputs) == 4
        for index, txin in enumerate(signed.inputs):
            if txin.witness:
                broken = bytearray(signed.raw)
                at = bytes(broken).rindex(txin.witness[0])
                broken[at + 8] ^= 1
                assert (await chain.test(bytes(broken))).verdict == "refused", index
        assert (await chain.broadcast(signed.raw)).verdict == "accepted"
        await chain.mine(2)
        entry = chain.tx(signed.txid)
        assert entry is not None
        assert entry.height == chain.height - 1
        await chain.reorg(2, blocks=3, drop=[signed.txid])
        entry = chain.tx(signed.txid)
        assert entry is None or entry.height is None
        height = chain.height
        with pytest.raises(WrongUsage, match="refused"):
            await chain.mine(1, txs=[Tx(2, 0, signed.inputs, (TxOut(10**9, target),)).raw])
        assert chain.height == height
