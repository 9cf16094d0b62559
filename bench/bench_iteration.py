"""The solver's work of one iteration on the library's ops and in plain torch, on one thread and on all.

They take turns, so that noise meets all alike, in two ways. "warm": a whole solve each, as with a model that leaves the
caches alone. "cold": one iteration each, so that the others have emptied the caches, as a large model would. Iterations
without a full history do not count. Each way to do the work is checked against the sequential chain before it is timed.
"""

from __future__ import annotations

import os
import statistics
import time
from collections import defaultdict
from typing import Any

import pytest
import report
import torch
from iteration import HISTORY, SCHEDULE, SIZE, Anderson, Default, Denoiser, PlainTorch, Work, solver_seconds
from timing import Copy
from torch import Tensor

from deqkern import ops, solvers

ROUNDS = 15
ITERATIONS = 15  # of a round, as published
CPU = torch.device("cpu")


def chain(noise: Tensor) -> Tensor:
    """The states (S, B, D) of the sequential chain."""
    table, x, states, model = SCHEDULE.steps(SIZE.steps), noise.double(), [], Denoiser()
    for i in range(SIZE.steps):
        output = model(x.float(), table.timesteps[i].expand(len(x))).double()
        x = table.a[i] * x + table.b[i] * output
        states.append(x.flatten(1))
    return torch.stack(states).float()


def check(work: Work, noise: Tensor) -> None:
    """The clean end within a thousandth of the sequential chain after as many iterations as there are steps."""
    model, timesteps = Denoiser(), SCHEDULE.steps(SIZE.steps).timesteps
    work.start(noise)
    for k in range(SIZE.steps):
        work.after(k, model(work.before(), timesteps))
    expected = chain(noise)[-1]
    error = (work.states()[-1] - expected).norm() / expected.norm()
    assert error < 1e-3, f"{work.name} is off by {error:.1e}"


def iterate(work: Work, k: int, model: Denoiser, timesteps: Tensor) -> float:
    """Seconds of one iteration without the model."""
    start = time.perf_counter()
    image = work.before()
    before = time.perf_counter() - start
    output = model(image, timesteps)
    start = time.perf_counter()
    work.after(k, output)
    return before + time.perf_counter() - start


def compare(works: list[Work], noise: Tensor, caches: str) -> tuple[dict[str, list[float]], Copy]:
    """Seconds of one iteration of each, one median per round; and copies that took their turns with them."""
    model, timesteps = Denoiser(), SCHEDULE.steps(SIZE.steps).timesteps
    copy, medians = Copy(Anderson().memory, CPU), defaultdict(list)
    everyone: list[Work | Copy] = [*works, copy]
    if caches == "warm":
        turns = [(work, k) for work in everyone for k in range(ITERATIONS)]
    else:
        turns = [(work, k) for k in range(ITERATIONS) for work in everyone]
    for _ in range(ROUNDS):
        found = defaultdict(list)
        for work, k in turns:
            if isinstance(work, Copy):
                work.run()
                continue
            if k == 0:
                work.start(noise)
            spent = iterate(work, k, model, timesteps)
            if k > HISTORY:
                found[work.name].append(spent)
        if caches == "warm":
            for solver in (solvers.deq_ddim(), solvers.default(window=None, thinning=0)):
                found[f"sample(solver={solver.name}())"] = solver_seconds(solver, noise, ITERATIONS)
        for name, times in found.items():
            medians[name].append(statistics.median(times))
    return medians, copy


def rows_of(medians: dict[str, list[float]], copy: Copy, floors: dict[str, int | None]) -> report.Rows:
    """What is reported of one comparison; ratios are formed round by round."""
    rows = []
    for name, times in medians.items():
        plain, released = (
            statistics.quantiles([base / own for base, own in zip(medians[other], times, strict=True)], n=4)
            for other in ("plain torch", "plain torch, as released")
        )
        row = {"name": name, "ratio": plain[1], "ratio_quartiles": plain[::2], "ratio_released": released[1]}
        if floor := floors[name]:
            bandwidth = floor / statistics.median(times)
            row |= {"floor_bytes": floor, "gb_per_s": bandwidth / 1e9, "share_of_copy": bandwidth / copy.bandwidth()}
        rows.append(row)
    return rows


@pytest.mark.parametrize("threads", sorted({1, os.cpu_count() or 1}))
def bench_iteration(benchmark: Any, request: pytest.FixtureRequest, threads: int) -> None:
    torch.set_num_threads(threads)
    noise = torch.randn(SIZE.batch, *SIZE.shape)
    plain, released = PlainTorch(released=False), PlainTorch(released=True)
    works: list[Work] = [Anderson(), Default(), plain, released]
    for work in works:
        check(work, noise)
    floors = {work.name: work.floor for work in works}
    floors["sample(solver=deq_ddim())"], floors["sample(solver=default())"] = works[0].floor, works[1].floor
    rows, copies = [], {}
    for caches in ("warm", "cold"):
        medians, copy = compare(works, noise, caches)
        copies[caches] = copy.bandwidth() / 1e9
        rows += [{"threads": threads, "caches": caches, **row} for row in rows_of(medians, copy, floors)]
    benchmark.group = f"iteration m{HISTORY} {SIZE}"
    isa = ops.backends()["cpu"].get("isa")
    benchmark.extra_info.update(threads=threads, isa=isa, copy_gb_per_s=copies, rows=rows)
    request.config.stash[report.ITERATIONS].extend(rows)
    once(benchmark, works[0], noise)


def once(benchmark: Any, work: Work, noise: Tensor) -> None:
    """Put the time of one iteration of `work` in the table of pytest-benchmark too."""
    model, timesteps = Denoiser(), SCHEDULE.steps(SIZE.steps).timesteps
    k, output = -1, torch.empty(0)

    def setup() -> None:
        nonlocal k, output
        k = (k + 1) % (2 * ITERATIONS)
        if k == 0:
            work.start(noise)
        output = model(work.before(), timesteps)

    benchmark.pedantic(lambda: work.after(k, output), setup=setup, rounds=100, warmup_rounds=HISTORY + 1)
