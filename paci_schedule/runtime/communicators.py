"""The process groups of the links, made in a number of steps that does not grow with the job.

A job of P stages and D replicas has 2 (P - 1) D links, and `new_group` asks all ranks of the job to take part in making
each of them: on NCCL, with a device bound to the default group, each one splits the world's communicator.  But pairs of
stages that share no rank can be made at the same time.  So a rank makes at most one group in each of five steps: with
its whole pipeline, for the announcements; then for either direction with the even pairs of stages (0 and 1, 2 and 3,
...), and with the odd ones.  A rank without a pair takes part in the split without a colour.

The function that torch's public calls share is called directly, because none of these will do, as of torch 2.13:
`split_group` and `new_group(use_local_synchronization=True)` name a group by how many of them a rank holds, which
differs between the two ends, so that gloo never meets and `destroy_process_group` hangs (pytorch issue 190396), and
`new_group(backend="gloo")` makes the ranks outside the group split a communicator that those inside it do not split.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any, cast

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import (
    _get_default_group,
    _get_default_store,
    _new_process_group_helper,
    _process_group_name,
    _world,
)

from paci_schedule.runtime.waiting import patience_of

if TYPE_CHECKING:
    from torch.distributed.distributed_c10d import GroupName

__all__ = ["Pair", "backend_for", "connect", "link_options"]

_CTAS = 4


@dataclass(frozen=True)
class Pair:
    """The groups that this rank has with a neighbour.

    Attributes:
        ranks: global ranks of the two, the earlier stage's first.
        down, up: of these two ranks, for activations and gradients.
        announcements: of the whole pipeline, on the host.
    """

    ranks: tuple[int, ...]
    down: dist.ProcessGroup
    up: dist.ProcessGroup
    announcements: dist.ProcessGroup


def connect(pipelines: Sequence[Sequence[int]], device: torch.device, timeout: timedelta) -> list[Pair]:
    """Make the groups of all links of the job; every rank of the job calls it at the same time.

    Args:
        pipelines: for every pipeline, the global rank of each stage, in stage order; the same on every rank.
        device: where activations and gradients live.
        timeout: of the groups; on NCCL those of the links have more (`patience_of`).

    Returns:
        This rank's pairs, the even one first: if all ranks set theirs up in this order, nobody waits in a circle.
    """
    stages = len(pipelines[0])
    if stages == 1:
        return []
    number = _process_group_name([], False)  # one that no other group has, the same on every rank
    announcements = _step([tuple(ranks) for ranks in pipelines], "gloo", f"{number} paci announcements", timeout)
    backend = backend_for(device)
    patience = patience_of(backend, timeout)
    even, odd = (
        [tuple(ranks[below : below + 2]) for ranks in pipelines for below in range(first, stages - 1, 2)]
        for first in (0, 1)
    )
    steps = [pairs for pairs in (even, odd) if pairs]
    downs = [_step(pairs, backend, f"{number} paci activation link", patience) for pairs in steps]
    ups = [_step(pairs, backend, f"{number} paci gradient link", patience) for pairs in steps]
    assert announcements is not None, "every rank of the job is in a pipeline"
    return [
        Pair(_own(pairs), down, up, announcements)
        for pairs, down, up in zip(steps, downs, ups, strict=True)
        if down is not None and up is not None
    ]


def backend_for(device: torch.device) -> str:
    """The backend that the default group has for tensors on such a device."""
    return dict(part.split(":") for part in dist.get_backend_config().split(","))[device.type]


def link_options(backend: str, timeout: timedelta) -> Any:
    """What a link asks of its backend; None for what the backend does by itself.

    On NCCL a receive that is posted early is a kernel that spins until its message comes.  Its stream has high
    priority, so that it starts in spite of what computes, and it gets at most 4 CTAs, so that it leaves the other
    multiprocessors to what computes: NCCL's own choice is up to 32 on NVSwitch.  `NCCL_MAX_CTAS` overrides it.
    """
    if backend != "nccl":
        return None
    options = dist.ProcessGroupNCCL.Options(is_high_priority_stream=True)
    options._timeout = timeout
    if hasattr(getattr(options, "config", None), "max_ctas"):  # not where torch was built with an NCCL before 2.17
        options.config.max_ctas = _CTAS
    return options


def _own(groups: list[tuple[int, ...]]) -> tuple[int, ...]:
    """The one of the groups that this rank is in; empty if there is none."""
    return next((ranks for ranks in groups if dist.get_rank() in ranks), ())


def _step(groups: list[tuple[int, ...]], backend: str, name: str, timeout: timedelta) -> dist.ProcessGroup | None:
    """Make groups that share no rank, all at once.  Returns this rank's, None if it is in none of them."""
    own = _own(groups)
    if not own and backend != "nccl":
        return None
    members = sorted(own or groups[0])
    group, _ = _new_process_group_helper(
        len(members),
        members.index(dist.get_rank()) if own else None,
        members,
        dist.Backend(backend),
        _get_default_store(),
        cast("GroupName", f"{name} {'-'.join(map(str, members))}"),
        backend_options=link_options(backend, timeout),
        timeout=timeout,
        device_id=_get_default_group().bound_device_id if backend == "nccl" else None,
        group_desc=name,
    )
    if not own:
        return None
    mine = cast("dist.ProcessGroup", group)  # torch gives its mark for outsiders to them only
    _world.pg_group_ranks[mine] = {member: index for index, member in enumerate(members)}
    return mine
