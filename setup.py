"""The extras; everything else about the package stands in pyproject.toml."""

import runpy
from pathlib import Path

from setuptools import setup

VERSIONS = runpy.run_path(str(Path(__file__).resolve().parent / "paci_schedule" / "adapters" / "versions.py"))
TORCH = "torch" + VERSIONS["TORCH"]
TEST = ["pytest", "pytest-timeout", "pytest-xdist"]
LAUNCH = ["datasets", "filelock", "tokenizers", "tqdm", "transformers>=5"]

setup(
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
