"""k-diffusion's sampler convention, which ComfyUI and others share."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from ..chain.step_table import StepTable, check_order
from ..solvers.presets import Solver
from .chain import Chain

__all__ = ["sample_deq"]


def sample_deq(
    model: Callable[..., Tensor],
    x: Tensor,  # (B, *shape)
    sigmas: Tensor,  # (S+1,)
    extra_args: Mapping[str, Any] | None = None,
    callback: Callable[[dict[str, Any]], Any] | None = None,
    disable: bool | None = None,
    *,
    order: int = 1,
    solver: Solver | None = None,
    rtol: float = 1e-2,
    max_iterations: int | None = None,
    max_batch: int | None = None,
) -> Tensor:
    """k-diffusion's `sample_euler` without churn, all steps at once: x[i+1] = x[i] + d (sigmas[i+1] - sigmas[i]),

    d = (x[i] - denoised) / sigmas[i]: the DDIM chain of a variance-exploding process. With order = 2 it is
    `sample_dpmpp_2m`.

    Args:
        model: `model(x, sigma, **extra_args) -> denoised`, x (N, *shape) and sigma (N,) in the dtype of x, N up to
            S * B. A row's output may depend on that row alone: conditions that `sigma[0]` switches, or that are held
            elsewhere with one row per sample, do not fit.
        x: (B, *shape) fp32, bf16, fp16 or fp64, noise of standard deviation sigmas[0].
        sigmas: (S+1,), not increasing, > 0 but for the last.
        extra_args: Tensors in it whose first dimension is B are repeated for every step.
        callback: Called after each iteration with a dict of the last step as it is then: `x` (B, *shape) at noise level
            `sigma` = `sigma_hat` = sigmas[S-1], and `denoised` (B, *shape), what the last step took for it: the result
            if sigmas[S] = 0. `i` counts iterations from 0 and stays below S.
        disable: True shows no progress bar, None only on a terminal. The bar is tqdm's, if that is installed.
        order: 1 or 2, DPM-Solver++ 2M, for which the sigmas must fall from step to step.
        solver: As in `deqkern.sample`.
        rtol: As in `deqkern.sample`.
        max_iterations: As in `deqkern.sample`.
        max_batch: As in `deqkern.sample`.

    Returns:
        x[S] (B, *shape) in the dtype of x.

    Raises:
        ValueError: For an argument that does not fit.
        TypeError: For one of another type.

    Warns:
        ConvergenceWarning: Once, if a sample did not converge.

    Example:
        >>> import torch
        >>> from deqkern.integrations.k_diffusion import sample_deq
        >>> def model(x, sigma):  # the denoiser of standard normal data
        ...     return x / (1 + sigma.view(-1, 1, 1, 1) ** 2)
        >>> sigmas = torch.tensor([10.0, 5.0, 2.0, 1.0, 0.0])
        >>> sample_deq(model, 10 * torch.randn(2, 3, 8, 8), sigmas, disable=True).shape
        torch.Size([2, 3, 8, 8])

    Reference:
        arXiv 2206.00364, section 4; arXiv 2211.01095, algorithm 2.
    """
    if extra_args is not None and not isinstance(extra_args, Mapping):
        raise TypeError(f"extra_args must be a mapping, got {type(extra_args).__name__}")
    table = sigma_table("sigmas", sigmas, order)

    def call(states: Tensor, sigma: Tensor, **arguments: Any) -> Tensor:
        return model(states, sigma.to(states.dtype), **arguments)

    chain = Chain(
        call,
        table,
        model,
        name="x",
        first=x,
        model_kwargs=extra_args,
        solver=solver,
        rtol=rtol,
        max_iterations=max_iterations,
        max_batch=max_batch,
        callback=callback,
    )
    last = table.num_inference_steps - 1
    a, b = float(table.a[last]), float(table.b[last] + table.c[last])
    for count in chain.run(disable):
        if callback is not None:
            before, after = chain.state(last), chain.state(last + 1)
            denoised = (after - a * before) / b if b else after
            levels = {"sigma": sigmas[last], "sigma_hat": sigmas[last]}
            callback({"x": before, "i": count - 1, **levels, "denoised": denoised})
    return chain.solution().value


def sigma_table(name: str, sigmas: Tensor, order: int = 1) -> StepTable:
    """The chain of Euler or 2M steps through these noise levels (S+1,), with alpha = 1 and a model that gives x0."""
    check_order(order)
    if not isinstance(sigmas, Tensor) or not sigmas.is_floating_point():
        raise TypeError(f"{name} must be a floating-point tensor, got {type(sigmas).__name__}")
    levels = sigmas.detach().to("cpu", torch.float64)
    if levels.ndim != 1 or len(levels) < 2:
        raise ValueError(f"{name} must have shape (S+1,) with S >= 1, got {tuple(levels.shape)}")
    falling = levels[1:] < levels[:-1] if order == 2 else levels[1:] <= levels[:-1]
    in_order = bool(falling.all() and (levels[:-1] > 0).all() and levels[-1] >= 0)
    if not in_order or not bool(levels.isfinite().all()):
        how = "fall" if order == 2 else "not increase"
        raise ValueError(f"{name} must be finite and {how}, > 0 but for the last, which may be 0")
    sigma, one = levels[:-1], torch.ones_like(levels[:-1])
    return StepTable.build(
        "sample",
        sigma,
        alpha=one,
        sigma=sigma,
        alpha_next=one,
        sigma_next=levels[1:],
        n=torch.zeros_like(sigma),
        order=order,
    )
