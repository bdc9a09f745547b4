"""Draws the generated parts of `docs/flow.md` from the code (imports, state tables, needs, events, rules), and `docs/reference`.

`python -m tests.docs_generator --write` rewrites the reference and what stands between the markers, `--check` exits 1 when they are
not what the code says. Text outside the markers is written by hand and left alone.

Law: the code is the source. What the code cannot tell (the question behind a state, which event announces an effect) stands in the
tables below, and a name that is missing there, or stands there in vain, is an error.
"""

from __future__ import annotations

import argparse
import ast
import inspect
import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields
from enum import StrEnum
from pathlib import Path
from typing import get_args

from pjv2.session import events as ev
from pjv2.session.needs import Need
from pjv2.session.receive import life as receiver
from pjv2.session.send import life as sender
from tests import docs_reference

ROOT = Path(__file__).resolve().parents[1]
FLOW = ROOT / "docs" / "flow.md"
MONEY_RULES = ROOT / "tests" / "unit" / "session" / "test_money_rules.py"
FACADE = "pjv2"
MARKER = re.compile(r"<!-- generated: (?P<name>[a-z ]+) -->\n.*?<!-- end -->", re.DOTALL)

# ---------------------------------------------------------------- what the code cannot tell

RECEIVER_STATES: Mapping[str, str] = {
    "Initialized": "Is there an Original in the mailbox?",
    "UncheckedOriginal": "Does the Original stand up to the checklist?",
    "CheckedOriginal": "What do we contribute, and does a person agree?",
    "ReservingChannels": "Which channels do the peers agree to?",
    "WantsProposal": "What does the transaction look like?",
    "SecuringChannels": "Did every peer sign for exactly this transaction?",
    "ProvisionalProposal": "Does the wallet sign our inputs?",
    "PayjoinProposal": "Is everything still as it was, so that it may leave the house?",
    "PostingProposal": "Did the directory take the proposal?",
    "ReleasingChannels": "Is it certain that no channel of this attempt can be funded any more?",
    "PendingFallback": "Nothing is proposed any more. Which transaction pays?",
    "HasReplyableError": "Did the payer learn that his Original was refused?",
    "Monitor": "Which transaction is buried?",
    "Closed": "Nothing is open. Is there a late payment?",
}

SENDER_STATES: Mapping[str, str] = {
    "Created": "May the Original leave the house?",
    "PostingOriginal": "Did the directory take the Original?",
    "PollingForProposal": "Is there a proposal in the reply mailbox?",
    "WantsSignature": "Does the wallet sign the proposal that passed the checklist?",
    "SignedPayjoin": "May the payjoin be broadcast?",
    "BroadcastingPayjoin": "Is the payjoin buried, or does the Original have to go out?",
    "PendingFallback": "There is no payjoin. Is the Original buried?",
    "Closed": "Nothing is open.",
}

EFFECTS: Mapping[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "ReserveCoins": (("CoinsReserved", "SenderCreated"), ()),
    "ReserveChannels": (("ChannelsIntended",), ("ChannelsReserved",)),
    "SecureChannels": (("ProposalDrafted",), ("ChannelsSecured",)),
    "ReleaseChannels": (("ChannelsReleasing",), ("ChannelsReleased",)),
    "PostReply": (("ProposalPosting", "RefusalPosting"), ("ProposalPosted", "RefusalPosted")),
    "PostOriginal": (("OriginalPosting",), ("OriginalPosted",)),
    "PostBip78": (("OriginalPosting",), ()),  # its answer is the proposal, or the reason why there is none
    "Broadcast": (
        ("FallbackBroadcasting", "Broadcasting", "ChildBroadcasting", "WayOutBroadcasting", "ReclaimBroadcasting"),
        ("FallbackBroadcasted", "FallbackRejected"),
    ),
    "ReleaseCoins": ((), ("CoinsReleased",)),
}
"""Needs that change the world: the events that announce them, and the events that report them."""

QUESTIONS = frozenset({"Poll", "ReadReply", "Watch", "GatherFacts", "FindCoins", "InspectChannels", "Sign"})
"""Needs that change nothing: they may be asked at any time, and again."""

MEANINGS: Mapping[str, str] = {
    "CancelRequested": "A person wants to stop; `broadcast` says whether the Original may go out instead.",
    "FallbackBroadcasting": "The Original goes out.",
    "FallbackBroadcasted": "The network took the Original, or had it already.",
    "FallbackRejected": "The network refused the Original.",
    "CoinsReleased": "Our coins are free again.",
    "Closed": "The session ended, with this outcome.",
    "OriginalRefused": "The Original broke a rule; the payer is told `code`, never `reason`.",
    "RefusalPosting": "The payer is told that there will be no payjoin.",
    "RefusalPosted": "The directory took the refusal.",
    "Approved": "A person agreed to propose.",
    "ChannelsReserved": "Every peer agreed to its channel; the funding scripts are known.",
    "ChannelsSecured": "The commitment signatures for exactly this transaction are on our node's disk; the backups are kept here.",
    "ProposalSigned": "Our inputs are final.",
    "ProposalPosted": "The directory took the proposal.",
    "ProposingStopped": "Nothing will be proposed any more.",
    "ChannelsReleasing": "The channels of this attempt are given up; `next` says what follows.",
    "ChannelsReleased": "No channel of this attempt is left at the node.",
    "WayOutBroadcasting": "Our own coin goes back to ourselves, because the payjoin will not confirm.",
    "OriginalPosted": "The directory took the Original.",
    "ProposalAccepted": "The proposal passed the checklist: it takes no more from us than we offered.",
    "Signed": "Our inputs of the payjoin are final.",
    "Broadcasting": "The payjoin goes out.",
    "ReclaimBroadcasting": "The inputs go back to our own wallet.",
}
"""What events mean that have no docstring of their own."""


class StaleTables(Exception):
    """The tables of this module and the code name different things."""


def _same(what: str, here: Iterable[str], code: Iterable[str]) -> None:
    ours, theirs = set(here), set(code)
    if ours != theirs:
        raise StaleTables(f"{what}: missing {sorted(theirs - ours)}, in vain {sorted(ours - theirs)}")


# ---------------------------------------------------------------- imports


def _room(path: Path) -> str:
    parts = path.relative_to(ROOT / "pjv2").with_suffix("").parts
    return FACADE if parts == ("__init__",) else parts[0]


def _imports(path: Path) -> set[str]:
    """Dotted names of the modules that a file imports, wherever in it."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level and node.module:
            if node.module == "pjv2":
                names |= {f"pjv2.{alias.name}" for alias in node.names}
            else:
                names.add(node.module)
    return names


def rooms() -> tuple[dict[str, set[str]], dict[str, set[str]]]:
    """Which rooms each room imports, and which foreign packages."""
    ours: dict[str, set[str]] = {}
    foreign: dict[str, set[str]] = {}
    for path in sorted((ROOT / "pjv2").rglob("*.py")):
        here = _room(path)
        ours.setdefault(here, set())
        foreign.setdefault(here, set())
        for name in _imports(path):
            first, *rest = name.split(".")
            if first == "pjv2" and rest:
                ours[here] |= {rest[0]} - {here}
            elif first != "pjv2" and first not in sys.stdlib_module_names:
                foreign[here].add(first)
    return ours, foreign


def _reach(graph: Mapping[str, set[str]], start: str, without: str = "") -> set[str]:
    """Every room that is reached from `start` on ways that do not pass `without`."""
    seen: set[str] = set()
    todo = [start]
    while todo:
        for there in graph[todo.pop()] - seen - {without}:
            seen.add(there)
            todo.append(there)
    return seen


def draw_imports() -> str:
    """The rooms as a graph without the arrows that others imply, and as a table of all of them."""
    graph, foreign = rooms()
    graph = {room: {there for there in to if there in graph} for room, to in graph.items()}
    order = sorted(graph, key=lambda room: (len(_reach(graph, room)), room))
    lines = ["```mermaid", "flowchart RL"]
    for room in order:
        implied = {there for via in graph[room] for there in _reach(graph, via, without=room) - {via}}
        lines += [f"    {_id(room)} --> {_id(there)}" for there in order if there in graph[room] - implied]
    lines += ["```", ""]
    rows = [
        (f"`{room}`", _names(there for there in order if there in graph[room]), _names(sorted(foreign[room])))
        for room in order
    ]
    return "\n".join(lines) + "\n" + _table(("room", "imports", "foreign packages"), rows)


def _id(room: str) -> str:
    return "facade" if room == FACADE else room


# ---------------------------------------------------------------- states


def draw_states(
    stages: type[StrEnum],
    transitions: Mapping[tuple[StrEnum, type[ev.Event]], tuple[StrEnum, ...]],
    flags: Sequence[type[ev.Event]],
    questions: Mapping[str, str],
) -> str:
    """States with their open questions, a diagram of the ways between them, and the table of `TRANSITIONS`."""
    _same("states", questions, [stage.value for stage in stages])
    for flag in flags:
        wrong = [stage for stage in stages if (stage, flag) in transitions and transitions[stage, flag] != (stage,)]
        if wrong:
            raise StaleTables(f"{flag.__name__} is said to change flags only, and leads out of {wrong}")
    rows = [(f"`{stage}`", questions[stage.value]) for stage in stages]
    lines = [_table(("state", "the question still open"), rows), "```mermaid", "stateDiagram-v2"]
    lines.append(f"    [*] --> {next(iter(stages))} : Created")
    ways: dict[tuple[StrEnum, StrEnum], list[str]] = {}
    for (stage, event), ends in transitions.items():
        for end in ends:
            if end is not stage:
                ways.setdefault((stage, end), []).append(name_of(event))
    place = {stage: number for number, stage in enumerate(stages)}
    for (stage, end), names in sorted(ways.items(), key=lambda way: (place[way[0][0]], place[way[0][1]])):
        lines.append(f"    {stage} --> {end} : {', '.join(names)}")
    lines += ["```", ""]
    cells = [
        (f"`{stage}`", f"`{name_of(event)}`", _names(ends))
        for stage in stages
        for (here, event), ends in transitions.items()
        if here is stage and event not in flags
    ]
    lines.append(_table(("state", "event", "next state"), cells))
    lines.append(f"In every state but `Closed`, changing flags only: {_names(name_of(flag) for flag in flags)}.\n")
    return "\n".join(lines)


# ---------------------------------------------------------------- events and needs


def name_of(event: type[ev.Event]) -> str:
    """The name that stands in the log."""
    return "Created" if event in (ev.ReceiverCreated, ev.SenderCreated) else event.__name__


def events() -> list[type[ev.Event]]:
    """Every event, in the order of the source."""
    return [value for value in vars(ev).values() if inspect.isclass(value) and ev.Event in value.__mro__[1:]]


def draw_events() -> str:
    """Every event: who has it, what it is to an effect, what it means, and what it holds."""
    every = events()
    known = {event.__name__ for event in every}
    announced = {name: need for need, (before, _) in EFFECTS.items() for name in before}
    reported = {name: need for need, (_, after) in EFFECTS.items() for name in after}
    _same("meanings", MEANINGS.keys() & known, MEANINGS)
    _same("announced and reported events", {*announced, *reported} & known, {*announced, *reported})
    rows = []
    for event in every:
        name = event.__name__
        if name in announced:
            kind = f"announces `{announced[name]}`"
        elif name in reported:
            kind = f"reports `{reported[name]}`"
        else:
            kind = "fact"
        holds = ", ".join(
            f"`{one.name}`" if one.repr else f"`{one.name}` (hidden)" for one in fields(event) if one.name != "at"
        )
        rows.append((f"`{name_of(event)}`", _roles(event), kind, _meaning(event), holds or "–"))
    return _table(("event", "role", "kind", "meaning", "holds, beside `at`"), rows)


def _roles(event: type[ev.Event]) -> str:
    receives = event is ev.ReceiverCreated or any(kind is event for _, kind in receiver.TRANSITIONS)
    sends = event is ev.SenderCreated or any(kind is event for _, kind in sender.TRANSITIONS)
    if not receives and not sends:
        raise StaleTables(f"{event.__name__} stands in no table of transitions")
    return "both" if receives and sends else "receiver" if receives else "sender"


def _meaning(thing: type) -> str:
    """The first sentence of a docstring; Python gives a dataclass without one its signature, which says nothing here."""
    text = (thing.__doc__ or "").strip()
    if not text or text.startswith(f"{thing.__name__}("):
        if thing.__name__ not in MEANINGS:
            raise StaleTables(f"{thing.__name__} has neither a docstring nor a meaning")
        text = MEANINGS[thing.__name__]
    paragraph = " ".join(text.partition("\n\n")[0].split())
    return re.split(r"(?<=[.!?]) (?=[A-Z`])", paragraph)[0].replace("|", "\\|")


def needs() -> list[type]:
    """Every need, in the order of the source."""
    return list(get_args(Need))


def draw_needs() -> str:
    """Every need: whether it changes the world, which events stand around it, and what answers it."""
    every = {need.__name__: need for need in needs()}
    _same("needs", {*EFFECTS, *QUESTIONS}, every)
    known = {event.__name__: event for event in events()}
    rows = []
    for name, need in every.items():
        before, after = EFFECTS.get(name, ((), ()))
        answer = re.search(r"Answer: `(\w+)`", need.__doc__ or "")
        if answer is None:
            raise StaleTables(f"the docstring of {name} does not say what answers it")
        rows.append(
            (
                f"`{name}`",
                "changes the world" if name in EFFECTS else "asks",
                _names(dict.fromkeys(name_of(known[one]) for one in before)),
                _names(dict.fromkeys(name_of(known[one]) for one in after)),
                f"`{answer[1]}`",
                _meaning(need),
            )
        )
    return _table(("need", "kind", "only after", "recorded as", "answer", "what is asked"), rows)


# ---------------------------------------------------------------- rules


def draw_rules() -> str:
    """The money rules M1 to M21, each by the sentences of the tests that stage its accident."""
    rules: dict[int, list[str]] = {}
    for node in ast.parse(MONEY_RULES.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            named = re.fullmatch(r"test_M(\d+)_(\w+)", node.name)
            if named is not None:
                rules.setdefault(int(named[1]), []).append(named[2].replace("_", " "))
    _same("money rules", map(str, rules), map(str, range(1, 22)))
    return _table(("rule", "what is tested"), ((f"M{rule}", "; ".join(rules[rule])) for rule in sorted(rules)))


# ---------------------------------------------------------------- the document


def _names(names: Iterable[str]) -> str:
    return ", ".join(f"`{name}`" for name in names) or "–"


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    lines += ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join(lines) + "\n"


def parts() -> dict[str, str]:
    """The generated parts by the name in their marker."""
    return {
        "imports": draw_imports(),
        "receiver": draw_states(receiver.Stage, receiver.TRANSITIONS, receiver.FLAGS, RECEIVER_STATES),
        "sender": draw_states(sender.Stage, sender.TRANSITIONS, sender.FLAGS, SENDER_STATES),
        "events": draw_events(),
        "rules": draw_rules(),
        "needs": draw_needs(),
    }


def generate(text: str) -> str:
    """`text` with every generated part as the code has it now."""
    drawn = parts()
    _same("markers", [match["name"] for match in MARKER.finditer(text)], drawn)
    return MARKER.sub(lambda match: f"<!-- generated: {match['name']} -->\n{drawn[match['name']]}<!-- end -->", text)


def main(args: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tests.docs_generator", description="Generated parts of docs/flow.md, and docs/reference."
    )
    mode = parser.add_mutually_exclusive_group(required=True)
    mode.add_argument("--write", action="store_true", help="rewrite them")
    mode.add_argument("--check", action="store_true", help="exit 1 when they are not what the code says")
    wish = parser.parse_args(args)
    code = 0
    wanted = {FLOW: generate(FLOW.read_text(encoding="utf-8"))} | docs_reference.documents()
    for path, drawn in wanted.items():
        if path.exists() and path.read_text(encoding="utf-8") == drawn:
            continue
        if wish.write:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(drawn, encoding="utf-8")
        else:
            print(f"{path.name} is not what the code says: run make docs", file=sys.stderr)
            code = 1
    return code


if __name__ == "__main__":
    sys.exit(main())
