"""The pretrain_gpt.py of a Megatron-LM checkout, started as users start it, with a tiny model.

On a machine without GPUs `testing.megatron_cpu` helps.
"""

from __future__ import annotations

import contextlib
import os
import re
import shlex
import signal
import subprocess
import sys
import tempfile
import uuid
from collections.abc import Iterator
from pathlib import Path

from testing.ranks import on_gpus

__all__ = ["ROOT", "logged", "pretrained", "surroundings"]

ROOT = Path(__file__).resolve().parents[1]
FURTHER = [path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path]
MODEL = shlex.split("""
    --transformer-impl local --no-persist-layer-norm --no-masked-softmax-fusion --no-gradient-accumulation-fusion
    --no-bias-gelu-fusion --no-bias-dropout-fusion --no-rope-fusion --attention-backend unfused
    --num-layers 4 --hidden-size 32 --num-attention-heads 4 --ffn-hidden-size 64 --seq-length 32
    --max-position-embeddings 32 --micro-batch-size 1 --global-batch-size 3 --lr-decay-style constant
    --attention-dropout 0 --hidden-dropout 0 --tokenizer-type NullTokenizer --vocab-size 127
    --make-vocab-size-divisible-by 1 --log-interval 1 --no-create-attention-mask-in-dataloader --num-workers 0
""")
MADE_UP = ["--mock-data", "--split", "90,5,5"]


def pretrained(
    checkout: str,
    schedule: str | None,
    stages: int,
    *arguments: str,
    trace: Path | None = None,
    script: Path | None = None,
    replicas: int = 1,
    real_data: bool = False,
) -> subprocess.CompletedProcess[str]:
    """Run the script; returns what it wrote, and how it ended.

    Args:
        checkout: of Megatron-LM.
        schedule: of the pipeline; None for Megatron-LM without a word about it.
        stages: of the pipeline.
        arguments: further flags; each may hold spaces between flags and values.
        trace: a file for the collectives of the ranks.
        script: to run in the place of pretrain_gpt.py.
        replicas: how many times as many ranks as stages there are.
        real_data: whether the flags name data.
    """
    flags = [word for argument in arguments for word in argument.split()]
    model = MODEL
    if "--step-batch-size-schedule" in flags:  # which takes no other batch size beside it
        at = model.index("--global-batch-size")
        model = model[:at] + model[at + 2 :]
    module = ["paci_schedule.launch"]
    if not on_gpus(stages * replicas):
        module = ["testing.megatron_cpu", *module]
        flags += ["--distributed-backend", "gloo"]
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        str(stages * replicas),
        "-m",
        *module,
        str(script or f"{checkout}/pretrain_gpt.py"),
        *(["--pipeline-schedule", schedule] if schedule else []),
        "--pipeline-model-parallel-size",
        str(stages),
        *model,
        *([] if real_data else MADE_UP),
        *flags,
    ]
    traced = {"MEGATRON_CPU_TRACE": str(trace)} if trace else {}
    # Into a file: the writer of a rank that was killed lives on, and would keep a pipe open.
    with tempfile.TemporaryFile("w+") as said:
        with surroundings(checkout) as environment:
            ended = subprocess.run(
                command, env=environment | traced, stdout=said, stderr=subprocess.STDOUT, timeout=300, check=False
            )
        said.seek(0)
        return subprocess.CompletedProcess(command, ended.returncode, said.read())


@contextlib.contextmanager
def surroundings(checkout: str) -> Iterator[dict[str, str]]:
    """The environment of the ranks of a job; what they leave behind is ended."""
    mark = uuid.uuid4().hex
    try:
        yield {
            **os.environ,
            "PYTHONPATH": os.pathsep.join([str(ROOT), checkout, *FURTHER]),
            "OMP_NUM_THREADS": "1",
            "PYTHONWARNINGS": "ignore",
            "CUDA_DEVICE_MAX_CONNECTIONS": "1",
            "PACI_TEST_RUN": mark,
        }
    finally:
        _end_what_is_left(mark)


def _end_what_is_left(mark: str) -> None:
    """End the processes that a run has left behind."""
    for environment in Path("/proc").glob("[0-9]*/environ"):
        with contextlib.suppress(OSError):
            if mark.encode() in environment.read_bytes():
                os.kill(int(environment.parent.name), signal.SIGKILL)


def logged(output: str) -> dict[int, tuple[str, ...]]:
    """iteration -> (consumed samples, learning rate, loss, grad norm), as the log says."""
    names = ("consumed samples", "learning rate", "lm loss", "grad norm")
    pattern = r"iteration +(\d+)/ .*" + ".*".join(rf"{name}: +(\S+)" for name in names)
    return {int(found[0]): found[1:] for found in re.findall(pattern, output)}
