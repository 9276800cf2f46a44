"""The linears that benchmarks run: shapes, operands, and the check against float64.

Shapes are those of published comparisons and of models people adapt.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from nsru_bench.session import Session


class Shape(NamedTuple):
    """Linears that read one x: M tokens, K in_features, the out_features of each; R and Q of each
    are the LoRA rank and the retain rank."""

    M: int
    K: int
    widths: tuple[int, ...]
    R: int = 16
    Q: int = 256

    @property
    def columns(self) -> dict[str, Any]:
        """N and R of all together, by which plans are looked up."""
        count = len(self.widths)
        sizes = {"M": self.M, "K": self.K, "N": sum(self.widths), "R": self.R * count, "Q": self.Q}
        return sizes if count == 1 else {**sizes, "widths": "+".join(map(str, self.widths))}


# The three shapes that LoRAFusion, Transformer Engine, axolotl and unsloth are compared on.
PUBLISHED = [(8192, 4096, 4096), (8192, 4096, 14336), (16384, 2048, 8192)]
# (K, N) of the linears of one layer: q, k/v, o, gate/up, down.
LAYERS = {
    "Llama-3.2-1B": [(2048, 2048), (2048, 512), (2048, 8192), (8192, 2048)],
    "Llama-3-8B": [(4096, 4096), (4096, 1024), (4096, 14336), (14336, 4096)],
    "Qwen2.5-7B": [(3584, 3584), (3584, 512), (3584, 18944), (18944, 3584)],
}
TOKENS = [1, 4, 16, 64, 256, 1024, 4096, 8192, 32768]
# The sizes of the CPU's acceptance figures.
CPU = Shape(512, 2048, (2048,))
CPU_SIBLINGS = Shape(512, 2048, (2048, 512, 512))
TINY = Shape(48, 64, (96,), 4, 8)


def linear_shapes(session: Session) -> list[Shape]:
    """In order of value: what a budget cuts off is missed least."""
    if session.tiny:
        return [TINY, TINY._replace(M=1)]
    if session.on_cpu:
        tokens = [CPU._replace(M=m) for m in (1, 16, 128, 2048)]
        return [CPU, *tokens, CPU._replace(widths=(8192,)), CPU._replace(K=8192)]
    published = [Shape(m, k, (n,)) for m, k, n in PUBLISHED]
    if session.quick:
        down = Shape(8192, 14336, (4096,))
        return [*published, *(shape._replace(M=2048) for shape in (*published[:2], down)), down]
    growing = [Shape(m, 4096, (4096,)) for m in TOKENS if m != 8192]
    layers = [Shape(8192, k, (n,)) for pairs in LAYERS.values() for k, n in pairs]
    ranks = [published[0]._replace(R=r) for r in (4, 8, 32, 64, 128)]
    widths = [published[0]._replace(Q=q) for q in (0, 1024)]
    return list(dict.fromkeys([*published, *growing, *layers, *ranks, *widths]))


def sibling_shapes(session: Session) -> list[Shape]:
    """q/k/v and gate/up, in order of value."""
    if session.tiny:
        return [TINY._replace(widths=(96, 32, 32)), TINY._replace(M=1, widths=(96, 96))]
    if session.on_cpu:
        return [
            CPU_SIBLINGS,
            CPU_SIBLINGS._replace(widths=(8192, 8192)),
            Shape(256, 4096, (4096, 1024, 1024)),
            CPU_SIBLINGS._replace(M=2048),
            CPU_SIBLINGS._replace(M=64),
        ]
    shapes = []
    for model, m in (("Llama-3-8B", 8192), ("Llama-3-8B", 2048), ("Llama-3.2-1B", 8192)):
        (k, q), (_, kv), (_, up), _ = LAYERS[model]
        shapes += [Shape(m, k, (q, kv, kv)), Shape(m, k, (up, up))]
    return shapes[:4] if session.quick else shapes


@dataclass(frozen=True)
class Operands:
    """x [M, K] and of each linear dy [M, N] and weight [N, K], in the dtype of the run; A [R, K],
    B [N, R] and the one basis [K, Q] in fp32."""

    x: Tensor
    basis: Tensor
    dys: list[Tensor]
    weights: list[Tensor]
    lora_as: list[Tensor]
    lora_bs: list[Tensor]
    scaling: float = 2.0

    @property
    def rank(self) -> int:
        return self.lora_as[0].shape[0]


def normal_numbers(device: torch.device | str = "cpu", seed: int = 0) -> Callable[..., Tensor]:
    """Sizes → normal numbers in fp32, other ones at each call."""
    generator = torch.Generator(device).manual_seed(seed)
    return partial(torch.randn, generator=generator, device=device)


def make_operands(
    shape: Shape, dtype: torch.dtype, device: torch.device | str = "cpu", seed: int = 0
) -> Operands:
    normal = normal_numbers(device, seed)
    m, k, widths, r, q = shape
    return Operands(
        x=normal(m, k).to(dtype),
        basis=torch.linalg.qr(normal(k, q))[0].contiguous(),
        dys=[normal(m, n).to(dtype) for n in widths],
        weights=[(normal(n, k) * k**-0.5).to(dtype) for n in widths],
        lora_as=[normal(r, k) * k**-0.5 for _ in widths],
        lora_bs=[normal(n, r) * r**-0.5 for n in widths],
    )


@dataclass(frozen=True)
class Provider:
    """One way to compute all y_i of one x.

    Attributes:
        forward: x → y_i.
        lora_as: A_i in order, or all of them stacked in one; none of the frozen linears.
        lora_bs: B_i.
        prepare: called before each step, and timed with it.
        projects: whether dA has no component along the basis.
    """

    forward: Callable[[Tensor], Sequence[Tensor]]
    lora_as: Sequence[nn.Parameter] = ()
    lora_bs: Sequence[nn.Parameter] = ()
    prepare: Callable[[], None] = lambda: None
    projects: bool = True

    @property
    def adapters(self) -> list[nn.Parameter]:
        return [*self.lora_as, *self.lora_bs]


def copies(tensors: Sequence[Tensor], dtype: torch.dtype | None = None) -> list[nn.Parameter]:
    return [nn.Parameter(tensor.to(dtype or tensor.dtype, copy=True)) for tensor in tensors]


def tolerance(dtype: torch.dtype) -> float:
    """S, y and dX are each rounded once or twice, to half of epsilon; float32 sums lose more."""
    return max(2 * torch.finfo(dtype).eps, 1e-5)


# Of sums over many rows whose factors were rounded once or twice.
SUM_TOLERANCE = {torch.float32: 1e-5, torch.float16: 8 * 2.0**-11, torch.bfloat16: 8 * 2.0**-9}


def assert_near(what: str, value: Tensor, exact: Tensor, bound: float) -> None:
    """AssertionError where the difference has more than ``bound`` of exact's Frobenius norm."""
    exact = exact.double()
    error = ((value.double() - exact).norm() / exact.norm()).item()
    assert error <= bound, f"{what} is off by {error:.1e} > {bound:.1e}"


def check(operands: Operands, name: str, provider: Provider) -> None:
    """AssertionError unless every y, dA, dB and the one dX agree with float64."""
    leaf = operands.x.clone().requires_grad_()
    leaves = [leaf, *provider.adapters]
    ys = provider.forward(leaf)
    dx, *grads = torch.autograd.grad(ys, leaves, operands.dys, allow_unused=True)
    assert all(grad is not None for grad in (dx, *grads)), f"{name}: a gradient is missing"
    adapted = bool(grads)
    if adapted:
        count = len(provider.lora_as)
        das = torch.cat(grads[:count]).split(operands.rank)
        dbs = torch.cat(grads[count:]).split([len(b) for b in operands.lora_bs])
    x, basis, s = operands.x.double(), operands.basis.double(), operands.scaling * adapted
    exact_dx = torch.zeros_like(x)
    pairs = {}
    for i, y in enumerate(ys):
        dy, w, a, b = (
            values[i].double()
            for values in (operands.dys, operands.weights, operands.lora_as, operands.lora_bs)
        )
        projected, ds = a - (a @ basis) @ basis.T, s * dy @ b
        pairs[f"y of {i}"] = y, x @ w.T + s * (x @ projected.T) @ b.T
        exact_dx += dy @ w + ds @ projected
        if adapted:
            d_a = ds.T @ x
            if provider.projects:
                d_a -= (d_a @ basis) @ basis.T
            pairs[f"dA of {i}"] = das[i], d_a
            pairs[f"dB of {i}"] = dbs[i], s * dy.T @ (x @ projected.T)
    pairs["dX"] = dx, exact_dx
    bound = tolerance(operands.x.dtype)
    for label, (value, exact) in pairs.items():
        assert_near(f"{name}: {label}", value, exact, bound)
