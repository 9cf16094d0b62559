"""The form of the code: how long a module is, how many arguments a call passes by place, what a class holds."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SOURCES = sorted((ROOT / "deqkern").rglob("*.py"))
LINES, POSITIONAL, ATTRIBUTES = 300, 6, 15

by_source = pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))


@by_source
def test_a_module_is_read_in_one_sitting(path: Path) -> None:
    if path.name != "reference.py":  # one executable meaning per op, side by side
        assert path.read_text().count("\n") <= LINES


@by_source
def test_calls_name_their_arguments(path: Path) -> None:
    """No more than six by place, and none from a tuple that is unpacked where it is written."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Call):
            unpacked = [arg for arg in node.args if isinstance(arg, ast.Starred) and isinstance(arg.value, ast.Tuple)]
            assert len(node.args) <= POSITIONAL and not unpacked, f"{path.name}:{node.lineno}"


def attributes(node: ast.ClassDef) -> set[str]:
    """What instances hold: fields, and what is assigned to self, also among several."""
    fields = [item.target for item in node.body if isinstance(item, ast.AnnAssign)]
    found = {target.id for target in fields if isinstance(target, ast.Name)}
    stored = [item for item in ast.walk(node) if isinstance(item, ast.Attribute) and isinstance(item.ctx, ast.Store)]
    return found | {item.attr for item in stored if isinstance(item.value, ast.Name) and item.value.id == "self"}


# What is all data, as a user reads it: the coefficients of a chain, the result of a solve, and a validated problem.
RECORDS = {"StepTable", "Solution"}


@by_source
def test_a_class_holds_no_more_than_one_can_keep_in_mind(path: Path) -> None:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ClassDef) and node.name not in RECORDS:
            assert len(attributes(node)) <= ATTRIBUTES, f"{node.name}: {sorted(attributes(node))}"


def test_sample_fits_one_screen() -> None:
    tree = ast.parse((ROOT / "deqkern/sampling.py").read_text())
    function = next(node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == "sample")
    docstring = function.body[0]
    assert function.end_lineno and docstring.end_lineno
    assert function.end_lineno - function.lineno + 1 - (docstring.end_lineno - docstring.lineno + 1) <= 60
