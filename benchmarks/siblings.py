"""Linears that read one x (q/k/v, gate/up) against everything a user could run; see ``bench.py``.

Every provider's y_i, dX, dA_i and dB_i are compared with float64 before anything is timed. "frozen"
computes y_i and dX only, and autograd sums its dX. "nsru" is the public op with the fold of this
optimizer step at hand, "single nsru" one such ``nsru_linear`` each; a backend's plan is timed with
the adapters folded.
"""

from __future__ import annotations

from functools import partial
from types import ModuleType

import torch
from nsru_kernels.ops.linear_group import projected_linear_group
from torch import Tensor, nn

import nsru_kernels as nk
from nsru_bench.cases import Shape, SiblingShape, element_size, sibling_shapes
from nsru_bench.linear import backends, drop_wrong, make_op, time_passes
from nsru_bench.linear import work as linear_work
from nsru_bench.linear_cpu import Case, Tensors
from nsru_bench.session import Session
from nsru_bench.siblings_cpu import (
    Provider,
    check,
    make_frozen,
    make_peft_siblings,
    make_siblings,
    separate,
)
from nsru_bench.winners import PREFIX


class PlannedGroup(torch.autograd.Function):
    """One backend's functions, without the module around them."""

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


def fold(tensors: list[Tensors], dtype: torch.dtype) -> Tensor:
    """The folded adapters on top of each other."""
    stacked = torch.cat([t.lora_a for t in tensors])
    return nk.project_adapter(stacked, tensors[0].basis).to(dtype)


def make_planned(cases: list[Case], tensors: list[Tensors], module: ModuleType) -> Provider:
    """The adapters are folded beforehand and their gradient not projected, as PEFT's is not."""
    lora_a = nn.Parameter(fold(tensors, cases[0].dtype))
    lora_bs = [
        nn.Parameter(t.lora_b.to(case.dtype)) for case, t in zip(cases, tensors, strict=True)
    ]
    weights = [t.weight.clone() for t in tensors]
    scalings = [case.scaling for case in cases]

    def forward(x: Tensor) -> list[Tensor]:
        return PlannedGroup.apply(x, lora_a, module, scalings, *weights, *lora_bs)

    return Provider(forward, [lora_a], lora_bs, projects=False)


def make_group_op(cases: list[Case], tensors: list[Tensors]) -> Provider:
    """What the modules do after the first micro-batch of a step; see ``linear.make_op``."""
    lora_as = [nn.Parameter(t.lora_a.clone()) for t in tensors]
    lora_bs = [nn.Parameter(t.lora_b.clone()) for t in tensors]
    weights, folded = [t.weight.clone() for t in tensors], fold(tensors, cases[0].dtype)
    basis, biases = tensors[0].basis, [None] * len(cases)
    scalings = [case.scaling for case in cases]

    def forward(x: Tensor) -> list[Tensor]:
        return projected_linear_group(
            x, weights, lora_as, lora_bs, basis, biases, folded, scalings, "auto"
        )

    return Provider(forward, lora_as, lora_bs)


def make_providers(
    cases: list[Case], tensors: list[Tensors], session: Session
) -> dict[str, Provider]:
    singles = [make_op(case, t) for case, t in zip(cases, tensors, strict=True)]
    providers = {
        "frozen": make_frozen(tensors),
        "nsru": make_group_op(cases, tensors),
        "single nsru": separate(singles),
        "peft bf16": make_peft_siblings(cases, tensors),
    }
    for backend, module in backends("linear_group", session).items():
        providers[f"{PREFIX}{backend}"] = make_planned(cases, tensors, module)
    return providers


def work(shape: SiblingShape, which: str, size: int) -> tuple[float, float]:
    """(FLOP, bytes) that no way of computing it can avoid: x and dX move once for all."""
    m, k, widths, r, q = shape
    flop = sum(linear_work(Shape(m, k, n, r, q), which, size)[0] for n in widths)
    return flop, linear_work(Shape(m, k, sum(widths), r, q), which, size)[1]


def run(session: Session) -> None:
    for shape in sibling_shapes(session):
        if session.fits(f"siblings {shape}", 2 if session.tiny else 30):
            run_shape(session, shape)


def run_shape(session: Session, shape: SiblingShape) -> None:
    m, k, widths, r, q = shape
    case = Case(m, k, widths[0], r, q, dtype=session.dtype, device=str(session.device))
    cases, tensors = make_siblings(case, widths)
    providers = make_providers(cases, tensors, session)
    drop_wrong(session, f"siblings {shape}", providers, partial(check, cases, tensors))
    size = element_size(session.dtype)
    time_passes(
        session, "siblings", shape.columns, tensors[0].x, [t.dy for t in tensors], providers,
        lambda which: work(shape, which, size),
    )  # fmt: skip
