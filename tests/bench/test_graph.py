"""Decoding in rings of fixed size, step by step, against the cache that grows; graphs on a GPU."""

from pathlib import Path

import numpy as np
import pytest

import optpipe.demo
from optpipe.artifact import Artifact
from optpipe.bench import graph, rings
from optpipe.bench.backend import open_backend
from optpipe.bench.torch import EAGER
from optpipe.bench.worker import Iterate
from optpipe.cache.static import KvCache
from optpipe.model import empty
from optpipe.quant.rtn import Rtn

TOLERANCE = 5e-6
"""Largest difference of logits that are about 0.5 large: float32 in another order of sums."""
DEMO = Artifact(path=Path(optpipe.demo.__file__).parent, format="hf", key="demo")
RAGGED, SHORT = np.array([25, 33, 7]), np.array([1, 1, 1])


def opened(folder, dtype="float32"):
    return open_backend(Artifact(path=folder, format="hf", key="k"), dtype=dtype)


def walked(backend, lengths_B, graphed):
    """Logits of prompts, of ten steps, of a chunk of three and of ten more steps."""
    backend.graphed = graphed
    ids_BS, width = np.random.default_rng(0).integers(0, backend.vocab, (3, 60)), lengths_B.max()
    given = np.where(np.arange(width) < lengths_B[:, None], ids_BS[:, :width], 0)
    found = [backend.prefill(given, lengths_B).copy()]
    found += [backend.decode(ids_BS[:, at]).copy() for at in range(33, 43)]
    found += [*np.moveaxis(backend.extend(ids_BS[:, 43:46]), 1, 0).copy()]
    return np.stack(found + [backend.decode(ids_BS[:, at]).copy() for at in range(46, 56)])


def test_rings_give_the_logits_of_the_cache_that_grows(tiny, family, monkeypatch):
    """All eight families, token by token: windows of 16 wrap, room for 8 more grows many times."""
    monkeypatch.setattr(rings, "UNIT", 8)
    with opened(tiny(family)) as backend:
        for lengths_B in (RAGGED, SHORT):
            grown = walked(backend, lengths_B, graphed=False)
            np.testing.assert_allclose(walked(backend, lengths_B, True), grown, atol=TOLERANCE)


def test_rotary_tables_that_the_host_computes_are_found(tiny):
    from optpipe.checkpoint import Checkpoint

    config = Checkpoint(tiny()).config
    assert graph.moving(empty(config)) is None
    config.rope_parameters = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}
    assert graph.moving(empty(config)) == "dynamic"


def test_on_a_cpu_steps_are_eager_and_said_to_be(tiny):
    with opened(tiny()) as backend:
        assert (backend.graphed, backend.decoding) == (False, EAGER) or backend.device != "cpu"


@pytest.mark.gpu
def test_graphs_give_the_logits_of_eager_steps(tiny, family, monkeypatch):
    """On a GPU, of all families, in float32; kernels of attention differ, so do the last bits."""
    monkeypatch.setattr(rings, "UNIT", 8)
    with opened(tiny(family)) as backend:
        assert backend.graphed
        for lengths_B in (RAGGED, SHORT, RAGGED):  # twice: the second replays what the first made
            grown = walked(backend, lengths_B, graphed=False)
            fixed = walked(backend, lengths_B, graphed=True)
            np.testing.assert_allclose(fixed, grown, atol=1e-4)
            assert backend._steps.pool_bytes > 0


@pytest.mark.gpu
def test_compressed_layers_and_a_rounded_cache_go_into_graphs(tiny, run):
    quantized = run(Rtn(bits=4, group_size=32), tiny())
    rounded = run(KvCache(calib=run.calib), quantized)
    for artifact in (quantized, rounded):
        with open_backend(artifact) as backend:
            grown = walked(backend, RAGGED, graphed=False)
            np.testing.assert_allclose(walked(backend, RAGGED, True), grown, atol=1e-4)


@pytest.mark.gpu
def test_the_demo_model_says_the_same_from_graphs():
    """64 greedy tokens after 8 prompts of 100, in float32."""
    text = np.frombuffer((DEMO.path / "heldout.txt").read_bytes()[:800], np.uint8)
    ids_BS = text.reshape(8, 100).astype(np.int64)
    found = []
    with open_backend(DEMO) as backend:
        for graphed in (False, True):
            backend.graphed = graphed
            lengths_B = np.full(8, 100)
            np.testing.assert_array_equal(
                backend.first_tokens(ids_BS, lengths_B),
                backend.prefill(ids_BS, lengths_B).argmax(-1),
            )
            found.append(Iterate(ids_BS=ids_BS, new_tokens=64)(backend).trace.tokens_NB)
    np.testing.assert_array_equal(*found)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_graphs_round_no_more_than_eager_steps(dtype):
    """Logits of the demo model, root mean square of what they miss those of float32 by."""
    with open_backend(DEMO) as backend:
        exact = walked(backend, RAGGED, graphed=False)
    with open_backend(DEMO, dtype=dtype) as backend:
        eager, graphed = (np.std(walked(backend, RAGGED, way) - exact) for way in (False, True))
    print(f"{dtype}: eager {eager:.2e}, graphed {graphed:.2e}")
    assert 0 < graphed < 1.1 * eager
