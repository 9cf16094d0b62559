"""The contract of an op, which is the signature of its reference: shapes, dtypes, what is written, ranges of numbers.

An argument's annotation says what it must be, once, for whoever calls, checks, registers, runs or tests the op:

    x: Annotated[Tensor, State("S+1, B, D")]            a tensor of this shape and of the dtype of the state
    z: Annotated[Tensor | None, State("S, B, D")]       or None
    norms: Annotated[Tensor, Float64("S, B, 3", written=True)]
    ridge: Annotated[float, AtLeast(0.0)]

The first tensor whose shape holds a symbol gives the call that size. The first `State` tensor gives it the dtype of the
state and the device, and chooses the kernel; where there is none, the first tensor does.
"""

from __future__ import annotations

import inspect
import math
import re
import typing
from collections.abc import Callable
from dataclasses import KW_ONLY, dataclass, field
from functools import cached_property
from typing import Any, ClassVar

import torch
from torch import Tensor

MAX_HISTORY = 16

# symbol: (least, most) size. S steps, B samples, D elements of a flattened sample, K bands, m history size, N rows that
# a call works on, R rows of a spectrum, C channels, H height, W width.
SYMBOLS: dict[str, tuple[int, float]] = {
    **dict.fromkeys("SBDKCHW", (1, math.inf)),
    **dict.fromkeys("NR", (0, math.inf)),
    "m": (1, MAX_HISTORY),
}


@dataclass(frozen=True)
class Array:
    """A contiguous tensor that needs no gradient. Its shape is text, such as "S+1, B, D": symbols and numbers.

    written: whether the op writes it, or which overload does. none_if: the flag with which only None is allowed.
    """

    shape: str
    _: KW_ONLY
    written: bool | str = False
    none_if: str = ""

    dtype: ClassVar[torch.dtype | None] = None

    @cached_property
    def sizes(self) -> tuple[str, ...]:
        """The expression of each dimension."""
        return tuple(self.shape.replace(" ", "").split(","))


class State(Array):
    """A state or a coefficient: float32 or float64, the same for all of a call."""


class Output(Array):
    """What a model gave: any floating dtype."""


class Float64(Array):
    """Sums, and what is made of them."""

    dtype = torch.float64


class Int64(Array):
    """Integers that lead nowhere: any value will do."""

    dtype = torch.int64


class Window(Int64):
    """(begin, end) of each sample's active steps, cut to 0 .. S by every backend."""


class Bands(Int64):
    """Where each band begins, and D: from 0 to D, not decreasing.

    The reference and the CPU kernels refuse others with a ValueError; the GPU kernels stay within their tensors.
    """


@dataclass(frozen=True)
class Index(Int64):
    """Places, 0 <= value < below.

    The reference and the CPU kernels refuse others with a ValueError; the GPU kernels stay within their tensors.
    """

    below: str = ""


@dataclass(frozen=True)
class AtLeast:
    """A finite float, not below `low`."""

    low: float


@dataclass(frozen=True)
class Between:
    """An int within low .. high, which is a number or a symbol."""

    low: int
    high: int | str


@dataclass(frozen=True)
class OneOf:
    """One of these strings; deqkern._C is given its place."""

    values: tuple[str, ...]


@dataclass(frozen=True)
class Overloads:
    """A flag that chooses what is written: the names of the overloads for False and True."""

    names: tuple[str, str]


Rule = Array | AtLeast | Between | OneOf | Overloads | None


@dataclass(frozen=True)
class Argument:
    """One argument of an op. type: Tensor, or that of a number, a flag or a string."""

    name: str
    type: type
    optional: bool
    rule: Any  # of Rule; for tensors an Array


@dataclass(frozen=True)
class Contract:
    """What the signature of `meaning`, an op's reference, says."""

    meaning: Callable[..., None]
    arguments: tuple[Argument, ...] = field(init=False)

    def __post_init__(self) -> None:
        hints = typing.get_type_hints(self.meaning, include_extras=True)
        names = inspect.signature(self.meaning).parameters
        object.__setattr__(self, "arguments", tuple(_argument(name, hints[name]) for name in names))

    @property
    def name(self) -> str:
        return self.meaning.__name__

    @cached_property
    def tensors(self) -> tuple[Argument, ...]:
        return tuple(argument for argument in self.arguments if argument.type is Tensor)

    @cached_property
    def scalars(self) -> tuple[Argument, ...]:
        return tuple(argument for argument in self.arguments if argument.type is not Tensor)

    @cached_property
    def chooser(self) -> Argument:
        """The argument whose dtype and device choose the kernel."""
        return next((a for a in self.tensors if isinstance(a.rule, State)), self.tensors[0])

    @cached_property
    def symbols(self) -> dict[str, tuple[str, int, int]]:
        """symbol: (name of the argument, dimension, what is added to it there), in the order of their first places."""
        found: dict[str, tuple[str, int, int]] = {}
        for argument in self.tensors:
            for dimension, size in enumerate(argument.rule.sizes):
                simple = re.fullmatch(r"([A-Za-z])(?:\+(\d+))?", size)
                if simple and not argument.optional:
                    found.setdefault(simple[1], (argument.name, dimension, int(simple[2] or 0)))
        return found

    @cached_property
    def overloads(self) -> dict[str, tuple[str, ...]]:
        """name of the overload, "" if there is one: the arguments that it writes."""
        chosen = [argument.rule.names for argument in self.scalars if isinstance(argument.rule, Overloads)]
        return {
            overload: tuple(a.name for a in self.tensors if a.rule.written in (True, overload))
            for overload in (chosen[0] if chosen else ("",))
        }

    @cached_property
    def flag(self) -> str:
        """The argument that chooses the overload, or ""."""
        return next((a.name for a in self.scalars if isinstance(a.rule, Overloads)), "")

    @cached_property
    def written(self) -> tuple[str, ...]:
        """All arguments that the op writes, in one overload or another."""
        return tuple(argument.name for argument in self.tensors if argument.rule.written)

    def schema(self, overload: str) -> str:
        """The arguments and the result as torch.library writes them."""
        written, parts = self.overloads[overload], []
        for place, argument in enumerate(self.arguments):
            kind = {int: "SymInt", Tensor: "Tensor"}.get(argument.type, argument.type.__name__)
            mark = f"(a{place}!)" if argument.name in written else ""
            parts.append(f"{kind}{mark}{'?' * argument.optional} {argument.name}")
        return f"({', '.join(parts)}) -> ()"


def _argument(name: str, hint: Any) -> Argument:
    rule: Rule = None
    if typing.get_origin(hint) is typing.Annotated:
        hint, rule = typing.get_args(hint)
    choices = typing.get_args(hint) or (hint,)
    (kind,) = (choice for choice in choices if choice is not type(None))
    assert isinstance(rule, Array) == (kind is Tensor), f"{name} needs a rule that fits its type"
    return Argument(name, kind, type(None) in choices, rule)
