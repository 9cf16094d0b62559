"""Gradients that go back through a chain step by step, by a reverse recurrence: exact, or AdjointDEIS."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ..chain.step_table import StepTable
from .linearized import LinearizedChain, Pulled

_NO_NOISE = 1e-9  # an end of a step with less has no log-SNR to speak of
_LONGEST = math.log(1.5)  # dP/dl = kappa P with kappa <= 1: constant over a longer step, V overshoots


@dataclass(frozen=True)
class Recurrence:
    """The coefficients of a reverse recurrence, one per step:

    lam[i] = keep[i] lam[i+1] + current[i] v + previous[i] (the v of the step before), v = of_lam[i] lam[i+1] +
    of_vjp[i] p, with the VJP p = J^T (lam[i+1] + lag[i] lam[i+2]) of the model at the state place[i].
    """

    place: list[int]  # the state, and the timestep, where J is taken
    of_lam: list[float]
    of_vjp: list[float]
    keep: list[float]
    current: list[float]
    previous: list[float]
    weight: list[float]  # of (d out / d theta)^T (lam[i+1] + lag[i] lam[i+2])
    lag: list[float]

    def pull_back(self, chain: LinearizedChain, cotangent: Tensor) -> Pulled:
        """The gradients of an explicit chain, with S VJPs of B rows."""
        lam, v = cotangent, torch.zeros_like(cotangent)
        lam_before = v
        noise = cotangent.new_empty(chain.steps, *cotangent.shape) if chain.with_noise else None
        for i in reversed(range(chain.steps)):
            if noise is not None:
                noise[i] = float(chain.table.n[i]) * lam
            pushed = lam + self.lag[i] * lam_before if self.lag[i] else lam
            through = chain.vjp(self.place[i], pushed, weight=self.weight[i])
            v_before, v = v, self.of_lam[i] * lam + self.of_vjp[i] * through
            lam_before = lam
            lam = self.keep[i] * lam + self.current[i] * v + self.previous[i] * v_before
        return chain.pulled(lam, noise, vjps=chain.steps)


def exact_recurrence(table: StepTable) -> Recurrence:
    """lam[i] = (a[i] + b[i] J[i]^T) lam[i+1], with the c of order 2."""
    steps = len(table.a)
    return Recurrence(
        place=list(range(steps)),
        of_lam=[0.0] * steps,
        of_vjp=[1.0] * steps,
        keep=table.a.tolist(),
        current=table.b.tolist(),
        previous=[0.0] * steps,
        weight=table.b.tolist(),
        lag=[*(table.c[1:] / table.b[:-1]).tolist(), 0.0] if table.order == 2 else [0.0] * steps,
    )


def adjoint_recurrence(table: StepTable, order: int) -> Recurrence:
    """With s the noisy and t the clean end of step i, r the end t before, h = l_s - l_t < 0, c = 1 + eta^2:

    alpha_s lam_s = alpha_t lam_t + c (E1 V_t + E2 (V_t - V_r) / (l_t - l_r)),     V_t = alpha_t^2 J_eps(x_t)^T lam_t,
    E1 = int e^-l dl = e^-l_t - e^-l_s,               E2 = int e^-l (l - l_t) dl = e^-l_t (1 - (1 + h) e^-h).

    A step with h < -log 1.5 is the exact one.
    """
    recurrence = exact_recurrence(table)
    det = table.alpha * table.w - table.sigma * table.u
    of_x, of_out = (-table.u / det).tolist(), (table.alpha / det).tolist()  # eps = of_x x + of_out out
    alpha, sigma, alpha_next, sigma_next, n = (
        v.tolist() for v in (table.alpha, table.sigma, table.alpha_next, table.sigma_next, table.n)
    )
    last: tuple[float, float] | None = None  # l_r, and the factor from V_r to what weighs (d out / d theta)^T lam_r
    for i in reversed(range(len(alpha) - 1)):
        if alpha[i] in (0, alpha_next[i]) or sigma_next[i] <= _NO_NOISE:
            last = None
            continue
        level, level_s = math.log(alpha_next[i] / sigma_next[i]), math.log(alpha[i] / sigma[i])
        h = level_s - level
        if h < -_LONGEST:
            last = None
            continue
        ddpm = (sigma_next[i] / sigma[i]) ** 2 * (1 - (alpha[i] / alpha_next[i]) ** 2)
        drift = 1 + n[i] ** 2 / ddpm
        first = drift * (math.exp(-level) - math.exp(-level_s))
        second = 0.0
        theta = alpha_next[i] * of_out[i + 1]
        if order == 2 and last is not None:
            second = drift * math.exp(-level) * (1 - (1 + h) * math.exp(-h)) / (level - last[0])
            recurrence.weight[i + 1] -= second * last[1]
        recurrence.place[i] = i + 1
        recurrence.of_lam[i], recurrence.of_vjp[i] = (
            alpha_next[i] ** 2 * of_x[i + 1],
            alpha_next[i] ** 2 * of_out[i + 1],
        )
        recurrence.keep[i] = alpha_next[i] / alpha[i]
        recurrence.current[i], recurrence.previous[i] = (first + second) / alpha[i], -second / alpha[i]
        recurrence.weight[i] = (first + second) * theta
        last = (level, theta)
    return recurrence
