"""What a mutant is, which rules must have one, and which functions of the two checklists are no guards."""

from __future__ import annotations

import ast
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

ROOT = Path(__file__).parents[2]

MONEY_RULES = {
    "money 1": "Channels are opened only after the Original has arrived.",
    "money 2": "Channels only while every fact holds, looked at again right before reserve, secure and post; fees within our caps.",
    "money 3": "Secure before post, for exactly the posted transaction.",
    "money 4": "At least one input of ours, signed ALL, is in a proposal with channels.",
    "money 5": "Release and post exclude each other, and so do refusal and post; after a post only a burial releases.",
    "money 6": "A step that costs money is recorded before it is taken; what was not secured is never resumed.",
    "money 7": "Degrade, don't fail: fewer channels, a plain payjoin, the Original itself.",
    "money 8": "Expiry stops proposing, not collecting.",
    "money 9": "There is always a way out that needs nobody.",
}
"""The nine rules that keep the money safe."""

SESSION_RULES = {
    "M1": "A payment that spends no input of the Original is news while a proposal may be out.",
    "M2": "Close at 6 deep, always.",
    "M3": "After a way out was recorded the coin is free only when its spend is buried.",
    "M4": "Unreadable mailbox: collect meanwhile; a burial replaces the read.",
    "M5": "An empty mailbox counts only before its time-to-live.",
    "M6": "Chain first: the proposal in sight stops every release.",
    "M7": "The reply mailbox is read also before coins are released and before a close without a burial.",
    "M8": "Cancel, disconnect, wait, then list.",
    "M9": "The channels are listed again right before the post.",
    "M11": "An unlogged pending channel is a proposal found; a burial of the Original's inputs frees it.",
    "M12": "A channel is dead by its own transaction id.",
    "M13": "The way out counts from the post, for plain payjoins too.",
    "M14": "Proposal dead, nothing at stake, watch over: close.",
    "M15": "No answered poll after expiry: the end of the watch closes.",
    "M16": "A refusal is recorded before it is posted.",
    "M17": "A worker that lost undoes its reservation.",
    "M18": "Sender: the payjoin dead or refused means the Original at once, or at the deadline.",
    "M19": "Sender: a reclaim is recorded, the coins stay leased.",
    "M20": "A recorded way out is carried to the end in every state.",
    "M21": "A worker judges by its own snapshot.",
}
"""The rules of the session model. M10 (read back after each post) was not adopted, so there is no guard to remove: that nothing is
read after a post is asserted by `test_M10_is_not_adopted_and_nothing_is_read_after_a_post`."""

RULES = MONEY_RULES | SESSION_RULES

CHECKLISTS = ("pjv2/psbt/original.py", "pjv2/psbt/verify.py")
"""Every function of these modules needs a mutant, unless it is in `NO_GUARD`."""
PLANNING = ("pjv2/psbt/plan.py", "pjv2/psbt/proposal.py")
"""In these, every function that raises a refusal of its own."""

NO_GUARD = {
    "pjv2/psbt/original.py": {
        "_spent": "lists what the clauses of rule 2 look at; the clauses have mutants",
        "_fee": "the subtraction that a rule and the rebuilding share; both have mutants",
    },
    "pjv2/psbt/verify.py": {
        "_stored": "reads our own log back; a damaged log is an error whatever it is called",
    },
    "pjv2/psbt/plan.py": {},
    "pjv2/psbt/proposal.py": {},
}


@dataclass(frozen=True, slots=True)
class Mutant:
    """One guard less. `old` occurs exactly once in `file`; `tests` are files or nodes of which one must fail.

    `rule` says in one sentence what the guard keeps. `serves` names the entries of `RULES` it stands for; the checklist function that
    it damages is found by where `old` stands.
    """

    name: str
    rule: str
    file: str
    old: str
    new: str
    tests: tuple[str, ...]
    serves: tuple[str, ...] = ()

    def apply(self, source: str) -> str:
        """The source without the guard. Raises ValueError when `old` does not occur exactly once, or nothing would change."""
        found = source.count(self.old)
        if found != 1:
            raise ValueError(f"{self.name}: the guard occurs {found} times in {self.file}, and once is needed")
        if self.old == self.new:
            raise ValueError(f"{self.name} changes nothing")
        return source.replace(self.old, self.new)

    def damages(self, source: str) -> str | None:
        """The module-level function (or method, as `Class.name`) that the guard stands in."""
        line = source[: source.index(self.old)].count("\n") + 1
        last = line + self.old.rstrip("\n").count("\n")
        inside = [name for name, (first, end) in functions(source).items() if first <= last and line <= end]
        return inside[0] if inside else None


@lru_cache(maxsize=64)
def functions(source: str) -> dict[str, tuple[int, int]]:
    """First and last line of every module-level function and method."""
    found = {}
    for node in ast.parse(source).body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            found[node.name] = (node.lineno, node.end_lineno or node.lineno)
        elif isinstance(node, ast.ClassDef):
            for inner in node.body:
                if isinstance(inner, ast.FunctionDef | ast.AsyncFunctionDef):
                    found[f"{node.name}.{inner.name}"] = (inner.lineno, inner.end_lineno or inner.lineno)
    return found


def must_have_a_mutant(file: str) -> set[str]:
    """The functions of a checklist or planning module that a mutant has to damage."""
    source = (ROOT / file).read_text(encoding="utf-8")
    wanted = set()
    for node in ast.parse(source).body:
        if isinstance(node, ast.FunctionDef) and (file in CHECKLISTS or _refuses(node)):
            wanted.add(node.name)
    return wanted - set(NO_GUARD[file])


def _refuses(function: ast.FunctionDef) -> bool:
    return any(isinstance(node, ast.Raise) and node.exc is not None for node in ast.walk(function))
