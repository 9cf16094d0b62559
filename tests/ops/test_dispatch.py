"""What torch sees of the ops, and which backend runs."""

from __future__ import annotations

import inspect
import sys
import threading
import types

import inputs
import pytest
import torch
from asserts import assert_close
from torch import Tensor

from deqkern import ops
from deqkern.ops import _dispatch, reference

EACH_OP = pytest.mark.parametrize("op", list(inputs.WRITTEN))
OVERLOADS = [(op, overload) for op, contract in ops.CONTRACTS.items() for overload in contract.overloads]


def overload_of(op: str, overload: str) -> torch._ops.OpOverload:
    return getattr(getattr(torch.ops.deqkern, op), overload or "default")


@EACH_OP
def test_the_signature_is_the_reference(op: str) -> None:
    meaning, public = getattr(reference, op), getattr(ops, op)
    assert inspect.signature(public) == inspect.signature(meaning)
    assert public.__doc__ == meaning.__doc__


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("op", "overload"), OVERLOADS)
def test_opcheck(op: str, overload: str, dtype: torch.dtype) -> None:
    arguments = inputs.example(op) if dtype is torch.float32 else inputs.wide(inputs.example(op))
    if overload == "inverse":
        arguments["inverse"] = True
    torch.library.opcheck(overload_of(op, overload), tuple(arguments.values()))


def five_ops(
    x: Tensor, e: Tensor, slope: Tensor, g_ring: Tensor, f_ring: Tensor, window: Tensor, bands: Tensor
) -> tuple[Tensor, ...]:
    """An iteration of a solver; the last update overwrites x[1:], as solvers do."""
    steps, batch, _ = e.shape
    ones = torch.ones(steps)
    norms = torch.empty(steps, batch, 3, dtype=torch.float64)
    moments = torch.empty(steps, batch, slope.shape[2], 2, dtype=torch.float64)
    gram, rhs = torch.zeros(steps, batch, 2, 2, dtype=torch.float64), torch.empty(steps, batch, 2, dtype=torch.float64)
    gamma = torch.empty(steps, batch, 2)
    ops.ddim_scan(
        *(x, e, None, ones, -0.1 * ones, 0.1 * ones, ones, slope, bands, window, 1.0, False),
        *(f_ring[2], g_ring[2], norms),
    )
    ops.band_moments(g_ring[2], e, f_ring[2], bands, window, moments)
    ops.anderson_gram(g_ring, 2, 1, window, gram, rhs)
    ops.anderson_solve(gram, rhs, window, "joint", 1e-8, 0.0, False, gamma)
    ops.anderson_mix(f_ring, 2, 1, gamma, window, x[1:])
    ops.ddim_scan(x, e, None, ones, -0.1 * ones, None, ones, slope, bands, window, 1.0, False, x[1:], g_ring[0], norms)
    return norms, moments, gram, rhs, gamma


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_an_iteration_compiles_to_one_graph(backend: str) -> None:
    steps, batch, size = 5, 2, 12
    arguments = (
        torch.randn(steps + 1, batch, size),
        torch.randn(steps, batch, size),
        torch.randn(steps, batch, 2),
        torch.randn(3, steps, batch, size),
        torch.randn(3, steps, batch, size),
        torch.tensor([[0, steps]] * batch),
        torch.tensor([0, 4, size]),
    )
    eager, compiled = [tuple(value.clone() for value in arguments) for _ in range(2)]
    expected = five_ops(*eager)
    actual = torch.compile(five_ops, fullgraph=True, backend=backend)(*compiled)
    for one, other in zip((*actual, *compiled), (*expected, *eager), strict=True):
        assert_close(one, other)


@pytest.mark.parametrize("inverse", [False, True])
def test_dct2_compiles_to_one_graph(inverse: bool) -> None:
    arguments = inputs.dct2(2, 3, 4, 5, inverse)
    compiled = inputs.clone(arguments)
    ops.dct2(**arguments)
    torch.compile(ops.dct2, fullgraph=True, backend="aot_eager")(**compiled)
    for name in inputs.WRITTEN["dct2"]:
        assert_close(compiled[name], arguments[name])


@EACH_OP
def test_every_op_compiles_within_a_function(op: str) -> None:
    """By inductor, into one graph; what is computed before and after it stays where it is."""

    def around(**arguments: Tensor) -> list[Tensor]:
        getattr(ops, op)(**arguments)
        return [arguments[name] + 1 for name in inputs.WRITTEN[op]]

    torch._dynamo.reset()  # one function may be compiled again eight times
    compiled = inputs.example(op)
    eager = inputs.clone(compiled)
    expected = around(**eager)
    actual = torch.compile(around, fullgraph=True, backend="inductor")(**compiled)
    for one, other in zip(actual, expected, strict=True):
        assert_close(one, other)
    for name in inputs.WRITTEN[op]:
        assert_close(compiled[name], eager[name])


@EACH_OP
def test_autograd_sees_what_is_written_and_nothing_else(op: str) -> None:
    arguments = inputs.example(op)
    before = {name: value._version for name, value in arguments.items() if isinstance(value, Tensor)}
    getattr(ops, op)(**arguments)
    changed = {name for name, version in before.items() if arguments[name]._version != version}
    assert changed == set(inputs.WRITTEN[op]) - {"image"}


@EACH_OP
def test_inference_mode(op: str) -> None:
    with torch.inference_mode():
        arguments = inputs.example(op)
        expected = inputs.clone(arguments)
        getattr(ops, op)(**arguments)
        getattr(reference, op)(**expected)
    for name in inputs.WRITTEN[op]:
        assert_close(arguments[name], expected[name])


@pytest.mark.parametrize("backend", ["reference", "auto"])
@pytest.mark.parametrize(("op", "overload"), OVERLOADS)
def test_autocast_changes_nothing(op: str, overload: str, backend: str) -> None:
    arguments = inputs.dct2(2, 3, 4, 5, True) if overload == "inverse" else inputs.example(op)
    expected = inputs.clone(arguments)
    with ops.use_backend(backend):
        getattr(ops, op)(**expected)
        with torch.autocast("cpu", torch.bfloat16):
            getattr(ops, op)(**arguments)
    for name in inputs.WRITTEN[op]:
        assert_close(arguments[name], expected[name])


@EACH_OP
def test_float64_goes_to_the_reference(op: str) -> None:
    arguments = inputs.wide(inputs.example(op))
    expected = inputs.clone(arguments)
    getattr(ops, op)(**arguments)
    getattr(reference, op)(**expected)
    for name in inputs.WRITTEN[op]:
        if op == "update_convergence":  # it has no other dtype, and its kernel runs
            assert_close(arguments[name], expected[name], 1e-12)
        else:
            assert torch.equal(arguments[name], expected[name])


@EACH_OP
def test_a_gpu_gives_what_the_reference_gives(op: str, device: torch.device) -> None:
    arguments = inputs.example(op)
    expected = inputs.wide(arguments)
    getattr(reference, op)(**expected)
    moved = {name: value.to(device) if isinstance(value, Tensor) else value for name, value in arguments.items()}
    getattr(ops, op)(**moved)
    for name in inputs.WRITTEN[op]:
        assert_close(moved[name], expected[name], 1e-4, name)


@EACH_OP
@pytest.mark.parametrize("backend", ["cuda", "triton"])
def test_a_backend_asked_for_by_name_never_falls_back(op: str, backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    _dispatch._kernel.cache_clear()
    arguments = inputs.example(op)
    before = inputs.clone(arguments)
    with ops.use_backend(backend), pytest.raises(RuntimeError, match=f"'{backend}' cannot run {op} here: .+"):
        getattr(ops, op)(**arguments)
    for name in inputs.WRITTEN[op]:
        assert torch.equal(arguments[name], before[name])


def test_the_cpu_kernels_refuse_float64_by_name() -> None:
    arguments = inputs.wide(inputs.example("ddim_scan"))
    with ops.use_backend("cpu"), pytest.raises(RuntimeError, match="float32"):
        ops.ddim_scan(**arguments)
    with ops.use_backend("cpu", "reference"):
        ops.ddim_scan(**arguments)


def test_the_choice_nests_ends_and_belongs_to_its_thread() -> None:
    seen: list[tuple[str, ...]] = []
    with ops.use_backend("reference"):
        with ops.use_backend("cpu"):
            assert _dispatch._requested.get() == ("cpu",)
        with pytest.raises(KeyError), ops.use_backend("cuda"):
            raise KeyError
        assert _dispatch._requested.get() == ("reference",)
        other = threading.Thread(target=lambda: seen.append(_dispatch._requested.get()))
        other.start()
        other.join()
    assert seen == [("auto",)] and _dispatch._requested.get() == ("auto",)


@pytest.mark.parametrize("names", [("numpy",), (), ("cpu", "gpu")])
def test_unknown_backends(names: tuple[str, ...]) -> None:
    with pytest.raises(ValueError, match="names"), ops.use_backend(*names):
        pass


def test_a_kernel_module_is_found_by_its_name(monkeypatch: pytest.MonkeyPatch) -> None:
    """deqkern.kernels.<op>.<op>, with the reference's signature, is the Triton backend of an op."""
    calls: list[tuple[object, ...]] = []
    module = types.ModuleType("deqkern.kernels.anderson_mix")
    module.anderson_mix = lambda *arguments: calls.append(arguments)  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "deqkern.kernels.anderson_mix", module)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    _dispatch._kernel.cache_clear()
    arguments = inputs.example("anderson_mix")
    try:
        with ops.use_backend("triton"):
            ops.anderson_mix(**arguments)
    finally:
        _dispatch._kernel.cache_clear()
    assert len(calls) == 1 and len(calls[0]) == len(arguments)


def test_backends_say_what_loaded_or_why_not() -> None:
    report = ops.backends()
    assert list(report) == ["reference", "cpu", "triton", "cuda"]
    for state in report.values():
        assert state["loaded"] == bool(state["ops"])
        assert set(state["ops"]) == set(inputs.WRITTEN) or state["reason"]
    assert report["cpu"]["loaded"], report["cpu"].get("reason")
    assert report["cpu"]["isa"] in report["cpu"]["isas"]
    assert report["cpu"]["threads"] == torch.get_num_threads()
