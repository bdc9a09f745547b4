"""A request with a cold address: the payment is sent there by a proposal that spends no coin of ours, or it stays with this wallet."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from pjv2 import session as model
from pjv2.errors import IllegalEvent, WrongUsage
from pjv2.psbt.tx import Psbt, TxOut
from pjv2.psbt.verify import check_proposal, original_body
from pjv2.session import events as ev
from pjv2.session.receive import cold_obstacle
from tests.unit.session.world import DAY, PLAN, Actor, World, kit, kit_address, want

SCRIPT = kit.Key(9006, kit.ScriptKind.P2TR).script
COLD = ev.ColdAddress(kit_address(SCRIPT), SCRIPT, 3)
LIFE = [
    "ReceiverCreated",
    "OriginalReceived",
    "OriginalAccepted",
    "ProposalDrafted",
    "ProposalSigned",
    "ProposalPosting",
    "ProposalPosted",
]


def cold(world: World, policy: ev.Policy | None = None, **more: object) -> Actor:
    return world.receiving(policy=policy, cold=COLD, **more)


def bury(world: World, actor: Actor, tx: kit.Tx) -> None:
    world.chain.put(tx)
    actor.look()
    world.chain.mine(6)
    actor.run("Closed")


def test_the_payment_goes_cold_without_a_coin_a_lease_or_a_signature_of_ours():
    world = World()
    actor = cold(world)
    actor.run("Monitor")
    assert actor.names() == LIFE
    asked = {type(need) for need in actor.done}
    assert not asked & {want.FindCoins, want.ReserveCoins, want.Sign}
    drafted = Psbt.parse(actor.last(ev.ProposalDrafted).psbt).tx
    assert [txin.outpoint for txin in drafted.inputs] == [world.payer.outpoint]
    fee = actor.last(ev.ProposalDrafted).intent.our_fee
    assert fee > 0  # a P2TR output is heavier than the P2WPKH one it takes the place of
    assert TxOut(100_000 - fee, SCRIPT) in drafted.outputs
    assert all(txout.script != kit.PAYEE for txout in drafted.outputs)
    bury(world, actor, world.payjoin(actor))
    assert actor.names()[-1] == "Closed"
    assert (actor.state.closed.outcome, actor.state.closed.amount_received) == (ev.Outcome.PAID, 100_000 - fee)
    assert not actor.has(ev.CoinsReleased)
    assert model.public_session(actor.state)["cold"] is True


def test_killed_after_every_event_it_goes_on_to_the_same_transaction():
    world = World()
    actor = cold(world)
    for name in LIFE[1:]:
        actor.run(lambda state, name=name: name in actor.names())
        actor.restart()
    assert actor.state.stage == "Monitor"
    before = actor.last(ev.ProposalDrafted).txid
    # A log that comes back from before the draft makes the very same transaction: nothing in it is drawn.
    actor.restore(ev.ProposalDrafted)
    actor.run("Monitor")
    assert actor.last(ev.ProposalDrafted).txid == before
    bury(world, actor, world.payjoin(actor))
    assert actor.state.closed.outcome == "Paid"


def test_the_payers_check_accepts_it_and_refuses_it_where_substitution_is_off():
    world = World()
    actor = cold(world)
    actor.run("Monitor")
    proposal = Psbt.parse(world.read_proposal(actor), padded=True)
    safe = check_proposal(world.sent, proposal)
    assert safe.ours == (world.payer.outpoint,)
    assert safe.fee_paid_by_us == 0
    assert safe.txid_is_stable
    assert safe.txid == actor.state.draft.txid
    with pytest.raises(Exception, match="which we did not allow"):
        check_proposal(replace(world.sent, substitution=False), proposal)


@pytest.mark.parametrize("how", ["parameter", "v1"])
def test_a_payer_who_forbids_substitution_gets_an_ordinary_payjoin(how):
    world = World()
    if how == "parameter":
        world.sent = kit.sent([world.payer], world.pays, substitution=False)
        actor = cold(world)
    else:
        actor = cold(world, v1=True)
        world.mailbox = original_body(world.sent)
    actor.run("Monitor")
    assert "does not let" in cold_obstacle(actor.state)
    assert [coin.outpoint for coin in actor.last(ev.ProposalDrafted).intent.coins] == [world.ours[0].outpoint]
    tx = Psbt.parse(actor.last(ev.ProposalDrafted).psbt).tx
    assert any(txout.script == kit.PAYEE for txout in tx.outputs)
    assert all(txout.script != SCRIPT for txout in tx.outputs)
    assert model.public_session(actor.state)["cold"] is False
    assert any(
        "does not go to the cold address: the payer" in line for line in model.explain(actor.state, actor.events)
    )


def test_without_a_coin_and_without_substitution_the_original_pays():
    world = World()
    world.ours.clear()
    world.sent = kit.sent([world.payer], world.pays, substitution=False)
    actor = cold(world)
    actor.run(lambda state: state.fallback_broadcasted)
    assert actor.last(ev.ProposingStopped).why == "policy"
    assert not actor.has(ev.ProposalDrafted)


def test_what_may_need_a_child_that_only_cold_keys_could_sign_stays_with_this_wallet():
    world = World()
    world.sent = kit.sent([world.payer], world.pays, rate=1)
    actor = cold(world)
    usual = world.answer

    def answer(of: Actor, need: want.Need) -> want.Answer:
        told = usual(of, need)
        return replace(told, economy_rate=kit.FeeRate(500)) if isinstance(need, want.GatherFacts) else told

    world.answer = answer
    actor.run("Monitor")
    assert "child" in cold_obstacle(actor.state)
    assert actor.has(ev.CoinsReserved)


def test_a_payment_too_small_for_the_cold_script_stays_with_this_wallet():
    world = World(pays=330)
    actor = cold(world, amount=None)
    actor.run("PendingFallback")
    assert cold_obstacle(actor.state) is not None
    assert actor.last(ev.ProposingStopped).why == "policy"


def test_a_spend_in_sight_stops_it_before_the_draft_and_before_the_post():
    for stage in ("CheckedOriginal", "PayjoinProposal"):
        world = World()
        actor = cold(world)
        actor.run(stage)
        world.chain.put(world.conflict())
        actor.do(want.InspectChannels)
        assert actor.last(ev.ProposingStopped).why == "spend_seen"


def test_the_cold_address_is_watched_from_the_original_on_and_what_arrives_there_counts():
    world = World()
    actor = cold(world)
    assert actor.state.scripts == {kit.PAYEE}
    actor.run("Monitor")
    assert actor.state.scripts == {kit.PAYEE, SCRIPT}
    # The payer made his own transaction to that address: it spends his input, and pays us.
    bumped = kit.sign(
        kit.unsigned([world.payer], [TxOut(100_000, SCRIPT), TxOut(300_000, kit.CHANGE)]), [world.payer]
    ).extract()
    bury(world, actor, bumped)
    assert (actor.state.closed.outcome, actor.state.closed.amount_received) == ("PaidOtherwise", 100_000)


def test_a_payment_to_the_cold_address_that_spends_nothing_of_the_original_decides_nothing():
    world = World()
    actor = cold(world)
    actor.run("Monitor")
    stranger = kit.sign(kit.unsigned([world.spare], [TxOut(100_000, SCRIPT)]), [world.spare]).extract()
    world.chain.put(stranger, depth=6)
    actor.look()
    assert actor.state.stage == "Monitor"
    assert actor.last(ev.Seen).what == "address"


def test_a_silent_payer_pays_with_his_original_after_the_deadline():
    world = World()
    actor = cold(world)
    actor.run("Monitor")
    world.now += DAY + 601
    actor.run(lambda state: state.fallback_broadcasted)
    world.chain.mine(6)
    actor.run("Closed")
    assert actor.state.closed.outcome == "PaidByFallback"


def test_a_stuck_payjoin_to_the_cold_address_is_no_parent_of_a_child_of_ours():
    world = World()
    actor = cold(world)
    actor.run("Monitor")
    world.chain.put(world.payjoin(actor))
    world.chain.rate = 10_000
    actor.look()
    world.now += 8_000
    actor.look()
    assert actor.need(want.Sign) is None
    # The Original in its place could be pulled: it pays an address of this wallet.
    world.chain.drop(actor.state.draft.txid)
    world.chain.put(world.original)
    actor.look()
    world.now += 8_000
    actor.look()
    assert actor.need(want.Sign).purpose == "child"


def test_channels_and_a_cold_address_exclude_each_other():
    with pytest.raises(WrongUsage, match="channels"):
        World().receiver(PLAN, cold=COLD)


def test_the_cold_address_is_not_the_requests_own():
    with pytest.raises(WrongUsage, match="own"):
        World().receiver(cold=replace(COLD, script=kit.PAYEE))


def test_a_draft_that_pays_neither_address_of_the_session_is_no_event_of_it():
    world = World()
    actor = cold(world)
    actor.run("Monitor")
    forged = actor.last(ev.ProposalDrafted)
    before = model.replay(actor.records[:3])
    script = kit.OUR_CHANGE
    swap = lambda output: replace(output, script=script) if output.script == SCRIPT else output  # noqa: E731  # used twice
    psbt = Psbt.parse(forged.psbt)
    tx = replace(psbt.tx, outputs=tuple(swap(txout) for txout in psbt.tx.outputs))
    intent = replace(forged.intent, outputs=tuple(swap(output) for output in forged.intent.outputs))
    event = replace(forged, psbt=replace(psbt, tx=tx).serialize(), intent=intent, txid=tx.txid)
    with pytest.raises(IllegalEvent, match="not of this session"):
        model.evolve(before, event)
    assert model.evolve(before, forged).stage == "ProvisionalProposal"


def test_logs_from_before_cold_addresses_are_read_as_they_were_meant():
    created = World(seed=99).receiver().events[0]
    record = json.loads(model.encode(created))
    assert record.pop("cold") is None
    assert record["policy"].pop("approve_within") == 518_400
    old = model.decode("Created", json.dumps(record))
    assert old == created
    assert old.cold is None
    kept = model.decode("Created", model.encode(replace(created, cold=COLD)))
    assert kept.cold == COLD
    assert json.loads(model.encode(kept))["cold"] == {"address": COLD.address, "script": SCRIPT.hex(), "index": 3}


def test_the_address_is_told_in_created_and_nowhere_else():
    world = World()
    actor = cold(world)
    actor.run("Monitor")
    told = [json.dumps(dict(model.public_event(actor.state, event))) for event in actor.events]
    assert [COLD.address in text for text in told] == [True] + [False] * (len(told) - 1)
    assert COLD.address not in json.dumps(dict(model.public_session(actor.state)))
    prose = model.explain(actor.state, actor.events)
    assert any("to the cold address, and spends no coin of ours" in line for line in prose)
    assert any("nothing to sign" in line for line in prose)
