"""The group of projected linears for autograd and for torch.compile; see ops/linear/autograd.py."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from nsru_kernels.dispatch import as_op, run
from nsru_kernels.ops.fold.reference import accumulate_dtype
from nsru_kernels.ops.linear.autograd import flatten, fold_to, unflatten

_library = torch.library.Library("nsru", "FRAGMENT")
_library.define(
    "linear_group_forward(Tensor x, Tensor[] weights, Tensor a, Tensor[] bs, Tensor?[] biases, "
    "float[] scalings, str backend) -> (Tensor[], Tensor)"
)
_library.define(
    "linear_group_backward(Tensor?[] dys, Tensor x, Tensor[] weights, Tensor a, Tensor[] bs, "
    "Tensor s, float[] scalings, bool[] needs, str backend) -> Tensor[]"
)


@torch.library.impl(_library, "linear_group_forward", "CompositeExplicitAutograd")
def _forward(x, weights, a, bs, biases, scalings, backend):
    args = (x, weights, a, bs, biases, scalings)
    return run("linear_group", "forward", backend, x.device, *args, **_key(x, weights, a))


@torch.library.impl(_library, "linear_group_backward", "CompositeExplicitAutograd")
def _(dys, x, weights, *args):
    dx, da, *others = _backward(dys, x, weights, *args)
    wide, dbs = accumulate_dtype(x.dtype), 2 * len(weights)
    return [dx, da.to(wide), *others[:dbs], *(db.to(wide) for db in others[dbs:])]


def _backward(dys, x, weights, a, bs, s, scalings, needs, backend):
    args = (dys, x, weights, a, bs, s, scalings, needs)
    return run("linear_group", "backward", backend, x.device, *args, **_key(x, weights, a))


def _key(x_MK: Tensor, ws_NK: list[Tensor], a_RK: Tensor) -> dict[str, Any]:
    """What a measured plan is looked up by: M, K, ΣN, ΣR."""
    n = sum(w_NK.shape[0] for w_NK in ws_NK)
    return {"sizes": (*x_MK.shape, n, a_RK.shape[0]), "dtypes": (x_MK.dtype,)}


@torch.library.register_fake("nsru::linear_group_forward")
def _(x, weights, a, bs, biases, scalings, backend):
    m = x.shape[0]
    return [x.new_empty(m, w.shape[0]) for w in weights], x.new_empty(m, a.shape[0])


@torch.library.register_fake("nsru::linear_group_backward")
def _(dys, x, weights, a, bs, s, scalings, needs, backend):
    shapes = [x.shape, a.shape]
    shapes += [w.shape for w in weights] + [w.shape[:1] for w in weights] + [b.shape for b in bs]
    used = [True, True, *[dy is not None for dy in dys] * 3]
    wide = accumulate_dtype(x.dtype)
    dtypes = [x.dtype, wide, *[x.dtype] * 2 * len(bs), *[wide] * len(bs)]
    return [
        x.new_empty(shape if need and use else 0, dtype=dtype)
        for shape, need, use, dtype in zip(shapes, needs, used, dtypes, strict=True)
    ]


class ProjectedLinearGroup(torch.autograd.Function):
    """y_i = x W_iᵀ + b_i + s_i S_i B_iᵀ, S = x Āᵀ, Ā the stacked A_i P.

    ``folded`` is Ā in x's dtype where the caller has it cached, else None. It is a value, not a
    variable: the gradients go to the A_i. ``tensors`` are all W_i, all b_i, all A_i, all B_i.
    """

    @staticmethod
    def forward(ctx, x, basis, core, folded, scalings, backend, *tensors):
        n = len(scalings)
        weights, biases, lora_as, lora_bs = (tensors[i * n : i * n + n] for i in range(4))
        if folded is None:
            folded = fold_to(x.dtype, _stack([a.detach() for a in lora_as]), basis, core, backend)
        bs_NR = [b.detach().to(x.dtype).contiguous() for b in lora_bs]
        x_MK = flatten(x)
        call = torch.ops.nsru.linear_group_forward if as_op(x) else _forward
        ys, s_MR = call(x_MK, list(weights), folded, bs_NR, list(biases), scalings, backend)
        ctx.save_for_backward(x_MK, folded, s_MR, basis, core, *weights, *bs_NR)
        ctx.set_materialize_grads(False)
        ctx.x_shape, ctx.scalings, ctx.backend = x.shape, scalings, backend
        ctx.ranks = [a.shape[0] for a in lora_as]
        ctx.dtypes = [None if t is None else t.dtype for t in (*biases, *lora_as, *lora_bs)]
        return tuple(unflatten(y, x.shape) for y in ys)

    @staticmethod
    @once_differentiable
    def backward(ctx, *dys):
        n = len(dys)
        try:
            x_MK, folded, s_MR, basis, core, *rest = ctx.saved_tensors
        except RuntimeError as error:
            raise RuntimeError(
                "nsru_linear_group: the outputs of siblings (q/k/v, gate/up) share one backward, "
                "which has run. Sum the losses, pass retain_graph=True, or "
                "swap_linears(..., siblings=False)."
            ) from error
        weights, bs_NR = rest[:n], rest[n:]
        need_x, need_tensors = ctx.needs_input_grad[0], ctx.needs_input_grad[6:]
        need_as = need_tensors[2 * n : 3 * n]
        needs = [need_x, any(need_as), *need_tensors[: 2 * n], *need_tensors[3 * n :]]
        call = torch.ops.nsru.linear_group_backward if as_op(x_MK) else _backward
        dx, da, *others = call(
            [None if dy is None else flatten(dy) for dy in dys],
            x_MK, weights, folded, bs_NR, s_MR, ctx.scalings, needs, ctx.backend,
        )  # fmt: skip
        bias_dtypes, a_dtypes, b_dtypes = (ctx.dtypes[i * n : i * n + n] for i in range(3))
        das = [None] * n
        if any(need_as):
            if basis is not None:
                wide = functools.reduce(torch.promote_types, a_dtypes)
                da = fold_to(wide, da.to(wide), basis, core, ctx.backend)
            das = da.split(ctx.ranks)
        grads = [
            *others[:n],
            *map(_to, others[n : 2 * n], bias_dtypes),
            *map(_to, das, a_dtypes),
            *map(_to, others[2 * n :], b_dtypes),
        ]
        used = [dy is not None for dy in dys] * 4
        return (
            unflatten(dx, ctx.x_shape) if need_x else None,
            *(None,) * 5,
            *(
                grad if need and use else None
                for grad, need, use in zip(grads, need_tensors, used, strict=True)
            ),
        )


def _stack(as_RK: list[Tensor]) -> Tensor:
    """[ΣR, K] in the widest of their dtypes."""
    dtype = functools.reduce(torch.promote_types, [a.dtype for a in as_RK])
    return torch.cat([a.to(dtype) for a in as_RK])


def _to(tensor: Tensor | None, dtype: torch.dtype | None) -> Tensor | None:
    return tensor if tensor is None or dtype is None else tensor.to(dtype)
