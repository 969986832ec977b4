"""The schedule in docs/extending.md is one: it keeps its rules, its messages never wait in a circle, and it runs."""

import re
from pathlib import Path

import pytest

from paci_schedule.check.validate import check_schedule
from paci_schedule.core.spec import PipelineSpec
from paci_schedule.simulate.costs import Costs
from paci_schedule.simulate.figures import figures_of

PAGE = Path(__file__).parents[1] / "docs" / "extending.md"


@pytest.fixture(scope="module")
def eager():
    [code] = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    names = {}
    exec(code, names)
    return names["EagerOneFOneB"]()


@pytest.mark.parametrize("stages", [1, 2, 4])
@pytest.mark.parametrize("accumulation", [1, 3, 8])
def test_the_schedule_of_the_page_keeps_its_rules(eager, stages, accumulation):
    check_schedule(eager, PipelineSpec(stages=stages, accumulation=accumulation))


def test_its_bubble_is_that_of_1f1b_and_it_holds_more(eager):
    spec = PipelineSpec(stages=4, accumulation=8)
    figures = figures_of(eager, spec, Costs(forward=2.0, backward=3.0))
    assert figures.makespan == (4 - 1 + 8) * 5.0
    assert figures.peak_in_flight == [7, 5, 3, 1]


@pytest.mark.parametrize("folder", ["deepspeed", "megatron"])
def test_the_files_of_an_adapter_are_those_of_the_page(folder):
    adapter = PAGE.parents[1] / "paci_schedule" / "adapters" / folder
    table = PAGE.read_text(encoding="utf-8").partition("## An adapter")[2].partition("The parts that are alike")[0]
    named = re.findall(r"`(\w+\.py)`", table)
    assert len(named) > 8
    driver = {"engine.py", "stream.py"}
    assert {name for name in named if name not in driver} <= {path.name for path in adapter.iterdir()}
    assert len(driver & {path.name for path in adapter.iterdir()}) == 1
