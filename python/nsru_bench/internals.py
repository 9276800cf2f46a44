"""Parts of nsru_kernels that benchmarks use beyond its public functions, in one place.

Plans one by one, which the public ops choose themselves, and the ops with the adapter projected
beforehand, as modules call them.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

import nsru_kernels as nk
from nsru_bench.cases import Operands, Provider, copies
from nsru_kernels.dispatch import extension, launch
from nsru_kernels.dispatch.choice import unavailable, wrong_dtype
from nsru_kernels.dispatch.plans import CPU_WITH_AMX, FOLDER, slug
from nsru_kernels.ops.linear import projected_linears
from nsru_kernels.ops.linear.backends import LINEAR
from nsru_kernels.ops.linear.cuda_products import CONFIGS, columns_product
from nsru_kernels.ops.products import one_read_pays
from nsru_kernels.ops.project.autograd import project_groups
from nsru_kernels.ops.sketch import update_sketch
from nsru_kernels.ops.sketch.reference import multiplies_short

__all__ = [
    "CPU_WITH_AMX",
    "FOLDER",
    "one_read_pays",
    "project_groups",
    "slug",
    "update_sketch",
]
TIMED_SWIZZLES = (1, 4, 8)


def stack_projected(operands: Operands) -> Tensor:
    stacked = torch.cat(operands.lora_as)
    return nk.project_adapter(stacked, operands.basis).to(operands.x.dtype)


def projected_ops(operands: Operands, *, together: bool) -> Provider:
    """One ``nsru_linear_group`` of all, or one ``nsru_linear`` each, as the modules call it after
    the first micro-batch of a step. The module itself would project again inside a CUDA graph,
    which must not go stale."""
    weights, count = [w.clone() for w in operands.weights], len(operands.weights)
    lora_as, lora_bs = copies(operands.lora_as), copies(operands.lora_bs)
    size = count if together else 1
    parts = [slice(start, start + size) for start in range(0, count, size)]
    folds = stack_projected(operands).split(size * operands.rank)
    biases, scalings = [None] * size, [operands.scaling] * size

    def forward(x: Tensor) -> list[Tensor]:
        return [
            y
            for part, fold in zip(parts, folds, strict=True)
            for y in projected_linears(
                x, weights[part], lora_as[part], lora_bs[part], operands.basis, biases, fold,
                scalings, 0.0, "auto",
            )
        ]  # fmt: skip

    return Provider(forward, lora_as, lora_bs)


class OnePlan(torch.autograd.Function):
    """Linears that share x by one plan of a backend in both passes, without the op around them."""

    @staticmethod
    def forward(ctx, x, a_RK, weights, scaling, module, plan, *bs_NR):
        frozen = [None] * len(weights), [scaling] * len(weights)
        ys, s_MR = module.forward(x, weights, a_RK, list(bs_NR), *frozen, 0.0, None, plan=plan)
        ctx.save_for_backward(x, a_RK, s_MR, *bs_NR)
        ctx.settings = weights, scaling, module, plan
        return tuple(ys)

    @staticmethod
    def backward(ctx, *dys):
        x, a_RK, s_MR, *bs_NR = ctx.saved_tensors
        weights, scaling, module, plan = ctx.settings
        count = len(weights)
        needs = [True, True, *[False] * (2 * count), *[True] * count]
        args = (x, weights, a_RK, bs_NR, s_MR, [scaling] * count, 0.0, None, needs)
        dx, da, *others = module.backward(list(dys), *args, plan=plan)
        return dx, da, None, None, None, None, *others[2 * count :]


def every_plan(operands: Operands) -> dict[str, Provider]:
    """Backend and plan → the linears by it in both passes, for all that can serve here. The
    adapters are projected beforehand and their gradients are not, as PEFT's are not."""
    x, weights, bs = operands.x, operands.weights, operands.lora_bs
    modules = {"eager": LINEAR.load("eager")}
    plans = ["eager expand_first"]
    for backend in ("triton", "cuda"):
        reason = unavailable(LINEAR, backend, x.device) or wrong_dtype(LINEAR, backend, (x.dtype,))
        if reason is not None:
            print(f"no plan {backend}: {reason}", flush=True)
            continue
        module = modules[backend] = LINEAR.load(backend)
        if backend == "cuda":
            names = itertools.product(CONFIGS, TIMED_SWIZZLES)
            plans += [f"cuda kext {config}/{swizzle}" for config, swizzle in names]
            plans.append("cuda expand_first")
        else:
            fitting = [plan for plan in module.PLANS if module.serves(plan, x, weights, bs)]
            if "kext_tma" in fitting:  # by pointers it is half as fast
                fitting.remove("kext")
            plans += [f"triton {plan}" for plan in fitting]
    return {plan: one_plan(operands, modules[plan.split()[0]], plan) for plan in plans}


def one_plan(operands: Operands, module: Any, plan: str) -> Provider:
    """``plan`` begins with the backend's name."""
    a_RK, weights = nn.Parameter(stack_projected(operands)), [w.clone() for w in operands.weights]
    bs_NR = copies(operands.lora_bs, operands.x.dtype)
    own = plan.partition(" ")[2] or None

    def forward(x: Tensor) -> Sequence[Tensor]:
        return OnePlan.apply(x, a_RK, weights, operands.scaling, module, own, *bs_NR)

    return Provider(forward, [a_RK], bs_NR, projects=False)


class TritonProducts:
    """The products of ``narrow.py`` by our Triton kernels."""

    def __init__(self) -> None:
        from nsru_kernels.ops.linear import triton_products

        self.products: Any = triton_products

    def rows(self, x_MC: Tensor, v_RC: Tensor) -> Tensor:
        return self.products.shrink(x_MC, v_RC.T)

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


class CudaProducts:
    """The one that our CUDA kernels have, up to the rank where it pays."""

    def both(self, x_MC: Tensor, p_MR: Tensor, v_CR: Tensor) -> tuple[Tensor, Tensor]:
        rows = torch.empty_like(p_MR)
        return rows, columns_product(x_MC, p_MR, 1.0, v_CR=v_CR, rows_out=rows)


def narrow_products(device: torch.device) -> dict[str, Any]:
    """Those that can run here; the others are named."""
    found: dict[str, Any] = {}
    for name, reason, make in (
        ("triton", launch.unavailable(device), TritonProducts),
        ("cuda", extension.unavailable(device), CudaProducts),
    ):
        if reason is None:
            found[name] = make()
        else:
            print(f"no {name} products: {reason}", flush=True)
    return found


def by_short_products(device: torch.device) -> bool:
    """True where the library's update of 16-bit activations leaves the host alone."""
    x_MK = torch.empty(0, 1, device=device, dtype=torch.bfloat16)
    return multiplies_short(x_MK, x_MK.float())
