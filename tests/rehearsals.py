"""Small models and data for rehearsals."""

import pytest
import torch
from torch import nn

from paci_schedule.rehearse import rehearse

RATE = 0.125
PREDICTIONS = ["window", "every", 1, 2, 3]


@pytest.fixture(autouse=True)
def one_thread():
    """The tensors are tiny: threads that wait for each other are slow on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


class Scale(nn.Module):
    """x times a weight: loss x w0 w1 ... has gradients that are products of the other stages' weights."""

    def __init__(self, weight):
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(weight, dtype=torch.float64))

    def forward(self, x):
        return x * self.weight


def sgd(modules, **options):
    return [torch.optim.SGD(module.parameters(), lr=RATE, **options) for module in modules]


def network(stages=4):
    torch.manual_seed(1)
    return [nn.Sequential(nn.Linear(6, 6), nn.LayerNorm(6), nn.Tanh()) for _ in range(stages)]


def adamw(modules):
    return [torch.optim.AdamW(module.parameters(), lr=0.05, weight_decay=0.1) for module in modules]


def batches_of(count, a, same=False):
    generator = torch.Generator().manual_seed(9)
    pairs = [(torch.randn(3, 6, generator=generator), torch.randn(3, 6, generator=generator)) for _ in range(count * a)]
    return [[pairs[0] if same else pairs[at + number] for number in range(a)] for at in range(0, count * a, a)]


def loss_fn(output, labels):
    return nn.functional.mse_loss(output, labels)


def values(modules):
    return [parameter.detach().clone() for module in modules for parameter in module.parameters()]


def same(one, other):
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def trained(make=adamw, count=6, a=4, stages=4, **options):
    modules = network(stages)
    losses = [
        each.loss for each in rehearse(modules, make(modules), loss_fn, batches_of(count, a), accumulation=a, **options)
    ]
    return values(modules), losses
