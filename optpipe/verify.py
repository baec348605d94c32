"""What must hold after every stage: the artifact loads, is finite, is what it claims, agrees.

A compressed checkpoint is read back and held against its plan: forms, grids, masks, ranks. A graph
or an engine is run beside the torch model it was made from: prompts of two lengths, a filled cache
decoded for several steps, a chunk fed on top of it, a batch of rows of different lengths, and where
layers look at a window only, a prompt longer than that.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from optpipe import model
from optpipe.artifact import Artifact, Stats, owner
from optpipe.bench.backend import Backend, backend_class, open_backend
from optpipe.bench.machine import usable_cores
from optpipe.blockwise import final_logits
from optpipe.bounds import departure
from optpipe.build.tensorrt import check_files
from optpipe.build.twin import exact_checkpoint, exact_graph, runnable_graph
from optpipe.checkpoint import Checkpoint
from optpipe.claims import check_claims, layer_facts
from optpipe.errors import GateError
from optpipe.export.readback import READERS, read_back
from optpipe.linear import Layers

TOLERANCES = {"float32": 2e-4, "float16": 1e-2, "bfloat16": 8e-2, "int8": 5e-2, "rounded": 0.5,
              "four_bits": 1.0}  # fmt: skip
"""Largest accepted error of the logits at any position, relative to their spread there: the root
mean square of the differences over the standard deviation of the reference. In 'float16' a weight
that is a code times a scale is rounded once more: the worst position of the demo model was off by
2.7e-3, in int4 by 5.1e-3, in fp8 by 6.2e-3. 'int8', for engines
that round activations to 8 bits before each product, bounds the mean over the positions instead: a
trained model has outliers among its activations, so that a typical position is off by 2 %, one in
fifty by 20 %, while held-out perplexity is the same to 0.1 %. 'rounded', for layers that round
their inputs, does so, too: an input between two codes goes up on one side and down on the other,
and random tokens, which mean nothing to a trained model, are moved far by that. In both cases the
same model with float activations must agree as float32 does at every position, so that these bounds
hide no wrong graph. 'four_bits' is 'rounded' for inputs in nvfp4 to weights in 16 bits: one weight
in the last place moves codes all over (mean 0.33 on the demo model in float16, 1.4 if unrelated),
while both in float32 agree to 1e-8. 'bfloat16' graphs are run in float32 with the values of their
weights.
"""

ADVICE = {
    "int8": "; with float activations it agrees, so the graph is right but this model does not "
    "stand activations in 8 bits: set build.accuracy_level=1"
}

PROMPTS = (24, 7)
DECODE_STEPS = 8
CHUNK = 5
SEED = 0


@dataclass(frozen=True)
class Parity:
    """How far two runtimes are apart. Errors are relative to the spread of the logits."""

    worst: float
    mean: float
    kind: str
    positions: int

    @property
    def bounded(self) -> float:
        """The error that the tolerance of its kind is about."""
        by_mean = self.kind in ("int8", "rounded", "four_bits")
        return self.mean if by_mean else self.worst


def verify(artifact: Artifact, reference: Artifact, planned: Layers | None) -> Stats:
    """Check a new artifact; ``reference`` is the newest torch artifact behind it.

    For a torch artifact that is its parent, whose masks it must keep. Returns what was found.
    Raises GateError.
    """
    if artifact.format == "hf":
        return verify_checkpoint(artifact, reference, planned)
    if artifact.format == "tensorrt":
        return verify_plan(artifact, reference, planned)
    # it computes what its torch model does, so it has the zeros and the ranks of that one
    same = reference.stats.get("verified", {})
    facts = {key: same[key] for key in ("parameters", "sparsity", "ranks") if key in same}
    if artifact.format in READERS:
        return {**facts, "read_back": read_back(artifact, reference)}
    source = Checkpoint(reference.path)
    inputs = {form.inputs for form in model.layers(source).values()} - {None}
    rounds = source.cache is not None or bool(inputs)
    narrow = artifact.stats.get("dtype") == "bfloat16"
    blocks = "blocks" in artifact.stats
    if not (rounds or narrow or blocks or artifact.stats.get("int8_activations")):
        return {**facts, "parity": asdict(parity(artifact, reference))}
    beside = artifact.path.parent  # on the same disk
    with tempfile.TemporaryDirectory(dir=beside, prefix=f".twin.{owner()}.") as folder:
        exact = _twins(artifact, reference, Path(folder), rounds)
        exactly = parity(*exact, "bfloat16" if narrow else None)
        if blocks and rounds:
            artifact = _runnable(artifact, Path(folder))
        elif narrow or blocks:  # which ONNX Runtime cannot multiply
            return {**facts, "parity": asdict(exactly)}
        four = "nvfp4_block" in inputs and artifact.stats.get("dtype") != "float32"
        kind = "four_bits" if four else "rounded" if rounds else "int8"
        rounded = parity(artifact, reference, kind)
    return {**facts, "parity": asdict(rounded), "parity_float_activations": asdict(exactly)}


def _twins(
    artifact: Artifact, reference: Artifact, folder: Path, rounds: bool
) -> tuple[Artifact, Artifact]:
    """Both without any rounding of activations."""
    graph, checkpoint = folder / "graph", folder / "checkpoint"
    graph.mkdir()
    exact_graph(artifact.path, graph)
    if rounds:
        checkpoint.mkdir()
        exact_checkpoint(reference.path, checkpoint)
        reference = replace(reference, path=checkpoint)
    return replace(artifact, path=graph), reference


def _runnable(artifact: Artifact, folder: Path) -> Artifact:
    """The graph with the same rounding, in operators that ONNX Runtime has."""
    (out := folder / "runnable").mkdir()
    runnable_graph(artifact.path, out)
    return replace(artifact, path=out)


def verify_plan(artifact: Artifact, reference: Artifact, planned: Layers | None) -> Stats:
    """The graph that was built, on ONNX Runtime; the plan itself where there is a GPU for it."""
    check_files(artifact.path)
    graph = replace(artifact, format="onnx")
    found = verify(graph, reference, planned)
    with tempfile.TemporaryDirectory(dir=graph.path.parent, prefix=f".twin.{owner()}.") as folder:
        narrow = artifact.stats.get("dtype") == "bfloat16" or "blocks" in artifact.stats
        check_full(_twins(graph, reference, Path(folder), False)[0] if narrow else graph)
    if backend_class(artifact.format).missing(artifact) is None:
        found["parity_plan"] = asdict(parity(artifact, reference))
    return found


def check_full(artifact: Artifact) -> None:
    """Raise GateError unless one token more than the cache holds is refused."""
    with open_backend(artifact, usable_cores()) as engine:
        try:
            engine.score(np.zeros((1, engine.capacity + 1), np.int64))
        except ValueError:
            return
    raise GateError(f"'{artifact.name}' takes more than the {engine.capacity} tokens it holds")


def verify_checkpoint(artifact: Artifact, parent: Artifact, planned: Layers | None) -> Stats:
    checkpoint = Checkpoint(artifact.path)
    forms = model.layers(checkpoint)
    if planned is not None and (name := departure(forms, planned)) is not None:
        raise GateError(f"layer '{name}' became {forms.get(name)}, planned {planned.get(name)}")
    trained = "trained_tokens" in artifact.stats
    facts = layer_facts(checkpoint, forms, Checkpoint(parent.path), trained)
    check_claims(artifact.stats, facts)
    ids_T = torch.from_numpy(_ids(checkpoint.decoder.vocab, 1, PROMPTS[0])[0])
    if not bool(torch.isfinite(final_logits(checkpoint, ids_T)).all()):
        raise GateError(f"the model after '{artifact.name}' gives logits that are not finite")
    return facts


def parity(artifact: Artifact, reference: Artifact, kind: str | None = None) -> Parity:
    """Run both and compare their logits. Raises GateError above the tolerance of ``kind``, by
    default the dtype of the artifact.
    """
    cores = usable_cores()
    blocks = Checkpoint(reference.path).decoder.blocks
    windows = {block.window for block in blocks if block.window}
    with open_backend(reference, cores) as torch_side, open_backend(artifact, cores) as other:
        kind = kind or other.dtype
        errors = np.concatenate([
            _errors(ours, theirs) for ours, theirs in _compared(torch_side, other, windows)
        ])  # fmt: skip
    found = Parity(float(errors.max()), float(errors.mean()), kind, errors.size)
    if not found.bounded <= TOLERANCES[kind]:  # also false for NaN
        raise GateError(
            f"'{artifact.name}' disagrees with '{reference.name}': relative logit error "
            f"{found.bounded:.2e} exceeds {TOLERANCES[kind]:.0e} ({kind}){ADVICE.get(kind, '')}"
        )
    return found


def _compared(
    left: Backend, right: Backend, windows: set[int]
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Pairs of logits (rows, positions, V) of the same tokens from both sides."""
    most = right.capacity - DECODE_STEPS - CHUNK
    long = min(PROMPTS[0], most)
    short = min(PROMPTS[1], long)
    beyond = [(1, window + CHUNK) for window in windows if window + CHUNK <= most]
    for rows, tokens in ((1, long), (1, short), (2, long), *beyond):
        ids = _ids(left.vocab, rows, tokens + DECODE_STEPS + CHUNK)
        lengths = np.array([tokens, short][:rows])
        yield _both(left, right, lambda b, i=ids, n=lengths: b.prefill(i[:, : n.max()], n))
        for step in range(tokens, tokens + DECODE_STEPS):
            yield _both(left, right, lambda b, t=ids[:, step]: b.decode(t))
        yield _both(left, right, lambda b, c=ids[:, -CHUNK:]: b.extend(c))


def _both(left: Backend, right: Backend, call: Any) -> tuple[np.ndarray, np.ndarray]:
    return np.array(call(left)), np.array(call(right))


def _errors(ours: np.ndarray, theirs: np.ndarray) -> np.ndarray:
    ours, theirs = (x.reshape(-1, x.shape[-1]).astype(np.float64) for x in (ours, theirs))
    rms = np.sqrt(np.mean((ours - theirs) ** 2, axis=-1))
    return np.asarray(rms / ours.std(axis=-1))


def _ids(vocab: int, rows: int, tokens: int) -> np.ndarray:
    return np.random.default_rng(SEED).integers(0, vocab, (rows, tokens))
