"""A function in the place of another one: who has it by name gets the new one, and who keeps it otherwise is named."""

import functools
import sys
import types

import pytest

from paci_schedule.adapters.rebinding import keepers, rebind

USER = """
from a_library import schedule, schedule as other_name

class ByName:
    run = schedule
    run_alone = staticmethod(schedule)
"""


def ours():
    return "ours"


@pytest.fixture
def library(monkeypatch):
    module = types.ModuleType("a_library")
    monkeypatch.setitem(sys.modules, "a_library", module)
    exec("def schedule(): return 'stock'", module.__dict__)
    return module


@pytest.fixture
def user(library, monkeypatch):
    module = types.ModuleType("a_user")
    monkeypatch.setitem(sys.modules, "a_user", module)
    exec(USER, module.__dict__)
    return module


def test_names_of_modules_and_classes_get_the_new_function(library, user):
    stock = library.schedule
    assert keepers(stock) == []
    assert set(rebind(stock, ours)) == {
        ("a_library", "schedule"),
        ("a_user", "schedule"),
        ("a_user", "other_name"),
        ("a_user.ByName", "run"),
        ("a_user.ByName", "run_alone"),
    }
    assert {each() for each in (user.schedule, user.other_name, user.ByName.run, user.ByName.run_alone)} == {"ours"}


KEPT = {
    "def loop(run=schedule): run()": "a default value of a_user.loop",
    "def loop(*, run=schedule): run()": "a default value of a_user.loop",
    "TABLE = {'1f1b': schedule}": "a_user.TABLE",
    "CHOICES = (schedule,)": "a_user.CHOICES",
    "class A:\n def __init__(self): self.run = schedule\na = A()": "an attribute of an object of a_user.A",
    "class A:\n __slots__ = 'run'\na = A()\na.run = schedule": "an attribute of an object of a_user.A",
    "def outer(run):\n return lambda: run()\nmade = outer(schedule)": "the closure of a_user.outer.<locals>.<lambda>",
}


@pytest.mark.parametrize("code", KEPT)
def test_what_keeps_it_otherwise_is_named(library, user, code):
    exec(code, user.__dict__)
    assert keepers(library.schedule) == [KEPT[code]]


def test_a_partial_function_is_named(library, user):
    user.run = functools.partial(library.schedule)
    assert keepers(library.schedule) == ["a functools.partial of a_library.schedule"]
    del user.run
    assert keepers(library.schedule) == []
