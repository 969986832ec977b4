"""``python -m integration_tests.megatron_cpu MODULE ARGUMENTS...``: as ``python -m MODULE``, the CPU playing CUDA.

MEGATRON_CPU_TRACE=PATH records the collectives of every rank.
"""

import atexit
import dataclasses
import importlib
import importlib.metadata
import importlib.util
import json
import os
import runpy
import sys
from pathlib import Path

from integration_tests.collectives import record
from integration_tests.megatron_cpu import shim

_HELPERS = "megatron.core.datasets.helpers_cpp"


def build_nothing() -> None:
    """A Megatron-LM checkout compiles when it starts: CUDA kernels (0.16), which the CPU does not call, and a helper of
    its data sets, which lies ready in the megatron-core package."""
    scripts = [argument for argument in sys.argv if argument.endswith(".py") and os.path.isfile(argument)]
    sys.path.insert(0, str(Path(scripts[0]).resolve().parent) if scripts else "")
    try:
        importlib.import_module("megatron.core.datasets.utils").compile_helpers = lambda: None
        importlib.import_module("megatron.legacy.fused_kernels").load = lambda args: None
    except ImportError:  # later versions have no such kernels
        pass
    del sys.path[0]
    for file in importlib.metadata.files("megatron-core") or ():
        if file.match("megatron/core/datasets/helpers_cpp*.so"):
            spec = importlib.util.spec_from_file_location(_HELPERS, file.locate())
            helpers = sys.modules[_HELPERS] = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(helpers)


def trace(path: str) -> None:
    """Write this rank's collectives to `path`.RANK as JSON, each with the iterations that were done when it came."""

    def iteration() -> int | None:
        job = getattr(sys.modules.get("megatron.training.global_vars"), "_GLOBAL_ARGS", None)
        return getattr(job, "curr_iteration", None)

    seen = record(iteration)

    def write() -> None:
        listed = [dataclasses.asdict(each) for each in seen]
        Path(f"{path}.{os.environ['RANK']}").write_text(json.dumps(listed), encoding="utf-8")

    atexit.register(write)


if __name__ == "__main__":
    shim.install()
    here = Path(__file__).resolve().parent
    path = [str(here / "spawned"), str(here.parents[1]), os.environ.get("PYTHONPATH", "")]
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, path))
    sys.argv = sys.argv[1:]
    build_nothing()
    if "MEGATRON_CPU_TRACE" in os.environ:
        trace(os.environ["MEGATRON_CPU_TRACE"])
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
