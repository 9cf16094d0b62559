"""Noise schedules: how noisy each timestep is, and the rules by which a chain of S steps is laid through them.

A state is x = alpha x0 + sigma eps, either variance preserving (alpha^2 = abar, sigma^2 = 1 - abar) or flow matching
(alpha = 1 - s, sigma = s). Coefficients are computed in float64 from the float32 tables of training.
"""

from __future__ import annotations

import copy
import itertools
import math
import operator
from collections.abc import Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, field
from typing import Any

import torch
from torch import Tensor

from .schedulers import OTHER_LEVELS, is_a, own_options, refuse_options, scheduler_at, variance_preserving_options
from .step_table import PREDICTION_TYPES, StepTable, check_order
from .timesteps import end_flow_at, even_in_log_snr, multistep_timesteps, shifted, spaced_timesteps

__all__ = ["NoiseSchedule", "StepTable"]

TIMESTEP_SPACINGS = ("leading", "linspace", "trailing", "log_snr")

_ZERO_SNR = 2**-24  # what some diffusers schedulers put for a last abar of 0
_LOWER_ORDER_FINAL = 15  # a chain of fewer steps ends with a first-order one: DPMSolverMultistepScheduler
_TINY = 1e-12  # a variance that rounding may be off by


@dataclass(frozen=True, eq=False)
class NoiseSchedule:
    """A training noise schedule and the rules by which a chain of S steps is laid through it.

    With `alphas_cumprod` the chain is that of diffusers' DDIMScheduler (arXiv 2010.02502), whose option names these
    are, quirks included: the step from timestep t leads to t - T // S whatever the next timestep is, and below 0 to
    abar = 1, or to alphas_cumprod[0] unless `set_alpha_to_one`. `clip_sample` is off unless asked for.
    `timestep_spacing="log_snr"`, which is not diffusers', takes timesteps from T - 1 to 0 that are even in
    log(alpha^2 / sigma^2), as near as whole numbers can be, each step ending where the next begins: the better one for
    `order=2` (docs/convergence.md).
    With `prediction_type="flow"` there is no `alphas_cumprod`; the chain is Euler's rule for rectified flow
    (arXiv 2209.03003), on the noise levels of diffusers' FlowMatchEulerDiscreteScheduler with `shift`.

    Raises ValueError or TypeError, naming the argument.
    """

    alphas_cumprod: Tensor | None  # (T,) in (0, 1], not increasing; the last may be 0, or 2^-24. Kept in float64
    _: KW_ONLY
    prediction_type: str = "epsilon"
    timestep_spacing: str = "leading"
    steps_offset: int = 0
    set_alpha_to_one: bool = True
    clip_sample: bool = False
    clip_sample_range: float = 1.0
    thresholding: bool = False  # takes precedence over clip_sample
    dynamic_thresholding_ratio: float = 0.995
    sample_max_value: float = 1.0
    shift: float = 1.0
    num_train_timesteps: int = 0  # T; 0 stands for the length of alphas_cumprod
    _scheduler: Any = field(default=None, repr=False)  # of diffusers, where the noise levels are its own

    def __post_init__(self) -> None:
        _check_choice("prediction_type", self.prediction_type, PREDICTION_TYPES)
        _check_choice("timestep_spacing", self.timestep_spacing, TIMESTEP_SPACINGS)
        if _integer("steps_offset", self.steps_offset) < 0:
            raise ValueError(f"steps_offset must be >= 0, got {self.steps_offset}")
        for name in ("clip_sample_range", "sample_max_value", "dynamic_thresholding_ratio", "shift"):
            if not 0 < _real(name, getattr(self, name)) < math.inf:
                raise ValueError(f"{name} must be finite and > 0, got {getattr(self, name)}")
        if self.dynamic_thresholding_ratio > 1:
            raise ValueError(f"dynamic_thresholding_ratio must be <= 1, got {self.dynamic_thresholding_ratio}")
        total = _integer("num_train_timesteps", self.num_train_timesteps)
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
        alphas_cumprod = _checked_alphas_cumprod(self.alphas_cumprod)
        if total not in (0, len(alphas_cumprod)):
            raise ValueError(f"num_train_timesteps is {total}, alphas_cumprod has {len(alphas_cumprod)} entries")
        if self._scheduler is not None and self.timestep_spacing == "log_snr":
            raise ValueError("timestep_spacing='log_snr' needs the noise levels of training, not the scheduler's own")
        object.__setattr__(self, "alphas_cumprod", alphas_cumprod)
        object.__setattr__(self, "num_train_timesteps", len(alphas_cumprod))

    @classmethod
    def from_betas(
        cls, betas: Tensor | Sequence[float], *, rescale_betas_zero_snr: bool = False, prediction_type: str = "epsilon",
        timestep_spacing: str = "leading", steps_offset: int = 0, set_alpha_to_one: bool = True,
        clip_sample: bool = False, clip_sample_range: float = 1.0, thresholding: bool = False,
        dynamic_thresholding_ratio: float = 0.995, sample_max_value: float = 1.0,
    ) -> NoiseSchedule:  # fmt: skip
        """alphas_cumprod[t] = prod (1 - betas[:t+1]) for `betas` (T,) in [0, 1], in float32 as networks are trained.

        `rescale_betas_zero_snr` shifts and scales sqrt(abar) so that it ends at 0 (arXiv 2305.08891, algorithm 1).
        """
        betas = torch.as_tensor(betas, dtype=torch.float32, device="cpu")
        if betas.ndim != 1 or not len(betas) or not bool(((betas >= 0) & (betas <= 1)).all()):
            raise ValueError(f"betas must be (T,) with values in [0, 1], got shape {tuple(betas.shape)}")
        if rescale_betas_zero_snr:
            betas = _rescale_zero_terminal_snr(betas)
        return cls(
            torch.cumprod(1.0 - betas, dim=0), prediction_type=prediction_type, timestep_spacing=timestep_spacing,
            steps_offset=steps_offset, set_alpha_to_one=set_alpha_to_one, clip_sample=clip_sample,
            clip_sample_range=clip_sample_range, thresholding=thresholding,
            dynamic_thresholding_ratio=dynamic_thresholding_ratio, sample_max_value=sample_max_value,
        )  # fmt: skip

    @classmethod
    def linear(
        cls, beta_start: float = 1e-4, beta_end: float = 0.02, num_train_timesteps: int = 1000, *,
        rescale_betas_zero_snr: bool = False, prediction_type: str = "epsilon", timestep_spacing: str = "leading",
        steps_offset: int = 0, set_alpha_to_one: bool = True, clip_sample: bool = False,
        clip_sample_range: float = 1.0, thresholding: bool = False, dynamic_thresholding_ratio: float = 0.995,
        sample_max_value: float = 1.0,
    ) -> NoiseSchedule:  # fmt: skip
        """Betas evenly spaced from `beta_start` to `beta_end` (DDPM, arXiv 2006.11239)."""
        ends = (_real("beta_start", beta_start), _real("beta_end", beta_end))
        betas = torch.linspace(*ends, _total(num_train_timesteps), dtype=torch.float32, device="cpu")
        return cls.from_betas(
            betas, rescale_betas_zero_snr=rescale_betas_zero_snr, prediction_type=prediction_type,
            timestep_spacing=timestep_spacing, steps_offset=steps_offset, set_alpha_to_one=set_alpha_to_one,
            clip_sample=clip_sample, clip_sample_range=clip_sample_range, thresholding=thresholding,
            dynamic_thresholding_ratio=dynamic_thresholding_ratio, sample_max_value=sample_max_value,
        )  # fmt: skip

    @classmethod
    def scaled_linear(
        cls, beta_start: float = 0.00085, beta_end: float = 0.012, num_train_timesteps: int = 1000, *,
        rescale_betas_zero_snr: bool = False, prediction_type: str = "epsilon", timestep_spacing: str = "leading",
        steps_offset: int = 0, set_alpha_to_one: bool = True, clip_sample: bool = False,
        clip_sample_range: float = 1.0, thresholding: bool = False, dynamic_thresholding_ratio: float = 0.995,
        sample_max_value: float = 1.0,
    ) -> NoiseSchedule:  # fmt: skip
        """Betas whose square roots are evenly spaced (latent diffusion, arXiv 2112.10752).

        Stable Diffusion 1.x and 2.x also have `steps_offset=1` and `set_alpha_to_one=False`.
        """
        first, last = _real("beta_start", beta_start), _real("beta_end", beta_end)
        if first < 0 or last < 0:
            raise ValueError(f"beta_start and beta_end must be >= 0, got {beta_start} and {beta_end}")
        ends = (first**0.5, last**0.5)
        betas = torch.linspace(*ends, _total(num_train_timesteps), dtype=torch.float32, device="cpu") ** 2
        return cls.from_betas(
            betas, rescale_betas_zero_snr=rescale_betas_zero_snr, prediction_type=prediction_type,
            timestep_spacing=timestep_spacing, steps_offset=steps_offset, set_alpha_to_one=set_alpha_to_one,
            clip_sample=clip_sample, clip_sample_range=clip_sample_range, thresholding=thresholding,
            dynamic_thresholding_ratio=dynamic_thresholding_ratio, sample_max_value=sample_max_value,
        )  # fmt: skip

    @classmethod
    def cosine(
        cls, num_train_timesteps: int = 1000, *, rescale_betas_zero_snr: bool = False,
        prediction_type: str = "epsilon", timestep_spacing: str = "leading", steps_offset: int = 0,
        set_alpha_to_one: bool = True, clip_sample: bool = False, clip_sample_range: float = 1.0,
        thresholding: bool = False, dynamic_thresholding_ratio: float = 0.995, sample_max_value: float = 1.0,
    ) -> NoiseSchedule:  # fmt: skip
        """The squared cosine of arXiv 2102.09672 with betas capped at 0.999 (diffusers: squaredcos_cap_v2)."""
        total = _total(num_train_timesteps)
        level = [math.cos((i / total + 0.008) / 1.008 * math.pi / 2) ** 2 for i in range(total + 1)]
        betas = [min(1 - after / before, 0.999) for before, after in itertools.pairwise(level)]
        return cls.from_betas(
            betas, rescale_betas_zero_snr=rescale_betas_zero_snr, prediction_type=prediction_type,
            timestep_spacing=timestep_spacing, steps_offset=steps_offset, set_alpha_to_one=set_alpha_to_one,
            clip_sample=clip_sample, clip_sample_range=clip_sample_range, thresholding=thresholding,
            dynamic_thresholding_ratio=dynamic_thresholding_ratio, sample_max_value=sample_max_value,
        )  # fmt: skip

    @classmethod
    def flow(cls, shift: float = 1.0, num_train_timesteps: int = 1000) -> NoiseSchedule:
        """Rectified flow: x = (1 - s) x0 + s noise, the model gives noise - x0 and is called with s * T.

        `shift` moves the steps towards the noise, s -> shift s / (1 + (shift - 1) s) (arXiv 2403.03206, eq. 23).
        """
        return cls(None, prediction_type="flow", shift=shift, num_train_timesteps=_total(num_train_timesteps))

    @classmethod
    def from_diffusers(cls, scheduler: Any) -> NoiseSchedule:
        """The schedule of a diffusers scheduler; later changes to the scheduler have no effect.

        A scheduler with `alphas_cumprod` (DDIM, DDPM, PNDM, DPM-Solver, Euler, ..) gives the DDIM chain of its noise
        schedule, prediction type, spacing and offset, whatever its own update rule. An option that it lacks has
        DDIMScheduler's default, except that nothing is clipped unless it says so. FlowMatchEulerDiscreteScheduler gives
        its own chain: `steps(S)` takes its sigmas as they stand if it was set to S timesteps, else those that
        `set_timesteps(S)` gives a copy of it; dynamic shifting needs the first, since only `set_timesteps` knows mu. So
        does a DPMSolverMultistepScheduler with Karras, exponential, beta or lu sigmas.

        Raises ValueError for those sigmas of other schedulers, flow sigmas and continuous timesteps of variance
        preserving ones, lambda_min_clipped, consistency samplers (LCM, TCD) and stochastic or inverted flow matching,
        and TypeError for anything else, such as the EDM schedulers.
        """
        name = type(scheduler).__name__
        config = getattr(scheduler, "config", None)
        if isinstance(config, Mapping) and getattr(scheduler, "alphas_cumprod", None) is not None:
            config, held = own_options(scheduler, config), None
            if is_a(scheduler, "DPMSolverMultistepScheduler") and any(config.get(name) for name in OTHER_LEVELS):
                config, held = config | dict.fromkeys(OTHER_LEVELS), copy.deepcopy(scheduler)
            return cls(scheduler.alphas_cumprod, **variance_preserving_options(name, config), _scheduler=held)
        if isinstance(config, Mapping) and is_a(scheduler, "FlowMatchEulerDiscreteScheduler"):
            refuse_options(name, config, ("invert_sigmas", "stochastic_sampling"))
            total, scheduler = config.get("num_train_timesteps", 1000), copy.deepcopy(scheduler)
            return cls(None, prediction_type="flow", num_train_timesteps=total, _scheduler=scheduler)
        raise TypeError(f"scheduler must have alphas_cumprod or be a FlowMatchEulerDiscreteScheduler, got {name}")

    @property
    def has_spacing(self) -> bool:
        """Whether `timestep_spacing` lays the steps: not of flow matching, nor of a scheduler's own noise levels."""
        return self.prediction_type != "flow" and self._scheduler is None

    def steps(
        self, num_inference_steps: int, eta: float = 0.0, sigma_min: float | None = None, order: int = 1
    ) -> StepTable:
        """The coefficients of a chain of S = `num_inference_steps` steps.

        `eta` scales the noise of each step (arXiv 2010.02502, eq. 16): 0 is DDIM, 1 is like DDPM. `sigma_min` ends the
        chain at that ratio sigma / alpha of noise to signal instead of at the clean sample: at the first timestep t_min
        whose ratio is no less (for flow matching, at that ratio itself). The S steps then lead there from the timestep
        at which the chain would start without it, each from where the one before it ended: evenly spaced in
        log(alpha^2 / sigma^2), as near as whole timesteps can be (as in arXiv 2206.00927). Steps that are even
        in t are so long at the clean end that some images have no start there (docs/inversion.md). The steps of flow
        matching keep their spacing.

        `order` 2 is DPM-Solver++ 2M (arXiv 2211.01095, algorithm 2) for eta 0, and its SDE variant for eta 1: the chain
        of diffusers' DPMSolverMultistepScheduler with solver_order=2 and solver_type="midpoint" (algorithm_type
        "dpmsolver++" and "sde-dpmsolver++"), whose timesteps differ from those of DDIMScheduler: each step leads to the
        next timestep, and `timestep_spacing` lays S + 1 of them of which the last is left out ("leading", "linspace").
        `set_alpha_to_one` stands for final_sigmas_type="zero".

        Raises ValueError or TypeError, naming the argument.
        """
        count, eta = _integer("num_inference_steps", num_inference_steps), _real("eta", eta)
        if not 1 <= count <= self.num_train_timesteps:
            raise ValueError(f"num_inference_steps must be in 1 .. {self.num_train_timesteps}, got {count}")
        if not 0 <= eta < math.inf:
            raise ValueError(f"eta must be finite and >= 0, got {eta}")
        check_order(order)
        if order == 2 and eta not in (0, 1):
            raise ValueError(f"eta must be 0 or 1 with order=2, got {eta}")
        if sigma_min is not None and not 0 < _real("sigma_min", sigma_min) < math.inf:
            raise ValueError(f"sigma_min must be None, or finite and > 0, got {sigma_min}")
        if self.alphas_cumprod is not None:
            return self._variance_preserving_steps(self.alphas_cumprod, count, eta, sigma_min, order)
        if eta > 0:
            raise ValueError(f"eta must be 0 for prediction_type='flow', got {eta}")
        timesteps, sigmas = self._flow_levels(count)
        if sigma_min is not None:
            timesteps, sigmas = end_flow_at(timesteps, sigmas, sigma_min)
        sigma, sigma_next = sigmas[:-1], sigmas[1:]
        return self._table(timesteps, 1 - sigma, sigma, 1 - sigma_next, sigma_next, torch.zeros_like(sigma), order)

    def _variance_preserving_steps(
        self, abar: Tensor, count: int, eta: float, sigma_min: float | None, order: int
    ) -> StepTable:
        if self._scheduler is not None:
            if sigma_min is not None:
                raise ValueError("sigma_min needs the noise levels of training, not the scheduler's own sigmas")
            own, sigmas = self._own_levels(count)
            levels = 1 / (1 + sigmas**2)
            return self._marginal_steps(own, levels[:-1], levels[1:], eta, order)
        total = self.num_train_timesteps
        if self.timestep_spacing == "log_snr":
            timesteps = self._log_snr_timesteps(abar, count)
        else:
            spaced = spaced_timesteps if order == 1 else multistep_timesteps
            timesteps = spaced(self.timestep_spacing, total, count, self.steps_offset)
        if timesteps[0] >= total:
            raise ValueError(
                f"steps_offset={self.steps_offset} with num_inference_steps={count} starts at timestep {timesteps[0]}, "
                f"beyond the last one, {total - 1}"
            )
        if self.timestep_spacing == "log_snr" and not self.set_alpha_to_one:
            following = [*timesteps[1:], 0]
        elif self.timestep_spacing == "log_snr" or order == 2:
            following = [*timesteps[1:], -1]
        else:
            following = [t - total // count for t in timesteps]
        if sigma_min is not None:
            lowest = self._timestep_of(abar, count, timesteps[0], sigma_min)
            chain = even_in_log_snr(abar, count, timesteps[0], lowest)
            timesteps, following = chain[:-1], chain[1:]
        final = abar.new_ones(1) if self.set_alpha_to_one else abar[:1]
        now, after = abar[timesteps], torch.cat([abar, final])[[t if t >= 0 else total for t in following]]
        return self._marginal_steps(torch.tensor(timesteps, device="cpu"), now, after, eta, order)

    def _marginal_steps(self, timesteps: Tensor, now: Tensor, after: Tensor, eta: float, order: int) -> StepTable:
        """The steps from abar = `now` to `after`, (S,) both."""
        if self.prediction_type == "epsilon" and bool((now == 0).any()):
            raise ValueError(
                "prediction_type='epsilon' cannot start at zero terminal SNR (alphas_cumprod = 0), where epsilon says "
                "nothing of x0: use v_prediction, or timestep_spacing='leading'"
            )
        variance = eta**2 * (1 - after) / (1 - now).clamp_min(_TINY) * (1 - now / after)
        if bool((variance > 1 - after + _TINY).any()):
            raise ValueError(f"eta={eta} adds more noise than a step has room for; it is at most 1")
        ends = (now.sqrt(), (1 - now).sqrt(), after.sqrt(), (1 - after).sqrt())
        return self._table(timesteps, *ends, variance.sqrt(), order)

    def _log_snr_timesteps(self, abar: Tensor, count: int) -> list[int]:
        """From T - 1 to 0, whence the last step leads to the clean sample; it ends at 0 without `set_alpha_to_one`."""
        top = self.num_train_timesteps - 1
        if self.set_alpha_to_one:
            return even_in_log_snr(abar, count - 1, top, 0) if count > 1 else [top]
        if count > top:
            raise ValueError(f"num_inference_steps must be in 1 .. {top} without set_alpha_to_one, got {count}")
        return even_in_log_snr(abar, count, top, 0)[:-1]

    def _timestep_of(self, abar: Tensor, count: int, top: int, sigma_min: float) -> int:
        reached = ((1 - abar) >= sigma_min**2 * abar).nonzero()
        lowest = int(reached[0]) if len(reached) else self.num_train_timesteps
        if lowest >= top:
            raise ValueError(f"sigma_min={sigma_min} is not below the noise of the chain's first timestep, {top}")
        if top - lowest < count:
            raise ValueError(
                f"num_inference_steps={count} is more than the {top - lowest} steps that sigma_min={sigma_min} leaves"
            )
        return lowest

    def _own_levels(self, count: int) -> tuple[Tensor, Tensor]:  # (S,), (S+1,) float64
        scheduler = scheduler_at(self._scheduler, count)
        sigmas = scheduler.sigmas.detach().to("cpu", torch.float64)
        if not bool((sigmas[1:] <= sigmas[:-1]).all()) or sigmas[-1] < 0:
            raise ValueError("scheduler.sigmas must descend to no less than 0")
        return scheduler.timesteps.detach().cpu(), sigmas

    def _flow_levels(self, count: int) -> tuple[Tensor, Tensor]:  # (S,) float32, (S+1,) float64
        if self._scheduler is not None:
            timesteps, sigmas = self._own_levels(count)
            if sigmas[0] > 1:
                raise ValueError("scheduler.sigmas must descend within 1 .. 0")
            return timesteps.float(), sigmas
        # the ends are shifted twice, here and with all the others below, as the scheduler does
        total = self.num_train_timesteps
        ends = shifted(torch.tensor([1, total], dtype=torch.float32, device="cpu") / total, self.shift)
        low, high = (s * total for s in ends.tolist())
        levels = high + torch.arange(count, dtype=torch.float64, device="cpu") * ((low - high) / max(count - 1, 1))
        sigmas = shifted(levels / total, self.shift).float()
        return sigmas * total, torch.cat([sigmas.double(), torch.zeros(1, dtype=torch.float64, device="cpu")])

    def _table(
        self,
        timesteps: Tensor,
        alpha: Tensor,
        sigma: Tensor,
        alpha_next: Tensor,
        sigma_next: Tensor,
        n: Tensor,
        order: int,
    ) -> StepTable:
        return StepTable.build(
            self.prediction_type, timesteps, alpha, sigma, alpha_next, sigma_next, n,
            clip_sample_range=self.clip_sample_range if self.clip_sample else None,
            thresholding=(self.dynamic_thresholding_ratio, self.sample_max_value) if self.thresholding else None,
            order=order, lower_order_final=len(timesteps) < _LOWER_ORDER_FINAL,
        )  # fmt: skip


def _rescale_zero_terminal_snr(betas: Tensor) -> Tensor:
    root = torch.cumprod(1.0 - betas, dim=0).sqrt()
    first, last = root[0].clone(), root[-1].clone()
    if first == last:
        raise ValueError("rescale_betas_zero_snr needs betas (T,) with T > 1 and some noise after the first")
    abar = ((root - last) * (first / (first - last))) ** 2
    return 1 - torch.cat([abar[:1], abar[1:] / abar[:-1]])


def _checked_alphas_cumprod(values: Any) -> Tensor:
    if values is None:
        raise TypeError("alphas_cumprod must be a tensor (T,), got None")
    abar = torch.as_tensor(values, device="cpu").detach().to(torch.float64, copy=True)
    if abar.ndim != 1 or not len(abar):
        raise ValueError(f"alphas_cumprod must have shape (T,) with T >= 1, got {tuple(abar.shape)}")
    ordered = abar[:-1] if abar[-1] == _ZERO_SNR else abar
    if not bool((ordered[1:] <= ordered[:-1]).all()):
        raise ValueError("alphas_cumprod must not increase")
    if not 0 < float(abar[0]) <= 1 or not bool((abar[:-1] > 0).all()) or abar[-1] < 0:
        raise ValueError("alphas_cumprod must lie in (0, 1]; only its last entry may be 0")
    return abar


def _check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(choices)}, got {value!r}")


def _integer(name: str, value: Any) -> int:
    try:
        if isinstance(value, bool):
            raise TypeError
        return operator.index(value)
    except TypeError:
        raise TypeError(f"{name} must be an int, got {type(value).__name__}") from None


def _real(name: str, value: Any) -> float:
    if isinstance(value, bool | str):
        raise TypeError(f"{name} must be a number, got {type(value).__name__}")
    try:
        return float(value)
    except TypeError:
        raise TypeError(f"{name} must be a number, got {type(value).__name__}") from None


def _total(value: Any) -> int:
    if _integer("num_train_timesteps", value) < 1:
        raise ValueError(f"num_train_timesteps must be >= 1, got {value}")
    return int(value)
