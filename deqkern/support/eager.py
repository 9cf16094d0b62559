"""What torch.compile leaves alone."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import torch

_P = ParamSpec("_P")
_T = TypeVar("_T")


def uncompiled(function: Callable[_P, _T]) -> Callable[_P, _T]:
    """`function` as it is, with all that it calls, also where torch.compile comes to it.

    A solve looks at what it computed, so that it would be cut into dozens of graphs; and inductor (torch 2.13) lets an
    op that writes into a view of a tensor write to another place of it.
    """
    plain: list[Callable[_P, _T]] = []

    @functools.wraps(function)
    def call(*args: _P.args, **kwargs: _P.kwargs) -> _T:
        if "torch._dynamo" not in sys.modules:  # nothing is compiled, and importing it takes seconds
            return function(*args, **kwargs)
        if not plain:
            plain.append(torch.compiler.disable(function))
        return plain[0](*args, **kwargs)

    return call
