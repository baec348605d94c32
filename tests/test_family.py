"""Every family through optpipe against transformers' own loader."""

import json

import pytest
import torch
import transformers

from optpipe import model
from optpipe.checkpoint import Checkpoint
from optpipe.errors import InputError
from optpipe.family import FAMILIES, describe


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
