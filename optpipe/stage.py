"""One step of the pipeline: a frozen dataclass whose fields are its whole configuration."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from optpipe.artifact import Artifact, Stats

if TYPE_CHECKING:
    from optpipe.checkpoint import Checkpoint
    from optpipe.linear import Layers

Progress = Callable[[str, int, int], None]
"""Called with (what is being done, units done, units in all); the screen makes an ETA of it."""


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What an artifact takes at once, and which key of the config says so."""

    tokens: int
    """Of a row, those of its prompt and of its answer."""
    tokens_key: str | None = None
    """None: it is the model's own context."""
    rows: int | None = None
    """Of a batch; None: as many as memory holds."""
    rows_key: str | None = None


@dataclass(frozen=True, kw_only=True)
class Stage(ABC):
    """Reads one artifact, writes another.

    A subclass adds fields (typed, with units in their docstrings), says what it accepts and
    produces, and implements ``run``. ``__post_init__`` may reject values but never changes them.
    """

    accepts: ClassVar[frozenset[str]] = frozenset({"hf"})
    produces: ClassVar[str] = "hf"
    last: ClassVar[bool] = False
    """No other stage of a torch model may follow: it would make void what this one measured."""
    rewrites: ClassVar[bool] = False
    """Weights no longer stand for those before this stage: folded, trained or cut."""
    compares: ClassVar[bool] = False
    """Corrects weights towards what they were: those of the newest stage that rewrote them."""

    def plan(self, layers: Layers) -> Layers:
        """The form of every linear layer after this stage, from names and shapes alone.

        Raises ValueError if this stage cannot follow what came before (say, a low-rank
        factorization of a pruned layer, which would lose its mask). Runs before any work.
        """
        return layers

    def resize(self, config: Any) -> Any:
        """The transformers config of the new model; only structured pruning makes another one.

        Raises ValueError where the family cannot have it. Runs before any work.
        """
        return config

    def unties(self) -> bool:
        """Whether a head that was the embedding has a weight of its own after this stage."""
        return False

    def inputs(self, model: Checkpoint) -> object:
        """What the result depends on besides ``model`` and the fields, JSON-like; part of the key.

        Say, a hash of a calibration text. ``model`` is what the run starts from, perhaps only its
        config so far. Raises ValueError if this stage cannot work on it. Runs before any work.
        """
        return None

    def follow(self, earlier: Sequence[Stage], model: Checkpoint) -> None:
        """Raise ValueError if this stage cannot work on what ``earlier`` stages make of ``model``.

        For what neither the layers nor the formats tell, such as the type of a KV cache. Runs
        before any work.
        """
        return None  # most can

    def limits(self, limits: Limits, model: Checkpoint) -> Limits:
        """What the new artifact takes at once, given what its source does; never more than that."""
        return limits

    def output_bits(self, layers: Layers, rest: int, float_bits: int) -> float:
        """Upper estimate of the size of the new artifact's weights, bits.

        ``layers`` are those with a weight of their own, as planned; ``rest`` counts the elements
        of all other weights, such as embeddings; the source stores floats in ``float_bits``.
        """
        return sum(form.stored_bits(float_bits) for form in layers.values()) + rest * float_bits

    @abstractmethod
    def run(self, source: Artifact, out: Path, progress: Progress) -> Stats:
        """Write the new artifact into the empty folder ``out``; return what was claimed."""

    def run_with(
        self, source: Artifact, original: Artifact, out: Path, progress: Progress
    ) -> Stats:
        """What the pipeline calls: ``run`` with a model from before compression at hand.

        That is the one the run started from; if the stage ``compares`` and weights were rewritten
        since, what they were rewritten to. A stage that looks at it overrides this one, and its
        ``run`` looks at ``source``.
        """
        return self.run(source, out, progress)
