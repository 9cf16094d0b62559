"""What the engine asks for: the states of one evaluation."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from torch import Tensor

if TYPE_CHECKING:
    from .trajectory import Trajectory


class Rows:
    """The states that an iteration needs the map at: N of them, each at a step of a sample.

    Made by `Solve.ask`. It may be cut into parts with `split`; the parts are evaluated in their order.

    Attributes:
        steps: (N,) int64, the step of each state, on the device of the states.
        samples: (N,) int64, the sample of the batch that each state belongs to.
        timesteps: (N,), what the model is told of each state, in the dtype of the table.

    """

    def __init__(
        self, trajectory: Trajectory, index: Tensor, steps: Tensor, samples: Tensor, timesteps: Tensor
    ) -> None:
        self._trajectory, self.index = trajectory, index  # (N,), flat indices step * B + sample
        self.steps, self.samples, self.timesteps = steps, samples, timesteps

    def __len__(self) -> int:
        return len(self.index)

    @property
    def states(self) -> Tensor:
        """The states (N, *shape), in the dtype that was asked for. Their memory is used again for the next rows."""
        return self._trajectory.inputs(self.index)

    def split(self, max_batch: int | None = None) -> Iterator[Rows]:
        """These rows in parts of at most `max_batch`, in their order; None is the limit that the solve began with."""
        most = max_batch or self._trajectory.traits.max_batch
        if most is None or len(self) <= most:
            yield self
            return
        parts = (value.split(int(most)) for value in (self.index, self.steps, self.samples, self.timesteps))
        for index, steps, samples, timesteps in zip(*parts, strict=True):
            yield Rows(self._trajectory, index, steps=steps, samples=samples, timesteps=timesteps)
