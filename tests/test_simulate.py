"""The simulator against closed forms, against arithmetic by hand, and against its own wavefront form."""

import random

import numpy as np
import pytest

from paci_schedule import ConfigError, PipelineSpec
from paci_schedule.core.drift import DriftMeter, drift_histogram, drift_of
from paci_schedule.core.ops import OpKind
from paci_schedule.core.schedules.registry import SCHEDULES, schedule
from paci_schedule.simulate.costs import Costs
from paci_schedule.simulate.execute import simulate
from paci_schedule.simulate.figures import figures_of, time_per_micro_batch
from paci_schedule.simulate.steady import run, steady_state
from paci_schedule.simulate.timeline import busy, peak_in_flight
from paci_schedule.simulate.wavefront import sweep

COSTS = [(1.0, 1.0, 1.0), (2.0, 3.0, 5.0), (7.0, 5.0, 3.0), (11.0, 13.0, 2.0), (3.0, 2.0, 2.0), (1.0, 9.0, 4.0)]
SHAPES = [(2, 3), (3, 5), (4, 8), (5, 9), (8, 15), (8, 24)]


def figures(name, stages, micro_batches, batches=None, extra=0, options=None, **costs):
    spec = PipelineSpec(stages=stages, accumulation=micro_batches, extra_in_flight=extra)
    return figures_of(schedule(name, **options or {}), spec, Costs(**costs), batches)


# ---- closed forms ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["gpipe", "1f1b"])
@pytest.mark.parametrize(("stages", "micro_batches"), [*SHAPES, (4, 2), (8, 1), (1, 3)])
def test_flushed_bubble(name, stages, micro_batches):
    found = figures(name, stages, micro_batches, forward=2.0, backward=5.0)
    assert found.bubble == (stages - 1) * (2 + 5)
    assert found.bubble_share == pytest.approx((stages - 1) / (micro_batches + stages - 1), abs=1e-12)
    assert found.makespan == (micro_batches + stages - 1) * (2 + 5)
    assert found.time_per_micro_batch == pytest.approx(found.makespan / micro_batches)
    held = micro_batches if name == "gpipe" else None
    assert found.peak_in_flight == [held or min(stages - stage, micro_batches) for stage in range(stages)]
    assert found.max_drift == [0] * stages


@pytest.mark.parametrize(("stages", "groups"), [(2, 1), (2, 3), (4, 2), (5, 3)])
@pytest.mark.parametrize("chunks", [2, 3, 4])
def test_interleaved_bubble(stages, groups, chunks):
    found = figures(
        "interleaved-1f1b",
        stages,
        stages * groups,
        options={"chunks": chunks},
        forward=3.0 * chunks,
        backward=5.0 * chunks,
    )
    assert found.bubble == (stages - 1) * (3 + 5)  # (P-1)(F+B)/v
    if groups > 1:
        assert found.peak_in_flight[0] == pytest.approx(stages + (stages - 1) / chunks)


@pytest.mark.parametrize(("forward", "backward", "weight"), COSTS)
@pytest.mark.parametrize(("stages", "micro_batches"), SHAPES)
def test_zero_bubble_h1(forward, backward, weight, stages, micro_batches):
    found = figures("zb-h1", stages, micro_batches, forward=forward, backward=backward, weight=weight)
    assert found.bubble == (stages - 1) * (backward + max(0, forward - weight))
    if weight <= forward:
        assert found.bubble == (stages - 1) * (forward + backward - weight)  # arXiv 2401.10241, table 1
    assert found.peak_in_flight == [min(stages, micro_batches)] * stages


@pytest.mark.parametrize(("forward", "backward", "weight"), COSTS)
@pytest.mark.parametrize(("stages", "micro_batches"), SHAPES)
def test_zero_bubble_h2(forward, backward, weight, stages, micro_batches):
    assert micro_batches >= 2 * stages - 1
    found = figures("zb-h2", stages, micro_batches, forward=forward, backward=backward, weight=weight)
    assert found.bubble == (stages - 1) * max(0, forward + backward - 2 * weight, backward - forward)
    assert found.peak_in_flight == [2 * stages - 1] * stages


@pytest.mark.parametrize(("stages", "micro_batches"), [(2, 4), (3, 6), (4, 8), (4, 13), (8, 24)])
def test_zero_bubble_v(stages, micro_batches):
    found = figures("zb-v", stages, micro_batches, forward=3.0, backward=3.0, weight=3.0)
    assert found.bubble == 0
    assert found.time_per_micro_batch == 9
    assert found.peak_in_flight == [stages] * stages


@pytest.mark.parametrize("name", ["paci", "pipedream", "pipedream-2bw"])
@pytest.mark.parametrize(("stages", "micro_batches"), [*SHAPES, (4, 3)])
def test_streams_have_no_bubble(name, stages, micro_batches):
    found = figures(name, stages, micro_batches, forward=2.0, backward=5.0)
    assert (found.bubble, found.bubble_share, found.waiting_share) == (0, 0, [0] * stages)
    assert found.time_per_micro_batch == 7
    assert found.peak_in_flight == [stages - stage for stage in range(stages)]
    assert found.makespan == (micro_batches + stages - 1) * 7  # one batch alone fills and drains as 1F1B


def test_ideal_speed_ups():
    """F = B / 2 and 8 stages: (a + 7) / a."""
    for micro_batches, ratio in ((8, 1.875), (16, 1.4375)):
        times = [
            time_per_micro_batch(
                schedule(name), PipelineSpec(stages=8, accumulation=micro_batches), Costs(forward=40.0, backward=80.0)
            )
            for name in ("1f1b", "paci")
        ]
        assert times[0] / times[1] == ratio


@pytest.mark.parametrize("name", SCHEDULES)
def test_the_whole_backward_is_the_sum_of_its_halves(name):
    split = figures(name, 4, 8, forward=2.0, backward=3.0, weight=3.0)
    assert figures(name, 4, 8, forward=2.0, backward=6.0) == split


# ---- what costs do --------------------------------------------------------------------------------------------------


def test_steps_are_paid_once_an_update():
    assert figures("paci", 4, 5, forward=2.0, backward=3.0, step=1.0).time_per_micro_batch == pytest.approx(5.2)
    assert figures("pipedream", 4, 5, forward=2.0, backward=3.0, step=1.0).time_per_micro_batch == pytest.approx(6)
    assert figures("1f1b", 4, 5, forward=2.0, backward=3.0, step=1.0).time_per_micro_batch == pytest.approx(41 / 5)


def test_without_slack_every_micro_batch_pays_the_round_trip_and_extra_in_flight_hides_it():
    """One link of latency 1 between two stages: F and B of a micro-batch wait for it once each way."""
    base = figures("paci", 2, 4, forward=2.0, backward=5.0, latency=1.0).time_per_micro_batch
    assert base == pytest.approx((2 + 5 + 2 + 5 + 2) / 2)  # cycle of two live micro-batches at stage 0
    assert figures("paci", 2, 4, extra=1, forward=2.0, backward=5.0, latency=1.0).time_per_micro_batch == 7


@pytest.mark.parametrize(("stages", "micro_batches"), [(3, 11), (4, 2), (4, 7), (5, 4), (6, 16), (64, 16)])
def test_links_cost_a_stream_their_latency_on_the_way_down_and_up_once_in_as_many_micro_batches_as_stages(
    stages, micro_batches
):
    """The pipe repeats itself every P micro-batches, whatever a batch is: no whole number of batches shows it."""
    for batches in (None, 3, 8):
        found = figures("paci", stages, micro_batches, batches, forward=1.0, backward=2.0, latency=0.5)
        assert found.time_per_micro_batch == pytest.approx(3 + (stages - 1) / stages, rel=1e-9)


@pytest.mark.parametrize("seed", range(30))
def test_the_steady_state_is_that_of_a_long_run(seed):
    draw = random.Random(seed)
    name = draw.choice(["paci", "paci", "pipedream", "pipedream-2bw", "1f1b", "zb-h1"])
    stages = draw.randint(1, 6)
    micro_batches = draw.randint(stages, 9)
    spec = PipelineSpec(
        stages=stages, accumulation=micro_batches, extra_in_flight=draw.choice([0, 1, 3]) * (name == "paci")
    )
    costs = Costs(
        forward=[draw.choice([1.0, 2.0, 2.5]) for _ in range(stages)],
        backward=draw.choice([2.0, 3.0]),
        step=draw.choice([0.0, 0.7]),
        latency=draw.choice([0.0, 0.3, 1.0]),
        sync=draw.choice([None, None, 0.2]),
    )
    half = 250
    starts = run(schedule(name), spec, costs, (2 * half + 1) * micro_batches, half * micro_batches).starts
    expected = (starts[2] - starts[1]) / (half * micro_batches)
    found = steady_state(schedule(name), spec, costs).period
    assert found == pytest.approx(expected, rel=1 / half / 2)


def test_a_straggler_sets_the_pace_of_all():
    found = figures("paci", 4, 8, forward=[2.0, 2.0, 3.0, 2.0], backward=5.0)
    assert found.time_per_micro_batch == pytest.approx(8)
    assert found.waiting_share == pytest.approx([1 / 8, 1 / 8, 0, 1 / 8], abs=1e-12)


def test_bandwidth_occupies_the_link():
    spec, costs = PipelineSpec(stages=2, accumulation=4), {"forward": 1.0, "backward": 1.0}
    slow = simulate(schedule("gpipe"), spec, Costs(**costs, bandwidth=2.0, message_bytes=10.0, latency=3.0))
    starts = [span.start for span in slow.rows[1] if span.op.kind is OpKind.FORWARD]
    assert starts == [1 + 5 * (number + 1) + 3 for number in range(4)]  # sent after F0, one transfer after the other


def test_a_synchronisation_every_call_is_a_flush_in_disguise():
    free = figures("paci", 4, 4, forward=40.0, backward=80.0)
    synced = figures("paci", 4, 4, forward=40.0, backward=80.0, sync=0.0)
    flushed = figures("1f1b", 4, 4, forward=40.0, backward=80.0)
    assert free.time_per_micro_batch == 120
    assert free.time_per_micro_batch < synced.time_per_micro_batch <= flushed.time_per_micro_batch


def test_a_synchronisation_holds_every_stage_for_the_slowest():
    spec = PipelineSpec(stages=2, accumulation=1)
    rows = simulate(schedule("1f1b"), spec, Costs(forward=1.0, backward=2.0, sync=10.0), 2).rows
    first = max(span.end for row in rows for span in row if span.op.index == 0)
    assert first == 6
    assert min(span.start for row in rows for span in row if span.op.index == 1) == 16


def test_jitter_is_seeded_keeps_the_mean_and_differs_between_ops():
    spec, costs = PipelineSpec(stages=3, accumulation=400), {"forward": 2.0, "backward": 3.0, "jitter": 0.1}
    runs = [simulate(schedule("1f1b"), spec, Costs(**costs, seed=seed)) for seed in (1, 1, 2)]
    assert runs[0].rows == runs[1].rows
    assert runs[0].rows != runs[2].rows
    lengths = np.array([span.end - span.start for span in runs[0].rows[1] if span.op.kind is OpKind.BACKWARD])
    assert len(set(lengths)) == 400
    assert lengths.mean() == pytest.approx(3, rel=0.02)
    assert lengths.std() == pytest.approx(0.3, rel=0.15)


def test_the_report_counts_activations_versions_and_stashes():
    spec = PipelineSpec(stages=3, accumulation=4)
    found = figures_of(
        schedule("pipedream"), spec, Costs(forward=1.0, backward=2.0), activation_bytes=10.0, weight_bytes=7.0
    )
    assert found.activation_bytes == [30, 20, 10]
    assert found.weight_versions == [3, 2, 1]
    assert (found.weight_bytes, found.stash_bytes) == ([7, 7, 7], [14, 7, 0])


def test_figures_of_the_batches_asked_for():
    few = figures("paci", 8, 1, batches=3, forward=1.0, backward=2.0)
    assert few.peak_in_flight == [3, 3, 3, 3, 3, 3, 2, 1]
    assert few.max_drift == [2, 2, 2, 2, 2, 2, 1, 0]
    assert few.makespan == (3 + 7) * 3
    assert few.drift_histogram[0] == {0: 1, 1: 1, 2: 1}
    assert figures("paci", 8, 1, forward=1.0, backward=2.0).max_drift == [7, 6, 5, 4, 3, 2, 1, 0]


# ---- the wavefronts say what the general simulator says -------------------------------------------------------------


@pytest.mark.parametrize("seed", range(60))
def test_wavefronts_equal_the_general_simulator(seed):
    draw = random.Random(seed)
    name = draw.choice(["paci", "pipedream", "pipedream-2bw"])
    stages, batches = draw.randint(1, 9), draw.randint(1, 7)
    extra = draw.choice([0, 0, 1, 2, 7, 20]) if name == "paci" else 0
    accumulation = draw.randint(1, 9) if name == "paci" else stages + draw.randint(0, 5)
    spec = PipelineSpec(stages=stages, accumulation=accumulation, extra_in_flight=extra)

    def each(count):
        return [draw.uniform(1, 5) for _ in range(count)]

    costs = Costs(
        forward=each(stages),
        backward=each(stages),
        step=draw.choice([0.0, each(stages)]),
        latency=each(stages - 1),
        bandwidth=3.0,
        message_bytes=draw.choice([0.0, 4.0]),
        jitter=draw.choice([0.0, 0.3]),
        seed=seed,
    )
    every = draw.randint(1, batches)
    whole = simulate(schedule(name), spec, costs, batches)
    marks = sweep(schedule(name), spec, costs, batches * accumulation, every * accumulation)
    for stage, row in enumerate(whole.rows):
        assert row[0].start == marks.start[stage]
        assert row[-1].end == marks.end[stage]
        assert busy(row) == pytest.approx(marks.busy[stage], rel=1e-12)
        marked = range(0, batches, every)
        assert [whole.call(stage, at)[0].start for at in marked] == marks.starts[:, stage].tolist()
        spent = [busy(row[: whole.calls[stage][at - 1] if at else 0]) for at in marked]
        assert marks.busy_before[:, stage] == pytest.approx(spent, rel=1e-9, abs=1e-9)


def test_wavefronts_reach_past_a_block_of_jitter():
    spec = PipelineSpec(stages=5, accumulation=700)
    costs = Costs(forward=1.0, backward=2.0, jitter=0.2, seed=3)
    marks = sweep(schedule("paci"), spec, costs, 1400, 700)
    assert marks.end.tolist() == [row[-1].end for row in simulate(schedule("paci"), spec, costs, 2).rows]


def test_wavefronts_refuse_synchronisations():
    with pytest.raises(ConfigError, match=r"sync=1.0: .*use simulate"):
        sweep(
            schedule("paci"),
            PipelineSpec(stages=2, accumulation=2),
            Costs(forward=1.0, backward=1.0, sync=1.0),
            2,
            2,
        )


# ---- counts ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stages", [1, 2, 3, 5, 8])
@pytest.mark.parametrize("accumulation", [1, 2, 3, 4, 7, 20])
@pytest.mark.parametrize("extra", [0, 1, 5])
def test_the_drift_histogram_is_drift_summed_up(stages, accumulation, extra):
    spec = PipelineSpec(stages=stages, accumulation=accumulation, extra_in_flight=extra)
    for stage in range(stages):
        for batches in (1, 2, 5):
            counted = DriftMeter().record_all(schedule("paci").stream(spec, stage, batches)).histogram
            assert drift_histogram(spec, stage, batches * accumulation) == counted
        assert drift_histogram(spec, stage, 13).total() == 13
        assert max(drift_histogram(spec, stage, 13)) == max(drift_of(spec, stage, index) for index in range(13))


@pytest.mark.parametrize("name", SCHEDULES)
def test_reported_peaks_are_those_of_the_ops(name):
    spec = PipelineSpec(stages=4, accumulation=8)
    chosen, found = schedule(name), figures(name, 4, 8, batches=3, forward=1.0, backward=2.0)
    for stage in range(4):
        ops = list(chosen.stream(spec, stage, 3))
        assert found.peak_in_flight[stage] == peak_in_flight(ops) / chosen.chunks
        assert peak_in_flight(ops) == chosen.in_flight(spec, stage)
        assert found.drift_histogram[stage].keys() == DriftMeter().record_all(ops).histogram.keys()


# ---- bad input ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("costs", "message"),
    [
        ({"forward": -1.0}, r"forward=-1.0: must be a number from 0"),
        ({"forward": [1.0, float("nan"), 1.0]}, r"forward=nan"),
        ({"forward": [1.0, 2.0]}, r"2 values for 3 stages"),
        ({"latency": [1.0]}, r"1 values for the 2 links"),
        ({"bandwidth": 0.0}, r"bandwidth=0"),
        ({"jitter": float("inf")}, r"jitter=inf"),
        ({"jitter": 1e200}, r"jitter=1e\+200: must be a number from 0 to 1e\+100"),
    ],
)
def test_bad_costs_are_refused(costs, message):
    with pytest.raises(ConfigError, match=message):
        figures("1f1b", 3, 4, **{"forward": 1.0, "backward": 1.0} | costs)


def test_sizes_beyond_memory_are_refused():
    costs, endless = Costs(forward=1.0, backward=1.0), PipelineSpec(stages=2, accumulation=2, extra_in_flight=10**9)
    with pytest.raises(ConfigError, match=r"the general simulator holds"):
        simulate(schedule("1f1b"), PipelineSpec(stages=1024, accumulation=100_000), costs)
    for spec in (endless, PipelineSpec(stages=10_001, accumulation=2)):
        with pytest.raises(ConfigError, match="at most 10000 stages and 1000000 micro-batches"):
            figures_of(schedule("paci"), spec, costs)
    with pytest.raises(ConfigError, match="weight_bytes=nan"):
        figures_of(schedule("1f1b"), PipelineSpec(stages=2, accumulation=2), costs, weight_bytes=float("nan"))
