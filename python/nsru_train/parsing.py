"""YAML files, read so that nothing in them is lost silently, and errors in plain words."""

from __future__ import annotations

import re
import types
from collections.abc import Hashable, Mapping
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin

import yaml

from nsru_kernels.files import check_unique, read_text


def parse_yaml(text: str) -> Any:
    """Raises ValueError where text is not plain YAML, or a mapping has a key twice."""
    try:
        return yaml.load(text, _Loader)
    except RecursionError:
        raise ValueError("not valid YAML: it nests too deep") from None
    except Exception as error:  # a tag on a value that does not fit it raises anything
        raise ValueError(f"not valid YAML: {' '.join(str(error).split())}") from None


def read_yaml(path: str | Path) -> Any:
    """`parse_yaml` of a file. Raises ValueError that names the file."""
    try:
        return parse_yaml(read_text(path))
    except ValueError as error:
        raise ValueError(f"{path}: {str(error).removeprefix(f'{path}: ')}") from None


# One and several values of a type, as messages call them.
_WORDS = {
    bool: ("true or false", "true or false"),
    int: ("a whole number", "whole numbers"),
    float: ("a number", "numbers"),
    str: ("a text", "texts"),
    dict: ("a mapping", "mappings"),
    list: ("a list", "lists"),
    type(None): ("null", "null"),
}


def in_words(hint: Any, several: bool = False) -> str:
    """The values that a type hint takes, in the words of someone who writes YAML."""
    kind, inner = get_origin(hint) or hint, get_args(hint)
    if kind in (Union, types.UnionType):
        return " or ".join(in_words(option, several) for option in inner)
    if kind is Literal:
        return f"one of {', '.join(map(str, inner))}"
    words = _WORDS.get(kind, ("its settings, as a mapping or a YAML file", "values"))[several]
    if kind is list and inner:
        return f"{words} of {in_words(inner[0], several=True)}"
    if kind is dict and inner:
        return f"{words} of names to {in_words(inner[1], several=True)}"
    return words


def explain_value(text: str, hints: Mapping[str, Any]) -> str | None:
    """The setting, its kind and what came, of jsonargparse's message on a value of a wrong type.

    Args:
        text: its message, on one line.
        hints: of the settings, by name; None comes back for others.
    """
    key = re.search(r'key "([\w.]+)": (Expected|Does not validate|Unable to load)', text)
    value = re.search(r"(?:Given value: |Got value: (?!.*Given)|load config ')(.+?)('|$)", text)
    if key is None or value is None or key[1] not in hints:
        return None
    return f"{key[1]}: expected {in_words(hints[key[1]])}, got {value[1]:.80}"


class _Loader(yaml.SafeLoader):
    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        own = [key for key, _ in node.value if key.tag != "tag:yaml.org,2002:merge"]
        keys = [self.construct_object(key, deep=True) for key in own]
        check_unique(key for key in keys if isinstance(key, Hashable))
        return super().construct_mapping(node, deep)
