"""Run a decoder engine with nothing but onnxruntime, numpy and tokenizers.

    python generate.py "def main():" --new-tokens 64
    python generate.py "4 8 15 16" --ids    # token numbers in and out: no tokenizer needed

This file travels with the engine. optpipe's benchmark drives the same class, so what is measured is
what is deployed.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort

TYPES = {"tensor(float)": np.float32, "tensor(float16)": np.float16, "tensor(int8)": np.int8}
PAST, PRESENT = "past_key_values", "present"
EXACT_INTEGERS = "session.x64quantprecision"
"""Asks for slower products of 8-bit integers, which never saturate."""


@dataclass
class Call:
    """Buffers of one shape of call, bound once: only their contents change from call to call."""

    binding: Any
    inputs: dict[str, np.ndarray]
    logits: np.ndarray


class Engine:
    """A decoder with a KV cache of fixed capacity, B rows at a time.

    ids are (B, S) int64, padded on the right where ``lengths`` (B) differ; logits are float32.
    """

    def __init__(self, folder: Path, threads: int = 0) -> None:
        options = ort.SessionOptions()
        options.intra_op_num_threads = threads
        options.log_severity_level = 3
        # a canonical graph promises float activations: do not let the fusion make them int8
        options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "1")
        if (settings := folder / "session.json").is_file():
            for key, value in json.loads(settings.read_text()).items():
                if key != EXACT_INTEGERS or not has_vnni():
                    options.add_session_config_entry(key, value)
        file = str(folder / "model.onnx")
        self.session = ort.InferenceSession(file, options, providers=["CPUExecutionProvider"])
        self.names = [value.name for value in self.session.get_inputs()]
        caches = [v for v in self.session.get_inputs() if v.name.startswith(PAST)]
        self.cache_type = TYPES[caches[0].type]
        self.cache_shapes = {value.name: value.shape[1:] for value in caches}
        self.capacity: int = caches[0].shape[2]
        logits = self.session.get_outputs()[0]
        self.vocab: int = logits.shape[2]
        self.dtype = TYPES[logits.type]
        # GroupQueryAttention takes several rows only for a first prompt or a single token
        self.fused = self.session.get_modelmeta().custom_metadata_map.get("form") == "fused"
        self.depth = np.zeros(0, np.int64)
        self.cache: dict[str, np.ndarray] = {}
        self.calls: dict[int | None, Call] = {}

    def prefill(self, ids: np.ndarray, lengths: np.ndarray) -> np.ndarray:
        """Forget the cache, read the prompts; logits (B, V) after the last token of each row."""
        self._reset(len(ids))
        logits = self._step(ids, (lengths - 1)[:, None])
        self.depth = lengths.astype(np.int64)
        return logits[:, 0]

    def decode(self, tokens: np.ndarray) -> np.ndarray:
        """Append one token to each row; logits (B, V) of the next."""
        logits = self._step(tokens[:, None], np.zeros((len(tokens), 1), np.int64))
        self.depth += 1
        return logits[:, 0]

    def extend(self, ids: np.ndarray) -> np.ndarray:
        """Append S tokens to each row; logits (B, S, V) after each of them."""
        logits = self._step(ids, np.tile(np.arange(ids.shape[1]), (len(ids), 1)))
        self.depth += ids.shape[1]
        return logits

    def score(self, ids: np.ndarray) -> np.ndarray:
        """Logits (B, S, V) of whole sequences, from an empty cache."""
        self._reset(len(ids))
        return self.extend(ids)

    def _reset(self, rows: int) -> None:
        self.depth = np.zeros(rows, np.int64)
        if next(iter(self.cache.values())).shape[0] != rows if self.cache else True:
            self.calls.clear()
            self.cache = {
                name: np.zeros((rows, *shape), self.cache_type)
                for name, shape in self.cache_shapes.items()
            }

    def _step(self, ids: np.ndarray, logits_at: np.ndarray) -> np.ndarray:
        rows, tokens = ids.shape
        if (longest := int(self.depth.max()) + tokens) > self.capacity:
            raise ValueError(f"{longest} tokens exceed the engine's capacity of {self.capacity}")
        if self.fused and rows > 1 and tokens > 1 and self.depth.any():
            parts = [self._run(ids[r : r + 1], logits_at[r : r + 1], r) for r in range(rows)]
            return np.concatenate(parts)
        return self._run(ids, logits_at, None)

    def _run(self, ids: np.ndarray, logits_at: np.ndarray, row: int | None) -> np.ndarray:
        rows, tokens = ids.shape
        call = self._call(rows, tokens, logits_at.shape[1], row)
        depth = self.depth if row is None else self.depth[row : row + 1]
        call.inputs["input_ids"][:] = ids
        call.inputs["logits_at"][:] = logits_at
        call.inputs["write_indices"][:] = depth
        if "position_ids" in call.inputs:
            call.inputs["position_ids"][:] = depth[:, None] + np.arange(tokens)
        self.session.run_with_iobinding(call.binding)
        return call.logits.astype(np.float32)  # a copy: the buffer is used again

    def _call(self, rows: int, tokens: int, wanted: int, row: int | None) -> Call:
        if tokens > 1:  # prompts come in any length: keeping their buffers would fill the memory
            return self._bind(rows, tokens, wanted, row)
        if row not in self.calls:
            self.calls[row] = self._bind(rows, 1, wanted, row)
        return self.calls[row]

    def _bind(self, rows: int, tokens: int, wanted: int, row: int | None) -> Call:
        """Bind inputs, logits and the cache, which is past and present in the same memory."""
        shapes: dict[str, tuple[int, ...]] = {
            "input_ids": (rows, tokens),
            "position_ids": (rows, tokens),
            "write_indices": (rows,),
            "logits_at": (rows, wanted),
        }
        inputs = {n: np.zeros(s, np.int64) for n, s in shapes.items() if n in self.names}
        logits = np.zeros((rows, wanted, self.vocab), self.dtype)
        binding = self.session.io_binding()
        for name, array in inputs.items():
            _bind_array(binding.bind_input, name, array)
        _bind_array(binding.bind_output, "logits", logits)
        for name, cache in self.cache.items():
            part = cache if row is None else cache[row : row + 1]
            _bind_array(binding.bind_input, name, part)
            _bind_array(binding.bind_output, name.replace(PAST, PRESENT), part)
        return Call(binding, inputs, logits)


def has_vnni() -> bool:
    """Whether this CPU has instructions for products of 8-bit integers that do not saturate."""
    about = Path("/proc/cpuinfo")
    return about.is_file() and "vnni" in about.read_text()


def _bind_array(bind: Any, name: str, array: np.ndarray) -> None:
    bind(name, "cpu", 0, array.dtype, array.shape, array.ctypes.data)


def generate(engine: Engine, prompt: list[int], new_tokens: int, stop: set[int]) -> list[int]:
    """The greedy continuation of one prompt, at most ``new_tokens`` long."""
    logits = engine.prefill(np.array([prompt], np.int64), np.array([len(prompt)]))
    tokens: list[int] = []
    while len(tokens) < new_tokens:
        token = int(logits[0].argmax())
        if token in stop:
            break
        tokens.append(token)
        if len(prompt) + len(tokens) >= engine.capacity:
            break
        logits = engine.decode(np.array([token]))
    return tokens


def numbers(text: str) -> list[int]:
    found = [int(word) for word in text.split()]
    if min(found, default=0) < 0:
        raise ValueError(text)
    return found


def encode(tokenizer: Path, text: str) -> list[int]:
    from tokenizers import Tokenizer

    return list(Tokenizer.from_file(str(tokenizer)).encode(text).ids)


def decode(tokenizer: Path, tokens: list[int]) -> str:
    from tokenizers import Tokenizer

    return str(Tokenizer.from_file(str(tokenizer)).decode(tokens))


def main() -> None:
    parser = argparse.ArgumentParser(description="Continue a prompt, greedily.")
    parser.add_argument("prompt")
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--threads", type=int, default=0, help="0: as many as there are cores")
    parser.add_argument("--ids", action="store_true", help="prompt and answer are token numbers")
    args = parser.parse_args()
    folder = Path(__file__).resolve().parent
    file = folder / "tokenizer.json"
    if not args.ids and not file.is_file():
        parser.error("this engine has no tokenizer: give token numbers and --ids")
    try:
        prompt = numbers(args.prompt) if args.ids else encode(file, args.prompt)
    except ValueError:
        parser.error(f"--ids takes token numbers, such as '4 8 15', got '{args.prompt}'")
    settings = json.loads((folder / "engine.json").read_text())
    engine = Engine(folder, args.threads)
    if not 0 < len(prompt) < engine.capacity:
        parser.error(f"the prompt has {len(prompt)} tokens; 1 to {engine.capacity - 1} fit")
    if max(prompt) >= engine.vocab:
        parser.error(f"token {max(prompt)} is not below the vocabulary of {engine.vocab}")
    tokens = generate(engine, prompt, args.new_tokens, set(settings["stop_tokens"]))
    print(*([*tokens] if args.ids else [decode(file, tokens)]))


if __name__ == "__main__":
    main()
