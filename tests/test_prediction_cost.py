"""The benchmark of what a prediction costs runs, for either dtype."""

import argparse

import pytest
import torch

from benchmarks import prediction_cost


@pytest.mark.parametrize("name", ["adamw", "muon"])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_the_benchmark_times_compute_a_step_and_a_prediction(name, dtype):
    if dtype == "bf16" and not hasattr(torch.Tensor, "grad_dtype"):
        pytest.skip("this torch sums the gradients of a bf16 weight in bf16")
    times = prediction_cost._milliseconds(24, 256, name, argparse.Namespace(device="cpu", dtype=dtype, turns=2))
    assert len(times) == 3
    assert all(milliseconds > 0 for milliseconds in times)
