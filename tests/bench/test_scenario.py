from pathlib import Path

import numpy as np
import pytest
from omegaconf import OmegaConf

from optpipe.bench.scenario import Cell, Scenario, cells, check, hash_ids, prompts
from optpipe.errors import InputError

CONF = sorted((Path(__file__).parents[2] / "conf" / "scenario").glob("*.yaml"))


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
    check({path.stem: OmegaConf.to_object(node)}, 1024)


def test_there_are_the_three_scenarios_of_every_report():
    assert {"single", "batch", "long_text"} <= {path.stem for path in CONF}


def test_what_does_not_fit_is_refused_with_what_would():
    scenario = Scenario(prompt_tokens=[100, 97], new_tokens=32)
    check({"long": scenario}, 132)
    with pytest.raises(InputError, match=r"'long'.*do not fit in 128.*prompt_tokens=\[96\]"):
        check({"long": scenario}, 128)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"batch": []}, r"batch=\[\]"),
        ({"batch": [0]}, r"batch=\[0\]"),
        ({"prompt_tokens": [8, -1]}, r"prompt_tokens=\[8, -1\]"),
        ({"new_tokens": 0}, "new_tokens=0"),
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
