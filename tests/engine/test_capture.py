"""CUDA graphs: what a replayed iteration may depend on, without a GPU; the real thing where there is one."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import types
from collections.abc import Iterator
from typing import Any, ClassVar

import pytest
import torch
from problems import gaussian, mixture
from torch import Tensor

import deqkern
from deqkern import NoiseSchedule, problem, sampling, solvers
from deqkern.engine import capture, loop
from deqkern.solvers.presets import Solver

SCHEDULE = NoiseSchedule.linear()
SHAPE = (3, 8, 8)
SOLVERS = pytest.mark.parametrize(
    "solver", [solvers.default(), solvers.parataa(), solvers.deq_ddim(), solvers.picard()], ids=lambda s: s.name
)


class FakeGraph:
    """Launches nothing between `capture_begin` and `capture_end`; a replay runs the iteration that was captured.

    A pool counts the graphs that use it. As in torch, one that its last graph has left takes no other.
    """

    recording: FakeGraph | None = None
    captured = 0
    replayed = 0
    broken = False  # capture_begin fails
    log: ClassVar[list[str]] = []  # of captures and waits
    uses: ClassVar[dict[str, int]] = {}  # pool -> graphs in it

    def __init__(self) -> None:
        self.iteration: Any = None
        self.arguments: tuple[Any, ...] = ()
        self.pool: str | None = None

    def __del__(self) -> None:
        if self.pool is not None:
            FakeGraph.uses[self.pool] -= 1

    def capture_begin(self, pool: str = "its own", capture_error_mode: str = "global") -> None:
        assert FakeGraph.recording is None and capture_error_mode == "relaxed"
        if FakeGraph.broken and pool != "its own":
            raise RuntimeError("no capture begins")
        if FakeGraph.uses.get(pool) == 0 and pool != "its own":
            raise RuntimeError("use_count > 0 INTERNAL ASSERT FAILED")
        self.pool, FakeGraph.uses[pool] = pool, FakeGraph.uses.get(pool, 0) + 1
        FakeGraph.recording = self
        FakeGraph.captured += 1
        FakeGraph.log.append(f"begin in {pool}")

    def capture_end(self) -> None:
        if FakeGraph.recording is not self:
            raise RuntimeError("no capture to end")
        FakeGraph.recording = None
        FakeGraph.log.append("end")

    def replay(self) -> None:
        assert self.arguments, "nothing was captured"
        FakeGraph.replayed += 1
        self.iteration.run(*self.arguments)


class FakeStream:
    def __init__(self, name: str) -> None:
        self.name = name

    def wait_stream(self, other: FakeStream) -> None:
        FakeGraph.log.append(f"{self.name} waits for {other.name}")


class Recorded:
    """An iteration that is only noted down while a graph records."""

    def __init__(self, iteration: Any) -> None:
        self.iteration, self.phase = iteration, iteration.phase

    def run(self, *arguments: Any) -> None:
        if FakeGraph.recording is None:
            self.iteration.run(*arguments)
        else:
            FakeGraph.recording.iteration, FakeGraph.recording.arguments = self.iteration, arguments


@pytest.fixture
def fake_cuda(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    handles = itertools.count()
    cuda = types.SimpleNamespace(
        CUDAGraph=FakeGraph,
        Stream=lambda device: FakeStream("side"),
        current_stream=lambda device: FakeStream("current"),
        stream=lambda stream: contextlib.nullcontext(),
        device=lambda device: contextlib.nullcontext(),
        graph_pool_handle=lambda: f"pool {next(handles)}",
    )
    capture.capture_stream.cache_clear()
    monkeypatch.setattr(capture, "torch", types.SimpleNamespace(cuda=cuda, zeros=torch.zeros))
    real = capture.CapturedIterations
    monkeypatch.setattr(loop, "CapturedIterations", lambda iteration, device: real(Recorded(iteration), device))
    monkeypatch.setattr(problem, "check_cuda_graph", lambda *arguments: None)
    FakeGraph.captured = FakeGraph.replayed = 0
    FakeGraph.log.clear()
    FakeGraph.uses.clear()
    yield
    capture.capture_stream.cache_clear()


def both(solver: Solver, device: str = "cpu", **options: Any) -> tuple[deqkern.Solution, deqkern.Solution]:
    """The same solve with and without graphs; the model looks at each row alone, so that not a bit may differ.

    On a GPU a product of matrices does not: how many rows there are decides which kernel computes them.
    """
    generator = torch.Generator().manual_seed(2)
    model: Any = mixture(SCHEDULE, SHAPE, generator)
    if device == "cuda":
        model = gaussian(SCHEDULE, SHAPE, generator)
        model.mean, model.variance = model.mean.cuda(), model.variance.cuda()
    noise = torch.randn(2, *SHAPE, generator=torch.Generator().manual_seed(3)).to(device)
    solver = dataclasses.replace(solver, thinning=0.0)  # a graph thins nothing
    options = {"solver": solver, "rtol": 1e-4, "max_iterations": 40} | options
    plain = deqkern.sample(model, noise, SCHEDULE, 40, **options)
    return plain, deqkern.sample(model, noise, SCHEDULE, 40, cuda_graph=True, **options)


def assert_equal(plain: deqkern.Solution, graph: deqkern.Solution) -> None:
    assert plain.iterations == graph.iterations
    torch.testing.assert_close(graph.history, plain.history, rtol=1e-2, atol=1e-7)
    torch.testing.assert_close(graph.trajectory, plain.trajectory, rtol=1e-5, atol=1e-5)
    assert torch.equal(graph.converged, plain.converged)
    assert (graph.nfe >= plain.nfe).all() and torch.equal(graph.nfe_history[-1], graph.nfe)
    torch.testing.assert_close(graph.residual_history, plain.residual_history, rtol=1e-3, atol=1e-7, equal_nan=True)


@SOLVERS
@pytest.mark.parametrize("order", [1, 2])
def test_a_replayed_iteration_does_what_a_launched_one_does(order: int, solver: Solver, fake_cuda: None) -> None:
    plain, graph = both(solver, order=order)
    assert_equal(plain, graph)
    assert FakeGraph.captured and FakeGraph.replayed >= FakeGraph.captured
    assert FakeGraph.replayed < graph.iterations, "the first iteration after a new selection is not a replay"


def test_the_default_repeats_two_graphs(fake_cuda: None) -> None:
    """After each selection of rows: one iteration as it is, two captures, and replays."""
    model = gaussian(SCHEDULE, SHAPE, torch.Generator().manual_seed(2))
    noise = torch.randn(1, *SHAPE)
    sampling.sample(model, noise, SCHEDULE, 40, solver=solvers.default(), rtol=1e-5, cuda_graph=True)
    selections = sorted(set(model.calls), reverse=True)
    assert all(2 * after <= before for before, after in itertools.pairwise(selections))
    assert FakeGraph.captured <= 2 * len(selections)


def test_samples_that_fall_back_take_new_graphs(fake_cuda: None) -> None:
    """Their slopes are replaced from then on, which graphs captured before do not do."""

    def both_ways(cuda_graph: bool) -> deqkern.Solution:
        calls = 0

        def model(x: Tensor, t: Tensor, second: Tensor) -> Tensor:
            nonlocal calls
            calls += 1
            wild = {4: (1e4, 1.0), 7: (1.0, 1e4)}.get(calls, (1.0, 1.0))  # of the first and of the second sample
            return torch.sin(x) * torch.where(second, wild[1], wild[0]).view(-1, 1, 1, 1)

        noise = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(1))
        given = {"model_kwargs": {"second": torch.tensor([False, True])}, "cuda_graph": cuda_graph}
        given["solver"] = solvers.default(window=None, thinning=0)
        return sampling.sample(model, noise, SCHEDULE, 30, rtol=0.0, **given)

    plain, graph = both_ways(False), both_ways(True)
    assert "2 diverged" in plain.message and "2 diverged" in graph.message
    assert_equal(plain, graph)


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"cuda_graph": 1}, TypeError, "cuda_graph must be a bool"),
        ({"cuda_graph": True}, ValueError, "cuda_graph=True needs noise on a CUDA device"),
    ],
)
def test_bad_input(options: dict[str, Any], error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        deqkern.sample(lambda x, t: x, torch.randn(1, *SHAPE), SCHEDULE, 10, **options)


class Iteration:
    """It raises `error` at k = 1; two phases."""

    def __init__(self, error: type[BaseException] | None = None) -> None:
        self.error = error

    def phase(self, k: int) -> tuple[int, ...]:
        return (k % 2,)

    def run(self, k: int, rows: Any = None, outputs: Any = ()) -> None:
        if k == 1 and self.error is not None:
            raise self.error("from the model")


def test_a_capture_keeps_its_place_among_what_is_launched(fake_cuda: None) -> None:
    """On a stream of its own, and in the memory of all the others."""
    captured = capture.CapturedIterations(Recorded(Iteration()), torch.device("cpu"))
    for k in range(6):
        captured.run(k, None, ())
    assert FakeGraph.log == 2 * ["side waits for current", "begin in pool 0", "end", "current waits for side"]


def test_new_graphs_take_a_new_pool(fake_cuda: None) -> None:
    """The old one is gone with its last graph: torch asserts where a graph is captured into it again."""
    captured = capture.CapturedIterations(Recorded(Iteration()), torch.device("cpu"))
    for k in range(4):
        captured.run(k, None, ())
    first = captured.pool
    captured.renew()
    assert FakeGraph.uses[first] == 0
    for k in range(4, 8):
        captured.run(k, None, ())
    assert captured.pool != first and FakeGraph.uses[captured.pool] == 2


def test_all_captures_of_a_device_share_a_stream(fake_cuda: None) -> None:
    one, other = (capture.CapturedIterations(Recorded(Iteration()), torch.device("cpu")) for _ in range(2))
    assert one.stream is other.stream


def test_a_capture_that_does_not_begin_is_ended(fake_cuda: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(FakeGraph, "broken", True)
    captured = capture.CapturedIterations(Recorded(Iteration()), torch.device("cpu"))
    captured.run(0, None, ())
    with pytest.raises(RuntimeError, match="cuda_graph=False: no capture begins"):
        captured.run(1, None, ())
    assert FakeGraph.captured == 1, "a capture that ends well comes after it, for torch's generator"


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (ValueError, "^from the model"),
        (KeyboardInterrupt, "^from the model"),
        (RuntimeError, "cuda_graph=False: from the model"),
    ],
)
def test_any_error_ends_the_capture(error: type[BaseException], words: str, fake_cuda: None) -> None:
    captured = capture.CapturedIterations(Iteration(error), torch.device("cpu"))
    captured.run(0, None, ())
    with pytest.raises(error, match=words):
        captured.run(1, None, ())
    assert FakeGraph.recording is None
    assert FakeGraph.captured == 2, "a capture that ends well comes after it, for torch's generator"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@SOLVERS
def test_graphs_on_a_gpu(solver: Solver) -> None:
    assert_equal(*both(solver, "cuda"))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_a_model_that_waits_cannot_be_captured() -> None:
    def model(x: Tensor, t: Tensor) -> Tensor:
        return x * float(t.sum().item() > 0)

    with pytest.raises(RuntimeError, match="cuda_graph=False"):
        deqkern.sample(model, torch.randn(1, *SHAPE, device="cuda"), SCHEDULE, 10, cuda_graph=True)
    # random numbers are drawn again, and a model that does not wait is captured
    deqkern.sample(lambda x, t: 0.1 * x, torch.randn(1, *SHAPE, device="cuda"), SCHEDULE, 10, cuda_graph=True)
    assert bool(deqkern.sample(model, torch.randn(1, *SHAPE, device="cuda"), SCHEDULE, 10).converged.all())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_a_window_moves_the_rows() -> None:
    with pytest.raises(ValueError, match="window is None or a share of the steps"):
        deqkern.sample(
            lambda x, t: x,
            torch.randn(1, *SHAPE, device="cuda"),
            SCHEDULE,
            10,
            solver=solvers.picard(window=5),
            cuda_graph=True,
        )
