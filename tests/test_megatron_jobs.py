"""The script that runs short jobs of Megatron-LM: what it says of them, and that the document has what they are."""

import re
from pathlib import Path

from benchmarks.megatron_jobs import CASES, Outcome, reason, row

MEGATRON = Path(__file__).resolve().parent.parent / "docs" / "megatron.md"
TRAINED = Outcome(("4.1", "4.2"))


def test_the_rows_of_the_document_are_jobs_of_the_script():
    _, _, section = MEGATRON.read_text().partition("| job | flags | stock | PACI |\n|---|---|---|---|\n")
    rows = [re.split(r"(?<!\\) *\| *", line)[1:3] for line in section.partition("\n\n")[0].splitlines()]
    assert len(rows) >= 15
    assert all(CASES[name].flags == flags.strip("`").replace("\\|", "|") for name, flags in rows)


def test_a_row_says_whether_the_losses_are_those_of_the_stock_schedule():
    assert row("bf16", TRAINED, TRAINED) == "| bf16 | `--bf16` | runs | runs, the same losses |"
    assert "OTHER LOSSES: ('4.1', '4.3')" in row("bf16", TRAINED, Outcome(("4.1", "4.3")))
    assert row("bf16", Outcome((), "no"), TRAINED).endswith("| no | runs |")
    assert row("bf16", TRAINED, Outcome((), "refused: --bf16")).endswith("| runs | refused: --bf16 |")


def test_the_reason_is_the_refusal_or_the_error_of_a_rank():
    refused = "W1122 torch\n'paci' cannot run this job; change what follows:\n--fp16 (fp16=True): why\nE1122 x\n"
    assert reason(refused) == "refused: --fp16 (fp16=True): why"
    failed = "[rank1]: Traceback\n[rank1]:   File x\n[rank1]: AssertionError: not so\nChildFailedError: \n"
    assert reason(failed) == "AssertionError: not so"
    assert reason("a\nlast words\n") == "last words"
    assert reason("") == "said nothing"
