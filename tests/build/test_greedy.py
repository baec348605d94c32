"""The engine writes what the torch model it was made from writes: 64 greedy tokens for 20 prompts.

Both sides are fed the torch model's tokens, so that one difference does not hide the next. A
difference counts as a near tie if torch's own lead of its first over its second choice is below
what parity allows the logits to differ by; anything else fails.
"""

from pathlib import Path

import numpy as np
import pytest

import optpipe
from optpipe.artifact import Artifact
from optpipe.bench.backend import open_backend
from optpipe.build.ort import Ort
from optpipe.checkpoint import Checkpoint
from optpipe.export.onnx import Onnx
from optpipe.quant.rtn import Rtn
from optpipe.text import tokenize
from optpipe.verify import TOLERANCES

PROMPTS, NEW_TOKENS = 20, 64
DEMO = Path(optpipe.__file__).parent / "demo"


def disagreements(reference, engine, prompts, tolerance):
    """(near ties, real differences) over all prompts and tokens."""
    lengths = np.full(len(prompts), prompts.shape[1])
    near = wrong = 0
    with open_backend(reference) as ours, open_backend(engine) as theirs:
        expected, found = (np.array(b.prefill(prompts, lengths)) for b in (ours, theirs))
        for _ in range(NEW_TOKENS):
            tokens = expected.argmax(-1)
            differs = tokens != found.argmax(-1)
            top = np.partition(expected, -2, axis=-1)[:, -2:]
            tie = top[:, 1] - top[:, 0] < tolerance * expected.std(-1)
            near, wrong = near + int((differs & tie).sum()), wrong + int((differs & ~tie).sum())
            expected, found = (np.array(b.decode(tokens)) for b in (ours, theirs))
    return near, wrong


def heldout(folder, tokens):
    ids = np.array(tokenize(folder, (DEMO / "heldout.txt").read_text()))
    starts = np.linspace(0, len(ids) - tokens, PROMPTS).astype(int)
    return np.stack([ids[start : start + tokens] for start in starts])


def engine_of(run, artifact, accuracy_level):
    canonical = run(Onnx(), artifact)
    return run(Ort(accuracy_level=accuracy_level), canonical)


@pytest.mark.parametrize("bits, accuracy_level", [(None, 1), (4, 1), (4, 4)])
def test_every_family(family, tiny, run, bits, accuracy_level):
    source = Artifact(path=tiny(family), format="hf", key="k")
    if bits:
        source = run(Rtn(bits=bits, group_size=32), source)
    prompts = np.random.default_rng(0).integers(3, 288, (PROMPTS, 24))
    tolerance = TOLERANCES["int8" if bits and accuracy_level == 4 else "float32"]
    engine = engine_of(run, source, accuracy_level)
    near, wrong = disagreements(source, engine, prompts, tolerance)
    assert wrong == 0
    assert near <= (0 if accuracy_level == 1 else 0.05 * PROMPTS * NEW_TOKENS)


@pytest.mark.parametrize("bits, accuracy_level", [(None, 1), (4, 4)])
def test_the_demo_model(run, bits, accuracy_level):
    source = Artifact(path=DEMO, format="hf", key="k")
    if bits:
        source = run(Rtn(bits=bits, group_size=32), source)
    engine = engine_of(run, source, accuracy_level)
    tolerance = TOLERANCES["int8" if accuracy_level == 4 else "float32"]
    prompts = heldout(DEMO, 48)
    near, wrong = disagreements(source, engine, prompts, tolerance)
    assert wrong == 0
    assert near <= (0 if accuracy_level == 1 else 0.05 * PROMPTS * NEW_TOKENS)
    assert Checkpoint(source.path).decoder.context >= 48 + NEW_TOKENS
