"""What a stage tells of its updates while it trains: one line of figures about once a second, and the file of them.

The files lie in the folder ``updates`` of a recording: ``updates/stage0.jsonl``, one JSON object a line with the
attributes of `Figures`.  Only the pipeline of rank 0 writes them.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from paci_schedule.errors import ConfigError

__all__ = ["FIGURES_FOLDER", "Figures", "append_figures", "read_figures"]

FIGURES_FOLDER = "updates"
"""The folder of these files, inside that of a recording."""


@dataclass(frozen=True, kw_only=True)
class Figures:
    """What a stage has done since it told its figures last.

    Attributes:
        stage: whose figures these are.
        version: updates that the stage has applied since its process began.
        at: seconds since 1970 when the host gave the newest of these updates to the device.
        seconds: that have passed, of the host's clock.
        micro_batches: backwards done.
        compute, wait: seconds of ops, and of waiting for neighbours.
        drift: the largest of the micro-batches in these updates, in updates.
        tokens: of a micro-batch, the mean of the newest batch; 0 where the stage reads nothing that has tokens.
        loss: the mean loss of the newest update.
    """

    stage: int
    version: int
    at: float
    seconds: float
    micro_batches: int
    compute: float
    wait: float
    drift: int
    tokens: float = 0.0
    loss: float | None = None

    @property
    def waiting_share(self) -> float:
        """Of the time in which the stage computed or waited, from 0 to 1."""
        return self.wait / (self.compute + self.wait) if self.compute + self.wait > 0 else 0.0

    @property
    def micro_batches_per_second(self) -> float:
        return self.micro_batches / self.seconds if self.seconds > 0 else 0.0

    def told(self, updates_before: int = 0, **per_micro_batch: float) -> dict[str, float]:
        """The figures as people read them.

        Args:
            updates_before: that the runs before this process have done.
            per_micro_batch: names of rates, with what a micro-batch has of each: ``samples_per_second=8``.

        Returns:
            version, drift, waiting_share and the rates; loss, where it is known.
        """
        rates = {name: each * self.micro_batches_per_second for name, each in per_micro_batch.items()}
        told = {"version": updates_before + self.version, "drift": self.drift, "waiting_share": self.waiting_share}
        return {**told, **rates, **({} if self.loss is None else {"loss": self.loss})}

    def line(self) -> str:
        """As JSON, without a line break."""
        told = asdict(self).items()
        return json.dumps({name: round(each, 6) if isinstance(each, float) else each for name, each in told})

    @classmethod
    def parse(cls, line: str) -> Figures:
        """What `line` says.  Raises ValueError, KeyError or TypeError where that is no line of figures."""
        told = {"tokens": 0.0, **json.loads(line)}  # which files of older versions do not have
        return cls(**{each.name: told[each.name] for each in fields(cls)})


def append_figures(folder: str, figures: Figures) -> None:
    """Append a line to the stage's file in the recording `folder`.  Raises OSError."""
    path = Path(folder, FIGURES_FOLDER, f"stage{figures.stage}.jsonl")
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        file.write(figures.line() + "\n")


def read_figures(folder: Path) -> list[list[Figures]]:
    """The figures of every stage in the recording `folder`, oldest first; a line that is being written is left out.

    Raises:
        ConfigError: a line is none of figures; the error names it.
    """
    stages: dict[int, list[Figures]] = {}
    for path in sorted((folder / FIGURES_FOLDER).glob("stage*.jsonl")):
        whole = path.read_text().rpartition("\n")[0]
        for number, line in enumerate(whole.splitlines(), start=1):
            try:
                figures = Figures.parse(line)
            except (ValueError, KeyError, TypeError) as error:
                raise ConfigError(
                    f"{str(path)!r}: line {number} has no figures of an update ({type(error).__name__}: {error}); "
                    "remove the line, or the file"
                ) from None
            stages.setdefault(figures.stage, []).append(figures)
    return [stages.get(stage, []) for stage in range(max(stages, default=-1) + 1)]
