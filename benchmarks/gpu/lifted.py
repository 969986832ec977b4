"""Megatron-LM's pretrain_gpt.py under PACI, with refusals lifted: `PACI_LIFTED` names them as in "fp8 cuda_graph_impl".

For `benchmarks.gpu.refused`, which asks whether they are needed; a job of anybody's own keeps them.
"""

from __future__ import annotations

import os
import runpy
import sys
from argparse import Namespace
from collections.abc import Iterable
from importlib import import_module
from pathlib import Path

from paci_schedule.adapters.refusal import Refusal

__all__ = ["without"]

_TABLES = "MODEL", "DDP", "OPTIMIZER", "JOB"
_READERS = "settings", "parsing", "refusals"


def without(table: Iterable[Refusal], names: Iterable[str]) -> tuple[Refusal, ...]:
    """The refusals but for those of these settings."""
    probes = [Namespace(**{name: object()}) for name in names]
    return tuple(refusal for refusal in table if all(refusal.read(probe) is None for probe in probes))


def main() -> None:
    rank = os.environ["RANK"]
    os.environ.update(NCCL_HOSTID=f"paci-{rank}", LOCAL_RANK="0")  # ranks that share a GPU
    names = os.environ.get("PACI_LIFTED", "").split()
    for module in (import_module(f"paci_schedule.adapters.megatron.{reader}") for reader in _READERS):
        for table in _TABLES:
            if hasattr(module, table):
                setattr(module, table, without(getattr(module, table), names))
    checkout = Path(import_module("megatron.training").__file__ or "").parents[2]
    sys.path.insert(0, str(checkout))
    runpy.run_path(str(checkout / "pretrain_gpt.py"), run_name="__main__")


if __name__ == "__main__":
    main()
