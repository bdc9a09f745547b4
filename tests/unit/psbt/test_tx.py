"""Transactions, PSBTs, scripts and addresses: the codec, its refusals, and that it agrees with python-bitcointx."""

from __future__ import annotations

import base64
import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from pjv2.errors import BadUri, PeerMistake, WrongUsage
from pjv2.psbt.tx import (
    MAGIC,
    Psbt,
    PsbtInput,
    PsbtOutput,
    ScriptKind,
    Tx,
    TxIn,
    TxOut,
    address_to_script,
    build_psbt,
    dust_limit,
    is_witness_program,
    kind_of,
    output_weight,
    script_to_address,
    varint,
)
from pjv2.units import MAX_MONEY, Network, Outpoint
from tests.unit.psbt.payjoin_kit import KINDS, Key, original_psbt, purse

VECTORS = Path(__file__).parents[2] / "vectors"
VALIDITY = json.loads((VECTORS / "psbt_validity.json").read_text())["vectors"]
REFERENCE = json.loads((VECTORS / "psbt.json").read_text())["vectors"]
BDK = json.loads((VECTORS / "psbt_bdk.json").read_text())["vectors"]


def decoded(vector: dict[str, object]) -> bytes:
    return base64.b64decode(str(vector["psbt_base64"]))


def of(name: str) -> dict[str, object]:
    return next(vector for vector in REFERENCE if vector["name"] == name)


def case_id(vector: dict[str, object]) -> str:
    return f"{vector['name']}: {str(vector['case'])[:60]}"


@pytest.mark.parametrize("vector", [v for v in VALIDITY if v["valid"] is False], ids=case_id)
def test_a_psbt_that_a_bip_calls_invalid_is_refused(vector: dict[str, object]) -> None:
    with pytest.raises(PeerMistake):
        Psbt.parse(decoded(vector))


@pytest.mark.parametrize("vector", [v for v in VALIDITY if v["valid"] and v["name"] != "bip370_psbt_case"], ids=case_id)
def test_a_psbt_that_a_bip_calls_valid_round_trips_byte_for_byte(vector: dict[str, object]) -> None:
    assert Psbt.parse(decoded(vector)).serialize() == decoded(vector)


@pytest.mark.parametrize("vector", [v for v in VALIDITY if v["name"] == "bip370_psbt_case"], ids=case_id)
def test_a_version_2_psbt_is_refused_with_a_clear_error(vector: dict[str, object]) -> None:
    with pytest.raises(PeerMistake) as refusal:
        Psbt.parse(decoded(vector))
    if vector["valid"]:
        assert "version 2" in str(refusal.value)


@pytest.mark.parametrize("vector", [v for v in VALIDITY if v["valid"] is None and "174" in v["name"]], ids=case_id)
def test_what_only_a_signer_refuses_still_parses(vector: dict[str, object]) -> None:
    assert Psbt.parse(decoded(vector)).serialize() == decoded(vector)


REFERENCE_PSBTS = [
    (f"{vector['name']}.{field}", value)
    for vector in REFERENCE
    for field, value in vector.items()
    if isinstance(value, str) and value.startswith("cHNidP8") and "\n" not in value
]
OTHER_KEY_ORDER = ("bip78_exchange.Unfinalized_signed_PSBT",)


@pytest.mark.parametrize(("name", "text"), REFERENCE_PSBTS, ids=[name for name, _ in REFERENCE_PSBTS])
def test_bitcoin_cores_psbts_round_trip_byte_for_byte(name: str, text: str) -> None:
    psbt = Psbt.from_base64(text)
    if name in OTHER_KEY_ORDER:
        assert len(psbt.to_base64()) == len(text)
        assert Psbt.from_base64(psbt.to_base64()) == psbt
    else:
        assert psbt.to_base64() == text


@pytest.mark.parametrize("vector", BDK, ids=lambda vector: f"{vector['kind']}-{vector['stage']}")
def test_bdks_psbts_round_trip_byte_for_byte_and_extract_to_its_transaction(vector: dict[str, str]) -> None:
    psbt = Psbt.from_base64(vector["psbt"])
    assert psbt.to_base64() == vector["psbt"]
    assert psbt.fee == vector["fee"]
    if vector["stage"] == "final":
        tx = psbt.extract()
        assert tx.raw.hex() == vector["tx"]
        assert (tx.txid, tx.weight) == (vector["txid"], vector["weight"])


def test_the_reference_invalid_psbt_is_refused() -> None:
    with pytest.raises(PeerMistake):
        Psbt.from_base64(str(of("test_utils_invalid_psbt")["value"]))


def test_the_reference_transaction_round_trips() -> None:
    raw = bytes.fromhex(str(of("psbt_mod_raw_tx")["raw_tx"]))
    tx = Tx.parse(raw)
    rebuilt = Tx(tx.version, tx.locktime, tx.inputs, tx.outputs)
    assert rebuilt.raw == raw
    assert rebuilt == tx
    assert tx.weight == 3 * len(tx.legacy) + len(raw)
    assert tx.stripped().txid == tx.txid
    assert not tx.stripped().has_witness


def test_transactions_agree_with_bitcointx_whatever_chain_is_selected() -> None:
    from bitcointx import ChainParams
    from bitcointx.core import CTransaction, b2lx

    psbt = original_psbt([purse(kind, 100_000, n + 1) for n, kind in enumerate(KINDS)], pays=50_000)
    ours = psbt.extract()
    theirs = CTransaction.deserialize(ours.raw)
    assert (b2lx(theirs.GetTxid()), theirs.serialize()) == (ours.txid, ours.raw)
    with ChainParams("bitcoin/regtest"):
        assert Tx.parse(ours.raw) == ours
        assert address_to_script("bc1qw508d6qejxtdg4y5r3zarvary0c5xw7kv8f3t4", Network.BITCOIN)[:2] == b"\x00\x14"


def test_a_psbt_without_inputs_parses_and_round_trips() -> None:
    psbt = build_psbt(Tx(2, 7, (), (TxOut(1, b"\x51"),)), {})
    assert Psbt.parse(psbt.serialize()) == psbt


def test_trailing_zeros_are_padding_only_where_padding_is_expected() -> None:
    data = original_psbt([purse(ScriptKind.P2TR, 200_000, 1)]).serialize()
    padded = data + bytes(50)
    assert Psbt.parse(padded, padded=True) == Psbt.parse(data)
    with pytest.raises(PeerMistake, match="followed"):
        Psbt.parse(padded)
    with pytest.raises(PeerMistake, match="followed"):
        Psbt.parse(padded + b"x", padded=True)


def test_a_final_script_that_is_present_but_empty_stays_present() -> None:
    psbt = build_psbt(Tx(2, 0, (TxIn(Outpoint("11" * 32, 0)),), (TxOut(1, b""),)), {})
    psbt = Psbt(psbt.tx, (PsbtInput(final_script_sig=b"", final_script_witness=()),), psbt.outputs)
    again = Psbt.parse(psbt.serialize())
    assert again == psbt
    assert again.inputs[0].has_signature
    assert not again.inputs[0].is_final


def test_amounts_beyond_all_bitcoin_are_refused_at_ingestion_and_all_bitcoin_is_not() -> None:
    def paying(value: int) -> bytes:
        return Tx(2, 0, (TxIn(Outpoint("11" * 32, 0)),), (TxOut(value, b"\x51"),)).raw

    assert Tx.parse(paying(MAX_MONEY)).outputs[0].value == MAX_MONEY
    for value in (MAX_MONEY + 1, -1):
        with pytest.raises(PeerMistake, match="outside"):
            Tx.parse(paying(value))


def test_previous_outputs_prefer_the_authenticated_transaction_and_contradictions_are_refused() -> None:
    spent = purse(ScriptKind.P2WPKH, 50_000, 3)
    other = purse(ScriptKind.P2WPKH, 60_000, 4)
    tx = Tx(2, 0, (TxIn(spent.outpoint),), (TxOut(40_000, b"\x51"),))

    def told(**fields: object) -> Psbt:
        return Psbt(tx, (PsbtInput(**fields),), (PsbtOutput(),))  # type: ignore[arg-type]

    both = told(witness_utxo=spent.txout, non_witness_utxo=spent.parent)
    assert both.prevouts() == (spent.txout,)
    assert both.fee == 10_000
    assert told().prevout(0) is None
    with pytest.raises(PeerMistake, match="another one"):
        told(non_witness_utxo=other.parent).prevouts()
    with pytest.raises(PeerMistake, match="contradict"):
        told(witness_utxo=other.txout, non_witness_utxo=spent.parent).prevouts()
    with pytest.raises(PeerMistake, match="does not tell"):
        told().prevouts()
    with pytest.raises(PeerMistake, match="worth more"):
        _ = told(witness_utxo=TxOut(1, spent.key.script)).fee
    beyond = Psbt(
        Tx(2, 0, (TxIn(Outpoint(spent.parent.txid, 9)),), tx.outputs),
        (PsbtInput(non_witness_utxo=spent.parent),),
        (PsbtOutput(),),
    )
    with pytest.raises(PeerMistake, match="no output 9"):
        beyond.prevouts()


def raw_psbt(*maps: list[tuple[bytes, bytes]]) -> bytes:
    tx = Tx(2, 0, (TxIn(Outpoint("11" * 32, 0)),), (TxOut(1, b"\x51"),))
    given = [[(b"\x00", tx.legacy), *maps[0]], *maps[1:]]

    def sized(data: bytes) -> bytes:
        return varint(len(data)) + data

    return MAGIC + b"".join(b"".join(sized(k) + sized(v) for k, v in entries) + b"\0" for entries in given)


@pytest.mark.parametrize(
    ("maps", "why"),
    [
        (([(b"\x01" + bytes(10), bytes(4))], [], []), "extended key"),
        (([(b"\xfb", b"\0")], [], []), "four bytes"),
        (([(b"\xfb\x01", bytes(4))], [], []), "data after"),
        (([], [(b"\x05\x01", b"")], []), "data after"),
        (([], [(b"\x02" + bytes(33), b"sig")], []), "partial_sigs key"),
        (([], [(b"\x16" + bytes(32), b"\xff")], []), "tap_bip32"),
        (([], [(b"\x08", b"\0\0")], []), "followed"),
        (([], [(b"\x03", b"\0")], []), "cannot be read"),
        (([], [(b"\x00", b"")], []), "cannot be read"),
        (([], [(b"\x07", b"a"), (b"\x07", b"b")], []), "same key twice"),
        (([], [], [(b"\x06", b"")]), "tap_tree"),
        (([], [], [(b"\x06", b"\x00")]), "tap_tree"),
        (([], [], [(b"\x06", b"\x00\x01\x00")]), "tap_tree"),
        (([], []), "cannot be read"),
    ],
)
def test_malformed_fields_are_refused(maps: tuple[list[tuple[bytes, bytes]], ...], why: str) -> None:
    with pytest.raises(PeerMistake, match=why):
        Psbt.parse(raw_psbt(*maps))


def test_an_explicit_version_0_is_accepted() -> None:
    assert Psbt.parse(raw_psbt([(b"\xfb", bytes(4))], [], [])).tx.version == 2


def test_wide_key_types_keep_their_place() -> None:
    entries = [(b"\x09por", b"x"), (b"\xfc\x01aq", b"p"), (b"\xfd\xfd\x00z", b"u")]
    data = raw_psbt([], entries, [])
    psbt = Psbt.parse(data)
    assert psbt.inputs[0].proprietary == ((b"\xfc\x01aq", b"p"),)
    assert psbt.serialize() == data


def test_signed_unsigned_transactions_and_missing_ones_are_refused() -> None:
    signed = Tx(2, 0, (TxIn(Outpoint("11" * 32, 0), b"\x51"),), (TxOut(1, b""),))
    with pytest.raises(PeerMistake, match="signatures"):
        Tx.parse_unsigned(signed.raw)
    with pytest.raises(PeerMistake, match="no unsigned transaction"):
        Psbt.parse(MAGIC + b"\0")
    with pytest.raises(PeerMistake, match="magic"):
        Psbt.parse(b"nothing")
    with pytest.raises(PeerMistake, match="base64"):
        Psbt.from_base64("cHN&")


def test_reprs_name_fields_and_hide_contents() -> None:
    psbt = original_psbt([purse(ScriptKind.P2WPKH, 200_000, 1)])
    shown = repr(psbt) + repr(psbt.inputs[0]) + repr(psbt.outputs[0])
    assert "final_script_witness" in shown
    assert psbt.inputs[0].final_script_witness is not None
    assert psbt.inputs[0].final_script_witness[0].hex() not in shown


@pytest.mark.parametrize(
    ("kind", "dust", "weight"),
    [
        (ScriptKind.P2PKH, 546, 136),
        (ScriptKind.P2SH, 540, 128),
        (ScriptKind.P2WPKH, 294, 124),
        (ScriptKind.P2WSH, 330, 172),
        (ScriptKind.P2TR, 330, 172),
    ],
)
def test_dust_and_output_weights_are_bitcoin_cores(kind: ScriptKind, dust: int, weight: int) -> None:
    script = Key(5, kind).script
    assert (kind_of(script), dust_limit(script), output_weight(script)) == (kind, dust, weight)


def test_odd_scripts_are_other_and_op_return_has_no_dust() -> None:
    assert kind_of(b"\x52\x20" + bytes(32)) is ScriptKind.OTHER
    assert is_witness_program(b"\x52\x20" + bytes(32))
    assert not is_witness_program(b"\x6a\x02ab")
    assert dust_limit(b"\x6a\x02ab") == 0


@pytest.mark.parametrize("network", list(Network))
@pytest.mark.parametrize("kind", KINDS)
def test_addresses_round_trip_on_every_network(kind: ScriptKind, network: Network) -> None:
    script = Key(7, kind).script
    address = script_to_address(script, network)
    assert address_to_script(address, network) == script
    other = Network.BITCOIN if network is not Network.BITCOIN else Network.REGTEST
    with pytest.raises(BadUri):
        address_to_script(address, other)


def test_the_reference_addresses_decode() -> None:
    for address in of("fuzz_seed_addresses")["addresses"]:  # type: ignore[attr-defined]
        assert script_to_address(address_to_script(address, Network.BITCOIN), Network.BITCOIN) == address
    assert address_to_script("BC1QW508D6QEJXTDG4Y5R3ZARVARY0C5XW7KV8F3T4", Network.BITCOIN)[0] == 0


def test_scripts_without_an_address_are_said_to_have_none() -> None:
    for script in (b"\x6a", b"", b"\x00\x03abc"):
        with pytest.raises(WrongUsage):
            script_to_address(script, Network.BITCOIN)


def test_importing_the_package_does_not_load_bitcointx() -> None:
    code = "import sys, pjv2.psbt.verify, pjv2.psbt.proposal, pjv2.psbt.scripts; sys.exit('bitcointx' in sys.modules)"
    root = Path(__file__).parents[3]
    environment = {**os.environ, "PYTHONPATH": str(root)}
    assert subprocess.run([sys.executable, "-c", code], cwd=root, env=environment, check=False).returncode == 0


def test_only_the_border_imports_bitcointx() -> None:
    package = Path(__file__).parents[3] / "pjv2" / "psbt"
    importers = [path.name for path in package.rglob("*.py") if "bitcointx" in path.read_text().split('"""', 2)[2]]
    assert importers == ["encoding.py"]


# --- arbitrary bytes: a value or a PeerMistake, never anything else -------------------------------------------------


def parses(data: bytes) -> None:
    for read in (Tx.parse, Tx.parse_unsigned, Psbt.parse, Psbt.from_base64):
        try:
            value = read(data)
        except PeerMistake:
            continue
        assert isinstance(value, Tx | Psbt)
        if isinstance(value, Psbt):
            assert Psbt.parse(value.serialize()) == value


@given(st.binary(max_size=200))
@example(b"")
@example(bytes.fromhex("02000000000000000000"))
@example(bytes.fromhex("0200000000ff"))
@settings(max_examples=150, deadline=None)
def test_arbitrary_bytes_are_a_value_or_a_peers_mistake(data: bytes) -> None:
    parses(data)
    parses(MAGIC + data)


SEEDS = [decoded(v) for v in VALIDITY if v["valid"] and v["name"] != "bip370_psbt_case"]


@given(
    st.sampled_from(SEEDS),
    st.lists(st.tuples(st.integers(0, 5000), st.integers(0, 255)), max_size=6),
    st.integers(0, 9),
)
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_damaged_psbts_are_a_value_or_a_peers_mistake(seed: bytes, hits: list[tuple[int, int]], cut: int) -> None:
    damaged = bytearray(seed)
    for at, value in hits:
        damaged[at % len(damaged)] = value
    parses(bytes(damaged[: len(damaged) - cut]))


@given(st.text(max_size=100))
@example("1" * 50)
@example("bc1" + "q" * 87)
@settings(max_examples=150, deadline=None)
def test_arbitrary_text_is_an_address_or_a_bad_uri(text: str) -> None:
    try:
        script = address_to_script(text, Network.BITCOIN)
    except BadUri:
        return
    assert script


def test_a_claimed_giant_count_fails_at_once() -> None:
    for data in (
        b"\x02\0\0\0\xfe\xff\xff\xff\x01",
        b"\x02\0\0\0\xff" + b"\xff" * 8,
        b"\x02\0\0\0\0\x01\xfe\xff\xff\xff\x01",
    ):
        with pytest.raises(PeerMistake):
            Tx.parse(data)
    stream = io.BytesIO()
    stream.write(MAGIC + b"\xfe\xff\xff\xff\x7f")
    with pytest.raises(PeerMistake):
        Psbt.parse(stream.getvalue())
