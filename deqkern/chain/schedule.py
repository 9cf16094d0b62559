"""Noise schedules: how noisy each timestep is, and the rules by which a chain of S steps is laid through them.

A state is x = alpha x0 + sigma eps, either variance preserving (alpha^2 = abar, sigma^2 = 1 - abar) or flow matching
(alpha = 1 - s, sigma = s). Coefficients are computed in float64 from the float32 tables of training.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass, field
from typing import Any, Unpack

from torch import Tensor

from ..support.checks import check_choice, to_float, to_int
from . import betas as rules
from .levels import StepLevels, discrete_levels, flow_levels, own_levels
from .options import ScheduleOptions, name_options
from .output import PREDICTION_TYPES, Clipping
from .schedulers import read
from .step_table import StepTable, check_order
from .timesteps import TIMESTEP_SPACINGS

__all__ = ["NoiseSchedule", "StepTable"]

_LOWER_ORDER_FINAL = 15  # a chain of fewer steps ends with a first-order one: DPMSolverMultistepScheduler


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

    Raises:
        ValueError, TypeError: For an option out of its range, or of another type, by name.

    Example:
        >>> import torch
        >>> from deqkern import NoiseSchedule
        >>> schedule = NoiseSchedule(torch.linspace(0.999, 0.01, 100), prediction_type="v_prediction")
        >>> schedule.steps(4).timesteps
        tensor([75, 50, 25,  0])

    Reference:
        arXiv 2010.02502 (DDIM), arXiv 2209.03003 (rectified flow).
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
    _scheduler: Any = field(default=None, repr=False)  # of diffusers, where the noise levels are its own

    def __post_init__(self) -> None:
        check_choice("prediction_type", self.prediction_type, PREDICTION_TYPES)
        check_choice("timestep_spacing", self.timestep_spacing, TIMESTEP_SPACINGS)
        if to_int("steps_offset", self.steps_offset) < 0:
            raise ValueError(f"steps_offset must be >= 0, got {self.steps_offset}")
        for name in ("clip_sample_range", "sample_max_value", "dynamic_thresholding_ratio", "shift"):
            if not 0 < to_float(name, getattr(self, name)) < math.inf:
                raise ValueError(f"{name} must be finite and > 0, got {getattr(self, name)}")
        if self.dynamic_thresholding_ratio > 1:
            raise ValueError(f"dynamic_thresholding_ratio must be <= 1, got {self.dynamic_thresholding_ratio}")
        total = to_int("num_train_timesteps", self.num_train_timesteps)
        if self.prediction_type == "flow":
            if self.alphas_cumprod is not None:
                raise ValueError("alphas_cumprod must be None for prediction_type='flow'")
            if self.clip_sample or self.thresholding:
                raise ValueError("clip_sample and thresholding are not defined for prediction_type='flow'")
            if total < 1:
                raise ValueError(f"num_train_timesteps must be >= 1, got {total}")
            if self.timestep_spacing == "log_snr":
                raise ValueError("timestep_spacing='log_snr' is not defined for prediction_type='flow'")
            return
        if self.shift != 1:
            raise ValueError(f"shift belongs to prediction_type='flow', got {self.shift} with {self.prediction_type!r}")
        alphas_cumprod = rules.checked_alphas_cumprod(self.alphas_cumprod)
        if total not in (0, len(alphas_cumprod)):
            raise ValueError(f"num_train_timesteps is {total}, alphas_cumprod has {len(alphas_cumprod)} entries")
        if self._scheduler is not None and self.timestep_spacing == "log_snr":
            raise ValueError("timestep_spacing='log_snr' needs the noise levels of training, not the scheduler's own")
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
    def flow(cls, shift: float = 1.0, num_train_timesteps: int = 1000) -> NoiseSchedule:
        """Rectified flow: x = (1 - s) x0 + s noise, the model gives noise - x0 and is called with s * T.

        `shift` moves the steps towards the noise: s -> shift s / (1 + (shift - 1) s) (arXiv 2403.03206, eq. 23).

        Example:
            >>> from deqkern import NoiseSchedule
            >>> NoiseSchedule.flow(shift=3.0).steps(3).timesteps.int()
            tensor([1000,  751,    8], dtype=torch.int32)
        """
        return cls(
            None, prediction_type="flow", shift=shift, num_train_timesteps=rules.check_total(num_train_timesteps)
        )

    @classmethod
    def from_diffusers(cls, scheduler: Any) -> NoiseSchedule:
        """The schedule of a diffusers scheduler; later changes to the scheduler have no effect.

        A scheduler with `alphas_cumprod` (DDIM, DDPM, PNDM, DPM-Solver, Euler, ..) gives the DDIM chain of its noise
        schedule, prediction type, spacing and offset, whatever its own update rule. An option that it lacks has
        DDIMScheduler's default, except that nothing is clipped unless it says so. FlowMatchEulerDiscreteScheduler gives
        its own chain: `steps(S)` takes its sigmas as they stand if it was set to S timesteps, else those that
        `set_timesteps(S)` gives a copy of it; dynamic shifting needs the first, since only `set_timesteps` knows mu. So
        does a DPMSolverMultistepScheduler with Karras, exponential, beta or lu sigmas.

        Raises:
            ValueError: For those sigmas of other schedulers, flow sigmas and continuous timesteps of variance
                preserving ones, lambda_min_clipped, consistency samplers (LCM, TCD) and stochastic or inverted flow
                matching.
            TypeError: For anything else, such as the EDM schedulers.

        Example:
            >>> from diffusers import DDIMScheduler
            >>> from deqkern import NoiseSchedule
            >>> NoiseSchedule.from_diffusers(DDIMScheduler(prediction_type="v_prediction")).prediction_type
            'v_prediction'
        """
        alphas_cumprod, options, own = read(scheduler)
        return cls(alphas_cumprod, **options, _scheduler=own)

    @property
    def has_spacing(self) -> bool:
        """Whether `timestep_spacing` lays the steps: not of flow matching, nor of a scheduler's own noise levels."""
        return self.prediction_type != "flow" and self._scheduler is None

    def steps(
        self, num_inference_steps: int, eta: float = 0.0, sigma_min: float | None = None, order: int = 1
    ) -> StepTable:
        """The coefficients of a chain of S steps, in float64 on the CPU.

        Args:
            num_inference_steps: S.
            eta: Scales the noise of each step (arXiv 2010.02502, eq. 16): 0 is DDIM, 1 is like DDPM.
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

        Raises:
            ValueError, TypeError: For an argument that the schedule has no room for, or of another type, by name.

        Example:
            >>> from deqkern import NoiseSchedule
            >>> table = NoiseSchedule.linear().steps(50)
            >>> table.num_inference_steps, float(table.alpha_next[-1])
            (50, 1.0)
        """
        count, eta = to_int("num_inference_steps", num_inference_steps), to_float("eta", eta)
        if not 1 <= count <= self.num_train_timesteps:
            raise ValueError(f"num_inference_steps must be in 1 .. {self.num_train_timesteps}, got {count}")
        if not 0 <= eta < math.inf:
            raise ValueError(f"eta must be finite and >= 0, got {eta}")
        check_order(order)
        if order == 2 and eta not in (0, 1):
            raise ValueError(f"eta must be 0 or 1 with order=2, got {eta}")
        if sigma_min is not None and not 0 < to_float("sigma_min", sigma_min) < math.inf:
            raise ValueError(f"sigma_min must be None, or finite and > 0, got {sigma_min}")
        levels = self._levels(count, eta=eta, sigma_min=sigma_min, order=order)
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
            lower_order_final=count < _LOWER_ORDER_FINAL,
        )

    def _levels(self, count: int, *, eta: float, sigma_min: float | None, order: int) -> StepLevels:
        if self.alphas_cumprod is None:
            if eta > 0:
                raise ValueError(f"eta must be 0 for prediction_type='flow', got {eta}")
            return flow_levels(self._scheduler, self.num_train_timesteps, count, shift=self.shift, sigma_min=sigma_min)
        if self._scheduler is not None:
            return own_levels(self._scheduler, count, eta=eta, sigma_min=sigma_min)
        return discrete_levels(
            self.alphas_cumprod, count, spacing=self.timestep_spacing, offset=self.steps_offset,
            to_one=self.set_alpha_to_one, eta=eta, sigma_min=sigma_min, order=order,
        )  # fmt: skip


name_options(NoiseSchedule, "from_betas", "linear", "scaled_linear", "cosine")
