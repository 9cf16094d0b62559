"""Functions that are written out from a contract, as dataclasses write `__init__`, and compiled once.

A loop over the arguments in every call would take as long as a small op; one expression over them does not.
"""

from __future__ import annotations

import inspect
import linecache
import textwrap
from collections.abc import Callable
from typing import Any

from .contract import Contract


def write_function(
    contract: Contract, kind: str, body: str, namespace: dict[str, Any], names: dict[str, Any]
) -> Callable[..., None]:
    """The function `body` of the contract's arguments, with the reference's signature and docstring.

    Args:
        contract: the op's.
        kind: what tracebacks call it.
        body: its source. It sees the arguments, `names`, and the globals `namespace` of the module it is for.
        namespace: the globals of that module.
        names: objects that are this op's own.

    """
    arguments = ", ".join(argument.name for argument in contract.arguments)
    function = f"def {contract.name}({arguments}):\n{textwrap.indent(body.rstrip(), '    ')}\n"
    source = f"def make({', '.join(names)}):\n{textwrap.indent(function, '    ')}    return {contract.name}\n"
    file = f"<deqkern.ops: {kind} {contract.name}>"
    linecache.cache[file] = (len(source), None, source.splitlines(keepends=True), file)
    made: dict[str, Any] = {}
    exec(compile(source, file, "exec"), namespace, made)
    written: Callable[..., None] = made["make"](**names)
    written.__doc__, written.__qualname__ = contract.meaning.__doc__, contract.name
    written.__annotations__ = contract.meaning.__annotations__
    written.__signature__ = inspect.signature(contract.meaning)  # type: ignore[attr-defined]
    return written


def sizes(contract: Contract) -> str:
    """The statements that take every symbol from the shapes of the tensors."""
    lines = []
    for argument in contract.tensors:
        taken = {
            dimension: (s, more) for s, (name, dimension, more) in contract.symbols.items() if name == argument.name
        }
        if taken:
            targets = [taken[d][0] if d in taken else "_" for d in range(len(argument.rule.sizes))]
            lines.append(f"{', '.join(targets)}{',' * (len(targets) == 1)} = {argument.name}.shape")
            lines += [f"{symbol} -= {more}" for symbol, more in taken.values() if more]
    return "\n".join(lines)
