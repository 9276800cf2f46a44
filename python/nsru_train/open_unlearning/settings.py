"""The configuration of OpenUnlearning's programs, fitted to the machine and to local files."""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from transformers.utils import is_flash_attn_2_available

from nsru_kernels.dispatch import default_device
from nsru_train.sources import TOFU_REPO

logger = logging.getLogger(__name__)

# What needs an NVIDIA GPU, by name and value, and what stands in for it elsewhere.
_ELSEWHERE: dict[tuple[str, Any], Any] = {
    ("attn_implementation", "flash_attention_2"): "sdpa",
    ("torch_dtype", "bfloat16"): "float32",
    ("torch_dtype", "float16"): "float32",
    ("bf16", True): False,
    ("fp16", True): False,
    ("bf16_full_eval", True): False,
    ("fp16_full_eval", True): False,
    ("optim", "paged_adamw_32bit"): "adamw_torch",
    ("optim", "paged_adamw_8bit"): "adamw_torch",
    ("device_map", "cuda"): "cpu",
    ("device", "cuda"): "cpu",
}


def fit_to_machine(config: Any, given: Sequence[str] = ()) -> None:
    """Replace what needs a GPU where there is none, and packages where they are missing.

    Args:
        config: of a run, changed in place.
        given: overrides of the command line, "key=value": those settings stay as they are.
    """
    on_gpu = default_device().type == "cuda"
    keep = {override.lstrip("+").partition("=")[0] for override in given}
    for node, name, path in _settings(config):
        value = node[name]
        key = (name, value) if isinstance(value, (str, bool)) else None
        if key not in _ELSEWHERE or path in keep or (on_gpu and _works_on_gpu(value)):
            continue
        node[name] = _ELSEWHERE[key]
        reason = "its package is not installed" if on_gpu else "there is no GPU"
        logger.info("%s: %s instead of %s, for %s", path, node[name], value, reason)


def _works_on_gpu(value: Any) -> bool:
    if value == "flash_attention_2":
        return is_flash_attn_2_available()
    if isinstance(value, str) and value.startswith("paged_"):
        return importlib.util.find_spec("bitsandbytes") is not None
    return True


def read_tofu_from(config: Any, folder: str | Path) -> None:
    """Let every dataset that would be TOFU of the hub read NAME.json of a folder.

    Raises:
        ValueError: a file is not there.
    """
    from omegaconf import open_dict

    for node, name, path in list(_settings(config)):
        if name != "path" or node[name] != TOFU_REPO:
            continue
        file = Path(folder, f"{node['name']}.json").resolve()
        if not file.is_file():
            raise ValueError(f"--data-dir: no file {file}, which {path.removesuffix('.path')} asks")
        with open_dict(node):
            node["path"], node["data_files"] = "json", str(file)


def _settings(node: Any, path: str = "") -> Iterator[tuple[Any, str, str]]:
    """(its mapping, its name, its dotted path) of every value of a configuration that is given."""
    from omegaconf import DictConfig, OmegaConf

    for name in list(node):
        if OmegaConf.is_missing(node, name):
            continue
        inside = f"{path}.{name}".lstrip(".")
        if isinstance(node[name], DictConfig):
            yield from _settings(node[name], inside)
        else:
            yield node, name, inside
