"""Judged without a node: good spends get a yes, and nothing gets one that a node's mempool refuses."""

from __future__ import annotations

import contextlib
import random
from collections import Counter
from contextlib import asynccontextmanager
from dataclasses import replace

import pytest

pytest.importorskip("pbk", reason="the lab needs libbitcoinkernel")

from pjv2.backends.chain.suitability import MAX_FAMILY, Judged, Outlook, ScriptVerifier, check_form, check_spend, judge
from pjv2.lab.chain import LabChain
from pjv2.psbt.original import Suitability
from pjv2.psbt.scripts import p2sh_script, p2tr_script, p2wsh_script, sighash_segwit_v0
from pjv2.psbt.tx import Tx, TxIn, TxOut
from pjv2.units import FeeRate, Outpoint
from tests.unit.backends.chain.spends import FINAL, KINDS, SPOILINGS, Purse, World, push

ROUNDS = 2_000
COIN = 100_000
VERIFIER = ScriptVerifier.load()


@asynccontextmanager
async def world_of(purse: Purse):
    """A chain, and on it twenty coins, two spent ones (in a block and in the mempool) and an immature one."""
    async with LabChain() as lab:
        outpoints = await lab.fund_many([TxOut(COIN + n, purse.script) for n in range(22)])
        coins = {outpoint: lab.utxos()[outpoint] for outpoint in outpoints}
        *good, first, second = outpoints
        await lab.mine(12)
        (block,) = await lab.mine(to=purse.script)
        immature = Outpoint(lab.find_block(block).txs[0].txid, 0)
        coins[immature] = lab.utxos()[immature]
        for outpoint, confirm in ((first, True), (second, False)):
            tx = Tx(2, 0, (TxIn(outpoint),), (TxOut(90_000, purse.script),))
            assert (await lab.broadcast(purse.sign(tx, [coins[outpoint]]).raw)).verdict == "accepted"
            if confirm:
                await lab.mine()
        tip = await lab.tip()
        yield lab, World(purse, tuple(good), (first, second), immature, tip.height, tip.median_time, coins)


async def outlook(lab, tx, **changes) -> Outlook:
    prevouts = await lab.prevouts([spend.outpoint for spend in tx.inputs])
    return replace(Outlook(await lab.tip(), prevouts, lab.min_relay), **changes)


async def verdict(lab, tx, **changes) -> Suitability:
    return judge(tx, await outlook(lab, tx, **changes), VERIFIER)


@pytest.mark.parametrize("kind", KINDS)
async def test_every_good_spend_gets_a_yes(kind):
    dice = random.Random(f"good {kind}")
    async with world_of(Purse(kind)) as (lab, world):
        for _ in range(100):
            tx = world.signed(world.draft(dice))
            assert await verdict(lab, tx) == Suitability("accepted")
            assert (await lab.test(tx.raw)).verdict == "accepted"


@pytest.mark.parametrize("kind", KINDS)
async def test_nothing_that_a_mempool_refuses_gets_a_yes(kind):
    dice = random.Random(f"spoilt {kind}")
    told = Counter()
    async with world_of(Purse(kind)) as (lab, world):
        for n in range(ROUNDS):
            spoiling = SPOILINGS[n % len(SPOILINGS)]
            tx = spoiling(world, world.draft(dice), dice)
            ours = await verdict(lab, tx)
            told[ours.verdict] += 1
            if ours.verdict == "accepted":
                theirs = await lab.test(tx.raw)
                assert theirs.verdict == "accepted", f"{spoiling.__name__}: {theirs.reason}"
                continue
            assert ours.reason
            if n % 7 == 0 and ours.verdict == "refused":
                # Only what this node takes although others do not, or what it may replace.
                excused = any(word in ours.reason for word in ("burns", "is spent by", "non-BIP68-final"))
                assert excused or (await lab.test(tx.raw)).verdict == "refused", ours.reason
    # Not by saying no to everything.
    assert told["accepted"] > ROUNDS // 20
    assert told["refused"] > ROUNDS // 4


# ---------------------------------------------------------------- one by one


@pytest.fixture
async def lab():
    async with LabChain() as lab:
        yield lab


KEY, SECOND = Purse("p2wsh").keys


def der(key, tx, script, value=COIN) -> bytes:
    return key.sign(sighash_segwit_v0(tx, 0, script, value), hasher=None) + b"\x01"


def spend(outpoint, value=COIN - 1_000, **changes) -> Tx:
    return Tx(2, 0, (TxIn(outpoint, sequence=FINAL - 2),), (TxOut(value, Purse("p2wpkh", 40).script),), **changes)


async def one_by_one(lab, script, make) -> str:
    """The verdict on a spend of one coin of `script`, whose input `make(tx)` completes."""
    tx = spend(await lab.fund(script, COIN))
    return (await judged(lab, replace(tx, inputs=(make(tx),)))).verdict


async def judged(lab, tx, **changes) -> Suitability:
    ours = await verdict(lab, tx, **changes)
    if ours.verdict == "accepted":
        assert (await lab.test(tx.raw)).verdict == "accepted"
    return ours


def key_script(key) -> bytes:
    return push(key.public_key.format()) + b"\xac"


async def test_a_single_key_behind_a_witness_script_is_known_nested_or_not(lab):
    program = key_script(KEY)

    def plain(tx):
        return replace(tx.inputs[0], witness=(der(KEY, tx, program), program))

    def nested(tx):
        return replace(plain(tx), script_sig=push(p2wsh_script(program)))

    assert await one_by_one(lab, p2wsh_script(program), plain) == "accepted"
    assert await one_by_one(lab, p2sh_script(p2wsh_script(program)), nested) == "accepted"


async def test_a_script_that_holds_but_is_not_known_is_unverifiable(lab):
    program = key_script(KEY)[:-1] + b"\xad\x51"  # CHECKSIGVERIFY 1

    def make(tx):
        return replace(tx.inputs[0], witness=(der(KEY, tx, program), program))

    assert await one_by_one(lab, p2wsh_script(program), make) == "unverifiable"
    assert await one_by_one(lab, b"\x51", lambda tx: tx.inputs[0]) == "unverifiable"


async def test_an_uncompressed_key_behind_a_witness_program_holds_by_consensus_and_gets_no_yes(lab):
    purse = Purse("p2wpkh", compressed=False)
    tx = spend(await lab.fund(purse.script, COIN))
    found = await judged(lab, purse.sign(tx, [TxOut(COIN, purse.script)]))
    assert (found.verdict, found.reason) == ("unverifiable", "input 0 is no plain signature and key")


async def test_multisig_in_pay_to_script_hash_is_known_only_with_exactly_its_signatures(lab):
    from tests.unit.backends.chain.spends import legacy_digest

    redeem = b"\x51" + push(KEY.public_key.format(False)) + push(SECOND.public_key.format()) + b"\x52\xae"

    def make(*before, last=redeem):
        def made(tx):
            signature = SECOND.sign(legacy_digest(tx, 0, redeem, 1), hasher=None) + b"\x01"
            return replace(tx.inputs[0], script_sig=b"".join(before) + b"\x00" + push(signature) + push(last))

        return made

    assert await one_by_one(lab, p2sh_script(redeem), make()) == "accepted"
    assert await one_by_one(lab, p2sh_script(redeem), make(b"\x51")) == "unverifiable"


async def test_leaves_with_one_key_or_a_threshold_of_keys_are_known(lab):
    from coincurve import PublicKeyXOnly

    from pjv2.psbt.scripts import tagged_hash

    internal = PublicKeyXOnly.from_secret(bytes(31) + b"\x09").format()
    keys = [PublicKeyXOnly.from_secret(key.secret).format() for key in (KEY, SECOND)]
    one = b"\x20" + keys[0] + b"\xac"
    threshold = one + b"\x20" + keys[1] + b"\xba\x51\x9c"
    strange = b"\x20" + keys[0] + b"\xad\x51"

    async def opened(leaf, *empty, version=0xC0) -> str:
        root = tagged_hash("TapLeaf", bytes([version, len(leaf)]) + leaf)
        tweak = tagged_hash("TapTweak", internal + root)
        point = PublicKeyXOnly(internal)
        output = point.tweak_add(tweak)
        parity = _parity(internal, tweak)
        script = p2tr_script(output.format() if output is not None else point.format())
        control = bytes([version | parity]) + internal

        def make(tx):
            digest = _tapscript_digest(tx, TxOut(COIN, script), root)
            return replace(tx.inputs[0], witness=(*empty, KEY.sign_schnorr(digest, bytes(32)), leaf, control))

        return await one_by_one(lab, script, make)

    assert await opened(one) == "accepted"
    assert await opened(threshold, b"") == "accepted"
    assert await opened(strange) == "unverifiable"
    assert await opened(one, version=0xC2) == "unverifiable"


def _parity(internal: bytes, tweak: bytes) -> int:
    from coincurve import PublicKey

    return PublicKey(b"\x02" + internal).add(tweak).format()[0] & 1


def _tapscript_digest(tx: Tx, spent: TxOut, leaf: bytes) -> bytes:
    """BIP342: the signature message with its extension, for a transaction of one input."""
    import hashlib
    import struct

    from pjv2.psbt.scripts import tagged_hash

    def sha(data: bytes) -> bytes:
        return hashlib.sha256(data).digest()

    this = tx.inputs[0]
    message = b"\x00\x00" + struct.pack("<iI", tx.version, tx.locktime)
    message += sha(this.serialize()[:36]) + sha(struct.pack("<q", spent.value))
    message += sha(bytes([len(spent.script)]) + spent.script) + sha(struct.pack("<I", this.sequence))
    message += sha(b"".join(out.serialize() for out in tx.outputs))
    message += b"\x02" + struct.pack("<I", 0) + leaf + b"\x00" + b"\xff\xff\xff\xff"
    return tagged_hash("TapSighash", message)


async def test_without_the_kernel_nothing_gets_a_yes_and_what_is_wrong_is_still_refused(lab):
    purse = Purse("p2wpkh")
    tx = spend(await lab.fund(purse.script, COIN))
    good = purse.sign(tx, [TxOut(COIN, purse.script)])
    found = judge(good, await outlook(lab, good), None)
    assert found.verdict == "unverifiable"
    assert "pjv2[lab]" in found.reason
    missing = spend(Outpoint("ab" * 32, 0))
    assert judge(missing, await outlook(lab, missing), None).verdict == "refused"


async def test_the_spend_itself_in_sight_is_known(lab):
    purse = Purse("p2wpkh")
    tx = purse.sign(spend(await lab.fund(purse.script, COIN)), [TxOut(COIN, purse.script)])
    await lab.broadcast(tx.raw)
    assert (await verdict(lab, tx)).verdict == "known"


async def test_a_fee_that_nodes_take_for_a_mistake_is_refused(lab):
    purse = Purse("p2wpkh")
    coin = 50_000_000
    outpoint = await lab.fund(purse.script, coin)
    verdicts = []
    for fee in (1_000, 10_000_000):
        tx = purse.sign(spend(outpoint, coin - fee), [TxOut(coin, purse.script)])
        verdicts.append((await judged(lab, tx)).verdict)
    assert verdicts == ["accepted", "refused"]


async def test_an_unconfirmed_coin_gets_a_yes_only_with_a_small_family_that_was_read(lab):
    purse = Purse("p2wpkh")
    outpoint = await lab.fund(purse.script, COIN, confirm=False)
    parent = lab.tx(outpoint.txid).tx
    tx = purse.sign(spend(outpoint), [TxOut(COIN, purse.script)])
    assert (await judged(lab, tx, family=(parent,))).verdict == "accepted"
    for family in (None, (), (parent,) * MAX_FAMILY, (replace(parent, version=3),)):
        assert (await judged(lab, tx, family=family)).verdict == "unverifiable"
    many = Tx(2, 0, parent.inputs, (TxOut(1_000, bytes(100_000)),))
    assert (await judged(lab, tx, family=(parent, many))).verdict == "unverifiable"


async def test_the_floor_is_counted_in_whole_virtual_bytes(lab):
    purse = Purse("p2wpkh")
    outpoint = await lab.fund(purse.script, COIN)
    size = -(-purse.sign(spend(outpoint), [TxOut(COIN, purse.script)]).weight // 4)
    verdicts = []
    for fee in (2 * size - 1, 2 * size):
        tx = purse.sign(spend(outpoint, COIN - fee), [TxOut(COIN, purse.script)])
        verdicts.append((await judged(lab, tx, floor=FeeRate(500))).verdict)
    assert verdicts == ["refused", "accepted"]


def test_what_can_be_said_without_a_chain():
    good = spend(Outpoint("ab" * 32, 0))
    out = good.outputs[0]
    check_form(good)
    cases = {
        "refused": (
            replace(good, inputs=()),
            replace(good, outputs=()),
            replace(good, version=4),
            replace(good, inputs=good.inputs * 2),
            replace(good, inputs=(TxIn(Outpoint("0" * 64, 0xFFFFFFFF)),)),
            replace(good, outputs=(replace(out, value=1),)),
            replace(good, outputs=(TxOut(0, b"\x6a"),)),
            replace(good, outputs=(out, TxOut(1, b"\x6a\x01a"))),
            replace(good, outputs=(out, TxOut(0, b"\x6a\x05a"))),
            replace(good, outputs=(out,) * 4_000),
        ),
        "unverifiable": (
            replace(good, version=3),
            replace(good, outputs=(out, TxOut(0, b"\x6a\x01a"), TxOut(0, b"\x6a\x01b"))),
            replace(good, outputs=(out, TxOut(0, b"\x6a\x4c\x64" + bytes(100)))),
            replace(good, outputs=(out, TxOut(1_000, b"\x51"))),
            replace(good, outputs=(out, TxOut(1_000, b""))),
        ),
    }
    for wanted, spoilt in cases.items():
        for tx in spoilt:
            with pytest.raises(Judged) as caught:
                check_form(tx)
            assert caught.value.suitability.verdict == wanted, tx
            assert caught.value.suitability.reason


@pytest.mark.parametrize("script", [Purse(kind).script for kind in KINDS] + [b"", b"\x60\x02ab"])
def test_no_shape_of_input_makes_it_stumble(script):
    dice = random.Random(1)
    taken = 0
    for _ in range(300):
        items = [dice.randbytes(dice.choice((0, 1, 9, 33, 64, 65, 72))) for _ in range(dice.randrange(4))]
        program = dice.choice(
            (b"\x51", b"\x52\xae", b"\xae", b"\xac", b"\x20", b"\x50", bytes([33]) + dice.randbytes(33) + b"\xac")
        )
        inputs = TxIn(Outpoint("ab" * 32, 0), b"".join(map(push, items))[: dice.randrange(200)], 0, (*items, program))
        inputs = replace(inputs, witness=()) if dice.random() < 0.2 else inputs
        with contextlib.suppress(Judged):
            check_spend(0, inputs, TxOut(1, script))
            taken += 1
    assert taken < 100
