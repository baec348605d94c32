"""Our int4 engine, transformers and onnxruntime-genai on the same weights, interleaved in one run.

    pip install onnxruntime-genai onnx-ir --no-deps
    python tests/bench/peers.py --shape llama_160m --threads 2

Prints how many times faster our engine is than each of them, with its 95 % interval.
onnxruntime-genai quantizes the same checkpoint with its own builder (int4, blocks of 32, int8
activations: the settings of our engine); transformers generates with its own cache in float32.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

import optpipe
from optpipe.artifact import Artifact
from optpipe.bench.backend import Backend, Ids, Logits, backend_class
from optpipe.bench.evidence.statistics import ratio
from optpipe.bench.timed.clock import Trace
from optpipe.bench.worker import Arm, Worker
from optpipe.build.ort import Ort
from optpipe.export.onnx import Onnx
from optpipe.pipeline import check, run
from optpipe.quant.rtn import Rtn
from optpipe.source import Random

DEMO = Path(optpipe.__file__).parent / "demo"


class Peer(Backend):
    """A runtime that generates whole answers by itself."""

    dtype = device = "its own"
    weight_bytes = vocab = 0
    capacity = 1 << 30

    def prefill(self, ids_BS: Ids, lengths_B: Ids) -> Logits:
        raise AssertionError

    decode = extend = score = prefill  # type: ignore[assignment]

    def close(self) -> None:
        del self.model

    def generate(self, ids_BS: Ids, new_tokens: int) -> list[int]:
        """When each token was known, nanoseconds."""
        raise AssertionError


class Transformers(Peer):
    def __init__(self, artifact: Artifact, threads: int, dtype: str) -> None:
        import torch
        from transformers import AutoModelForCausalLM

        torch.set_num_threads(threads)
        self.model = AutoModelForCausalLM.from_pretrained(artifact.path, dtype=torch.float32)

    def generate(self, ids_BS: Ids, new_tokens: int) -> list[int]:
        import torch

        stamps: list[int] = []

        class Stamps:  # a streamer is handed the prompt first, then every token
            def put(self, _: Any) -> None:
                stamps.append(time.perf_counter_ns())

            def end(self) -> None:
                pass

        ids = torch.from_numpy(ids_BS)
        self.model.generate(
            ids, attention_mask=torch.ones_like(ids), do_sample=False, streamer=Stamps(),
            min_new_tokens=new_tokens, max_new_tokens=new_tokens, pad_token_id=0,
        )  # fmt: skip
        return stamps[1:]


class Genai(Peer):
    def __init__(self, artifact: Artifact, threads: int, dtype: str) -> None:
        import onnxruntime_genai

        file = artifact.path / "genai_config.json"
        settings = json.loads(file.read_text())
        settings["model"]["decoder"]["session_options"]["intra_op_num_threads"] = threads
        file.write_text(json.dumps(settings))
        self.api = onnxruntime_genai
        self.model = onnxruntime_genai.Model(str(artifact.path))

    def generate(self, ids_BS: Ids, new_tokens: int) -> list[int]:
        params = self.api.GeneratorParams(self.model)
        length = ids_BS.shape[1] + new_tokens
        params.set_search_options(max_length=length, min_length=length, do_sample=False)
        generator = self.api.Generator(self.model, params)
        generator.append_tokens(ids_BS.astype(np.int32))
        stamps = []
        for _ in range(new_tokens):
            generator.generate_next_token()
            stamps.append(time.perf_counter_ns())
        return stamps


PEERS: dict[str, type[Backend]] = {"transformers": Transformers, "genai": Genai}


def find(format: str) -> type[Backend]:
    return PEERS.get(format) or backend_class(format)


@dataclass(frozen=True)
class Generate:
    """A question to a worker: one answer of ``new_tokens``, when its tokens came."""

    ids_BS: Ids
    new_tokens: int

    def __call__(self, backend: Backend) -> tuple[float, float]:
        """(time to the first token, mean gap after it), seconds."""
        from optpipe.bench.timed.clock import generate

        start = time.perf_counter_ns()
        if isinstance(backend, Peer):
            stamps = backend.generate(self.ids_BS, self.new_tokens)
        else:
            trace: Trace = generate(
                backend, self.ids_BS, self.new_tokens, None, time.perf_counter_ns
            )
            stamps = list(trace.token_ns)
        assert len(stamps) == self.new_tokens, (len(stamps), self.new_tokens)
        return (stamps[0] - start) / 1e9, (stamps[-1] - stamps[0]) / 1e9 / (self.new_tokens - 1)


def artifacts(shape: str, store: Path, group_size: int) -> dict[str, Artifact]:
    """The same random weights for everyone; int4 with the head, as genai's builder does it."""
    source = Random(config=shape)
    stages = {"quant": Rtn(group_size=group_size, head=True), "export": Onnx(), "build": Ort()}
    *_, engine = baseline, *_ = [*run(check(stages, source, store), source.prepare(store))]
    made = {"ours": engine, "transformers": _as(baseline, "transformers", baseline.path)}
    folder = store / "genai"
    if not (folder / "genai_config.json").is_file():
        model = store / "genai-source"  # the builder wants a tokenizer; which one does not matter
        shutil.copytree(baseline.path, model, dirs_exist_ok=True)
        for file in DEMO.glob("tokenizer*"):
            shutil.copy2(file, model)
        builder = [sys.executable, "-m", "onnxruntime_genai.models.builder", "-i", str(model),
                   "-o", str(folder), "-p", "int4", "-e", "cpu", "-c", str(store / "cache"),
                   "--extra_options", "int4_accuracy_level=4"]  # fmt: skip
        subprocess.run(builder, check=True, capture_output=True)
    return made | {"genai": _as(baseline, "genai", folder)}


def _as(artifact: Artifact, format: str, path: Path) -> Artifact:
    return Artifact(path=path, format=format, key=artifact.key)


def interleave(
    workers: Mapping[str, Worker], blocks: int, question: Generate
) -> dict[str, list[tuple[float, float]]]:
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in workers}
    rng = np.random.default_rng(0)
    for block in range(-2, blocks):  # the first two warm up
        for name in rng.permutation([*workers]):
            answer = workers[name].ask(question, f"block {block}")

            if block >= 0:
                found[name].append(answer)
            time.sleep(0.02)  # threads that still spin go to sleep
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", default="llama_160m")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--prompt-tokens", type=int, default=128)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--blocks", type=int, default=20)
    parser.add_argument("--group-size", type=int, default=32)
    parser.add_argument("--store", type=Path, default=Path(tempfile.gettempdir()) / "optpipe-peers")
    args = parser.parse_args()
    args.store.mkdir(parents=True, exist_ok=True)
    made = artifacts(args.shape, args.store, args.group_size)
    ids = np.random.default_rng(0).integers(3, 3000, (1, args.prompt_tokens))
    workers = {
        name: Worker(
            Arm(name=name, artifact=artifact, dtype="float32", threads=args.threads, find=find)
        )
        for name, artifact in made.items()
    }
    for worker in workers.values():
        worker.imported()
        worker.load(600)
    found = interleave(workers, args.blocks, Generate(ids, args.new_tokens))
    for worker in workers.values():
        worker.close()
    report(found)


def report(found: Mapping[str, list[tuple[float, float]]]) -> None:
    times = {name: np.array(values) for name, values in found.items()}
    for name, values in times.items():
        ttft, tpot = np.median(values, axis=0) * 1e3
        print(f"{name:>14}  TTFT {ttft:8.1f} ms  TPOT {tpot:7.2f} ms")
    for peer in ("transformers", "genai"):
        for index, metric in enumerate(("TTFT", "TPOT")):
            shift = ratio(times[peer][:, index], times["ours"][:, index])
            low, high = shift.ci or (float("nan"), float("nan"))
            print(f"{metric} against {peer}: {shift.estimate:.3f} x [{low:.3f}, {high:.3f}]")


if __name__ == "__main__":
    main()
