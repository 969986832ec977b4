"""Short jobs of Megatron-LM with the flags of real ones, each under its own schedule and under PACI.

    python -m benchmarks.megatron_jobs CHECKOUT                          # all; half a minute for each, or more
    python -m benchmarks.megatron_jobs CHECKOUT --jobs bf16 experts      # these alone
    python -m benchmarks.megatron_jobs CHECKOUT --results runs.jsonl     # goes on where it was interrupted

trains a tiny model on two stages, at a learning rate of 0, so that every iteration's loss has to be that of the stock
schedule, and prints the table of docs/megatron.md.  On a machine without GPUs it runs on the CPU, with gloo.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from testing.megatron_lm import logged, pretrained

STAGES, ITERATIONS = 2, 5
COMMON = "--lr 0 --min-lr 0 --clip-grad 0 --eval-iters 0 --eval-interval 100 --untie-embeddings-and-output-weights"
_BY_SAMPLES = "--train-samples 28 --lr-decay-samples 28"
_SHARDED = "--bf16 --use-distributed-optimizer --global-batch-size 4"
_EXPERTS = (
    "--num-experts 4 --moe-router-dtype fp64 --disable-bias-linear --moe-router-load-balancing-type aux_loss "
    "--global-batch-size 4"
)
_OF_ANOTHER = "ChildFailedError|LinkError|Connection (closed|reset)"  # what a rank says of one that has failed


@dataclass(frozen=True)
class Case:
    """A set of flags.

    Attributes:
        flags: beside those of the model.
        replicas: how many times as many ranks as stages there are.
        stock: other flags for the stock schedule, where it does not take these on two stages.
    """

    flags: str
    replicas: int = 1
    stock: str | None = None


CASES = {
    "plain": Case(""),
    "bf16": Case("--bf16"),
    "fp16": Case("--fp16"),
    "replicas": Case("--overlap-grad-reduce --global-batch-size 4", 2),
    "distributed optimizer": Case(f"{_SHARDED} --overlap-grad-reduce --overlap-param-gather", 2),
    "precision-aware optimizer": Case(f"{_SHARDED} --use-precision-aware-optimizer", 2),
    "optimizer on the host": Case(
        f"{_SHARDED} --use-precision-aware-optimizer --optimizer-cpu-offload --use-torch-optimizer-for-cpu-offload", 2
    ),
    "tensor parallelism": Case("--tensor-model-parallel-size 2", 2),
    "sequence parallelism": Case("--tensor-model-parallel-size 2 --sequence-parallel", 2),
    "context parallelism": Case("--context-parallel-size 2 --position-embedding-type rope --global-batch-size 4", 2),
    "full recomputation": Case("--recompute-granularity full --recompute-method uniform --recompute-num-layers 1"),
    "selective recomputation": Case("--recompute-granularity selective --recompute-modules core_attn mlp"),
    "uneven stages": Case("--pipeline-model-parallel-layout Et|tttL"),
    "virtual stages": Case("--num-layers-per-virtual-pipeline-stage 1 --overlap-p2p-communication-warmup-flush", 1, ""),
    "sgd": Case("--optimizer sgd"),
    "per-token loss": Case("--calculate-per-token-loss"),
    "norms and timers": Case("--log-params-norm --log-throughput --timing-log-level 2"),
    "re-runs": Case("--rerun-mode validate_results"),
    "experts": Case(
        f"{_EXPERTS} --moe-token-dispatcher-type allgather --expert-model-parallel-size 2 --global-batch-size 4", 2
    ),
    "experts, all-to-all": Case(f"{_EXPERTS} --moe-token-dispatcher-type alltoall --expert-model-parallel-size 2", 2),
    "experts, grouped": Case(f"{_EXPERTS} --moe-token-dispatcher-type allgather --moe-grouped-gemm --bf16"),
    "latent attention": Case(
        "--multi-latent-attention --qk-head-dim 8 --qk-pos-emb-head-dim 4 --v-head-dim 6 --kv-lora-rank 8 "
        "--q-lora-rank 8 --position-embedding-type rope --qk-layernorm"
    ),
    "further tokens": Case("--mtp-num-layers 1 --position-embedding-type rope"),
    "batches that grow": Case("--rampup-batch-size 2 2 8 --global-batch-size 6"),
    "skipped iterations": Case("--iterations-to-skip 3"),
    "end of documents": Case("--reset-position-ids --reset-attention-mask --eod-mask-loss"),
    "a validation in between": Case("--eval-iters 2 --eval-interval 2"),
    "an exit in between": Case("--exit-interval 3"),
    "fp8": Case("--bf16 --fp8-format hybrid"),
    "CUDA graphs": Case("--cuda-graph-impl local --te-rng-tracker"),
    "activation offloading": Case("--cpu-offloading-num-layers 1"),
    "in-process restart": Case("--inprocess-restart"),
}


@dataclass(frozen=True)
class Outcome:
    """How a case ended under a schedule.

    Attributes:
        losses: of the iterations, as the log has them.
        reason: why it did not come to its end, in its last words; "" where it did.
    """

    losses: tuple[str, ...]
    reason: str = ""


def outcome(checkout: str, schedule: str | None, case: Case) -> Outcome:
    """Train."""
    flags = case.stock if schedule is None and case.stock is not None else case.flags
    length = _BY_SAMPLES if "--rampup" in flags else f"--train-iters {ITERATIONS}"
    try:
        run = pretrained(checkout, schedule, STAGES, COMMON, length, flags, replicas=case.replicas)
    except subprocess.TimeoutExpired:
        return Outcome((), "did not end in time")
    if run.returncode:
        return Outcome((), reason(run.stdout))
    return Outcome(tuple(line[2] for line in logged(run.stdout).values()))


def reason(said: str) -> str:
    """Of what a failed job wrote: the refusals of PACI, or the last error of a rank."""
    refused = re.search(r"'paci' cannot run this job; [^\n]*\n((?:[^\n]+\n)+?)(?=\[|W\d|E\d|\n|$)", said)
    if refused:
        return "refused: " + refused[1].splitlines()[0]
    errors = re.findall(r"(?:^|\]:)\s*((?:\w+\.)*\w*(?:Error|Exception): .*)$", said, re.MULTILINE)
    own = [error for error in errors if not re.search(_OF_ANOTHER, error)]
    return own[-1] if own else said.strip().splitlines()[-1] if said.strip() else "said nothing"


def row(name: str, stock: Outcome, paci: Outcome) -> str:
    """A line of the table."""
    said = paci.reason or ("runs" if stock.reason else "runs, the same losses")
    if not (paci.reason or stock.reason) and paci.losses != stock.losses:
        said = f"OTHER LOSSES: {paci.losses} for {stock.losses}"
    if paci.reason and paci.reason == stock.reason:
        said = "the same"
    flags = CASES[name].flags.replace("|", "\\|")
    return f"| {name} | {f'`{flags}`' if flags else ''} | {stock.reason or 'runs'} | {said} |"


def table(results: dict[str, tuple[Outcome, Outcome]]) -> Iterator[str]:
    """The outcomes in Markdown."""
    yield "| job | flags | stock | PACI |"
    yield "|---|---|---|---|"
    for name, (stock, paci) in results.items():
        yield row(name, stock, paci)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkout", type=Path, help="of Megatron-LM")
    parser.add_argument("--jobs", nargs="+", choices=CASES, default=list(CASES), metavar="JOB", help="only these")
    parser.add_argument("--results", type=Path, help="JSON lines, read and added to")
    options = parser.parse_args()
    known = options.results.read_text().splitlines() if options.results and options.results.exists() else []
    results = {
        line["job"]: (_read(line["stock"]), _read(line["paci"]))
        for line in map(json.loads, known)
        if line["job"] in CASES
    }
    for name in options.jobs:
        if name not in results:
            checkout = str(options.checkout.resolve())
            results[name] = outcome(checkout, None, CASES[name]), outcome(checkout, "paci", CASES[name])
            stock, paci = results[name]
            if options.results:
                with options.results.open("a") as file:
                    file.write(json.dumps({"job": name, "stock": asdict(stock), "paci": asdict(paci)}) + "\n")
            print(row(name, stock, paci), file=sys.stderr, flush=True)
    print(*table(results), sep="\n")


def _read(told: dict[str, object]) -> Outcome:
    losses = told["losses"]
    assert isinstance(losses, list)
    return Outcome(tuple(losses), str(told["reason"]))


if __name__ == "__main__":
    main()
