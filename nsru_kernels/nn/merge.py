"""From adapted linears back to plain ones."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from nsru_kernels.nn.experts import ExpertLinear, NSRUExpertLinear
from nsru_kernels.nn.inputs import with_progress
from nsru_kernels.nn.linear import NSRULinear
from nsru_kernels.nn.names import COMPILED, check_module, unwrap
from nsru_kernels.nn.sharded import comes_and_goes, gathered, reshard, shards_of
from nsru_kernels.nn.swap import replace_module
from nsru_kernels.nn.wrapped import NSRUWrappedLinear, linear_sizes


@torch.no_grad()
def merge_adapters(model: nn.Module, *, progress: bool = False) -> nn.Module:
    """Replace every ``NSRULinear`` by ``nn.Linear`` with W + s B Ā, summed in fp32, rounded once.

    A layer of another kind gets the sum into its own weight where that is W, as ``Conv1D``'s;
    a quantised one becomes an ``nn.Linear`` in the model's dtype, and what stood for a 3-D
    parameter of experts that parameter. Where nothing quantised is left, transformers saves the
    model as a plain one. Of a model that ``fully_shard`` has sharded every rank makes the call:
    modules are gathered one by one, the result is sharded as before.

    Args:
        model: changed in place. Weights keep their dtype and stay frozen.
        progress: show a progress bar (needs tqdm).

    Returns:
        model, for chaining.

    Raises:
        ValueError: the model has no ``NSRULinear``, is one itself, is sharded otherwise, a merged
            weight would hold NaN or infinite values, a layer has a parametrization, or one of a
            class of the model's own computes with another W than its weight; nothing is changed.
    """
    check_module(model)
    modules = [(n, m) for n, m in model.named_modules() if isinstance(m, NSRULinear)]
    if not modules:
        raise ValueError(
            "merge_adapters: model has no NSRULinear; swap_linears(model, ...) puts them in."
        )
    if modules[0][0] == "":
        raise ValueError("merge_adapters: model is an NSRULinear itself; use its merge().")
    if comes_and_goes(modules[0][1].lora_A) or any(
        type(module).__name__ == "FullyShardedDataParallel" for module in model.modules()
    ):
        raise ValueError(
            "merge_adapters: the model is sharded by FSDP1 or ZeRO-3, which would go on gathering "
            "what was merged. save_lora_adapter and merge in a process by itself, as `nsru merge` "
            "does, or shard by fully_shard."
        )
    reshard(model)
    for name, module in modules:
        if nn.utils.parametrize.is_parametrized(module):
            raise ValueError(f"merge_adapters: {name} has a parametrization; remove it first.")
        if hasattr(module, "reshard"):  # its hooks would go with it
            raise ValueError(
                f"merge_adapters: {name} was given to fully_shard by itself; shard the layer that "
                "holds it instead, or save_lora_adapter and merge in a process by itself."
            )
    for name, module in modules:  # computed twice, so that a refusal leaves the model whole
        try:
            module.merged_weight()
            if isinstance(module, NSRUWrappedLinear):
                module.check_mergeable()
        except ValueError as error:
            raise ValueError(f"merge_adapters: {name}: {error}") from error
    dtype = _dtype_of(model, modules[0][1].dtype)
    for name, module in with_progress(modules, "merge", "layer") if progress else modules:
        sharded = bool(shards_of(module))
        with gathered(module, write=True):
            linear = module.merged_linear(dtype)
        if sharded and not isinstance(module, NSRUWrappedLinear):
            _become_linear(module)
        else:
            # A compiled layer goes on calling what it was made of.
            replace_module(model, name.removesuffix(COMPILED), linear)
    _forget_quantiser(model)
    return model


def _forget_quantiser(model: Any) -> None:
    """Let transformers save a model of which nothing is quantised any more as what it is."""
    model = unwrap(model)
    quantiser = getattr(model, "hf_quantizer", None)
    if quantiser is not None and all(type(p) is nn.Parameter for p in model.parameters()):
        sized = (m for m in model.modules() if linear_sizes(m) != (0, 0))
        if all(isinstance(getattr(m, "weight", None), nn.Parameter) for m in sized):
            quantiser.remove_quantization_config(model)


class _Sharded(nn.Module):
    """An adapted linear to ``fully_shard``, merged: it hands A and B on to nobody."""

    def __setattr__(self, name, value):
        if name in ("lora_A", "lora_B"):
            self.__dict__[name] = value  # where it is no parameter of the model
        else:
            super().__setattr__(name, value)


class _ShardedLinear(_Sharded, nn.Linear):
    pass


class _ShardedExpertLinear(_Sharded, ExpertLinear):
    """Stays where a parameter of experts was, and is saved under that parameter's name."""

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        destination[prefix.removesuffix(".")] = self.weight if keep_vars else self.weight.detach()


def _become_linear(module: NSRULinear) -> None:
    """Make the module itself a linear, because ``fully_shard`` goes on gathering into it."""
    of_experts = isinstance(module, NSRUExpertLinear)
    plain = nn.Linear(module.in_features, module.out_features, device="meta")
    adapter = {name: module._parameters.pop(name) for name in ("lora_A", "lora_B")}
    module._modules.clear()
    module._buffers.clear()
    kept = {*plain.__dict__, "num_experts", "is_transposed"}
    for name in module.__dict__.keys() - kept:
        del module.__dict__[name]
    module.__class__ = _ShardedExpertLinear if of_experts else _ShardedLinear  # type: ignore
    module.__dict__ |= adapter


def _dtype_of(model: nn.Module, default: torch.dtype) -> torch.dtype:
    """The dtype of what is neither quantised nor an adapter, as the embeddings of a model."""
    floats = [
        parameter.dtype
        for name, parameter in model.named_parameters()
        if parameter.is_floating_point() and "lora_" not in name
    ]
    return floats[0] if floats else default
