"""The short tables of a run: printed at its end, or in Markdown from its JSON by `python bench/report.py FILE ..`."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

Rows = list[dict[str, Any]]

OPS = pytest.StashKey[Rows]()
ITERATIONS = pytest.StashKey[Rows]()


def print_tables(terminal: pytest.TerminalReporter, config: pytest.Config) -> None:
    """Print what the benches left in the stash of `config`."""
    if rows := config.stash[OPS]:
        terminal.section("ops: share of the copy bandwidth, speed-up over plain torch")
        for line in _aligned(op_table(rows)):
            terminal.write_line(line)
    if rows := config.stash[ITERATIONS]:
        terminal.section("one iteration without the model: S50 B1 3x64x64, m = 5")
        for line in _aligned(iteration_table(rows)):
            terminal.write_line(line)


def op_table(rows: Rows) -> list[list[str]]:
    """One line per op and size: shares and speed-ups of the kernel."""
    table = [["op", "size", "threads", "share of copy", "speed-up"]]
    for row in rows:
        name = f"{row['op']} {row['variant']}".strip()
        speed_up = f"{row['speed_up']:.1f}x" if "speed_up" in row else "-"
        table.append([name, row["size"], str(row["threads"]), f"{row['share_of_copy']:.2f}", speed_up])
    return table


def iteration_table(rows: Rows) -> list[list[str]]:
    """One line per way to do an iteration and number of threads."""
    table = [["solver work", "threads", "caches", "vs plain torch", "quartiles", "vs released code", "share of copy"]]
    for row in rows:
        quartiles = " .. ".join(f"{value:.1f}" for value in row["ratio_quartiles"])
        share = f"{row['share_of_copy']:.2f}" if "share_of_copy" in row else "-"
        ratios = [f"{row['ratio']:.1f}x", quartiles, f"{row['ratio_released']:.1f}x"]
        table.append([row["name"], str(row["threads"]), row["caches"], *ratios, share])
    return table


def _aligned(table: list[list[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in table]


def _markdown(table: list[list[str]]) -> str:
    lines = [table[0], ["---"] * len(table[0]), *table[1:]]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


if __name__ == "__main__":
    results = [json.loads(Path(name).read_text()) for name in sys.argv[1:]]
    benchmarks = [entry["extra_info"] for result in results for entry in result["benchmarks"]]
    iterations = [row for info in benchmarks for row in info.get("rows", ())]
    kernels = [info for info in benchmarks if info.get("backend") == "kernel"]
    print(_markdown(iteration_table(iterations)), _markdown(op_table(kernels)), sep="\n\n")
