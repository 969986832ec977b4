"""The least slack that hides the links: an example by hand, and against the simulator for every smaller slack."""

import itertools
import random

import pytest

from paci_schedule import ConfigError, PipelineSpec
from paci_schedule.core.schedules.registry import schedule
from paci_schedule.simulate.costs import Costs
from paci_schedule.simulate.figures import time_per_micro_batch
from paci_schedule.simulate.slack import least_slack

PACI = schedule("paci")


def time(costs, stages, slack, accumulation=4):
    return time_per_micro_batch(
        PACI, PipelineSpec(stages=stages, accumulation=accumulation, extra_in_flight=slack), costs
    )


def test_one_round_at_the_slow_link_of_sixteen_stages_is_enough():
    """F + B = 60 ms.  Link 7 takes 20 ms each way, 40 ms of a round of 60: without slack two rounds of the two stages
    beside it take 2 * 60 + 40, that is 80 ms each."""
    costs = Costs(forward=20, backward=40, latency=[20 if link == 7 else 0 for link in range(15)])
    slack = least_slack(PACI, PipelineSpec(stages=16, accumulation=16), costs)
    assert slack == (0,) * 7 + (1,) + (0,) * 7
    assert time(costs, 16, 0) == pytest.approx(80)
    assert time(costs, 16, slack) == pytest.approx(60)


@pytest.mark.parametrize("seed", range(12))
def test_no_smaller_slack_hides_the_links(seed):
    draw = random.Random(seed)
    stages = draw.choice([2, 3, 4])
    costs = Costs(
        forward=[draw.randint(1, 9) for _ in range(stages)],
        backward=[draw.randint(2, 9) for _ in range(stages)],
        latency=[draw.choice([0, 1, 3, 8, 17]) for _ in range(stages - 1)],
        bandwidth=[draw.choice([1, 2, 5]) for _ in range(stages - 1)],
        message_bytes=draw.choice([0, 4]),
    )
    slowest = max(a + b for a, b in zip(costs.forward, costs.backward, strict=True))
    least = least_slack(PACI, PipelineSpec(stages=stages, accumulation=4), costs)
    assert time(costs, stages, least) == pytest.approx(slowest)
    for total in range(sum(least)):
        for slack in itertools.product(range(total + 1), repeat=stages - 1):
            if sum(slack) == total:
                assert time(costs, stages, slack) > slowest * (1 + 1e-9)


def test_stages_with_time_to_spare_hide_links_by_themselves():
    """The slowest stage takes 12, the others 6: their circle of two rounds has 12 to spare, as the link takes."""
    costs = Costs(forward=[2, 2, 4], backward=[4, 4, 8], latency=[6, 0])
    assert least_slack(PACI, PipelineSpec(stages=3, accumulation=4), costs) == (0, 0)


def test_schedules_without_slack_and_stages_without_time_are_refused():
    spec = PipelineSpec(stages=2, accumulation=2)
    with pytest.raises(ConfigError, match="1f1b has a fixed number"):
        least_slack(schedule("1f1b"), spec, Costs(forward=1, backward=2))
    with pytest.raises(ConfigError, match="take no time"):
        least_slack(PACI, spec, Costs(forward=0, backward=0, latency=1))
