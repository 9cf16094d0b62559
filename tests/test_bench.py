"""The measurements, rehearsed at toy sizes on a CPU: every part runs and writes its figures."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from conftest import ROOT
from test_models import save_tiny_model

from deqkern import models, solvers

PARTS = [
    "copy",
    "ops",
    "solve",
    "iteration",
    "latency UNet",
    "end to end UNet",
    "latency DiT",
    "end to end DiT",
    "bars",
]


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[dict[str, object]]]:
    out = tmp_path_factory.mktemp("bench") / "gpu.json"
    command = [sys.executable, Path(ROOT) / "bench" / "gpu.py", "--device", "cpu", "--small", "--out", out]
    environment = os.environ | {"PYTHONPATH": ROOT, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(out.read_text())


@pytest.mark.parametrize("part", PARTS)
def test_every_part_writes_its_figures(measured: dict[str, list[dict[str, object]]], part: str) -> None:
    rows = measured[part]
    assert rows and all("skipped" not in row for row in rows)
    numbers = [value for row in rows for value in row.values() if isinstance(value, float)]
    assert numbers and all(number > 0 for number in numbers)


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
    verdicts = [row["verdict"] for row in importlib.import_module("gpu").bars(result)]
    assert verdicts == ["MISSED", "met", "met", "MISSED", "met", "MISSED", "not measured"]


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
    """docs/convergence.md: 1.2e-2 against 2.1e-2 on 8 samples, with steps even in t and the model's profile."""
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
