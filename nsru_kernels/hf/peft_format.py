"""(Ā, B) as a plain LoRA adapter in PEFT's directory format, and back."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from nsru_kernels.files import atomic_write_all
from nsru_kernels.nn.linear import NSRULinear
from nsru_kernels.nn.swap import SwapReport, swap_linears

WEIGHTS = "adapter_model.safetensors"
CONFIG = "adapter_config.json"
SIDECAR = "nsru.json"
_PREFIX = "base_model.model."


def save_lora_adapter(
    model: nn.Module, path: str | os.PathLike[str], *, metadata: dict[str, Any] | None = None
) -> Path:
    """Write the adapters as PEFT does: ``adapter_model.safetensors`` and ``adapter_config.json``.

    The projection is projected in, so PEFT, vLLM and ``merge_and_unload`` take the folder as it is.
    ``nsru.json`` beside them says how much of each adapter leaks into its retain subspace. An
    adapter that was there before stays whole when writing fails.

    Args:
        model: has ``NSRULinear`` modules, none merged.
        path: folder, made if need be.
        metadata: more entries for ``nsru.json``, e.g. the base model's fingerprint.
    Returns:
        the folder.
    Raises:
        ValueError: no ``NSRULinear``, one is merged, or one holds NaN or infinite values.
        TypeError: metadata cannot be written as JSON.
        OSError: the disk is full or the folder cannot be written; files there before are unharmed.
    """
    from safetensors.torch import save

    modules = {n: m for n, m in model.named_modules() if isinstance(m, NSRULinear)}
    if not modules:
        raise ValueError("save_lora_adapter: model has no NSRULinear; nothing to save.")
    if merged := [name for name, module in modules.items() if module.merged]:
        raise ValueError(f"save_lora_adapter: {merged[0]} is merged; call unmerge() first.")
    tensors: dict[str, Tensor] = {}
    for name, module in modules.items():
        tensors[f"{_PREFIX}{name}.lora_A.weight"] = module.projected_adapter().cpu().contiguous()
        tensors[f"{_PREFIX}{name}.lora_B.weight"] = module.lora_B.detach().cpu().contiguous()
    for key, tensor in tensors.items():
        if not torch.isfinite(tensor).all():
            raise ValueError(
                f"save_lora_adapter: {key} holds NaN or infinite values: training diverged. "
                "Nothing was written."
            )
    folder = Path(path)
    sidecar = {
        "schema": 1,
        "leakage": {name: module.leakage() for name, module in modules.items()},
        **(metadata or {}),
    }
    atomic_write_all(
        {
            folder / WEIGHTS: save(tensors, metadata={"format": "pt"}),
            folder / SIDECAR: json.dumps(sidecar, indent=2) + "\n",
            folder / CONFIG: json.dumps(_config(model, modules), indent=2) + "\n",
        }
    )
    return folder


def _config(model: nn.Module, modules: dict[str, NSRULinear]) -> dict[str, Any]:
    first = next(iter(modules.values()))
    config = getattr(model, "config", None)
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM" if hasattr(model, "generate") else None,
        "base_model_name_or_path": getattr(config, "_name_or_path", None) or None,
        "inference_mode": True,
        "r": first.rank,
        "lora_alpha": first.alpha,
        "lora_dropout": first.dropout,
        "target_modules": list(modules),
        "rank_pattern": {n: m.rank for n, m in modules.items() if m.rank != first.rank},
        "alpha_pattern": {n: m.alpha for n, m in modules.items() if m.alpha != first.alpha},
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "use_rslora": False,
        "use_dora": False,
        "modules_to_save": None,
    }


def read_adapter(path: str | os.PathLike[str]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """(config, tensors) of a PEFT LoRA folder.

    Raises:
        ValueError: a file is missing, truncated or not LoRA; the message names it.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    folder = Path(path)
    for file in (CONFIG, WEIGHTS):
        if not (folder / file).is_file():
            raise ValueError(
                f"adapter: {folder} has no {file}; expected a folder that save_lora_adapter wrote."
            )
    try:
        config = json.loads((folder / CONFIG).read_text())
        tensors = load_file(folder / WEIGHTS)
    except (SafetensorError, json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(
            f"adapter: a file in {folder} is truncated or damaged ({error}). Copy it again."
        ) from error
    if config.get("peft_type") != "LORA":
        raise ValueError(f"adapter: {folder} is {config.get('peft_type')!r}, expected 'LORA'.")
    return config, tensors


@torch.no_grad()
def load_lora_adapter(model: nn.Module, path: str | os.PathLike[str]) -> SwapReport:
    """Swap the linears that a plain LoRA adapter names and give them its A and B; A is Ā, no basis.

    Args:
        model: the base model, changed in place.
        path: a folder in PEFT's format, with one rank for all modules.
    Returns:
        the swap report.
    Raises:
        ValueError: damaged files, unsupported LoRA variants, or an adapter of another model.
    """
    config, tensors = read_adapter(path)
    for option in ("use_rslora", "use_dora", "rank_pattern", "modules_to_save"):
        if config.get(option):
            raise ValueError(
                f"adapter: {option}={config[option]!r} is not supported; load it with PEFT."
            )
    if config.get("bias", "none") != "none":
        raise ValueError("adapter: trained biases are not supported; load it with PEFT.")
    names = sorted({key.removeprefix(_PREFIX).rsplit(".lora_", 1)[0] for key in tensors})
    key = (_PREFIX + "{}.lora_{}.weight").format
    expected = {key(name, side) for name in names for side in "AB"}
    if not names or expected != tensors.keys():
        odd = sorted(expected ^ tensors.keys())[:1]
        raise ValueError(f"adapter: expected lora_A and lora_B of each module, check {odd}.")
    for name in names:
        a, b = (tensors[key(name, side)] for side in "AB")
        try:
            linear = model.get_submodule(name)
        except AttributeError:
            raise ValueError(f"adapter: the model has no module {name!r}; another base?") from None
        shape = tuple(getattr(linear, "weight", torch.empty(0)).shape)
        if shape != (b.shape[0], a.shape[1]):
            raise ValueError(
                f"adapter: {name} is made for a weight of {(b.shape[0], a.shape[1])}, "
                f"the model has {shape}; another base?"
            )
        if not a.shape[0] == b.shape[1] == config["r"]:
            raise ValueError(
                f"adapter: {name} has rank {a.shape[0]} (A) and {b.shape[1]} (B), "
                f"{CONFIG} says {config['r']}."
            )
    check_fingerprint(model, Path(path) / SIDECAR)
    report = swap_linears(
        model,
        names,
        rank=config["r"],
        alpha=config["lora_alpha"],
        alpha_pattern=config.get("alpha_pattern"),
    )
    for name in names:
        module = model.get_submodule(name)
        assert isinstance(module, NSRULinear)
        module.lora_A.copy_(tensors[key(name, "A")])
        module.lora_B.copy_(tensors[key(name, "B")])
    return report


def check_fingerprint(model: nn.Module, sidecar: Path) -> None:
    """Raise ValueError when ``nsru.json`` says that the adapter was trained on other weights."""
    from nsru_kernels.subspaces.collection import fingerprint_weights

    if not sidecar.is_file():
        return
    try:
        wanted = json.loads(sidecar.read_text()).get("fingerprint")
    except (ValueError, AttributeError) as error:
        raise ValueError(f"adapter: {sidecar} is damaged ({error}). Copy it again.") from error
    if wanted is not None and (found := fingerprint_weights(model)) != wanted:
        raise ValueError(
            f"adapter: {sidecar.parent} was trained on weights with fingerprint {wanted}, "
            f"the model has {found}; load the base model that it was trained on."
        )
