"""The line that says, when a job starts, what its schedule is."""

from paci_schedule import PipelineSpec, __version__
from paci_schedule.adapters.options import Options
from paci_schedule.adapters.start_line import start_line
from paci_schedule.core.schedules.registry import schedule


def line(name="paci", stages=5, accumulation=3, clip=0.5, copied_bytes=0, extra_in_flight=0, **options):
    spec = PipelineSpec(stages=stages, accumulation=accumulation, extra_in_flight=extra_in_flight)
    said = start_line(
        schedule(name), spec, Options(**options), framework="DeepSpeed", clip=clip, copied_bytes=copied_bytes
    )
    begin = f"paci_schedule {__version__}: DeepSpeed runs the schedule "
    assert said.startswith(begin)
    assert "\n" not in said
    return said.removeprefix(begin)


def test_it_says_what_paci_does():
    assert line() == (
        '"paci" on P = 5 stages, a = 3 micro-batches an update; drift at most 2 updates; the global norm is clipped to '
        "0.5, with norms of other stages that are up to 2 updates old; no prediction"
    )


def test_slack_raises_the_drift_and_the_age_of_norms():
    said = line(extra_in_flight=4)  # d_0 = 8
    assert "drift at most 3 updates" in said
    assert "up to 3 updates old" in said


def test_it_says_what_the_options_change():
    said = line(
        accumulation=1,
        clip=2.0,
        copied_bytes=3 << 19,
        prediction="every",
        prediction_reach=1.5,
        flush_warmup_steps=1,
    )
    assert "stages, a = 1 micro-batch an update; drift at most 4 updates; " in said
    assert said.endswith(
        "up to 5 updates old; stale forwards run on predicted weights ('every' with a reach of 1.5), which costs stage "
        '0 a copy of its weights, 1.5 MiB; a warm-up of 1 update under "1f1b" comes first'
    )


def test_without_clipping_and_with_clipping_by_stage():
    spec = PipelineSpec(stages=2, accumulation=1)
    by_stage = start_line(schedule("paci"), spec, Options(clip="stage"), framework="Megatron-core", clip=0.25)
    assert "each stage clips to 0.25 by its own norm" in by_stage
    assert "no gradient clipping" in line(clip=0.0)
    assert "clip" not in line(clip=None)


def test_a_flush_has_no_drift_and_one_stage_has_no_bubble():
    assert line("zb-h1").endswith("update; no drift, as every batch ends with a flush")
    alone = line(stages=1)
    assert alone.startswith('"paci" on P = 1 stage, a = 3 micro-batches an update; one stage has no bubble')
    assert "drift" not in alone
