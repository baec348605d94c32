"""Calibration data and what is kept of it."""

import json

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from optpipe.calibrate import Calib, Cross, Gram, Squares, _read
from optpipe.checkpoint import Checkpoint
from optpipe.errors import InputError
from optpipe.quant.fourbits import Seen
from optpipe.structure.width import Moments


@pytest.fixture
def folder(tiny, tmp_path):
    """The tiny model with a tokenizer: one token a word 'w0' ... 'w199'."""
    for file in tiny().iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    tokenizer = Tokenizer(models.WordLevel({f"w{i}": i for i in range(200)}, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text(
        '{"tokenizer_class": "PreTrainedTokenizerFast"}'
    )
    return tmp_path


def words(count):
    return " ".join(f"w{i % 200}" for i in range(count))


@pytest.mark.parametrize("kind", ["txt", "jsonl"])
def test_windows_are_seeded_and_do_not_overlap(folder, tmp_path, kind):
    file = tmp_path / f"text.{kind}"
    file.write_text(words(200) if kind == "txt" else json.dumps({"text": words(200)}))
    calib = Calib(path=str(file), samples=5, tokens=16, seed=3)
    ids = calib.ids(Checkpoint(folder))
    assert ids.shape == (5, 16)
    assert ids.flatten().unique().numel() == 80
    assert ((ids[:, 1:] - ids[:, :-1]) == 1).all()
    assert torch.equal(ids, calib.ids(Checkpoint(folder)))
    other = Calib(path=str(file), samples=5, tokens=16, seed=4)
    assert not torch.equal(ids, other.ids(Checkpoint(folder)))


def test_windows_begin_as_the_tokenizer_begins_a_text(folder, tmp_path):
    settings = json.loads((folder / "tokenizer.json").read_text())
    settings["model"]["vocab"]["<s>"] = 200
    tokenizer = Tokenizer.from_str(json.dumps(settings))
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 200)]
    )
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    (tmp_path / "text.txt").write_text(words(200))
    ids = Calib(path=str(tmp_path / "text.txt"), samples=5, tokens=16).ids(Checkpoint(folder))
    assert ids.shape == (5, 16)
    assert (ids[:, 0] == 200).all()
    assert ids[:, 1:].unique().numel() == 75 and ids[:, 1:].max() < 200


def test_random_tokens_need_no_text(tiny):
    calib = Calib(source="random", samples=3, tokens=10)
    ids = calib.ids(Checkpoint(tiny()))
    assert ids.shape == (3, 10) and ids.max() < 288 and ids.unique().numel() > 20


def test_bad_input_is_one_clear_error(folder, tiny, tmp_path):
    short = tmp_path / "short.txt"
    short.write_text(words(40))
    checkpoint = Checkpoint(folder)
    with pytest.raises(InputError, match=r"samples=5.*tokens=16.*80 tokens.*has 40"):
        Calib(path=str(short), samples=5, tokens=16).ids(checkpoint)
    with pytest.raises(InputError, match=r"tokens=129 exceeds the context of 128"):
        Calib(tokens=129).ids(checkpoint)
    with pytest.raises(InputError, match=r"nowhere\.txt"):
        Calib(path="nowhere.txt", tokens=16).ids(checkpoint)
    with pytest.raises(InputError, match="no tokenizer; use calib=random"):
        Calib(path=str(short), samples=1, tokens=16).ids(Checkpoint(tiny()))
    with pytest.raises(ValueError, match=r"source.*'web'"):
        Calib(source="web")
    with pytest.raises(ValueError, match="0 x 16"):
        Calib(samples=0, tokens=16)


def test_statistics_do_not_depend_on_how_inputs_arrive():
    x = torch.randn(90, 7)
    gram, squares = Gram(7), Squares(7)
    for part in x.split([1, 40, 49]):
        gram.add(part)
        squares.add(part)
    exact = x.double().T @ x.double()
    torch.testing.assert_close(gram.mean_CC, exact / 90, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(squares.norm_C, exact.diagonal().sqrt(), atol=1e-12, rtol=1e-9)
    factor, divided = torch.rand(7) + 0.1, Gram(7)
    divided.add(x / factor)
    gram.divide(factor)
    torch.testing.assert_close(gram.mean_CC, divided.mean_CC, atol=1e-4, rtol=1e-5)
    torch.testing.assert_close(gram.mean_abs_C, divided.mean_abs_C, atol=1e-6, rtol=1e-5)


def test_a_broken_tokenizer_or_one_of_another_model_is_one_clear_error(folder, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text(words(200))
    config = json.loads((folder / "config.json").read_text()) | {"vocab_size": 100}
    (folder / "config.json").write_text(json.dumps(config))
    calib = Calib(path=str(text), samples=2, tokens=16)
    with pytest.raises(InputError, match=r"token 199.*vocabulary ends at 99"):
        calib.ids(Checkpoint(folder))
    (folder / "tokenizer.json").write_text("{")
    with pytest.raises(InputError, match="cannot read the tokenizer"):
        calib.ids(Checkpoint(folder))


def test_json_lines_may_hold_any_character_and_blank_lines(tmp_path):
    file = tmp_path / "text.jsonl"
    file.write_text('{"text": "one\u2028two\x85three"}\n\n{"text": "four"}\n', encoding="utf-8")
    assert _read(file) == "one\u2028two\x85three\n\nfour"
    file.write_text('{"text": "one"}\n{"tekst": "two"}\n')
    with pytest.raises(InputError, match=r"text\.jsonl': line 2: KeyError: 'text'"):
        _read(file)


def test_more_tokens_than_memory_are_refused():
    with pytest.raises(ValueError, match="at most 100,000,000 tokens, got 100000000 x 512"):
        Calib(samples=100_000_000, tokens=512)


def test_a_mixture_takes_windows_of_every_text_by_its_share(folder, tmp_path):
    """Largest remainders: 7 samples at 3 : 2 : 1 are 3.5, 2.33 and 1.17, so 4, 2 and 1."""
    files = {}
    for index, share in enumerate((3.0, 2.0, 1.0)):
        file = tmp_path / f"{index}.txt"
        file.write_text(" ".join(f"w{50 * index + i % 50}" for i in range(200)))
        files[str(file)] = share
    calib = Calib(mixture=files, samples=7, tokens=16)
    ids = calib.ids(Checkpoint(folder))
    assert (ids[:, 0] // 50).tolist() == [0, 0, 0, 0, 1, 1, 2]
    assert torch.equal(ids // 50, (ids[:, :1] // 50).expand(7, 16))
    assert calib.facts()["calib_text"] == files
    alone = Calib(path=next(iter(files)), samples=4, tokens=16).ids(Checkpoint(folder))
    assert torch.equal(ids[:4], alone)
    with pytest.raises(InputError, match=r"gives '.*2.txt' none of calib.samples=2; raise these"):
        Calib(mixture=files, samples=2, tokens=16).ids(Checkpoint(folder))


@pytest.mark.parametrize(
    "fields",
    [
        {"mixture": {}},
        {"mixture": {"a.txt": 0.0}},
        {"mixture": {"a.txt": 1.0, "./a.txt": 1.0}},
        {"mixture": {"a.txt": 1.0}, "path": "b.txt"},
        {"mixture": {"a.txt": 1.0}, "source": "random"},
    ],
)
def test_a_mixture_that_says_nothing_is_refused(fields):
    with pytest.raises(ValueError, match="mixture must be files, each once, with shares above 0"):
        Calib(**fields)


@pytest.mark.parametrize("statistic", [Gram, Cross, Moments, Seen])
@pytest.mark.parametrize(("samples", "warned"), [(12, False), (11, True)])
def test_few_tokens_for_each_input_are_warned_of_and_told(statistic, tiny, caplog, samples, warned):
    """down_proj has 96 inputs: 8 tokens for each are 12 samples of 64."""
    calib = Calib(source="random", samples=samples, tokens=64)
    wanted = frozenset({"model.layers.0.mlp.down_proj", "model.layers.0.mlp.up_proj"})
    observation = calib.observe(Checkpoint(tiny()), wanted, statistic)
    assert observation.facts["calib_tokens_per_input"] == pytest.approx(samples * 64 / 96)
    assert ("raise calib.samples to 12" in caplog.text) == warned
    caplog.clear()
    assert "calib_tokens_per_input" not in calib.observe(Checkpoint(tiny()), wanted, Squares).facts
    assert not caplog.text
