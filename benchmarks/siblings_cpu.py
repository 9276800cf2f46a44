"""Forward and backward of q, k and v, which read one x, on a CPU: a ratio to three frozen linears.

    python benchmarks/siblings_cpu.py

Frozen linears compute y and dX only, and autograd sums their dX. "group" is what ``swap_linears``
makes of the model, "three single" the same modules unaware of each other; both fold in every
iteration, as in a step without gradient accumulation; "fold cached" is every further micro-batch of
that step. PEFT is given the folded adapters, for it knows no projection.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

import nsru_kernels as nk
from nsru_bench import linear_cpu, measure
from nsru_bench.linear_cpu import Case, Tensors, frozen_linear, make_peft, make_tensors, tolerance

NAMES = ("q_proj", "k_proj", "v_proj")
WIDTHS = (2048, 512, 512)
BAR = 1.08  # group over three frozen linears


@dataclass(frozen=True)
class Provider:
    """All y_i of one x; the adapters one by one in order, or stacked."""

    forward: Callable[[Tensor], list[Tensor]]
    lora_as: list[nn.Parameter]
    lora_bs: list[nn.Parameter]
    prepare: Callable[[], None] = lambda: None
    projects: bool = True  # dA has no component along the basis

    @property
    def adapters(self) -> list[nn.Parameter]:
        return [*self.lora_as, *self.lora_bs]


class Block(nn.Module):
    """Three linears that are called with the same tensor."""

    def __init__(self, linears: list[nn.Module]):
        super().__init__()
        for name, linear in zip(NAMES, linears, strict=True):
            self.add_module(name, linear)

    def forward(self, x: Tensor) -> list[Tensor]:
        return [getattr(self, name)(x) for name in NAMES]


def make_siblings(case: Case, widths: tuple[int, ...]) -> tuple[list[Case], list[Tensors]]:
    """The tensors of linears of different widths; x and the basis are those of the first."""
    cases = [replace(case, N=n) for n in widths]
    made = [make_tensors(case, seed) for seed, case in enumerate(cases)]
    return cases, [replace(t, x=made[0].x, basis=made[0].basis) for t in made]


def separate(parts: list[linear_cpu.Provider]) -> Provider:
    """One linear after the other; autograd sums their dX."""
    return Provider(
        lambda x: [part.forward(x) for part in parts],
        [part.lora_a for part in parts if part.lora_a is not None],
        [part.lora_b for part in parts if part.lora_b is not None],
        projects=parts[0].projects,
    )


def make_frozen(tensors: list[Tensors]) -> Provider:
    return separate([linear_cpu.Provider(frozen_linear(t), None, None) for t in tensors])


def make_peft_siblings(cases: list[Case], tensors: list[Tensors]) -> Provider:
    return separate(
        [make_peft(c, t, fp32_adapters=False) for c, t in zip(cases, tensors, strict=True)]
    )


def make_block(cases: list[Case], tensors: list[Tensors], *, together: bool) -> Provider:
    block = Block([frozen_linear(t) for t in tensors])
    basis = tensors[0].basis
    case = cases[0]
    report = nk.swap_linears(
        block, list(NAMES), rank=case.R, alpha=case.scaling * case.R,
        subspaces=dict.fromkeys(NAMES, basis),
    )  # fmt: skip
    layers = [getattr(block, name) for name in NAMES]
    with torch.no_grad():
        for layer, t in zip(layers, tensors, strict=True):
            layer.lora_A.copy_(t.lora_a)
            layer.lora_B.copy_(t.lora_b)
            if not together:
                layer._siblings = None
        for _ in range(2):
            block(tensors[0].x.clone())
    served = "q_proj+k_proj+v_proj × 1 served together" in str(report)
    assert served == together, str(report)
    return Provider(block, [layer.lora_A for layer in layers], [layer.lora_B for layer in layers])


def check(cases: list[Case], tensors: list[Tensors], name: str, provider: Provider) -> None:
    """AssertionError unless every y, dA, dB and the one dX agree with float64."""
    leaf = tensors[0].x.clone().requires_grad_()
    leaves = [leaf, *provider.adapters]
    for adapter in leaves:
        adapter.grad = None
    ys = provider.forward(leaf)
    torch.autograd.backward(ys, [t.dy for t in tensors])
    count = len(provider.lora_as)
    assert all(adapter.grad is not None for adapter in leaves), f"{name}: a gradient is missing"
    grads = [adapter.grad for adapter in leaves]
    found, exact = {}, {}
    dx = torch.zeros_like(leaf, dtype=torch.float64, requires_grad=False)
    if count:
        ranks, widths = [case.R for case in cases], [case.N for case in cases]
        das = torch.cat(grads[1 : 1 + count]).split(ranks)
        dbs = torch.cat(grads[1 + count :]).split(widths)
    for i, (case, t, y) in enumerate(zip(cases, tensors, ys, strict=True)):
        x, dy, w, b, basis = (v.double() for v in (t.x, t.dy, t.weight, t.lora_b, t.basis))
        s = case.scaling if count else 0.0
        folded = t.lora_a.double() - (t.lora_a.double() @ basis) @ basis.T
        ds = s * dy @ b
        found[f"y of {i}"] = y
        exact[f"y of {i}"] = x @ w.T + s * (x @ folded.T) @ b.T
        dx += dy @ w + ds @ folded
        if not count:
            continue
        d_a = ds.T @ x
        if provider.projects:
            d_a -= (d_a @ basis) @ basis.T
        found |= {f"dA of {i}": das[i], f"dB of {i}": dbs[i]}
        exact |= {f"dA of {i}": d_a, f"dB of {i}": s * dy.T @ (x @ folded.T)}
    bound = tolerance(cases[0].dtype)
    found["dX"], exact["dX"] = grads[0], dx
    for label, reference in exact.items():
        error = measure.relative_error(found[label], reference)
        assert error <= bound, f"{name}: {label} is off by {error:.1e} > {bound:.1e}"


def timed_call(
    tensors: list[Tensors], provider: Provider, *, cached: bool
) -> tuple[Callable[[], None], Callable[[], None]]:
    leaf = tensors[0].x.clone().requires_grad_()
    dys = [t.dy for t in tensors]

    @torch.no_grad()
    def prepare() -> None:
        leaf.grad = None
        for adapter in provider.adapters:
            adapter.grad = None
            if not cached:
                adapter.mul_(1.0)

    def run() -> None:
        torch.autograd.backward(provider.forward(leaf), dys)

    return prepare, run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=200, help="timed iterations of each provider")
    parser.add_argument("--out", type=Path, default=measure.RESULTS / "siblings_cpu.csv")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)

    cases, tensors = make_siblings(Case(), WIDTHS)
    group = make_block(cases, tensors, together=True)
    single = make_block(cases, tensors, together=False)
    providers = {
        "frozen": (make_frozen(tensors), True),
        "group": (group, False),
        "group, fold cached": (group, True),
        "three single": (single, False),
        "three single, fold cached": (single, True),
        "peft bf16": (make_peft_siblings(cases, tensors), True),
    }
    for name, (provider, _) in providers.items():
        check(cases, tensors, name, provider)
    seconds = measure.interleave(
        {n: timed_call(tensors, p, cached=cached) for n, (p, cached) in providers.items()},
        arguments.rounds,
    )

    case = cases[0]
    print(f"{case}, N {WIDTHS}, {arguments.threads} threads, {arguments.rounds} rounds")
    sizes = {"M": case.M, "K": case.K, "N": "+".join(map(str, WIDTHS)), "R": case.R, "Q": case.Q}
    dtype = str(case.dtype).removeprefix("torch.")
    rows = measure.report_ratios(seconds, lambda _: {}, dtype=dtype, **sizes)
    for variant in ("group", "group, fold cached"):
        measure.report_target(seconds, variant, "frozen", BAR)
    measure.write_rows(arguments.out, rows)


if __name__ == "__main__":
    main()
