"""The measurements of a GPU, rehearsed at toy sizes on a CPU: every part runs and writes its figures."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

PARTS = ["copy", "ops", "solve", "iteration", "latency UNet", "end to end UNet", "latency DiT", "end to end DiT"]


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

    assert {row["op"] for row in measured["ops"]} == {name for name in ops.__all__ if name.islower()} - {
        "backends",
        "use_backend",
    }
