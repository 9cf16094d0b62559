"""Whole solves of trained models on a GPU, batch 1, against the sequential loop: eager, as one graph, and compiled.

The loop is the fastest that we know to write: a and b are numbers, a step is the model and one or two small kernels,
and as a graph all of its steps are one launch. Errors are relative to its result in the same dtype.
"""

from __future__ import annotations

import copy
import functools
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import policies
import torch
from gpu_clock import Call, Clock, Row, graphed
from torch import Tensor

import deqkern
from deqkern import NoiseSchedule, models
from deqkern.chain.step_table import StepTable
from deqkern.engine.capture import CapturedIterations
from deqkern.engine.solution import relative_error


@dataclass
class Captures:
    """What capturing graphs took, over all solves since."""

    seconds: float = 0.0
    count: int = 0
    solves: int = 0


@contextmanager
def captures(clock: Clock) -> Iterator[Captures]:
    """Counts the captures of every solve in this context. A solve is one that makes a `CapturedIterations`."""
    found, start, capture = Captures(), CapturedIterations.__init__, CapturedIterations._capture

    def counted_start(self: Any, *arguments: Any) -> None:
        found.solves += 1
        start(self, *arguments)

    def timed_capture(self: Any, *arguments: Any) -> Any:
        clock.wait()
        begin = time.perf_counter()
        graph = capture(self, *arguments)
        found.seconds += time.perf_counter() - begin
        found.count += 1
        return graph

    CapturedIterations.__init__, CapturedIterations._capture = counted_start, timed_capture  # type: ignore[method-assign]
    try:
        yield found
    finally:
        CapturedIterations.__init__, CapturedIterations._capture = start, capture  # type: ignore[method-assign]


def chain(model: Callable[..., Any], table: StepTable, x: Tensor, z: Tensor | None, dtype: torch.dtype) -> Tensor:
    """The sequential loop from x (B, *shape), with step noise z (S, B, *shape) or none; the model in its own dtype."""
    a, b, n = table.a.tolist(), table.b.tolist(), table.n.tolist()
    timesteps = _kept(table, x.device, len(x))
    for i in range(len(a)):
        output = model(x.to(dtype), timesteps[i])
        output = getattr(output, "sample", output).to(x.dtype)
        if table.converts:
            output = table.effective_output(x, output, _kept_steps(table, x.device, len(x))[i])
        x = torch.add(x * a[i], output, alpha=b[i])
        if z is not None:
            x = torch.add(x, z[i], alpha=n[i])
    return x


@functools.lru_cache(maxsize=64)
def _kept(table: StepTable, device: torch.device, batch: int) -> list[Tensor]:
    """The timesteps of each call; made once, so that a loop copies nothing to the device."""
    return [t.expand(batch).contiguous() for t in table.timesteps.to(device)]


@functools.lru_cache(maxsize=64)
def _kept_steps(table: StepTable, device: torch.device, batch: int) -> list[Tensor]:
    return [torch.full((batch,), i, device=device) for i in range(len(table.a))]


@dataclass
class Problem:
    """One model and chain; `sequential` holds the seconds of each way to run the loop that was measured."""

    name: str
    model: torch.nn.Module
    schedule: NoiseSchedule
    shape: tuple[int, ...]
    steps: int
    eta: float
    dtype: torch.dtype
    device: torch.device
    sequential: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        generator = torch.Generator().manual_seed(0)
        self.noise = torch.randn(1, *self.shape, generator=generator).to(self.device)
        self.table = self.schedule.steps(self.steps, eta=self.eta)
        self.z = None
        if self.eta:
            self.z = torch.randn(self.steps, 1, *self.shape, generator=generator).to(self.device)
        self.label: Row = {"model": self.name, "dtype": str(self.dtype).removeprefix("torch.")}
        self.label |= {"steps": self.steps, "eta": self.eta}
        self.exact = self.loop(self.model)()

    def loop(self, model: Callable[..., Any]) -> Callable[[], Tensor]:
        """The sequential chain with `model`."""
        return functools.partial(chain, model, self.table, self.noise, self.z, self.dtype)

    def loop_row(self, clock: Clock, way: str, call: Call) -> Row:
        """Time one way to run the loop."""
        self.sequential[way] = clock.solve(call)
        return self.label | {"way": f"sequential, {way}", "ms": 1e3 * self.sequential[way], "iterations": self.steps}

    def solve_row(self, clock: Clock, way: str, model: Callable[..., Any], graph: bool) -> Row:
        """Time the joint solve as it ships, and compare it with every loop that was timed."""
        options: Row = {"eta": self.eta, "step_noise": self.z, "cuda_graph": graph}
        call = functools.partial(deqkern.sample, model, self.noise, self.schedule, self.steps, **options)
        found = call()
        with captures(clock) as capturing:
            spent = clock.solve(call)
        row = self.label | {"way": f"parallel, {way}", "ms": 1e3 * spent, "iterations": found.iterations}
        row |= {"nfe": int(found.nfe[0]), "error": float(relative_error(found.value, self.exact))}
        if graph and capturing.solves:  # each solve captures its own
            row |= {"captures": capturing.count / capturing.solves}
            row |= {"captures_ms": 1e3 * capturing.seconds / capturing.solves}
            row |= {"ms without captures": row["ms"] - row["captures_ms"]}
        return row | {f"speed-up over {name}": seconds / spent for name, seconds in self.sequential.items()}

    def rows(self, clock: Clock) -> Iterator[Row]:
        """The loop and the solve, eager and as graphs."""
        yield self.loop_row(clock, "eager", self.loop(self.model))
        if self.device.type == "cuda":
            yield self.loop_row(clock, "graph", graphed([self.loop(self.model)], self.device))
        yield self.solve_row(clock, "eager", self.model, False)
        if self.device.type == "cuda":
            yield self.solve_row(clock, "graph", self.model, True)

    def compiled_rows(self, clock: Clock) -> Iterator[Row]:
        """The same with a compiled model: for one row in the loop, for any number of rows in the solve."""
        one = torch.compile(self.model, dynamic=False)
        loop = self.loop(one)
        yield self.loop_row(clock, "compiled", loop)
        if self.device.type == "cuda":
            yield self.loop_row(clock, "compiled graph", graphed([loop], self.device))
        whole = torch.compile(copy.copy(self.model))

        def any_rows(x: Tensor, t: Tensor) -> Any:
            for value in (x, t):
                torch._dynamo.maybe_mark_dynamic(value, 0)
            return whole(x, t)

        model: Any = any_rows if self.dtype is torch.float32 else _InDtype(any_rows, self.dtype)
        yield self.solve_row(clock, "compiled", model, False)
        if self.device.type == "cuda":
            yield self.solve_row(clock, "compiled graph", model, True)


class _InDtype(torch.nn.Module):
    """A function that is called in `dtype`, which `sample` reads off a module."""

    def __init__(self, function: Callable[..., Any], dtype: torch.dtype) -> None:
        super().__init__()
        self.function, self.dtype = function, dtype

    def forward(self, x: Tensor, t: Tensor) -> Any:
        return self.function(x, t)


def shipped(name: str, steps: int, dtypes: tuple[torch.dtype, ...], device: torch.device) -> Iterator[Problem]:
    """The chain of a shipped model. Raises ImportError without diffusers."""
    loaded = models.load(name)
    for dtype in dtypes:
        model = copy.deepcopy(loaded.model).to(device, dtype)
        yield Problem(name, model, loaded.schedule, loaded.shape, steps, 0.0, dtype, device)


def policy(
    network: torch.nn.Module,
    chains: tuple[tuple[int, float], ...],
    dtypes: tuple[torch.dtype, ...],
    device: torch.device,
    seconds: float,
) -> Iterator[Problem]:
    """Chains (S, eta) of a policy that is trained for so long first."""
    trained = policies.trained(network, device, seconds)
    millions = sum(value.numel() for value in trained.parameters()) / 1e6
    name = f"{type(network).__name__} {millions:.0f}M"
    for dtype in dtypes:
        model = copy.deepcopy(trained).to(dtype)
        for steps, eta in chains:
            yield Problem(name, model, policies.SCHEDULE, policies.PolicyMLP.shape, steps, eta, dtype, device)


def measure(problems: Iterator[Problem], clock: Clock, kept: list[Problem]) -> Iterator[Row]:
    """All of them; those that were measured are `kept` to be compiled later."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", deqkern.ConvergenceWarning)
        for problem in problems:
            kept.append(problem)
            yield from problem.rows(clock)


def measure_compiled(problems: list[Problem], clock: Clock) -> Iterator[Row]:
    """The same problems with compiled models."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", deqkern.ConvergenceWarning)
        for problem in problems:
            yield from problem.compiled_rows(clock)
