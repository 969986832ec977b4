"""The page of `paci trace --output run.html`: a run that has ended, or one that goes on."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from paci_schedule import trace
from paci_schedule.draw.page import page
from paci_schedule.errors import ConfigError
from paci_schedule.trace import Figures

__all__ = ["is_page", "page_of", "write_page"]

_PAGE = ".html"


def write_page(files: Sequence[Path], output: Path | None, batches: int, follow: float | None) -> None:
    """Write the page of a run; with `follow` again and again, that many seconds apart, until somebody interrupts.

    Raises:
        ConfigError: `files` are not one folder, `output` is no page, or it cannot be written.
    """
    if len(files) != 1 or (files[0].exists() and not files[0].is_dir()):
        raise ConfigError(
            "a page shows the run in one folder: name the folder that the option 'record' of the run names"
        )
    if output is None or output.suffix != _PAGE:
        raise ConfigError("--follow writes a page again and again: name it with --output run.html")
    _write(output, page_of(files[0], batches, follow))
    while follow is not None:
        time.sleep(follow)
        _write(output, page_of(files[0], batches, follow))


def is_page(output: Path | None) -> bool:
    return output is not None and output.suffix == _PAGE


def page_of(folder: Path, batches: int, refresh: float | None = None) -> str:
    """The page of the run recorded in `folder`.

    Args:
        folder: holds recordings, figures of updates, or both.
        batches: number of batches to draw.
        refresh: seconds after which the page is written again; None where it is not.  Files that cannot be read are
            then left out, for the run is writing them, or has not begun.

    Raises:
        ConfigError: there is nothing in the folder, or a file cannot be read.
    """
    recordings: list[trace.Recording] = []
    paths = sorted(folder.glob("stage*-replica0.jsonl"))
    try:
        recordings = trace.merge([trace.read(path) for path in paths]) if paths else []
        shown = _shown(recordings, batches) if recordings else {}
    except ConfigError:
        if refresh is None:
            raise
        recordings, shown = [], {}
    figures = trace.read_figures(folder)
    if refresh is None and not (recordings or figures):
        raise ConfigError(
            f"{str(folder)!r}: holds neither recordings nor figures of a run; name the folder that the option 'record' "
            "of the run names"
        )
    return page(
        f"The run in {folder.name or folder}",
        _summary(figures),
        updates=[_rows(each) for each in figures],
        refresh=refresh,
        **shown,
    )


def _shown(recordings: Sequence[trace.Recording], batches: int) -> dict[str, Any]:
    accumulation = recordings[0].accumulation
    timelines = {"recorded": trace.timeline(recordings), "simulated": trace.simulated(recordings)}
    last = {
        f"{title}, the last batches": trace.last_batches(whole, accumulation, batches)
        for title, whole in timelines.items()
    }
    return {
        "timelines": last,
        "notes": {next(iter(last)): trace.between_ops(recordings)},
        "spent": [trace.spent(recording) for recording in recordings],
        "verdicts": [str(verdict) for verdict in trace.verdicts(recordings)],
    }


def _summary(figures: Sequence[Sequence[Figures]]) -> str:
    """A line about the newest figures."""
    newest = [each[-1] for each in figures if each]
    if not newest:
        return "The run has told no figures of its updates yet."
    waiting = max(newest, key=lambda each: each.waiting_share)
    loss = next((each.loss for each in reversed(newest) if each.loss is not None), None)
    said = [
        f"{len(figures)} stages",
        f"{newest[-1].version} updates by {time.strftime('%Y-%m-%d %H:%M:%S', time.localtime(newest[-1].at))}",
        *([] if loss is None else [f"loss {loss:.4f}"]),
        f"stage {waiting.stage} waits most, {waiting.waiting_share:.0%} of its time",
        f"drift at most {max(each.drift for each in newest)}",
    ]
    return "; ".join(said) + "."


def _rows(figures: Sequence[Figures]) -> list[dict[str, Any]]:
    """What the charts show; a process that goes on from a checkpoint is counted on."""
    rows, before, last = [], 0, 0
    for each in figures:
        before, last = (before + last if each.version < last else before), each.version
        told = each.told(before, micro_batches_per_second=1)
        rows.append({"update": told.pop("version"), "loss": None, **told})
    return rows


def _write(output: Path, text: str) -> None:
    """Replace the file at once, for a browser may be reading it."""
    new = output.with_name(output.name + ".new")
    try:
        new.write_text(text, encoding="utf-8")
        os.replace(new, output)
    except OSError as error:
        raise ConfigError(f"output={str(output)!r}: cannot be written ({error}); name another file") from None
