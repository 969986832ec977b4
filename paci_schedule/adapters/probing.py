"""Looking for the hooks in a framework that an adapter stands on."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
from collections.abc import Collection, Iterable
from importlib.machinery import ModuleSpec, PathFinder
from typing import Any

from paci_schedule.errors import UnsupportedError

__all__ = ["TORCH_HOOKS", "found_in", "look_up", "require"]

_C10D = "torch.distributed.distributed_c10d"
TORCH_HOOKS = {
    f"{_C10D}:_get_default_group": (),
    f"{_C10D}:_get_default_store": (),
    f"{_C10D}:_new_process_group_helper": ("backend_options", "device_id", "group_desc"),
    f"{_C10D}:_process_group_name": ("ranks", "use_hashed_name"),
    **{f"{_C10D}:_world.{table}": () for table in ("pg_map", "pg_names", "pg_group_ranks", "pg_backend_config")},
    "torch.distributed:ProcessGroup._get_backend": (),
    "torch.distributed:ProcessGroup._device_types": (),
    "torch.autograd:_unsafe_preserve_version_counter": (),
    "torch:_foreach_mul": (),
    "torch:_foreach_copy_": (),
}
"""What `paci_schedule.runtime` and `predict` use of torch that is no public name: hook -> parameters it must take."""


def require(found: Iterable[tuple[str, bool, str]], refused: str) -> None:
    """Raises UnsupportedError, `refused` and then what is missing of `found` (name, whether it is there, detail)."""
    missing = [f"{name}: {detail}" for name, there, detail in found if not there]
    if missing:
        raise UnsupportedError(f"{refused}.  Missing: {'; '.join(missing)}")


def found_in(package: str) -> str | None:
    """The folder or file that `package` would be imported from; None if there is none.  Nothing is imported."""
    name, *parts = package.split(".")
    spec: ModuleSpec | None = importlib.util.find_spec(name)
    for part in parts:
        name = f"{name}.{part}"
        places = None if spec is None else spec.submodule_search_locations
        spec = None if places is None else PathFinder.find_spec(name, list(places))
    if spec is None:
        return None
    return next(iter(spec.submodule_search_locations or ()), spec.origin)


def look_up(name: str, parameters: Collection[str] = ()) -> tuple[str, bool, str]:
    """Whether ``module:path.to.attribute`` exists and, if it is callable, still takes `parameters`.

    Returns:
        name, whether it is there, and what was found.
    """
    module, _, path = name.partition(":")
    try:
        target: Any = importlib.import_module(module)
        for part in path.split("."):
            target = getattr(target, part)
        lost = sorted(set(parameters) - set(inspect.signature(target).parameters)) if parameters else []
    except Exception as error:  # what lies there may be anything, and fail in any way while it is imported
        return name, False, f"{type(error).__name__}: {error}"
    return name, not lost, f"lost its parameters {lost}" if lost else "there"
