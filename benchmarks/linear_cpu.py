"""Forward and backward of one adapted linear on a CPU, as a ratio to the frozen nn.Linear.

    python benchmarks/linear_cpu.py

All providers compute the same y, dX and dB: PEFT is given the folded adapter, for it knows no
projection. The frozen linear computes y and dX only. "nsru" folds in every iteration, as in a step
without gradient accumulation; "nsru, fold cached" is every further micro-batch of that step.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import peft
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import nsru_kernels as nk
from nsru_bench import measure


@dataclass(frozen=True)
class Case:
    M: int = 512
    K: int = 2048
    N: int = 2048
    R: int = 16
    Q: int = 256
    dtype: torch.dtype = torch.bfloat16
    scaling: float = 2.0
    device: str = "cpu"


@dataclass(frozen=True)
class Tensors:
    """x [M, K], dy [M, N], weight [N, K] in the case's dtype; the others in fp32."""

    x: Tensor
    dy: Tensor
    weight: Tensor
    lora_a: Tensor
    lora_b: Tensor
    basis: Tensor


@dataclass(frozen=True)
class Provider:
    forward: Callable[[Tensor], Tensor]
    lora_a: nn.Parameter | None
    lora_b: nn.Parameter | None
    prepare: Callable[[], None] = lambda: None
    projects: bool = True  # dA has no component along the basis

    @property
    def adapters(self) -> list[nn.Parameter]:
        return [p for p in (self.lora_a, self.lora_b) if p is not None]


# The acceptance bars of this repository: provider, base, largest ratio.
TARGETS = (
    ("nsru", "frozen", 1.12),
    ("nsru", "peft bf16", 1.03),
    ("nsru", "eager activation", 0.80),
)


def tolerance(dtype: torch.dtype) -> float:
    """S, y and dX are each rounded once or twice, to half of epsilon; float32 sums lose more."""
    return max(2 * torch.finfo(dtype).eps, 1e-5)


def make_tensors(case: Case, seed: int = 0) -> Tensors:
    generator = torch.Generator().manual_seed(seed)

    def normal(rows: int, columns: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(rows, columns, generator=generator) * scale).to(case.device)

    return Tensors(
        x=normal(case.M, case.K).to(case.dtype),
        dy=normal(case.M, case.N).to(case.dtype),
        weight=normal(case.N, case.K, case.K**-0.5).to(case.dtype),
        lora_a=normal(case.R, case.K, case.K**-0.5),
        lora_b=normal(case.N, case.R, case.R**-0.5),
        basis=torch.linalg.qr(normal(case.K, case.Q))[0].contiguous(),
    )


def frozen_linear(t: Tensors) -> nn.Linear:
    linear = nn.Linear(t.weight.shape[1], t.weight.shape[0], bias=False, device="meta")
    linear.weight = nn.Parameter(t.weight.clone(), requires_grad=False)
    return linear


def make_nsru(case: Case, t: Tensors, *, cached: bool) -> Provider:
    layer = nk.NSRULinear.from_linear(
        frozen_linear(t), case.R, alpha=case.scaling * case.R, basis=t.basis
    )
    with torch.no_grad():
        layer.lora_A.copy_(t.lora_a)
        layer.lora_B.copy_(t.lora_b)

    @torch.no_grad()
    def change_adapter() -> None:
        layer.lora_A.mul_(1.0)

    prepare = (lambda: None) if cached else change_adapter
    return Provider(layer, layer.lora_A, layer.lora_B, prepare)


def make_peft(case: Case, t: Tensors, *, fp32_adapters: bool) -> Provider:
    model = nn.ModuleDict({"layer": frozen_linear(t)})
    config = peft.LoraConfig(
        r=case.R,
        lora_alpha=round(case.scaling * case.R),
        target_modules=["layer"],
        lora_dropout=0.0,
    )
    wrapped = peft.get_peft_model(model, config, autocast_adapter_dtype=fp32_adapters)
    layer = wrapped.base_model.model["layer"]
    lora_a, lora_b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    assert lora_a.dtype == (torch.float32 if fp32_adapters else case.dtype)
    with torch.no_grad():
        lora_a.copy_(nk.project_adapter(t.lora_a, t.basis))
        lora_b.copy_(t.lora_b)
    return Provider(layer, lora_a, lora_b, projects=False)


def make_eager(case: Case, t: Tensors, *, materialised: bool) -> Provider:
    linear = frozen_linear(t)
    lora_a, lora_b = nn.Parameter(t.lora_a.to(case.dtype)), nn.Parameter(t.lora_b.to(case.dtype))
    basis = t.basis.to(case.dtype)
    projector = None
    if materialised:
        projector = (torch.eye(case.K, device=case.device) - t.basis @ t.basis.T).to(case.dtype)

    def forward(x: Tensor) -> Tensor:
        projected = x - (x @ basis) @ basis.T if projector is None else x @ projector
        return linear(x) + F.linear(F.linear(projected, lora_a), lora_b) * case.scaling

    return Provider(forward, lora_a, lora_b)


def make_providers(case: Case, t: Tensors) -> dict[str, Provider]:
    return {
        "frozen": Provider(frozen_linear(t), None, None),
        "nsru": make_nsru(case, t, cached=False),
        "nsru, fold cached": make_nsru(case, t, cached=True),
        "peft bf16": make_peft(case, t, fp32_adapters=False),
        "peft default (fp32 adapters)": make_peft(case, t, fp32_adapters=True),
        "eager activation": make_eager(case, t, materialised=False),
        "eager materialised": make_eager(case, t, materialised=True),
    }


def check(case: Case, t: Tensors, name: str, provider: Provider) -> None:
    """AssertionError unless y, dX, dA and dB agree with float64."""
    x, dy, weight = (value.double() for value in (t.x, t.dy, t.weight))
    basis, s = t.basis.double(), case.scaling
    folded = t.lora_a.double() - (t.lora_a.double() @ basis) @ basis.T
    lora_b = t.lora_b.double()
    leaf = t.x.clone().requires_grad_()
    y = provider.forward(leaf)
    y.backward(t.dy)
    if provider.lora_a is None or provider.lora_b is None:
        expected = {"y": (y, x @ weight.T), "dX": (leaf.grad, dy @ weight)}
    else:
        ds = s * dy @ lora_b
        d_a = ds.T @ x
        if provider.projects:
            d_a -= (d_a @ basis) @ basis.T
        expected = {
            "y": (y, x @ weight.T + s * (x @ folded.T) @ lora_b.T),
            "dX": (leaf.grad, dy @ weight + ds @ folded),
            "dA": (provider.lora_a.grad, d_a),
            "dB": (provider.lora_b.grad, s * dy.T @ (x @ folded.T)),
        }
    for label, (value, reference) in expected.items():
        assert value is not None, f"{name}: no {label}"
        error = measure.relative_error(value, reference)
        bound = tolerance(case.dtype)
        assert error <= bound, f"{name}: {label} is off by {error:.1e} > {bound:.1e}"


def timed_call(t: Tensors, provider: Provider) -> tuple[Callable[[], None], Callable[[], None]]:
    leaf = t.x.clone().requires_grad_()

    def prepare() -> None:
        provider.prepare()
        for tensor in (leaf, *provider.adapters):
            tensor.grad = None

    def run() -> None:
        provider.forward(leaf).backward(t.dy)

    return prepare, run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=200, help="timed iterations of each provider")
    parser.add_argument("--out", type=Path, default=measure.RESULTS / "linear_cpu.csv")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)

    case = Case()
    tensors = make_tensors(case)
    providers = make_providers(case, tensors)
    for name, provider in providers.items():
        check(case, tensors, name, provider)
    seconds = measure.interleave(
        {name: timed_call(tensors, provider) for name, provider in providers.items()},
        arguments.rounds,
    )

    flop = 4 * case.M * case.K * case.N  # y and dX of the frozen linear: the useful work
    print(f"{case}, {arguments.threads} threads, {arguments.rounds} rounds")
    rows = measure.report_ratios(
        seconds,
        lambda median: {"frozen_tflops": round(flop / median / 1e12, 4)},
        dtype=str(case.dtype).removeprefix("torch."),
        **{letter: getattr(case, letter) for letter in "MKNRQ"},
    )
    for name, base, bar in TARGETS:
        for variant in (name, f"{name}, fold cached"):
            measure.report_target(seconds, variant, base, bar)
    measure.write_rows(arguments.out, rows)


if __name__ == "__main__":
    main()
