"""The torch side of every op: schema, fake, and the backend that runs a call.

A backend is a set of functions with the reference's signatures: `reference` itself, `deqkern._C` on CPUs and GPUs (see
`_native`), and `deqkern.kernels.<op>` (Triton). They are looked up once per (op, device, dtype), when first called.
"""

from __future__ import annotations

import functools
import importlib
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch.autograd.graph import increment_version  # noqa: F401, the written functions call it

from . import _generate, _native, reference
from .contract import Contract, State

Kernel = Callable[..., None]

CONTRACTS = {op: Contract(getattr(reference, op)) for op in reference.__all__}


def kernel_dtype(op: str) -> torch.dtype:
    """What kernels are written for: the dtype of the state, or of what chooses the kernel if there is no state."""
    rule = CONTRACTS[op].chooser.rule
    return torch.float32 if isinstance(rule, State) else rule.dtype


def _find_reference(op: str, device: str, dtype: torch.dtype) -> Kernel | str:
    meaning: Kernel = getattr(reference, op)
    return _in_its_dtype(meaning, device) if torch.amp.is_autocast_available(device) else meaning


def _find_cpu(op: str, device: str, dtype: torch.dtype) -> Kernel | str:
    if _native.unavailable:
        return _native.unavailable
    if device != "cpu":
        return f"its kernels read host memory, not {device}"
    if dtype is not kernel_dtype(op):
        return f"its kernels are written for {kernel_dtype(op)}, not {dtype}"
    return _native.write_cpu(CONTRACTS[op], getattr(_native._C, op))


def _find_triton(op: str, device: str, dtype: torch.dtype) -> Kernel | str:
    if device != "cuda" and not (device == "cpu" and os.environ.get("TRITON_INTERPRET") == "1"):
        return f"Triton does not run on {device}"
    if dtype is not kernel_dtype(op):
        return f"its kernels are written for {kernel_dtype(op)}, not {dtype}"
    try:
        kernel = getattr(importlib.import_module(f"deqkern.kernels.{op}"), op)
    except ImportError as error:
        return str(error)
    return _on_its_device(kernel) if device == "cuda" and torch.cuda.device_count() > 1 else kernel


def _find_cuda(op: str, device: str, dtype: torch.dtype) -> Kernel | str:
    if _native.unavailable:
        return _native.unavailable
    if not _native._C.cuda_compiled():
        return f"deqkern._C was compiled without CUDA: {_native._C.build_info()['cuda_reason']}"
    kernel = getattr(_native._C, f"cuda_{op}", None)
    if kernel is None:
        return f"deqkern._C has no CUDA kernel for {op}"
    if device != "cuda":
        return f"its kernels read the memory of a GPU, not {device}"
    if dtype is not kernel_dtype(op):
        return f"its kernels are written for {kernel_dtype(op)}, not {dtype}"
    return _native.write_cuda(CONTRACTS[op], kernel, _native.stream)


def _in_its_dtype(kernel: Kernel, device: str) -> Kernel:
    """Autocast is for models: it would round the products of matrices in plain torch."""

    def run(*arguments: Any) -> None:
        if not torch.is_autocast_enabled(device):
            return kernel(*arguments)
        with torch.autocast(device, enabled=False):
            kernel(*arguments)

    return run


def _on_its_device(kernel: Kernel) -> Kernel:
    """Triton launches on the current device, whatever the tensors say."""

    def run(*arguments: Any) -> None:
        with torch.cuda.device(arguments[0].device):
            kernel(*arguments)

    return run


_FIND = {"reference": _find_reference, "cpu": _find_cpu, "triton": _find_triton, "cuda": _find_cuda}
_AUTO = {"cpu": ("cpu", "reference"), "cuda": ("cuda", "triton", "reference")}
_requested: ContextVar[tuple[str, ...]] = ContextVar("deqkern_backend", default=("auto",))


@contextmanager
def use_backend(*names: str) -> Iterator[None]:
    """Run the ops called in this context on the first of the named backends that can: "auto" is any of them.

    Names: "auto", "reference" (plain torch), "cpu" (C++), "triton", "cuda". A call that none of them can run raises
    RuntimeError with the reason; there is no silent way back to the reference. The choice belongs to the current thread
    (a contextvar). Unknown names are a ValueError.
    """
    for name in names or ("",):
        if name != "auto" and name not in _FIND:
            raise ValueError(f"names must be among 'auto', {', '.join(map(repr, _FIND))}, got {name!r}")
    token = _requested.set(names)
    try:
        yield
    finally:
        _requested.reset(token)


def requested_backends() -> tuple[str, ...]:
    """The names that `use_backend` was given, for a later call of it: a backward pass may run in another thread."""
    return _requested.get()


@functools.cache
def _kernel(op: str, requested: tuple[str, ...], device: str, dtype: torch.dtype) -> Kernel:
    reasons = []
    for request in requested:
        for name in _AUTO.get(device, ("reference",)) if request == "auto" else (request,):
            found = _FIND[name](op, device, dtype)
            if not isinstance(found, str):
                return found
            reasons.append(f"backend {name!r} cannot run {op} here: {found}")
    raise RuntimeError("; ".join(reasons))


def backends() -> dict[str, dict[str, Any]]:
    """What can run: for each backend `loaded`, the `ops` it holds, and the `reason` why others are missing.

    "cpu" adds the instruction set in use (`isa`), those compiled in (`isas`) and the `threads` of a call. This imports
    Triton and asks for GPUs; importing deqkern does neither.
    """
    report: dict[str, dict[str, Any]] = {}
    for name, find in _FIND.items():
        device = "cuda" if name in ("triton", "cuda") else "cpu"
        found = {op: find(op, device, kernel_dtype(op)) for op in CONTRACTS}
        ops = [op for op, kernel in found.items() if not isinstance(kernel, str)]
        reasons = [reason for reason in found.values() if isinstance(reason, str)]
        if device == "cuda" and not torch.cuda.is_available():
            interpreted = name == "triton" and os.environ.get("TRITON_INTERPRET") == "1"
            if ops and not interpreted:
                ops, reasons = [], ["torch sees no CUDA device", *reasons]
        report[name] = {"loaded": bool(ops), "ops": ops}
        if reasons:
            report[name]["reason"] = "; ".join(dict.fromkeys(reasons))
    if not _native.unavailable:
        try:
            report["cpu"] |= {"isa": _native._C.isa(), "isas": _native._C.isas(), "threads": torch.get_num_threads()}
        except RuntimeError as error:  # DEQKERN_ISA names one that is not there: every call says the same
            report["cpu"] = {"loaded": False, "ops": [], "reason": str(error)}
    return report


def _write_direct(contract: Contract, overload: str) -> Kernel:
    """The op past torch's dispatcher: it finds the kernel, and tells autograd what was written."""
    names = ", ".join(argument.name for argument in contract.arguments)
    chooser, written = contract.chooser.name, ", ".join(contract.overloads[overload])
    body = f"""\
_kernel({contract.name!r}, _requested.get(), {chooser}.device.type, {chooser}.dtype)({names})
increment_version(({written},))
"""
    return _generate.write_function(contract, "direct", body, globals(), {})


def _register(contract: Contract, overload: str) -> Kernel:
    name = contract.name + f".{overload}" * bool(overload)
    library.define(name + contract.schema(overload))
    library.impl(name, direct[contract.name, overload], "CompositeExplicitAutograd")
    torch.library.register_fake(f"deqkern::{name}", lambda *arguments: None, lib=library)
    registered: Kernel = getattr(getattr(torch.ops.deqkern, contract.name), overload or "default")
    return registered


library = torch.library.Library("deqkern", "DEF")
# By (op, overload): the ops past torch's dispatcher, and through it.
direct = {
    (op, overload): _write_direct(contract, overload)
    for op, contract in CONTRACTS.items()
    for overload in contract.overloads
}
registered = {(op, overload): _register(CONTRACTS[op], overload) for op, overload in direct}
