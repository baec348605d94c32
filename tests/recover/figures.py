"""What structured pruning costs the bundled model and what recovery wins back, on held-out text.

    PYTHONPATH=.:tests python tests/recover/figures.py [depth] [width] [sparse24] [lowrank]

Minutes of CPU each. Perplexity as in tests/test_quality.py. The share won back is that of the gap
between the compressed and the untouched model. Ends with an error where less is reached than what
each figure names.
"""

import sys
import tempfile
import time
from pathlib import Path

from test_quality import DEMO, perplexity

from optpipe.artifact import Artifact
from optpipe.calibrate import Calib
from optpipe.lowrank.svdllm import SvdLlm
from optpipe.prune.sparsegpt import SparseGpt
from optpipe.recover.blockwise import Blockwise
from optpipe.recover.distill import Distill
from optpipe.structure.depth import Depth
from optpipe.structure.width import Width

BASELINE = Artifact(path=DEMO, format="hf", key="b")


class Figures:
    def __init__(self, folder):
        self.folder, self.missed = folder, []
        self.dense = perplexity(DEMO)
        print(f"{'untouched':44} {self.dense:7.3f}", flush=True)

    def made(self, name, stage, source=BASELINE):
        """The artifact and its perplexity."""
        out = self.folder / str(len([*self.folder.iterdir()]))
        out.mkdir()
        started = time.monotonic()
        stage.run_with(source, BASELINE, out, lambda *_: None)
        spent = time.monotonic() - started
        found = perplexity(out)
        print(f"{name:44} {found:7.3f} {found / self.dense - 1:+8.1%} {spent:6.0f} s", flush=True)
        return Artifact(path=out, format="hf", key="k"), found

    def won(self, before, after, least):
        share = (before - after) / (before - self.dense)
        print(f"    {share:.2f} of the gap won back, at least {least} wanted", flush=True)
        if share < least:
            self.missed.append(share)


def depth(figures):
    calib = Calib(samples=16)
    for share in (0.125, 0.25):
        names = ("influence", "greedy")
        stages = {name: Depth(share=share, score=name, calib=calib) for name in names}
        by = {name: figures.made(f"depth {share}, {name}", s)[1] for name, s in stages.items()}
        if by["greedy"] > by["influence"]:
            figures.missed.append(by)


def width(figures):
    """The gap is that of the plain cut; compensation alone closes most of it."""
    _, before = figures.made("width, no compensation", Width(compensation="none"))
    figures.made("width, compensation by bias", Width(compensation="bias"))
    narrow, _ = figures.made("width, compensation by weights", Width())
    _, after = figures.made("  + distill", Distill(tokens=65_536), narrow)
    figures.won(before, after, 0.7)


def sparse24(figures):
    pruned, before = figures.made("2:4 SparseGPT", SparseGpt(pattern="2:4"))
    _, after = figures.made("  + blockwise", Blockwise(rate=0.02), pruned)
    figures.won(before, after, 0.5)


def lowrank(figures):
    targets = ["*o_proj", "*up_proj"]
    factors, before = figures.made("SVD-LLM 80 %", SvdLlm(keep=0.8, targets=targets))
    _, after = figures.made("  + blockwise", Blockwise(), factors)
    figures.won(before, after, 0.6)


if __name__ == "__main__":
    chosen = sys.argv[1:] or ["depth", "width", "sparse24", "lowrank"]
    with tempfile.TemporaryDirectory() as folder:
        figures = Figures(Path(folder))
        for name in chosen:
            globals()[name](figures)
    sys.exit(f"not reached: {figures.missed}" if figures.missed else 0)
