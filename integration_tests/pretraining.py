"""The pretrain_gpt.py of a Megatron-LM checkout, started as users start it, and what it logs and saves.

MEGATRON_LM_CHECKOUT names the checkout; several, separated by ':', are tried one after the other.
"""

import contextlib
import os
import pickle
import re
import shlex
import signal
import subprocess
import sys
import tempfile
import uuid
import warnings
from pathlib import Path
from types import SimpleNamespace

import torch
from torch.distributed.checkpoint import FileSystemReader, load
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from testing.ranks import on_gpus

CHECKOUTS = [path for path in os.environ.get("MEGATRON_LM_CHECKOUT", "").split(os.pathsep) if path]
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


def pretrain(checkout, schedule, stages, *arguments, trace=None, expect=0, script=None, replicas=1, real_data=False):
    """Run the script; returns what it wrote.  `arguments` may hold spaces between flags and values."""
    flags = [word for argument in arguments for word in argument.split()]
    model = MODEL
    if "--step-batch-size-schedule" in flags:  # which takes no other batch size beside it
        at = model.index("--global-batch-size")
        model = model[:at] + model[at + 2 :]
    module = ["paci_schedule.launch"]
    if not on_gpus(stages * replicas):
        module = ["testing.megatron_cpu", *module]
        flags += ["--distributed-backend", "gloo"]
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(ROOT), checkout, *FURTHER]),
        "OMP_NUM_THREADS": "1",
        "PYTHONWARNINGS": "ignore",
        "CUDA_DEVICE_MAX_CONNECTIONS": "1",
        **({"MEGATRON_CPU_TRACE": str(trace)} if trace else {}),
    }
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
    mark = environment["PACI_TEST_RUN"] = uuid.uuid4().hex
    # Into a file: the writer of a rank that was killed lives on, and would keep a pipe open.
    with tempfile.TemporaryFile("w+") as said:
        try:
            ended = subprocess.run(
                command, env=environment, stdout=said, stderr=subprocess.STDOUT, timeout=300, check=False
            )
        finally:
            end_what_is_left(mark)
        said.seek(0)
        output = said.read()
    assert (ended.returncode == 0) == (expect == 0), output[-6000:]
    return output


def end_what_is_left(mark):
    """End the processes that a run has left behind."""
    for environment in Path("/proc").glob("[0-9]*/environ"):
        with contextlib.suppress(OSError):
            if mark.encode() in environment.read_bytes():
                os.kill(int(environment.parent.name), signal.SIGKILL)


def logged(output):
    """iteration -> (consumed samples, learning rate, loss, grad norm), as the log says."""
    names = ("consumed samples", "learning rate", "lm loss", "grad norm")
    pattern = r"iteration +(\d+)/ .*" + ".*".join(rf"{name}: +(\S+)" for name in names)
    return {int(found[0]): found[1:] for found in re.findall(pattern, output)}


def validated(output):
    return re.findall(r"validation loss at (iteration \d+) .*?lm loss value: (\S+)", output)


class Left(pickle.Unpickler):
    """Loads tensors, and leaves out what would need Megatron."""

    def find_class(self, module, name):
        if module.partition(".")[0] in ("megatron", "argparse"):
            return type(name, (), {"__init__": lambda self, *args: None, "__setstate__": lambda self, state: None})
        return super().find_class(module, name)


def weights(folder):
    """name -> tensor, of a rank's checkpoint in Megatron's format "torch"."""
    pickled = SimpleNamespace(__name__="left", Unpickler=Left, load=None)
    saved = torch.load(f"{folder}/model_optim_rng.pt", weights_only=False, pickle_module=pickled)
    return {name: value for name, value in saved["model"].items() if isinstance(value, torch.Tensor)}


def distributed(folder):
    """name -> tensor, of a checkpoint in Megatron's format "torch_dist"."""
    reader = FileSystemReader(folder)
    found = {
        name: torch.zeros(each.size, dtype=each.properties.dtype)
        for name, each in reader.read_metadata().state_dict_metadata.items()
        if isinstance(each, TensorStorageMetadata)
    }
    with warnings.catch_warnings(action="ignore"):  # that one process loads alone
        load(found, storage_reader=reader)
    return found
