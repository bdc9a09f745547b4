"""Guards of the sessions that no other test would miss."""

from __future__ import annotations

from dataclasses import replace

import pytest

from pjv2 import session as model
from pjv2.errors import IllegalEvent
from pjv2.psbt.tx import Psbt
from pjv2.session import events as ev
from tests.unit.session.world import PLAN, TWO, Actor, World, kit, want

ELSEWHERE = kit.Outpoint("cd" * 32, 0)


def at(stage, plan=PLAN) -> tuple[World, Actor]:
    world = World()
    actor = world.receiving(plan)
    actor.run(stage)
    return world, actor


@pytest.mark.parametrize("stage", ["WantsProposal", "PayjoinProposal"])
def test_a_wallet_that_cannot_sign_any_more_ends_the_channels_right_before_secure_and_post(stage):
    world, actor = at(stage)
    world.can_sign = False
    actor.do(want.InspectChannels if stage == "WantsProposal" else want.ReserveCoins)
    assert actor.last(ev.ChannelsReleasing).next == "end"
    assert not actor.has(ev.ProposalPosting)


def test_a_look_at_the_chain_is_enough_to_stop_the_proposing():
    world, actor = at("CheckedOriginal", None)
    world.chain.put(world.original)
    actor.look()
    assert actor.last(ev.ProposingStopped).why == "spend_seen"
    assert actor.state.stage == "PendingFallback"


def contradicted(actor: Actor, event: ev.Event, why: str) -> None:
    """The event is no continuation of this log."""
    with pytest.raises(IllegalEvent, match=why):
        model.evolve(actor.state, event)


def test_a_log_in_which_a_channel_was_secured_for_another_output_is_not_believed():
    world, actor = at("SecuringChannels")
    [secured] = world.answer(actor, actor.need(want.SecureChannels)).secured
    event = ev.ChannelsSecured(world.now, (secured,))
    assert model.evolve(actor.state, event).stage == "ProvisionalProposal"
    contradicted(actor, replace(event, channels=(replace(secured, outpoint=ELSEWHERE),)), "not those of the drafted")


def test_a_log_in_which_other_channels_were_reserved_than_intended_is_not_believed():
    world, actor = at("ReservingChannels", TWO)
    first, second = world.answer(actor, actor.need(want.ReserveChannels)).reserved
    assert model.evolve(actor.state, ev.ChannelsReserved(world.now, (first, second))).stage == "WantsProposal"
    for channels in ((first,), (second, first), (first, replace(second, capacity=second.capacity + 1))):
        contradicted(actor, ev.ChannelsReserved(world.now, channels), "not the intended ones")


def test_a_log_in_which_something_else_was_signed_than_drafted_is_not_believed():
    world, actor = at("ProvisionalProposal")
    drafted = Psbt.parse(actor.state.drafted.psbt)
    outputs = (replace(drafted.tx.outputs[0], value=drafted.tx.outputs[0].value + 1), *drafted.tx.outputs[1:])
    other = replace(drafted, tx=replace(drafted.tx, outputs=outputs))
    contradicted(actor, ev.ProposalSigned(world.now, other.serialize()), "another transaction")


def test_a_log_whose_coins_are_none_opens_no_channels_where_an_input_of_ours_is_required():
    world, actor = at(lambda state: state.coins is not None)
    actor.append(replace(actor.last(ev.CoinsReserved), coins=()))
    actor.do(want.ReserveCoins)
    assert not actor.has(ev.ChannelsIntended)
    assert actor.last(ev.ProposingStopped).why == "policy"
    assert world.node.calls == []


def test_bytes_in_the_reply_mailbox_that_this_log_did_not_announce_are_not_ours():
    _, actor = at("Monitor")
    announced = actor.state.posting.message
    assert model.receive.release.own_bytes(actor.state, want.ReplyRead(True, None))
    assert model.receive.release.own_bytes(actor.state, want.ReplyRead(True, announced))
    assert not model.receive.release.own_bytes(actor.state, want.ReplyRead(True, announced + b"x"))


def test_a_log_in_which_two_channels_share_an_id_is_not_believed():
    _, actor = at("ReservingChannels", TWO)
    intended = actor.last(ev.ChannelsIntended)
    before = model.replay(actor.records[: actor.events.index(intended)])
    assert model.evolve(before, intended).stage == "ReservingChannels"
    with pytest.raises(IllegalEvent, match="ids differ"):
        model.evolve(before, replace(intended, ids=(intended.ids[0],) * 2))
