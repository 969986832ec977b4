"""DeepSpeed's kernel for communication on the CPU: built before ranks start, by one process that may be given up.

A rank would build it at the first collective, behind a lock in the file system.  A process that is killed meanwhile
leaves the lock, and everybody after it waits for ever.
"""

from __future__ import annotations

import os
import subprocess
import sys

from launch.errors import LaunchError

__all__ = ["build_kernels"]


def build_kernels(timeout: float = 300.0) -> None:
    """Build and load the kernel once, in a process of its own.

    Args:
        timeout: seconds that it may take.

    Raises:
        LaunchError: it took longer.
    """
    command = [sys.executable, "-c", "from deepspeed.comm.torch import build_shm_op; build_shm_op()"]
    environment = {**os.environ, "DS_ACCELERATOR": "cpu", "DS_BUILD_OPS": "0"}
    try:
        subprocess.run(command, env=environment, capture_output=True, check=True, timeout=timeout)
    except subprocess.TimeoutExpired:
        folder = os.environ.get("TORCH_EXTENSIONS_DIR", "~/.cache/torch_extensions")
        raise LaunchError(
            f"DeepSpeed's kernel for communication was not built within {timeout:g} s: if an earlier build was cut "
            f"off, remove deepspeed_shm_comm/lock somewhere below {folder}"
        ) from None
