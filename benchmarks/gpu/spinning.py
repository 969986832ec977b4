"""What posted receives cost the compute that runs beside them.

A receive of NCCL that has been posted is a kernel that spins on as many streaming multiprocessors as the connection
has channels, until its message is there.  Here kernels of 2 to 32 blocks spin, as wide as NCCL's, while a transformer
block runs forward and backward on the compute stream.
"""

from __future__ import annotations

import statistics
from typing import Any

import torch
from torch import nn

from benchmarks.gpu.place import Place, Unavailable

__all__ = ["run"]

_BLOCKS = (2, 4, 8, 16, 32)
_THREADS = 640  # of a block, as NCCL's widest point-to-point kernels have
_SHARED = 40 * 1024  # bytes of shared memory that such a block holds, as far as no configuration is needed for it
_KERNEL = """
extern "C" __global__ void spin(const int* stop, int most) {
    extern __shared__ char held[];
    long long begin = clock64();
    if (threadIdx.x == 0) held[0] = 0;
    while (*(volatile const int*)stop == 0 && ((clock64() - begin) >> 20) < most) { }
}
"""


def run(place: Place) -> dict[str, Any]:
    """How many times longer forward and backward take beside spinning kernels, by the number of their blocks."""
    width, tokens, turns = (64, 32, 2) if place.dry else (2048, 4096, 15)
    block = nn.TransformerEncoderLayer(width, 16, 4 * width, dropout=0.0, batch_first=True, device=place.device)
    values = torch.randn(1, tokens, width, device=place.device)

    def compute() -> None:
        with torch.autocast(place.device.type, dtype=torch.bfloat16):
            loss = block(values).float().square().mean()
        loss.backward()

    for _ in range(3):
        compute()
    place.require_gpu("kernels that spin beside the compute")
    spin = _spinner()
    alone, beside = [], {blocks: [] for blocks in _BLOCKS}
    for _ in range(turns):
        alone.append(_milliseconds(compute))
        for blocks, times in beside.items():
            with spin(blocks):
                times.append(_milliseconds(compute))
    median = statistics.median(alone)
    return {
        "multiprocessors": torch.cuda.get_device_properties(place.device).multi_processor_count,
        "milliseconds alone": median,
        **{f"ratio beside {blocks} blocks": statistics.median(times) / median for blocks, times in beside.items()},
    }


def _spinner() -> Any:
    """A context manager factory: within it, so many blocks spin on a stream of their own."""
    try:
        kernel = torch.cuda._compile_kernel(_KERNEL, "spin")
    except (AttributeError, OSError) as error:
        raise Unavailable(f"PyTorch {torch.__version__} compiles no kernel here ({error}); 2.9 and newer do") from None
    stream, setter = torch.cuda.Stream(), torch.cuda.Stream()
    flag = torch.zeros(1, dtype=torch.int32, device="cuda")
    most = 20_000  # times 2^20 clock cycles: about ten seconds, should nobody stop the kernel

    class Spinning:
        def __init__(self, blocks: int) -> None:
            self._blocks = blocks

        def __enter__(self) -> None:
            flag.zero_()
            torch.cuda.synchronize()
            with torch.cuda.stream(stream):
                kernel(
                    grid=(self._blocks, 1, 1),
                    block=(_THREADS, 1, 1),
                    args=[flag, most],
                    shared_mem=_SHARED,
                    stream=stream,
                )

        def __exit__(self, *_: object) -> None:
            with torch.cuda.stream(setter):
                flag.fill_(1)
            torch.cuda.synchronize()

    return Spinning


def _milliseconds(compute: Any) -> float:
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    begin.record()
    compute()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end)
