"""The KV cache in 8 bits: scales, torch, graphs, engines."""

import inspect
import json

import numpy as np
import pytest
import torch
from transformers import DynamicCache

from optpipe import kvcache, model
from optpipe.artifact import Artifact
from optpipe.build.generate import Engine
from optpipe.build.ort import Ort
from optpipe.cache.static import KvCache
from optpipe.checkpoint import Checkpoint
from optpipe.errors import InputError
from optpipe.export.onnx import Onnx
from optpipe.linear import round_inputs
from optpipe.quant.inputs import input_scale
from optpipe.quant.rtn import Rtn
from optpipe.verify import verify

IDS = torch.arange(3, 43)[None]


def feed(lm, ids, cache):
    takes = inspect.signature(type(lm).forward).parameters
    name = "cache" if "cache" in takes else "past_key_values"  # before transformers 5.24
    return lm(ids, **{name: cache}).logits


FAMILIES = ["llama", "qwen3", "gemma2", "gpt2"]  # plain, normed heads, soft caps, learned positions


@pytest.fixture(params=FAMILIES)
def family(request):
    return request.param


@pytest.fixture
def made(run, tiny):
    def make(family, number="int8"):
        source = Artifact(path=tiny(family), format="hf", key="k")
        return run(KvCache(number=number, calib=run.calib), source)

    return make


def test_scales_span_keys_and_values_after_the_rotation(family, made, tiny, run):
    """As transformers' own cache holds them."""
    folder = made(family).path
    form, lm = kvcache.load(folder), model.load(Checkpoint(tiny(family)))
    largest = np.zeros((3, 2))
    with torch.no_grad():
        for row in run.calib.ids(Checkpoint(folder)):
            cache = DynamicCache()  # which keeps what is beyond a window
            feed(lm, row[None], cache)
            for i, layer in enumerate(cache.layers):
                seen = [float(t.abs().max()) for t in (layer.keys, layer.values)]
                largest[i] = np.maximum(largest[i], seen)
    assert np.isfinite(largest).all() and (largest > 0).all()
    for i, (key, value) in enumerate(zip(form.key, form.value, strict=True)):
        assert [key, value] == pytest.approx([float(input_scale(m, 127)) for m in largest[i]])


@pytest.mark.parametrize("number", ["int8", "fp8"])
def test_one_run_equals_decoding_from_a_cache_that_was_rounded_once(number, family, made, tiny):
    """In transformers' cache, rounded from outside after every step."""
    folder = made(family, number).path
    form = kvcache.load(folder)
    with torch.no_grad():
        at_once = model.load(Checkpoint(folder))(IDS).logits[0]
    lm = model.load(Checkpoint(tiny(family)))
    lm.set_attn_implementation("eager")
    logits = []

    def rounding(layer, update):
        def rounded(keys, values, *args, **kwargs):
            scales = (form.key[layer], form.value[layer])
            both = (
                round_inputs(t, f"{number}_tensor", torch.tensor(s))
                for t, s in zip((keys, values), scales, strict=True)
            )
            return update(*both, *args, **kwargs)

        return rounded

    cache = DynamicCache(config=lm.config)
    for i, layer in enumerate(cache.layers):
        layer.update = rounding(i, layer.update)
    with torch.no_grad():
        for token in IDS[0]:
            logits.append(feed(lm, token[None, None], cache)[0, 0])
    error = (at_once - torch.stack(logits)).abs() / at_once.std()
    assert error.median() < 1e-5 and error.mean() < 1e-2  # some are rounded the other way


def test_graph_and_engine_hold_integers_and_compute_what_torch_does(family, made, run):
    source = made(family)
    graph = run(Onnx(), source)
    engine = run(Ort(), graph)
    with torch.no_grad():
        full = model.load(Checkpoint(source.path))(IDS).logits[0, 27:].numpy()
    ids = IDS.numpy()
    for artifact in (graph, engine):
        runner = Engine(artifact.path, threads=1)
        assert runner.cache_type is np.int8
        got = [runner.prefill(ids[:, :28], np.array([28]))]
        got += [runner.decode(ids[:, t]) for t in range(28, 40)]
        error = np.abs(np.concatenate(got) - full) / full.std()
        assert np.median(error) < 1e-4, artifact.format
        found = verify(artifact, source, None)
        assert found["parity"]["kind"] == "rounded"
        assert found["parity_float_activations"]["worst"] < 2e-4


def test_rounding_is_felt(made, tiny):
    with torch.no_grad():
        ours, theirs = (
            model.load(Checkpoint(f))(IDS).logits for f in (made("llama").path, tiny("llama"))
        )
    assert 1e-4 < (ours - theirs).norm() / theirs.norm() < 0.1


def test_it_follows_other_stages_and_only_once(run, tiny):
    quantized = run(Rtn(group_size=32), tiny())
    cached = run(KvCache(calib=run.calib), quantized)
    assert Checkpoint(cached.path).forms == Checkpoint(quantized.path).forms
    assert json.loads((cached.path / "kv_cache.json").read_text())["number"] == "int8"
    with pytest.raises(InputError, match="quantized already, to int8"):
        run(KvCache(calib=run.calib), cached)


def test_what_cannot_be_verified_is_refused(made, run):
    with pytest.raises(InputError, match=r"fp8 cannot be verified.*cache.number=int8"):
        run(Onnx(), made("llama", "fp8"))
    with pytest.raises(ValueError, match=r"number must be one of .*, got 'int4'"):
        KvCache(number="int4")
