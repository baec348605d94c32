"""What auto_quantize runs, against transformers' own forward and backward."""

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from optpipe import model
from optpipe.checkpoint import Checkpoint
from optpipe.device import fastest
from optpipe.errors import InputError
from optpipe.quant import scoring
from optpipe.quant.scoring import Scored, check_fits

IDS = torch.arange(3, 40)[None]


def slopes(lm, block, run):
    """Gradients of the outputs of a block's layers."""
    seen = {}

    def hook(name):
        return lambda _, __, slope: seen.__setitem__(name, slope[0].clone())

    hooks = [
        layer.register_full_backward_hook(hook(name))
        for name, layer in model.block_linears(lm, block)
    ]
    run()
    for added in hooks:
        added.remove()
    return seen


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2"])
def test_logits_and_gradients_are_those_of_the_whole_model(family, tiny, tmp_path):
    checkpoint = Checkpoint(tiny(family))
    ours, whole = Scored(checkpoint, tmp_path), model.load(checkpoint)
    theirs = AutoModelForCausalLM.from_pretrained(tiny(family)).eval()
    ours.lm.train().requires_grad_(True)  # as modelopt leaves it
    for block in checkpoint.decoder.blocks:
        found = slopes(ours.lm, block, lambda: ours.score(ours.lm, IDS.to(fastest())))
        whole.get_input_embeddings().requires_grad_()
        wanted = slopes(whole, block, lambda: whole(IDS, labels=IDS).loss.backward())
        assert found.keys() == wanted.keys() and len(found) == len(block.linears)
        for name, slope in found.items():
            torch.testing.assert_close(slope.cpu(), wanted[name], rtol=1e-4, atol=1e-7)
    assert all(parameter.grad is None for parameter in ours.lm.parameters())
    with torch.no_grad():
        said = ours.logits(nn.Module(), IDS.to(fastest())).cpu()
        torch.testing.assert_close(said, theirs(IDS).logits, rtol=1e-4, atol=1e-5)


def test_a_model_that_a_gpu_cannot_hold_is_refused(tiny, monkeypatch):
    checkpoint = Checkpoint(tiny())
    weights = sum(parameter.numel() for parameter in model.load(checkpoint).parameters())
    monkeypatch.setattr(scoring, "fastest", lambda: torch.device("cuda"))
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (4 * weights, 10**12))
    check_fits(checkpoint)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (4 * weights - 1, 10**12))
    with pytest.raises(InputError, match="CUDA_VISIBLE_DEVICES= to search on the CPU"):
        check_fits(checkpoint)
