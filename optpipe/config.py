"""From YAML to validated objects, and from Hydra's errors to one line each.

This file and cli.py are the only ones that know Hydra.
"""

from __future__ import annotations

import difflib
import pkgutil
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import yaml
from hydra.core.config_store import ConfigStore
from hydra.errors import MissingConfigException, OverrideParseException
from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import (
    ConfigAttributeError,
    ConfigKeyError,
    MissingMandatoryValue,
    OmegaConfBaseException,
)

from optpipe.errors import InputError, one_line
from optpipe.stage import Stage

_PACKAGE = Path(__file__).resolve().parent
PLAIN_KEYS = ("stages", "store")
DATA_GROUPS = ("model", "calib", "scenario", "bench", "eval")
"""Groups whose options are no stages."""


def data_dir(name: str) -> Path:
    """conf/ and recipes/ lie beside the package in a checkout, inside it once installed."""
    inside = _PACKAGE / name
    return inside if inside.is_dir() else _PACKAGE.parent / name


def register_recipes(*folders: Path) -> None:
    """Make recipes/NAME.yaml selectable as ``recipe=NAME``; a later folder wins."""
    for path in (p for folder in folders for p in sorted(folder.glob("*.yaml"))):
        try:
            node = OmegaConf.load(path)
        except (yaml.YAMLError, OSError, UnicodeDecodeError) as error:
            raise InputError(f"cannot read recipe '{path}': {one_line(error)}") from error
        if not isinstance(node, DictConfig):
            continue  # some other YAML in a folder that happens to be called recipes
        ConfigStore.instance().store(group="recipe", name=path.stem, node=node, package="_global_")


def overview() -> str:
    """Every recipe with what its first line says, and every group with its options."""
    folders = (data_dir("recipes"), Path("recipes"))
    about = {
        path.stem: _about(path) for folder in folders for path in sorted(folder.glob("*.yaml"))
    }
    lines = ["recipe", *(f"  {name:14}{text}" for name, text in sorted(about.items())), ""]
    for name in groups():
        options = sorted(path.stem for path in (data_dir("conf") / name).glob("*.yaml"))
        lines.append(f"{name:16}{', '.join(options)}")
    return "\n".join(lines)


def _about(recipe: Path) -> str:
    first = recipe.read_text(encoding="utf-8").partition("\n")[0]
    return first.lstrip("# ").partition(": python")[0] if first.startswith("#") else ""


def build(node: DictConfig, base: type[Any] = Stage, name: str = "stage") -> Any:
    """Turn one config node into the object its ``_target_`` names, checking every key and type.

    ``name`` is the key of the node, for messages. Raises InputError.
    """
    try:
        cls = pkgutil.resolve_name(node["_target_"])
    except (ImportError, AttributeError, ValueError, TypeError) as error:
        raise InputError(f"{name}._target_: {one_line(error)}") from error
    if not (isinstance(cls, type) and issubclass(cls, base)):
        raise InputError(f"{name}: {node['_target_']} is not a {base.__name__}")
    return typed({key: node[key] for key in node if key != "_target_"}, cls, name)


def typed(fields: Any, cls: type[Any], name: str) -> Any:
    """A dataclass from a mapping. Raises InputError for an unknown key or a value it rejects."""
    try:
        if isinstance(fields, DictConfig):  # a merge would lose the keys that ${} points to
            fields = OmegaConf.to_container(fields, resolve=True)
        return OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(cls), fields))
    except OmegaConfBaseException as error:
        raise InputError(_field_error(error, name)) from error
    except ValueError as error:  # from __post_init__
        said = str(error)  # some name the whole key
        raise InputError(said if said.startswith(f"{name}.") else f"{name}: {said}") from error


def build_stages(cfg: DictConfig) -> dict[str, Stage]:
    """All stages of a run, in order. A slot that is configured but not listed is checked too."""
    _check_top_level(cfg)
    slots = {
        str(name): build(node, Stage, str(name))
        for name, node in cfg.items()
        if name not in DATA_GROUPS and isinstance(node, DictConfig)
    }
    names = cfg.stages
    if not isinstance(names, ListConfig):
        raise InputError(f"stages must be a list of {', '.join(slots)}, got '{names}'")
    for name in names:
        if name not in slots:
            raise InputError(unknown("stage", str(name), slots))
        if list(names).count(name) > 1:
            raise InputError(f"stage '{name}' is listed twice; a second slot needs its own name")
    return {name: slots[name] for name in names}


def check_choices(choices: Mapping[str, object]) -> None:
    """Raise InputError for a group of which several options, or none, were chosen.

    Hydra merges several in silence, and leaves the group out of ``choices``.
    """
    for group in ("recipe", *groups()):
        if group != "scenario" and group not in choices:
            raise InputError(
                f"{group} takes one name; for several runs: -m {group}=NAME,NAME; what does not "
                "run is left out of stages=[...]"
            )


def groups() -> list[str]:
    """The folders of conf/."""
    return [path.name for path in sorted(data_dir("conf").iterdir()) if path.is_dir()]


def unused(cfg: DictConfig, overrides: Iterable[str]) -> list[str]:
    """Overrides of a slot that is configured but not among the stages."""
    idle = {str(name) for name in cfg} - {*DATA_GROUPS, *PLAIN_KEYS, *cfg.stages}
    return [text for text in overrides if re.split(r"[.=]", text.lstrip("+~"))[0] in idle]


def build_scenarios(cfg: DictConfig, cls: type[Any]) -> dict[str, Any]:
    """The chosen scenarios by name; at least one."""
    if "scenario" not in cfg or not cfg.scenario:
        there = sorted(path.stem for path in (data_dir("conf") / "scenario").glob("*.yaml"))
        raise InputError(
            f"scenario=[] leaves nothing to measure: one or more of {', '.join(there)}"
        )
    return {str(k): typed(node, cls, f"scenario.{k}") for k, node in cfg.scenario.items()}


def _check_top_level(cfg: DictConfig) -> None:
    """A recipe may add a slot (a node with a ``_target_``), but a misspelt key must not pass."""
    if "recipe" in cfg:  # its keys would be ignored in silence
        raise InputError("this recipe file must begin with '# @package _global_'")
    known = (*groups(), *PLAIN_KEYS)
    for key, value in cfg.items_ex(resolve=False):
        slot = isinstance(value, DictConfig) and "_target_" in value
        if not slot and key not in known:
            raise InputError(unknown("key", str(key), (*known, "recipe")))


def unknown(kind: str, value: str, allowed: Iterable[str]) -> str:
    """What to tell a user who asked for something that is not there."""
    names = sorted(allowed)
    near = difflib.get_close_matches(value, names, n=1, cutoff=0.5)
    hint = f"; did you mean '{near[0]}'?" if near else ";"
    return f"unknown {kind} '{value}'{hint} allowed: {', '.join(names) or 'none'}"


def explain(error: Exception) -> str:
    """One line for what Hydra and OmegaConf say in many."""
    if isinstance(error, OverrideParseException):
        return f"cannot parse '{error.override}': {one_line(error).partition(' See http')[0]}"
    if isinstance(error, MissingConfigException):
        group, _, option = str(error.missing_cfg_file).rpartition("/")
        there = [path.stem for path in (data_dir("conf") / group).glob("*.yaml")]
        kind = group if group == "recipe" else f"option of {group}"
        return unknown(kind, option, error.options or there) if group else one_line(error)
    if isinstance(error, MissingMandatoryValue):
        return f"{error.full_key} has no value; give one: {error.full_key}=..."
    cause = error.__cause__
    if isinstance(os_error := cause or error, OSError):  # Hydra opens the log there
        return f"cannot write to the output folder: {one_line(os_error)}"
    if isinstance(cause, ConfigAttributeError | ConfigKeyError):
        return _key_error(cause)
    whole = _first_line(error) if isinstance(error, OmegaConfBaseException) else one_line(error)
    return f"{whole}: {_first_line(cause)}" if isinstance(cause, OmegaConfBaseException) else whole


def _field_error(error: OmegaConfBaseException, name: str) -> str:
    if isinstance(error, ConfigAttributeError | ConfigKeyError):
        said, key = _key_error(error, prefix=f"{name}."), str(error.full_key)
        options = (data_dir("conf") / name).glob("*.yaml")
        if any(key in OmegaConf.load(option) for option in options):
            said += f"; another option of {name} has it: if a recipe sets it, add '~{name}.{key}'"
        return said
    key = f"{name}.{error.full_key}" if error.full_key else name
    if isinstance(error, MissingMandatoryValue):
        return f"{key} has no value; give one: {key}=..."
    return f"{key}: {_first_line(error)}"


def _key_error(error: ConfigAttributeError | ConfigKeyError, prefix: str = "") -> str:
    parent = error.parent_node
    keys = [str(key) for key in parent] if isinstance(parent, DictConfig) else []
    if "hydra" in keys:  # the top level
        keys = ["recipe", *(key for key in keys if key != "hydra")]
    full_key = f"{prefix}{error.full_key}"
    owner, _, key = full_key.rpartition(".")
    kind = f"key of {owner}" if owner else "key"
    return unknown(kind, key, (k for k in keys if not k.startswith("_")))


def _first_line(error: OmegaConfBaseException) -> str:
    """Without the details OmegaConf appends, which are names of our classes."""
    return str(error).partition("\n")[0]
