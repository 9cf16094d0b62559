from __future__ import annotations

import inputs
import pytest
import torch
from aot import Case
from asserts import assert_close

BACKENDS = inputs.backends("band_moments")
BF16, FP16 = {"e": "*bf16"}, {"e": "*fp16"}
COMPILED = [
    Case("band_moments_kernel", {"BLOCK": 256, "BANDS": 32}, 1, 6),
    Case("band_moments_kernel", {"BLOCK": 256, "BANDS": 32}, 1, 2, 0, BF16 | {"e_prev": "*bf16"}),
    Case("band_moments_kernel", {"BLOCK": 256, "BANDS": 32}, 1, 4, 0, FP16),
    Case("band_moments_finish_kernel", {"BLOCK": 256, "BANDS": 32, "PARTIALS": 8}, 1),
]


@BACKENDS
@pytest.mark.parametrize(("steps", "batch", "size", "count"), inputs.SIZES)
def test_equals_the_reference(backend: str, steps: int, batch: int, size: int, count: int) -> None:
    inputs.skip_slow(backend, steps, batch, size)
    inputs.check("band_moments", inputs.band_moments(steps, batch, size, count, first=size % 4), backend)


@BACKENDS
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_model_outputs_in_half_precision(backend: str, dtype: torch.dtype) -> None:
    arguments = inputs.band_moments(7, 3, 65, 3)
    inputs.check("band_moments", arguments | {name: arguments[name].to(dtype) for name in ("e", "e_prev")}, backend)


@BACKENDS
def test_bands_that_split_everywhere(backend: str) -> None:
    """One element per band: moments are the products themselves."""
    size = 37
    arguments = inputs.band_moments(2, 1, size, size) | {"bands": torch.arange(size + 1)}
    inputs.run("band_moments", backend, arguments)
    dx, de = arguments["dx"].double(), arguments["e"].double() - arguments["e_prev"].double()
    assert_close(arguments["moments"], torch.stack([dx * de, dx * dx], -1), 1e-6)


@BACKENDS
def test_a_linear_model_has_its_own_slope(backend: str) -> None:
    arguments = inputs.band_moments(5, 2, 300, 3) | {"window": torch.tensor([[0, 5], [0, 5]])}
    arguments["dx"], arguments["e_prev"] = torch.randn(5, 2, 300), torch.zeros(5, 2, 300)
    arguments["bands"] = torch.tensor([0, 7, 100, 300])
    slope = torch.tensor([0.5, -2.0, 3.0])
    arguments["e"] = torch.repeat_interleave(slope, arguments["bands"].diff()) * arguments["dx"]
    inputs.run("band_moments", backend, arguments)
    cross, square = arguments["moments"].unbind(-1)
    assert_close(cross / square, slope.double().expand(5, 2, 3), 1e-6)


@BACKENDS
@pytest.mark.parametrize("spoilt", [False, True])
def test_bands_do_not_reach_each_other(backend: str, spoilt: bool) -> None:
    """Neither a band 1e8 times larger nor one that is not finite changes the moments of a small band after it."""
    arguments = inputs.band_moments(2, 1, 40, 3) | {"bands": torch.tensor([0, 10, 10, 40])}
    for name in ("dx", "e", "e_prev"):
        arguments[name] = torch.randn(2, 1, 40)
    alone = inputs.clone(arguments)
    alone["dx"][..., :10] = 0
    arguments["dx"][..., :10] *= 1e8
    if spoilt:
        arguments["dx"][..., 3] = torch.nan
    inputs.run("band_moments", backend, arguments)
    inputs.run("band_moments", backend, alone)
    assert_close(arguments["moments"][..., 1:, :], alone["moments"][..., 1:, :], 1e-12)


@BACKENDS
@pytest.mark.parametrize("bands", [1, 3, 24])
def test_rows_longer_than_a_segment(backend: str, bands: int) -> None:
    inputs.check("band_moments", inputs.band_moments(1, 1, 40_001, bands), backend)


@BACKENDS
def test_blocks_are_added_in_double_precision(backend: str) -> None:
    arguments = inputs.band_moments(1, 1, 1025, 1)
    arguments["dx"], arguments["e_prev"] = torch.zeros(1, 1, 1025), torch.zeros(1, 1, 1025)
    arguments["dx"][..., 0], arguments["dx"][..., -1] = 2.0**12, 1.0
    arguments["e"] = arguments["dx"].clone()
    inputs.run("band_moments", backend, arguments)
    assert (arguments["moments"] == 2**24 + 1).all()
