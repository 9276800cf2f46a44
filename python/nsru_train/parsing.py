"""YAML files, read so that nothing in them is lost silently and errors name the file."""

from __future__ import annotations

from collections.abc import Hashable
from pathlib import Path
from typing import Any

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


class _Loader(yaml.SafeLoader):
    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        own = [key for key, _ in node.value if key.tag != "tag:yaml.org,2002:merge"]
        keys = [self.construct_object(key, deep=True) for key in own]
        check_unique(key for key in keys if isinstance(key, Hashable))
        return super().construct_mapping(node, deep)
