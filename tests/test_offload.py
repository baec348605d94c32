"""Offloaded tensors: the same values in the same objects, and no memory while nobody uses them."""

import os
from pathlib import Path

import pytest
import torch
from torch import nn

from optpipe.libc import trim
from optpipe.offload import CPU, Offloaded, tensors

MB = 2**20


def resident():
    """Bytes of this process that are in memory, pages of files included."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def mixed():
    layer = nn.Linear(5, 3)
    layer.register_buffer("codes", torch.arange(7, dtype=torch.uint8))
    layer.register_buffer("mask", torch.tensor([[True, False]]))
    layer.register_buffer("scale", torch.tensor(0.5, dtype=torch.float16))
    return layer


def test_values_and_objects_stay_and_changes_are_kept(tmp_path):
    layer = mixed()
    before, held = {k: v.clone() for k, v in layer.state_dict().items()}, tensors(layer)
    file = Offloaded(held, tmp_path)
    assert not [*tmp_path.iterdir()]  # nothing is left behind by a process that is killed
    assert all(torch.equal(v, before[k]) for k, v in layer.state_dict().items())
    with file.on(CPU, changed=True), torch.no_grad():
        layer.weight.add_(1)
        layer.codes.zero_()
    assert torch.equal(layer.weight, before["weight"] + 1) and not layer.codes.any()
    assert torch.equal(layer.bias, before["bias"]) and torch.equal(layer.mask, before["mask"])
    assert [*map(id, tensors(layer))] == [*map(id, held)]
    layer(torch.ones(2, 5)).sum().backward()
    assert torch.equal(layer.bias.grad, torch.full((3,), 2.0))


def test_a_system_that_cannot_reserve_disk_has_the_values_too(tmp_path, monkeypatch):
    monkeypatch.delattr(os, "posix_fallocate")
    tensor = torch.arange(5.0)
    Offloaded([tensor], tmp_path)
    assert torch.equal(tensor, torch.arange(5.0))


def test_memory_is_taken_only_while_tensors_are_used(tmp_path):
    torch.ones(7 * MB)  # once it is freed, glibc takes blocks of up to 28 MB from its heap
    holes = [torch.ones(MB) for _ in range(40)]  # and keeps their 160 MB
    end, _ = torch.ones(MB), holes.clear()
    tensor = torch.full((64 * MB // 4,), 2.0)
    trim()  # what others left
    start = resident()
    file = Offloaded([tensor], tmp_path)
    assert resident() < start - 48 * MB
    with file.on(CPU, changed=True):
        tensor.mul_(2)
        assert resident() > start - 16 * MB
    assert resident() < start - 48 * MB
    assert tensor.min() == tensor.max() == 4 and end.max() == 1


@pytest.mark.gpu
def test_values_travel_to_a_gpu_and_back(tmp_path):
    layer = mixed()
    before = layer.weight.detach().clone()
    file = Offloaded(tensors(layer), tmp_path)
    for changed in (False, True):
        with file.on(torch.device("cuda"), changed), torch.no_grad():
            assert all(tensor.is_cuda for tensor in tensors(layer))
            layer.weight.add_(1)
        assert torch.equal(layer.weight, before + changed)
