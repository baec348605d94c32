"""The limits that ruff does not know, and the imports that would make the command line slow."""

import ast
import doctest
import importlib
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "optpipe"
FILES = sorted(PACKAGE.rglob("*.py"))
LIGHT = ["cli", "config", "artifact", "stage", "pipeline", "progress", "errors"]


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_files_and_functions_are_short(path):
    text = path.read_text()
    assert len(text.splitlines()) <= 300
    assert text.isascii()
    tree = ast.parse(text)
    assert ast.get_docstring(tree), "a module opens with one sentence"
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            assert node.end_lineno - node.lineno < 40, f"{node.name} is too long"


EXAMPLES = [path for path in FILES if ">>>" in path.read_text()]


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_examples_in_docstrings_are_true(path):
    name = ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts)
    found = doctest.testmod(importlib.import_module(name))
    assert found.attempted and not found.failed


def test_there_is_something_to_check():
    assert len(FILES) > 20 and len(EXAMPLES) > 4


def test_what_runs_before_there_is_work_imports_nothing_heavy():
    modules = [f"optpipe.{name}" for name in LIGHT]
    heavy = "{'torch', 'transformers', 'onnx', 'onnxruntime'}"
    code = f"import sys, {', '.join(modules)}; sys.exit(bool({heavy} & set(sys.modules)))"
    assert (
        subprocess.run([sys.executable, "-c", code], cwd=PACKAGE.parent, check=False).returncode
        == 0
    )
