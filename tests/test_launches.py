"""What Triton would launch and compile in whole solves, on a driver that is faked: bench/host_time.py."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT

pytest.importorskip("triton")

SOLVERS = ("default", "default, all steps", "parataa", "deq_ddim")


@pytest.fixture(scope="module")
def rows() -> dict[tuple[str, str], dict[str, Any]]:
    """By shape and solver."""
    command = [sys.executable, Path(ROOT) / "bench" / "host_time.py", "--json", "--rounds", "5"]
    environment = os.environ | {"PYTHONPATH": ROOT, "OMP_NUM_THREADS": "1", "TRITON_INTERPRET": "0"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return {(row["shape"], row["solver"]): row for row in json.loads(done.stdout)}


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("shape", ["4x64x64", "3x128x128", "16x14"])
def test_nothing_is_compiled_after_the_third_iteration(rows: dict[Any, Any], shape: str, solver: str) -> None:
    compiled = rows[shape, solver]["compiled"]
    assert compiled[0] and len(compiled) > 4
    assert not any(compiled[3:]), compiled


def test_every_solver_is_timed(rows: dict[Any, Any]) -> None:
    assert {solver for _, solver in rows} == set(SOLVERS)
    for row in rows.values():
        assert row["all_us"] > 0 and row["solver_us"] > 0 and 4 <= row["launches"] <= 12, row
