from __future__ import annotations

import inputs
import pytest
import torch
from aot import Case
from asserts import assert_close

BACKENDS = inputs.backends("secant_slope")
COMPILED = [
    Case("secant_slope_kernel", {"BLOCK": 512}, 4),
]


@BACKENDS
@pytest.mark.parametrize(("steps", "batch", "count"), [(1, 1, 1), (2, 3, 1), (7, 3, 24), (50, 5, 3), (50, 1, 33)])
def test_equals_the_reference(backend: str, steps: int, batch: int, count: int) -> None:
    inputs.check("secant_slope", inputs.secant_slope(steps, batch, count), backend)


@BACKENDS
def test_quotients_weights_and_bounds(backend: str) -> None:
    moments = torch.tensor([[0.3, 1.0], [0.0, 0.0], [-2.0, 1.0], [5.0, 1.0], [torch.nan, 1.0]], dtype=torch.float64)
    arguments = {
        "moments": moments.view(1, 1, 5, 2),
        "low": torch.zeros(1, dtype=torch.float64),
        "high": torch.ones(1, dtype=torch.float64),
        "prior_weight": 0.5,
        "slope": torch.full((1, 1, 5), 0.6),
    }
    inputs.run("secant_slope", backend, arguments)
    assert_close(arguments["slope"][0, 0], torch.tensor([0.4, 0.6, 0.0, 1.0, 0.6]))
