"""Anderson mixing of the corrections across iterations (docs/method.md, type II)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..solvers.presets import Solver
from .trajectory import Trajectory


class Mixing:
    """The last corrections of a solve, and their combination; with a history of m = 0 they are applied as they are.

    A scan writes its correction and the state that it leads to into the slots of its iteration. Without history the
    second slot is the states themselves.
    """

    def __init__(self, trajectory: Trajectory, solver: Solver) -> None:
        x, steps, batch, elements = trajectory.x, trajectory.steps, trajectory.batch, trajectory.basis.size
        m = solver.history_size
        self.solver, self.states, self.implicit = solver, x[1:], trajectory.table.implicit
        moves = x.new_zeros((m + 1) * steps + 1, batch, elements)  # the first row stays zero: x[0] never moves
        self.corrections = moves[1:].view(m + 1, steps, batch, elements)
        self.updates = x.new_zeros(m + 1, steps, batch, elements) if m else self.states[None]
        # Without history: the last change of the states that the map is evaluated at (S, B, D).
        self.last_change = self.corrections[0] if self.implicit else moves[:steps]
        self.gram = x.new_zeros(steps, batch, m, m, dtype=torch.float64)
        self.rhs = x.new_zeros(steps, batch, m, dtype=torch.float64)
        self.gamma = x.new_zeros(steps, batch, m)

    def slots(self, k: int) -> tuple[Tensor, Tensor]:
        """Where the scan of iteration k puts the updated states and their correction, both (S, B, D)."""
        head = k % (self.solver.history_size + 1)
        return self.updates[head], self.corrections[head]

    def mix(self, op: Any, k: int, window: Tensor, plain: Tensor | None) -> None:
        """Write the mixed states of iteration k. plain: (B,) bool, the samples that are not mixed; None if all are."""
        m = self.solver.history_size
        if not m:
            return
        head, count = k % (m + 1), min(k, m)
        if count:
            op.anderson_gram(self.corrections, head=head, count=count, window=window, gram=self.gram, rhs=self.rhs)
            op.anderson_solve(
                self.gram,
                self.rhs,
                window=window,
                scope=self.solver.scope,
                ridge=self.solver.ridge,
                ridge_absolute=self.solver.ridge_absolute,
                implicit=self.implicit,
                gamma=self.gamma,
            )
            if plain is not None:
                self.gamma.masked_fill_(plain[:, None], 0.0)
        op.anderson_mix(self.updates, head=head, count=count, gamma=self.gamma, window=window, out=self.states)

    def reset(self, sample: int) -> None:
        """Forget the updates of a sample: what is not finite would get through a weight of zero."""
        if self.solver.history_size:
            self.updates[:, :, sample] = 0.0
