"""The projected linear against everything a user could run instead; see ``bench.py``.

Every provider's y, dX, dA and dB are compared with float64 before anything is timed. The frozen
linear computes y and dX only. Plans of a backend are timed one by one with the adapter folded;
"nsru" is the public op with the fold of this optimizer step at hand, as the module calls it.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping
from functools import partial
from types import ModuleType
from typing import Any

import torch
from nsru_kernels.config import BACKENDS
from torch import Tensor, nn

import nsru_kernels as nk
from nsru_bench.cases import Shape, element_size, linear_shapes
from nsru_bench.linear_cpu import (
    Case,
    Provider,
    Tensors,
    check,
    frozen_linear,
    make_eager,
    make_nsru,
    make_peft,
    make_tensors,
)
from nsru_bench.session import Session
from nsru_bench.timing import Call
from nsru_bench.winners import PREFIX
from nsru_kernels import dispatch
from nsru_kernels.dispatch import cpu_extension
from nsru_kernels.ops.linear import projected_linear

PASSES = ("forward", "backward", "forward+backward")


class PlannedLinear(torch.autograd.Function):
    """One backend's functions, one plan, without the module around them."""

    @staticmethod
    def forward(ctx, x, weight, a_RK, b_NR, scaling, module, plan):
        options = {} if plan is None else {"plan": plan}
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


def make_planned(case: Case, t: Tensors, module: ModuleType, plan: str | None) -> Provider:
    """The adapter is folded beforehand and its gradient not projected, as PEFT's is not."""
    lora_a = nn.Parameter(nk.project_adapter(t.lora_a, t.basis).to(case.dtype))
    lora_b = nn.Parameter(t.lora_b.to(case.dtype))
    weight = t.weight.clone()

    def forward(x: Tensor) -> Tensor:
        return PlannedLinear.apply(x, weight, lora_a, lora_b, case.scaling, module, plan)

    return Provider(forward, lora_a, lora_b, projects=False)


def make_op(case: Case, t: Tensors) -> Provider:
    """What ``NSRULinear`` does after the first micro-batch of a step. The module itself would fold
    again inside a CUDA graph, which must not go stale."""
    lora_a, lora_b = nn.Parameter(t.lora_a.clone()), nn.Parameter(t.lora_b.clone())
    folded, weight = nk.project_adapter(t.lora_a, t.basis).to(case.dtype), t.weight.clone()

    def forward(x: Tensor) -> Tensor:
        return projected_linear(
            x, weight, lora_a, lora_b, t.basis, None, folded, case.scaling, 0.0, "auto"
        )

    return Provider(forward, lora_a, lora_b)


def make_unsloth(case: Case, t: Tensors) -> Provider:
    """unsloth's fused function for one linear (no bias, no dropout), where it can be imported."""
    from unsloth.kernels.fast_lora import LoRA_W

    lora_a = nn.Parameter(nk.project_adapter(t.lora_a, t.basis).to(case.dtype))
    lora_b, weight = nn.Parameter(t.lora_b.to(case.dtype)), t.weight.clone()

    def forward(x: Tensor) -> Tensor:
        return LoRA_W.apply(x[None], weight, None, lora_a, lora_b, case.scaling)[0]

    return Provider(forward, lora_a, lora_b, projects=False)


def compiled(provider: Provider) -> Provider:
    return Provider(
        torch.compile(provider.forward), provider.lora_a, provider.lora_b, projects=False
    )


def autocast(provider: Provider, case: Case) -> Provider:
    def forward(x: Tensor) -> Tensor:
        with torch.autocast(torch.device(case.device).type, case.dtype):
            return provider.forward(x)

    return Provider(forward, provider.lora_a, provider.lora_b, projects=False)


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


def plans(module: ModuleType, t: Tensors) -> list[str | None]:
    """The plans of ``module`` that can serve these operands; [None] where it has but one way."""
    known = getattr(module, "PLANS", None)
    if known is None:
        return [None]
    return [plan for plan in known if module.serves(plan, t.x, t.weight, t.lora_a)]


def make_providers(case: Case, t: Tensors, session: Session) -> dict[str, Provider]:
    """Name → provider; what is not installed is printed."""
    peft_default = make_peft(case, t, fp32_adapters=True)
    providers = {
        "frozen": Provider(frozen_linear(t), None, None),
        "nsru": make_op(case, t),
        "nsru, fold every call": make_nsru(case, t, cached=False),
        "peft bf16": make_peft(case, t, fp32_adapters=False),
        "peft default, autocast": autocast(peft_default, case),
        "eager activation": make_eager(case, t, materialised=False),
        "eager materialised": make_eager(case, t, materialised=True),
    }
    if session.compile:
        providers["peft bf16, compiled"] = compiled(make_peft(case, t, fp32_adapters=False))
    for backend, module in backends("linear", session).items():
        for plan in plans(module, t):
            name = f"plan {backend}" if plan is None else f"plan {backend} {plan}"
            providers[name] = make_planned(case, t, module, plan)
    # Liger-Kernel has no LoRA linear; its loss is in loss.py.
    if importlib.util.find_spec("unsloth") is None:
        print("unsloth is not installed: its way is not timed", flush=True)
    else:
        try:
            providers["unsloth"] = make_unsloth(case, t)
        except Exception as error:
            session.fail("unsloth does not import", error)
    return providers


def calls(x: Tensor, dys: list[Tensor], provider: Any, which: str, copies: int) -> Call:
    """The pass on ``copies`` inputs of equal size, which do not fit into the caches together.

    ``provider`` has ``forward``, with as many outputs as there are ``dys``, ``adapters`` and
    ``prepare``.
    """
    return [
        _pass(provider, x.clone().requires_grad_(), [dy.clone() for dy in dys], which)
        for _ in range(copies)
    ]


def _pass(provider: Any, x: Tensor, dys: list[Tensor], which: str) -> Callable[[], object]:
    leaves = [x, *provider.adapters]
    if which == "forward":
        return lambda: provider.forward(x)
    if which == "backward":
        y = provider.forward(x)
        return lambda: torch.autograd.grad(y, leaves, dys, retain_graph=True)

    def both() -> object:
        provider.prepare()
        return torch.autograd.grad(provider.forward(x), leaves, dys)

    return both


def work(shape: Shape, which: str, size: int) -> tuple[float, float]:
    """(FLOP, bytes) that no way of computing it can avoid: each operand moves once."""
    m, k, n, r, _ = shape
    gemm, narrow = 2.0 * m * k * n, 2.0 * m * (k + n) * r
    forward = gemm + narrow, size * (m * k + k * n + m * n)
    backward = gemm + 2 * narrow, size * (2 * m * k + k * n + m * n)
    if which == "forward":
        return forward
    if which == "backward":
        return backward
    return forward[0] + backward[0], forward[1] + backward[1]


def run(session: Session) -> None:
    for shape in linear_shapes(session):
        name = f"linear {shape}"
        if session.fits(name, 2 if session.tiny else 15):
            run_shape(session, shape)


def run_shape(session: Session, shape: Shape) -> None:
    case = Case(*shape, dtype=session.dtype, device=str(session.device))
    t = make_tensors(case)
    providers = make_providers(case, t, session)
    drop_wrong(session, f"linear {shape}", providers, partial(check, case, t))
    size = element_size(session.dtype)
    time_passes(
        session, "linear", shape.columns, t.x, [t.dy], providers,
        lambda which: work(shape, which, size),
    )  # fmt: skip


def drop_wrong(
    session: Session, what: str, providers: dict[str, Any], check: Callable[[str, Any], None]
) -> None:
    """Remove the providers that do not pass ``check(name, provider)``, and report them."""
    for name, provider in list(providers.items()):
        try:
            check(name, provider)
        except Exception as error:  # what is wrong is not timed, the others are
            session.fail(f"{what}, {name}", error)
            del providers[name]


def time_passes(
    session: Session,
    op: str,
    columns: Mapping[str, Any],
    x: Tensor,
    dys: list[Tensor],
    providers: Mapping[str, Any],
    work: Callable[[str], tuple[float, float]],
) -> None:
    """Time every pass of every provider; ratios are to "frozen". ``work``: pass → FLOP, bytes."""
    bytes_in = x.nbytes + sum(dy.nbytes for dy in dys)
    copies = 2 if session.device.type == "cpu" else max(2, min(16, 2**28 // bytes_in))
    for which in PASSES:
        timed = {name: calls(x, dys, p, which, copies) for name, p in providers.items()}
        flop, moved = work(which)
        session.record(
            op, session.time(timed), {"pass": which, **columns},
            flop=flop, moved=moved, base="frozen", plans={name: _plan(name) for name in timed},
        )  # fmt: skip


def _plan(name: str) -> str:
    """ "plan triton kext" → "triton kext"."""
    return name.removeprefix(PREFIX) if name.startswith(PREFIX) else ""
