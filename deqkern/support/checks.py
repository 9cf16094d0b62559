"""What an argument may be, whoever takes it: each rule once, with the message that names the argument."""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from numbers import Integral, Real
from typing import Any, TypeGuard

import torch
from torch import Tensor

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)  # that states come in


def check_number(name: str, value: Any) -> None:
    """An int or a float."""
    if not is_number(value):
        raise TypeError(f"{name} must be a number, got {type(value).__name__}")


def is_number(value: Any) -> TypeGuard[float]:
    """Whether it is an int or a float, which True is not."""
    return isinstance(value, Real) and not isinstance(value, bool)


def is_int(value: Any) -> TypeGuard[int]:
    """Whether it is an int, which True is not."""
    return isinstance(value, Integral) and not isinstance(value, bool)


def check_rtol(rtol: float) -> None:
    """A finite number >= 0."""
    check_number("rtol", rtol)
    if not 0 <= rtol < math.inf:
        raise ValueError(f"rtol must be finite and >= 0, got {rtol}")


def check_count(name: str, value: int | None, *, optional: bool = False) -> None:
    """An int >= 1, or None where that is an option."""
    if optional and value is None:
        return
    if not is_int(value) or value < 1:
        raise ValueError(f"{name} must be {'None or ' if optional else ''}an int >= 1, got {value!r}")


def check_callable(name: str, value: Any) -> None:
    """A function, or what is called like one."""
    if not callable(value):
        raise TypeError(f"{name} must be callable, got {type(value).__name__}")


def check_callback(callback: Any) -> None:
    """None or callable."""
    if callback is not None:
        check_callable("callback", callback)


def check_generator(generator: Any) -> None:
    """None or a `torch.Generator`."""
    if generator is not None and not isinstance(generator, torch.Generator):
        raise TypeError(f"generator must be a torch.Generator, got {type(generator).__name__}")


def check_dtype(name: str, value: Tensor) -> None:
    """One that states come in."""
    if value.dtype not in DTYPES:
        raise TypeError(f"{name} must be fp32, bf16, fp16 or fp64, got {value.dtype}")


def check_finite(name: str, value: Tensor) -> None:
    """No infinity and no NaN."""
    if not bool(value.isfinite().all()):
        raise ValueError(f"{name} must be finite")


def check_not_empty(name: str, first: Tensor) -> None:
    """At least one sample."""
    if len(first) == 0:
        raise ValueError(f"{name} must hold at least one sample")


def to_int(name: str, value: Any) -> int:
    """`value`, which is an int or acts as one."""
    try:
        if isinstance(value, bool):
            raise TypeError
        return operator.index(value)
    except TypeError:
        raise TypeError(f"{name} must be an int, got {type(value).__name__}") from None


def to_float(name: str, value: Any) -> float:
    """`value`, which is a number or acts as one."""
    if isinstance(value, bool | str):
        raise TypeError(f"{name} must be a number, got {type(value).__name__}")
    try:
        return float(value)
    except TypeError:
        raise TypeError(f"{name} must be a number, got {type(value).__name__}") from None


def check_choice(name: str, value: str, choices: Sequence[str]) -> None:
    """One of the `choices`."""
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(choices)}, got {value!r}")
