"""Run a function on several ranks: real processes, a rendezvous without free-port races, a deadline, no survivors.

Ranks fork from a server process that has imported torch and DeepSpeed once, so they start in milliseconds and in a
clean state, and compute on the CPU.  The environment's PACI_TEST_BACKEND says what they speak: gloo, by default;
nccl_like, which is gloo with NCCL's habits (`testing.nccl_like`); nccl, with a GPU for every rank, each of
which is spawned instead and has to set its device itself, as a training script does; or nccl_shared, the same with
fewer GPUs than ranks.  NCCL refuses two ranks on one GPU of one host, so there every rank claims a host of its own, and
they speak through the loopback network: it works, and is not supported.
"""

from __future__ import annotations

import datetime
import functools
import gc
import importlib.util
import math
import multiprocessing
import multiprocessing.connection
import os
import pickle
import signal
import socket
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.distributed import TCPStore

from testing import nccl_like

__all__ = ["Outcome", "RankError", "backend", "gather_outcomes", "on_gpus", "run_ranks"]

_ROOT = Path(__file__).parents[1]
_PRELOAD = "testing.preload"
_SWITCH = "PACI_TEST_BACKEND"
_GRACE = 2.0  # seconds that the others get to end by themselves after a rank has failed that should not have


class RankError(Exception):
    """A rank raised, died or overran the deadline."""


@dataclass(frozen=True)
class Outcome:
    """How one rank ended.

    Attributes:
        rank: which one.
        ended: "returned", "raised", "died" (by itself) or "killed" (at the deadline).
        value: what the function returned; None unless it did.
        error: the traceback if it raised, what happened if it died or was killed; empty if it returned.
        raised: class names of the exception and its bases, most specific first; empty unless it raised.
        seconds: from the start of the rank to its end.
        output: what it wrote to stdout and stderr.
    """

    rank: int
    ended: str
    value: Any
    error: str
    raised: tuple[str, ...]
    seconds: float
    output: str


def on_gpus(world_size: int) -> bool:
    """True where NCCL is asked for, and there are GPUs enough for a job this large."""
    needed = {"nccl": world_size, "nccl_shared": 1}.get(os.environ.get(_SWITCH))
    return needed is not None and torch.cuda.device_count() >= needed


def backend(world_size: int) -> str:
    """What the ranks of a job this large speak: "gloo", "nccl_like" or "nccl"."""
    asked = os.environ.get(_SWITCH, "gloo")
    if asked not in ("gloo", nccl_like.BACKEND, "nccl", "nccl_shared"):
        raise ValueError(f"{_SWITCH}={asked}: must be gloo, {nccl_like.BACKEND}, nccl or nccl_shared")
    if asked in ("nccl", "nccl_shared"):
        return "nccl" if on_gpus(world_size) else "gloo"
    return asked


def _shared_gpu(rank: int) -> dict[str, str]:
    """What lets NCCL take a rank on a GPU that has another rank."""
    return {
        "LOCAL_RANK": str(rank % torch.cuda.device_count()),
        "NCCL_HOSTID": f"rank{rank}",
        "NCCL_NET": "Socket",
        "NCCL_SOCKET_IFNAME": "lo",
        "NCCL_IB_DISABLE": "1",
        "NCCL_MNNVL_ENABLE": "0",
        "NCCL_MAX_P2P_NCHANNELS": "1",
    }


def run_ranks(
    target: Callable[..., Any],
    world_size: int,
    args: tuple = (),
    *,
    timeout: float = 120.0,
    env: Mapping[str, str] | None = None,
) -> list[Any]:
    """Run ``target(*args)`` on every rank of a fresh process group and return what each rank returned.

    Args:
        target: a picklable function; `torch.distributed` is initialised when it is called.
        world_size: number of ranks.
        args: picklable arguments, the same for every rank.
        timeout: seconds after which whatever still runs is killed.
        env: environment variables for the ranks, beyond RANK, WORLD_SIZE and the like.

    Raises:
        RankError: with the traceback and the output of the rank that failed first; a death comes before the errors of
            the ranks that it left alone.
    """
    outcomes = _run(target, world_size, args, timeout, env, _GRACE)
    failed = [outcome for outcome in outcomes if outcome.ended != "returned"]
    if failed:
        first = min(failed, key=lambda outcome: (["died", "raised", "killed"].index(outcome.ended), outcome.seconds))
        others = [f"rank {other.rank}: {other.error.splitlines()[-1]}" for other in failed if other is not first]
        raise RankError(
            "\n".join(
                [
                    f"rank {first.rank} of {world_size} failed after {first.seconds:.1f} s:",
                    first.error,
                    "--- its output ---",
                    first.output[-4000:],
                    *others,
                ]
            )
        )
    return [outcome.value for outcome in outcomes]


def gather_outcomes(
    target: Callable[..., Any],
    world_size: int,
    args: tuple = (),
    *,
    timeout: float = 120.0,
    env: Mapping[str, str] | None = None,
    grace: float | None = None,
) -> list[Outcome]:
    """Run ranks that may fail: every rank runs to its end or the deadline, and all are reported.  Else as `run_ranks`.

    Args:
        grace: once a rank has failed, seconds after which the others that still run are killed; None waits for the
            deadline.
    """
    return _run(target, world_size, args, timeout, env, math.inf if grace is None else grace)


@functools.cache
def _fork_context() -> multiprocessing.context.BaseContext:
    os.environ.update(_BASE_ENVIRONMENT)  # the server reads it when it imports torch and DeepSpeed
    if importlib.util.find_spec("deepspeed") is not None:
        _build_kernel()
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([_PRELOAD])
    return context


def _build_kernel(timeout: float = 600.0) -> None:
    """Let a process that may be given up build DeepSpeed's kernel: one that is killed while it builds leaves a lock."""
    command = [sys.executable, "-c", "from deepspeed.comm.torch import build_shm_op; build_shm_op()"]
    try:
        subprocess.run(command, capture_output=True, check=True, timeout=timeout)
    except subprocess.TimeoutExpired:
        folder = os.environ.get("TORCH_EXTENSIONS_DIR", "~/.cache/torch_extensions")
        raise RankError(
            f"DeepSpeed's kernel for the CPU was not built within {timeout:g} s: if an earlier build was cut off, "
            f"remove deepspeed_shm_comm/lock somewhere below {folder}"
        ) from None


_BASE_ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "TORCHINDUCTOR_COMPILE_THREADS": "1",
    "DS_BUILD_OPS": "0",
    "DS_ACCELERATOR": "cpu",
    "PYTHONPATH": os.pathsep.join(filter(None, [str(_ROOT), os.environ.get("PYTHONPATH")])),
}


def _run(target, world_size, args, timeout, env, grace) -> list[Outcome]:
    speak = backend(world_size)
    gpus = speak == "nccl"
    context = multiprocessing.get_context("spawn") if gpus else _fork_context()
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    with tempfile.TemporaryDirectory() as folder:
        started, ends, pipes = time.monotonic(), {}, {}
        processes = []
        for rank in range(world_size):
            Path(folder, str(rank)).touch()  # a rank may be killed before it has begun to write
            reader, writer = context.Pipe(duplex=False)
            settings = {
                **_BASE_ENVIRONMENT,
                "DS_ACCELERATOR": "cuda" if gpus else "cpu",
                "RANK": str(rank),
                "LOCAL_RANK": str(rank),
                "WORLD_SIZE": str(world_size),
                "LOCAL_WORLD_SIZE": str(world_size),
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(store.port),
                **(_shared_gpu(rank) if gpus and torch.cuda.device_count() < world_size else {}),
                **(env or {}),
            }
            process = context.Process(
                target=_rank, args=(target, args, settings, speak, timeout, writer, folder), daemon=True
            )
            process.start()
            writer.close()
            processes.append(process)
            pipes[rank] = reader
        deadline, killed = started + timeout, set()
        while len(ends) < world_size:
            waiting = [rank for rank in range(world_size) if rank not in ends]
            multiprocessing.connection.wait([pipes[rank] for rank in waiting], max(0.0, deadline - time.monotonic()))
            for rank in waiting:
                if pipes[rank].poll():
                    ends[rank] = (_received(pipes[rank]), time.monotonic() - started)
                    if ends[rank][0] is None or ends[rank][0][0] != "returned":
                        deadline = min(deadline, time.monotonic() + grace)
            if time.monotonic() >= deadline:
                for rank in waiting:
                    if rank not in ends:
                        killed.add(rank)
                        processes[rank].kill()
                        ends[rank] = (None, time.monotonic() - started)
        outcomes = []
        for rank, process in enumerate(processes):
            message, seconds = ends[rank]
            if message is None:
                process.join(5.0)
            process.kill()
            process.join()
            pipes[rank].close()
            if message is None:
                message = _killed(timeout, grace) if rank in killed else _died(process.exitcode)
            output = Path(folder, str(rank)).read_text(encoding="utf-8", errors="replace")
            outcomes.append(Outcome(rank, *message, seconds, output))
    return outcomes


def _received(pipe: multiprocessing.connection.Connection) -> tuple | None:
    """What a rank reported; None if it closed the pipe without a word."""
    try:
        return pickle.loads(pipe.recv_bytes())
    except EOFError:
        return None


def _killed(timeout: float, grace: float) -> tuple:
    return "killed", None, f"still running at the deadline ({timeout:g} s, or {grace:g} s after another failed)", ()


def _died(exitcode: int | None) -> tuple:
    name = signal.Signals(-exitcode).name if exitcode and exitcode < 0 else f"exit code {exitcode}"
    return "died", None, f"died without a word ({name})", ()


def _raised(error: BaseException) -> tuple:
    return "raised", None, traceback.format_exc(), tuple(cls.__name__ for cls in type(error).__mro__)


def _rank(target, args, settings, backend, timeout, writer, folder) -> None:
    """The life of one rank, in its own process."""
    os.environ.update(settings)
    rank, world_size = int(settings["RANK"]), int(settings["WORLD_SIZE"])
    with open(Path(folder, str(rank)), "wb", buffering=0) as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    sys.stdout = open(1, "w", buffering=1, closefd=False, encoding="utf-8")  # noqa: SIM115
    sys.stderr = open(2, "w", buffering=1, closefd=False, encoding="utf-8")  # noqa: SIM115
    torch.set_num_threads(1)
    gc.freeze()  # DeepSpeed collects garbage all the time: spare it what was imported
    try:
        if backend == nccl_like.BACKEND:
            nccl_like.install(rank)
        patience = datetime.timedelta(seconds=timeout + 60)  # the parent ends this rank before
        store = TCPStore("127.0.0.1", int(settings["MASTER_PORT"]), world_size, is_master=False, timeout=patience)
        torch.distributed.init_process_group(backend, store=store, rank=rank, world_size=world_size, timeout=patience)
        _meet(store, "connected", rank, world_size)
        message = pickle.dumps(("returned", target(*args), "", ()))
        returned = True
    except BaseException as error:  # whatever it is, the caller shall see it
        message = pickle.dumps(_raised(error))
        returned = False
    sys.stdout.flush()
    sys.stderr.flush()
    writer.send_bytes(message)
    writer.close()
    if returned:
        _meet(store, "returned", rank, world_size)  # the others may still read what this rank has sent
    os._exit(0)  # no teardown of process groups: a dead neighbour must not hold this rank up


def _meet(store: TCPStore, where: str, rank: int, world_size: int) -> None:
    """Wait until every rank has come here."""
    store.set(f"{where} {rank}", b"")
    store.wait([f"{where} {other}" for other in range(world_size)])


def free_port() -> int:
    """A TCP port that nothing listens on right now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
