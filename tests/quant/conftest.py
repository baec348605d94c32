"""Layers whose inputs are white, correlated, or have channels far larger than the others."""

import pytest
import torch


@pytest.fixture
def layer():
    """layer(kind, seed) -> weight (R, C) float32 and inputs (N, C) float64."""

    def make(kind, seed, rows=32, cols=64, tokens=600):
        generator = torch.Generator().manual_seed(seed)
        weight = torch.randn(rows, cols, generator=generator)
        x = torch.randn(tokens, cols, generator=generator, dtype=torch.float64)
        if kind == "correlated":
            mix = torch.randn(cols, cols, generator=generator, dtype=torch.float64)
            x = x * torch.arange(1, cols + 1).double() ** -0.8 @ torch.linalg.qr(mix)[0]
        if kind == "outliers":
            x[:, [5, 33]] *= 30
        return weight, x

    return make


@pytest.fixture
def output_error():
    """output_error(difference of weights, inputs) -> mean square of what the output is off by."""
    return lambda difference, x: float((x @ difference.double().T).square().sum(1).mean())
