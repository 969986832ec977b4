"""Predicted weights in a Megatron job: which jobs can have them, and what their predictions are clipped by."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.optimizer.layer_wise_optimizer import LayerWiseDistributedOptimizer

from paci_schedule.adapters.megatron import groups
from paci_schedule.adapters.megatron.options import PaciOptions
from paci_schedule.adapters.megatron.stage_local import chains, optimizers, owner_of
from paci_schedule.adapters.megatron.ties import tied_embedding, unwrapped
from paci_schedule.adapters.megatron.working import KNOWN, WorkingWeights
from paci_schedule.core.staleness import interval_of
from paci_schedule.errors import UnsupportedError
from paci_schedule.predict import Prediction, check

__all__ = ["build_prediction", "reasons"]


def build_prediction(model: torch.nn.Module, config: Any, options: PaciOptions) -> Prediction | None:
    """What the option "prediction" asks for; None for "off".

    Args:
        model: the chunk, in a job that `reasons` has nothing against.
        config: its ModelParallelConfig.
        options: of the schedule.
    """
    interval = interval_of(options.prediction)
    if interval is None:
        return None
    _, tied = tied_embedding(model)
    deferred = [] if tied is None else [tied]
    slices = groups.tensor_parallel()
    partial = _partial(model, config) if slices.size() > 1 else []
    weights = WorkingWeights(optimizers(config), deferred, partial, slices)
    prediction = Prediction(weights, interval, options.prediction_reach)
    _note_norms(config, prediction, next(model.parameters()).device)
    return prediction


def reasons(model: torch.nn.Module, config: Any, options: PaciOptions) -> Iterator[str]:
    """Why this job cannot have the predictions that it asks for."""
    if interval_of(options.prediction) is None:
        return
    option = f"config.paci = {{'prediction': {options.prediction!r}}} (--paci-prediction)"
    if owner_of(config) is None:
        yield f"{option} needs the optimizer: set config.grad_scale_func = optimizer.scale_loss, or prediction to 'off'"
    if any(isinstance(chain, LayerWiseDistributedOptimizer) for chain in chains(config)):
        yield (
            f"{option} with LayerWiseDistributedOptimizer: a replica could predict only its own share of the weights; "
            "use one that every replica has whole (--optimizer muon without --use-distributed-optimizer), or 'off'"
        )
    if getattr(config, "calculate_per_token_loss", False):
        yield f"{option} with --calculate-per-token-loss: the tokens of a window are counted at its end; use 'off'"
    for optimizer in optimizers(config):
        for reason in _reasons_of(optimizer, options.prediction_reach):
            yield f"{option} with {reason}"
    averaged = (getattr(each, "average_gradients_across_tp_domain", False) for each in model.parameters())
    if parallel_state.get_tensor_model_parallel_world_size() > 1 and any(averaged):
        yield f"{option} with gradients that are averaged over tensor-parallel ranks: not tried yet; use 'off'"


def _reasons_of(optimizer: Any, reach: float) -> Iterator[str]:
    settings = getattr(optimizer, "config", None)  # a bare torch optimizer has none
    if getattr(settings, "use_precision_aware_optimizer", False):
        yield "--use-precision-aware-optimizer: its masters and states lie inside of FusedAdam; leave it off"
    elif type(optimizer) not in KNOWN:
        names = ", ".join(known.__name__ for known in KNOWN)
        yield f"{type(optimizer).__name__}: weights can be predicted with {names}; use one of these, or 'off'"
    elif getattr(optimizer, "grad_scaler", None) is not None:
        yield "--loss-scale: an overflow elsewhere may skip the update, which this stage does not see; leave it off"
    elif not optimizer.is_stub_optimizer:
        try:
            check(optimizer.optimizer, reach)
        except UnsupportedError as error:
            yield str(error)


def _partial(model: torch.nn.Module, config: Any) -> list[torch.nn.Parameter]:
    """Parameters of whose gradient a slice has a part, which `finalize_model_grads` sums over the slices."""
    in_sequence, in_heads = config.sequence_parallel, getattr(config, "qk_layernorm", False)
    return [
        parameter
        for name, parameter in unwrapped(model).named_parameters()
        if (in_sequence and getattr(parameter, "sequence_parallel", False))
        or (in_heads and ("q_layernorm" in name or "k_layernorm" in name))
    ]


def _note_norms(config: Any, prediction: Prediction, device: torch.device) -> None:
    """Let predictions clip as the update before them did, by the norm that the optimizer has asked for."""
    owner = owner_of(config)
    assert owner is not None, "`reasons` asks for it"
    limit = owner.config.clip_grad
    if limit <= 0:
        return

    def noting(ask: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(ask)
        def noted(*args: Any, **kwargs: Any) -> Any:
            norm = ask(*args, **kwargs)
            # A number where Megatron-core has waited for the device, and then nobody waits once more; else a tensor.
            factor = limit / (norm + 1.0e-6)
            if isinstance(factor, torch.Tensor):
                prediction.factor = factor.detach().reshape(()).clamp(max=1.0)
            else:
                prediction.factor = torch.full((), factor if factor < 1.0 else 1.0, device=device)
            return norm

        return noted

    # One or the other, as the optimizer is a chain or not.
    owner.get_grad_norm, owner.clip_grad_norm = noting(owner.get_grad_norm), noting(owner.clip_grad_norm)
