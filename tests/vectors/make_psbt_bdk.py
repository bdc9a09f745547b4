"""How psbt_bdk.json was made: bdkpython 3.1.1, offline wallets of four descriptor types, funded by made-up transactions.

Run it with the `bdk` extra installed; signatures are deterministic, but BDK draws change positions at random, so a new file differs.
"""

import base64
import json
import struct
from pathlib import Path

import bdkpython as bdk

MNEMONIC = "abandon abandon abandon abandon abandon abandon abandon abandon abandon abandon abandon about"
KINDS = {
    "p2pkh": bdk.Descriptor.new_bip44,
    "p2sh-p2wpkh": bdk.Descriptor.new_bip49,
    "p2wpkh": bdk.Descriptor.new_bip84,
    "p2tr": bdk.Descriptor.new_bip86,
}


def funding(scripts: list[bytes], salt: int) -> bytes:
    """A transaction from nowhere that pays 100,000 sat to each script."""
    outputs = b"".join(struct.pack("<q", 100_000 + n) + bytes([len(s)]) + s for n, s in enumerate(scripts))
    body = b"\x01" + bytes([salt]) * 32 + bytes(4) + b"\x00" + b"\xfd\xff\xff\xff" + bytes([len(scripts)]) + outputs
    return b"\x02\x00\x00\x00" + body + bytes(4)


def main() -> None:
    vectors = []
    for salt, (kind, make) in enumerate(KINDS.items(), 1):
        network = bdk.NetworkKind.TEST
        secret = bdk.DescriptorSecretKey(network, bdk.Mnemonic.from_string(MNEMONIC), None)
        pair = [make(secret, keychain, network) for keychain in (bdk.KeychainKind.EXTERNAL, bdk.KeychainKind.INTERNAL)]
        wallet = bdk.Wallet(pair[0], pair[1], bdk.Network.REGTEST, bdk.Persister.new_in_memory())
        revealed = [wallet.reveal_next_address(bdk.KeychainKind.EXTERNAL) for _ in range(2)]
        scripts = [bytes(info.address.script_pubkey().to_bytes()) for info in revealed]
        raw = funding(scripts, salt)
        wallet.apply_unconfirmed_txs([bdk.UnconfirmedTx(tx=bdk.Transaction(raw), last_seen=1_700_000_000)])
        payee = bdk.Script(b"\x00\x14" + bytes([salt]) * 20)
        rate = bdk.FeeRate.from_sat_per_kwu(500)
        psbt = (
            bdk.TxBuilder()
            .add_recipient(payee, bdk.Amount.from_sat(150_000))
            .fee_rate(rate)
            .nlocktime(bdk.LockTime.BLOCKS(0))
            .finish(wallet)
        )
        common = {"kind": kind, "fee": psbt.fee(), "payee_script": payee.to_bytes().hex()}
        vectors.append({**common, "stage": "unsigned", "psbt": psbt.serialize()})
        wallet.sign(psbt, None)
        tx = psbt.extract_tx()
        final = {"tx": bytes(tx.serialize()).hex(), "txid": str(tx.compute_txid()), "weight": tx.weight()}
        vectors.append({**common, "stage": "final", "psbt": psbt.serialize(), **final})
        base64.b64decode(psbt.serialize(), validate=True)
    about = "PSBTs made by bdkpython 3.1.1 (BDK) with make_psbt_bdk.py: two inputs each, one payee, one change output."
    target = Path(__file__).with_name("psbt_bdk.json")
    target.write_text(
        json.dumps({"about": about, "sources": {"bdkpython": "3.1.1"}, "vectors": vectors}, indent=1) + "\n"
    )


if __name__ == "__main__":
    main()
