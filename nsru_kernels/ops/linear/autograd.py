"""The projected linears for autograd and for torch.compile.

In eager the backend is called directly; while compiling, the registered ops
``nsru::linear_forward`` and ``nsru::linear_backward`` stand in the graph. Both run the same module.
"""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from nsru_kernels.dispatch.choice import as_op, choose
from nsru_kernels.dispatch.config import BackendUnavailable, requested_backend
from nsru_kernels.ops.fold.autograd import fold_many
from nsru_kernels.ops.fold.reference import accumulate_dtype
from nsru_kernels.ops.linear import reference
from nsru_kernels.ops.linear.backends import LINEAR

_library = torch.library.Library("nsru", "FRAGMENT")
_library.define(
    "linear_forward(Tensor x, Tensor[] weights, Tensor a, Tensor[] bs, Tensor?[] biases, "
    "float[] scalings, float dropout_p, Tensor? seed, str backend) -> (Tensor[], Tensor)"
)
_library.define(
    "linear_backward(Tensor?[] dys, Tensor x, Tensor[] weights, Tensor a, Tensor[] bs, Tensor s, "
    "float[] scalings, float dropout_p, Tensor? seed, bool[] needs, str backend) -> Tensor[]"
)


def _choose(function, x, weights, a, backend):
    """Plans are looked up by M, K, ΣN, ΣR; a linear by itself and a group have their own."""
    (m, k), r = x.shape, a.shape[0]
    if len(weights) == 1:
        table, n = "linear", weights[0].shape[0]
    else:
        table, n = "linear_group", sum([weight.shape[0] for weight in weights])
    return choose(
        LINEAR, requested_backend(backend), x.device, table, function, (m, k, n, r), (x.dtype,),
        torch.get_num_threads(),
    )  # fmt: skip


@torch.library.impl(_library, "linear_forward", "CompositeExplicitAutograd")
def _forward(x, weights, a, bs, biases, scalings, dropout_p, seed, backend):
    chosen = _choose("forward", x, weights, a, backend)
    args = (x, weights, a, bs, biases, scalings, dropout_p, seed)
    try:
        return chosen.module.forward(*args, **chosen.options)
    except BackendUnavailable:  # measured at these sizes, but not for this layout, say
        if chosen.named:
            raise
        return reference.forward(*args)


@torch.library.impl(_library, "linear_backward", "CompositeExplicitAutograd")
def _(dys, x, weights, *args):
    grads = _backward(dys, x, weights, *args)
    adapters = accumulate_dtype(x.dtype)  # whatever the backend hands out
    dtypes = [x.dtype, adapters, *[x.dtype] * 2 * len(weights), *[adapters] * len(weights)]
    return [
        x.new_empty(0, dtype=dtype) if grad is None else grad.to(dtype)
        for grad, dtype in zip(grads, dtypes, strict=True)
    ]


def _backward(dys, x, weights, a, bs, s, scalings, dropout_p, seed, needs, backend):
    # Every backend draws masks of its own: with dropout both passes must be by the same one.
    function = "forward" if dropout_p else "backward"
    chosen = _choose(function, x, weights, a, backend)
    args = (dys, x, weights, a, bs, s, scalings, dropout_p, seed, needs)
    try:
        return chosen.module.backward(*args)
    except BackendUnavailable:
        if chosen.named:
            raise
        return reference.backward(*args)


@torch.library.register_fake("nsru::linear_forward")
def _(x, weights, a, bs, biases, scalings, dropout_p, seed, backend):
    m = x.shape[0]
    return [x.new_empty(m, w.shape[0]) for w in weights], x.new_empty(m, a.shape[0])


@torch.library.register_fake("nsru::linear_backward")
def _(dys, x, weights, a, bs, s, scalings, dropout_p, seed, needs, backend):
    shapes = [x.shape, a.shape]
    shapes += [w.shape for w in weights] + [w.shape[:1] for w in weights] + [b.shape for b in bs]
    used = [True, True, *[dy is not None for dy in dys] * 3]
    wide = accumulate_dtype(x.dtype)
    dtypes = [x.dtype, wide, *[x.dtype] * 2 * len(bs), *[wide] * len(bs)]
    return [
        x.new_empty(shape if need and use else 0, dtype=dtype)
        for shape, need, use, dtype in zip(shapes, needs, used, dtypes, strict=True)
    ]


class ProjectedLinear(torch.autograd.Function):
    """y_i = x W_iᵀ + b_i + s_i S_i B_iᵀ, S = dropout(x) Āᵀ, Ā the stacked A_i P.

    ``projected`` is Ā in x's dtype where the caller has it cached, else None. It is a value, not a
    variable: the gradients go to the A_i. ``tensors`` are all W_i, all b_i, all A_i, all B_i.
    """

    @staticmethod
    def forward(ctx, x, basis, core, projected, scalings, dropout_p, seed, backend, *tensors):
        n = len(scalings)
        weights, biases = list(tensors[:n]), list(tensors[n : 2 * n])
        lora_as, lora_bs = tensors[2 * n : 3 * n], tensors[3 * n :]
        if projected is None:
            projected = _project(x.dtype, _stack(lora_as), basis, core, backend)
        dtype = x.dtype
        bs_NR, a_dtypes, b_dtypes = [], [], []
        for a_RK, b_NR in zip(lora_as, lora_bs, strict=True):
            bs_NR.append(b_NR.detach() if b_NR.dtype == dtype else b_NR.detach().to(dtype))
            a_dtypes.append(a_RK.dtype)
            b_dtypes.append(b_NR.dtype)
        x_MK = x if x.dim() == 2 else _flatten(x)
        call = torch.ops.nsru.linear_forward if as_op(x) else _forward
        args = (x_MK, weights, projected, bs_NR, biases, scalings, dropout_p, seed, backend)
        # The dtypes are chosen already.
        if not x.is_meta and torch.is_autocast_enabled(x.device.type):
            with torch.autocast(x.device.type, enabled=False):
                ys, s_MR = call(*args)
        else:
            ys, s_MR = call(*args)
        ctx.save_for_backward(x_MK, projected, s_MR, basis, core, seed, *weights, *bs_NR)
        ctx.set_materialize_grads(False)
        ctx.settings = x.shape, scalings, dropout_p, backend
        ctx.dtypes = a_dtypes + b_dtypes
        ctx.spent = False
        if x.dim() == 2:
            return tuple(ys)
        # Not views: autograd would refuse to let one of several be edited in place.
        lead = x.shape[:-1]
        return tuple([torch.ops.aten._unsafe_view(y, (*lead, y.shape[1])) for y in ys])

    @staticmethod
    def backward(ctx, *dys):
        # The check against double backward costs as much as a GEMM of a small model.
        return (_gradients_once if torch.is_grad_enabled() else _gradients)(ctx, *dys)


def _gradients(ctx, *dys):
    n = len(dys)
    try:
        x_MK, projected, s_MR, basis, core, seed, *rest = ctx.saved_tensors
    except RuntimeError as error:
        if n == 1 or not ctx.spent:
            raise
        raise RuntimeError(
            "nsru_linear_group: the outputs of a group (q/k/v, gate/up) share one backward, which "
            "has run. Sum the losses, pass retain_graph=True, or swap_linears(..., siblings=False)."
        ) from error
    ctx.spent = True
    x_shape, scalings, dropout_p, backend = ctx.settings
    need_x, need_tensors = ctx.needs_input_grad[0], ctx.needs_input_grad[8:]
    need_a = any(need_tensors[2 * n : 3 * n])
    needs = [need_x, need_a, *need_tensors[: 2 * n], *need_tensors[3 * n :]]
    dys_MN = [dy if dy is None or dy.dim() == 2 else _flatten(dy) for dy in dys]
    call = torch.ops.nsru.linear_backward if as_op(x_MK) else _backward
    args = (dys_MN, x_MK, rest[:n], projected, rest[n:], s_MR, scalings, dropout_p, seed, needs)
    if not x_MK.is_meta and torch.is_autocast_enabled(x_MK.device.type):
        with torch.autocast(x_MK.device.type, enabled=False):
            dx, da, *others = call(*args, backend)
    else:
        dx, da, *others = call(*args, backend)
    das = [None] * n
    if need_a:
        if basis is not None:
            wide = functools.reduce(torch.promote_types, ctx.dtypes[:n])
            da = _project(wide, da.to(wide), basis, core, backend)
        das = (da,) if n == 1 else da.split_with_sizes([b_NR.shape[1] for b_NR in rest[n:]])
    if need_x and len(x_shape) != 2:
        dx = torch.ops.aten._unsafe_view(dx, x_shape)
    grads = [dx if need_x else None, *(None,) * 7, *others[: 2 * n]]
    for grad, dtype in zip((*das, *others[2 * n :]), ctx.dtypes, strict=True):
        grads.append(grad if grad is None or grad.dtype == dtype else grad.to(dtype))
    for i, need in enumerate(need_tensors):
        if not need or dys[i % n] is None:
            grads[8 + i] = None
    return tuple(grads)


_gradients_once = once_differentiable(_gradients)


def _project(
    dtype: torch.dtype, a_RK: Tensor, basis_KQ: Tensor | None, core_QQ: Tensor | None, backend: str
) -> Tensor:
    """Ā rounded once to ``dtype``; A itself where there is no basis. No autograd."""
    if basis_KQ is None or not a_RK.numel():
        return a_RK.to(dtype).contiguous()
    return fold_many([a_RK], [basis_KQ], [core_QQ], backend)[0].to(dtype)


def _stack(lora_as: tuple[Tensor, ...]) -> Tensor:
    """[ΣR, K] in the widest of their dtypes."""
    if len(lora_as) == 1:
        return lora_as[0].detach()
    dtype = functools.reduce(torch.promote_types, [a.dtype for a in lora_as])
    return torch.cat([a.detach().to(dtype) for a in lora_as])


def _flatten(x: Tensor) -> Tensor:
    """x [M, K], also where K is 0 and reshape(-1, K) would not know M."""
    return x if x.dim() == 2 else x.reshape(math.prod(x.shape[:-1]), x.shape[-1])
