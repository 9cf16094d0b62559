from __future__ import annotations

import inputs
import pytest
import torch
from aot import Case
from asserts import assert_close

from deqkern.ops.state import OutputPath

BACKENDS = inputs.backends("interpolate_outputs")
COMPILED = [
    Case("interpolate_outputs_kernel", {"BLOCK": 512}, 4, 5, 1),
    Case("interpolate_outputs_kernel", {"BLOCK": 512}, 4, aligned=False),
]


@BACKENDS
@pytest.mark.parametrize(("steps", "batch", "size", "count"), inputs.SIZES)
def test_equals_the_reference(backend: str, steps: int, batch: int, size: int, count: int) -> None:
    inputs.skip_slow(backend, steps, batch, size)
    inputs.check("interpolate_outputs", inputs.interpolate_outputs(steps, batch, size, count), backend)


@BACKENDS
def test_nothing_is_missing(backend: str) -> None:
    arguments = inputs.interpolate_outputs(5, 2, 7, 3)
    arguments["rows"] = arguments["rows"][:, :0].contiguous()
    inputs.check("interpolate_outputs", arguments, backend)


@BACKENDS
def test_between_two_outputs(backend: str) -> None:
    """A state where the chain leads takes the mean of the outputs; one off it, its own slope times how far."""
    x, e = torch.zeros(4, 1, 5), torch.zeros(3, 1, 5)
    x[0], x[2], e[0], e[2] = 1.0, 5.0, 2.0, 4.0
    x[1] = torch.tensor([3.0, 3.0, 4.0, 3.0, 5.0])
    arguments = {
        "x": x,
        "slope": torch.tensor([10.0, 100.0]).expand(3, 1, 2).contiguous(),
        "bands": torch.tensor([0, 4, 5]),
        "rows": torch.tensor([[1], [0], [2]]),
        # x0 = x - e is -1 on the left, 1 on the right and 0 between them: y = 2 (x[left] + 1/4 + 1/4) = 3
        "path": torch.tensor(
            OutputPath(
                scale=[1.0, 2.0, 1.0],
                gain=[0.0] * 3,
                gain_level=[0.0, 0.5, 0.0],
                level=[0.0, 1.0, 2.0],
                of_x=[1.0] * 3,
                of_out=[-1.0] * 3,
            ),
            dtype=torch.float64,
        ),
        "e": e,
    }
    inputs.run("interpolate_outputs", backend, arguments)
    assert_close(arguments["e"][1, 0], torch.tensor([3.0, 3.0, 13.0, 3.0, 203.0]))
    assert_close(arguments["e"][::2, 0, 0], torch.tensor([2.0, 4.0]))
