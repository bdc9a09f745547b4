"""The lab's chain: consensus by the kernel, policy in bitcoind's words, and power over the weather."""

import sys
from dataclasses import replace

import pytest

pytest.importorskip("pbk", reason="the lab needs libbitcoinkernel")

from coincurve import PrivateKey

from pjv2.errors import NotNow, WrongUsage
from pjv2.lab.chain import LabChain
from pjv2.lab.miner import HALVING, SUBSIDY
from pjv2.psbt.scripts import p2pkh_script, p2wpkh_script, p2wpkh_script_code, p2wsh_script, sighash_segwit_v0
from pjv2.psbt.tx import Tx, TxIn, TxOut
from pjv2.session.facts import ChainTx
from pjv2.units import FeeRate, Network, Outpoint

ANYONE = p2wsh_script(b"\x51")
KEY = PrivateKey(b"\x07" * 32)
KEYED = p2wpkh_script(KEY.public_key.format())
COIN = 100_000
ORDER = 0xFFFFFFFF_FFFFFFFF_FFFFFFFF_FFFFFFFE_BAAEDCE6_AF48A03B_BFD25E8C_D0364141


@pytest.fixture
async def chain():
    async with LabChain() as chain:
        yield chain


def spend(*outpoints, value=COIN - 1_000, script=ANYONE, version=2, locktime=0, sequence=0xFFFFFFFD, outputs=None):
    inputs = tuple(TxIn(outpoint, b"", sequence, (b"\x51",)) for outpoint in outpoints)
    return Tx(version, locktime, inputs, outputs or (TxOut(value, script),))


async def coin(chain, value=COIN):
    return await chain.fund(ANYONE, value)


async def send(chain, tx, parents=()):
    return await chain.broadcast(tx.raw, parents=[parent.raw for parent in parents])


async def accepted(chain, tx, parents=()):
    result = await send(chain, tx, parents)
    assert (result.verdict, result.reason) == ("accepted", "")
    return tx.txid


async def refusal(chain, tx, parents=()):
    """The reason, which the test and the broadcast agree on."""
    if not parents:
        verdict = await chain.test(tx.raw)
        assert verdict.verdict == "refused"
    result = await send(chain, tx, parents)
    assert result.verdict == "refused"
    assert chain.tx(tx.txid) is None
    if not parents:
        assert verdict.reason in (result.reason, "missing-inputs")
    return result.reason


def money(chain):
    return sum(out.value for out in chain.utxos().values())


def issued(chain):
    return sum(SUBSIDY >> (height // HALVING) for height in range(1, chain.height + 1))


# ---------------------------------------------------------------- start and stop


async def test_a_fresh_chain_is_regtest_with_a_full_faucet_and_the_same_every_time(chain):
    assert await chain.genesis_hash() == Network.REGTEST.genesis_hash
    tip = await chain.tip()
    assert tip.height == 110
    assert tip.median_time == chain.block(105).time
    async with LabChain() as other:
        assert await other.tip() == tip
    async with LabChain(premine=3, start=1_600_000_000, step=60) as short:
        assert [short.block(n).time for n in (1, 2, 3)] == [1_600_000_000, 1_600_000_060, 1_600_000_120]
        with pytest.raises(WrongUsage, match="mine 100 more blocks"):
            await short.fund(ANYONE, 1)


async def test_closing_deletes_the_files_and_silences_the_ports():
    chain = LabChain(premine=1)
    directory = chain._kernel._directory
    assert directory.is_dir()
    await chain.close()
    await chain.close()
    assert not directory.exists()
    with pytest.raises(NotNow, match="closed"):
        await chain.tip()
    with pytest.raises(NotNow, match="closed"):
        await chain.mine()


async def test_without_the_kernel_the_lab_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "pbk", None)
    with pytest.raises(NotNow, match=r"pjv2\[lab\], or have bitcoind on PATH"):
        LabChain()


async def test_an_offline_chain_answers_no_port_but_lives_on(chain):
    chain.offline = True
    with pytest.raises(NotNow):
        await chain.view(frozenset(), frozenset(), frozenset(), 0)
    await chain.mine()
    chain.offline = False
    assert (await chain.tip()).height == 111


# ---------------------------------------------------------------- what is taken


async def test_a_good_transaction_enters_is_known_confirms_and_is_still_known(chain):
    outpoint = await coin(chain)
    tx = spend(outpoint)
    assert (await chain.test(tx.raw)).verdict == "accepted"
    assert chain.mempool() == ()
    txid = await accepted(chain, tx)
    assert chain.tx(txid).fee == 1_000
    again = await send(chain, tx)
    assert (again.verdict, again.reason) == ("known", "txn-already-in-mempool")
    await chain.mine()
    assert chain.mempool() == ()
    assert chain.tx(txid).height == chain.height
    assert chain.block(chain.height).txs[1].txid == txid
    known = await chain.test(tx.raw)
    assert (known.verdict, known.reason) == ("known", "txn-already-known")
    assert chain.spender(outpoint) == txid
    assert outpoint not in chain.utxos()
    assert chain.utxos(ANYONE) == {Outpoint(txid, 0): tx.outputs[0]}


async def test_another_witness_of_the_same_transaction_is_known(chain):
    tx = spend(await coin(chain))
    await accepted(chain, tx)
    other = replace(tx, inputs=(replace(tx.inputs[0], witness=(b"\x01", b"\x51")),))
    result = await send(chain, other)
    assert (result.verdict, result.reason) == ("known", "txn-same-nonwitness-data-in-mempool")


async def test_fees_go_to_the_miner_and_no_satoshi_is_lost(chain):
    first = spend(await coin(chain), value=COIN - 7_000)
    await accepted(chain, first)
    await accepted(chain, spend(Outpoint(first.txid, 0), value=COIN - 9_000))
    await chain.mine(2)
    assert money(chain) == issued(chain)
    await chain.reorg(3)
    assert money(chain) == issued(chain)
    await chain.mine(HALVING)
    assert money(chain) == issued(chain)


async def test_standard_outputs_of_every_kind_are_taken(chain):
    scripts = [
        p2pkh_script(KEY.public_key.format()),
        KEYED,
        ANYONE,
        b"\xa9\x14" + bytes(20) + b"\x87",
        b"\x51\x20" + KEY.public_key.format()[1:],
        b"\x51\x02\x4e\x73",
        b"\x21" + KEY.public_key.format() + b"\xac",
    ]
    outputs = (*(TxOut(1_000, script) for script in scripts), TxOut(0, b"\x6a\x04note"))
    await accepted(chain, spend(await coin(chain), outputs=outputs))


# ---------------------------------------------------------------- what is refused, in bitcoind's words


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda tx: replace(tx, outputs=(TxOut(COIN, ANYONE),)), "min relay fee not met, 0 < "),
        (lambda tx: replace(tx, outputs=(TxOut(COIN + 1, ANYONE),)), "bad-txns-in-belowout, value in (0.00100000)"),
        (lambda tx: replace(tx, outputs=(TxOut(329, ANYONE),)), "dust"),
        (lambda tx: replace(tx, outputs=(TxOut(293, KEYED),)), "dust"),
        (lambda tx: replace(tx, outputs=(TxOut(90_000, b"\x51"),)), "scriptpubkey"),
        (lambda tx: replace(tx, outputs=(TxOut(90_000, b"\x00\x15" + bytes(21)),)), "scriptpubkey"),
        (lambda tx: replace(tx, outputs=(TxOut(0, b"\x6a\xac"),)), "scriptpubkey"),
        (lambda tx: replace(tx, version=4), "version"),
        (lambda tx: replace(tx, version=0), "version"),
        (lambda tx: replace(tx, locktime=112), "non-final"),
        (lambda tx: replace(tx, locktime=1_900_000_000), "non-final"),
        (lambda tx: replace(tx, inputs=tx.inputs * 2), "bad-txns-inputs-duplicate"),
        (lambda tx: replace(tx, inputs=(replace(tx.inputs[0], script_sig=b"\x76"),)), "scriptsig-not-pushonly"),
        (lambda tx: replace(tx, inputs=(replace(tx.inputs[0], script_sig=b"\x51" * 1651),)), "scriptsig-size"),
        (lambda tx: replace(tx, outputs=(TxOut(300, ANYONE),) * 2_400), "tx-size"),
        (lambda tx: replace(tx, outputs=(TxOut(0, b"\x6a"),)), "tx-size-small"),
        (lambda tx: replace(tx, outputs=(TxOut(1_100_000_000_000_000, ANYONE),) * 2), "bad-txns-txouttotal-toolarge"),
        (
            lambda tx: replace(tx, inputs=(replace(tx.inputs[0], outpoint=Outpoint("ab" * 32, 0)),)),
            "bad-txns-inputs-mi",
        ),
        (lambda tx: replace(tx, inputs=(replace(tx.inputs[0], sequence=2),)), "non-BIP68-final"),
        (lambda tx: replace(tx, inputs=(replace(tx.inputs[0], sequence=1 << 22 | 3),)), "non-BIP68-final"),
        (
            lambda tx: replace(tx, inputs=(replace(tx.inputs[0], witness=(b"\x52",)),)),
            "mempool-script-verify-flag-failed (the script does not hold), input 0 of ",
        ),
    ],
)
async def test_a_transaction_that_breaks_a_rule_is_refused_by_its_name(chain, change, reason):
    outpoint = await coin(chain)
    assert (await refusal(chain, change(spend(outpoint)))).startswith(reason)
    await accepted(chain, spend(outpoint))


async def test_noise_and_foreign_coinbases_are_refused(chain):
    for noise in (b"", b"\x00" * 10, b"no transaction"):
        result = await chain.broadcast(noise)
        assert (result.verdict, result.reason) == ("refused", "TX decode failed")
    base = chain.block(5).txs[0].tx
    assert await refusal(chain, replace(base, locktime=1)) == "coinbase"


async def test_a_missing_input_has_two_names(chain):
    tx = spend(Outpoint("ab" * 32, 0))
    assert (await chain.test(tx.raw)).reason == "missing-inputs"
    assert (await send(chain, tx)).reason == "bad-txns-inputs-missingorspent"
    spent = await coin(chain)
    await accepted(chain, spend(spent))
    await chain.mine()
    assert (await send(chain, spend(spent, value=50_000))).reason == "bad-txns-inputs-missingorspent"
    held = await coin(chain)
    assert (await send(chain, spend(Outpoint(held.txid, 99)))).reason == "bad-txns-inputs-missingorspent"


async def test_a_coinbase_is_spent_after_a_hundred_blocks_and_not_before(chain):
    await chain.mine(to=ANYONE)
    outpoint = Outpoint(chain.block(chain.height).txs[0].txid, 0)
    tx = spend(outpoint, value=SUBSIDY - 1_000)
    assert (await refusal(chain, tx)) == "bad-txns-premature-spend-of-coinbase, tried to spend coinbase at depth 1"
    await chain.mine(98)
    assert (await refusal(chain, tx)).endswith("at depth 99")
    async with LabChain() as other:
        await other.mine(to=ANYONE)
        early = Outpoint(other.block(111).txs[0].txid, 0)
        with pytest.raises(WrongUsage, match="bad-txns-premature-spend-of-coinbase"):
            await other.mine(txs=[spend(early).raw])
    await chain.mine()
    assert (await chain.prevouts([outpoint]))[outpoint].coinbase
    await accepted(chain, tx)
    await chain.mine()
    assert chain.tx(tx.txid).height == chain.height


async def test_a_signature_with_a_high_s_is_refused_though_consensus_takes_it(chain):
    outpoint = await chain.fund(KEYED, COIN)
    draft = Tx(2, 0, (TxIn(outpoint),), (TxOut(COIN - 1_000, ANYONE),))
    der = KEY.sign(sighash_segwit_v0(draft, 0, p2wpkh_script_code(KEYED), COIN), hasher=None)

    def signed(signature):
        return replace(draft, inputs=(TxIn(outpoint, witness=(signature + b"\x01", KEY.public_key.format())),))

    r_size = der[3]
    s = ORDER - int.from_bytes(der[6 + r_size :], "big")
    high = b"\x00" + s.to_bytes(32, "big")
    body = der[2 : 4 + r_size] + b"\x02" + bytes([len(high)]) + high
    tall = signed(b"\x30" + bytes([len(body)]) + body)
    assert "S value is unnecessarily high" in await refusal(chain, tall)
    wrong = bytearray(der)
    wrong[-1] ^= 1
    assert "mempool-script-verify-flag-failed" in await refusal(chain, signed(bytes(wrong)))
    await chain.mine(txs=[tall.raw])
    assert chain.tx(tall.txid).height == chain.height


async def test_a_coin_with_an_unknown_script_is_not_spent_through_the_mempool(chain):
    outpoint = await chain.fund(b"\x51", COIN)
    tx = Tx(2, 0, (TxIn(outpoint),), (TxOut(COIN - 1_000, ANYONE),))
    assert (await refusal(chain, tx)).startswith("bad-txns-nonstandard-inputs")
    await chain.mine(txs=[tx.raw])
    assert chain.tx(tx.txid).height == chain.height


# ---------------------------------------------------------------- locks


async def test_a_relative_height_lock_opens_when_the_coin_is_old_enough(chain):
    tx = spend(await coin(chain), sequence=3)
    for _ in range(2):
        assert await refusal(chain, tx) == "non-BIP68-final"
        await chain.mine()
    await accepted(chain, tx)
    await chain.mine()
    assert chain.tx(tx.txid).height == chain.height


async def test_a_relative_time_lock_opens_when_the_median_time_has_passed(chain):
    outpoint = await coin(chain)
    tx = spend(outpoint, sequence=1 << 22 | 20)
    prevout = (await chain.prevouts([outpoint]))[outpoint]
    assert prevout.time == chain.block(prevout.height - 1).median_time
    while (await chain.tip()).median_time < prevout.time + 20 * 512:
        assert await refusal(chain, tx) == "non-BIP68-final"
        await chain.mine()
    await accepted(chain, tx)
    await chain.mine()
    assert chain.tx(tx.txid).height == chain.height


async def test_a_relative_lock_on_an_unconfirmed_coin_and_one_that_is_switched_off(chain):
    parent = spend(await coin(chain))
    await accepted(chain, parent)
    child = Outpoint(parent.txid, 0)
    assert await refusal(chain, spend(child, value=90_000, sequence=1)) == "non-BIP68-final"
    await accepted(chain, spend(child, value=90_000, sequence=1 << 31 | 500))
    await accepted(chain, spend(await coin(chain), sequence=500, version=1))


async def test_an_absolute_lock_opens_at_its_height_and_is_void_with_final_sequences(chain):
    tx = spend(await coin(chain), locktime=113)
    assert await refusal(chain, tx) == "non-final"
    await accepted(chain, spend(await coin(chain), locktime=500, sequence=0xFFFFFFFF))
    await chain.mine()
    await accepted(chain, tx)


async def test_an_absolute_time_lock_looks_at_the_median_time(chain):
    await chain.skip_time(100_000)
    await chain.mine(6)
    median = (await chain.tip()).median_time
    assert await refusal(chain, spend(await coin(chain), locktime=int(median) + 700)) == "non-final"
    await accepted(chain, spend(await coin(chain), locktime=int(median) - 1))


async def test_a_block_too_far_ahead_of_the_clock_is_refused(chain):
    await chain.skip_time(4_000_000_000 - chain.block(110).time)
    with pytest.raises(WrongUsage, match="time-too-new"):
        await chain.mine()


# ---------------------------------------------------------------- fees, replacement, packages


async def test_the_relay_fee_is_a_tenth_of_a_satoshi_and_can_be_raised(chain):
    outpoint = await coin(chain)
    size = -(-spend(outpoint).weight // 4)
    least = -(-size // 10)
    assert (await refusal(chain, spend(outpoint, value=COIN - least + 1))).startswith("min relay fee not met")
    assert (await chain.test(spend(outpoint, value=COIN - least).raw)).verdict == "accepted"
    chain.min_relay = FeeRate.from_sat_per_vb(5)
    assert (
        await refusal(chain, spend(outpoint, value=COIN - 5 * size + 1))
        == f"min relay fee not met, {5 * size - 1} < {5 * size}"
    )
    await accepted(chain, spend(outpoint, value=COIN - 5 * size))


async def test_a_fee_spike_evicts_what_pays_too_little_unless_a_child_pays(chain):
    cheap, lifted = spend(await coin(chain)), spend(await coin(chain), value=COIN - 900)
    child = spend(Outpoint(lifted.txid, 0), value=50_000)
    for tx in (cheap, lifted, child):
        await accepted(chain, tx)
    rate = FeeRate.from_sat_per_vb(30)
    assert await chain.spike(rate) == (cheap.txid,)
    assert [entry.txid for entry in chain.mempool()] == [lifted.txid, child.txid]
    assert (await refusal(chain, cheap)).startswith("mempool min fee not met")
    assert await chain.fee_rate(144) == rate
    await chain.spike(FeeRate(0))
    await accepted(chain, cheap)


async def test_estimates_are_picked_by_target_and_can_be_set(chain):
    chain.estimates = {2: FeeRate(4_000), 10: FeeRate(2_000)}
    assert [(await chain.fee_rate(n)).sat_per_kwu for n in (1, 2, 6, 10, 144)] == [4_000, 4_000, 4_000, 2_000, 2_000]
    view = await chain.view(frozenset(), frozenset(), frozenset(), 0)
    assert (view.rate, view.economy_rate) == (FeeRate(4_000), FeeRate(2_000))


async def test_a_replacement_pays_a_better_rate_and_more_fee(chain):
    outpoint = await coin(chain)
    old = spend(outpoint, value=COIN - 2_000)
    await accepted(chain, old)
    size = chain.tx(old.txid).vsize
    same = await refusal(chain, spend(outpoint, value=COIN - 2_000, script=KEYED, outputs=None, locktime=1))
    assert same.startswith("insufficient fee, rejecting replacement ")
    assert "; new feerate 0.000" in await refusal(chain, spend(outpoint, value=COIN - 1_900))
    little = await refusal(chain, spend(outpoint, value=COIN - 2_000 - size // 10))
    assert "not enough additional fees to relay; 0.000000" in little
    better = spend(outpoint, value=COIN - 2_000 - size // 10 - 1)
    await accepted(chain, better)
    assert [entry.txid for entry in chain.mempool()] == [better.txid]


async def test_a_replacement_pays_for_the_descendants_it_throws_out(chain):
    outpoint = await coin(chain)
    parent = spend(outpoint, value=COIN - 500)
    child = spend(Outpoint(parent.txid, 0), value=COIN - 20_000)
    await accepted(chain, parent)
    await accepted(chain, child)
    reason = await refusal(chain, spend(outpoint, value=COIN - 5_000))
    assert "less fees than conflicting txs; 0.00005000 < 0.00020000" in reason
    await accepted(chain, spend(outpoint, value=COIN - 21_000))
    assert len(chain.mempool()) == 1


async def test_a_replacement_neither_spends_what_it_replaces_nor_adds_an_unconfirmed_coin(chain):
    outpoint = await coin(chain)
    parent = spend(outpoint)
    await accepted(chain, parent)
    both = spend(outpoint, Outpoint(parent.txid, 0), value=COIN)
    assert await refusal(chain, both) == "bad-txns-spends-conflicting-tx"
    other = spend(await coin(chain))
    await accepted(chain, other)
    adding = spend(outpoint, Outpoint(other.txid, 0), value=COIN)
    assert (await refusal(chain, adding)).startswith("replacement-adds-unconfirmed")


async def test_a_parent_without_fee_enters_with_its_child(chain):
    parent = spend(await coin(chain), value=COIN)
    child = spend(Outpoint(parent.txid, 0), value=COIN - 2_000)
    assert (await refusal(chain, parent)).startswith("min relay fee not met")
    assert await refusal(chain, child) == "bad-txns-inputs-missingorspent"
    await accepted(chain, child, [parent])
    assert [entry.txid for entry in chain.mempool()] == [parent.txid, child.txid]
    assert (await send(chain, child, [parent])).verdict == "known"


async def test_a_package_is_judged_by_its_rate_as_a_whole(chain):
    rate = FeeRate.from_sat_per_vb(20)
    await chain.spike(rate)
    outpoint = await coin(chain)
    parent = spend(outpoint, value=COIN - 100)
    size = 2 * -(-parent.weight // 4)
    need = rate.fee(4 * size) - 100
    poor = spend(Outpoint(parent.txid, 0), value=COIN - 100 - need + 1)
    assert (await refusal(chain, poor, [parent])).startswith("mempool min fee not met")
    assert chain.mempool() == ()
    await accepted(chain, spend(Outpoint(parent.txid, 0), value=COIN - 100 - need), [parent])


async def test_a_package_replaces_what_its_parent_alone_could_not(chain):
    outpoint = await coin(chain)
    old = spend(outpoint, value=COIN - 5_000)
    await accepted(chain, old)
    parent = spend(outpoint, value=COIN - 200)
    assert (await refusal(chain, parent)).startswith("insufficient fee")
    child = spend(Outpoint(parent.txid, 0), value=COIN - 20_000)
    await accepted(chain, child, [parent])
    assert [entry.txid for entry in chain.mempool()] == [parent.txid, child.txid]


async def test_a_good_parent_enters_though_its_child_is_refused(chain):
    parent = spend(await coin(chain))
    bad = spend(Outpoint(parent.txid, 0), value=COIN * 2)
    assert (await refusal(chain, bad, [parent])).startswith("bad-txns-in-belowout")
    assert chain.tx(parent.txid) is not None


async def test_a_bad_parent_or_a_stranger_spoils_the_package(chain):
    missing = spend(Outpoint("ab" * 32, 0))
    child = spend(Outpoint(missing.txid, 0), value=90_000)
    assert await refusal(chain, child, [missing]) == "bad-txns-inputs-missingorspent"
    free = spend(await coin(chain), value=COIN)
    stranger = spend(await coin(chain))
    assert await refusal(chain, stranger, [free]) == "package-not-child-with-parents"


async def test_a_chain_of_unconfirmed_transactions_ends_at_twenty_five(chain):
    outpoint, value = await coin(chain), COIN
    for _ in range(25):
        value -= 500
        outpoint = Outpoint(await accepted(chain, spend(outpoint, value=value)), 0)
    assert (await refusal(chain, spend(outpoint, value=value - 500))).startswith("too-long-mempool-chain")
    await chain.mine()
    assert chain.mempool() == ()
    await accepted(chain, spend(outpoint, value=value - 500))


# ---------------------------------------------------------------- mining, eviction, reorganisation


async def test_a_miner_takes_what_he_is_told_with_its_parents(chain):
    parent = spend(await coin(chain))
    child = spend(Outpoint(parent.txid, 0), value=90_000)
    other = spend(await coin(chain))
    for tx in (parent, child, other):
        await accepted(chain, tx)
    await chain.mine(txs=[])
    assert len(chain.mempool()) == 3
    await chain.mine(txs=[child.txid])
    assert [entry.txid for entry in chain.mempool()] == [other.txid]
    assert [entry.txid for entry in chain.block(chain.height).txs[1:]] == [parent.txid, child.txid]
    with pytest.raises(WrongUsage, match="knows no transaction"):
        await chain.mine(txs=["ab" * 32])


async def test_a_mined_double_spend_throws_out_its_rival_and_all_that_hangs_on_it(chain):
    outpoint = await coin(chain)
    parent = spend(outpoint)
    child = spend(Outpoint(parent.txid, 0), value=90_000)
    await accepted(chain, parent)
    await accepted(chain, child)
    rival = spend(outpoint, value=COIN, locktime=1)
    await chain.mine(txs=[rival.raw])
    assert chain.mempool() == ()
    assert chain.spender(outpoint) == rival.txid
    assert await refusal(chain, parent) == "bad-txns-inputs-missingorspent"


async def test_a_block_that_consensus_refuses_changes_nothing_and_says_why(chain):
    outpoint = await coin(chain)
    tip = await chain.tip()
    before = chain.utxos()
    bad = spend(outpoint)
    unsigned = replace(bad, inputs=(replace(bad.inputs[0], witness=(b"\x52",)),))
    twice = [bad.raw, spend(outpoint, value=5_000).raw]
    for txs, reason in (
        ([unsigned.raw], "block-script-verify-flag-failed"),
        (twice, "bad-txns-inputs-missingorspent"),
        ([spend(outpoint, value=COIN * 2).raw], "bad-txns-in-belowout"),
        ([spend(outpoint, locktime=5_000).raw], "bad-txns-nonfinal"),
    ):
        with pytest.raises(WrongUsage, match=reason):
            await chain.mine(txs=txs)
        assert await chain.tip() == tip
        assert chain.utxos() == before
    await chain.mine()
    assert (await chain.tip()).height == tip.height + 1


async def test_an_evicted_transaction_takes_its_children_along_and_may_come_back(chain):
    outpoint = await coin(chain)
    parent = spend(outpoint)
    child = spend(Outpoint(parent.txid, 0), value=90_000)
    await accepted(chain, parent)
    await accepted(chain, child)
    assert set(await chain.evict(parent.txid)) == {parent.txid, child.txid}
    assert await chain.evict(parent.txid) == ()
    assert (chain.mempool(), chain.spender(outpoint)) == ((), None)
    await accepted(chain, parent)


async def test_a_reorganisation_returns_transactions_to_the_mempool_and_restores_every_index(chain):
    first, second = await coin(chain), await coin(chain)
    await chain.mine(txs=[])
    height = chain.height
    state = (chain.utxos(), await chain.prevouts([first, second]))
    parent = spend(first)
    child = spend(Outpoint(parent.txid, 0), value=90_000)
    waiting = spend(Outpoint(child.txid, 0), second, value=100_000)
    await accepted(chain, parent)
    await chain.mine()
    await accepted(chain, child)
    await chain.mine()
    await accepted(chain, waiting)
    hashes = await chain.reorg(2)
    assert chain.height == height + 3
    assert [chain.block(height + n).hash for n in (1, 2, 3)] == list(hashes)
    assert [entry.txid for entry in chain.mempool()] == [parent.txid, child.txid, waiting.txid]
    watched = {tx.txid: ChainTx(tx.txid, tx.raw, None) for tx in (parent, child, waiting)}
    view = await chain.view(frozenset(watched), frozenset(), frozenset(), 0)
    assert {tx.txid: tx for tx in view.txs} == watched
    await chain.reorg(3, blocks=4, drop=[parent.txid])
    assert chain.mempool() == ()
    same = {outpoint: out for outpoint, out in chain.utxos().items() if chain.tx(outpoint.txid).height <= height}
    assert (same, await chain.prevouts([first, second])) == state
    assert chain.history(ANYONE)[0].height <= height


async def test_a_reorganisation_can_double_spend_what_was_buried(chain):
    outpoint = await coin(chain)
    paid = spend(outpoint)
    await accepted(chain, paid)
    await chain.mine(6)
    rival = spend(outpoint, value=50_000)
    await chain.reorg(6, include=[rival.raw])
    assert chain.tx(paid.txid) is None
    assert chain.spender(outpoint) == rival.txid
    assert chain.tx(rival.txid).height == chain.height - 6
    assert money(chain) == issued(chain)


async def test_a_reorganisation_can_confirm_the_same_transactions_elsewhere(chain):
    tx = spend(await coin(chain))
    await accepted(chain, tx)
    await chain.mine(3)
    before = chain.tx(tx.txid)
    await chain.reorg(3, include=[tx.txid])
    after = chain.tx(tx.txid)
    assert (after.height, after.block == before.block) == (before.height, False)
    assert chain.find_block(before.block).height == before.height


async def test_a_branch_that_is_refused_leaves_the_chain_as_it_was(chain):
    outpoint = await coin(chain)
    paid = spend(outpoint)
    await accepted(chain, paid)
    await chain.mine(2)
    tip, held = await chain.tip(), chain.utxos()
    with pytest.raises(WrongUsage, match="bad-txns-in-belowout"):
        await chain.reorg(2, include=[spend(outpoint, value=COIN * 2).raw])
    assert (await chain.tip(), chain.utxos()) == (tip, held)
    assert chain.tx(paid.txid).height == tip.height - 1
    for depth, blocks in ((0, 1), (2, 2), (chain.height + 1, None)):
        with pytest.raises(WrongUsage, match="longer branch"):
            await chain.reorg(depth, blocks=blocks)
    await chain.mine()
    assert (await chain.tip()).height == tip.height + 1


async def test_a_coin_of_an_orphaned_coinbase_is_gone_with_what_it_paid(chain):
    funded = await coin(chain)
    await chain.mine(to=KEYED)
    base = Outpoint(chain.block(chain.height).txs[0].txid, 0)
    await chain.reorg(1)
    assert (await chain.prevouts([base, funded])).keys() == {funded}
    assert chain.utxos(KEYED) == {}


# ---------------------------------------------------------------- readings


async def test_a_history_holds_payments_and_spends_newest_first(chain):
    outpoint = await chain.fund(ANYONE, COIN)
    tx = Tx(2, 0, (TxIn(outpoint, witness=(b"\x51",)),), (TxOut(COIN - 1_000, KEYED),))
    await accepted(chain, tx)
    assert [entry.txid for entry in chain.history(ANYONE)] == [tx.txid, outpoint.txid]
    assert [entry.txid for entry in chain.history(KEYED)] == [tx.txid]
    view = await chain.view(frozenset(), frozenset(), frozenset({ANYONE}), 0)
    assert [seen.txid for seen in view.txs] == [outpoint.txid]


async def test_many_outputs_are_funded_at_once_confirmed_or_not(chain):
    outputs = [TxOut(1_000 + n, ANYONE) for n in range(5)]
    outpoints = await chain.fund_many(outputs)
    assert [chain.utxos()[outpoint] for outpoint in outpoints] == outputs
    fresh = await chain.fund(KEYED, 5_000, confirm=False)
    assert (await chain.prevouts([fresh]))[fresh].height is None
    with pytest.raises(WrongUsage, match="dust"):
        await chain.fund(KEYED, 5, confirm=False)
    large = await chain.fund(KEYED, 3 * SUBSIDY)
    assert chain.utxos()[large].value == 3 * SUBSIDY
    with pytest.raises(WrongUsage, match="cannot pay"):
        await chain.fund(KEYED, 1_000 * SUBSIDY)


async def test_blocks_can_be_read_and_are_whole(chain):
    await accepted(chain, spend(await coin(chain)))
    await chain.mine()
    block = chain.block(chain.height)
    assert block.raw.startswith(block.header)
    assert block.weight == 4 * (80 + 1) + sum(entry.tx.weight for entry in block.txs)
    assert chain.find_block(block.hash) == block
    with pytest.raises(WrongUsage, match="its tip is"):
        chain.block(chain.height + 1)


async def test_a_block_made_by_one_chain_is_taken_by_another(chain):
    async with LabChain() as other:
        await chain.mine()
        await other.submit_block(chain.block(111))
        assert await other.tip() == await chain.tip()
        with pytest.raises(WrongUsage, match="refused"):
            await chain.submit_block(other.block(5))


async def test_a_big_block_is_judged_in_a_worker_thread(chain):
    outpoints = await chain.fund_many([TxOut(1_000, ANYONE)] * 1_200)
    for start in range(0, 1_200, 2):
        await accepted(chain, spend(*outpoints[start : start + 2], value=1_900, script=ANYONE))
    await chain.mine()
    assert len(chain.block(chain.height).txs) == 601
    assert chain.mempool() == ()
    assert money(chain) == issued(chain)
