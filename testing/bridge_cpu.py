"""What Megatron-Bridge imports at module level without asking whether it is there, for a machine that has none of it.

``python -m testing.megatron_cpu testing.bridge_cpu MODULE ARGUMENTS...`` is as ``python -m MODULE``, on the CPU.
"""

from __future__ import annotations

import runpy
import sys

from testing import stand_ins

_ABSENT = ("transformer_engine", "transformer_engine.pytorch", "nvidia_resiliency_ext.inprocess")
_ABSENT_WITH_ALL_PARTS = ("megatron.energon", "webdataset", "qwen_vl_utils", "timm", "open_clip", "torchvision")


def install() -> None:
    """Give stand-ins to Megatron-Bridge alone: whoever else asks finds nothing, and does without."""
    stand_ins.install("megatron.bridge", _ABSENT, _ABSENT_WITH_ALL_PARTS)


if __name__ == "__main__":
    install()
    sys.argv = sys.argv[1:]
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
