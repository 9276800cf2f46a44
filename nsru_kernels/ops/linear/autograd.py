"""The projected linear for autograd and for torch.compile.

In eager the backend is called directly; while compiling, the registered ops
``nsru::linear_forward`` and ``nsru::linear_backward`` stand in the graph. Both run the same module.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from nsru_kernels.dispatch import as_op, run
from nsru_kernels.ops.fold.autograd import fold_many
from nsru_kernels.ops.fold.reference import accumulate_dtype

_library = torch.library.Library("nsru", "FRAGMENT")
_library.define(
    "linear_forward(Tensor x, Tensor weight, Tensor a, Tensor b, Tensor? bias, float scaling, "
    "float dropout_p, Tensor? seed, str backend) -> (Tensor, Tensor)"
)
_library.define(
    "linear_backward(Tensor dy, Tensor x, Tensor weight, Tensor a, Tensor b, Tensor s, "
    "float scaling, float dropout_p, Tensor? seed, bool[] needs, str backend) -> Tensor[]"
)


@torch.library.impl(_library, "linear_forward", "CompositeExplicitAutograd")
def _forward(x, weight, a, b, bias, scaling, dropout_p, seed, backend):
    args = (x, weight, a, b, bias, scaling, dropout_p, seed)
    return run("linear", "forward", backend, x.device, *args, **_key(x, weight, a))


@torch.library.impl(_library, "linear_backward", "CompositeExplicitAutograd")
def _(dy, *args):
    dx, dw, dbias, da, db = _backward(dy, *args)
    wide = accumulate_dtype(dy.dtype)  # whatever the backend hands out
    return [dx, dw, dbias, da.to(wide), db.to(wide)]


def _backward(dy, x, weight, a, b, s, scaling, dropout_p, seed, needs, backend):
    args = (dy, x, weight, a, b, s, scaling, dropout_p, seed, needs)
    # Every backend draws masks of its own: with dropout both passes must be by the same one.
    chosen_by = "forward" if dropout_p else None
    key = _key(x, weight, a)
    return run("linear", "backward", backend, x.device, *args, **key, chosen_by=chosen_by)


def _key(x_MK: Tensor, w_NK: Tensor, a_RK: Tensor) -> dict[str, Any]:
    """What a measured plan is looked up by."""
    return {"sizes": (*x_MK.shape, w_NK.shape[0], a_RK.shape[0]), "dtypes": (x_MK.dtype,)}


@torch.library.register_fake("nsru::linear_forward")
def _(x, weight, a, b, bias, scaling, dropout_p, seed, backend):
    return x.new_empty(x.shape[0], weight.shape[0]), x.new_empty(x.shape[0], a.shape[0])


@torch.library.register_fake("nsru::linear_backward")
def _(dy, x, weight, a, b, s, scaling, dropout_p, seed, needs, backend):
    shapes = (x.shape, weight.shape, (weight.shape[0],), a.shape, b.shape)
    dtypes = 3 * [x.dtype] + 2 * [accumulate_dtype(x.dtype)]
    return [
        x.new_empty(shape if need else 0, dtype=dtype)
        for shape, need, dtype in zip(shapes, needs, dtypes, strict=True)
    ]


class ProjectedLinear(torch.autograd.Function):
    """y = x Wᵀ + bias + s S Bᵀ, S = dropout(x) Āᵀ, Ā = A P.

    ``folded`` is Ā in x's dtype where the caller has it cached, else None. It is a value, not a
    variable: the gradient goes to A.
    """

    @staticmethod
    def forward(
        ctx, x, weight, bias, lora_a, lora_b, basis, core, folded, scaling, dropout_p, seed, backend
    ):
        if folded is None:
            folded = fold_to(x.dtype, lora_a, basis, core, backend)
        b_NR = lora_b.detach().to(x.dtype).contiguous()
        x_MK = flatten(x)
        call = torch.ops.nsru.linear_forward if as_op(x) else _forward
        y_MN, s_MR = call(x_MK, weight, folded, b_NR, bias, scaling, dropout_p, seed, backend)
        ctx.save_for_backward(x_MK, weight, folded, b_NR, s_MR, basis, core, seed)
        ctx.x_shape, ctx.scaling, ctx.dropout_p, ctx.backend = x.shape, scaling, dropout_p, backend
        ctx.dtypes = (
            bias.dtype if bias is not None else None,
            lora_a.dtype,
            lora_b.dtype,
        )
        return unflatten(y_MN, x.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        x_MK, weight, folded, b_NR, s_MR, basis, core, seed = ctx.saved_tensors
        bias_dtype, a_dtype, b_dtype = ctx.dtypes
        needs = list(ctx.needs_input_grad[:5])
        call = torch.ops.nsru.linear_backward if as_op(dy) else _backward
        dx, dw, dbias, da, db = call(
            flatten(dy), x_MK, weight, folded, b_NR, s_MR,
            ctx.scaling, ctx.dropout_p, seed, needs, ctx.backend,
        )  # fmt: skip
        need_x, need_w, need_bias, need_a, need_b = needs
        if need_a and basis is not None:
            da = fold_to(a_dtype, da.to(a_dtype), basis, core, ctx.backend)
        return (
            unflatten(dx, ctx.x_shape) if need_x else None,
            dw if need_w else None,
            dbias.to(bias_dtype) if need_bias else None,
            da.to(a_dtype) if need_a else None,
            db.to(b_dtype) if need_b else None,
            *(None,) * 7,
        )


def fold_to(
    dtype: torch.dtype, a_RK: Tensor, basis_KQ: Tensor | None, core_QQ: Tensor | None, backend: str
) -> Tensor:
    """Ā rounded once to ``dtype``; A itself where there is no basis. No autograd."""
    a_RK = a_RK.detach()
    if basis_KQ is None or not a_RK.numel():
        return a_RK.to(dtype).contiguous()
    return fold_many([a_RK], [basis_KQ], [core_QQ], backend)[0].to(dtype)


def flatten(x: Tensor) -> Tensor:
    """x [M, K], also where K is 0 and reshape(-1, K) would not know M."""
    return x if x.dim() == 2 else x.reshape(math.prod(x.shape[:-1]), x.shape[-1])


def unflatten(y_MN: Tensor, x_shape: torch.Size) -> Tensor:
    """y [..., N]. Not a view: autograd would refuse to let a view be edited in place."""
    if len(x_shape) == 2:
        return y_MN
    return torch.ops.aten._unsafe_view(y_MN, (*x_shape[:-1], y_MN.shape[1]))
