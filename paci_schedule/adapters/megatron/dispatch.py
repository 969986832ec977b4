"""The hook into Megatron-core: its schedules look at the model's config when they are called.

``get_forward_backward_func`` stays as it is, and returns the schedules that stand here in the place of Megatron-core's
own; training loops that import a schedule by name, without asking, get the same.  Where that has happened already,
registration replaces it there too.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Mapping
from typing import Any
from weakref import WeakKeyDictionary, WeakSet

import torch
from megatron.core import pipeline_parallel
from megatron.core.pipeline_parallel import schedules
from megatron.core.utils import get_model_config

from paci_schedule.adapters.choice import IN_EVERY_LOOP, check_choice
from paci_schedule.adapters.megatron import groups
from paci_schedule.adapters.megatron.hooks import check_installed
from paci_schedule.adapters.megatron.options import PaciOptions, read_schedule
from paci_schedule.adapters.megatron.stream import FRAMEWORK, ModelStream
from paci_schedule.adapters.ranks import is_rank_0
from paci_schedule.adapters.rebinding import keepers, rebind
from paci_schedule.adapters.start_line import say, start_line
from paci_schedule.core.schedules.registry import schedule
from paci_schedule.core.spec import PipelineSpec
from paci_schedule.errors import ConfigError, UnsupportedError

__all__ = ["Dispatcher", "install", "load_state", "registered_options", "stream_of"]

logger = logging.getLogger(__name__)

Model = torch.nn.Module | list[torch.nn.Module]
ForwardBackward = Callable[..., list[Any]]  # of a batch

_STREAM = "_paci_stream"  # of a model's first chunk: it refers to the model, so no table may keep it
_DISPATCHER = "dispatcher"  # of a schedule of ours
_SCHEDULES = (
    "forward_backward_pipelining_without_interleaving",
    "forward_backward_pipelining_with_interleaving",
    "forward_backward_no_pipelining",
)


class Dispatcher:
    """Decides for each call which schedule it runs.

    Attributes:
        default: the schedule of a model whose config names none.
        options: the options of a model whose config has no ``paci``.
        states: of models that are yet to be trained, by their first chunk, to begin with.
    """

    def __init__(self) -> None:
        self.default = "1f1b"
        self.options: Mapping[str, Any] = {}
        self.states: WeakKeyDictionary[torch.nn.Module, Mapping[str, Any]] = WeakKeyDictionary()
        self._unstaged: WeakSet[torch.nn.Module] = WeakSet()  # models of one stage that have said so

    def in_place_of(self, stock: ForwardBackward) -> ForwardBackward:
        """What takes the place of one of Megatron-core's schedules."""

        @functools.wraps(stock)
        def forward_backward(**call: Any) -> list[Any]:
            return self.forward_backward(stock, **call)

        setattr(forward_backward, _DISPATCHER, self)
        return forward_backward

    def forward_backward(
        self, stock: ForwardBackward, *, model: Model, forward_only: bool = False, **call: Any
    ) -> list[Any]:
        """One call of the schedule.

        Evaluation, a pipeline of one stage and the schedule ``"1f1b"`` are Megatron-core's own; micro-batches
        that are parked between two training calls stay untouched.

        Raises:
            ConfigError: on every rank, if the schedule was changed while micro-batches are parked.
        """
        first = _chunks(model)[0]
        name, stream = read_schedule(get_model_config(first), self.default), _stream(first)
        untouched = functools.partial(stock, model=model, forward_only=forward_only, **call)
        if forward_only:
            return untouched() if stream is None else stream.evaluate(untouched)
        if name == "1f1b" and stream is None and first not in self.states:
            return untouched()
        group = getattr(call.get("pg_collection"), "pp", None) or groups.pipeline()
        if group.size() == 1:
            if name != "1f1b":
                self._say_unstaged(first, name, call["num_microbatches"])
            return untouched()
        if stream is None:
            options = self._options(first)
            state = self.states.pop(first, None)
            try:
                stream = ModelStream(_chunks(model), group, options, name, call)
            except UnsupportedError as error:
                if name != "1f1b":
                    raise
                logger.warning("the state of PACI that was loaded is not applied: %s", error)
                return untouched()
            if state is not None:  # a flush applies what waits in it
                stream.load_state(state)
            setattr(first, _STREAM, stream)
        if name == "1f1b" or stream.begin_batch():
            return stream.flush_batch(untouched, call["num_microbatches"])
        return stream.train_batch(**call)

    def _options(self, first: torch.nn.Module) -> PaciOptions:
        return PaciOptions.read(getattr(get_model_config(first), "paci", self.options))

    def _say_unstaged(self, first: torch.nn.Module, name: str, num_microbatches: int) -> None:
        """Say, once for a model, that a pipeline of one stage runs Megatron-core's own schedule."""
        if first not in self._unstaged:
            self._unstaged.add(first)
            spec = PipelineSpec(stages=1, accumulation=num_microbatches)
            say(start_line(schedule(name), spec, self._options(first), framework=FRAMEWORK))


def install(default: str | None, options: Mapping[str, Any] | None) -> None:
    """Put the selector in Megatron-core's place; None leaves what is set."""
    if default is not None:
        check_choice(default, f"pipeline schedule {default!r}", IN_EVERY_LOOP)
    if options is not None:
        PaciOptions.read(options)
    dispatcher = _installed() or _replace()
    dispatcher.default = default or dispatcher.default
    dispatcher.options = dispatcher.options if options is None else options


def _installed() -> Dispatcher | None:
    return getattr(schedules.forward_backward_pipelining_without_interleaving, _DISPATCHER, None)


def registered_options() -> PaciOptions:
    """Those of a model whose config has no ``paci``."""
    dispatcher = _installed()
    return PaciOptions.read({} if dispatcher is None else dispatcher.options)


def _replace() -> Dispatcher:
    """Put schedules of ours in the place of Megatron-core's, in every module and class that has one by name too.

    Raises:
        UnsupportedError: something else has one.
    """
    check_installed()
    stock = [getattr(schedules, name) for name in _SCHEDULES]
    if kept := [place for each in stock for place in keepers(each)]:
        raise UnsupportedError(
            f"{', '.join(kept)}: got a schedule of Megatron-core before paci_schedule was registered, and would go on "
            "with it; register first, or start the job with python -m paci_schedule.launch"
        )
    dispatcher = Dispatcher()
    early = [
        f"{owner} (as {name})"
        for each in stock
        for owner, name in rebind(each, dispatcher.in_place_of(each))
        if owner not in (schedules.__name__, pipeline_parallel.__name__)
    ]
    if early and is_rank_0():
        logger.warning(
            "%s imported a schedule of Megatron-core before paci_schedule was registered: these have the new one now",
            ", ".join(sorted(early)),
        )
    return dispatcher


def stream_of(model: Model) -> ModelStream:
    """The stream of a model.  Raises ConfigError if it has none."""
    stream = _stream(_chunks(model)[0])
    if stream is None:
        raise ConfigError(
            "this model has not been trained under PACI: set config.pipeline_schedule = 'paci' and call the function "
            "that get_forward_backward_func() returns first"
        )
    return stream


def load_state(model: Model, state: Mapping[str, Any]) -> None:
    """Let a model that has no stream yet begin with `state`.  Raises ConfigError if it has one."""
    dispatcher = _installed()
    first = _chunks(model)[0]
    if dispatcher is None:
        raise ConfigError("call paci_schedule.register() before the state is loaded")
    if _stream(first) is not None:
        raise ConfigError("this model is being trained under PACI already: load its state before the first call")
    dispatcher.states[first] = state


def _stream(first: torch.nn.Module) -> ModelStream | None:
    return first.__dict__.get(_STREAM)


def _chunks(model: Model) -> list[torch.nn.Module]:
    return model if isinstance(model, list) else [model]
