"""Scripts and signature hashes: what they commit to agrees with python-bitcointx and the BIPs' vectors."""

from __future__ import annotations

import pytest

from pjv2.errors import WrongUsage
from pjv2.psbt.scripts import (
    p2pkh_script,
    p2tr_script,
    p2wpkh_script,
    p2wpkh_script_code,
    p2wsh_script,
    sighash_legacy,
    sighash_segwit_v0,
    sighash_taproot,
    taproot_tweak,
)
from pjv2.psbt.tx import ScriptKind, Tx
from tests.unit.psbt.payjoin_kit import KINDS, Key, original_psbt, purse

PURSES = [purse(kind, 100_000 + n, n + 1) for n, kind in enumerate(KINDS)]
TX = original_psbt(PURSES, pays=50_000).tx
TYPES = (0x01, 0x02, 0x03, 0x81, 0x82, 0x83)


def bitcointx_transaction():  # type: ignore[no-untyped-def]
    from bitcointx.core import CTransaction

    return CTransaction.deserialize(TX.raw)


@pytest.mark.parametrize("hash_type", TYPES)
@pytest.mark.parametrize("index", range(5))
def test_segwit_hashes_agree_with_bitcointx(index: int, hash_type: int) -> None:
    from bitcointx.core.script import SIGVERSION_WITNESS_V0, CScript, RawSignatureHash

    code = p2wpkh_script_code(p2wpkh_script(Key(1, ScriptKind.P2WPKH).public))
    theirs, _ = RawSignatureHash(
        CScript(code), bitcointx_transaction(), index, hash_type, amount=77, sigversion=SIGVERSION_WITNESS_V0
    )
    assert sighash_segwit_v0(TX, index, code, 77, hash_type) == theirs


def test_legacy_hashes_agree_with_bitcointx() -> None:
    from bitcointx.core.script import SIGHASH_ALL, CScript, SignatureHash

    code = Key(1, ScriptKind.P2PKH).script
    assert sighash_legacy(TX, 0, code) == SignatureHash(CScript(code), bitcointx_transaction(), 0, SIGHASH_ALL)


@pytest.mark.parametrize("hash_type", [0, *TYPES])
@pytest.mark.parametrize("index", range(5))
def test_taproot_hashes_agree_with_bitcointx(index: int, hash_type: int) -> None:
    from bitcointx.core import CTxOut
    from bitcointx.core.script import CScript, SIGHASH_Type, SignatureHashSchnorr

    prevouts = [item.txout for item in PURSES]
    if hash_type & 3 == 3 and index >= len(TX.outputs):
        with pytest.raises(WrongUsage):
            sighash_taproot(TX, index, prevouts, hash_type)
        return
    spent = [CTxOut(txout.value, CScript(txout.script)) for txout in prevouts]
    theirs = SignatureHashSchnorr(
        bitcointx_transaction(), index, spent, hashtype=SIGHASH_Type(hash_type) if hash_type else None
    )
    assert sighash_taproot(TX, index, prevouts, hash_type) == theirs


def test_the_bip86_key_path_vector_gives_its_address() -> None:
    # BIP86, "Test vectors", account 0, first receiving address.
    internal = bytes.fromhex("cc8a4bc64d897bddc5fbc2f670f7a8ba0b386779106cf1223c6fc5d7cd6fc115")
    from coincurve import PublicKeyXOnly

    key = PublicKeyXOnly(internal)
    key.tweak_add(taproot_tweak(internal))
    assert p2tr_script(key.format()).hex() == "5120a60869f0dbcf1dc659c9cecbaf8050135ea9e8cdc487053f1dc6880949dc684c"


def test_what_cannot_be_hashed_is_said() -> None:
    prevouts = [item.txout for item in PURSES]
    for wrong in (
        lambda: sighash_legacy(TX, 0, b"", 3),
        lambda: sighash_legacy(TX, 9, b""),
        lambda: sighash_segwit_v0(TX, 9, b"", 0),
        lambda: sighash_taproot(TX, 0, prevouts[:1]),
        lambda: sighash_taproot(TX, 0, prevouts, 4),
        lambda: p2wpkh_script(b"short"),
        lambda: p2pkh_script(b"short"),
        lambda: p2tr_script(b"short"),
        lambda: p2wpkh_script_code(b"short"),
    ):
        with pytest.raises(WrongUsage):
            wrong()
    assert len(p2wsh_script(b"")) == 34
    assert isinstance(TX, Tx)
