"""What the package reads is data: nothing runs code that a file holds, and no file takes memory without a limit."""

import ast
import json

import pytest

from paci_schedule.core import files
from tests.test_architecture import MODULES, imports

RUN_CODE = {"pickle", "cPickle", "marshal", "shelve", "dill", "cloudpickle", "joblib", "yaml"}
EVALUATE = {"eval", "exec", "compile", "__import__"}
LOADS = {"torch.load", "torch.jit.load", "torch.package.PackageImporter", "numpy.load", "np.load"}


@pytest.mark.parametrize("module", MODULES)
def test_no_module_runs_code_that_somebody_else_has_written_into_a_file(module):
    path = MODULES[module]
    assert not {name.partition(".")[0] for name in imports(module, path)} & RUN_CODE
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            assert called not in EVALUATE, f"line {node.lineno}"
            if called in LOADS:
                safely = {word.arg: ast.unparse(word.value) for word in node.keywords}
                assert called == "torch.load", f"line {node.lineno}"
                assert safely.get("weights_only") == "True", f"line {node.lineno}"


@pytest.fixture
def written(tmp_path):
    def write(content):
        path = tmp_path / "file.json"
        path.write_bytes(content)
        return path

    return write


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"[" * 200_000, "nested too deeply"),
        (b'{"a":' * 200_000, "nested too deeply"),
        (b"1" * 5000, "digits"),
        (b"\xff\xfe{}", "codec can't decode"),
        (b"", "Expecting value"),
        (b" " * ((1 << 20) + 1), "more than 1048576 bytes"),
    ],
)
def test_what_is_no_data_is_an_error(content, says, written):
    with pytest.raises(ValueError, match=says):
        files.read_json(written(content), 1 << 20)


def test_a_file_without_an_end_is_not_read_to_its_end():
    with pytest.raises(ValueError, match="no regular file"):
        files.read_text(files.Path("/dev/zero"), 10)


def test_data_is_read_up_to_the_limit(written):
    text = json.dumps({"a": [1, 2.5, "ä"]}, ensure_ascii=False)
    assert files.read_json(written(text.encode()), len(text.encode())) == {"a": [1, 2.5, "ä"]}
    with pytest.raises(ValueError, match="the most that is read"):
        files.read_text(written(text.encode()), len(text.encode()) - 1)
