"""Which frameworks are installed, and the registration of the schedules with each of them."""

from __future__ import annotations

import logging
from collections.abc import Collection
from importlib import import_module

from paci_schedule.adapters.probing import found_in
from paci_schedule.adapters.ranks import is_rank_0
from paci_schedule.errors import ConfigError, UnsupportedError, nearest

__all__ = ["exists", "installed", "register_with"]

logger = logging.getLogger(__name__)

_ADAPTERS = {
    "deepspeed": "deepspeed",
    "megatron": "megatron.core",
    "torch": "torch.distributed.pipelining",
}  # adapter -> the package that it is for


def installed() -> list[str]:
    """The adapters whose framework can be imported; PyTorch's own pipelines, which come with each of them, left out."""
    return [adapter for adapter, package in _ADAPTERS.items() if adapter != "torch" and exists(package)]


def register_with(frameworks: Collection[str]) -> None:
    """Register with these frameworks; with all that are installed and supported, if none is named.

    Raises:
        ConfigError: the name of a framework is unknown.
        UnsupportedError: none is installed, or one that is named, or all, in a version that is not supported.
    """
    for name in frameworks:
        if name not in _ADAPTERS:
            raise ConfigError(f"register({name!r}): unknown; valid are {nearest(str(name), _ADAPTERS)}")
    adapters = frameworks or installed()
    if not adapters:
        raise UnsupportedError(
            "no supported framework is installed: pip install 'paci-schedule[deepspeed]' or 'paci-schedule[megatron]'"
        )
    refused = {adapter: error for adapter in adapters if (error := _unsupported(adapter))}
    supported = [adapter for adapter in adapters if adapter not in refused]
    if refused and (frameworks or not supported):
        raise UnsupportedError("  ".join(map(str, refused.values())))
    for adapter, error in refused.items():
        if is_rank_0():
            logger.warning("a %s job would run its own schedule, as it is not registered: %s", adapter, error)
    for adapter in supported:
        try:
            import_module(f"paci_schedule.adapters.{adapter}").register()
        except UnsupportedError as error:
            others = [other for other in supported if other != adapter]
            way_out = f"  A job that does not use it can say paci_schedule.register({others[0]!r})." if others else ""
            raise UnsupportedError(f"{error}{way_out}") from error


def _unsupported(adapter: str) -> UnsupportedError | None:
    """What is wrong with the adapter's framework; asked before the adapter imports what the framework may lack."""
    try:
        import_module(f"paci_schedule.adapters.{adapter}.hooks").check_installed()
    except UnsupportedError as error:
        return error


def exists(package: str) -> bool:
    """Whether there is such a package; nothing is imported for the answer."""
    return found_in(package) is not None
