"""Check every stage before the first one works, run them in order, reuse what is already made."""

from __future__ import annotations

import logging
import math
import shutil
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from optpipe.artifact import Artifact, code, fingerprint, publish
from optpipe.errors import GateError, InputError, StageError, TimingError, one_line
from optpipe.family import HEAD
from optpipe.progress import clock, shown
from optpipe.stage import Limits, Progress, Stage

if TYPE_CHECKING:
    from optpipe.linear import Layers
    from optpipe.source import Source

log = logging.getLogger(__name__)
SIDE_BYTES = 1_000_000
"""Config, tokenizer, graph and padding of an artifact, roughly."""


@dataclass(frozen=True, kw_only=True)
class Step:
    """One stage of a run, checked: what it will make, and where."""

    name: str
    stage: Stage
    key: str
    path: Path
    layers: Layers
    """The form of every linear layer after this stage."""
    size_bytes: int
    """Upper estimate of what it writes."""
    limits: Limits

    @property
    def done(self) -> bool:
        return Artifact.find(self.path) is not None


@dataclass(frozen=True)
class Parents:
    """What a step looks at."""

    source: Artifact
    reference: Artifact
    """The newest torch artifact: the source itself, or what a graph was made from."""
    original: Artifact
    """The untouched model, or what weights were last rewritten to."""


def check(stages: Mapping[str, Stage], source: Source, store: Path) -> list[Step]:
    """The steps of a run. Raises InputError if some stage cannot follow the one before it."""
    from optpipe import model, order  # imports torch and transformers

    _check_formats(stages)
    _check_followers(stages)
    checkpoint, key = source.checkpoint, source.key
    decoder, layers = checkpoint.decoder, model.layers(checkpoint)
    shapes = model.parameter_shapes(checkpoint).values()
    elements = sum(math.prod(shape) for shape in shapes)
    float_bits = round(8 * source.size_bytes / elements)
    tied, limits = decoder.tied, Limits(tokens=decoder.context)
    rest = elements - _elements(_owned(layers, tied))
    steps: list[Step] = []
    for name, stage in stages.items():
        try:
            if stage.compares and (by := next((s for s in steps[::-1] if s.stage.rewrites), None)):
                order.check_lost(stage.plan(layers), layers, by.layers, by.name)
            stage.follow([step.stage for step in steps], checkpoint)
            layers, inputs = _planned(stage, layers), stage.inputs(checkpoint)
            limits = stage.limits(limits, checkpoint)
            if (config := stage.resize(checkpoint.config)) is not checkpoint.config:
                checkpoint = checkpoint.planned(config)
                layers = model.layers(checkpoint)
        except ValueError as error:
            raise InputError(f"stage '{name}': {error}") from error
        tied = tied and not stage.unties()
        bits = stage.output_bits(_owned(layers, tied), rest, float_bits)
        kind = f"{type(stage).__module__}.{type(stage).__qualname__}"
        key = fingerprint(key, kind, asdict(stage), inputs, code())
        path = store / f"{name}-{key}"
        size_bytes = int(bits / 8) + SIDE_BYTES
        steps.append(
            Step(name=name, stage=stage, key=key, path=path, layers=layers, size_bytes=size_bytes,
                 limits=limits)
        )  # fmt: skip
    return steps


def _planned(stage: Stage, layers: Layers) -> Layers:
    """The plan of a stage, which must take whatever one before it may settle on."""
    from optpipe import bounds  # imports torch

    for choice in bounds.settled(layers):
        stage.plan(choice)
    return stage.plan(layers)


def _owned(layers: Layers, tied: bool) -> Layers:
    """Without a head that is the embedding by another name."""
    return {n: f for n, f in layers.items() if not (tied and n == HEAD and f.bits is None)}


def _elements(layers: Layers) -> int:
    return sum(form.rows * form.cols for form in layers.values())


def check_writable(folder: Path, what: str) -> None:
    """Raise InputError unless ``folder`` exists or can be made, and a file can be written there."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(b"optpipe")
    except OSError as error:
        raise InputError(f"cannot write to {what} '{folder}': {error.strerror}") from error


def check_space(steps: list[Step], source: Source, store: Path) -> None:
    """Raise InputError if the disk cannot hold what is still to be made."""
    needed = sum(step.size_bytes for step in steps if not step.done)
    if not source.folder(store).exists():
        needed += source.size_bytes
    free = shutil.disk_usage(store).free
    if needed > free:
        raise InputError(
            f"store '{store}' has {free / 1e6:,.1f} MB free, but this run may write "
            f"{needed / 1e6:,.1f} MB; free some space or give another folder: store=..."
        )


def run(steps: list[Step], baseline: Artifact) -> Iterator[Artifact]:
    """Yield the baseline, then the artifact of each step."""
    yield baseline
    artifact = torch_side = rewritten = baseline
    for step in steps:
        original = rewritten if step.stage.compares else baseline
        artifact = _take(step, Parents(artifact, torch_side, original))
        if artifact.format == "hf":
            torch_side = artifact
        if step.stage.rewrites:
            rewritten = artifact
        yield artifact


@contextmanager
def failing_as(name: str) -> Iterator[None]:
    """Whatever breaks inside is a failure of the stage ``name``; the log gets the traceback."""
    try:
        yield
    except (GateError, StageError, TimingError):
        raise
    except Exception as error:  # the boundary: a stage may raise anything
        kind = "" if isinstance(error, InputError) else f"{type(error).__name__}: "
        raise StageError(f"stage '{name}' failed: {kind}{one_line(error)}") from error


def _take(step: Step, parents: Parents) -> Artifact:
    """The artifact of one step, made or found."""
    lineage = (*parents.source.lineage, step.name)
    if (found := Artifact.find(step.path)) is not None:
        log.info("%s: reusing %s", step.name, step.path)
        return replace(found, lineage=lineage)
    log.info("%s: %s", step.name, step.stage)
    started_s = time.monotonic()
    with failing_as(step.name), shown(step.name) as progress:
        artifact = publish(step.path, lambda out: _make(step, out, parents, progress))
    log.info("%s: %s -> %s", step.name, clock(time.monotonic() - started_s), step.path)
    return replace(artifact, lineage=lineage)


def _make(step: Step, out: Path, parents: Parents, progress: Progress) -> Artifact:
    """Run the stage, and look at what it made before anyone else can see it."""
    from optpipe.verify import verify  # imports torch

    started_s = time.monotonic()
    stats = step.stage.run_with(parents.source, parents.original, out, progress)
    artifact = Artifact(
        path=out,
        format=step.stage.produces,
        key=step.key,
        lineage=(*parents.source.lineage, step.name),
        stats=stats,
        made_s=time.monotonic() - started_s,
    )
    progress("verifying", 1, 1)
    verified = verify(artifact, parents.reference, step.layers)
    return replace(artifact, stats={**stats, "verified": verified})


def _check_formats(stages: Mapping[str, Stage]) -> None:
    made, maker = "hf", "the model"
    for name, stage in stages.items():
        if made not in stage.accepts:
            raise InputError(
                f"stage '{name}' accepts {' or '.join(sorted(stage.accepts))}, but gets {made} "
                f"from {maker}; {_advice(stages)}"
            )
        made, maker = stage.produces, f"stage '{name}'"


def _check_followers(stages: Mapping[str, Stage]) -> None:
    closed = None
    for name, stage in stages.items():
        if closed and stage.produces == "hf":
            raise InputError(
                f"stage '{name}' would make void what stage '{closed}' measured; put '{closed}' "
                "after all others that make a torch model"
            )
        closed = name if stage.last else closed


def _advice(stages: Mapping[str, Stage]) -> str:
    order = _order(stages, "hf")
    if order is None:
        return "no order of these stages fits, so one is missing"
    return f"a possible order: stages=[{','.join(order)}]"


def _order(left: Mapping[str, Stage], made: str) -> list[str] | None:
    """An order of all these stages that fits, as close to theirs as possible."""
    if not left:
        return []
    for name, stage in left.items():
        if made in stage.accepts:
            others = {other: left[other] for other in left if other != name}
            rest = _order(others, stage.produces)
            if rest is not None:
                return [name, *rest]
    return None
