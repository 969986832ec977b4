"""Predicted weights on the real megatron-core: as other optimizers' steps on copies leave them; never shown."""

import dataclasses

import pytest

from integration_tests.megatron_job import GptJob
from integration_tests.ranks import on_gpus
from integration_tests.test_megatron_core import assert_as_the_oracle_says

pytest.importorskip("megatron.core", reason="megatron-core is not installed")

from integration_tests.predicting_oracle import predicting_all

EXACT = pytest.mark.skipif(on_gpus(1), reason="equality to the last bit is asked for on the CPU")


def predicting(prediction, plain, paci=(), **change):
    return dataclasses.replace(plain, **{**change, "paci": {"prediction": prediction, **dict(paci)}})


THREE = GptJob(stages=3, accumulation=2, calls=4)
DEEP = [
    predicting("every", THREE),
    predicting("window", THREE, clip_grad=0.2, accumulation=1),
    predicting(2, THREE, accumulation=3, bf16=True, optimizer="sgd"),
    predicting("window", THREE, bf16=True, clip_grad=0.2, paci={"clip": "stage"}),
    predicting("every", THREE, accumulation=1, tied=True, clip_grad=0.2, calls=6),
    predicting("window", THREE, accumulation=4, tied=True, bf16=True, distributed_optimizer=True, clip_grad=0.2),
    predicting("every", THREE, recompute="full", bf16=True),
    predicting("window", THREE, accumulation=3, clip_grad=0.2, paci={"drain_interval": 2}, evaluate_after=(1, 3)),
    predicting("every", THREE, distributed_optimizer=True, tied=True, optimizer="adam"),
]


@EXACT
def test_stages_predict_as_steps_on_copies():
    assert_as_the_oracle_says(DEEP, predicting_all)


TWO_BY_TWO = GptJob(stages=2, accumulation=3, calls=4, data_parallel=2)
REPLICATED = [
    predicting("every", TWO_BY_TWO, clip_grad=0.1),
    predicting("window", TWO_BY_TWO, bf16=True, overlap_grad_reduce=True),
    predicting("every", TWO_BY_TWO, distributed_optimizer=True, bf16=True, tied=True),
    predicting("window", TWO_BY_TWO, distributed_optimizer=True),
    predicting("every", TWO_BY_TWO, distributed_optimizer=True, bf16=True, overlap_grad_reduce=True,
               align_grad_reduce=True),
]


@EXACT
def test_replicas_predict_each_from_its_own_part():
    assert_as_the_oracle_says(REPLICATED, predicting_all)
