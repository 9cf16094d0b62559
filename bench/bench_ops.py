"""Every op on its kernel and on the plain-torch reference, round by round beside a copy of the same working set."""

from __future__ import annotations

import functools
import statistics
from typing import Any

import pytest
import registry
import report
import torch
from timing import Copy, rounds_for, wait

from deqkern import ops

BUDGET = 0.35  # seconds of rounds for one op on one backend


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    full = metafunc.config.getoption("--full")
    metafunc.parametrize("case", registry.cases(full), ids=str)
    metafunc.parametrize("backend", ["reference", "kernel"])


@functools.lru_cache(maxsize=1)
def arguments_of(case: registry.Case, device: torch.device) -> registry.Arguments:
    """The same for the reference and the kernel, which follow each other."""
    return case.make(device)


@pytest.fixture(scope="module")
def medians() -> dict[str, float]:
    """The reference's median time of each case, for the kernel that is timed after it."""
    return {}


def bench_op(
    benchmark: Any,
    request: pytest.FixtureRequest,
    case: registry.Case,
    backend: str,
    medians: dict[str, float],
    device: torch.device,
) -> None:
    needed = case.memory() + (case.temporary if backend == "reference" else 0)
    if needed > registry.MEMORY_CAP:
        pytest.skip(f"{case} on the {backend} needs {needed / 1e9:.1f} GB, over {registry.MEMORY_CAP / 1e9:.0f} GB")
    arguments, op = arguments_of(case, device), getattr(ops, case.op)
    kernels = ("cuda", "triton") if device.type == "cuda" else ("cpu",)

    def call() -> None:
        op(**arguments)
        wait(device)

    with ops.use_backend(*(kernels if backend == "kernel" else ("reference",))):
        try:
            call()
        except RuntimeError as error:
            if "cannot run" not in str(error):
                raise
            pytest.skip(str(error))
        copy = Copy(case.memory(), device)
        benchmark.group = str(case)
        benchmark.pedantic(call, setup=copy.run, rounds=rounds_for(call, device, BUDGET))
    if benchmark.stats is None:  # --benchmark-disable
        return
    median = statistics.median(benchmark.stats.stats.data)
    achieved = case.floor / median
    benchmark.extra_info.update(
        op=case.op,
        variant=case.variant,
        size=str(case.size),
        backend=backend,
        threads=torch.get_num_threads(),
        isa=ops.backends()["cpu"].get("isa"),
        floor_bytes=case.floor,
        gb_per_s=achieved / 1e9,
        copy_gb_per_s=copy.bandwidth() / 1e9,
        share_of_copy=achieved / copy.bandwidth(),
    )
    if backend == "reference":
        medians[str(case)] = median
        return
    if str(case) in medians:
        benchmark.extra_info["speed_up"] = medians[str(case)] / median
    request.config.stash[report.OPS].append(benchmark.extra_info)
