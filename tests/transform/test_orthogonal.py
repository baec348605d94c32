"""Orthogonal matrices: orthogonal, flat where they should be, reproducible."""

import pytest
import torch
from scipy.linalg import hadamard as sylvester

from optpipe.transform.orthogonal import KINDS, hadamard, keeping_mean, orthogonal

SIZES = [1, 2, 4, 12, 20, 28, 36, 44, 64, 96, 768, 896, 1152]


@pytest.mark.parametrize("size", SIZES)
def test_hadamard_matrices_are_signs_with_orthogonal_rows(size):
    matrix = hadamard(size)
    assert matrix.shape == (size, size) and (matrix.abs() == 1).all()
    assert torch.equal(matrix @ matrix.T, size * torch.eye(size, dtype=torch.float64))


@pytest.mark.parametrize("size", [2, 8, 64])
def test_powers_of_two_are_sylvester_s(size):
    assert torch.equal(hadamard(size), torch.tensor(sylvester(size), dtype=torch.float64))


@pytest.mark.parametrize("size", [3, 6, 92])
def test_sizes_without_a_known_one_are_refused(size):
    with pytest.raises(ValueError, match=f"no Hadamard matrix of size {size} is known here"):
        orthogonal(size, "hadamard", 0)


@pytest.mark.parametrize("kind", KINDS)
def test_rotations_are_orthogonal_and_follow_the_seed(kind):
    q = orthogonal(96, kind, 0)
    assert (q @ q.T - torch.eye(96)).abs().max() < 1e-13
    assert torch.equal(q, orthogonal(96, kind, 0))
    assert not torch.equal(q, orthogonal(96, kind, 1))


@pytest.mark.parametrize("kind", KINDS)
def test_what_has_mean_zero_keeps_it(kind):
    q = keeping_mean(orthogonal(96, kind, 0))
    ones = torch.ones(96, dtype=torch.float64)
    assert (q @ q.T - torch.eye(96)).abs().max() < 1e-13
    assert (ones @ q - ones).abs().max() < 1e-12 and (q @ ones - ones).abs().max() < 1e-12


def test_a_rotation_spreads_an_outlier_evenly():
    x = torch.zeros(96, dtype=torch.float64)
    x[5] = 30.0
    rotated = x @ orthogonal(96, "hadamard", 0)
    torch.testing.assert_close(rotated.abs(), torch.full_like(x, 30 / 96**0.5))
