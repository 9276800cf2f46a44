"""Base models in 4 or 8 bits by bitsandbytes: how they are loaded, and what they are merged to."""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

import nsru_kernels as nk
from nsru_kernels.nn.experts import ExpertLinear, NSRUExpertLinear, expert_linears
from nsru_kernels.nn.left_out import looks_linear
from nsru_kernels.nn.swap import replace_module
from nsru_kernels.nn.wrapped import dense_linear, is_own_kind, is_plain, why_not_linear

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from nsru_train.config import ModelConfig


def check_bitsandbytes(quantize: str) -> None:
    """Raise ValueError where nothing can quantise."""
    missing = [
        name for name in ("bitsandbytes", "accelerate") if not importlib.util.find_spec(name)
    ]
    if missing:
        raise ValueError(
            f"model.quantize: {quantize} needs {' and '.join(missing)}: pip install "
            f"{' '.join(missing)}. Or leave it at none."
        )


def bits_config(quantize: str, dtype: Any) -> Any:
    """The configuration for transformers: nf4 or int8, and the dtype that NF4 computes in."""
    from transformers import BitsAndBytesConfig

    if quantize == "int8":
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype
    )


def quantizing(config: ModelConfig, device: torch.device) -> dict[str, Any]:
    """More options of ``from_pretrained`` for ``model.quantize``."""
    from transformers import AutoConfig

    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # which warns at each product
    dtype: str = config.dtype
    found = AutoConfig.from_pretrained(config.path, trust_remote_code=config.trust_remote_code)
    if (own := getattr(found, "quantization_config", None)) is not None:
        kind = own.get("quant_method") if isinstance(own, dict) else own.quant_method
        raise ValueError(
            f"model.quantize: {config.path!r} is quantised already, by {kind}, and would stay as "
            "it is; leave it at none."
        )
    if dtype == "auto":
        dtype = str(found.dtype or torch.float32).removeprefix("torch.")
    bits = bits_config(config.quantize, dtype)
    return {"quantization_config": bits, "device_map": {"": device}}


def dense_experts(model: PreTrainedModel) -> str:
    """A sentence on what quantisation passes by; empty where there is nothing."""
    experts: list[ExpertLinear] = []
    for name, module in model.named_modules():
        experts += expert_linears(name, module).values()
    if not experts:
        return ""
    share = sum(linear.weight.numel() for linear in experts) / model.num_parameters()
    return f"linear layers only are quantised: experts, {share:.0%} of all parameters, stay as is"


def is_quantised(module: nn.Module) -> bool:
    """True for a layer of bitsandbytes."""
    return type(module).__module__.partition(".")[0] == "bitsandbytes"


def refuse_wrapped(model: nn.Module, what: str) -> None:
    """Raise ValueError where an adapted layer is no ``nn.Linear``, of whose weight ``what`` is."""
    for name, module in model.named_modules():
        if isinstance(module, NSRUExpertLinear):
            raise ValueError(
                f"{what} needs plain linear layers, and {name} is of fused experts; leave them out "
                "of subspace.targets, or take another method."
            )
        if isinstance(module, nk.NSRUWrappedLinear):
            raise ValueError(
                f"{what} needs plain linear layers, and {name} is a "
                f"{type(module.base_layer).__name__}; take other targets, or another base model."
            )


@torch.no_grad()
def requantization_errors(model: nn.Module) -> dict[str, float]:
    """Name → ‖Q(W + s B Ā) - (W + s B Ā)‖ / ‖s B Ā‖ of each adapted layer of bitsandbytes.

    Beyond 1, quantising the merged weight again changes it by more than the adapter did.
    """
    errors = {}
    for name, module in model.named_modules():
        if isinstance(module, nk.NSRUWrappedLinear) and is_quantised(module.base_layer):
            change = module.delta_weight().norm()
            if change:
                merged = module.merged_weight().float()
                again = _requantized(module.base_layer, merged)
                errors[name] = float((again - merged).norm() / change)
    return errors


def _requantized(base_layer: nn.Module, merged: Tensor) -> Tensor:
    """A weight [N, K] as ``base_layer`` would hold it."""
    from bitsandbytes import functional as bnb

    if state := getattr(base_layer.weight, "quant_state", None):
        options: Mapping[str, Any] = {"quant_type": state.quant_type, "blocksize": state.blocksize}
        return bnb.dequantize_4bit(*bnb.quantize_4bit(merged, **options)).to(merged.dtype)
    scales_N1 = merged.abs().amax(1, keepdim=True).clamp_min(1e-30) / 127
    return (merged / scales_N1).round() * scales_N1


@torch.no_grad()
def dequantize(model: PreTrainedModel) -> None:
    """Make every quantised linear layer a plain one of what it computes, in the model's dtype.

    transformers' own way fails where adapters were merged into all of them.
    """
    for name, module in list(model.named_modules()):
        if not looks_linear(module) or is_plain(module) or is_own_kind(module):
            continue
        if why_not_linear(module) is None:
            replace_module(model, name, dense_linear(module, model.dtype))
    if hasattr(model, "hf_quantizer"):  # else merge_adapters found nothing left
        model.hf_quantizer.remove_quantization_config(model)
