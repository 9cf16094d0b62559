"""A GPU that launches nothing, so that a machine without one shows what the host does for it.

The Triton launchers run as they would: they choose specialisations, and what a real driver would have to compile is
noted down. Tensors stay on the CPU. With `compute` the C++ kernel of an op gives its result, so that a whole solve
goes its way; without it an op costs what its launches cost the host.

Triton must not interpret: TRITON_INTERPRET=0, before it is imported.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

from deqkern.ops import _dispatch, _native

ARCHITECTURE = 90


@dataclass
class Log:
    """What was launched and compiled: an entry per launch, and one per specialisation that was new."""

    launches: list[str] = field(default_factory=list)  # names of kernels
    compiled: list[tuple[str, str]] = field(default_factory=list)  # name, and the key of the specialisation


class _Driver:
    """What `JITFunction.run` asks of a driver."""

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", ARCHITECTURE, 32)


class _Kernel:
    """What `JITFunction.run` asks of a compiled kernel."""

    function, packed_metadata = 0, ()

    def __init__(self, name: str, log: Log) -> None:
        self.name, self.log = name, log

    def launch_metadata(self, *arguments: Any) -> None:
        return None

    def run(self, *arguments: Any) -> None:
        self.log.launches.append(self.name)


@contextmanager
def faked(compute: bool = False) -> Iterator[Log]:
    """In this context ops on CPU tensors launch Triton kernels on a GPU that is not there.

    Every specialisation is new again when the context begins.
    """
    log, before = Log(), (JITFunction._do_compile, dict(_dispatch._FIND))

    def compile(self: Any, key: Any, signature: Any, device: Any, *rest: Any) -> _Kernel:
        kernel = self.device_caches[device][0][key] = _Kernel(self.fn.__name__, log)
        log.compiled.append((kernel.name, str(key)))
        return kernel

    def find(op: str, device: str, dtype: torch.dtype) -> Callable[..., None] | str:
        meaning = before[1]["cpu"](op, device, dtype)
        if isinstance(meaning, str):
            return meaning
        run = meaning if compute else lambda *arguments: None
        if op == "anderson_solve":  # the one CUDA kernel; what its launch costs is not measured here
            return run
        launch = getattr(importlib.import_module(f"deqkern.kernels.{op}"), op)

        def both(*arguments: Any) -> None:
            launch(*arguments)
            run(*arguments)

        return both if compute else launch

    if _native.unavailable:
        raise RuntimeError(_native.unavailable)
    kernels = _kernels()
    for kernel in kernels:
        kernel.device_caches.clear()
    triton.runtime.driver.set_active(_Driver())
    JITFunction._do_compile = compile  # type: ignore[method-assign]
    _dispatch._FIND["cpu"] = find
    _dispatch._kernel.cache_clear()
    try:
        yield log
    finally:
        JITFunction._do_compile = before[0]  # type: ignore[method-assign]
        _dispatch._FIND.update(before[1])
        _dispatch._kernel.cache_clear()
        triton.runtime.driver._active = None
        for kernel in kernels:
            kernel.device_caches.clear()


def _kernels() -> list[Any]:
    """All that Triton could launch; raises where Triton interprets."""
    modules = [importlib.import_module(f"deqkern.kernels.{op}") for op in _dispatch.CONTRACTS if op != "anderson_solve"]
    found = [value for module in modules for name, value in vars(module).items() if name.endswith("_kernel")]
    if not all(isinstance(kernel, JITFunction) for kernel in found):
        raise RuntimeError("Triton interprets: set TRITON_INTERPRET=0 before it is imported")
    return found
