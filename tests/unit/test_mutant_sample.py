"""The six guards that guard most money are taken away in every run of the suite; `make mutants` takes away all of them."""

from __future__ import annotations

from dataclasses import replace

import pytest

from tests.mutants.catalogue import CATALOGUE, SAMPLE
from tests.mutants.runner import run

CHOSEN = [mutant for mutant in CATALOGUE if mutant.name in SAMPLE]


def test_without_a_money_critical_guard_the_suite_goes_red() -> None:
    verdicts = run(CHOSEN, processes=1)
    assert {verdict.mutant.name: verdict.result for verdict in verdicts} == dict.fromkeys(SAMPLE, "killed")


def test_a_mutant_that_no_test_notices_survives_and_one_that_proves_nothing_is_broken() -> None:
    [mutant] = [mutant for mutant in CATALOGUE if mutant.name == "fee-cap-share"]
    importing = "from pjv2.psbt.coin import count_overhead\n"
    wrong = {
        "unnoticed": replace(mutant, tests=("tests/unit/psbt/test_scripts.py",)),
        "does not apply": replace(mutant, old="no such guard"),
        "cannot be collected": replace(mutant, old=importing, new="from pjv2.nowhere import count_overhead\n"),
    }
    verdicts = run([replace(mutant, name=name) for name, mutant in wrong.items()], processes=1)
    assert [verdict.result for verdict in verdicts] == ["survived", "broken", "broken"]


def test_tests_that_do_not_exist_prove_nothing() -> None:
    with pytest.raises(RuntimeError, match="not green"):
        run([replace(CHOSEN[0], tests=("tests/unit/psbt/test_scripts.py::test_nothing_of_the_kind",))], processes=1)
