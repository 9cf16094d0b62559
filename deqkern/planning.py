"""`plan`: whether parallel sampling pays on this model, device and batch, from latencies measured here and now."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .chain.schedule import NoiseSchedule
from .engine.effort import USUAL_RTOL, effort
from .network.latency import Latencies, measure_latencies
from .network.model import Model
from .problem import Problem, check_schedule
from .solvers.presets import Solver, default, sequential
from .support.checks import check_count, check_not_empty

# Windows of S / n steps: the ratios of their iterations and evaluations to the default's
# (docs/records/convergence.md).
WINDOWS = {2: (1.1, 0.87), 4: (1.55, 0.69), 8: (2.4, 0.58)}
# A smaller gain does not count: timing scatters by as much, and the solver's own work is not included.
LEAST_GAIN = 1.1
# Calls per size.
REPEATS = 3


@dataclass(frozen=True)
class Way:
    """One way to solve the chain in parallel, and its predicted time.

    Attributes:
        window: Steps.
        max_batch: Rows in one model call, None for all.
        iterations: Predicted.
        evaluations: Predicted, per sample.
        seconds: Predicted, for the whole batch.

    """

    window: int
    max_batch: int | None
    iterations: int
    evaluations: float
    seconds: float


@dataclass(frozen=True)
class Plan:
    """What `plan` returns: whether parallel sampling pays, and the solver to use.

    Attributes:
        latencies: Seconds of a model call by its rows, as measured.
        sequential_seconds: Of the sequential chain for the whole batch, predicted.
        parallel_seconds: Of the fastest of `ways` for the whole batch, predicted.
        speedup: `sequential_seconds / parallel_seconds`.
        pays: Whether the speedup is at least 1.1.
        solver: To be passed to `sample`.
        max_batch: To be passed to `sample`.
        message: A paragraph that says all this.
        ways: The default solver, then narrower windows, each with the `max_batch` that suits it.
        out_of_memory: The rows with which the model ran out of memory, or None.

    Example:
        >>> noise, schedule = torch.randn(1, 1, 8, 8), deqkern.NoiseSchedule.linear()
        >>> plan = deqkern.plan(lambda x, t: 0.1 * x, noise, schedule, 20, repeats=1)
        >>> plan.pays == (plan.speedup >= 1.1), plan.message.split(":")[0] in ("Yes", "No")
        (True, True)

    """

    latencies: dict[int, float]
    sequential_seconds: float
    parallel_seconds: float
    speedup: float
    pays: bool
    solver: Solver
    max_batch: int | None
    message: str
    ways: tuple[Way, ...]
    out_of_memory: int | None


def plan(
    model: Model,
    example: Tensor,  # (B, *shape)
    schedule: NoiseSchedule | Any,
    num_inference_steps: int = 50,
    *,
    eta: float | None = None,
    order: int | None = None,
    rtol: float = USUAL_RTOL,
    iterations: int | None = None,
    evaluations: float | None = None,
    model_kwargs: Mapping[str, Any] | None = None,
    max_batch: int | None = None,
    repeats: int = REPEATS,
) -> Plan:
    """Measure the model with B, 2 B, 4 B, .. rows, and predict whether parallel sampling beats sequential.

    It stops at the window of the default solver, at `max_batch`, when memory runs out, or when the device is full: from
    there on, calls are split. Between two sizes time is taken to be linear. The solver's own work is not included
    (docs/performance.md); it matters for a model whose call takes less than a few milliseconds. The model is called as
    it is, without gradients; the random state of torch stays as it was.

    Args:
        model: As in `sample`.
        example: (B, *shape), the noise that would be sampled, on its device.
        schedule: As in `sample`.
        num_inference_steps: S.
        eta: As in `sample`.
        order: As in `sample`.
        rtol: As in `sample`.
        iterations: How many a solve with the default solver takes, such as `solution.iterations` of one of yours. None:
            what the shipped models take at rtol 1e-2, 9, or 12 with eta > 0; 1.5 more per decade of a smaller `rtol`;
            1 more with order = 2.
        evaluations: The same per sample, such as `float(solution.nfe.double().mean())`. None: 3.7 S, or 4.3 S with
            fewer than 43 steps, or 5.3 S with eta > 0; 0.8 S more per decade of a smaller `rtol`.
        model_kwargs: As in `sample`.
        max_batch: As in `sample`.
        repeats: Calls per size, of which the fastest counts: anything else that runs on the machine only adds time.
            Another one before them warms up. The smallest size is measured once more at the end, for as long as the
            largest.

    Returns:
        The `Plan`.

    Raises:
        ValueError: As `sample` does.
        TypeError: As `sample` does.
        RuntimeError: As the model does if even B rows are too many for the memory.

    Example:
        >>> noise, schedule = torch.randn(1, 1, 8, 8), deqkern.NoiseSchedule.linear()
        >>> plan = deqkern.plan(lambda x, t: 0.1 * x, noise, schedule, 20)
        >>> solution = deqkern.sample(
        ...     lambda x, t: 0.1 * x, noise, schedule, 20, solver=plan.solver, max_batch=plan.max_batch
        ... )
        >>> plan.message.startswith(("Yes", "No"))
        True

    """
    schedule = check_schedule(schedule)
    check_count("repeats", repeats)
    problem = Problem.of_chain(
        model,
        example,
        lambda: schedule.steps(num_inference_steps, eta=eta, order=order),
        name="example",
        solver=default(),
        rtol=rtol,
        max_batch=max_batch,
        model_kwargs=model_kwargs,
    )
    return planned(problem, "example", iterations=iterations, evaluations=evaluations, repeats=repeats)


def planned(
    problem: Problem,
    name: str,
    *,
    iterations: int | None = None,
    evaluations: float | None = None,
    repeats: int = REPEATS,
) -> Plan:
    """`plan` of a problem; `name` is the argument that holds its known state, the example."""
    network, example, rtol, max_batch = problem.network, problem.first, problem.rtol, problem.max_batch
    assert network is not None
    check_not_empty(name, example)
    steps, batch = len(network.table.a), len(example)
    counts = f"the shipped models need at rtol {rtol:g}, yours may differ"
    if iterations is not None or evaluations is not None:
        counts = "given"
    eta = float((network.table.n != 0).any())
    count, evals = effort(steps, eta, iterations, evaluations, rtol=rtol, order=network.table.order)
    devices = [example.device] if example.is_cuda else []
    with torch.no_grad(), torch.random.fork_rng(devices):
        most_rows = default().width(steps) * batch
        most = min(max_batch or most_rows, most_rows)
        latencies = measure_latencies(network, example, most, repeats=repeats, sequential_calls=steps)

    one_by_one = steps * latencies.of(batch, max_batch or batch)
    ways = _ways(latencies, steps, batch, iterations=count, evaluations=evals, max_batch=max_batch)
    best = _fastest(ways)
    speedup = one_by_one / best.seconds
    pays = speedup >= LEAST_GAIN
    return Plan(
        latencies=latencies.seconds,
        sequential_seconds=one_by_one,
        parallel_seconds=best.seconds,
        speedup=speedup,
        pays=pays,
        solver=(default() if best is ways[0] else default(window=best.window)) if pays else sequential(),
        max_batch=best.max_batch if pays else max_batch,
        message=_message(latencies, steps, batch, one_by_one=one_by_one, best=best, pays=pays, counts=counts),
        ways=tuple(ways),
        out_of_memory=latencies.out_of_memory,
    )


def _ways(
    latencies: Latencies,
    steps: int,
    batch: int,
    *,
    iterations: int,
    evaluations: float,
    max_batch: int | None,
) -> list[Way]:
    """The default solver first, then narrower windows."""
    widest, found = default().width(steps), list[Way]()
    for parts, (more_iterations, fewer_evaluations) in {1: (1.0, 1.0), **WINDOWS}.items():
        window = min(math.ceil(steps / parts), widest)
        if parts > 1 and window < 2:
            continue
        count = min(round(iterations * more_iterations), steps)
        evals = min(max(evaluations * fewer_evaluations, steps), window * count)
        ways = []
        for size in reversed(latencies.sizes):  # those that hold all rows, which are equal, then those that cut
            seconds = sum(latencies.of(rows, size) for rows in _rows(window, batch, count, evals))
            limit = max_batch if size >= window * batch else size
            ways.append(Way(window, limit, count, evals, seconds))
        found.append(_fastest(ways))
    return found


def _rows(window: int, batch: int, iterations: int, evaluations: float) -> list[int]:
    """Rows of each iteration: they fall linearly, as steps converge, and add up to the evaluations."""
    mean = evaluations / iterations
    first = min(window, 2 * mean)
    fall = 2 * (first - mean) / max(iterations - 1, 1)
    return [max(round(batch * (first - fall * j)), 1) for j in range(iterations)]


def _fastest(ways: list[Way]) -> Way:
    """The first, unless a later one gains something on it."""
    best = ways[0]
    for way in ways[1:]:
        if way.seconds * LEAST_GAIN <= best.seconds:
            best = way
    return best


def _message(
    latencies: Latencies, steps: int, batch: int, *, one_by_one: float, best: Way, pays: bool, counts: str
) -> str:
    fewest, most = latencies.sizes[0], latencies.sizes[-1]
    cut = "" if best.max_batch is None else f", max_batch {best.max_batch}"
    parts = [
        f"{'Yes' if pays else 'No'}: parallel sampling {'pays' if pays else 'does not pay'} here.",
        f"{steps} sequential steps of {_count(batch, 'sample')} take {one_by_one:.3g} s;"
        f" a window of {_count(best.window, 'step')}{cut}: {best.seconds:.3g} s,"
        f" {one_by_one / best.seconds:.2f} times as fast,"
        f" with {best.iterations} iterations and {best.evaluations:.0f} evaluations per sample (as {counts}).",
    ]
    if not pays and best.seconds < one_by_one:
        parts.append(f"Less than {LEAST_GAIN} times is not counted as a gain.")
    if most > fewest:
        slowest = latencies.seconds[most]
        ratio = slowest / latencies.seconds[fewest]
        parts.append(f"A call with {_count(most, 'row')} takes {slowest:.3g} s, {ratio:.2g} times that with {fewest}.")
    if latencies.out_of_memory is not None:
        parts.append(f"With {_count(latencies.out_of_memory, 'row')} the memory was not enough.")
    parts.append("The solver's own work is not counted." if pays else "Use deqkern.solvers.sequential().")
    return " ".join(parts)


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"
