"""What counts as a number in an argument, Python's or NumPy's: each rule once, for whoever checks one."""

from __future__ import annotations

from numbers import Integral, Real
from typing import Any, TypeGuard


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
