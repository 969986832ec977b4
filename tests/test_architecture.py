"""Who may import whom, what the public names are, and that importing the package has no side effect."""

import ast
import pkgutil
import re
import subprocess
import sys
from pathlib import Path

import pytest

import paci_schedule

PACKAGE = Path(paci_schedule.__file__).parent
FRAMEWORKS = {"deepspeed", "megatron", "transformers", "datasets", "accelerate", "lightning"}
TORCH_FREE = {"core", "simulate", "check", "plan", "draw", "trace", "cli"}  # as long as nothing is imported lazily
LAYERS = {  # a folder, or a module at the top -> the others that it may import; lazily too
    "errors": {*()},
    "core": {"errors"},
    "simulate": {"errors", "core"},
    "check": {"errors", "core", "simulate"},
    "plan": {"errors", "core", "simulate"},
    "draw": {"errors", "core", "simulate"},
    "trace": {"errors", "core", "simulate"},
    "predict": {"errors", "core"},
    "measure": {"errors", "core", "plan", "runtime"},
    "runtime": {"errors", "core", "predict", "trace"},
    "rehearse": {"errors", "core", "predict"},
    "adapters": {"errors", "core", "plan", "predict", "trace", "measure", "runtime"},
    "cli": {"errors", "", "core", "simulate", "check", "plan", "draw", "trace", "rehearse", "adapters"},
    "launch": {"errors", "", "core", "runtime", "adapters"},
    "startup": {"", "errors", "adapters"},
    "": {"errors", "core", "adapters"},
}

PUBLIC_NAMES = [
    "CheckpointError",
    "ConfigError",
    "DataEndedError",
    "LinkError",
    "NonfiniteError",
    "PaciError",
    "PipelineSpec",
    "ScheduleError",
    "UnsupportedError",
    "register",
]


def modules():
    """Dotted name below paci_schedule -> its file."""
    files = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        files[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return files


def layer(module):
    """The folder of a module, or its own name at the top of the package."""
    return module.partition(".")[0]


def imports(module, path, lazy=True):
    """Absolute dotted names that a file imports; without `lazy` only those that run when it is imported."""
    package = ["paci_schedule", *module.split(".")]
    if path.name != "__init__.py":
        package.pop()
    names = set()

    def visit(node):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            source = ".".join([*base, *([node.module] if node.module else [])])
            names.add(source)
            names.update(f"{source}.{alias.name}" for alias in node.names)
        if lazy or not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            for child in ast.iter_child_nodes(node):
                visit(child)

    visit(ast.parse(path.read_text(encoding="utf-8")))
    return names


def roots(names):
    return {name.partition(".")[0] for name in names}


def own(names):
    """Those of the names that are modules of this package, below its name."""
    return {name.removeprefix("paci_schedule.") for name in names if name.startswith("paci_schedule.")} & set(modules())


MODULES = modules()
PURE = [name for name in MODULES if layer(name) in TORCH_FREE and name != "cli.__main__"]


def test_every_folder_is_a_layer():
    assert {layer(name) for name in MODULES} == set(LAYERS)
    assert imports("core.schedules.paci", MODULES["core.schedules.paci"]) >= {"paci_schedule.core.ops"}


@pytest.mark.parametrize("module", MODULES)
def test_a_layer_imports_only_what_lies_below_it(module):
    assert {layer(name) for name in own(imports(module, MODULES[module]))} <= LAYERS[layer(module)] | {layer(module)}


@pytest.mark.parametrize("module", [name for name in MODULES if layer(name) != "adapters"])
def test_only_adapters_import_a_framework(module):
    """`paci plan` reads configs of models through transformers, inside a function."""
    allowed = {"transformers"} if module == "cli.models" else set()
    assert not roots(imports(module, MODULES[module])) & FRAMEWORKS - allowed


@pytest.mark.parametrize("module", [name for name in MODULES if layer(name) == "adapters"])
def test_adapters_import_their_own_framework_and_never_each_other(module):
    names, (_, mine, *_) = imports(module, MODULES[module]), [*module.split("."), ""]
    mine = mine if mine in FRAMEWORKS else None
    assert roots(names) & FRAMEWORKS <= {mine}
    assert {name.split(".")[1] for name in own(names) if name.startswith("adapters.")} & FRAMEWORKS <= {mine}


@pytest.mark.parametrize("module", ["", "launch", "adapters.frameworks", *PURE])
def test_torch_and_frameworks_are_imported_only_when_needed(module):
    """The package itself, its commands and all that they show without training import torch inside functions only."""
    assert not roots(imports(module, MODULES[module], lazy=False)) & (FRAMEWORKS | {"torch"})


def run(code):
    return subprocess.run(
        [sys.executable, "-c", code], cwd=PACKAGE.parent, capture_output=True, text=True, timeout=60, check=True
    ).stdout


def test_importing_the_package_is_light_and_silent():
    heavy = FRAMEWORKS | {"torch", "numpy"}
    assert run(f"import sys, paci_schedule; print(sorted({heavy!r} & set(sys.modules)))") == "[]\n"


def test_importing_the_whole_core_leaves_torch_out():
    code = f"import importlib, sys\nfor name in {PURE!r}: importlib.import_module('paci_schedule.' + name)\n"
    assert run(code + f"print(sorted({FRAMEWORKS | {'torch'}!r} & set(sys.modules)))") == "[]\n"


def test_the_public_names_are_locked():
    assert paci_schedule.__all__ == PUBLIC_NAMES
    assert all(hasattr(paci_schedule, name) for name in PUBLIC_NAMES)


@pytest.mark.parametrize("module", PURE)
def test_every_core_module_declares_names_that_it_has(module):
    namespace = pkgutil.resolve_name(f"paci_schedule.{module}")
    if MODULES[module].name not in ("__init__.py", "__main__.py"):
        assert namespace.__all__ == sorted(namespace.__all__)
    assert all(hasattr(namespace, name) for name in getattr(namespace, "__all__", ()))
    assert namespace.__doc__


def test_the_newest_version_of_the_changelog_is_this_one():
    changelog = PACKAGE.parent / "CHANGELOG.md"
    if not changelog.exists():
        pytest.skip("CHANGELOG.md is not written yet")
    text = changelog.read_text(encoding="utf-8")
    versions = re.findall(r"^## \[?v?(\d+\.\d+\.\d+\S*?)\]?(?=\s|$)", text, re.MULTILINE)
    assert versions[0] == paci_schedule.__version__
