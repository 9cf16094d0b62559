"""The timesteps of a scheduler whose loop runs once per iteration."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor


class Timesteps(Tensor):
    """Timesteps of a scheduler whose iteration ends when the solve has converged; so do slices of them."""

    iterations: Callable[[Tensor, range], Iterator[Tensor]]  # of the values, and of which steps they are
    span: range  # which steps of the scheduler's they are
    # whatever is computed from them is a plain tensor
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @staticmethod
    def of(values: Tensor, iterations: Callable[[Tensor, range], Iterator[Tensor]], span: range) -> Timesteps:
        timesteps = values.as_subclass(Timesteps)
        timesteps.iterations, timesteps.span = iterations, span
        return timesteps

    def __getitem__(self, index: Any) -> Tensor:
        values = super().__getitem__(index)
        return Timesteps.of(values, self.iterations, self.span[index]) if isinstance(index, slice) else values

    def __iter__(self) -> Iterator[Tensor]:
        return self.iterations(self.as_subclass(Tensor), self.span)
