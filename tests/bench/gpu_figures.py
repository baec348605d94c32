"""Figures of a GPU that have no threshold: python tests/bench/gpu_figures.py [PART..]

decode  a step of llama_1b in bfloat16: one graph against kernel by kernel, by batch and depth
aa      two identical workers of it in 20 blocks, with turns of several lengths; then its energy
flow    recipe=int4_ort of llama_160m: torch on the GPU, ONNX Runtime on the CPU
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from optpipe.artifact import Artifact
from optpipe.bench import energy, nvml
from optpipe.bench.backend import open_backend
from optpipe.bench.evidence.dependence import paired
from optpipe.bench.evidence.statistics import log_ratios
from optpipe.bench.resident import reside
from optpipe.bench.scenario import Cell, Scenario
from optpipe.bench.timed import blocks
from optpipe.bench.timed.measure import BenchConfig, Measured, Session, measure
from optpipe.bench.timed.series import collect, pairs
from optpipe.bench.worker import Arm, Iterate
from optpipe.source import Random

ROOT = Path(__file__).resolve().parents[2]
CELLS = [Cell("single", 1, 128, 64), Cell("prefill_only", 8, 2040, 1)]
AA = ("baseline", "same")
TURNS_S = (0.05, 0.5, 1.0)


def artifact(store: Path, shape: str) -> Artifact:
    return Random(config=shape, dtype="bfloat16").prepare(store)


def decode(store: Path) -> None:
    """Time of a step, wall and device, median of 63; and whether both say the same tokens."""
    made = artifact(store, "llama_1b")
    print("batch x depth: kernel by kernel ms (device) | one graph ms (device) | same tokens")
    with open_backend(made, dtype="bfloat16") as backend:
        for batch, depth in ((1, 128), (1, 2048), (16, 512), (8, 4096)):
            ids_BS = np.random.default_rng(0).integers(0, backend.vocab, (batch, depth))
            row, tokens = [f"{batch} x {depth}:"], []
            for graphed in (False, True):
                backend.graphed = graphed
                for _ in range(2):
                    start = time.perf_counter()
                    found = Iterate(ids_BS=ids_BS, new_tokens=64)(backend)
                    taken = time.perf_counter() - start
                gaps = np.diff(np.array(found.trace.token_ns)) / 1e6
                device = 1e3 * statistics.median(found.device_s[1:])
                row.append(f"{np.median(gaps):.3f} ({device:.3f}), whole {taken:.3f} s, "
                           f"peak {found.peak_bytes / 1e9:.2f} GB |")  # fmt: skip
                tokens.append(found.trace.tokens_NB)
            same = float((tokens[0] == tokens[1]).mean())
            print(*row, f"{same:.1%}", flush=True)


def aa(store: Path) -> None:
    """Half widths, and what a ratio is made of: position, neighbours, the first of a turn."""
    made = artifact(store, "llama_1b")
    arms = [Arm(name=n, artifact=made, dtype="bfloat16", threads=1) for n in AA]
    with reside(arms, lambda *_: None) as residents:
        assert not residents.broken, residents.broken
        session = Session(number=0, workers=residents.workers, loaded=residents.loaded,
                          budget_s=600.0)  # fmt: skip
        for turn_s in TURNS_S:
            found = Measured(scenarios={cell.scenario: Scenario() for cell in CELLS})
            config = BenchConfig(blocks=20, processes=1, max_processes=1, turn_s=turn_s)
            start = time.perf_counter()
            measure(session, CELLS, config, found, lambda *_: None)
            print(f"turn {turn_s} s, took {time.perf_counter() - start:.0f} s", flush=True)
            for cell in CELLS:
                for metric in ("ttft_s", "tpot_s"):
                    resolved(found, cell, metric)
            for gpu in nvml.gpus():
                print(" ", *(gpu[k] for k in ("uuid", "sm_mhz", "power_w", "clocks_limited_by")))


def joules(store: Path) -> None:
    """Of llama_1b in bfloat16, one worker."""
    arm = Arm(name="baseline", artifact=artifact(store, "llama_1b"), dtype="bfloat16", threads=1)
    with reside([arm], lambda *_: None) as residents:
        session = Session(number=0, workers=residents.workers, loaded=residents.loaded,
                          budget_s=600.0)  # fmt: skip
        config, found = BenchConfig(energy_s=12), Measured()
        energy.measure_energy(session, CELLS, config, found, lambda *_: None)
    for (_, cell), told in found.energy.items():
        print(cell, told, flush=True)


def resolved(found: Measured, cell: Cell, metric: str) -> None:
    turns = {name: collect(found.samples).get((name, cell)) for name in AA}
    if None in turns.values():
        print("  nothing of", cell, found.dead, found.dropped)
        return
    base, own = (turns[name] for name in AA)
    before, after = pairs(base, own, metric)
    if not before:
        return
    logs = np.array(log_ratios(before, after))
    shift = paired(list(logs), 0.95)
    position = {(s.arm, s.block): s.position for s in found.samples if s.cell == cell}
    sign = np.array([1 if position["baseline", s] == 0 else -1
                     for s in sorted({s.block for s in base.samples})])  # fmt: skip
    series = [s.metrics[metric] for s in base.samples]
    first = [s.metrics[metric] for s in base.samples if s.iteration == 0]
    last = [s.metrics[metric] for s in base.samples if s.iteration]
    half = (shift.ci[1] - shift.ci[0]) / 2
    two = (logs[0::2] + logs[1::2][: len(logs[0::2])]) / 2 if len(logs) % 2 == 0 else logs
    print(f"  {cell.scenario} {metric}: +-{half:.2%} ratio {shift.estimate:+.3%}, "
          f"sd {logs.std(ddof=1):.2%}, rho {shift.rho:.2f}, by position "
          f"{(sign * logs).mean() / 2:+.2%}, of block pairs "
          f"+-{2.26 * two.std(ddof=1) / len(two) ** 0.5:.2%}, median {np.median(series) * 1e3:.3f} "
          f"ms, spread {np.std(series) / np.mean(series):.2%}, first/later "
          f"{np.median(first) / np.median(last or first):.4f}, "
          f"tainted {sum(s.reason == 'tainted' for s in found.samples if s.cell == cell)}",
          flush=True)  # fmt: skip
    print("   ", " ".join(f"{100 * x:+.2f}" for x in logs))


def flow(store: Path) -> None:
    """The whole flow where torch has a GPU and ONNX Runtime has none."""
    command = [
        sys.executable, "-m", "optpipe", "recipe=int4_ort", "model=random",
        "model.config=llama_160m", "calib=random", "calib.samples=8", "scenario=[single]",
        "bench.dtypes=[bfloat16]", "bench.budget_s=60", "bench.quality.windows=1",
        "bench.quality.cache=null", f"store={store}/store", f"hydra.run.dir={store}/out",
    ]  # fmt: skip
    start = time.perf_counter()
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    done = subprocess.run(command, cwd=store, env={**os.environ, "PYTHONPATH": path},
                          stdout=sys.stdout, stderr=subprocess.STDOUT)  # fmt: skip
    print(f"exit code {done.returncode} after {time.perf_counter() - start:.0f} s")
    if (store / "out" / "report.md").is_file():
        print((store / "out" / "report.md").read_text()[:7000])
        ceilings = json.loads((store / "out" / "report.json").read_text())["run"]["ceilings"]
        print("ceilings of", {k: {d: v["bytes_per_s"] for d, v in of.items()} for k, of in
                              ceilings.items()})  # fmt: skip


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition(":")[0])
    parser.add_argument("parts", nargs="*", default=["decode", "aa", "energy", "flow"])
    parser.add_argument("--settle", type=float, default=blocks.SETTLE_S)
    asked = parser.parse_args()
    blocks.SETTLE_S = asked.settle
    with tempfile.TemporaryDirectory() as folder:
        for part in asked.parts:
            print(f"== {part}", flush=True)
            {"decode": decode, "aa": aa, "energy": joules, "flow": flow}[part](Path(folder))
