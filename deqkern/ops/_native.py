"""The kernels of `deqkern._C` under the reference's signatures.

A call gives the addresses of the tensors (0 for None), the sizes, the numbers, and the number of threads; a CUDA kernel
the device and the stream instead. Each in the order of the contract. Arguments were validated by the public functions;
what follows from the contents of `bands`, `rows` and `order` is checked there. States are fp32; a model output of
another floating type is converted first, and back if the op writes it.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch import get_num_threads  # noqa: F401, the written functions call it

from . import _generate
from .contract import Argument, Contract, OneOf, Output

try:
    _C: Any = importlib.import_module("deqkern._C")
    unavailable = ""
except ImportError as error:
    _C = None
    unavailable = f"deqkern._C did not load: {error}"

stream: Any = getattr(torch._C, "_cuda_getCurrentRawStream", None)  # of a device; missing where torch has no CUDA


def write_cpu(contract: Contract, kernel: Callable[..., None]) -> Callable[..., None]:
    """The call of a CPU kernel: the bound function of deqkern._C."""
    outputs = [argument for argument in contract.tensors if isinstance(argument.rule, Output)]
    before = "".join(
        f"{_plain(a)} = {a.name} if {a.name}.dtype is torch.float32 else {a.name}.float()\n" for a in outputs
    )
    after = "".join(
        f"if {contract.flag} is {a.rule.written == list(contract.overloads)[1]} and {_plain(a)} is not {a.name}:\n"
        f"    {a.name}.copy_({_plain(a)})\n"
        for a in outputs
        if a.rule.written
    )
    call = f"kernel({', '.join([*_given(contract), 'get_num_threads()'])})"
    body = f"{_generate.sizes(contract)}\n{before}{call}\n{after}"
    return _generate.write_function(contract, "CPU kernel of", body, globals(), {"kernel": kernel})


def write_cuda(contract: Contract, kernel: Callable[..., None], stream: Callable[[int], int]) -> Callable[..., None]:
    """The call of a CUDA kernel: one launch on the current stream of its tensors' device."""
    call = f"kernel({', '.join([*_given(contract), 'device', 'stream(device)'])})"
    body = f"{_generate.sizes(contract)}\ndevice = {contract.chooser.name}.get_device()\n{call}\n"
    return _generate.write_function(contract, "CUDA kernel of", body, globals(), {"kernel": kernel, "stream": stream})


def arguments(contract: Contract) -> list[str]:
    """The names of what a call gives, without threads, device and stream."""
    names = [argument.name for argument in contract.tensors]
    return [*names, *contract.symbols, *(argument.name for argument in contract.scalars)]


def _plain(argument: Argument) -> str:
    """The variable that holds the fp32 form of a model output."""
    return f"plain_{argument.name}" if isinstance(argument.rule, Output) else argument.name


def _given(contract: Contract) -> list[str]:
    addresses = [f"{f'0 if {a.name} is None else ' * a.optional}{_plain(a)}.data_ptr()" for a in contract.tensors]
    scalars = [f"{a.rule.values!r}.index({a.name})" if isinstance(a.rule, OneOf) else a.name for a in contract.scalars]
    return [*addresses, *contract.symbols, *scalars]
