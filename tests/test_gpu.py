"""Whole solves on a GPU: what the CPU gives, on any stream and device, bit for bit the same again."""

from __future__ import annotations

import pytest
import torch
from asserts import relative_error
from conftest import HAS_CUDA
from torch import Tensor

import deqkern
from deqkern import NoiseSchedule, ops, solvers
from deqkern.solvers.presets import Solver

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not HAS_CUDA, reason="no GPU")]

SCHEDULE = NoiseSchedule.linear()
SHAPE, STEPS = (3, 16, 16), 50  # enough steps to be thinned
SOLVERS = pytest.mark.parametrize(
    "solver",
    [solvers.default(), solvers.parataa(), solvers.deq_ddim(), solvers.picard(window=10), solvers.sequential()],
    ids=lambda solver: solver.name,
)


class Network(torch.nn.Module):
    """A small convolutional denoiser with random weights, smooth enough to converge."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        torch.manual_seed(5)
        self.first, self.last = torch.nn.Conv2d(3, 16, 3, padding=1), torch.nn.Conv2d(16, 3, 3, padding=1)
        self.to(dtype)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        noisy = (t / 1000).view(-1, 1, 1, 1).to(x.dtype)
        return noisy * x + 0.2 * self.last(torch.tanh(self.first(x)))


@pytest.fixture(autouse=True)
def exact_convolutions() -> None:
    torch.backends.cudnn.allow_tf32 = False
    torch.backends.cudnn.deterministic = True


def noises(count: int = 2) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    return torch.randn(count, *SHAPE, generator=generator), torch.randn(STEPS, count, *SHAPE, generator=generator)


def solved(solver: Solver, device: str, eta: float = 0.0, dtype: torch.dtype = torch.float32) -> deqkern.Solution:
    noise, step_noise = noises()
    return deqkern.sample(
        Network(dtype).to(device),
        noise.to(device),
        SCHEDULE,
        STEPS,
        eta=eta,
        step_noise=step_noise.to(device) if eta else None,
        solver=solver,
        rtol=1e-5 if dtype is torch.float32 else 1e-2,
    )


@SOLVERS
@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_sample_gives_what_the_cpu_gives(solver: Solver, eta: float) -> None:
    expected, found = solved(solver, "cpu", eta), solved(solver, "cuda", eta)
    assert relative_error(found.value.cpu(), expected.value).max() <= 1e-4
    assert abs(found.iterations - expected.iterations) <= 1
    assert torch.equal(found.converged.cpu(), expected.converged)


def test_the_kernels_run_and_not_the_reference() -> None:
    report = ops.backends()
    assert report["cuda"]["ops"] == ["anderson_solve"] and not set(ops.CONTRACTS) - {
        *report["triton"]["ops"],
        "anderson_solve",
    }
    with ops.use_backend("cuda", "triton"):
        assert solved(solvers.parataa(), "cuda").converged.all()
        assert solved(solvers.default(), "cuda").converged.all()


@SOLVERS
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_models(solver: Solver, dtype: torch.dtype) -> None:
    found, exact = solved(solver, "cuda", dtype=dtype), solved(solvers.sequential(), "cuda", dtype=dtype)
    assert found.value.dtype is torch.float32
    assert relative_error(found.value, exact.value).max() <= 5e-2


@SOLVERS
def test_the_same_again_bit_for_bit(solver: Solver) -> None:
    first, second = solved(solver, "cuda"), solved(solver, "cuda")
    assert torch.equal(first.trajectory, second.trajectory) and torch.equal(first.history, second.history)


@pytest.mark.parametrize("cuda_graph", [False, True])
def test_another_stream(cuda_graph: bool) -> None:
    """Work that the caller queued on the stream before is seen; the result belongs to the stream."""
    model, (noise, _) = Network().cuda(), noises()
    expected = deqkern.sample(model, noise.cuda(), SCHEDULE, STEPS, rtol=1e-4).value
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(20_000_000)
        late = noise.pin_memory().to("cuda", non_blocking=True)
        found = deqkern.sample(model, late, SCHEDULE, STEPS, rtol=1e-4, cuda_graph=cuda_graph).value
    stream.synchronize()
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one GPU")
@pytest.mark.parametrize("cuda_graph", [False, True])
def test_a_second_device(cuda_graph: bool) -> None:
    noise, _ = noises()
    expected = deqkern.sample(Network().to("cuda:0"), noise.to("cuda:0"), SCHEDULE, STEPS, rtol=1e-4).value
    found = deqkern.sample(
        Network().to("cuda:1"), noise.to("cuda:1"), SCHEDULE, STEPS, rtol=1e-4, cuda_graph=cuda_graph
    ).value
    assert found.device == torch.device("cuda:1") and torch.cuda.current_device() == 0
    torch.testing.assert_close(found.cpu(), expected.cpu(), rtol=1e-4, atol=1e-4)


def test_inversion() -> None:
    model, (noise, _) = Network().cuda(), noises()
    made = deqkern.sample(model, noise.cuda(), SCHEDULE, STEPS, sigma_min=0.08, rtol=0.0).value
    found = deqkern.invert(model, made, SCHEDULE, STEPS, rtol=1e-5, round_trip=True)
    assert found.converged.all() and found.round_trip is not None and found.round_trip.max() <= 1e-4


def test_a_model_that_gives_nan_is_named() -> None:
    def model(x: Tensor, t: Tensor) -> Tensor:
        return torch.where((t == t.min()).view(-1, 1, 1, 1), torch.nan, 0.1 * x)

    with pytest.raises(ValueError, match="NaN or infinity at iteration 1"):
        deqkern.sample(model, noises()[0].cuda(), SCHEDULE, STEPS)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_step_noise_from_a_generator_on_either_device(device: str) -> None:
    noise = noises()[0].cuda()
    first, second = (
        deqkern.sample(
            Network().cuda(), noise, SCHEDULE, 10, eta=1.0, generator=torch.Generator(device).manual_seed(1)
        ).value
        for _ in range(2)
    )
    assert torch.equal(first, second)


@pytest.mark.parametrize("solver", [solvers.anderson(), solvers.picard()], ids=lambda solver: solver.name)
def test_fixed_points_and_their_gradients_are_those_of_the_cpu(solver: Solver) -> None:
    generator = torch.Generator().manual_seed(4)
    weight, x = 0.05 * torch.randn(64, 64, generator=generator), torch.randn(5, 64, generator=generator)
    found: dict[str, tuple[Tensor, Tensor]] = {}
    for device in ("cpu", "cuda"):
        held, injected = weight.to(device).requires_grad_(), x.to(device)
        solution = deqkern.fixed_point(
            lambda z: torch.tanh(z @ held + injected),  # noqa: B023
            torch.zeros_like(injected),
            solver=solver,
            rtol=1e-5,
        )
        assert solution.converged.all() and solution.value.device.type == device
        (grad,) = torch.autograd.grad(solution.value.square().sum(), held)
        found[device] = solution.value.detach().cpu(), grad.cpu()
    for cpu, cuda in zip(*found.values(), strict=True):
        assert relative_error(cuda, cpu).max() <= 1e-3
