"""What benchmarks use of nsru_kernels beyond its public functions, in one place.

Backends and plans one by one, which the public ops choose themselves, and the ops with the adapter
projected beforehand, as modules call them.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

import nsru_kernels as nk
from nsru_bench import providers
from nsru_bench.cases import Operands, Provider
from nsru_bench.session import Session
from nsru_kernels import dispatch
from nsru_kernels.config import BACKENDS
from nsru_kernels.ops import cpu_extension, extension, launch
from nsru_kernels.ops.linear import projected_linear
from nsru_kernels.ops.linear_group import projected_linear_group
from nsru_kernels.ops.products import one_read_pays
from nsru_kernels.ops.sketch import energy_limit
from nsru_kernels.plans import CPU_WITH_AMX, FOLDER, slug
from nsru_kernels.subspaces.factors import left_singular, nystrom_factor

__all__ = ["CPU_WITH_AMX", "FOLDER", "left_singular", "nystrom_factor", "slug"]

PREFIX = "plan "  # of providers that are one backend's functions, by one plan


def stack_projected(operands: Operands) -> Tensor:
    stacked = torch.cat(operands.lora_as)
    return nk.project_adapter(stacked, operands.basis).to(operands.x.dtype)


def linear_op(operands: Operands) -> Provider:
    """One ``nsru_linear`` each, as ``NSRULinear`` calls it after the first micro-batch of a step.
    The module itself would project again inside a CUDA graph, which must not go stale."""
    weights, s = [w.clone() for w in operands.weights], operands.scaling
    lora_as, lora_bs = map(providers.copies, (operands.lora_as, operands.lora_bs))
    folds = stack_projected(operands).split(operands.rank)
    rows = list(zip(weights, lora_as, lora_bs, folds, strict=True))

    def forward(x: Tensor) -> list[Tensor]:
        return [
            projected_linear(x, w, a, b, operands.basis, None, fold, s, 0.0, "auto")
            for w, a, b, fold in rows
        ]

    return Provider(forward, lora_as, lora_bs)


def group_op(operands: Operands) -> Provider:
    """All in one ``nsru_linear_group``, likewise."""
    weights, count = [w.clone() for w in operands.weights], len(operands.weights)
    lora_as, lora_bs = map(providers.copies, (operands.lora_as, operands.lora_bs))
    fold, scalings, biases = stack_projected(operands), [operands.scaling] * count, [None] * count

    def forward(x: Tensor) -> Sequence[Tensor]:
        return projected_linear_group(
            x, weights, lora_as, lora_bs, operands.basis, biases, fold, scalings, "auto"
        )

    return Provider(forward, lora_as, lora_bs)


def backends(op: str, session: Session) -> dict[str, ModuleType]:
    """The modules of ``op``, a folder in nsru_kernels/ops, that can run here in this dtype."""
    found = {}
    for backend in BACKENDS:
        try:
            found[backend] = dispatch.implementation(op, backend, session.device)
        except nk.BackendUnavailable as error:
            print(f"no {backend} plans: {error}", flush=True)
    if "cpu" in found and session.dtype not in cpu_extension.KERNEL_DTYPES:
        del found["cpu"]
        print(f"no cpu plans: its kernels do not take {session.dtype}", flush=True)
    return found


class PlannedLinear(torch.autograd.Function):
    """One backend's functions for a linear, by one plan, without the op around them."""

    @staticmethod
    def forward(ctx, x, weight, a_RK, b_NR, scaling, module, options):
        y, s_MR = module.forward(x, weight, a_RK, b_NR, None, scaling, 0.0, None, **options)
        ctx.save_for_backward(x, weight, a_RK, b_NR, s_MR)
        ctx.scaling, ctx.module = scaling, module
        return y

    @staticmethod
    def backward(ctx, dy):
        needs = [True, False, False, True, True]
        args = (*ctx.saved_tensors, ctx.scaling, 0.0, None, needs)
        dx, _, _, da, db = ctx.module.backward(dy, *args)
        return dx, None, da, db, None, None, None


class PlannedGroup(torch.autograd.Function):
    """One backend's functions for a group, without the op around them."""

    @staticmethod
    def forward(ctx, x, a_RK, module, scalings, *tensors):
        count = len(scalings)
        weights, bs_NR = list(tensors[:count]), list(tensors[count:])
        ys, s_MR = module.forward(x, weights, a_RK, bs_NR, [None] * count, scalings)
        ctx.save_for_backward(x, a_RK, s_MR, *tensors)
        ctx.module, ctx.scalings = module, scalings
        return tuple(ys)

    @staticmethod
    def backward(ctx, *dys):
        x, a_RK, s_MR, *tensors = ctx.saved_tensors
        count = len(dys)
        weights, bs_NR = tensors[:count], tensors[count:]
        needs = [True, True] + [False] * (2 * count) + [True] * count
        args = (x, weights, a_RK, bs_NR, s_MR, ctx.scalings, needs)
        dx, da, *others = ctx.module.backward(list(dys), *args)
        return dx, da, None, None, *[None] * count, *others[2 * count :]


def planned(op: str, operands: Operands, session: Session) -> dict[str, Provider]:
    """Every plan of every backend of "linear" or "linear_group" that can run here. Adapters are
    projected beforehand and their gradient is not, as PEFT's is not."""
    found = {}
    for backend, module in backends(op, session).items():
        plans = [
            plan
            for plan in getattr(module, "PLANS", ())
            if module.serves(plan, operands.x, operands.weights[0], operands.lora_as[0])
        ]
        for plan in plans if hasattr(module, "PLANS") else [None]:
            name = f"{PREFIX}{backend}" if plan is None else f"{PREFIX}{backend} {plan}"
            found[name] = plan_provider(
                op, operands, module, {} if plan is None else {"plan": plan}
            )
    return found


def plan_provider(
    op: str, operands: Operands, module: ModuleType, options: dict[str, str]
) -> Provider:
    a_RK = nn.Parameter(stack_projected(operands))
    bs_NR = providers.copies(operands.lora_bs, operands.x.dtype)
    weights, s = [w.clone() for w in operands.weights], operands.scaling

    def forward(x: Tensor) -> Sequence[Tensor]:
        if op == "linear":
            return [PlannedLinear.apply(x, weights[0], a_RK, bs_NR[0], s, module, options)]
        return PlannedGroup.apply(x, a_RK, module, [s] * len(weights), *weights, *bs_NR)

    return Provider(forward, [a_RK], bs_NR, projects=False)


class TritonProducts:
    """The products of ``narrow.py`` by our Triton kernels."""

    def __init__(self) -> None:
        from nsru_kernels.ops.linear import triton_products

        self.products: Any = triton_products

    def rows(self, x_MC: Tensor, v_RC: Tensor) -> Tensor:
        return self.products.rows_product(x_MC, v_RC.T)

    def both(self, x_MC: Tensor, p_MR: Tensor, v_CR: Tensor) -> tuple[Tensor, Tensor]:
        if not one_read_pays(p_MR.shape[1]):
            d = self.products.columns_product(x_MC, p_MR, 1.0, rank_first=False)
            return self.rows(x_MC, v_CR.T.contiguous()), d
        rows = torch.empty_like(p_MR)
        d = self.products.columns_product(
            x_MC, p_MR, 1.0, rank_first=False, v_CR=v_CR, rows_out=rows
        )
        return rows, d

    def columns(self, x_MC: Tensor, p_MR: Tensor) -> Tensor:
        return self.products.columns_product(x_MC, p_MR, 1.0, rank_first=True)


class CudaProducts(TritonProducts):
    """The same by our CUDA kernels."""

    def __init__(self) -> None:
        from nsru_kernels.ops.linear import cuda_products

        self.products = cuda_products

    def rows(self, x_MC: Tensor, v_RC: Tensor) -> Tensor:
        return self.products.rows_product(x_MC, v_RC)


def narrow_products(device: torch.device) -> dict[str, TritonProducts]:
    """Those that can run here; the others are named."""
    found: dict[str, TritonProducts] = {}
    for name, reason, make in (
        ("triton", launch.unavailable(device), TritonProducts),
        ("cuda", extension.unavailable("linear", device), CudaProducts),
    ):
        if reason is None:
            found[name] = make()
        else:
            print(f"no {name} products: {reason}", flush=True)
    return found


def sketch_update(
    backend: str, plan: str, device: torch.device
) -> Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]:
    """(x, Ω, Y, H) → the energy of x, added to Y and H by one backend and plan.

    Raises:
        BackendUnavailable: the backend cannot run here.
    """
    module = dispatch.implementation("sketch", backend, device)
    add = functools.partial(module.update_sketch, **({"plan": plan} if plan else {}))

    def update(x_MK: Tensor, omega_KL: Tensor, y_KL: Tensor, h_LL: Tensor) -> Tensor:
        return add(x_MK, omega_KL, y_KL, h_LL, None, False, energy_limit(y_KL.dtype))

    return update
