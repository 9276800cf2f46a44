"""The shapes that benchmarks run: those of published comparisons and of models people adapt."""

from __future__ import annotations

from typing import NamedTuple

import torch

from nsru_bench.session import Session


class Shape(NamedTuple):
    """One linear layer: M tokens, K in_features, N out_features, R LoRA rank, Q retain rank."""

    M: int
    K: int
    N: int
    R: int = 16
    Q: int = 256

    @property
    def columns(self) -> dict[str, int]:
        return self._asdict()


# The three shapes that LoRAFusion, Transformer Engine, axolotl and unsloth are compared on.
PUBLISHED = [Shape(8192, 4096, 4096), Shape(8192, 4096, 14336), Shape(16384, 2048, 8192)]
# (K, N) of the linears of one layer: q, k/v, o, gate/up, down.
LAYERS = {
    "Llama-3.2-1B": [(2048, 2048), (2048, 512), (2048, 8192), (8192, 2048)],
    "Llama-3-8B": [(4096, 4096), (4096, 1024), (4096, 14336), (14336, 4096)],
    "Qwen2.5-7B": [(3584, 3584), (3584, 512), (3584, 18944), (18944, 3584)],
}
TOKENS = [1, 4, 16, 64, 256, 1024, 4096, 8192, 32768]
# The sizes of the CPU's acceptance figures.
CPU = Shape(512, 2048, 2048)
TINY = Shape(48, 64, 96, 4, 8)


def linear_shapes(session: Session) -> list[Shape]:
    """In order of value: what a budget cuts off is missed least."""
    if session.tiny:
        return [TINY, TINY._replace(M=1)]
    if session.device.type == "cpu":
        return [CPU, CPU._replace(M=1), CPU._replace(M=16)]
    growing = [Shape(m, 4096, 4096) for m in TOKENS if m != 8192]
    layers = [Shape(8192, k, n) for pairs in LAYERS.values() for k, n in pairs]
    ranks = [Shape(8192, 4096, 4096, r) for r in (4, 8, 32, 64, 128)]
    widths = [Shape(8192, 4096, 4096, 16, q) for q in (0, 1024)]
    return list(dict.fromkeys([*PUBLISHED, *growing, *layers, *ranks, *widths]))


def element_size(dtype: torch.dtype) -> int:
    return torch.empty(0, dtype=dtype).element_size()
