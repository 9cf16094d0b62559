"""The basis: orthonormal, inverted by its inverse, and its bands cover every coefficient once."""

from __future__ import annotations

import pytest
import torch

from deqkern.solvers.basis import Basis, dct_matrix, radial_bands

SHAPES = [(1, 8, 8), (3, 32, 32), (4, 7, 12), (2, 1, 5), (1, 1, 1), (3, 16, 9)]


@pytest.mark.parametrize("size", [1, 2, 3, 8, 31, 64])
def test_dct_matrix_is_orthonormal_and_its_rows_are_cosines(size: int) -> None:
    matrix = dct_matrix(size)
    torch.testing.assert_close(matrix @ matrix.T, torch.eye(size, dtype=torch.float64), atol=1e-12, rtol=0)
    scipy_fft = pytest.importorskip("scipy.fft")
    expected = scipy_fft.dct(torch.eye(size, dtype=torch.float64).numpy(), axis=0, norm="ortho")
    torch.testing.assert_close(matrix, torch.as_tensor(expected), atol=1e-12, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_dct_matrix_is_symmetric_bit_for_bit(dtype: torch.dtype) -> None:
    for size in (*range(1, 131), 192, 256, 384, 512):
        matrix, even = dct_matrix(size, dtype), True
        while even:
            sign = 1 - 2 * (torch.arange(len(matrix)) % 2)
            assert torch.equal(matrix.flip(1), sign[:, None] * matrix), size
            even = len(matrix) % 2 == 0
            matrix = matrix[::2, : len(matrix) // 2]


def test_transforms_are_those_of_scipy() -> None:
    scipy_fft = pytest.importorskip("scipy.fft")
    basis, image, rows = Basis.spectral((2, 64, 48)), torch.randn(3, 2, 64, 48), torch.tensor([2, 0, 1])
    spectrum = torch.empty(3, basis.size)
    basis.forward(image, spectrum, rows)
    expected = torch.as_tensor(scipy_fft.dctn(image.double().numpy(), axes=(2, 3), norm="ortho"))
    torch.testing.assert_close(spectrum[rows].double(), expected.flatten(1)[:, basis.order], atol=1e-5, rtol=0)
    back = torch.empty_like(image)
    basis.inverse(spectrum, back, rows)
    expected.flatten(1)[:, basis.order] = spectrum[rows].double()
    expected = torch.as_tensor(scipy_fft.idctn(expected.numpy(), axes=(2, 3), norm="ortho"))
    torch.testing.assert_close(back.double(), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("shape", SHAPES)
def test_round_trip_norm_and_gather(shape: tuple[int, ...]) -> None:
    basis = Basis.spectral(shape)
    image = torch.randn(4, *shape)
    rows = torch.tensor([6, 1, 3, 0])
    spectrum = torch.full((7, basis.size), torch.nan)
    basis.forward(image, spectrum, rows)
    assert spectrum[[2, 4, 5]].isnan().all()
    torch.testing.assert_close(spectrum[rows].norm(dim=1), image.flatten(1).norm(dim=1))
    back = torch.full_like(image, torch.nan)
    basis.inverse(spectrum, back, rows)
    torch.testing.assert_close(back, image, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("shape", SHAPES)
def test_bands_cover_every_coefficient_once_and_rise_in_frequency(shape: tuple[int, ...]) -> None:
    basis = Basis.spectral(shape)
    assert basis.order is not None
    assert basis.bands[0] == 0 and basis.bands[-1] == basis.size
    assert (basis.bands.diff() > 0).all()
    assert torch.equal(basis.order.sort().values, torch.arange(basis.size))
    per_channel = (len(basis.bands) - 1) // shape[0]
    assert per_channel <= 8
    channel = basis.order // (shape[1] * shape[2])
    assert (channel.diff() >= 0).all()
    band = radial_bands(*shape[1:]).flatten()[basis.order % (shape[1] * shape[2])] + channel * per_channel
    expected = torch.repeat_interleave(torch.arange(len(basis.bands) - 1), basis.bands.diff())
    assert torch.equal(band, expected)


def test_colour_transform_puts_grey_in_the_first_channel() -> None:
    basis = Basis.spectral((3, 4, 4))
    grey = torch.randn(1, 1, 4, 4).expand(-1, 3, -1, -1)
    spectrum = torch.empty(1, basis.size)
    basis.forward(grey, spectrum, torch.tensor([0]))
    assert spectrum[0, 16:].abs().max() < 1e-6 < spectrum[0, :16].abs().max()


def test_identity_is_one_band_in_place_of_order() -> None:
    basis = Basis.identity((5,))
    image, spectrum = torch.randn(2, 5, dtype=torch.float16), torch.empty(2, 5)
    basis.forward(image, spectrum, torch.tensor([1, 0]))
    assert torch.equal(spectrum, image.flip(0).float())
    assert basis.bands.tolist() == [0, 5]


def test_strided_and_half_precision_images_give_the_same_coefficients() -> None:
    basis = Basis.spectral((3, 8, 6))
    image = torch.randn(2, 3, 8, 6)
    rows = torch.arange(2)
    expected, got = torch.empty(2, basis.size), torch.empty(2, basis.size)
    basis.forward(image, expected, rows)
    basis.forward(image.to(memory_format=torch.channels_last), got, rows)
    assert torch.equal(got, expected)
    basis.forward(image.half(), got, rows)
    torch.testing.assert_close(got, expected, atol=5e-3, rtol=1e-2)
