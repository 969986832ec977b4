"""A job that starts: it says that its schedule is on, and a schedule that is asked for never stays off unnoticed."""

import functools
from unittest import mock

from testing import deepspeed_job, jobs, ranks
from testing.jobs import Job

EVERY = {"prediction": "every", "prediction_reach": 1.5}
STARTS = [
    (
        Job(stages=2, accumulation=3, script=(), clip=0.5),
        '"paci" on P = 2 stages, a = 3 micro-batches an update; drift at most 1 update; the global norm is clipped to '
        "0.5, with norms of other stages that are up to 1 update old; no prediction",
    ),
    (
        Job(stages=2, accumulation=1, script=(), config={"paci": EVERY}),
        '"paci" on P = 2 stages, a = 1 micro-batch an update; drift at most 1 update; no gradient clipping; stale '
        "forwards run on predicted weights ('every' with a reach of 1.5), which costs stage 0 a copy of its weights, ",
    ),
    (
        Job(stages=2, accumulation=2, script=(), precision="bf16", config={"paci": EVERY}),
        "no gradient clipping; stale forwards run on predicted weights ('every' with a reach of 1.5)\n",
    ),
    (
        Job(stages=2, accumulation=2, script=(), config={"pipeline_schedule": "zb-h1"}),
        '"zb-h1" on P = 2 stages, a = 2 micro-batches an update; no drift, as every batch ends with a flush\n',
    ),
]


def start_all(jobs):
    for job in jobs:
        deepspeed_job.build(job)


def test_rank_0_says_in_one_line_what_runs():
    first, last = ranks.gather_outcomes(start_all, 2, ([job for job, _ in STARTS],))
    assert (first.ended, last.ended) == ("returned", "returned"), first.error or last.error
    told = [line for line in first.output.splitlines(keepends=True) if line.startswith("paci_schedule")]
    for line, (_, says) in zip(told, STARTS, strict=True):
        assert says in line
    assert "paci_schedule" not in last.output


def test_one_stage_says_that_it_needs_no_schedule():
    [only] = ranks.gather_outcomes(start_all, 1, ([Job(stages=1, accumulation=2, script=())],))
    assert only.ended == "returned", only.error
    assert '"paci" on P = 1 stage, a = 2 micro-batches an update; one stage has no bubble' in only.output


# ---- a schedule that is asked for and stays off ---------------------------------------------------------------------

JOB = Job(stages=2, accumulation=3, script=())


def arguments(job, config=None):
    """What `deepspeed.initialize` hands to the engine that it builds."""
    from deepspeed.pipe import PipelineModule
    from deepspeed.runtime.config import DeepSpeedConfig

    module = PipelineModule(
        jobs.layers(job.model), num_stages=job.stages, partition_method="uniform", loss_fn=jobs.loss
    )
    config = deepspeed_job.config(job, "paci") if config is None else config
    return {
        "args": None,
        "model": module,
        "optimizer": jobs.optimizer(job),
        "model_parameters": list(module.parameters()),
        "mpu": module.mpu(),
        "config": config,
        "config_class": DeepSpeedConfig(config, module.mpu()),
    }


def answer_of(function, *values):
    """The class of what a function returns, or the error that it raises, in words."""
    try:
        return type(function(*values)).__name__
    except Exception as error:
        return f"{type(error).__name__}: {error}"


def build_engines(job):
    """What becomes of engines that are built in all kinds of ways from a config that names "paci"."""
    import deepspeed
    from deepspeed.runtime.pipe import schedule
    from deepspeed.runtime.pipe.engine import PipelineEngine

    import paci_schedule

    class OfDeepSpeed(PipelineEngine):
        pass

    class Secretive(PipelineEngine):
        """Its config is not among the arguments of its constructor."""

        def __init__(self, values):
            super().__init__(**values)

    deepspeed.init_distributed(verbose=False)
    early = PipelineEngine(**arguments(job))
    answers = {"nobody registered": answer_of(lambda: early)}
    paci_schedule.register("deepspeed")
    feed = jobs.data(job.model)
    answers["registered late"] = answer_of(early.train_batch, feed)
    answers["imported early"] = answer_of(lambda: PipelineEngine(**arguments(job)))
    answers["derived from DeepSpeed's"] = answer_of(lambda: OfDeepSpeed(**arguments(job)))
    answers["secretive"] = answer_of(lambda: Secretive(arguments(job)).train_batch(feed))
    stock = {**deepspeed_job.config(job, "stock")}
    answers["derived, without the key"] = answer_of(lambda: OfDeepSpeed(**arguments(job, stock)).train_batch(feed))

    from paci_schedule.adapters.deepspeed import PaciPipelineEngine

    class OfOurs(PaciPipelineEngine):
        forwards = 0

        def _exec_forward_pass(self, buffer_id):
            self.forwards += 1
            super()._exec_forward_pass(buffer_id)

    class Sending(PaciPipelineEngine):
        def _exec_send_grads(self, buffer_id):
            super()._exec_send_grads(buffer_id)

    engine = OfOurs(**arguments(job))
    engine.train_batch(feed)
    answers["derived from ours"] = engine.forwards, engine.pipeline_stats()["backwards"]
    plain = OfOurs(**arguments(job, stock))
    plain.train_batch(feed)
    answers["derived from ours, without the key"] = plain.forwards, plain.pipeline_stats()["backwards"]
    answers["sends itself"] = answer_of(lambda: Sending(**arguments(job)))
    answers["no iterator"] = answer_of(OfOurs(**arguments(job)).train_batch)

    def reduce(self):
        raise AssertionError("never called")

    with mock.patch.dict(PipelineEngine._INSTRUCTION_MAP, {schedule.ReduceGrads: reduce}):
        answers["another instruction"] = answer_of(lambda: PipelineEngine(**arguments(job)))
    sends = functools.wraps(PipelineEngine._exec_send_grads)(lambda self, buffer_id: None)
    with mock.patch.dict(PipelineEngine._INSTRUCTION_MAP, {schedule.SendGrad: sends}):
        answers["a wrapped instruction"] = answer_of(lambda: PipelineEngine(**arguments(job)))
    with mock.patch.object(PipelineEngine, "train_batch", reduce):
        answers["another train_batch"] = answer_of(lambda: PipelineEngine(**arguments(job)))

    class Backwards(schedule.TrainSchedule):
        """GPipe's order."""

        def steps(self):
            instructions = [each for step in super().steps() for each in step]
            last = [each for each in instructions if not hasattr(each, "buffer_id")]
            yield [each for each in instructions if isinstance(each, schedule.ForwardPass)]
            yield [each for each in instructions if isinstance(each, schedule.BackwardPass)] + last

    class Loading(schedule.TrainSchedule):
        """1F1B that loads every micro-batch before it exchanges activations."""

        def steps(self):
            for step in super().steps():
                yield sorted(step, key=lambda each: not isinstance(each, schedule.LoadMicroBatch))

    for name, replaced in (("another order", Backwards), ("another time to load", Loading)):
        with mock.patch.object(schedule, "TrainSchedule", replaced):
            answers[name] = answer_of(lambda: PipelineEngine(**arguments(job)))
    return answers


ANSWERS = {
    "nobody registered": "PipelineEngine",
    "registered late": ["UnsupportedError", '"pipeline_schedule": "paci"', "built before paci_schedule was registered"],
    "imported early": "PaciPipelineEngine",
    "derived from DeepSpeed's": ["UnsupportedError", "OfDeepSpeed", "derive it from", "PaciPipelineEngine"],
    "secretive": ["UnsupportedError", "Secretive", "derive it from", "PaciPipelineEngine"],
    "derived, without the key": "Tensor",
    "sends itself": ["UnsupportedError", "_exec_send_grads", "Sending", "would not be called"],
    "no iterator": ["ConfigError", "train_batch() without an iterator", "training_data"],
    "another instruction": ["UnsupportedError", "_INSTRUCTION_MAP[ReduceGrads]", "reduce", "would not be called"],
    "a wrapped instruction": ["UnsupportedError", "_INSTRUCTION_MAP[SendGrad]", "<lambda>", "would not be called"],
    "another train_batch": ["UnsupportedError", "PipelineEngine.train_batch", "would not be called"],
    "another order": ["UnsupportedError", "TrainSchedule", "Backwards", "order of 1F1B"],
    "another time to load": "PaciPipelineEngine",
}


def test_no_engine_runs_1f1b_where_the_config_names_another_schedule():
    for stage, answers in enumerate(ranks.run_ranks(build_engines, 2, (JOB,))):
        for name, says in ANSWERS.items():
            if isinstance(says, str):
                assert answers[name] == says, name
            else:
                assert all(words in answers[name] for words in says), answers[name]
        assert answers["derived from ours"] == (3, 2 + stage)
        assert answers["derived from ours, without the key"] == (3, 3)


def orders(pairs):
    """Whether DeepSpeed's own TrainSchedule computes in the order of our 1F1B."""
    from deepspeed.runtime.pipe.schedule import TrainSchedule

    from paci_schedule import PipelineSpec
    from paci_schedule.adapters.deepspeed.replaced import is_1f1b

    return [is_1f1b(TrainSchedule, PipelineSpec(stages=p, accumulation=a)) for p, a in pairs]


def test_deepspeeds_own_schedule_is_1f1b():
    pairs = [(p, a) for p in range(1, 6) for a in range(1, 8)]
    assert ranks.run_ranks(orders, 1, (pairs,)) == [[True] * len(pairs)]
