"""What the loss feels of each layer, block by block, against the model differentiated whole."""

import pytest
import torch

from optpipe import model
from optpipe.checkpoint import Checkpoint
from optpipe.sensitivity import felt


@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt2"])
def test_it_is_the_gradient_of_the_whole_model(name, tiny):
    """transformers' own forward and loss: caps on logits, windows and all."""
    checkpoint = Checkpoint(tiny(name))
    ids = torch.randint(3, 288, (3, 40), generator=torch.Generator().manual_seed(0))
    found = {n: grams for n, _, *grams in felt(checkpoint, ids, names(checkpoint), quiet)}
    lm, fed, given = model.load(checkpoint), {}, {}
    for layer in found:

        def keep(_, args, out, layer=layer):
            fed.setdefault(layer, []).append(args[0].detach())
            given[layer] = out

        lm.get_submodule(layer).register_forward_hook(keep)
    felt_by = {layer: [] for layer in found}
    for row in ids:
        embedded = lm.get_input_embeddings()(row[None]).requires_grad_()
        logits = lm(inputs_embeds=embedded).logits[0, :-1]
        loss = torch.nn.functional.cross_entropy(logits, row[1:], reduction="sum")
        for layer, gradient in zip(
            found, torch.autograd.grad(loss, [given[n] for n in found]), strict=True
        ):
            felt_by[layer].append(gradient)
    assert len(found) == 3 * (4 if name == "gpt2" else 7)
    for layer, (inputs, gradients) in found.items():
        close(inputs.mean_CC, gram(fed[layer]))
        close(gradients.mean_CC, gram(felt_by[layer]))


def gram(parts):
    rows = torch.cat([part.flatten(0, -2) for part in parts]).double()
    return rows.T @ rows / len(rows)


def close(ours, theirs):
    torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4 * float(theirs.abs().max()))


def quiet(*_):
    pass


def names(checkpoint):
    return [name for block in checkpoint.decoder.blocks for name in block.linears]


def test_it_works_on_a_compressed_model_for_the_layers_that_are_wanted(run, tiny):
    from optpipe.lowrank.svd import Svd
    from optpipe.quant.rtn import Rtn

    made = run(Rtn(group_size=32), run(Svd(keep=0.9, targets=["*down_proj"]), tiny()))
    wanted = [name for name in Checkpoint(made.path).forms if name.endswith((".left", ".q_proj"))]
    found = {
        n: grams
        for n, _, *grams in felt(Checkpoint(made.path), torch.arange(3, 43)[None], wanted, quiet)
    }
    assert sorted(found) == sorted(wanted) and len(wanted) == 6
    assert all(float(gram.mean_CC.diagonal().min()) > 0 for pair in found.values() for gram in pair)
