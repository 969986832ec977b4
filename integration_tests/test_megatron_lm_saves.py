"""Saves of the real pretrain_gpt.py are complete or not there, whatever dies in them, in each of its formats."""

import os
import random
import re
from functools import cache
from pathlib import Path

import pytest
import torch

from integration_tests.pretraining import CHECKOUTS, distributed, logged, pretrain, weights
from paci_schedule.adapters.frameworks import exists

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not CHECKOUTS, reason="MEGATRON_LM_CHECKOUT names no Megatron-LM checkout"),
]

COMMON = "--lr 1e-2 --min-lr 1e-3 --eval-iters 0 --eval-interval 100 --train-iters 4"
SHARED = "--ckpt-format torch_dist"
BACKGROUND = f"{SHARED} --async-save --use-persistent-ckpt-worker"
TRANSIENT = "--save-interval 100 --non-persistent-save-interval 2 --non-persistent-ckpt-type"
KINDS = {
    "torch": (1, "--ckpt-format torch --save-interval 2"),
    "shared by replicas": (2, f"{SHARED} --save-interval 2 --global-batch-size 6"),
    "in the background": (1, f"{BACKGROUND} --save-interval 2"),
    "non-persistent": (1, f"{SHARED} {TRANSIENT} global"),
    "non-persistent, in the background, of replicas": (2, f"{BACKGROUND} {TRANSIENT} global --global-batch-size 6"),
    "local": (1, f"{SHARED} {TRANSIENT} local --non-persistent-local-ckpt-dir FOLDER/local"),
}
"""Replicas, and flags; FOLDER is that of --save."""

# A process that is forked to write has the hook too, and ends the rank that it writes for.  What is written in the
# background is finished before the third iteration.
WATCHED = """
import atexit, os, runpy, signal, sys, time
sys.path[0] = os.path.dirname({script!r})
from megatron.training import training
step, steps = training.train_step, []
def train_step(*values, **options):
    steps.append(0)
    if len(steps) == 3:
        training.maybe_finalize_async_save(blocking=True)
    return step(*values, **options)
training.train_step = train_step
doom, count, me = {doom}, 0, os.getpid()
def watch(event, arguments):
    global count
    name = str(arguments[0]) if event in ("open", "os.mkdir", "os.rename", "os.remove") else ""
    if {mark!r} in name or (count and name.endswith(".new")):
        count += 1
        if [os.environ["RANK"], count] == doom:
            {fate}
sys.addaudithook(watch)
told = "rank {{}} did {{}} operations"
atexit.register(lambda: os.getpid() == me and print(told.format(os.environ["RANK"], count), flush=True))
sys.argv[0] = {script!r}
runpy.run_path({script!r}, run_name="__main__")
"""
DIES, HANGS = "os.kill(me, signal.SIGKILL)", "time.sleep(600)"


@pytest.fixture(params=CHECKOUTS, ids=lambda path: Path(path).name)
def checkout(request):
    return request.param


def flags_of(kind, checkout, folder):
    """The flags of a kind of save into this folder, for this Megatron-LM, of whose two ways to write in the background
    the other one needs a package."""
    flags = f"{KINDS[kind][1].replace('FOLDER', str(folder))} --save {folder}"
    has_strategies = "async_strategy" in Path(checkout, "megatron/training/async_utils.py").read_text(encoding="utf-8")
    return f"{flags} --async-strategy mcore" if has_strategies and "--async-save" in flags else flags


def written(tmp_path, checkout, doom=None, fate="pass", mark="iter_0000004"):
    """A script that is pretrain_gpt.py; the rank `doom[0]` meets its fate at its file operation `doom[1]` of a save."""
    script = tmp_path / f"watched-{doom and '-'.join(map(str, doom))}.py"
    doom = doom and [str(doom[0]), doom[1]]
    script.write_text(WATCHED.format(doom=doom, fate=fate, mark=mark, script=f"{checkout}/pretrain_gpt.py"))
    return script


def values(folder):
    """Every weight and every state of the checkpoint of iteration 4 in a folder, by name."""
    ranks = sorted(folder.glob("mp_rank_*"))
    return {f"{at.name} {name}": value for at in ranks for name, value in weights(at).items()} or distributed(folder)


@cache
def whole(checkout, kind, root):
    """The run of a kind that is let be: its log, what it computed, and the file operations of each rank's save."""
    replicas, folder = KINDS[kind][0], root / "whole"
    flags = flags_of(kind, checkout, folder)
    said = pretrain(checkout, "paci", 2, COMMON, flags, script=written(root, checkout), replicas=replicas)
    counted = {int(rank): int(count) for rank, count in re.findall(r"rank (\d+) did (\d+) operations", said)}
    assert sorted(counted) == list(range(2 * replicas))
    assert min(counted.values()) > 0
    return logged(said), folder, counted


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return cache(lambda *names: tmp_path_factory.mktemp("saves"))


@pytest.mark.parametrize("seed", [1, 2])
@pytest.mark.parametrize("kind", KINDS)
def test_a_rank_killed_in_a_save_leaves_the_checkpoint_before(checkout, kind, seed, root, tmp_path):
    """A rank dies in the save of iteration 4; the run that goes on from what is left equals the one that was let be."""
    if kind == "local" and not exists("nvidia_resiliency_ext"):
        pytest.skip("nvidia-resiliency-ext is not installed")
    straight, truth, counted = whole(checkout, kind, root(checkout, kind))
    draw = random.Random(seed)
    rank = draw.randrange(len(counted))
    doom = rank, draw.randint(1, counted[rank])
    replicas, folder = KINDS[kind][0], tmp_path / "cut"
    flags = flags_of(kind, checkout, folder)
    said = pretrain(
        checkout, "paci", 2, COMMON, flags, script=written(tmp_path, checkout, doom, DIES), replicas=replicas, expect=1
    )
    assert "Signal 9 (SIGKILL)" in said, doom
    named = [path.read_text() for path in folder.rglob("latest_checkpointed_iteration.txt")]
    assert named or kind == "local"
    said = pretrain(checkout, "paci", 2, COMMON, flags, f"--load {folder}", replicas=replicas)
    resumed = logged(said)
    assert "begins with nothing deferred" not in said
    assert list(resumed) in ([3, 4], []), doom
    assert kind == "local" or list(resumed) == list(range(int(max(named)) + 1, 5)), doom
    assert {key: line[3] for key, line in resumed.items()} == {key: straight[key][3] for key in resumed}
    assert not resumed or not list(folder.rglob("*.unfinished*"))  # what trains nothing, saves as Megatron does
    if kind == "local":
        assert {path.name for path in (folder / "paci_schedule").iterdir()} == {"iter_0000004"}
    for manifest in folder.rglob("iter_0000004/paci_manifest.json"):
        ours = values(manifest.parent)
        theirs = values(truth / manifest.parent.relative_to(folder))
        assert len(ours) > 10
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[name], theirs[name]) for name in ours)
        assert len(list((manifest.parent / "paci_schedule").iterdir())) == 2


def test_a_torn_checkpoint_is_named_before_anything_is_loaded(checkout, root):
    for kind, at in (("torch", "."), ("non-persistent", "non_persistent")):
        folder = whole(checkout, kind, root(checkout, kind))[1]
        final = folder / at / "iter_0000004"
        torn = next(path for path in final.rglob("*") if path.suffix in (".pt", ".distcp"))
        size = torn.stat().st_size
        os.truncate(torn, 100)
        said = pretrain(checkout, "paci", 2, COMMON, KINDS[kind][1], f"--load {folder}", expect=1)
        assert f"{torn.relative_to(final)} has 100 of {size} bytes" in said
        assert "Traceback" not in said.split("has 100 of ")[0].rpartition("\n")[2]


def test_megatron_removes_its_checkpoints_and_what_is_ours_with_them(checkout, tmp_path):
    """--save-retain-interval, and the non-persistent ones that are older than the one before."""
    flags = f"--train-iters 4 --save-interval 1 --ckpt-format torch --save-retain-interval 3 --save {tmp_path}/torch"
    pretrain(checkout, "paci", 2, COMMON.replace("--train-iters 4", ""), flags)
    assert {path.name for path in (tmp_path / "torch").glob("iter_*")} == {"iter_0000003", "iter_0000004"}
    flags = flags_of("non-persistent, in the background, of replicas", checkout, tmp_path / "background")
    pretrain(checkout, "paci", 2, COMMON, flags.replace("-save-interval 2", "-save-interval 1"))
    found = {path.name for path in (tmp_path / "background" / "non_persistent").glob("iter_*")}
    assert found == {"iter_0000003", "iter_0000004"}
    assert not list(tmp_path.rglob("paci_schedule/iter_*"))


# ---- ranks that are lost, and do not die -----------------------------------------------------------------------------


@pytest.mark.parametrize(("doing", "lost"), [("saved", 0), ("saved", 1), ("loaded", 1)])
def test_a_rank_that_hangs_in_a_save_or_a_load_is_named_within_the_timeout(checkout, doing, lost, root, tmp_path):
    flags = KINDS["torch"][1]
    mark, load = "iter_0000004", ""
    if doing == "loaded":
        mark, load = (
            "model_optim_rng.pt",
            f"--load {whole(checkout, 'torch', root(checkout, 'torch'))[1]} --ckpt-step 2",
        )
    said = pretrain(
        checkout,
        "paci",
        2,
        COMMON,
        flags,
        f"--save {tmp_path}/saved --paci-timeout 8 {load}",
        script=written(tmp_path, checkout, (lost, 2 - (doing == "loaded")), HANGS, mark),
        expect=1,
    )
    does = "loaded a checkpoint" if doing == "loaded" else "(began to save|wrote|saved|published) a checkpoint"
    told = rf"LinkError: stage {1 - lost} \(rank {1 - lost}\) {does} together with .*rank.* {lost}\b"
    assert re.search(told, said), said[-3000:]


DEAD = """
import runpy, sys
sys.path[0] = {checkout!r}
from megatron.training import async_utils, checkpointing
from megatron.core.dist_checkpointing.strategies import async_utils as callers
schedule, calls = checkpointing.schedule_async_save, []
def schedule_async_save(request):
    schedule(request)
    calls.append(0)
    if len(calls) == 2:
        async_utils._async_calls_queue.async_calls[-1].async_caller.process.kill()
checkpointing.schedule_async_save = schedule_async_save
runpy.run_path({checkout!r} + "/pretrain_gpt.py", run_name="__main__")
"""


def test_a_writer_that_dies_in_the_background_is_named(checkout, tmp_path):
    """Megatron-LM would wait for it without end."""
    script = tmp_path / "dead.py"
    script.write_text(DEAD.format(checkout=checkout))
    flags = flags_of("in the background", checkout, tmp_path / "saved")
    said = pretrain(checkout, "paci", 2, COMMON, flags, script=script, expect=1)
    assert re.search(
        r"CheckpointError: the process that writes checkpoints for rank [01] .* ended with exit code -9", said
    )
    tracker = tmp_path / "saved" / "latest_checkpointed_iteration.txt"  # not there if the first save was under way too
    assert not tracker.exists() or tracker.read_text() == "2"
