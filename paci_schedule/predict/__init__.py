"""Predictions of an optimizer's next weights, from its state and the part of the gradient that is already there.

`advance` takes the optimizer's own step on copies of its state.  `momentum` finds the gradient that an optimizer
expects where no part is there yet, and knows which optimizers can be predicted.  `Prediction` decides when a stage
predicts.
"""

from paci_schedule.predict.clipping import clip_factor
from paci_schedule.predict.momentum import check, expected_gradient
from paci_schedule.predict.prediction import Prediction, Weights
from paci_schedule.predict.shadow import advance, piece_of, pieces
from paci_schedule.predict.stepped import SteppedWeights

__all__ = [
    "Prediction",
    "SteppedWeights",
    "Weights",
    "advance",
    "check",
    "clip_factor",
    "expected_gradient",
    "piece_of",
    "pieces",
]
