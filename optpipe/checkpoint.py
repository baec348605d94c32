"""A model folder: transformers config, safetensors, and ``forms.json`` where layers are compressed.

Reading is lazy, one tensor at a time, so that a stage or an exporter never needs the whole model
in memory; a plain Hugging Face folder is a checkpoint in which every layer is dense.
"""

from __future__ import annotations

import json
import shutil
import struct
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoConfig

from optpipe import kvcache
from optpipe.errors import InputError, one_line
from optpipe.family import Decoder, describe
from optpipe.linear import Form, Layers

FORMS = "forms.json"
INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")
DTYPES = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32}
"""Floating-point types by their names in safetensors."""
SIDE_FILES = ("config.json", "generation_config.json", kvcache.FILE, "tokenizer*",
              "special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt",
              "chat_template*")  # fmt: skip


class Checkpoint:
    """Lazy view of a model folder. Raises InputError if the folder is not a usable model."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._open: dict[str, Any] = {}
        self._prefix = ""

    @cached_property
    def config(self) -> Any:
        if not (self.path / "config.json").is_file():
            raise InputError(f"no config.json in model folder '{self.path}'")
        try:
            return AutoConfig.from_pretrained(self.path, trust_remote_code=False)
        except (ValueError, KeyError, OSError, StrictDataclassError) as error:
            raise InputError(
                f"cannot read the config of '{self.path}': {one_line(error)}"
            ) from error

    @cached_property
    def decoder(self) -> Decoder:
        return describe(self.config)

    @cached_property
    def files(self) -> dict[str, str]:
        """Tensor name -> file name, every header checked against the size of its file."""
        if (self.path / INDEX).is_file():
            listed = _weight_map(self.path / INDEX)
            names = sorted(set(listed.values()))
        elif (self.path / SINGLE).is_file():
            listed, names = None, [SINGLE]
        else:
            raise InputError(_no_weights(self.path))
        headers = {name: _header(self.path / name) for name in names}
        found = {tensor for header in headers.values() for tensor in header}
        if listed is not None and (missing := sorted(set(listed) - found)):
            raise InputError(f"tensor '{missing[0]}' is listed in {INDEX} but in no file")
        # a base model saved on its own, such as the original GPT-2, leaves the prefix out
        prefix = self.decoder.embed.partition(".")[0] + "."
        self._prefix = "" if any(name.startswith(prefix) for name in found) else prefix
        return {self._prefix + t: name for name, header in headers.items() for t in header}

    @cached_property
    def forms(self) -> Layers | None:
        """The layers this project compressed; None for a folder of Hugging Face's own."""
        file = self.path / FORMS
        if not file.is_file():
            return None
        return {name: Form(**form) for name, form in json.loads(file.read_text()).items()}

    @cached_property
    def cache(self) -> kvcache.CacheForm | None:
        """How its KV cache is rounded; None if it is not."""
        return kvcache.load(self.path)

    @property
    def head_is_embedding(self) -> bool:
        """Whether the output projection has no weight of its own."""
        head = (self.forms or {}).get(self.decoder.head)
        return self.decoder.tied and (head is None or head.bits is None)

    @cached_property
    def types(self) -> dict[str, str]:
        """What every tensor is stored as, in the names of safetensors."""
        return {
            self._prefix + tensor: entry["dtype"]
            for name in sorted(set(self.files.values()))
            for tensor, entry in _header(self.path / name).items()
        }

    @property
    def dtype(self) -> torch.dtype:
        """What the embedding is stored as, whatever the config says."""
        return self.floating(f"{self.decoder.embed}.weight")

    def layer_dtype(self, layer: str) -> torch.dtype:
        """What the floats of a layer are stored as; of a new factor, the layer it came from."""
        for owner in (layer, layer.rpartition(".")[0]):
            for part in ("weight", "values", "bias"):
                if f"{owner}.{part}" in self.types:
                    return self.floating(f"{owner}.{part}")
        return self.dtype

    def floating(self, name: str) -> torch.dtype:
        """The type of one stored tensor. Raises InputError if it is none that a weight may have."""
        stored = self.types[name]
        if stored not in DTYPES:
            raise InputError(f"'{name}' is stored as {stored}; allowed are {', '.join(DTYPES)}")
        return DTYPES[stored]

    @property
    def stop_tokens(self) -> list[int]:
        """The tokens that end a text; none for a model that knows no end."""
        file = self.path / "generation_config.json"
        try:
            settings = json.loads(file.read_text()) if file.is_file() else {}
            stop = settings.get("eos_token_id")
        except (ValueError, AttributeError) as error:
            raise InputError(f"'{file}' is no JSON object: {one_line(error)}") from error
        if stop is None:
            stop = self.config.eos_token_id
        if stop is None:
            return []
        stops = list(stop) if isinstance(stop, list) else [stop]
        if not all(type(token) is int for token in stops):
            raise InputError(f"eos_token_id of '{self.path}' must be token numbers, got {stop!r}")
        return stops

    def get(self, name: str) -> Tensor | None:
        """One tensor as stored, or None if there is none of that name."""
        if name not in self.files:
            return None
        file = self.files[name]
        if file not in self._open:
            self._open[file] = safe_open(self.path / file, framework="pt")
        tensor: Tensor = self._open[file].get_tensor(name.removeprefix(self._prefix))
        return tensor

    def let_go(self) -> None:
        """Unmap the files: what was read of them counts as memory of this process until then."""
        self._open.clear()

    def tensor(self, name: str) -> Tensor:
        """One tensor that must be there."""
        tensor = self.get(name)
        assert tensor is not None, name
        return tensor

    def planned(self, config: Any) -> Checkpoint:
        """What later stages will find once a stage has given the model this config: no tensors."""
        later = Checkpoint(self.path)
        later.config, later.forms = config, None
        return later

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of every stored tensor, from the headers alone."""
        return {
            self._prefix + tensor: tuple(entry["shape"])
            for name in sorted(set(self.files.values()))
            for tensor, entry in _header(self.path / name).items()
        }

    def sizes(self) -> dict[str, int]:
        """Bytes of every stored tensor, from the headers alone."""
        return {
            self._prefix + tensor: entry["data_offsets"][1] - entry["data_offsets"][0]
            for name in sorted(set(self.files.values()))
            for tensor, entry in _header(self.path / name).items()
        }

    @property
    def size_bytes(self) -> int:
        return sum((self.path / name).stat().st_size for name in set(self.files.values()))


class Writer:
    """Writes a checkpoint one part at a time, each its own safetensors file; ``close`` seals it."""

    def __init__(self, out: Path, source: Checkpoint) -> None:
        self.out, self.source = out, source
        self.weight_map: dict[str, str] = {}
        self.total = 0

    def add(self, part: str, tensors: Mapping[str, Tensor]) -> None:
        """Store ``tensors`` in PART.safetensors."""
        if not tensors:
            return
        file = f"{part}.safetensors"
        save_file(dict(tensors), self.out / file, metadata={"format": "pt"})
        self.weight_map |= dict.fromkeys(tensors, file)
        self.total += sum(t.numel() * t.element_size() for t in tensors.values())

    def close(self, forms: Layers) -> None:
        _dump(self.out / FORMS, {name: asdict(form) for name, form in forms.items()})
        self.seal()

    def seal(self) -> None:
        """Config, tokenizer and index, as in a folder of Hugging Face's own."""
        copy_side_files(self.source.path, self.out)
        index = {"metadata": {"total_size": self.total}, "weight_map": self.weight_map}
        _dump(self.out / INDEX, index)


def untie(folder: Path) -> None:
    """Make the config say that the output projection has a weight of its own."""
    file = folder / "config.json"
    _dump(file, {**json.loads(file.read_text()), "tie_word_embeddings": False})


def copy_side_files(source: Path, out: Path) -> None:
    """Config and tokenizer travel with the weights."""
    for file in side_files(source):
        shutil.copy2(file, out / file.name)


def side_files(path: Path) -> Iterator[Path]:
    found = (file for pattern in SIDE_FILES for file in sorted(path.glob(pattern)))
    return (file for file in found if file.is_file())


def _dump(file: Path, content: object) -> None:
    file.write_text(json.dumps(content, indent=1) + "\n")


def _weight_map(file: Path) -> dict[str, str]:
    try:
        return dict(json.loads(file.read_text())["weight_map"])
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"'{file}' is no index of weights: {one_line(error)}") from error


def _header(file: Path) -> dict[str, Any]:
    """The header of a safetensors file. Raises InputError if the file is not whole."""
    if not file.is_file():
        raise InputError(f"weight file '{file}' is missing")
    size = file.stat().st_size
    with file.open("rb") as stream:
        start = stream.read(8)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else size
        text = stream.read(length) if length < size else b""
    try:
        header: dict[str, Any] = json.loads(text)
        header.pop("__metadata__", None)
        end = 8 + length + max((e["data_offsets"][1] for e in header.values()), default=0)
    except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        raise InputError(f"'{file}' is not a whole safetensors file (bad header)") from error
    if end != size:
        raise InputError(f"'{file}' is truncated: {size} bytes, its header says {end}")
    return header


def _no_weights(path: Path) -> str:
    pickles = sorted(file.name for pattern in PICKLES for file in path.glob(pattern))
    if pickles:
        return (
            f"'{path}' holds pickled weights ({pickles[0]}), which are refused because loading "
            "them can run code; convert them to safetensors"
        )
    return f"no safetensors weights ({SINGLE} or {INDEX}) in model folder '{path}'"
