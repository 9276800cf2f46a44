"""What backends of several ops share about their narrow products."""

from __future__ import annotations

import torch
from torch import Tensor


def scaled_product(left: Tensor, right: Tensor, scaling: float) -> Tensor:
    """scaling · left @ right, scaled before the result is rounded."""
    out = left.new_empty(left.shape[0], right.shape[1])
    return torch.addmm(out, left, right, beta=0, alpha=scaling)


def rank_columns(s_MR: Tensor, bs_NR: list[Tensor]) -> tuple[Tensor, ...]:
    """The columns of S, or of dS, that belong to each sibling's B_i; views."""
    return s_MR.split_with_sizes([b_NR.shape[1] for b_NR in bs_NR], dim=1)


def one_read_pays(r: int) -> bool:
    """Whether dB and dS should share one read of dY: beyond this rank the partial sums of dS,
    4 R bytes a row and block of 256 columns, move more than a second read."""
    return r <= 32
