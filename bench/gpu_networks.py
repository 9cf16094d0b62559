"""Networks with random weights on a GPU: t(N) of a batch of N rows, and the time of an iteration of theirs.

They converge at once, so that only the time of an iteration is theirs; what trained weights need is combined with it.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Iterator
from typing import Any

import networks
import torch
from gpu_clock import Clock, Row, graphed
from gpu_solves import captures, chain
from iteration import SCHEDULE
from torch import Tensor

import deqkern
from deqkern import solvers

Net = networks.UNet | networks.DiT
# Iterations to 1e-2 of the default solver with all steps at once, on trained weights at S = 50, eta 0:
# docs/convergence.md, both models.
TRAINED_ITERATIONS = 6.5


def measure_latency(clock: Clock, network: Net, counts: list[int]) -> Iterator[Row]:
    """Milliseconds of one call of the network for N rows."""
    for count in counts:
        call = functools.partial(network, *inputs_of(network, count))
        row: Row = {"network": type(network).__name__, "rows": count, "eager_ms": 1e3 * clock(call)}
        yield row | {"graph_ms": 1e3 * clock(graphed([call], clock.device))}


def inputs_of(network: Net, count: int) -> tuple[Tensor, Tensor]:
    """Samples (N, *shape) and timesteps (N,) as the network takes them."""
    parameter = next(network.parameters())
    x = torch.randn(count, *network.shape, device=parameter.device, dtype=parameter.dtype)
    return x, torch.randint(0, 1000, (count,), device=parameter.device)


def measure_end_to_end(clock: Clock, network: Net, steps: int, iterations: int) -> Iterator[Row]:
    """One sample: the sequential loop and an iteration over all steps, eager and as graphs."""
    for graph in (False, True) if clock.device.type == "cuda" else (False,):
        yield end_to_end(clock, network, network, steps, iterations, graph)


def end_to_end(clock: Clock, network: Net, model: Any, steps: int, iterations: int, graph: bool) -> Row:
    """`model` is the network, or what it was compiled to. The captures of a graph are reported apart."""
    noise, parameter = torch.randn(1, *network.shape, device=clock.device), next(network.parameters())
    loop = functools.partial(chain, model, SCHEDULE.steps(steps), noise, None, parameter.dtype)
    all_rows = functools.partial(model, *inputs_of(network, steps))
    if graph:
        loop, all_rows = graphed([loop], clock.device), graphed([all_rows], clock.device)
    options: Row = {"solver": solvers.default(window=None, thinning=0), "rtol": 0.0, "max_iterations": iterations}
    parallel = functools.partial(deqkern.sample, model, noise, SCHEDULE, steps, cuda_graph=graph, **options)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", deqkern.ConvergenceWarning)
        done = parallel().iterations
        with captures(clock) as capturing:
            spent = clock.solve(parallel)
        captured = capturing.seconds / max(capturing.solves, 1)
    iteration, alone, sequential = (spent - captured) / done, clock.solve(all_rows), clock.solve(loop)
    row: Row = {"network": type(network).__name__, "mode": "graph" if graph else "eager", "steps": steps}
    row |= {"sequential_ms": 1e3 * sequential, "iteration_ms": 1e3 * iteration, "captures_ms": 1e3 * captured}
    row |= {"iterations": done, "model_share": alone / iteration}
    return row | {"combined_with_trained_iterations": sequential / (TRAINED_ITERATIONS * iteration)}
