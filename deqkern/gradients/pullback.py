"""From the cotangent of a chain's last state to the gradients of all that the state depends on, by any method."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from ..network.model import Network
from ..support.eager import uncompiled
from .autograd import attach
from .linearized import LinearizedChain, Pulled


class Gradient(Protocol):
    """What `gradient=` takes: any object with a method `pull_back`.

    The classes of `deqkern.gradients` are of this kind, and so may be one of your own. It may also have a method
    `check(table)`, which raises ValueError for a `StepTable` that it cannot go back through; it is called before the
    model is.

    Example:
        Straight through: as if the output of the model did not depend on its input.

        >>> class StraightThrough:
        ...     def pull_back(self, chain, cotangent):
        ...         return chain.pulled(cotangent * float(chain.table.a.prod()))
        >>> noise = torch.randn(1, 4, requires_grad=True)
        >>> schedule = deqkern.NoiseSchedule.linear()
        >>> model = lambda x, t: 0.1 * x
        >>> solution = deqkern.sample(model, noise, schedule, 10, gradient=StraightThrough())
        >>> solution.value.sum().backward()
        >>> noise.grad.shape
        torch.Size([1, 4])
    """

    def pull_back(self, chain: LinearizedChain, cotangent: Tensor) -> Pulled:
        """From dL/dx[S] (B, *shape), which is finite, to the gradients of what the chain depends on."""


@uncompiled
def pull_back(gradient: Gradient, chain: LinearizedChain, cotangent: Tensor) -> Pulled:
    """The gradients of `chain` from dL/dx[S] (B, *shape), by the method `gradient`.

    NaN all over for a cotangent that is not finite: a gradient scaler of half precision wants to see it.
    """
    if not bool(cotangent.isfinite().all()):
        lost = torch.full_like(cotangent, torch.nan)
        noise = lost.expand(chain.steps, *lost.shape) if chain.with_noise else None
        none = torch.zeros(chain.batch, dtype=torch.int64, device="cpu")
        return Pulled(lost, noise, [torch.full_like(value, torch.nan) for value in chain.inputs], none)
    pulled: Any = gradient.pull_back(chain, cotangent)
    if not isinstance(pulled, Pulled):
        name = type(gradient).__name__
        raise TypeError(f"pull_back of {name} must return what chain.pulled(...) makes, got {type(pulled).__name__}")
    return pulled


class Pullback:
    """Pulls a cotangent back from the end of a solved chain to all that it depends on."""

    def __init__(self, network: Network, gradient: Gradient, rtol: float, max_batch: int | None) -> None:
        self.network, self.gradient, self.rtol, self.max_batch = network, gradient, rtol, max_batch

    def __call__(
        self,
        states: Tensor,  # (S+1, B, *shape), the solution
        cotangent: Tensor,  # (B, *shape), dL/dx[S]
        inputs: Sequence[Tensor] = (),
        with_noise: bool = False,
    ) -> Pulled:
        """The gradients by the first state, by the step noise if asked for, and by `inputs`."""
        options: dict[str, Any] = {"rtol": self.rtol, "max_batch": self.max_batch, "with_noise": with_noise}
        return pull_back(self.gradient, LinearizedChain(self.network, states, inputs, **options), cotangent)

    def attach(self, value: Tensor, states: Tensor, first: Tensor, step_noise: Tensor | None = None) -> Tensor:
        """The `value` (B, *shape) of a solve, whose states (S+1, B, *shape) are those of the chain, with a gradient.

        By `first` (B, *shape), the step noise (S, B, *shape), conditions and parameters. As it is where none of them
        requires one, or under torch.no_grad(). Differentiating twice raises RuntimeError.
        """
        if not torch.is_grad_enabled():
            return value

        def gradients(sources: Sequence[Any], cotangent: Tensor, wanted: Sequence[bool]) -> list[Tensor | None]:
            states, _, _, *inputs = sources
            asked = [value for value, want in zip(inputs, wanted[3:], strict=True) if want]
            pulled = self(states, cotangent.to(states.dtype), asked, with_noise=wanted[2])
            sums = iter(pulled.inputs)
            return [None, pulled.first, pulled.step_noise, *(next(sums) if want else None for want in wanted[3:])]

        return attach(value, [states, first, step_noise, *self.network.inputs(first)], gradients)
