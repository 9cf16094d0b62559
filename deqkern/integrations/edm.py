"""The calling convention of EDM (arXiv 2206.00364): `net(x, sigma, class_labels)` gives the denoised sample."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..solvers.presets import Solver
from ..support.checks import check_count, check_number
from .chain import Chain
from .k_diffusion import sigma_table

__all__ = ["edm_sampler"]


def edm_sampler(
    net: Callable[..., Tensor],
    latents: Tensor,  # (B, *shape)
    class_labels: Tensor | None = None,  # (B, L)
    *,
    num_steps: int = 18,
    sigma_min: float = 0.002,
    sigma_max: float = 80.0,
    rho: float = 7.0,
    solver: Solver | None = None,
    rtol: float = 1e-2,
    max_iterations: int | None = None,
    max_batch: int | None = None,
) -> Tensor:
    """The deterministic Euler chain on EDM's noise levels (arXiv 2206.00364, eq. 5 and a final 0), all steps at once.

    That is EDM's algorithm 1 without its second-order correction, and with S_churn = 0: not its default sampler, whose
    two evaluations per step are not linear in the network's output.

    Args:
        net: Called with x (N, *shape) in the dtype of `latents`, sigma (N,) and class_labels (N, L) or None. Its
            `sigma_min` and `sigma_max` bound the levels and its `round_sigma` rounds them, where it has them.
        latents: (B, *shape), standard normal; fp64 keeps the states in fp64, as EDM does.
        class_labels: (B, L).
        num_steps: S.
        sigma_min: The last noise level before 0.
        sigma_max: The first noise level.
        rho: How the levels are spaced: evenly in sigma^(1 / rho).
        solver: As in `deqkern.sample`.
        rtol: As in `deqkern.sample`.
        max_iterations: As in `deqkern.sample`.
        max_batch: As in `deqkern.sample`.

    Returns:
        x[S] (B, *shape) in the dtype of `latents`.

    Raises:
        ValueError: For an argument that does not fit.
        TypeError: For one of another type.

    Warns:
        ConvergenceWarning: Once, if a sample did not converge.

    Example:
        >>> import torch
        >>> from deqkern.integrations.edm import edm_sampler
        >>> def net(x, sigma, class_labels):  # the denoiser of standard normal data
        ...     return x / (1 + sigma.view(-1, 1, 1, 1) ** 2)
        >>> edm_sampler(net, torch.randn(2, 3, 8, 8)).shape
        torch.Size([2, 3, 8, 8])
    """
    check_count("num_steps", num_steps)
    for name, value in {"sigma_min": sigma_min, "sigma_max": sigma_max, "rho": rho}.items():
        check_number(name, value)
    low, high = float(max(sigma_min, getattr(net, "sigma_min", 0.0))), float(sigma_max)
    high, rho = min(high, getattr(net, "sigma_max", high)), float(rho)
    if not 0 < low < high or not rho > 0:
        raise ValueError(f"sigma_min={low} must lie in (0, sigma_max={high}), and rho={rho} must be > 0")
    if not isinstance(latents, Tensor):
        raise TypeError(f"latents must be a tensor, got {type(latents).__name__}")
    part = torch.arange(num_steps, dtype=torch.float64, device=latents.device) / max(num_steps - 1, 1)
    sigmas = (high ** (1 / rho) + part * (low ** (1 / rho) - high ** (1 / rho))) ** rho
    if hasattr(net, "round_sigma"):
        sigmas = net.round_sigma(sigmas)
    sigmas = torch.cat([sigmas.double(), sigmas.new_zeros(1, dtype=torch.float64)])

    def call(states: Tensor, sigma: Tensor, class_labels: Tensor | None) -> Tensor:
        return net(states, sigma.to(states.dtype), class_labels)

    table = sigma_table("sigma_min .. sigma_max, rounded by net,", sigmas)
    chain = Chain(
        call,
        table,
        net,
        name="latents",
        first=latents * sigmas[0],
        model_kwargs={"class_labels": class_labels},
        solver=solver,
        rtol=rtol,
        max_iterations=max_iterations,
        max_batch=max_batch,
    )
    return chain.solve().value
