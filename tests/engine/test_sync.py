"""Inside an iteration nothing waits for the device: neither a tensor's value nor a size that depends on one is read.

Without a GPU every torch op that an iteration runs is looked at; with one, CUDA itself raises when something waits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
from conftest import HAS_CUDA
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import deqkern
from deqkern import NoiseSchedule, solvers
from deqkern.engine.iteration import Iteration
from deqkern.solvers.presets import Solver

SHAPE = (3, 8, 8)
WAITS = {"_local_scalar_dense", "is_nonzero", "nonzero", "masked_select", "_unique2", "unique_dim", "equal", "item"}
SCHEDULES = {
    "plain": NoiseSchedule.linear(),
    "clip": NoiseSchedule.linear(clip_sample=True),
    "threshold": NoiseSchedule.linear(thresholding=True),
}


class NoWaiting(TorchDispatchMode):
    """Raises where a CUDA tensor's contents would have to come to the host."""

    def __init__(self) -> None:
        super().__init__()
        self.seen = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        self.seen += 1
        name = func._schema.name.partition("::")[2]
        indices = args[1] if name.startswith("index") and isinstance(args[1], list | tuple) else ()
        masked = any(isinstance(index, Tensor) and index.dtype is torch.bool for index in indices)
        if name in WAITS or masked:
            raise AssertionError(f"{func} waits for the device")
        return func(*args, **(kwargs or {}))


@contextmanager
def watched(device: torch.device) -> Iterator[None]:
    if device.type == "cuda":
        torch.cuda.set_sync_debug_mode("error")
        try:
            yield
        finally:
            torch.cuda.set_sync_debug_mode("default")
    else:
        with NoWaiting() as mode:
            yield
        assert mode.seen > 5


@pytest.fixture
def iterations(monkeypatch: pytest.MonkeyPatch, device: torch.device) -> list[int]:
    """The iterations that were run and watched; the first may compile kernels."""
    done: list[int] = []
    run: Callable[..., None] = Iteration.run

    def watched_run(self: Iteration, k: int, *arguments: Any) -> None:
        if k == 0 and device.type == "cuda":
            return run(self, k, *arguments)
        with watched(device):
            run(self, k, *arguments)
        done.append(k)

    monkeypatch.setattr(Iteration, "run", watched_run)
    return done


class Denoiser(torch.nn.Module):
    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.gain = torch.nn.Parameter(torch.tensor(0.3, dtype=dtype))

    def forward(self, x: Tensor, t: Tensor, shift: Tensor) -> Tensor:
        return self.gain * torch.sin(x) + shift.to(x.dtype)[:, None, None, None] * (t / 1000).view(-1, 1, 1, 1).to(x)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("eta", [0.0, 1.0])
@pytest.mark.parametrize(("schedule", "order"), [*[(name, 1) for name in SCHEDULES], ("plain", 2)])
@pytest.mark.parametrize(
    "solver",
    [
        solvers.default(),
        replace(solvers.default(window=None, thinning=2.0), name="thinned"),
        solvers.parataa(),
        solvers.deq_ddim(),
        solvers.picard(window=4),
    ],
    ids=lambda s: s.name,
)
def test_an_iteration_never_waits(
    iterations: list[int],
    solver: Solver,
    schedule: str,
    order: int,
    eta: float,
    dtype: torch.dtype,
    device: torch.device,
) -> None:
    model = Denoiser(dtype).to(device)
    solution = deqkern.sample(
        model,
        torch.randn(2, *SHAPE, device=device),
        SCHEDULES[schedule],
        10,
        eta=eta,
        order=order,
        solver=solver,
        rtol=0.0,
        max_batch=7,
        model_kwargs={"shift": torch.tensor([0.1, -0.1], device=device)},
    )
    assert len(iterations) >= solution.iterations - 1 >= 1


def test_the_watch_sees_a_model_that_waits(iterations: list[int]) -> None:
    if HAS_CUDA:
        pytest.skip("this is of the watch without a GPU")

    def model(x: Tensor, t: Tensor) -> Tensor:
        return x * float(t.sum().item())

    with pytest.raises(AssertionError, match="waits for the device"):
        deqkern.sample(model, torch.randn(1, *SHAPE), SCHEDULES["plain"], 10)
