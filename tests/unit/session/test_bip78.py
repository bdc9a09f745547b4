"""A sender whose payee has a server of his own: one request and its answer instead of two mailboxes (BIP78)."""

from __future__ import annotations

import base64
import json

import pytest

from pjv2 import session as model
from pjv2.errors import WrongUsage
from pjv2.psbt.plan import ReceiverScripts, make_intent
from pjv2.psbt.proposal import draft_proposal, finish_proposal
from pjv2.session import events as ev
from pjv2.session.create import BIP78_PATIENCE
from pjv2.session.events import Outcome
from pjv2.units import Network
from pjv2.wire.uri import parse_uri
from tests.unit.session.world import GENESIS, NOW, TIP, Actor, World, kit, kit_address, want

PJ = "https://shop.example/pay?id=7"


def paying(world: World, sent: kit.SentOriginal | None = None, pj: str = PJ) -> Actor:
    uri = parse_uri(f"bitcoin:{kit_address(kit.PAYEE)}?amount=0.001&pj={pj}")
    sent = sent or kit.sent([world.payer], world.pays, version=1)
    created = model.create_sender(
        world.now,
        world.rng,
        network=Network.REGTEST,
        genesis=GENESIS,
        wallet="wallet-2",
        uri=uri,
        sent=sent,
        amount=world.pays,
        lock_id=b"\x55" * 32,
        height=TIP,
    )
    actor = Actor(world, created)
    actor.settle()
    return actor


def proposal(world: World, need: want.Need) -> bytes:
    """What an honest server answers to this request."""
    query = need.url.partition("?id=7&")[2]
    payload = kit.parse_original(need.body + b"\n" + query.encode(), v1=True)
    checked = kit.check_original(payload, kit.facts([world.payer]), kit.terms(amount=world.pays))
    intent = make_intent(checked, None, [world.ours[0].coin()], ReceiverScripts(kit.OUR_CHANGE))
    drafted = draft_proposal(checked, intent, (), world.rng)
    return base64.b64encode(finish_proposal(drafted, kit.sign(drafted.psbt, world.ours).serialize()).psbt)


def test_the_answer_to_the_post_is_the_proposal():
    world = World()
    actor = paying(world)
    assert [type(need) for need in actor.due if not isinstance(need, want.Watch)] == [want.PostBip78]
    need = actor.need(want.PostBip78)
    assert need.url.startswith(f"{PJ}&v=1&")
    actor.do(want.PostBip78, want.Bip78Answer(200, proposal(world, need) + b"\n"))
    assert actor.state.stage == "WantsSignature"
    actor.do(want.Sign)
    assert actor.state.stage == "BroadcastingPayjoin"


def test_a_restarted_sender_asks_with_the_same_bytes():
    world = World()
    actor = paying(world)
    need = actor.need(want.PostBip78)
    actor.restart()
    assert actor.need(want.PostBip78) == need
    assert "shop" not in repr(need)


def test_an_endpoint_without_parameters_gets_the_payers():
    actor = paying(World(), pj="https://shop.example/pay")
    assert actor.need(want.PostBip78).url.startswith("https://shop.example/pay?v=1&")


@pytest.mark.parametrize(
    ("status", "body", "code"),
    [
        (400, json.dumps({"errorCode": "unavailable", "message": "x"}).encode(), "unavailable"),
        (400, json.dumps({"errorCode": "made-up", "message": "<b>"}).encode(), "made-up"),
        (500, b"<html>oops</html>", None),
        (302, b"", None),
        (200, b"not base64 !", None),
        (200, base64.b64encode(b"no psbt"), None),
        (200, b"", None),
    ],
)
def test_whatever_is_no_proposal_ends_in_the_original(status, body, code):
    world = World()
    actor = paying(world)
    actor.do(want.PostBip78, want.Bip78Answer(status, body))
    assert actor.state.stage == "PendingFallback"
    assert actor.state.refused.code == code
    assert "<" not in actor.state.refused.reason
    actor.look()
    actor.do(want.Broadcast)
    world.chain.mine(6)
    actor.run("Closed")
    assert actor.state.closed.outcome is Outcome.PAID_BY_FALLBACK


def test_a_server_that_never_answers_is_given_up_after_two_minutes():
    world = World()
    actor = paying(world)
    assert actor.needs.wake_at == NOW + BIP78_PATIENCE
    world.now += BIP78_PATIENCE
    actor.settle()
    assert actor.last(ev.ProposalRefused).reason == "the payee's server did not answer in time"
    assert actor.need(want.PostBip78) is None


def test_an_answer_after_the_cancel_is_not_taken():
    world = World()
    actor = paying(world)
    answer = want.Bip78Answer(200, proposal(world, actor.need(want.PostBip78)))
    actor.feed(want.Cancel())
    assert actor.state.stage == "PendingFallback"
    assert actor.decide(answer) == []


def test_a_proposal_that_breaks_a_rule_is_refused_as_everywhere():
    world = World()
    actor = paying(world)
    other = World(seed=2, pays=110_000)  # takes 10,000 sat more from the change
    wrong = proposal(other, paying(other, kit.sent([other.payer], 110_000, version=1)).need(want.PostBip78))
    actor.do(want.PostBip78, want.Bip78Answer(200, wrong))
    assert actor.state.stage == "PendingFallback"


def test_an_original_of_the_wrong_version_makes_no_session():
    world = World()
    with pytest.raises(WrongUsage, match="other version"):
        paying(world, world.sent)
