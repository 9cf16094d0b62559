"""What the build must hold to, beside what tests/ops/test_cpu.py says of forks and of each instruction set."""

from __future__ import annotations

import ctypes
import importlib
import importlib.metadata
import tomllib
from pathlib import Path
from typing import Any

import pytest
import torch
from asserts import assert_close, in_new_python
from torch import Tensor

import deqkern
from deqkern.ops import reference

_C: Any = pytest.importorskip("deqkern._C")

SOURCE = Path(__file__).resolve().parent.parent
PACKAGE = Path(deqkern.__file__).parent


def address(value: Tensor | None) -> int:
    return 0 if value is None else value.data_ptr()


def test_kernels_is_no_package_of_its_own(tmp_path: Path) -> None:
    """Another package has that name, and transformers asks for it: the folder must not stand in its way.

    Without an __init__.py it is a namespace portion, which libraries take for absent and any real package comes before.
    """
    find = f"import sys; sys.path.insert(0, {str(SOURCE)!r}); import kernels; print(kernels.__file__)"
    assert in_new_python(find).strip() == "None"
    real = tmp_path / "kernels" / "__init__.py"
    real.parent.mkdir()
    real.touch()
    assert in_new_python(f"import sys; sys.path.append({str(tmp_path)!r}); {find}").strip() == str(real)


# Without the package, which imports torch, for a second.
LOADED_ALONE = f"""
import importlib.util, sys
spec = importlib.util.spec_from_file_location("_C", {_C.__file__!r})
_C = importlib.util.module_from_spec(spec)
spec.loader.exec_module(_C)
print(_C.isa(), "torch" in sys.modules)
"""


def test_the_extension_needs_no_torch() -> None:
    isa, torch_is_there = in_new_python(LOADED_ALONE).split()
    assert isa in _C.isas() and torch_is_there == "False"


@pytest.mark.parametrize("isa", _C.isas())
def test_an_instruction_set_can_be_forced(isa: str) -> None:
    assert in_new_python(LOADED_ALONE, DEQKERN_ISA=isa).split()[0] == isa


def test_the_build_says_what_it_is() -> None:
    info = _C.build_info()
    assert info["compiler"]
    assert _C.cuda_compiled() == bool(info["cuda"]) == (not info["cuda_reason"])
    if not torch.cuda.is_available():
        with pytest.raises(RuntimeError, match="CUDA"):
            _C.cuda_device_count()
    assert _C.isas()[-1] == "baseline"
    assert (PACKAGE / "py.typed").exists()


def test_the_installed_version_is_the_one_in_pyproject() -> None:
    try:
        version = importlib.metadata.version("deqkern")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("not installed")
    assert version == tomllib.loads((SOURCE / "pyproject.toml").read_text())["project"]["version"]
    assert deqkern.__version__ == version


def one_iteration(threads: int) -> list[Tensor]:
    """Every op that sums or is chunked, at a size that two threads share; one takes the answers of another."""
    torch.manual_seed(0)
    S, B, D, K, m = 9, 3, 6151, 4, 3
    x, e, z = torch.randn(S + 1, B, D), torch.randn(S, B, D), torch.randn(S, B, D)
    a, b, n, slope = torch.rand(S), torch.rand(S), torch.rand(S), torch.randn(S, B, K)
    bands, window = torch.tensor([0, 7, 7, 1500, D]), torch.tensor([[0, S], [2, 7], [4, 4]])
    ring, norms = torch.randn(m + 1, S, B, D), torch.zeros(S, B, 3, dtype=torch.float64)
    gram, rhs = torch.zeros(S, B, m, m, dtype=torch.float64), torch.zeros(S, B, m, dtype=torch.float64)
    moments, gamma = torch.zeros(S, B, K, 2, dtype=torch.float64), torch.zeros(S, B, m)
    scan = [address(value) for value in (x, e, z, a, b, a, n, slope, bands, window, x[1:], ring[2], norms)]
    _C.ddim_scan(*scan, S, B, D, K, 0.9, False, threads)
    _C.band_moments(*map(address, (e, x, z, bands, window, moments)), S, B, D, K, threads)
    _C.anderson_gram(*map(address, (ring, window, gram, rhs)), m, S, B, D, 2, m, threads)
    _C.anderson_solve(*map(address, (gram, rhs, window, gamma)), S, B, m, 1, 1e-6, 0.0, False, threads)
    _C.anderson_mix(*map(address, (ring, gamma, window, x[1:])), m, S, B, D, 2, m, threads)
    return [x, ring, norms, moments, gram, rhs, gamma]


def test_the_number_of_threads_changes_no_bit() -> None:
    for one, two in zip(one_iteration(1), one_iteration(2), strict=True):
        assert torch.equal(one, two)


@pytest.mark.parametrize("in_place", [True, False])
@pytest.mark.parametrize("D", [1 << 20, (1 << 20) + 5])
def test_arrays_too_large_for_the_cache(D: int, in_place: bool) -> None:
    """They are written past it, where their rows are aligned."""
    S, m = 3, 1
    x, e, ring = torch.randn(S + 1, 1, D), torch.randn(S, 1, D), torch.randn(m + 1, S, 1, D)
    a, b, slope, gamma = torch.rand(S), torch.rand(S), torch.rand(S, 1, 1), torch.rand(S, 1, m)
    bands, window = torch.tensor([0, D]), torch.tensor([[0, S]])
    f, g, norms = torch.empty_like(e), torch.empty_like(e), torch.zeros(S, 1, 3, dtype=torch.float64)
    expected = [torch.empty_like(value) for value in (f, g, norms, f)]
    reference.ddim_scan(x, e, None, a, b, b, b, slope, bands, window, 0.5, False, *expected[:3])
    reference.anderson_mix(ring, 1, m, gamma, window, expected[3])
    f = x[1:] if in_place else f
    scan = [address(value) for value in (x, e, None, a, b, b, None, slope, bands, window, f, g, norms)]
    _C.ddim_scan(*scan, S, 1, D, 1, 0.5, False, 2)
    mixed = torch.empty_like(e)
    _C.anderson_mix(*map(address, (ring, gamma, window, mixed)), m, S, 1, D, 1, m, 2)
    for actual, value in zip((f, g, norms, mixed), expected, strict=True):
        assert_close(actual, value)


@pytest.mark.parametrize("width", [1, 3, 16, 33, 40])
def test_the_transform_reads_and_writes_nothing_beyond_its_arrays(width: int) -> None:
    """Guards of NaN before and after; a matrix that is orthonormal and no DCT."""
    N, C, H, R = 2, 3, 7, 3
    D = C * H * width
    guarded = torch.full((N * D + 128,), torch.nan)
    image = guarded[64:-64].view(N, C, H, width).copy_(torch.randn(N, C, H, width))
    held = torch.full((R * D + 128,), torch.nan)
    spectrum = held[64:-64].view(R, D)
    rows, order = torch.tensor([2, 0]), torch.randperm(D)
    dct_h, dct_w, colour = (torch.linalg.qr(torch.randn(n, n))[0].contiguous() for n in (H, width, C))
    matrices = (dct_h, dct_w, colour)
    expected = torch.full((R, D), torch.nan, dtype=torch.float64)
    reference.dct2(
        image.double(), expected, rows, *(value.double() for value in matrices), order, order.argsort(), False
    )
    pointers = [address(value) for value in (image, spectrum, rows, *matrices, order, order.argsort())]
    original = image.clone()
    _C.dct2(*pointers, N, C, H, width, R, False, 1)
    assert_close(spectrum, expected)
    image.fill_(torch.nan)
    _C.dct2(*pointers, N, C, H, width, R, True, 2)
    assert_close(image, original)
    for memory in (guarded, held):
        assert memory[:64].isnan().all() and memory[-64:].isnan().all()


def test_null_is_refused() -> None:
    memory = (ctypes.c_int64 * 4)()
    with pytest.raises(ValueError, match="f_ring is null"):
        _C.anderson_mix(0, ctypes.addressof(memory), ctypes.addressof(memory), 0, 1, 1, 1, 1, 0, 1, 1)
    with pytest.raises(ValueError, match="m must be"):
        _C.anderson_solve(0, 0, 0, 0, 1, 1, 17, 0, 0.0, 0.0, False, 1)
    _C.anderson_mix(0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1)
