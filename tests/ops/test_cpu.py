"""What is the same for every kernel on the CPU: threads, forks, instruction sets, and indices that it follows."""

from __future__ import annotations

from collections.abc import Iterator

import inputs
import pytest
import torch
from asserts import assert_close, in_new_python

from deqkern import ops

EACH_OP = pytest.mark.parametrize("op", list(inputs.WRITTEN))


@pytest.fixture
def threads() -> Iterator[None]:
    """Puts the number of threads back."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@EACH_OP
def test_two_threads_give_what_one_gives(op: str, threads: None) -> None:
    one = inputs.large(op)
    two = inputs.clone(one)
    for count, arguments in ((1, one), (2, two)):
        torch.set_num_threads(count)
        with ops.use_backend("cpu"):
            getattr(ops, op)(**arguments)
    for name in inputs.WRITTEN[op]:
        assert_close(two[name], one[name], 1e-6 if one[name].dtype is torch.float32 else 1e-12, name)


def test_a_forked_child_does_not_wait_for_threads_it_has_not() -> None:
    code = """
import os, signal, torch, inputs
from deqkern import ops
torch.set_num_threads(2)
arguments = inputs.large("ddim_scan")
with ops.use_backend("cpu"):
    ops.ddim_scan(**arguments)
    child = os.fork()
    if child == 0:
        signal.alarm(120)
        ops.ddim_scan(**arguments)
        os._exit(0)
print(os.waitpid(child, 0)[1])
"""
    assert in_new_python(code).strip() == "0"


@pytest.mark.parametrize("isa", ops.backends()["cpu"].get("isas", []))
def test_every_instruction_set_gives_what_the_reference_gives(isa: str) -> None:
    code = f"""
import torch, inputs
from deqkern import ops
torch.manual_seed(1)
assert ops.backends()["cpu"]["isa"] == {isa!r}
for size in (1, 5, 17, 255, 257, 3072):
    for noise in (True, False):
        inputs.check("ddim_scan", inputs.ddim_scan(7, 3, size, 5, noise=noise), "cpu")
    inputs.check("band_moments", inputs.band_moments(7, 3, size, 5), "cpu")
    inputs.check("interpolate_outputs", inputs.interpolate_outputs(7, 3, size, 5), "cpu")
    inputs.check("extrapolate_states", inputs.extrapolate_states(7, 6, size), "cpu")
    for count in (1, 2, 5, 16):
        inputs.check("anderson_gram", inputs.anderson_gram(2, 3, size, 16, 3, count), "cpu")
        inputs.check("anderson_mix", inputs.anderson_mix(2, 3, size, 16, 3, count), "cpu")
for scope in ops.SCOPES:
    inputs.check("anderson_solve", inputs.anderson_solve(7, 5, 6, scope=scope), "cpu")
for shape in ((1, 1, 1, 1), (5, 3, 31, 17), (2, 3, 16, 32), (2, 4, 9, 33)):
    for inverse in (True, False):
        inputs.check("dct2", inputs.dct2(*shape, inverse=inverse), "cpu")
for inverse in (True, False):
    split = dict(dct_h=inputs.mirrored(48, 2), dct_w=inputs.mirrored(22, 1), colour=None)
    split |= dict(order=torch.arange(3 * 48 * 22))
    inputs.check("dct2", inputs.dct2(2, 3, 48, 22, inverse=inverse) | split, "cpu")
"""
    in_new_python(code, DEQKERN_ISA=isa)


def test_no_access_lies_outside_of_its_tensor() -> None:
    """Tensors that end, and then that begin, where a page does, beside pages that can be neither read nor written."""
    code = """
import torch, inputs, fences
torch.manual_seed(1)
for op, cases in inputs.SMALL.items():
    for arguments in cases:
        for at_end in (True, False):
            print(op, at_end, flush=True)
            given = arguments().items()
            inputs.check(op, {k: fences.fenced(v, at_end) if torch.is_tensor(v) else v for k, v in given}, "cpu")
"""
    in_new_python(code)


def test_an_instruction_set_that_is_not_there_is_refused() -> None:
    code = """
import inputs
from deqkern import ops
print(ops.backends()["cpu"])
try:
    ops.ddim_scan(**inputs.example("ddim_scan"))
except RuntimeError as error:
    print("refused:", error)
"""
    report, refusal = in_new_python(code, DEQKERN_ISA="abacus").splitlines()
    assert "'loaded': False" in report and "abacus" in report
    assert refusal.startswith("refused:") and "abacus" in refusal


@pytest.mark.parametrize("wrong", [[1, 4, 8, 10], [0, 4, 8, 11], [0, 8, 4, 10], [0, -4, 8, 10], [0, 4, 8, 9]], ids=str)
@pytest.mark.parametrize("op", ["ddim_scan", "band_moments", "interpolate_outputs"])
def test_bands_that_lead_out_of_bounds(op: str, wrong: list[int]) -> None:
    with ops.use_backend("cpu"), pytest.raises(ValueError, match="bands"):
        getattr(ops, op)(**inputs.example(op) | {"bands": torch.tensor(wrong)})


@pytest.mark.parametrize(("name", "wrong"), [("rows", -1), ("rows", 5), ("order", 60), ("order", -1)])
def test_rows_and_order_that_lead_out_of_bounds(name: str, wrong: int) -> None:
    arguments = inputs.example("dct2")
    arguments[name][1] = wrong
    with ops.use_backend("cpu"), pytest.raises(ValueError, match=name):
        ops.dct2(**arguments)


@pytest.mark.parametrize("wrong", [-1, 4])
@pytest.mark.parametrize("kind", [0, 1, 2])
def test_gaps_that_lead_out_of_bounds(kind: int, wrong: int) -> None:
    arguments = inputs.example("interpolate_outputs")
    arguments["rows"][kind, 0] = wrong
    with ops.use_backend("cpu"), pytest.raises(ValueError, match="rows"):
        ops.interpolate_outputs(**arguments)


@pytest.mark.parametrize(
    "op", [op for op in inputs.WRITTEN if op not in ("dct2", "secant_slope", "interpolate_outputs")]
)
def test_windows_that_lead_out_of_bounds_are_cut(op: str) -> None:
    """No error: they live on the device, and nothing waits to look at them."""
    arguments = inputs.example(op) | {"window": torch.tensor([[0, 1000]])}
    expected = inputs.example(op) | {name: value for name, value in inputs.clone(arguments).items() if name != "window"}
    with ops.use_backend("cpu"):
        getattr(ops, op)(**arguments)
        getattr(ops, op)(**expected)
    for name in inputs.WRITTEN[op]:
        assert torch.equal(arguments[name], expected[name])
