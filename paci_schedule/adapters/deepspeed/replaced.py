"""What a job has put in the place of parts of DeepSpeed's pipeline engine that a schedule of ours would not run."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from deepspeed.runtime.pipe import schedule as stock_schedules
from deepspeed.runtime.pipe.engine import PipelineEngine as StockEngine

from paci_schedule.core.ops import OpKind
from paci_schedule.core.schedules import one_f_one_b
from paci_schedule.core.spec import PipelineSpec

__all__ = ["is_1f1b", "why_bypassed"]

_NEVER_CALLED = (
    "_exec_schedule",
    "_train_schedule",
    "_exec_send_activations",
    "_exec_recv_activations",
    "_exec_send_grads",
    "_exec_recv_grads",
    "_exec_reduce_tied_grads",
    "_aggregate_total_loss",
)
"""The methods of DeepSpeed's engine that a training batch of ours never calls."""

_MESSAGES = frozenset({"LoadMicroBatch", "SendActivation", "RecvActivation", "SendGrad", "RecvGrad"})
_COMPUTED = {OpKind.FORWARD: "ForwardPass", OpKind.BACKWARD: "BackwardPass"}
_AT_THE_END = ["ReduceTiedGrads", "ReduceGrads", "OptimizerStep"]


def why_bypassed(engine: type[StockEngine], spec: PipelineSpec) -> Iterator[str]:
    """Why a job cannot run our schedule in place of DeepSpeed's own, which it has changed.

    Args:
        engine: the class of the engine.
        spec: of the pipeline, without slack.
    """
    for instruction, execute in engine._INSTRUCTION_MAP.items():
        if not _is_stock(execute):
            yield (
                f"PipelineEngine._INSTRUCTION_MAP[{instruction.__name__}] is {_name(execute)}, which would not be "
                "called: leave the change out, or derive the engine from PaciPipelineEngine and override its methods"
            )
    for name in _NEVER_CALLED:
        method = getattr(engine, name, None)
        if method is not None and not _is_stock(method):
            yield f"PipelineEngine.{name} is {_name(method)}, which would not be called: leave the change out"
    if not _is_stock(StockEngine.train_batch):
        yield f"PipelineEngine.train_batch is {_name(StockEngine.train_batch)}, which would not be called: leave it out"
    trains = stock_schedules.TrainSchedule
    if (trains.__module__, _home(trains.steps)) != (stock_schedules.__name__,) * 2 and not is_1f1b(trains, spec):
        yield (
            f"DeepSpeed's TrainSchedule is {_name(trains)}, with the steps of {_name(trains.steps)}, which do not "
            "compute in the order of 1F1B: a job has one schedule; leave the change out"
        )


def _is_stock(method: Any) -> bool:
    return _home(method) == StockEngine.__module__


def _home(function: Any) -> str:
    """The module that has the code of a function; one that wraps another may bear the other's name and module."""
    module = getattr(function, "__globals__", {}).get("__name__", "")
    ours = module.startswith(f"{__package__}.") and hasattr(function, "__wrapped__")  # see `dispatch`
    return _home(function.__wrapped__) if ours else module


def _name(thing: Any) -> str:
    code = getattr(thing, "__code__", None)
    name = getattr(code, "co_qualname", None) or getattr(thing, "__qualname__", repr(thing))
    return f"{_home(thing) or getattr(thing, '__module__', None)}.{name}"


def is_1f1b(trains: Any, spec: PipelineSpec) -> bool:
    """Whether a schedule of DeepSpeed's kind computes what 1F1B does, in the same order, whatever it sends and when."""
    return all(_computed(trains, spec, stage) == _expected(spec, stage) for stage in range(spec.stages))


def _computed(trains: Any, spec: PipelineSpec, stage: int) -> list[str]:
    steps = trains(micro_batches=spec.accumulation, stages=spec.stages, stage_id=stage).steps()
    names = (type(instruction).__name__ for instructions in steps for instruction in instructions)
    return [name for name in names if name not in _MESSAGES]


def _expected(spec: PipelineSpec, stage: int) -> list[str]:
    return [_COMPUTED[op.kind] for op in one_f_one_b.OneFOneB().batch(spec, stage)] + _AT_THE_END
