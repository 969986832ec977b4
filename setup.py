"""The extras, and the file that Python reads at its start; all else about the package stands in pyproject.toml."""

import runpy
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

VERSIONS = runpy.run_path(str(Path(__file__).resolve().parent / "paci_schedule" / "adapters" / "versions.py"))
TORCH = "torch" + VERSIONS["TORCH"]
TEST = ["pytest", "pytest-timeout", "pytest-xdist"]
LAUNCH = ["datasets", "filelock", "tokenizers", "tqdm", "transformers>=5"]


class BuildWithStartup(build_py):
    """Puts `paci_schedule.pth` beside the package, where Python looks for such files."""

    def run(self) -> None:
        super().run()
        if not self.editable_mode:
            self.copy_file("paci_schedule/startup.pth", str(Path(self.build_lib, "paci_schedule.pth")))


setup(
    cmdclass={"build_py": BuildWithStartup},
    extras_require={
        "deepspeed": ["deepspeed" + VERSIONS["DEEPSPEED"], TORCH],
        "megatron": ["megatron-core" + VERSIONS["MEGATRON_CORE"], TORCH],
        "launch": LAUNCH,
        # six: imported by the tokenizers of Megatron-LM core_v0.16.1, which does not declare it.
        "dev": [*LAUNCH, "coverage>=7.10", "pre-commit", "pyright[nodejs]", *TEST, "ruff", "six"],
        "docs": ["furo", "myst-parser", "sphinx", "sphinx-autoapi"],
        "release": ["build", "twine"],
    },
)
