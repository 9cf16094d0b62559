"""The measurements, rehearsed at toy sizes on a CPU: every part runs and writes its figures."""

from __future__ import annotations

import importlib
import json
import os
import shutil
import subprocess
import sys
import sysconfig
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from conftest import ROOT
from folders import save_tiny_model

import deqkern
from deqkern import models, solvers

PARTS = [
    "copy",
    "policy 0.0M",
    "policy 0.7M",
    "iteration",
    "ops",
    "solve",
    "latency UNet",
    "end to end UNet",
    "latency DiT",
    "end to end DiT",
    "bars",
]


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[dict[str, object]]]:
    """By `make gpu-measure`, where neither deqkern nor diffusers is installed: -S reads no .pth file."""
    if shutil.which("make") is None:
        pytest.skip("no make")
    place = tmp_path_factory.mktemp("bench")
    (place / "diffusers.py").write_text("raise ImportError('hidden')")
    paths = [str(place), *dict.fromkeys(sysconfig.get_path(kind) for kind in ("purelib", "platlib"))]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"}
    command = ["make", "gpu-measure", f"GPU_PYTHON={sys.executable} -S", "GPU_FLAGS=--device cpu --small"]
    command += [f"GPU_OUT={place / 'gpu.json'}", "GPU_COMMIT=0123abc"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads((place / "gpu.json").read_text())


@pytest.mark.parametrize("part", PARTS)
def test_every_part_writes_its_figures(measured: dict[str, list[dict[str, object]]], part: str) -> None:
    rows = measured[part]
    assert rows and all("skipped" not in row for row in rows)
    numbers = [value for row in rows for key, value in row.items() if isinstance(value, float) and key in TIMES]
    assert (numbers or part == "bars") and all(number > 0 for number in numbers)


TIMES = {"ms", "us", "graph_us", "sequential_ms", "iteration_ms", "eager_ms", "graph_ms", "gb_per_s"}


def test_without_diffusers_the_shipped_models_are_left_out(measured: dict[str, Any]) -> None:
    for name in models.SHIPPED:
        (row,) = measured[f"shipped {name}"]
        assert "needs diffusers" in row["skipped"]


def test_the_commit_is_given_where_there_is_no_checkout(measured: dict[str, Any]) -> None:
    assert measured["machine"]["commit"] == "0123abc"


def test_solves_are_compared_with_the_sequential_loop(measured: dict[str, Any]) -> None:
    rows = [row for title, part in measured.items() if title.startswith("policy") for row in part]
    parallel = [row for row in rows if row["way"].startswith("parallel")]
    assert len(parallel) == 8 and {row["dtype"] for row in parallel} == {"float32", "bfloat16"}
    for row in parallel:
        assert row["speed-up over eager"] > 0 and row["iterations"] <= row["steps"] < row["nfe"]
        assert row["error"] < (1e-2 if row["dtype"] == "float32" else 5e-2)


def test_every_op_is_measured(measured: dict[str, list[dict[str, object]]]) -> None:
    from deqkern import ops

    assert {row["op"] for row in measured["ops"]} == set(ops.CONTRACTS)


def test_the_worst_figure_decides_about_a_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(Path(ROOT) / "bench"))
    scan, mix = {"op": "ddim_scan", "variant": "", "bytes": 3e8}, {"op": "anderson_mix", "variant": "m5", "bytes": 4e7}
    result = {
        "machine": {},
        "ops": [scan | {"share_of_copy": 0.9}, scan | {"share_of_copy": 0.7}, mix | {"share_of_copy": 0.6}],
        "iteration": [{"solver": "default", "graph_us": 60.0, "us": 201.0, "graph ratio to plain torch": 9.0}],
        "solve": [{"skipped": "no time"}],
    }
    result["iteration"][0]["ratio to plain torch"] = 3.0
    policy = {"model": "p", "dtype": "float32", "eta": 1.0, "steps": 100, "speed-up over eager": 7.0}
    photos = {"model": "photos", "dtype": "float32", "eta": 0.0, "steps": 50, "speed-up over eager": 5.0}
    result["policy 1M"] = [policy | {"speed-up over graph": 3.0}, policy | {"speed-up over graph": 2.0}]
    result["shipped photos"] = [photos | {"speed-up over graph": 1.0}, photos | {"speed-up over graph": 1.6}]
    verdicts = [row["verdict"] for row in importlib.import_module("gpu_results").bars(result)]
    assert verdicts == [
        "MISSED",
        "met",
        "met",
        "MISSED",
        "met",
        "MISSED",
        "not measured",
        "met",
        "MISSED",
        *2 * ["met"],
    ]


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Any]:
    """A function that imports a module of bench/."""
    monkeypatch.syspath_prepend(str(Path(ROOT) / "bench"))
    return importlib.import_module


class Clock:
    """Half a second per iteration of a solve and 5 seconds around it; a second for anything else."""

    device = torch.device("cpu")

    def solve(self, call: Callable[[], Any]) -> float:
        found = call()
        return 5 + 0.5 * found.iterations if isinstance(found, deqkern.Solution) else 1.0

    def wait(self) -> None: ...


def test_an_iteration_is_what_more_of_them_take(bench: Callable[[str], Any]) -> None:
    """Neither the start nor the end of a solve is in it, nor what a first call compiles."""
    size = bench("registry").Size(20, 1, (3, 4, 4))
    assert bench("gpu_iterations").measure_sample(Clock(), size) == 0.5


def test_iterations_that_were_done_count(bench: Callable[[str], Any]) -> None:
    torch.manual_seed(0)
    network = bench("networks").DiT(32, 1, 2).eval()
    with torch.no_grad():
        row = bench("gpu_networks").end_to_end(Clock(), network, network, steps=3, iterations=8, graph=False)
    assert row["iterations"] <= 3 and row["iteration_ms"] == pytest.approx(1e3 * (5 / row["iterations"] + 0.5))


def test_captures_are_timed_apart(bench: Callable[[str], Any], monkeypatch: pytest.MonkeyPatch) -> None:
    captured = importlib.import_module("deqkern.engine.capture").CapturedIterations
    monkeypatch.setattr(captured, "__init__", lambda self: None)
    monkeypatch.setattr(captured, "_capture", lambda self, k: time.sleep(0.01))
    with bench("gpu_solves").captures(Clock()) as found:
        for _ in range(2):
            iteration = captured()
            iteration._capture(1), iteration._capture(2)
    assert (found.solves, found.count) == (2, 4) and found.seconds >= 0.04
    captured()._capture(1)
    assert found.count == 4


def test_the_loop_is_the_chain(bench: Callable[[str], Any]) -> None:
    """Of a shipped model, and with step noise; both schedules and both ends of eta."""
    pytest.importorskip("diffusers")
    solves = bench("gpu_solves")
    (problem,) = solves.shipped("digits", 4, (torch.float32,), torch.device("cpu"))
    exact = deqkern.sample(problem.model, problem.noise, problem.schedule, 4, solver=solvers.sequential(), rtol=0.0)
    torch.testing.assert_close(problem.exact, exact.value, rtol=1e-4, atol=1e-4)
    network = bench("policies").PolicyMLP(32, 1)
    (problem,) = solves.policy(network, ((5, 1.0),), (torch.float32,), torch.device("cpu"), 0.0)
    given = {"eta": 1.0, "step_noise": problem.z, "solver": solvers.sequential(), "rtol": 0.0}
    exact = deqkern.sample(problem.model, problem.noise, problem.schedule, 5, **given)
    torch.testing.assert_close(problem.exact, exact.value, rtol=1e-4, atol=1e-4)


def test_every_row_is_on_disk_at_once(bench: Callable[[str], Any], tmp_path: Path) -> None:
    """A part that hangs, or a run that is ended, loses nothing that was measured before."""
    out = tmp_path / "deep" / "gpu.json"
    results = bench("gpu_results").Results({"gpu": "none"}, out, 60)
    seen = []

    def rows() -> Iterator[dict[str, Any]]:
        for number in range(3):
            seen.append(len(json.loads(out.read_text()).get("numbers", [])))
            yield {"number": number}
        time.sleep(30)

    results.part("numbers", rows, limit=1)
    assert seen == [0, 1, 2] and "no time left" in results.found["numbers"][3]["skipped"]
    results.part("broken", lambda: 1 / 0)
    assert results.failed == ["broken"] and json.loads(out.read_text()) == results.found


def test_what_make_gpu_runs() -> None:
    """Limits around all that may hang, reports that outlive them, no sanitizer before the rest, no setuptools."""
    if shutil.which("make") is None:
        pytest.skip("no make")
    commands = subprocess.run(
        ["make", "-n", "gpu", "GPU_PYTHON=python3"], capture_output=True, text=True, cwd=ROOT, check=True
    ).stdout.replace("\\\n", " ")
    (test,) = (line for line in commands.splitlines() if "pytest" in line)
    (measure,) = (line for line in commands.splitlines() if "bench/gpu.py" in line)
    assert test.startswith("timeout -s INT -k 20 200 ") and "--deselect tests/ops/test_cuda.py::test_a_san" in test
    for option in ("--tb=short", "-rfE", "--junitxml=bench/results/gpu-tests.xml"):
        assert option in test
    assert measure.startswith("timeout -k 10 ") and "--commit" in measure and "setup.py" not in commands


def test_each_eta_is_compared_with_its_own_chain(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_tiny_model(tmp_path)
    monkeypatch.syspath_prepend(str(Path(ROOT) / "bench"))
    convergence, loaded = importlib.import_module("convergence"), models.load(tmp_path)
    for eta in (0.0, 0.5, 1.0):
        case = convergence.measure(loaded, 4, eta, 1, solvers.sequential(), 2, 4)
        assert max(case.stop_error["0.001"]) == 0


@pytest.fixture
def quality(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """bench/quality.py."""
    pytest.importorskip("diffusers")
    monkeypatch.syspath_prepend(str(Path(ROOT) / "bench"))
    return importlib.import_module("quality")


def test_quality_is_measured_and_drawn(quality: ModuleType, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    out, picture, cache = tmp_path / "quality.json", tmp_path / "quality.png", tmp_path / "cache"
    sizes = {"seeds": 1, "budgets": [3], "joint_steps": [5], "exact_steps": 12}
    quality.measure("digits", **sizes, profile=False, cache=cache, out=out)
    figures = json.loads(out.read_text())
    assert figures["floors"]["DPM-Solver++ 2M, S=12"] == [0.0] and len(list(cache.iterdir())) == 3
    last: dict[tuple[str, str], dict[str, dict[str, object]]] = {}  # of a joint solve, the last iteration
    for point in figures["points"]:
        if point["steps"] == 5:
            last.setdefault((point["sampler"], point["spacing"]), {})[point["solver"]] = point
    joint = [pair for pair in last.values() if "default" in pair]
    assert len(joint) == len(quality.JOINT)
    for pair in joint:  # the chain that is solved is the scheduler's
        for key in ("error", "error_ddim"):
            assert pair["default"][key] == pytest.approx(pair["sequential"][key], rel=1e-3)
    quality.draw([out], out=picture, solver="default")
    assert picture.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


def test_six_joint_iterations_come_nearer_than_twenty_steps(quality: ModuleType) -> None:
    """docs/records/convergence.md: 1.2e-2 against 2.1e-2 on 8 samples, with steps even in t and the model's profile."""
    loaded = models.load("digits")
    noise = torch.randn(8, *loaded.shape, generator=torch.Generator().manual_seed(1000))[:3]
    exact = quality.chain(loaded, noise, "DPM-Solver++ 2M", "even in log-SNR", 100)
    problem = quality.Problem(loaded, noise, exact=exact, ddim=exact)
    solver = solvers.default(loaded.profile, window=None)
    joint = quality.joint(problem, "DPM-Solver++ 2M", "even in t", 50, solver)[5]
    stepped = [quality.sequential(problem, sampler, "even in t", 20) for sampler in quality.SAMPLERS]
    assert (joint.calls, joint.steps) == (6, 50)
    print(f"\n{joint.median:.1e} against {[f'{point.median:.1e}' for point in stepped]}")
    assert joint.median <= 0.75 * min(point.median for point in stepped)
