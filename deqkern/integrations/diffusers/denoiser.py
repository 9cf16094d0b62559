"""The hook on a denoiser: where the loop calls it at one state, it is evaluated at the states of all steps."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...network.model import kwargs_of
from ...network.replication import Replicated
from ...support.eager import uncompiled
from .checks import check_denoiser_call
from .loops import LatentFormat, Loop


class Evaluation(NamedTuple):
    """The states that a call of the denoiser is to be evaluated at."""

    states: Tensor  # (N, channels or tokens, ..), as the loop has latents
    timesteps: Tensor  # (N,), of the scheduler
    samples: Tensor  # (N,)
    latents: LatentFormat


Answer = Callable[[Tensor, Tensor, Mapping[str, Any]], Evaluation]


class DenoiserHook:
    """Calls the denoiser at other states than its caller does, and gives the caller their outputs.

    Args:
        denoiser: The module of the pipe.
        loop: What is known of the loop that calls it.
        active: Whether a call of it is the loop's now.
        answer: The states to evaluate for a call, from its own states, timestep and other arguments.
        max_batch: Rows in one call.
        spread: The denoiser on several devices, if it is.
    """

    def __init__(
        self,
        denoiser: Any,
        loop: Loop,
        active: Callable[[], bool],
        answer: Answer,
        *,
        max_batch: int | None,
        spread: Replicated | None,
    ) -> None:
        self.denoiser, self.loop, self.active, self.answer = denoiser, loop, active, answer
        self.max_batch, self.spread = max_batch, spread
        self.names = list(inspect.signature(getattr(denoiser, "_orig_mod", denoiser).__class__.forward).parameters)[1:]
        self.inside = False  # the denoiser is called by the hook itself
        self.outputs: list[Tensor] = []  # of all parts of a call but the last
        self.join: Callable[[Any], Tensor] | None = None  # the last output to those of its rows on other devices
        self.handles = [
            denoiser.register_forward_pre_hook(self.before, with_kwargs=True),
            denoiser.register_forward_hook(self.after),
        ]

    def __deepcopy__(self, memo: Any) -> DenoiserHook:
        return self  # a copied denoiser has the hooks of this one, which do nothing there

    def remove(self) -> None:
        """Take the hooks off the denoiser, and let go of it."""
        for handle in self.handles:
            handle.remove()
        self.denoiser = self.spread = self.join = None
        self.outputs = []

    @uncompiled
    def before(
        self, module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[()], dict[str, Any]] | None:
        """Call the module at the states, ordered (copy of guidance, state); the last part is left to it."""
        if self._passes(module):
            return None
        given = dict(zip(self.names, args, strict=False)) | kwargs
        x, t = given.pop(self.names[0]), given.pop("timestep")
        check_denoiser_call(given)
        evaluation = self.answer(x, t, given)
        at, count = self._arguments(x, given, evaluation)
        *parts, last = torch.arange(count, device=x.device).split(self.max_batch or max(count, 1))
        self.inside = True
        try:
            if self.spread is None:
                self.outputs = [module(**at(part))[0] for part in parts]
                return (), at(last)
            spread = self.spread
            *spreads, own = [[((), at(part[share])) for share in spread.shares(len(part))] for part in (*parts, last)]
            self.outputs = [spread.evaluate(call) for call in spreads]
            (_, call), self.join = spread.begin(own)
            return (), call
        finally:
            self.inside = False

    @uncompiled
    def after(self, module: torch.nn.Module, args: Any, output: Any) -> Any:
        """Join the output of the last part to those of the others."""
        if self._passes(module) or not (self.outputs or self.join):
            return None
        joined = torch.cat([*self.outputs, output[0] if self.join is None else self.join(output)])
        self.outputs, self.join = [], None
        return (joined,) if isinstance(output, tuple) else type(output)(sample=joined)

    def _passes(self, module: torch.nn.Module) -> bool:
        """Whether this call of a denoiser is not the loop's."""
        return self.inside or module is not self.denoiser or not self.active()

    def _arguments(
        self, x: Tensor, given: Mapping[str, Any], evaluation: Evaluation
    ) -> tuple[Callable[[Tensor], dict[str, Any]], int]:
        """The denoiser's arguments at some of the rows, x first; and the number of rows, those of guidance counted."""
        states, timesteps, samples, latents = evaluation
        copies = latents.copies
        copy = torch.arange(copies, device=x.device)[:, None]
        index = (copy * latents.batch + samples).flatten()  # (N,) of all copies
        states = states.repeat(copies, *[1] * (states.ndim - 1))
        if x.shape[1] > latents.own:
            states = torch.cat([states, x[index, latents.own :]], dim=1)
        timesteps = self.loop.timestep(timesteps.repeat(copies), x.dtype, self.denoiser.config)
        shared = {name: given[name] for name in self.loop.shared}
        shared = {name: value[:1] if isinstance(value, list) else value for name, value in shared.items()}

        def at(part: Tensor) -> dict[str, Any]:
            own = {self.names[0]: states[part], "timestep": timesteps[part]}
            return own | kwargs_of(given, index[part], len(x)) | shared

        return at, len(index)
