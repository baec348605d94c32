"""What flows through the pipeline: a folder on disk plus a manifest that says how it was made."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import shutil
import uuid
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import psutil

MANIFEST = "artifact.json"
Stats = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Artifact:
    """A model at one point of the pipeline. Never modified; a stage makes a new one."""

    path: Path
    """Folder that holds the files of this artifact."""
    format: str
    """'hf' (torch), 'onnx', 'ort', 'tensorrt' and others: which stages accept it, what runs it."""
    key: str
    """Hash of all that led here: model, stages, their fields, code. Equal key, equal artifact."""
    lineage: tuple[str, ...] = ()
    """Names of the stages applied so far, oldest first."""
    stats: Stats = field(default_factory=dict)
    """What was claimed and what was found in the files, such as sparsity or bits per weight."""

    made_s: float | None = None
    """How long its stage took, verification aside; None: no stage made it."""
    files: dict[str, int] = field(default_factory=dict)
    """Every file of the artifact with its size in bytes, the manifest aside."""

    @property
    def intact(self) -> bool:
        """Whether all its files are still there, none cut short."""
        return bool(self.files) and all(
            (self.path / name).is_file() and (self.path / name).stat().st_size == size
            for name, size in self.files.items()
        )

    @property
    def name(self) -> str:
        return "+".join(self.lineage) or "baseline"

    @property
    def contents(self) -> list[Path]:
        """Its files; while it is still being made, whatever is in its folder."""
        if self.files:
            return [self.path / name for name in sorted(self.files)]
        return sorted(file for file in self.path.rglob("*") if file.is_file())

    @property
    def size_bytes(self) -> int:
        return sum(file.stat().st_size for file in self.contents)

    @classmethod
    def load(cls, path: Path) -> Artifact:
        record = json.loads((path / MANIFEST).read_text())
        return cls(path=path, **{**record, "lineage": tuple(record["lineage"])})

    @classmethod
    def find(cls, path: Path) -> Artifact | None:
        """The artifact of a folder; None if there is none, or one that is damaged or foreign."""
        try:
            artifact = cls.load(path)
        except (OSError, ValueError, TypeError, KeyError):  # no manifest, or one cut short
            return None
        return artifact if artifact.intact else None


def publish(final: Path, make: Callable[[Path], Artifact]) -> Artifact:
    """Let ``make`` fill a temporary folder beside ``final``, then rename it: all or nothing.

    ``make`` returns the artifact with ``path`` still inside the temporary folder. If another
    process published the same key meanwhile, its folder is kept: equal key, equal artifact.
    """
    temporary = final.with_name(f".{final.name}.{owner()}.{uuid.uuid4().hex}")
    temporary.mkdir(parents=True)
    try:
        record = {k: v for k, v in asdict(make(temporary)).items() if k != "path"}
        found = (file for file in sorted(temporary.rglob("*")) if file.is_file())
        record["files"] = {str(f.relative_to(temporary)): f.stat().st_size for f in found}
        (temporary / MANIFEST).write_text(json.dumps(record, indent=2) + "\n")
        try:
            temporary.rename(final)
        except OSError:  # a folder that is not empty is never replaced
            if not final.is_dir():
                raise
            if Artifact.find(final) is None:  # damaged since it was made
                shutil.rmtree(final)
                temporary.rename(final)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return Artifact.load(final)


def sweep(store: Path) -> None:
    """Remove the temporary folders that processes of this machine left behind when they died."""
    for folder in store.glob(f".*.{platform.node()}.*.*"):
        process = folder.name.split(".")[-2]
        if process.isdigit() and not psutil.pid_exists(int(process)):
            shutil.rmtree(folder, ignore_errors=True)


def owner() -> str:
    """A store may be shared by containers and machines, where process numbers repeat."""
    return f"{platform.node()}.{os.getpid()}"


def fingerprint(*parts: object) -> str:
    """Twelve hex digits of a stable hash; the parts must be JSON-like."""
    text = json.dumps(parts, sort_keys=True, default=_plain)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


@cache
def code(*also: str) -> str:
    """Hash of all of this package that makes artifacts, so that none is reused by other code.

    The benchmark only looks at them, and the training script of the demo makes none: they count
    where they are named, as "bench".
    """
    package, other = Path(__file__).parent, {"bench", "demo"} - {*also}
    sources = sorted(package.rglob("*.py"))
    making = [s for s in sources if s.relative_to(package).parts[0] not in other]
    return hashlib.sha256(b"\0".join(source.read_bytes() for source in making)).hexdigest()[:12]


def _plain(value: object) -> object:
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, Mapping):
        return dict(value)
    raise TypeError(f"cannot fingerprint {value!r}")
