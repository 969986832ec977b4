"""Saves of the real pretrain_gpt.py are complete or not there, whatever dies in them."""

import os
from pathlib import Path

import pytest
import torch

from integration_tests.pretraining import CHECKOUTS, logged, pretrain, weights

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not CHECKOUTS, reason="MEGATRON_LM_CHECKOUT names no Megatron-LM checkout"),
]

COMMON = "--lr 1e-2 --min-lr 1e-3 --eval-iters 0 --eval-interval 100 --ckpt-format torch --save-interval 2"
KILLING = """
import os, runpy, signal, sys
left = {operations}
def watch(event, arguments):
    global left
    name = str(arguments[0]) if event in ("open", "os.mkdir", "os.rename") else ""
    if "iter_0000004" in name or (name.endswith(".new") and left < {operations}):
        left -= 1
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)
if os.environ["RANK"] == "{rank}":
    sys.addaudithook(watch)
sys.argv[0] = {script!r}
sys.path.insert(0, os.path.dirname({script!r}))
runpy.run_path({script!r}, run_name="__main__")
"""


@pytest.fixture(params=CHECKOUTS, ids=lambda path: Path(path).name)
def checkout(request):
    return request.param


def test_a_rank_killed_in_a_save_leaves_the_checkpoint_before(checkout, tmp_path):
    """Ranks die in the save of iteration 4; the run that goes on from what is left equals the one that was let be."""
    straight = logged(pretrain(checkout, "paci", 2, COMMON, f"--train-iters 6 --save {tmp_path}/whole"))
    for rank, operations in ((1, 1), (0, 2), (0, 4)):
        folder = tmp_path / f"{rank}-{operations}"
        script = tmp_path / f"die{rank}{operations}.py"
        script.write_text(KILLING.format(rank=rank, operations=operations, script=f"{checkout}/pretrain_gpt.py"))
        flags = f"--train-iters 6 --save {folder} --paci-timeout 20"
        pretrain(checkout, "paci", 2, COMMON, flags, script=script, expect=1)
        named = (folder / "latest_checkpointed_iteration.txt").read_text()
        assert named in ("2", "4")
        resumed = logged(pretrain(checkout, "paci", 2, COMMON, f"--train-iters 6 --save {folder} --load {folder}"))
        assert list(resumed) == list(range(int(named) + 1, 7))
        assert {key: line[3] for key, line in resumed.items()} == {key: straight[key][3] for key in resumed}
        for stage in range(2):
            ours, theirs = (
                weights(f"{each}/iter_0000006/mp_rank_00_{stage:03}") for each in (folder, tmp_path / "whole")
            )
            assert all(torch.equal(ours[name], theirs[name]) for name in ours)
        assert not list(folder.glob("*.unfinished"))
    torn = next(folder.glob("iter_0000006/mp_rank_00_001/*.pt"))
    os.truncate(torn, 100)
    said = pretrain(checkout, "paci", 2, COMMON, f"--train-iters 8 --load {folder}", expect=1)
    assert f"{torn.relative_to(folder / 'iter_0000006')} has 100 of " in said
    assert "Traceback" not in said.split("has 100 of ")[0].rpartition("\n")[2]
