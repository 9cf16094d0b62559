"""The solver's own time in an iteration of a whole `deqkern.sample`, model taken out: one thread, a small sample.

    python bench/iteration.py                        # microseconds per iteration
    python bench/iteration.py --against CHECKOUT     # and their ratio to those of another checkout, alternating

A sample of 2 x 16 elements in S = 100 steps: so little that it is all calls. CPU time of the process, least of several.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Annotated

import typer

ROOT = Path(__file__).resolve().parent.parent

# Also runs in checkouts of before: it uses nothing but what `sample` has always had.
WORK = """
import json, time, warnings, torch, deqkern
from deqkern import solvers
torch.set_num_threads(1)
warnings.simplefilter("ignore")
noise, schedule = torch.randn(1, 2, 16, generator=torch.Generator().manual_seed(0)), deqkern.NoiseSchedule.linear()
spent = 0.0
def model(x, t):
    global spent
    start = time.process_time()
    out = torch.sin(3 * x).mul_(0.3).add_(x, alpha=0.5)
    spent += time.process_time() - start
    return out
found = {}
for name, solver, eta in [("default", solvers.default(), 0.0), ("default, eta 1", solvers.default(), 1.0),
                          ("all steps", solvers.default(window=None, thinning=0), 0.0),
                          ("parataa", solvers.parataa(), 0.0), ("deq_ddim", solvers.deq_ddim(), 0.0)]:
    least = float("inf")
    for _ in range(12):
        spent, start = 0.0, time.process_time()
        options = {"solver": solver, "eta": eta, "rtol": 0.0, "max_iterations": 20}
        solution = deqkern.sample(model, noise, schedule, 100, generator=torch.Generator().manual_seed(1), **options)
        least = min(least, (time.process_time() - start - spent) / solution.iterations)
    found[name] = 1e6 * least
print(json.dumps(found))
"""


def measure(checkout: Path) -> dict[str, float]:
    """Microseconds of an iteration by solver, of the deqkern in a checkout whose extension is built."""
    environment = os.environ | {"PYTHONPATH": str(checkout), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", WORK], cwd=checkout, env=environment, capture_output=True, text=True, check=True
    )
    found: dict[str, float] = json.loads(done.stdout)
    return found


def main(
    against: Annotated[Path | None, typer.Option(help="Another checkout, its extension built.")] = None,
    rounds: Annotated[int, typer.Option(help="Processes for each checkout, alternating; the least counts.")] = 5,
) -> None:
    """Print a line per solver."""
    here, there = list[dict[str, float]](), list[dict[str, float]]()
    for _ in range(rounds):
        if against is not None:
            there.append(measure(against.resolve()))
        here.append(measure(ROOT))
    for name in here[0]:
        least = min(found[name] for found in here)
        line = f"{name:16} {least:7.1f} us an iteration"
        if there:
            line += f", ratio {least / min(found[name] for found in there):.2f}"
        print(line)
