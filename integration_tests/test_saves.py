"""A save is complete or not there: kills at random moments of it, torn folders, full disks, ranks that stay away."""

import json
import os
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from paci_schedule import CheckpointError, ConfigError
from paci_schedule.runtime import publication
from paci_schedule.runtime.meeting import Meetings, require_alike
from testing import deepspeed_job, jobs, kills, ranks
from testing.jobs import Job

TIMEOUT = timedelta(seconds=1)
KILLS = 20
OPERATIONS = 14  # of a rank in a save of the job below, about


# ---- kills ----------------------------------------------------------------------------------------------------------


def save_once(kill, folder):
    """What the engine does when it saves, with one small file of each rank, which tells its update and its rank."""
    from deepspeed.runtime.checkpoint_engine.torch_checkpoint_engine import TorchCheckpointEngine

    from paci_schedule.adapters.deepspeed.saving import PublishingEngine, find

    rank, meetings, stock = dist.get_rank(), Meetings(0, TIMEOUT), TorchCheckpointEngine()
    tag = find(folder, None, Meetings(0, timedelta(seconds=60)), looks=rank == 0)
    update = 0
    if tag is not None:
        state = stock.load(f"{folder}/{tag}/rank{rank}.pt")
        update = state["update"]
        assert state["rank"] == rank
        assert (state["weight"] == update).all()
    kills.loaded(update)
    update += 1
    final = Path(folder, "common" if update % 3 else f"step{update}")  # mostly the same tag again and again
    engine = PublishingEngine(
        stock,
        meetings,
        final,
        update,
        publishes=rank == 0,
        node="",
        latest=Path(folder, "latest") if rank == 0 else None,
    )
    with kills.saving(kill):
        engine.begin()
        new = final.with_name(publication.unfinished(final.name))
        engine.makedirs(str(new), exist_ok=True)
        engine.save({"update": update, "rank": rank, "weight": torch.full((50_000,), update)}, f"{new}/rank{rank}.pt")
        engine.commit(None)


def chain(folder, seeds):
    """One save after the other on one folder, each with a kill; how many ranks died, and saves were cut off."""
    newest, saved, died, torn = 0, False, 0, 0
    drawn = (kills.Kill.drawn(seed, 2, OPERATIONS) for seed in seeds)
    for each in kills.rounds(save_once, 2, (str(folder),), drawn):
        assert each.found == newest + 1 if saved else each.found in (newest, newest + 1), each
        newest, saved = each.found, each.saved
        died += each.ends.count("died")
        torn += not saved
        for rank, end in enumerate(each.ends):  # whoever is left ends by itself, and says whom it waited for
            assert end in ("died", "returned") or f"the other ranks of the job (rank {1 - rank})" in end, each
    return died, torn


def test_whatever_dies_in_a_save_the_newest_whole_checkpoint_loads(tmp_path):
    """Its update is the one before the save, or the one that was saved; never a mixture, never an older one."""
    chains = 4
    with ThreadPoolExecutor(chains) as pool:  # a rank that is left waits most of the time
        folders = [tmp_path / str(number) for number in range(chains)]
        seeds = [range(number, KILLS, chains) for number in range(chains)]
        died, torn = map(sum, zip(*pool.map(chain, folders, seeds), strict=True))
    assert died >= KILLS // 2
    assert torn >= KILLS // 3


# ---- checkpoints that are torn, and saves that fail -----------------------------------------------------------------


def raised(error, action):
    """The text of the error that every rank raises."""
    with pytest.raises(error) as found:
        action()
    return str(found.value)


def full_disk(engine):
    """A checkpoint engine of the user's own, whose disk is full on rank 1."""
    from deepspeed.runtime.checkpoint_engine.torch_checkpoint_engine import TorchCheckpointEngine

    class OnFullDisk(TorchCheckpointEngine):
        full = engine.global_rank == 1

        def save(self, state_dict, path):
            if self.full and "layer_" in path:
                raise OSError(28, "No space left on device")
            super().save(state_dict, path)

    return OnFullDisk()


def tear(job, folder):
    """Saves and loads, with a disk that is full and files that are torn in between; what the errors say, on a rank."""
    root, says = Path(folder), {}
    engine = deepspeed_job.build(job)
    rank, feed = engine.global_rank, jobs.data(job.model)

    def alone(action):
        dist.barrier()
        if rank == 0:
            action()
        dist.barrier()

    engine.train_batch(feed)
    engine.save_checkpoint(folder, tag="common", client_state={"mine": 7})
    engine.train_batch(feed)
    stock, engine.checkpoint_engine = engine.checkpoint_engine, full_disk(engine)
    says["full"] = raised(CheckpointError, lambda: engine.save_checkpoint(folder, tag="common"))
    says["tags"] = raised(CheckpointError, lambda: engine.save_checkpoint(folder, tag=f"tag{rank}"))
    path, state = engine.load_checkpoint(folder)
    says["loaded"] = path.rpartition("/")[0], state["mine"], engine.global_steps
    engine.checkpoint_engine.full = False
    engine.train_batch(feed)
    engine.train_batch(feed)
    engine.save_checkpoint(folder, tag="common")
    says["engine"] = type(engine.checkpoint_engine).__name__
    engine.checkpoint_engine = stock
    says["listing"] = sorted(path.name for path in root.iterdir())
    engine.train_batch(feed)
    engine.save_checkpoint(folder, tag="other", save_latest=False)
    says["latest"] = (root / "latest").read_text()
    says["update"] = json.loads((root / "common" / publication.MANIFEST).read_text())["update"]
    layer = next((root / "common").glob("layer_*"))
    alone(lambda: os.truncate(layer, 10))
    says["short"] = raised(CheckpointError, lambda: engine.load_checkpoint(folder))
    alone(layer.unlink)
    says["missing"] = raised(CheckpointError, lambda: engine.load_checkpoint(folder, tag="common"))
    alone(lambda: (root / "other").rename(root / "other.unfinished"))
    says["unfinished"] = raised(CheckpointError, lambda: engine.load_checkpoint(folder, tag="other.unfinished"))
    mixed = root / "common" / "mp_rank_01_model_states.pt"
    alone(lambda: (root / "other.unfinished" / mixed.name).replace(mixed))
    alone((root / "common" / publication.MANIFEST).unlink)
    alone(lambda: (root / "other.unfinished" / layer.name).replace(layer))
    says["mixed"] = raised(CheckpointError, lambda: engine.load_checkpoint(folder, tag="common"))
    alone(lambda: (root / "latest").write_text(""))
    says["empty"] = raised(CheckpointError, lambda: engine.load_checkpoint(folder))
    alone(lambda: (root / "latest").write_text("x" * 5000))
    says["long"] = raised(CheckpointError, lambda: engine.load_checkpoint(folder))
    return says, layer.name


def test_torn_checkpoints_and_full_disks_are_errors_on_every_rank_and_cost_nothing(tmp_path):
    """The recordings of rank 1 cannot be written either, and stop nothing."""
    job = Job(stages=2, accumulation=2, script=(), config={"paci": {"record": str(tmp_path / "recordings")}})
    (tmp_path / "recordings").mkdir()
    (tmp_path / "recordings" / "stage1-replica0.new").mkdir()
    (says, layer), other = ranks.run_ranks(tear, 2, (job, str(tmp_path / "saved")))
    own = ("loaded", "tags", "mixed")  # which name the rank's own tag or file
    assert [says[key] for key in says if key not in own] == [other[0][key] for key in says if key not in own]
    assert "rank 1: " in says["full"]
    assert "No space left on device" in says["full"]
    assert "rank 0" not in says["full"]
    assert "tag='tag0': other ranks save under other tags (tag0, tag1)" in says["tags"]
    assert says["loaded"][1:] == (7, 1)
    assert says["engine"] == "OnFullDisk"
    assert says["listing"] == ["common", "latest"]
    assert says["latest"] == "common"
    assert says["update"] == 3
    assert f"{layer} has 10 of " in says["short"]
    assert f"{layer} is missing" in says["missing"]
    assert "did not come to its end" in says["unfinished"]
    assert "of the updates 3, 4" in says["mixed"]
    assert "latest' is empty" in says["empty"]
    assert "latest': it has more than 4096 bytes, the most that is read, so it names no checkpoint" in says["long"]
    assert (tmp_path / "recordings" / "stage0-replica0.jsonl").is_file()


def test_a_folder_that_a_framework_has_written_again_is_its_own(tmp_path, monkeypatch):
    """All its files are newer than the manifest; where one of several is, and is short, it is torn."""
    new, final = tmp_path / "step.unfinished", tmp_path / "step"
    (new / publication.OURS).mkdir(parents=True)
    files = [new / "a.pt", new / "b.pt", new / publication.OURS / "late.pt"]
    for file in files:
        file.write_text("whole")
    publication.publish(final, publication.sizes(new), update=3)
    publication.check(final)
    with monkeypatch.context() as patched:
        patched.setattr(publication, "_LARGEST_MANIFEST", 20)
        assert "cannot be read (ValueError: it has more than 20 bytes" in raised(
            CheckpointError, lambda: publication.check(final)
        )
    listed = (final / publication.MANIFEST).stat().st_mtime_ns
    (final / "b.pt").write_text("cut")
    os.utime(final / "b.pt", ns=(listed + 1, listed + 1))
    assert "b.pt has 3 of 5 bytes" in raised(CheckpointError, lambda: publication.check(final))
    os.utime(final / "a.pt", ns=(listed + 1, listed + 1))
    publication.check(final)


# ---- ranks that stay away -------------------------------------------------------------------------------------------


def disagree_and_die(job):
    """Different configs, refused on both ranks; then rank 1 dies while engines are constructed."""
    import dataclasses

    from deepspeed.runtime.engine import DeepSpeedEngine

    rank = dist.get_rank()
    own = dataclasses.replace(
        job, accumulation=2 + rank, config={"paci": {"timeout": 3, "clip": ("stage", "global")[rank]}}
    )
    print(raised(ConfigError, lambda: deepspeed_job.build(own)))
    if rank == 1:
        DeepSpeedEngine._configure_lr_scheduler = lambda *_: os._exit(9)
    deepspeed_job.build(job)


def test_different_configs_are_refused_and_a_rank_lost_in_construction_is_named():
    job = Job(stages=2, accumulation=2, script=(), config={"paci": {"timeout": 3}})
    first, second = ranks.gather_outcomes(disagree_and_die, 2, (job,), timeout=60, grace=30)
    for outcome in (first, second):
        assert '"gradient_accumulation_steps" is 2 on rank 0; 3 on rank 1' in outcome.output, outcome
        assert '"paci": {"clip"} is "stage" on rank 0; "global" on rank 1' in outcome.output
        assert "number of stages" not in outcome.output
    assert second.ended == "died"
    assert first.raised[:1] == ("LinkError",), first
    assert "(rank 1) and got no answer within the timeout of 3 s" in first.error


def hang_in_an_evaluation(job):
    """Rank 1 stands still in its second evaluation's forward; how long the other one waits."""
    engine = deepspeed_job.build(job)
    feed = jobs.data(job.model)
    engine.train_batch(feed)
    engine.eval_batch(feed)
    engine.train_batch(feed)
    if engine.global_rank == 1:
        engine.module.forward_funcs[0].register_forward_pre_hook(lambda *_: time.sleep(600))
    engine.drain() if engine.global_rank == 0 else engine._runner.drain()
    started = time.monotonic()
    try:
        engine.eval_batch(feed)
    finally:
        print(f"waited {time.monotonic() - started:.1f}")


def test_a_rank_that_hangs_in_an_evaluation_ends_the_others_within_the_timeout():
    job = Job(stages=2, accumulation=2, script=(), config={"paci": {"timeout": 4}})
    first, second = ranks.gather_outcomes(hang_in_an_evaluation, 2, (job,), timeout=90, grace=1)
    assert second.ended == "killed"
    assert first.raised[:1] == ("LinkError",), first
    assert "stage 0 (rank 0) evaluated, and sent a message to stage 1 (rank 1)" in first.error
    assert float(first.output.rsplit("waited ", 1)[1].split()[0]) < 20


def be_lost_in_a_load(job, folder, how):
    """Rank 1 is lost while it reads its layers; how long the other one waits."""
    engine = deepspeed_job.build(job)
    engine.train_batch(jobs.data(job.model))
    engine.save_checkpoint(folder)
    if engine.global_rank == 1:
        engine.module.load_state_dir = lambda *_, **__: os._exit(9) if how == "dies" else time.sleep(600)
    started = time.monotonic()
    try:
        engine.load_checkpoint(folder)
    finally:
        print(f"waited {time.monotonic() - started:.1f}")


@pytest.mark.parametrize("how", ["dies", "hangs"])
def test_a_rank_that_is_lost_in_a_load_ends_the_others_within_the_timeout(how, tmp_path):
    job = Job(stages=2, accumulation=2, script=(), config={"paci": {"timeout": 3}})
    grace = 1 if how == "hangs" else 30
    first, second = ranks.gather_outcomes(be_lost_in_a_load, 2, (job, str(tmp_path), how), timeout=90, grace=grace)
    assert second.ended == {"dies": "died", "hangs": "killed"}[how], second
    assert first.raised[:1] == ("LinkError",), first
    assert "stage 0 (rank 0) loaded a checkpoint together with the other ranks of the job (rank 1)" in first.error
    assert float(first.output.rsplit("waited ", 1)[1].split()[0]) < 20


def test_settings_that_differ_are_named_with_their_ranks():
    require_alike([{"a": 1, "b": [1]}] * 3)
    with pytest.raises(ConfigError, match=r"b is \[1\] on ranks 0, 2; \[2\] on rank 1.*one config"):
        require_alike([{"a": 1, "b": [1]}, {"a": 1, "b": [2]}, {"a": 1, "b": [1]}])


def be_cut_off_while_collecting():
    """Rank 1 comes last, and dies before it has collected what the ranks have said."""
    rank, meetings = dist.get_rank(), Meetings(0, TIMEOUT)
    if rank == 1:
        while meetings._store.add("0 arrived", 0) == 0:
            time.sleep(0.01)
        meetings._collected = lambda _: os._exit(9)
    print(meetings.gather("met", rank))
    meetings.gather("met again", rank)


def test_what_everybody_has_said_is_heard_although_the_last_one_died_and_then_it_is_named():
    first, second = ranks.gather_outcomes(be_cut_off_while_collecting, 2, (), timeout=60, grace=20)
    assert second.ended == "died"
    assert "[0, 1]" in first.output
    assert "met again together with the other ranks of the job (rank 1) and got no answer" in first.error
