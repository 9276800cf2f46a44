"""The projected linears for autograd and for torch.compile.

In eager the backend is called directly; while compiling, the registered ops
``nsru::linear_forward`` and ``nsru::linear_backward`` stand in the graph. Both choose alike.
"""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from nsru_kernels.dispatch.choice import READ_MEMORY, as_op, choose
from nsru_kernels.dispatch.config import BackendUnavailable
from nsru_kernels.dispatch.launch import in_memory
from nsru_kernels.ops.linear import reference
from nsru_kernels.ops.linear.backends import LINEAR, compute_dtype
from nsru_kernels.ops.project.autograd import project_one
from nsru_kernels.ops.project.reference import accumulate_dtype

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
        LINEAR, backend, x.device, table, function, (m, k, n, r), (x.dtype,),
        torch.get_num_threads(),
    )  # fmt: skip


@torch.library.impl(_library, "linear_forward", "CompositeExplicitAutograd")
def _forward(x, weights, a, bs, biases, scalings, dropout_p, seed, backend):
    chosen = _choose("forward", x, weights, a, backend)
    args: Sequence = (x, weights, a, bs, biases, scalings, dropout_p, seed)
    if chosen.backend in READ_MEMORY:
        args = in_memory(args)
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
    args: Sequence = (dys, x, weights, a, bs, s, scalings, dropout_p, seed, needs)
    if chosen.backend in READ_MEMORY:
        args = in_memory(args)
    try:
        return chosen.module.backward(*args, **({} if dropout_p else chosen.options))
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


class Call(NamedTuple):
    """The arguments of a call besides the variables of the graph.

    ``projected`` is Ā in x's dtype where the caller has it cached, else None. It is a value, not a
    variable: the gradients go to the A_i.
    """

    weights: Sequence[Tensor]
    biases: Sequence[Tensor | None]
    basis: Tensor | None
    gram_inverse: Tensor | None
    projected: Tensor | None
    scalings: Sequence[float]
    dropout_p: float
    seed: Tensor | None
    backend: str


class ProjectedLinear(torch.autograd.Function):
    """y_i = x W_iᵀ + b_i + s_i S_i B_iᵀ, S = dropout(x) Āᵀ, Ā the stacked A_i P.

    ``variables`` are all A_i and all B_i, and, where one of them is not frozen, all W_i and b_i.
    Few of them, for PyTorch walks through the arguments of each call. Without gradients ``forward``
    is called as it is, with None for ctx.
    """

    @staticmethod
    def forward(ctx, call, x, *variables):
        weights, biases, basis, gram_inverse, projected, scalings, dropout_p, seed, backend = call
        n, dtype = len(weights), x.dtype
        lora_as, lora_bs = variables[:n], variables[n : 2 * n]
        if projected is None:
            projected = _project(dtype, _stack(lora_as), basis, gram_inverse, backend)
        bs_NR = []
        for b_NR in lora_bs:
            bs_NR.append(b_NR.detach() if b_NR.dtype == dtype else b_NR.detach().to(dtype))
        x_MK = x if x.dim() == 2 else _flatten(x)
        run = torch.ops.nsru.linear_forward if as_op(x) else _forward
        args = (x_MK, weights, projected, bs_NR, biases, scalings, dropout_p, seed, backend)
        if not x.is_meta and torch.is_autocast_enabled(x.device.type):  # dtypes are chosen already
            with torch.autocast(x.device.type, enabled=False):
                ys, s_MR = run(*args)
        else:
            ys, s_MR = run(*args)
        if ctx is not None:
            saved = (x_MK, projected, s_MR, basis, gram_inverse, seed, *weights, *bs_NR)
            ctx.save_for_backward(*saved)
            ctx.set_materialize_grads(False)
            ctx.settings = x.shape, scalings, dropout_p, backend
            ctx.adapters = lora_as, lora_bs  # whose dtypes the gradients take
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
        x_MK, projected, s_MR, basis, gram_inverse, seed, *rest = ctx.saved_tensors
    except RuntimeError as error:
        if n == 1 or "a second time" not in str(error):
            raise
        raise RuntimeError(
            "nsru_linear_group: the outputs of a group (q/k/v, gate/up) share one backward, which "
            "has run. Sum the losses, pass retain_graph=True, or swap_linears(..., siblings=False)."
        ) from error
    ctx.spent = True
    x_shape, scalings, dropout_p, backend = ctx.settings
    _, need_x, *wanted = ctx.needs_input_grad
    need_frozen = wanted[2 * n :] or [False] * (2 * n)
    need_a = any(wanted[:n])
    needs = [need_x, need_a, *need_frozen, *wanted[n : 2 * n]]
    dys_MN = [dy if dy is None or dy.dim() == 2 else _flatten(dy) for dy in dys]
    run = torch.ops.nsru.linear_backward if as_op(x_MK) else _backward
    args = (dys_MN, x_MK, rest[:n], projected, rest[n:], s_MR, scalings, dropout_p, seed, needs)
    if not x_MK.is_meta and torch.is_autocast_enabled(x_MK.device.type):
        with torch.autocast(x_MK.device.type, enabled=False):
            dx, da, *others = run(*args, backend)
    else:
        dx, da, *others = run(*args, backend)
    lora_as, lora_bs = ctx.adapters
    das: Sequence[Tensor | None] = [None] * n
    if need_a:
        if basis is not None:
            da = _project(_widest(lora_as), da, basis, gram_inverse, backend)
        das = (da,) if n == 1 else da.split_with_sizes([b_NR.shape[1] for b_NR in rest[n:]])
    if need_x and len(x_shape) != 2:
        dx = torch.ops.aten._unsafe_view(dx, x_shape)
    grads = [None, dx if need_x else None]
    adapters = zip((*lora_as, *lora_bs), (*das, *others[2 * n :]), strict=True)
    for i, (parameter, grad) in enumerate(adapters):
        used = wanted[i] and dys[i % n] is not None
        grads.append(_to(grad, parameter.dtype) if used else None)
    for i, need in enumerate(wanted[2 * n :]):
        grads.append(others[i] if need and dys[i % n] is not None else None)
    return tuple(grads)


_gradients_once = once_differentiable(_gradients)


class ProjectedUpdate(torch.autograd.Function):
    """y + s S Bᵀ, S = dropout(x) Āᵀ, for a y = x Wᵀ + b that another kernel made; library GEMMs.

    y is not written to, and not kept for backward. ``call`` has no weights.
    """

    @staticmethod
    def forward(ctx, call, y, x, lora_a, lora_b):
        _, _, basis, gram_inverse, projected, (scaling,), dropout_p, seed, backend = call
        dtype = compute_dtype(x)
        with _no_autocast(x):
            if projected is None:
                projected = _project(dtype, lora_a.detach(), basis, gram_inverse, backend)
            x_MK, y_MN, b_NR = _flatten(_to(x, dtype)), _flatten(y), _to(lora_b.detach(), dtype)
            s_MR = reference.drop(x_MK, dropout_p, seed) @ projected.T
            if y.dtype == dtype:
                out_MN = torch.addmm(y_MN, s_MR, b_NR.T, alpha=scaling)
            else:
                out_MN = torch.add(y_MN, _to(s_MR @ b_NR.T, y.dtype), alpha=scaling)
        ctx.save_for_backward(x_MK, projected, b_NR, s_MR, basis, gram_inverse, seed)
        ctx.settings = scaling, dropout_p, backend
        ctx.likes = x.shape, x.dtype, lora_a.dtype, lora_b.dtype
        return torch.ops.aten._unsafe_view(out_MN, y.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        x_MK, projected, b_NR, s_MR, basis, gram_inverse, seed = ctx.saved_tensors
        scaling, dropout_p, backend = ctx.settings
        x_shape, x_dtype, a_dtype, b_dtype = ctx.likes
        _, need_y, need_x, need_a, need_b = ctx.needs_input_grad
        dys_MN: list[Tensor | None] = [_flatten(_to(dy, x_MK.dtype))]
        needs = [need_x, need_a, False, False, need_b]
        with _no_autocast(dy):
            dx, da, *_, db = reference.backward(
                dys_MN, x_MK, [None], projected, [b_NR], s_MR, [scaling], dropout_p, seed, needs
            )
            if da is not None:
                da = _project(a_dtype, da, basis, gram_inverse, backend)
        return (
            None,
            dy if need_y else None,
            None if dx is None else _to(dx, x_dtype).reshape(x_shape),
            da,
            None if db is None else _to(db, b_dtype),
        )


def _no_autocast(x: Tensor) -> contextlib.AbstractContextManager:
    if x.is_meta or not torch.is_autocast_enabled(x.device.type):
        return contextlib.nullcontext()
    return torch.autocast(x.device.type, enabled=False)


def _project(
    dtype: torch.dtype,
    a_RK: Tensor,
    basis_KQ: Tensor | None,
    gram_inverse_QQ: Tensor | None,
    backend: str,
) -> Tensor:
    """Ā rounded once to ``dtype``; A itself where there is no basis. No autograd."""
    if basis_KQ is None or not a_RK.numel():
        return _to(a_RK, dtype).contiguous()
    return _to(project_one(a_RK, basis_KQ, gram_inverse_QQ, backend), dtype)


def _stack(lora_as: Sequence[Tensor]) -> Tensor:
    """[ΣR, K] in the widest of their dtypes."""
    if len(lora_as) == 1:
        return lora_as[0].detach()
    dtype = _widest(lora_as)
    return torch.cat([a.detach().to(dtype) for a in lora_as])


def _widest(tensors: Sequence[Tensor]) -> torch.dtype:
    if len(tensors) == 1:
        return tensors[0].dtype
    return functools.reduce(torch.promote_types, [tensor.dtype for tensor in tensors])


def _flatten(x: Tensor) -> Tensor:
    """x [M, K], also where K is 0 and reshape(-1, K) would not know M."""
    return x.reshape(math.prod(x.shape[:-1]), x.shape[-1])


def _to(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    return tensor if tensor.dtype == dtype else tensor.to(dtype)
