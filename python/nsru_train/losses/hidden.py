"""Hidden states of one decoder layer, from a forward pass that ends there."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from nsru_train.language_models import refuse_encoder_decoder


class _Reached(Exception):  # noqa: N818
    """The layer has its output; nothing above it is needed."""


def decoder_layers(model: nn.Module) -> tuple[str, nn.ModuleList]:
    """Name and modules of a causal language model's decoder layers: its longest list of modules.

    Raises:
        ValueError: the model has no list of modules, or is an encoder-decoder.
    """
    refuse_encoder_decoder(model, "a method of the states after one layer")
    lists = {n: m for n, m in model.named_modules() if isinstance(m, nn.ModuleList)}
    if not lists:
        raise ValueError(f"{type(model).__name__} has no decoder layers: no nn.ModuleList.")
    name = max(lists, key=lambda name: len(lists[name]))
    return name, lists[name]


def layer_states(model: nn.Module, inputs: Mapping[str, Tensor], layer: int) -> Tensor:
    """Output [B, S, D] of decoder layer ``layer``; no layer above it runs.

    Args:
        inputs: of the model, without labels.
    """
    found: list[Tensor] = []

    def stop(module: nn.Module, args: Any, output: Any) -> None:
        found.append(output if isinstance(output, Tensor) else output[0])
        raise _Reached

    causal: Any = getattr(model, "get_base_model", lambda: model)()
    handle = decoder_layers(causal)[1][layer].register_forward_hook(stop)
    try:
        causal.base_model(**inputs, use_cache=False)
    except _Reached:
        return found[0]
    finally:
        handle.remove()
    raise ValueError(f"decoder layer {layer} of {type(causal).__name__} was not called.")
