"""The projection for autograd and for torch.compile. P is symmetric: backward projects dĀ."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from nsru_kernels.dispatch.choice import READ_MEMORY, as_op, choose
from nsru_kernels.dispatch.config import BackendUnavailable
from nsru_kernels.dispatch.launch import in_memory
from nsru_kernels.ops.project import reference
from nsru_kernels.ops.project.backends import PROJECT, query

_library = torch.library.Library("nsru", "FRAGMENT")
_library.define(
    "project(Tensor[] a, Tensor[] basis, Tensor?[] gram_inverse, str backend) -> Tensor[]"
)


def project_many(
    as_RK: list[Tensor], bases_KQ: list[Tensor], gram_inverses_QQ: list[Tensor | None], backend: str
) -> list[Tensor]:
    """Ā_i, unrounded (float32, or float64 for float64 adapters); no autograd."""
    if as_op(as_RK[0]):
        return torch.ops.nsru.project(as_RK, bases_KQ, gram_inverses_QQ, backend)
    return _project_many(as_RK, bases_KQ, gram_inverses_QQ, backend)


def project_one(
    a_RK: Tensor, basis_KQ: Tensor, gram_inverse_QQ: Tensor | None, backend: str
) -> Tensor:
    """``project_many`` of one adapter, in few steps."""
    if as_op(a_RK) or torch.is_autocast_enabled(a_RK.device.type):
        return project_many([a_RK], [basis_KQ], [gram_inverse_QQ], backend)[0]
    dtypes, threads = (a_RK.dtype, basis_KQ.dtype), torch.get_num_threads()
    chosen = choose(PROJECT, backend, a_RK.device, "fold", "fold_many", (1,), dtypes, threads)
    if chosen.backend == "eager":
        return reference.project(a_RK, basis_KQ, gram_inverse_QQ)
    return _project_many([a_RK], [basis_KQ], [gram_inverse_QQ], backend)[0]


@torch.library.impl(_library, "project", "CompositeExplicitAutograd")
def _project_many(
    as_RK: list[Tensor], bases_KQ: list[Tensor], gram_inverses_QQ: list[Tensor | None], backend: str
) -> list[Tensor]:
    device, threads = as_RK[0].device, torch.get_num_threads()
    chosen = choose(PROJECT, backend, device, *query(as_RK, bases_KQ), threads)
    args: Sequence = (as_RK, bases_KQ, gram_inverses_QQ)
    if chosen.backend in READ_MEMORY:
        args = in_memory(args)
    try:
        if torch.is_autocast_enabled(device.type):
            with torch.autocast(device.type, enabled=False):
                return chosen.module.project_many(*args)
        return chosen.module.project_many(*args)
    except BackendUnavailable:  # tensors without memory of their own, say
        if chosen.named:
            raise
        return reference.project_many(as_RK, bases_KQ, gram_inverses_QQ)


@torch.library.register_fake("nsru::project")
def _(a, basis, gram_inverse, backend):
    return [
        torch.empty_like(x, dtype=torch.promote_types(x.dtype, torch.float32)).contiguous()
        for x in a
    ]


class Projection(torch.autograd.Function):
    """Ā_i = A_i P_i; dA_i = dĀ_i P_i."""

    @staticmethod
    def forward(ctx, backend, bases, gram_inverses, *lora_as):
        ctx.backend = backend
        ctx.count = len(bases)
        ctx.dtypes = [a.dtype for a in lora_as]
        ctx.save_for_backward(*bases, *gram_inverses)
        projected = project_many(list(lora_as), bases, gram_inverses, backend)
        return tuple(f.to(dtype) for f, dtype in zip(projected, ctx.dtypes, strict=True))

    @staticmethod
    @once_differentiable
    def backward(ctx, *grads):
        saved = ctx.saved_tensors
        wanted = [i for i in range(ctx.count) if ctx.needs_input_grad[3 + i]]
        projected = project_many(
            [grads[i] for i in wanted],
            [saved[i] for i in wanted],
            [saved[ctx.count + i] for i in wanted],
            ctx.backend,
        )
        result: list[Tensor | None] = [None] * ctx.count
        for i, grad in zip(wanted, projected, strict=True):
            result[i] = grad.to(ctx.dtypes[i])
        return None, None, None, *result
