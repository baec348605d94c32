"""What structured pruning, 2:4 and low rank cost the bundled model and what recovery wins back, on
held-out text.

    PYTHONPATH=.:tests python tests/recover/figures.py [NAME ...] [--workers N]

Chains of stages run in parallel processes, on GPUs where there are any. Perplexity as in
tests/test_quality.py. What is won back is the share of the gap between the model compressed naively
and the untouched one. Ends with an error where less is won than a figure names.
"""

import argparse
import os
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import fields
from hashlib import sha256
from multiprocessing import current_process, get_context
from pathlib import Path

import torch
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
FEW = Calib(samples=16)
WHOLE = Calib(samples=72, tokens=1024)
"""Nearly all of the bundled text, in windows as long as the context."""
FIGURES = {
    "depth": [
        ((Depth(share=share, score="influence", calib=FEW),), (Depth(share=share, calib=FEW),), 0.0)
        for share in (0.125, 0.25)
    ],
    "width": [
        ((Width(compensation="none", **cut),), (Width(**cut), Distill(calib=WHOLE)), 0.7)
        for cut in ({"multiple": 8}, {"mlp": 0.25, "multiple": 64})  # 152 and 192 of 768 channels
    ],
    "sparse24": [
        ((SparseGpt(pattern="2:4"),), (SparseGpt(pattern="2:4"), Blockwise(rate=0.02)), 0.5)
    ],
    "lowrank": [
        ((SvdLlm(targets=t, allocation="uniform"),), (SvdLlm(targets=t), *recovery), least)
        for t in (["*o_proj", "*up_proj"], ["*"])
        for recovery, least in (((), 0.4), ((Blockwise(),), 0.6), ((Distill(calib=WHOLE),), 0.6))
    ],
}
"""By name: a naive chain of stages, a better one, and the share of the gap to be won back."""


def said(chain):
    """The classes of a chain, with the fields that are not as by default."""
    return " | ".join(
        f"{type(stage).__name__}({', '.join(_changed(stage, type(stage)()))})" for stage in chain
    )


def _changed(ours, plain):
    for name in (field.name for field in fields(ours)):
        value, other = getattr(ours, name), getattr(plain, name)
        if isinstance(value, Calib) and value != other:
            yield f"calib: {', '.join(_changed(value, other))}"
        elif value != other:
            yield f"{name}={value}"


def made(folder, chain):
    """Run the last stage of a chain on what the others made; perplexity and seconds."""
    source = Artifact(path=_place(folder, chain[:-1]), format="hf", key="k")
    (out := _place(folder, chain)).mkdir()
    started = time.monotonic()
    chain[-1].run_with(source, BASELINE, out, lambda *_: None)
    spent = time.monotonic() - started
    return perplexity(out), spent


def _place(folder, chain):
    return folder / sha256(said(chain).encode()).hexdigest() if chain else DEMO


def measured(chains, workers):
    """Perplexity after every chain, and after all that it begins with; a table as it goes."""
    parts = {said(chain[:n]): chain[:n] for chain in chains for n in range(1, len(chain) + 1)}
    found, dense = {"": perplexity(DEMO)}, perplexity(DEMO)
    print(f"{dense:8.3f} untouched", flush=True)
    threads = max(os.cpu_count() // workers, 1)
    pool = ProcessPoolExecutor(workers, get_context("spawn"), ready, (threads,))
    with tempfile.TemporaryDirectory() as folder, pool:
        for length in range(1, max(map(len, chains)) + 1):
            names = [name for name, part in parts.items() if len(part) == length]
            jobs = {pool.submit(made, Path(folder), parts[name]): name for name in names}
            for job in as_completed(jobs):
                name = jobs[job]
                found[name], spent = job.result()
                cost = found[name] / dense - 1
                print(f"{found[name]:8.3f} {cost:+8.2%} {spent:5.0f} s  {name}", flush=True)
    return found


def ready(threads):
    """A process of its own share of the cores, and one of the GPUs."""
    torch.set_num_threads(threads)
    if gpus := torch.cuda.device_count():
        torch.cuda.set_device(current_process()._identity[0] % gpus)


def missed(chosen, workers):
    """The figures of which less was reached than they name."""
    chains = [chain for *pair, _ in chosen for chain in pair]
    found = measured(chains, workers)
    for naive, better, least in chosen:
        before, after = found[said(naive)], found[said(better)]
        won = (before - after) / (before - found[""])
        print(f"{won:6.3f} of the gap of {said(naive)}, at least {least} wanted: {said(better)}")
        if won < least:
            yield said(better)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("figures", nargs="*", default=[*FIGURES])
    parser.add_argument("--workers", type=int, default=os.cpu_count())
    options = parser.parse_args()
    chosen = [figure for name in options.figures for figure in FIGURES[name]]
    if under := [*missed(chosen, options.workers)]:
        sys.exit("not reached: " + "; ".join(under))
