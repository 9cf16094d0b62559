"""Each wrong argument of each op is refused with an error that names it."""

from __future__ import annotations

from typing import Any

import inputs
import pytest
import torch

from deqkern import ops
from deqkern.ops.contract import SYMBOLS, AtLeast, Output, State

CONTRACTS = inputs.CONTRACTS
TENSORS = [(op, argument.name) for op, contract in CONTRACTS.items() for argument in contract.tensors]
EACH_TENSOR = pytest.mark.parametrize(("op", "name"), TENSORS)


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


def gives(op: str, name: str) -> set[int]:
    """The dimensions of an argument that give the call a size: with another one it is right, and the next is named."""
    return {dimension for owner, dimension, _ in CONTRACTS[op].symbols.values() if owner == name}


def rule(op: str, name: str) -> Any:
    (argument,) = (argument for argument in CONTRACTS[op].tensors if argument.name == name)
    return argument.rule


@EACH_TENSOR
def test_wrong_shape(op: str, name: str) -> None:
    value = inputs.example(op)[name]
    refused(op, name, value.unsqueeze(0), ValueError)
    if value.ndim > 1:
        refused(op, name, value.flatten()[:0], ValueError)
        refused(op, name, value[0], ValueError)
    for dimension in {*range(value.ndim)} - gives(op, name):
        refused(op, name, torch.cat([value, value], dimension), ValueError)


@pytest.mark.parametrize(("op", "name"), [pair for pair in TENSORS if gives(*pair)])
def test_sizes_that_fit_no_other(op: str, name: str) -> None:
    value = inputs.example(op)[name]
    for symbol, (owner, dimension, _) in CONTRACTS[op].symbols.items():
        if owner != name:
            continue
        if SYMBOLS[symbol][0]:
            refused(op, name, value.narrow(dimension, 0, 0), ValueError)
        if any(symbol in argument.rule.shape for argument in CONTRACTS[op].tensors if argument.name != name):
            with pytest.raises(ValueError, match="must have shape"):
                getattr(ops, op)(**inputs.example(op) | {name: torch.cat([value, value], dimension)})


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


@pytest.mark.parametrize(("op", "name"), FLOATING)
def test_requires_grad(op: str, name: str) -> None:
    value = inputs.example(op)[name]
    refused(op, name, value.clone().requires_grad_(), ValueError)
    with torch.no_grad():
        getattr(ops, op)(**inputs.example(op) | {name: value.clone().requires_grad_()})


STATE = [
    (op, argument.name)
    for op, contract in CONTRACTS.items()
    for argument in contract.tensors
    if isinstance(argument.rule, State) and argument is not contract.chooser
]


@pytest.mark.parametrize(("op", "name"), STATE)
def test_another_dtype_than_the_state(op: str, name: str) -> None:
    refused(op, name, inputs.example(op)[name].double(), TypeError)


@pytest.mark.parametrize(("op", "name"), [*FLOATING])
def test_half_precision_is_for_what_the_model_touches(op: str, name: str) -> None:
    arguments = inputs.example(op) | {name: inputs.example(op)[name].bfloat16()}
    if isinstance(rule(op, name), Output):
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


NUMBERS = [
    (op, argument.name)
    for op, contract in CONTRACTS.items()
    for argument in contract.scalars
    if isinstance(argument.rule, AtLeast)
]


@pytest.mark.parametrize(("op", "name"), NUMBERS)
@pytest.mark.parametrize(
    ("value", "error"), [(-1e-9, ValueError), (float("nan"), ValueError), (float("inf"), ValueError), (None, TypeError)]
)
def test_numbers_that_are_not_negative(op: str, name: str, value: Any, error: type[Exception]) -> None:
    refused(op, name, value, error)


@pytest.mark.parametrize(("value", "error"), [(0, ValueError), (10**6, ValueError), (1.0, TypeError)])
def test_the_size_of_a_window(value: Any, error: type[Exception]) -> None:
    refused("update_convergence", "window_size", value, error)


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
