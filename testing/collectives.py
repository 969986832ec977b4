"""Recording every collective that a rank starts, where all of them pass, by whatever name it was called."""

import contextlib

import torch.distributed as dist
from torch.distributed.distributed_c10d import ProcessGroup, _world

__all__ = ["MESSAGES", "recorded"]

MESSAGES = {"send", "recv", "recv_anysource"}
QUERIES = {
    "BackendType",
    "_enable_collectives_timing",
    "_end_coalescing",
    "_get_backend",
    "_get_backend_name",
    "_get_sequence_number_for_group",
    "_has_hooks",
    "_id",
    "_pybind11_conduit_v1_",
    "_register_backend",
    "_register_on_completion_hook",
    "_set_default_backend",
    "_set_group_desc",
    "_set_group_name",
    "_set_sequence_number_for_group",
    "_start_coalescing",
    "_wait_for_pending_works",
    "abort",
    "boxed",
    "get_group_store",
    "merge_remote_group",
    "name",
    "rank",
    "set_timeout",
    "shutdown",
    "size",
    "split_group",
    "unbox",
    "use_pg_for_symm_mem_rendezvous",
}
COLLECTIVES = sorted(  # whatever else a group can do, whichever PyTorch it is
    name
    for name, value in vars(ProcessGroup).items()
    if callable(value) and not name.startswith("__") and name not in MESSAGES | QUERIES
)


@contextlib.contextmanager
def recorded(keep):
    """Within it, `keep(name, ranks of the group)` hears of every collective that this rank starts in any group."""
    classes = {ProcessGroup, type(dist.group.WORLD)}  # a backend in Python has methods of its own
    original = [(owner, name, vars(owner)[name]) for owner in classes for name in COLLECTIVES if name in vars(owner)]

    def listening(name, method):
        def heard(group, *args, **kwargs):
            if group in _world.pg_group_ranks:  # else it is what such a backend is made of
                keep(name, sorted(dist.get_process_group_ranks(group)))
            return method(group, *args, **kwargs)

        return heard

    for owner, name, method in original:
        setattr(owner, name, listening(name, method))
    try:
        yield
    finally:
        for owner, name, method in original:
            setattr(owner, name, method)
