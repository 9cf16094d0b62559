"""`slerp`: interpolation of Gaussian noise."""

from __future__ import annotations

import torch
from torch import Tensor


def slerp(first: Tensor, second: Tensor, t: Tensor) -> Tensor:
    """Interpolate spherically between two batches of Gaussian noise, each sample by its own angle.

        (sin((1 - t) theta) first + sin(t theta) second) / sin(theta),  cos theta = <first, second> / (|first| |second|)

    What lies between keeps the norm of Gaussian noise, where a straight line would shrink it.

    Args:
        first: (B, *shape) of any float dtype, the noise at t = 0.
        second: (B, *shape), the noise at t = 1.
        t: (F,), the places between them.

    Returns:
        (F, B, *shape) in the dtype of `first`. Samples that are (anti)parallel, with no arc between them, are
        interpolated linearly.

    Raises:
        ValueError: The shapes of `first` and `second` differ, or `t` is no tensor (F,).

    Example:
        >>> first, second = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 1.0]])
        >>> deqkern.interpolation.slerp(first, second, torch.tensor([0.0, 0.5, 1.0])).norm(dim=-1).flatten()
        tensor([1.0000, 1.0000, 1.0000])

    Reference:
        Shoemake: Animating rotation with quaternion curves, SIGGRAPH 1985. For the noise of DDIM: arXiv 2010.02502,
        appendix D.5.

    """
    if first.shape != second.shape:
        raise ValueError(f"second must have the shape of first, {tuple(first.shape)}, got {tuple(second.shape)}")
    if not isinstance(t, Tensor) or t.ndim != 1:
        raise ValueError(f"t must be a tensor (F,), got {tuple(t.shape) if isinstance(t, Tensor) else t!r}")
    a, b = first.double().flatten(1), second.double().flatten(1)
    cosine = (a * b).sum(1) / (a.norm(dim=1) * b.norm(dim=1))  # (B,)
    theta, t = torch.arccos(cosine), t.to(a)[:, None]  # (B,), (F, 1)
    arc = theta.sin() > 1e-6  # not so for NaN: a sample is zero, or rounding leaves a cosine beyond 1
    of_first = torch.where(arc, ((1 - t) * theta).sin() / theta.sin(), 1 - t)  # (F, B)
    of_second = torch.where(arc, (t * theta).sin() / theta.sin(), t)
    between = of_first[..., None] * a + of_second[..., None] * b
    return between.view(len(t), *first.shape).to(first.dtype)
