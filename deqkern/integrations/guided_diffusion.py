"""The DDIM loops of guided-diffusion and the many codes that keep its `GaussianDiffusion` and `SpacedDiffusion`.

They derive eps from the x0 that was clipped, so the chain here is written for x0, and what happens to x0 belongs to the
model: everything that works row by row is exact.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..chain.step_table import StepTable
from ..solvers.presets import Solver
from ..support.checks import check_callable, is_int
from .chain import Chain
from .ddim import ddim_table

__all__ = ["ddim_reverse_sample_loop", "ddim_sample_loop", "ddim_sample_loop_progressive"]


def ddim_sample_loop(
    diffusion: Any,
    model: Callable[..., Tensor],
    shape: Sequence[int],
    noise: Tensor | None = None,  # (B, *shape)
    clip_denoised: bool = True,
    denoised_fn: Callable[[Tensor], Tensor] | None = None,
    cond_fn: Callable[..., Tensor] | None = None,
    model_kwargs: Mapping[str, Any] | None = None,
    device: torch.device | str | None = None,
    progress: bool = False,
    eta: float = 0.0,
    *,
    solver: Solver | None = None,
    rtol: float = 1e-2,
    max_iterations: int | None = None,
    max_batch: int | None = None,
) -> Tensor:
    """`diffusion.ddim_sample_loop(model, shape, ...)`, all steps at once.

    Args:
        diffusion: An object with `alphas_cumprod` (S,) and `model_mean_type` EPSILON or START_X; also with
            `timestep_map` (spaced) and `rescale_timesteps`.
        model: `model(x, t, **model_kwargs)` with N rows, N up to S * B, gives C channels, or 2 C with a learned
            variance.
        shape: Of the noise, (B, *shape).
        noise: (B, *shape); drawn from torch's global generator unless given.
        clip_denoised: Whether x0 is clipped to -1 .. 1.
        denoised_fn: Called with N rows of x0; a row may depend on that row alone.
        cond_fn: Called with N rows of x, t and model_kwargs; a row may depend on that row alone.
        model_kwargs: Tensors in it whose first dimension is B are repeated for every step.
        device: Where noise is drawn, by default the model's.
        progress: Whether to show a bar of tqdm, if that is installed.
        eta: The noise of each step is drawn as the sequential loop draws it.
        solver: As in `deqkern.sample`.
        rtol: As in `deqkern.sample`.
        max_iterations: As in `deqkern.sample`.
        max_batch: As in `deqkern.sample`.

    Returns:
        The clean samples (B, *shape).

    Raises:
        ValueError: For an argument that does not fit.
        TypeError: For one of another type.

    Warns:
        ConvergenceWarning: Once, if a sample did not converge.

    Example:
        >>> import torch
        >>> from types import SimpleNamespace
        >>> from deqkern.integrations.guided_diffusion import ddim_sample_loop
        >>> diffusion = SimpleNamespace(alphas_cumprod=torch.linspace(0.99, 0.01, 20))  # or a GaussianDiffusion
        >>> ddim_sample_loop(diffusion, lambda x, t: 0.1 * x, (2, 3, 8, 8)).shape
        torch.Size([2, 3, 8, 8])
    """
    denoiser = _Denoiser(diffusion, model, clip_denoised, denoised_fn=denoised_fn, cond_fn=cond_fn)
    chain = Chain(
        denoiser,
        denoiser.table(eta),
        model,
        name="noise",
        first=_noise(model, shape, noise, device=device),
        model_kwargs=model_kwargs,
        solver=solver,
        rtol=rtol,
        max_iterations=max_iterations,
        max_batch=max_batch,
    )
    return chain.solve(not progress).value


def ddim_sample_loop_progressive(
    diffusion: Any,
    model: Callable[..., Tensor],
    shape: Sequence[int],
    noise: Tensor | None = None,  # (B, *shape)
    clip_denoised: bool = True,
    denoised_fn: Callable[[Tensor], Tensor] | None = None,
    cond_fn: Callable[..., Tensor] | None = None,
    model_kwargs: Mapping[str, Any] | None = None,
    device: torch.device | str | None = None,
    progress: bool = False,
    eta: float = 0.0,
    *,
    solver: Solver | None = None,
    rtol: float = 1e-2,
    max_iterations: int | None = None,
    max_batch: int | None = None,
) -> Iterator[dict[str, Tensor]]:
    """`ddim_sample_loop`, iteration by iteration.

    Arguments are those of `ddim_sample_loop`, and are checked at the call, not at the first iteration.

    Yields:
        Dicts with `sample` (B, *shape), the clean samples as they are then, and `pred_xstart`, the estimate of x0 at
        the last step, which the chain ends at: the same numbers.

    Example:
        >>> import torch
        >>> from types import SimpleNamespace
        >>> from deqkern.integrations.guided_diffusion import ddim_sample_loop_progressive
        >>> diffusion = SimpleNamespace(alphas_cumprod=torch.linspace(0.99, 0.01, 20))
        >>> for now in ddim_sample_loop_progressive(diffusion, lambda x, t: 0.1 * x, (2, 3, 8, 8)):
        ...     preview = now["sample"]
    """
    denoiser = _Denoiser(diffusion, model, clip_denoised, denoised_fn=denoised_fn, cond_fn=cond_fn)
    chain = Chain(
        denoiser,
        denoiser.table(eta),
        model,
        name="noise",
        first=_noise(model, shape, noise, device=device),
        model_kwargs=model_kwargs,
        solver=solver,
        rtol=rtol,
        max_iterations=max_iterations,
        max_batch=max_batch,
    )
    return _iterations(chain, progress)


def _iterations(chain: Chain, progress: bool) -> Iterator[dict[str, Tensor]]:
    for _ in chain.run(not progress):
        value = chain.state(chain.problem.table.num_inference_steps)
        yield {"sample": value, "pred_xstart": value.clone()}
    chain.solution()


def ddim_reverse_sample_loop(
    diffusion: Any,
    model: Callable[..., Tensor],
    x: Tensor,  # (B, *shape)
    clip_denoised: bool = True,
    denoised_fn: Callable[[Tensor], Tensor] | None = None,
    model_kwargs: Mapping[str, Any] | None = None,
    eta: float = 0.0,
    *,
    solver: Solver | None = None,
    rtol: float = 1e-2,
    max_iterations: int | None = None,
    max_batch: int | None = None,
) -> Tensor:
    """`diffusion.ddim_reverse_sample` for t = 0 .. S-1, all steps at once.

    Each step takes the model at its clean end, the noisier state does not enter: naive inversion, wrong by percents
    (arXiv 2010.02502, section 4.3). `deqkern.invert` finds the noise that gives x back. The last step leads to
    abar = 0. Other arguments are those of `ddim_sample_loop`.

    Returns:
        The noise (B, *shape) of the samples x (B, *shape).

    Raises:
        ValueError: For an argument that does not fit; eta must be 0.
        TypeError: For one of another type.

    Example:
        >>> import torch
        >>> from types import SimpleNamespace
        >>> from deqkern.integrations.guided_diffusion import ddim_reverse_sample_loop
        >>> diffusion = SimpleNamespace(alphas_cumprod=torch.linspace(0.99, 0.01, 20))
        >>> ddim_reverse_sample_loop(diffusion, lambda x, t: 0.1 * x, torch.rand(2, 3, 8, 8)).shape
        torch.Size([2, 3, 8, 8])
    """
    if eta != 0:
        raise ValueError(f"eta must be 0, got {eta}: steps that draw noise have no reverse")
    denoiser = _Denoiser(diffusion, model, clip_denoised, denoised_fn=denoised_fn, cond_fn=None)
    abar = denoiser.abar
    after = torch.cat([abar[1:], abar.new_zeros(1)])
    table = StepTable.build(
        "sample",
        torch.arange(len(abar), device="cpu"),
        alpha=abar.sqrt(),
        sigma=(1 - abar).sqrt(),
        alpha_next=after.sqrt(),
        sigma_next=(1 - after).sqrt(),
        n=torch.zeros_like(abar),
    )
    chain = Chain(
        denoiser,
        table,
        model,
        name="x",
        first=x,
        model_kwargs=model_kwargs,
        solver=solver,
        rtol=rtol,
        max_iterations=max_iterations,
        max_batch=max_batch,
    )
    return chain.solve().value


def _noise(
    model: Callable[..., Tensor], shape: Sequence[int], noise: Tensor | None, device: torch.device | str | None
) -> Tensor:
    """The noise given, or drawn."""
    if not isinstance(shape, Sequence) or not all(map(is_int, shape)):
        raise TypeError(f"shape must be a sequence of ints, got {shape!r}")
    if noise is None:
        if device is None and isinstance(model, torch.nn.Module):
            device = next((parameter.device for parameter in model.parameters()), None)
        return torch.randn(*shape, device=device)
    if isinstance(noise, Tensor) and tuple(noise.shape) != tuple(shape):
        raise ValueError(f"noise must have the shape given, {tuple(shape)}, got {tuple(noise.shape)}")
    return noise


class _Denoiser:
    """The x0 that a step of the diffusion takes, of x (N, *shape) at its timesteps (N,) of 0 .. S-1."""

    def __init__(
        self,
        diffusion: Any,
        model: Callable[..., Tensor],
        clip_denoised: bool,
        denoised_fn: Callable[[Tensor], Tensor] | None,
        cond_fn: Callable[..., Tensor] | None,
    ) -> None:
        self.model, self.clip, self.denoised_fn, self.cond_fn = model, clip_denoised, denoised_fn, cond_fn
        if getattr(diffusion, "alphas_cumprod", None) is None:
            raise TypeError(f"diffusion must have alphas_cumprod, got {type(diffusion).__name__}")
        abar = torch.as_tensor(diffusion.alphas_cumprod, device="cpu").detach().double()
        if abar.ndim != 1 or not len(abar) or not bool(((abar > 0) & (abar < 1)).all() & (abar[1:] < abar[:-1]).all()):
            raise ValueError("diffusion.alphas_cumprod must have shape (S,) and descend within (0, 1)")
        kind = getattr(diffusion, "model_mean_type", "EPSILON")
        kind = getattr(kind, "name", kind)
        if kind not in ("EPSILON", "START_X"):
            raise ValueError(f"diffusion.model_mean_type must be EPSILON or START_X, got {kind}")
        for name, function in (("denoised_fn", denoised_fn), ("cond_fn", cond_fn)):
            if function is not None:
                check_callable(name, function)
        steps = getattr(diffusion, "timestep_map", None)
        total = len(abar) if steps is None else getattr(diffusion, "original_num_steps", 1000)
        timesteps = torch.arange(len(abar), device="cpu") if steps is None else torch.tensor(list(steps), device="cpu")
        if len(timesteps) != len(abar):
            raise ValueError(f"diffusion.timestep_map has {len(timesteps)} entries, alphas_cumprod {len(abar)}")
        if getattr(diffusion, "rescale_timesteps", False):
            timesteps = timesteps.float() * (1000.0 / total)
        self.abar, self.timesteps, self.predicts_x0 = abar, timesteps, kind == "START_X"
        self.levels = torch.stack([1 / abar.sqrt(), (1 / abar - 1).sqrt(), (1 - abar) / abar.sqrt()])

    def table(self, eta: float) -> StepTable:
        """The chain of its sampling loop."""
        return ddim_table("sample", torch.arange(len(self.abar), device="cpu"), self.abar, eta=eta)

    def __call__(self, x: Tensor, index: Tensor, **model_kwargs: Any) -> Tensor:
        t = self.timesteps.to(x.device)[index]
        rows = self.levels.to(x.device, torch.promote_types(x.dtype, torch.float32))[:, index]
        of_x, of_eps, of_gradient = rows.view(3, -1, *[1] * (x.ndim - 1))
        output = self.model(x, t, **model_kwargs)
        if not isinstance(output, Tensor):
            raise TypeError(f"model must return a tensor, got {type(output).__name__}")
        if output.shape == (len(x), 2 * x.shape[1], *x.shape[2:]):
            output = output[:, : x.shape[1]]  # the rest is the learned variance, which DDIM does not use
        if output.shape != x.shape:
            raise ValueError(f"model returned shape {tuple(output.shape)} for an input of shape {tuple(x.shape)}")
        x0 = output if self.predicts_x0 else of_x * x - of_eps * output
        if self.denoised_fn is not None:
            x0 = self.denoised_fn(x0)
        if self.clip:
            x0 = x0.clamp(-1, 1)
        if self.cond_fn is not None:  # eps - sigma gradient of log p(y | x): arXiv 2105.05233, algorithm 2
            x0 = x0 + of_gradient * self.cond_fn(x, t, **model_kwargs)
        return x0
