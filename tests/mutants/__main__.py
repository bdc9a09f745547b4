"""`python -m tests.mutants [PART OF A NAME, RULE OR FILE …]`: run the mutants, print a table, exit 1 when one survived."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence

from tests.mutants.catalogue import CATALOGUE
from tests.mutants.model import Mutant
from tests.mutants.runner import Verdict, run


def chosen(only: Sequence[str]) -> list[Mutant]:
    """The mutants whose name, file or rule key is asked for; all when nothing is."""
    if not only:
        return list(CATALOGUE)
    wanted = [word.lower() for word in only]
    return [
        mutant
        for mutant in CATALOGUE
        if any(word in mutant.name or word in mutant.file or word in map(str.lower, mutant.serves) for word in wanted)
    ]


def tell(verdict: Verdict) -> None:
    mutant = verdict.mutant
    print(f"{verdict.result:<9}{verdict.seconds:6.1f} s  {mutant.name:<58} {verdict.said}", flush=True)


def main(only: Sequence[str]) -> int:
    mutants = chosen(only)
    if not mutants:
        print(f"no mutant is called anything like {', '.join(only)}", file=sys.stderr)
        return 2
    started = time.monotonic()
    print(f"{len(mutants)} guards to take away; first the tests without any patch …", flush=True)
    try:
        verdicts = run(mutants, tell=tell)
    except RuntimeError as exc:
        print(exc, file=sys.stderr)
        return 2
    by_file: dict[str, list[Verdict]] = {}
    for verdict in verdicts:
        by_file.setdefault(verdict.mutant.file, []).append(verdict)
    print(f"\n{'file':<40}{'killed':>8}{'survived':>10}{'broken':>8}")
    for file, some in sorted(by_file.items()):
        counts = [sum(verdict.result == result for verdict in some) for result in ("killed", "survived", "broken")]
        print(f"{file:<40}{counts[0]:>8}{counts[1]:>10}{counts[2]:>8}")
    killed = sum(verdict.killed for verdict in verdicts)
    print(f"\n{killed} of {len(verdicts)} killed in {time.monotonic() - started:.0f} s")
    for verdict in verdicts:
        if not verdict.killed:
            print(f"  {verdict.result}: {verdict.mutant.name}: {verdict.mutant.rule} ({verdict.said})")
    return 0 if killed == len(verdicts) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
