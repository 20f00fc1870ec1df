"""YAML 1.2 as the files of settings and sweeps are read: ``no`` is a word, ``1:30`` is no number, ``1e-5`` is one.

Plain values are those of the core schema (https://yaml.org/spec/1.2.2/#103-core-schema): null, truths, whole numbers, numbers, text.
``010`` is ten. YAML 1.1, which PyYAML reads by itself, has more: truths called ``no`` and ``off``, numbers to the base 60 and 8, dates.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any, ClassVar

import yaml

_TAG = "tag:yaml.org,2002:"
_RESOLVED = (  # the kind of a plain value, what it looks like, and what it may begin with
    ("null", r"null|Null|NULL|~|", "nN~"),
    ("bool", r"true|True|TRUE|false|False|FALSE", "tTfF"),
    ("int", r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+", "-+0123456789"),
    ("float", r"[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)", "-+.0123456789"),
    ("merge", r"<<", "<"),
)
_MOST_VALUES = 100_000  # that aliases may make of a file


def read_yaml(text: str, is_text: Callable[[tuple[str, ...]], bool] = lambda path: False) -> Any:
    """The value that a YAML document holds; None: it is empty.

    Args:
        is_text: is the value under these keys text? Then it stays as it is written (``001``, ``1.10``, ``true``), but for null.

    Raises:
        yaml.YAMLError: it is no YAML, names a key twice, has a tag, or is nested or aliased beyond measure.
    """
    loader = _Loader(text.removeprefix("\ufeff"))
    try:
        root = loader.get_single_node()
        if root is None:
            return None
        _check_size(root, {})
        return loader.construct_document(_kept(root, (), is_text))
    except RecursionError:
        raise yaml.YAMLError("it is nested too deeply") from None
    except ValueError as error:  # an escape beyond Unicode
        raise yaml.YAMLError(str(error)) from None
    finally:
        loader.dispose()


class _Loader(yaml.SafeLoader):
    yaml_implicit_resolvers: ClassVar[dict[str, Any]] = {}
    yaml_constructors: ClassVar[dict[str, Any]] = {
        tag: make
        for tag, make in yaml.SafeLoader.yaml_constructors.items()
        if tag is None or tag.removeprefix(_TAG) in ("null", "str", "seq", "map")
    }

    def construct_mapping(self, node: yaml.Node, deep: bool = False) -> dict:
        if isinstance(node, yaml.MappingNode):
            written = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode) and key.value != "<<"]
            if twice := next((key for key in written if written.count(key) > 1), None):
                raise yaml.constructor.ConstructorError(None, None, f"duplicate key {twice}", node.start_mark)
        return super().construct_mapping(node, deep)

    def truth(self, node: yaml.ScalarNode) -> bool:
        if node.value.lower() not in ("true", "false"):  # tagged as one
            raise yaml.constructor.ConstructorError(None, None, f"'{node.value[:20]}' is no truth", node.start_mark)
        return node.value.lower() == "true"

    def whole_number(self, node: yaml.ScalarNode) -> int:
        try:
            return int(node.value, {"0o": 8, "0x": 16}.get(node.value[:2], 10))
        except ValueError:  # of thousands of digits
            raise yaml.constructor.ConstructorError(None, None, f"'{node.value[:20]}...' is no number", node.start_mark) from None

    def number(self, node: yaml.ScalarNode) -> float:
        try:
            return float(re.sub(r"\.(?=[iInN])", "", node.value))
        except ValueError:  # tagged as one
            raise yaml.constructor.ConstructorError(None, None, f"'{node.value[:20]}' is no number", node.start_mark) from None


for _kind, _form, _first in _RESOLVED:
    _Loader.add_implicit_resolver(f"{_TAG}{_kind}", re.compile(f"^(?:{_form})$"), [*_first, *([""] if _kind == "null" else [])])
_Loader.add_constructor(f"{_TAG}bool", _Loader.truth)
_Loader.add_constructor(f"{_TAG}int", _Loader.whole_number)
_Loader.add_constructor(f"{_TAG}float", _Loader.number)


def _kept(node: yaml.Node, path: tuple[str, ...], is_text: Callable[[tuple[str, ...]], bool]) -> yaml.Node:
    """The node with the plain values of text as text."""
    if isinstance(node, yaml.MappingNode):
        pairs = [(key, _kept(value, (*path, str(key.value)), is_text)) for key, value in node.value]
        return yaml.MappingNode(node.tag, pairs, node.start_mark, node.end_mark)
    if isinstance(node, yaml.SequenceNode):
        return yaml.SequenceNode(node.tag, [_kept(each, path, is_text) for each in node.value], node.start_mark, node.end_mark)
    if node.tag.removeprefix(_TAG) not in ("bool", "int", "float", "merge") or not is_text(path):
        return node
    return yaml.ScalarNode(f"{_TAG}str", node.value, node.start_mark, node.end_mark)


def _check_size(node: yaml.Node, sizes: dict[int, int]) -> int:
    """How many values the node stands for, aliases written out.

    Raises:
        yaml.YAMLError: very many, or it holds itself.
    """
    if id(node) in sizes:
        return sizes[id(node)]
    sizes[id(node)] = _MOST_VALUES + 1  # until it is known: met again inside itself, it has no end
    inner = [each for pair in node.value for each in pair] if isinstance(node, yaml.MappingNode) else node.value
    total = 1 if isinstance(node, yaml.ScalarNode) else 1 + sum(_check_size(each, sizes) for each in inner)
    if total > _MOST_VALUES:
        raise yaml.YAMLError(f"its aliases stand for more than {_MOST_VALUES:,} values")
    sizes[id(node)] = total
    return total
