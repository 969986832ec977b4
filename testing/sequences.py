"""Random jobs: settings and a sequence of calls, both drawn from a seed.

A seed always gives the same job, so a failure needs no more than the seed and the number of the action.  Every job is
compared with the reference after each of its calls; the calls up to the first difference are therefore the shortest
part of the sequence that shows it, and nothing has to be run again to find it.
"""

from __future__ import annotations

import itertools
import random
from typing import Any

from testing.jobs import Job
from testing.megatron_model import GptJob

__all__ = ["deepspeed_job", "gpt_job", "torch_job"]

_OFTEN, _SOMETIMES, _SELDOM = 12, 3, 2
_SHAPES = ((3, 5), (2, 3), (3, 1), (1, 5), (2, 4))


def deepspeed_job(seed: int, stages: int, length: int) -> Job:
    """A job of so many stages for DeepSpeed, with a sequence of so many calls."""
    draw = random.Random(seed)
    job = _settings(draw, stages)
    precision = draw.choice(["fp32", "fp32", "bf16", "bf16-bf16"])
    paci = {**job["paci"], "extra_in_flight": draw.choice([0, 0, 1, 2])}
    shapes = () if draw.random() < 0.6 else _SHAPES[: draw.randint(2, len(_SHAPES))]
    script = _script(
        draw,
        length,
        {
            "accumulate": lambda: f"={draw.randint(1, 4)}",
            "samples": lambda: f"={draw.randint(1, 4)}",
            "schedule": lambda: f"={draw.choice(job['schedules'])}",
            "rate": lambda: f"={draw.choice([0.01, 0.02, 0.03])}",
        },
        # DeepSpeed's BF16_Optimizer cannot load what it has saved without ZeRO.
        others=("drain", "drained", "eval", "save", "reset", *(["load"] if precision != "bf16-bf16" else [])),
    )
    return Job(
        stages=stages,
        accumulation=draw.randint(1, 4),
        # A rate that is set while the stages are at different updates makes the copies of a tied weight differ.
        script=_drained(script, {"rate"} if job["model"] == "tied" else set()),
        model=job["model"],
        optimizer=_steady(job["optimizer"], job["clip"]),
        precision=precision,
        clip=job["clip"],
        warmup=draw.random() < 0.5,
        config={"paci": paci},
        shapes=shapes,
    )


def torch_job(seed: int, stages: int, length: int) -> Job:
    """A job of so many stages for torch.distributed.pipelining, with a sequence of so many calls, or a few more."""
    draw = random.Random(seed)
    job = _settings(draw, stages)
    # The reference adds up the norms of tied weights first, as DeepSpeed does.
    clip = 0.0 if job["model"] == "tied" else job["clip"]
    script = _script(
        draw,
        length,
        {
            "schedule": lambda: f"={draw.choice(job['schedules'])}",
            "rate": lambda: f"={draw.choice([0.01, 0.02, 0.03])}",
        },
        # PyTorch's own evaluation takes no tuples as targets.
        others=("drain", "save", "load", *(["eval"] if job["model"] != "pairs" else [])),
    )
    return Job(
        stages=stages,
        accumulation=draw.randint(1, 4),
        # Micro-batches in flight are an error there, when anything is saved or loaded.
        script=_drained(script, {"save", "load"} | ({"rate"} if job["model"] == "tied" else set())),
        model=job["model"],
        optimizer=_steady(job["optimizer"], clip),
        clip=clip,
        warmup=draw.random() < 0.5,
        config={"paci": {**job["paci"], "extra_in_flight": draw.choice([0, 0, 1])}},
    )


def gpt_job(seed: int, stages: int, calls: int) -> GptJob:
    """A job of so many stages for Megatron-core, of so many calls."""
    draw = random.Random(seed)
    paci: dict[str, Any] = {"prediction": draw.choice(["off", "off", "window", "every"])}
    every = draw.choice([0, 0, 2, 3])  # a pipe that is never empty before the end, or after so many calls
    if every:
        paci["drain_interval"] = every
    if draw.random() < 0.3:
        paci["early_receives"] = True
    schedules, resume_after = (), None
    if every:
        parts = ["paci", *(draw.choice(["paci", "1f1b"]) for _ in range(calls // every))]
        schedules = tuple(parts[call // every] for call in range(calls))
        resume_after = every if draw.random() < 0.5 else None
    if "1f1b" in schedules or resume_after:
        paci["prediction"] = "off"
    bf16 = draw.random() < 0.5
    return GptJob(
        stages=stages,
        accumulation=draw.randint(1, 4),
        calls=calls,
        bf16=bf16,
        distributed_optimizer=draw.random() < 0.3,
        recompute=draw.choice([None, None, "full"]),
        clip_grad=draw.choice([0.0, 0.2]),
        tied=draw.random() < 0.5,
        schedules=schedules,
        resume_after=resume_after,
        evaluate_after=tuple(sorted(draw.sample(range(1, calls + 1), draw.randint(0, 2)))),
        paci=paci,
    )


def _settings(draw: random.Random, stages: int) -> dict[str, Any]:
    """What all jobs on the models of `testing.jobs` have in common."""
    model = draw.choice(["words", "words", "pairs", "tied", "tied", "frozen"])
    clip = draw.choice([0.0, 0.4, 0.9]) if model != "tied" else draw.choice([0.0, 2.5])
    paci: dict[str, Any] = {"prediction": draw.choice(["off", "off", "window", "every", 2])}
    if clip and model != "tied" and draw.random() < 0.3:
        paci["clip"] = "stage"
    # Under a flush gloo adds up the norms of more than two stages in another order than the reference.
    flushes = stages == 2 or not clip or "clip" in paci
    if flushes and draw.random() < 0.2:
        paci["flush_warmup_steps"] = draw.randint(1, 3)
    if draw.random() < 0.2:
        paci["early_receives"] = True
    return {
        "model": model,
        "clip": clip,
        "paci": paci,
        "optimizer": draw.choice(["adamw", "sgd", "groups", "nadam"]),
        "schedules": ["paci", "1f1b"] if flushes else ["paci"],
    }


def _steady(optimizer: str, clip: float) -> str:
    """Another optimizer in the place of SGD that nothing clips: it may diverge, until its norms are not finite."""
    return "adamw" if optimizer == "sgd" and not clip else optimizer


def _drained(script: tuple[str, ...], names: set[str]) -> tuple[str, ...]:
    """The script with a drain before each of these calls."""
    parts = (("drain", action) if action.partition("=")[0] in names else (action,) for action in script)
    return tuple(itertools.chain.from_iterable(parts))


def _script(draw: random.Random, length: int, with_value: dict[str, Any], others: tuple[str, ...]) -> tuple[str, ...]:
    """Calls of which about half train; what has been saved may be loaded, and nothing is saved before it is trained."""
    script = ["train"]
    weights = {"train": _OFTEN, **dict.fromkeys(others, _SOMETIMES), **dict.fromkeys(with_value, _SELDOM)}
    while len(script) < length:
        [name] = draw.choices(list(weights), list(weights.values()))
        if name == "load" and "save" not in script:
            continue
        script.append(name + (with_value[name]() if name in with_value else ""))
    return tuple(script)
