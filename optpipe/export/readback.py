"""Checkpoints for other runtimes, read back: do they hold the very weights they were made from?

Where the runtime itself cannot run here, this is what can be verified: every parameter is there,
once, and decodes to what the torch model multiplies with.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from importlib import import_module
from pathlib import Path

import torch
from torch import Tensor

from optpipe import model
from optpipe.artifact import Artifact, Stats
from optpipe.checkpoint import Checkpoint
from optpipe.errors import GateError
from optpipe.export.folder import cache_scales, parameters
from optpipe.linear import Layers, Quantized, weight_of

READERS = {
    "vllm": "optpipe.export.unpack.read",
    "trtllm": "optpipe.export.unpack.read",
    "trtllm_legacy": "optpipe.export.ranks.read",
    "gguf": "optpipe.export.gguf.read",
}
"""Format of an artifact -> what reads it: (folder, layers) -> names of the plain model, tensors."""
Reader = Callable[[Path, Layers], Iterator[tuple[str, Tensor]]]
EXACT = 2.0**-22
"""Largest accepted difference of what is not quantized, for formats that store a norm plus one."""
ULP = 2.0**-22
"""Relative, of a float32 that was inverted twice."""


def read_back(artifact: Artifact, reference: Artifact) -> Stats:
    """Compare all tensors with the torch model. Raises GateError for the first that differs."""
    module, _, function = READERS[artifact.format].rpartition(".")
    reader: Reader = getattr(import_module(module), function)
    source = Checkpoint(reference.path)
    layers = model.layers(source)
    cache = {".".join(place): scale for place, scale in cache_scales(source).items()}
    missing = {*parameters(source), *_input_scales(layers), *cache}
    quantized = 0
    for name, stored in reader(artifact.path, layers):
        if name not in missing:
            raise GateError(f"'{artifact.name}' holds '{name}', which is no parameter, or twice")
        missing.remove(name)
        if name in cache:
            _check_scale(name, float(stored), cache[name])
            continue
        wanted, exact = _wanted(source, layers, name)
        quantized += exact and torch.equal(stored.float(), wanted)
        wanted = wanted if exact else wanted.to(stored.dtype).float()
        inverted = exact and layers[name.rpartition(".")[0]].number == "nvfp4"
        relative, absolute = (ULP if inverted else 0.0), (0.0 if exact else EXACT)
        if not _same(stored.float(), wanted, relative, absolute):
            raise GateError(f"'{name}' of '{artifact.name}' is not that of '{reference.name}'")
    if missing:
        raise GateError(f"'{artifact.name}' lacks '{min(missing)}'")
    return {"layers_with_codes_bit_exact": quantized}


def _wanted(source: Checkpoint, layers: Layers, name: str) -> tuple[Tensor, bool]:
    """A parameter as the torch model has it, and whether it stands in codes."""
    layer, _, part = name.rpartition(".")
    if layer in layers and part == "weight":
        module = model.layer(layer, source.forms or {}, source)
        weight = weight_of(module)
        turned = source.decoder.transposed and layer != source.decoder.head
        return (weight.T if turned else weight), isinstance(module, Quantized)
    tensor = source.get(name)
    assert tensor is not None, name
    if part == "input_scale":
        return tensor.float().reshape(1), False
    return tensor, False


def _check_scale(name: str, stored: float, wanted: float) -> None:
    if stored != wanted:
        raise GateError(f"'{name}' is {stored:g}, the cache of the model has {wanted:g}")


def _same(stored: Tensor, wanted: Tensor, relative: float, absolute: float) -> bool:
    if stored.shape != wanted.shape:
        return False
    return bool(((stored - wanted).abs() <= relative * wanted.abs() + absolute).all())


def _input_scales(layers: Layers) -> list[str]:
    return [f"{name}.input_scale" for name, form in layers.items() if form.static_inputs]
