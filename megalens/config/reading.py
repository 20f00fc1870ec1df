"""YAML files and ``key=value`` arguments merged into one checked configuration; every refusal is one line that names the mend."""

from __future__ import annotations

import dataclasses
import difflib
import functools
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, get_type_hints

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from megalens import shipped
from megalens.config.fields import ConfigError, Schedule, Weight
from megalens.config.rules import validate
from megalens.config.schema import Config
from megalens.config.yaml_core import read_yaml


def load_config(arguments: list[str], source: str = "the command line") -> Config:
    """Command-line arguments to a checked configuration.

    ``config=FILE`` names a YAML file (default: the built-in defaults); conf/x.yaml is megalens' own where there is none here. Other
    ``key=value`` or ``--key=value`` arguments override it, the last one winning. ``--deepspeed FILE`` is taken as ``deepspeed=FILE``;
    ``--local_rank=N`` (from launchers) is ignored.

    Args:
        source: where the arguments come from, for messages.

    Raises:
        ConfigError: unknown key, wrong type, empty value, missing file, or settings that contradict each other.
    """
    arguments = _normalise(arguments)
    files = [a.split("=", 1)[1] for a in arguments if a.startswith("config=")]
    overrides = [a for a in arguments if not a.startswith("config=")]
    if len(files) > 1:
        raise ConfigError(f"config= is given {len(files)} times; give one file and put what is common in its defaults:")
    merged = OmegaConf.structured(Config)
    if files:
        if not files[0]:
            raise ConfigError("config= is empty; name a file, e.g. config=conf/demo.yaml")
        try:
            merged = _merge_file(merged, shipped.find(files[0]), ())
        except OSError as error:
            raise ConfigError(f"config={files[0][:200]} cannot be read: {error.strerror or error}") from None
        named: Any = OmegaConf.to_container(merged, resolve=False)
        if named["run_name"] is None:
            merged.run_name = Path(files[0]).stem
    for argument in overrides:
        merged = _merge_argument(merged, argument, source)
    return _finish(merged)


def config_from_dict(values: dict, arguments: Sequence[str] = ()) -> Config:
    """A checked configuration from a plain dictionary (as saved in a checkpoint), with ``key=value`` arguments merged into it.

    A ``${...}`` in the dictionary is text: what is saved refers to nothing.
    """
    merged = _merge(OmegaConf.structured(Config), _literal(values), "the saved configuration")
    for argument in _normalise(list(arguments)):
        merged = _merge_argument(merged, argument, "the command line")
    return _finish(merged)


def config_to_dict(config: Config) -> dict[str, Any]:
    """The configuration as plain values that :func:`config_from_dict` reads back; a constant weight is a number."""

    def plain(value: Any) -> Any:
        if isinstance(value, Weight) and value.type == "constant":
            return value.value
        if dataclasses.is_dataclass(value):
            return {f.name: plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
        if isinstance(value, dict):
            return {name: plain(each) for name, each in value.items()}
        return list(value) if isinstance(value, list) else value

    return plain(config)


def config_to_yaml(config: Config) -> str:
    """The configuration as YAML that ``config=`` reads back."""
    return yaml.safe_dump(_literal(config_to_dict(config)), sort_keys=False, allow_unicode=True)


def _literal(value: Any) -> Any:
    """Values in which no text is a reference to another: ``\\${`` stands for ``${``, as OmegaConf reads it."""
    if isinstance(value, dict):
        return {key: _literal(each) for key, each in value.items()}
    if isinstance(value, list):
        return [_literal(each) for each in value]
    return re.sub(r"(\\*)\$\{", r"\1\1\\${", value) if isinstance(value, str) else value


def _normalise(arguments: list[str]) -> list[str]:
    result, rest = [], list(arguments)
    while rest:
        argument = rest.pop(0)
        if argument == "--deepspeed":
            if not rest:
                raise ConfigError("--deepspeed wants a file, e.g. --deepspeed ds_configs/z3.json")
            argument = f"deepspeed={rest.pop(0)}"
        argument = argument.removeprefix("--")
        if argument.startswith(("local_rank=", "local-rank=")):
            continue
        if argument in _keys(Config):
            raise ConfigError(f"'{argument}' has no value; write {argument}=VALUE")
        if "=" not in argument:
            raise ConfigError(f"'{argument}' is no setting; write key=value" + nearest(argument, ["config", *_keys(Config)]))
        result.append(argument)
    return result


def _merge_file(base, path: Path, seen: tuple[Path, ...]):
    if path.is_dir():
        raise ConfigError(f"config file {path} is a folder; name one of its files, e.g. config={_some_file(path)}")
    if not path.is_file():
        near = difflib.get_close_matches(path.name, [p.name for p in path.parent.glob("*.yaml")], 1) if path.parent.is_dir() else []
        raise ConfigError(f"config file {path} does not exist" + (f"; did you mean {path.parent / near[0]}?" if near else ""))
    if path.resolve() in seen:
        raise ConfigError(f"{path}: its defaults lead back to itself")
    try:
        values = read_yaml(path.read_text(encoding="utf-8"), _is_text)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is no valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(values, dict | None):
        raise ConfigError(f"{path} holds no key: value pairs")
    values = _unfolded(values or {}, str(path))
    parents = values.pop("defaults", None) or []
    if not isinstance(parents, list) or not all(isinstance(parent, str) for parent in parents):
        raise ConfigError(f"{path}: defaults: is a list of file names in the same folder without .yaml, e.g. defaults: [demo_warmstart]")
    for parent in parents:
        if parent != "_self_":
            base = _merge_file(base, path.parent / f"{parent}.yaml", (*seen, path.resolve()))
    return _merge(base, values, str(path))


def _some_file(folder: Path) -> Path:
    return next(iter(sorted(folder.glob("*.yaml"))), folder / "NAME.yaml")


def _unfolded(values: dict, path: str) -> dict:
    """The settings of a file with dotted keys (``dataset.name: x``) as sections."""
    result: dict = {}
    for key, value in values.items():
        *sections, last = str(key).split(".") if kind_of(str(key)) is not None else [key]
        place: Any = result
        for section in sections:
            place = place.setdefault(section, {}) if isinstance(place, dict) else place
        value = _unfolded(value, path) if isinstance(value, dict) else value
        there = place.get(last) if isinstance(place, dict) else None
        if isinstance(there, dict) and isinstance(value, dict) and not there.keys() & value.keys():
            value = there | value
        elif not isinstance(place, dict) or last in place:
            raise ConfigError(f"{path}: {key} is given twice, once as a section and once with a dot; leave one of the two out")
        place[last] = value
    return result


def _is_text(path: tuple[str, ...]) -> bool:
    """Is the setting under these keys text, or a list of texts?"""
    return "str" in str(kind_of(".".join(path)))


def _merge_argument(base, argument: str, source: str):
    key, value = argument.split("=", 1)
    if value == "None":  # how W&B's agent writes a null
        argument, value = f"{key}=null", "null"
    if value == "":
        raise ConfigError(f"{key}= is empty; give it a value (in a sweep: does the parameter's name match a key of conf/config.yaml?)")
    _check_key(key, source)
    kind = kind_of(key)
    is_list = str(kind).startswith("list")
    if value != "null" and _is_text((key,)) and not is_list:  # text as it stands: 001, on and a: b are no numbers, truths or mappings
        return _merge(base, _nested(key, value), argument)
    try:
        return _merge(base, _nested(key, read_yaml(value, lambda path: _is_text((key, *path)))), argument)
    except yaml.YAMLError:
        raise ConfigError(f"{argument}: this is no {kind}") from None


def _merge(base, values: Any, where: str):
    values = _with_weights(values, where)
    for key, value in _flat(values).items():
        _check_key(key, where)
        _check_value(key, value, where)
    try:
        return OmegaConf.merge(base, OmegaConf.create(values))
    except OmegaConfBaseException as error:
        key = error.full_key if error.full_key and not where.startswith(f"{error.full_key}=") else ""
        raise ConfigError(": ".join(filter(None, [where, key, _line(error)]))) from None


def _with_weights(values: dict, where: str, prefix: str = "") -> dict:
    """The values with a constant schedule in place of each plain number that is given for a schedule."""
    result = {}
    for name, value in values.items():
        key = f"{prefix}{name}"
        kind = kind_of(key)
        if isinstance(kind, type) and issubclass(kind, Schedule) and not isinstance(value, dict):
            if isinstance(value, bool) or not isinstance(value, (int, float)):
                raise ConfigError(f"{where}: {key} is a number or a schedule; write {key}=0.5, or {key}.type=linear and its other keys")
            value = {"type": "constant", "value": value}
        result[name] = _with_weights(value, where, f"{key}.") if isinstance(value, dict) else value
    return result


def _check_value(key: str, value, where: str) -> None:
    """Refuse, in plainer words than OmegaConf's, a value where a section is meant, a null and a list of no list."""
    kind = kind_of(key)
    if dataclasses.is_dataclass(kind) and not isinstance(value, dict):
        raise ConfigError(f"{where}: {key} is a section; set its keys, e.g. {key}.{dataclasses.fields(kind)[0].name}=...")
    if value is None and not dataclasses.is_dataclass(kind) and "None" not in str(kind):
        raise ConfigError(f"{where}: {key} cannot be null")
    if str(kind).startswith("list") and not isinstance(value, list):
        raise ConfigError(f"{where}: {key} is a list; write {key}=[a,b,...]")


def _check_key(key: str, where: str) -> None:
    if kind_of(key) is None:
        raise ConfigError(f"unknown key '{key}' in {where}" + nearest(key, known_keys()))


def _flat(values: dict, prefix: str = "") -> dict[str, Any]:
    """Nested settings as dotted keys; an empty section stays a section."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) and value else {f"{prefix}{key}": value}
    return flat


def _nested(key: str, value) -> dict:
    for part in reversed(key.split(".")):
        value = {part: value}
    return value


def kind_of(key: str) -> Any:
    """The type of a dotted key, a section's being its dataclass; None: there is no such key."""
    known = _keys(Config)
    if key not in known and key.startswith("terms."):  # of any name; the objective knows which there are
        name, _, rest = key.removeprefix("terms.").partition(".")
        return Weight if name and not rest else known.get(f"alpha_schedule.{rest}")
    return known.get(key)


@functools.cache
def _keys(cls, prefix: str = "") -> dict[str, Any]:
    """Every dotted key and its type; a section's type is its dataclass."""
    keys: dict[str, Any] = {}
    for name, kind in get_type_hints(cls).items():
        keys[prefix + name] = kind.__name__ if kind in (bool, int, float, str) else kind
        if isinstance(kind, type) and dataclasses.is_dataclass(kind):
            keys |= _keys(kind, f"{prefix}{name}.")
    return keys


def known_keys(sections: bool = False) -> list[str]:
    """Every dotted key: ``dataset.name``, and ``dataset`` where sections count too."""
    return [key for key, kind in _keys(Config).items() if sections or kind is Weight or not dataclasses.is_dataclass(kind)]


def nearest(key: str, known: Iterable[str]) -> str:
    """The end of a message about an unknown key: the one meant.

    That is one of the same last part or initials (lr), of a close last part in the section, or of close spelling.
    """
    section, _, last = key.rpartition(".")
    leaves = {name: name.rpartition(".")[2] for name in known}
    siblings = {leaf: name for name, leaf in leaves.items() if name.rpartition(".")[0] == section}
    near = [name for name, leaf in leaves.items() if last and last in (leaf, "".join(word[:1] for word in leaf.split("_")))]
    near += [siblings[leaf] for leaf in difflib.get_close_matches(last, siblings, 1, 0.5)]
    near += difflib.get_close_matches(key, leaves, 1, 0.6)
    return f"; did you mean '{near[0]}'?" if near else "; conf/config.yaml lists every key"


def _line(error: Exception) -> str:
    return str(error).strip().splitlines()[0]


def _finish(merged) -> Config:
    try:
        config: Any = OmegaConf.to_object(merged)
    except OmegaConfBaseException as error:
        raise ConfigError(": ".join(filter(None, [error.full_key, _line(error).rpartition("resolving interpolation: ")[2]]))) from None
    validate(config)
    return config
