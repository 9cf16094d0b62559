"""The orthonormal basis in which a denoiser's Jacobian is nearly diagonal, and its frequency bands.

Images and latents (C, H, W): the 2-D DCT-II of each channel, after an orthonormal colour transform for RGB, with the
coefficients sorted by channel and log-spaced radial band. Anything else: the identity with one band.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from .. import ops

BANDS_PER_CHANNEL = 8

# grey, red-blue, green-magenta
_COLOUR_TRANSFORM = (
    (1 / math.sqrt(3), 1 / math.sqrt(3), 1 / math.sqrt(3)),
    (1 / math.sqrt(2), 0.0, -1 / math.sqrt(2)),
    (-1 / math.sqrt(6), 2 / math.sqrt(6), -1 / math.sqrt(6)),
)


def dct_matrix(size: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """The orthonormal DCT-II as a matrix (size, size): row k is the k-th cosine.

    Row k is even or odd about its middle as k is, bit for bit, which the op `dct2` makes use of; and so are the first
    halves of rows 0, 2, 4, .. as rows of their own, while their length is even.
    """
    index = torch.arange(size, device="cpu")
    quarter = torch.cos(index.double() * (math.pi / (2 * size)))  # the only cosines; in steps of pi / (2 size)
    half = torch.cat([quarter, quarter.new_zeros(1), -quarter[1:].flip(0)])
    circle = torch.cat([half, -half]) * math.sqrt(2 / size)
    matrix = circle[(2 * index + 1) * index[:, None] % (4 * size)]
    matrix[0] /= math.sqrt(2)
    return matrix.to(dtype)


def radial_bands(height: int, width: int, count: int = BANDS_PER_CHANNEL) -> Tensor:
    """The band of every coefficient (height, width), int64 in 0 .. count-1: log-spaced in radial frequency.

    Frequencies are in half-cycles per pixel, (k/height, l/width). Band 0 holds the constant and all that lies within
    the first edge. Bands that a small image leaves empty are closed up.
    """
    k = torch.arange(height, dtype=torch.float64, device="cpu")[:, None] / height
    l = torch.arange(width, dtype=torch.float64, device="cpu") / width  # noqa: E741
    radius = torch.hypot(k, l)
    lowest = 1.0 / max(height, width)
    edges = torch.logspace(math.log10(1.25 * lowest), 0.0, count, dtype=torch.float64, device="cpu")[:-1]
    band = torch.bucketize(radius, edges)
    return torch.unique(band, return_inverse=True)[1].view(height, width)


@dataclass(frozen=True)
class Basis:
    """An orthonormal map V between samples (N, *shape) and coefficients (R, D), and the bands of the coefficients."""

    shape: tuple[int, ...]
    bands: Tensor  # (K+1,) int64: band k holds coefficients bands[k] .. bands[k+1]-1
    dct_h: Tensor | None = None  # (H, H); None for the identity
    dct_w: Tensor | None = None  # (W, W)
    colour: Tensor | None = None  # (C, C); None: no colour transform
    order: Tensor | None = None  # (D,) int64
    place: Tensor | None = None  # (D,) int64, its inverse

    @classmethod
    def identity(cls, shape: tuple[int, ...], device: torch.device | None = None) -> Basis:
        """V = identity, one band: any data."""
        return cls(shape, torch.tensor([0, math.prod(shape)], device=device))

    @classmethod
    @lru_cache(maxsize=16)  # sorting the coefficients of a large image takes longer than an iteration
    @torch.inference_mode(False)
    def spectral(
        cls, shape: tuple[int, ...], device: torch.device | None = None, dtype: torch.dtype = torch.float32
    ) -> Basis:
        """The DCT-II basis of samples (C, H, W) with up to 8 bands per channel."""
        channels, height, width = shape
        band = radial_bands(height, width).flatten()
        count = int(band.max()) + 1
        keys = (torch.arange(channels, device="cpu")[:, None] * count + band).flatten()
        colour = torch.tensor(_COLOUR_TRANSFORM, dtype=dtype, device=device) if channels == 3 else None
        order = keys.argsort(stable=True)
        sizes = torch.bincount(keys, minlength=channels * count)
        return cls(
            shape,
            bands=torch.nn.functional.pad(sizes.cumsum(0), (1, 0)).to(device),
            dct_h=dct_matrix(height, dtype).to(device),
            dct_w=dct_matrix(width, dtype).to(device),
            colour=colour,
            order=order.to(device),
            place=order.argsort().to(device),
        )

    @property
    def size(self) -> int:
        """D, the elements of one sample."""
        return math.prod(self.shape)

    def forward(self, image: Tensor, spectrum: Tensor, rows: Tensor) -> None:
        """spectrum[rows] = V image; image (N, *shape) of any float dtype, spectrum (R, D), rows (N,) int64.

        The tensors are not looked at once more: who calls this allocated or checked them.
        """
        if self.dct_h is None:
            spectrum.index_copy_(0, rows, image.reshape(len(rows), -1).to(spectrum.dtype))
        else:
            self._transform(ops.unchecked.dct2.forward, image.resolve_neg().contiguous(), spectrum, rows, inverse=False)

    def inverse(self, spectrum: Tensor, image: Tensor, rows: Tensor) -> None:
        """Image = V^T spectrum[rows]; shapes as in `forward`, image is written. The identity keeps the dtype."""
        if self.dct_h is None:
            torch.index_select(spectrum, 0, rows, out=image.view(len(rows), -1))
        else:
            self._transform(ops.unchecked.dct2.inverse, image, spectrum, rows, inverse=True)

    def _transform(self, op: Any, image: Tensor, spectrum: Tensor, rows: Tensor, *, inverse: bool) -> None:
        op(
            image,
            spectrum,
            rows,
            dct_h=self.dct_h,
            dct_w=self.dct_w,
            colour=self.colour,
            order=self.order,
            place=self.place,
            inverse=inverse,
        )
