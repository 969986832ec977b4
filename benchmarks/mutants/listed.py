"""The mutants, by the rules that they break, each with the tests that guard the rule."""

from __future__ import annotations

from benchmarks.mutants import Mutant

__all__ = ["MUTANTS"]

CORE, RUNTIME, ADAPTERS = "paci_schedule/core", "paci_schedule/runtime", "paci_schedule/adapters"
PREDICT, DEFERRED = "paci_schedule/predict", "paci_schedule/runtime/deferred"


# ---- the tests that are asked ----------------------------------------------------------------------------------------


def _of(path: str, test: str, *names: str) -> tuple[str, ...]:
    """The test with these parameters."""
    return tuple(f"{path}.py::{test}[{name}]" for name in names) if names else (f"{path}.py::{test}",)


ORDER = ("tests/test_paci_schedule.py", "tests/test_schedules.py")
DRIFT = ("tests/test_drift.py", "tests/test_schedules.py")
MESSAGES = ("tests/test_lower.py", "tests/test_validate.py")
NORMS = ("tests/test_norms.py",)
TIED = ("tests/test_tied.py",)
STEPS = ("tests/test_predict.py",)
_ON_DEEPSPEED = "integration_tests/test_deepspeed_"
DEEPSPEED = _of(f"{_ON_DEEPSPEED}equivalence", "test_the_engine_trains_as_the_reference", "P=2 a=3")
CLIPPED = _of(f"{_ON_DEEPSPEED}clip", "test_the_engine_clips_as_the_reference", "P=3 a=2")
OVERFLOW = _of(f"{_ON_DEEPSPEED}clip", "test_an_overflow_elsewhere_counts_as_nothing_and_skips_one_update_of_one_stage")
TIED_DEEPSPEED = _of(f"{_ON_DEEPSPEED}tied", "test_the_engine_ties_as_the_reference", "P=2 a=3", "P=3 a=2")
TIED_CLIPPED = _of(f"{_ON_DEEPSPEED}tied", "test_the_engine_ties_as_the_reference", "P=4 a=2, clipping")
SWITCHED_TIES = _of(f"{_ON_DEEPSPEED}tied", "test_the_engine_ties_as_the_reference", "a flush on the way")
TIED_OVERFLOW = _of(f"{_ON_DEEPSPEED}tied", "test_gradients_that_overflow_are_dropped_element_by_element")
PREDICTED = _of(
    f"{_ON_DEEPSPEED}prediction", "test_the_engine_predicts_as_a_rehearsal", "P=2 a=3, every, slack, groups"
)
COLLECTIVES = _of(f"{_ON_DEEPSPEED}collectives", "test_no_collective_spans_stages")
_TORCH = "integration_tests/test_torch_equivalence", "test_the_schedule_trains_as_the_reference"
TORCH = _of(*_TORCH, "P=2 a=4")
ONCE_A_WINDOW = _of(*_TORCH, "predictions once a window, tied")
EVERY_SECOND = _of(*_TORCH, "a prediction at every second stale forward")
TORCH_TIED = _of(*_TORCH, "tied, clipping, switched")
_MEGATRON = "integration_tests/test_megatron_core"
MEGATRON = _of(_MEGATRON, "test_megatron_trains_as_the_reference", "2")
MEGATRON_TIED = _of(_MEGATRON, "test_tied_embeddings_and_global_clipping_train_as_the_reference", "2")
MEGATRON_ENDS = _of(_MEGATRON, "test_a_stream_that_ends_before_the_pipe_is_full_trains_as_the_reference", "2")
MEGATRON_FLUSH = _of(_MEGATRON, "test_tied_gradients_that_wait_are_applied_by_the_first_stock_call")

SPIKES = ("tests/test_spikes.py",)
_SPIKES = "integration_tests/test_spikes"
FALLEN_BACK = _of(_SPIKES, "test_every_stage_falls_back_to_1f1b_at_the_same_update", "deepspeed-P=2 a=2, replicas")
PLANNED_FALL = _of(_SPIKES, "test_megatron_falls_back_after_an_end_that_it_plans")
RESUMED_FALL = _of(_SPIKES, "test_a_resumed_run_falls_back_as_if_it_had_not_stopped", "torch")

# ---- the mutants -----------------------------------------------------------------------------------------------------

MUTANTS = (
    Mutant(
        "schedule order",
        "an update comes after the first backward of its window, not after the last",
        f"{CORE}/schedules/paci.py",
        "if (done + 1) % accumulation == 0:",
        "if done % accumulation == 0:",
        ORDER,
    ),
    Mutant(
        "schedule order",
        "every backward comes a round late",
        f"{CORE}/schedules/paci.py",
        "done = index - ahead\n",
        "done = index - ahead - 1\n",
        ORDER,
    ),
    Mutant(
        "schedule order",
        "leading calls read nothing ahead",
        f"{CORE}/schedules/paci.py",
        "admitted = stop + spec.look_ahead(0)\n",
        "admitted = stop\n",
        ORDER,
    ),
    Mutant(
        "schedule order",
        "the slack of the link after a stage is forgotten",
        f"{CORE}/spec.py",
        "return behind + sum(self.extra_in_flight[stage:])",
        "return behind + sum(self.extra_in_flight[stage + 1 :])",
        ("tests/test_spec.py", *MESSAGES),
    ),
    Mutant(
        "drift bound",
        "the bound is rounded down",
        f"{CORE}/drift.py",
        "return -(-spec.look_ahead(stage) // spec.accumulation)",
        "return spec.look_ahead(stage) // spec.accumulation",
        DRIFT,
    ),
    Mutant(
        "drift bound",
        "the closed form counts updates before the first",
        f"{CORE}/drift.py",
        "behind = max(0, micro_batch - spec.look_ahead(stage))",
        "behind = micro_batch - spec.look_ahead(stage)",
        DRIFT,
    ),
    Mutant(
        "drift bound",
        "the check lets one update more than the bound pass",
        "paci_schedule/check/validate.py",
        "drift > schedule.drift_bound(spec, stage):",
        "drift > schedule.drift_bound(spec, stage) + 1:",
        DRIFT,
    ),
    Mutant(
        "drift bound",
        "a stage at work does not count its updates",
        f"{RUNTIME}/stage.py",
        "self._compute.step(op.index, losses)\n        self.meter.record(op)\n",
        "self._compute.step(op.index, losses)\n",
        DEEPSPEED,
    ),
    Mutant(
        "version guard",
        "DeepSpeed: an update makes the late backwards fail",
        f"{ADAPTERS}/deepspeed/engine.py",
        "with torch.autograd._unsafe_preserve_version_counter(tuple(self.module.parameters())):",
        "with suppress():",
        DEEPSPEED,
    ),
    Mutant(
        "version guard",
        "torch: an update makes the late backwards fail",
        f"{ADAPTERS}/torch/update.py",
        "with torch.autograd._unsafe_preserve_version_counter(tuple(parameters)):",
        "if True:",
        TORCH,
    ),
    Mutant(
        "version guard",
        "Megatron: an update makes the late backwards fail",
        f"{ADAPTERS}/megatron/stream.py",
        "torch.autograd._unsafe_preserve_version_counter(parameters)",
        "ExitStack()",
        MEGATRON,
    ),
    Mutant(
        "drain",
        "the last backward of the first stage is left out",
        f"{CORE}/schedules/paci.py",
        "return Segment(spec, admitted, admitted + spec.look_ahead(0), admitted)",
        "return Segment(spec, admitted, admitted + spec.look_ahead(0) - 1, admitted)",
        ORDER,
    ),
    Mutant(
        "drain",
        "micro-batches count on after the pipe was empty",
        f"{RUNTIME}/stage.py",
        "(0, 0) if is_empty else (call.taken, call.finished)",
        "(call.taken, call.finished)",
        DEEPSPEED,
    ),
    Mutant(
        "drain",
        "DeepSpeed: an evaluation runs beside micro-batches in flight",
        f"{ADAPTERS}/deepspeed/draining.py",
        'self._drain_for("eval_batch")\n',
        "pass\n",
        DEEPSPEED,
    ),
    Mutant(
        "drain",
        "DeepSpeed: a checkpoint is saved beside micro-batches in flight",
        f"{ADAPTERS}/deepspeed/draining.py",
        'self._drain_for("save_checkpoint")\n',
        "pass\n",
        DEEPSPEED,
    ),
    Mutant(
        "drain",
        "Megatron: a planned end comes an update late",
        f"{ADAPTERS}/megatron/stream.py",
        "runner.finished + (end - done) * accumulation",
        "runner.finished + (end - done + 1) * accumulation",
        MEGATRON_ENDS,
    ),
    Mutant(
        "norm rule",
        "a stage clips by its own norm only",
        f"{DEFERRED}/norms.py",
        "            square.add_(self._squares(others, [self._newest[stage] for stage in others]).sum())\n",
        "            del others\n",
        NORMS,
    ),
    Mutant(
        "norm rule",
        "norms from above count as newer than they are, which tied stages must agree on",
        f"{DEFERRED}/norms.py",
        "behind = max(0, micro_batch - self._spec.look_ahead(stage))",
        "behind = micro_batch",
        TIED_CLIPPED,
    ),
    Mutant(
        "norm rule",
        "a drain tells no stage the others' newest norms",
        f"{RUNTIME}/stage.py",
        "            self._deferred.exchange()\n",
        "            pass\n",
        CLIPPED,
    ),
    Mutant(
        "norm rule",
        "an overflow of one stage stops the others",
        f"{DEFERRED}/norms.py",
        "return torch.nan_to_num(joined, nan=0.0, posinf=0.0)",
        "return joined",
        NORMS,
    ),
    Mutant(
        "norm rule",
        "DeepSpeed: an update sums its norm over all stages, and so waits for them",
        f"{ADAPTERS}/deepspeed/stage_local.py",
        "self._model_parallel = model_parallel or self._grid.get_slice_parallel_group()",
        "self._model_parallel = self._grid.get_model_parallel_group()",
        COLLECTIVES,
    ),
    Mutant(
        "tied rule",
        "the delay is rounded down",
        f"{DEFERRED}/tied.py",
        "self.delay = -(-ahead // spec.accumulation)",
        "self.delay = ahead // spec.accumulation",
        TIED_DEEPSPEED,
    ),
    Mutant(
        "tied rule",
        "a sum is applied an update early",
        f"{DEFERRED}/tied.py",
        "while len(self._pending) + len(self._held) > self.delay:",
        "while len(self._pending) + len(self._held) >= self.delay:",
        TIED,
    ),
    Mutant(
        "tied rule",
        "a flush loses the sums that are pending",
        f"{DEFERRED}/tied.py",
        "        while self._pending:\n            gradient.add_(self._pop())\n",
        "        while self._pending:\n            self._pop()\n",
        SWITCHED_TIES,
    ),
    Mutant(
        "tied rule",
        "torch: a flush leaves the sums of its own update for later",
        f"{ADAPTERS}/torch/update.py",
        "self._ties.exchange(at, now=flushing)",
        "self._ties.exchange(at, now=False)",
        TORCH_TIED,
    ),
    Mutant(
        "tied rule",
        "Megatron: a flush leaves the sums of its own update for later",
        f"{ADAPTERS}/megatron/stream.py",
        "self._ties.exchanging(now=True):",
        "self._ties.exchanging():",
        MEGATRON_FLUSH,
    ),
    Mutant(
        "tied rule",
        "what is not a number in a sum stays",
        f"{DEFERRED}/tied.py",
        "values.masked_fill_(~(values.abs() < limit), 0.0)",
        "values.masked_fill_(values.abs() >= limit, 0.0)",
        TIED_OVERFLOW,
    ),
    Mutant(
        "tied rule",
        "two stages post a sum at different moments",
        f"{CORE}/sums.py",
        "end - (distance - 1) // 2",
        "end - (distance + 1) // 2",
        MESSAGES,
    ),
    Mutant(
        "message pairing",
        "an activation is sent before it is made",
        f"{CORE}/lower.py",
        "program.at(OpKind.FORWARD, index) + 1, Place.SEND",
        "program.at(OpKind.FORWARD, index), Place.SEND",
        MESSAGES,
    ),
    Mutant(
        "message pairing",
        "a gradient crosses in a call before its receive is posted",
        f"{CORE}/link.py",
        "self._made[0][1] < self._sent or",
        "self._made[0][1] <= self._sent or",
        MESSAGES,
    ),
    Mutant(
        "message pairing",
        "after a drain a link goes on counting",
        f"{CORE}/lower.py",
        "if call.finished == call.taken:\n",
        "if call.finished > call.taken:\n",
        MESSAGES,
    ),
    Mutant(
        "message pairing",
        "a stage sends another layout than the one that its neighbour expects",
        f"{RUNTIME}/boxes.py",
        "elif layout != known:",
        "elif False:",
        ("integration_tests/test_deepspeed_shapes.py",),
    ),
    Mutant(
        "message pairing",
        "a message is written over while it is sent",
        f"{RUNTIME}/boxes.py",
        "        self._sending.append((work, (*buffers, buffer), header, doing))\n",
        "        self._sending.append((work, (*buffers, buffer), header, doing))\n        buffer.zero_()\n",
        TORCH,
    ),
    Mutant(
        "norm rule",
        "Megatron: a stage clips by its own norm only",
        f"{ADAPTERS}/megatron/stream.py",
        'carries_norms=options.clip == "global",',
        "carries_norms=False,",
        MEGATRON_TIED,
    ),
    Mutant(
        "prediction",
        "a part of the gradient is taken for the whole",
        f"{RUNTIME}/stage.py",
        "scale = self.spec.accumulation / len(self._window) if self._window else 0.0",
        "scale = 1.0 if self._window else 0.0",
        PREDICTED,
    ),
    Mutant(
        "prediction",
        "a prediction starts from the prediction before it",
        f"{PREDICT}/stepped.py",
        "            write(self._parameters(), self._real)\n        for optimizer",
        "            pass\n        for optimizer",
        EVERY_SECOND,
    ),
    Mutant(
        "prediction",
        "only one of several steps is taken",
        f"{PREDICT}/shadow.py",
        "for left in reversed(range(windows)):",
        "for left in range(1):",
        STEPS,
    ),
    Mutant(
        "prediction",
        "the momentum's bias is not corrected",
        f"{PREDICT}/momenta.py",
        'mean = state["exp_avg"] / (1 - group["betas"][0] ** state["step"])\n    return mean if group["decoupled',
        'mean = state["exp_avg"].clone()\n    return mean if group["decoupled',
        STEPS,
    ),
    Mutant(
        "prediction",
        "a window predicts only once in a run",
        f"{PREDICT}/prediction.py",
        "        self._weights.restore()\n        self._stale = 0\n",
        "        self._weights.restore()\n",
        ONCE_A_WINDOW,
    ),
    Mutant(
        "loss spike",
        "an update is judged a batch too soon, when the first stage may not have done it",
        f"{RUNTIME}/spikes.py",
        "return 1 - (-spec.look_ahead(0) // spec.accumulation)",
        "return -(-spec.look_ahead(0) // spec.accumulation) - 1",
        (*SPIKES, *FALLEN_BACK),
    ),
    Mutant(
        "loss spike",
        "an update under a flush is judged, too",
        f"{RUNTIME}/stage.py",
        "if self._spikes is not None and not self.flushing:",
        "if self._spikes is not None:",
        FALLEN_BACK,
    ),
    Mutant(
        "loss spike",
        "Megatron's pipe is not emptied",
        f"{ADAPTERS}/megatron/stream.py",
        "if self._spiked:  # as soon as what is read ahead makes whole updates",
        "if False:",
        PLANNED_FALL,
    ),
    Mutant(
        "loss spike",
        "what was judged before is not saved",
        f"{DEFERRED}/state.py",
        '"spikes": None if self.spikes is None else self.spikes.state(),',
        '"spikes": None,',
        RESUMED_FALL,
    ),
)
