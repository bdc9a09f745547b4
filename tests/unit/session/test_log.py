"""The log: golden records, the codec's menu of damage, replay."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pjv2 import session as model
from pjv2.errors import CannotRead
from pjv2.session import events as ev
from pjv2.session import log
from pjv2.session.log import EVENTS
from tests.unit.session.samples import SAMPLES
from tests.unit.session.scenarios import all_actors
from tests.unit.session.world import PLAN, World

GOLDEN = Path(__file__).parents[2] / "vectors" / "events"
NAMES = sorted(EVENTS)


def record(**changes):
    """The record of a `Seen`, changed."""
    data = json.loads(model.encode(SAMPLES["Seen"]))
    data.update(changes)
    return json.dumps({key: value for key, value in data.items() if value is not ...})


@pytest.mark.parametrize("name", NAMES)
def test_every_event_is_written_byte_for_byte_as_its_golden_file(name):
    golden = (GOLDEN / f"{name}.json").read_text("ascii").removesuffix("\n")
    assert model.encode(SAMPLES[name]) == golden


@pytest.mark.parametrize("name", NAMES)
def test_every_golden_file_is_read_as_its_event(name):
    golden = (GOLDEN / f"{name}.json").read_text("ascii")
    event = model.decode(model.event_name(SAMPLES[name]), golden)
    assert event == SAMPLES[name]
    assert type(event) is EVENTS[name]


def test_there_is_no_golden_file_without_an_event():
    assert {path.stem for path in GOLDEN.glob("*.json")} == set(NAMES)


def test_the_two_beginnings_share_a_name_and_differ_by_role():
    receiver, sender = SAMPLES["ReceiverCreated"], SAMPLES["SenderCreated"]
    assert model.event_name(receiver) == model.event_name(sender) == "Created"
    assert json.loads(model.encode(receiver))["role"] == "receiver"
    assert json.loads(model.encode(sender))["role"] == "sender"


@pytest.mark.parametrize("name", NAMES)
def test_fields_that_were_added_later_may_be_missing_and_no_other(name):
    data = json.loads(model.encode(SAMPLES[name]))
    required = {f.name for f in dataclasses.fields(EVENTS[name]) if f.default is dataclasses.MISSING}
    for key in [key for key in data if key not in ("v", "event", "role")]:
        short = json.dumps({k: v for k, v in data.items() if k != key})
        if key in required:
            with pytest.raises(CannotRead, match=key):
                model.decode(data["event"], short)
        else:
            assert type(model.decode(data["event"], short)) is EVENTS[name]


@pytest.mark.parametrize("name", NAMES)
def test_a_field_of_another_type_or_name_is_refused(name):
    data = json.loads(model.encode(SAMPLES[name]))
    for key in [key for key in data if key not in ("v", "event", "role")]:
        for wrong in ({"no": 1}, ["x"], -0.5, "zz"):
            if isinstance(data[key], str) and wrong == "zz" and data[key] in ("text \u2192", data.get("reason")):
                continue
            changed = {**data, key: wrong}
            try:
                event = model.decode(data["event"], json.dumps(changed))
            except CannotRead:
                continue
            assert json.loads(model.encode(event))[key] == wrong  # the value fits the field's type
    with pytest.raises(CannotRead, match="does not know"):
        model.decode(data["event"], json.dumps({**data, "newer": 1}))


@pytest.mark.parametrize(
    ("data", "words"),
    [
        ("", "not JSON"),
        ("[]", "not a JSON object"),
        ("{", "not JSON"),
        ("[" * 100_000, "not JSON"),
        (record(v=2), "version"),
        (record(v=True), "version"),
        (record(v="1"), "version"),
        (record(v=...), "version"),
        (record(event="Closed"), "says"),
        (record(role="receiver"), "role"),
        (record(at=float("nan")), "not JSON"),
        (record(at=float("inf")), "not JSON"),
        (record(at=True), "not a number"),
        (record(amount=True), "whole number"),
        (record(amount=1.0), "whole number"),
        (record(height="1"), "whole number"),
        (record(what="stranger"), "none of"),
        (record(what=None), "none of"),
        (record(txid=None), "not text"),
        (record().replace('"v": 1', '"v": 1, "v": 1'), "not JSON"),
    ],
)
def test_a_damaged_record_is_refused_with_the_reason(data, words):
    with pytest.raises(CannotRead, match=words):
        model.decode("Seen", data)


@pytest.mark.parametrize("text", ["0A", "0", "zz", "00 00", 5])
def test_bytes_are_lower_case_hex_only(text):
    data = json.loads(model.encode(SAMPLES["ProposalSigned"]))
    with pytest.raises(CannotRead, match="hex"):
        model.decode("ProposalSigned", json.dumps({**data, "psbt": text}))


def test_an_outpoint_and_a_rate_out_of_range_are_refused():
    accepted = json.loads(model.encode(SAMPLES["OriginalAccepted"]))
    with pytest.raises(CannotRead, match="outpoint"):
        model.decode("OriginalAccepted", json.dumps({**accepted, "inputs": ["ab:1"]}))
    with pytest.raises(CannotRead, match="range"):
        model.decode("OriginalAccepted", json.dumps({**accepted, "economy_rate": -1}))


@pytest.mark.parametrize("name", ["Nothing", "Event", "ReceiverCreated", "__class__", "dataclass"])
def test_a_name_that_is_no_event_is_refused(name):
    with pytest.raises(CannotRead, match="does not know"):
        model.decode(name, json.dumps({"v": 1, "event": name, "at": 0}))


def test_a_beginning_without_role_is_refused():
    data = json.loads(model.encode(SAMPLES["ReceiverCreated"]))
    for role in ("banker", None, 1):
        with pytest.raises(CannotRead):
            model.decode("Created", json.dumps({**data, "role": role}))


def test_fixed_length_lists_keep_their_length():
    data = json.loads(model.encode(SAMPLES["ChannelsReleased"]))
    for wrong in ([["peer"]], [["peer", 1, 2]], ["peer"], [["peer", "1"]]):
        with pytest.raises(CannotRead):
            model.decode("ChannelsReleased", json.dumps({**data, "blocked": wrong}))


def test_a_type_without_a_form_is_a_mistake_of_ours():
    with pytest.raises(TypeError, match="no form"):
        log._codec(set)
    with pytest.raises(TypeError, match="no form"):
        log._codec(int | str)


# ---------------------------------------------------------------- replay


def test_replay_equals_live_for_every_story_at_every_length():
    for actor in all_actors().values():
        state = None
        for length, event in enumerate(actor.events, start=1):
            state = model.evolve(state, event)
            assert model.replay(actor.records[:length]) == state


def test_an_empty_log_is_refused():
    with pytest.raises(CannotRead, match="empty"):
        model.replay([])


@pytest.fixture(scope="module")
def told():
    world = World()
    actor = world.receiving(PLAN)
    actor.run("Monitor")
    return actor


def test_a_log_with_a_gap_a_double_or_a_swap_is_refused_naming_the_record(told):
    records = told.records
    for damaged in (
        records[:3] + records[4:],
        [*records[:3], records[2], *records[3:]],
        [*records[:2], records[3], records[2], *records[4:]],
        records[1:],
    ):
        with pytest.raises(CannotRead, match="record"):
            model.replay(damaged)
    renumbered = [(i, name, data) for i, (_, name, data) in enumerate(records[:3] + records[4:])]
    with pytest.raises(CannotRead, match="record 3"):
        model.replay(renumbered)


def test_a_log_whose_record_is_not_understood_is_refused_naming_the_record(told):
    records = list(told.records)
    records[2] = (2, "Tomorrow", '{"v":1,"event":"Tomorrow"}')
    with pytest.raises(CannotRead, match="record 2"):
        model.replay(records)


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_a_damaged_log_is_refused_or_tells_a_whole_state(told, data):
    index = data.draw(st.integers(0, len(told.records) - 1))
    seq, name, text = told.records[index]
    place = data.draw(st.integers(0, len(text) - 1))
    letter = data.draw(st.sampled_from('0123456789abcdef"{}[],:'))
    records = list(told.records)
    records[index] = (seq, name, text[:place] + letter + text[place + 1 :])
    try:
        state = model.replay(records)
    except CannotRead:
        return
    assert state.seq == len(records)


def contradict(told, kind, **changes):
    records = list(told.records)
    index = max(i for i, event in enumerate(told.events) if isinstance(event, kind))
    event = dataclasses.replace(told.events[index], **changes)
    records[index] = (index, model.event_name(event), model.encode(event))
    return records


def is_read(records):
    try:
        model.replay(records)
    except CannotRead:
        return False
    return True


def test_a_record_that_contradicts_the_state_is_refused(told):
    accepted, intended = told.state.accepted, told.state.intended
    drafted, reserved = told.state.drafted, told.state.reserved
    secured = told.state.secured
    cases = [
        contradict(told, ev.ReceiverCreated, receiver_key=b"\x00" * 32),
        contradict(told, ev.OriginalReceived, reply_key=b"\x05" * 33),
        contradict(told, ev.OriginalReceived, body=b"junk"),
        contradict(told, ev.OriginalAccepted, txid="00" * 32),
        contradict(told, ev.OriginalAccepted, amount=accepted.amount + 1),
        contradict(told, ev.OriginalAccepted, inputs=()),
        contradict(told, ev.ChannelsIntended, attempt=2),
        contradict(told, ev.ChannelsIntended, ids=()),
        contradict(told, ev.ChannelsIntended, intent=dataclasses.replace(intended.intent, coins=())),
        contradict(told, ev.ChannelsReserved, channels=()),
        contradict(told, ev.ChannelsReserved, channels=(dataclasses.replace(reserved.channels[0], capacity=1),)),
        contradict(told, ev.ChannelsReserved, channels=(dataclasses.replace(reserved.channels[0], script=b""),)),
        contradict(told, ev.ProposalDrafted, txid="00" * 32),
        contradict(told, ev.ProposalDrafted, psbt=b"junk"),
        contradict(told, ev.ProposalDrafted, funding=()),
        contradict(told, ev.ProposalDrafted, funding=(dataclasses.replace(drafted.funding[0], vout=0),)),
        contradict(told, ev.ProposalDrafted, funding=(dataclasses.replace(drafted.funding[0], script=b"\x00" * 34),)),
        contradict(told, ev.ChannelsSecured, channels=()),
        contradict(told, ev.ChannelsSecured, channels=(dataclasses.replace(secured.channels[0], id=b""),)),
        contradict(told, ev.ProposalSigned, psbt=told.state.payload.psbt.serialize()),
        contradict(told, ev.ProposalSigned, psbt=b""),
    ]
    assert [number for number, records in enumerate(cases) if is_read(records)] == []


def test_a_senders_beginning_that_does_not_hold_together_is_refused():
    created = SAMPLES["SenderCreated"]
    for changes in (
        {"txid": "00" * 32},
        {"inputs": ()},
        {"original": b"junk"},
        {"reply_key": b"\x00" * 32},
        {"receiver": b"\x05" * 33},
        {"query": "v=7"},
    ):
        event = dataclasses.replace(created, **changes)
        with pytest.raises(CannotRead, match="record 0"):
            model.replay([(0, "Created", model.encode(event))])
