"""Packaging.  The version is read from the package's source, so that installing needs neither torch nor a framework."""

import re
from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).resolve().parent
VERSION = re.search(r'^__version__ = "(.+)"$', (HERE / "paci_schedule" / "__init__.py").read_text(), re.MULTILINE)[1]
README = HERE / "README.md"

CORE = ["click>=8", "matplotlib>=3.8", "numpy>=1.26", "rich>=13"]
DEEPSPEED = ["deepspeed>=0.19.8,<0.20", "torch>=2.7"]
MEGATRON = ["megatron-core>=0.16.1,<0.17", "torch>=2.7"]
LAUNCH = ["datasets", "filelock", "tokenizers", "tqdm", "transformers>=5"]

setup(
    name="paci-schedule",
    version=VERSION,
    description="Bubble-free pipeline training with bounded drift, switched on in DeepSpeed and Megatron by one key",
    long_description=README.read_text() if README.exists() else "",
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.10",
    packages=find_packages(include=["paci_schedule", "paci_schedule.*"]),
    entry_points={"console_scripts": ["paci = paci_schedule.cli:main"]},
    install_requires=CORE,
    extras_require={
        "deepspeed": DEEPSPEED,
        "megatron": MEGATRON,
        "launch": LAUNCH,
        # six: imported by the tokenizers of Megatron-LM core_v0.16.1, which does not declare it.
        "dev": [*LAUNCH, "pytest", "pytest-timeout", "ruff", "six"],
    },
    classifiers=[
        "Intended Audience :: Science/Research",
        "Operating System :: POSIX :: Linux",
        "Programming Language :: Python :: 3",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
)
