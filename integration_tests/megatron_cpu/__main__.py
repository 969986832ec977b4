"""``python -m integration_tests.megatron_cpu MODULE ARGUMENTS...``: as ``python -m MODULE``, the CPU playing CUDA."""

import os
import runpy
import sys
from pathlib import Path

from integration_tests.megatron_cpu import shim

if __name__ == "__main__":
    shim.install()
    here = Path(__file__).resolve().parent
    path = [str(here / "spawned"), str(here.parents[1]), os.environ.get("PYTHONPATH", "")]
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, path))
    sys.argv = sys.argv[1:]
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
