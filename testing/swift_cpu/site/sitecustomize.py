"""Found by Python at the start of the processes that ms-swift's command starts: its ranks train on the CPU."""

import os
from pathlib import Path

exec((Path(__file__).parents[3] / "paci_schedule" / "startup.pth").read_text(encoding="utf-8"))  # as an installation's
if "RANK" in os.environ:
    from testing.swift_cpu import ranks

    ranks.begin()
