"""JSON and YAML files, read so that nothing in them is lost silently and errors name the file."""

from __future__ import annotations

import json
from collections.abc import Hashable, Iterable
from pathlib import Path
from typing import Any

import yaml


def read_text(path: str | Path) -> str:
    """A UTF-8 file, with or without a byte order mark. Raises ValueError where it is not UTF-8."""
    try:
        return Path(path).read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 text ({error})") from None


def parse_json(text: str) -> Any:
    """Raises ValueError where text is not JSON, nests too deep, or an object has a key twice."""
    try:
        return json.loads(text, object_pairs_hook=lambda pairs: _unique(dict(pairs), pairs))
    except RecursionError:
        raise ValueError("it nests too deep") from None


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


def _unique(found: dict[Any, Any], pairs: Iterable[tuple[Any, Any]]) -> dict[Any, Any]:
    left = set(found)
    for key, _ in pairs:
        if key not in left:
            raise ValueError(f"key {key!r} stands twice in one object; keep one of the two")
        left.remove(key)
    return found


class _Loader(yaml.SafeLoader):
    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        own = [key for key, _ in node.value if key.tag != "tag:yaml.org,2002:merge"]
        keys = [self.construct_object(key, deep=True) for key in own]
        hashable = [(key, None) for key in keys if isinstance(key, Hashable)]
        _unique(dict(hashable), hashable)
        return super().construct_mapping(node, deep)
