"""Every mutant of `make mutants` still stands for one piece of the code and breaks a rule that tests guard."""

import ast

import pytest

from benchmarks.mutants import ROOT, Mutant, mutated
from benchmarks.mutants.listed import MUTANTS

RULES = {
    "schedule order",
    "drift bound",
    "version guard",
    "drain",
    "norm rule",
    "tied rule",
    "message pairing",
    "prediction",
    "loss spike",
}


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: f"{mutant.rule}: {mutant.does}")
def test_a_mutant_changes_one_place_and_is_code_and_its_tests_are_there(mutant):
    broken = mutated(mutant)
    assert broken != (ROOT / mutant.file).read_text(encoding="utf-8")
    ast.parse(broken)
    for test in mutant.tests:
        file, _, name = test.partition("::")
        assert f"def {name.partition('[')[0]}" in (ROOT / file).read_text(encoding="utf-8")


def test_every_rule_has_two_mutants_or_more():
    assert {mutant.rule for mutant in MUTANTS} == RULES
    assert all(sum(mutant.rule == rule for mutant in MUTANTS) >= 2 for rule in RULES)


@pytest.mark.parametrize("right", ["no such text", "self"])
def test_a_text_that_is_not_there_once_is_an_error(right):
    with pytest.raises(ValueError, match=r"stage\.py has this text \d+ times, not once"):
        mutated(Mutant("drain", "nothing", "paci_schedule/runtime/stage.py", right, "", ()))
