"""The ways to compute adapted linears that read one x: ours, and what a user could run instead."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import peft
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import nsru_kernels as nk
from nsru_bench.cases import Operands, Provider, copies
from nsru_bench.internals import every_plan
from nsru_bench.rows import PREFIX

BACKENDS = ("eager", "cpu", "triton", "cuda")


def projected(operands: Operands, dtype: torch.dtype) -> list[nn.Parameter]:
    """Adapters without their part in the retain subspace, for ways that know no projection."""
    return copies([nk.project_adapter(a, operands.basis) for a in operands.lora_as], dtype)


class InTurn(NamedTuple):
    """One linear after the other; autograd sums their dX."""

    layers: list[nn.Module]

    def __call__(self, x: Tensor) -> list[Tensor]:
        return [layer(x) for layer in self.layers]


class Block(nn.ModuleDict):
    """The linears as a model, which shows ``swap_linears`` that they read one x."""

    def forward(self, x: Tensor) -> list[Tensor]:
        return [layer(x) for layer in self.values()]


def frozen_linears(operands: Operands) -> Block:
    linears = {}
    for i, weight in enumerate(operands.weights):
        linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
        linear.weight = nn.Parameter(weight.clone(), requires_grad=False)
        linears[f"linear_{i}"] = linear
    return Block(linears)


def frozen(operands: Operands) -> Provider:
    """y and dX only."""
    return Provider(InTurn(list(frozen_linears(operands).values())))


def modules(operands: Operands, *, cached: bool, together: bool = True) -> Provider:
    """The modules that ``swap_linears`` makes: ``cached`` as in further micro-batches of a step,
    else as in the first, which projects the adapter."""
    block, rank = frozen_linears(operands), operands.rank
    names = list(block)
    nk.swap_linears(
        block, names, rank=rank, alpha=operands.scaling * rank, siblings=together,
        subspaces=dict.fromkeys(names, operands.basis), batch={"x": operands.x},
    )  # fmt: skip
    layers = list(block.values())
    lora_as, lora_bs = [layer.lora_A for layer in layers], [layer.lora_B for layer in layers]
    with torch.no_grad():
        for parameters, values in ((lora_as, operands.lora_as), (lora_bs, operands.lora_bs)):
            for parameter, value in zip(parameters, values, strict=True):
                parameter.copy_(value)

    @torch.no_grad()
    def change_adapters() -> None:
        for lora_a in lora_as:
            lora_a.mul_(1.0)

    forward = InTurn(layers)
    ys = forward(operands.x.clone())
    # Members are computed one by one for few tokens, as long as Python costs more than products.
    nodes = {y.grad_fn for y in ys}
    by_autograd = {node.name() for node in nodes} == {"AddmmBackward0"}
    assert by_autograd or (len(nodes) == 1) == (together or len(ys) == 1)
    return Provider(forward, lora_as, lora_bs, (lambda: None) if cached else change_adapters)


def backend(operands: Operands, name: str, *, together: bool) -> Provider:
    """The public ops by a named backend. Adapters are projected beforehand and their gradient is
    not, as PEFT's is not."""
    dtype, s, weights = operands.x.dtype, operands.scaling, [w.clone() for w in operands.weights]
    lora_as, lora_bs = projected(operands, dtype), copies(operands.lora_bs, dtype)

    def forward(x: Tensor) -> Sequence[Tensor]:
        if together:
            scalings = [s] * len(weights)
            return nk.nsru_linear_group(
                x, weights, lora_as, lora_bs, scalings=scalings, backend=name
            )
        return [
            nk.nsru_linear(x, w, a, b, scaling=s, backend=name)
            for w, a, b in zip(weights, lora_as, lora_bs, strict=True)
        ]

    return Provider(forward, lora_as, lora_bs, projects=False)


def plans(operands: Operands, *, together: bool) -> dict[str, Provider]:
    """All that a plan table can name: every backend, or each of its plans. Those that cannot run
    here raise ``BackendUnavailable``."""
    found = {f"{PREFIX}{name}": backend(operands, name, together=together) for name in BACKENDS}
    for plan, provider in every_plan(operands).items():
        name = plan.split()[0]
        if name in BACKENDS:
            if name != "eager":
                found.pop(f"{PREFIX}{name}", None)
            found[f"{PREFIX}{plan}"] = provider
    return found


def peft_linears(operands: Operands, *, fp32_adapters: bool) -> Provider:
    """PEFT's layers with the projected adapters."""
    block, rank = frozen_linears(operands), operands.rank
    config = peft.LoraConfig(
        r=rank,
        lora_alpha=round(operands.scaling * rank),
        target_modules=list(block),
        lora_dropout=0.0,
    )
    wrapped = peft.get_peft_model(block, config, autocast_adapter_dtype=fp32_adapters)
    layers = list(wrapped.base_model.model.values())
    lora_as = [layer.lora_A["default"].weight for layer in layers]
    lora_bs = [layer.lora_B["default"].weight for layer in layers]
    assert lora_as[0].dtype == (torch.float32 if fp32_adapters else operands.x.dtype)
    with torch.no_grad():
        for lora_a, value in zip(lora_as, projected(operands, torch.float32), strict=True):
            lora_a.copy_(value)
        for lora_b, value in zip(lora_bs, operands.lora_bs, strict=True):
            lora_b.copy_(value)
    return Provider(InTurn(layers), lora_as, lora_bs, projects=False)


def peft_autocast(operands: Operands) -> Provider:
    """PEFT as it is by default: adapters in fp32, under autocast."""
    default, x = peft_linears(operands, fp32_adapters=True), operands.x

    def forward(x_MK: Tensor) -> Sequence[Tensor]:
        with torch.autocast(x.device.type, x.dtype):
            return default.forward(x_MK)

    return replace(default, forward=forward)


def eager(operands: Operands, *, materialised: bool) -> Provider:
    """Projections written by hand: x times the projector, or minus its part in the subspace."""
    dtype, basis = operands.x.dtype, operands.basis.to(operands.x.dtype)
    lora_as, lora_bs = copies(operands.lora_as, dtype), copies(operands.lora_bs, dtype)
    linears = list(frozen_linears(operands).values())
    projector = None
    if materialised:
        identity = torch.eye(len(basis), device=basis.device)
        projector = (identity - operands.basis @ operands.basis.T).to(dtype)

    def forward(x: Tensor) -> list[Tensor]:
        px = x - (x @ basis) @ basis.T if projector is None else x @ projector
        return [
            linear(x) + F.linear(F.linear(px, a), b) * operands.scaling
            for linear, a, b in zip(linears, lora_as, lora_bs, strict=True)
        ]

    return Provider(forward, lora_as, lora_bs)


def unsloth(operands: Operands) -> Provider:
    """unsloth's fused function for one linear (no bias, no dropout)."""
    from unsloth.kernels.fast_lora import LoRA_W

    dtype = operands.x.dtype
    lora_as, lora_bs = projected(operands, dtype), copies(operands.lora_bs, dtype)
    weight = operands.weights[0].clone()

    def forward(x: Tensor) -> list[Tensor]:
        scaling = operands.scaling
        return [LoRA_W.apply(x[None], weight, None, lora_as[0], lora_bs[0], scaling)[0]]

    return Provider(forward, lora_as, lora_bs, projects=False)
