"""What a run on a GPU found: rows by part, on disk after each of them, and the bars of docs/records/performance.md."""

from __future__ import annotations

import json
import math
import os
import signal
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from gpu_clock import Row

# name, which rows, the way that the loop runs, and the aim
SOLVES: tuple[tuple[str, Callable[[Row], bool], str, float], ...] = (
    ("policies, DDPM-100", lambda row: row["eta"] == 1 and row["steps"] == 100, "eager", 6),
    ("policies, DDPM-100", lambda row: row["eta"] == 1 and row["steps"] == 100, "graph", 3.4),
    ("photos, S = 50", lambda row: row["model"] == "photos" and row["steps"] == 50, "eager", 4),
    ("photos, S = 50", lambda row: row["model"] == "photos" and row["steps"] == 50, "graph", 1.5),
)


class OutOfTime(BaseException):
    """A part has had its seconds, or the run has."""


class Results:
    """The parts of a run. Each row is printed and written to `out` as soon as it is there."""

    def __init__(self, machine: Row, out: Path | None, seconds: float) -> None:
        self.found: dict[str, Any] = {"machine": machine}
        self.failed: list[str] = []
        self.out, self.end = out, time.perf_counter() + seconds
        signal.signal(signal.SIGALRM, _stop)
        self.write()

    def part(self, title: str, measure: Callable[[], Iterable[Row]], limit: float = math.inf) -> None:
        """Run one part for at most `limit` seconds; one that fails keeps none of the others from running."""
        start, rows = time.perf_counter(), []
        self.found[title] = rows
        print(f"\n{title}", flush=True)
        try:
            left = min(self.end - start, limit)
            if left <= 0:
                raise OutOfTime
            signal.alarm(math.ceil(min(left, 1e6)))
            for row in measure():
                self._take(rows, row)
        except OutOfTime:
            self._take(rows, {"skipped": f"no time left after {time.perf_counter() - start:.0f} s"})
        except ImportError as error:
            self._take(rows, {"skipped": str(error)})
        except Exception as error:
            traceback.print_exc()
            self._take(rows, {"skipped": f"{type(error).__name__}: {error}"})
            self.failed.append(title)
        finally:
            signal.alarm(0)
        self.found["machine"][f"{title}: seconds"] = round(time.perf_counter() - start, 1)
        self.write()

    def _take(self, rows: list[Row], row: Row) -> None:
        rows.append(row)
        cells = [f"{key} {value:.4g}" if isinstance(value, float) else f"{key} {value}" for key, value in row.items()]
        print("  " + ", ".join(cells), flush=True)
        self.write()

    def write(self) -> None:
        """All that is known, in one move: whoever reads `out` finds a whole file."""
        if self.out is None:
            return
        self.out.parent.mkdir(parents=True, exist_ok=True)
        place = self.out.with_name(self.out.name + ".part")
        place.write_text(json.dumps(self.found, indent=1) + "\n")
        os.replace(place, self.out)


def _stop(*_: object) -> None:
    raise OutOfTime


def bars(result: Row) -> Iterator[Row]:
    """docs/records/performance.md, the table of aims. Of several figures that a bar is about, the worst counts."""

    def bar(name: str, aim: float, figures: list[float], least: bool) -> Row:
        if not figures:
            return {"bar": name, "aim": aim, "verdict": "not measured"}
        worst = min(figures) if least else max(figures)
        met = worst >= aim if least else worst <= aim
        return {"bar": name, "aim": aim, "measured": worst, "verdict": "met" if met else "MISSED"}

    rows = {
        title: [row for row in part if "skipped" not in row] for title, part in result.items() if title != "machine"
    }
    shares = [
        (row["bytes"], row["share_of_copy"])
        for row in rows.get("ops", [])
        if row["op"] in ("ddim_scan", "anderson_mix") and row["variant"] in ("", "eta>0", "m5")
    ]
    yield bar("share of copy, 256 MB and more", 0.8, [share for size, share in shares if size >= 256e6], True)
    middle = [share for size, share in shares if 32e6 <= size < 256e6]
    yield bar("share of copy, 32 MB and more", 0.6, middle, True)
    default = [row for row in rows.get("iteration", []) if row["solver"] == "default"]
    yield bar("us of an iteration as a graph", 60, [row["graph_us"] for row in default], False)
    yield bar("us of an iteration, launched", 200, [row["us"] for row in default], False)
    for kind in ("graph ratio", "ratio"):
        yield bar(f"{kind} to plain torch", 8, [row[f"{kind} to plain torch"] for row in default], True)
    ratios = [row["ratio"] for row in rows.get("solve", []) if (row["systems"], row["m"]) == (5000, 5)]
    yield bar("anderson_solve against torch.linalg.solve", 10, ratios, True)
    solves = [row for title, part in rows.items() if title.split()[0] in ("policy", "shipped") for row in part]
    for name, kind, way, aim in SOLVES:
        chosen = [row for row in solves if kind(row) and f"speed-up over {way}" in row]
        best: dict[Any, float] = {}  # of the ways to run a solve
        for row in chosen:
            problem = row["model"], row["dtype"]
            best[problem] = max(best.get(problem, 0.0), row[f"speed-up over {way}"])
        yield bar(f"{name} over the sequential loop, {way}", aim, list(best.values()), True)
