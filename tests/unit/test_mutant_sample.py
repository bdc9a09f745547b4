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


def test_a_mutant_that_no_test_notices_survives_and_one_without_tests_is_broken() -> None:
    [mutant] = [mutant for mutant in CATALOGUE if mutant.name == "fee-cap-share"]
    blind = ("tests/unit/psbt/test_scripts.py",)
    unnoticed = replace(mutant, name="unnoticed", tests=blind)
    missing = replace(mutant, name="does not apply", old="no such guard", tests=blind)
    verdicts = run([unnoticed, missing], processes=1)
    assert [verdict.result for verdict in verdicts] == ["survived", "broken"]


def test_tests_that_do_not_exist_prove_nothing() -> None:
    with pytest.raises(RuntimeError, match="not green"):
        run([replace(CHOSEN[0], tests=("tests/unit/psbt/test_scripts.py::test_nothing_of_the_kind",))], processes=1)
