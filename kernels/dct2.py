"""Orthonormal 2-D DCT of every channel, colour transform and band order, and the inverse of all three.

Row k of a DCT-II is even or odd about its middle, as k is: d[k, n-1-p] = (-1)^k d[k, p]. Even rows need only the sums
x[p] + x[n-1-p], odd rows only the differences, and that halves the products. Forward, an image is folded along both
sides as it is read, and each quarter of the coefficients, by the parities of their two frequencies, is a product of
half the sides; the inverse unfolds what four such products make. Both find a coefficient by its `place`, so the band
order costs no pass of its own. Colours are transformed first: that commutes with the transforms of the channels, and a
channel then is independent work.

Images of at most 64 x 64 take one kernel that writes nothing but the result; a channel's programs each read all of it,
after the first time from the second-level cache. Larger ones take two tiled products, along W and along H, with one
array between them. No setting of the device or of torch changes the products: those of two large matrices by cuBLAS
would follow the TF32 switches, and need passes around them.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .launch import cdiv, next_power_of_2
from .window import within

WHOLE = 64  # the largest side of an image that goes through one kernel
ROWS = 16  # of a folded image, unfolded by one program of the inverse
WARPS = 4  # of these kernels where an image is wider than 32; one below
BLOCK, DEPTH = 64, 16  # of the tiled products
REGISTERS = 128  # of a thread, forward: two blocks share a multiprocessor. Left alone, ptxas aims at three and spills
PRECISION = "ieee"  # or "tf32x3": three tensor-core products, with errors near those of fp32


@triton.jit
def dct2_mixed(source, colour, pixel, mask, channel, channels, plane):
    """sum_d colour[c, d] source[d, pixel] of an image (C, H*W) in fp32."""
    if colour is None:
        mixed = tl.load(source + channel * plane + pixel, mask=mask, other=0.0).to(tl.float32)
    else:
        mixed = tl.zeros(pixel.shape, tl.float32)
        for d in range(channels):
            weight = tl.load(colour + channel * channels + d)
            mixed += weight * tl.load(source + d * plane + pixel, mask=mask, other=0.0).to(tl.float32)
    return mixed


@triton.jit
def dct2_gathered(source, colour, place, pixel, mask, channel, channels, plane):
    """sum_d colour[d, c] source[place[d, pixel]] of a spectrum (C*H*W,)."""
    if colour is None:
        spot = within(tl.load(place + channel * plane + pixel, mask=mask, other=0), channels * plane)
        gathered = tl.load(source + spot, mask=mask, other=0.0)
    else:
        gathered = tl.zeros(pixel.shape, tl.float32)
        for d in range(channels):
            weight = tl.load(colour + d * channels + channel)
            spot = within(tl.load(place + d * plane + pixel, mask=mask, other=0), channels * plane)
            gathered += weight * tl.load(source + spot, mask=mask, other=0.0)
    return gathered


@triton.jit
def dct2_kernel(
    image,
    spectrum,
    rows,
    dct_h,
    dct_w,
    colour,  # None: they stay
    place,
    total,  # R
    channels,
    height,
    width,
    PRECISION: tl.constexpr,
    H: tl.constexpr,  # half of the height and width to the next powers of two, at least 16
    W: tl.constexpr,
):
    """y = dct_h (sum_d colour[c, d] image[n, d]) dct_w^T,  spectrum[rows[n], place[c, i, j]] = y[i, j]

    image (N, C, H, W) fp32, bf16 or fp16, spectrum (R, C*H*W) fp32. Grid (N * C * 4,): a program writes the frequencies
    i = 2u + odd_h, j = 2v + odd_w of a channel. Accumulates in fp32.
    """
    odd_w = tl.program_id(0) % 2
    odd_h = tl.program_id(0) // 2 % 2
    channel = tl.program_id(0) // 4 % channels
    n = (tl.program_id(0) // (4 * channels)).to(tl.int64)
    plane = height * width
    image += n * channels * plane
    spectrum += within(tl.load(rows + n), total) * channels * plane
    p = tl.arange(0, H)[:, None]
    q = tl.arange(0, W)[None, :]
    below = height - 1 - p  # the mirror image of p, and of q
    right = width - 1 - q
    half_h = height - height // 2
    half_w = width - width // 2
    inside = (p < half_h) & (q < half_w)
    two_h = inside & (p < height // 2)  # the middle one of an odd length is its own
    two_w = inside & (q < width // 2)
    upper = dct2_mixed(image, colour, p * width + q, inside, channel, channels, plane)
    lower = dct2_mixed(image, colour, below * width + q, two_h, channel, channels, plane)
    upper_right = dct2_mixed(image, colour, p * width + right, two_w, channel, channels, plane)
    lower_right = dct2_mixed(image, colour, below * width + right, two_h & two_w, channel, channels, plane)
    sign_h = 1.0 - 2.0 * odd_h
    folded = upper + sign_h * lower + (1.0 - 2.0 * odd_w) * (upper_right + sign_h * lower_right)
    i = 2 * tl.arange(0, H)[:, None] + odd_h
    p = tl.arange(0, H)[None, :]
    q = tl.arange(0, W)[:, None]
    j = 2 * tl.arange(0, W)[None, :] + odd_w
    left = tl.load(dct_h + i * height + p, mask=(i < height) & (p < half_h), other=0.0)
    across = tl.load(dct_w + j * width + q, mask=(j < width) & (q < half_w), other=0.0)
    y = tl.dot(tl.dot(left, folded, input_precision=PRECISION), across, input_precision=PRECISION)
    mask = (i < height) & (j < width)
    spot = within(tl.load(place + channel * plane + i * width + j, mask=mask, other=0), channels * plane)
    tl.store(spectrum + spot, y, mask=mask)


@triton.jit
def dct2_inverse_kernel(
    spectrum,
    image,
    rows,
    dct_h,
    dct_w,
    colour,  # None: they stay
    place,
    total,  # R
    channels,
    height,
    width,
    PRECISION: tl.constexpr,
    H: tl.constexpr,  # half of the height and width to the next powers of two, at least 16
    W: tl.constexpr,
    ROWS: tl.constexpr,
):
    """image[n, c] = dct_h^T (sum_d colour[d, c] y[d]) dct_w,  y[d, i, j] = spectrum[rows[n], place[d, i, j]]

    spectrum (R, C*H*W) fp32, image (N, C, H, W) fp32, bf16 or fp16. Grid (N * C * cdiv(cdiv(H, 2), ROWS),): a program
    writes ROWS rows from the top of a channel, and their mirror images. Accumulates in fp32.
    """
    half_h = height - height // 2
    half_w = width - width // 2
    bands = tl.cdiv(half_h, ROWS)
    first = tl.program_id(0) % bands * ROWS
    channel = tl.program_id(0) // bands % channels
    n = (tl.program_id(0) // (bands * channels)).to(tl.int64)
    plane = height * width
    spectrum += within(tl.load(rows + n), total) * channels * plane
    image += (n * channels + channel) * plane
    p = first + tl.arange(0, ROWS)[:, None]
    q = tl.arange(0, W)[None, :]
    upper = tl.zeros([ROWS, W], tl.float32)
    lower = tl.zeros([ROWS, W], tl.float32)
    upper_right = tl.zeros([ROWS, W], tl.float32)
    lower_right = tl.zeros([ROWS, W], tl.float32)
    for odd_w in tl.range(2, num_stages=1):
        j = 2 * tl.arange(0, W)[None, :] + odd_w
        above = tl.zeros([ROWS, W], tl.float32)  # of the rows p, and
        under = tl.zeros([ROWS, W], tl.float32)  # of their mirror images
        for odd_h in tl.static_range(2):
            i = 2 * tl.arange(0, H)[:, None] + odd_h
            mask = (i < height) & (j < width)
            y = dct2_gathered(spectrum, colour, place, i * width + j, mask, channel, channels, plane)
            i = 2 * tl.arange(0, H)[None, :] + odd_h
            left = tl.load(dct_h + i * height + p, mask=(i < height) & (p < half_h), other=0.0)
            part = tl.dot(left, y, input_precision=PRECISION)
            above += part
            under += part if odd_h == 0 else -part
        j = 2 * tl.arange(0, W)[:, None] + odd_w
        across = tl.load(dct_w + j * width + q, mask=(j < width) & (q < half_w), other=0.0)
        above = tl.dot(above, across, input_precision=PRECISION)
        under = tl.dot(under, across, input_precision=PRECISION)
        sign = 1.0 - 2.0 * odd_w
        upper += above
        lower += under
        upper_right += sign * above
        lower_right += sign * under
    inside = (p < half_h) & (q < half_w)
    two_h = inside & (p < height // 2)  # the middle one of an odd length is its own mirror image
    two_w = inside & (q < width // 2)
    kind = image.dtype.element_ty
    below = (height - 1 - p) * width
    right = width - 1 - q
    tl.store(image + p * width + q, upper.to(kind), mask=inside)
    tl.store(image + p * width + right, upper_right.to(kind), mask=two_w)
    tl.store(image + below + q, lower.to(kind), mask=two_h)
    tl.store(image + below + right, lower_right.to(kind), mask=two_h & two_w)


@triton.jit
def dct2_tile(program, channels, length, other, BLOCK: tl.constexpr):
    """(n, channel, block, tile) of a program: blocks of half of the length, tiles of the other side, which go first."""
    tiles = tl.cdiv(other, BLOCK)
    blocks = tl.cdiv(length - length // 2, BLOCK)
    rest = program // tiles
    n = (rest // (blocks * channels)).to(tl.int64)
    return n, rest // blocks % channels, rest % blocks, program % tiles


@triton.jit
def dct2_side_kernel(
    image,
    target,
    rows,
    matrix,
    colour,
    place,
    total,  # R
    channels,
    plane,  # H * W
    length,  # of the side that is transformed
    other,  # of the side that stays
    stride,  # between elements along the one
    apart,  # and along the other
    FIRST: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK: tl.constexpr,
    DEPTH: tl.constexpr,
):
    """target[n, c, i, q] = sum_p matrix[i, p] image[n, c, p, q], i and p along one side, q along the other.

    The FIRST of two calls transforms colours as it reads the image (N, C, H, W), and writes scratch (N, C, H, W) fp32;
    the second reads that as its image and writes the spectrum. Grid (N * C * cdiv(cdiv(length, 2), BLOCK) *
    cdiv(other, BLOCK) * 2,): a program writes frequencies of one parity. Accumulates in fp32.
    """
    odd = tl.program_id(0) % 2
    n, channel, block, tile = dct2_tile(tl.program_id(0) // 2, channels, length, other, BLOCK)
    half = length - length // 2
    image += n * channels * plane
    target += (n if FIRST else within(tl.load(rows + n), total)) * channels * plane
    i = 2 * (block * BLOCK + tl.arange(0, BLOCK)[:, None]) + odd
    q = tile * BLOCK + tl.arange(0, BLOCK)[None, :]
    sign = 1.0 - 2.0 * odd
    y = tl.zeros([BLOCK, BLOCK], tl.float32)
    for first in range(0, half, DEPTH):
        p = first + tl.arange(0, DEPTH)[None, :]
        left = tl.load(matrix + i * length + p, mask=(i < length) & (p < half), other=0.0)
        p = first + tl.arange(0, DEPTH)[:, None]
        mirror = length - 1 - p
        inside = (p < half) & (q < other)
        pair = (p < length // 2) & (q < other)
        if FIRST:
            folded = dct2_mixed(image, colour, p * stride + q * apart, inside, channel, channels, plane)
            folded += sign * dct2_mixed(image, colour, mirror * stride + q * apart, pair, channel, channels, plane)
        else:
            start = image + channel * plane + q * apart
            folded = tl.load(start + p * stride, mask=inside, other=0.0)
            folded += sign * tl.load(start + mirror * stride, mask=pair, other=0.0)
        y = tl.dot(left, folded, y, input_precision=PRECISION)
    mask = (i < length) & (q < other)
    spot = channel * plane + i * stride + q * apart
    if not FIRST:
        spot = within(tl.load(place + spot, mask=mask, other=0), channels * plane)
    tl.store(target + spot, y, mask=mask)


@triton.jit
def dct2_side_inverse_kernel(
    source,
    image,
    rows,
    matrix,
    colour,
    place,
    total,  # R
    channels,
    plane,  # H * W
    length,  # of the side that is transformed
    other,  # of the side that stays
    stride,  # between elements along the one
    apart,  # and along the other
    FIRST: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK: tl.constexpr,
    DEPTH: tl.constexpr,
):
    """image[n, c, p, q] = sum_i matrix[i, p] source[n, c, i, q], i and p along one side, q along the other.

    The FIRST of two calls transforms colours as it reads the spectrum at its places, and writes scratch (N, C, H, W)
    fp32; the second reads that and writes the image (N, C, H, W). Grid (N * C * cdiv(cdiv(length, 2), BLOCK) *
    cdiv(other, BLOCK),): a program writes a tile and its mirror image. Accumulates in fp32.
    """
    n, channel, block, tile = dct2_tile(tl.program_id(0), channels, length, other, BLOCK)
    half = length - length // 2
    source += (within(tl.load(rows + n), total) if FIRST else n) * channels * plane
    image += n * channels * plane
    p = block * BLOCK + tl.arange(0, BLOCK)[:, None]
    q = tile * BLOCK + tl.arange(0, BLOCK)[None, :]
    mirror = length - 1 - p
    even = tl.zeros([BLOCK, BLOCK], tl.float32)
    odd = tl.zeros([BLOCK, BLOCK], tl.float32)
    for first in range(0, half, DEPTH):
        for parity in tl.static_range(2):
            i = 2 * (first + tl.arange(0, DEPTH)[None, :]) + parity
            left = tl.load(matrix + i * length + p, mask=(i < length) & (p < half), other=0.0)
            i = 2 * (first + tl.arange(0, DEPTH)[:, None]) + parity
            mask = (i < length) & (q < other)
            pixel = i * stride + q * apart
            if FIRST:
                right = dct2_gathered(source, colour, place, pixel, mask, channel, channels, plane)
            else:
                right = tl.load(source + channel * plane + pixel, mask=mask, other=0.0)
            if parity == 0:
                even = tl.dot(left, right, even, input_precision=PRECISION)
            else:
                odd = tl.dot(left, right, odd, input_precision=PRECISION)
    start = image + channel * plane + q * apart
    kind = image.dtype.element_ty
    tl.store(start + p * stride, (even + odd).to(kind), mask=(p < half) & (q < other))
    tl.store(start + mirror * stride, (even - odd).to(kind), mask=(p < length // 2) & (q < other))


def padded(side: int) -> int:
    """Half of a side, as the kernels of whole images hold it."""
    return max(16, next_power_of_2(cdiv(side, 2)))


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
    plane, planes = height * width, count * channels
    if height <= WHOLE and width <= WHOLE:
        shape = rows, dct_h, dct_w, colour, place, len(spectrum), channels, height, width
        sides = PRECISION, padded(height), padded(width)
        warps = WARPS if width > 32 else 1
        if inverse:
            grid = (planes * cdiv(cdiv(height, 2), ROWS),)
            dct2_inverse_kernel[grid](spectrum, image, *shape, *sides, ROWS, num_warps=warps)
        else:
            dct2_kernel[(planes * 4,)](image, spectrum, *shape, *sides, num_warps=warps)
        return
    scratch = torch.empty(image.shape, dtype=torch.float32, device=image.device)
    kernel = dct2_side_inverse_kernel if inverse else dct2_side_kernel
    source, target = (spectrum, image) if inverse else (image, spectrum)
    registers = None if inverse else REGISTERS
    along_w = (dct_w, width, height, 1, width)  # length, other, stride, apart
    along_h = (dct_h, height, width, width, 1)
    for first, (matrix, length, other, stride, apart) in ((True, along_w), (False, along_h)):
        tiles = cdiv(cdiv(length, 2), BLOCK) * cdiv(other, BLOCK)
        kernel[(planes * tiles * (1 if inverse else 2),)](
            source if first else scratch, scratch if first else target, rows, matrix, colour, place, len(spectrum),
            channels, plane, length, other, stride, apart, first, PRECISION, BLOCK, DEPTH, num_warps=8,
            maxnreg=registers,
        )  # fmt: skip
