"""The baseline's logits of each window: one file each, kept for later runs where the user wants it.

A sweep then scores its baseline once. What is kept is found again only for the same bytes of the
artifact, computed in the same way on the same machine.
"""

from __future__ import annotations

import hashlib
import json
import platform
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from optpipe.bench import machine
from optpipe.bench.backend import Ids
from optpipe.bench.scenario import hash_ids
from optpipe.bench.worker import Arm, Loaded

MOST_BYTES = 2_000_000_000
"""Logits of a large vocabulary take more room than it takes time to make them again."""


@dataclass(frozen=True, kw_only=True)
class References:
    """A folder of logits, float32 (positions, vocabulary), by the token ids they belong to."""

    folder: Path
    kept: bool

    @contextmanager
    def file(self, ids_S: Ids) -> Iterator[Path]:
        """Where the logits of a window are or will be; gone afterwards unless they are kept."""
        found = self.folder / f"{hash_ids(ids_S)}.npy"
        yield found
        if not self.kept:
            found.unlink(missing_ok=True)


@contextmanager
def references(kept: Path | None) -> Iterator[References]:
    """Of a run that keeps them in a folder; None: of one that does not keep them."""
    if kept is not None:
        kept.mkdir(parents=True, exist_ok=True)
        yield References(folder=kept, kept=True)
        return
    with tempfile.TemporaryDirectory(prefix="optpipe-") as folder:
        yield References(folder=Path(folder), kept=False)


def keep_in(cache: str | None, arm: Arm, content: str, told: Loaded, ids_WS: Ids) -> Path | None:
    """The folder for the logits of an arm, by all that decides their bits; None: do not keep them.

    ``content``: hash of the files of the arm.
    """
    if cache is None or ids_WS.size * told.vocab * 4 > MOST_BYTES:
        return None
    how = [content, told.dtype, told.device, arm.threads, machine.versions(), platform.node()]
    key = hashlib.sha256(json.dumps(how).encode()).hexdigest()[:16]
    return Path(cache).resolve() / key
