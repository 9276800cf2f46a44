"""Modules: the drop-in linear, and how a model is swapped to it and back."""

from nsru_kernels.nn.linear import NSRULinear, adapters_disabled
from nsru_kernels.nn.merge import merge_adapters
from nsru_kernels.nn.swap import SwapReport, swap_linears
from nsru_kernels.nn.wrapped import NSRUWrappedLinear

__all__ = [
    "NSRULinear",
    "NSRUWrappedLinear",
    "SwapReport",
    "adapters_disabled",
    "merge_adapters",
    "swap_linears",
]
