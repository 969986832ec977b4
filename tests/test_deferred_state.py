"""The deferred state of a stage: what it saves and what it loads, from older versions too."""

from datetime import timedelta
from unittest import mock

import pytest
import torch
import torch.distributed as dist

from paci_schedule.core.spec import PipelineSpec
from paci_schedule.predict import Prediction
from paci_schedule.runtime.deferred.state import DeferredState
from paci_schedule.runtime.deferred.tied import TiedGradient

SUMS = [torch.tensor([1.5, -2.0]), torch.tensor([0.25, 8.0])]


@pytest.fixture
def stage():
    """The state of a stage that predicts and holds a copy of one tied weight."""
    spec = PipelineSpec(stages=3, accumulation=1)
    with mock.patch.object(dist, "get_process_group_ranks", return_value=[0, 2]):
        tied = TiedGradient(None, (0, 2), spec, timedelta(seconds=1))
    return DeferredState(
        0, torch.device("cpu"), timedelta(seconds=1), None, {"embedding": tied}, Prediction(mock.Mock(), 1)
    )


def test_a_stage_goes_on_as_the_one_that_gave_the_state(stage):
    saved = {"norms": [], "tied": {"embedding": SUMS}, "factor": 0.1}
    assert stage.load_state(saved) == []
    again = stage.state()
    assert again["factor"] == torch.tensor(0.1).item()
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(again["tied"]["embedding"], SUMS, strict=True))


def test_sums_of_a_tie_that_is_not_here_are_left_out_by_name(stage):
    assert stage.load_state({"norms": [], "tied": {"head": SUMS, "none": []}, "factor": None}) == ["head"]
    assert stage.state() == {"norms": [], "tied": {"embedding": []}, "factor": None, "spikes": None}


def test_the_list_that_version_0_1_0_saved_on_megatron_is_of_the_only_tie(stage):
    assert stage.load_state({"norms": [], "tied": SUMS}) == []
    assert len(stage.state()["tied"]["embedding"]) == 2


def test_another_spec_changes_how_late_sums_are_applied(stage):
    assert stage.tied["embedding"].delay == 2
    stage.respec(PipelineSpec(stages=3, accumulation=2))
    assert stage.tied["embedding"].delay == 1
