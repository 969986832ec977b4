"""The patches apply to the upstream version that they name, and the flag or key works there without our launcher."""

import os
import re
import shlex
import shutil
import subprocess
import sys
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PATCHES = sorted((ROOT / "patches").glob("*.patch"))
CHECKOUTS = [Path(path) for path in os.environ.get("MEGATRON_LM_CHECKOUT", "").split(os.pathsep) if path]


def apply(patch, folder):
    run = subprocess.run(
        ["patch", "-p1", "--fuzz=0", "-d", folder, "-i", patch], capture_output=True, text=True, timeout=60, check=False
    )
    assert run.returncode == 0, run.stdout + run.stderr


def run(arguments, folder, **environment):
    """Run Python with `folder` first on its path; returns what it wrote."""
    path = f"{folder}{os.pathsep}{ROOT}"
    done = subprocess.run(
        [sys.executable, "-W", "ignore", *arguments],
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
        cwd=folder,
        env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", **environment},
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    return done.stdout + done.stderr


def copied(source, target, names):
    """`source` as links in `target`, but for the files `names`, which are copies that can be patched."""
    for name in names:
        path = target / name
        path.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(source / name, path)
        for folder in path.relative_to(target).parents:
            for sibling in (source / folder).iterdir():
                link = target / folder / sibling.name
                if not link.exists():
                    if any(str(folder / sibling.name) in map(str, Path(other).parents) for other in names):
                        link.mkdir()
                    else:
                        link.symlink_to(sibling)
    return target


def touched(patch):
    return re.findall(r"^\+\+\+ b/(\S+)", patch.read_text(encoding="utf-8"), re.MULTILINE)


@pytest.mark.parametrize("patch", PATCHES, ids=lambda patch: patch.name)
def test_a_patch_says_what_it_changes_why_and_when_it_can_go(patch):
    header = patch.read_text(encoding="utf-8").partition("--- a/")[0]
    assert all(f"\n{word}" in header for word in ("What:", "Why: ", "Gone:", "Apply with: "))
    assert patch.name in header
    assert touched(patch)


def test_the_deepspeed_patch_applies_and_works(tmp_path):
    if find_spec("deepspeed") is None:
        pytest.skip("deepspeed is not installed")
    [patch] = [patch for patch in PATCHES if patch.name.startswith("deepspeed")]
    if version("deepspeed") not in patch.name:
        pytest.skip(f"deepspeed {version('deepspeed')} is installed, the patch is for another version")
    installed = Path(find_spec("deepspeed").origin).parent
    (tmp_path / "copy" / "deepspeed").mkdir(parents=True)
    copy = tmp_path / "copy"
    for entry in installed.iterdir():
        if entry.name != "__init__.py":
            (copy / "deepspeed" / entry.name).symlink_to(entry)
    shutil.copy(installed / "__init__.py", copy / "deepspeed")
    apply(patch, copy)
    said = run(
        ["-c", DEEPSPEED_JOB],
        copy,
        DS_ACCELERATOR="cpu",
        DS_BUILD_OPS="0",
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT="0",
        RANK="0",
        LOCAL_RANK="0",
        WORLD_SIZE="1",
        LOCAL_WORLD_SIZE="1",
    )
    assert f"{copy}/deepspeed/__init__.py" in said
    assert "engines: PipelineEngine PaciPipelineEngine" in said


DEEPSPEED_JOB = """
import sys, torch, torch.distributed as dist
import deepspeed
# It would be compiled anew for this folder, and after that again for its own.
sys.modules["deepspeed.comm.torch"].build_shm_op = lambda: None
store = dist.TCPStore("127.0.0.1", 0, 1, True)
dist.init_process_group("gloo", store=store, rank=0, world_size=1)
deepspeed.init_distributed("gloo")
print(deepspeed.__file__)
def engine(**more):
    module = deepspeed.pipe.PipelineModule([deepspeed.pipe.LayerSpec(torch.nn.Linear, 4, 4)], num_stages=1)
    config = {"train_micro_batch_size_per_gpu": 1, "gradient_accumulation_steps": 2,
              "optimizer": {"type": "SGD", "params": {"lr": 0.1}}, **more}
    return type(deepspeed.initialize(model=module, config=config)[0]).__name__
print("engines:", engine(), engine(pipeline_schedule="paci"))
"""


@pytest.mark.parametrize("patch", [each for each in PATCHES if "megatron" in each.name], ids=lambda patch: patch.name)
def test_a_megatron_lm_patch_applies_and_works(patch, tmp_path):
    """--pipeline-schedule is the script's own flag then."""
    minor = "16" if "0.16" in patch.name else "20"
    fitting = [
        path
        for path in CHECKOUTS
        if f"MINOR = {minor}\n" in (path / "megatron/core/package_info.py").read_text(encoding="utf-8")
    ]
    if not fitting:
        pytest.skip(f"MEGATRON_LM_CHECKOUT names no checkout of Megatron-core 0.{minor}")
    copy = copied(fitting[0], tmp_path, touched(patch))
    apply(patch, copy)
    script = shlex.split("""--transformer-impl local --no-persist-layer-norm --no-masked-softmax-fusion
        --no-bias-gelu-fusion
        --no-gradient-accumulation-fusion --no-bias-dropout-fusion --no-rope-fusion --attention-backend unfused
        --num-layers 2 --hidden-size 16 --num-attention-heads 2 --seq-length 16 --max-position-embeddings 16
        --micro-batch-size 1 --global-batch-size 2 --lr 1e-1 --train-iters 4 --eval-iters 0 --eval-interval 9
        --mock-data --tokenizer-type NullTokenizer --vocab-size 31 --make-vocab-size-divisible-by 1 --num-workers 0
        --no-create-attention-mask-in-dataloader --log-interval 1 --split 100,0,0 --distributed-backend gloo
        --rerun-mode disabled --pipeline-model-parallel-size 2""")
    start = [
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
        "-m",
        "testing.megatron_cpu",
        "pretrain_gpt",
    ]
    losses = {
        chosen: re.findall(r"iteration +\d/ +4 .*lm loss: (\S+)", run([*start, *script, *chosen], copy))
        for chosen in ((), ("--pipeline-schedule", "1f1b"), ("--pipeline-schedule", "paci"))
    }
    absent, flushed, paci = losses.values()
    assert len(paci) == 4
    assert absent == flushed != paci
