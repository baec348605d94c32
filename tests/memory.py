"""What a method takes on a model of random weights: time, peak memory of the process and the GPU.

    python tests/memory.py STORE llama_1b quant=gptq[,FIELD=VALUE] 128 512 [BLOCKS]

quantizes or prunes the shape (conf/model/shapes) on SAMPLES x TOKENS random tokens; with BLOCKS,
only so many decoder blocks of it: all blocks are alike, and so is the peak of each.
"""

import json
import resource
import shutil
import sys
import tempfile
import time
from pathlib import Path

import torch
import yaml
from omegaconf import OmegaConf

from optpipe.config import build, data_dir
from optpipe.source import Random


def shape(name: str, blocks: str | None, folder: Path) -> str:
    if blocks is None:
        return name
    content = yaml.safe_load((data_dir("conf") / f"model/shapes/{name}.yaml").read_text())
    file = folder / "shape.json"
    file.write_text(json.dumps(content | {"num_hidden_layers": int(blocks)}))
    return str(file)


def main(store: str, name: str, method: str, samples: str, tokens: str, blocks: str | None = None):
    started_s = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        source = Random(config=shape(name, blocks, Path(folder))).prepare(Path(store))
    print(f"weights: {source.size_bytes / 1e9:.2f} GB in {time.monotonic() - started_s:.0f} s")
    calib = {"source": "random", "samples": int(samples), "tokens": int(tokens)}
    choice, *fields = method.split(",")
    group, _, option = choice.partition("=")
    node = OmegaConf.load(data_dir("conf") / group / f"{option}.yaml")
    node.merge_with(OmegaConf.from_dotlist(fields))
    stage = build(OmegaConf.create({"calib": calib, "stage": node}).stage)
    out = Path(store) / "out"
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir()
    started_s = time.monotonic()
    shown = [-1]

    def progress(what: str, done: int, total: int) -> None:
        if done - shown[0] >= total // 10:
            shown[0] = done
            print(f"{time.monotonic() - started_s:6.0f} s  {done}/{total}  {what}", flush=True)

    stage.run(source, out, progress)
    peak_gb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    gpu_gb = torch.cuda.max_memory_allocated() / 1e9 if torch.cuda.is_available() else 0.0
    print(
        f"{name} {method} {samples} x {tokens}: {time.monotonic() - started_s:.0f} s, "
        f"peak {peak_gb:.2f} GB, GPU {gpu_gb:.2f} GB"
    )


if __name__ == "__main__":
    main(*sys.argv[1:])
