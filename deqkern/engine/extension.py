"""States that a window reaches: guessed from the chain before them, with x0 kept constant."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .trajectory import Trajectory


class Extension:
    """The initial guesses of the states that windows reach.

    Of what the last step before them says: x0 constant along the chain, or the state constant (ParaDiGMS).
    """

    def __init__(self, trajectory: Trajectory, window: Tensor, beta: float) -> None:
        kept, x = trajectory.constant_x0(), trajectory.x
        self.trajectory, self.beta = trajectory, beta
        self.constant_x0 = None if kept is None else kept.to(x.device, x.dtype)  # (4, S)
        self.n = trajectory.table.n.to(x.device, x.dtype)
        self.previous_window = window.clone()  # (B, 2)

    def note(self, window: Tensor) -> None:
        """Keep the window (B, 2) of the present iteration."""
        if self.constant_x0 is not None:
            self.previous_window.copy_(window)

    def extend(self, op: Any, last_change: Tensor, outputs: Tensor, window: Tensor, skip: Tensor) -> None:
        """Guess the states that the steps lead to which the `window` (B, 2) has reached.

        last_change, outputs: (S, B, D). skip: (B,), not 0 for samples that are left as they are.
        """
        if self.constant_x0 is None:
            return
        op.extrapolate_states(
            self.trajectory.x,
            last_change,
            outputs,
            z=self.trajectory.z,
            constant_x0=self.constant_x0,
            n=self.n,
            previous_window=self.previous_window,
            window=window,
            skip=skip,
            beta=self.beta,
            implicit=self.trajectory.table.implicit,
        )

    def fill_unreached(self, op: Any, last_change: Tensor, outputs: Tensor, skip: Tensor) -> None:
        """Guess the states that no window has reached yet; they are guessed anew when one does."""
        rest = torch.full_like(self.previous_window, self.trajectory.steps)
        self.extend(op, last_change, outputs, rest, skip)
