"""Predicted weights for stale forwards: when a stage predicts, from what, and when its real weights come back.

A forward is *stale* when its micro-batch belongs to a later window than the one whose gradients are being summed.  At
that moment the stage holds j of the a backwards of the pending window; their mean stands for the whole window's
gradient, scaled by the newest clip factor, and the weights become those that the optimizer's step would leave
(`predict.advance`).  Where the micro-batch is n windows ahead, n such steps are taken.  With j = 0 the gradient is what
the momentum expects (`predict.expected_gradient`).  A real step always starts from the real weights.

* "every": the stage predicts at every stale forward.  Only this forward sees the prediction; backwards run on the real
  weights.
* "window": the stage predicts once in a window, at its first stale forward.  The prediction stays in place until the
  step, so backwards run on it as well, and nothing is swapped back and forth.
* k > 1: the stage predicts at every k-th stale forward of a window; a prediction stays in place until the next one or
  the step.

With a *reach* of more than 1 a prediction goes beyond the expected update, in its direction: stale forwards look ahead,
as Nesterov's momentum does.
"""

from __future__ import annotations

from typing import Protocol

import torch

__all__ = ["Prediction", "Weights"]


class Weights(Protocol):
    """The weights of a stage, which sometimes hold a prediction."""

    def predict(self, windows: int, scale: float, factor: torch.Tensor | None, reach: float) -> None:
        """Replace the real weights by those that the next `windows` steps would leave.

        Args:
            windows: the number of steps, at least 1.
            scale: a / j, which turns the sum of the j gradients that are there into the mean of a window; 0 where none
                is there.
            factor: the newest clip factor; None for no clipping.
            reach: how far along these steps the weights go (`advance`).
        """

    def restore(self) -> None:
        """Put back the real weights where a prediction stands."""

    def exchange(self) -> None:
        """Put the real weights in the place of predicted ones, or, the next time, the predicted ones back."""


class Prediction:
    """The moments at which a stage's weights hold a prediction.

    Args:
        weights: the weights of the stage.
        interval: the value of `interval_of`, not None.
        reach: how far along the expected updates the predicted weights lie; 1 is where these end.

    Attributes:
        factor: the newest clip factor, fp32[]; None for no clipping.  The code that clips sets it.
        made: the number of predictions so far.
    """

    def __init__(self, weights: Weights, interval: int, reach: float = 1.0) -> None:
        self.factor: torch.Tensor | None = None
        self.made = 0
        self._weights, self._interval, self._reach = weights, interval, reach
        self._stale = 0  # forwards since the last step

    def before_forward(self, windows: int, scale: float) -> None:
        """Predict, if the forward that follows is to run on a prediction.

        Args:
            windows: how many windows ahead its micro-batch is; 0 for a forward that is not stale.
            scale: as in `Weights.predict`.
        """
        if not windows:
            return
        if self._stale % self._interval == 0 if self._interval else self._stale == 0:
            self._weights.predict(windows, scale, self.factor, self._reach)
            self.made += 1
        self._stale += 1

    def after_forward(self) -> None:
        """Put back the real weights, if the prediction was for this forward only."""
        if self._interval == 1:
            self._weights.restore()

    def before_step(self) -> None:
        """Put back the real weights; a new window begins."""
        self._weights.restore()
        self._stale = 0

    def exchange(self) -> None:
        """Put the real weights in the place of predicted ones, or, the next time, the predicted ones back."""
        self._weights.exchange()
