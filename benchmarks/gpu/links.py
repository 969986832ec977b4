"""What a link between two stages does: latency, bandwidth, the blocks of its kernels, the memory of a communicator.

On one GPU two ranks speak through the host's network stack, so the times say little about NVLink; the number of blocks
that a kernel takes under each setting does not depend on it.
"""

from __future__ import annotations

import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.profiler import ProfilerActivity, profile

from benchmarks.gpu.place import Place
from testing.ranks import run_ranks

__all__ = ["run"]

_SIZES = {"4 KiB": 1 << 12, "1 MiB": 1 << 20, "16 MiB": 1 << 24}
_SETTINGS: dict[str, dict[str, int]] = {
    "default": {},
    "max_ctas=1": {"max_ctas": 1},
    "max_ctas=4": {"max_ctas": 4},
    "min_ctas=8": {"min_ctas": 8, "max_ctas": 8},
}


def run(place: Place) -> dict[str, Any]:
    """Figures of the first rank."""
    every_channel = {"NCCL_MAX_P2P_NCHANNELS": "32"}  # else one, which is enough for ranks that share a GPU
    figures, _ = run_ranks(_measure, 2, (place.dry,), timeout=place.seconds - 5, env=every_channel)
    return figures


def _measure(dry: bool) -> dict[str, Any]:
    figures: dict[str, Any] = {}
    device = torch.device("cpu" if dry else "cuda")
    ones = torch.ones(4, device=device)
    options = dist.AllreduceOptions()
    options.asyncOp = False
    returned = dist.group.WORLD.allreduce([ones], options)
    figures["a synchronous collective returns"] = "None" if returned is None else "a handle"
    for setting, config in _SETTINGS.items():
        group = _group(config, dry)
        before = 0 if dry else torch.cuda.mem_get_info()[0]
        _exchange(torch.zeros(4, device=device), group)
        if not dry:
            torch.cuda.synchronize()
            figures[f"{setting}, MiB of both ranks' communicator"] = (before - torch.cuda.mem_get_info()[0]) / 2**20
        for name, size in _SIZES.items():
            message = torch.zeros(size, dtype=torch.uint8, device=device)
            figures[f"{setting}, {name}, ms"] = statistics.median(_timed(message, group, dry) for _ in range(7))
        if not dry:
            figures[f"{setting}, kernel's blocks"] = _blocks(message, group)
        if dry:
            break
    return figures


def _group(config: dict[str, int], dry: bool) -> dist.ProcessGroup:
    if dry:
        return dist.new_group([0, 1])
    options = dist.ProcessGroupNCCL.Options(is_high_priority_stream=True)
    for name, value in config.items():
        setattr(options.config, name, value)
    return dist.new_group([0, 1], pg_options=options)


def _exchange(message: torch.Tensor, group: dist.ProcessGroup) -> None:
    if dist.get_rank() == 0:
        dist.send(message, 1, group=group)
    else:
        dist.recv(message, 0, group=group)


def _timed(message: torch.Tensor, group: dist.ProcessGroup, dry: bool) -> float:
    """Milliseconds of one message, as the host sees it."""
    begin = time.perf_counter()
    _exchange(message, group)
    if not dry:
        torch.cuda.synchronize()
    return 1e3 * (time.perf_counter() - begin)


def _blocks(message: torch.Tensor, group: dist.ProcessGroup) -> list[int]:
    """The grids of the kernels that one message takes."""
    with profile(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU]) as profiled:
        _exchange(message, group)
        torch.cuda.synchronize()
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "trace.json")
        profiled.export_chrome_trace(str(file))
        events = json.loads(file.read_text())["traceEvents"]
    return [event["args"]["grid"][0] for event in events if event.get("cat") == "kernel" and "nccl" in event["name"]]
