"""--inprocess-restart: a job goes on in the same processes, from its newest checkpoint, after a rank has failed.

MEGATRON_LM_CHECKOUT names the checkout, and nvidia-resiliency-ext must be there, which Megatron-LM restarts with.
"""

import contextlib
import socket
import subprocess
import sys
import time
from importlib import import_module
from pathlib import Path

import pytest

from integration_tests.pretraining import CHECKOUTS, logged, pretrain
from paci_schedule.adapters.frameworks import exists
from testing.megatron_lm import MADE_UP, MODEL, surroundings
from testing.ranks import free_port

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not CHECKOUTS, reason="MEGATRON_LM_CHECKOUT names no Megatron-LM checkout"),
    pytest.mark.skipif(not exists("nvidia_resiliency_ext"), reason="nvidia-resiliency-ext is not installed"),
]

JOB = "--lr 1e-2 --min-lr 1e-3 --eval-iters 0 --eval-interval 100 --train-iters 8 --save-interval 3"

# pretrain_gpt.py, with a fault in the fifth iteration, and a look at what is left of the model before.
FAULTY = """
import gc, os, runpy, signal, sys, weakref
from pathlib import Path
from megatron.core.models.gpt import GPTModel
build, forward, built, calls = GPTModel.__init__, GPTModel.forward, [], []
fails = os.environ["RANK"] == {rank!r}  # which a spare rank takes over
def __init__(self, *values, **options):
    gc.collect()
    if built:
        print("models of before that are still there:", sum(each() is not None for each in built), flush=True)
    built.append(weakref.ref(self))
    build(self, *values, **options)
def faulty(self, *values, **options):
    calls.append(0)
    if fails and len(calls) == 14 and len(built) == 1:
        {fate}
    return forward(self, *values, **options)
GPTModel.__init__, GPTModel.forward = __init__, faulty
sys.path[0] = os.path.dirname({script!r})
sys.argv[0] = {script!r}
runpy.run_path({script!r}, run_name="__main__")
"""


@pytest.fixture(scope="module", params=CHECKOUTS)
def uninterrupted(request, tmp_path_factory):
    """The checkout, and the log of the job and of what is resumed from its first checkpoint."""
    asks = Path(request.param, "megatron", "core", "dist_checkpointing", "strategies", "nvrx.py").exists()
    if asks and not hasattr(import_module("nvidia_resiliency_ext"), "__version__"):
        pytest.skip("this Megatron-LM asks nvidia-resiliency-ext for its version, which this one does not tell")
    folder = tmp_path_factory.mktemp("uninterrupted")
    job = f"{JOB} --save {folder}"
    whole = logged(pretrain(request.param, "paci", 2, job))
    (folder / "latest_checkpointed_iteration.txt").write_text("3")
    resumed = logged(pretrain(request.param, "paci", 2, job, f"--load {folder}"))
    assert list(whole) == list(range(1, 9))
    assert list(resumed) == list(range(4, 9))
    assert {n: line for n, line in whole.items() if n > 5} == {n: line for n, line in resumed.items() if n > 5}
    return request.param, {**whole, **resumed}


def free_ports():
    """A port that is free, as are the two after it, where Megatron-LM and what restarts it have stores of their own."""
    while True:
        port = free_port()
        with contextlib.suppress(OSError), contextlib.ExitStack() as held:
            for further in (port + 1, port + 2):
                held.enter_context(socket.socket()).bind(("127.0.0.1", further))
            return port


def restarted(checkout, folder, *, fate, rank, ranks):
    """What such a job wrote, on so many ranks, two of which train.

    Each is started by itself, because torchrun ends all ranks when one of them is gone.
    """
    script = folder / "faulty.py"
    script.write_text(FAULTY.format(rank=str(rank), fate=fate, script=f"{checkout}/pretrain_gpt.py"))
    job = [*JOB.split(), "--save", str(folder), "--load", str(folder), "--paci-timeout", "20"]
    job += ["--inprocess-restart", "--inprocess-granularity", "rank", "--inprocess-active-world-size", "2"]
    command = [sys.executable, "-m", "testing.megatron_cpu", "paci_schedule.launch", str(script)]
    command += ["--pipeline-schedule", "paci", "--pipeline-model-parallel-size", "2", *MODEL, *MADE_UP, *job]
    rendezvous = {
        "TORCH_CPP_LOG_LEVEL": "error",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_ports()),
        "WORLD_SIZE": str(ranks),
        "LOCAL_WORLD_SIZE": str(ranks),
    }
    said = [(folder / f"rank{each}.txt").open("w+") for each in range(ranks)]
    with surroundings(checkout) as environment:
        started = [
            subprocess.Popen(
                [*command, "--distributed-backend", "gloo"],
                env={**environment, **rendezvous, "RANK": str(each), "LOCAL_RANK": str(each)},
                stdout=file,
                stderr=subprocess.STDOUT,
            )
            for each, file in enumerate(said)
        ]
        deadline = time.monotonic() + 240
        codes = [each.wait(deadline - time.monotonic()) for each in started]
    texts = []
    for file in said:
        file.seek(0)
        texts.append(file.read())
        file.close()
    return codes, texts


@pytest.mark.parametrize("rank", [0, 1])
def test_an_error_restarts_the_job_from_its_checkpoint(uninterrupted, tmp_path, rank):
    checkout, expected = uninterrupted
    codes, texts = restarted(checkout, tmp_path, fate="raise RuntimeError('a fault')", rank=rank, ranks=2)
    assert codes == [0, 0], "\n".join(text[-4000:] for text in texts)
    assert logged("".join(texts)) == expected
    for text in texts:
        assert "models of before that are still there: 0" in text


def test_a_spare_rank_takes_the_place_of_one_that_is_killed(uninterrupted, tmp_path):
    checkout, expected = uninterrupted
    codes, texts = restarted(checkout, tmp_path, fate="os.kill(os.getpid(), signal.SIGKILL)", rank=1, ranks=3)
    assert (codes[0], codes[2]) == (0, 0), "\n".join(text[-4000:] for text in texts)
    assert codes[1] != 0
    assert logged("".join(texts)) == expected
