"""The direction of imports, who may print, and what importing deqkern may load."""

from __future__ import annotations

import ast
import graphlib
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
# From the top. A module may import from the layers below its own, and inside its own where no circle comes of it.
LAYERS = [
    ["cli"],
    ["integrations", "models", "plots"],
    ["sampling", "inversion", "optimization", "planning", "calibration", "runs", "nn", "interpolation", "slopes"],
    ["problem", "gradients", "fixed_point"],
    ["engine"],
    ["solvers", "network"],
    ["chain", "ops"],
    ["support", "_C", "kernels"],
]
RANK = {f"deqkern.{name}": -depth for depth, names in enumerate(LAYERS) for name in names}
SOURCES = sorted((ROOT / "deqkern").rglob("*.py"))
MODULES = {".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path for path in SOURCES}


def layer(module: str) -> int | None:
    """How high the room of a module is; None for deqkern itself, which gathers the public names."""
    return RANK.get(".".join(module.split(".")[:2]))


def imports(path: Path) -> set[str]:
    """Absolute names of all that the file imports, at the top or inside a function."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    package = parts[:-1]
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parent = package[: len(package) - node.level + 1]
                base = ".".join([*parent, base] if base else parent)
            found |= {f"{base}.{alias.name}" for alias in node.names}
    return found


def modules_imported(path: Path) -> set[str]:
    """The modules of deqkern among what the file imports: `from a import b` is a.b if that is one, else a."""
    found = set()
    for name in imports(path):
        while name not in MODULES and "." in name:
            name = name.rpartition(".")[0]
        if name in MODULES:
            found.add(name)
    return found


@pytest.mark.parametrize("module", [name for name in MODULES if name != "deqkern"])
def test_imports_point_down(module: str) -> None:
    here = layer(module)
    assert here is not None, f"{module} is in no layer"
    for target in modules_imported(MODULES[module]):
        there = layer(target)
        if there is None:  # the package itself, of which its integrations and the command line take public names
            assert here >= RANK["deqkern.integrations"], f"{module} imports {target}"
        else:
            assert there <= here, f"{module} imports {target}, which is in a higher layer"


def test_imports_go_in_no_circle() -> None:
    """Not even through functions: what a module needs stands below it."""
    graph = {}
    for name, path in MODULES.items():
        package = name if path.stem == "__init__" else name.rpartition(".")[0]
        graph[name] = modules_imported(path) - {name, package}  # a package may be asked for what stands beside one
    graphlib.TopologicalSorter(graph).prepare()


def test_every_layer_stands_for_something() -> None:
    there = {name.split(".")[1] for name in MODULES if "." in name} | {"_C", "kernels"}
    assert {name for names in LAYERS for name in names} == there


def test_nothing_else_of_a_checkout_can_be_imported() -> None:
    for name in ("bench", "tests", "csrc", "examples", "docs"):
        code = f"import deqkern.kernels.bands, deqkern.{name}"
        done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
        assert f"No module named 'deqkern.{name}'" in done.stderr


@pytest.mark.parametrize("path", sorted((ROOT / "kernels").glob("*.py")), ids=lambda path: path.name)
def test_kernels_import_nothing_of_deqkern(path: Path) -> None:
    assert not any(name.split(".")[0] == "deqkern" for name in imports(path))


@pytest.mark.parametrize("path", sorted((ROOT / "csrc").rglob("*.[hc]*")), ids=lambda path: path.name)
def test_native_sources_know_no_torch(path: Path) -> None:
    text = path.read_text()
    assert "torch" not in text and "ATen" not in text and "c10" not in text


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_only_the_command_line_prints_or_plots(path: Path) -> None:
    if path.parent.name in ("cli", "plots"):
        return
    calls = [node.func for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)]
    assert not any(isinstance(call, ast.Name) and call.id == "print" for call in calls)
    assert not any(name.split(".")[0] in ("matplotlib", "rich", "typer") for name in imports(path))


def test_importing_is_lean_and_silent() -> None:
    code = """
import sys, torch
before = set(sys.modules)
import deqkern, deqkern.ops, deqkern.models
heavy = {'diffusers', 'matplotlib', 'triton', 'sklearn', 'typer', 'rich', 'PIL'} & set(sys.modules)
heavy |= {'scipy', 'pandas'} & (set(sys.modules) - before)
assert not heavy, heavy
assert not torch.cuda.is_initialized()
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
