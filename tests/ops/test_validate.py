"""Each wrong argument of each op is refused with an error that names it."""

from __future__ import annotations

import inspect
from typing import Any

import inputs
import pytest
import torch

from deqkern import ops

TENSORS = [
    (op, name)
    for op in inputs.WRITTEN
    for name, parameter in inspect.signature(getattr(ops, op)).parameters.items()
    if "Tensor" in parameter.annotation
]
EACH_TENSOR = pytest.mark.parametrize(("op", "name"), TENSORS, ids="-".join)


def refused(op: str, name: str, value: Any, error: type[Exception] | tuple[type[Exception], ...]) -> None:
    arguments = inputs.example(op)
    before = inputs.clone(arguments)
    with pytest.raises(error, match=rf"\b{name}\b"):
        getattr(ops, op)(**arguments | {name: value})
    for written in inputs.WRITTEN[op]:
        assert torch.equal(arguments[written], before[written]), f"{written} was written"


@EACH_TENSOR
def test_not_a_tensor(op: str, name: str) -> None:
    refused(op, name, [1.0, 2.0], TypeError)


@EACH_TENSOR
def test_wrong_dtype(op: str, name: str) -> None:
    value = inputs.example(op)[name]
    refused(op, name, value.to(torch.complex64 if value.is_floating_point() else torch.int32), TypeError)


# The argument that gives a call its sizes: with other sizes it is right itself, and the next argument is named.
SIZES_FROM = {
    "dct2": "image",
    "ddim_scan": "e",
    "band_moments": "dx",
    "anderson_gram": "g_ring",
    "anderson_solve": "rhs",
    "anderson_mix": "f_ring",
    "secant_slope": "slope",
    "interpolate_outputs": "e",
    "extrapolate_states": "e",
    "update_convergence": "norms",
}
OTHERS = [(op, name) for op, name in TENSORS if SIZES_FROM[op] != name]
# K and N, likewise
BANDS_FROM = [
    ("ddim_scan", "slope"),
    ("band_moments", "moments"),
    ("interpolate_outputs", "slope"),
    ("interpolate_outputs", "rows"),
]


@pytest.mark.parametrize(("op", "name"), OTHERS, ids="-".join)
def test_wrong_shape(op: str, name: str) -> None:
    value = inputs.example(op)[name]
    refused(op, name, value.unsqueeze(0), ValueError)
    refused(op, name, value.flatten()[:0], ValueError)
    if (op, name) not in BANDS_FROM:
        refused(op, name, torch.cat([value, value], -1), ValueError)


@pytest.mark.parametrize(("op", "name"), SIZES_FROM.items(), ids=SIZES_FROM)
def test_wrong_sizes(op: str, name: str) -> None:
    value = inputs.example(op)[name]
    refused(op, name, value[0], ValueError)
    refused(op, name, value[..., :0], ValueError)
    with pytest.raises(ValueError, match="must have shape"):
        getattr(ops, op)(**inputs.example(op) | {name: torch.cat([value, value], -2)})


@EACH_TENSOR
def test_not_contiguous(op: str, name: str) -> None:
    value = inputs.example(op)[name]
    if value.numel() > 1:  # one element is contiguous at any stride
        refused(op, name, torch.stack([value, value], -1)[..., 0], ValueError)


@EACH_TENSOR
def test_another_device(op: str, name: str) -> None:
    arguments = inputs.example(op)
    with pytest.raises(ValueError, match="must be on"):
        getattr(ops, op)(**arguments | {name: arguments[name].to("meta")})


FLOATING = [(op, name) for op, name in TENSORS if inputs.example(op)[name].is_floating_point()]


@pytest.mark.parametrize(("op", "name"), FLOATING, ids="-".join)
def test_requires_grad(op: str, name: str) -> None:
    value = inputs.example(op)[name]
    refused(op, name, value.clone().requires_grad_(), ValueError)
    with torch.no_grad():
        getattr(ops, op)(**inputs.example(op) | {name: value.clone().requires_grad_()})


STATE = [
    *[("dct2", name) for name in ("dct_h", "dct_w", "colour")],
    *[("ddim_scan", name) for name in ("z", "a", "b", "c", "n", "slope", "f", "g")],
    *[("interpolate_outputs", name) for name in ("slope", "e")],
    *[("extrapolate_states", name) for name in ("moved", "e", "z", "held", "n")],
    ("anderson_mix", "gamma"),
    ("anderson_mix", "out"),
]


@pytest.mark.parametrize(("op", "name"), STATE, ids="-".join)
def test_another_dtype_than_the_state(op: str, name: str) -> None:
    refused(op, name, inputs.example(op)[name].double(), TypeError)


@pytest.mark.parametrize(("op", "name"), [*FLOATING], ids="-".join)
def test_half_precision_is_for_what_the_model_touches(op: str, name: str) -> None:
    arguments = inputs.example(op) | {name: inputs.example(op)[name].bfloat16()}
    if name in ("e", "e_prev", "image") and op not in ("interpolate_outputs", "extrapolate_states"):
        getattr(ops, op)(**arguments)
    else:
        refused(op, name, arguments[name], TypeError)


@pytest.mark.parametrize("op", ["anderson_gram", "anderson_mix"])
@pytest.mark.parametrize(
    ("name", "value", "error"),
    [
        ("head", -1, ValueError),
        ("head", 4, ValueError),
        ("head", 1.0, TypeError),
        ("head", True, TypeError),
        ("count", -1, ValueError),
        ("count", 4, ValueError),
        ("count", None, TypeError),
    ],
)
def test_ring_positions(op: str, name: str, value: Any, error: type[Exception]) -> None:
    """By the op itself: the CPU kernels look once more."""
    with ops.use_backend("reference"):
        refused(op, name, value, error)


def test_gram_needs_a_difference() -> None:
    refused("anderson_gram", "count", 0, ValueError)


@pytest.mark.parametrize(("op", "name"), [("anderson_gram", "g_ring"), ("anderson_mix", "f_ring")])
@pytest.mark.parametrize("length", [1, 18])
def test_ring_lengths(op: str, name: str, length: int) -> None:
    refused(op, name, torch.zeros(length, 4, 1, 10), ValueError)


def test_history_of_the_solve() -> None:
    refused("anderson_solve", "rhs", torch.zeros(4, 1, 17, dtype=torch.float64), ValueError)


@pytest.mark.parametrize("name", ["ridge", "ridge_absolute"])
@pytest.mark.parametrize(
    ("value", "error"),
    [(-1e-9, ValueError), (float("nan"), ValueError), (float("inf"), ValueError), ("1", TypeError)],
)
def test_ridges(name: str, value: Any, error: type[Exception]) -> None:
    refused("anderson_solve", name, value, error)


@pytest.mark.parametrize(
    ("value", "error"),
    [(float("nan"), ValueError), (float("inf"), ValueError), (-float("inf"), ValueError), (None, TypeError)],
)
def test_beta(value: Any, error: type[Exception]) -> None:
    refused("ddim_scan", "beta", value, error)
    refused("extrapolate_states", "beta", value, error)


def test_a_whole_number_is_a_real_one() -> None:
    arguments = inputs.example("ddim_scan")
    expected = inputs.clone(arguments)
    ops.ddim_scan(**arguments | {"beta": 1})
    ops.ddim_scan(**expected | {"beta": 1.0})
    torch.testing.assert_close(arguments["f"], expected["f"], rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("op", inputs.WRITTEN)
def test_all_states_may_be_float64(op: str) -> None:
    getattr(ops, op)(**inputs.wide(inputs.example(op)))


NUMBERS = [("secant_slope", "pull"), *[("update_convergence", name) for name in ("rtol", "contraction", "growth")]]


@pytest.mark.parametrize(("op", "name"), NUMBERS, ids="-".join)
@pytest.mark.parametrize(
    ("value", "error"), [(-1e-9, ValueError), (float("nan"), ValueError), (float("inf"), ValueError), (None, TypeError)]
)
def test_numbers_that_are_not_negative(op: str, name: str, value: Any, error: type[Exception]) -> None:
    refused(op, name, value, error)


@pytest.mark.parametrize(("value", "error"), [(0, ValueError), (10**6, ValueError), (1.0, TypeError)])
def test_the_size_of_a_window(value: Any, error: type[Exception]) -> None:
    refused("update_convergence", "size", value, error)


def test_a_spectrum_without_dimensions() -> None:
    refused("dct2", "spectrum", torch.zeros(()), ValueError)


def test_an_implicit_chain_has_no_second_step() -> None:
    arguments = inputs.example("ddim_scan") | {"implicit": True}
    with pytest.raises(ValueError, match="c must be None"):
        ops.ddim_scan(**arguments)
    ops.ddim_scan(**arguments | {"c": None})


@pytest.mark.parametrize("value", ["rows", "", None, 0])
def test_scope(value: Any) -> None:
    refused("anderson_solve", "scope", value, ValueError)


def test_an_unknown_name_is_a_type_error() -> None:
    with pytest.raises(TypeError, match="bta"):
        ops.ddim_scan(**inputs.example("ddim_scan"), bta=1.0)  # type: ignore[call-arg]
