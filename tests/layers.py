"""Layers with white, correlated and outlier inputs, as the property tests want them."""

import torch

from optpipe.calibrate import Gram

KINDS = ("white", "correlated", "outliers")


class Layer:
    """A weight (R, C), its inputs x (N, C) and their Gram matrix, as a stage is shown it."""

    def __init__(self, kind, seed, rows=24, cols=64, tokens=2048):
        generator = torch.Generator().manual_seed(seed)
        self.weight = torch.randn(rows, cols, generator=generator)
        x = torch.randn(tokens, cols, generator=generator, dtype=torch.float64)
        if kind == "correlated":  # a power law spectrum, as hidden states have
            mix = torch.randn(cols, cols, generator=generator, dtype=torch.float64)
            x = x * torch.arange(1, cols + 1, dtype=torch.float64) ** -0.8 @ torch.linalg.qr(mix)[0]
        if kind == "outliers":
            x[:, [5, 22, 47]] *= 30  # in groups of four of their own
        self.x = x
        self.gram = Gram(cols)
        self.gram.add(x)

    @property
    def mean_CC(self):
        return self.x.T @ self.x / len(self.x)

    def error(self, weight, damp=0.0):
        """tr(D H D^T), from the inputs themselves; ``damp`` adds to H as the methods do."""
        change = weight.double() - self.weight.double()
        loss = (self.x @ change.T).square().sum() / len(self.x)
        pull = damp * self.mean_CC.diagonal().mean() * change.square().sum()
        return float(loss + pull)
