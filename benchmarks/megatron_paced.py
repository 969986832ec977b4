"""Megatron-core's 1F1B against PACI on paced stages: forwards and backwards take fixed times.

    python -m benchmarks.megatron_paced --stages 4 --accumulation 4 --forward 40 --backward 80

The loop is Megatron's: zero the gradients, call the schedule, step the optimizer (its gradient norm included).  Both
schedules run in the same processes, in turns, after a warm-up; the median call counts.  `--tied` adds PACI with one
weight in the first and the last stage.  Without a GPU for every rank, the CPU plays CUDA.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from typing import Any

import torch

from benchmarks.pacing import Pace
from testing.megatron_job import prepare
from testing.megatron_model import GptJob, set_up
from testing.ranks import run_ranks

SHAPE = (4, 1, 8)  # sequence, micro-batch, hidden: what crosses a link


def _paced_model(schedule: str, stages: int, forward: float, backward: float, tied: bool) -> tuple[Any, Any]:
    from megatron.core import parallel_state
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
    from megatron.core.enums import ModelType
    from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
    from megatron.core.transformer import TransformerConfig
    from megatron.core.transformer.module import MegatronModule

    class PacedStage(MegatronModule):
        def __init__(self, config: TransformerConfig) -> None:
            super().__init__(config)
            self.weight = torch.nn.Parameter(torch.ones(SHAPE[-1]))
            self.received: torch.Tensor | None = None
            self.model_type = ModelType.encoder_or_decoder
            self.share_embeddings_and_output_weights = tied
            self.pre_process = parallel_state.is_pipeline_first_stage()
            self.post_process = parallel_state.is_pipeline_last_stage()
            self.weight.shared = self.post_process

        def shared_embedding_or_output_weight(self) -> torch.nn.Parameter | None:
            return self.weight if self.pre_process or self.post_process else None

        def set_input_tensor(self, tensors: list[torch.Tensor | None]) -> None:
            self.received = tensors[0]

        def forward(self) -> torch.Tensor:
            values = torch.ones(SHAPE, device=self.weight.device) if self.received is None else self.received
            return Pace.apply(values * self.weight, forward, backward)

    config = TransformerConfig(
        num_layers=stages,
        hidden_size=SHAPE[-1],
        num_attention_heads=1,
        pipeline_model_parallel_size=stages,
        pipeline_dtype=torch.float32,
    )
    config.pipeline_schedule = schedule
    model = DistributedDataParallel(config, DistributedDataParallelConfig(), PacedStage(config).cuda())
    optimizer = get_megatron_optimizer(OptimizerConfig(optimizer="sgd", lr=1e-3, clip_grad=0.0), [model])
    config.grad_scale_func, config.finalize_model_grads_func = optimizer.scale_loss, finalize_model_grads
    return model, optimizer


def _step(data: Any, model: Any) -> tuple[torch.Tensor, Any]:
    return model(), lambda output: (output.mean(), {"loss": output.detach().mean()})


def _worker(stages: int, accumulation: int, forward: float, backward: float, tied: bool, calls: int) -> dict[str, Any]:
    prepare()
    set_up(GptJob(stages=stages))
    from megatron.core.pipeline_parallel import get_forward_backward_func

    from paci_schedule.adapters.megatron import pipeline_stats

    pace = stages, forward, backward
    jobs = {schedule: _paced_model(schedule, *pace, tied=False) for schedule in ("1f1b", "paci")}
    if tied:
        jobs["paci, tied"] = _paced_model("paci", *pace, tied=True)
    seconds: dict[str, list[float]] = {name: [] for name in jobs}
    for _ in range(2):
        for name, (model, optimizer) in jobs.items():
            for call in range(2 + calls):
                started = time.perf_counter()
                model.zero_grad_buffer()
                optimizer.zero_grad()
                get_forward_backward_func()(
                    forward_step_func=_step,
                    data_iterator=None,
                    model=[model],
                    num_microbatches=accumulation,
                    seq_length=SHAPE[0],
                    micro_batch_size=SHAPE[1],
                    forward_only=False,
                )
                optimizer.step()
                if call >= 2:
                    seconds[name].append(time.perf_counter() - started)
    stats = pipeline_stats(jobs["paci"][0])
    return {"seconds": seconds, "max_drift": stats["max_drift"], "peak_in_flight": stats["peak_in_flight"]}


def measure(
    stages: int, accumulation: int, forward: float, backward: float, tied: bool, calls: int = 6
) -> dict[str, Any]:
    """Median milliseconds per call of the schedules, and the time of a call without any bubble.

    Args:
        stages: of the pipeline, a process each.
        accumulation: micro-batches to a call.
        forward, backward: seconds.
        tied: whether to run PACI with a tied weight, too.
        calls: measured in each turn.
    """
    ranks = run_ranks(_worker, stages, (stages, accumulation, forward, backward, tied, calls), timeout=600)
    medians = {
        name: 1e3 * statistics.median(second for rank in ranks for second in rank["seconds"][name])
        for name in ranks[0]["seconds"]
    }
    ideal = 1e3 * accumulation * (forward + backward)
    return {
        "stages": stages,
        "accumulation": accumulation,
        "milliseconds": medians,
        "ideal_milliseconds": ideal,
        "of_ideal": ideal / medians["paci"],
        "ratio": medians["1f1b"] / medians["paci"],
        "ideal_ratio": (accumulation + stages - 1) / accumulation,
        "max_drift": [rank["max_drift"] for rank in ranks],
        "peak_in_flight": [rank["peak_in_flight"] for rank in ranks],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stages", type=int, default=4)
    parser.add_argument("--accumulation", type=int, default=4)
    parser.add_argument("--forward", type=float, default=40.0, help="milliseconds")
    parser.add_argument("--backward", type=float, default=80.0, help="milliseconds")
    parser.add_argument("--tied", action="store_true")
    arguments = parser.parse_args()
    pace = arguments.forward / 1e3, arguments.backward / 1e3
    row = measure(arguments.stages, arguments.accumulation, *pace, arguments.tied)
    print(json.dumps(row, indent=2))


if __name__ == "__main__":
    main()
