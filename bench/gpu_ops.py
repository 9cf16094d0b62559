"""Each op on a GPU: microseconds and GB/s, its reference, other ways to divide dct2, and torch.linalg.solve."""

from __future__ import annotations

import importlib
from collections.abc import Iterator

import registry
import torch
from gpu_clock import Call, Clock, Row, copies
from registry import Size
from torch import Tensor

from deqkern import ops
from deqkern.ops import reference

COMPILED = ("anderson_mix", "anderson_gram", "band_moments", "secant_slope", "interpolate_outputs", "ddim_scan")


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
