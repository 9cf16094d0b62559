"""The ops: validated here, once; run by the backend that fits the tensors (see `backends` and `use_backend`).

Every tensor is contiguous, on one device. State tensors and coefficients share one dtype, float32 or float64; the
model's output may be of any floating dtype; sums are float64 and indices int64. A wrong shape, device, layout or value
is a ValueError and a wrong type or dtype a TypeError, each naming the argument. What the integer tensors hold is not
looked at before a kernel does: the reference and the CPU kernels refuse `bands`, `rows` and `order` that lead out of
bounds with a ValueError, a GPU's kernels stay within their tensors, and all cut windows to 0 .. S. The ops write into
tensors they are given, return nothing and record no gradient.

What an op means is its reference in `deqkern.ops.reference`, whose signature is also its contract: the functions here,
their checks, the schemas of torch.library and the calls of the kernels all follow from it.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from . import reference
from ._dispatch import CONTRACTS, backends, direct, registered, requested_backends, use_backend
from ._validate import write_checked
from .contract import MAX_HISTORY
from .reference import SCOPES

__all__ = ["MAX_HISTORY", "SCOPES", "backends", "requested_backends", "unchecked", "use_backend"]
__all__ += reference.__all__


def _unchecked(op: str) -> Any:
    """The op past the checks and torch's dispatcher."""
    overloads = {overload: call for (name, overload), call in direct.items() if name == op}
    return next(iter(overloads.values())) if len(overloads) == 1 else SimpleNamespace(**overloads)


# For a loop that calls the ops with the same tensors again and again, after a first time that looked at them: past
# torch's dispatcher too, which takes longer than a launch. An op with overloads has each of them by its name.
unchecked = SimpleNamespace(**{op: _unchecked(op) for op in CONTRACTS})

if TYPE_CHECKING:
    from .reference import *  # noqa: F403
else:
    for _op, _contract in CONTRACTS.items():
        _calls = {overload: call for (name, overload), call in registered.items() if name == _op}
        globals()[_op] = write_checked(_contract, _calls)
        globals()[_op].__module__ = __name__
