"""The gradient of a solve as a node of torch's graph: for chains and for fixed points."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..ops._dispatch import requested_backends, use_backend

# (sources, cotangent of the value, which sources want a gradient) to their gradients, None where there is none
PullBack = Callable[[Sequence[Any], Tensor, Sequence[bool]], Sequence[Tensor | None]]


def attach(value: Tensor, sources: Sequence[Tensor | None], pull_back: PullBack) -> Tensor:
    """`value` with a gradient by the `sources`, which `pull_back` computes; as it is where none of them requires one.

    The sources are saved, so that torch notices if one of them changes in place before the gradient is taken. The
    backward pass has the ops' backends of this call, also in another thread. Differentiating twice raises RuntimeError.
    """
    attached: Tensor = _Attached.apply(pull_back, value, *sources)
    return attached


class Once(torch.autograd.Function):
    """`value`, from which no second derivative reaches the `sources`.

    torch's once_differentiable lets a wrong one through, zero, where the first cotangent requires no gradient.
    """

    @staticmethod
    def forward(ctx: Any, value: Tensor, *sources: Tensor | None) -> Tensor:
        return value.detach()

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor) -> tuple[None, ...]:
        raise RuntimeError("the gradient of a solve cannot be differentiated again")


class _Attached(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, pull_back: PullBack, value: Tensor, *sources: Tensor | None) -> Tensor:
        ctx.pull_back, ctx.backends = pull_back, requested_backends()
        ctx.save_for_backward(*sources)
        return value.detach()

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor) -> tuple[Any, ...]:
        sources = ctx.saved_tensors
        with torch.no_grad(), use_backend(*ctx.backends):
            gradients = ctx.pull_back(sources, cotangent.detach(), ctx.needs_input_grad[2:])
        if torch.is_grad_enabled():  # create_graph: the gradients depend on all sources, and have no derivative here
            gradients = [value if value is None else Once.apply(value, *sources) for value in gradients]
        return None, None, *gradients
