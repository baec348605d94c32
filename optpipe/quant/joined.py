"""Layers that read the same inputs, as one layer for as long as someone looks at them."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from optpipe.linear import dense


class Joint:
    """Layers that read the same inputs, as one: it runs once for all of them."""

    def __init__(self, layers: list[nn.Linear]) -> None:
        self.linear = dense(torch.cat([layer.weight for layer in layers]), None)
        self.fed, self.made = torch.empty(0), torch.empty(0)

    def __call__(self, x: Tensor) -> Tensor:
        if x is not self.fed:
            self.fed, self.made = x, self.linear(x)
        return self.made


class Rows(nn.Module):
    """One layer of a joint one."""

    def __init__(self, joint: Joint, first: int, layer: nn.Linear) -> None:
        super().__init__()
        self.joint, self.first, self.rows = joint, first, layer.out_features
        self.bias = layer.bias

    def forward(self, x: Tensor) -> Tensor:
        y = self.joint(x)[..., self.first : self.first + self.rows]
        return y if self.bias is None else y + self.bias


@contextlib.contextmanager
def joined(lm: nn.Module, groups: list[list[str]]) -> Iterator[nn.ModuleList]:
    """Inside, the layers of each group are one, without bias, in the list that is given."""
    found: dict[str, nn.Linear] = {name: lm.get_submodule(name) for g in groups for name in g}  # type: ignore[misc]
    joints = []
    for group in groups:
        joints.append(joint := Joint([found[name] for name in group]))
        first = 0
        for name in group:
            lm.set_submodule(name, Rows(joint, first, found[name]))
            first += found[name].out_features
    try:
        yield nn.ModuleList(joint.linear for joint in joints)
    finally:
        for name, layer in found.items():
            lm.set_submodule(name, layer)
