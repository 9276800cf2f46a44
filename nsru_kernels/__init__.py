"""Projected low-rank updates, streaming retain subspaces, drop-in modules: unlearning with LoRA."""

from nsru_kernels.dispatch import BackendUnavailable
from nsru_kernels.dispatch.explain import explain
from nsru_kernels.hf.constrain import constrain_peft
from nsru_kernels.hf.peft_format import load_lora_adapter, save_lora_adapter
from nsru_kernels.nn import (
    NSRULinear,
    NSRUWrappedLinear,
    SwapReport,
    adapters_disabled,
    merge_adapters,
    swap_linears,
)
from nsru_kernels.ops.linear import nsru_linear, nsru_linear_group
from nsru_kernels.ops.project import project_adapter, project_adapters
from nsru_kernels.subspaces import RetainSketch, RetainSubspace, estimate_retain_subspaces

__version__ = "0.1.0"

__all__ = [
    "BackendUnavailable",
    "NSRULinear",
    "NSRUWrappedLinear",
    "RetainSketch",
    "RetainSubspace",
    "SwapReport",
    "adapters_disabled",
    "constrain_peft",
    "estimate_retain_subspaces",
    "explain",
    "load_lora_adapter",
    "merge_adapters",
    "nsru_linear",
    "nsru_linear_group",
    "project_adapter",
    "project_adapters",
    "save_lora_adapter",
    "swap_linears",
]
