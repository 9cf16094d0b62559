"""Classifier-free guidance against the two models called one after the other."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
from asserts import relative_error
from problems import chain
from torch import Tensor

import deqkern
from deqkern import NoiseSchedule, models, solvers

SHAPE, STEPS, SCHEDULE = (2, 6, 5), 10, NoiseSchedule.linear()


class Held(NamedTuple):
    gain: Tensor
    shift: float


class Conditional(torch.nn.Module):
    """A small network whose condition has per-sample tensors at several depths, and more."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.first = torch.nn.Conv2d(2, 6, 3, padding=1, dtype=dtype)
        self.last = torch.nn.Conv2d(6, 2, 3, padding=1, dtype=dtype)
        self.rows: list[int] = []

    def forward(self, x: Tensor, t: Tensor, text: Tensor, added: Any = None, gain: Any = 1.0) -> Any:
        self.rows.append(len(x))
        hidden = self.first(x) + (t.to(x) / 1000)[:, None, None, None] + text[:, :, None, None]
        if added is not None:
            hidden = hidden * added["size"][0][:, None, None, None]
        return SimpleNamespace(sample=0.5 * x + gain * self.last(torch.tanh(hidden)))


def conditions(batch: int, dtype: torch.dtype = torch.float32) -> tuple[dict[str, Any], dict[str, Any]]:
    """One text per sample against one for all; both with a nested tensor and a number."""
    texts, sizes = torch.randn(batch + 1, 6, dtype=dtype), torch.rand(batch + 1, dtype=dtype)
    cond = {"text": texts[1:], "added": {"size": [sizes[1:]]}, "gain": 0.8}
    return cond, {"text": texts[:1], "added": {"size": [sizes[:1]]}, "gain": 0.8}


def by_hand(
    model: Callable[..., Any],
    x: Tensor,
    scale: float,
    cond: dict[str, Any],
    uncond: dict[str, Any],
    phi: float = 0.0,
    **options: Any,
) -> Tensor:
    def guided(x: Tensor, t: Tensor) -> Tensor:
        positive, negative = model(x, t, **cond).sample, model(x, t, **uncond).sample
        out = negative + scale * (positive - negative)
        if phi:
            sizes = [v.flatten(1).std(dim=1)[:, None, None, None] for v in (positive, out)]
            out = phi * (out * sizes[0] / sizes[1]) + (1 - phi) * out
        return out

    return chain(guided, x, SCHEDULE, STEPS, **options)


@pytest.mark.parametrize("scale", [0.0, 3.0, -1.0])
@pytest.mark.parametrize("rescale", [0.0, 0.7, 1.0])
@pytest.mark.parametrize("batch", [1, 3])
@torch.no_grad()
def test_equals_the_guided_chain(scale: float, rescale: float, batch: int) -> None:
    model, noise, (cond, uncond) = Conditional(), torch.randn(batch, *SHAPE), conditions(batch)
    expected = by_hand(model, noise, scale, cond, uncond, rescale)
    model.rows.clear()
    found = deqkern.sample(
        deqkern.guided(model, scale, cond, uncond, rescale=rescale), noise, SCHEDULE, STEPS, rtol=0, max_batch=7
    )
    assert relative_error(found.value, expected).max() <= 1e-5
    assert max(model.rows) <= 14 and sum(model.rows) == 2 * int(found.nfe.sum())


@torch.no_grad()
def test_scale_one_is_the_conditional_model_once() -> None:
    model, noise, (cond, uncond) = Conditional(), torch.randn(3, *SHAPE), conditions(3)
    expected = by_hand(model, noise, 1.0, cond, uncond)
    model.rows.clear()
    found = deqkern.sample(deqkern.guided(model, 1, cond, uncond, rescale=0.5), noise, SCHEDULE, STEPS, rtol=0)
    assert relative_error(found.value, expected).max() <= 1e-5
    assert sum(model.rows) == int(found.nfe.sum())


@torch.no_grad()
def test_on_digits() -> None:
    """The trained model has no condition: another timestep stands in for one."""
    loaded = models.load("digits")

    def model(x: Tensor, t: Tensor, later: Tensor) -> Any:
        return loaded.model(x, (t + later).clamp_max(999))

    noise, cond, uncond = torch.randn(2, *loaded.shape), {"later": torch.tensor([0, 20])}, {"later": torch.tensor([40])}
    expected = deqkern.sample(
        lambda x, t: 1.5 * model(x, t, **cond).sample - 0.5 * model(x, t, **uncond).sample,
        *(noise, loaded.schedule, 8),
        solver=solvers.sequential(),
        rtol=0,
    ).value
    guided = deqkern.guided(model, 1.5, cond, uncond)
    for rtol, bar in ((0.0, 1e-5), (1e-4, 2e-3)):
        found = deqkern.sample(guided, noise, loaded.schedule, 8, rtol=rtol)
        assert relative_error(found.value, expected).max() <= bar


@pytest.mark.filterwarnings("ignore:sample has values up to:UserWarning")  # the made-up model is of no data
@torch.no_grad()
def test_inverts_and_samples_again() -> None:
    model, noise, (cond, uncond) = Conditional(), torch.randn(3, *SHAPE), conditions(3)
    guided = deqkern.guided(model, 2.0, cond, uncond)
    sample = by_hand(model, noise, 2.0, cond, uncond, sigma_min=0.08)
    for method in ("joint", "stepwise"):
        found = deqkern.invert(guided, sample, SCHEDULE, STEPS, method=method, rtol=1e-5, round_trip=True)
        assert found.converged.all() and found.round_trip is not None and found.round_trip.max() <= 1e-4
        assert relative_error(found.value, noise).max() <= 1e-3


@pytest.mark.parametrize("plain", [False, True])
@pytest.mark.parametrize("rescale", [0.0, 0.7])
def test_gradients_equal_those_of_the_chain(plain: bool, rescale: float) -> None:
    """By the noise, both conditions and the parameters, also those that a plain function closes over."""
    model, batch = Conditional(torch.float64), 3
    noise = torch.randn(batch, *SHAPE, dtype=torch.float64, requires_grad=True)
    cond, uncond = conditions(batch, torch.float64)
    leaves = [noise, cond["text"].requires_grad_(), uncond["text"].requires_grad_(), *model.parameters()]
    weight = torch.randn(batch, *SHAPE, dtype=torch.float64)
    expected = torch.autograd.grad((weight * by_hand(model, noise, 2.0, cond, uncond, rescale)).sum(), leaves)
    given = (lambda x, t, **kwargs: model(x, t, **kwargs)) if plain else model
    guided = deqkern.guided(given, 2.0, cond, uncond, rescale=rescale)
    assert len(list(guided.parameters())) == (0 if plain else 4)
    found = deqkern.sample(guided, noise, SCHEDULE, STEPS, rtol=0, gradient="implicit", max_batch=11)
    for one, other in zip(torch.autograd.grad((weight * found.value).sum(), leaves), expected, strict=True):
        assert float((one - other).norm() / other.norm()) <= 1e-10


@torch.no_grad()
def test_conditions_can_be_replaced() -> None:
    model, noise, (cond, uncond) = Conditional(), torch.randn(3, *SHAPE), conditions(3)
    other = conditions(3)[0]
    expected = deqkern.sample(deqkern.guided(model, 2.0, other, uncond), noise, SCHEDULE, STEPS, rtol=0).value
    guided = deqkern.guided(model, 2.0, cond, uncond)
    found = deqkern.sample(guided, noise, SCHEDULE, STEPS, rtol=0, model_kwargs={"cond": other})
    assert torch.equal(found.value, expected)


@torch.no_grad()
def test_is_a_model_by_itself() -> None:
    model, x, t, (cond, uncond) = Conditional(), torch.randn(3, *SHAPE), torch.tensor([5, 6, 7]), conditions(3)
    found = deqkern.guided(model, 2.0, cond, uncond)(x, t)
    expected = 2 * model(x, t, **cond).sample - model(x, t, **(uncond | {"text": uncond["text"].expand(3, -1)})).sample
    assert relative_error(found, expected).max() <= 1e-5


@torch.no_grad()
def test_conditions_in_a_namedtuple() -> None:
    def model(x: Tensor, t: Tensor, held: Held) -> Tensor:
        return x.tanh() * held.gain[:, None, None, None] + held.shift

    noise, (gain, other) = torch.randn(3, *SHAPE), torch.rand(2, 3).unbind()
    guided = deqkern.guided(model, 2.0, {"held": Held(gain, 0.1)}, {"held": Held(other, 0.1)})
    found = deqkern.sample(guided, noise, SCHEDULE, STEPS, rtol=0).value
    expected = chain(lambda x, t: x.tanh() * (2 * gain - other)[:, None, None, None] + 0.1, noise, SCHEDULE, STEPS)
    assert relative_error(found, expected).max() <= 1e-5


@pytest.mark.parametrize(
    ("change", "error", "name"),
    [
        ({"model": 1}, TypeError, "model"),
        ({"scale": "7"}, TypeError, "scale"),
        ({"scale": True}, TypeError, "scale"),
        ({"scale": torch.inf}, ValueError, "scale"),
        ({"rescale": 1.5}, ValueError, "rescale"),
        ({"rescale": None}, TypeError, "rescale"),
        ({"cond": [1]}, TypeError, "^cond"),
        ({"uncond": None}, TypeError, "uncond"),
        ({"cond": {}}, ValueError, "names"),
        ({"cond": {"text": torch.zeros(2, 6)}}, ValueError, r"cond\['text'\].*one row per sample"),
        ({"cond": {"text": torch.zeros(3, 5)}}, ValueError, r"cond\['text'\]"),
        ({"cond": {"text": None}}, ValueError, r"cond\['text'\].*only tensors"),
        ({"cond": {"text": torch.zeros(())}, "uncond": {"text": torch.ones(())}}, ValueError, r"cond\['text'\]"),
        ({"cond": {"text": 1.0}, "uncond": {"text": 2.0}}, ValueError, r"cond\['text'\]"),
        ({"cond": {"text": [0.0, 1.0]}, "uncond": {"text": [0.0]}}, ValueError, r"cond\['text'\]"),
    ],
)
def test_bad_arguments(change: dict[str, Any], error: type[Exception], name: str) -> None:
    def untouched(x: Tensor, t: Tensor, text: Any) -> Tensor:
        raise AssertionError("the model was called")

    text = {"text": torch.zeros(3, 6)}
    given = {"model": untouched, "scale": 2.0, "cond": text, "uncond": text}
    with pytest.raises(error, match=name):
        deqkern.sample(deqkern.guided(**(given | change)), torch.randn(3, *SHAPE), SCHEDULE, STEPS)


@pytest.mark.parametrize("scale", [1.0, 2.0])
def test_conditions_of_another_batch_are_refused_as_they_were_given(scale: float) -> None:
    guided = deqkern.guided(Conditional(), scale, {"text": torch.zeros(3, 6)}, {"text": torch.zeros(1, 6)})
    shapes = r"\(3, 6\) and \(3, 6\)" if scale == 1 else r"\(3, 6\) and \(1, 6\)"
    for call in (deqkern.sample, deqkern.invert, deqkern.plan):
        with pytest.raises(ValueError, match=rf"cond\['text'\] must have one row per sample.* {shapes} for 2 rows"):
            call(guided, torch.randn(2, *SHAPE), SCHEDULE, STEPS)
