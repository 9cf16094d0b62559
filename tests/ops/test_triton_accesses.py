"""What a kernel reads and writes, seen while Triton interprets it: a GPU forgives less than the interpreter does.

No access lies outside the tensors of its launch, and no program of a launch touches what another one writes, since they
run in any order. Scratch memory begins as NaN, and so does what a mask leaves out of a load, if it has no `other`.
"""

from __future__ import annotations

import importlib
from typing import Any

import inputs
import numpy
import pytest
import torch
from torch import Tensor

from deqkern.ops.contract import Argument, Index

interpreter = pytest.importorskip("triton.runtime.interpreter")
pytestmark = [
    pytest.mark.skipif(not inputs.INTERPRETED, reason="the kernels run on the GPU"),
    pytest.mark.filterwarnings("ignore:.*encountered in divide"),
]


class Accesses:
    """The places that the programs of the launch under way have read and written."""

    def __init__(self) -> None:
        self.tensors: list[tuple[int, int]] = []
        self.places: dict[str, list[Any]] = {"read": [], "written": []}
        self.launches = 0
        self.may_meet = False  # two programs may write to one place

    def begin(self, tensors: list[Tensor]) -> None:
        self.tensors = [(value.data_ptr(), value.data_ptr() + value.nbytes) for value in tensors]
        self.places = {"read": [], "written": []}
        self.launches += 1

    def add(self, kind: str, pointers: Any, mask: Any, program: int) -> None:
        size = pointers.get_element_ty().primitive_bitwidth // 8
        active = numpy.broadcast_to(mask.data, pointers.data.shape).astype(bool)
        places = pointers.data[active].astype(numpy.int64)
        inside = numpy.zeros(places.shape, bool)
        for begin, end in self.tensors:
            inside |= (places >= begin) & (places + size <= end)
        assert inside.all(), f"{kind} outside of every tensor"
        self.places[kind].append(numpy.stack([places, numpy.full_like(places, program)]))

    def end(self) -> None:
        if self.may_meet:
            return
        written, read = (
            numpy.unique(numpy.concatenate(self.places[kind], 1), axis=1) if self.places[kind] else numpy.empty((2, 0))
            for kind in ("written", "read")
        )
        assert numpy.unique(written[0]).size == written.shape[1], "two programs write to one place"
        read = read[:, numpy.isin(read[0], written[0])]
        owner = written[1, numpy.searchsorted(written[0], read[0])]
        assert (owner == read[1]).all(), "a program reads what another one writes"


@pytest.fixture
def accesses(monkeypatch: pytest.MonkeyPatch) -> Accesses:
    seen, builder, executor = Accesses(), interpreter.InterpreterBuilder, interpreter.GridExecutor
    load, store, call = builder.create_masked_load, builder.create_masked_store, executor.__call__
    arguments = executor._init_args_hst

    def watched_load(self: Any, pointers: Any, mask: Any, other: Any, *rest: Any) -> Any:
        seen.add("read", pointers, mask, self.grid_idx[0])
        loaded = load(self, pointers, mask, other, *rest)
        if other is None and loaded.data.size > 1 and loaded.data.dtype.kind == "f":  # it drops a scalar 0.0
            loaded.data = numpy.where(mask.data, loaded.data, loaded.data.dtype.type(numpy.nan))
        return loaded

    def watched_store(self: Any, pointers: Any, value: Any, mask: Any, *rest: Any) -> Any:
        seen.add("written", pointers, mask, self.grid_idx[0])
        return store(self, pointers, value, mask, *rest)

    def watched_arguments(self: Any, args: Any, kwargs: Any) -> Any:
        on_host = arguments(self, args, kwargs)
        seen.begin([value for value in on_host[0] if isinstance(value, Tensor)])
        return on_host

    def watched_call(self: Any, *args: Any, **kwargs: Any) -> Any:
        result = call(self, *args, **kwargs)
        seen.end()
        return result

    monkeypatch.setattr(builder, "create_masked_load", watched_load)
    monkeypatch.setattr(builder, "create_masked_store", watched_store)
    monkeypatch.setattr(executor, "_init_args_hst", watched_arguments)
    monkeypatch.setattr(executor, "__call__", watched_call)
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *args, **kwargs: empty(*args, **kwargs).fill_(torch.nan))
    return seen


# With these, the small arguments take several blocks of a row and several rounds of each loop.
CONSTANTS = {"BLOCK": 32, "PARTIALS": 2, "BANDS": 4}


@pytest.mark.parametrize("op", [op for op, names in inputs.KERNELS.items() if "triton" in names])
def test_programs_stay_within_their_tensors_and_apart(
    op: str, accesses: Accesses, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = importlib.import_module(f"deqkern.kernels.{op}")
    for name in CONSTANTS.keys() & vars(module).keys():
        monkeypatch.setattr(module, name, CONSTANTS[name])
    for arguments in inputs.SMALL[op]:
        launches = accesses.launches
        inputs.check(op, arguments(), "triton")
        assert accesses.launches > launches


@pytest.mark.filterwarnings("ignore:.*(divide|invalid value|overflow)")
@pytest.mark.parametrize(
    ("op", "argument"),
    [(op, argument) for op, argument in inputs.INTEGERS if "triton" in inputs.KERNELS[op]],
    ids=lambda value: value if isinstance(value, str) else value.name,
)
def test_programs_stay_within_their_tensors_whatever_the_integers(
    op: str, argument: Argument, accesses: Accesses
) -> None:
    accesses.may_meet = isinstance(argument.rule, Index)  # at the end of what they lead beyond
    for arguments in inputs.wild(op, argument.name):
        inputs.run(op, "triton", arguments)
