"""DeepSpeed's own tests of pipelines, from a stock checkout (DEEPSPEED_CHECKOUT), on PACI's engine.

The checkout should be of the version that is installed.  Stand-ins replace torchvision and its images; each process
adds the key to every config that `deepspeed.initialize` is given, and changes nothing else.
"""

import re

import pytest

from integration_tests.public_programs import checkout, keys, run, stubs

pytestmark = pytest.mark.slow

# TestPipeCifar10 trains AlexNet 12 times, which takes hours on a CPU; test_deepspeed_jobs.py trains it once.
TESTS = ("unit/pipe", "unit/runtime/pipe", "-k", "not TestPipeCifar10")
# What cannot pass under PACI, by its nature; all of it passes under `flush_warmup_steps`.
OTHERWISE = {
    "TestPipeGradientAccumulationScaling::test_gradients_are_scaled_once": (
        "reads the weights after one batch, when the first stage has not done its update: it drains nothing"
    ),
}

IMAGES = '''
"""What the tests take of torchvision: images made up."""
import sys, types
import torch

__version__ = "0.20.0"

class FakeData(torch.utils.data.Dataset):
    def __init__(self, size, image_size, num_classes, transform, random_offset):
        self.size, self.image_size, self.num_classes = size, image_size, num_classes
    def __len__(self):
        return self.size
    def __getitem__(self, number):
        drawn = torch.Generator().manual_seed(number)
        return torch.randn(self.image_size, generator=drawn), number % self.num_classes

def module(name, **values):
    sys.modules[f"torchvision.{name}"] = found = types.ModuleType(name)
    vars(found).update(values)
    return found

step = lambda *_, **__: None
transforms = module("transforms", ToTensor=step, Normalize=step, Compose=step, Lambda=step)
datasets = module("datasets", FakeData=FakeData)
'''
KEYED = """
import deepspeed, paci_schedule
paci_schedule.register("deepspeed")
initialize = deepspeed.initialize
deepspeed.initialize = lambda *args, config, **more: initialize(*args, config={{**config, **{keys}}}, **more)
"""


def outcomes(folder, schedule, *selected):
    """By the name of each test, PASSED, FAILED or ERROR."""
    tests = checkout("DEEPSPEED_CHECKOUT") / "tests"
    path = stubs(folder / schedule, {"torchvision": IMAGES})
    (path / "sitecustomize.py").write_text(KEYED.format(keys=keys(schedule)))
    command = ("-m", "pytest", "-p", "no:cacheprovider", "-rA", *selected)
    said = run(*command, path=(path,), folder=tests, ranks=4, ends=(0, 1), seconds=3600)
    found = re.findall(r"^(PASSED|FAILED|ERROR) unit/\S+?\.py::(\S+)", re.sub(r"\x1b\[[\d;]*m", "", said), re.MULTILINE)
    assert found, said[-6000:]
    return {name: outcome for outcome, name in found}


@pytest.mark.timeout(3600)
def test_they_pass_under_paci_but_for_those_that_read_undrained_weights(tmp_path):
    found = outcomes(tmp_path, "paci", *TESTS)
    assert len(found) > 30
    assert {name for name, outcome in found.items() if outcome != "PASSED"} == set(OTHERWISE)


@pytest.mark.parametrize("name", OTHERWISE)
def test_those_pass_under_a_flush(name, tmp_path):
    assert outcomes(tmp_path, "flushed", "unit/runtime/pipe", "-k", name.rpartition("::")[2]) == {name: "PASSED"}
