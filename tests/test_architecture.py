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
OUTER = {"registration", "launch", "cli", "doctor", "optim"}  # modules at the top of the package that are no core
TORCH_LAYERS = {  # what imports torch and no framework -> the layers that it may import
    "runtime": {"core", "predict", "runtime"},
    "predict": {"core", "predict"},
    "rehearse": {"core", "predict", "rehearse"},
}

PUBLIC_NAMES = [
    "ConfigError",
    "DataEndedError",
    "LinkError",
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
    """core, a torch layer, adapters.NAME, adapters, or the name of an outer module."""
    parts = module.split(".")
    if parts[0] == "adapters":
        return ".".join(parts[:2])
    return parts[0] if parts[0] in OUTER | set(TORCH_LAYERS) else "core"


def imports(module, path, lazy=True):
    """Absolute dotted names that a file imports; without `lazy` those alone that run when it is imported."""
    package = ["paci_schedule", *module.split(".")]
    if path.name != "__init__.py":
        package.pop()
    names = set()

    def visit(node):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[:len(package) - node.level + 1] if node.level else []
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
CORE = [name for name in MODULES if layer(name) == "core" and name]


def test_the_layers_are_found():
    """The rules below mean something: the core's modules are there and are seen as core."""
    assert {"ops", "spec", "errors", "lower", "drift", "validate", "schedules.paci"} <= set(CORE)
    assert imports("schedules.paci", MODULES["schedules.paci"]) >= {"paci_schedule.ops", "paci_schedule.spec"}


@pytest.mark.parametrize("module", CORE)
def test_the_core_imports_neither_torch_nor_frameworks_nor_what_lies_above(module):
    names = imports(module, MODULES[module])
    assert not roots(names) & (FRAMEWORKS | {"torch"})
    assert not {name for name in own(names) if layer(name) != "core"}


@pytest.mark.parametrize("module", [name for name in MODULES if layer(name) in TORCH_LAYERS])
def test_the_torch_layers_import_torch_and_what_lies_below_them(module):
    names = imports(module, MODULES[module])
    assert not roots(names) & FRAMEWORKS
    assert {layer(name) for name in own(names)} <= TORCH_LAYERS[layer(module)]


@pytest.mark.parametrize("module", [name for name in MODULES if layer(name).startswith("adapters")])
def test_adapters_import_their_own_framework_and_never_each_other(module):
    names = imports(module, MODULES[module])
    mine = layer(module)
    assert roots(names) & FRAMEWORKS <= {mine.removeprefix("adapters.")}
    assert {layer(name) for name in own(names)} <= {"core", "runtime", "predict", "adapters", mine}


@pytest.mark.parametrize("module", ["", *(name for name in MODULES if layer(name) in OUTER)])
def test_torch_frameworks_and_adapters_are_imported_only_when_needed(module):
    """The package itself, its registration and its entry points name them inside functions alone."""
    names = imports(module, MODULES[module], lazy=False)
    assert not roots(names) & (FRAMEWORKS | {"torch"})
    assert not {name for name in own(names) if layer(name).startswith("adapters") or layer(name) in TORCH_LAYERS}
    if module == "":
        assert {layer(name) for name in own(names)} == {"core"}


def run(code):
    return subprocess.run([sys.executable, "-c", code], cwd=PACKAGE.parent, capture_output=True, text=True, timeout=60,
                          check=True).stdout


def test_importing_the_package_is_light_and_silent():
    heavy = FRAMEWORKS | {"torch", "numpy"}
    assert run(f"import sys, paci_schedule; print(sorted({heavy!r} & set(sys.modules)))") == "[]\n"


def test_importing_the_whole_core_leaves_torch_out():
    code = f"import importlib, sys\nfor name in {CORE!r}: importlib.import_module('paci_schedule.' + name)\n"
    assert run(code + f"print(sorted({FRAMEWORKS | {'torch'}!r} & set(sys.modules)))") == "[]\n"


def test_the_public_names_are_locked():
    assert paci_schedule.__all__ == PUBLIC_NAMES
    assert all(hasattr(paci_schedule, name) for name in PUBLIC_NAMES)


@pytest.mark.parametrize("module", CORE)
def test_every_core_module_declares_names_that_it_has(module):
    namespace = pkgutil.resolve_name(f"paci_schedule.{module}")
    if MODULES[module].name != "__init__.py":
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
