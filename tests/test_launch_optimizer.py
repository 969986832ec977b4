"""Weight-decay groups and the learning-rate schedule."""

import itertools
import math

import pytest
import torch
from torch import nn

from launch.optimizer import optimizer_name, warm_up_cosine, weight_decay_groups


def test_matrices_decay_and_vectors_do_not():
    module = nn.Sequential(nn.Embedding(7, 3), nn.LayerNorm(3), nn.Linear(3, 5))
    module[2].weight.requires_grad_(False)
    decayed, kept = weight_decay_groups(module)
    assert "weight_decay" not in decayed
    assert kept["weight_decay"] == 0.0
    assert [parameter.shape for parameter in decayed["params"]] == [(7, 3)]
    assert [parameter.shape for parameter in kept["params"]] == [(3,), (3,), (5,)]


def test_the_rate_warms_up_linearly_and_falls_as_a_cosine_to_a_tenth():
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(2))], lr=3.0)
    scheduler = warm_up_cosine(updates=14, warm_up=4)(optimizer)
    rates = []
    for _ in range(16):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    assert rates[:5] == pytest.approx([0.75, 1.5, 2.25, 3.0, 3.0])
    assert rates[9] == pytest.approx(3.0 * (0.1 + 0.9 / 2))
    assert rates[11] == pytest.approx(3.0 * (0.1 + 0.9 * (1 + math.cos(math.pi * 0.7)) / 2))
    assert rates[14:] == pytest.approx([0.3, 0.3])
    assert all(late < early for early, late in itertools.pairwise(rates[4:15]))


def test_the_logged_name_tells_decoupled_decay():
    weights = [nn.Parameter(torch.zeros(2))]
    assert optimizer_name(torch.optim.AdamW(weights)) == "AdamW"
    assert optimizer_name(torch.optim.NAdam(weights)) == "NAdam"
    assert optimizer_name(torch.optim.NAdam(weights, decoupled_weight_decay=True)) == "NAdamW"
