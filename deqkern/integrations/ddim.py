"""The calling convention of the DDIM authors' code (arXiv 2010.02502): betas, timesteps, lists of states."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..chain.step_table import StepTable
from ..solvers.presets import Solver
from ..support.checks import check_number
from .chain import Chain

__all__ = ["generalized_steps"]


def generalized_steps(
    x: Tensor,  # (B, *shape)
    seq: Sequence[int],
    model: Callable[..., Tensor],
    b: Tensor,  # (T,)
    *,
    eta: float = 0.0,
    solver: Solver | None = None,
    rtol: float = 1e-2,
    max_iterations: int | None = None,
    max_batch: int | None = None,
) -> tuple[list[Tensor], list[Tensor]]:
    """The chain through the timesteps `seq` of the betas `b`, all steps at once (arXiv 2010.02502, eq. 12).

    Args:
        x: (B, *shape), the noise.
        seq: Timesteps, ascending.
        model: `model(x, t) -> eps` with x (N, *shape) in the dtype of x and t (N,) fp32, N up to S * B.
        b: (T,), the betas.
        eta: The noise of each step is drawn from torch's global generator, in the order of the sequential chain.
        solver: As in `deqkern.sample`.
        rtol: As in `deqkern.sample`.
        max_iterations: As in `deqkern.sample`.
        max_batch: As in `deqkern.sample`.

    Returns:
        (xs, x0_preds) as the authors' function of this name: the S+1 states, the first of them x itself, and the
        model's S estimates of x0 at them; all but x on the CPU. The estimates cost one more batched call.

    Raises:
        ValueError: For an argument that does not fit.
        TypeError: For one of another type.

    Warns:
        ConvergenceWarning: Once, if a sample did not converge.

    Example:
        >>> import torch
        >>> from deqkern.integrations.ddim import generalized_steps
        >>> betas = torch.linspace(1e-4, 0.02, 1000)
        >>> xs, x0_preds = generalized_steps(torch.randn(2, 3, 8, 8), range(0, 1000, 100), lambda x, t: 0.1 * x, betas)
        >>> len(xs), len(x0_preds)
        (11, 10)
    """
    if not isinstance(b, Tensor) or b.ndim != 1 or not bool(((b > 0) & (b < 1)).all()):
        raise ValueError("b must be a tensor (T,) of betas within (0, 1)")
    if any(int(step) != step for step in seq):
        raise ValueError(f"seq must be timesteps, whole numbers, got {list(seq)}")
    steps = torch.tensor(list(seq), dtype=torch.int64, device="cpu")
    if not len(steps) or not bool((steps[1:] > steps[:-1]).all()) or steps[0] < 0 or steps[-1] >= len(b):
        raise ValueError(f"seq must ascend within 0 .. {len(b) - 1}, got {list(seq)}")
    kept = (1 - b.detach()).cumprod(0).to("cpu", torch.float64)[steps]  # in the precision of b, as the authors'
    table = ddim_table("epsilon", steps.float(), kept, eta=eta)

    def call(states: Tensor, t: Tensor, **arguments: Any) -> Tensor:
        return model(states, t, **arguments)

    chain = Chain(
        call,
        table,
        model,
        name="x",
        first=x,
        model_kwargs=None,
        solver=solver,
        rtol=rtol,
        max_iterations=max_iterations,
        max_batch=max_batch,
    )
    states = chain.solve().trajectory
    return [x, *states[1:].to(x.dtype).cpu()], [*chain.estimates(states).to(x.dtype).cpu()]


def ddim_table(prediction_type: str, timesteps: Tensor, abar: Tensor, eta: float) -> StepTable:
    """DDIM steps through the noise levels `abar` (S,) float64, which descends, to 1; all (S,) given from t = 0 up.

    Raises ValueError or TypeError for an eta that a step has no room for.
    """
    check_number("eta", eta)
    after = torch.cat([abar.new_ones(1), abar[:-1]])
    n = eta * ((1 - after) / (1 - abar) * (1 - abar / after)).sqrt()
    if not 0 <= eta < math.inf or bool((n**2 > 1 - after + 1e-12).any()):
        raise ValueError(f"eta must be >= 0 and leave room for the noise of each step, got {eta}")
    abar, after = abar.flip(0), after.flip(0)
    return StepTable.build(
        prediction_type,
        timesteps.flip(0),
        alpha=abar.sqrt(),
        sigma=(1 - abar).sqrt(),
        alpha_next=after.sqrt(),
        sigma_next=(1 - after).sqrt(),
        n=n.flip(0),
    )
