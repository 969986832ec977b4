"""The documents' commands can be run again, and the rest of a document is left as it is."""

import importlib.util
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SPEC = importlib.util.spec_from_file_location("rebuild", ROOT / "docs" / "rebuild.py")
rebuild = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(rebuild)

DOCUMENT = """before
```console
$ paci show --schedule gpipe --stages 2 --micro-batches 2 \\
    --forward 1 --backward 1
{output}$ paci check --schedule zb-h1 --stages 2 --micro-batches 4
ok: zb-h1 is a valid zb-h1 schedule of 2 stages and 4 micro-batches a batch
```
between
```console
# not run
$ paci doctor
whatever
```
"""
GRID = "stage 0   F0 F1 .  .  B1 B0|\nstage 1   .  F0 F1 B1 B0|\n"


@pytest.mark.parametrize("output", ["", "something old\n", GRID])
def test_output_is_put_where_it_belongs(output):
    assert rebuild.rebuilt(DOCUMENT.format(output=output)) == DOCUMENT.format(output=GRID)


def test_the_grids_in_the_documents_are_up_to_date():
    """The cheap commands alone; `python docs/rebuild.py --check` runs all."""
    text = (ROOT / "docs" / "planning.md").read_text()
    cheap = [block for block in re.findall(r"```console\n.*?```\n", text, re.DOTALL) if "plan" not in block]
    cheap = [block for block in cheap if "--output" not in block]
    assert len(cheap) >= 3
    for block in cheap:
        assert rebuild.rebuilt(block) == block
