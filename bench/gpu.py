"""Everything that is measured on a GPU, in one run: `make gpu`, or what docs/records/performance.md says without make.

    copy         the bandwidth of a copy, per size: what every share is a share of
    shipped      whole solves of the shipped models, fp32 and bf16 (they need diffusers)
    policy       the same of networks of the size of robot policies, trained for seconds: DDPM-100 and DDIM-50
    iteration    all solver work of one iteration, launched and as a CUDA graph, against DEQ-DDIM's way in plain torch
    ops          microseconds and GB/s of each op, its reference, and its reference through torch.compile
    solve        the batched least squares against torch.linalg.solve on the same systems
    latency      t(N) of larger networks for a batch of N rows: eager, as a graph
    end to end   the sequential chain and the joint solve of these, with the model's share
    dct2         its kernel in other shapes and precisions, with their errors, and the bare products by cuBLAS
    compiled     the whole solves through torch.compile, last since it takes longest
    bars         what docs/records/performance.md aims at, met or missed

Whole solves are compared with the sequential loop in each way to run it: eager, as one CUDA graph, compiled, both. A
part that fails is left out and the exit code is 1; one that `--seconds` leaves no time for is cut. Every row is on disk
when it is printed. `--small` is a rehearsal at toy sizes, on a CPU too: its times mean nothing.
"""

from __future__ import annotations

import faulthandler
import functools
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import gpu_networks
import gpu_ops
import gpu_solves
import networks
import policies
import torch
import typer
from gpu_clock import Clock, Row, copies, machine
from gpu_iterations import measure_iterations
from gpu_results import Results, bars
from registry import Size

GRACE = 30  # seconds after the end until whatever hangs is shown and ended


def measured_copies(clock: Clock, powers: range) -> Iterator[Row]:
    """Bandwidths of copies of 2^power bytes."""
    for power in powers:
        for size, bandwidth in copies(clock, [1 << power]).items():
            yield {"bytes": size, "gb_per_s": bandwidth / 1e9}


def main(
    device: Annotated[str, typer.Option(help="cuda or cpu")] = "cuda",
    small: Annotated[bool, typer.Option(help="toy sizes: a rehearsal")] = False,
    seconds: Annotated[int, typer.Option(help="stop measuring after so many")] = 3600,
    out: Annotated[Path | None, typer.Option(help="JSON to write, after each row")] = None,
    commit: Annotated[str, typer.Option(help="of the sources, where they are no checkout")] = "",
) -> None:
    """Measure all parts, print them, write the figures."""
    faulthandler.dump_traceback_later(seconds + GRACE, exit=True)  # a kernel that hangs lets no signal through
    torch.manual_seed(0)
    place = torch.device(device)
    clock = Clock(place, 0.01 if small else 0.1)
    dtypes = (torch.float32, torch.bfloat16)
    if small:
        powers, training = range(10, 13, 2), 0.1
        sizes, batch, systems = [Size(3, 1, (3, 8, 8))], Size(20, 1, (4, 8, 8)), [(3, 2, 5)]
        nets = [networks.UNet(32, (1, 1), 1), networks.DiT(64, 1, 2)]
        nets_of_policies = [policies.PolicyMLP(64, 1), policies.PolicyUNet((16, 32))]
        counts, steps, iterations, chains = [1, 2], 4, 2, ((6, 1.0), (4, 0.0))
    else:
        powers, training = range(20, 32, 2), 12.0
        latents = [Size(50, count, (4, 64, 64)) for count in (1, 3, 20)]
        sizes, batch = [*latents, Size(50, 1, (3, 32, 32)), Size(50, 8, (3, 256, 256))], latents[0]
        systems, nets = [(50, 100, 5), (50, 1, 5), (1000, 8, 5), (50, 100, 16)], [networks.UNet(), networks.DiT()]
        nets_of_policies = [policies.PolicyMLP(), policies.PolicyUNet((128, 256, 512)), policies.PolicyUNet()]
        counts, steps, iterations, chains = [1, 2, 4, 8, 16, 25, 50, 75, 100], 50, 8, ((100, 1.0), (50, 0.0))
    results, problems = Results(machine(place, commit), out, seconds), []
    part = results.part
    with torch.no_grad():
        part("copy", lambda: measured_copies(clock, powers))
        for name in ("photos", "digits"):
            found = functools.partial(gpu_solves.shipped, name, steps, dtypes, place)
            part(f"shipped {name}", lambda f=found: gpu_solves.measure(f(), clock, problems), 60)
        for network in nets_of_policies:
            found = functools.partial(gpu_solves.policy, network, chains, dtypes, place, training)
            title = f"policy {sum(value.numel() for value in network.parameters()) / 1e6:.1f}M"
            part(title, lambda f=found: gpu_solves.measure(f(), clock, problems), 60)
        part("iteration", lambda: measure_iterations(clock, batch), 60)
        part("ops", lambda: gpu_ops.measure_ops(clock, sizes, Size(0, 0, ()) if small else batch), 90)
        part("solve", lambda: gpu_ops.measure_solve(clock, systems), 30)
        narrow = torch.float32 if place.type == "cpu" else torch.bfloat16
        for network in [network.to(place, narrow).eval() for network in nets]:
            title = type(network).__name__
            part(f"latency {title}", lambda n=network: gpu_networks.measure_latency(clock, n, counts), 30)
            measured = functools.partial(gpu_networks.measure_end_to_end, clock, network, steps, iterations)
            part(f"end to end {title}", measured, 30)
        if place.type == "cuda":
            part("dct2", lambda: gpu_ops.measure_dct2(clock, sizes[:3:2]), 40)
        if not small:
            part("compiled", lambda: gpu_solves.measure_compiled(in_order_of_value(problems), clock))
    part("bars", lambda: bars(results.found))
    if results.failed:
        raise typer.Exit(1)


def in_order_of_value(problems: list[gpu_solves.Problem]) -> list[gpu_solves.Problem]:
    """First one of each model, since compiling takes long: the policies with step noise, in bf16."""
    return sorted(problems, key=lambda p: (p.dtype is torch.float32, p.eta == 0 and p.name != "photos", p.name))


if __name__ == "__main__":
    typer.run(main)
