"""What the host does in an iteration, on a GPU that launches nothing: `python bench/host_time.py`.

    launches    kernels of Triton in an iteration with all of its history
    solver      microseconds of the host for the solver's work: two transforms, slopes, scan, mixing, convergence
    all         microseconds of the host for all of an iteration, with a model that is a tensor; torch's own small
                operations run on the CPU here, which takes about as long as launching them
    compiled    specialisations that a whole solve compiles in iterations 1, 2, 3 and later

`--json` prints the same for programs, with the names of what was compiled.
"""

from __future__ import annotations

import json
import os
import statistics
import time
import warnings
from dataclasses import replace
from typing import Annotated, Any

os.environ["TRITON_INTERPRET"] = "0"  # read when Triton is imported

import torch
import typer
from faked_gpu import Log, faked
from iteration import SCHEDULE, Denoiser, open_iteration
from torch import Tensor

import deqkern
from deqkern import solvers
from deqkern.engine.iteration import Iteration
from deqkern.engine.loop import Evaluation
from deqkern.network.model import Network
from deqkern.solvers.presets import Solver

STEPS = 50
SHAPES = {"4x64x64": (4, 64, 64), "3x128x128": (3, 128, 128), "16x14": (16, 14)}  # the last: a policy's actions
SOLVERS = {
    "default": solvers.default(),
    "default, all steps": replace(solvers.default(window=None), name="default, all steps"),
    "parataa": solvers.parataa(),
    "deq_ddim": solvers.deq_ddim(),
}


def measure(solver: Solver, shape: tuple[int, ...], rounds: int) -> dict[str, Any]:
    """Launches and microseconds of an iteration of B = 1 with all rows selected.

    Without transforms the size of a sample does not matter: a small one, whose copies take no time.
    """
    if solver.basis != "spectral":
        shape = (2, 4, 4)
    noise, table = torch.randn(1, *shape), SCHEDULE.steps(STEPS)
    output = torch.randn(STEPS, *shape)
    with torch.no_grad(), faked() as log:
        iteration, rows = open_iteration(solver, noise, table)
        network = Network(lambda x, t: output[: len(x)], table, {}, noise)

        def work(k: int) -> None:
            iteration.run(k, rows, [rows.states])

        def everything(k: int) -> None:
            iteration.run(k, rows, Evaluation(network, rows))

        found: dict[str, Any] = {}
        for name, run in (("solver_us", work), ("all_us", everything)):
            spent, first = [], 2 * solver.history_size + 2
            for k in range(first + rounds):
                log.launches.clear()
                start = time.perf_counter()
                run(k)
                spent.append(time.perf_counter() - start)
            found |= {"launches": len(log.launches), name: 1e6 * statistics.median(spent[first:])}
        return found


def compilations(solver: Solver, shape: tuple[int, ...], eta: float = 0.0) -> list[list[str]]:
    """The kernels that each iteration of a whole solve, in a fresh process, would compile."""
    found: list[list[str]] = []
    run = Iteration.run

    def counted(self: Iteration, *arguments: Any) -> None:
        before = len(log.compiled)
        run(self, *arguments)
        found.append([name for name, _ in log.compiled[before:]])

    log = Log()
    Iteration.run = counted  # type: ignore[method-assign]
    try:
        with faked(compute=True) as log, warnings.catch_warnings():
            warnings.simplefilter("ignore", deqkern.ConvergenceWarning)
            deqkern.sample(model, torch.randn(1, *shape), SCHEDULE, STEPS, solver=solver, eta=eta, rtol=1e-3)
    finally:
        Iteration.run = run  # type: ignore[method-assign]
    return found


denoise = Denoiser()


def model(x: Tensor, t: Tensor) -> Tensor:
    """Not linear, so that a solve takes some iterations."""
    return denoise(x, t) + 0.1 * torch.tanh(x.roll(1, -1))


def main(
    rounds: Annotated[int, typer.Option(help="iterations that are timed")] = 200,
    as_json: Annotated[bool, typer.Option("--json", help="for programs")] = False,
) -> None:
    """Print a line per solver and shape."""
    torch.manual_seed(0)
    torch.set_num_threads(1)
    rows = []
    for name, shape in SHAPES.items():
        for title, solver in SOLVERS.items():
            compiled = compilations(solver, shape)
            rows.append({"shape": name, "solver": title, **measure(solver, shape, rounds), "compiled": compiled})
    if as_json:
        print(json.dumps(rows))
        return
    for row in rows:
        counts = [len(names) for names in row["compiled"]]
        first, later = ", ".join(map(str, counts[:3])), sum(counts[3:])
        line = f"{row['shape']:10} {row['solver']:20} {row['launches']:3} launches, us: solver {row['solver_us']:6.1f}"
        line += f", all {row['all_us']:6.1f}"
        print(f"{line}; compiled {first} and later {later}, in {len(counts)} iterations")


if __name__ == "__main__":
    typer.run(main)
