"""The examples in the docstrings of all public objects run, and print what they say."""

from __future__ import annotations

import doctest
import importlib
import inspect
import textwrap
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

import deqkern

# The modules whose names without an underscore, or whose __all__, are public.
MODULES = (
    "deqkern",
    "deqkern.gradients",
    "deqkern.interpolation",
    "deqkern.models",
    "deqkern.nn",
    "deqkern.ops",
    "deqkern.plots",
    "deqkern.runs",
    "deqkern.slopes",
    "deqkern.solvers",
    "deqkern.integrations.ddim",
    "deqkern.integrations.diffusers",
    "deqkern.integrations.edm",
    "deqkern.integrations.guided_diffusion",
    "deqkern.integrations.k_diffusion",
)
# Those that must have an example at each object.
COMPLETE = (
    "deqkern",
    "deqkern.gradients",
    "deqkern.models",
    "deqkern.nn",
    "deqkern.slopes",
    "deqkern.solvers",
    "deqkern.integrations.ddim",
    "deqkern.integrations.diffusers",
    "deqkern.integrations.edm",
    "deqkern.integrations.guided_diffusion",
    "deqkern.integrations.k_diffusion",
)
# Those that an example would only repeat: what `pull_back` is given and returns, shown at `Gradient`.
WITHOUT = {
    "deqkern.gradients.Pulled",
    "deqkern.gradients.LinearizedChain",
    "deqkern.ConvergenceWarning",
    "deqkern.Rows",
}


def public(module: ModuleType) -> Iterator[tuple[str, Any]]:
    """The name and the object of each public class and function of a module."""
    names = getattr(module, "__all__", None) or [name for name in vars(module) if not name.startswith("_")]
    for name in names:
        value = getattr(module, name)
        own = getattr(value, "__module__", "").split(".")[0] == "deqkern"
        if own and (inspect.isclass(value) or inspect.isroutine(value)):
            yield f"{module.__name__}.{name}", value


def documented(name: str, value: Any) -> Iterator[tuple[str, str]]:
    """The docstrings of an object and, if it is a class, of its public methods."""
    yield name, value.__doc__ or ""
    if inspect.isclass(value):
        for member, method in vars(value).items():
            method = getattr(method, "__func__", method)
            if not member.startswith("_") and inspect.isfunction(method):
                yield f"{name}.{member}", method.__doc__ or ""


def example(docstring: str) -> str:
    """The text of the section `Example:`, or nothing."""
    lines = inspect.cleandoc(docstring).splitlines()
    if "Example:" not in lines:
        return ""
    section = lines[lines.index("Example:") + 1 :]
    end = next((place for place, line in enumerate(section) if line and not line.startswith(" ")), len(section))
    return textwrap.dedent("\n".join(section[:end])) + "\n"


OBJECTS = {name: value for module in MODULES for name, value in public(importlib.import_module(module))}
DOCSTRINGS = {name: text for key, value in OBJECTS.items() for name, text in documented(key, value)}
EXAMPLES = {name: example(text) for name, text in DOCSTRINGS.items() if example(text)}


@pytest.mark.parametrize("name", EXAMPLES)
def test_the_example_runs(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    test = doctest.DocTestParser().get_doctest(
        EXAMPLES[name], {"torch": torch, "deqkern": deqkern, "__name__": "example"}, name, None, None
    )
    assert test.examples, "an Example section holds lines that begin with >>>"
    output: list[str] = []
    runner = doctest.DocTestRunner(optionflags=doctest.NORMALIZE_WHITESPACE | doctest.ELLIPSIS)
    assert runner.run(test, out=output.append).failed == 0, "".join(output)


def test_every_public_object_has_an_example() -> None:
    wanted = {name for name in OBJECTS if name.rpartition(".")[0] in COMPLETE}
    assert wanted - set(EXAMPLES) == WITHOUT


@pytest.mark.parametrize("name", EXAMPLES)
def test_an_example_is_short(name: str) -> None:
    assert sum(line.startswith((">>>", "...")) for line in EXAMPLES[name].splitlines()) <= 15
