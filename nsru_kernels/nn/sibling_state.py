"""What an output of a sibling depends on, and what keeps siblings from being served together."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from nsru_kernels.nn import fold_cache
from nsru_kernels.ops.fold.core import tensor_key
from nsru_kernels.ops.linear import compute_dtype

if TYPE_CHECKING:
    from nsru_kernels.nn.linear import NSRULinear


def context_of(x: Tensor) -> tuple:
    """What an output depends on besides x itself and its module; the first is the backward."""
    stream = None
    if x.is_cuda:
        stream = torch.cuda.current_stream(x.device), torch.cuda.is_current_stream_capturing()
    return (
        torch._C._current_graph_task_id(),
        x._version,
        x.data_ptr(),
        x.shape,
        x.stride(),
        x.requires_grad,
        x.grad_fn,  # itself, not its identity, which another could get
        torch.is_grad_enabled(),
        torch.is_inference_mode_enabled(),
        torch.is_autocast_enabled(x.device.type),
        compute_dtype(x),
        fold_cache.optimizer_steps(),
        stream,
    )


def tensors_of(module: NSRULinear) -> tuple[Tensor | None, ...]:
    return module.weight, module.bias, module.lora_A, module.lora_B, module.basis


def state_of(module: NSRULinear) -> tuple:
    """What an output depends on in its module."""
    keys = [None if t is None else (tensor_key(t), t.requires_grad) for t in tensors_of(module)]
    flags = (module.enabled, module.merged, module.training, module.dropout, module.scaling)
    return *keys, *flags, module.backend


def obstacle(modules: list[NSRULinear], x: Tensor) -> str | None:
    """Why these cannot be served together now; None if they can."""
    for module in modules:
        if not module.enabled or module.merged:
            return "adapters are off or merged"
        if module.training and module.dropout > 0:
            return "dropout draws a mask for each"
        if module.retain is not modules[0].retain or module.backend != modules[0].backend:
            return "different bases or backends"
        n, k, r = module.out_features, module.in_features, module.rank
        shapes = ((n, k), (n,), (r, k), (n, r))
        for tensor, shape in zip(tensors_of(module), shapes, strict=False):
            if tensor is None:
                continue
            # FSDP and ZeRO hold shards, or nothing, until the module itself is called.
            if type(tensor) not in (Tensor, nn.Parameter) or tuple(tensor.shape) != shape:
                return "weights are sharded"
            if tensor.device != x.device:
                return "on different devices"
        if module.weight.dtype != modules[0].weight.dtype:
            return "weights of different dtypes"
    return None
