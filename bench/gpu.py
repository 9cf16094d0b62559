"""Everything that is measured on a GPU, in one run: `make gpu`, or `python bench/gpu.py --out bench/results/gpu.json`.

    copy         the bandwidth of a copy, per size: what every share is a share of
    ops          microseconds and GB/s of each op, its reference, and its reference through torch.compile
    solve        the batched least squares against torch.linalg.solve on the same systems
    iteration    all solver work of one iteration, launched and as a CUDA graph, against DEQ-DDIM's way in plain torch
    dct2         its kernel in other shapes and precisions, with their errors, and the bare products by cuBLAS
    shipped      whole solves of the shipped models (they need diffusers)
    latency      t(N) of each network for a batch of N rows: eager, as a graph
    end to end   the sequential chain and the joint solve, wall clock, with the model's share
    compiled     both of these through torch.compile, last since it takes longest
    bars         what docs/performance.md aims at, met or missed

Networks with random weights converge at once, so they give the time of an iteration only. A part that fails is left out
and the exit code is 1; one that `--seconds` leaves no time for is cut. `--small` is a rehearsal at toy sizes, on a CPU
too: its times mean nothing.
"""

from __future__ import annotations

import copy
import functools
import importlib
import json
import math
import platform
import signal
import statistics
import subprocess
import time
import traceback
import warnings
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Annotated, Any

import networks
import registry
import torch
import typer
from iteration import HISTORY, SCHEDULE, PlainTorch, open_iteration
from registry import Size
from torch import Tensor

import deqkern
from deqkern import models, ops, solvers
from deqkern.engine.iteration import Iteration
from deqkern.engine.rows import Rows
from deqkern.engine.solution import relative_error
from deqkern.ops import reference

Row = dict[str, Any]
Network = networks.UNet | networks.DiT
Call = Callable[[], object]
COMPILED = ("anderson_mix", "anderson_gram", "band_moments", "secant_slope", "interpolate_outputs", "ddim_scan")
# Iterations to 1e-2 of the default solver with all steps at once, on trained weights at S = 50, eta 0:
# docs/convergence.md, both models.
TRAINED_ITERATIONS = 6.5


class OutOfTime(BaseException):
    """`--seconds` are over."""


class Clock:
    """Medians of repeated calls, by CUDA events with the cache emptied before each, or by the host's clock.

    What empties the cache keeps the device busy for some 0.3 ms: the host has launched the call by then, and its own
    time is not in the device's, unless it takes longer than that.
    """

    def __init__(self, device: torch.device, budget: float) -> None:
        self.device, self.budget = device, budget
        self.flush = torch.empty(2**30 if device.type == "cuda" else 1, dtype=torch.int8, device=device)

    def __call__(self, call: Call) -> float:
        """Seconds of one call on the device."""
        for _ in range(3):
            call()
        once = self.wall(call, 1)
        repeats = int(min(max(self.budget / max(once, 1e-6), 5), 200))
        if self.device.type != "cuda":
            return statistics.median(self.wall(call, 1) for _ in range(repeats))
        events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(repeats)]
        for start, end in events:
            self.flush.zero_()
            start.record()
            call()
            end.record()
        torch.cuda.synchronize(self.device)
        return statistics.median(start.elapsed_time(end) * 1e-3 for start, end in events)

    def wall(self, call: Call, repeats: int) -> float:
        """Seconds of one of so many calls in a row, by the host's clock, until the device has finished."""
        self.wait()
        start = time.perf_counter()
        for _ in range(repeats):
            call()
        self.wait()
        return (time.perf_counter() - start) / repeats

    def wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def graphed(calls: list[Call], device: torch.device) -> Call:
    """One call that replays all of `calls`, captured as one graph; on a CPU it makes them."""
    if device.type != "cuda":
        return lambda: [call() for call in calls]
    side = torch.cuda.Stream(device)
    side.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(side):
        for call in calls:
            call()
    torch.cuda.current_stream(device).wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    return graph.replay


def machine(device: torch.device) -> Row:
    def printed(*command: str) -> str:
        try:
            return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
        except (OSError, subprocess.CalledProcessError):
            return ""

    found: Row = {
        "torch": torch.__version__,
        "python": platform.python_version(),
        "commit": printed("git", "rev-parse", "HEAD"),
        "backends": {name: state["ops"] for name, state in ops.backends().items()},
    }
    if device.type == "cuda":
        found["gpu"] = torch.cuda.get_device_name(device)
        found["cuda"] = torch.version.cuda
        found["driver"] = printed("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
        found["triton"] = __import__("triton").__version__
    return found


def copies(clock: Clock, sizes: list[int]) -> dict[int, float]:
    """Bytes per second, read and written, of a copy that moves so many bytes in all."""
    found = {}
    for size in sizes:
        source, target = torch.ones(2, max(size // 8, 1), device=clock.device).unbind()
        found[size] = 8 * len(source) / clock(lambda s=source, t=target: t.copy_(s))
    return found


def measure_ops(clock: Clock, sizes: list[Size], compile_at: Size) -> Iterator[Row]:
    moved: dict[int, float] = {}
    for case in [case for size in sizes for case in registry._cases_of(size, (5,))]:
        arguments, op = case.make(clock.device), getattr(ops, case.op)
        row: Row = {"op": case.op, "variant": case.variant, "size": str(case.size), "bytes": case.floor}
        if case.floor not in moved:
            moved |= copies(clock, [case.floor])
        spent = clock(lambda o=op, a=arguments: o(**a))
        row |= {"us": 1e6 * spent, "gb_per_s": case.floor / spent / 1e9}
        row |= {"share_of_copy": case.floor / spent / moved[case.floor]}
        row["launched_us"] = 1e6 * clock.wall(lambda o=op, a=arguments: o(**a), 100)  # back to back, the caches warm
        meaning = getattr(reference, case.op)
        if case.temporary < 8 * 1000**3:
            row["reference_us"] = 1e6 * clock(lambda m=meaning, a=arguments: m(**a))
        if case.size == compile_at and case.op in COMPILED:
            row |= compiled_reference(clock, meaning, arguments)
        yield row


def compiled_reference(clock: Clock, meaning: Call, arguments: Row) -> Row:
    """Its time through torch.compile, and how many calls that compiled: those of shapes that depend on data are not."""
    counted = torch._dynamo.utils.counters["stats"]
    before, compiled = counted["calls_captured"], torch.compile(meaning, dynamic=False)
    spent = clock(lambda: compiled(**arguments))
    return {"compiled_reference_us": 1e6 * spent, "compiled_calls": counted["calls_captured"] - before}


def measure_dct2(clock: Clock, sizes: list[Size]) -> Iterator[Row]:
    """The kernel's ways to divide an image of 64 x 64, and two products by cuBLAS without colours, bands and rows."""
    module = importlib.import_module("deqkern.kernels.dct2")
    names = ("ROWS", "WARPS", "PRECISION")
    shipped = tuple(getattr(module, name) for name in names)
    ways = [shipped, (16, 2, "ieee"), (32, 8, "ieee"), (16, 2, "tf32x3"), (16, 4, "tf32x3"), (32, 8, "tf32x3")]
    for size in sizes:
        for inverse in (False, True):
            arguments = registry._dct2(size, inverse)(clock.device)
            written = "image" if inverse else "spectrum"
            exact = {
                k: v.double() if isinstance(v, Tensor) and v.is_floating_point() else v for k, v in arguments.items()
            }
            reference.dct2(**exact)
            base: Row = {"size": str(size), "inverse": inverse}
            for way in ways:
                for name, value in zip(names, way, strict=True):
                    setattr(module, name, value)
                try:
                    spent = clock(lambda a=arguments: ops.dct2(**a))
                finally:
                    for name, value in zip(names, shipped, strict=True):
                        setattr(module, name, value)
                error = (arguments[written] - exact[written]).norm() / exact[written].norm()
                row = base | dict(zip(("rows", "warps", "precision"), way, strict=True))
                yield row | {"us": 1e6 * spent, "error": float(error)}
            left, right, image = arguments["dct_h"], arguments["dct_w"].mT.contiguous(), arguments["image"]
            yield base | {"precision": "cuBLAS", "us": 1e6 * clock(lambda i=image, a=left, b=right: a @ i @ b)}


def measure_solve(clock: Clock, systems: list[tuple[int, int, int]]) -> Iterator[Row]:
    for steps, batch, m in systems:
        size = Size(steps, batch, ())
        arguments = registry._anderson_solve(size, m, "row")(clock.device)
        ridge = arguments["ridge"] * arguments["gram"].diagonal(dim1=-2, dim2=-1).mean(-1)
        matrix = arguments["gram"] + ridge[..., None, None] * torch.eye(m, device=clock.device)
        for name, dtype in (("float64", torch.float64), ("float32", torch.float32)):
            left, right = matrix.to(dtype), arguments["rhs"].to(dtype)
            spent = clock(lambda a=arguments: ops.anderson_solve(**a))
            library = clock(lambda a=left, b=right: torch.linalg.solve(a, b))
            ratio = {"us": 1e6 * spent, "linalg_us": 1e6 * library, "ratio": library / spent}
            ratio["unchecked_us"] = 1e6 * clock(lambda a=left, b=right: torch.linalg.solve_ex(a, b))  # no wait for info
            yield {"systems": steps * batch, "m": m, "linalg": name, **ratio}


def measure_iterations(clock: Clock, size: Size) -> Iterator[Row]:
    """All steps stay active: the windows are opened again before each iteration, one small copy more."""
    device = clock.device
    noise = torch.randn(size.batch, *size.shape, device=device)
    plain = {}
    for released in (False, True):
        work = PlainTorch(released, size, device)
        work.start(noise)
        for k in range(HISTORY + 1):
            work.after(k, work.before())
        plain[work.name] = clock.wall(lambda w=work: w.after(HISTORY, w.before()), 50)
    yield from ({"solver": name, "us": 1e6 * spent} for name, spent in plain.items())
    for solver in (solvers.default(window=None), solvers.parataa(), solvers.deq_ddim()):
        table = SCHEDULE.steps(size.steps)
        iteration, rows = open_iteration(solver, noise, table)
        opened = iteration.stopping.flat.clone()

        def run(k: int, i: Iteration = iteration, r: Rows = rows, w: Tensor = opened) -> None:
            i.stopping.flat.copy_(w)
            i.run(k, r, [r.states])

        for k in range(2 * solver.history_size + 2):
            run(k)
        period = math.lcm(len(iteration.e), solver.history_size + 1)
        calls: list[Call] = [lambda k=k: run(k) for k in range(4 * period, 5 * period)]
        eager = clock.wall(lambda c=calls: [call() for call in c], max(50 // period, 1)) / period
        graph = graphed(calls, device)
        for _ in range(3):
            graph()
        captured = clock.wall(graph, max(200 // period, 1)) / period
        row = {"solver": solver.name, "us": 1e6 * eager, "graph_us": 1e6 * captured}
        for name, spent in plain.items():
            row[f"ratio to {name}"] = spent / eager
            row[f"graph ratio to {name}"] = spent / captured
        yield row
    yield {"solver": "default, all that sample does", "us": 1e6 * measure_sample(clock, size)}


def measure_sample(clock: Clock, size: Size, iterations: int = 8) -> float:
    """Seconds of an iteration of the default solver as it ships, with all that the host does; its model is tanh."""
    noise = torch.randn(size.batch, *size.shape, device=clock.device)
    model, options = (lambda x, t: torch.tanh(x)), {"rtol": 0.0, "max_iterations": iterations}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", deqkern.ConvergenceWarning)
        return clock.wall(lambda: deqkern.sample(model, noise, SCHEDULE, size.steps, **options), 5) / iterations


def measure_latency(clock: Clock, network: Network, counts: list[int]) -> Iterator[Row]:
    """Milliseconds of one call of the network for N rows."""
    for count in counts:
        call = functools.partial(network, *inputs_of(network, count))
        row: Row = {"network": type(network).__name__, "rows": count, "eager_ms": 1e3 * clock(call)}
        yield row | {"graph_ms": 1e3 * clock(graphed([call], clock.device))}


def measure_compiled(clock: Clock, network: Network, steps: int, iterations: int) -> Iterator[Row]:
    """For any number of rows, since fewer come with each iteration; a transformer block by block: all are the same."""
    model: Any
    if isinstance(network, networks.DiT):
        model = copy.deepcopy(network)
        for block in model.blocks:
            block.compile(dynamic=True)
    else:
        whole = torch.compile(network)

        def model(x: Tensor, t: Tensor) -> Tensor:
            for value in (x, t):
                torch._dynamo.maybe_mark_dynamic(value, 0)
            return whole(x, t)

    for count in (steps, 1):
        call = functools.partial(model, *inputs_of(network, count))
        yield {"network": type(network).__name__, "rows": count, "compiled_ms": 1e3 * clock(call)}
    yield end_to_end(clock, network, model, "compiled", steps, iterations)


def inputs_of(network: Network, count: int) -> tuple[Tensor, Tensor]:
    """Samples (N, *shape) and timesteps (N,) as the network takes them."""
    parameter = next(network.parameters())
    x = torch.randn(count, *network.shape, device=parameter.device, dtype=parameter.dtype)
    return x, torch.randint(0, 1000, (count,), device=parameter.device)


def measure_end_to_end(clock: Clock, network: Network, steps: int, iterations: int) -> Iterator[Row]:
    for mode in ("eager", "graph"):
        yield end_to_end(clock, network, network, mode, steps, iterations)


def end_to_end(clock: Clock, network: Network, model: Any, mode: str, steps: int, iterations: int) -> Row:
    """Random weights: the time of an iteration, and what trained weights would need, openly combined.

    As a graph the sequential chain is S replays of the network alone, for one sample.
    """
    noise = torch.randn(1, *network.shape, device=clock.device)
    graph = mode == "graph" and clock.device.type == "cuda"
    one, all_rows = (functools.partial(model, *inputs_of(network, count)) for count in (1, steps))
    if graph:
        one, all_rows = graphed([one], clock.device), graphed([all_rows], clock.device)
    solver = solvers.default(window=None, thinning=0)
    options: Row = {"solver": solver, "rtol": 0.0, "max_iterations": iterations, "cuda_graph": graph}
    parallel = functools.partial(deqkern.sample, model, noise, SCHEDULE, steps, **options)
    chain = functools.partial(deqkern.sample, model, noise, SCHEDULE, steps, rtol=0.0, solver=solvers.sequential())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", deqkern.ConvergenceWarning)
        parallel(), all_rows(), one()
        iteration, alone = clock.wall(parallel, 3) / iterations, clock.wall(all_rows, 3)
        sequential = steps * clock.wall(one, 10) if graph else clock.wall(chain, 1)
    row: Row = {"network": type(network).__name__, "mode": mode, "steps": steps}
    row |= {"sequential_ms": 1e3 * sequential, "iteration_ms": 1e3 * iteration, "model_share": alone / iteration}
    return row | {"combined_with_trained_iterations": sequential / (TRAINED_ITERATIONS * iteration)}


def measure_shipped(clock: Clock, name: str, steps: int) -> Iterator[Row]:
    """The shipped model on its trained weights: wall clock, error and nfe of real solves."""
    loaded = models.load(name)
    model = loaded.model.to(clock.device)
    noise = torch.randn(1, *loaded.shape, generator=torch.Generator().manual_seed(0)).to(clock.device)
    chain = deqkern.sample(model, noise, loaded.schedule, steps, solver=solvers.sequential(), rtol=0.0)
    spent = clock.wall(
        lambda: deqkern.sample(model, noise, loaded.schedule, steps, solver=solvers.sequential(), rtol=0.0), 2
    )
    yield {"model": name, "solver": "sequential", "ms": 1e3 * spent, "iterations": steps, "nfe": steps}
    for graph in (False, True) if clock.device.type == "cuda" else (False,):
        options: Row = {"rtol": 1e-2, "cuda_graph": graph}
        found = deqkern.sample(model, noise, loaded.schedule, steps, **options)
        spent = clock.wall(lambda o=options: deqkern.sample(model, noise, loaded.schedule, steps, **o), 5)
        error = float(relative_error(found.value, chain.value))
        row = {"model": name, "solver": "default, graph" if graph else "default", "ms": 1e3 * spent}
        yield row | {"iterations": found.iterations, "nfe": int(found.nfe[0]), "error": error}


def bars(result: Row) -> Iterator[Row]:
    """docs/performance.md, the table of aims. Of several figures that a bar is about, the worst counts."""

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


def show(title: str, rows: list[Row]) -> None:
    print(f"\n{title}")
    for row in rows:
        cells = [f"{key} {value:.4g}" if isinstance(value, float) else f"{key} {value}" for key, value in row.items()]
        print("  " + ", ".join(cells), flush=True)


def main(
    device: Annotated[str, typer.Option(help="cuda or cpu")] = "cuda",
    small: Annotated[bool, typer.Option(help="toy sizes: a rehearsal")] = False,
    seconds: Annotated[int, typer.Option(help="stop measuring after so many")] = 3600,
    out: Annotated[Path | None, typer.Option(help="JSON to write, after each part")] = None,
) -> None:
    """Measure all parts, print them, write the figures."""
    torch.manual_seed(0)
    place = torch.device(device)
    clock = Clock(place, 0.01 if small else 0.1)
    dtype = torch.float32 if place.type == "cpu" else torch.bfloat16
    if small:
        sizes, batch, systems = [Size(3, 1, (3, 8, 8))], Size(4, 1, (4, 8, 8)), [(3, 2, 5)]
        nets = [networks.UNet(32, (1, 1), 1), networks.DiT(64, 1, 2)]
        counts, steps, iterations = [1, 2], 3, 2
    else:
        latents = [Size(50, count, (4, 64, 64)) for count in (1, 3, 20)]
        sizes, batch = [*latents, Size(50, 1, (3, 32, 32)), Size(50, 8, (3, 256, 256))], latents[0]
        systems, nets = [(50, 100, 5), (50, 1, 5), (1000, 8, 5), (50, 100, 16)], [networks.UNet(), networks.DiT()]
        counts, steps, iterations = [1, 2, 4, 8, 16, 25, 50, 75, 100], 50, 8
    result: Row = {"machine": machine(place)}
    failed: list[str] = []
    end = time.perf_counter() + seconds

    def part(title: str, measure: Callable[[], Iterable[Row]]) -> None:
        start, rows = time.perf_counter(), []
        result[title] = rows
        try:
            if start >= end:
                raise OutOfTime
            signal.alarm(math.ceil(end - start))
            for row in measure():
                rows.append(row)
        except OutOfTime:
            rows.append({"skipped": f"no time left of {seconds} s"})
        except ImportError as error:
            rows.append({"skipped": str(error)})
        except Exception as error:
            traceback.print_exc()
            rows.append({"skipped": f"{type(error).__name__}: {error}"})
            failed.append(title)
        finally:
            signal.alarm(0)
        result["machine"][f"{title}: seconds"] = round(time.perf_counter() - start, 1)
        show(title, rows)
        if out:
            out.parent.mkdir(parents=True, exist_ok=True)
            out.write_text(json.dumps(result, indent=1) + "\n")

    def stop(*_: object) -> None:
        raise OutOfTime

    signal.signal(signal.SIGALRM, stop)
    with torch.no_grad():
        sized = [1 << power for power in ((10, 12) if small else range(20, 32, 2))]
        part("copy", lambda: [{"bytes": n, "gb_per_s": v / 1e9} for n, v in copies(clock, sized).items()])
        part("iteration", lambda: measure_iterations(clock, batch))
        part("solve", lambda: measure_solve(clock, systems))
        part("ops", lambda: measure_ops(clock, sizes, Size(0, 0, ()) if small else batch))
        if place.type == "cuda":
            part("dct2", lambda: measure_dct2(clock, latents[::2] if not small else sizes))
        for name in ("digits", "photos"):
            part(f"shipped {name}", lambda name=name: measure_shipped(clock, name, steps))
        nets = [network.to(place, dtype).eval() for network in nets]
        for network in nets:
            title = type(network).__name__
            part(f"latency {title}", lambda n=network: measure_latency(clock, n, counts))
            part(f"end to end {title}", lambda n=network: measure_end_to_end(clock, n, steps, iterations))
        for network in reversed([] if small else nets):
            title = type(network).__name__
            part(f"compiled {title}", lambda n=network: measure_compiled(clock, n, steps, iterations))
    part("bars", lambda: list(bars(result)))
    if failed:
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
