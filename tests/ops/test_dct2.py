from __future__ import annotations

from typing import Any

import inputs
import pytest
import torch
from aot import Case
from asserts import assert_close
from torch.utils._python_dispatch import TorchDispatchMode

from deqkern import ops
from deqkern.solvers.basis import dct_matrix

BACKENDS = inputs.backends("dct2")


def transform(side: int, **constants: Any) -> dict[str, Any]:
    return {"PRECISION": "ieee", "H": side // 2, "W": side // 2, **constants}


def one_side(first: bool) -> dict[str, Any]:
    return {"FIRST": first, "PRECISION": "ieee", "BLOCK": 64, "DEPTH": 16, "stride" if first else "apart": 1}


TILED = {"maxnreg": "REGISTERS"}
COMPILED = [
    Case("dct2_kernel", transform(64), 4, 36),  # rows of both halves, and the matrices
    Case("dct2_kernel", transform(64, colour=None), 4, 8),
    Case("dct2_kernel", transform(32), 1, 16, types={"image": "*bf16"}),
    Case("dct2_kernel", transform(32), 1, aligned=False),
    Case("dct2_inverse_kernel", transform(64, ROWS=16), 4, 4, 2),
    Case("dct2_inverse_kernel", transform(64, ROWS=16, colour=None), 4, 4, 2),
    Case("dct2_inverse_kernel", transform(32, ROWS=16), 1, 6, types={"image": "*fp16"}),
    Case("dct2_inverse_kernel", transform(32, ROWS=16), 1, aligned=False),
    Case("dct2_side_kernel", one_side(True), 8, 1, options=TILED),
    Case("dct2_side_kernel", one_side(True), 8, types={"image": "*bf16"}, options=TILED),
    Case("dct2_side_kernel", one_side(False), 8, 2, options=TILED),
    Case("dct2_side_inverse_kernel", one_side(True), 8, 1),
    Case("dct2_side_inverse_kernel", one_side(False), 8, 2),
    Case("dct2_side_inverse_kernel", one_side(False), 8, types={"image": "*bf16"}),
]
# (N, C, H, W)
SHAPES = [(1, 1, 1, 1), (3, 1, 5, 7), (2, 3, 16, 16), (5, 3, 31, 17), (2, 4, 1, 9), (2, 5, 13, 2), (1, 3, 64, 64)]
SHAPES += [(1, 2, 40, 9), (1, 2, 9, 33), (1, 3, 70, 33), (2, 2, 20, 65), (2, 1, 1, 129)]


@BACKENDS
@pytest.mark.parametrize("inverse", [False, True])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_equals_the_reference(backend: str, shape: tuple[int, int, int, int], inverse: bool) -> None:
    inputs.check("dct2", inputs.dct2(*shape, inverse=inverse), backend)


@pytest.mark.parametrize("inverse", [False, True])
def test_each_direction_is_an_overload_that_says_what_it_writes(inverse: bool) -> None:
    seen: list[Any] = []

    class Watched(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            seen.append(func)
            return func(*args, **(kwargs or {}))

    with Watched():
        ops.dct2(**inputs.dct2(2, 3, 4, 5, inverse=inverse))
    (used,) = (func for func in seen if func.namespace == "deqkern")
    written = [argument.name for argument in used._schema.arguments if argument.is_write]
    assert written == ["image" if inverse else "spectrum"]


@BACKENDS
@pytest.mark.parametrize("inverse", [False, True])
@pytest.mark.parametrize("shape", [*SHAPES, (2, 3, 32, 32), (1, 1, 256, 96)], ids=str)
def test_cosines(backend: str, shape: tuple[int, int, int, int], inverse: bool) -> None:
    """Kernels may use the symmetry of these."""
    arguments = inputs.dct2(*shape, inverse=inverse, matrix=lambda size: dct_matrix(size, torch.float32))
    inputs.check("dct2", arguments, backend)


@pytest.mark.parametrize("inverse", [False, True])
@pytest.mark.parametrize("width", [26, 32, 72])
@pytest.mark.parametrize("height", [16, 48, 88])
def test_every_depth_of_symmetry(height: int, width: int, inverse: bool) -> None:
    for levels_h in range(5 if height % 16 == 0 else 4):
        for levels_w in range(2):
            matrices = {"dct_h": inputs.mirrored(height, levels_h), "dct_w": inputs.mirrored(width, levels_w)}
            inputs.check("dct2", inputs.dct2(2, 3, height, width, inverse=inverse) | matrices, "cpu")


@pytest.mark.parametrize("inverse", [False, True])
@pytest.mark.parametrize("side", ["dct_h", "dct_w"])
def test_one_entry_off_the_symmetry(side: str, inverse: bool) -> None:
    arguments = inputs.dct2(1, 1, 32, 32, inverse=inverse, matrix=lambda size: dct_matrix(size, torch.float32))
    for row in (0, 1, 12, 31):
        for column in (0, 15, 16, 31):
            matrix = arguments[side].clone()
            matrix[row, column] += 1
            inputs.check("dct2", inputs.clone(arguments) | {side: matrix}, "cpu")


@BACKENDS
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_inverse_undoes_and_norms_stay(backend: str, shape: tuple[int, int, int, int]) -> None:
    forward = inputs.dct2(*shape, inverse=False)
    image = forward["image"].clone()
    inputs.run("dct2", backend, forward)
    spectrum = forward["spectrum"][forward["rows"]]
    assert_close(spectrum.norm(dim=-1), image.flatten(1).norm(dim=-1))
    forward["image"].fill_(torch.nan)
    inputs.run("dct2", backend, forward | {"inverse": True})
    assert_close(forward["image"], image)


@BACKENDS
@pytest.mark.parametrize("inverse", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_images_in_half_precision(backend: str, dtype: torch.dtype, inverse: bool) -> None:
    arguments = inputs.dct2(3, 3, 9, 8, inverse=inverse)
    arguments["image"] = arguments["image"].to(dtype)
    inputs.check("dct2", arguments, backend, rtol=1e-5 if not inverse else torch.finfo(dtype).eps)


@BACKENDS
def test_all_rows_of_the_spectrum(backend: str) -> None:
    inputs.check("dct2", inputs.dct2(6, 2, 8, 8, inverse=False, rows=6), backend)


@BACKENDS
def test_no_images(backend: str) -> None:
    arguments = inputs.dct2(0, 3, 4, 4, inverse=False)
    inputs.run("dct2", backend, arguments)
    inputs.run("dct2", backend, arguments | {"inverse": True})
    assert arguments["spectrum"].isnan().all()


@BACKENDS
@pytest.mark.parametrize("inverse", [False, True])
@pytest.mark.parametrize("shape", [(3, 1, 5, 7), (2, 4, 16, 16), (2, 3, 70, 33)], ids=str)
def test_no_rotation_of_colours(backend: str, shape: tuple[int, int, int, int], inverse: bool) -> None:
    arguments = inputs.dct2(*shape, inverse=inverse) | {"colour": None}
    rotated = inputs.clone(arguments) | {"colour": torch.eye(shape[1])}
    inputs.check("dct2", arguments, backend)
    inputs.run("dct2", "reference", rotated)
    written = "image" if inverse else "spectrum"
    inputs.run("dct2", backend, arguments)
    rows = slice(None) if inverse else arguments["rows"]
    assert_close(arguments[written][rows], rotated[written][rows])
