"""One model on several devices, here several times on one: the same samples, inverses and gradients."""

from __future__ import annotations

import copy
import os
import pickle
import threading
import warnings
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from asserts import relative_error
from torch import Tensor

import deqkern
from deqkern import NoiseSchedule, models, replicated, solvers
from deqkern.network import replication
from deqkern.network.replication import autocast_of, is_replicated

SHAPE, STEPS, SCHEDULE = (2, 6, 5), 12, NoiseSchedule.linear()
THREE = ["cpu"] * 3


class Denoiser(torch.nn.Module):
    """A small network with a condition per row, one for all rows, and a buffer; it notes down who called it."""

    calls: list[tuple[int, int, int]]  # which copy, its rows, its thread

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = torch.nn.Conv2d(2, 6, 3, padding=1), torch.nn.Conv2d(6, 2, 3, padding=1)
        self.drop, self.act = torch.nn.Dropout(0.5), torch.nn.Tanh()
        self.register_buffer("gain", torch.tensor(0.5))
        self.scales = {"adapter": [1.0]}

    def forward(self, x: Tensor, t: Tensor, text: Tensor | None = None, added: Any = None) -> Any:
        Denoiser.calls.append((id(self), len(x), threading.get_ident()))
        hidden = self.first(x) + (t.to(x) / 1000)[:, None, None, None]
        if text is not None:
            hidden = hidden + text[:, :, None, None] + added["bias"][0]
        hidden = self.scales["adapter"][0] * hidden
        return SimpleNamespace(sample=self.gain * x + self.last(self.act(self.drop(hidden))))


@pytest.fixture
def model() -> Denoiser:
    torch.manual_seed(0)
    Denoiser.calls = []
    return Denoiser().eval()


def noise(count: int = 2) -> Tensor:
    return torch.randn(count, *SHAPE, generator=torch.Generator().manual_seed(1))


def conditions(count: int = 2) -> dict[str, Any]:
    return {"text": torch.randn(count, 6), "added": {"bias": [torch.randn(1, 6, 1, 1)]}}


@pytest.mark.parametrize("rows", [1, 2, 3, 7])
def test_rows_are_shared_out(model: Denoiser, rows: int) -> None:
    x, t = noise(rows), torch.arange(rows)
    given = conditions(rows)
    expected = model(x, t, **given).sample
    Denoiser.calls.clear()
    found = replicated(model, THREE)(x, t, **given)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    copies, counts, threads = zip(*Denoiser.calls, strict=True)
    assert sum(counts) == rows and max(counts) - min(counts) <= 1
    assert len(set(copies)) == min(rows, 3)
    here = [thread == threading.get_ident() for thread in threads]
    assert here == [copy == id(model) for copy in copies]
    assert torch.equal(replicated(model, THREE)(x=x, t=t, **given), found)


def test_no_rows(model: Denoiser) -> None:
    assert replicated(model, THREE)(noise(0), torch.arange(0)).shape == (0, *SHAPE)
    assert [copy for copy, _, _ in Denoiser.calls] == [id(model)]


def test_all_devices_work_at_the_same_time(model: Denoiser) -> None:
    met, order = threading.Barrier(3, timeout=30), list[int]()
    model.first.register_forward_pre_hook(lambda module, args: order.append(met.wait()))
    replicated(model, THREE)(noise(3), torch.arange(3))
    assert sorted(order) == [0, 1, 2]


def test_a_copy_keeps_its_thread_and_goes_without_it_to_another_process(model: Denoiser) -> None:
    """Plans of convolutions are kept per thread; a thread can be neither copied nor stored nor forked."""
    copies = replicated(model, THREE)
    for _ in range(3):
        expected = copies(noise(3), torch.arange(3))
    threads = {(copy, thread) for copy, _, thread in Denoiser.calls}
    assert len(threads) == 3 == len({thread for _, thread in threads})
    for other in (copy.deepcopy(copies), pickle.loads(pickle.dumps(copies))):
        assert torch.equal(other(noise(3), torch.arange(3)), expected)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of forking beside threads
        child = os.fork()
    if child == 0:
        try:
            os._exit(0 if torch.equal(copies(noise(3), torch.arange(3)), expected) else 1)
        finally:
            os._exit(2)
    assert os.waitpid(child, 0)[1] == 0


@pytest.mark.parametrize("grad", [False, True])
def test_a_copy_and_its_rows_are_on_its_device(model: Denoiser, grad: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    here = autocast_of(torch.device("cpu"))
    monkeypatch.setattr(replication, "autocast_of", lambda device: here)  # there is none for meta
    seen: list[set[str]] = []
    model.last.register_forward_hook(
        lambda module, args, output: seen.append({value.device.type for value in (module.weight, *args, output)})
    )
    with torch.set_grad_enabled(grad), pytest.raises(NotImplementedError, match="copy out of meta"):
        replicated(model, ["cpu", "meta"])(noise(), torch.arange(2))  # no data comes back from there
    assert sorted(map(sorted, seen)) == [["cpu"], ["meta"]]


@pytest.mark.parametrize("max_batch", [None, 5])
def test_samples_and_inverses_are_the_same(model: Denoiser, max_batch: int | None) -> None:
    options: dict[str, Any] = {"model_kwargs": conditions(), "max_batch": max_batch, "rtol": 0.0}
    expected = deqkern.sample(model, noise(), SCHEDULE, STEPS, sigma_min=0.1, **options)
    Denoiser.calls.clear()
    found = deqkern.sample(replicated(model, THREE), noise(), SCHEDULE, STEPS, sigma_min=0.1, **options)
    assert relative_error(found.value, expected.value).max() <= 1e-5
    assert sum(rows for _, rows, _ in Denoiser.calls) == found.nfe.sum()
    picture = noise().clamp(-1, 1)
    inverse, again = (
        deqkern.invert(inner, picture, SCHEDULE, STEPS, sigma_min=0.1, **options)
        for inner in (model, replicated(model, THREE))
    )
    assert relative_error(again.value, inverse.value).max() <= 1e-5


def test_a_trained_model() -> None:
    loaded = models.load("digits")
    first = torch.randn(2, *loaded.shape, generator=torch.Generator().manual_seed(3))
    expected = deqkern.sample(loaded.model, first, loaded.schedule, 20, solver=solvers.sequential(), rtol=0.0)
    found = deqkern.sample(replicated(loaded.model, ["cpu", "cpu"]), first, loaded.schedule, 20, rtol=1e-3)
    assert found.converged.all() and relative_error(found.value, expected.value).max() <= 3e-3


def test_what_all_samples_share_stays_whole_whatever_the_rows() -> None:
    class Looked(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gain = torch.nn.Parameter(torch.tensor(0.3))

        def forward(self, x: Tensor, t: Tensor, table: Tensor, label: Tensor) -> Tensor:
            assert len(label) == len(x) == len(t)
            lengths.append((len(x), len(table)))
            return self.gain * torch.sin(x) + table[label].view(-1, 1, 1, 1)

    lengths: list[tuple[int, int]] = []
    given = {"table": torch.tensor([0.0, 0.1, 0.2, 0.3]), "label": torch.tensor([3, 1])}
    expected, found = (
        deqkern.sample(inner, noise(), SCHEDULE, 6, rtol=0.0, max_batch=4, model_kwargs=given).value
        for inner in (Looked(), replicated(Looked(), ["cpu", "cpu"]))
    )
    assert (2, 4) in lengths and {table for _, table in lengths} == {4}
    assert relative_error(found, expected).max() <= 1e-6


def test_a_change_through_data_needs_a_refresh(model: Denoiser) -> None:
    spread, x, t = replicated(model, THREE), noise(6), torch.arange(6)
    with torch.no_grad():
        model.last.weight.data.mul_(2)
        expected = model(x, t).sample
        assert relative_error(spread(x, t), expected).max() > 0.05
        spread.refresh()
        torch.testing.assert_close(spread(x, t), expected, rtol=1e-5, atol=1e-6)


def test_guidance_goes_around_it(model: Denoiser) -> None:
    cond, uncond = conditions(), conditions()
    expected, found = (
        deqkern.sample(deqkern.guided(inner, 3.0, cond, uncond), noise(), SCHEDULE, STEPS, rtol=0.0).value
        for inner in (model, replicated(model, THREE))
    )
    assert relative_error(found, expected).max() <= 1e-5


@pytest.mark.parametrize("gradient", ["exact", "implicit"])
def test_gradients_reach_the_model_and_its_arguments(model: Denoiser, gradient: str) -> None:
    def grads(inner: torch.nn.Module) -> list[Tensor]:
        first, given = noise().requires_grad_(), conditions_with_grad
        found = deqkern.sample(inner, first, SCHEDULE, STEPS, rtol=1e-6, gradient=gradient, model_kwargs=given)
        inputs = [first, given["text"], given["added"]["bias"][0], *model.parameters()]
        return list(torch.autograd.grad(found.value.square().sum(), inputs))

    conditions_with_grad = conditions()
    for value in (conditions_with_grad["text"], conditions_with_grad["added"]["bias"][0]):
        value.requires_grad_()
    for expected, found in zip(grads(model), grads(replicated(model, THREE)), strict=True):
        assert expected.norm() > 0
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-5 * float(expected.abs().max()))


def change_parameter(model: Denoiser) -> None:
    with torch.no_grad():
        model.last.weight.mul_(2)


def change_buffer(model: Denoiser) -> None:
    model.gain = torch.tensor(-0.3)


def add_module(model: Denoiser) -> None:
    model.last = torch.nn.Sequential(model.last, torch.nn.Conv2d(2, 2, 1))


def change_activation(model: Denoiser) -> None:
    model.act = torch.nn.Sigmoid().eval()  # which has no values of its own, as little as Tanh


def change_scale(model: Denoiser) -> None:
    model.scales["adapter"][0] = 3.0


@pytest.mark.parametrize("change", [change_parameter, change_buffer, add_module, change_activation, change_scale])
@pytest.mark.parametrize("grad", [False, True])
def test_the_copies_follow_the_model(model: Denoiser, change: Any, grad: bool) -> None:
    spread, x, t = replicated(model, THREE), noise(6), torch.arange(6)
    with torch.set_grad_enabled(grad):
        before = spread(x, t)
        change(model)
        expected = model(x, t).sample
        assert relative_error(before, expected).max() > 0.05
        torch.testing.assert_close(spread(x, t), expected, rtol=1e-5, atol=1e-6)


def test_the_copies_follow_the_mode(model: Denoiser) -> None:
    spread, x, t = replicated(model.train(), THREE), noise(6), torch.arange(6)
    model.eval()
    with torch.no_grad():
        torch.testing.assert_close(spread(x, t), spread(x, t), rtol=0, atol=0)
        spread.train()
        assert relative_error(spread(x, t), spread(x, t)).min() > 0.01


def test_what_torch_keeps_per_thread_goes_with_the_call(model: Denoiser) -> None:
    seen: list[tuple[bool, bool, torch.dtype]] = []
    model.first.register_forward_hook(
        lambda module, args, output: seen.append(
            (torch.is_grad_enabled(), torch.is_inference_mode_enabled(), output.dtype)
        )
    )
    spread, x, t = replicated(model, THREE), noise(3), torch.arange(3)
    for setting, expected in (
        (torch.no_grad(), (False, False, torch.float32)),
        (torch.enable_grad(), (True, False, torch.float32)),
        (torch.inference_mode(), (False, True, torch.float32)),
        (torch.autocast("cpu", torch.bfloat16), (True, False, torch.bfloat16)),
    ):
        seen.clear()
        with setting:
            spread(x, t)
        assert seen == [expected] * 3


def test_an_error_of_a_copy_is_raised(model: Denoiser) -> None:
    spread = replicated(model, THREE)
    with pytest.raises(RuntimeError, match="channels"):
        spread(torch.randn(6, 3, 6, 5), torch.arange(6))
    with torch.no_grad():
        assert spread(noise(), torch.arange(2)).shape == (2, *SHAPE)


def test_a_compiled_model() -> None:
    model = torch.nn.Bilinear(3, 3, 4)
    x, y = torch.randn(6, 3), torch.randn(6, 3)
    with torch.no_grad():
        found = replicated(torch.compile(model, backend="eager"), THREE)(x, y)
        torch.testing.assert_close(found, model(x, y), rtol=1e-5, atol=1e-6)


class Bound(torch.nn.Linear):
    """Its forward is a method that it sets itself."""

    def __init__(self) -> None:
        super().__init__(3, 4)
        self.forward = self.doubled

    def doubled(self, x: Tensor) -> Tensor:
        return 2 * torch.nn.functional.linear(x, self.weight, self.bias)


def test_a_forward_that_the_module_sets_itself_goes_along() -> None:
    model, x = Bound(), torch.randn(6, 3)
    found = replicated(model, THREE)
    with torch.no_grad():
        model.weight.mul_(3)
        torch.testing.assert_close(found(x), model(x), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "change",
    [
        lambda module: setattr(module, "forward", lambda x: x),
        lambda module: setattr(module, "forward", torch.nn.Identity().forward),
        lambda module: setattr(module, "_hf_hook", object()),
    ],
)
def test_a_forward_that_was_replaced_is_refused(model: Denoiser, change: Any) -> None:
    change(model.last)
    with pytest.raises(ValueError, match="model has a Conv2d whose forward was replaced"):
        replicated(model, THREE)


def test_without_devices_it_takes_all_gpus(model: Denoiser, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert replicated(model).devices == (torch.device("cpu"),)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(ValueError, match="must hold the model's own, cpu, got cuda:0, cuda:1"):
        replicated(model)


def test_a_model_that_returns_a_tuple_and_takes_a_number(model: Denoiser) -> None:
    class Tuple(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = model

        def forward(self, x: Tensor, t: Tensor, factor: Tensor) -> tuple[Tensor, Tensor]:
            return factor * self.inner(x, t).sample, t

    x, t, factor = noise(4), torch.arange(4), torch.tensor(2.0)
    torch.testing.assert_close(replicated(Tuple(), THREE)(x, t, factor), 2 * model(x, t).sample, rtol=1e-5, atol=1e-6)


def test_a_model_made_in_inference_mode() -> None:
    Denoiser.calls, x, t = [], noise(4), torch.arange(4)
    with torch.inference_mode():
        model = Denoiser().eval()
        torch.testing.assert_close(replicated(model, THREE)(x, t), model(x, t).sample, rtol=1e-5, atol=1e-6)


def test_the_plan_measures_all_devices(model: Denoiser) -> None:
    deqkern.plan(replicated(model, THREE), noise(), SCHEDULE, STEPS, repeats=1)
    assert len({copy for copy, _, _ in Denoiser.calls}) == 3


def test_one_device_copies_nothing(model: Denoiser) -> None:
    replicated(model, ["cpu"])(noise(), torch.arange(2))
    assert [copy for copy, _, _ in Denoiser.calls] == [id(model)]
    assert not is_replicated(replicated(model, ["cpu"])) and not is_replicated(lambda x, t: x)
    assert is_replicated(deqkern.guided(replicated(model, ["cpu", "cpu"]), 1.0, {}, {}))


@pytest.mark.parametrize(
    ("make", "devices", "error", "words"),
    [
        (lambda model: lambda x, t: x, THREE, TypeError, "model must be a torch.nn.Module"),
        (lambda model: deqkern.guided(model, 2.0, {}, {}), THREE, ValueError, "model must be the network itself"),
        (lambda model: replicated(model, THREE), THREE, ValueError, "model must be the network itself"),
        (lambda model: torch.nn.Identity(), THREE, ValueError, "model must have its parameters on one device, got 0"),
        (lambda model: model, "cpu", TypeError, "devices must be a sequence of devices"),
        (lambda model: model, torch.device("cpu"), TypeError, "devices must be a sequence of devices"),
        (lambda model: model, [], ValueError, "devices must hold the model's own, cpu, got none"),
        (lambda model: model, ["meta", "meta"], ValueError, "devices must hold the model's own, cpu, got meta, meta"),
    ],
)
def test_bad_input(model: Denoiser, make: Any, devices: Sequence[str], error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        replicated(make(model), devices)


def test_a_graph_cannot_span_devices(model: Denoiser, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Tensor, "is_cuda", True)
    with pytest.raises(ValueError, match="cuda_graph=True needs a model on one device"):
        deqkern.sample(replicated(model, THREE), noise(), SCHEDULE, STEPS, cuda_graph=True)


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="fewer than two GPUs")
@pytest.mark.parametrize("gradient", [None, "implicit"])
def test_all_gpus(model: Denoiser, gradient: str | None) -> None:
    torch.backends.cudnn.allow_tf32 = False
    options: dict[str, Any] = {"rtol": 1e-6, "gradient": gradient}
    first = noise().requires_grad_(gradient is not None)
    expected = deqkern.sample(model, first, SCHEDULE, STEPS, **options).value
    found = deqkern.sample(replicated(model.cuda()), first.cuda(), SCHEDULE, STEPS, **options).value
    assert len({copy for copy, _, _ in Denoiser.calls}) >= torch.cuda.device_count()
    assert relative_error(found.detach().cpu(), expected.detach()).max() <= 1e-4
