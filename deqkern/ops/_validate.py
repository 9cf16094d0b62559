"""The checks of a call's arguments: metadata only, never the contents of a tensor, so nothing waits for a GPU.

A call that is right costs one expression, written out from the contract. What was wrong is found out afterwards, by
`check`, which says the same at length.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.compiler import is_dynamo_compiling  # noqa: F401, the written functions call it

from ..support.checks import check_number, is_int
from . import _generate
from .contract import SYMBOLS, Argument, Array, AtLeast, Between, Contract, Float64, Index, Int64, OneOf, Output, State

STATE_DTYPES = (torch.float32, torch.float64)


def write_checked(contract: Contract, calls: dict[str, Callable[..., None]]) -> Callable[..., None]:
    """The public function of an op: it checks its arguments and calls the overload that they ask for."""
    conditions = [_sizes_are_fine(contract)]
    conditions += [_tensor_is_fine(contract, argument) for argument in contract.tensors]
    conditions += [_scalar_is_fine(argument) for argument in contract.scalars]
    negations = [f"{f'{a.name} is not None and ' * a.optional}{a.name}.is_neg()" for a in contract.tensors]
    conditions.append(f"(is_dynamo_compiling() or not ({' or '.join(negations)}))")  # which cannot trace it
    names = ", ".join(argument.name for argument in contract.arguments)
    chosen = "call_"
    if contract.flag:
        if_false, if_true = calls
        chosen = f"(call_{if_true} if {contract.flag} else call_{if_false})"
    body = f"""\
try:
{_indented(_generate.sizes(contract))}
    device, state = {contract.chooser.name}.device, {contract.chooser.name}.dtype
    fine = (
        {f"{chr(10)}        and ".join(conditions)}
    )
except (AttributeError, TypeError, ValueError, RuntimeError):
    fine = False
if not fine:
    {names} = check(contract, ({names}))
{chosen}({names})
"""
    own = {"contract": contract, **{f"call_{overload}": call for overload, call in calls.items()}}
    return _generate.write_function(contract, "checked", body, globals(), own)


def _indented(text: str) -> str:
    return "\n".join("    " + line for line in text.splitlines())


def _sizes_are_fine(contract: Contract) -> str:
    limits = {symbol: SYMBOLS[symbol] for symbol in contract.symbols}
    bounds = [f"{least} <= {s}{f' <= {most}' if most < math.inf else ''}" for s, (least, most) in limits.items()]
    return " and ".join(bounds)


def _tensor_is_fine(contract: Contract, argument: Argument) -> str:
    name, rule = argument.name, argument.rule
    dtype = {
        State: f"{name}.dtype is state",
        Output: f"{name}.dtype.is_floating_point",
        Float64: f"{name}.dtype is torch.float64",
        Int64: f"{name}.dtype is torch.int64",
    }
    terms = [text for kind, text in dtype.items() if isinstance(rule, kind)]
    if argument is contract.chooser and isinstance(rule, State):
        terms = ["(state is torch.float32 or state is torch.float64)"]
    given = {dimension for owner, dimension, _ in contract.symbols.values() if owner == name}
    if len(given) < len(rule.sizes):
        terms.insert(0, f"{name}.shape == ({', '.join(rule.sizes)},)")
    if isinstance(rule, Index) and any(not SYMBOLS[symbol][0] for symbol in re.findall(r"[A-Za-z]", rule.below)):
        terms.append(f"({rule.below} or not {name}.numel())")
    if argument is not contract.chooser:
        terms.append(f"{name}.device == device")
    terms += [f"{name}.layout is torch.strided", f"{name}.is_contiguous()"]
    terms.append(f"not {name}.requires_grad")
    text = " and ".join(terms)
    if rule.none_if:
        text = f"not {rule.none_if} and {text}"
    return f"({name} is None or ({text}))" if argument.optional else text


def _scalar_is_fine(argument: Argument) -> str:
    name, rule = argument.name, argument.rule
    if argument.type is bool:
        return f"({name} is True or {name} is False)"
    if isinstance(rule, OneOf):
        return f"type({name}) is str and {name} in {rule.values!r}"
    if isinstance(rule, Between):
        return f"type({name}) is int and {rule.low} <= {name} <= {rule.high}"
    low = f"{rule.low} <=" if isinstance(rule, AtLeast) else "-math.inf <"
    return f"type({name}) is float and {low} {name} < math.inf"


def check(contract: Contract, values: tuple[Any, ...]) -> tuple[Any, ...]:
    """The arguments of a call, with Python's numbers for NumPy's.

    Raises:
        ValueError: a shape, device, layout or value is wrong.
        TypeError: a type or dtype is wrong.

    """
    given = dict(zip((argument.name for argument in contract.arguments), values, strict=True))
    chooser = given[contract.chooser.name]
    sizes: dict[str, int] = {}
    for argument in contract.scalars:
        if argument.type is bool:  # the tensors that may be given depend on it
            given[argument.name] = _number(argument, given[argument.name], sizes)
    for argument in contract.tensors:
        name, value, rule = argument.name, given[argument.name], argument.rule
        if value is None and argument.optional:
            continue
        if rule.none_if and given[rule.none_if]:
            raise ValueError(f"{name} must be None if {rule.none_if}")
        _check_dense(name, value)
        _check_shape(contract, argument, value.shape, sizes)
        like = chooser if isinstance(chooser, Tensor) else value
        _check_dtype(name, rule, value.dtype, value.dtype if argument is contract.chooser else like.dtype)
        if value.device != like.device:
            raise ValueError(f"{name} must be on {like.device} like the other tensors, got {value.device}")
        if not value.is_contiguous():
            raise ValueError(f"{name} must be contiguous, got strides {value.stride()} for shape {tuple(value.shape)}")
        if value.is_neg():
            raise ValueError(f"{name} must not be a lazy negation: pass {name}.resolve_neg()")
        if value.requires_grad and torch.is_grad_enabled():
            raise ValueError(
                f"{name} requires grad, but the ops record no gradient: call them under torch.no_grad(), "
                f"or detach {name}"
            )
    for argument in contract.scalars:
        given[argument.name] = _number(argument, given[argument.name], sizes)
    return tuple(given.values())


def _check_dense(name: str, value: object) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(value).__name__}")
    if value.is_nested or value.layout is not torch.strided:
        kind = "nested" if value.is_nested else str(value.layout).removeprefix("torch.")
        raise ValueError(f"{name} must be a dense tensor, got a {kind} one")


def _check_shape(contract: Contract, argument: Argument, shape: torch.Size, sizes: dict[str, int]) -> None:
    """Adds the symbols that `argument` gives the call to `sizes`."""
    name, rule = argument.name, argument.rule
    wanted = f"({rule.shape})" if len(rule.sizes) > 1 else f"({rule.shape},)"
    if len(shape) != len(rule.sizes):
        raise ValueError(f"{name} must have shape {wanted}, got {tuple(shape)}")
    for symbol, (owner, dimension, more) in contract.symbols.items():
        if owner == name:
            sizes[symbol] = shape[dimension] - more
            least, most = SYMBOLS[symbol]
            if not least <= sizes[symbol] <= most:
                limit = f"at least {least}" if most == math.inf else f"within {least} .. {most}"
                raise ValueError(f"{name} must have shape {wanted} with {symbol} {limit}, got {tuple(shape)}")
    expected = tuple(_size(size, sizes) for size in rule.sizes)
    if shape != expected:
        raise ValueError(f"{name} must have shape {expected}, got {tuple(shape)}: {wanted}")
    if isinstance(rule, Index) and shape.numel() and not _size(rule.below, sizes):
        raise ValueError(f"{name} must be empty where {rule.below} is 0, got shape {tuple(shape)}")


def _size(text: str, sizes: dict[str, int]) -> int:
    """The value of an expression of symbols: sums and products."""
    if "+" in text:
        return sum(_size(part, sizes) for part in text.split("+"))
    return math.prod(int(part) if part.isdigit() else sizes[part] for part in text.split("*"))


def _check_dtype(name: str, rule: Array, dtype: torch.dtype, state: torch.dtype) -> None:
    if isinstance(rule, State):
        if dtype not in STATE_DTYPES:
            raise TypeError(f"{name} must be float32 or float64, got {dtype}")
        if dtype is not state:
            raise TypeError(f"{name} must be {state} like the other states, got {dtype}")
    elif isinstance(rule, Output):
        if not dtype.is_floating_point:
            raise TypeError(f"{name} must be of a floating dtype, got {dtype}")
    elif dtype is not rule.dtype:
        raise TypeError(f"{name} must be {rule.dtype}, got {dtype}")


def _number(argument: Argument, value: Any, sizes: dict[str, int]) -> Any:
    name, rule = argument.name, argument.rule
    if argument.type is bool:
        if not isinstance(value, bool | np.bool_):
            raise TypeError(f"{name} must be a bool, got {type(value).__name__}")
        return bool(value)
    if isinstance(rule, OneOf):
        if not isinstance(value, str) or value not in rule.values:
            raise ValueError(f"{name} must be one of {', '.join(rule.values)}, got {_shown(value)}")
        return str(value)
    if isinstance(rule, Between):
        if not is_int(value):
            raise TypeError(f"{name} must be an int, got {type(value).__name__}")
        high = rule.high if isinstance(rule.high, int) else sizes[rule.high]
        if not rule.low <= value <= high:
            raise ValueError(f"{name} must be in {rule.low} .. {high}, got {_shown(value)}")
        return int(value)
    check_number(name, value)
    low = rule.low if isinstance(rule, AtLeast) else -math.inf
    try:
        number = float(value)
    except OverflowError:  # of an int
        number = math.inf
    if not (low <= number < math.inf and number > -math.inf):
        raise ValueError(f"{name} must be finite{f' and >= {low:g}' if low > -math.inf else ''}, got {_shown(value)}")
    return number


def _shown(value: Any) -> str:
    """`value` for a message: Python refuses to print an int of more than 4300 digits."""
    return "an int of many digits" if is_int(value) and abs(value) > 10**18 else repr(value)
