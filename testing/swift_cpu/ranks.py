"""A rank of an ms-swift job, before it runs ms-swift's script: the CPU plays CUDA, and collectives may be recorded."""

import atexit
import os
from contextlib import ExitStack

from testing.megatron_cpu import shim
from testing.megatron_cpu.__main__ import build_nothing, trace
from testing.swift_cpu import local_layers


def begin() -> None:
    """As `python -m testing.megatron_cpu` does it, for a process that is started without."""
    shim.install()
    build_nothing()
    local_layers.install()
    recording = ExitStack()  # not in processes that this one starts, which would write into the same file
    recording.enter_context(trace(os.environ.pop("MEGATRON_CPU_TRACE", None)))
    atexit.register(recording.close)
