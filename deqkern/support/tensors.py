"""Tensors in parts, and tensors inside dicts, lists and tuples."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from torch import Tensor


def rebuilt(value: Any, change: Callable[[Any], Any]) -> Any:
    """A list, tuple or mapping (then a dict) with `change` applied to what it holds; anything else as it is."""
    if isinstance(value, Mapping):
        return {key: change(entry) for key, entry in value.items()}
    if isinstance(value, tuple) and hasattr(value, "_make"):  # a namedtuple
        return value._make(map(change, value))
    if type(value) in (list, tuple):
        return type(value)(map(change, value))
    return value


def tensors_in(value: Any) -> Iterator[Tensor]:
    """All tensors in `value`, at any depth."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for entry in value.values():
            yield from tensors_in(entry)
    elif isinstance(value, list | tuple):
        for entry in value:
            yield from tensors_in(entry)


def split_rows(rows: Tensor, max_batch: int | None) -> tuple[Tensor, ...]:
    """The rows (N, ..) of each call of the model: at most `max_batch`."""
    return rows.split(int(max_batch or max(len(rows), 1)))
