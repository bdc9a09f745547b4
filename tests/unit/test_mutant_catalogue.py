"""The catalogue of mutants cannot rot in silence: every entry still applies, and no rule and no check is without one."""

from __future__ import annotations

import ast
import re
from collections import Counter

import pytest

from tests.mutants.catalogue import CATALOGUE, SAMPLE
from tests.mutants.model import (
    CHECKLISTS,
    MONEY_RULES,
    NO_GUARD,
    PLANNING,
    ROOT,
    RULES,
    SESSION_RULES,
    Mutant,
    functions,
    must_have_a_mutant,
)


def source(mutant: Mutant) -> str:
    return (ROOT / mutant.file).read_text(encoding="utf-8")


@pytest.mark.parametrize("mutant", CATALOGUE, ids=lambda mutant: mutant.name)
def test_every_mutant_still_applies_and_leaves_a_program(mutant: Mutant) -> None:
    ast.parse(mutant.apply(source(mutant)))


@pytest.mark.parametrize("mutant", CATALOGUE, ids=lambda mutant: mutant.name)
def test_every_mutant_names_what_its_guard_keeps_and_the_tests_that_must_notice(mutant: Mutant) -> None:
    assert re.fullmatch(r"[a-z0-9]+(-[a-z0-9]+)*", mutant.name)
    assert re.fullmatch(r"\S.* .*\.", mutant.rule), "a sentence"
    assert set(mutant.serves) <= set(RULES)
    assert mutant.tests
    for test in mutant.tests:
        file, _, name = test.partition("::")
        text = (ROOT / file).read_text(encoding="utf-8")
        assert not name or re.search(rf"def {re.escape(name.split('[')[0])}\(", text), f"{test} does not exist"


def test_names_and_patches_are_unique() -> None:
    assert [name for name, times in Counter(mutant.name for mutant in CATALOGUE).items() if times > 1] == []
    patches = Counter((mutant.file, mutant.apply(source(mutant))) for mutant in CATALOGUE)
    assert max(patches.values()) == 1


def test_every_rule_has_a_mutant() -> None:
    assert set(RULES) - {rule for mutant in CATALOGUE for rule in mutant.serves} == set()


def test_the_rules_are_the_nine_and_the_twenty_that_were_adopted() -> None:
    assert [*MONEY_RULES] == [f"money {number}" for number in range(1, 10)]
    assert [*SESSION_RULES] == [f"M{number}" for number in range(1, 22) if number != 10]


@pytest.mark.parametrize("file", [*CHECKLISTS, *PLANNING])
def test_every_function_that_checks_or_refuses_has_a_mutant(file: str) -> None:
    damaged = {mutant.damages(source(mutant)) for mutant in CATALOGUE if mutant.file == file}
    assert must_have_a_mutant(file) - damaged == set()


@pytest.mark.parametrize("file", [*CHECKLISTS, *PLANNING])
def test_what_needs_no_mutant_exists_and_says_why(file: str) -> None:
    assert set(NO_GUARD[file]) <= set(functions((ROOT / file).read_text(encoding="utf-8")))
    assert all(len(reason.split()) > 3 for reason in NO_GUARD[file].values())


def test_every_step_of_both_checklists_is_found_by_itself() -> None:
    wanted = must_have_a_mutant("pjv2/psbt/original.py") | must_have_a_mutant("pjv2/psbt/verify.py")
    assert {"inputs_not_owned", "_relative_lock", "check_inputs", "_check_their_input", "check_fees"} <= wanted


def test_the_sample_is_of_the_catalogue_and_aims_at_single_tests() -> None:
    sample = [mutant for mutant in CATALOGUE if mutant.name in SAMPLE]
    assert len(sample) == len(SAMPLE) == 6
    assert all("::" in test for mutant in sample for test in mutant.tests)


@pytest.mark.parametrize(
    ("old", "new", "why"),
    [
        ("no such line", "x", "0 times"),
        ("MAX_MONEY", "x", "times"),
        ("def check_shape(", "def check_shape(", "changes nothing"),
    ],
)
def test_a_patch_that_does_not_fit_is_refused(old: str, new: str, why: str) -> None:
    mutant = Mutant("x", "A rule.", "pjv2/psbt/original.py", old, new, ("tests",))
    with pytest.raises(ValueError, match=why):
        mutant.apply(source(mutant))
