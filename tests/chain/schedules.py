"""Noise schedules, and the schedulers of diffusers that they are compared with."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

from deqkern.chain.schedule import NoiseSchedule, StepTable

SPACINGS = ("leading", "linspace", "trailing")
PREDICTIONS = ("epsilon", "v_prediction", "sample")
TRAINED_BETAS = (1e-4 + 0.02 * torch.linspace(0, 1, 100) ** 1.5).tolist()
KINDS: dict[str, dict[str, Any]] = {  # DDIMScheduler's arguments
    "linear": {"beta_start": 1e-4, "beta_end": 0.02, "beta_schedule": "linear"},
    "scaled_linear": {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"},
    "cosine": {"beta_schedule": "squaredcos_cap_v2"},
    "trained": {"trained_betas": TRAINED_BETAS, "num_train_timesteps": len(TRAINED_BETAS)},
}
CLIPPING: tuple[dict[str, Any], ...] = (
    {"clip_sample": False},
    {"clip_sample": True, "clip_sample_range": 1.0},
    {"clip_sample": True, "clip_sample_range": 0.7},
    {"clip_sample": True, "thresholding": True, "dynamic_thresholding_ratio": 0.9, "sample_max_value": 1.5},
)
# offset, alpha to one, eta, steps (999 stands for T - 1, 1000 for T), clipping
CHAINS = list(itertools.product((0, 1), (True, False), (0.0, 0.5, 1.0), (1, 7, 20, 50, 100, 999, 1000), CLIPPING))
CASES = list(itertools.product(KINDS, SPACINGS, PREDICTIONS, (False, True)))
SHAPE = (2, 3, 4, 4)


def make(kind: str, **options: Any) -> NoiseSchedule:
    if kind == "trained":
        return NoiseSchedule.from_betas(TRAINED_BETAS, **options)
    constructors = {
        "linear": NoiseSchedule.linear,
        "scaled_linear": NoiseSchedule.scaled_linear,
        "cosine": NoiseSchedule.cosine,
    }
    return constructors[kind](**options)


def ddim(kind: str, **options: Any) -> Any:
    return pytest.importorskip("diffusers").DDIMScheduler(**KINDS[kind], **options)


def chain_step(table: StepTable, i: int, x: Tensor, out: Tensor, z: Tensor) -> Tensor:
    if table.clips:
        out = table.effective_output(x, out, torch.full((len(x),), i))
    a, b, n = (v[i].to(x.dtype) for v in (table.a, table.b, table.n))
    return a * x + b * out + n * z


def relative(value: Tensor, expected: Tensor) -> float:
    return float((value.double() - expected.double()).norm() / expected.double().norm())
