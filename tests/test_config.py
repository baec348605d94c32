"""From a config node to a dataclass: every key, type and value is checked, every error names it."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest
from omegaconf import OmegaConf

from optpipe.config import build, build_stages, data_dir, unknown, unused
from optpipe.errors import InputError
from optpipe.stage import Stage


@dataclass
class Data:
    samples: int = 4

    def __post_init__(self) -> None:
        if self.samples < 1:
            raise ValueError(f"samples must be at least 1, got {self.samples}")


@dataclass(frozen=True, kw_only=True)
class Method(Stage):
    bits: int = 4
    name: str
    data: Data = field(default_factory=Data)
    rows: list[str] | None = None

    def __post_init__(self) -> None:
        if self.bits not in (3, 4):
            raise ValueError(f"bits must be 3 or 4, got {self.bits}")

    def run(self, source, out, progress):
        return {}


def made(**fields):
    target = f"{Method.__module__}.Method"
    return build(OmegaConf.create({"m": {"_target_": target, **fields}}).m, Stage, "quant")


def test_fields_arrive_typed():
    assert made(name="a", data={"samples": 2}, rows=["x"]) == Method(
        name="a", data=Data(samples=2), rows=["x"]
    )


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"name": "a", "bitz": 3},
            "unknown key of quant 'bitz'; did you mean 'bits'? allowed: bits",
        ),
        (
            {"name": "a", "group_size": 3},
            "unknown key of quant 'group_size'; allowed: bits, data, name, rows; another option "
            "of quant has it: if a recipe sets it, add '~quant.group_size'",
        ),
        ({"name": "a", "data": {"sample": 3}}, "unknown key of quant.data 'sample'; did you mean"),
        ({"name": "a", "bits": "x"}, "quant.bits: Value 'x' of type 'str'"),
        ({"name": "a", "bits": 3.0}, "quant.bits: Value '3.0' of type 'float'"),
        ({"name": "a", "data": {"samples": "q"}}, "quant.data.samples: Value 'q'"),
        ({"name": "a", "bits": 5}, "quant: bits must be 3 or 4, got 5"),
        ({"name": "a", "data": {"samples": 0}}, "quant: samples must be at least 1, got 0"),
        ({"bits": 4}, "quant.name has no value; give one: quant.name=..."),
        ({"name": None}, "quant.name: "),
        ({"name": "a", "rows": "x"}, "quant.rows: "),
    ],
)
def test_a_wrong_field_is_named(fields, message):
    with pytest.raises(InputError) as caught:
        made(**fields)
    assert str(caught.value).startswith(message)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "target", ["os.system", "os", "nowhere.Thing", "optpipe.stage.Nothing", ""]
)
def test_only_a_class_of_the_expected_kind_is_made(target):
    with pytest.raises(InputError, match="quant"):
        build(OmegaConf.create({"_target_": target}), Stage, "quant")


def slots(**changes):
    target = f"{Method.__module__}.Method"
    node = {"_target_": target, "name": "a"}
    base = {"quant": node, "prune": node, "stages": ["quant"], "store": "s", "calib": {"x": 1}}
    return OmegaConf.create({**base, **changes})


def test_stages_come_in_the_order_of_the_list():
    assert list(build_stages(slots(stages=["quant", "prune"]))) == ["quant", "prune"]
    assert list(build_stages(slots(stages=["prune", "quant"]))) == ["prune", "quant"]


def test_a_slot_that_is_not_listed_is_checked_too():
    node = {"_target_": f"{Method.__module__}.Method", "name": "a", "bits": 7}
    with pytest.raises(InputError, match="prune: bits must be 3 or 4, got 7"):
        build_stages(slots(prune=node))


def test_a_recipe_may_add_a_slot_but_not_a_key():
    node = {"_target_": f"{Method.__module__}.Method", "name": "a"}
    assert list(build_stages(slots(more=node, stages=["more", "quant"]))) == ["more", "quant"]
    with pytest.raises(InputError, match="unknown key 'stagez'; did you mean 'stages'"):
        build_stages(slots(stagez=[]))


def test_an_override_without_effect_is_found():
    given = ["prune.bits=3", "quant.bits=3", "+prune.x=1", "prune=wanda", "calib.x=2", "store=z"]
    assert unused(slots(), given) == ["prune.bits=3", "+prune.x=1", "prune=wanda"]


def test_suggestions():
    assert unknown("recipe", "defalt", ["a", "default"]) == (
        "unknown recipe 'defalt'; did you mean 'default'? allowed: a, default"
    )
    assert "did you mean" not in unknown("recipe", "zzz", ["a", "default"])


def test_data_lies_beside_the_package_in_a_checkout():
    assert (data_dir("conf") / "config.yaml").is_file()
    assert (data_dir("recipes") / "default.yaml").is_file()
