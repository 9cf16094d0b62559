"""The CUDA kernels: one launch, on the stream and the device of the caller; errors, graphs, and the sanitizers."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import inputs
import pytest
import torch
from asserts import assert_close

from deqkern import ops
from deqkern.ops import _native, reference

_C: Any = pytest.importorskip("deqkern._C")
OPS = [op for op, names in inputs.KERNELS.items() if "cuda" in names]
EACH_OP = pytest.mark.parametrize("op", OPS)
EACH_SCOPE = pytest.mark.parametrize("scope", ops.SCOPES)
SANITIZER_SECONDS = 120
NEEDS_CUDA = pytest.mark.skipif(not _C.cuda_compiled(), reason="compiled without CUDA")


def gpu(test: Any) -> Any:
    marked = pytest.mark.skipif(not inputs.HAS_CUDA or not _C.cuda_compiled(), reason="no GPU")(test)
    return pytest.mark.gpu(marked)


def on_device(scope: str, device: str = "cuda") -> inputs.Arguments:
    return inputs.to(inputs.anderson_solve(300, 5, 5, scope=scope), device)


def solve(arguments: inputs.Arguments) -> torch.Tensor:
    with ops.use_backend("cuda"):
        ops.anderson_solve(**arguments)
    return arguments["gamma"]


def test_what_is_passed() -> None:
    calls: list[tuple[object, ...]] = []
    contract = ops.CONTRACTS["anderson_solve"]
    call = _native.write_cuda(contract, lambda *arguments: calls.append(arguments), lambda device: 7000 + device)
    arguments = inputs.anderson_solve(4, 2, 3, scope="joint", implicit=True) | {"ridge_absolute": 0.5}
    call(**arguments)
    pointers = [arguments[name].data_ptr() for name in ("gram", "rhs", "window", "gamma")]
    assert calls == [(*pointers, 4, 2, 3, ops.SCOPES.index("joint"), 1e-6, 0.5, True, -1, 6999)]


@NEEDS_CUDA
def test_bad_arguments_never_reach_the_gpu() -> None:

    def call(address: int, S: int = 1, m: int = 1, scope: int = 0) -> None:
        _C.cuda_anderson_solve(address, 8, 8, 8, S, 1, m, scope, 0.0, 0.0, False, 0, 0)

    with pytest.raises(ValueError, match="gram is null"):
        call(0)
    with pytest.raises(ValueError, match="scope must be"):
        call(8, scope=len(ops.SCOPES))
    with pytest.raises(ValueError, match="m must be"):
        call(8, m=17)
    call(0, S=0)


@NEEDS_CUDA
def test_errors_are_in_the_words_of_cuda() -> None:
    """No such device, or no driver at all; the next call is not told again."""
    with pytest.raises(RuntimeError, match=r"^CUDA: \w+"):
        _C.cuda_anderson_solve(8, 8, 8, 8, 1, 1, 1, 0, 0.0, 0.0, False, 4321, 0)
    if inputs.HAS_CUDA:
        assert solve(on_device("row")).isfinite().all()


@EACH_OP
def test_the_reason_names_what_is_missing(op: str) -> None:
    arguments = inputs.example(op)
    reason = "GPU" if not _native.unavailable and _C.cuda_compiled() else "compiled without CUDA"
    with ops.use_backend("cuda"), pytest.raises(RuntimeError, match=reason):
        getattr(ops, op)(**arguments)


@gpu
@EACH_OP
def test_it_is_what_a_gpu_uses_first(op: str) -> None:
    assert op in ops.backends()["cuda"]["ops"]
    one, other = inputs.to(inputs.example(op), "cuda"), inputs.to(inputs.example(op), "cuda")
    for name in inputs.WRITTEN[op]:
        other[name] = one[name].clone()
    other |= {name: value for name, value in one.items() if name not in inputs.WRITTEN[op]}
    getattr(ops, op)(**one)
    with ops.use_backend("cuda"):
        getattr(ops, op)(**other)
    for name in inputs.WRITTEN[op]:
        assert torch.equal(one[name], other[name])


@gpu
@EACH_SCOPE
def test_every_run_gives_the_same_bits(scope: str) -> None:
    arguments = on_device(scope)
    first = solve(arguments).clone()
    for _ in range(20):
        arguments["gamma"].fill_(torch.nan)
        assert torch.equal(solve(arguments), first)


@gpu
@EACH_SCOPE
def test_it_waits_for_its_own_stream_and_no_other(scope: str) -> None:
    arguments, side = on_device(scope), torch.cuda.Stream()
    expected = solve(arguments).clone()
    late = arguments | {"gram": torch.zeros_like(arguments["gram"]), "gamma": torch.empty_like(expected)}
    torch.cuda.synchronize()
    with torch.cuda.stream(side):
        torch.cuda._sleep(100_000_000)
        late["gram"].copy_(arguments["gram"])
        solve(late)
        assert not side.query()  # the call came back before the kernel ran
    side.synchronize()
    assert torch.equal(late["gamma"], expected)


@gpu
@EACH_SCOPE
def test_a_graph_captures_it(scope: str) -> None:
    arguments = on_device(scope)
    solve(arguments)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        solve(arguments)
    other = on_device(scope)
    arguments["gram"].copy_(other["gram"])
    arguments["rhs"].copy_(other["rhs"])
    graph.replay()
    assert torch.equal(arguments["gamma"], solve(other))


@gpu
@EACH_SCOPE
def test_the_gpu_gives_what_its_emulation_gives(scope: str) -> None:
    arguments = inputs.anderson_solve(70, 3, 11, scope=scope)
    emulated = inputs.clone(arguments)
    inputs.run("anderson_solve", "cuda", arguments)
    inputs.run("anderson_solve", "lanes", emulated)
    assert_close(arguments["gamma"], emulated["gamma"], 1e-6)


@gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one GPU")
def test_another_device() -> None:
    arguments = on_device("causal", "cuda:1")
    expected = inputs.wide(arguments)
    reference.anderson_solve(**expected)
    assert torch.cuda.current_device() == 0
    assert_close(solve(arguments), expected["gamma"])
    assert torch.cuda.current_device() == 0


def sanitizer() -> str | None:
    nvcc = shutil.which("nvcc")
    places = [str(Path(nvcc).resolve().parent)] if nvcc else []
    return shutil.which("compute-sanitizer") or shutil.which("compute-sanitizer", path=os.pathsep.join(places))


@gpu
@pytest.mark.skipif(sanitizer() is None, reason="no compute-sanitizer")
@pytest.mark.parametrize("tool", ["memcheck", "racecheck", "synccheck"])
def test_a_sanitizer_finds_nothing(tool: str) -> None:
    code = """
import inputs
from deqkern import ops
for scope in ops.SCOPES:
    for history in (1, 5, 8, 11, 16):
        for scale in (1.0, 0.0):
            arguments = inputs.anderson_solve(70, 3, history, scope=scope)
            arguments["gram"] *= scale
            inputs.run("anderson_solve", "cuda", arguments)
"""
    paths = {"PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    options = ["--report-api-errors", "no"] if tool == "memcheck" else []  # calls by which torch looks around
    command = [str(sanitizer()), "--tool", tool, "--error-exitcode", "9", *options, sys.executable, "-c", code]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, env=os.environ | paths, check=False, timeout=SANITIZER_SECONDS
        )
    except subprocess.TimeoutExpired:
        pytest.skip(f"{tool} takes more than {SANITIZER_SECONDS} s here")
    printed = done.stdout + done.stderr
    if "not supported" in printed:
        pytest.skip(f"{tool} does not work here: {printed[-300:]}")
    assert done.returncode == 0, printed
