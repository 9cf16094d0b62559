"""The solver's work of one iteration on a GPU, launched and as a graph, beside DEQ-DDIM's way in plain torch."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator

import torch
from gpu_clock import Call, Clock, Row, graphed
from iteration import HISTORY, SCHEDULE, PlainTorch, open_iteration
from registry import Size
from torch import Tensor

import deqkern
from deqkern import solvers
from deqkern.engine.iteration import Iteration
from deqkern.engine.rows import Rows


def measure_iterations(clock: Clock, size: Size) -> Iterator[Row]:
    """All steps stay active: the windows are opened again before each iteration, one small copy more."""
    device = clock.device
    noise = torch.randn(size.batch, *size.shape, device=device)
    plain = {}
    for released in (False, True):
        work = PlainTorch(released, size, device)
        work.start(noise)
        for k in range(HISTORY + 1):
            work.after(k, work.before())
        plain[work.name] = clock.wall(lambda w=work: w.after(HISTORY, w.before()), 50)
    yield from ({"solver": name, "us": 1e6 * spent} for name, spent in plain.items())
    for solver in (solvers.default(window=None), solvers.parataa(), solvers.deq_ddim()):
        table = SCHEDULE.steps(size.steps)
        iteration, rows = open_iteration(solver, noise, table)
        opened = iteration.stopping.flat.clone()

        def run(k: int, i: Iteration = iteration, r: Rows = rows, w: Tensor = opened) -> None:
            i.stopping.flat.copy_(w)
            i.run(k, r, [r.states])

        for k in range(2 * solver.history_size + 2):
            run(k)
        period = math.lcm(len(iteration.e), solver.history_size + 1)
        calls: list[Call] = [lambda k=k: run(k) for k in range(4 * period, 5 * period)]
        eager = clock.wall(lambda c=calls: [call() for call in c], max(50 // period, 1)) / period
        graph = graphed(calls, device)
        for _ in range(3):
            graph()
        captured = clock.wall(graph, max(200 // period, 1)) / period
        row = {"solver": solver.name, "us": 1e6 * eager, "graph_us": 1e6 * captured}
        for name, spent in plain.items():
            row[f"ratio to {name}"] = spent / eager
            row[f"graph ratio to {name}"] = spent / captured
        yield row
    yield {"solver": "default, all that sample does", "us": 1e6 * measure_sample(clock, size)}


def measure_sample(clock: Clock, size: Size, first: int = 4, last: int = 12) -> float:
    """Seconds of an iteration of the default solver as it ships, with all that the host does; its model is tanh.

    What a solve of `last` iterations takes longer than one of `first`, so that its start and its end do not count.
    """
    noise = torch.randn(size.batch, *size.shape, device=clock.device)
    taken, done = [], []
    for count in (first, last):
        options: Row = {"rtol": 0.0, "max_iterations": count}

        def solve(options: Row = options) -> deqkern.Solution:
            return deqkern.sample(lambda x, t: torch.tanh(x), noise, SCHEDULE, size.steps, **options)

        with warnings.catch_warnings():
            warnings.simplefilter("ignore", deqkern.ConvergenceWarning)
            done.append(solve().iterations)
            taken.append(clock.solve(solve))
    return (taken[1] - taken[0]) / (done[1] - done[0])
