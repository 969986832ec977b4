"""The examination of this machine: what is installed, and whether it is what PACI needs.

A package that is missing is reported and not imported.
"""

from __future__ import annotations

import importlib
import importlib.util
import platform
from collections.abc import Iterator
from importlib import metadata
from typing import NamedTuple

from paci_schedule.errors import PaciError

__all__ = ["Finding", "examine"]

_FRAMEWORKS = {"deepspeed": "deepspeed", "megatron": "megatron-core"}  # adapter -> distribution
_LIBRARIES = ("numpy", "click", "rich", "matplotlib")


class Finding(NamedTuple):
    """The result of one look.

    Attributes:
        name: what was looked at.
        ok: whether it serves.
        detail: its version, or what is wrong and what to do.
        required: False for what PACI can do without; it needs only one of the frameworks.
    """

    name: str
    ok: bool
    detail: str
    required: bool = True


def examine() -> Iterator[Finding]:
    """Look at Python, the libraries, PyTorch with its back ends, and the hooks of each framework that is installed.

    What a framework lacks counts as required only if no other framework is complete.
    """
    supported = platform.python_version_tuple() >= ("3", "10")
    yield Finding("python", supported, platform.python_version())
    for library in _LIBRARIES:
        yield _distribution(library)
    yield from _torch()
    found = {adapter: [*_framework(adapter)] for adapter in _FRAMEWORKS}
    complete = [adapter for adapter, findings in found.items() if all(finding.ok for finding in findings)]
    for findings in found.values():
        yield from (finding._replace(required=finding.ok or not complete) for finding in findings)
    listed = ", ".join(complete)
    yield Finding(
        "a supported framework", bool(complete), listed or "none has all that PACI needs: see the lines above"
    )


def _version(distribution: str) -> str:
    """The version of an installed distribution, or "" where there is none."""
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return ""


def _distribution(name: str) -> Finding:
    version = _version(name)
    return Finding(name, bool(version), version or f"not installed: pip install {name}")


def _torch() -> Iterator[Finding]:
    found = _distribution("torch")
    yield found
    if not found.ok:
        return
    from torch import cuda, distributed

    available = distributed.is_available()
    yield Finding(
        "torch.distributed", available, "available" if available else "this build of torch has none: install another"
    )
    if available:
        yield Finding(
            "gloo", distributed.is_gloo_available(), "for CPU ranks and for ranks that share a GPU", required=False
        )
        yield Finding("nccl", distributed.is_nccl_available(), "for GPU ranks", required=False)
    count = cuda.device_count()
    yield Finding("gpus", count > 0, f"{count} visible", required=False)


def _framework(adapter: str) -> Iterator[Finding]:
    """Whether a framework is installed, and what its adapter finds out about the hooks that it relies on."""
    found = _distribution(_FRAMEWORKS[adapter])
    yield found
    if not found.ok:
        return
    name = f"paci_schedule.adapters.{adapter}"
    try:
        spec = importlib.util.find_spec(name)
    except ModuleNotFoundError:
        spec = None
    if spec is None:
        yield Finding(f"{adapter} adapter", False, f"this build of paci_schedule has no {name}: install one that has")
        return
    try:
        for hook, ok, detail in importlib.import_module(name).probe():
            yield Finding(f"{adapter}: {hook}", ok, detail)
    except (PaciError, ImportError, AttributeError) as error:
        yield Finding(f"{adapter} adapter", False, f"{type(error).__name__}: {error}")
