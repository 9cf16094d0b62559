"""The coefficients of one sampling chain: x_next = a x + b out + c out_before + n z, linear in the model's outputs.

A state is x = alpha x0 + sigma eps and the model's output is out = u x0 + w eps. With det = alpha w - sigma u,

    x0 = (w x - sigma out) / det,      eps = (alpha out - u x) / det,
    x_next = alpha_next x0 + direction eps + n z,      direction^2 = sigma_next^2 - n^2,
    a = (alpha_next w - direction u) / det,      b = (direction alpha - alpha_next sigma) / det.

A second-order step (DPM-Solver++ 2M, arXiv 2211.01095, algorithm 2) extrapolates x0 from the step before it, linearly
in log(alpha / sigma), with h the length of a step in it:

    x_next = a x + b (x0 + (x0 - x0_before) h / (2 h_before)) + n z,      a and b of the model's output x0.

Nothing else here assumes that a step begins where the one before it ended. All is computed in float64 on the CPU.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, fields, replace

import torch
from torch import Tensor

from ..support.checks import is_int

PREDICTION_TYPES = ("epsilon", "v_prediction", "sample", "flow")

_MAX_LOG_SNR = 32.0
_SMALLEST_SIGMA = 1e-12  # stands for 0 at a timestep without noise: sample prediction divides by it
_IDLE = 1e-9  # a step whose b is no larger stays where it is
_QUANTILE_ELEMENTS = 1 << 23  # torch.quantile refuses inputs of more than 16 million elements


@dataclass(frozen=True, eq=False)
class StepTable:
    """The coefficients of a chain of S steps: tensors (S,) float64 on the CPU, in the order in which the chain runs.

    `a`, `b`, `c` and the slopes belong to what enters the chain: the model's output, or `effective_output` if the table
    `converts`.
    A slope is d out / dx = slope_0 (1 - kappa) + slope_1 kappa for a shrinkage kappa in [0, 1], where
    d eps / dx = kappa / sigma and d x0 / dx = (1 - kappa) / alpha: 0 freezes epsilon, 1 freezes x0. Where one of the
    two has no meaning (alpha = 0 or sigma = 0) it is replaced by the other.
    """

    timesteps: Tensor  # what the model is called with, descending; int64, float32 for flow matching
    alpha: Tensor
    sigma: Tensor  # at least 1e-12
    alpha_next: Tensor
    sigma_next: Tensor
    a: Tensor
    b: Tensor
    c: Tensor  # zero, but for order 2
    n: Tensor
    slope_0: Tensor
    slope_1: Tensor
    u: Tensor  # of the model's own output
    w: Tensor
    direction: Tensor
    clip_sample_range: float | None = None
    thresholding: tuple[float, float] | None = None  # ratio and largest value of dynamic thresholding
    order: int = 1  # 2: the chain is written for x0, and steps use that of the step before
    implicit: bool = False  # a step takes the model's output at its own end: see `reversed`
    _device_rows: dict[tuple[torch.device, torch.dtype], Tensor] = field(default_factory=dict, init=False, repr=False)

    @classmethod
    def build(
        cls,
        prediction_type: str,
        timesteps: Tensor,  # (S,)
        alpha: Tensor,  # (S,) float64, here and below; the noisy end of each step
        sigma: Tensor,
        alpha_next: Tensor,  # the clean end
        sigma_next: Tensor,
        n: Tensor,
        clip_sample_range: float | None = None,
        thresholding: tuple[float, float] | None = None,
        order: int = 1,
        lower_order_final: bool = False,
    ) -> StepTable:
        """The table of steps between these noise levels.

        order: 1 is DDIM. 2 is DPM-Solver++ 2M, where the first step is first order, and the last one if it ends without
        noise or if `lower_order_final`; n must be that of eta = 0 or 1, and each step begin where the last one ended.

        A table that clips is written for the velocity alpha eps - sigma x0 (arXiv 2202.00512, appendix D), whatever the
        model predicts: its a and b lie within -1 .. 1 at any noise level, while those of epsilon grow with 1 / alpha
        would lose in rounding what clipping keeps. Raises ValueError for an unknown `prediction_type`, and with order 2
        for a step between equal noise levels.
        """
        sigma = sigma.clamp_min(_SMALLEST_SIGMA)
        u, w = _output_mix(prediction_type, alpha, sigma)
        clips = clip_sample_range is not None or thresholding is not None
        chain = _stand_in(order, clips) or prediction_type
        chain_u, chain_w = _output_mix(chain, alpha, sigma)
        direction = (sigma_next**2 - n**2).clamp_min(0).sqrt()
        det = alpha * chain_w - sigma * chain_u
        a = (alpha_next * chain_w - direction * chain_u) / det
        b = (direction * alpha - alpha_next * sigma) / det
        slope_0, slope_1 = chain_u / alpha, chain_w / sigma
        slope_0 = torch.where(alpha == 0, slope_1, slope_0)
        slope_1 = torch.where(sigma == _SMALLEST_SIGMA, slope_0, slope_1)
        c = torch.zeros_like(b)
        if order == 2:
            length = (alpha_next / sigma_next).log() - (alpha / sigma).log()
            if not bool((length[:-1] > 0).all()):
                raise ValueError(
                    "num_inference_steps is too large for order=2, whose noise levels must fall from step to step: "
                    "take fewer, or timestep_spacing='trailing' or 'log_snr'"
                )
            extrapolation = torch.zeros_like(b)
            extrapolation[1:] = length[1:] / (2 * length[:-1])
            if lower_order_final or sigma_next[-1] == 0:
                extrapolation[-1] = 0
            b, c = b * (1 + extrapolation), -b * extrapolation
        elif clips:  # a step that stays where it is (b = 0) still clips: give its output a way in, and no slope
            idle = b.abs() <= _IDLE
            b = torch.where(idle, 1.0, b)
            slope_0, slope_1 = torch.where(idle, 0.0, slope_0), torch.where(idle, 0.0, slope_1)
        ends = (alpha, sigma, alpha_next, sigma_next)
        clipping = (clip_sample_range, thresholding)
        return cls(timesteps, *ends, a, b, c, n, slope_0, slope_1, u, w, direction, *clipping, order)

    def reversed(self) -> StepTable:
        """The same chain from its clean end to its noise: y[j] = x[S-j], an implicit chain.

        x_next = a x + b out(x) becomes y_next = y / a - (b / a) out(y_next). Raises ValueError for a table that clips,
        that draws noise, or that has a step with a = 0: such steps cannot be undone; or a table of order 2.
        """
        if self.order != 1:
            raise ValueError("order must be 1: steps that use the output of the step before are not inverted")
        if self.clips:
            raise ValueError("schedule clips or thresholds x0: what is cut off cannot be found again by inversion")
        if bool((self.n != 0).any()):
            raise ValueError("eta must be 0: steps that draw noise cannot be undone")
        if bool((self.a == 0).any()):
            raise ValueError("schedule has a step that forgets its state (a = 0): it cannot be undone")
        flipped = {name: getattr(self, name).flip(0) for name in _PER_STEP}
        flipped |= {"a": 1 / flipped["a"], "b": -flipped["b"] / flipped["a"]}
        return StepTable(**flipped, implicit=not self.implicit)

    def transposed(self) -> StepTable:
        """The chain of the gradient: y[0] = dL/dx[S], y[j] belongs to state S-j, J is that of the map at its states.

        Explicit:  y[j+1] = a y[j] + b J[S-1-j]^T y[j],        y[S] = dL/dx[0];    of step i = S-1-j.
        Implicit:  y[j+1] = a' y[j] + b J[S-j]^T y[j+1],   a y[S] = dL/dx[0];      a' of the step before, at first 1.

        What step i adds to dL/dtheta is b (d out / d theta)^T y: y[j] of an explicit step, y[j+1] of an implicit one.
        The chain draws no noise. Raises ValueError for a table of order 2, whose transposed chain has another form.
        """
        if self.order != 1:
            raise ValueError("order must be 1 for the transposed chain")
        flipped = {name: getattr(self, name).flip(0) for name in _PER_STEP}
        flipped["n"] = torch.zeros_like(self.n)
        if self.implicit:
            flipped["a"] = torch.cat([torch.ones_like(self.a[:1]), flipped["a"][:-1]])
        return replace(self, **flipped, clip_sample_range=None, thresholding=None)  # VJPs enter it as they are

    def held_x0(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """How a chain goes on while x0 stays what it is: keep, pull, of_x, of_out (S,) with

        x[i+1] = keep[i] x[i] + pull[i] x0 + n[i] z[i],      x0 = of_x[j] x + of_out[j] out

        for the output out of step j at the state x that it is called with; both as they enter the chain.
        """
        chain = _stand_in(self.order, self.clips)
        u, w = _output_mix(chain, self.alpha, self.sigma) if chain else (self.u, self.w)
        det = self.alpha * w - self.sigma * u
        noisy, clean = (self.alpha, self.sigma), (self.alpha_next, self.direction.clamp_min(_SMALLEST_SIGMA))
        begin, end = (clean, noisy) if self.implicit else (noisy, clean)
        keep = end[1] / begin[1]
        return keep, end[0] - keep * begin[0], w / det, -self.sigma / det

    def part(self, span: range) -> StepTable:
        """The chain of the steps `span` alone: its first one is of first order, as it has none before it."""
        part = {name: getattr(self, name)[span.start : span.stop].clone() for name in _PER_STEP}
        part["b"][:1] += part["c"][:1]
        part["c"][:1] = 0
        return replace(self, **part)

    def coefficients(self, like: Tensor) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
        """a, b, c and n (S,) as `ddim_scan` takes them beside states `like`: c is None where no step uses it."""
        a, b, c, n = (value.to(like.device, like.dtype) for value in (self.a, self.b, self.c, self.n))
        return a, b, c if self.order == 2 else None, n

    @property
    def num_inference_steps(self) -> int:
        """S."""
        return len(self.timesteps)

    @property
    def clips(self) -> bool:
        """Whether x0 is clipped or thresholded."""
        return self.clip_sample_range is not None or self.thresholding is not None

    @property
    def converts(self) -> bool:
        """Whether `effective_output` stands for the model's output: the table clips, or is written for x0."""
        return _stand_in(self.order, self.clips) is not None

    @property
    def log_snr(self) -> Tensor:
        """log(alpha^2 / sigma^2) (S,), kept within -32 .. 32."""
        return (2 * (self.alpha.log() - self.sigma.log())).clamp(-_MAX_LOG_SNR, _MAX_LOG_SNR)

    def shrinkage(self, variance: float) -> Tensor:
        """The Wiener filter of Gaussian data with `variance` P: kappa = sigma^2 / (alpha^2 P + sigma^2) (S,).

        Raises ValueError for a negative or non-finite variance.
        """
        if not 0 <= variance < math.inf:
            raise ValueError(f"variance must be finite and >= 0, got {variance}")
        noise = self.sigma**2
        return noise / (self.alpha**2 * variance + noise)

    def original_sample(
        self,
        x: Tensor,  # (N, *shape)
        out: Tensor,  # (N, *shape)
        index: Tensor,  # (N,) int64, on the device of x
    ) -> Tensor:
        """The estimate of x0 (N, *shape), fp32 or wider, from the model's own output at steps `index`.

        It is clipped if the table clips: the pred_original_sample of diffusers' DDIMScheduler (arXiv 2010.02502,
        eq. 12). Do not call it with an `effective_output`.
        """
        x, out, rows = self._gather(x, out, index)
        return self._clip((rows[0] * x).addcmul_(rows[1], out))

    def effective_output(
        self,
        x: Tensor,  # (N, *shape)
        out: Tensor,  # (N, *shape)
        index: Tensor,  # (N,) int64, on the device of x
    ) -> Tensor:
        """What stands for the model's output at steps `index`, so that a x + b out is the step from the clipped x0.

        x and out are in pixel space; the result (N, *shape) is fp32 or wider. x0 is clipped to `clip_sample_range` or
        dynamically thresholded (arXiv 2205.11487, section 2.3) and eps is left alone, as in diffusers' DDIMScheduler.
        With order 2 it is x0 itself, clipped if the table clips. Raises ValueError for a table that does not convert.
        """
        if not self.converts:
            raise ValueError("effective_output is for a table that converts")
        if self.order == 2:
            return self.original_sample(x, out, index)
        x, out, rows = self._gather(x, out, index)
        x0 = rows[0] * x + rows[1] * out
        eps = rows[2] * x + rows[3] * out
        clipped = self._clip(x0)
        moved = rows[6] * clipped + rows[7] * eps - rows[8] * x
        # the same number wherever nothing was clipped, without the cancellation: secants live on its small differences
        return torch.where(clipped == x0, rows[4] * x0 + rows[5] * eps, moved)

    def _gather(self, x: Tensor, out: Tensor, index: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        dtype = torch.promote_types(x.dtype, torch.float32)
        key = (x.device, dtype)
        if key not in self._device_rows:
            self._device_rows[key] = self._rows().to(*key)
        rows = self._device_rows[key][:, index]
        return x.to(dtype), out.to(dtype), rows.view(len(rows), -1, *[1] * (x.ndim - 1))  # rows (R, N, 1, ..)

    def _rows(self) -> Tensor:  # (R, S)
        det = self.alpha * self.w - self.sigma * self.u
        rows = [self.w / det, -self.sigma / det, -self.u / det, self.alpha / det]  # x0, eps of (x, out)
        if self.clips and self.order == 1:
            idle = (self.direction * self.alpha - self.alpha_next * self.sigma).abs() <= _IDLE  # see build
            rows += [torch.where(idle, 0.0, -self.sigma), torch.where(idle, 0.0, self.alpha)]
            rows += [self.alpha_next / self.b, self.direction / self.b, self.a / self.b]
        return torch.stack(rows)

    def _clip(self, x0: Tensor) -> Tensor:  # (N, *shape)
        if self.thresholding is not None:
            ratio, largest = self.thresholding
            flat = x0.flatten(1)
            parts = torch.split(flat.abs(), max(1, _QUANTILE_ELEMENTS // flat.shape[1]))
            bound = torch.cat([torch.quantile(part, ratio, dim=1) for part in parts]).clamp(1, largest)[:, None]
            return (flat.clamp(-bound, bound) / bound).view_as(x0)
        if self.clip_sample_range is not None:
            return x0.clamp(-self.clip_sample_range, self.clip_sample_range)
        return x0


def check_order(order: int) -> None:
    """Refuse all but 1 and 2."""
    if not is_int(order) or order not in (1, 2):
        raise ValueError(f"order must be 1 or 2, got {order!r}")


_PER_STEP = tuple(item.name for item in fields(StepTable) if item.type == "Tensor")


def _stand_in(order: int, clips: bool) -> str | None:
    """What such a chain is written for where it is not the model's own output: see `StepTable.build`."""
    return "sample" if order == 2 else "v_prediction" if clips else None


def _output_mix(prediction_type: str, alpha: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
    """(u, w) (S,) of out = u x0 + w eps."""
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
