"""The direction of imports, who may print, and what importing deqkern may load."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
# A module may import what stands in a lower layer, never its own or a higher one.
LAYERS = [
    ["deqkern._C", "deqkern.kernels"],
    ["deqkern.numeric", "deqkern.nested", "deqkern.eager", "deqkern.host", "deqkern.storage"],
    ["deqkern.ops", "deqkern.guidance", "deqkern.version", "deqkern.timesteps", "deqkern.scheduler"],
    ["deqkern.step_table"],
    ["deqkern.schedule", "deqkern.walks", "deqkern.replication"],
    ["deqkern.spectral", "deqkern.thinning"],
    ["deqkern.slopes"],
    ["deqkern.solvers", "deqkern.network"],
    ["deqkern.trajectory", "deqkern.checks"],
    ["deqkern.capture", "deqkern.planning"],
    ["deqkern.solve"],
    ["deqkern.gradients", "deqkern.runs", "deqkern.layout"],
    ["deqkern.sampling", "deqkern.optimization", "deqkern.fixed_point"],
    ["deqkern.calibration", "deqkern.inversion", "deqkern.interpolation", "deqkern.measures", "deqkern.nn"],
    ["deqkern"],
    ["deqkern.models", "deqkern.integrations", "deqkern.plots"],
    ["deqkern.cli"],
]
RANK = {name: rank for rank, names in enumerate(LAYERS) for name in names}


def module_name(path: Path) -> str:
    parts = list(path.relative_to(ROOT).with_suffix("").parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def owner(module: str) -> str | None:
    """The longest name in LAYERS that holds `module`."""
    parts = module.split(".")
    names = (".".join(parts[:end]) for end in range(len(parts), 0, -1))
    return next((name for name in names if name in RANK), None)


def imports(path: Path) -> set[str]:
    """Absolute names of all modules that the file imports, at the top or inside a function."""
    name = module_name(path)
    package = name if path.stem == "__init__" else name.rpartition(".")[0]
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parent = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*parent, base] if base else parent)
            found |= {base, *(f"{base}.{alias.name}" for alias in node.names)}
    return found


SOURCES = sorted((ROOT / "deqkern").rglob("*.py"))


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_point_down(path: Path) -> None:
    here = owner(module_name(path))
    assert here is not None
    for target in imports(path):
        there = owner(target) if target.startswith("deqkern") else None
        if there is None or there == here or (there == "deqkern" and target == "deqkern"):
            continue
        if there == "deqkern":  # a name that `from deqkern import name` or `from . import name` takes from the package
            assert RANK[here] > RANK["deqkern"], f"{path.name} imports {target}"
        assert RANK[there] < RANK[here], f"{path.name} imports {target}"


def test_every_module_has_a_layer() -> None:
    top = {module_name(path) for path in (ROOT / "deqkern").glob("*.py")}
    folders = {f"deqkern.{path.name}" for path in (ROOT / "deqkern").iterdir() if (path / "__init__.py").exists()}
    assert top | folders <= set(RANK)


@pytest.mark.parametrize("path", sorted((ROOT / "kernels").glob("*.py")), ids=lambda path: path.name)
def test_kernels_import_nothing_of_deqkern(path: Path) -> None:
    assert not any(name.split(".")[0] == "deqkern" for name in imports(path))


@pytest.mark.parametrize("path", sorted((ROOT / "csrc").rglob("*.[hc]*")), ids=lambda path: path.name)
def test_native_sources_know_no_torch(path: Path) -> None:
    text = path.read_text()
    assert "torch" not in text and "ATen" not in text and "c10" not in text


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_only_the_command_line_prints_or_plots(path: Path) -> None:
    if path.parent.name == "cli" or path.name == "plots.py":
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
