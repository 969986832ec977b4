"""A rank takes its own device before anything of ours allocates or communicates; here the accelerator only notes it."""

import types
from unittest import mock

import pytest

from launch import train_gpt
from testing import deepspeed_job, ranks
from testing.collectives import recorded
from testing.jobs import Job

JOB = Job(stages=2, accumulation=2, script=(), clip=0.5, config={"paci": {"clip": "global"}})


class ReachedError(Exception):
    """A stand-in that has only what the test looks at."""


def noting(seen):
    """An accelerator of many devices, of which the first is current until one is set."""
    from deepspeed.accelerator import get_accelerator

    def current():
        return f"cuda:{[0, *(index for what, index in seen if what == 'device')][-1]}"

    return mock.patch.multiple(
        get_accelerator(), set_device=lambda index: seen.append(("device", index)), current_device_name=current,
        device_name=lambda index=None: "cuda" if index is None else f"cuda:{index}",
    )  # fmt: skip


def first_steps(args):
    """What this rank's engine does until its norms are made: devices that it sets, collectives, where the norms are."""
    import deepspeed

    from paci_schedule.runtime import assembly

    seen = []

    def norms(spec, stage, pipeline, device, **_):
        seen.append(("norms", str(device)))
        raise ReachedError

    def initialize(**arguments):
        with noting(seen), recorded(lambda name, _: seen.append(("collective", name))):
            stock(args=args, **arguments)

    stock = deepspeed.initialize
    with mock.patch.object(deepspeed, "initialize", initialize), mock.patch.object(assembly, "CarriedNorms", norms), \
            pytest.raises(ReachedError):  # fmt: skip
        deepspeed_job.build(JOB)
    return seen


@pytest.mark.parametrize(
    ("args", "chosen"), [(None, [0, 1]), (types.SimpleNamespace(device_rank=3), [3, 3])], ids=["LOCAL_RANK", "args"]
)
def test_the_device_is_set_before_our_first_collective_and_the_norms_are_there(args, chosen):
    for (first, *rest), index in zip(ranks.run_ranks(first_steps, 2, (args,)), chosen, strict=True):
        assert first == ("device", index)
        assert "collective" in dict(rest)
        assert rest[-1] == ("norms", f"cuda:{index}")


def first_step_of_the_programme():
    seen = []
    with noting(seen), mock.patch.object(train_gpt, "deepspeed_config", side_effect=ReachedError), \
            recorded(lambda name, _: seen.append(("collective", name))), pytest.raises(ReachedError):  # fmt: skip
        train_gpt.main([])
    return seen


def test_the_training_programme_begins_with_its_device():
    assert ranks.run_ranks(first_step_of_the_programme, 2) == [[("device", 0)], [("device", 1)]]
