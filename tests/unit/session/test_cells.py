"""Every cell of both tables: what is listed advances, what is not listed is an error that changes nothing."""

from __future__ import annotations

import copy
from importlib import import_module

import pytest

from pjv2 import session as model
from pjv2.errors import IllegalEvent
from pjv2.session import events as ev
from pjv2.session import receive, send
from pjv2.session.log import EVENTS
from tests.unit.session.samples import SAMPLES
from tests.unit.session.scenarios import Step, all_actors, steps

R, S = receive.Stage, send.Stage
FLAGS = "CancelRequested ExpiryPassed Seen Unseen Alarm MailboxSpoiled BroadcastRequested ChildBroadcasting"
FALLBACK = "FallbackBroadcasting FallbackBroadcasted FallbackRejected"

# session-model.md 2.2, written down a second time: a change of the table is a change of the law.
RECEIVER_LAW = {
    R.INITIALIZED: {"OriginalReceived": "UncheckedOriginal", "Closed": "Closed"},
    R.UNCHECKED_ORIGINAL: {"OriginalAccepted": "CheckedOriginal", "OriginalRefused": "HasReplyableError"},
    R.CHECKED_ORIGINAL: {
        "Approved": "CheckedOriginal",
        "CoinsReserved": "CheckedOriginal",
        "ChannelsIntended": "ReservingChannels",
        "ProposalDrafted": "ProvisionalProposal",
        "RefusalPosting": "PendingFallback",
        "ProposingStopped": "PendingFallback",
        "ProposalFound": "Monitor",
    },
    R.RESERVING_CHANNELS: {"ChannelsReserved": "WantsProposal", "ChannelsReleasing": "ReleasingChannels"},
    R.WANTS_PROPOSAL: {"ProposalDrafted": "SecuringChannels", "ChannelsReleasing": "ReleasingChannels"},
    R.SECURING_CHANNELS: {"ChannelsSecured": "ProvisionalProposal", "ChannelsReleasing": "ReleasingChannels"},
    R.PROVISIONAL_PROPOSAL: {
        "ProposalSigned": "PayjoinProposal",
        "ChannelsReleasing": "ReleasingChannels",
        "ProposingStopped": "PendingFallback",
        "ProposalFound": "Monitor",
    },
    R.PAYJOIN_PROPOSAL: {
        "ProposalPosting": "PostingProposal",
        "ChannelsReleasing": "ReleasingChannels",
        "ProposingStopped": "PendingFallback",
        "ProposalFound": "Monitor",
    },
    R.POSTING_PROPOSAL: {
        "ProposalPosted": "Monitor",
        "WayOutBroadcasting": "PostingProposal",
        "ChannelsReleasing": "ReleasingChannels",
        "CoinsReleased": "PostingProposal",
        "Closed": "Closed",
        FALLBACK: "PostingProposal",
    },
    R.RELEASING_CHANNELS: {
        "ChannelsReleased": "CheckedOriginal PendingFallback Monitor PostingProposal",
        "ProposalFound": "Monitor",
        "WayOutBroadcasting": "ReleasingChannels",
        FALLBACK: "ReleasingChannels",  # 3.2: "While waiting O is broadcast"
    },
    R.PENDING_FALLBACK: {
        FALLBACK: "PendingFallback",
        "RefusalPosted": "PendingFallback",
        "CoinsReleased": "PendingFallback",
        "WayOutBroadcasting": "PendingFallback",  # M20: recorded while channels were released, and too cheap since
        "ProposalFound": "Monitor",
        "Closed": "Closed",
    },
    R.HAS_REPLYABLE_ERROR: {
        "RefusalPosting": "HasReplyableError",  # M16
        "RefusalPosted": "HasReplyableError",
        "ProposalFound": "Monitor",
        "Closed": "Closed",
    },
    R.MONITOR: {
        "WayOutBroadcasting": "Monitor",
        "ChannelsReleasing": "ReleasingChannels",
        "CoinsReleased": "Monitor",
        "Closed": "Closed",
        FALLBACK: "Monitor",
    },
    R.CLOSED: {"LatePayment": "Closed"},
}
AFTER_POSTING = {"ReclaimRequested ReclaimBroadcasting CoinsReleased": "", "Closed": "Closed"}
SENDER_LAW = {
    S.CREATED: {"OriginalPosting": "PostingOriginal", "CoinsReleased": "Created", "Closed": "Closed"},
    S.POSTING_ORIGINAL: {
        "OriginalPosted": "PollingForProposal",
        "ProposalAccepted": "WantsSignature",
        "ProposalRefused": "PendingFallback",
        **AFTER_POSTING,
    },
    S.POLLING_FOR_PROPOSAL: {
        "ProposalAccepted": "WantsSignature",
        "ProposalRefused": "PendingFallback",
        **AFTER_POSTING,
    },
    S.WANTS_SIGNATURE: {"Signed": "SignedPayjoin", "ProposalRefused": "PendingFallback", **AFTER_POSTING},
    S.SIGNED_PAYJOIN: {
        "Broadcasting": "BroadcastingPayjoin",
        "FallbackBroadcasting": "PendingFallback",
        **AFTER_POSTING,
    },
    S.BROADCASTING_PAYJOIN: {FALLBACK: "", **AFTER_POSTING},
    S.PENDING_FALLBACK: {FALLBACK: "", **AFTER_POSTING},
    S.CLOSED: {},
}


def written_down(law, closed):
    table = {}
    for stage, row in law.items():
        full = dict(row) if stage is closed else {FLAGS: "", **row}
        for names, targets in full.items():
            for name in names.split():
                wanted = targets.split() or [stage.value]
                table[stage, EVENTS[name]] = {type(stage)(target) for target in wanted}
    return table


def test_the_receivers_table_is_the_law():
    assert {cell: set(to) for cell, to in receive.TRANSITIONS.items()} == written_down(RECEIVER_LAW, R.CLOSED)


def test_the_senders_table_is_the_law():
    assert {cell: set(to) for cell, to in send.TRANSITIONS.items()} == written_down(SENDER_LAW, S.CLOSED)


def taken() -> list[Step]:
    """Every step of every story, and every flag in every state."""
    found = [step for actor in all_actors().values() for step in steps(actor)]
    flags = [SAMPLES[name] for name in FLAGS.split()]
    seen = {}
    for step in found:
        seen.setdefault((step.after.role, step.after.stage), step.after)
    for (_, stage), state in seen.items():
        if stage != "Closed":
            found += [Step(state, flag, model.evolve(state, flag)) for flag in flags]
            if state.role == "sender" and stage != "Created":
                for kind in (ev.ReclaimRequested, ev.ReclaimBroadcasting, ev.CoinsReleased):
                    event = sender_event(kind)
                    found.append(Step(state, event, model.evolve(state, event)))
                freed = model.evolve(state, sender_event(ev.CoinsReleased))
                found.append(Step(freed, sender_event(ev.Closed), model.evolve(freed, sender_event(ev.Closed))))
    for step in [s for s in found if isinstance(s.event, ev.ProposalAccepted | ev.ProposalRefused)]:
        before = next(
            s.after
            for actor in all_actors().values()
            for s in steps(actor)
            if s.after.session == step.before.session and s.after.stage == S.POSTING_ORIGINAL
        )
        found.append(Step(before, step.event, model.evolve(before, step.event)))
    return found


def sender_event(kind):
    return next(e for e in all_actors()["sender reclaimed"].events if isinstance(e, kind))


@pytest.mark.parametrize("role", ["receiver", "sender"])
def test_every_legal_cell_leads_where_the_table_says(role):
    table = model.TRANSITIONS[role]
    reached = {}
    for step in taken():
        if step.before is None or step.before.role != role:
            continue
        cell = (step.before.stage, type(step.event))
        assert step.after.stage in table[cell]
        assert step.after.seq == step.before.seq + 1
        assert step.after.updated == step.event.at
        reached.setdefault(cell, set()).add(step.after.stage)
    missing = {(stage.value, kind.__name__) for stage, kind in set(table) - set(reached)}
    assert not missing
    unreached = {cell: set(to) - reached[cell] for cell, to in table.items() if set(to) - reached[cell]}
    assert not unreached


@pytest.mark.parametrize("role", ["receiver", "sender"])
def test_every_other_cell_is_an_error_and_changes_nothing(role):
    table = model.TRANSITIONS[role]
    states = {s.after.stage: s.after for actor in all_actors().values() for s in steps(actor) if s.after.role == role}
    assert set(states) == set(R if role == "receiver" else S)
    cells = 0
    for stage, state in states.items():
        before = copy.deepcopy(state)
        for name, kind in EVENTS.items():
            if (stage, kind) in table:
                continue
            with pytest.raises(IllegalEvent):
                model.evolve(state, SAMPLES[name])
            assert state == before
            cells += 1
    assert cells > 200


def test_a_session_begins_with_created_only():
    for name, sample in SAMPLES.items():
        if name not in ("ReceiverCreated", "SenderCreated"):
            with pytest.raises(IllegalEvent):
                model.evolve(None, sample)


def test_the_tables_name_no_event_that_does_not_exist_and_forget_none():
    named = {kind for table in model.TRANSITIONS.values() for _, kind in table}
    assert named | {ev.ReceiverCreated, ev.SenderCreated} == set(EVENTS.values())


def test_needs_is_a_function_of_the_room_and_a_module_too():
    assert callable(model.needs)
    assert import_module("pjv2.session.needs").Memory is model.Memory
