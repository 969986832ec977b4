"""The partition into stages: the best of all that there are, within memory, and the error where nothing fits."""

import itertools
import math
import random

import pytest

from paci_schedule import ConfigError, PipelineSpec
from paci_schedule.plan.layers import Layer
from paci_schedule.plan.partition import Partition, balance, check_bounds, evaluate, memory_of_stages


def memories(stages, memory_limit=None, extra_in_flight=0):
    """Stages that hold so many bytes, with a byte for a parameter."""
    spec = PipelineSpec(stages=stages, accumulation=1, extra_in_flight=extra_in_flight)
    return memory_of_stages(spec, bytes_per_parameter=1, memory_limit=memory_limit)


def layer(forward, backward, **memory):
    return Layer(forward=forward, backward=backward, **memory)


def every_partition(layers, stages):
    for inner in itertools.combinations(range(1, layers), stages - 1):
        yield (0, *inner, layers)


def stage_costs(layers, bounds, in_flight, every=0):
    """Seconds and bytes of every stage, written down a second time from what `evaluate` promises."""
    costs = []
    for stage, (start, stop) in enumerate(itertools.pairwise(bounds)):
        mine, seconds, live, running = layers[start:stop], 0, 0, 0
        for first in range(0, len(mine), every or len(mine)):
            chunk = mine[first : first + (every or len(mine))]
            inside = sum(one.input_bytes + one.saved_bytes for one in chunk)
            seconds += sum(one.forward + one.backward for one in chunk)
            once = max(one.workspace_bytes for one in chunk)
            if every and any(one.parameters for one in chunk):
                seconds += sum(one.forward for one in chunk)
                once += inside - chunk[0].input_bytes
                inside = chunk[0].input_bytes
            live += inside
            running = max(running, once)
        live += mine[0].input_bytes + mine[-1].output_bytes
        state = sum(one.parameters for one in mine if one.tied is None)
        state += sum({one.tied: one.parameters for one in mine if one.tied is not None}.values())
        costs.append((seconds, state + in_flight[stage] * live + running))
    return costs


def best(layers, stages, in_flight, limit=math.inf, every=0):
    """Slowest stage and sum of squares of the best partition that fits, by looking at all; None if none fits."""
    found = []
    for bounds in every_partition(len(layers), stages):
        costs = stage_costs(layers, bounds, in_flight, every)
        if all(size <= limit for _, size in costs):
            found.append((max(took for took, _ in costs), sum(took**2 for took, _ in costs)))
    return min(found, default=None)


def some_layers(seed, count):
    """Layers of coprime costs, without two alike; every third has no parameters, two are tied."""
    draw = random.Random(seed)
    primes = [2, 3, 5, 7, 11, 13, 17, 19, 23, 29, 31, 37, 41, 43, 47, 53, 59, 61, 67, 71, 73, 79, 83, 89, 97]
    return [
        layer(
            *draw.sample(primes, 2),
            input_bytes=draw.choice(primes),
            saved_bytes=5 * draw.choice(primes),
            workspace_bytes=3 * draw.choice(primes),
            output_bytes=draw.choice(primes),
            parameters=0 if at % 3 == 2 else 7 * draw.choice(primes[:9]),
            tied="ends" if at in (1, count - 3) else None,
        )
        for at in range(count)
    ]


@pytest.mark.parametrize(("count", "stages"), [(1, 1), (4, 1), (4, 4), (7, 2), (9, 3), (10, 4), (9, 7), (12, 5)])
@pytest.mark.parametrize("seed", range(6))
def test_the_partition_is_the_best_of_all(count, stages, seed):
    layers = some_layers(seed, count)
    partition = balance(layers, memories(stages))
    check_bounds(partition.bounds, count, stages)
    assert (partition.slowest, sum(took**2 for took in partition.seconds)) == best(layers, stages, [1] * stages)


@pytest.mark.parametrize("every", [0, 1, 2, 3])
@pytest.mark.parametrize("extra", [0, 2, (0, 3, 1)])
def test_the_partition_is_the_best_of_all_that_fit(every, extra):
    stages, results = 4, set()
    in_flight = [memory.in_flight for memory in memories(stages, extra_in_flight=extra)]
    for seed in range(4):
        layers = some_layers(seed, 9)
        peaks = [
            max(size for _, size in stage_costs(layers, partition, in_flight, every))
            for partition in every_partition(9, stages)
        ]
        with pytest.raises(ConfigError, match="no partition keeps to it"):
            balance(layers, memories(stages, min(peaks) - 1, extra), recompute_every=every)
        for limit in sorted(peaks)[::3]:
            partition = balance(layers, memories(stages, limit, extra), recompute_every=every)
            costs = stage_costs(layers, partition.bounds, in_flight, every)
            assert (partition.seconds, partition.peak_bytes) == tuple(zip(*costs, strict=True))
            assert (partition.slowest, sum(took**2 for took in partition.seconds)) == best(
                layers, stages, in_flight, limit, every
            )
            assert max(partition.peak_bytes) <= limit
            results.add((seed, partition.slowest))
    assert len(results) > 2 * 4  # the limits mattered


def test_a_head_that_weighs_more_than_a_block_gets_a_stage_of_its_own():
    """Six blocks of 2 + 5, an embedding of 1 + 2, a head of 7 + 13 seconds, in 3 stages: the head gets its own."""
    layers = [layer(1, 2), *[layer(2, 5)] * 6, layer(7, 13)]
    partition = balance(layers, memories(3))
    assert partition == Partition(bounds=(0, 4, 7, 8), seconds=(24, 21, 20), peak_bytes=(0, 0, 0))
    assert partition.slowest == 24
    assert partition.ideal == pytest.approx(65 / 3)
    assert evaluate(layers, memories(3), [0, 3, 6, 8]).seconds == (17, 21, 27)


def test_ties_go_to_the_partition_whose_other_stages_are_even():
    """A layer of 13 is the slowest stage in any partition; the other four
    layers could be divided 3 | 10, 5 | 8 or 10 | 3.
    """
    layers = [layer(0, 13), layer(1, 2), layer(1, 1), layer(2, 3), layer(1, 2)]
    assert balance(layers, memories(3)).seconds == (13, 5, 8)


def test_early_stages_hold_more_micro_batches():
    """Alike layers, 11 bytes saved by each: with memory for 6 layer-micro-batches the first of 3 stages gets fewer."""
    layers = [layer(2, 3, saved_bytes=11)] * 8
    assert balance(layers, memories(3)).bounds == (0, 2, 5, 8)
    partition = balance(layers, memories(3, 66))
    assert partition == Partition(bounds=(0, 2, 5, 8), seconds=(10, 15, 15), peak_bytes=(66, 66, 33))
    assert balance(layers, memories(3, [33, 66, 66])).bounds == (0, 1, 4, 8)
    with pytest.raises(ConfigError, match="no partition keeps to it"):
        balance(layers, memories(3, 54, extra_in_flight=2))


def test_a_tied_layer_counts_once_in_a_stage_and_in_each_of_two():
    tied, other = layer(1, 2, parameters=100, tied="words"), layer(3, 5, parameters=7)
    assert evaluate([tied, other, tied], memories(1), [0, 3]).peak_bytes == (107,)
    assert evaluate([tied, other, tied], memories(2), [0, 2, 3]).peak_bytes == (107, 100)


def test_recomputation_costs_a_forward_and_keeps_the_first_input_of_a_chunk():
    """Chunks count from the start of a stage; the one without parameters is not recomputed."""
    small = layer(2, 3, input_bytes=1, saved_bytes=10, workspace_bytes=40, output_bytes=5, parameters=1000)
    large = layer(5, 7, input_bytes=2, saved_bytes=20, workspace_bytes=50, output_bytes=4, parameters=100)
    bare = layer(11, 13, input_bytes=3, saved_bytes=30, workspace_bytes=60, output_bytes=6)
    partition = evaluate([small, large, bare, bare, small], memories(2), [0, 4, 5], recompute_every=2)
    assert partition.seconds == (5 + 12 + 2 * 24 + 7, 5 + 2)
    kept = 1 + (33 + 33) + 1 + 6  # a first input, the bare chunk, what came and what went
    assert partition.peak_bytes == (1100 + 2 * kept + (10 + 22 + 50), 1000 + (1 + 1 + 5) + (10 + 40))


def test_what_does_not_fit_is_said_with_the_stage_and_its_need():
    heavy = layer(2, 3, input_bytes=2**20, saved_bytes=3 * 2**20, output_bytes=2**20, parameters=8 * 2**20)
    with pytest.raises(ConfigError) as caught:
        balance([heavy] * 5, memories(2, 34 * 2**20))
    assert str(caught.value) == (
        "memory_limit: no partition keeps to it; in the nearest, [0, 2, 5], stage 0 needs 36.0 MiB of 34.0 MiB, "
        "stage 1 needs 38.0 MiB of 34.0 MiB; "
        "use more stages, smaller micro-batches, recomputation or less extra_in_flight"
    )


@pytest.mark.parametrize("limit", [0, -5, [10, 10, 10], [10], [10, 0], math.nan])
def test_a_malformed_limit_is_refused(limit):
    with pytest.raises(ConfigError, match="must be bytes above 0, or 2 of them, one for each stage"):
        balance([layer(1, 2)] * 3, memories(2, limit))


def test_more_stages_than_layers_are_refused():
    with pytest.raises(ConfigError, match="2 layers for 3 stages: every stage needs at least one; use fewer stages"):
        balance([layer(1, 2)] * 2, memories(3))


@pytest.mark.parametrize(
    "bounds", [[0, 2, 5], [0, 2, 2, 5], [0, 3, 2, 5], [1, 2, 3, 5], [0, 2, 3, 4], [0, 1, 2, 3, 5], []]
)
def test_bounds_that_are_no_partition_are_refused(bounds):
    check_bounds([0, 2, 3, 5], 5, 3)
    with pytest.raises(ConfigError, match=r"5 layers in 3 stages need 4 bounds that rise from 0 to 5"):
        check_bounds(bounds, 5, 3)


@pytest.mark.parametrize("value", [-1, math.nan, math.inf])
@pytest.mark.parametrize("name", ["forward", "backward", "saved_bytes", "parameters"])
def test_a_cost_must_be_finite_and_not_negative(name, value):
    with pytest.raises(ConfigError, match=f"{name}={value}: a layer's cost must be finite and at least 0"):
        Layer(**{"forward": 1.0, "backward": 2.0, name: value})


@pytest.mark.parametrize("every", [-1, 1.5, "2"])
def test_a_malformed_recomputation_is_refused(every):
    with pytest.raises(ConfigError, match=r"recompute_every=.*must be a whole number of layers, 0 for none"):
        balance([layer(1, 2)] * 2, memories(2), recompute_every=every)


def test_a_partition_prints_what_a_person_wants_to_know():
    layers = [layer(0.002, 0.003, parameters=2**20), layer(0.007, 0.011), layer(0.001, 0.002, saved_bytes=2**19)]
    assert str(evaluate(layers, memories(2), [0, 1, 3])) == (
        "partition [0, 1, 3], the slowest stage at 0.619 of the ideal speed\n"
        "  stage 0: layers 0 to 0, 5 ms a micro-batch, 1.0 MiB\n"
        "  stage 1: layers 1 to 2, 21 ms a micro-batch, 0.5 MiB"
    )
