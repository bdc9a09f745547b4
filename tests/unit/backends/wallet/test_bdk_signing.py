"""Payjoin signatures of the embedded wallet, judged by real consensus, and by our own reckoning of each signature."""

from __future__ import annotations

import asyncio
import contextlib
from dataclasses import replace

import pytest

from pjv2 import session as model
from pjv2 import start
from pjv2.backends.wallet.bdk import Electrum, Esplora, bdk_wallet
from pjv2.backends.wallet.signature import check_signed_input
from pjv2.errors import NotNow, WrongUsage
from pjv2.lab.electrum import ElectrumServer
from pjv2.lab.esplora import EsploraServer
from pjv2.lab.httpd import HttpResponse
from pjv2.lab.world import World
from pjv2.psbt.coin import push, script_pushes
from pjv2.psbt.scripts import p2wsh_script
from pjv2.psbt.tx import Psbt, PsbtInput, PsbtOutput, Tx, TxIn, TxOut
from pjv2.session.events import Policy
from pjv2.units import FeeRate, Network, Outpoint

ANYONE = p2wsh_script(b"\x51")
RATE = FeeRate.from_sat_per_vb(3)
KINDS = ("p2wpkh", "p2tr", "p2sh-p2wpkh", "p2pkh")
A, B = b"\x01" * 32, b"\x02" * 32


# ---------------------------------------------------------------- two wallets in one transaction


@pytest.mark.parametrize("receiver_kind", KINDS)
@pytest.mark.parametrize("sender_kind", KINDS)
async def test_a_payjoin_of_any_two_kinds_confirms(make, pay, chain, clock, sender_kind, receiver_kind):
    sender, receiver = await make(1, sender_kind), await make(2, receiver_kind)
    await pay(sender, 100_000)
    (theirs,) = await pay(receiver, 40_000)
    (coin,) = await receiver.coins()
    funded = Psbt.parse(await sender.fund([TxOut(30_000, ANYONE)], RATE, A, clock.now() + 600))
    (hers,) = (spend.outpoint for spend in funded.tx.inputs)
    tx = replace(
        funded.tx.stripped(),
        inputs=(TxIn(theirs, sequence=0xFFFFFFFD), *funded.tx.stripped().inputs),
        outputs=(*funded.tx.outputs, TxOut(38_500, ANYONE)),
    )
    bare = replace(funded.inputs[0], final_script_sig=None, final_script_witness=None)
    joint = Psbt(tx, (coin.psbt_input(), bare), tuple(PsbtOutput() for _ in tx.outputs))
    half = await receiver.sign(joint.serialize(), [theirs])
    assert not Psbt.parse(half).inputs[1].has_signature
    whole = Psbt.parse(await sender.sign(half, [hers]))
    assert whole.outputs == joint.outputs  # no derivation of ours goes to the peer
    assert (await chain.broadcast(whole.extract().raw)).verdict == "accepted"
    await chain.mine()
    assert chain.tx(whole.extract().txid).height == chain.height


@pytest.mark.parametrize("kind", ["p2wpkh", "p2tr"])
async def test_a_payment_between_two_embedded_wallets_ends_as_a_payjoin(kind, words):
    """Everything real: two programs with directory, relays and a chain between them, each wallet over its own Esplora client."""
    async with World() as world, EsploraServer(world.chain) as server, contextlib.AsyncExitStack() as stack:

        async def party(name, number, value):
            person = await world.party(name)
            wallet = await bdk_wallet(person.home, Esplora(server.url), words(number), kind=kind, now=world.clock.now)
            stack.push_async_callback(wallet.close)
            await world.chain.fund((await wallet.new_address()).script, value)
            person.driver = person.make_driver(wallet=wallet)
            return person, wallet

        bob, his = await party("bob", 1, 200_000)
        alice, hers = await party("alice", 2, 500_000)
        request = await start.receive(bob.driver, Network.REGTEST, 150_000, policy=Policy())
        payment = await start.send(alice.driver, Network.REGTEST, request.uri, policy=Policy(), rate=RATE)
        tasks = [
            asyncio.create_task(person.driver.drive(session, model.is_closed))
            for person, session in ((bob, request.session), (alice, payment.session))
        ]
        for person, session in ((bob, request.session), (alice, payment.session)):
            await person.diary.until("Seen", session)
        await world.chain.mine(6)
        await asyncio.gather(*tasks)
        closed = bob.diary.of("Closed", request.session)[0]
        assert closed.facts["outcome"] == "Paid"
        tx = world.chain.tx(closed.facts["txid"]).tx
        assert len(tx.inputs) == 2
        assert await his.balance() == 200_000 + closed.facts["amount_received"]
        fee = 700_000 - sum(out.value for out in tx.outputs)
        assert await his.balance() + await hers.balance() == 700_000 - fee
        for wallet in (his, hers):
            assert len(await wallet.coins()) == 1  # nothing stays locked


# ---------------------------------------------------------------- what others put into a PSBT


async def joint(make, pay, chain, kind="p2wpkh"):
    wallet = await make(kind=kind)
    (ours,) = await pay(wallet, 60_000)
    theirs = await chain.fund(ANYONE, 40_000)
    (coin,) = await wallet.coins()
    tx = Tx(2, 0, (TxIn(theirs), TxIn(ours)), (TxOut(95_000, ANYONE),))
    told = PsbtInput(witness_utxo=TxOut(40_000, ANYONE), final_script_witness=(b"\x51",))
    return wallet, ours, Psbt(tx, (told, coin.psbt_input()), (PsbtOutput(),))


@pytest.mark.parametrize("kind", KINDS)
async def test_fields_that_break_the_librarys_own_reader_are_left_as_they_are(make, pay, chain, kind):
    wallet, ours, psbt = await joint(make, pay, chain, kind)
    strange = ((b"\xfc\x05other\x01", b"secret"),)
    unknown = ((b"\x50\x01", b"note"),)
    control = (b"\xc0" + b"\x02" * 32, b"\x51\xc0")
    theirs = replace(psbt.inputs[0], proprietary=strange, unknown=unknown, tap_leaf_scripts=(control,))
    mine = replace(psbt.inputs[1], proprietary=strange, unknown=unknown)
    output = PsbtOutput(proprietary=strange, unknown=unknown)
    psbt = replace(psbt, inputs=(theirs, mine), outputs=(output,), proprietary=strange, unknown=unknown)
    signed = Psbt.parse(await wallet.sign(psbt.serialize(), [ours]))
    assert signed.inputs[0] == theirs
    assert signed.outputs == (output,)
    assert (signed.proprietary, signed.unknown) == (strange, unknown)
    assert (await chain.test(signed.extract().raw)).verdict == "accepted"


@pytest.mark.parametrize("kind", KINDS)
async def test_our_previous_output_comes_from_our_records_whatever_the_psbt_says(make, pay, chain, kind):
    wallet, ours, psbt = await joint(make, pay, chain, kind)
    lie = TxOut(1_000_000, p2wsh_script(b"\x52"))
    for told in (PsbtInput(), PsbtInput(witness_utxo=lie), replace(psbt.inputs[1], witness_utxo=lie)):
        asked = replace(psbt, inputs=(psbt.inputs[0], told))
        signed = Psbt.parse(await wallet.sign(asked.serialize(), [ours]))
        assert (await chain.test(signed.extract().raw)).verdict == "accepted"
        assert signed.inputs[1].witness_utxo == told.witness_utxo  # the caller's map stays his


async def test_a_taproot_signature_finds_what_the_psbt_does_not_tell_and_believes_no_liar(make, pay, chain, esplora):
    wallet, ours, psbt = await joint(make, pay, chain, "p2tr")
    silent = replace(psbt, inputs=(PsbtInput(final_script_witness=(b"\x51",)), psbt.inputs[1]))
    signed = Psbt.parse(await wallet.sign(silent.serialize(), [ours]))
    assert (await chain.test(signed.extract().raw)).verdict == "accepted"
    path = f"/tx/{psbt.tx.inputs[0].outpoint.txid}/raw"
    other = chain.block(chain.height).txs[0].raw
    for answer, error in (
        (HttpResponse(404, b"Transaction not found"), WrongUsage),
        (HttpResponse(200, other), WrongUsage),
        (HttpResponse(200, b"noise"), NotNow),
        (HttpResponse(502, b"broken"), NotNow),
    ):
        esplora.overrides[path] = answer
        with pytest.raises(error):
            await wallet.sign(silent.serialize(), [ours])
    del esplora.overrides[path]
    esplora.offline = True
    with pytest.raises(NotNow):
        await wallet.sign(silent.serialize(), [ours])


async def test_over_electrum_too_a_missing_previous_output_is_asked_for(make, pay, chain):
    async with ElectrumServer(chain) as server:
        wallet = await make(kind="p2tr", sync=Electrum(server.url))
        (ours,) = await pay(wallet, 60_000)
        theirs = await chain.fund(ANYONE, 40_000)
        tx = Tx(2, 0, (TxIn(theirs), TxIn(ours)), (TxOut(95_000, ANYONE),))
        psbt = Psbt(tx, (PsbtInput(final_script_witness=(b"\x51",)), PsbtInput()), (PsbtOutput(),))
        signed = Psbt.parse(await wallet.sign(psbt.serialize(), [ours]))
        assert (await chain.test(signed.extract().raw)).verdict == "accepted"
        lost = replace(tx, inputs=(TxIn(Outpoint("ef" * 32, 0)), tx.inputs[1]))
        with pytest.raises(WrongUsage, match="nobody knows"):
            await wallet.sign(replace(psbt, tx=lost).serialize(), [ours])


async def test_what_is_not_a_psbt_or_not_spent_by_it_is_not_signed(make, pay, chain):
    wallet, ours, psbt = await joint(make, pay, chain)
    with pytest.raises(WrongUsage, match="no PSBT"):
        await wallet.sign(b"noise", [ours])
    without = replace(psbt, tx=replace(psbt.tx, inputs=psbt.tx.inputs[:1]), inputs=psbt.inputs[:1])
    with pytest.raises(WrongUsage, match="not spent by the PSBT"):
        await wallet.sign(without.serialize(), [ours])
    with pytest.raises(WrongUsage, match="not a coin of this wallet"):
        await wallet.sign(psbt.serialize(), [psbt.tx.inputs[0].outpoint])


async def test_a_coin_whose_spend_is_known_is_signed_again(make, pay, chain):
    """After our own broadcast, or for a transaction that replaces it."""
    wallet, ours, psbt = await joint(make, pay, chain)
    signed = Psbt.parse(await wallet.sign(psbt.serialize(), [ours]))
    await chain.broadcast(signed.extract().raw)
    await wallet.sync()
    again = Psbt.parse(await wallet.sign(psbt.serialize(), [ours]))
    assert again.inputs[1].is_final


async def test_a_library_that_signs_badly_is_found_out(make, pay, chain, monkeypatch):
    wallet, ours, psbt = await joint(make, pay, chain)
    true = wallet._file._sign

    def forged(shadow):
        signed = true(shadow)
        signature, key = signed.inputs[1].final_script_witness
        bad = signature[:-2] + bytes([signature[-2] ^ 1, signature[-1]])
        return replace(signed, inputs=(signed.inputs[0], replace(signed.inputs[1], final_script_witness=(bad, key))))

    for fault in (forged, lambda shadow: shadow, lambda shadow: replace(shadow, tx=replace(shadow.tx, locktime=7))):
        monkeypatch.setattr(wallet._file, "_sign", fault)
        with pytest.raises(NotNow, match="nothing was signed"):
            await wallet.sign(psbt.serialize(), [ours])


async def test_inputs_that_were_not_named_are_unsigned_even_inside_the_library(make, pay, chain, monkeypatch):
    wallet = await make()
    first, second = await pay(wallet, 60_000, 60_000)
    coins = {coin.outpoint: coin for coin in await wallet.coins()}
    tx = Tx(2, 0, (TxIn(first), TxIn(second)), (TxOut(110_000, ANYONE),))
    psbt = Psbt(tx, (coins[first].psbt_input(), coins[second].psbt_input()), (PsbtOutput(),))
    seen = []
    true = wallet._file._sign
    monkeypatch.setattr(wallet._file, "_sign", lambda shadow: seen.append(true(shadow)) or seen[-1])
    await wallet.sign(psbt.serialize(), [second])
    assert seen[0].inputs[0].final_script_witness == (b"\x51",)
    assert not seen[0].inputs[0].partial_sigs


# ---------------------------------------------------------------- our own reckoning


@pytest.mark.parametrize("kind", KINDS)
async def test_every_alteration_of_a_signed_input_is_noticed(make, pay, chain, kind):
    wallet, ours, psbt = await joint(make, pay, chain, kind)
    signed = Psbt.parse(await wallet.sign(psbt.serialize(), [ours])).extract()
    prevouts = [TxOut(40_000, ANYONE), (await wallet.coins())[0].txout]
    check_signed_input(signed, 1, prevouts)

    def with_input(**changes):
        return replace(signed, inputs=(signed.inputs[0], replace(signed.inputs[1], **changes)))

    spend = signed.inputs[1]
    items = list(script_pushes(spend.script_sig) if kind == "p2pkh" else spend.witness)

    def with_items(items):
        if kind == "p2pkh":
            return with_input(script_sig=b"".join(map(push, items)))
        return with_input(witness=tuple(items))

    flipped = bytes([items[0][0], *items[0][1:9], items[0][9] ^ 1, *items[0][10:]])
    altered = [
        replace(signed, locktime=signed.locktime + 1),
        replace(signed, outputs=(TxOut(94_999, ANYONE),)),
        with_input(sequence=5),
        with_items([flipped, *items[1:]]),
        with_items([items[0][:-1] + b"\x83" if kind != "p2tr" else items[0] + b"\x83", *items[1:]]),
        with_items([]),
        with_items([*items, b"more"]),
        with_items([b"\x30" + bytes(70) + b"\x01", *items[1:]]),
        with_input(witness=(), script_sig=b""),
    ]
    if kind == "p2pkh":
        altered.append(with_input(witness=(b"\x01",)))
    else:
        altered.append(with_input(script_sig=b"\x51"))
    if kind != "p2tr":
        altered.append(with_items([items[0], b"\x02" + bytes(32)]))
    for tx in altered:
        with pytest.raises(NotNow, match="does not hold"):
            check_signed_input(tx, 1, prevouts)
    wrong = [TxOut(40_000, ANYONE), TxOut(prevouts[1].value + 1, prevouts[1].script)]
    if kind != "p2pkh":  # a legacy signature does not cover the amount
        with pytest.raises(NotNow):
            check_signed_input(signed, 1, wrong)
    for missing in ([None, None], [TxOut(40_000, ANYONE), None], [prevouts[1], TxOut(1, ANYONE)]):
        with pytest.raises(NotNow):
            check_signed_input(signed, 1, missing)
    if kind == "p2tr":
        with pytest.raises(NotNow):
            check_signed_input(signed, 1, [None, prevouts[1]])
