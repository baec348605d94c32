"""Orthogonal matrices that spread what is concentrated in few channels over all of them.

Hadamard matrices of Sylvester (orders 2^k), of Paley (q + 1 and 2 (q + 1) for primes q) and their
products; those of QuaRot (arXiv:2404.00456) have random signs besides.
"""

from __future__ import annotations

import torch
from torch import Tensor

HADAMARD, RANDOM = "hadamard", "random"
KINDS = (HADAMARD, RANDOM)


def orthogonal(size: int, kind: str, seed: int) -> Tensor:
    """Q with Q Q^T = 1, float64 (size, size).

    Raises ValueError if there is no Hadamard matrix of this size, or none that is known here.
    """
    generator = torch.Generator().manual_seed(seed)
    if kind == RANDOM:
        gauss = torch.randn(size, size, generator=generator, dtype=torch.float64)
        q, r = torch.linalg.qr(gauss)
        uniform: Tensor = (
            q * r.diagonal().sign()
        )  # uniform over all rotations (Mezzadri, math-ph/0609050)
        return uniform
    signs = torch.randint(2, (size,), generator=generator).double() * 2 - 1
    signed: Tensor = signs[:, None] * hadamard(size) / size**0.5
    return signed


def keeping_mean(rotation: Tensor) -> Tensor:
    """The rotation followed by the reflection that brings (1, .., 1) back to itself.

    What has mean zero keeps it, so that a LayerNorm does to the rotated what it did before.
    """
    u = torch.full((len(rotation),), len(rotation) ** -0.5, dtype=rotation.dtype)
    w = u @ rotation - u
    if float(w.norm()) < 1e-12:
        return rotation
    w = w / w.norm()
    reflected: Tensor = rotation - 2 * (rotation @ w)[:, None] * w
    return reflected


def hadamard(size: int) -> Tensor:
    """A matrix of +1 and -1 with orthogonal rows, float64. Raises ValueError if none is known."""
    most = (size & -size).bit_length() - 1
    found = ((k, base) for k in range(most, -1, -1) if (base := _paley(size >> k)) is not None)
    doublings, base = next(found, (0, None))
    if base is None:
        raise ValueError(f"no Hadamard matrix of size {size} is known here; use kind={RANDOM}")
    two = torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64)
    for _ in range(doublings):
        base = torch.kron(two, base)
    return base


def _paley(order: int) -> Tensor | None:
    """Paley's matrices, and those of order 1."""
    if order == 1:
        return torch.ones(1, 1, dtype=torch.float64)
    one = torch.eye(order, dtype=torch.float64)
    if order % 4 == 0 and _is_prime(order - 1):
        skew = _conference(order - 1)
        skew[1:, 0] = -1
        return skew + one
    q = order // 2 - 1
    if order % 4 == 0 and q % 4 == 1 and _is_prime(q):
        pair = torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64)
        other = torch.tensor([[1.0, -1.0], [-1.0, -1.0]], dtype=torch.float64)
        return torch.kron(_conference(q), pair) + torch.kron(one[: q + 1, : q + 1], other)
    return None


def _conference(q: int) -> Tensor:
    """Quadratic residues of all differences modulo q, bordered by ones, (q + 1, q + 1)."""
    squares = {i * i % q for i in range(1, q)}
    character = torch.tensor([0.0] + [1.0 if i in squares else -1.0 for i in range(1, q)])
    index = torch.arange(q)
    matrix = torch.ones(q + 1, q + 1, dtype=torch.float64)
    matrix[1:, 1:] = character.double()[(index[:, None] - index) % q]
    matrix[0, 0] = 0
    return matrix


def _is_prime(n: int) -> bool:
    return n > 1 and all(n % i for i in range(2, int(n**0.5) + 1))
