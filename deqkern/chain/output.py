"""What a model's output says of x0 and eps, and what of it enters a chain that clips x0 or is written for it."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

PREDICTION_TYPES = ("epsilon", "v_prediction", "sample", "flow")

QUANTILE_ELEMENTS = 1 << 23  # of one torch.quantile, which refuses inputs of more than 16 million elements


def output_mix(prediction_type: str, alpha: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
    """(u, w) (S,) of out = u x0 + w eps.

    Raises ValueError for an unknown `prediction_type`.
    """
    zero, one = torch.zeros_like(alpha), torch.ones_like(alpha)
    if prediction_type == "epsilon":
        return zero, one
    if prediction_type == "sample":
        return one, zero
    if prediction_type == "v_prediction":
        return -sigma, alpha
    if prediction_type == "flow":
        return -one, one
    raise ValueError(f"prediction_type must be one of {', '.join(PREDICTION_TYPES)}, got {prediction_type!r}")


class Estimates(NamedTuple):
    """x0 = x0_of_x x + x0_of_out out and eps = eps_of_x x + eps_of_out out, for a state x and an output out; (S,)."""

    x0_of_x: Tensor
    x0_of_out: Tensor
    eps_of_x: Tensor
    eps_of_out: Tensor


def estimates(prediction_type: str, alpha: Tensor, sigma: Tensor) -> Estimates:
    """What an output of this type says at a state alpha x0 + sigma eps."""
    u, w = output_mix(prediction_type, alpha, sigma)
    det = alpha * w - sigma * u
    return Estimates(x0_of_x=w / det, x0_of_out=-sigma / det, eps_of_x=-u / det, eps_of_out=alpha / det)


class Clipping(NamedTuple):
    """How x0 is kept within bounds: -limit .. limit, or dynamic thresholding (arXiv 2205.11487, section 2.3)."""

    limit: float  # of dynamic thresholding the largest
    quantile: float | None = None  # of |x0| of a sample: dynamic thresholding

    def __call__(self, x0: Tensor) -> Tensor:
        """x0 (N, *shape) within the bounds."""
        if self.quantile is None:
            return x0.clamp(-self.limit, self.limit)
        flat = x0.flatten(1)
        parts = torch.split(flat.abs(), max(1, QUANTILE_ELEMENTS // flat.shape[1]))
        bound = torch.cat([torch.quantile(part, self.quantile, dim=1) for part in parts])
        bound = bound.clamp(1, self.limit)[:, None]
        return (flat.clamp(-bound, bound) / bound).view_as(x0)


class ConversionRows(NamedTuple):
    """Coefficients between a state x, the model's own output, x0, eps and v = alpha eps - sigma x0.

    (S,), or (N, 1, ..) for rows. The first four are `Estimates`; the others are zero unless x0 is clipped. v is
    v_of_x0 x0 + v_of_eps eps of an x0 that lies within the bounds, and clipped_of_x0 x0 + clipped_of_eps eps -
    clipped_of_x x of any: with it a x + b v is the step from that x0.
    """

    x0_of_x: Tensor
    x0_of_out: Tensor
    eps_of_x: Tensor
    eps_of_out: Tensor
    v_of_x0: Tensor
    v_of_eps: Tensor
    clipped_of_x0: Tensor
    clipped_of_eps: Tensor
    clipped_of_x: Tensor


class OutputConversion:
    """Estimates of x0, and what enters the chain in place of the model's output, for rows of any steps.

    Args:
        rows: The coefficients (S,), float64 on the CPU.
        clipping: How x0 is kept within bounds, if it is.
        to_x0: Whether x0 itself enters the chain; else it is the velocity.
    """

    def __init__(self, rows: ConversionRows, clipping: Clipping | None, to_x0: bool) -> None:
        self.rows, self.clipping, self.to_x0 = torch.stack(rows), clipping, to_x0
        self._on_device: dict[tuple[torch.device, torch.dtype], Tensor] = {}

    def original_sample(self, x: Tensor, out: Tensor, index: Tensor) -> Tensor:
        """See `StepTable.original_sample`."""
        x, out, rows = self._gathered(x, out, index)
        return self._clipped((rows.x0_of_x * x).addcmul_(rows.x0_of_out, out))

    def effective_output(self, x: Tensor, out: Tensor, index: Tensor) -> Tensor:
        """See `StepTable.effective_output`."""
        if self.to_x0:
            return self.original_sample(x, out, index)
        x, out, rows = self._gathered(x, out, index)
        x0 = rows.x0_of_x * x + rows.x0_of_out * out
        eps = rows.eps_of_x * x + rows.eps_of_out * out
        clipped = self._clipped(x0)
        moved = rows.clipped_of_x0 * clipped + rows.clipped_of_eps * eps - rows.clipped_of_x * x
        # the same number wherever nothing was clipped, without the cancellation: secants live on its small differences
        return torch.where(clipped == x0, rows.v_of_x0 * x0 + rows.v_of_eps * eps, moved)

    def _gathered(self, x: Tensor, out: Tensor, index: Tensor) -> tuple[Tensor, Tensor, ConversionRows]:
        """x and out in fp32 or wider, and the rows of the steps `index` (N,) for them."""
        dtype = torch.promote_types(x.dtype, torch.float32)
        key = (x.device, dtype)
        if key not in self._on_device:
            self._on_device[key] = self.rows.to(*key)
        rows = self._on_device[key][:, index].view(len(self.rows), -1, *[1] * (x.ndim - 1))
        return x.to(dtype), out.to(dtype), ConversionRows(*rows.unbind())

    def _clipped(self, x0: Tensor) -> Tensor:
        return x0 if self.clipping is None else self.clipping(x0)
