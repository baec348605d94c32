"""Every recipe composes, its stages fit together, and it says what it is and how to run it."""

from functools import cache

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from optpipe import calibrate, pipeline
from optpipe.config import build, build_stages, data_dir, register_recipes
from optpipe.source import Source

RECIPES = sorted(path.stem for path in data_dir("recipes").glob("*.yaml"))
NEEDED = ["baseline", "default", "int4_ort", "int8_ort", "lowrank_ort", "sparse24_ort",
          "fp16_trt", "fp8_trt", "int4_trt", "int8_trt", "lowrank_trt", "sparse24_trt"]  # fmt: skip


@pytest.fixture(autouse=True, scope="module")
def registered():
    register_recipes(data_dir("recipes"))
    with pytest.MonkeyPatch.context() as patch:  # they all calibrate on the same text
        patch.setattr(calibrate, "tokenize", cache(calibrate.tokenize))
        yield


@pytest.fixture(scope="module")
def keys():
    """Of a run, at the top."""
    return set(composed())


def composed(*overrides):
    with initialize_config_dir(version_base="1.3", config_dir=str(data_dir("conf"))):
        return compose("config", overrides=list(overrides))


def test_none_is_missing():
    assert set(NEEDED) <= set(RECIPES)


@pytest.mark.parametrize("recipe", RECIPES)
def test_recipe_composes_and_fits(recipe, tmp_path):
    cfg = composed(f"recipe={recipe}")
    stages = build_stages(cfg)
    steps = pipeline.check(stages, build(cfg.model, Source, "model"), tmp_path)
    assert [step.name for step in steps] == list(cfg.stages)
    assert all(step.size_bytes > 0 for step in steps)


@pytest.mark.parametrize("recipe", RECIPES)
def test_recipe_says_how_to_run_it_and_adds_nothing_but_choices(recipe, keys):
    path = data_dir("recipes") / f"{recipe}.yaml"
    text = path.read_text()
    argument = "" if recipe == "default" else f" recipe={recipe}"
    assert text.splitlines()[0].startswith("# ")
    assert text.splitlines()[0].endswith(f": python -m optpipe{argument}")
    assert "_target_" not in text and len(text.splitlines()) <= 20
    content = OmegaConf.load(path)
    content.pop("defaults", None)
    assert set(content) <= keys
    for group, values in content.items():
        if OmegaConf.is_dict(values):
            options = data_dir("conf").glob(f"{group}/*.yaml")
            allowed = {key for option in options for key in OmegaConf.load(option)}
            assert set(values) <= allowed, f"{group} of {recipe} holds a key that no option has"


def test_the_bundled_shapes_are_no_model_options():
    options = {path.stem for path in data_dir("conf").glob("model/*.yaml")}
    shapes = {path.stem for path in data_dir("conf").glob("model/shapes/*.yaml")}
    assert shapes == {"llama_160m", "llama_1b", "llama_8b", "qwen3_0_6b"}
    assert not options & shapes


def test_random_weights_are_calibrated_on_random_tokens_unless_told_otherwise():
    assert composed("model=random").calib.source == "random"
    assert composed("model=random", "calib=text").calib.source == "text"
    assert composed().calib.source == "text"
