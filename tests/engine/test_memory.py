"""The memory of `sample`: what a solve holds at its peak, and that its iterations allocate no states.

Torch's own allocator is watched, so temporary memory inside an op counts as well. The model allocates nothing itself.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile, record_function

import deqkern
from deqkern import NoiseSchedule, solvers
from deqkern.solvers.presets import Solver

SCHEDULE = NoiseSchedule.linear()
STEPS, BATCH, SHAPE = 12, 3, (3, 48, 48)
STATE = 4 * BATCH * 3 * 48 * 48  # bytes of B D floats, three samples
ITERATIONS = 6
THINNED = replace(solvers.default(window=None, thinning=2.0), name="thinned")
SOLVERS = (solvers.default(), THINNED, solvers.parataa(), solvers.deq_ddim(), solvers.picard())


class Denoiser(torch.nn.Module):
    """The Wiener filter of data with variance 1/4, bent by a sine, computed in memory of its own."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.scale = torch.nn.Parameter(torch.ones((), dtype=dtype))  # by which `sample` knows the dtype
        assert SCHEDULE.alphas_cumprod is not None
        abar = SCHEDULE.alphas_cumprod
        self.gain = ((1 - abar).sqrt() / (abar / 4 + 1 - abar)).to(dtype)
        self.output = torch.empty(STEPS * BATCH, *SHAPE, dtype=dtype)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        with record_function("model"):
            output = torch.sin(x, out=self.output[: len(x)])
            return output.mul_(0.1).add_(x).mul_(self.gain[t].view(-1, 1, 1, 1))


@dataclass(frozen=True)
class Record:
    """peak: bytes. allocations: (model calls so far, bytes, what torch was doing) of each, in order."""

    peak: int
    allocations: list[tuple[int, int, str]]
    calls: int


def record(solver: Solver, eta: float, dtype: torch.dtype = torch.float32) -> Record:
    """Run `sample` for some iterations and watch the allocator."""
    model, noise = Denoiser(dtype), torch.randn(BATCH, *SHAPE)
    step_noise = torch.randn(STEPS, BATCH, *SHAPE) if eta else None
    with warnings.catch_warnings(), profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        warnings.simplefilter("ignore", deqkern.ConvergenceWarning)
        solution = deqkern.sample(
            model,
            noise,
            SCHEDULE,
            STEPS,
            eta=eta,
            solver=solver,
            rtol=0.0,
            max_iterations=ITERATIONS,
            step_noise=step_noise,
        )
    live, peak, calls, doing, allocations = 0, 0, 0, "", []
    for event in sorted(profiler.profiler.kineto_results.events(), key=lambda event: event.start_ns()):
        if event.name() == "[memory]":
            live += event.nbytes()
            peak = max(peak, live)
            if event.nbytes() > 0:
                allocations.append((calls, event.nbytes(), doing))
        else:
            doing = event.name()
            calls += doing == "model"
    assert calls == solution.iterations
    return Record(peak, allocations, calls)


@pytest.mark.parametrize("eta", [0.0, 1.0])
@pytest.mark.parametrize("solver", SOLVERS, ids=lambda solver: solver.name)
def test_peak_is_2m_plus_6_times_all_states(solver: Solver, eta: float) -> None:
    """States, step noise and the model's input included. With step noise the known first state is counted too."""
    states = STEPS + 1 if eta else STEPS
    found, allowed = record(solver, eta), (2 * solver.history_size + 6) * states * STATE
    assert found.peak >= 4 * STEPS * STATE, "the allocator was not watched"
    assert found.peak <= allowed, (
        f"{found.peak / STEPS / STATE:.2f} S B D floats, allowed {allowed / STEPS / STATE:.2f}"
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("eta", [0.0, 1.0])
@pytest.mark.parametrize("solver", SOLVERS, ids=lambda solver: solver.name)
def test_iterations_allocate_no_states(solver: Solver, eta: float, dtype: torch.dtype) -> None:
    """From the second model call to the last one, nothing as large as half of one state, which has three samples."""
    found = record(solver, eta, dtype)
    assert found.calls >= 4
    large = [
        (calls, size / STATE, doing)
        for calls, size, doing in found.allocations
        if 2 <= calls < found.calls and size >= STATE / 2
    ]
    assert not large, f"(model calls before it, B D floats, op): {large}"
