"""The flattening of a fixed point's state, a tensor or several, to rows."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ..engine.solution import Solution
from ..engine.stopping import ROUNDINGS
from ..support.checks import check_dtype, check_finite

State = Any  # a tensor (B, *shape), or a tuple or list of tensors that share B

# In half precision no residual need be better than this many eps of the dtype: it is rounding.
NARROW_ROUNDINGS = 1.0


@dataclass(frozen=True)
class Flattening:
    """How a state lies in rows (B, D): its parts side by side, in one dtype."""

    shapes: tuple[tuple[int, ...], ...]  # (B, *shape) of each part
    dtypes: tuple[torch.dtype, ...]
    kind: type | None  # tuple or list, None for a tensor
    device: torch.device

    @classmethod
    def of(cls, state: State, name: str) -> Flattening:
        """That of `state`, an argument called `name`, which must hold finite numbers."""
        kind = type(state) if type(state) in (tuple, list) else None
        parts = state if kind else (state,)
        if not parts:
            raise ValueError(f"{name} is an empty {type(state).__name__}")
        for part in parts:
            if not isinstance(part, Tensor):
                raise TypeError(f"{name} must be a tensor, or a tuple or list of tensors, got {type(part).__name__}")
            check_dtype(name, part)
            if part.ndim < 1 or part.numel() == 0:
                raise ValueError(f"{name} must have shape (B, *shape) and not be empty, got {tuple(part.shape)}")
            if len(part) != len(parts[0]) or part.device != parts[0].device:
                raise ValueError(f"{name} must hold tensors of one batch size on one device")
            check_finite(name, part)
        shapes, dtypes = tuple(tuple(part.shape) for part in parts), tuple(part.dtype for part in parts)
        return cls(shapes, dtypes, kind, parts[0].device)

    @property
    def dtype(self) -> torch.dtype:
        """That of rows: fp32, or fp64 if a part is."""
        return torch.float64 if torch.float64 in self.dtypes else torch.float32

    @property
    def rounding(self) -> float:
        """The relative residual that is nothing but the rounding of the narrowest part."""
        narrow = [NARROW_ROUNDINGS * torch.finfo(dtype).eps for dtype in self.dtypes if dtype.itemsize == 2]
        return max([ROUNDINGS * torch.finfo(self.dtype).eps, *narrow])

    def rows(self, state: State) -> Tensor:  # (B, D)
        """A state like the one that this was made from."""
        parts = (state,) if self.kind is None else state
        return torch.cat([part.reshape(len(part), -1).to(self.dtype) for part in parts], 1)

    def output(self, state: State) -> Tensor:  # (B, D)
        """The rows of what f returned. Raises if it is no state."""
        if self.kind is not None and (not isinstance(state, tuple | list) or len(state) != len(self.shapes)):
            raise TypeError(f"f must return a tuple or list of {len(self.shapes)} tensors, got {type(state).__name__}")
        parts = (state,) if self.kind is None else state
        for part, shape in zip(parts, self.shapes, strict=True):
            if not isinstance(part, Tensor):
                raise TypeError(f"f must return what it is given, a tensor for a tensor, got {type(part).__name__}")
            if not part.is_floating_point():
                raise TypeError(f"f must return floating-point tensors, got {part.dtype}")
            if tuple(part.shape) != shape:
                raise ValueError(f"f returned shape {tuple(part.shape)} for an input of shape {shape}")
            if part.device != self.device:
                raise ValueError(f"f returned a tensor on {part.device} for an input on {self.device}")
        return self.rows(state)

    def state(self, rows: Tensor) -> State:
        """The state whose rows are (B, D), in memory of its own."""
        widths = [math.prod(shape[1:]) for shape in self.shapes]
        parts = [
            part.reshape(shape).to(dtype, copy=True)
            for part, shape, dtype in zip(rows.split(widths, 1), self.shapes, self.dtypes, strict=True)
        ]
        return parts[0] if self.kind is None else self.kind(parts)

    def solution(self, found: Solution, rows: Tensor) -> Solution:
        """`found`, of rows, with the value `rows` (B, D) as a state."""
        trajectory = found.trajectory if self.kind else found.trajectory.view(2, *self.shapes[0])
        return replace(found, value=self.state(rows), trajectory=trajectory)
