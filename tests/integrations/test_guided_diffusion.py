"""The DDIM loops of guided-diffusion against the same steps one by one, written from the papers' equations."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from asserts import relative_error
from torch import Tensor

import deqkern
from deqkern import NoiseSchedule, models
from deqkern.integrations import guided_diffusion
from deqkern.integrations.guided_diffusion import (
    ddim_reverse_sample_loop,
    ddim_sample_loop,
    ddim_sample_loop_progressive,
)

SHAPE, STEPS = (3, 8, 8), 20
ABAR = NoiseSchedule.linear().alphas_cumprod
CLASSES = torch.tensor([0, 2, 1])


def diffusion(spaced: bool = True, rescale: bool = False, mean_type: str = "EPSILON", abar: Any = ABAR) -> Any:
    """A stand-in with the attributes of `SpacedDiffusion`, or of `GaussianDiffusion` with T = S."""
    kept = [*range(0, 1000, 1000 // STEPS)]
    found = SimpleNamespace(model_mean_type=SimpleNamespace(name=mean_type), rescale_timesteps=rescale)
    found.alphas_cumprod, found.num_timesteps = abar[kept].numpy(), STEPS
    if spaced:
        found.timestep_map, found.original_num_steps = kept, 1000
    return found


def timesteps_of(d: Any) -> Tensor:
    t = torch.tensor(getattr(d, "timestep_map", range(d.num_timesteps)))
    return t.float() * (1000.0 / getattr(d, "original_num_steps", d.num_timesteps)) if d.rescale_timesteps else t


def by_hand(d: Any, model: Any, x: Tensor, *, reverse: bool = False, eta: float = 0.0, **options: Any) -> Tensor:
    """x0 of the model, `denoised_fn`, clipping, eps from it, `cond_fn`, and eq. 12 of arXiv 2010.02502, in a loop."""
    abar, given = torch.as_tensor(d.alphas_cumprod).float(), options.get("model_kwargs") or {}
    ends = torch.cat([abar[1:], torch.zeros(1)]) if reverse else torch.cat([torch.ones(1), abar[:-1]])
    for i in range(len(abar)) if reverse else reversed(range(len(abar))):
        t, now, after = timesteps_of(d)[i].expand(len(x)), abar[i], ends[i]
        with torch.no_grad():
            out = model(x, t, **given)[:, : x.shape[1]]
        x0 = out if d.model_mean_type.name == "START_X" else (x - (1 - now).sqrt() * out) / now.sqrt()
        if options.get("denoised_fn"):
            x0 = options["denoised_fn"](x0)
        if options.get("clip_denoised", True):
            x0 = x0.clamp(-1, 1)
        eps = (x - now.sqrt() * x0) / (1 - now).sqrt()
        if options.get("cond_fn"):
            eps = eps - (1 - now).sqrt() * options["cond_fn"](x, t, **given)
            x0 = (x - (1 - now).sqrt() * eps) / now.sqrt()
        sigma = eta * ((1 - after) / (1 - now) * (1 - now / after)).sqrt() if eta else 0.0
        x = after.sqrt() * x0 + (1 - after - sigma**2) ** 0.5 * eps
        if eta:
            x = x + sigma * torch.randn_like(x)
    return x


class Net(torch.nn.Module):
    """A small class-conditional network, which gives 2C channels if it learns the variance."""

    def __init__(self, learn_sigma: bool = False) -> None:
        super().__init__()
        self.first = torch.nn.Conv2d(3, 8, 3, padding=1)
        self.last = torch.nn.Conv2d(8, 6 if learn_sigma else 3, 3, padding=1)
        self.label = torch.nn.Embedding(3, 8)

    def forward(self, x: Tensor, t: Tensor, y: Tensor | None = None) -> Tensor:
        hidden = self.first(x) + torch.sin(t.float() / 300)[:, None, None, None]
        if y is not None:
            hidden = hidden + self.label(y)[:, :, None, None]
        out = self.last(torch.tanh(hidden))
        return torch.cat([0.7 * x + out[:, :3], out[:, 3:]], 1)


def towards_class(x: Tensor, t: Tensor, y: Tensor) -> Tensor:
    """The gradient of a classifier, as guidance scripts write it."""
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        logits = torch.stack([(x - level).square().mean((1, 2, 3)) for level in (-0.5, 0.0, 0.5)], 1).mul(-20)
        chosen = torch.log_softmax(logits, 1)[torch.arange(len(x)), y] @ (0.5 + t.float() / 1000)
        return torch.autograd.grad(chosen, x)[0]


def cases() -> Iterator[Any]:
    for name, parts, options in [
        ("plain", {}, {"clip_denoised": False}),
        ("clip", {}, {}),
        ("eta", {}, {"eta": 1.0}),
        ("eta-free", {}, {"eta": 0.5, "clip_denoised": False}),
        ("whole", {"spaced": False}, {}),
        ("rescaled", {"rescale": True}, {}),
        ("whole-rescaled", {"spaced": False, "rescale": True}, {}),
        ("x0", {"mean_type": "START_X"}, {}),
        ("denoised_fn", {}, {"denoised_fn": lambda x0: x0 * 0.9 + 0.1 * x0.square()}),
        ("cond_fn", {}, {"cond_fn": towards_class, "model_kwargs": {"y": CLASSES}}),
        ("all", {"rescale": True}, {
            "cond_fn": towards_class, "model_kwargs": {"y": CLASSES}, "denoised_fn": torch.tanh, "eta": 1.0,
        }),
    ]:  # fmt: skip
        yield pytest.param(parts, options, id=name)


@pytest.mark.parametrize(("parts", "options"), list(cases()))
@pytest.mark.parametrize("learn_sigma", [False, True])
def test_equals_the_sequential_loop(parts: dict[str, Any], options: dict[str, Any], learn_sigma: bool) -> None:
    d, model, noise = diffusion(**parts), Net(learn_sigma), torch.randn(3, *SHAPE)
    torch.manual_seed(3)
    expected = by_hand(d, model, noise, **options)
    assert not expected.requires_grad
    for rtol, bar in ((0.0, 1e-5), (1e-4, 2e-3)):
        torch.manual_seed(3)
        found = ddim_sample_loop(d, model, (3, *SHAPE), noise, rtol=rtol, **options)
        assert not found.requires_grad and relative_error(found, expected).max() <= bar, rtol


@pytest.mark.parametrize("options", [{}, {"clip_denoised": False, "eta": 1.0}], ids=["clip", "eta"])
def test_equals_the_sequential_loop_on_digits(options: dict[str, Any]) -> None:
    loaded = models.load("digits")
    d, noise = diffusion(abar=loaded.schedule.alphas_cumprod), torch.randn(2, *loaded.shape)
    model = lambda x, t: loaded.model(x, t).sample  # noqa: E731
    torch.manual_seed(3)
    expected = by_hand(d, model, noise, **options)
    for rtol, bar in ((0.0, 1e-5), (1e-4, 2e-3)):
        torch.manual_seed(3)
        found = ddim_sample_loop(d, model, noise.shape, noise, rtol=rtol, **options)
        assert relative_error(found, expected).max() <= bar, rtol


@pytest.mark.parametrize(("kind", "clip_denoised"), [("net", False), ("net", True), ("digits", False)])
def test_the_reverse_loop_equals_its_steps(kind: str, clip_denoised: bool) -> None:
    d, model, x = diffusion(), Net(True), torch.randn(3, *SHAPE).clamp(-1, 1)
    if kind == "digits":
        loaded = models.load("digits")
        d, noise = diffusion(abar=loaded.schedule.alphas_cumprod), torch.randn(1, *loaded.shape)
        model = lambda x, t: loaded.model(x, t).sample  # noqa: E731
        x = ddim_sample_loop(d, model, noise.shape, noise)
    expected = by_hand(d, model, x, reverse=True, clip_denoised=clip_denoised)
    # eps of the first states is a small difference times 1 / sigma = 100, and so is the rounding of x
    nudged = x * (1 + torch.finfo(torch.float32).eps * torch.randn_like(x).sign())
    floor = relative_error(by_hand(d, model, nudged, reverse=True, clip_denoised=clip_denoised), expected).max()
    for rtol, bar in ((0.0, max(1e-5, 3 * float(floor))), (1e-4, 2e-3)):
        found = ddim_reverse_sample_loop(d, model, x, clip_denoised, rtol=rtol)
        assert relative_error(found, expected).max() <= bar, rtol


def test_the_reverse_loop_has_options_too() -> None:
    d, model, x = diffusion(), Net(), torch.randn(3, *SHAPE).clamp(-1, 1)
    options: dict[str, Any] = {"denoised_fn": torch.tanh, "model_kwargs": {"y": CLASSES}}
    expected = by_hand(d, model, x, reverse=True, **options)
    assert relative_error(by_hand(d, model, x, reverse=True), expected).max() > 0.05
    rows: list[int] = []
    model.register_forward_pre_hook(lambda module, given: rows.append(len(given[0])))
    assert (
        relative_error(ddim_reverse_sample_loop(d, model, x, rtol=1e-4, max_batch=7, **options), expected).max() < 2e-3
    )
    assert max(rows) == 7


def test_what_has_not_converged_is_said() -> None:
    d, model, x = diffusion(), Net(), torch.randn(3, *SHAPE)
    for run in (
        lambda **given: ddim_sample_loop(d, model, x.shape, x, **given),
        lambda **given: ddim_reverse_sample_loop(d, model, x, **given),
    ):
        with pytest.warns(deqkern.ConvergenceWarning) as caught:
            run(max_iterations=1)
        assert len(caught) == 1 and caught[0].filename == __file__


def test_progress_is_a_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    d, model, noise, made = diffusion(), Net(), torch.randn(3, *SHAPE), list[bool | None]()

    class Bar:
        n = 0

        def __init__(self, total: int, disable: bool | None) -> None:
            made.append(disable)

        def update(self, count: int) -> None:
            self.n += count

        def close(self) -> None:
            assert self.n == STEPS

    fake = ModuleType("tqdm.auto")
    fake.tqdm = Bar  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "tqdm.auto", fake)
    for progress, bars in ((False, []), (True, [False, False])):
        ddim_sample_loop(d, model, noise.shape, noise, progress=progress)
        list(ddim_sample_loop_progressive(d, model, noise.shape, noise, progress=progress))
        assert made == bars


def test_progressive_yields_each_iteration() -> None:
    d, model, noise = diffusion(), Net(), torch.randn(3, *SHAPE)
    seen = []
    for entry in ddim_sample_loop_progressive(d, model, noise.shape, noise, rtol=1e-4):
        assert torch.is_grad_enabled()
        seen.append(entry)
    expected = by_hand(d, model, noise)
    errors = [float(relative_error(entry["sample"], expected).max()) for entry in seen]
    assert 1 < len(seen) < STEPS and errors[-1] < 2e-3 < errors[0]
    assert all(torch.equal(entry["sample"], entry["pred_xstart"]) for entry in seen)
    assert len({value.data_ptr() for entry in seen for value in entry.values()}) == 2 * len(seen), "shared memory"
    with pytest.warns(deqkern.ConvergenceWarning) as caught:
        list(ddim_sample_loop_progressive(d, model, noise.shape, noise, max_iterations=1))
    assert len(caught) == 1 and caught[0].filename == __file__


def test_noise_is_drawn_as_the_sequential_loop_draws_it() -> None:
    d, model = diffusion(), Net()
    torch.manual_seed(7)
    expected = by_hand(d, model, torch.randn(2, *SHAPE), eta=1.0)
    torch.manual_seed(7)
    assert relative_error(ddim_sample_loop(d, model, (2, *SHAPE), eta=1.0, rtol=0), expected).max() <= 1e-5


def test_noise_is_drawn_where_the_model_is(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[str] = []

    def randn(*shape: int, device: torch.device | str | None = None) -> Tensor:
        drawn.append(torch.empty(shape, device=device).device.type)
        raise InterruptedError

    cases = [
        (Net(), None), (Net().to("meta"), None), (Net().to("meta"), "cpu"), (torch.nn.Identity(), None),
        (lambda x, t: x, None), (lambda x, t: x, "meta"),
    ]  # fmt: skip
    monkeypatch.setattr(torch, "randn", randn)
    for model, device in cases:
        with pytest.raises(InterruptedError):
            ddim_sample_loop(diffusion(), model, (1, *SHAPE), device=device)
    assert drawn == ["cpu", "meta", "cpu", "cpu", "cpu", "meta"]


def test_what_a_diffusion_may_lack() -> None:
    """Its mean type is then EPSILON; and 1000 steps are only the default of those that it was spaced from."""
    model, noise = Net(), torch.randn(3, *SHAPE)
    expected = ddim_sample_loop(diffusion(rescale=True), model, list(noise.shape), noise)
    plain = diffusion(rescale=True)
    del plain.model_mean_type, plain.original_num_steps
    assert torch.equal(ddim_sample_loop(plain, model, noise.shape, noise), expected)
    fewer = diffusion(rescale=True)
    fewer.original_num_steps = 100
    found = ddim_sample_loop(fewer, model, noise.shape, noise, rtol=0.0)
    assert relative_error(found, by_hand(fewer, model, noise)).max() <= 1e-5
    assert relative_error(found, expected).max() > 0.01


def test_x0_of_half_precision_is_rounded_once() -> None:
    d, x = diffusion(), torch.randn(3, *SHAPE).bfloat16()
    found = guided_diffusion._Denoiser(d, lambda x, t: x, False, None, None)(x, torch.tensor([STEPS // 2] * 3))
    abar = float(d.alphas_cumprod[STEPS // 2])
    assert relative_error(found.double(), x.double() * (1 - (1 - abar) ** 0.5) / abar**0.5).max() <= 1e-5


def test_max_batch_and_tensors_of_the_batch() -> None:
    d, model, noise, rows = diffusion(), Net(), torch.randn(3, *SHAPE), []

    def counted(x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        rows.append(len(x))
        return model(x, t, y)

    given = {"y": CLASSES}
    found = ddim_sample_loop(d, counted, noise.shape, noise, model_kwargs=given, rtol=0, max_batch=7)
    assert max(rows) == 7
    assert relative_error(found, by_hand(d, model, noise, model_kwargs=given)).max() <= 1e-5


@pytest.mark.parametrize(
    ("change", "error", "name"),
    [
        ({"diffusion": object()}, TypeError, "diffusion"),
        ({"diffusion": diffusion(mean_type="PREVIOUS_X")}, ValueError, "PREVIOUS_X"),
        ({"diffusion": SimpleNamespace(alphas_cumprod=np.array([0.9, 0.95]))}, ValueError, "alphas_cumprod"),
        ({"diffusion": SimpleNamespace(alphas_cumprod=np.array([1.0, 0.95]))}, ValueError, "alphas_cumprod"),
        ({"diffusion": SimpleNamespace(alphas_cumprod=np.array([0.9, 0.0]))}, ValueError, "alphas_cumprod"),
        ({"diffusion": SimpleNamespace(alphas_cumprod=np.array([]))}, ValueError, "alphas_cumprod"),
        ({"diffusion": SimpleNamespace(alphas_cumprod=np.array([[0.9], [0.8]]))}, ValueError, "alphas_cumprod"),
        ({"diffusion": SimpleNamespace(alphas_cumprod=np.array([0.9]), timestep_map=[0, 1])}, ValueError, "_map"),
        ({"noise": torch.randn(2, 3, 8, 8)}, ValueError, "noise"),
        ({"noise": [1.0]}, TypeError, "noise"),
        ({"shape": 3}, TypeError, "shape must be a sequence of ints"),
        ({"shape": (3, 2.0)}, TypeError, "shape must be a sequence of ints"),
        ({"denoised_fn": 1}, TypeError, "denoised_fn"),
        ({"cond_fn": 1}, TypeError, "cond_fn"),
        ({"model_kwargs": [1]}, TypeError, "model_kwargs"),
        ({"eta": 2.0}, ValueError, "eta"),
        ({"eta": -1.0}, ValueError, "eta"),
        ({"rtol": torch.nan}, ValueError, "rtol"),
        ({"model": lambda x, t: x[:, :1]}, ValueError, "model returned shape"),
        ({"model": lambda x, t: x[:, 0, 0, 0]}, ValueError, "model returned shape"),
        ({"model": lambda x, t: None}, TypeError, "model must return"),
    ],
)  # fmt: skip
def test_bad_arguments(change: dict[str, Any], error: type[Exception], name: str) -> None:
    arguments = {"diffusion": diffusion(), "model": Net(), "shape": (3, *SHAPE)} | change
    with pytest.raises(error, match=name):
        ddim_sample_loop(**arguments)
    if "model" not in change:
        with pytest.raises(error, match=name):
            ddim_sample_loop_progressive(**arguments)


def test_a_reverse_loop_draws_no_noise() -> None:
    with pytest.raises(ValueError, match="eta"):
        ddim_reverse_sample_loop(diffusion(), Net(), torch.randn(3, *SHAPE), eta=0.5)
