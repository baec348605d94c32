"""The torch backend against the model as transformers runs it, without any cache."""

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from optpipe.artifact import Artifact
from optpipe.bench.backend import backend_class, open_backend
from optpipe.errors import InputError

TOLERANCE = 5e-6
"""Largest difference of logits that are about 0.5 large: float32 in another order of sums."""


def reference(folder, ids_BS):
    """Logits (B, S, V) of whole sequences; Gemma-2 caps its scores, which only eager does."""
    lm = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()
    with torch.inference_mode():
        return lm(input_ids=torch.from_numpy(ids_BS), use_cache=False).logits.numpy()


def opened(folder, dtype="float32"):
    return open_backend(Artifact(path=folder, format="hf", key="k"), dtype=dtype)


def test_a_ragged_batch_gives_every_row_its_own_logits(tiny, family):
    """Prompts of 25, 40 and 7 tokens, three steps, a chunk of four, one step; windows are 16."""
    folder, rows = tiny(family), np.arange(3)
    ids_BS, lengths_B = np.random.default_rng(0).integers(0, 288, (3, 60)), np.array([25, 40, 7])
    expected = reference(folder, ids_BS)
    with opened(folder) as backend:
        padded = np.where(np.arange(40) < lengths_B[:, None], ids_BS[:, :40], 0)
        found = [(backend.prefill(padded, lengths_B), lengths_B - 1)]
        for step in range(3):
            at = lengths_B + step
            found.append((backend.decode(ids_BS[rows, at]), at))
        chunk = lengths_B[:, None] + 3 + np.arange(4)
        found.append((backend.extend(ids_BS[rows[:, None], chunk]), chunk))
        found.append((backend.decode(ids_BS[rows, lengths_B + 7]), lengths_B + 7))
    for logits, at in found:
        wanted = expected[rows, at] if at.ndim == 1 else expected[rows[:, None], at]
        np.testing.assert_allclose(logits, wanted, atol=TOLERANCE)


def test_equal_rows_prefill_chunks_and_scores(tiny, family):
    folder = tiny(family)
    ids_BS = np.random.default_rng(1).integers(0, 288, (2, 50))
    expected = reference(folder, ids_BS)
    with opened(folder) as backend:
        first = backend.prefill(ids_BS[:, :20], np.array([20, 20]))
        np.testing.assert_allclose(first, expected[:, 19], atol=TOLERANCE)
        chunk = backend.extend(ids_BS[:, 20:48])
        np.testing.assert_allclose(chunk, expected[:, 20:48], atol=TOLERANCE)
        last = backend.decode(ids_BS[:, 48])
        np.testing.assert_allclose(last, expected[:, 48], atol=TOLERANCE)
        np.testing.assert_allclose(backend.score(ids_BS), expected, atol=TOLERANCE)
        again = backend.prefill(ids_BS[:, :20], np.array([20, 20]))
        np.testing.assert_allclose(again, first, atol=TOLERANCE)  # the cache was emptied


def test_what_it_tells_of_itself(tiny):
    artifact = Artifact(path=tiny(), format="hf", key="k")
    with opened(tiny()) as backend, opened(tiny(), "bfloat16") as half:
        parameters = AutoModelForCausalLM.from_pretrained(tiny()).num_parameters()
        assert (backend.capacity, backend.vocab, backend.dtype) == (128, 288, "float32")
        assert 4 * parameters <= backend.weight_bytes < 4 * parameters + 1000  # rotary tables
        assert half.dtype == "bfloat16"
        assert 2 * parameters <= half.weight_bytes < 2 * parameters + 1000
        kind = backend_class("hf")
        assert kind.memory_bytes(artifact, "float32") == 4 * parameters
        prompt = np.zeros((1, 4), np.int64)
        assert half.prefill(prompt, np.array([4])).dtype == np.float32


def test_what_cannot_be_opened_is_refused(tiny):
    with pytest.raises(InputError, match=r"'gguf'; known are hf, onnx, ort"):
        open_backend(Artifact(path=tiny(), format="gguf", key="k"))
    with pytest.raises(InputError, match="'int4' is not one of float32"):
        opened(tiny(), "int4")
