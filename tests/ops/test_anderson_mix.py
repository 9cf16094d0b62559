from __future__ import annotations

import inputs
import pytest
import torch
from aot import Case

BACKENDS = inputs.backends("anderson_mix")
COMPILED = [
    Case("anderson_mix_kernel", {"M": 1, "BLOCK": 512}, 4, 2, 1),
    Case("anderson_mix_kernel", {"M": 5, "BLOCK": 512}, 4, 6, 1),
    Case("anderson_mix_kernel", {"M": 16, "BLOCK": 512}, 4, 17, 1),
    Case("anderson_mix_kernel", {"M": 16, "BLOCK": 512}, 4, aligned=False),
]


@BACKENDS
@pytest.mark.parametrize("history", [1, 3, 5, 16])
def test_every_head_and_count(backend: str, history: int) -> None:
    for head in inputs.some(range(history + 1), backend):
        for count in inputs.some(range(history + 1), backend):
            arguments = inputs.anderson_mix(2, 2, 5, history, head, count, first=head % 5)
            inputs.check("anderson_mix", arguments, backend)


@BACKENDS
@pytest.mark.parametrize("history", [1, 3, 5, 16])
@pytest.mark.parametrize(("steps", "batch", "size", "_"), [s for s in inputs.SIZES if s[0] * s[1] * s[2] < 10**5])
def test_equals_the_reference(backend: str, steps: int, batch: int, size: int, _: int, history: int) -> None:
    inputs.skip_slow(backend, steps, batch, size, history)
    count = 1 + size % history
    head = steps % (history + 1)
    arguments = inputs.anderson_mix(steps, batch, size, history, head, count, first=size % 4)
    inputs.check("anderson_mix", arguments, backend)


@BACKENDS
def test_no_mixing_takes_the_newest(backend: str) -> None:
    arguments = inputs.anderson_mix(3, 2, 33, 4, 2, 4) | {"window": torch.tensor([[0, 3], [0, 3]])}
    arguments["f_ring"], arguments["gamma"] = torch.randn(5, 3, 2, 33), torch.zeros(3, 2, 4)
    inputs.run("anderson_mix", backend, arguments)
    assert torch.equal(arguments["out"], arguments["f_ring"][2])


@BACKENDS
def test_rows_outside_the_windows_are_not_written(backend: str) -> None:
    inputs.check("anderson_mix", inputs.filled(inputs.anderson_mix(4, 5, 33, 3, 1, 2)), backend)
