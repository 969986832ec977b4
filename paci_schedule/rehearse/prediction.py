"""Stale forwards on predicted weights: when a stage predicts, from what, and when it has its real weights back.

A forward is *stale* when its micro-batch belongs to a later window than the one whose gradients are being summed.  At
that moment the stage holds j of the a backwards of the pending window; their mean stands for the whole window's
gradient, scaled by the newest clip factor, and the weights become those that the optimizer's step would leave
(`predict.advance`).  Where the micro-batch is n windows ahead, n such steps are taken.  With j = 0 the gradient is what
the momentum expects (`predict.expected_gradient`).  A real step always starts from the real weights.

* "every": at every stale forward, which alone sees the prediction; backwards run on the real weights.
* "window": once a window, at its first stale forward.  The prediction is left in place until the step, so that
  backwards run on it as well, and nothing is swapped back and forth.
* k > 1: at every k-th stale forward of a window, left in place until the next or the step.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.optim import Optimizer

from paci_schedule.errors import ConfigError
from paci_schedule.predict import advance, check, expected_gradient
from paci_schedule.predict.copies import copied, write

__all__ = ["Prediction", "interval_of"]

ONCE = 0  # the interval of "window"


def interval_of(prediction: str | int) -> int | None:
    """Stale forwards from one prediction to the next: None for "off", 0 for once a window.

    Raises:
        ConfigError: it is none of "off", "window", "every" and the whole numbers of at least 1.
    """
    named = {"off": None, "window": ONCE, "every": 1}
    if isinstance(prediction, str) and prediction in named:
        return named[prediction]
    if isinstance(prediction, int) and not isinstance(prediction, bool) and prediction >= 1:
        return prediction
    raise ConfigError(
        f"prediction={prediction!r}: must be 'off', 'window' (once a window), 'every' (at every stale forward) or a "
        "whole number k of at least 1 (at every k-th)"
    )


class Prediction:
    """The predicted weights of one stage.

    Args:
        parameters: of the stage, those that are trained.
        optimizers: of the stage.
        interval: as `interval_of` gives it, not None.

    Raises:
        UnsupportedError: an optimizer cannot be predicted.

    Attributes:
        made: how many predictions there were.
    """

    def __init__(
        self, parameters: Sequence[torch.nn.Parameter], optimizers: Sequence[Optimizer], interval: int
    ) -> None:
        for optimizer in optimizers:
            check(optimizer)
        self.made = 0
        self._parameters, self._optimizers, self._interval = parameters, optimizers, interval
        self._real: list[torch.Tensor] | None = None  # while the parameters hold a prediction
        self._stale = 0  # forwards of this window

    def before_forward(self, windows: int, scale: float, factor: torch.Tensor | None) -> None:
        """Before the forward of a micro-batch that is so many windows ahead.

        Args:
            windows: 0 for a forward that is not stale.
            scale: a / j, which makes the mean of the part out of the sum in `.grad`; 0 where nothing is there.
            factor: the newest clip factor; None for none.
        """
        if not windows:
            return
        if self._stale % self._interval == 0 if self._interval else self._stale == 0:
            self._predict(windows, scale, factor)
        self._stale += 1

    def after_forward(self) -> None:
        """The real weights again, where the prediction is for this forward only."""
        if self._interval == 1:
            self._restore()

    def before_step(self) -> None:
        """The real weights again; a new window begins."""
        self._restore()
        self._stale = 0

    def exchange(self) -> None:
        """Put the real weights in the place of predicted ones, or, the next time, the predicted ones back."""
        if self._real is not None:
            other = copied(self._parameters)
            write(self._parameters, self._real)
            self._real = other

    def _restore(self) -> None:
        if self._real is not None:
            write(self._parameters, self._real)
            self._real = None

    def _predict(self, windows: int, scale: float, factor: torch.Tensor | None) -> None:
        if self._real is None:
            self._real = copied(self._parameters)
        else:
            write(self._parameters, self._real)
        for optimizer in self._optimizers:
            gradients = self._part(optimizer, scale, factor) if scale else self._expected(optimizer)
            advance(optimizer, {parameter: parameter for parameter in gradients}, gradients, windows)
        self.made += 1

    def _part(
        self, optimizer: Optimizer, scale: float, factor: torch.Tensor | None
    ) -> dict[torch.Tensor, torch.Tensor]:
        held = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        if not held:
            return {}
        parts = torch._foreach_mul([parameter.grad for parameter in held], scale)
        if factor is not None:
            torch._foreach_mul_(parts, factor)
        return dict(zip(held, parts, strict=True))

    def _expected(self, optimizer: Optimizer) -> dict[torch.Tensor, torch.Tensor]:
        gradients = {}
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                gradient = expected_gradient(optimizer, group, parameter, parameter.detach())
                if gradient is not None:
                    gradients[parameter] = gradient
        return gradients
