"""What more than one language says of the ops: names, places and constants, compared here."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from deqkern import ops
from deqkern.ops import _native, reference, state

_C: Any = pytest.importorskip("deqkern._C")
ROOT = Path(__file__).resolve().parent.parent.parent
VIEWS = [state.Norms, state.Moments, state.Convergence, state.ConstantX0, state.OutputPath]
SHARED = ["MAX_HISTORY", "SMALLEST_EIGENVALUE", "SMALLEST_CHANGE", "LEAST_LEFT"]


def test_calls_name_the_same_members_in_the_same_order() -> None:
    assert _C.shared()["ops"] == {op: _native.arguments(contract) for op, contract in ops.CONTRACTS.items()}


@pytest.mark.parametrize("view", VIEWS, ids=lambda view: view.__name__)
def test_places_are_those_of_cpp(view: Any) -> None:
    assert _C.shared()[view.__name__] == ", ".join(view._fields)


@pytest.mark.parametrize("view", VIEWS, ids=lambda view: view.__name__)
def test_places_are_those_of_triton(view: Any) -> None:
    pytest.importorskip("triton")
    import deqkern.kernels.state as places

    prefix = re.sub(r"(?<!^)(?=[A-Z])", "_", view.__name__).upper()
    one = {"NORMS": "NORM", "MOMENTS": "MOMENT"}.get(prefix, prefix)
    found = {name: value.value for name, value in vars(places).items() if name.startswith(f"{one}_")}
    assert found == {f"{one}_{field.upper()}": place for place, field in enumerate(view._fields)}
    if hasattr(places, prefix):
        assert getattr(places, prefix).value == len(view._fields)


def test_shapes_hold_a_place_for_each_name() -> None:
    sizes = {
        ("ddim_scan", "norms", -1): state.Norms,
        ("update_convergence", "norms", -1): state.Norms,
        ("band_moments", "moments", -1): state.Moments,
        ("secant_slope", "moments", -1): state.Moments,
        ("update_convergence", "convergence", -1): state.Convergence,
        ("extrapolate_states", "constant_x0", 0): state.ConstantX0,
        ("interpolate_outputs", "path", 0): state.OutputPath,
    }
    for (op, name, dimension), view in sizes.items():
        (argument,) = (argument for argument in ops.CONTRACTS[op].tensors if argument.name == name)
        assert argument.rule.sizes[dimension] == str(len(view._fields))


def test_scopes_and_constants_are_those_of_cpp() -> None:
    shared = _C.shared()
    assert tuple(shared["SCOPES"].split(", ")) == ops.SCOPES
    values = vars(reference) | {"MAX_HISTORY": ops.MAX_HISTORY}
    assert {name: shared[name] for name in SHARED} == {name: values[name] for name in SHARED}


def test_constants_are_those_of_triton() -> None:
    pytest.importorskip("triton")
    import deqkern.kernels.update_convergence as kernel

    for name in ("SMALLEST_CHANGE", "LEAST_LEFT"):
        assert getattr(kernel, name).value == getattr(reference, name)


@pytest.mark.parametrize("view", VIEWS, ids=lambda view: view.__name__)
@pytest.mark.parametrize("kind", ["torch", "numpy"])
def test_a_view_is_no_copy(view: Any, kind: str) -> None:
    count = len(view._fields)
    shape = (count, 4) if view in (state.ConstantX0, state.OutputPath) else (4, count)
    memory: Any = torch.zeros(shape) if kind == "torch" else np.zeros(shape)
    for place, part in enumerate(view.view(memory)):
        part[:] = place + 1.0
    assert sorted(set(np.asarray(memory).ravel().tolist())) == [place + 1.0 for place in range(count)]


@pytest.mark.parametrize("kind", ["torch", "numpy"])
def test_the_status_is_windows_and_then_who_diverged(kind: str) -> None:
    memory: Any = torch.arange(6) if kind == "torch" else np.arange(6)
    status = state.Status.view(memory)
    assert status.window.tolist() == [[0, 1], [2, 3]] and status.diverged.tolist() == [4, 5]
    status.window[0, 0] = 9
    assert memory[0] == 9


# What only an op's own files may name, and the lists of ops.
FOLDERS = ["deqkern/ops", "csrc", "kernels", "CMakeLists.txt", "setup.py"]
LISTS = {"deqkern/ops/reference.py", "csrc/ops.h", "csrc/cuda/ops.h"}


@pytest.mark.parametrize("op", list(ops.CONTRACTS))
def test_an_op_is_named_in_its_own_files_and_the_lists_alone(op: str) -> None:
    """So that a new one touches no others: CONTRIBUTING.md counts them."""
    suffixes = {".py", ".h", ".cpp", ".cu", ".cuh", ".txt"}
    files = [path for folder in FOLDERS for path in [ROOT / folder, *(ROOT / folder).rglob("*")] if path.is_file()]
    naming = {
        str(path.relative_to(ROOT))
        for path in files
        if path.suffix in suffixes and re.search(rf"\b{op}(?:_kernel)?\b", path.read_text())
    }
    own = {f"csrc/{op}.h", f"csrc/cpu/{op}.cpp", f"kernels/{op}.py"} | {
        f"csrc/cuda/{op}{suffix}" for suffix in (".h", ".cu", ".cuh")
    }
    assert naming <= own | LISTS, naming - own - LISTS
