"""All ranks of a job come together on the host, through the job's store, where they construct, save or load.

A barrier of the transport lasts as long as its group lets it, and its error names nobody.  A meeting ends in time, its
error names the ranks that did not come, and every rank hears what the others have to say.  None is held between two
updates.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import timedelta
from typing import Any

import torch.distributed as dist
from torch.distributed.distributed_c10d import _get_default_store, _process_group_name

from paci_schedule.errors import ConfigError, LinkError
from paci_schedule.runtime.waiting import no_answer

__all__ = ["Meetings", "require_alike"]

_ARRIVED, _WORDS = "arrived", "words"


class Meetings:
    """The meetings of all ranks of the job; every rank constructs its own at the same time.

    Args:
        stage: this rank's.
        timeout: how long the others may take to come.
    """

    def __init__(self, stage: int, timeout: timedelta) -> None:
        number = _process_group_name([], False)  # one that nothing else has, the same on every rank
        self._store = dist.PrefixStore(f"paci meetings {number}", _get_default_store())
        self._ranks, self._rank = dist.get_world_size(), dist.get_rank()
        self._stage, self._timeout, self._held = stage, timeout, 0

    def gather(self, doing: str, word: Any = None) -> list[Any]:
        """Every rank's word, by rank; the last one to come collects them, so the store is asked little.

        Args:
            doing: what this rank did, up to "together with": "saved a checkpoint".
            word: what this rank has to say; something that JSON can hold.

        Raises:
            LinkError: not all ranks came in time; it names those that did not.
        """
        number, self._held = self._held, self._held + 1
        try:
            words, missing = self._words(number, json.dumps(word))
            if words and number:  # whoever has come here has read the words of the meeting before
                for part in (self._rank, *((_ARRIVED, _WORDS) if self._rank == 0 else ())):
                    self._store.delete_key(f"{number - 1} {part}")
        except RuntimeError as error:
            said = f"{self._no_answer(doing, [0])}  The job's store, which that rank may keep, says: {error}"
            raise LinkError(said, [0]) from error
        if missing:
            raise self._no_answer(doing, missing)
        return json.loads(words)

    def _words(self, number: int, word: str) -> tuple[str, list[int]]:
        """What all ranks have said, a JSON list, and none who is missing; or no words, and who is."""
        self._store.set(f"{number} {self._rank}", word)
        if self._store.add(f"{number} {_ARRIVED}", 1) == self._ranks:
            self._store.set(f"{number} {_WORDS}", self._collected(number))
        try:
            self._store.wait([f"{number} {_WORDS}"], self._timeout)
        except dist.DistStoreError:
            missing = [rank for rank in range(self._ranks) if not self._store.check([f"{number} {rank}"])]
            # With nobody missing, whoever came last was cut off before it collected the words.
            return ("", missing) if missing else (self._collected(number), [])
        return self._store.get(f"{number} {_WORDS}").decode(), []

    def _collected(self, number: int) -> str:
        words = self._store.multi_get([f"{number} {rank}" for rank in range(self._ranks)])
        return f"[{','.join(bytes(word).decode() for word in words)}]"

    def _no_answer(self, doing: str, missing: list[int]) -> LinkError:
        doing = f"{doing} together with"
        said = no_answer(self._stage, doing, "the other ranks of the job", missing, self._timeout)
        return LinkError(said, missing)


def require_alike(settings: Sequence[Mapping[str, Any]]) -> None:
    """Raises ConfigError, naming what differs and between which ranks, unless all ranks have the same settings.

    Args:
        settings: of every rank, by name as a user writes it.
    """
    differing = []
    for name in dict.fromkeys(name for each in settings for name in each):
        values: dict[str, list[int]] = {}
        for rank, each in enumerate(settings):
            values.setdefault(json.dumps(each.get(name)), []).append(rank)
        if len(values) > 1:
            listed = "; ".join(f"{value} on rank{'s' * (len(at) > 1)} {_some(at)}" for value, at in values.items())
            differing.append(f"{name} is {listed}")
    if differing:
        raise ConfigError(
            "the ranks of this job have different settings, and would wait for each other or compute different things: "
            f"{'. '.join(differing)}.  Start all ranks with one config and one version of paci_schedule"
        )


def _some(ranks: list[int]) -> str:
    """Ranks in a line, the first ones of many."""
    return ", ".join(map(str, ranks[:8])) + (f" and {len(ranks) - 8} more" if len(ranks) > 8 else "")
