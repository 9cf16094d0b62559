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
from dataclasses import dataclass, fields, replace
from functools import cached_property

import torch
from torch import Tensor

from ..ops.state import ConstantX0
from ..support.checks import is_int
from .output import Clipping, ConversionRows, OutputConversion, estimates, output_mix

_MAX_LOG_SNR = 32.0
_SMALLEST_SIGMA = 1e-12  # stands for 0 at a timestep without noise: sample prediction divides by it
_IDLE = 1e-9  # a step whose b is no larger stays where it is


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
    prediction_type: str = "epsilon"  # of the model's own output
    clipping: Clipping | None = None  # of x0
    order: int = 1  # 2: the chain is written for x0, and steps use that of the step before
    process: str = "ddim"  # see `NoiseSchedule`; of DDPM's, a chain that clips is written for x0, which eps follows
    implicit: bool = False  # a step takes the model's output at its own end: see `reversed`

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
        clipping: Clipping | None = None,
        order: int = 1,
        lower_order_final: bool = False,
        process: str = "ddim",
    ) -> StepTable:
        """The table of steps between these noise levels.

        A table that clips is written for the velocity alpha eps - sigma x0 (arXiv 2202.00512, appendix D), whatever the
        model predicts: its a and b lie within -1 .. 1 at any noise level, while those of epsilon grow with 1 / alpha
                would lose in rounding what clipping keeps. Where eps follows the clipped x0 it is written for x0.

        order: 1 is DDIM. 2 is DPM-Solver++ 2M, where the first step is first order, and the last one if it ends without
        noise or if `lower_order_final`; n must be that of eta = 0 or 1, and each step begin where the last one ended.
        Raises ValueError for an unknown `prediction_type`, and with order 2 for a step between equal noise levels.
        """
        sigma = sigma.clamp_min(_SMALLEST_SIGMA)
        output_mix(prediction_type, alpha, sigma)  # refuses an unknown one
        entering = _entering(order, clipping, process)
        chain_u, chain_w = output_mix(entering or prediction_type, alpha, sigma)
        direction = _direction(sigma_next, n)
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
        elif entering == "v_prediction":  # a step that stays where it is (b = 0) still clips: give its output a way in,
            idle = b.abs() <= _IDLE  # and no slope
            b = torch.where(idle, 1.0, b)
            slope_0, slope_1 = torch.where(idle, 0.0, slope_0), torch.where(idle, 0.0, slope_1)
        return cls(
            timesteps=timesteps, alpha=alpha, sigma=sigma, alpha_next=alpha_next, sigma_next=sigma_next,
            a=a, b=b, c=c, n=n, slope_0=slope_0, slope_1=slope_1,
            prediction_type=prediction_type, clipping=clipping, order=order, process=process,
        )  # fmt: skip

    def reversed(self) -> StepTable:
        """The same chain from its clean end to its noise: y[j] = x[S-j], an implicit chain.

        x_next = a x + b out(x) becomes y_next = y / a - (b / a) out(y_next). Raises ValueError for a table that clips,
        that draws noise, or that has a step with a = 0: such steps cannot be undone; or a table of order 2.
        """
        if self.order != 1:
            raise ValueError(
                "order must be 1: steps that use the output of the step before are not inverted; take the DDIM chain, "
                "schedule.as_ddim()"
            )
        if self.clips:
            raise ValueError("schedule clips or thresholds x0: what is cut off cannot be found again by inversion")
        if bool((self.n != 0).any()):
            raise ValueError("eta must be 0: steps that draw noise cannot be undone")
        if bool((self.a == 0).any()):
            raise ValueError("schedule has a step that forgets its state (a = 0): it cannot be undone")
        flipped = {name: getattr(self, name).flip(0) for name in _PER_STEP}
        flipped |= {"a": 1 / flipped["a"], "b": -flipped["b"] / flipped["a"]}
        return replace(self, **flipped, implicit=not self.implicit)

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
        return replace(self, **flipped, clipping=None)  # VJPs enter it as they are

    def constant_x0(self) -> ConstantX0[Tensor]:
        """The constant-x0 extrapolation of the chain: its states while x0 stays what it is."""
        entering = _entering(self.order, self.clipping, self.process) or self.prediction_type
        x0 = estimates(entering, self.alpha, self.sigma)
        noisy, clean = (self.alpha, self.sigma), (self.alpha_next, self.direction.clamp_min(_SMALLEST_SIGMA))
        (alpha_begin, sigma_begin), (alpha_end, sigma_end) = (clean, noisy) if self.implicit else (noisy, clean)
        keep = sigma_end / sigma_begin
        return ConstantX0(keep, alpha_end - keep * alpha_begin, of_x=x0.x0_of_x, of_out=x0.x0_of_out)

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
    def u(self) -> Tensor:
        """Of the model's own output, u x0 + w eps."""
        return output_mix(self.prediction_type, self.alpha, self.sigma)[0]

    @property
    def w(self) -> Tensor:
        """Of the model's own output, u x0 + w eps."""
        return output_mix(self.prediction_type, self.alpha, self.sigma)[1]

    @property
    def direction(self) -> Tensor:
        """How much of eps the clean end of a step has, beside fresh noise."""
        return _direction(self.sigma_next, self.n)

    @property
    def clips(self) -> bool:
        """Whether x0 is clipped or thresholded."""
        return self.clipping is not None

    @property
    def converts(self) -> bool:
        """Whether `effective_output` stands for the model's output: the table clips, or is written for x0."""
        return _entering(self.order, self.clipping, self.process) is not None

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
        return self._conversion.original_sample(x, out, index)

    def effective_output(
        self,
        x: Tensor,  # (N, *shape)
        out: Tensor,  # (N, *shape)
        index: Tensor,  # (N,) int64, on the device of x
    ) -> Tensor:
        """What stands for the model's output at steps `index`, so that a x + b out is the step from the clipped x0.

        x and out are in pixel space; the result (N, *shape) is fp32 or wider. x0 is clipped to `clip_sample_range` or
        dynamically thresholded (arXiv 2205.11487, section 2.3) and eps is left alone, as in diffusers' DDIMScheduler.
        With order 2, and where eps follows the clipped x0, it is x0 itself, clipped if the table clips. Raises
        ValueError for a table that does not convert.
        """
        if not self.converts:
            raise ValueError("effective_output is for a table that converts")
        return self._conversion.effective_output(x, out, index)

    @cached_property
    def _conversion(self) -> OutputConversion:
        own = estimates(self.prediction_type, self.alpha, self.sigma)
        if _entering(self.order, self.clipping, self.process) == "sample":
            return OutputConversion(ConversionRows(*own, *[torch.zeros_like(self.a)] * 5), self.clipping, to_x0=True)
        idle = (self.direction * self.alpha - self.alpha_next * self.sigma).abs() <= _IDLE  # see build
        velocity = (torch.where(idle, 0.0, -self.sigma), torch.where(idle, 0.0, self.alpha))
        clipped = (self.alpha_next / self.b, self.direction / self.b, self.a / self.b)
        return OutputConversion(ConversionRows(*own, *velocity, *clipped), self.clipping, to_x0=False)


def check_order(order: int) -> None:
    """Refuse all but 1 and 2."""
    if not is_int(order) or order not in (1, 2):
        raise ValueError(f"order must be 1 or 2, got {order!r}")


_PER_STEP = tuple(item.name for item in fields(StepTable) if item.type == "Tensor")


def _entering(order: int, clipping: Clipping | None, process: str) -> str | None:
    """What enters such a chain where it is not the model's own output: see `StepTable.build`."""
    if order == 2:
        return "sample"
    if clipping is None:
        return None
    return "v_prediction" if process == "ddim" else "sample"


def _direction(sigma_next: Tensor, n: Tensor) -> Tensor:
    return (sigma_next**2 - n**2).clamp_min(0).sqrt()
