"""The small products, as far as several backends share them."""

from __future__ import annotations

from torch import Tensor


def rank_columns(s_MR: Tensor, bs_NR: list[Tensor]) -> tuple[Tensor, ...]:
    """The columns of S, or of dS, that belong to each B_i; views."""
    ranks = []
    for b_NR in bs_NR:
        ranks.append(b_NR.shape[1])
    return s_MR.split_with_sizes(ranks, dim=1)


def frozen_gradients(
    dys_MN: list[Tensor | None], x_MK: Tensor, needs: list[bool]
) -> list[Tensor | None]:
    """[*dW, *dbias] of weights and biases that are not frozen after all, by library GEMMs.

    ``needs`` is that of ``backward``; what is not needed, or not used, is None.
    """
    count = len(dys_MN)
    grads: list[Tensor | None] = [None] * (2 * count)
    if any(needs[2 : 2 + 2 * count]):
        for i, dy_MN in enumerate(dys_MN):
            if dy_MN is not None and needs[2 + i]:
                grads[i] = dy_MN.T @ x_MK
            if dy_MN is not None and needs[2 + count + i]:
                grads[count + i] = dy_MN.sum(0)
    return grads


def input_gradient(
    dys_MN: list[Tensor | None], ws_NK: list[Tensor], ds_MR: Tensor, a_RK: Tensor
) -> Tensor:
    """dS Ā + Σ dY_i W_i by library GEMMs, each accumulated onto the one before (beta 1)."""
    dx_MK = ds_MR @ a_RK
    for dy_MN, w_NK in zip(dys_MN, ws_NK, strict=True):
        if dy_MN is not None:
            dx_MK.addmm_(dy_MN, w_NK)
    return dx_MK


def public_name(ws_NK: list[Tensor]) -> str:
    """The function that the user called, for messages."""
    return "nsru_linear" if len(ws_NK) == 1 else "nsru_linear_group"


def one_read_pays(r: int) -> bool:
    """True where dB and dS should share one read of dY: beyond this rank the partial sums of dS,
    4 R bytes a row and block of 256 columns, move more than a second read."""
    return r <= 32
