"""The documents' commands can be run again, and the rest of a document is left as it is."""

import importlib.util
import math
import re
from dataclasses import replace
from pathlib import Path

import pytest

from paci_schedule import ConfigError, PipelineSpec
from paci_schedule.core.schedules.registry import schedule
from paci_schedule.simulate.costs import Costs
from paci_schedule.simulate.figures import figures_of, time_per_micro_batch

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
    pages = (ROOT / "README.md", ROOT / "docs" / "planning.md", ROOT / "docs" / "several-nodes.md")
    text = "".join(page.read_text() for page in pages)
    cheap = [block for block in re.findall(r"```console\n.*?```\n", text, re.DOTALL) if "plan" not in block]
    cheap = [block for block in cheap if "--output" not in block]
    assert len(cheap) >= 5
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


def anchors(page):
    """Of the headings of a page, as the forge makes them."""
    text = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
    return {
        re.sub(r"[^\w\- ]", "", title.lower()).strip().replace(" ", "-")
        for title in re.findall(r"^#+ (.*)$", text, re.M)
    }


def test_links_to_headings_lead_to_a_heading():
    documents = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")]
    links = [
        (page, link, anchor)
        for page in documents
        for link, anchor in re.findall(r"\]\(([^)#\s]*)#([^)\s]+)\)", page.read_text())
        if "://" not in link
    ]
    assert len(links) > 50
    assert [
        (page.name, link, anchor)
        for page, link, anchor in links
        if anchor not in anchors(page.parent / link if link else page)
    ] == []


def rows_of_table(page, first_cell):
    """The cells of the table whose header row has these after its first cell."""
    lines = page.read_text().splitlines()
    begin = next(at for at, line in enumerate(lines) if line.startswith(first_cell))
    rows = []
    for line in lines[begin:]:
        if not line.startswith("|"):
            break
        rows.append([cell.strip().strip("*") for cell in line.strip("|").split("|")])
    return [rows[0], *rows[2:]]


SCHEDULES_OF_README = {"interleaved 1F1B": "interleaved-1f1b"}


def test_the_closed_forms_in_the_readme_are_the_simulators():
    header, times, memories, drifts = rows_of_table(
        ROOT / "README.md", "| | 1F1B | interleaved 1F1B | ZB-H1 | ZB-H2 | ZB-V | PACI"
    )
    P, v = 4, 2
    for a in (12, 16):
        spec, names = PipelineSpec(stages=P, accumulation=a), {"P": P, "a": a, "v": v, "ceil": math.ceil}
        for name, *cells in zip(header[1:], times[1:], memories[1:], drifts[1:], strict=True):
            chosen = schedule(SCHEDULES_OF_README.get(name, name.lower()))
            third = 1 / 3
            split = {"weight": third} if chosen.splits_backward else {}
            costs = Costs(forward=third, backward=third if split else 2 * third, **split)
            found = figures_of(chosen, spec, costs)
            time, memory, drift = (
                eval(
                    re.sub(
                        r"\b(\d|v)(?=a|P|\()",
                        r"\1*",
                        re.sub(r"\bva\b", "v*a", cell.partition(",")[0].replace("at most ", "")),
                    ),
                    {},
                    names,
                )
                for cell in cells
            )
            assert found.time_per_micro_batch == pytest.approx(time), (name, a)
            assert max(found.peak_in_flight) == pytest.approx(memory), (name, a)
            assert max(found.max_drift) == drift, (name, a)


@pytest.mark.parametrize(
    "setting",
    [
        "a = 16",
        "a = 16, links of 20 ms",
        "a = 64",
        pytest.param("a = 64, jitter of 5%", marks=pytest.mark.slow),
        "a = 64, links of 20 ms",
    ],
)
def test_the_milliseconds_in_the_readme_are_the_simulators(setting):
    header, *rows = rows_of_table(ROOT / "README.md", "| | 1F1B | interleaved 1F1B | ZB-H1 | ZB-H2 | ZB-V | DualPipeV")
    assert len(rows) == 5
    cells = {first: rest for first, *rest in rows}[setting]
    spec = PipelineSpec(stages=16, accumulation=int(re.findall(r"a = (\d+)", setting)[0]))
    extra = {"jitter": 0.05} if "jitter" in setting else {"latency": 20.0} if "links" in setting else {}
    for name, cell in zip(header[1:], cells, strict=True):
        chosen = schedule(SCHEDULES_OF_README.get(name, name.lower()))
        if not cell:
            with pytest.raises(ConfigError):
                chosen.check(spec)
            continue
        split = {"weight": 20.0} if chosen.splits_backward else {}
        costs = Costs(forward=20.0, backward=20.0 if split else 40.0, **split, **extra)
        written, *slack = re.findall(r"\d+\.\d", cell)
        found = time_per_micro_batch(chosen, spec, costs)
        assert found == pytest.approx(float(written), abs=0.051), name
        for hidden in slack:
            found = time_per_micro_batch(chosen, replace(spec, extra_in_flight=(1,) * 15), costs)
            assert found == pytest.approx(float(hidden), abs=0.051), name


def test_the_gain_in_the_readme_is_the_measured_one():
    gain = re.findall(r"\*\*([\d.]+) times the speed of 1F1B\*\*", (ROOT / "README.md").read_text())[0]
    row = next(line for line in (ROOT / "docs" / "results.md").read_text().splitlines() if line.startswith("| 8 | 8 |"))
    measured, ideal = (float(cell) for cell in row.split("|")[5:7])
    assert (float(gain), ideal) == (round(measured, 2), 15 / 8)


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
