"""From adapted linears back to plain ones."""

from __future__ import annotations

import torch
from torch import nn

from nsru_kernels.nn.linear import NSRULinear
from nsru_kernels.nn.swap import replace_module


@torch.no_grad()
def merge_adapters(model: nn.Module) -> nn.Module:
    """Replace every ``NSRULinear`` by ``nn.Linear`` with W + s B Ā, summed in fp32, rounded once.

    Args:
        model: changed in place. Weights keep their dtype and stay frozen.
    Returns:
        model, for chaining.
    Raises:
        ValueError: the model has no ``NSRULinear``, or is one itself.
    """
    modules = [(n, m) for n, m in model.named_modules() if isinstance(m, NSRULinear)]
    if not modules:
        raise ValueError(
            "merge_adapters: model has no NSRULinear; swap_linears(model, ...) puts them in."
        )
    if modules[0][0] == "":
        raise ValueError("merge_adapters: model is an NSRULinear itself; use its merge().")
    for name, module in modules:
        module.weight.copy_(module.merged_weight())
        linear = nn.Linear(
            module.in_features, module.out_features, bias=module.bias is not None, device="meta"
        )
        linear.weight = module.weight
        linear.bias = module.bias  # type: ignore[assignment] # None without a bias
        replace_module(model, name, linear.train(module.training))
    return model
