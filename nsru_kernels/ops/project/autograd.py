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
from nsru_kernels.ops.project.gram import gram_inverse_of
from nsru_kernels.ops.project.tables import Group

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


def project_groups(
    groups: Sequence[tuple[Sequence[Tensor], Tensor]], dtype: torch.dtype, backend: str
) -> list[Tensor]:
    """Ā_i of each group of adapters on one basis, on top of each other: [ΣR, K], rounded once to
    ``dtype``; no autograd. Where the backend has a grouped kernel, one launch writes them all."""
    adapters = [a_RK for lora_as, _ in groups for a_RK in lora_as]
    bases = [basis for lora_as, basis in groups for _ in lora_as]
    device, threads = adapters[0].device, torch.get_num_threads()
    chosen = choose(PROJECT, backend, device, *query(adapters, bases), threads)
    with torch.autocast(device.type, enabled=False):
        if into := getattr(chosen.module, "project_into", None):
            outputs = [
                basis.new_empty(sum([a.shape[0] for a in lora_as]), basis.shape[0], dtype=dtype)
                for lora_as, basis in groups
            ]
            try:
                into(
                    [
                        Group(output, in_memory(lora_as), in_memory(basis), gram_inverse_of(basis))
                        for output, (lora_as, basis) in zip(outputs, groups, strict=True)
                    ]
                )
                return outputs
            except BackendUnavailable:  # float64, say
                if chosen.named:
                    raise
        module = reference if into else chosen.module
        stacked = [a[0] if len(a) == 1 else torch.cat(list(a)) for a, _ in groups]
        bases = [basis for _, basis in groups]
        parts = module.project_many(stacked, bases, [gram_inverse_of(basis) for basis in bases])
        return [part.to(dtype) for part in parts]


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
        ctx.set_materialize_grads(False)
        ctx.backend = backend
        ctx.dtypes = [a.dtype for a in lora_as]
        ctx.save_for_backward(*bases, *gram_inverses)
        projected = project_many(list(lora_as), bases, gram_inverses, backend)
        return tuple(f.to(dtype) for f, dtype in zip(projected, ctx.dtypes, strict=True))

    @staticmethod
    @once_differentiable
    def backward(ctx, *grads):
        bases, gram_inverses = ctx.saved_tensors[: len(grads)], ctx.saved_tensors[len(grads) :]
        wanted = ctx.needs_input_grad[3:]
        das: list[Tensor | None] = [None] * len(grads)
        given = [i for i, grad in enumerate(grads) if grad is not None and wanted[i]]
        if given:
            projected = project_many(
                [grads[i] for i in given],
                [bases[i] for i in given],
                [gram_inverses[i] for i in given],
                ctx.backend,
            )
            for i, da in zip(given, projected, strict=True):
                das[i] = da.to(ctx.dtypes[i])
        return None, None, None, *das


class KeptProjection(torch.autograd.Function):
    """s_i Ā_i as variables of the graph, of values that are kept; dA_i = s_i dĀ_i P by library
    products.

    Nothing is saved for backward, so that the same variables serve every forward and backward for
    as long as the values do. ``kept`` is (Ā [ΣR, K], scalings, basis, gram_inverse): no variables.
    """

    @staticmethod
    def forward(ctx, kept, *lora_as):
        ctx.set_materialize_grads(False)
        projected, ctx.scalings, ctx.basis, ctx.gram_inverse = kept
        ctx.edits = None if ctx.basis is None else ctx.basis._version
        ctx.dtypes = [a.dtype for a in lora_as]
        rows = projected.split([len(a) for a in lora_as])
        return tuple([a * s for a, s in zip(rows, ctx.scalings, strict=True)])

    @staticmethod
    def backward(ctx, *grads):
        if len(grads) == 1:
            da = _projected(ctx, grads[0], ctx.scalings[0])
            return None, da if da.dtype == ctx.dtypes[0] else da.to(ctx.dtypes[0])
        das, given = list(grads), [i for i, grad in enumerate(grads) if grad is not None]
        parts, scale = [grads[i] for i in given], ctx.scalings[0]
        if len({*ctx.scalings}) > 1:
            parts, scale = [grads[i] * ctx.scalings[i] for i in given], 1.0
        da = _projected(ctx, torch.cat(parts), scale)
        for i, row in zip(given, da.split([len(part) for part in parts]), strict=True):
            das[i] = row if row.dtype == ctx.dtypes[i] else row.to(ctx.dtypes[i])
        return None, *das


def _projected(ctx, da_RK: Tensor, scale: float) -> Tensor:
    if ctx.basis is None:
        return da_RK * scale
    if ctx.basis._version != ctx.edits:
        raise RuntimeError(
            "the basis of a retain subspace was modified by an inplace operation between forward "
            "and backward; edit it before the forward or after the backward."
        )
    if torch.is_autocast_enabled(da_RK.device.type):
        with torch.autocast(da_RK.device.type, enabled=False):
            return reference.project(da_RK, ctx.basis, ctx.gram_inverse, scale)
    return reference.project(da_RK, ctx.basis, ctx.gram_inverse, scale)
