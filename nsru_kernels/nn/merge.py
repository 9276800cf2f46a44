"""From adapted linears back to plain ones."""

from __future__ import annotations

import torch
from torch import nn

from nsru_kernels.nn.linear import NSRULinear
from nsru_kernels.nn.names import COMPILED, check_module
from nsru_kernels.nn.swap import replace_module


@torch.no_grad()
def merge_adapters(model: nn.Module) -> nn.Module:
    """Replace every ``NSRULinear`` by ``nn.Linear`` with W + s B Ā, summed in fp32, rounded once.

    A layer of another kind gets the sum into its own weight where that is dense, as ``Conv1D``'s;
    a quantised one becomes an ``nn.Linear`` in the model's dtype, and what stood for a 3-D
    parameter of experts that parameter.

    Args:
        model: changed in place. Weights keep their dtype and stay frozen.
    Returns:
        model, for chaining.
    Raises:
        ValueError: the model has no ``NSRULinear``, is one itself, or a merged weight would hold
            NaN or infinite values; nothing is then changed.
    """
    check_module(model)
    modules = [(n, m) for n, m in model.named_modules() if isinstance(m, NSRULinear)]
    if not modules:
        raise ValueError(
            "merge_adapters: model has no NSRULinear; swap_linears(model, ...) puts them in."
        )
    if modules[0][0] == "":
        raise ValueError("merge_adapters: model is an NSRULinear itself; use its merge().")
    for name, module in modules:  # computed twice, so that a refusal leaves the model whole
        try:
            module.merged_weight()
        except ValueError as error:
            raise ValueError(f"merge_adapters: {name}: {error}") from error
    dtype = _dtype_of(model, modules[0][1].dtype)
    for name, module in modules:
        # A compiled layer goes on calling what it was made of.
        replace_module(model, name.removesuffix(COMPILED), module.merged_linear(dtype))
    return model


def _dtype_of(model: nn.Module, default: torch.dtype) -> torch.dtype:
    """The dtype of what is neither quantised nor an adapter, as the embeddings of a model."""
    floats = [
        parameter.dtype
        for name, parameter in model.named_parameters()
        if parameter.is_floating_point() and "lora_" not in name
    ]
    return floats[0] if floats else default
