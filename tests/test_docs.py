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
    """Only the cheap commands are run; `python docs/rebuild.py --check` runs all."""
    text = (ROOT / "docs" / "planning.md").read_text()
    cheap = [block for block in re.findall(r"```console\n.*?```\n", text, re.DOTALL) if "plan" not in block]
    cheap = [block for block in cheap if "--output" not in block]
    assert len(cheap) >= 3
    for block in cheap:
        assert rebuild.rebuilt(block) == block


def test_links_between_documents_lead_somewhere():
    documents = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")]
    links = [
        (document, link)
        for document in documents
        for link in re.findall(r"\]\(([^)#\s]+)[^)]*\)", document.read_text())
        if "://" not in link
    ]
    assert len(links) > 50
    assert [(document.name, link) for document, link in links if not (document.parent / link).exists()] == []


def test_files_that_the_documents_name_exist():
    """A file is named from the top of the repository, or inside the package, the integration tests or the documents."""
    documents = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")]
    names = {name for path in documents for name in re.findall(r"(?<![\w/.*-])(?:\w+/)+\w+\.py\b", path.read_text())}
    folders = [ROOT / folder for folder in ("", "paci_schedule", "integration_tests", "docs")]
    assert len(names) > 20
    assert [name for name in sorted(names) if not any((folder / name).exists() for folder in folders)] == []


def test_every_row_of_what_works_names_tests_that_exist():
    """A name without a file belongs to the file named before it; "the same" means the row before it."""
    text = (ROOT / "docs" / "what-works.md").read_text()
    rows = [row for row in text.partition("## Not tested")[0].splitlines() if row.startswith("| ")]
    rows = [row for row in rows if not row.startswith("| what |")]
    assert len(rows) > 30
    assert [row for row in rows if not re.search(r"::test_\w+`|\| the same\b", row)] == []
    file = None
    for path, name in re.findall(r"`(test_\w+\.py)?::(test_\w+)`", text):
        file = path or file
        assert re.search(rf"^def {name}\(", (ROOT / "integration_tests" / file).read_text(), re.MULTILINE), name
