"""The weights that an optimizer's step would leave, found by the optimizer's own code on copies of its state.

A formula for each optimizer would be a second description of it, right only for the settings that it was written for.
The optimizer's own `step` is right for all of them, bit for bit: amsgrad, maximize, foreach, fused, a subclass that
looks ahead.  A formula would save little: the new moments are temporaries of the same size as the copies, so it would
only avoid writing these copies, about a fifth of the memory traffic of an Adam step.  Memory is bounded in another way:
the parameters are taken in buckets, which is possible for every optimizer that treats each parameter by itself.
"""

from __future__ import annotations

from collections import OrderedDict, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch.optim import Optimizer

from paci_schedule.predict.copies import copied

__all__ = ["PIECE", "advance", "piece_of", "pieces", "state_of"]

PIECE = 1 << 24
"""How many elements of a flat parameter are predicted at a time."""

_BUCKET = 1 << 24  # elements whose state is copied at a time


@torch.no_grad()
def advance(
    optimizer: Optimizer,
    weights: Mapping[torch.Tensor, torch.Tensor],
    gradients: Mapping[torch.Tensor, torch.Tensor],
    windows: int = 1,
    reach: float = 1.0,
) -> None:
    """Move `weights` to where the optimizer's next steps would take them; the optimizer stays as it is.

    Args:
        optimizer: one that `momentum.check` lets pass, and that treats every parameter by itself.
        weights: parameter of the optimizer -> the values to move, in place; the parameter itself, or a copy of it.
            Autograd does not see it: no version counter moves.
        gradients: parameter -> the gradient of each of these steps, clipped already.  It may be overwritten.  A
            parameter without one stays where it is, as in a step.
        windows: the number of steps, all with this gradient and the present learning rate.
        reach: the length of each of these steps, relative to the optimizer's own.  The optimizers that `check` lets
            pass go as far as their learning rate tells them, the decay of weights included.
    """
    for group in optimizer.param_groups:
        for bucket in _buckets([parameter for parameter in group["params"] if parameter in gradients]):
            moved = [weights[parameter].data for parameter in bucket]
            for weight, parameter in zip(moved, bucket, strict=True):
                vars(weight).update(vars(parameter))  # attributes of a parameter, such as how it is sliced
            states = _copied_states([state_of(optimizer, group, parameter) for parameter in bucket])
            settings = {name: _copied(value) for name, value in group.items() if name != "params"}  # counts among them
            if reach != 1:
                settings["lr"] = settings["lr"] * reach
            shadow = _shadow(optimizer, {**settings, "params": moved}, dict(zip(moved, states, strict=True)))
            parts = [gradients[parameter] for parameter in bucket]
            for left in reversed(range(windows)):
                # SGD with foreach and Nesterov's momentum writes into its gradients.
                for weight, part in zip(moved, copied(parts) if left else parts, strict=True):
                    if weight.dtype != part.dtype:  # an optimizer that keeps fp32 masters in its state
                        weight.grad_dtype = part.dtype
                    weight.grad = part
                type(optimizer).step(shadow)


def piece_of(optimizer: Optimizer, group: Mapping[str, Any], parameter: torch.Tensor, place: slice) -> Optimizer:
    """An optimizer whose only parameter is a piece of this one, for `advance` and `expected_gradient`.

    Args:
        optimizer: one that treats every element by itself.
        group: the parameter's group.
        parameter: flat.
        place: the elements of the piece.

    Returns:
        The optimizer; its parameter and state are views.
    """
    piece = parameter.detach()[place]
    state = state_of(optimizer, group, parameter)
    views = {name: value[place] if _is_large(value) else value for name, value in state.items()}
    return _shadow(optimizer, {**group, "params": [piece]}, {piece: views} if state else {})


def state_of(optimizer: Optimizer, group: Mapping[str, Any], parameter: torch.Tensor) -> Mapping[str, Any]:
    """The optimizer's state of a parameter of the group; it is empty before the first step.

    A class that keeps part of the state elsewhere, such as a count of steps for the whole group, has a method
    `state_of(group, parameter)` that puts it together.
    """
    own = getattr(optimizer, "state_of", None)
    return optimizer.state.get(parameter, {}) if own is None else own(group, parameter)


def pieces(
    optimizer: Optimizer,
) -> Iterator[tuple[Optimizer, Mapping[str, Any], list[tuple[torch.Tensor, torch.Tensor, Any]]]]:
    """All parameters that the optimizer steps, a limited number of elements at a time.

    Args:
        optimizer: one that treats every parameter by itself, and every element of a flat one.

    Yields:
        An optimizer for `advance`, one of its groups, and some parameters of this group.  Each of these is a tuple: the
        parameter of the yielded optimizer, the parameter of the given one that it belongs to, and the index of its
        elements there.
    """
    for group in optimizer.param_groups:
        large = [parameter for parameter in group["params"] if parameter.dim() == 1 and parameter.numel() > PIECE]
        for parameter in large:
            for start in range(0, parameter.numel(), PIECE):
                place = slice(start, start + PIECE)
                piece = piece_of(optimizer, group, parameter, place)
                (only,) = piece.param_groups
                yield piece, only, [(only["params"][0], parameter, place)]
        for bucket in _buckets([each for each in group["params"] if all(each is not other for other in large)]):
            yield optimizer, group, [(parameter, parameter, ...) for parameter in bucket]


def _buckets(parameters: Sequence[torch.Tensor]) -> Iterator[list[torch.Tensor]]:
    bucket: list[torch.Tensor] = []
    for parameter in parameters:
        if bucket and sum(other.numel() for other in bucket) + parameter.numel() > _BUCKET:
            yield bucket
            bucket = []
        bucket.append(parameter)
    if bucket:
        yield bucket


def _copied_states(states: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Copies of the states; all but step counts, which are scalars and often on the host, are copied in one kernel."""
    large = iter(copied([value for state in states for value in state.values() if _is_large(value)]))

    def copy(value: Any) -> Any:
        if _is_large(value):
            return next(large)
        return _copied(value)

    return [{name: copy(value) for name, value in state.items()} for state in states]


def _copied(value: Any) -> Any:
    return value.clone() if isinstance(value, torch.Tensor) else value


def _is_large(value: object) -> bool:
    return isinstance(value, torch.Tensor) and value.dim() > 0


def _shadow(optimizer: Optimizer, group: dict[str, Any], state: dict[torch.Tensor, dict[str, Any]]) -> Optimizer:
    """An optimizer of the same class and settings with this group only, without hooks."""
    shadow = object.__new__(type(optimizer))
    shadow.__dict__.update(
        optimizer.__dict__,
        param_groups=[group],
        state=defaultdict(dict, state),
        _optimizer_step_pre_hooks=OrderedDict(),
        _optimizer_step_post_hooks=OrderedDict(),
    )
    return shadow
