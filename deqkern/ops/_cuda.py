"""The CUDA kernels of `deqkern._C` under the reference's signatures: pointers, sizes, scalars, device, stream.

Arguments were validated by the public functions. A call is one launch on the current stream of its tensors' device.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import reference
from ._cpu import _C

_stream: Any = getattr(torch._C, "_cuda_getCurrentRawStream", None)  # of a device; missing where torch has no CUDA


def anderson_solve(
    gram: Tensor,
    rhs: Tensor,
    window: Tensor,
    scope: str,
    ridge: float,
    ridge_absolute: float,
    implicit: bool,
    gamma: Tensor,
) -> None:
    device = gamma.get_device()
    _C.cuda_anderson_solve(
        gram.data_ptr(),
        rhs.data_ptr(),
        window.data_ptr(),
        gamma.data_ptr(),
        *rhs.shape,
        reference.SCOPES.index(scope),
        ridge,
        ridge_absolute,
        implicit,
        device,
        _stream(device),
    )
