"""What a process holds, and whether it grows."""

from __future__ import annotations

import gc
import os
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import NamedTuple

__all__ = ["Held", "assert_flat", "held"]

_NOISE = 3 << 20  # bytes by which the allocator's pages come and go


class Held(NamedTuple):
    """What this process holds.

    Attributes:
        memory: bytes that are resident.
        files: open file descriptors.
        threads: of the process.
        shared: bytes of /dev/shm that it has mapped.
    """

    memory: int
    files: int
    threads: int
    shared: int


def held() -> Held:
    """What this process holds now, after a collection of garbage."""
    gc.collect()
    own = Path("/proc/self")
    pages = int((own / "statm").read_text().split()[1])
    shared = 0
    for line in (own / "maps").read_text().splitlines():
        if "/dev/shm/" in line:
            begin, end = (int(at, 16) for at in line.split()[0].split("-"))
            shared += end - begin
    files, threads = len(os.listdir(own / "fd")), len(os.listdir(own / "task"))
    return Held(pages * os.sysconf("SC_PAGE_SIZE"), files, threads, shared)


def assert_flat(readings: Sequence[Held], who: str) -> None:
    """Nothing has grown since the warm-up, which is the first third of the readings.

    Counts of files and threads, and shared memory, are never larger afterwards than they were in the warm-up.  Memory,
    which comes and goes by pages, has in the last third a median that is at most 3 MiB above that of the second.
    """
    third = len(readings) // 3
    assert third, "too few readings"
    for name in ("files", "threads", "shared"):
        counts = [getattr(each, name) for each in readings]
        assert max(counts[third:]) <= max(counts[:third]), f"{who}: {name} grew: {counts}"
    second, last = ([each.memory for each in part] for part in (readings[third : 2 * third], readings[-third:]))
    assert median(last) <= median(second) + _NOISE, f"{who}: memory grew: {[each.memory for each in readings]}"
