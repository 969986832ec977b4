"""Processes that no launcher reaches: their environment registers the schedule, by a file that Python reads first."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """What an installation puts into site-packages."""
    folder = tmp_path_factory.mktemp("build")
    command = [sys.executable, "setup.py", "-q", "egg_info", "--egg-base", str(folder), "build", "--build-base"]
    subprocess.run([*command, str(folder)], cwd=ROOT, check=True, capture_output=True)
    return folder / "lib"


def started(site, code, **environment):
    """A process of this installation runs `code`; what it printed, and its last words."""
    begin = f"import site, sys; sys.path.insert(0, {str(site)!r}); site.addsitedir({str(site)!r}); "
    run = subprocess.run(
        [sys.executable, "-c", begin + code],
        env={**os.environ, **environment},
        cwd=site,
        capture_output=True,
        text=True,
        check=False,
    )
    return run.stdout.strip(), run.stderr.strip().rpartition("\n")[2]


@pytest.fixture
def framework(tmp_path):
    """A Megatron-core that cannot be registered with."""
    (tmp_path / "megatron" / "core").mkdir(parents=True)
    (tmp_path / "megatron" / "core" / "__init__.py").write_text(
        "print('imported', __loader__.get_source(__name__)[:5])\n"
    )
    return f"sys.path.insert(0, {str(tmp_path)!r}); "


def test_the_environment_registers_with_a_framework_that_is_imported(site, framework):
    said, died = started(site, f"{framework} import megatron.core", PACI_PIPELINE_SCHEDULE="paci")
    assert said == "imported print"
    assert "UnsupportedError: paci_schedule cannot register with this Megatron-core" in died


def test_without_the_environment_nothing_is_imported_or_registered(site, framework):
    code = f"{framework} import megatron.core; print([name for name in sys.modules if name.startswith('paci')])"
    for nothing in ({}, {"PACI_PIPELINE_SCHEDULE": ""}):
        assert started(site, code, **nothing) == ("imported print\n[]", "")


def test_a_process_without_a_framework_starts_quickly(site):
    code = "print({'torch', 'numpy', 'paci_schedule.adapters.megatron'} & set(sys.modules))"
    assert started(site, code, PACI_PIPELINE_SCHEDULE="paci") == ("set()", "")
