"""What benchmarks use of nsru_kernels beyond its public functions, in one place.

Plans one by one, which the public ops choose themselves, and the ops with the adapter projected
beforehand, as modules call them.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

import nsru_kernels as nk
from nsru_bench.cases import Operands, Provider, copies
from nsru_kernels.dispatch import choose, extension, launch
from nsru_kernels.dispatch.choice import unavailable, wrong_dtype
from nsru_kernels.dispatch.plans import CPU_WITH_AMX, FOLDER, slug
from nsru_kernels.ops.linear import projected_linears
from nsru_kernels.ops.linear.backends import LINEAR
from nsru_kernels.ops.linear.cuda_products import CONFIGS, SWIZZLES
from nsru_kernels.ops.products import one_read_pays
from nsru_kernels.ops.sketch import energy_limit
from nsru_kernels.ops.sketch.backends import SKETCH
from nsru_kernels.ops.sketch.reference import multiplies_short

__all__ = ["CPU_WITH_AMX", "FOLDER", "slug"]


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
    """A linear by one plan of a backend in both passes, without the op around them."""

    @staticmethod
    def forward(ctx, x, weight, a_RK, b_NR, scaling, module, plan):
        args = (x, [weight], a_RK, [b_NR], [None], [scaling], 0.0, None)
        (y,), s_MR = module.forward(*args, plan=plan)
        ctx.save_for_backward(x, weight, a_RK, b_NR, s_MR)
        ctx.scaling, ctx.module, ctx.plan = scaling, module, plan
        return y

    @staticmethod
    def backward(ctx, dy):
        x, weight, a_RK, b_NR, s_MR = ctx.saved_tensors
        needs = [True, True, False, False, True]
        args = (x, [weight], a_RK, [b_NR], s_MR, [ctx.scaling], 0.0, None, needs)
        dx, da, _, _, db = ctx.module.backward([dy], *args, plan=ctx.plan)
        return dx, None, da, db, None, None, None


def every_plan(operands: Operands) -> dict[str, Provider]:
    """Backend and plan → the one linear by it in both passes, for all that can serve here. The
    adapter is projected beforehand and its gradient is not, as PEFT's is not."""
    x, weights, bs = operands.x, operands.weights[:1], operands.lora_bs[:1]
    modules = {"eager": LINEAR.load("eager")}
    plans = ["eager expand_first"]
    for backend in ("triton", "cuda"):
        reason = unavailable(LINEAR, backend, x.device) or wrong_dtype(LINEAR, backend, (x.dtype,))
        if reason is not None:
            print(f"no plan {backend}: {reason}", flush=True)
            continue
        module = modules[backend] = LINEAR.load(backend)
        if backend == "cuda":
            names = itertools.product(CONFIGS, SWIZZLES)
            plans += [f"cuda kext {config}/{swizzle}" for config, swizzle in names]
            plans.append("cuda expand_first")
            continue
        for plan in module.PLANS:
            if module.serves(plan, x, weights, bs):
                configs = triton_configurations(x) if plan.startswith("kext") else [""]
                plans += [f"triton {plan} {config}".strip() for config in configs]
    return {plan: one_plan(operands, modules[plan.split()[0]], plan) for plan in plans}


def triton_configurations(x: Tensor) -> list[str]:
    """The names of the GEMM's configurations on this device; one nameless where it has one only."""
    from nsru_kernels.ops.linear import triton_products

    if x.device.type != "cuda" or x.dtype == torch.float32:
        return [""]
    configs = triton_products.CONFIGS["kext"][launch.architecture(x.device)]
    return [triton_products.config_name(config) for config in configs]


def one_plan(operands: Operands, module: Any, plan: str) -> Provider:
    """``plan`` begins with the backend's name."""
    a_RK, weight = nn.Parameter(stack_projected(operands)), operands.weights[0].clone()
    (b_NR,) = copies(operands.lora_bs, operands.x.dtype)
    own = plan.partition(" ")[2] or None

    def forward(x: Tensor) -> Sequence[Tensor]:
        return [OnePlan.apply(x, weight, a_RK, b_NR, operands.scaling, module, own)]

    return Provider(forward, [a_RK], [b_NR], projects=False)


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


def by_short_products(device: torch.device) -> bool:
    """Whether the library's update of 16-bit activations leaves the host alone."""
    x_MK = torch.empty(0, 1, device=device, dtype=torch.bfloat16)
    return multiplies_short(x_MK, x_MK.float())


def sketch_update(
    backend: str, plan: str, device: torch.device
) -> Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]:
    """(x, Ω, Y, H) → the energy of x, added to Y and H by one backend and plan.

    Raises:
        BackendUnavailable: the backend cannot run here.
    """
    requested = (backend, device, "sketch", "update_sketch", (), (), torch.get_num_threads())
    module = choose(SKETCH, *requested).module
    add = functools.partial(module.update_sketch, **({"plan": plan} if plan else {}))

    def update(x_MK: Tensor, omega_KL: Tensor, y_KL: Tensor, h_LL: Tensor) -> Tensor:
        return add(x_MK, omega_KL, y_KL, h_LL, None, False, energy_limit(y_KL.dtype))

    return update
