"""ONNX Runtime as a backend: canonical graphs and built engines, through the loader that ships."""

from __future__ import annotations

import numpy as np

from optpipe.artifact import Artifact
from optpipe.bench.backend import Backend, Ids, Logits
from optpipe.bench.kv import KvCache
from optpipe.build.generate import Engine
from optpipe.export.graph import DATA


class Ort(Backend):
    """Opens formats 'onnx' and 'ort'; the dtype is that of the graph."""

    def __init__(self, artifact: Artifact, threads: int, dtype: str) -> None:
        self.engine = Engine(artifact.path, threads)
        self.capacity = self.engine.capacity
        self.vocab = self.engine.vocab
        self.weight_bytes = (artifact.path / DATA).stat().st_size
        self.dtype = self.engine.dtype.__name__
        self.device = "cpu"
        shapes, kind = self.engine.cache_shapes.values(), self.engine.cache_type
        self.kv = KvCache.of_tensors(np.empty((0, *shape), kind) for shape in shapes)

    @classmethod
    def missing(cls, artifact: Artifact) -> str | None:
        if artifact.stats.get("dtype") == "bfloat16":
            return "ONNX Runtime multiplies no bfloat16 on a CPU"
        if blocks := artifact.stats.get("blocks"):
            return f"ONNX Runtime has no kernel of {' and '.join(blocks)} on a CPU"
        return None

    def prefill(self, ids_BS: Ids, lengths_B: Ids) -> Logits:
        return self.engine.prefill(ids_BS, lengths_B)

    def decode(self, tokens_B: Ids) -> Logits:
        return self.engine.decode(tokens_B)

    def extend(self, ids_BS: Ids) -> Logits:
        return self.engine.extend(ids_BS)

    def score(self, ids_BS: Ids) -> Logits:
        return self.engine.score(ids_BS)

    def close(self) -> None:
        del self.engine
