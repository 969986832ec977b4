"""The least slack that hides the links of a pipeline that runs in rounds.

Let T be the time of the slowest stage for one micro-batch, t_s that of stage s, and r_l the round trip of link l: what
a message takes there and back.  With k_l rounds of slack on link l, the stages from s to e give each other work in a
circle that takes the sum of their t and of the r between them, and has a round for each stage and each k.  Nobody waits
if no circle takes longer than its rounds do at T each:

    sum of (T - t_j), j = s ... e   +   sum of (k_l T - r_l), l = s ... e - 1   >=   0     for all s <= e

From the first link to the last one each gets the fewest rounds that keep this true for the circles that end behind it.
No other choice needs fewer rounds in all, because a round on an earlier link helps no circle that begins later.
"""

from __future__ import annotations

import math
from itertools import pairwise

from paci_schedule.core.ops import OpKind
from paci_schedule.core.schedules.base import Schedule
from paci_schedule.core.spec import PipelineSpec
from paci_schedule.errors import ConfigError
from paci_schedule.simulate.costs import Costs

__all__ = ["least_slack"]

_ROUNDING = 1e-9


def least_slack(schedule: Schedule, spec: PipelineSpec, costs: Costs) -> tuple[int, ...]:
    """Rounds of slack for each link, as `PipelineSpec.extra_in_flight` takes them; the fewest that hide the links.

    Jitter is left out: the costs are means.

    Args:
        schedule: one that takes slack.
        spec: the pipeline; its own slack does not count.
        costs: what things take.

    Raises:
        ConfigError: the schedule takes no slack, or an op of no time cannot hide a link.
    """
    if "extra_in_flight" not in schedule.options:
        raise ConfigError(f"suggest_slack: {schedule.name} has a fixed number of micro-batches in flight; take paci")
    takes = costs.durations(schedule, spec.stages)
    every = schedule.micro_batches_per_update(spec)
    busy = (takes[OpKind.FORWARD] + takes[OpKind.BACKWARD] + takes[OpKind.STEP] / every).tolist()
    trips = (2 * (costs.latencies(spec.stages) + costs.transfers(spec.stages))).tolist()
    slowest = max(busy)
    if not slowest and any(trips[:-1]):
        raise ConfigError(
            "suggest_slack: the stages take no time, so no slack hides a link; give --forward, --backward"
        )
    rounds: list[int] = []
    room = slowest - busy[0]  # of the circle with the least room that ends at this stage
    for (_, after), trip in zip(pairwise(busy), trips, strict=False):
        own = slowest - after
        missing = trip - room - own
        needed = max(0, math.ceil(missing / slowest - _ROUNDING)) if slowest else 0
        rounds.append(needed)
        room = min(own, room + own + needed * slowest - trip)
    return tuple(rounds)
