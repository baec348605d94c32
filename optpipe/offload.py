"""Tensors that lie in a file and take memory only while they are used (ZeRO-Infinity,
arXiv:2104.07857, does so for models larger than any memory)."""

from __future__ import annotations

import mmap
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryFile

import torch
from torch import Tensor, nn

from optpipe.libc import trim

ALIGN = 64
"""Bytes that every tensor starts at a multiple of, as torch's own do."""
CPU = torch.device("cpu")


class Offloaded:
    """Some tensors of the CPU, whose values are moved to a nameless file in ``folder``.

    They stay the same objects, so that whoever holds one finds its values where they are now: in
    the file, mapped into memory, or on a device while they are :meth:`on` it. Raises OSError if the
    disk is full.
    """

    def __init__(self, tensors: Iterable[Tensor], folder: Path) -> None:
        self._tensors = list(tensors)
        size = sum(_room(tensor) for tensor in self._tensors)
        with TemporaryFile(dir=folder) as file:
            file.truncate(size)
            if hasattr(os, "posix_fallocate"):  # not on macOS; later, a full disk would kill us
                os.posix_fallocate(file.fileno(), 0, size)
            self._map = mmap.mmap(file.fileno(), size)
        self._bytes = torch.frombuffer(self._map, dtype=torch.uint8)
        self._move()
        trim()
        self._let_go()

    def _move(self) -> None:
        values = [tensor.data for tensor in self._tensors]
        self._place(self._bytes)
        for tensor, value in zip(self._tensors, values, strict=True):
            tensor.data.copy_(value)

    @contextmanager
    def on(self, device: torch.device, changed: bool = False) -> Iterator[None]:
        """The values on a device; kept if they ``changed``, then gone from memory."""
        there = self._bytes.to(device)
        self._place(there)
        yield
        if changed and there is not self._bytes:
            self._bytes.copy_(there)
        self._place(self._bytes)
        self._let_go()

    def _place(self, values: Tensor) -> None:
        start = 0
        for tensor in self._tensors:
            mine = values[start : start + tensor.nbytes]
            tensor.data = mine.view(tensor.dtype).view(tensor.shape)
            start += _room(tensor)

    def _let_go(self) -> None:
        self._map.madvise(mmap.MADV_DONTNEED)  # of a shared mapping: what was written is kept


def tensors(module: nn.Module) -> list[Tensor]:
    """All that a module holds, each tensor once."""
    return [*module.parameters(), *module.buffers()]


def _room(tensor: Tensor) -> int:
    return -(-tensor.nbytes // ALIGN) * ALIGN
