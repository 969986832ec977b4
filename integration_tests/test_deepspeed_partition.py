"""The measured cut: the same on every rank, and training with it is training with the same cut given by hand."""

import itertools
import re
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import nn

from testing.ranks import gather_outcomes, run_ranks


class Clock:
    """Stands still but for `Clocked`, so that what is measured does not depend on the machine."""

    seconds = 0.0

    def __deepcopy__(self, memo):
        return self


class Clocked(nn.Module):
    """A layer whose backward moves a clock."""

    def __init__(self, clock, seconds, width=4):
        super().__init__()
        self.linear = nn.Linear(width, width)
        self.clock, self.seconds = clock, seconds

    def forward(self, values):
        if values.requires_grad:
            values.register_hook(self._took)
        return torch.tanh(self.linear(values))

    def _took(self, gradient):
        self.clock.seconds += self.seconds
        return gradient


def scaled(values):
    """A layer without parameters."""
    return values * 0.5


def logits(module, values):
    """A tied embedding as a head."""
    return nn.functional.linear(values, module.weight)


def loss(outputs, labels):
    return nn.functional.cross_entropy(outputs.flatten(0, -2), labels.flatten())


def data():
    for number in itertools.count():
        generator = torch.Generator().manual_seed(number)
        yield tuple(torch.randint(0, 9, (6,), generator=generator) for _ in range(2))


def model(costs):
    """Embedding and head tied, `costs` for the layers between, one of them a module that is made already."""
    from deepspeed.pipe import LayerSpec, TiedLayerSpec

    clock = Clock()
    torch.manual_seed(3)
    inner = [LayerSpec(Clocked, clock, seconds) for seconds in costs]
    inner[1] = inner[1].build()
    tied = TiedLayerSpec("words", nn.Embedding, 9, 4), TiedLayerSpec("words", nn.Embedding, 9, 4, forward_fn=logits)
    return [tied[0], *inner, scaled, tied[1]], mock.patch(
        "paci_schedule.measure.profile.time", SimpleNamespace(perf_counter=lambda: clock.seconds)
    )


def trained(layers, partition):
    """Layer bounds, the first weights, and weights and losses after some batches under PACI."""
    import deepspeed

    import paci_schedule
    from paci_schedule.adapters.deepspeed import CutPipelineModule

    paci_schedule.register("deepspeed")
    module = CutPipelineModule(layers, num_stages=2, loss_fn=loss, partition_method=partition)
    first = weights(module)
    engine, *_ = deepspeed.initialize(
        model=module,
        config={
            "train_micro_batch_size_per_gpu": 6,
            "gradient_accumulation_steps": 3,
            "pipeline_schedule": "paci",
            "optimizer": {"type": "AdamW", "params": {"lr": 1e-2, "torch_adam": True}},
        },
    )
    feed = data()
    losses = [float(engine.train_batch(feed)) for _ in range(4)] + [float(engine.drain())]
    return module.parts, first, weights(module), losses


def weights(module):
    return {name: value.detach().clone() for name, value in module.named_parameters()}


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def measure_and_train(file):
    import deepspeed

    from paci_schedule.adapters.deepspeed import balanced_cut

    deepspeed.init_distributed(verbose=False)
    # Rank 1 would find another cut, if it were asked.
    layers, clock = model([2, 3, 5, 7, 11] if dist.get_rank() == 0 else [11, 7, 5, 3, 2])
    options = {"num_stages": 2, "loss_fn": loss, "file": file}
    with clock:
        cut = balanced_cut(layers, next(data()), **options)
    known = balanced_cut([None] * 8, None, **options)  # read, not measured
    measured, by_hand = trained(layers, cut), trained(model([2, 3, 5, 7, 11])[0], [0, 5, 8])
    return {
        "cut": cut,
        "known": known,
        "parts": (measured[0], by_hand[0]),
        "losses": (measured[3], by_hand[3]),
        "first weights": same(measured[1], by_hand[1]),
        "last weights": same(measured[2], by_hand[2]),
        "moved": not same(measured[1], measured[2]),
    }


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    return run_ranks(measure_and_train, 2, (str(tmp_path_factory.mktemp("cut") / "new" / "cut.json"),))


def test_every_rank_gets_the_cut_that_rank_0_measured(measured):
    """Layers: embedding 0, then 2 + 3 + 5 + 7 + 11, scaled 0, head 0 seconds."""
    assert [rank["cut"].bounds for rank in measured] == [(0, 5, 8)] * 2
    assert [rank["cut"].seconds for rank in measured] == [(17, 11)] * 2
    assert measured[0]["cut"] == measured[1]["cut"]


def test_a_cut_is_kept_in_its_file(measured):
    assert [rank["known"] == rank["cut"] for rank in measured] == [True] * 2


def test_training_with_the_measured_cut_is_training_with_the_same_cut_by_hand(measured):
    for rank in measured:
        assert rank["parts"] == ([0, 5, 8],) * 2
        assert rank["first weights"]
        assert rank["last weights"]
        assert rank["moved"]
        assert str(rank["losses"][0]) == str(rank["losses"][1])


def stock_methods():
    from deepspeed.pipe import PipelineModule

    from paci_schedule.adapters.deepspeed import CutPipelineModule

    def parts(kind, method):
        module = kind(model([2, 3, 5, 7, 11])[0], num_stages=2, loss_fn=loss, partition_method=method)
        return module.parts, [name for name, _ in module.named_parameters()]

    import deepspeed

    deepspeed.init_distributed(verbose=False)
    return [
        (method, parts(PipelineModule, method), parts(CutPipelineModule, method), parts(CutPipelineModule, bounds))
        for method, bounds in (("uniform", [0, 4, 8]), ("parameters", (0, 4, 8)), ("type:clocked", [0, 4, 8]))
    ]


def test_deepspeeds_own_methods_stay_as_they_are():
    for rank in run_ranks(stock_methods, 2):
        for method, stock, ours, by_hand in rank:
            assert stock == ours, method
            assert stock == by_hand, method


def refused(what):
    import deepspeed

    from paci_schedule.adapters.deepspeed import CutPipelineModule, balanced_cut

    deepspeed.init_distributed(verbose=False)
    layers, _ = model([1, 2])
    options = {"num_stages": 2, "loss_fn": loss}
    if what == "layer":
        layers[2] = nn.Linear(7, 4)
    elif what == "limit":
        options["memory_limit"] = 100
    elif what == "bounds":
        CutPipelineModule(layers, partition_method=[0, 5, 6], **options)
    else:
        options["file"] = what
    balanced_cut(layers, next(data()), **options)


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("layer", r"layer 2, Linear, fails on float32\[6, 4\]: RuntimeError"),
        ("limit", r"memory_limit: no partition keeps to it; in the nearest, \[.*stage 0 needs"),
        ("file", r"holds no partition of this model \(partition \[0, 2, 9\].*remove it to measure anew"),
    ],
    ids=["layer", "limit", "file"],
)
def test_where_one_rank_finds_no_cut_all_of_them_say_so(what, message, tmp_path):
    if what == "file":
        path = tmp_path / "cut.json"
        path.write_text('{"bounds": [0, 2, 9], "seconds": [1, 2], "peak_bytes": [3, 4]}')
        what = str(path)
    ours, other = gather_outcomes(refused, 2, (what,), timeout=60)
    expected = "NothingFitsError" if what == "limit" else "ConfigError"
    assert (ours.raised[0], other.raised[0]) == (expected, "PaciError")
    assert re.search(message, ours.error)
    assert "rank 0 found no partition: " in other.error


def test_bounds_that_are_no_cut_of_the_model_are_refused_on_every_rank():
    for rank in gather_outcomes(refused, 2, ("bounds",), timeout=60):
        assert rank.raised[0] == "ConfigError"
        assert "partition [0, 5, 6]: 5 layers in 2 stages need 3 bounds that rise from 0 to 5" in rank.error


def predict_and_count(bounds, every):
    """This stage's peak by the profile, and as its storages are counted in training; weights in neither."""
    import deepspeed
    from deepspeed.pipe import LayerSpec

    import paci_schedule
    from paci_schedule.adapters.deepspeed import CutPipelineModule, layer_costs
    from paci_schedule.measure.live_bytes import LiveBytes
    from paci_schedule.plan.partition import evaluate, memory_of_stages

    deepspeed.init_distributed(verbose=False)
    paci_schedule.register("deepspeed")
    block = LayerSpec(nn.TransformerEncoderLayer, 32, 2, 64, 0.1, batch_first=True)
    layers = [LayerSpec(nn.Embedding, 300, 32), *[block] * 6, LayerSpec(nn.Linear, 32, 300)]
    ids = torch.arange(512).remainder(300).reshape(8, 64)
    micro_batch = ids, ids.roll(1)
    costs = layer_costs(layers, micro_batch, loss_fn=loss, repeats=1)
    stages = paci_schedule.PipelineSpec(stages=3, accumulation=1)
    memories = memory_of_stages(stages, bytes_per_parameter=4)  # gradients in fp32
    expected = evaluate(costs, memories, bounds, recompute_every=every).peak_bytes[dist.get_rank()]
    module = CutPipelineModule(layers, num_stages=3, loss_fn=loss, partition_method=bounds)
    engine, *_ = deepspeed.initialize(
        model=module,
        config={
            "train_micro_batch_size_per_gpu": 8,
            "gradient_accumulation_steps": 4,
            "pipeline_schedule": "paci",
            "optimizer": {"type": "SGD", "params": {"lr": 1e-2}},
            "gradient_clipping": 0.0,
            # Reentrant, the default, takes what comes from integers out of the backward: the embedding, all after it.
            "pipeline": {"activation_checkpoint_interval": every, "use_reentrant": False},
        },
    )
    feed = itertools.repeat(micro_batch)
    engine.train_batch(feed)
    engine.drain()
    engine.zero_grad()
    with LiveBytes() as counter:
        for _ in range(3):
            engine.train_batch(feed)
    return expected, counter.peak


@pytest.mark.parametrize(
    ("bounds", "every", "tolerance"), [([0, 2, 5, 8], 0, 0.05), ([0, 4, 6, 8], 0, 0.05), ([0, 3, 6, 8], 2, 0.15)]
)
def test_a_stages_peak_is_predicted(bounds, every, tolerance):
    for expected, counted in run_ranks(predict_and_count, 3, (bounds, every)):
        assert expected == pytest.approx(counted, rel=tolerance)


class Sliced(nn.Module):
    """A layer that sums over its tensor-parallel group."""

    def __init__(self, group):
        super().__init__()
        self.linear, self.group = nn.Linear(4, 4), group

    def forward(self, values):
        values = self.linear(values)
        total = values.detach().clone()
        dist.all_reduce(total, group=self.group)
        return values + total


def tensor_parallel():
    import deepspeed
    from deepspeed.pipe import LayerSpec
    from deepspeed.runtime.pipe.topology import PipeModelDataParallelTopology

    from paci_schedule.adapters.deepspeed import CutPipelineModule, balanced_cut

    deepspeed.init_distributed(verbose=False)
    topology = PipeModelDataParallelTopology(num_pp=2, num_mp=2, num_dp=1)
    groups = [dist.new_group(ranks) for ranks in topology.get_axis_comm_lists("model")]
    mine = groups[dist.get_rank() // 2]
    layers = [*(LayerSpec(Sliced, mine) for _ in range(4)), Sliced(mine)]
    micro_batch = torch.ones(2, 4), torch.zeros(2, 4)
    cut = balanced_cut(layers, micro_batch, topology=topology, loss_fn=nn.MSELoss())
    return cut, CutPipelineModule(layers, topology=topology, partition_method=cut).parts


def test_tensor_parallel_ranks_measure_together():
    results = run_ranks(tensor_parallel, 4)
    assert len({cut for cut, _ in results}) == 1
    assert all(parts == list(cut.bounds) for cut, parts in results)
