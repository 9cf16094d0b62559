"""What a loop gives its denoiser must be the same at every step, since all steps are solved at once."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from .loops import LatentFormat, Loop

_CALLS = (
    "pipe calls its denoiser more often at some steps than at others, which cannot run in parallel: all steps are "
    "solved at once; a hook, or an option of the call, must be left out"
)


class Guard:
    """Compares the calls of the denoiser in one turn of the loop with those in the first, which it takes note of.

    Args:
        loop: What is known of the loop.
        config: Of the denoiser.
        settings: What a callback could change beside the arguments of the denoiser, as it is now.
    """

    def __init__(self, loop: Loop, config: Mapping[str, Any], settings: Callable[[], list[Any]]) -> None:
        self.loop, self.config, self.settings = loop, config, settings
        self.calls = 0  # of the denoiser in this turn
        self.given: list[list[Any]] = []  # what each of them is given, in the first turn
        self.timestep = torch.empty(0)  # of the loop

    def begin(self) -> None:
        """Another loop: the next turn is the first."""
        self.given = []

    def begin_turn(self, timestep: Tensor) -> None:
        """The loop has come to another timestep."""
        self.calls, self.timestep = 0, timestep

    def check_call(
        self,
        x: Tensor,
        timestep: Tensor,
        given: Mapping[str, Any],
        *,
        latents: LatentFormat,
        preview: Tensor,
        first: bool,
    ) -> None:
        """Of the denoiser: its states x (N, ..), its timestep, and what else it is given.

        `preview` are the latents of this turn, `first` says whether it is the first one.
        """
        self._check_conditioning(x[:, latents.own :], given, first)
        self._check_latents(x[:, : latents.own], torch.cat([preview.to(x.dtype)] * latents.copies))
        self._check_timestep(timestep, x.dtype)
        self.calls += 1

    def check_turn(self) -> None:
        """All of its calls are done."""
        if self.calls != len(self.given):
            raise ValueError(_CALLS)

    def _check_conditioning(self, channels: Tensor, given: Mapping[str, Any], first: bool) -> None:
        leaves = [channels, *tree_leaves(dict(given)), *self.settings()]
        leaves += [leaf._version for leaf in leaves[1:] if isinstance(leaf, Tensor) and not leaf.is_inference()]
        if first:
            self.given.append(leaves)
            return
        if self.calls >= len(self.given):
            raise ValueError(_CALLS)
        before = self.given[self.calls]
        if len(leaves) != len(before) or not all(map(_same, leaves, before)):
            raise ValueError(
                "callback_on_step_end changed the conditioning or the guidance: inside parallel() every step is solved "
                "at once, and all need the same"
            )

    def _check_latents(self, x: Tensor, expected: Tensor) -> None:
        if _same(x, expected):
            return
        if self.calls:
            raise ValueError(
                "pipe calls its denoiser at other latents than those of the step, which cannot run in parallel; a "
                "hook, or an option of the call, must be left out"
            )
        raise ValueError(
            "callback_on_step_end, or the pipe's own loop, changed latents between two steps; inside parallel() "
            "they are previews, to look at only"
        )

    def _check_timestep(self, timestep: Tensor, dtype: torch.dtype) -> None:
        seen, expected = timestep.float(), self.loop.timestep(self.timestep, dtype, self.config).float()
        if not bool(torch.isclose(seen, expected, rtol=1e-2).all()):  # it may be rounded otherwise
            raise ValueError(
                f"pipe gives its denoiser the timestep {float(seen.flatten()[0]):g}, not {float(expected):g}: its "
                "loop is not the one that parallel() knows"
            )


def _same(a: Any, b: Any) -> bool:
    """Whether two arguments are equal, NaN or not; of what is no tensor and not plain, whether they are of one type."""
    if a is b:
        return True
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a.shape == b.shape and (a.numel() == 0 or bool(((a == b) | (a.isnan() & b.isnan())).all()))
    return type(a) is type(b) and (not isinstance(a, bool | int | float | str) or a == b)
