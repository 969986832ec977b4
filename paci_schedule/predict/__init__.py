"""An optimizer's next weights, before its step: from its state and the part of the gradient that is there.

`advance` takes the optimizer's own step on copies of its state; `momentum` says what gradient an optimizer expects
where no part is there yet, and which optimizers can be predicted.  `Prediction` says when a stage predicts.
"""

from paci_schedule.predict.clipping import clip_factor
from paci_schedule.predict.momentum import check, expected_gradient
from paci_schedule.predict.prediction import Prediction, Weights, interval_of
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
    "interval_of",
    "piece_of",
    "pieces",
]
