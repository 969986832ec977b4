"""`python -m paci_schedule.launch script.py ...` registers and runs the script unchanged, under any launcher."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from testing import ranks

ROOT = Path(__file__).parents[1]

SCRIPT = """
import argparse, json, os, sys
import helper                                    # lies beside the script
import deepspeed
from deepspeed.pipe import PipelineModule
from testing import deepspeed_job, jobs
from testing.jobs import Job

assert __name__ == "__main__"
parser = argparse.ArgumentParser()
parser.add_argument("--local_rank", type=int, default=-1)
parser.add_argument("--out")
parser.add_argument("--steps", type=int)
parser.add_argument("words", nargs="*")
arguments = parser.parse_args()
deepspeed.init_distributed(verbose=False)
job = Job(stages=2, accumulation=2, script=())
module = PipelineModule(jobs.layers(job.model), num_stages=2, partition_method="uniform", loss_fn=jobs.loss)
parameters = list(module.parameters())
engine, *_ = deepspeed.initialize(model=module, optimizer=jobs.optimizer(job), model_parameters=parameters,
                                  config=deepspeed_job.config(job, "paci"))
feed = jobs.data(job.model)
losses = [engine.train_batch(feed).item() for _ in range(arguments.steps)]
engine.drain()
with open(f"{arguments.out}/{engine.stage_id}.json", "w") as file:
    json.dump({"argv": sys.argv, "path": sys.path[0], "words": arguments.words, "help": helper.HELP,
               "version": engine.pipeline_stats()["version"], "engine": type(engine).__name__,
               "losses": [str(loss) for loss in losses]}, file)
"""


def launch(*command, **options):
    """Run a launcher; its result, with what it printed."""
    environment = {
        **os.environ,
        "DS_ACCELERATOR": "cpu",
        "DS_BUILD_OPS": "0",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(ROOT),
    }
    return subprocess.run(
        [sys.executable, "-m", *command],
        capture_output=True,
        text=True,
        timeout=180,
        env=environment,
        check=False,
        **options,
    )


@pytest.mark.skipif(ranks.on_gpus(2), reason="the script trains on the CPU")
def test_torchrun_runs_the_script_with_the_schedule(tmp_path):
    script = tmp_path / "folder" / "train.py"
    script.parent.mkdir()
    script.write_text(SCRIPT)
    (script.parent / "helper.py").write_text("HELP = 42\n")
    done = launch(
        "torch.distributed.run",
        "--nproc_per_node",
        "2",
        "--rdzv-backend",
        "c10d",
        "--rdzv-endpoint",
        "localhost:0",
        "-m",
        "paci_schedule.launch",
        str(script),
        "--out",
        str(tmp_path),
        "--steps",
        "3",
        "one",
        "two words",
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    for stage in range(2):
        told = json.loads((tmp_path / f"{stage}.json").read_text())
        assert told["argv"] == [str(script), "--out", str(tmp_path), "--steps", "3", "one", "two words"]
        assert told["words"] == ["one", "two words"]
        assert told["path"] == str(script.parent)
        assert (told["help"], told["version"]) == (42, 3)
        assert told["engine"] != "PipelineEngine"
        assert all(float(loss) == float(loss) for loss in told["losses"])


def test_deepspeeds_launcher_runs_the_script_with_the_schedule(tmp_path):
    """It puts --local_rank before the script's name."""
    script = tmp_path / "train.py"
    script.write_text(
        "import deepspeed, json, os, pathlib, sys\n"
        "told = {'argv': sys.argv[1:], 'module': deepspeed.DeepSpeedEngine.__new__.__module__}\n"
        f"pathlib.Path({str(tmp_path)!r}, os.environ['RANK']).write_text(json.dumps(told))\n"
    )
    done = launch(
        "deepspeed.launcher.runner", "--num_gpus", "2", "--module", "paci_schedule.launch", str(script), "--steps", "3"
    )
    assert done.returncode == 0, done.stderr[-3000:]
    for rank in range(2):
        told = json.loads((tmp_path / str(rank)).read_text())
        assert told["argv"] == [f"--local_rank={rank}", "--steps", "3"]
        assert told["module"].startswith("paci_schedule.")


@pytest.mark.parametrize("arguments", [[], ["missing.py"], ["--steps", "3"]], ids=["nothing", "no file", "no script"])
def test_without_a_script_it_says_how_to_call_it(arguments):
    done = launch("paci_schedule.launch", *arguments)
    assert done.returncode != 0
    last = done.stderr.strip().splitlines()[-1]
    assert "ConfigError" in last
    assert "paci_schedule.launch train.py" in last


def test_flags_that_a_script_has_itself_stay_its_own(tmp_path):
    """Ours are for Megatron, which has none; where it cannot be found, or DeepSpeed is named, they stay."""
    script = tmp_path / "prints.py"
    script.write_text("import sys; print(sys.argv[1:]); 'megatron.core, deepspeed'\n")
    done = launch("paci_schedule.launch", str(script), "--pipeline-schedule", "paci", "--paci-clip", "stage")
    assert done.stdout.strip() == "['--pipeline-schedule', 'paci', '--paci-clip', 'stage']"
    (tmp_path / "megatron" / "training").mkdir(parents=True)
    (tmp_path / "megatron" / "training" / "__init__.py").write_text("")
    assert launch("paci_schedule.launch", str(script), "--pipeline-schedule", "1f1b", "--x").stdout.strip() == "['--x']"


def test_a_training_loop_on_megatron_core_alone_has_flags_for_its_ends_too(tmp_path):
    """And no flag of Megatron-LM's is added to its own."""
    script = tmp_path / "loop.py"
    script.write_text(
        "import sys; from megatron.core.pipeline_parallel import schedules; print(sys.argv[1:])\n"
        "print(schedules.forward_backward_pipelining_without_interleaving.dispatcher.options)\n"
    )
    flags = ["--paci-drain-interval", "5", "--paci-train-iters=9", "--lr", "1"]
    done = launch("testing.megatron_cpu", "paci_schedule.launch", str(script), "--pipeline-schedule", "paci", *flags)
    assert done.stdout.splitlines()[-2:] == ["['--lr', '1']", "{'drain_interval': 5, 'train_iters': 9}"], done.stderr
    done = launch("paci_schedule.launch", str(script), "--paci-drain-interval=0")
    assert (done.returncode, done.stdout) == (2, "")
    assert "argument --paci-drain-interval: '0': must be a whole number of calls greater than 0" in done.stderr


def test_a_megatron_bridge_script_is_switched_also_where_it_starts_itself_again(tmp_path):
    """As run_recipe.py does with the environment of a recipe; no flag of Megatron-LM's is added to its overrides."""
    script = tmp_path / "here" / "recipe.py"
    script.parent.mkdir()
    script.write_text(
        "# imports megatron.bridge.training\n"
        "import os, sys; from megatron.core.pipeline_parallel import schedules\n"
        "dispatcher = schedules.forward_backward_pipelining_without_interleaving.dispatcher\n"
        "print(os.environ.get('AGAIN'), sys.argv[1:], dispatcher.default, dispatcher.options, flush=True)\n"
        "if 'AGAIN' not in os.environ:\n"
        "    command = [sys.executable, os.path.realpath(__file__), *sys.argv[1:]]\n"
        "    os.execvpe(sys.executable, command, {**os.environ, 'AGAIN': 'yes'})\n"
    )
    write(tmp_path, {"here/megatron/training/__init__.py": ""})
    (tmp_path / "there").symlink_to("here")
    flags = ["--pipeline-schedule", "paci", "train.train_iters=9", "--paci-clip=stage"]
    done = launch("paci_schedule.launch", str(tmp_path / "there" / "recipe.py"), *flags)
    said = "['train.train_iters=9'] paci {'clip': 'stage'}"
    assert done.stdout.splitlines() == [f"None {said}", f"yes {said}"], done.stderr[-2000:]


@pytest.mark.parametrize(
    ("chosen", "left"),
    [
        ([], ["--rerun-mode", "disabled"]),
        (["--rerun-mode", "validate_results"], ["--rerun-mode", "validate_results"]),
        (["--rerun-mode=disabled"], ["--rerun-mode=disabled"]),
    ],
    ids=["no mode", "a mode", "a mode behind an equals sign"],
)
def test_megatrons_reruns_are_switched_off_unless_the_user_chose_a_mode(chosen, left, tmp_path):
    script = tmp_path / "prints.py"
    script.write_text("import sys; print(sys.argv[1:])\n")
    write(tmp_path, {"megatron/training/__init__.py": ""})
    done = launch("paci_schedule.launch", str(script), "--pipeline-schedule", "paci", *chosen)
    assert done.stdout.strip() == repr(left), done.stderr[-2000:]


@pytest.mark.parametrize("value", ["evry", "0", "-2", "1.5"])
def test_a_prediction_that_is_none_is_refused_before_anything_starts(value, tmp_path):
    script = tmp_path / "prints.py"
    script.write_text("print('ran')\n")
    write(tmp_path, {"megatron/training/__init__.py": ""})
    done = launch("paci_schedule.launch", str(script), f"--paci-prediction={value}")
    assert (done.returncode, done.stdout) == (2, "")
    said = done.stderr.strip().splitlines()[-1]
    assert f"argument --paci-prediction: '{value}': must be 'off', 'window'" in said


@pytest.mark.parametrize("value", ["9", "far"])
def test_a_reach_that_is_none_is_refused_before_anything_starts(value, tmp_path):
    script = tmp_path / "prints.py"
    script.write_text("print('ran')\n")
    write(tmp_path, {"megatron/training/__init__.py": ""})
    done = launch("paci_schedule.launch", str(script), "--paci-prediction=every", f"--paci-prediction-reach={value}")
    assert (done.returncode, done.stdout) == (2, "")
    assert f"argument --paci-prediction-reach: '{value}': must be a number above 0" in done.stderr.splitlines()[-1]


FRAMEWORKS = {
    "deepspeed": {"deepspeed/__init__.py": "__version__ = '0.1'\n"},
    "megatron": {"megatron/__init__.py": "", "megatron/core/__init__.py": "__version__ = '0.1'\n"},
}


def write(folder, files):
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)


@pytest.mark.parametrize("old", FRAMEWORKS)
def test_a_job_is_not_stopped_by_another_framework_s_version(old, tmp_path):
    """What is too old is left out with a word, unless it is asked for by name, or nothing else is there."""
    write(
        tmp_path,
        {
            **FRAMEWORKS[old],
            "train.py": f"""
import paci_schedule
paci_schedule.register()
try:
    paci_schedule.register({old!r})
except paci_schedule.UnsupportedError as error:
    print("refused", error)
""",
        },
    )
    done = launch("paci_schedule.launch", str(tmp_path / "train.py"))
    assert done.returncode == 0, done.stderr[-3000:]
    assert "refused paci_schedule cannot register with" in done.stdout
    assert old in done.stdout.lower().partition(";")[0]
    assert f"a {old} job would run its own schedule" in done.stderr
    for files in FRAMEWORKS.values():
        write(tmp_path, files)
    done = launch("paci_schedule.launch", str(tmp_path / "train.py"))
    assert done.returncode != 0
    assert "UnsupportedError: paci_schedule cannot register with" in done.stderr


def test_a_megatron_job_never_imports_deepspeed(tmp_path):
    """Unless it is a DeepSpeed job that lies beside Megatron-LM."""
    write(
        tmp_path,
        {
            "deepspeed/__init__.py": "raise SystemExit('imported')",
            "megatron/training/__init__.py": "",
            "train.py": "print('ran')",
        },
    )
    done = launch("paci_schedule.launch", str(tmp_path / "train.py"), "--pipeline-schedule", "1f1b")
    assert (done.stdout, done.returncode) == ("ran\n", 0), done.stderr[-3000:]
    assert "imported" in launch("paci_schedule.launch", str(tmp_path / "train.py"), "--deepspeed_config", "x").stderr


COPIES = {
    "a copy without a version": {
        "megatron/__init__.py": "",
        "megatron/training.py": "",
        "megatron/core/__init__.py": "mpu = None\n",
    },
    "a copy that cannot be imported": {
        "megatron/__init__.py": "raise RuntimeError('no GPU')\n",
        "megatron/training.py": "",
        "megatron/core/__init__.py": "",
    },
    "no core": {"megatron/__init__.py": "raise RuntimeError('no GPU')\n", "megatron/training.py": ""},
}


@pytest.mark.parametrize(
    ("copy", "arguments"), [("a copy without a version", ["--deepspeed_config=x"]), *((copy, []) for copy in COPIES)]
)
def test_another_project_s_megatron_folder_stops_no_deepspeed_job(copy, arguments, tmp_path):
    """Megatron-DeepSpeed and GPT-NeoX have such folders.  A script with a --deepspeed... never hears of them."""
    write(tmp_path, {**COPIES[copy], "train.py": "import deepspeed; print(deepspeed.PipelineEngine is not None)"})
    done = launch("paci_schedule.launch", str(tmp_path / "train.py"), *arguments)
    assert (done.returncode, done.stdout.splitlines()[-1:]) == (0, ["True"]), done.stderr[-3000:]
    assert "pip install" not in done.stderr
    told = str(tmp_path / "megatron" / "core") in done.stderr
    assert told == (not arguments and copy != "no core")


LOCKS = """
import os, pathlib, sys, threading, time
from torch.utils.file_baton import FileBaton

def folder(name, age):
    lock = pathlib.Path(sys.argv[1], name, "lock")
    lock.parent.mkdir()
    lock.touch()
    for path in (lock, lock.parent):
        os.utime(path, (time.time() - age,) * 2)
    return lock

live = folder("live", 9000)
held = os.open(live, os.O_RDONLY)
threading.Timer(4, lambda: (live.unlink(), os.close(held))).start()
FileBaton(str(live)).wait()
print("the live build has ended")
left = folder("left", 30)
threading.Timer(4, left.unlink).start()
FileBaton(str(left)).wait()
print("the lock has been removed")
FileBaton(str(folder("stale", 9000))).wait()
"""


def test_the_lock_of_a_killed_build_is_named_and_waited_for_no_longer(tmp_path):
    """A lock that a process has open is waited for, however old it is."""
    script = tmp_path / "waits.py"
    script.write_text(LOCKS)
    done = launch("paci_schedule.launch", str(script), str(tmp_path))
    assert done.stdout.splitlines() == ["the live build has ended", "the lock has been removed"], done.stderr[-3000:]
    assert done.returncode == 1
    warnings = [line for line in done.stderr.splitlines() if "remove the file, and this job goes on" in line]
    assert [line.partition(" is the lock")[0] for line in warnings] == [str(tmp_path / "left" / "lock")]
    last = done.stderr.strip().splitlines()[-1]
    assert f"PaciError: {tmp_path}/stale/lock is the lock of a kernel build. No process of this machine" in last
    assert re.search(r"changed 90\d\d s ago", last)
    assert "remove the file and start again" in last
    assert (tmp_path / "stale" / "lock").exists()


def test_an_error_of_the_script_is_the_script_s(tmp_path):
    script = tmp_path / "fails.py"
    script.write_text("import atexit, sys\natexit.register(lambda: print(sys.last_value.code))\nraise SystemExit(7)\n")
    done = launch("paci_schedule.launch", str(script))
    assert (done.returncode, done.stdout) == (7, "7\n")  # which engines look for at the exit
    script.write_text("1 / 0\n")
    done = launch("paci_schedule.launch", str(script))
    assert done.returncode == 1
    assert "ZeroDivisionError" in done.stderr
    assert 'fails.py", line 1' in done.stderr
