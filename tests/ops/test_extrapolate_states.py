from __future__ import annotations

import inputs
import pytest
import torch
from aot import Case
from asserts import assert_close

from deqkern.ops.state import ConstantX0

BACKENDS = inputs.backends("extrapolate_states")
COMPILED = [
    Case("extrapolate_states_kernel", {"IMPLICIT": False, "BLOCK": 512}, 4, 5, 2),
    Case("extrapolate_states_kernel", {"IMPLICIT": True, "BLOCK": 512, "z": None}, 4, 3, 2),
    Case("extrapolate_states_kernel", {"IMPLICIT": False, "BLOCK": 512}, 4, aligned=False),
]


@BACKENDS
@pytest.mark.parametrize("implicit", [False, True])
@pytest.mark.parametrize(("steps", "batch", "size"), [(1, 1, 5), (2, 3, 257), (7, 6, 17), (12, 7, 600), (50, 6, 33)])
def test_equals_the_reference(backend: str, steps: int, batch: int, size: int, implicit: bool) -> None:
    for noise in (False, True):
        inputs.check(
            "extrapolate_states", inputs.extrapolate_states(steps, batch, size, noise=noise, implicit=implicit), backend
        )


@BACKENDS
@pytest.mark.parametrize("first", range(6))
def test_a_single_sample(backend: str, first: int) -> None:
    inputs.check("extrapolate_states", inputs.extrapolate_states(9, 1, 4099, first), backend)


@BACKENDS
@pytest.mark.parametrize(
    ("begin", "implicit", "share"), [(3, False, 0.0), (2, False, 1.0), (1, False, 0.5), (3, True, 0.5)]
)
def test_x0_is_that_of_the_state_the_model_was_called_at(
    backend: str, begin: int, implicit: bool, share: float
) -> None:
    """The first active state of an explicit chain is exact, the second took the plain step, others beta of theirs."""
    arguments = inputs.extrapolate_states(6, 1, 3, noise=False, implicit=implicit)
    arguments |= {"previous_window": torch.tensor([[begin, 4]]), "window": torch.tensor([[4, 5]]), "beta": 0.5}
    arguments["constant_x0"] = torch.zeros(4, 6)
    constant_x0 = ConstantX0.view(arguments["constant_x0"])
    constant_x0.x0_gain[4] = constant_x0.of_x[3] = 1.0  # x[5] = x0 = y
    at = 3 + implicit
    arguments["x"][:] = torch.randn(7, 1, 3)
    arguments["e"][:], arguments["last_change"][:] = 0.0, torch.randn(6, 1, 3)
    before = inputs.clone(arguments)
    inputs.run("extrapolate_states", backend, arguments)
    assert_close(arguments["x"][5], before["x"][at] - share * before["last_change"][3])
    assert not arguments["last_change"][4].any()
    kept = [0, 1, 2, 3, 5]
    assert torch.equal(arguments["last_change"][kept], before["last_change"][kept])
    assert torch.equal(arguments["x"][[*range(5), 6]], before["x"][[*range(5), 6]])
