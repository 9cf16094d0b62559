"""What counts as a number in an argument: each rule once, for whoever checks one."""

from __future__ import annotations

from typing import Any, TypeGuard


def check_number(name: str, value: Any) -> None:
    """An int or a float."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"{name} must be a number, got {type(value).__name__}")


def is_int(value: Any) -> TypeGuard[int]:
    """Whether it is an int, which True is not."""
    return isinstance(value, int) and not isinstance(value, bool)
