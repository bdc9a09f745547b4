"""Old logs stay readable whatever later rules say: a log rebuilds what was accepted once, and only the living are judged."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from pjv2 import session as model
from pjv2.errors import BadOriginal, BadProposal, CannotRead
from pjv2.psbt import original, params, verify
from pjv2.session import events as ev
from pjv2.session.receive import life
from pjv2.units import FeeRate
from tests.unit.session.scenarios import sending
from tests.unit.session.world import World

LOGS = Path(__file__).parents[2] / "vectors" / "logs"
ENDS = {
    "receiver-two-channels": ("Closed", "Paid"),
    "receiver-plain": ("Closed", "Paid"),
    "receiver-fallback": ("Closed", "PaidByFallback"),
    "sender-payjoin": ("Closed", "Paid"),
    "sender-too-late": ("PendingFallback", None),
}
RULES = (
    "every_input_signed",
    "broadcast_suitability",
    "real_previous_outputs",
    "no_money_from_nowhere",
    "sufficient_fee",
    "inputs_not_owned",
    "payment_is_there",
    "sufficient_amount",
)
STEPS = ("check_shape", "same_transaction_frame", "inputs_in_order", "check_inputs", "check_outputs", "check_fees")


def records(name):
    lines = (LOGS / f"{name}.jsonl").read_text("ascii").splitlines()
    return [(seq, json.loads(line)["event"], line) for seq, line in enumerate(lines)]


@pytest.fixture(autouse=True)
def nothing_is_remembered():
    """What this process parsed before says nothing about a process of later code."""
    life._read_original.cache_clear()
    yield
    life._read_original.cache_clear()


def refuse(monkeypatch, module, rule, error):
    def stricter(*_args):
        raise error("a rule of tomorrow")

    monkeypatch.setattr(module, rule, stricter)


def test_there_is_no_old_log_without_an_end():
    assert {path.stem for path in LOGS.glob("*.jsonl")} == set(ENDS)


@pytest.mark.parametrize("name", ENDS)
def test_an_old_log_ends_as_it_ended(name):
    state = model.replay(records(name))
    outcome = None if state.closed is None else state.closed.outcome.value
    assert (state.stage.value, outcome) == ENDS[name]


@pytest.mark.parametrize("name", ENDS)
def test_stricter_rules_of_tomorrow_leave_old_logs_as_they_are(monkeypatch, name):
    log = records(name)
    before = [model.replay(log[:length]) for length in range(1, len(log) + 1)]
    for rule in RULES:
        refuse(monkeypatch, original, rule, BadOriginal)
    for step in STEPS:
        refuse(monkeypatch, verify, step, BadProposal)
    assert [model.replay(log[:length]) for length in range(1, len(log) + 1)] == before


@pytest.mark.parametrize("rule", RULES)
def test_a_stricter_rule_refuses_the_next_original(monkeypatch, rule):
    refuse(monkeypatch, original, rule, BadOriginal)
    actor = World().receiving()
    actor.run(lambda state: state.stage == "HasReplyableError")
    assert actor.last(ev.OriginalRefused).reason == "a rule of tomorrow"


@pytest.mark.parametrize("step", STEPS)
def test_a_stricter_step_refuses_the_next_proposal(monkeypatch, step):
    actor = sending(World())
    refuse(monkeypatch, verify, step, BadProposal)
    actor.run("PendingFallback")
    assert actor.last(ev.ProposalRefused).reason.endswith("a rule of tomorrow")


@pytest.mark.parametrize("limit", ["MAX_MIN_FEE_RATE", "SUPPORTED_VERSIONS"])
def test_stricter_limits_of_tomorrow_leave_old_logs_readable_and_refuse_the_next_original(monkeypatch, limit):
    logs = {name: records(name) for name in ENDS}
    before = {name: model.replay(log) for name, log in logs.items()}
    actor = World().receiver()
    actor.world.post_original(actor)
    life._read_original.cache_clear()
    monkeypatch.setattr(params, limit, FeeRate(1) if limit == "MAX_MIN_FEE_RATE" else (3,))
    assert {name: model.replay(log) for name, log in logs.items()} == before
    actor.run("HasReplyableError")
    assert actor.has(ev.OriginalRefused)


def test_an_acceptance_that_belongs_to_another_original_is_not_read():
    log = records("receiver-fallback")
    seq, name, line = next(record for record in log if record[1] == "OriginalAccepted")
    accepted = json.loads(line)
    for changes in ({"amount": accepted["amount"] + 1}, {"txid": "00" * 32}, {"prevouts": []}):
        damaged = [*log[:seq], (seq, name, json.dumps(accepted | changes)), *log[seq + 1 :]]
        with pytest.raises(CannotRead, match=f"record {seq}"):
            model.replay(damaged)
    prevout = accepted["prevouts"][0]
    poor = prevout | {"txout": prevout["txout"] | {"value": 1}}
    damaged = [*log[:seq], (seq, name, json.dumps(accepted | {"prevouts": [poor]})), *log[seq + 1 :]]
    with pytest.raises(CannotRead, match="worth less"):
        model.replay(damaged)
