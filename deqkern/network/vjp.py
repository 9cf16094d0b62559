"""Vector-Jacobian products (VJPs) by autograd, that neither overflow nor vanish in half precision."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

_LARGEST_SUM = 2.0**13  # of absolute cotangents: fp16 ends at 2^16


def leaves(output: Tensor) -> list[Tensor]:
    """The tensors that require grad, made by no operation, that the autograd graph of `output` ends in."""
    tensors, seen, nodes = [], set(), [output.grad_fn]
    while nodes:
        node = nodes.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):
            tensors.append(node.variable)
        nodes += [following for following, _ in node.next_functions]
    return tensors


def scaled_vjp(
    output: Tensor,
    states: Tensor,
    cotangents: Tensor,  # like output
    inputs: Sequence[Tensor] = (),
    *,
    retain_graph: bool = False,
    create_graph: bool = False,
) -> tuple[Tensor, list[Tensor | None]]:
    """J^T cotangents by the states, zeros where the output does not depend on them, and by `inputs`, None there.

    The graph, whose dtypes may be narrow, gets cotangents that are scaled to a largest entry of 1, and to a sum that no
    gradient of `inputs` overflows by; what comes back is in fp32 at least.
    """
    if not output.requires_grad:
        return torch.zeros_like(states), [None] * len(inputs)
    size = cotangents.abs()
    scale = torch.maximum(size.amax(), size.sum() / _LARGEST_SUM) if inputs else size.amax()
    scale = scale.clamp_min(torch.finfo(cotangents.dtype).tiny)
    by_states, *by_inputs = torch.autograd.grad(
        output,
        [states, *inputs],
        (cotangents / scale).to(output.dtype),
        retain_graph=retain_graph or create_graph,
        create_graph=create_graph,
        allow_unused=True,
    )
    by_states = torch.zeros_like(states) if by_states is None else _times(by_states, scale)
    return by_states, [None if value is None else _times(value, scale) for value in by_inputs]


def _times(value: Tensor, scale: Tensor) -> Tensor:
    """`value` * `scale`, in fp32 at least."""
    wide = torch.promote_types(value.dtype, torch.float32)
    return value.to(wide) * scale.to(wide)
