from __future__ import annotations

import importlib
from typing import Any

import inputs
import pytest
import torch
from aot import Case
from asserts import assert_close

from deqkern.ops import reference

BACKENDS = inputs.backends("ddim_scan")


def scan(block: int, stages: int, implicit: bool, **constants: Any) -> dict[str, Any]:
    return {"IMPLICIT": implicit, "BLOCK": block, "STAGES": stages, "c": None, **constants}


def two_step(block: int, stages: int, **constants: Any) -> dict[str, Any]:
    return {"IMPLICIT": False, "BLOCK": block, "STAGES": stages, **constants}


BF16, FP16 = {"e": "*bf16"}, {"e": "*fp16"}
COMPILED = [
    Case("ddim_scan_kernel", scan(128, 8, False), 1, 25, 2),  # 8 x (x, e, z), and the first state
    Case("ddim_scan_kernel", scan(128, 8, True, z=None), 1, 17, 2),
    Case("ddim_scan_kernel", scan(256, 4, False), 1, 26, 4),
    Case("ddim_scan_kernel", scan(256, 4, True, z=None), 1, 18, 4),
    Case("ddim_scan_kernel", scan(256, 4, False, z=None), 1, 10, 4, BF16),
    Case("ddim_scan_kernel", scan(128, 8, False), 1, 17, 2, FP16),
    Case("ddim_scan_kernel", scan(256, 4, True), 1, 0, 0, BF16, aligned=False),
    Case("ddim_scan_kernel", two_step(128, 8), 1, 26, 2),  # and the first output
    Case("ddim_scan_kernel", two_step(256, 4, z=None), 1, 20, 4),
    Case("ddim_scan_kernel", two_step(256, 4, z=None), 1, 11, 4, BF16),
    Case("ddim_scan_norms_kernel", {"PARTIALS": 128}, 1),
]
KINDS = pytest.mark.parametrize(
    "kind", [{}, {"implicit": True}, {"two_step": True}], ids=["explicit", "implicit", "two-step"]
)


@BACKENDS
@KINDS
@pytest.mark.parametrize("noise", [True, False])
@pytest.mark.parametrize(("steps", "batch", "size", "count"), inputs.SIZES)
def test_equals_the_reference(
    backend: str, steps: int, batch: int, size: int, count: int, noise: bool, kind: dict[str, bool]
) -> None:
    inputs.skip_slow(backend, steps, batch, size)
    inputs.check("ddim_scan", inputs.ddim_scan(steps, batch, size, count, size % 5, noise, **kind), backend)


@BACKENDS
@KINDS
@pytest.mark.parametrize("first", range(5))
def test_every_kind_of_window(backend: str, first: int, kind: dict[str, bool]) -> None:
    inputs.check("ddim_scan", inputs.ddim_scan(7, 1, 33, 3, first, **kind), backend)


@BACKENDS
@KINDS
def test_rows_outside_the_windows_are_not_written(backend: str, kind: dict[str, bool]) -> None:
    inputs.check("ddim_scan", inputs.filled(inputs.ddim_scan(4, 5, 33, 3, **kind)), backend)


@BACKENDS
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_model_output_in_half_precision(backend: str, dtype: torch.dtype) -> None:
    arguments = inputs.ddim_scan(7, 3, 65, 3)
    arguments["e"] = arguments["e"].to(dtype)
    inputs.check("ddim_scan", arguments, backend)


@BACKENDS
@KINDS
@pytest.mark.parametrize(("steps", "batch", "size"), [(1, 1, 1), (7, 3, 255), (50, 1, 3072)])
def test_update_may_overwrite_the_states(
    backend: str, steps: int, batch: int, size: int, kind: dict[str, bool]
) -> None:
    inputs.skip_slow(backend, steps, batch, size)
    arguments = inputs.ddim_scan(steps, batch, size, 3, **kind)
    expected = inputs.wide(arguments)
    reference.ddim_scan(**expected)
    before = arguments["x"].clone()
    arguments["f"] = arguments["x"][1:]
    inputs.run("ddim_scan", backend, arguments)
    written = ~inputs.inactive(arguments["window"], steps)
    assert_close(arguments["f"][written], expected["f"][written])
    assert torch.equal(arguments["f"][~written].nan_to_num(9.0), before[1:][~written].nan_to_num(9.0))
    assert torch.equal(arguments["x"][0].nan_to_num(9.0), before[0].nan_to_num(9.0))
    assert_close(arguments["g"], expected["g"])
    for part in range(3):
        assert_close(arguments["norms"][..., part], expected["norms"][..., part])


@BACKENDS
def test_exact_slopes_solve_a_linear_chain(backend: str) -> None:
    """A model e = s x with its own slope makes the system triangular: one scan with beta = 1 is the answer."""
    steps, batch, size = 20, 2, 31
    window = torch.tensor([[0, steps]] * batch)
    arguments = inputs.ddim_scan(steps, batch, size, 1, noise=False) | {"beta": 1.0, "window": window}
    arguments["x"] = torch.randn(steps + 1, batch, size)
    slope = torch.randn(steps, batch, 1)
    arguments["slope"], arguments["e"] = slope, slope * arguments["x"][:-1]
    inputs.run("ddim_scan", backend, arguments)
    state = arguments["x"][0]
    for i in range(steps):
        state = (arguments["a"][i] + arguments["b"][i] * slope[i]) * state
        assert_close(arguments["f"][i], state, 1e-4)


@BACKENDS
def test_exact_slopes_solve_a_linear_chain_of_two_steps(backend: str) -> None:
    """The same where each step uses the output of the one before too, in a window that begins in the chain."""
    steps, batch, size, begin = 20, 2, 31, 6
    arguments = inputs.ddim_scan(steps, batch, size, 1, noise=False, two_step=True) | {"beta": 1.0}
    slope, a, b, c = torch.randn(steps, batch, 1), *(arguments[name] for name in "abc")
    state = [torch.randn(batch, size)]
    for i in range(steps):
        state.append((a[i] + b[i] * slope[i]) * state[i] + (c[i] * slope[i - 1] * state[i - 1] if i else 0.0))
    x = torch.randn(steps + 1, batch, size)
    x[: begin + 1] = torch.stack(state[: begin + 1])
    arguments |= {"x": x, "slope": slope, "e": slope * x[:-1], "window": torch.tensor([[begin, steps]] * batch)}
    inputs.run("ddim_scan", backend, arguments)
    assert_close(arguments["f"][begin:], torch.stack(state[begin + 1 :]), 1e-4)


@BACKENDS
def test_exact_slopes_invert_a_linear_chain(backend: str) -> None:
    """From the end of x[i+1] = (a + b s) x[i], the implicit scan with the steps in the other order finds its start."""
    steps, batch, size = 20, 2, 31
    window = torch.tensor([[0, steps]] * batch)
    arguments = inputs.ddim_scan(steps, batch, size, 1, noise=False, implicit=True) | {"beta": 1.0, "window": window}
    slope = torch.randn(steps, batch, 1)
    a, b = arguments["a"], arguments["b"]
    chain = [torch.randn(batch, size)]
    for i in range(steps):
        chain.append((a[i] + b[i] * slope[i]) * chain[-1])
    x = torch.randn(steps + 1, batch, size)
    x[0] = chain[-1]
    slope = slope.flip(0).contiguous()
    arguments |= {"x": x, "slope": slope, "e": slope * x[1:], "a": 1 / a.flip(0), "b": -(b / a).flip(0)}
    inputs.run("ddim_scan", backend, arguments)
    for i in range(steps):
        assert_close(arguments["f"][i], chain[steps - 1 - i], 1e-4)


@BACKENDS
@KINDS
def test_a_sample_that_overflowed_stays_alone(backend: str, kind: dict[str, bool]) -> None:
    arguments = inputs.ddim_scan(5, 3, 300, 3, **kind) | {"window": torch.tensor([[0, 5]] * 3)}
    for name in ("x", "e", "z", "slope"):
        arguments[name] = torch.randn_like(arguments[name])
    spoilt = inputs.clone(arguments)
    spoilt["e"][2, 1, 7], spoilt["e"][2, 1, 70] = torch.nan, torch.inf
    inputs.run("ddim_scan", backend, arguments)
    inputs.run("ddim_scan", backend, spoilt)
    for name in ("f", "g", "norms"):
        assert torch.equal(spoilt[name][:, [0, 2]], arguments[name][:, [0, 2]])
    others = [d for d in range(300) if d not in (7, 70)]
    assert torch.equal(spoilt["f"][:, 1, others], arguments["f"][:, 1, others])
    assert not spoilt["norms"][2, 1, 0].isfinite() and not spoilt["norms"][2:, 1, 1].isfinite().any()


@BACKENDS
def test_blocks_are_added_in_double_precision(backend: str) -> None:
    arguments = inputs.ddim_scan(1, 1, 1025, 1, noise=False)
    arguments["x"], arguments["e"] = torch.zeros(2, 1, 1025), torch.zeros(1, 1, 1025)
    arguments["x"][1, 0, 0], arguments["x"][1, 0, -1] = 2.0**12, 1.0
    inputs.run("ddim_scan", backend, arguments)
    assert (arguments["norms"] == 2**24 + 1).all()


@KINDS
def test_the_blocks_of_large_problems(monkeypatch: pytest.MonkeyPatch, kind: dict[str, bool]) -> None:
    """Triton takes other blocks where there are many elements: more than fit into a test."""
    pytest.importorskip("triton")
    module = importlib.import_module("deqkern.kernels.ddim_scan")
    monkeypatch.setattr(module, "launch_size", lambda batch, size: (256, 4))
    inputs.check("ddim_scan", inputs.ddim_scan(5, 3, 700, 24, **kind), "triton")
