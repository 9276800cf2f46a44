"""Products of rows that stand in groups, each group with a matrix of its own: grouped GEMMs.

PyTorch's ``grouped_mm`` where it takes the operands, which needs no word from the host; else one
library GEMM for each group that has rows.
"""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F
from torch import Tensor


class Groups:
    """S rows of E groups, those of a group next to each other.

    Args:
        group_S: [S], the group of each row, never falling.
        count: E.

    Attributes:
        sizes_E: [E], the rows of each group.
        ends_E: [E] int32, where the rows of each group end.
    """

    def __init__(self, group_S: Tensor, count: int) -> None:
        self.sizes_E = group_S.new_zeros(count).scatter_add_(0, group_S, torch.ones_like(group_S))
        self.ends_E = self.sizes_E.cumsum(0, dtype=torch.int32)

    @functools.cached_property
    def spans(self) -> list[tuple[int, slice]]:
        """(group, its rows) of every group that has any. Waits for the GPU."""
        starts = (self.ends_E - self.sizes_E).tolist()
        return [
            (group, slice(start, start + size))
            for group, (start, size) in enumerate(zip(starts, self.sizes_E.tolist(), strict=True))
            if size
        ]

    def matmul(self, x_SK: Tensor, w_EKN: Tensor) -> Tensor:
        """y_s = x_s W_e, e the group of s: [S, N]. W of another dtype is cast group by group."""
        if _taken(x_SK, w_EKN):
            return F.grouped_mm(x_SK, w_EKN, offs=self.ends_E)
        y_SN = x_SK.new_empty(len(x_SK), w_EKN.shape[2])
        for group, rows in self.spans:
            torch.mm(x_SK[rows], w_EKN[group].to(x_SK.dtype), out=y_SN[rows])
        return y_SN

    def outer(self, u_SN: Tensor, x_SK: Tensor) -> Tensor:
        """Σ_s u_sᵀ x_s over the rows of each group: [E, N, K], zero where there are none."""
        if _taken(u_SN.T, x_SK):
            sums_ENK = F.grouped_mm(u_SN.T, x_SK, offs=self.ends_E)
            # Kernels may leave alone what no row belongs to.
            return sums_ENK.masked_fill_((self.sizes_E == 0)[:, None, None], 0)
        sums_ENK = x_SK.new_zeros(len(self.sizes_E), u_SN.shape[1], x_SK.shape[1])
        for group, rows in self.spans:
            torch.mm(u_SN[rows].T, x_SK[rows], out=sums_ENK[group])
        return sums_ENK


def _taken(*operands: Tensor) -> bool:
    """True where ``grouped_mm`` is there and takes these: no float64, all rows at 16 bytes."""
    if not hasattr(F, "grouped_mm"):  # before torch 2.10
        return False
    return all(
        operand.dtype == operands[0].dtype
        and operand.dtype in (torch.float32, torch.bfloat16, torch.float16)
        and operand.is_meta | (operand.data_ptr() % 16 == 0)
        and _has_aligned_rows(operand)
        for operand in operands
    )


def _has_aligned_rows(matrix: Tensor) -> bool:
    """As ``grouped_mm`` asks for them: one of the last two dimensions dense, no overlap."""
    for inner, outer in ((-1, -2), (-2, -1)):
        if matrix.stride(inner) == 1 and matrix.stride(outer) >= max(1, matrix.shape[inner]):
            return all(
                matrix.stride(d) * matrix.element_size() % 16 == 0
                for d in range(matrix.dim())
                if d != matrix.dim() + inner
            )
    return False
