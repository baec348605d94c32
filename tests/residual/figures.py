"""What QERA takes back after each kind of stage that may come before, on held-out text.

    PYTHONPATH=.:tests python tests/residual/figures.py [CHAIN ...]

The bundled model, 3 bits in groups of 32, rank 16. Perplexity as in tests/test_quality.py, beside
that of the untouched model; the share taken back is of what was lost since weights were last
folded, trained or cut, which is what a correction looks at. Minutes of CPU each; ends with an error
where the corrected model is worse.
"""

import sys
import tempfile
from pathlib import Path

from test_quality import DEMO, perplexity

from optpipe import pipeline
from optpipe.lowrank.svdllm import SvdLlm
from optpipe.prune.sparsegpt import SparseGpt
from optpipe.quant.gptq import Gptq
from optpipe.quant.rtn import Rtn
from optpipe.recover.blockwise import Blockwise
from optpipe.residual.qera import Qera
from optpipe.source import Demo
from optpipe.transform.rotate import Rotate
from optpipe.transform.smoothquant import SmoothQuant

PRUNE = {"prune": SparseGpt(pattern="2:4")}
LOWRANK = {"lowrank": SvdLlm(keep=0.8, targets=["*o_proj", "*up_proj"])}
BEFORE = {
    "nothing": {},
    "pruned": PRUNE,
    "recovered": {**PRUNE, "recover": Blockwise()},
    "factorized": LOWRANK,
    "rotated": {"transform": Rotate()},
    "smoothed": {"transform": SmoothQuant()},
}


def main(*wanted):
    dense, worse = perplexity(DEMO), []
    with tempfile.TemporaryDirectory() as store:
        source = Demo()
        baseline = source.prepare(Path(store))
        for name in wanted or BEFORE:
            for quant in (Rtn(bits=3, group_size=32), Gptq(bits=3, group_size=32)):
                stages = {**BEFORE[name], "quant": quant, "residual": Qera()}
                made = list(pipeline.run(pipeline.check(stages, source, Path(store)), baseline))
                costs = [perplexity(artifact.path) / dense - 1 for artifact in made]
                rewrote = [i for i, stage in enumerate(stages.values(), 1) if stage.rewrites]
                known, alone, corrected = costs[max(rewrote, default=0)], costs[-2], costs[-1]
                share = (alone - corrected) / (alone - known)
                kind = f"{name}, {type(quant).__name__}"
                print(f"{kind:18} {alone:+8.2%} to {corrected:+8.2%}, {share:.2f} back, of what "
                      f"was lost since {known:+.2%}", flush=True)  # fmt: skip
                if corrected >= alone:
                    worse.append(kind)
    sys.exit(f"worse when corrected: {', '.join(worse)}" if worse else 0)


if __name__ == "__main__":
    main(*sys.argv[1:])
