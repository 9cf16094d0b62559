"""What the surfaces share: a chain that is given by its table, solved iteration by iteration."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from ..chain.step_table import StepTable
from ..engine.loop import Solve
from ..engine.solution import Solution
from ..engine.trajectory import start
from ..network.model import Model, Network, arguments_of
from ..problem import check_chain
from ..solvers.presets import Solver, default


class Chain:
    """The chain `table` from `first` (B, *shape), which the user knows as the argument `name`.

    call: `model` as the engine sees it, (states (N, *shape), table.timesteps (N,), **arguments) -> what the table's
    prediction type says. It gets `model_kwargs` with one row per state and, as a plain function, the states in the
    dtype of `first`. Raises ValueError or TypeError for an
    argument that does not fit, before the model is called.
    """

    def __init__(
        self,
        call: Callable[..., Tensor],
        table: StepTable,
        model: Model,
        name: str,
        first: Tensor,
        model_kwargs: Mapping[str, Any] | None,
        solver: Solver | None,
        rtol: float,
        max_iterations: int | None,
        max_batch: int | None,
        callback: Callable[..., Any] | None = None,
    ) -> None:
        self.solver = default() if solver is None else solver
        check_chain(model, name, first, self.solver, rtol, max_iterations, model_kwargs, max_batch, callback)
        self.table, self.first, self.max_batch = table, first, max_batch
        self.network = Network(call, table, arguments_of(model, model_kwargs), self.first)
        self.options: dict[str, Any] = {"rtol": rtol, "max_iterations": max_iterations}

    @torch.no_grad()
    def run(self, disable: bool | None = True) -> Iterator[Solve]:
        """The solve after each iteration, with a bar of tqdm unless `disable` (None: only on a terminal).

        The bar counts the steps that are settled in every sample. Noise is drawn from torch's global generator, in the
        order of the sequential chain.
        """
        trajectory = start(self.network, self.first, self.table, self.solver, max_batch=self.max_batch)
        self.solving = Solve(trajectory, self.solver, **self.options)
        with _Bar(trajectory.steps, disable) as bar:
            while self.solving.open:
                self.solving.iterate()
                bar.reach(int(self.solving.window[:, 0].min()))
                yield self.solving

    def solve(self, disable: bool | None = True) -> Solution:
        """All iterations, and the solution."""
        for _ in self.run(disable):
            pass
        return self.solution()

    def solution(self) -> Solution:
        """What the iterations of `run` came to."""
        return self.solving.solution(self.first.dtype)

    def state(self, step: int) -> Tensor:
        """State `step` of 0 .. S as it is now (B, *shape)."""
        trajectory = self.solving.trajectory
        rows = step * trajectory.batch + torch.arange(trajectory.batch, device=trajectory.x.device)
        return trajectory.images(rows).to(self.first.dtype, copy=True)


class _Bar:
    def __init__(self, total: int, disable: bool | None) -> None:
        self.bar: Any = None
        if not disable:
            with contextlib.suppress(ImportError):
                from tqdm.auto import tqdm

                self.bar = tqdm(total=total, disable=disable)

    def reach(self, count: int) -> None:
        if self.bar is not None:
            self.bar.update(count - self.bar.n)

    def __enter__(self) -> _Bar:
        return self

    def __exit__(self, *error: object) -> None:
        if self.bar is not None:
            self.bar.close()
