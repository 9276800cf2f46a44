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


class SiblingShape(NamedTuple):
    """Linears that read one x [M, K]: their out_features N_i; R and Q as of each one."""

    M: int
    K: int
    widths: tuple[int, ...]
    R: int = 16
    Q: int = 256

    @property
    def columns(self) -> dict[str, int | str]:
        """N and R of all together, by which plans are looked up."""
        n, r = sum(self.widths), self.R * len(self.widths)
        widths = "+".join(map(str, self.widths))
        return {"M": self.M, "K": self.K, "N": n, "R": r, "Q": self.Q, "widths": widths}


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
        tokens = [CPU._replace(M=m) for m in (1, 16, 128, 2048)]
        return [CPU, *tokens, CPU._replace(N=8192), CPU._replace(K=8192)]
    growing = [Shape(m, 4096, 4096) for m in TOKENS if m != 8192]
    layers = [Shape(8192, k, n) for pairs in LAYERS.values() for k, n in pairs]
    ranks = [Shape(8192, 4096, 4096, r) for r in (4, 8, 32, 64, 128)]
    widths = [Shape(8192, 4096, 4096, 16, q) for q in (0, 1024)]
    return list(dict.fromkeys([*PUBLISHED, *growing, *layers, *ranks, *widths]))


def sibling_shapes(session: Session) -> list[SiblingShape]:
    """q/k/v and gate/up, in order of value."""
    if session.tiny:
        return [SiblingShape(48, 64, (96, 32, 32), 4, 8), SiblingShape(1, 64, (96, 96), 4, 8)]
    if session.device.type == "cpu":
        return [
            SiblingShape(512, 2048, (2048, 512, 512)),
            SiblingShape(512, 2048, (8192, 8192)),
            SiblingShape(256, 4096, (4096, 1024, 1024)),
            SiblingShape(2048, 2048, (2048, 512, 512)),
            SiblingShape(64, 2048, (2048, 512, 512)),
        ]
    shapes = []
    for model in ("Llama-3.2-1B", "Llama-3-8B"):
        (k, q), (_, kv), (_, up), _ = LAYERS[model]
        shapes += [SiblingShape(8192, k, (q, kv, kv)), SiblingShape(8192, k, (up, up))]
    return shapes


def element_size(dtype: torch.dtype) -> int:
    return torch.empty(0, dtype=dtype).element_size()
