"""What the surfaces share: a chain that is given by its table, solved iteration by iteration."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ..chain.step_table import StepTable
from ..engine.loop import Evaluation, Solve
from ..engine.solution import Solution, warn_unless_converged
from ..network.model import Model, Network, arguments_of
from ..problem import Problem
from ..solvers.presets import Solver, default
from ..support.tensors import split_rows


class Chain:
    """The chain `table` from `first` (B, *shape), which the user knows as the argument `name`.

    call: `model` as the engine sees it, (states (N, *shape), table.timesteps (N,), **arguments) -> what the table's
    prediction type says. It gets `model_kwargs` with one row per state and, as a plain function, the states in the
    dtype of `first`. Raises ValueError or TypeError for an argument that does not fit, before the model is called.
    """

    solving: Solve  # while it is run

    def __init__(
        self,
        call: Callable[..., Tensor],
        table: StepTable,
        model: Model,
        *,
        name: str,
        first: Tensor,
        model_kwargs: Mapping[str, Any] | None,
        solver: Solver | None,
        rtol: float,
        max_iterations: int | None,
        max_batch: int | None,
        callback: Callable[..., Any] | None = None,
    ) -> None:
        problem = Problem.of_chain(
            model,
            first,
            lambda: table,
            name=name,
            solver=default() if solver is None else solver,
            rtol=rtol,
            max_iterations=max_iterations,
            max_batch=max_batch,
            model_kwargs=model_kwargs,
            callback=callback,
        )
        self.network = Network(call, table, arguments_of(model, model_kwargs), first)
        self.problem = replace(problem, network=self.network, dtype=self.network.dtype)

    @torch.no_grad()
    def run(self, disable: bool | None = True) -> Iterator[int]:
        """The number of iterations after each of them, with a bar of tqdm unless `disable` (None: only on a terminal).

        The bar counts the steps that have converged in every sample. Noise is drawn from torch's global generator, in
        the order of the sequential chain.
        """
        self.solving = solve = self.problem.begin()
        with _Bar(self.problem.table.num_inference_steps, disable) as bar:
            while solve.open:
                solve.tell(Evaluation(self.network, solve.ask()))
                bar.reach(int(solve.window[:, 0].min()))
                yield solve.count

    def solve(self, disable: bool | None = True) -> Solution:
        """All iterations, and the solution, with one warning if a sample did not converge."""
        for _ in self.run(disable):
            pass
        return self.solution()

    def solution(self) -> Solution:
        """What the iterations of `run` came to, with one warning if a sample did not converge."""
        solution = self.solving.solution()
        warn_unless_converged(solution)
        return solution

    def state(self, step: int) -> Tensor:
        """State `step` of 0 .. S as it is now (B, *shape)."""
        return self.solving.state(step)

    @torch.no_grad()
    def estimates(self, states: Tensor) -> Tensor:
        """The model's estimates of x0 (S, B, *shape) at the noisy ends of all steps, of `states` (S+1, B, *shape)."""
        rows, batch = states[:-1].flatten(0, 1), states.shape[1]
        found = torch.empty_like(rows)
        for part in split_rows(torch.arange(len(rows), device=states.device), self.problem.max_batch):
            index = part // batch
            output = self.network(rows[part], index, part % batch)
            found[part] = self.problem.table.original_sample(rows[part], output, index).to(found.dtype)
        return found.view_as(states[:-1])


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
