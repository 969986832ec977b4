"""The `paci` command: its output, its JSON, and one line for bad input."""

import json
import subprocess
import sys
import types

import pytest

from paci_schedule import UnsupportedError, cli
from paci_schedule.cli import environment, models
from tests.test_trace import recorded


@pytest.fixture
def paci(capsys):
    """Run the command; returns exit code, standard output, standard error."""

    def run(*arguments):
        with pytest.raises(SystemExit) as exit_:
            cli.main([str(argument) for argument in arguments])
        printed = capsys.readouterr()
        return exit_.value.code, printed.out, printed.err

    return run


def arguments(line):
    return line.split()


# ---- simulate -------------------------------------------------------------------------------------------------------


def test_simulate_prints_its_figures_as_json(paci):
    code, out, _ = paci(
        *arguments("simulate --schedule 1f1b --stages 4 --micro-batches 8 --forward 2 --backward 5 --json")
    )
    found = json.loads(out)
    assert code == 0
    assert (found["makespan"], found["bubble"], found["time_per_micro_batch"]) == (77, 21, 77 / 8)
    assert found["bubble_share"] == pytest.approx(3 / 11)
    assert (found["peak_in_flight"], found["max_drift"]) == ([4, 3, 2, 1], [0, 0, 0, 0])


def test_simulate_takes_every_option(paci):
    line = (
        "simulate --schedule paci --stages 4 --micro-batches 8 --batches 6 --forward 2,2,2,2 --backward 3 --weight 1 "
        "--step 1 --latency 0.1,0.1,0.1 --bandwidth 100 --unit s --message-bytes 5 --jitter 0.05 --seed 7 "
        "--straggler 2:1.5 --slow-link 1:0.7 "
        "--extra-in-flight 2 --cut leading --activation-bytes 10 --weight-bytes 20 --json"
    )
    code, out, _ = paci(*arguments(line))
    found = json.loads(out)
    assert code == 0
    assert found["time_per_micro_batch"] > 9  # the straggler's 1.5 * (2 + 4)
    assert found["peak_in_flight"] == [6, 5, 3, 1]
    assert found["activation_bytes"] == [60, 50, 30, 10]
    assert json.loads(paci(*arguments(line.replace("--seed 7", "--seed 8")))[1])["makespan"] != found["makespan"]


def test_simulate_prints_a_table(paci):
    code, out, _ = paci(*arguments("simulate --schedule zb-h2 --stages 4 --micro-batches 8 --weight 2 --forward 2"))
    assert code == 0
    assert "zb-h2, 4 stages, 8 micro-batches" in out
    assert "7 on every stage" in out


def test_simulate_compares_schedules(paci):
    line = "simulate --schedule 1f1b,zb-h2,paci --stages 8 --micro-batches 16 --forward 2 --backward 2 --weight 2"
    out = paci(*arguments(line))[1].splitlines()
    assert [row.split()[:3] for row in out[1:]] == [
        ["1f1b", "8.625", "1.000"],
        ["zb-h2", "6", "1.438"],
        ["paci", "6", "1.438"],
    ]
    found = json.loads(paci(*arguments(line), "--extra-in-flight", "2", "--json")[1])
    assert [row["peak_in_flight"][0] for row in found] == [8, 15, 10]


SLOW = "--schedule paci --stages 16 --micro-batches 16 --forward 20 --backward 40 --slow-link 7:20"


def test_simulate_takes_slack_for_each_link_and_suggests_it(paci):
    """Round trips of 40 ms on link 7, which one round of 60 hides: see tests/test_slack.py."""
    one = ",".join("1" if link == 7 else "0" for link in range(15))
    given = json.loads(paci(*arguments(f"simulate {SLOW} --extra-in-flight {one} --json"))[1])
    suggested = json.loads(paci(*arguments(f"simulate {SLOW} --suggest-slack --json"))[1])
    assert suggested == given
    assert given["time_per_micro_batch"] == pytest.approx(60)
    assert given["extra_in_flight"] == [0] * 7 + [1] + [0] * 7
    assert f"extra in flight       {one}" in paci(*arguments(f"simulate {SLOW} --suggest-slack"))[1]
    assert paci(*arguments(f"show {SLOW} --extra-in-flight {one} --width 90"))[0] == 0


def test_bytes_per_second_go_with_the_unit_of_the_times(paci):
    """A message of 1 MB at 1 GB/s takes 1 ms, there and back 2: two stages alone wait for both in two rounds of 3."""
    line = "simulate --schedule paci --stages 2 --micro-batches 4 --message-bytes 1e6 --bandwidth 1e9 --json "
    milli = json.loads(paci(*arguments(line + "--unit ms --forward 1 --backward 2"))[1])
    whole = json.loads(paci(*arguments(line + "--unit s --forward 1e-3 --backward 2e-3"))[1])
    assert milli["time_per_micro_batch"] == pytest.approx(4)
    assert whole["time_per_micro_batch"] == pytest.approx(4e-3)


def test_simulate_at_the_scale_of_a_cluster(paci):
    code, out, _ = paci(
        *arguments(
            "simulate --schedule paci --stages 256 --micro-batches 256 --batches 10 --jitter 0.05 "
            "--straggler 40:1.2 --json"
        )
    )
    assert code == 0
    assert json.loads(out)["time_per_micro_batch"] > 3.6


# ---- show, check ----------------------------------------------------------------------------------------------------


def test_show_draws_text_pictures_and_traces(paci, tmp_path):
    line = "show --schedule gpipe --stages 2 --micro-batches 2 --forward 1 --backward 1"
    assert paci(*arguments(line))[1].splitlines()[0] == "stage 0   F0 F1 .  .  B1 B0|"
    assert paci(*arguments(line), "--width", "16")[1].splitlines()[0] == "stage 0   F0 F1…"
    both = paci(*arguments(line.replace("gpipe", "gpipe,1f1b")))[1]
    assert "1f1b, 2 stages, 2 micro-batches\nstage 0   F0 F1 .  B0 .  B1|" in both
    trace = json.loads(paci(*arguments(line), "--json")[1])
    assert len(trace["traceEvents"]) == 1 + 2 + 2 * 5
    for name in ("a.svg", "a.png", "a.json", "a.txt"):
        assert paci(*arguments(line), "--output", tmp_path / name) == (0, "", "")
        assert (tmp_path / name).stat().st_size > 50


def test_check_says_yes_or_shows_the_op(paci, tmp_path):
    code, out, _ = paci(*arguments("check --schedule zb-v --stages 4 --micro-batches 8"))
    assert (code, out) == (0, "ok: zb-v is a valid zb-v schedule of 4 stages and 8 micro-batches a batch\n")
    path = tmp_path / "grid.txt"
    path.write_text("stage 0   F0 F1 B0 B1 STEP0\nstage 1   F0 B0 F1 STEP0 B1\n")
    code, out, _ = paci("check", path, *arguments("--schedule 1f1b --micro-batches 2"))
    assert code == 1
    assert "stage 1: STEP0 after 1 backwards" in out
    assert ">STEP0<" in out
    code, out, _ = paci("check", path, *arguments("--schedule 1f1b --micro-batches 2 --json"))
    assert (code, json.loads(out)["ok"]) == (1, False)


# ---- plan, trace ----------------------------------------------------------------------------------------------------


def test_plan_prints_rows_reasons_and_settings(paci):
    line = "plan --model gpt2-medium --devices 8 --memory 16 --global-batch 64 --stages 8 --micro-batch-size 1"
    code, out, _ = paci(*arguments(line))
    assert code == 0
    for words in (
        "paci",
        "refused because",
        "drift up to 7, limit 1",
        '"pipeline_schedule": ',
        "CutPipelineModule(layers, num_stages=8, partition_method=[0, ",
        '"data_types": {"grad_accum_dtype": "fp32"}',
        "--pipeline-schedule ",
    ):
        assert words in out
    found = json.loads(paci(*arguments(line), "--json")[1])
    assert found["settings"]["deepspeed"]["settings"]["train_batch_size"] == 64
    assert {row["schedule"] for row in found["rows"]} >= {"paci", "1f1b", "zb-v"}


def test_plan_puts_a_prediction_into_the_settings(paci):
    line = "plan --model gpt2-medium --devices 8 --memory 9 --global-batch 64 --schedule paci --stages 8 --prediction 3"
    _, out, _ = paci(*arguments(line))
    assert "Predictions an update on the first stage: 3." in out  # of 7 stale forwards
    assert '"paci": {"prediction": 3}' in out


def test_plan_fails_where_nothing_can_run(paci):
    code, out, _ = paci(*arguments("plan --model gpt2 --devices 8 --memory 0.01 --global-batch 64"))
    assert (code, "No pipeline can run" in out) == (1, True)
    assert "GiB of 0.0" in out


def test_plan_knows_the_types_of_transformers(paci):
    pytest.importorskip("transformers")
    line = "plan --model llama --devices 8 --memory 80 --global-batch 8 --schedule 1f1b --json"
    found = json.loads(paci(*arguments(line))[1])
    assert found["parameters"] == pytest.approx(6.74e9, rel=0.01)


def test_only_names_with_an_owner_are_asked_for_on_the_hub(paci, monkeypatch):
    monkeypatch.setattr(models, "_on_the_hub", lambda name: 1 / 0)
    _, _, err = paci(*arguments(f"{PLAN} --model lama"))
    assert "no type in transformers" in err
    assert "not on the hub" not in err
    _, _, err = paci(*arguments(f"{PLAN} --model someone/lama"))
    assert "not on the hub (division by zero)" in err


def test_without_transformers_a_type_says_what_is_missing(paci, monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    code, _, err = paci(*arguments(f"{PLAN} --model llama"))
    assert code == 2
    assert "need transformers, which is not installed: pip install transformers" in err
    assert "hub (" not in err


def test_trace_tells_where_the_time_went(paci, tmp_path):
    recorded(tmp_path)
    code, out, _ = paci("trace", tmp_path)
    assert code == 0
    assert "wait for gradient" in out
    assert out.count("stage 2") == 2
    found = json.loads(paci("trace", tmp_path, "--output", tmp_path / "run.svg", "--json")[1])
    assert found["makespan"] == pytest.approx(found["simulated_makespan"])
    assert found["spent"][1]["compute"] == pytest.approx(18)
    assert "simulated" in (tmp_path / "run.svg").read_text()


def test_trace_gives_verdicts_and_an_ideal(paci, tmp_path):
    """In tests/test_trace.py's run of F 1 and B 2 nobody is slow; here stage 1's ops take 4 s where others' take 3."""
    recorded(tmp_path / "even")
    out = paci("trace", tmp_path / "even")[1]
    assert "No stage, link, jitter or data costs 1% of the run." in out
    assert "ideal (equal stages that never wait) 19.500 s" in out  # 6 micro-batches of 3 s, 3 updates of 0.5 s
    recorded(tmp_path / "uneven", costs={"forward": [1, 4 / 3, 1], "backward": [2, 8 / 3, 2]})
    said = json.loads(paci("trace", tmp_path / "uneven", "--json")[1])["verdicts"]
    assert [(verdict["cause"], verdict["where"]) for verdict in said] == [("stage", 1)]
    assert "stage 1 is 33% slower than the others: costs" in paci("trace", tmp_path / "uneven")[1]


def test_calibrate_prints_the_options_of_simulate(paci, tmp_path):
    recorded(tmp_path, batches=20, costs={"forward": [1, 4 / 3, 1], "backward": [2, 8 / 3, 2]})
    options, comparison = paci("calibrate", tmp_path)[1].splitlines()
    assert options.startswith(
        "--schedule paci --stages 3 --micro-batches 2 --forward 1,1.33333,1 --backward 2,2.66667,2 "
    )
    # Stage 1 takes 4 s a micro-batch and half an update of 0.5 s.
    assert comparison.startswith("a micro-batch: simulated 4.25 s, recorded 4.2")
    same = json.loads(paci("calibrate", tmp_path, "--json")[1])
    assert same["simulated"] == pytest.approx(same["recorded"], rel=0.03)
    found = json.loads(paci("simulate", *arguments(options), "--json")[1])
    assert found["time_per_micro_batch"] == pytest.approx(4.25, rel=1e-4)


def test_profile_measures_layers_that_plan_reads(paci, tmp_path):
    pytest.importorskip("deepspeed")
    script = tmp_path / "mine.py"
    script.write_text(
        "import torch\n"
        "def model():\n"
        "    layers = [torch.nn.Linear(8, 8), torch.nn.Linear(8, 16), torch.nn.Linear(16, 8)]\n"
        "    return {'layers': layers, 'micro_batch': (torch.ones(4, 8), torch.ones(4, 8)),\n"
        "            'loss_fn': torch.nn.functional.mse_loss, 'sequence_length': 1}\n"
    )
    output = tmp_path / "made" / "layers.json"
    code, out, _ = paci("profile", f"{script}:model", "--output", output, "--repeats", 1)
    assert (code, "3 layers" in out) == (0, True)
    layers = json.loads(output.read_text())
    assert layers["micro_batch_size"] == 4
    assert [layer["parameters"] for layer in layers["layers"]] == [72, 144, 136]
    assert [layer["input_bytes"] for layer in layers["layers"]] == [4 * 4 * 8, 4 * 4 * 8, 4 * 4 * 16]
    line = "--devices 3 --stages 3 --memory 1 --global-batch 16 --micro-batch-size 4 --schedule 1f1b --recompute none"
    (row,) = json.loads(paci("plan", "--layers", output, *arguments(line), "--json")[1])["rows"]
    each = [layer["forward"] + layer["backward"] for layer in layers["layers"]]
    assert row["stage_seconds"] == pytest.approx(each)
    for source, said in (("x.py:model", "the file must exist"), (f"{script}:other", "has no function other")):
        assert said in paci("profile", source, "--output", output)[2]


def test_trace_compares_with_a_plan(paci, tmp_path):
    """The plan: three stages of 3 s, as recorded, but for the updates of 0.5 s for every two micro-batches."""
    recorded(tmp_path / "run")
    layer = {"forward": 1, "backward": 2, "parameters": 1, "activation_bytes": 1, "input_bytes": 1, "count": 3}
    (tmp_path / "layers.json").write_text(json.dumps({"sequence_length": 8, "layers": [layer]}))
    line = "--devices 3 --stages 3 --memory 1 --global-batch 2 --micro-batch-size 1 --schedule paci --json"
    plan = tmp_path / "plan.json"
    plan.write_text(paci("plan", "--layers", tmp_path / "layers.json", *arguments(line))[1])
    out = paci("trace", tmp_path / "run", "--against", plan)[1]
    assert "a micro-batch: planned 3 s, recorded 3.2" in out
    assert "stage 1: planned 3 s, recorded 3 s (+0.0%)" in out
    other = tmp_path / "other.json"
    other.write_text(plan.read_text().replace('"accumulation": 2', '"accumulation": 4'))
    assert "and 4 micro-batches an update, the run 3 and 2" in paci("trace", tmp_path / "run", "--against", other)[2]
    assert "holds no plan" in paci("trace", tmp_path / "run", "--against", tmp_path / "layers.json")[2]


def test_a_chrome_trace_has_waits_data_and_messages(paci, tmp_path):
    recorded(tmp_path)
    paci("trace", tmp_path, "--output", tmp_path / "run.json")
    events = json.loads((tmp_path / "run.json").read_text())["traceEvents"]
    named = {event["name"] for event in events}
    assert {"stage 1, waits and data"} <= {event["args"]["name"] for event in events if event["ph"] == "M"}
    assert {"wait for gradient 0", "activation", "gradient"} <= named
    sent = {event["id"]: event for event in events if event["ph"] == "s"}
    taken = {event["id"]: event for event in events if event["ph"] == "f"}
    assert len(sent) == 2 * 2 * 6  # two links, both ways, six micro-batches
    assert all(abs(taken[at]["tid"] - sent[at]["tid"]) == 1 and taken[at]["ts"] >= sent[at]["ts"] for at in sent)


def test_trace_draws_the_last_batches(paci, tmp_path):
    recorded(tmp_path)
    out = paci("trace", tmp_path, "--batches", 1)[1]
    assert "recorded, its last 10.500 s (--batches 1)" in out
    assert (out.count(" F3"), out.count(" F5")) == (0, 2 * 3)
    cut = [line for line in paci("trace", tmp_path, "--width", 40)[1].splitlines() if line.startswith("stage ")]
    assert [len(line) for line in cut] == [40] * 6
    assert paci("trace", tmp_path, "--batches", 1, "--output", tmp_path / "run.json")[0] == 0
    events = json.loads((tmp_path / "run.json").read_text())["traceEvents"]
    assert sum(event["name"] == "F0" for event in events) == 2 * 3


# ---- doctor ---------------------------------------------------------------------------------------------------------


def adapter(monkeypatch, probe, other="no-such-distribution"):
    """Install a stand-in adapter for DeepSpeed; Megatron comes from the distribution `other`, with the same hooks."""
    monkeypatch.setattr(environment, "_FRAMEWORKS", {"deepspeed": "pytest", "megatron": other})
    monkeypatch.setattr(environment.importlib.util, "find_spec", lambda name: types.SimpleNamespace(name=name))
    monkeypatch.setattr(environment.importlib, "import_module", lambda name: types.SimpleNamespace(probe=probe))
    monkeypatch.setattr(environment, "_torch", lambda: iter(()))


def test_doctor_passes_where_all_is_there(paci, monkeypatch):
    adapter(monkeypatch, lambda: [("PipelineEngine", True, "0.19.8")])
    code, out, _ = paci("doctor", "--json")
    found = {finding["name"]: finding for finding in json.loads(out)["findings"]}
    assert code == 0
    assert found["deepspeed: PipelineEngine"] == {
        "name": "deepspeed: PipelineEngine",
        "ok": True,
        "detail": "0.19.8",
        "required": True,
    }
    assert found["click"]["ok"]


def test_doctor_wants_one_framework_with_all_its_hooks(paci, monkeypatch):
    probes = iter([[("PipelineEngine", True, "there")], [("schedules", False, "gone")]])
    adapter(monkeypatch, lambda: next(probes), other="pytest")
    code, out, _ = paci("doctor", "--json")
    found = {finding["name"]: finding for finding in json.loads(out)["findings"]}
    assert code == 0
    assert (found["megatron: schedules"]["ok"], found["megatron: schedules"]["required"]) == (False, False)
    assert found["a supported framework"]["detail"] == "deepspeed"


def test_what_frameworks_print_does_not_spoil_the_json(paci, monkeypatch):
    def probe():
        print("[WARNING] Setting accelerator to CPU")
        return []

    adapter(monkeypatch, probe)
    code, out, err = paci("doctor", "--json")
    assert (code, json.loads(out)["ok"], "WARNING" in err) == (0, True, True)


def test_doctor_fails_where_a_hook_is_gone(paci, monkeypatch):
    adapter(monkeypatch, lambda: [("_INSTRUCTION_MAP", False, "not in this version")])
    code, out, _ = paci("doctor")
    assert code == 1
    assert "_INSTRUCTION_MAP" in out


def test_doctor_fails_where_a_framework_is_not_supported(paci, monkeypatch):
    def probe():
        raise UnsupportedError("deepspeed 0.18.3: not supported")

    adapter(monkeypatch, probe)
    code, out, _ = paci("doctor")
    assert (code, "0.18.3" in out) == (1, True)


def test_doctor_fails_without_a_framework(paci, monkeypatch):
    monkeypatch.setattr(environment, "_FRAMEWORKS", {"deepspeed": "no-such-distribution"})
    monkeypatch.setattr(environment, "_torch", lambda: iter(()))
    code, out, _ = paci("doctor")
    assert code == 1
    assert "pip install no-such-distribution" in out
    assert "none has all that PACI needs" in out


# ---- bad input: one line, exit code 2 -------------------------------------------------------------------------------

SIZE = "--stages 3 --micro-batches 4"
PLAN = "plan --devices 8 --memory 80 --global-batch 64"


@pytest.mark.parametrize(
    ("line", "words"),
    [
        (f"simulate --schedule pacy {SIZE}", "did you mean 'paci'"),
        (
            "simulate --schedule paci --stages 0 --micro-batches 4",
            "paci: --stages=0: must be a whole number of at",
        ),
        ("simulate --schedule paci --stages 3 --micro-batches -4", "paci: --micro-batches=-4"),
        ("simulate --schedule paci --stages x --micro-batches 4", "'x' is not a valid integer"),
        ("simulate --stages 3", "Missing option '--schedule'"),
        (
            "simulate --schedule interleaved-1f1b --stages 3 --micro-batches 4",
            "paci: --micro-batches=4: inter",
        ),
        (f"simulate --schedule 1f1b {SIZE} --forward -1", "forward=-1.0: must be a number from 0 to 1e+100"),
        (f"simulate --schedule 1f1b {SIZE} --forward 1,b", "'1,b' is not a number"),
        (f"simulate --schedule 1f1b {SIZE} --backward 1,2", "2 values for 3 stages"),
        (f"simulate --schedule paci {SIZE} --chunks 3", "chunks=3: not an option of the paci schedule"),
        (f"simulate --schedule 1f1b {SIZE} --cut leading", "cut=leading: 1f1b returns at the end of every batch"),
        (f"simulate --schedule paci {SIZE} --straggler 1:-1", "straggler 1=-1.0: must be a number from 0"),
        (f"simulate --schedule paci {SIZE} --jitter 11", "jitter=11.0: must be at most 10"),
        (
            "simulate --schedule 1f1b --stages 2000 --micro-batches 1000",
            "2000 stages x 1000 micro-batches x 3 batches (as many as a steady state takes): up to 12000000 ops",
        ),
        (f"{PLAN} --model gpt2 --memory -1", "-1.0 is not in the range x>0"),
        (f"{PLAN} --model gpt2-meduim", "did you mean 'gpt2-medium'?"),
        (f"simulate --schedule paci {SIZE} --straggler 5:2", "straggler=5:2.0: there are 3 of them, numbered 0 to 2"),
        (f"simulate --schedule paci {SIZE} --slow-link 2:1", "--slow-link=2:1.0: there are 2 of them, numbered 0 to 1"),
        (f"simulate --schedule paci {SIZE} --straggler 2", "'2' is not an index and a number"),
        (f"simulate --schedule paci {SIZE} --batches 0", "batches=0"),
        (f"simulate --schedule paci {SIZE} --seed -1", "seed=-1"),
        (f"simulate --schedule paci {SIZE} --fowrard 2", "No such option '--fowrard'"),
        (f"show --schedule paci {SIZE} --output a.pdf", "the ending says the format"),
        (f"show --schedule paci {SIZE} --batches 0", "batches=0"),
        (f"show --schedule paci {SIZE} --width 0", "0 is not in the range x>=1"),
        ("check --schedule paci --stages 100000 --micro-batches 64", "the general simulator holds 10000000"),
        ("check --schedule paci --micro-batches 4", "stages is missing"),
        ("check no-such-file --schedule paci --micro-batches 4", "cannot be read"),
        ("plan --devices 8 --memory 80 --global-batch 64", "give either --model NAME or --layers FILE"),
        ("plan --layers none.json --devices 8 --memory 80 --global-batch 64", "cannot be read as JSON"),
        (
            "plan --model gpt2 --devices 8 --memory 80 --global-batch 64 --stages 5",
            "stages=5: must divide the 8 devices",
        ),
        (f"{PLAN} --model gpt2 --sequence-length 0", "0 is not in the range x>=1"),
        (f"{PLAN} --model gpt2 --tflops inf", "--tflops=inf: must be finite"),
        (f"{PLAN} --model gpt2 --prediction evry", "prediction='evry': must be 'off', 'window'"),
        (f"{PLAN} --model gpt2 --latency inf", "latency=inf: must be a number from 0"),
        (f"{PLAN} --layers none.json --sequence-length 8", "--sequence-length=8: the layers were measured"),
        (f"simulate --schedule paci {SIZE} --bandwidth 1e9", "--bandwidth=1e+09: is in bytes per second"),
        (f"simulate --schedule paci {SIZE} --extra-in-flight 1,2,3", "3 stages have 2 links"),
        (f"simulate --schedule paci {SIZE} --extra-in-flight 1,x", "'1,x' is not a whole number"),
        (f"simulate --schedule 1f1b {SIZE} --suggest-slack", "--suggest-slack: 1f1b has a fixed number"),
        (f"simulate --schedule paci {SIZE} --suggest-slack --extra-in-flight 1", "--suggest-slack chooses it"),
        (f"{PLAN} --layers docs/layers.json --tflops 100", "--tflops=100: the layers' times were measured"),
        (f"{PLAN} --model gpt2 --latency 20", "--latency=20: is in seconds"),
        (f"{PLAN} --model gpt2 --gpu h10", "did you mean 'h100'?"),
        ("plan --model gpt2 --devices 8 --global-batch 64", "memory is missing: give --memory GIB, or --gpu NAME"),
        (f"{PLAN} --model gpt2 --tensor-parallel 3", "--tensor-parallel=3: must divide the 8 devices"),
        ("trace", "no trace files"),
        ("trace no-such-file", "cannot be read"),
        ("draw", "No such command 'draw'"),
    ],
)
def test_bad_input_is_one_line(paci, line, words):
    code, out, err = paci(*arguments(line))
    assert (code, out) == (2, "")
    assert err.startswith("paci: ")
    assert err.count("\n") == 1
    assert words in err


def test_every_command_has_help_and_the_version_is_printed(paci):
    code, _, err = paci()
    assert (code, "simulate" in err) == (2, True)
    code, out, _ = paci("--version")
    assert (code, out.startswith("paci, version ")) == (0, True)
    for command in ("show", "check", "simulate", "plan", "trace", "doctor"):
        code, out, _ = paci(command, "--help")
        assert (code, "--json" in out) == (0, True)


def test_the_command_runs_as_a_module():
    done = subprocess.run(
        [sys.executable, "-m", "paci_schedule.cli", "--version"], capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stdout.startswith("paci, version ")
