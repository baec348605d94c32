"""Every family through optpipe against transformers' own loader."""

import json

import pytest
import torch
import transformers

from optpipe import model
from optpipe.checkpoint import Checkpoint
from optpipe.errors import InputError
from optpipe.family import FAMILIES, describe, joined


def test_logits_equal_those_of_from_pretrained(family, tiny):
    ids = torch.randint(3, 288, (2, 40), generator=torch.Generator().manual_seed(0))
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tiny(family), dtype=torch.float32)
    ours = model.load(Checkpoint(tiny(family)))
    with torch.no_grad():
        assert torch.equal(ours(ids).logits, theirs(ids).logits)


def test_every_linear_layer_is_listed(family, tiny):
    checkpoint = Checkpoint(tiny(family))
    lm = model.load(checkpoint)
    linears = {n: m for n, m in lm.named_modules() if isinstance(m, torch.nn.Linear)}
    forms = model.layers(checkpoint)
    assert forms.keys() == linears.keys()
    assert all((f.rows, f.cols) == tuple(linears[n].weight.shape) for n, f in forms.items())


def test_layers_that_read_the_same_inputs_are_joined(family, tiny):
    for block in Checkpoint(tiny(family)).decoder.blocks:
        several = [names for names in (block.qkv, block.mlp_in) if len(names) > 1]
        assert joined(block.linears) == several
        assert joined(f"{name}.right" for name in block.linears) == []


def test_every_supported_family_has_a_tiny_model(families):

    assert families == [*FAMILIES]


def test_an_unsupported_family_is_refused_by_name_with_the_others():
    with pytest.raises(InputError, match="'bert' is not supported; supported are llama, mistral"):
        describe(transformers.BertConfig())


def test_an_unsupported_activation_is_refused(tmp_path, tiny):
    config = json.loads((tiny() / "config.json").read_text()) | {"hidden_act": "relu6"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match="activation 'relu6'"):
        _ = Checkpoint(tmp_path).decoder


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_a_base_model_saved_on_its_own_is_the_same_model(name, tiny, tmp_path):
    """The original GPT-2 on the hub is stored without the prefix 'transformer.'."""
    whole = transformers.AutoModelForCausalLM.from_pretrained(tiny(name), dtype=torch.float32)
    whole.lm_head.weight = whole.get_input_embeddings().weight  # a base model has no head
    whole.config.tie_word_embeddings = True
    whole.base_model.save_pretrained(tmp_path)
    whole.config.save_pretrained(tmp_path)
    checkpoint = Checkpoint(tmp_path)
    model.check_complete(checkpoint)
    ids = torch.arange(3, 40)[None]
    with torch.no_grad():
        assert torch.equal(model.load(checkpoint)(ids).logits, whole(ids).logits)
