"""What every op does at the edges: nothing to do, numbers of NumPy, odd tensors, integers that lead out of bounds."""

from __future__ import annotations

import contextlib
from importlib.util import find_spec
from typing import Any

import inputs
import lanes
import numpy as np
import pytest
import torch
from asserts import in_new_python

from deqkern import ops
from deqkern.ops.contract import Argument, Bands, Index

CONTRACTS = inputs.CONTRACTS
TENSORS = [(op, argument.name) for op, contract in CONTRACTS.items() for argument in contract.tensors]
EACH_TENSOR = pytest.mark.parametrize(("op", "name"), TENSORS)
EACH_INTEGER = pytest.mark.parametrize(
    ("op", "argument"), inputs.INTEGERS, ids=lambda value: value.name if isinstance(value, Argument) else value
)


def backends_of(op: str) -> list[str]:
    missing = {"cuda": not inputs.HAS_CUDA, "lanes": bool(lanes.missing), "triton": find_spec("triton") is None}
    return [name for name in ("reference", "cpu", *inputs.KERNELS[op]) if not missing.get(name)]


@EACH_INTEGER
@pytest.mark.filterwarnings("ignore:.*(divide|invalid value|overflow)")
def test_integers_that_lead_out_of_bounds(op: str, argument: Argument) -> None:
    """Windows are cut and flags mean the same everywhere; what leads to a place is refused on the host."""
    for arguments in inputs.wild(op, argument.name):
        for backend in backends_of(op):
            given = inputs.clone(arguments)
            if not isinstance(argument.rule, Bands | Index):
                inputs.check(op, given, backend)
            elif backend != "triton":  # tests/ops/test_triton_accesses.py
                refused_or_not_read(op, argument.name, given, backend)


def refused_or_not_read(op: str, name: str, arguments: inputs.Arguments, backend: str) -> None:
    other = inputs.clone(arguments) | {name: arguments[name].clamp(0, 0)}
    try:
        inputs.run(op, backend, arguments)
    except ValueError as error:
        assert name in str(error)
        return
    with contextlib.suppress(ValueError):
        inputs.run(op, backend, other)
        assert all(torch.equal(arguments[key], other[key]) for key in CONTRACTS[op].written)


def test_the_cpu_kernels_stay_within_their_tensors_whatever_the_integers() -> None:
    """Beside pages that can be neither read nor written."""
    code = """
import contextlib, torch, inputs, fences
for op, argument in inputs.INTEGERS:
    for arguments in inputs.wild(op, argument.name):
        for at_end in (True, False):
            print(op, argument.name, arguments[argument.name], at_end, flush=True)
            given = {k: fences.fenced(v, at_end) if torch.is_tensor(v) else v for k, v in arguments.items()}
            with contextlib.suppress(ValueError):
                inputs.run(op, "cpu", given)
"""
    in_new_python(code)


@EACH_TENSOR
def test_a_lazy_negation_is_refused(op: str, name: str) -> None:
    value = inputs.example(op)[name]
    with pytest.raises(ValueError, match=rf"\b{name}\b.*negation"):
        getattr(ops, op)(**inputs.example(op) | {name: torch._neg_view(value)})


@EACH_TENSOR
@pytest.mark.filterwarnings("ignore:.*(prototype|beta state|Sparse)")
def test_a_tensor_that_is_not_dense_is_refused(op: str, name: str) -> None:
    value = inputs.example(op)[name]
    odd = {"sparse": value.to_sparse(), "nested": torch.nested.nested_tensor([value, value])}
    if value.dtype is torch.float32:
        odd["mkldnn"] = value.to_mkldnn()
    for kind, tensor in odd.items():
        with pytest.raises(ValueError, match=rf"\b{name}\b.*{kind}"):
            getattr(ops, op)(**inputs.example(op) | {name: tensor})


NUMPY = {float: (np.float64, np.float32), int: (np.int64, np.int32, np.uint8), bool: (np.bool_,), str: (np.str_,)}
SCALARS = [(op, argument.name) for op, contract in CONTRACTS.items() for argument in contract.scalars]


@pytest.mark.parametrize(("op", "name"), SCALARS)
def test_numbers_of_numpy_are_numbers(op: str, name: str) -> None:
    value = inputs.example(op)[name]
    for kind in NUMPY[type(value)]:
        arguments = inputs.example(op)
        expected = inputs.clone(arguments)
        getattr(ops, op)(**arguments | {name: kind(value)})
        getattr(ops, op)(**expected | {name: type(value)(kind(value))})
        assert all(torch.equal(arguments[key], expected[key]) for key in CONTRACTS[op].written)


@pytest.mark.parametrize(("op", "name"), SCALARS)
@pytest.mark.parametrize("value", [None, b"1", torch.ones(2), [1], -(10**5000)], ids=lambda value: type(value).__name__)
def test_what_is_no_number_is_refused_by_name(op: str, name: str, value: Any) -> None:
    with pytest.raises((ValueError, TypeError), match=rf"\b{name}\b"):
        getattr(ops, op)(**inputs.example(op) | {name: value})


@pytest.mark.parametrize("backend", ["reference", "cpu", "triton"])
@pytest.mark.parametrize("inverse", [False, True])
@pytest.mark.parametrize("total", [0, 3])
def test_no_images_to_transform(backend: str, inverse: bool, total: int) -> None:
    arguments = inputs.dct2(2, 3, 4, 5, inverse)
    arguments |= {"image": arguments["image"][:0], "rows": arguments["rows"][:0]}
    arguments["spectrum"] = torch.randn(total, 60)
    before = arguments["spectrum"].clone()
    inputs.run("dct2", backend, arguments)
    assert torch.equal(arguments["spectrum"], before)


def test_images_need_rows_of_a_spectrum() -> None:
    with pytest.raises(ValueError, match="rows must be empty where R is 0"):
        ops.dct2(**inputs.example("dct2") | {"spectrum": torch.zeros(0, 60)})
