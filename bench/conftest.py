"""Options of the benches, what a result says about its machine, and the short tables at the end.

`pytest bench` times a few sizes, `pytest bench --full` all of them; `--benchmark-json=FILE` keeps the result.
"""

from __future__ import annotations

import platform
from collections.abc import Iterator
from typing import Any

import pytest
import report
import torch

from deqkern import ops


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("deqkern")
    group.addoption("--full", action="store_true", help="all sizes that fit in memory, not a few")
    group.addoption("--threads", type=int, default=None, help="CPU threads of the ops (all of torch)")
    group.addoption("--device", default="cpu", help="cpu or cuda")


def pytest_configure(config: pytest.Config) -> None:
    config.stash[report.OPS], config.stash[report.ITERATIONS] = [], []


@pytest.fixture(scope="session")
def device(request: pytest.FixtureRequest) -> torch.device:
    return torch.device(request.config.getoption("--device"))


@pytest.fixture(autouse=True)
def _threads_and_seed(request: pytest.FixtureRequest) -> Iterator[None]:
    before, wanted = torch.get_num_threads(), request.config.getoption("--threads")
    torch.set_num_threads(wanted or before)
    torch.manual_seed(0)
    yield
    torch.set_num_threads(before)


def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict[str, Any]) -> None:
    cpu = machine_info.get("cpu", {})
    machine_info["cpu"] = {key: cpu[key] for key in ("brand_raw", "arch", "count", "l2_cache_size") if key in cpu}
    machine_info["node"] = ""
    machine_info["versions"] = {"python": platform.python_version(), "torch": torch.__version__}
    machine_info["backends"] = {name: state for name, state in ops.backends().items() if state["loaded"]}
    if config.getoption("--device") == "cuda":
        machine_info["gpu"] = torch.cuda.get_device_name()
        machine_info["versions"]["cuda"] = torch.version.cuda
        machine_info["versions"]["triton"] = __import__("triton").__version__


def pytest_benchmark_update_json(config: pytest.Config, benchmarks: list[Any], output_json: dict[str, Any]) -> None:
    for entry in output_json["benchmarks"]:
        entry["stats"].pop("data", None)  # one number per round
        for key in ("param", "params", "options"):
            entry.pop(key, None)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    report.print_tables(terminalreporter, config)
