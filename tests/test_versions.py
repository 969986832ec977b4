"""The version ranges of the frameworks stand in one file; the extras, the pins, the documents and the patches agree."""

import re
import shutil
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

import paci_schedule
from paci_schedule.adapters import versions
from paci_schedule.adapters.deepspeed import hooks as deepspeed_hooks
from paci_schedule.adapters.megatron import hooks as megatron_hooks

ROOT = Path(__file__).resolve().parents[1]
RANGES = {"deepspeed": versions.DEEPSPEED, "megatron-core": versions.MEGATRON_CORE, "torch": versions.TORCH}
PINS = [Requirement(line) for line in (ROOT / "constraints.txt").read_text().splitlines() if line and line[0] != "#"]
NAMED = re.compile(r"(deepspeed|megatron-core|core_v)(?:==|[ -])?(\d+\.\d+\.\d+)", re.IGNORECASE)
MEASURED = ROOT / "docs" / "results.md"  # figures keep the versions that they were measured with


def pinned(name):
    """The version of a package that `make venv` installs under this Python."""
    [pin] = [pin for pin in PINS if pin.name == name and (pin.marker is None or pin.marker.evaluate())]
    return str(pin.specifier).removeprefix("==")


def oldest(name):
    """The lower bound of a range, as a version with three numbers."""
    [bound] = [each.version for each in SpecifierSet(RANGES[name]) if each.operator == ">="]
    return ".".join([*bound.split("."), "0", "0"][:3])


def versions_named(path):
    """The versions of frameworks in a file's name and text: (the package, the version)."""
    for name, named in NAMED.findall(f"{path.name}\n{path.read_text(encoding='utf-8')}"):
        yield "megatron-core" if name.lower() == "core_v" else name.lower(), named


@pytest.mark.parametrize("name", RANGES)
def test_the_pinned_version_is_installed_and_supported(name):
    assert pinned(name) in SpecifierSet(RANGES[name])
    assert version(name).partition("+")[0] == pinned(name)


def test_the_adapters_refuse_what_is_outside_the_ranges():
    assert SpecifierSet(versions.DEEPSPEED) == deepspeed_hooks.TESTED
    assert SpecifierSet(versions.MEGATRON_CORE) == megatron_hooks.TESTED


def test_the_extras_of_a_built_package_have_the_ranges(tmp_path):
    tree = tmp_path / "tree"  # a copy, because a build writes into what it builds
    (tree / "paci_schedule" / "adapters").mkdir(parents=True)
    package = ("paci_schedule/__init__.py", "paci_schedule/adapters/versions.py")
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE", *package):
        (tree / name).write_bytes((ROOT / name).read_bytes())
    code = f"from setuptools import build_meta; build_meta.prepare_metadata_for_build_wheel({str(tmp_path)!r})"
    subprocess.run([sys.executable, "-c", code], cwd=tree, capture_output=True, check=True, timeout=60)
    [metadata] = tmp_path.glob("*.dist-info/METADATA")
    required = map(Requirement, re.findall(r"^Requires-Dist: (.*)$", metadata.read_text(), re.MULTILINE))
    found = {(each.name, str(each.specifier)) for each in required if each.name in RANGES}
    assert found == {(name, str(SpecifierSet(spec))) for name, spec in RANGES.items()}


def test_documents_and_patches_name_the_pinned_versions_or_the_oldest():
    documents = [ROOT / "README.md", *(ROOT / "docs").glob("*.md"), *(ROOT / "patches").glob("*.patch")]
    found = [(path.name, *named) for path in documents if path != MEASURED for named in versions_named(path)]
    assert len(found) > 10
    assert [each for each in found if each[2] not in (pinned(each[1]), oldest(each[1]))] == []


def test_code_and_messages_name_no_version_of_a_framework():
    """They take the ranges from the one file, or speak of the framework without a version."""
    folders = [ROOT / "paci_schedule", ROOT / "launch"]
    files = [path for folder in folders for path in folder.rglob("*.py") if path.name != "versions.py"]
    assert len(files) > 100
    assert [(str(path), *named) for path in files for named in versions_named(path)] == []


def check_release(tag, root):
    return subprocess.run([root / ".github" / "check_release", tag], capture_output=True, text=True, check=False)


def test_a_tag_is_released_only_where_every_file_has_its_version(tmp_path):
    released = f"v{paci_schedule.__version__}"
    texts = {name: (ROOT / name).read_text() for name in ("CITATION.cff", "paci_schedule/__init__.py", "CHANGELOG.md")}
    texts["CHANGELOG.md"] = texts["CHANGELOG.md"].replace("## Unreleased\n", "")
    for name in (*texts, ".github/check_release"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    for name, text in texts.items():
        (tmp_path / name).write_text(text)
    assert check_release(released, tmp_path).stderr == ""
    assert check_release("v99.0.0", tmp_path).returncode == 1
    for name, text in texts.items():
        (tmp_path / name).write_text(text.replace(paci_schedule.__version__, "99.0.0"))
        refused = check_release(released, tmp_path)
        assert refused.returncode == 1
        assert name in refused.stderr
        (tmp_path / name).write_text(text)


def test_documents_name_the_oldest_supported_torch_and_python():
    [oldest_torch] = re.findall(r">=(\d+\.\d+)", versions.TORCH)
    [oldest_python] = re.findall(r'requires-python = ">=(3\.\d+)"', (ROOT / "pyproject.toml").read_text())
    texts = {path: (ROOT / path).read_text() for path in ("README.md", "CONTRIBUTING.md", "Makefile", "docs/gpu.md")}
    for path, text in texts.items():
        for name, said in re.findall(r"(PyTorch|Python) (\d\.\d+) or newer", text):
            assert said == {"PyTorch": oldest_torch, "Python": oldest_python}[name], path
    assert f"Python {oldest_python} or newer" in texts["README.md"]
    assert f'["{oldest_python}", ' in (ROOT / ".github" / "workflows" / "ci.yml").read_text()
