"""Noise schedules: how noisy each timestep is, and the rules by which a chain of S steps is laid through them.

A state is x = alpha x0 + sigma eps, either variance preserving (alpha^2 = abar, sigma^2 = 1 - abar) or flow matching
(alpha = 1 - s, sigma = s). Coefficients are computed in float64 from the float32 tables of training.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass, field, replace
from typing import Any, Unpack

from torch import Tensor

from ..support.checks import to_float, to_int
from . import betas as rules
from .levels import levels_of
from .options import ScheduleOptions, check_options, check_total, checked_eta, name_options
from .output import Clipping
from .reading import OwnChain, given_flow_levels, read
from .step_table import StepTable

__all__ = ["NoiseSchedule", "StepTable"]


@dataclass(frozen=True, eq=False)
class NoiseSchedule:
    """A training noise schedule and the rules by which a chain of S steps is laid through it.

    With `alphas_cumprod` the chain is that of diffusers' DDIMScheduler, whose option names these are, quirks included:
    the step from timestep t leads to t - T // S whatever the next timestep is. With `prediction_type="flow"` there is
    no `alphas_cumprod`; the chain is Euler's rule for rectified flow, on the noise levels of diffusers'
    FlowMatchEulerDiscreteScheduler with `shift`.

    Args:
        alphas_cumprod: (T,) in (0, 1], not increasing; the last may be 0, or 2^-24. Kept in float64. None for flow.
        prediction_type: What the model predicts: "epsilon", "v_prediction", "sample" or "flow".
        timestep_spacing: "leading", "linspace" or "trailing", as in diffusers, or "log_snr": timesteps from T - 1 to 0
            that are even in log(alpha^2 / sigma^2), as near as whole numbers can be, each step ending where the next
            begins: the better one for `order=2` (docs/convergence.md).
        steps_offset: Added to timesteps of leading spacing.
        set_alpha_to_one: Whether a step below timestep 0 leads to abar = 1, or to alphas_cumprod[0].
        clip_sample: Whether x0 is clipped.
        clip_sample_range: To which range on both sides of 0.
        thresholding: Whether x0 is thresholded dynamically (arXiv 2205.11487). Takes precedence over `clip_sample`.
        dynamic_thresholding_ratio: At which quantile of its absolute values.
        sample_max_value: The largest threshold.
        shift: Of flow matching: moves the steps towards the noise.
        num_train_timesteps: T; 0 stands for the length of `alphas_cumprod`.
        process: "ddim", or "ddpm" for the ancestral steps of DDPM (arXiv 2006.11239) as DDPMScheduler has them: each
            leads to the next timestep, eps is that of the clipped x0, and the noise is `variance_type` fixed_small.
            "ddpm_large" is fixed_large. "ddpm" is "ddim" at eta = 1 if nothing is clipped and the steps join up.

    Raises:
        ValueError, TypeError: For an option out of its range, or of another type, by name.

    Example:
        >>> import torch
        >>> from deqkern import NoiseSchedule
        >>> schedule = NoiseSchedule(torch.linspace(0.999, 0.01, 100), prediction_type="v_prediction")
        >>> schedule.steps(4).timesteps
        tensor([75, 50, 25,  0])

    Reference:
        arXiv 2010.02502 (DDIM), arXiv 2006.11239 (DDPM), arXiv 2209.03003 (rectified flow).
    """

    alphas_cumprod: Tensor | None
    _: KW_ONLY
    prediction_type: str = "epsilon"
    timestep_spacing: str = "leading"
    steps_offset: int = 0
    set_alpha_to_one: bool = True
    clip_sample: bool = False
    clip_sample_range: float = 1.0
    thresholding: bool = False
    dynamic_thresholding_ratio: float = 0.995
    sample_max_value: float = 1.0
    shift: float = 1.0
    num_train_timesteps: int = 0
    process: str = "ddim"
    _own: OwnChain = field(default=OwnChain(), repr=False)  # of the scheduler that it was read from

    def __post_init__(self) -> None:
        check_options(self, own_levels=self._own.levels is not None)
        if self.prediction_type != "flow":
            alphas_cumprod = rules.checked_alphas_cumprod(self.alphas_cumprod)
            check_total(self.num_train_timesteps, alphas_cumprod)
            object.__setattr__(self, "alphas_cumprod", alphas_cumprod)
            object.__setattr__(self, "num_train_timesteps", len(alphas_cumprod))

    @classmethod
    def from_betas(
        cls,
        betas: Tensor | Sequence[float],
        *,
        rescale_betas_zero_snr: bool = False,
        **options: Unpack[ScheduleOptions],
    ) -> NoiseSchedule:
        """alphas_cumprod[t] = prod (1 - betas[:t+1]), in float32 as networks are trained.

        Args:
            betas: (T,) in [0, 1].
            rescale_betas_zero_snr: Shift and scale sqrt(abar) so that it ends at 0 (arXiv 2305.08891, algorithm 1).
            **options: Those of `NoiseSchedule`, by name.

        Example:
            >>> from deqkern import NoiseSchedule
            >>> NoiseSchedule.from_betas([0.5, 0.5]).alphas_cumprod.tolist()
            [0.5, 0.25]
        """
        return cls(rules.alphas_cumprod_of(betas, rescale_betas_zero_snr), **options)

    @classmethod
    def linear(
        cls, beta_start: float = 1e-4, beta_end: float = 0.02, num_train_timesteps: int = 1000, *,
        rescale_betas_zero_snr: bool = False, **options: Unpack[ScheduleOptions],
    ) -> NoiseSchedule:  # fmt: skip
        """Betas evenly spaced from `beta_start` to `beta_end` (DDPM, arXiv 2006.11239); options as in `from_betas`.

        Example:
            >>> from deqkern import NoiseSchedule
            >>> NoiseSchedule.linear(timestep_spacing="trailing").steps(4).timesteps
            tensor([999, 749, 499, 249])
        """
        betas = rules.linear(beta_start, beta_end, num_train_timesteps)
        return cls.from_betas(betas, rescale_betas_zero_snr=rescale_betas_zero_snr, **options)

    @classmethod
    def scaled_linear(
        cls, beta_start: float = 0.00085, beta_end: float = 0.012, num_train_timesteps: int = 1000, *,
        rescale_betas_zero_snr: bool = False, **options: Unpack[ScheduleOptions],
    ) -> NoiseSchedule:  # fmt: skip
        """Betas whose square roots are evenly spaced (latent diffusion, arXiv 2112.10752); options as in `from_betas`.

        Example:
            >>> from deqkern import NoiseSchedule
            >>> stable_diffusion = NoiseSchedule.scaled_linear(steps_offset=1, set_alpha_to_one=False)
            >>> stable_diffusion.steps(4).timesteps
            tensor([751, 501, 251,   1])
        """
        betas = rules.scaled_linear(beta_start, beta_end, num_train_timesteps)
        return cls.from_betas(betas, rescale_betas_zero_snr=rescale_betas_zero_snr, **options)

    @classmethod
    def cosine(
        cls,
        num_train_timesteps: int = 1000,
        *,
        rescale_betas_zero_snr: bool = False,
        **options: Unpack[ScheduleOptions],
    ) -> NoiseSchedule:
        """The squared cosine of arXiv 2102.09672 (squaredcos_cap_v2), capped at 0.999; options as in `from_betas`.

        Example:
            >>> from deqkern import NoiseSchedule
            >>> NoiseSchedule.cosine(prediction_type="sample").num_train_timesteps
            1000
        """
        betas = rules.cosine(num_train_timesteps)
        return cls.from_betas(betas, rescale_betas_zero_snr=rescale_betas_zero_snr, **options)

    @classmethod
    def flow(
        cls, shift: float = 1.0, num_train_timesteps: int = 1000, *, sigmas: Sequence[float] | Tensor | None = None
    ) -> NoiseSchedule:
        """Rectified flow: x = (1 - s) x0 + s noise, the model gives noise - x0 and is called with s * T.

        `shift` moves the steps towards the noise: s -> shift s / (1 + (shift - 1) s) (arXiv 2403.03206, eq. 23).

        Args:
            shift: See above.
            num_train_timesteps: T.
            sigmas: (S,), the s at which the model is called, descending within 1 .. 0, before the shift, as diffusers'
                set_timesteps(sigmas=..) takes them; the last step ends at 0. `steps` then takes that S alone.

        Example:
            >>> from deqkern import NoiseSchedule
            >>> NoiseSchedule.flow(shift=3.0).steps(3).timesteps.int()
            tensor([1000,  751,    8], dtype=torch.int32)
            >>> NoiseSchedule.flow(sigmas=[1.0, 0.75, 0.25]).steps(3).timesteps
            tensor([1000.,  750.,  250.])
        """
        total = rules.check_total(num_train_timesteps)
        schedule = cls(None, prediction_type="flow", shift=shift, num_train_timesteps=total)
        if sigmas is None:
            return schedule
        return replace(schedule, _own=OwnChain(given_flow_levels(sigmas, total, shift)))

    @classmethod
    def from_diffusers(cls, scheduler: Any) -> NoiseSchedule:
        """The schedule of a diffusers scheduler, and its chain; later changes to the scheduler have no effect.

        * DDIMScheduler, DDPMScheduler (fixed_large_log, of which its own step makes NaN, is taken for fixed_large),
          DPMSolverMultistepScheduler of order 2 and FlowMatchEulerDiscreteScheduler give their own chain: process,
          `eta` and `order` are theirs where `steps` is not told otherwise.
        * Any other one with `alphas_cumprod` (PNDM, UniPC, Euler, ..) gives the DDIM chain of its noise levels,
          whatever its own update rule. An option that it lacks has DDIMScheduler's default, but for clipping.
        * With sigmas of its own (flow matching, and Karras, exponential, beta or lu sigmas of DPM-Solver), `steps(S)`
          takes those it was set to if they are S, else those that `set_timesteps(S)` gives a copy of it; dynamic
          shifting needs the first, since only `set_timesteps` knows mu.
        * Timesteps or sigmas of your own that its `set_timesteps` was given are all that `steps` takes; DDIM and those
          without a chain of their own are refused with them.

        Raises:
            ValueError: For a DDPMScheduler whose variance is learned, those sigmas of other schedulers, flow sigmas and
                continuous timesteps of variance preserving ones, lambda_min_clipped, samplers of few steps (LCM, TCD)
                and stochastic or inverted flow matching.
            TypeError: For anything else, such as the EDM schedulers.

        Example:
            >>> from diffusers import DDPMScheduler
            >>> from deqkern import NoiseSchedule
            >>> NoiseSchedule.from_diffusers(DDPMScheduler(prediction_type="v_prediction")).process
            'ddpm'
        """
        alphas_cumprod, options, own = read(scheduler)
        return cls(alphas_cumprod, **options, _own=own)

    @property
    def has_spacing(self) -> bool:
        """Whether `timestep_spacing` lays the steps: not of flow matching, nor of a scheduler's own noise levels."""
        return self.prediction_type != "flow" and self._own.levels is None

    def as_ddim(self) -> NoiseSchedule:
        """The same noise levels with the steps of DDIM, where `steps` is not told otherwise: eta 0, order 1."""
        return replace(self, process="ddim", _own=OwnChain(self._own.levels))

    def draws_noise(self, eta: float | None = None) -> bool:
        """Whether the steps of a chain of this `eta` draw noise."""
        return self.process != "ddim" or (self._own.eta if eta is None else to_float("eta", eta)) != 0

    def steps(
        self,
        num_inference_steps: int,
        eta: float | None = None,
        sigma_min: float | None = None,
        order: int | None = None,
    ) -> StepTable:
        """The coefficients of a chain of S steps, in float64 on the CPU.

        Args:
            num_inference_steps: S.
            eta: Scales the noise of each step (arXiv 2010.02502, eq. 16): 0 is DDIM, 1 is like DDPM. None: that of the
                scheduler that the schedule was read from, else 0. A `process` other than "ddim" has its own noise, and
                takes None or 1.
            sigma_min: End the chain at this ratio sigma / alpha of noise to signal instead of at the clean sample: at
                the first timestep whose ratio is no less (for flow matching, whose steps keep their spacing, at that
                ratio itself). The S steps lead there from where the chain starts without it, each from where the one
                before it ended, evenly spaced in log(alpha^2 / sigma^2), as near as whole timesteps can be (arXiv
                2206.00927): steps that are even in t are too long at the clean end (docs/inversion.md).
            order: 2 is DPM-Solver++ 2M (arXiv 2211.01095, algorithm 2) for eta 0, and its SDE variant for eta 1: the
                chain of diffusers' DPMSolverMultistepScheduler with solver_order=2 and solver_type="midpoint"
                (algorithm_type "dpmsolver++" and "sde-dpmsolver++"), whose timesteps differ from those of
                DDIMScheduler: each step leads to the next timestep, and `timestep_spacing` lays S + 1 of them of which
                the last is left out ("leading", "linspace"). `set_alpha_to_one` stands for final_sigmas_type="zero".
                None: that of the scheduler that the schedule was read from, else 1.

        Raises:
            ValueError, TypeError: For an argument that the schedule has no room for, or of another type, by name.

        Example:
            >>> from deqkern import NoiseSchedule
            >>> table = NoiseSchedule.linear().steps(50)
            >>> table.num_inference_steps, float(table.alpha_next[-1])
            (50, 1.0)
        """
        count, own = to_int("num_inference_steps", num_inference_steps), self._own
        if not 1 <= count <= self.num_train_timesteps:
            raise ValueError(f"num_inference_steps must be in 1 .. {self.num_train_timesteps}, got {count}")
        order = own.order if order is None else order
        if own.unsolved is not None and order != 1:
            raise ValueError(own.unsolved)
        eta = checked_eta(own.eta if eta is None and self.process == "ddim" else eta, self.process, order)
        if sigma_min is not None and not 0 < to_float("sigma_min", sigma_min) < math.inf:
            raise ValueError(f"sigma_min must be None, or finite and > 0, got {sigma_min}")
        levels = levels_of(self, self._own.levels, count, eta=eta, sigma_min=sigma_min, order=order)
        if self.prediction_type == "epsilon" and bool((levels.alpha == 0).any()):
            raise ValueError(
                "prediction_type='epsilon' cannot start at zero terminal SNR (alphas_cumprod = 0), where epsilon says "
                "nothing of x0: use v_prediction, or timestep_spacing='leading'"
            )
        clipping = Clipping(self.clip_sample_range) if self.clip_sample else None
        if self.thresholding:
            clipping = Clipping(self.sample_max_value, self.dynamic_thresholding_ratio)
        return StepTable.build(
            self.prediction_type,
            **levels._asdict(),
            clipping=clipping,
            order=order,
            lower_order_final=own.ends_in_order_1(count),
            process=self.process,
        )


name_options(NoiseSchedule, "from_betas", "linear", "scaled_linear", "cosine")
