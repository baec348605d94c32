"""Where a model comes from: the bundled demo, Hugging Face (a folder or hub id), or a seed."""

from __future__ import annotations

import hashlib
import json
import logging
from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import errors as hub
from huggingface_hub import hf_hub_download, snapshot_download
from omegaconf import OmegaConf
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoConfig

from optpipe import model
from optpipe.artifact import Artifact, code, fingerprint, publish
from optpipe.checkpoint import INDEX, SIDE_FILES, SINGLE, Checkpoint, side_files
from optpipe.config import data_dir, unknown
from optpipe.errors import InputError, one_line
from optpipe.family import FAMILIES
from optpipe.progress import shown

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Source(ABC):
    """The model a run starts from; its artifact is the baseline of every comparison."""

    @cached_property
    @abstractmethod
    def checkpoint(self) -> Checkpoint:
        """The model, checked; its files need not be there yet. Raises InputError."""

    @cached_property
    def key(self) -> str:
        """Hash of every byte that decides what the model computes."""
        checkpoint = self.checkpoint
        log.info("model: reading %s, %.3f GB", checkpoint.path, checkpoint.size_bytes / 1e9)
        model.check_finite(checkpoint)
        return fingerprint([(name, _sha256(checkpoint.path / name)) for name in self._names()])

    def _names(self) -> list[str]:
        """The files that are the model; others may lie in the same folder."""
        found = side_files(self.checkpoint.path)
        return sorted({file.name for file in found} | {*self.checkpoint.files.values()})

    @property
    def size_bytes(self) -> int:
        """Bytes of the weights on disk."""
        return self.checkpoint.size_bytes

    def folder(self, store: Path) -> Path:
        """Where the files are, or will be after :meth:`prepare`."""
        return self.checkpoint.path

    def prepare(self, store: Path) -> Artifact:
        """The baseline; whatever has to be made first is made in ``store``."""
        path = self.folder(store)
        files = {name: (path / name).stat().st_size for name in self._names()}
        return Artifact(path=path, format="hf", key=self.key, files=files)


@dataclass(frozen=True, kw_only=True)
class Demo(Source):
    """The small trained model in this package."""

    @cached_property
    def checkpoint(self) -> Checkpoint:
        return _checked(Checkpoint(Path(__file__).parent / "demo"))


@dataclass(frozen=True, kw_only=True)
class HuggingFace(Source):
    """A folder with config.json and safetensors, or such a repository on the hub."""

    path: str
    """A folder, else an id such as 'Qwen/Qwen3-0.6B'."""
    revision: str | None = None
    """Branch, tag or commit on the hub; null: the default branch."""

    @cached_property
    def checkpoint(self) -> Checkpoint:
        folder = Path(self.path).expanduser()
        return _checked(Checkpoint(folder.resolve() if folder.is_dir() else self._download()))

    def _download(self) -> Path:
        """Fetch config, safetensors and tokenizer; never code, never pickled weights.

        Only weights under the names transformers gives them: a repository may hold them a second
        time, in a format of its authors' own.
        """
        if self.path.startswith((".", "/", "~")) or self.path.count("/") > 1:
            raise InputError(f"model.path: there is no folder '{self.path}'")
        try:
            config = hf_hub_download(self.path, "config.json", revision=self.revision)
            _ = Checkpoint(Path(config).parent).decoder  # refuse a family before its gigabytes
            wanted = [SINGLE, INDEX, "model-*.safetensors", *SIDE_FILES]
            return Path(snapshot_download(self.path, revision=self.revision, allow_patterns=wanted))
        except InputError:
            raise
        except (OSError, ValueError, hub.HTTPError) as error:  # type: ignore[attr-defined]
            raise InputError(
                f"model.path: '{self.path}' is neither a folder nor to be had from the "
                f"Hugging Face hub: {one_line(error)}"
            ) from error


DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}
STD = 0.02
"""Standard deviation of random weights, what most families are initialized with."""


@dataclass(frozen=True, kw_only=True)
class Random(Source):
    """Random weights of a real architecture: for speed, which does not depend on their values."""

    config: str
    """A folder with config.json, a JSON file, or a name from conf/model/shapes."""
    seed: int = 0
    dtype: str = "float16"
    """float16, bfloat16 or float32."""

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, got '{self.dtype}'")

    @cached_property
    def checkpoint(self) -> Checkpoint:
        shape = _read_shape(self.config)
        family = str(shape.pop("model_type", None))
        shape.pop("torch_dtype", None)  # the old name of dtype
        if family not in FAMILIES:
            raise InputError(f"model.config: {unknown('model family', family, FAMILIES)}")
        checkpoint = Checkpoint(Path(f"random-{self.key}"))  # not that folder and its tokenizer
        checkpoint.forms = None
        try:
            checkpoint.config = AutoConfig.for_model(family, **{**shape, "dtype": self.dtype})
            model.parameter_shapes(checkpoint)
        except (ValueError, TypeError, KeyError, hub.StrictDataclassError) as error:
            raise InputError(f"model.config '{self.config}': {one_line(error)}") from error
        return checkpoint

    @cached_property
    def key(self) -> str:
        return fingerprint(_read_shape(self.config), self.seed, self.dtype, code())

    @property
    def size_bytes(self) -> int:
        shapes = model.parameter_shapes(self.checkpoint).values()
        return sum(torch.Size(shape).numel() for shape in shapes) * DTYPES[self.dtype].itemsize

    def folder(self, store: Path) -> Path:
        return store / f"random-{self.key}"

    def prepare(self, store: Path) -> Artifact:
        path = self.folder(store)
        if (found := Artifact.find(path)) is not None:
            log.info("model: reusing %s", path)
            return found
        return publish(path, self._write)

    def _write(self, out: Path) -> Artifact:
        """One file for each decoder block and one for the rest: never the whole model in memory."""
        checkpoint = self.checkpoint
        blocks = [f"{block.name}." for block in checkpoint.decoder.blocks]
        parts: dict[str, list[str]] = {}
        shapes = model.parameter_shapes(checkpoint)
        for name in shapes:
            block = next((b for b in blocks if name.startswith(b)), "rest.")
            parts.setdefault(f"{block}safetensors", []).append(name)
        with shown("model") as progress:
            for index, (file, names) in enumerate(parts.items()):
                progress(file, index, len(parts))
                tensors = {name: self._tensor(name, shapes[name]) for name in names}
                save_file(tensors, out / file, metadata={"format": "pt"})
        weight_map = {name: file for file, names in parts.items() for name in names}
        index_text = json.dumps({"metadata": {}, "weight_map": weight_map}, indent=1)
        (out / INDEX).write_text(index_text + "\n")
        checkpoint.config.architectures = [type(model.empty(checkpoint.config)).__name__]
        checkpoint.config.save_pretrained(out)
        return Artifact(path=out, format="hf", key=self.key)

    def _tensor(self, name: str, shape: tuple[int, ...]) -> Tensor:
        """Seeded by its name, so that it depends on no other tensor."""
        dtype = DTYPES[self.dtype]
        if len(shape) == 1 and name.endswith(".weight"):  # a norm that scales by one
            return torch.full(shape, 1.0 - self.checkpoint.decoder.norm_offset, dtype=dtype)
        digest = hashlib.sha256(f"{self.seed}:{name}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little", signed=True))
        return torch.empty(shape).normal_(std=STD, generator=generator).to(dtype)


def _checked(checkpoint: Checkpoint) -> Checkpoint:
    """Raise InputError unless this is a whole, uncompressed model of a family known here."""
    if getattr(checkpoint.config, "quantization_config", None):
        raise InputError(f"model '{checkpoint.path}' is quantized already; give the original")
    if checkpoint.forms is not None:
        raise InputError(f"model '{checkpoint.path}' is an artifact of optpipe; give the original")
    _ = checkpoint.decoder  # the family first: what is not supported need not be whole
    model.check_complete(checkpoint)
    return checkpoint


def _read_shape(config: str) -> dict[str, Any]:
    """The content of a config.json or of a bundled shape."""
    shapes = {path.stem: path for path in data_dir("conf").glob("model/shapes/*.yaml")}
    file = Path(config).expanduser()
    if file.is_dir():
        file = file / "config.json"
    if not file.is_file() and config not in shapes:
        known = unknown("shape", config, shapes)
        raise InputError(f"model.config: no folder, no JSON file, and {known}")
    try:
        content: Any = json.loads(file.read_text()) if file.is_file() else _plain(shapes[config])
    except (ValueError, OSError) as error:
        raise InputError(f"cannot read model.config '{config}': {one_line(error)}") from error
    if not isinstance(content, dict):
        raise InputError(f"model.config '{config}' holds no JSON object")
    return content


def _plain(shape: Path) -> object:
    return OmegaConf.to_container(OmegaConf.load(shape))


def _sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
