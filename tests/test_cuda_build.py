"""What the compiler made of the CUDA kernels, read off the built module; no GPU is needed for it."""

from __future__ import annotations

import functools
import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
from asserts import in_new_python

_C: Any = pytest.importorskip("deqkern._C")

ARCHITECTURES = ("sm_80", "sm_90")


def find_cuobjdump() -> str | None:
    """The toolkit's, or the one that Triton brings; Triton is asked in another process, without its interpreter."""
    nvcc = shutil.which("nvcc")
    places = [str(Path(nvcc).resolve().parent)] if nvcc else []
    found = shutil.which("cuobjdump") or shutil.which("cuobjdump", path=os.pathsep.join(places))
    code = """
try:
    import triton
    print(triton.knobs.nvidia.cuobjdump.path)
except (ImportError, AttributeError, RuntimeError):
    print("")
"""
    return found or in_new_python(code, TRITON_INTERPRET="0").strip() or None


@functools.cache
def usage() -> dict[str, dict[str, dict[str, int]]]:
    """Architecture -> mangled name -> {"REG": registers, "STACK": bytes, "LOCAL": bytes, ...}."""
    if not _C.cuda_compiled():
        pytest.skip(f"compiled without CUDA: {_C.build_info()['cuda_reason']}")
    built = _C.build_info()["cuda_architectures"]
    if not all(name.removeprefix("sm_") in built for name in ARCHITECTURES):
        pytest.skip(f"compiled for {built}")
    cuobjdump = find_cuobjdump()
    if cuobjdump is None:
        pytest.skip("no cuobjdump")
    done = subprocess.run([cuobjdump, "-res-usage", _C.__file__], capture_output=True, text=True, check=True)
    found: dict[str, dict[str, dict[str, int]]] = {}
    functions: dict[str, dict[str, int]] = {}
    name = ""
    for line in done.stdout.splitlines():
        if match := re.search(r"\barch = (sm_\d+)", line):
            functions = found.setdefault(match[1], {})
        elif match := re.match(r"\s*Function (\S+):", line):
            name = match[1]
        elif "REG:" in line:
            functions[name] = {key: int(value) for key, value in re.findall(r"\b(\w+(?:\[\d+\])?):(\d+)", line)}
    return found


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_no_kernel_spills(architecture: str) -> None:
    """A stack or local memory would be where registers are spilled to, or an array that is indexed by a variable."""
    kernels = usage()[architecture]
    assert kernels
    for name, used in kernels.items():
        assert used["STACK"] == 0 and used["LOCAL"] == 0, (name, used)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("length", [1, 2, 3, 4, 5, 6, 7, 8, 12, 16])
def test_two_blocks_of_anderson_solve_fit_a_multiprocessor(architecture: str, length: int) -> None:
    matching = [used for name, used in usage()[architecture].items() if f"anderson_solve_kernelILi{length}E" in name]
    assert len(matching) == 1
    assert 0 < matching[0]["REG"] <= 128 and matching[0]["SHARED"] <= 48 << 10
