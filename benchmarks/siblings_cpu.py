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
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

import nsru_kernels as nk
from nsru_bench import measure
from nsru_bench.linear_cpu import Case, Tensors, frozen_linear, make_peft, make_tensors, tolerance

NAMES = ("q_proj", "k_proj", "v_proj")
WIDTHS = (2048, 512, 512)
BAR = 1.08  # group over three frozen linears


class Block(nn.Module):
    """Three linears that are called with the same tensor."""

    def __init__(self, linears: list[nn.Module]):
        super().__init__()
        for name, linear in zip(NAMES, linears, strict=True):
            self.add_module(name, linear)

    def forward(self, x: Tensor) -> list[Tensor]:
        return [getattr(self, name)(x) for name in NAMES]


def make_siblings() -> tuple[list[Case], list[Tensors]]:
    """The tensors of three linears of different widths; x and the basis are those of the first."""
    cases = [replace(Case(), N=n) for n in WIDTHS]
    made = [make_tensors(case) for case in cases]
    # Every case draws from the same seed; A must differ between siblings.
    return cases, [
        replace(t, x=made[0].x, basis=made[0].basis, lora_a=t.lora_a.roll(i, 0))
        for i, t in enumerate(made)
    ]


def make_block(cases: list[Case], tensors: list[Tensors], *, together: bool) -> Block:
    block = Block([frozen_linear(t) for t in tensors])
    basis = tensors[0].basis
    case = cases[0]
    report = nk.swap_linears(
        block, list(NAMES), rank=case.R, alpha=case.scaling * case.R,
        subspaces=dict.fromkeys(NAMES, basis),
    )  # fmt: skip
    with torch.no_grad():
        for name, t in zip(NAMES, tensors, strict=True):
            layer = getattr(block, name)
            layer.lora_A.copy_(t.lora_a)
            layer.lora_B.copy_(t.lora_b)
            if not together:
                layer._siblings = None
        for _ in range(2):
            block(tensors[0].x.clone())
    served = "q_proj+k_proj+v_proj × 1 served together" in str(report)
    assert served == together, str(report)
    return block


def adapters(block: Block) -> list[nn.Parameter]:
    return [p for p in block.parameters() if p.requires_grad]


def make_peft_block(cases: list[Case], tensors: list[Tensors]) -> Block:
    layers = []
    for case, t in zip(cases, tensors, strict=True):
        layer = make_peft(case, t, fp32_adapters=False).forward
        assert isinstance(layer, nn.Module)
        layers.append(layer)
    return Block(layers)


def check(cases: list[Case], tensors: list[Tensors], name: str, block: Block) -> None:
    """AssertionError unless every y, dA, dB and the one dX agree with float64."""
    leaf = tensors[0].x.clone().requires_grad_()
    block.zero_grad()
    ys = block(leaf)
    torch.autograd.backward(ys, [t.dy for t in tensors])
    found = {"dX": leaf.grad}
    exact = {"dX": torch.zeros(leaf.shape, dtype=torch.float64)}
    for child, case, t, y in zip(NAMES, cases, tensors, ys, strict=True):
        x, dy, w, b, basis = (v.double() for v in (t.x, t.dy, t.weight, t.lora_b, t.basis))
        s = 0.0 if name == "frozen" else case.scaling
        folded = t.lora_a.double() - (t.lora_a.double() @ basis) @ basis.T
        ds = s * dy @ b
        found[f"{child} y"] = y
        exact[f"{child} y"] = x @ w.T + s * (x @ folded.T) @ b.T
        exact["dX"] += dy @ w + ds @ folded
        if name == "frozen":
            continue
        params = dict(getattr(block, child).named_parameters())
        a_grad, b_grad = (
            next(p.grad for key, p in params.items() if letter in key)
            for letter in ("lora_A", "lora_B")
        )
        d_a = ds.T @ x
        if not name.startswith("peft"):
            d_a -= (d_a @ basis) @ basis.T
        found |= {f"{child} dA": a_grad, f"{child} dB": b_grad}
        exact |= {f"{child} dA": d_a, f"{child} dB": s * dy.T @ (x @ folded.T)}
    for label, reference in exact.items():
        value = found[label]
        assert value is not None, f"{name}: no {label}"
        error = measure.relative_error(value, reference)
        bound = tolerance(case.dtype)
        assert error <= bound, f"{name}: {label} is off by {error:.1e} > {bound:.1e}"


def timed_call(
    tensors: list[Tensors], block: Block, *, cached: bool
) -> tuple[Callable[[], None], Callable[[], None]]:
    leaf = tensors[0].x.clone().requires_grad_()
    dys = [t.dy for t in tensors]
    trained = adapters(block)

    @torch.no_grad()
    def prepare() -> None:
        leaf.grad = None
        for parameter in trained:
            parameter.grad = None
            if not cached:
                parameter.mul_(1.0)

    def run() -> None:
        torch.autograd.backward(block(leaf), dys)

    return prepare, run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=200, help="timed iterations of each provider")
    parser.add_argument("--out", type=Path, default=measure.RESULTS / "siblings_cpu.csv")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)

    cases, tensors = make_siblings()
    frozen = Block([frozen_linear(t) for t in tensors])
    group = make_block(cases, tensors, together=True)
    single = make_block(cases, tensors, together=False)
    providers = {
        "frozen": (frozen, True),
        "group": (group, False),
        "group, fold cached": (group, True),
        "three single": (single, False),
        "three single, fold cached": (single, True),
        "peft bf16": (make_peft_block(cases, tensors), True),
    }
    for name, (block, _) in providers.items():
        check(cases, tensors, name, block)
    seconds = measure.interleave(
        {n: timed_call(tensors, block, cached=cached) for n, (block, cached) in providers.items()},
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
