"""Orthonormal 2-D DCT of every channel, colour rotation and band order, and the inverse of all three.

Colours are rotated first: they commute with the transforms of the channels, and a channel then is independent work.
Images of at most 64 x 64 take one kernel that writes nothing but the result; its programs write ROWS rows of a channel
each and read the whole image for that, after the first time from the second-level cache. Larger ones take two tiled
products, along W and along H, with one array between them. Both directions find a coefficient by its `place`, so the
band order costs no pass of its own. No setting of the device or of torch
changes the products: those of two large matrices by cuBLAS would follow the TF32 switches, and need passes around them.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .launch import cdiv, next_power_of_2

WHOLE = 64  # the largest side of an image that goes through one kernel
ROWS = 16  # with 8 results per thread: a product then fits in registers, and three programs in a multiprocessor
COLUMNS = 16  # per warp
BLOCK, DEPTH = 64, 16  # of the tiled products
PRECISION = "ieee"  # or "tf32x3": three tensor-core products, with errors near those of fp32


@triton.jit
def dct2_mixed(source, colour, place, pixel, mask, channel, channels, plane, INVERSE: tl.constexpr):
    """sum_d colour[c, d] source[d, pixel], or of the transposed colour and of the coefficients at their places."""
    if colour is None:
        spot = channel * plane + pixel
        if INVERSE:
            spot = tl.load(place + spot, mask=mask, other=0)
        mixed = tl.load(source + spot, mask=mask, other=0.0).to(tl.float32)
    else:
        mixed = tl.zeros(pixel.shape, tl.float32)
        for d in range(channels):
            spot = d * plane + pixel
            if INVERSE:
                weight = tl.load(colour + d * channels + channel)
                spot = tl.load(place + spot, mask=mask, other=0)
            else:
                weight = tl.load(colour + channel * channels + d)
            mixed += weight * tl.load(source + spot, mask=mask, other=0.0).to(tl.float32)
    return mixed


@triton.jit
def dct2_kernel(
    source,
    target,
    rows,
    dct_h,
    dct_w,
    colour,  # None: no rotation
    place,
    channels,
    height,
    width,
    INVERSE: tl.constexpr,
    PRECISION: tl.constexpr,
    H: tl.constexpr,  # height and width to the next powers of two, at least 16
    W: tl.constexpr,
    ROWS: tl.constexpr,  # of the result, written by one program
):
    """Forward: y = dct_h (sum_d colour[c, d] image[n, d]) dct_w^T,  spectrum[rows[n], place[c, i, j]] = y[i, j];
    INVERSE: image[n, c] = dct_h^T (sum_d colour[d, c] y[d]) dct_w,  y[d, i, j] = spectrum[rows[n], place[d, i, j]].

    source, target: image (N, C, H, W) fp32, bf16 or fp16, and spectrum (R, C*H*W) fp32, or the other way round.
    Grid (N * C * cdiv(H, ROWS),), ROWS rows of a channel each. Accumulates in fp32.
    """
    bands = tl.cdiv(height, ROWS)
    above = tl.program_id(0) % bands * ROWS
    channel = tl.program_id(0) // bands % channels
    image = (tl.program_id(0) // (bands * channels)).to(tl.int64)
    plane = height * width
    row = tl.load(rows + image)
    if INVERSE:
        source += row * channels * plane
        target += image * channels * plane
    else:
        source += image * channels * plane
        target += row * channels * plane
    p = tl.arange(0, H)[:, None]
    j = tl.arange(0, W)[None, :]
    mask = (p < height) & (j < width)
    y = dct2_mixed(source, colour, place, p * width + j, mask, channel, channels, plane, INVERSE)
    i = above + tl.arange(0, ROWS)[:, None]
    p = tl.arange(0, H)[None, :]
    q = tl.arange(0, W)[:, None]
    left = dct_h + (p * height + i if INVERSE else i * height + p)
    right = dct_w + (q * width + j if INVERSE else j * width + q)
    left = tl.load(left, mask=(i < height) & (p < height), other=0.0)
    right = tl.load(right, mask=(q < width) & (j < width), other=0.0)
    y = tl.dot(tl.dot(left, y, input_precision=PRECISION), right, input_precision=PRECISION)
    spot = channel * plane + i * width + j
    mask = (i < height) & (j < width)
    if not INVERSE:
        spot = tl.load(place + spot, mask=mask, other=0)
    tl.store(target + spot, y.to(target.dtype.element_ty), mask=mask)


@triton.jit
def dct2_side_kernel(
    source,
    target,
    rows,
    matrix,
    colour,
    place,
    channels,
    plane,  # H * W
    length,  # of the side that is transformed
    other,  # of the side that stays
    stride,  # between elements along the one
    apart,  # and along the other
    INVERSE: tl.constexpr,
    FIRST: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK: tl.constexpr,
    DEPTH: tl.constexpr,
):
    """target[n, c, i, q] = sum_p matrix[i, p] source[n, c, p, q], INVERSE: matrix[p, i];  i, p along one side, q along
    the other.

    The FIRST of two calls rotates colours as it reads the image (N, C, H, W), or the spectrum at its places if INVERSE,
    and writes scratch (N, C, H, W) fp32; the second reads that and writes the spectrum, or the image.
    Grid (N * C * cdiv(length, BLOCK) * cdiv(other, BLOCK),). Accumulates in fp32.
    """
    tiles = tl.cdiv(other, BLOCK)
    tile = tl.program_id(0) % tiles
    rest = tl.program_id(0) // tiles
    block = rest % tl.cdiv(length, BLOCK)
    rest = rest // tl.cdiv(length, BLOCK)
    channel = rest % channels
    image = (rest // channels).to(tl.int64)
    row = tl.load(rows + image)
    source += (row if FIRST and INVERSE else image) * channels * plane
    target += (image if FIRST or INVERSE else row) * channels * plane
    i = block * BLOCK + tl.arange(0, BLOCK)[:, None]
    q = tile * BLOCK + tl.arange(0, BLOCK)[None, :]
    y = tl.zeros([BLOCK, BLOCK], tl.float32)
    for first in range(0, length, DEPTH):
        p = first + tl.arange(0, DEPTH)[None, :]
        left = matrix + (p * length + i if INVERSE else i * length + p)
        left = tl.load(left, mask=(i < length) & (p < length), other=0.0)
        p = first + tl.arange(0, DEPTH)[:, None]
        pixel = p * stride + q * apart
        mask = (p < length) & (q < other)
        if FIRST:
            right = dct2_mixed(source, colour, place, pixel, mask, channel, channels, plane, INVERSE)
        else:
            right = tl.load(source + channel * plane + pixel, mask=mask, other=0.0)
        y = tl.dot(left, right, y, input_precision=PRECISION)
    mask = (i < length) & (q < other)
    spot = channel * plane + i * stride + q * apart
    if not FIRST and not INVERSE:
        spot = tl.load(place + spot, mask=mask, other=0)
    tl.store(target + spot, y.to(target.dtype.element_ty), mask=mask)


def padded(side: int) -> int:
    return max(16, next_power_of_2(side))


def dct2(
    image: torch.Tensor,  # (N, C, H, W)
    spectrum: torch.Tensor,  # (R, C*H*W)
    rows: torch.Tensor,  # (N,) int64
    dct_h: torch.Tensor,  # (H, H)
    dct_w: torch.Tensor,  # (W, W)
    colour: torch.Tensor | None,  # (C, C)
    order: torch.Tensor,  # (C*H*W,) int64
    place: torch.Tensor,  # (C*H*W,) int64, its inverse
    inverse: bool,
) -> None:
    count, channels, height, width = image.shape
    if count == 0:
        return
    plane = height * width
    source, target = (spectrum, image) if inverse else (image, spectrum)
    if height <= WHOLE and width <= WHOLE:
        dct2_kernel[(count * channels * cdiv(height, ROWS),)](
            source, target, rows, dct_h, dct_w, colour, place, channels, height, width,
            inverse, PRECISION, padded(height), padded(width), ROWS, num_warps=padded(width) // COLUMNS,
        )  # fmt: skip
        return
    scratch = torch.empty(image.shape, dtype=torch.float32, device=image.device)
    grid = (count * channels * cdiv(height, BLOCK) * cdiv(width, BLOCK),)
    for first, matrix in ((True, dct_w), (False, dct_h)):
        along_w = (width, height, 1, width)  # length, other, stride, apart
        along_h = (height, width, width, 1)
        dct2_side_kernel[grid](
            source if first else scratch, scratch if first else target, rows, matrix, colour, place, channels, plane,
            *(along_w if first else along_h), inverse, first, PRECISION, BLOCK, DEPTH, num_warps=8,
        )  # fmt: skip
