from __future__ import annotations

from collections.abc import Callable

import inputs
import pytest
import torch
from aot import Case
from asserts import assert_close
from torch import Tensor

BACKENDS = inputs.backends("anderson_gram")
COMPILED = [
    Case("anderson_gram_kernel", {"M": 1, "BLOCK": 512}, 1, 8),
    Case("anderson_gram_kernel", {"M": 4, "BLOCK": 512}, 1, 20),
    Case("anderson_gram_kernel", {"M": 5, "BLOCK": 256}, 1, 12),
    Case("anderson_gram_kernel", {"M": 16, "BLOCK": 256}, 1, 34),
    Case("anderson_gram_finish_kernel", {"M": 1, "SIDE": 1, "SUMS": 2, "PARTIALS": 32}, 4),
    Case("anderson_gram_finish_kernel", {"M": 5, "SIDE": 8, "SUMS": 16, "PARTIALS": 32}, 4),
    Case("anderson_gram_finish_kernel", {"M": 16, "SIDE": 16, "SUMS": 32, "PARTIALS": 32}, 4),
]


@BACKENDS
@pytest.mark.parametrize("history", [1, 3, 5, 16])
def test_every_head_and_count(backend: str, history: int) -> None:
    for head in inputs.some(range(history + 1), backend):
        for count in inputs.some(range(1, history + 1), backend):
            arguments = inputs.anderson_gram(2, 2, 5, history, head, count, first=head % 5)
            inputs.check("anderson_gram", arguments, backend)


@BACKENDS
@pytest.mark.parametrize("history", [1, 3, 5, 16])
@pytest.mark.parametrize(("steps", "batch", "size", "_"), [s for s in inputs.SIZES if s[0] * s[1] * s[2] < 10**5])
def test_equals_the_reference(backend: str, steps: int, batch: int, size: int, _: int, history: int) -> None:
    inputs.skip_slow(backend, steps, batch, size, history)
    count = 1 + size % history
    head = steps % (history + 1)
    arguments = inputs.anderson_gram(steps, batch, size, history, head, count, first=size % 4)
    inputs.check("anderson_gram", arguments, backend)


@BACKENDS
def test_updates_add_up_to_the_gram_matrix(backend: str, fresh: Callable[..., Tensor]) -> None:
    """Turn after turn of the ring, gram is dG^T dG of the whole history."""
    history, steps, batch, size = 3, 4, 2, 50
    window = torch.tensor([[0, steps]] * batch)
    gram = fresh(steps, batch, history, history, dtype=torch.float64)
    rhs = fresh(steps, batch, history, dtype=torch.float64)
    ring = fresh(history + 1, steps, batch, size)
    corrections: list[Tensor] = []
    for turn in range(9):
        head = turn % (history + 1)
        ring[head] = torch.randn(steps, batch, size)
        corrections.append(ring[head].double())
        count = min(turn, history)
        if count == 0:
            continue
        arguments = {"g_ring": ring, "head": head, "count": count, "window": window, "gram": gram, "rhs": rhs}
        inputs.run("anderson_gram", backend, arguments)
        new = [corrections[-1 - j] - corrections[-2 - j] for j in range(count)]
        differences = torch.stack(new, -1)  # (S, B, D, count)
        assert_close(gram[..., :count, :count], differences.mT @ differences, 1e-6)
        assert_close(rhs[..., :count], (differences.mT @ corrections[-1][..., None])[..., 0], 1e-6)
        assert not gram[..., count:, :].any() and not gram[..., :, count:].any() and not rhs[..., count:].any()


@BACKENDS
def test_blocks_are_added_in_double_precision(backend: str) -> None:
    arguments = inputs.anderson_gram(1, 1, 1025, 1, 0, 1) | {"g_ring": torch.zeros(2, 1, 1, 1025)}
    arguments["g_ring"][0, ..., 0], arguments["g_ring"][0, ..., -1] = 2.0**12, 1.0
    inputs.run("anderson_gram", backend, arguments)
    assert arguments["gram"].item() == arguments["rhs"].item() == 2**24 + 1
