"""What a share of sparsity for every block wins over the same for all, on held-out text.

    PYTHONPATH=.:tests python tests/prune/figures.py [sparsegpt] [wanda] [0.5] [0.6] [0.7]

Perplexity as in tests/test_quality.py, beside that of the untouched model. Minutes of CPU a row of
the allocator. Ends with an error where it is worse than uniform.
"""

import sys
import tempfile
import time
from pathlib import Path

from test_quality import DEMO, perplexity

from optpipe.artifact import Artifact
from optpipe.prune.allocated import ALLOCATIONS, ALLOCATOR, UNIFORM
from optpipe.prune.sparsegpt import SparseGpt
from optpipe.prune.wanda import Wanda

METHODS = {"sparsegpt": SparseGpt, "wanda": Wanda}
SPARSITIES = 0.5, 0.6, 0.7


def row(stage, dense):
    """Perplexity after a stage, relative to the untouched model."""
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder)
        stats = stage.run(Artifact(path=DEMO, format="hf", key="k"), out, lambda *_: None)
        spent = time.monotonic() - started
        ratio = perplexity(out) / dense
    blocks = [f"{s:.2f}" for n, s in stats.get("sparsities", {}).items() if n.endswith("q_proj")]
    name = f"{type(stage).__name__} {stage.sparsity} {stage.allocation}"
    print(f"{name:28} {ratio - 1:+9.2%} {spent:5.0f} s  {' '.join(blocks)}", flush=True)
    return ratio


def main(*wanted):
    dense, worse = perplexity(DEMO), []
    for name in [n for n in METHODS if n in wanted] or METHODS:
        for sparsity in [s for s in SPARSITIES if str(s) in wanted] or SPARSITIES:
            stages = (METHODS[name](sparsity=sparsity, allocation=kind) for kind in ALLOCATIONS)
            ratios = {stage.allocation: row(stage, dense) for stage in stages}
            if ratios[ALLOCATOR] > ratios[UNIFORM]:
                worse.append(f"{name} {sparsity}")
    sys.exit(f"the allocator is worse than uniform: {', '.join(worse)}" if worse else 0)


if __name__ == "__main__":
    main(*sys.argv[1:])
