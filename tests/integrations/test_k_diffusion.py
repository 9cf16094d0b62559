"""`sample_deq` against k-diffusion's Euler loop, written from its definition."""

from __future__ import annotations

import importlib.util
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import problems
import pytest
import torch
from asserts import relative_error
from torch import Tensor

import deqkern
from deqkern import NoiseSchedule, models, solvers
from deqkern.integrations.k_diffusion import sample_deq

SHAPE = (3, 8, 8)
Denoiser = Callable[..., Tensor]


def euler(model: Denoiser, x: Tensor, sigmas: Tensor, extra_args: dict[str, Any] | None = None) -> list[dict[str, Any]]:
    """k-diffusion's `sample_euler`: what its callback sees at each step, and last the result."""
    seen = []
    for i in range(len(sigmas) - 1):
        denoised = model(x, sigmas[i] * x.new_ones(len(x)), **(extra_args or {}))
        seen.append({"x": x, "i": i, "sigma": sigmas[i], "sigma_hat": sigmas[i], "denoised": denoised})
        x = x + (x - denoised) / sigmas[i] * (sigmas[i + 1] - sigmas[i])
    return [*seen, {"x": x}]


def dpmpp_2m(model: Denoiser, x: Tensor, sigmas: Tensor) -> Tensor:
    """k-diffusion's `sample_dpmpp_2m`: its result."""
    before = None
    for i in range(len(sigmas) - 1):
        denoised = model(x, sigmas[i] * x.new_ones(len(x)))
        bent, h = denoised, (sigmas[i] / sigmas[i + 1]).log()
        if before is not None and sigmas[i + 1] > 0:
            r = (sigmas[i - 1] / sigmas[i]).log() / h
            bent = (1 + 1 / (2 * r)) * denoised - 1 / (2 * r) * before
        x, before = sigmas[i + 1] / sigmas[i] * x - torch.expm1(-h) * bent, denoised
    return x


def karras(steps: int, low: float = 0.02, high: float = 80.0, rho: float = 7.0) -> Tensor:
    """Descending noise levels and a final 0 (arXiv 2206.00364, eq. 5)."""
    part = torch.linspace(0, 1, steps)
    return torch.cat([(high ** (1 / rho) + part * (low ** (1 / rho) - high ** (1 / rho))) ** rho, torch.zeros(1)])


class Convolutions(torch.nn.Module):
    """x / (1 + sigma^2) plus a small network, moved by a condition (N,) and a mask (N, *shape)."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = torch.nn.Conv2d(3, 8, 3, padding=1), torch.nn.Conv2d(8, 3, 3, padding=1)

    @torch.no_grad()
    def forward(self, x: Tensor, sigma: Tensor, shift: Tensor | float = 0.0, mask: Tensor | None = None) -> Tensor:
        s = sigma.view(-1, 1, 1, 1)
        shift = shift.view(-1, 1, 1, 1) if isinstance(shift, Tensor) else shift
        scaled = x / (1 + s**2).sqrt()
        denoised = x / (1 + s**2) + s / (1 + s) * self.last(torch.tanh(self.first(scaled) + shift))
        return denoised if mask is None else denoised * mask


def mixture() -> Denoiser:
    exact = problems.mixture(NoiseSchedule.linear(), SHAPE, torch.Generator().manual_seed(1))
    return lambda x, sigma: exact.denoise(x.flatten(1), torch.ones(len(x), 1), sigma[:, None]).view_as(x)


def digits() -> tuple[Denoiser, Tensor]:
    """The shipped model as a denoiser of x0 + sigma eps, and the noise levels of 20 of its timesteps with a final 0."""
    loaded = models.load("digits")
    assert loaded.schedule.alphas_cumprod is not None
    levels = (1 / loaded.schedule.alphas_cumprod - 1).sqrt().float()

    @torch.no_grad()
    def denoise(x: Tensor, sigma: Tensor) -> Tensor:
        column, t = sigma.view(-1, 1, 1, 1), torch.searchsorted(levels, sigma * (1 - 1e-6))
        return x - column * loaded.model(x / (1 + column**2).sqrt(), t).sample

    return denoise, torch.cat([levels[torch.arange(950, -1, -50)], torch.zeros(1)])


def problem(kind: str, steps: int) -> tuple[Denoiser, Tensor, tuple[int, ...]]:
    """A denoiser, noise levels and the shape of a sample; the digits come with 20 levels of their own."""
    if kind == "digits":
        return *digits(), models.load("digits").shape
    return Convolutions() if kind == "convolutions" else mixture(), karras(steps), SHAPE


@pytest.mark.parametrize("kind", ["convolutions", "mixture", "digits"])
def test_equals_the_sequential_loop(kind: str) -> None:
    model, sigmas, shape = problem(kind, 30)
    x = torch.randn(2, *shape) * sigmas[0]
    expected = euler(model, x, sigmas)[-1]["x"]
    for rtol, bar in ((0.0, 1e-5), (1e-4, 2e-3)):
        found = sample_deq(model, x, sigmas, disable=True, rtol=rtol)
        assert found.dtype == x.dtype and relative_error(found, expected).max() <= bar, rtol


@pytest.mark.parametrize("end", ["zero", "noisy"])
@pytest.mark.parametrize("kind", ["convolutions", "mixture", "digits"])
def test_second_order_equals_the_sequential_loop(kind: str, end: str) -> None:
    model, sigmas, shape = problem(kind, 20)
    sigmas = sigmas if end == "zero" else sigmas[:-2]
    x, seen = torch.randn(2, *shape) * sigmas[0], []
    expected = dpmpp_2m(model, x, sigmas)
    for rtol, bar in ((0.0, 1e-5), (1e-4, 2e-3)):
        found = sample_deq(model, x, sigmas, None, seen.append, disable=True, order=2, rtol=rtol)
        assert relative_error(found, expected).max() <= bar, rtol
    last = seen[-1]
    if end == "zero":
        assert relative_error(last["denoised"], found).max() <= 1e-6
    else:  # what the last step took for it leads from its state to the result
        ratio = sigmas[-1] / sigmas[-2]
        assert relative_error(ratio * last["x"] + (1 - ratio) * last["denoised"], found).max() <= 1e-5


def test_second_order_needs_sigmas_that_fall() -> None:
    with pytest.raises(ValueError, match="sigmas must be finite and fall"):
        sample_deq(Convolutions(), torch.randn(1, *SHAPE), torch.tensor([3.0, 1.0, 1.0, 0.0]), order=2)
    with pytest.raises(ValueError, match="order must be 1 or 2"):
        sample_deq(Convolutions(), torch.randn(1, *SHAPE), karras(5), order=3)


def test_other_solvers() -> None:
    model, sigmas = Convolutions(), karras(12)
    x = torch.randn(3, *SHAPE) * sigmas[0]
    expected = euler(model, x, sigmas)[-1]["x"]
    for solver in (solvers.sequential(), solvers.picard(), solvers.parataa()):
        assert relative_error(sample_deq(model, x, sigmas, solver=solver, rtol=0), expected).max() <= 1e-5


def test_conditions_are_repeated_and_batches_cut() -> None:
    model, sigmas, rows = Convolutions(), karras(12), []
    x, mask = torch.randn(3, *SHAPE) * 80, (torch.rand(3, *SHAPE) > 0.5).float()
    arguments = {"shift": torch.tensor([-1.0, 0.0, 1.0]), "mask": mask}

    def counted(x: Tensor, sigma: Tensor, **extra: Any) -> Tensor:
        rows.append(len(x))
        assert sigma.shape == (len(x),) and sigma.dtype == x.dtype
        return model(x, sigma, **extra)

    expected = euler(model, x, sigmas, arguments)[-1]["x"]
    found = sample_deq(counted, x, sigmas, arguments, rtol=0, max_batch=7)
    assert relative_error(found, expected).max() <= 1e-5 and max(rows) == 7


@pytest.mark.parametrize("end", [0.0, 0.5])
def test_the_callback_ends_at_what_that_of_the_loop_ends_at(end: float) -> None:
    """Also a chain that ends with some noise left, and equal levels in it."""
    model, x, seen = Convolutions(), torch.randn(2, *SHAPE) * 10, []
    sigmas = torch.tensor([10.0, 6.0, 6.0, 3.0, 1.0, end])
    found = sample_deq(model, x, sigmas, None, seen.append, True, rtol=0)
    *expected, result = euler(model, x, sigmas)
    assert relative_error(found, result["x"]).max() <= 1e-5
    assert [entry["i"] for entry in seen] == list(range(len(seen))) and len(seen) <= 5
    assert set(seen[0]) == {"x", "i", "sigma", "sigma_hat", "denoised"}
    assert seen[-1]["sigma"] == seen[-1]["sigma_hat"] == 1.0
    for key in ("x", "denoised"):
        assert relative_error(seen[-1][key], expected[-1][key]).max() <= 1e-5, key


def test_the_callback_of_a_last_step_that_does_not_move() -> None:
    """What it took for the clean sample is not in its ends."""
    sigmas, seen = torch.tensor([10.0, 3.0, 1.0, 1.0]).requires_grad_(), []
    with warnings.catch_warnings(action="error"):
        found = sample_deq(Convolutions(), torch.randn(2, *SHAPE) * 10, sigmas, None, seen.append, True, rtol=0)
    assert not found.requires_grad and found.isfinite().all()
    assert torch.equal(seen[-1]["denoised"], found) and torch.equal(seen[-1]["x"], found)


def test_half_precision_and_double() -> None:
    """The model gets x and sigma in the dtype of x, whatever its parameters are."""
    model, sigmas = Convolutions(), karras(8)
    x = torch.randn(2, *SHAPE).bfloat16() * 80

    def wide(x: Tensor, sigma: Tensor) -> Tensor:
        assert x.dtype == sigma.dtype == torch.bfloat16
        return model(x.float(), sigma.float()).bfloat16()

    assert sample_deq(wide, x, sigmas).dtype == torch.bfloat16
    model = Convolutions().double()
    x64 = torch.randn(2, *SHAPE, dtype=torch.float64) * 80
    expected = euler(model, x64, sigmas.double())[-1]["x"]
    assert relative_error(sample_deq(model, x64, sigmas.double(), rtol=0), expected).max() <= 1e-12


def test_the_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    """It counts settled steps, gets `disable` as it is, is closed, and is not missed."""
    made: list[Any] = []

    class Bar:
        def __init__(self, total: int, disable: bool | None) -> None:
            self.total, self.disable, self.n, self.closed, self.seen = total, disable, 0, False, list[int]()
            made.append(self)

        def update(self, count: int) -> None:
            self.n += count
            self.seen.append(self.n)

        def close(self) -> None:
            self.closed = True

    fake = ModuleType("tqdm.auto")
    fake.tqdm = Bar  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "tqdm.auto", fake)
    x, sigmas = torch.randn(2, *SHAPE) * 80, karras(6)
    sample_deq(Convolutions(), x, sigmas, disable=True)
    assert not made
    sample_deq(Convolutions(), x, sigmas)
    assert [(bar.total, bar.disable, bar.n, bar.closed) for bar in made] == [(6, None, 6, True)]
    with pytest.raises(InterruptedError):
        sample_deq(Convolutions(), x, sigmas, None, interrupt, False)
    assert made[-1].closed
    x[1] = 0  # settled at once, but the other is not
    sample_deq(lambda x, sigma: torch.tanh(x), x.requires_grad_(), sigmas, disable=False, rtol=0)
    assert made[-1].seen[0] == 1 and made[-1].seen[-1] == 6
    monkeypatch.setitem(sys.modules, "tqdm.auto", None)
    sample_deq(Convolutions(), x, sigmas, disable=False)


def interrupt(entry: dict[str, Any]) -> None:
    raise InterruptedError


def test_a_guided_model_keeps_its_conditions() -> None:
    model, x, sigmas = Convolutions(), torch.randn(2, *SHAPE) * 80, karras(6)
    shift = torch.tensor([1.0, 2.0])
    guided = deqkern.guided(model, 3.0, {"shift": shift}, {"shift": torch.zeros(1)})
    expected = euler(lambda x, s: 3 * model(x, s, shift) - 2 * model(x, s), x, sigmas)[-1]["x"]
    assert relative_error(sample_deq(guided, x, sigmas, rtol=0), expected).max() <= 1e-5


@pytest.mark.parametrize(
    ("change", "error", "name"),
    [
        ({"sigmas": [1.0, 0.0]}, TypeError, "sigmas"),
        ({"sigmas": torch.tensor([1, 0])}, TypeError, "sigmas"),
        ({"sigmas": torch.tensor([1.0])}, ValueError, "sigmas"),
        ({"sigmas": torch.tensor([1.0, 2.0, 0.0])}, ValueError, "sigmas"),
        ({"sigmas": torch.tensor([1.0, 0.0, 0.0])}, ValueError, "sigmas"),
        ({"sigmas": torch.tensor([torch.nan, 0.0])}, ValueError, "sigmas"),
        ({"sigmas": torch.tensor([torch.inf, 1.0])}, ValueError, "sigmas"),
        ({"sigmas": torch.tensor([1.0, -0.5])}, ValueError, "sigmas"),
        ({"x": torch.zeros(2)}, ValueError, "x must"),
        ({"extra_args": [1]}, TypeError, "extra_args"),
        ({"callback": 1}, TypeError, "callback"),
        ({"rtol": -1.0}, ValueError, "rtol"),
        ({"solver": "euler"}, TypeError, "solver"),
        ({"max_batch": 0}, ValueError, "max_batch"),
    ],
)
def test_bad_arguments(change: dict[str, Any], error: type[Exception], name: str) -> None:
    def untouched(x: Tensor, sigma: Tensor) -> Tensor:
        raise AssertionError("the model was called")

    arguments = {"x": torch.randn(2, *SHAPE), "sigmas": karras(4)} | change
    with pytest.raises(error, match=name):
        sample_deq(untouched, **arguments)


def test_not_converged_is_one_warning_at_the_caller() -> None:
    with pytest.warns(deqkern.ConvergenceWarning) as caught:
        sample_deq(mixture(), torch.randn(2, *SHAPE) * 80, karras(20), max_iterations=2)
    assert len(caught) == 1 and caught[0].filename == __file__


def test_the_comfyui_node(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a stand-in for ComfyUI: the file loads without it, and hands it a function of its convention."""
    path = Path(__file__).resolve().parents[2] / "examples/comfyui/deqkern_sampler.py"
    spec = importlib.util.spec_from_file_location("deqkern_sampler", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    comfy, samplers = ModuleType("comfy"), ModuleType("comfy.samplers")
    comfy.samplers = samplers  # type: ignore[attr-defined]
    samplers.KSAMPLER = lambda function, options: SimpleNamespace(f=function, o=options)  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "comfy", comfy)
    monkeypatch.setitem(sys.modules, "comfy.samplers", samplers)
    node = module.NODE_CLASS_MAPPINGS["DeqkernSampler"]
    options = {name: entry[1]["default"] for name, entry in node.INPUT_TYPES()["required"].items()}
    (made,) = getattr(node(), node.FUNCTION)(**options)
    model, sigmas, x = Convolutions(), karras(6), torch.randn(2, *SHAPE) * 80
    expected = euler(model, x, sigmas)[-1]["x"]
    assert relative_error(made.f(model, x, sigmas, {}, None, True, **made.o), expected).max() <= 2e-2
    (second,) = getattr(node(), node.FUNCTION)(**options | {"sampler_name": "dpmpp_2m"})
    expected = dpmpp_2m(model, x, sigmas)
    assert relative_error(second.f(model, x, sigmas, {}, None, True, **second.o), expected).max() <= 2e-2
    with pytest.raises(ValueError, match="mask"):
        made.f(model, x, sigmas, {"denoise_mask": torch.ones_like(x)}, None, True, **made.o)
