"""Backends with known delays and known faults; in a file of its own, for workers import it."""

import os
import time

import numpy as np

from optpipe.artifact import Artifact
from optpipe.bench.backend import Backend

VOCAB, PROMPT = 11, 8


class Fake(Backend):
    """Takes its behaviour from the stats of its artifact; sleeps to absolute deadlines."""

    vocab = VOCAB
    dtype, device, weight_bytes = "float32", "cpu", 1

    def __init__(self, artifact, threads, dtype):
        self.plan = artifact.stats
        self.capacity = self.plan.get("capacity", 64)
        self.max_batch = self.plan.get("max_batch")
        self._rng, self._scored = np.random.default_rng(0), False
        if self.plan.get("fault") == "load":
            raise ValueError("no such tensor")
        if self.plan.get("fault") == "die_loading":
            os._exit(9)

    @classmethod
    def missing(cls, artifact):
        return artifact.stats.get("missing")

    def prefill(self, ids_BS, lengths_B):
        self._fail()
        if self.max_batch and len(ids_BS) > self.max_batch:
            raise FloatingPointError(f"{len(ids_BS)} rows")
        self._sleep("prefill_s")
        if ids_BS.shape[1] >= PROMPT:  # whole prompts only
            time.sleep(self.plan.pop("first_s", 0.0))  # as a JIT does
        self.next_B = ids_BS.sum(-1) % VOCAB
        return np.eye(VOCAB, dtype=np.float32)[self.next_B]

    def decode(self, tokens_B):
        self._sleep("decode_s")
        self.next_B = (tokens_B + 1) % VOCAB  # so that the tokens fed back can be seen
        return np.eye(VOCAB, dtype=np.float32)[self.next_B]

    def extend(self, ids_BS):
        raise AssertionError

    def score(self, ids_BS):
        self._fail()
        self._scored = True
        shape = (ids_BS.shape[1], VOCAB)
        base = np.stack([np.random.default_rng(ids).normal(size=shape) * 2 for ids in ids_BS])
        noise = np.random.default_rng(0).normal(size=base.shape)
        if self.plan.get("fault") == "moody":
            noise, self.plan["noise"] = self._rng.normal(size=base.shape), 0.1
        if len(ids_BS) > 1:  # a kernel of its own for batches
            base = base + self.plan.get("batch_noise", 0.0) * noise
        logits = (base + self.plan.get("noise", 0.0) * noise).astype(np.float32)
        if self.plan.get("fault") == "nan":
            logits[-1, -2, 3] = np.nan
        return logits

    def peak_bytes(self):
        if self.plan.get("hoards"):  # an allocator that gives nothing back
            return 2 if self._scored else 1
        return super().peak_bytes()

    def close(self):
        pass

    def _sleep(self, name):
        time.sleep(self.plan.get(name, 0.0))

    def _fail(self):
        fault = self.plan.get("fault")
        if fault == "raise":
            raise FloatingPointError("the kernel is unhappy")
        if fault == "die":
            os._exit(7)
        if fault == "hang":
            time.sleep(3600)


def find(format):
    return Fake


def fake_artifact(folder, *lineage, **plan):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "weights").write_bytes(bytes(1000))
    return Artifact(path=folder, format="fake", key="k", lineage=lineage, stats=plan)
