"""The shape of a pipeline job: what is refused, and how far each stage runs ahead."""

import dataclasses
import itertools

import pytest

from paci_schedule import ConfigError, PipelineSpec


@pytest.mark.parametrize(
    ("field", "value", "least"),
    [
        ("stages", 0, 1),
        ("stages", -3, 1),
        ("stages", 2.0, 1),
        ("stages", "2", 1),
        ("stages", None, 1),
        ("stages", True, 1),
        ("accumulation", 0, 1),
        ("accumulation", 1.5, 1),
        ("accumulation", False, 1),
        ("extra_in_flight", -1, 0),
        ("extra_in_flight", "0", 0),
    ],
)
def test_a_bad_field_is_refused_with_its_value_and_its_rule(field, value, least):
    with pytest.raises(ConfigError) as caught:
        PipelineSpec(**{"stages": 2, "accumulation": 3, field: value})
    assert str(caught.value) == f"{field}={value!r}: must be a whole number of at least {least}"
    assert isinstance(caught.value, ValueError)


@pytest.mark.parametrize(
    ("extra", "message"),
    [((1, -2), "extra_in_flight=-2: must be a whole number of at least 0"), ((1,), "3 stages have 2 links")],
)
def test_slack_is_given_for_every_link(extra, message):
    with pytest.raises(ConfigError, match=message):
        PipelineSpec(stages=3, accumulation=2, extra_in_flight=extra)


def test_a_spec_takes_keywords_only_and_does_not_change():
    with pytest.raises(TypeError):
        PipelineSpec(2, 3)
    spec = PipelineSpec(stages=2, accumulation=3)
    with pytest.raises(dataclasses.FrozenInstanceError):
        spec.stages = 3


@pytest.mark.parametrize(
    ("stages", "extra", "look_ahead", "gradients_on_wire"),
    [
        (1, 0, [0], [0]),
        (1, 3, [0], [0]),
        (2, 0, [1, 0], [0, 1]),
        (2, 3, [4, 0], [0, 4]),
        (4, 0, [3, 2, 1, 0], [0, 1, 1, 1]),
        (4, 1, [4, 3, 2, 0], [0, 1, 1, 2]),
        (4, 2, [5, 4, 2, 0], [0, 1, 2, 2]),
        (4, 3, [6, 4, 2, 0], [0, 2, 2, 2]),
        (3, 5, [7, 4, 0], [0, 3, 4]),
        (4, (0, 1, 0), [4, 3, 1, 0], [0, 1, 2, 1]),
        (4, (2, 0, 1), [6, 3, 2, 0], [0, 3, 1, 2]),
    ],
)
def test_slack_adds_to_look_ahead_and_gradients_on_the_wire(stages, extra, look_ahead, gradients_on_wire):
    spec = PipelineSpec(stages=stages, accumulation=5, extra_in_flight=extra)
    assert [spec.look_ahead(stage) for stage in range(stages)] == look_ahead
    assert [spec.in_flight(stage) for stage in range(stages)] == [ahead + 1 for ahead in look_ahead]
    assert [spec.gradients_on_wire(stage) for stage in range(stages)] == gradients_on_wire


@pytest.mark.parametrize("stages", range(1, 33))
@pytest.mark.parametrize("extra", [0, 1, 2, 7])
def test_the_first_stage_gets_all_the_extra_and_the_last_none(stages, extra):
    spec = PipelineSpec(stages=stages, accumulation=1, extra_in_flight=extra)
    ahead = [spec.look_ahead(stage) for stage in range(stages)]
    assert ahead[-1] == 0
    if stages > 1:
        assert ahead[0] == stages - 1 + extra
    assert all(before > after for before, after in itertools.pairwise(ahead))


@pytest.mark.parametrize("stage", [-1, 4, 99])
def test_a_stage_outside_the_pipeline_is_refused(stage):
    spec = PipelineSpec(stages=4, accumulation=2)
    with pytest.raises(ConfigError, match=rf"stage={stage}: a pipeline of 4 stages has stages 0 to 3"):
        spec.look_ahead(stage)
