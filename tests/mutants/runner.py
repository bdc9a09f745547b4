"""Applies mutants to a copy of the tree and runs the tests that must catch them.

The tree it was started from is never touched. A mutant is killed only by a failing test (pytest's exit code 1): a test that cannot be
collected, does not exist or never ends proves nothing and is an error of the catalogue.

Law: what is run is the copy, which `probe` makes sure of in every single run.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue

from tests.mutants.model import ROOT, Mutant

COPIED = ("pjv2", "tests")
SECONDS_PER_MUTANT = 180.0
SECONDS_UNPATCHED = 900.0


@dataclass(frozen=True, slots=True)
class Verdict:
    """What became of a mutant; `said` is the failing test, or what went wrong."""

    mutant: Mutant
    result: str
    said: str
    seconds: float

    @property
    def killed(self) -> bool:
        return self.result == "killed"


class Tree:
    """A copy of the project that may be damaged."""

    def __init__(self, home: Path) -> None:
        self.home = home
        home.mkdir(parents=True)
        for entry in ROOT.iterdir():
            if entry.name in COPIED:
                shutil.copytree(entry, home / entry.name, ignore=shutil.ignore_patterns("__pycache__"))
            elif entry.name == "pyproject.toml":
                shutil.copy(entry, home)
            elif not entry.name.startswith("."):
                (home / entry.name).symlink_to(entry)
        # Compiled by the hash of the source: a patched file is never taken for its unpatched self, however quick the change.
        compiling = ["-m", "compileall", "-q", "--invalidation-mode", "checked-hash", "pjv2"]
        subprocess.run([sys.executable, *compiling], cwd=home, env=self.environment(), check=True)

    def environment(self) -> dict[str, str]:
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("PYTEST_", "COV_"))}
        return kept | {
            "PYTHONPATH": str(self.home),
            "PJV2_MUTANT_TREE": str(self.home),
            # A run is mostly start-up: only the plugin that the tests need is loaded.
            "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1",
        }

    def test(self, tests: Sequence[str], *, seconds: float) -> tuple[int | None, str]:
        """pytest's exit code (None: it did not end) and the last lines it wrote."""
        command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", "-p", "pytest_asyncio.plugin"]
        command += ["-p", "tests.mutants.probe", "--tb=line", *tests]
        try:
            done = subprocess.run(
                command,
                check=False,
                cwd=self.home,
                env=self.environment(),
                capture_output=True,
                text=True,
                timeout=seconds,
            )
        except subprocess.TimeoutExpired:
            return None, f"not done after {seconds:g} s"
        return done.returncode, done.stdout + done.stderr

    def judge(self, mutant: Mutant) -> Verdict:
        """Take the guard away, run its tests, put it back."""
        started = time.monotonic()
        path = self.home / mutant.file
        before = path.read_text(encoding="utf-8")
        try:
            path.write_text(mutant.apply(before), encoding="utf-8")
            code, output = self.test(mutant.tests, seconds=SECONDS_PER_MUTANT)
        except ValueError as exc:
            return Verdict(mutant, "broken", str(exc), time.monotonic() - started)
        finally:
            path.write_text(before, encoding="utf-8")
        took = time.monotonic() - started
        match code:
            case 0:
                return Verdict(mutant, "survived", "every test passed", took)
            case 1 if failed := _failed(output):
                return Verdict(mutant, "killed", failed, took)
            case _:
                return Verdict(mutant, "broken", f"pytest ended with {code}: {_last(output)}", took)


def _failed(output: str) -> str:
    """The test that failed; none when a module could not even be collected, which `-x` ends with the same exit code."""
    prefix = "FAILED "
    failed = (line.removeprefix(prefix) for line in output.splitlines() if line.startswith(prefix))
    return next(failed, "").split(" - ")[0]


def _last(output: str) -> str:
    lines = [line for line in output.splitlines() if line.strip()]
    return lines[-1] if lines else ""


def run(
    mutants: Iterable[Mutant], *, processes: int = 2, tell: Callable[[Verdict], None] = lambda verdict: None
) -> list[Verdict]:
    """Judge every mutant, in the order given. Raises RuntimeError when the tests are not green without any patch."""
    chosen = list(mutants)
    with tempfile.TemporaryDirectory(prefix="pjv2-mutants-") as scratch:
        trees: SimpleQueue[Tree] = SimpleQueue()
        for number in range(processes):
            trees.put(Tree(Path(scratch) / f"tree-{number}"))
        _green(trees, chosen)

        def judge(mutant: Mutant) -> Verdict:
            tree = trees.get()
            try:
                verdict = tree.judge(mutant)
            finally:
                trees.put(tree)
            tell(verdict)
            return verdict

        with ThreadPoolExecutor(processes) as pool:
            return list(pool.map(judge, chosen))


def _green(trees: SimpleQueue[Tree], mutants: Sequence[Mutant]) -> None:
    """The union of all tests passes unpatched: else a red run would say nothing."""
    tree = trees.get()
    union = list(dict.fromkeys(test for mutant in mutants for test in mutant.tests))
    files = {test for test in union if "::" not in test}
    code, output = tree.test(
        [t for t in union if t in files or t.split("::")[0] not in files], seconds=SECONDS_UNPATCHED
    )
    trees.put(tree)
    if code != 0:
        raise RuntimeError(f"without any patch the tests are not green ({code}):\n{output[-4000:]}")
