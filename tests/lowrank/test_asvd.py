"""ASVD between plain and whitened SVD."""

import pytest
import torch
from layers import KINDS, Layer

from optpipe.calibrate import Gram
from optpipe.lowrank.asvd import Asvd
from optpipe.lowrank.factorize import truncated
from optpipe.lowrank.svdllm import whitened


def test_it_truncates_the_weight_scaled_by_its_inputs():
    """Eckart and Young in that norm: what is lost is the sum of the discarded singular values."""
    layer = Layer("outliers", 0)
    scale = layer.x.abs().mean(0).sqrt()
    left, right = Asvd().factors(layer.weight.double(), 8, layer.gram)
    lost = ((layer.weight - left @ right) * scale).square().sum()
    expected = torch.linalg.svdvals(layer.weight * scale)[8:].square().sum()
    torch.testing.assert_close(lost, expected, rtol=1e-9, atol=0)


def test_equal_inputs_make_it_plain_svd_and_a_dead_one_breaks_nothing():
    weight, gram = torch.randn(24, 40, dtype=torch.float64), Gram(40)
    gram.add(2 * torch.eye(40, dtype=torch.float64))
    left, right = Asvd().factors(weight, 8, gram)
    expected = truncated(weight, 8)
    torch.testing.assert_close(left @ right, expected[0] @ expected[1])
    dead = Gram(40)
    dead.add(torch.eye(40, dtype=torch.float64)[:30])
    assert torch.isfinite(Asvd().factors(weight, 8, dead)[1]).all()


@pytest.mark.parametrize("kind", KINDS)
def test_whitened_loses_least_on_every_layer_and_asvd_less_than_svd_where_inputs_differ(kind):
    errors = []
    for seed in range(8):
        layer = Layer(kind, seed)
        weight = layer.weight.double()
        pairs = (
            whitened(weight, layer.mean_CC, 8),
            Asvd().factors(weight, 8, layer.gram),
            truncated(weight, 8),
        )
        errors.append([layer.error(left @ right) for left, right in pairs])
        assert errors[-1][0] <= min(errors[-1][1:]) * (1 + 1e-9)
    _, asvd, svd = torch.tensor(errors).mean(0)
    assert kind == "white" or asvd < svd


@pytest.mark.parametrize("alpha", [0.0, 1.1])
def test_a_bad_power_is_refused(alpha):
    with pytest.raises(ValueError, match=f"alpha .* {alpha}"):
        Asvd(alpha=alpha)
