"""Recovery on the bundled trained model, a small budget; tests/recover/figures.py has the rest."""

from pathlib import Path

import pytest
import torch

import optpipe
from optpipe import model
from optpipe.calibrate import Calib
from optpipe.checkpoint import Checkpoint
from optpipe.prune.magnitude import Magnitude
from optpipe.recover.blockwise import Blockwise
from optpipe.recover.distill import Distill
from optpipe.structure.width import Width
from optpipe.text import tokenize

DEMO = Path(optpipe.__file__).parent / "demo"
SMALL = Calib(samples=32, tokens=128)


@torch.inference_mode()
def loss(folder):
    """Of 8 windows of held-out text, nats a token."""
    ids = torch.tensor(tokenize(DEMO, (DEMO / "heldout.txt").read_text()))[: 8 * 128]
    return float(
        model.load(Checkpoint(folder))(ids.reshape(8, 128), labels=ids.reshape(8, 128)).loss
    )


@pytest.mark.long
@pytest.mark.parametrize(
    ("damage", "recovery", "least"),
    [
        (Magnitude(pattern="2:4"), Blockwise(tokens=8192, calib=SMALL), 0.6),
        (Width(compensation="none", calib=SMALL), Distill(tokens=8192, calib=SMALL), 0.3),
    ],
)
def test_part_of_what_was_lost_on_held_out_text_comes_back(damage, recovery, least, run):
    damaged = run(damage, DEMO)
    recovered = run(recovery, damaged, DEMO)
    whole, before, after = (loss(folder) for folder in (DEMO, damaged.path, recovered.path))
    assert (before - after) / (before - whole) > least
