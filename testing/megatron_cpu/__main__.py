"""``python -m testing.megatron_cpu MODULE ARGUMENTS...``: as ``python -m MODULE``, the CPU playing CUDA.

MEGATRON_CPU_TRACE=PATH records the collectives of every rank.  A job that is not Megatron-LM's writes the number of
iterations done into MEGATRON_CPU_ITERATION.
"""

import contextlib
import importlib
import importlib.metadata
import importlib.util
import json
import os
import runpy
import sys
from collections.abc import Iterator
from pathlib import Path

from testing.collectives import recorded
from testing.megatron_cpu import attention, dispatcher, shim

_HELPERS = "megatron.core.datasets.helpers_cpp"


def build_nothing() -> None:
    """A Megatron-LM checkout compiles when it starts: CUDA kernels (0.16), which the CPU does not call, and a helper of
    its data sets, which lies ready in the megatron-core package."""
    scripts = [argument for argument in sys.argv if argument.endswith(".py") and os.path.isfile(argument)]
    sys.path.insert(0, str(Path(scripts[0]).resolve().parent) if scripts else "")
    try:
        importlib.import_module("megatron.core.datasets.utils").compile_helpers = lambda: None
        attention.install()
        dispatcher.install()
        importlib.import_module("megatron.legacy.fused_kernels").load = lambda args: None
    except ImportError:  # later versions have no such kernels
        pass
    del sys.path[0]
    for file in importlib.metadata.files("megatron-core") or ():
        if file.match("megatron/core/datasets/helpers_cpp*.so"):
            spec = importlib.util.spec_from_file_location(_HELPERS, file.locate())
            helpers = sys.modules[_HELPERS] = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(helpers)


@contextlib.contextmanager
def trace(path: str | None) -> Iterator[None]:
    """Write this rank's collectives to `path`.RANK as JSON: iterations done when it came, name, ranks of the group."""
    seen: list[tuple[int | None, str, list[int]]] = []

    def keep(name: str, ranks: list[int]) -> None:
        job = getattr(sys.modules.get("megatron.training.global_vars"), "_GLOBAL_ARGS", None)
        told = os.environ.get("MEGATRON_CPU_ITERATION")
        seen.append((getattr(job, "curr_iteration", told and int(told)), name, ranks))

    if path is None:
        yield
        return
    with recorded(keep):
        yield
    Path(f"{path}.{os.environ['RANK']}").write_text(json.dumps(seen), encoding="utf-8")


if __name__ == "__main__":
    shim.install()
    here = Path(__file__).resolve().parent
    path = [str(here / "spawned"), str(here.parents[1]), os.environ.get("PYTHONPATH", "")]
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, path))
    sys.argv = sys.argv[1:]
    build_nothing()
    with trace(os.environ.get("MEGATRON_CPU_TRACE")):
        runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
