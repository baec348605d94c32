import json
from pathlib import Path

import numpy as np
import pytest
from omegaconf import OmegaConf
from transformers import AutoTokenizer

import optpipe.demo
from optpipe.bench.scenario import (
    Cell,
    Scenario,
    Serving,
    cells,
    check,
    hash_ids,
    prompts,
    read_texts,
)
from optpipe.config import typed
from optpipe.errors import InputError
from optpipe.stage import Limits

CONF = sorted((Path(__file__).parents[2] / "conf" / "scenario").glob("*.yaml"))

DEMO = Path(optpipe.demo.__file__).parent


def test_a_scenario_is_every_pair_of_its_lists():
    scenario = Scenario(batch=[1, 4], prompt_tokens=[8, 16], new_tokens=2)
    found = cells({"sweep": scenario, "one": Scenario()})
    assert found[:4] == [Cell("sweep", b, p, 2) for b, p in [(1, 8), (1, 16), (4, 8), (4, 16)]]
    assert found[4:] == [Cell("one", 1, 128, 32)]


@pytest.mark.parametrize("path", CONF, ids=lambda path: path.stem)
def test_every_option_is_a_scenario_under_its_own_name_that_fits_the_demo(path):
    content = OmegaConf.load(path)
    assert list(content) == [path.stem]
    node = OmegaConf.merge(OmegaConf.structured(Scenario), content[path.stem])
    check({path.stem: OmegaConf.to_object(node)}, Limits(tokens=1024))


def test_there_are_the_scenarios_of_the_readme():
    names = {"single", "batch", "long_text", "prefill_only", "decode_at_depth", "server", "trace"}
    assert names <= {path.stem for path in CONF}


@pytest.mark.parametrize(
    ("prompt", "new", "advice"),
    [
        (1, 200, r"'scenario.s.new_tokens=127' or fewer"),
        (200, 28, r"'scenario.s.prompt_tokens=\[100\]' or fewer"),
        (200, 200, r"prompt_tokens=\[64\]' and 'scenario.s.new_tokens=64'"),
    ],
)
def test_what_is_advised_does_fit(prompt, new, advice):
    with pytest.raises(InputError, match=advice):
        check({"s": Scenario(prompt_tokens=[prompt], new_tokens=new)}, Limits(tokens=128))


def test_every_option_has_a_verdict_on_speed():
    for path in CONF:
        assert OmegaConf.load(path)[path.stem].primary, path


def test_what_does_not_fit_is_refused_with_what_would():
    scenario = Scenario(prompt_tokens=[100, 97], new_tokens=32)
    check({"long": scenario}, Limits(tokens=132))
    with pytest.raises(InputError, match=r"'long'.*do not fit in 128.*prompt_tokens=\[96\]"):
        check({"long": scenario}, Limits(tokens=128))


def test_more_rows_than_an_engine_is_built_for_are_refused_with_both_ways_out():
    scenario = Scenario(batch=[4, 16], prompt_tokens=[8])
    check({"batch": scenario}, Limits(tokens=64, rows=16, rows_key="build.max_batch"))
    with pytest.raises(InputError) as error:
        check({"batch": scenario}, Limits(tokens=64, rows=8, rows_key="build.max_batch"))
    assert str(error.value) == (
        "scenario 'batch': 16 rows at once, but build.max_batch is 8; "
        "set 'scenario.batch.batch=[8]' or 'build.max_batch=16'"
    )


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"batch": []}, r"batch=\[\]"),
        ({"batch": [0]}, r"batch=\[0\]"),
        ({"prompt_tokens": [8, -1]}, r"prompt_tokens=\[8, -1\]"),
        ({"new_tokens": 0}, "new_tokens=0"),
        ({"primary": ["speed"]}, "'speed' is not one of ttft_s, prefill_s, tpot_s"),
        ({"primary": ["queue_s"]}, "'queue_s' is not one of"),
        ({"primary": ["e2e_s", "e2e_s"]}, "each metric once"),
        ({"new_tokens": 1}, r"primary=\[ttft_s\]"),
    ],
)
def test_bad_values_are_refused(fields, message):
    with pytest.raises(InputError, match=message):
        Scenario(**fields)


def test_prompts_come_from_the_seed_and_differ_between_rows():
    cell = Cell("batch", 4, 64, 8)
    ids = prompts(cell, 288, seed=3)
    assert ids.shape == (4, 64) and ids.min() >= 0 and ids.max() < 288
    assert len({row.tobytes() for row in ids}) == 4
    np.testing.assert_array_equal(ids, prompts(cell, 288, seed=3))
    assert hash_ids(ids) != hash_ids(prompts(cell, 288, seed=4))


def test_every_seed_has_its_own_prompts():
    cell = Cell("batch", 4, 64, 8)
    blocks = [prompts(cell, 288, seed) for seed in (1, 2, 3)]
    assert len({row.tobytes() for ids in blocks for row in ids}) == 12


def texts(tmp_path, longest, name, content):
    file = tmp_path / name
    file.write_text(content)
    return read_texts({"own": Scenario(prompts=str(file), prompt_tokens=[longest])}, DEMO)


def test_prompts_of_the_user_s(tmp_path):
    found = texts(tmp_path, 4, "p.txt", "def main():\n\nimport os, sys\nreturn None\n")["own"]
    tokenizer = AutoTokenizer.from_pretrained(DEMO)
    cell = Cell("own", 3, 4, 2)
    rows = prompts(cell, 4096, 0, found)
    begins = {tokenizer.decode(row)[:6] for row in rows}
    assert begins == {"def ma", "import", "return"}, "every row begins at another prompt"
    np.testing.assert_array_equal(rows, prompts(cell, 4096, 0, found))
    many = prompts(cell._replace(batch=8), 4096, 0, found)
    assert len({row.tobytes() for row in many}) == 8, (
        "more rows than prompts, and still no two equal"
    )


def test_jsonl_prompts_are_those_of_a_text(tmp_path):
    lines = [{"prompt": "def main():\n"}, {"text": "import os, sys\n"}, {"prompt": "return None\n"}]
    jsonl = "\n".join(json.dumps(line) for line in lines)
    one = texts(tmp_path, 4, "p.jsonl", jsonl)["own"]
    two = texts(tmp_path, 4, "p.txt", "def main():\nimport os, sys\nreturn None\n")["own"]
    np.testing.assert_array_equal(one.ids, two.ids)
    np.testing.assert_array_equal(one.starts, two.starts)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("p.jsonl", '{"prompt": "a b c d e f"}\n{"prompts": 3}', "line 2: no text under"),
        ("p.jsonl", "{", "line 1: Expecting property name"),
        ("p.txt", "a", "has 1 tokens, fewer than the 4 of the longest prompt"),
        ("p.txt", "", "has 0 tokens"),
    ],
)
def test_bad_prompt_files_are_named(tmp_path, name, content, message):
    with pytest.raises(InputError, match=message):
        texts(tmp_path, 4, name, content)


def test_a_prompt_file_that_is_not_there():
    with pytest.raises(InputError, match=r"'none.txt': No such file"):
        read_texts({"own": Scenario(prompts="none.txt")}, DEMO)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"arrivals": "uniform"}, "arrivals=uniform: one of poisson, burst, closed, trace"),
        ({"arrivals": "closed", "rate_per_s": 5.0}, "rate_per_s=5.0: arrivals=closed has its own"),
        ({"trace": "t.jsonl"}, "trace=t.jsonl: read by arrivals=trace, not poisson"),
        ({"rate_per_s": 0.0}, "rate_per_s=0.0"),
        ({"shape": 0.0}, "shape=0.0"),
        ({"requests": 0}, "requests=0"),
        ({"sigma": -1.0}, "sigma=-1.0"),
        ({"scale": {"time": 0.0}}, "both above 0"),
        ({"scale": {"length": float("inf")}}, "both above 0"),
        ({"objective": {"ttft_s": 0.0}}, r"objective.ttft_s=0.0"),
        ({"objective": {"share": 1.5}}, r"objective.share=1.5"),
        ({"rate": 3}, "did you mean"),
    ],
)
def test_bad_servers_are_one_line(fields, message):
    with pytest.raises(InputError, match=message) as caught:
        typed({"serving": fields}, Scenario, "scenario.server")
    assert "\n" not in str(caught.value) and "scenario.server" in str(caught.value)


def test_a_trace_that_asks_for_more_than_the_scenario_allows_is_refused():
    serving = {"arrivals": "trace", "scale": {"length": 0.5}}
    scenario = typed({"serving": serving, "prompt_tokens": [600]}, Scenario, "s")
    with pytest.raises(InputError, match=r"'t': line \d+ of .*trace.jsonl' asks for .* 600 \+ 32"):
        check({"t": scenario}, Limits(tokens=1024))


def test_a_trace_has_its_own_prompts():
    with pytest.raises(InputError, match="hash_ids"):
        Scenario(prompts="p.txt", serving=Serving(arrivals="trace"))
