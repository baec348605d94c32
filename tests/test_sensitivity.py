"""What the loss feels of each layer, block by block, against the model differentiated whole."""

import pytest
import torch

from optpipe import model
from optpipe.checkpoint import Checkpoint
from optpipe.sensitivity import sensitivities


@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt2"])
def test_it_is_the_gradient_of_the_whole_model(name, tiny):
    """transformers' own forward and loss: caps on logits, windows and all."""
    checkpoint = Checkpoint(tiny(name))
    ids = torch.randint(3, 288, (3, 40), generator=torch.Generator().manual_seed(0))
    found = sensitivities(checkpoint, ids, lambda *_: None)
    lm = model.load(checkpoint)
    outputs = {}
    for layer in found:
        lm.get_submodule(layer).register_forward_hook(
            lambda _, __, out, layer=layer: outputs.setdefault(layer, []).append(out)
        )
    expected = dict.fromkeys(found, 0.0)
    for row in ids:
        outputs.clear()
        embedded = lm.get_input_embeddings()(row[None]).requires_grad_()
        logits = lm(inputs_embeds=embedded).logits[0, :-1]
        loss = torch.nn.functional.cross_entropy(logits, row[1:], reduction="sum")
        gradients = torch.autograd.grad(loss, [outputs[layer][0] for layer in found])
        for layer, gradient in zip(found, gradients, strict=True):
            expected[layer] += float(gradient.square().sum()) / (2 * gradient.shape[-1])
    assert len(found) == 3 * (4 if name == "gpt2" else 7)
    for layer, value in expected.items():
        assert found[layer] == pytest.approx(value / ids.numel(), rel=1e-3), layer


def test_it_works_on_a_compressed_model_and_leaves_no_gradients_behind(run, tiny):
    from optpipe.lowrank.svd import Svd
    from optpipe.quant.rtn import Rtn

    made = run(Rtn(group_size=32), run(Svd(keep=0.9, targets=["*down_proj"]), tiny()))
    found = sensitivities(Checkpoint(made.path), torch.arange(3, 43)[None], lambda *_: None)
    assert found.keys() == made_names(made)
    assert all(value > 0 for value in found.values())


def made_names(made):
    return {name for name in Checkpoint(made.path).forms if name != "lm_head"}
