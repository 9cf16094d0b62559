"""The copy under test, the threads, the interpreter, the seeds, and what every test may ask for.

The checkout is tested (with the extension built in place) unless DEQKERN_TEST_INSTALLED=1, which tests the installed
package. One thread per process is the default: on a busy machine parallel regions are slower by orders of magnitude.
"""

from __future__ import annotations

import gc
import os
import sys
import zlib
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import hypothesis
import pytest
import torch
from torch import Tensor

ROOT = str(Path(__file__).resolve().parent.parent)
HAS_CUDA = torch.cuda.is_available()

if os.environ.get("DEQKERN_TEST_INSTALLED") == "1":
    sys.path[:] = [place for place in sys.path if Path(place or ".").resolve() != Path(ROOT)]
elif ROOT not in sys.path:
    sys.path.insert(0, ROOT)
if not HAS_CUDA:  # Triton reads it when it is first imported
    os.environ.setdefault("TRITON_INTERPRET", "1")

hypothesis.settings.register_profile("deqkern", deadline=None, derandomize=True, max_examples=60)
hypothesis.settings.load_profile("deqkern")

# Files of more than ten seconds begin first: one that a process begins late leaves the others with nothing to do.
LONGEST = (
    "test_convergence",
    "test_docs",
    "test_diffusers",
    "test_kernels_aot",
    "test_methods",
    "test_diffusers_transformers",
    "test_bench",
    "test_runs",
    "test_cli_inversion",
    "test_second_order",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    places = {name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: places.get(item.path.stem, len(places)))


def pytest_collection_finish() -> None:
    """What is there now stays to the end: the garbage collector need not go through it again and again."""
    gc.collect()
    gc.freeze()


def pytest_report_header() -> list[str]:
    import deqkern
    from deqkern import ops

    kernels = ", ".join(name for name, state in ops.backends().items() if state["loaded"])
    return [f"deqkern: {Path(deqkern.__file__).parent}, backends {kernels}, torch {torch.__version__}"]


@pytest.fixture(autouse=True)
def _seed(request: pytest.FixtureRequest) -> None:
    """Another stream of random numbers for each test, the same in each run."""
    torch.manual_seed(zlib.crc32(request.node.nodeid.encode()))


NEEDS_GPU = [pytest.mark.gpu, pytest.mark.skipif(not HAS_CUDA, reason="no GPU")]


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=NEEDS_GPU)])
def device(request: pytest.FixtureRequest) -> torch.device:
    return torch.device(request.param)


@pytest.fixture(scope="session")
def fresh() -> Callable[..., Tensor]:
    """A function (*shape, dtype=, device=) that gives memory filled with NaN, for outputs that must be written."""

    def allocate(*shape: int, dtype: torch.dtype = torch.float32, device: torch.device | str | None = None) -> Tensor:
        return torch.full(shape, torch.nan, dtype=dtype, device=device)

    return allocate
