"""Checks of one call's arguments: metadata only, never the contents of a tensor, so nothing waits for a GPU.

Each check is one short condition, because five ops run per iteration; what went wrong is found out only afterwards.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..support.checks import check_number, is_int

STATE_DTYPES = (torch.float32, torch.float64)


def array(name: str, value: Tensor, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> None:
    """Raise unless `value` is a contiguous tensor of this shape, dtype and device that needs no gradient."""
    try:
        if (
            value.shape == shape
            and value.dtype is dtype
            and value.device == device
            and value.is_contiguous()
            and not value.requires_grad
        ):
            return
    except AttributeError:
        pass
    _tensor(name, value)
    if value.shape != shape:
        raise ValueError(f"{name} must have shape {tuple(shape)}, got {tuple(value.shape)}")
    if value.dtype is not dtype:
        raise TypeError(f"{name} must be {dtype}, got {value.dtype}")
    if value.device != device:
        raise ValueError(f"{name} must be on {device} like the other tensors, got {value.device}")
    if not value.is_contiguous():
        raise ValueError(f"{name} must be contiguous, got strides {value.stride()} for shape {tuple(value.shape)}")
    if torch.is_grad_enabled():
        raise ValueError(
            f"{name} requires grad, but the ops record no gradient: call them under torch.no_grad(), or detach {name}"
        )


def state(name: str, value: Tensor) -> torch.dtype:
    """The dtype of the tensor that every other state tensor of the call must share."""
    _tensor(name, value)
    dtype = value.dtype
    if dtype not in STATE_DTYPES:
        raise TypeError(f"{name} must be float32 or float64, got {dtype}")
    return dtype


def floating(name: str, value: Tensor) -> torch.dtype:
    """The dtype of a tensor that may be of any floating type."""
    _tensor(name, value)
    if not value.is_floating_point():
        raise TypeError(f"{name} must be of a floating dtype, got {value.dtype}")
    return value.dtype


def sizes(name: str, value: Tensor, dims: int) -> torch.Size:
    """The shape of a tensor that gives the call its sizes: `dims` of them, each at least 1."""
    _tensor(name, value)
    shape = value.shape
    if len(shape) != dims or 0 in shape:
        raise ValueError(f"{name} must have {dims} dimensions of at least 1, got shape {tuple(shape)}")
    return shape


def _tensor(name: str, value: object) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(value).__name__}")


def integer(name: str, value: int, low: int, high: int) -> None:
    """Raise unless low <= value <= high."""
    if type(value) is not int and not is_int(value):
        raise TypeError(f"{name} must be an int, got {type(value).__name__}")
    if not low <= value <= high:
        raise ValueError(f"{name} must be in {low} .. {high}, got {value}")


def real(name: str, value: float, low: float = -math.inf) -> None:
    """Raise unless `value` is finite and at least `low`."""
    if type(value) is not float:
        check_number(name, value)
    if not low <= value < math.inf or value == -math.inf:
        raise ValueError(f"{name} must be finite{'' if low == -math.inf else f' and >= {low:g}'}, got {value}")
