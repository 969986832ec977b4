"""Code written for `torch.cuda` and NCCL, run on a CPU-only PyTorch with gloo.

`install` replaces the parts of torch.cuda that Megatron calls by their CPU equivalents or by nothing, maps the device
"cuda" to the CPU in every torch function (a TorchFunctionMode that stays on), and drops the arguments of
torch.distributed that only NCCL takes.  It is for good: install it in a process of its own.
"""

from __future__ import annotations

import builtins
import contextlib
import functools
import importlib
import os
import time
import types
import typing
from collections import defaultdict
from typing import Any

import torch
import torch.distributed as dist
from torch.overrides import TorchFunctionMode

from testing.megatron_cpu import grouped_gemm_stub, triton_stub

__all__ = ["install"]

_CPU = torch.device("cpu")


def install() -> None:
    """Let the CPU play CUDA in this process.  Idempotent; before Megatron is imported."""
    if getattr(torch.cuda, "is_played_by_the_cpu", False):
        return
    torch.cuda.is_played_by_the_cpu = True
    os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")
    os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
    importlib.import_module("torch._dynamo")  # before patching: its import refuses two names for one function
    torch.compile = lambda function=None, **_: function if callable(function) else (lambda inner: inner)
    if not hasattr(typing, "override"):  # newer Megatron is written for Python 3.12
        typing.override = lambda function: function
    # Without Transformer Engine, megatron-core 0.16.1 leaves this name undefined where it asks whether it is None.
    builtins.te_general_gemm = None  # pyright: ignore[reportAttributeAccessIssue]: it is the point
    triton_stub.install()
    grouped_gemm_stub.install()
    _patch_cuda()
    _patch_distributed()
    torch.nn.Module.cuda = lambda self, device=None: self
    torch._amp_foreach_non_finite_check_and_unscale_ = _unscale
    # The backward runs where the mode is off: on again, or a recomputation inside it would not see the shim.
    engine = torch.autograd._engine_run_backward

    def run_backward(*args: Any, **kwargs: Any) -> Any:
        with _CudaIsCpu():
            return engine(*args, **kwargs)

    torch.autograd._engine_run_backward = run_backward
    _CudaIsCpu().__enter__()


class _CudaIsCpu(TorchFunctionMode):
    """Rewrites devices and answers for tensors that claim to live on a GPU."""

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = dict(kwargs or {})
        if func in (torch.Tensor.cuda, torch.Tensor.pin_memory):
            return args[0]
        if func is torch.Tensor.record_stream:
            return None
        if func is torch.Tensor.type and len(args) == 1 and not kwargs:  # Megatron compares "torch.cuda.FloatTensor"
            return func(*args).replace("torch.", "torch.cuda.", 1)
        if func is torch.device and isinstance(args[0], int):
            args = (_mapped(args[0]),)
        if func is torch.Tensor.to and len(args) > 1:
            args = (args[0], _mapped(args[1]), *args[2:])
        if "device" in kwargs:
            kwargs["device"] = _mapped(kwargs["device"])
        if "pin_memory" in kwargs:
            kwargs["pin_memory"] = False
        return func(*args, **kwargs)


def _mapped(device: Any) -> Any:
    cuda = (
        (isinstance(device, int) and not isinstance(device, bool))
        or (isinstance(device, str) and device.startswith("cuda"))
        or (isinstance(device, torch.device) and device.type == "cuda")
    )
    return _CPU if cuda else device


class _Stream:
    """A stream on which everything is done at once."""

    device = _CPU
    cuda_stream = 0

    def __init__(self, *_: Any, **__: Any) -> None: ...
    def wait_stream(self, stream: Any) -> None: ...
    def wait_event(self, event: Any) -> None: ...
    def synchronize(self) -> None: ...
    def query(self) -> bool:
        return True

    def record_event(self, event: Any = None) -> Any:
        return event or _Event()

    def __enter__(self) -> _Stream:
        return self

    def __exit__(self, *_: Any) -> None: ...


class _Event:
    """An event that has always happened."""

    def __init__(self, *_: Any, **__: Any) -> None:
        self.at = time.perf_counter()

    def record(self, *_: Any) -> None:
        self.at = time.perf_counter()

    def wait(self, *_: Any) -> None: ...
    def synchronize(self) -> None: ...
    def query(self) -> bool:
        return True

    def elapsed_time(self, other: _Event) -> float:
        return 1e3 * (other.at - self.at)


def _patch_cuda() -> None:
    cuda, stream = torch.cuda, _Stream()

    def nothing(*_: Any, **__: Any) -> None: ...

    def zero(*_: Any, **__: Any) -> int:
        return 0

    for name in (
        "synchronize",
        "empty_cache",
        "set_device",
        "init",
        "_lazy_init",
        "ipc_collect",
        "set_stream",
        "reset_peak_memory_stats",
        "reset_max_memory_allocated",
    ):
        setattr(cuda, name, nothing)
    for name in (
        "memory_allocated",
        "max_memory_allocated",
        "memory_reserved",
        "max_memory_reserved",
        "current_device",
        "utilization",
    ):
        setattr(cuda, name, zero)
    cuda.memory_stats = lambda *_, **__: defaultdict(int)
    cuda.is_available = cuda.is_initialized = lambda: True
    cuda.is_bf16_supported = lambda *_, **__: True
    cuda.is_current_stream_capturing = lambda: False
    cuda.device_count = lambda: int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    cuda.get_device_capability = lambda *_: (8, 0)
    cuda.get_device_name = lambda *_: "CPU that plays CUDA"
    cuda.get_device_properties = lambda *_: types.SimpleNamespace(
        total_memory=16 << 30, multi_processor_count=1, major=8, minor=0, name="CPU that plays CUDA", warp_size=32
    )
    cuda.Stream, cuda.Event = _Stream, _Event
    cuda.current_stream = cuda.default_stream = lambda *_: stream
    cuda.stream = lambda *_: contextlib.nullcontext()
    cuda.device = lambda *_: contextlib.nullcontext()
    cuda.default_generators = (torch.default_generator,)
    cuda.manual_seed = cuda.manual_seed_all = lambda seed: torch.default_generator.manual_seed(int(seed)) and None
    cuda.seed = cuda.seed_all = lambda: torch.default_generator.seed() and None
    cuda.initial_seed = torch.initial_seed
    cuda.get_rng_state = cuda.random.get_rng_state = lambda *_, **__: torch.get_rng_state()
    cuda.set_rng_state = cuda.random.set_rng_state = lambda state, *_, **__: torch.set_rng_state(state)
    cuda._lazy_call = lambda callback, **_: callback()
    cuda.nvtx = types.SimpleNamespace(
        range_push=nothing,
        range_pop=nothing,
        mark=nothing,
        range_start=nothing,
        range_end=nothing,
        range=lambda *_, **__: contextlib.nullcontext(),
    )


def _patch_distributed() -> None:
    barrier, init, new_group, gather = dist.barrier, dist.init_process_group, dist.new_group, dist.all_gather

    @functools.wraps(barrier)
    def gloo_barrier(group: Any = None, async_op: bool = False, device_ids: Any = None) -> Any:
        return barrier(group, async_op)

    @functools.wraps(init)
    def gloo_init(backend: Any = None, **kwargs: Any) -> None:
        kwargs.pop("device_id", None)
        init("gloo", **kwargs)

    @functools.wraps(new_group)
    def gloo_group(*args: Any, **kwargs: Any) -> Any:
        kwargs.pop("pg_options", None)
        kwargs.pop("device_id", None)
        if kwargs.get("backend") == "nccl":
            kwargs["backend"] = None  # the default group's
        return new_group(*args, **kwargs)

    @functools.wraps(gather)
    def uneven_gather(tensors: list[Any], tensor: Any, group: Any = None, async_op: bool = False) -> Any:
        """Gloo gathers only tensors of one size; NCCL takes others as a broadcast from each rank."""
        if async_op or all(other.shape == tensors[0].shape for other in tensors):
            return gather(tensors, tensor, group, async_op)
        tensors[dist.get_rank(group)].copy_(tensor)
        for rank, other in enumerate(tensors):
            if other.numel():
                dist.broadcast(other, group=group, group_src=rank)
        return None

    dist.barrier, dist.init_process_group, dist.new_group = gloo_barrier, gloo_init, gloo_group
    dist.all_gather = uneven_gather


@torch.no_grad()
def _unscale(gradients: list[torch.Tensor], found_inf: torch.Tensor, inverse_scale: torch.Tensor) -> None:
    for gradient in gradients:
        if not torch.isfinite(gradient).all():
            found_inf.fill_(1.0)
        gradient.mul_(inverse_scale)
