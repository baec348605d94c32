"""Room in KV caches, in bytes and tokens worked out by hand, and of a real cache."""

from types import SimpleNamespace

import numpy as np
import pytest

from optpipe.artifact import Artifact
from optpipe.bench import capacity, ort, paged
from optpipe.bench.backend import open_backend
from optpipe.bench.kv import KvCache
from optpipe.bench.outcome import Outcome
from optpipe.bench.policy import BenchConfig
from optpipe.bench.scenario import Cell
from optpipe.bench.worker import Loaded

# 3 layers of 2 KV heads of 16, keys and values, 2 bytes: 128 bytes a token and layer.
GROWS = KvCache.of([None] * 3, 2, 16, 2)
CELL = Cell("single", 1, 90, 10)


def told(kv, **fields):
    known = {"load_s": 1, "capacity": 256, "vocab": 9, "weight_bytes": 1000, "dtype": "float16",
             "device": "cpu", "host_bytes": 4000, "kv": kv}  # fmt: skip
    return Loaded(**(known | fields))


def test_a_row_takes_what_its_tokens_take():
    assert (GROWS.token_bytes, GROWS.row_bytes(100)) == (384, 38_400)
    assert GROWS.capacity_tokens(100_000) == 260 and GROWS.sequences(100, 100_000) == 2
    assert GROWS.sequences(100, 100_000, most=1) == 1 and GROWS.sequences(100, -1) == 0


def test_a_window_keeps_no_more_than_its_tokens():
    mixed = KvCache.of([None, 16, 16], 2, 16, 2)
    assert mixed.token_bytes == 384 and mixed.row_bytes(10) == 3840
    assert mixed.row_bytes(100) == 128 * (100 + 16 + 16)


def test_a_fixed_row_takes_all_of_it_at_once():
    tensors = [np.empty((0, 2, 64, 16), np.float32)] * 6  # keys and values of three layers
    fixed = KvCache.of_tensors(tensors)
    assert fixed.token_bytes == 768 and fixed.row_bytes(1) == fixed.row_bytes(64) == 64 * 768
    assert fixed.sequences(10, 100_000) == 2
    made = KvCache.of_tensors(tensors, rows=4)
    assert made.pool_tokens == 256 and made.sequences(10, 0) == 4


def test_a_pool_is_shared_by_rows_of_any_length():
    pool = KvCache.of([None] * 3, 2, 16, 1, pool_tokens=1000)
    assert pool.token_bytes == 192 and pool.capacity_tokens(0) == 1000
    assert pool.sequences(300, 0) == 3


def test_an_artifact_tells_its_room_or_why_it_does_not():
    """Of 104 000 bytes, 4000 are taken once it is loaded."""
    found = capacity.entry(told(GROWS), 104_000, "")
    assert found == {
        "host_bytes": 4000, "device_bytes": None, "reasons": {"device_bytes": capacity.ON_CPU},
        "kv_cache": {"bytes_per_token": 384, "capacity_tokens": 260, "room_bytes": 100_000,
                     "reasons": {}},
    }  # fmt: skip
    assert capacity.sequences(told(GROWS), CELL, 104_000, "") == (2, {})
    on_gpu = told(GROWS, gpu="GPU-1", device_bytes=24_000)
    assert capacity.room_bytes(on_gpu, 104_000) == 80_000
    assert capacity.room_bytes(told(GROWS, gpu="GPU-1"), 104_000) == 103_000, "weights, at least"
    pool = capacity.entry(told(KvCache.of([None], 1, 8, 2, pool_tokens=77)), 9, "")["kv_cache"]
    assert (pool["capacity_tokens"], pool["room_bytes"]) == (77, None) and pool["reasons"]
    assert capacity.sequences(told(GROWS, capacity=99), CELL, 1, "")[1] == {
        "max_sequences": "100 tokens do not fit in its KV cache of 99"
    }
    for loaded, why in ((None, "too large"), (told(None), "")):
        empty = capacity.entry(loaded, 9, why)["kv_cache"]
        assert {*empty["reasons"].values()} == {why or capacity.UNTOLD}
        assert capacity.sequences(loaded, CELL, 9, why)[0] is None


def test_room_is_of_the_device_that_an_arm_runs_on(arm):
    """A GPU may have more memory than its host, or less."""
    loaded = {"cpu": told(GROWS), "gpu": told(GROWS, gpu="GPU-1")}
    outcome = Outcome(
        arms=[arm("cpu"), arm("gpu")], cells=[CELL], sessions=[], left_out={}, bench=BenchConfig(),
        loaded=loaded, free_bytes=50_000, device_free_bytes=90_000,
    )  # fmt: skip
    assert (outcome.free("cpu"), outcome.free("gpu"), outcome.free("lost")) == (
        50_000, 90_000, 50_000,
    )  # fmt: skip


def test_what_torch_holds_is_what_is_counted(tiny):
    with open_backend(Artifact(path=tiny(), format="hf", key="k"), dtype="bfloat16") as backend:
        backend.prefill(np.zeros((2, 20), np.int64), np.full(2, 20))
        held = sum(part.nbytes for one in backend._cache.layers for part in (one.keys, one.values))
        assert backend.kv.row_bytes(20) * 2 == held


def test_a_graph_in_onnx_runtime_tells_the_type_of_its_cache(monkeypatch, tmp_path):
    (tmp_path / ort.DATA).write_bytes(b"weights")
    engine = SimpleNamespace(
        capacity=64, vocab=9, dtype=np.float32, cache_type=np.int8,
        cache_shapes={"key": (2, 64, 16), "value": (2, 64, 16)},
    )  # fmt: skip
    monkeypatch.setattr(ort, "Engine", lambda *_: engine)
    kv = ort.Ort(SimpleNamespace(path=tmp_path), 1, "float32").kv
    assert kv.token_bytes == 2 * 2 * 16 and kv.row_bytes(1) == 64 * 64


@pytest.mark.parametrize(("scheme", "rounds"), [(None, False), ({"num_bits": 8}, True)])
def test_a_checkpoint_says_whether_its_cache_is_rounded(scheme, rounds):
    config = SimpleNamespace(quantization_config={"kv_cache_scheme": scheme})
    assert paged.rounds_cache(SimpleNamespace(config=config)) is rounds
    assert not paged.rounds_cache(SimpleNamespace(config=SimpleNamespace()))
