"""Stale forwards on predicted weights: when a stage predicts, from what, and when it has its real weights back.

A forward is *stale* when its micro-batch belongs to a later window than the one whose gradients are being summed.  At
that moment the stage holds j of the a backwards of the pending window; their mean stands for the whole window's
gradient, scaled by the newest clip factor, and the weights become those that the optimizer's step would leave
(`predict.advance`).  Where the micro-batch is n windows ahead, n such steps are taken.  With j = 0 the gradient is what
the momentum expects (`predict.expected_gradient`).  A real step always starts from the real weights.

* "every": at every stale forward, which is all that sees the prediction; backwards run on the real weights.
* "window": once a window, at its first stale forward.  The prediction is left in place until the step, so that
  backwards run on it as well, and nothing is swapped back and forth.
* k > 1: at every k-th stale forward of a window, left in place until the next or the step.

With a *reach* of more than 1 a prediction goes further than the expected update, in its direction: stale forwards look
ahead, as Nesterov's momentum does.
"""

from __future__ import annotations

from typing import Protocol

import torch

__all__ = ["Prediction", "Weights"]


class Weights(Protocol):
    """The weights of a stage, which hold a prediction now and then."""

    def predict(self, windows: int, scale: float, factor: torch.Tensor | None, reach: float) -> None:
        """Make them, from the real ones, what the next `windows` steps would leave.

        Args:
            windows: how many, at least 1.
            scale: a / j, which makes the mean of the part out of the gradients' sum; 0 where nothing is there.
            factor: the newest clip factor; None for none.
            reach: how far along these steps, as `advance` has it.
        """

    def restore(self) -> None:
        """The real weights again, where a prediction stands."""

    def exchange(self) -> None:
        """Put the real weights in the place of predicted ones, or, the next time, the predicted ones back."""


class Prediction:
    """When a stage's weights hold a prediction.

    Args:
        weights: of the stage.
        interval: as `interval_of` gives it, not None.
        reach: how far along the expected updates the predicted weights lie; 1 is where these end.

    Attributes:
        factor: the newest clip factor, fp32[]; None for none.  Whoever clips sets it.
        made: how many predictions there were.
    """

    def __init__(self, weights: Weights, interval: int, reach: float = 1.0) -> None:
        self.factor: torch.Tensor | None = None
        self.made = 0
        self._weights, self._interval, self._reach = weights, interval, reach
        self._stale = 0  # forwards since the last step

    def before_forward(self, windows: int, scale: float) -> None:
        """Before the forward of a micro-batch that is so many windows ahead.

        Args:
            windows: 0 for a forward that is not stale.
            scale: as `Weights.predict` has it.
        """
        if not windows:
            return
        if self._stale % self._interval == 0 if self._interval else self._stale == 0:
            self._weights.predict(windows, scale, self.factor, self._reach)
            self.made += 1
        self._stale += 1

    def after_forward(self) -> None:
        """The real weights again, where the prediction is for this forward only."""
        if self._interval == 1:
            self._weights.restore()

    def before_step(self) -> None:
        """The real weights again; a new window begins."""
        self._weights.restore()
        self._stale = 0

    def exchange(self) -> None:
        """Put the real weights in the place of predicted ones, or, the next time, the predicted ones back."""
        self._weights.exchange()
