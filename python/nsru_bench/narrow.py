"""The narrow products around the GEMM, each bound by reading one large matrix; see ``bench.py``.

    S            x Āᵀ                     one read of x
    dS + dB      dY B and dYᵀ S           one read of dY at best
    dA           dSᵀ x                    one read of x

The column "of_copy" is what a product reads of that matrix a second, against the bandwidth of a
copy in the same run.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from nsru_bench.cases import assert_near, normal_numbers, tolerance
from nsru_bench.internals import narrow_products, one_read_pays
from nsru_bench.session import Session
from nsru_bench.timing import Call, copies_beyond_caches

# (M, C, R): the inputs and outputs of Llama-3-8B's and Llama-3.2-1B's linears.
SHAPES = [(8192, 4096, 16), (8192, 14336, 16), (16384, 2048, 16), (8192, 4096, 64), (16, 4096, 16)]
CPU_SHAPES, TINY_SHAPES = [(512, 2048, 16)], [(48, 64, 4)]
PRODUCTS = ("S", "dS + dB", "dA")


class Library:
    """PyTorch's own products."""

    def rows(self, x_MC: Tensor, v_RC: Tensor) -> Tensor:
        return x_MC @ v_RC.T

    def both(self, x_MC: Tensor, p_MR: Tensor, v_CR: Tensor) -> tuple[Tensor, Tensor]:
        return x_MC @ v_CR, x_MC.T @ p_MR

    def columns(self, x_MC: Tensor, p_MR: Tensor) -> Tensor:
        return p_MR.T @ x_MC


def run(session: Session) -> None:
    ways = {"library": Library(), **narrow_products(session.device)}
    for shape in TINY_SHAPES if session.tiny else CPU_SHAPES if session.on_cpu else SHAPES:
        for product in PRODUCTS:
            if session.fits(f"narrow {product} {shape}", 1 if session.tiny else 4):
                run_product(session, ways, product, *shape)


def run_product(
    session: Session, ways: dict[str, Any], product: str, m: int, c: int, r: int
) -> None:
    if product != "dS + dB" or not one_read_pays(r):
        ways = {name: way for name, way in ways.items() if name != "cuda"}
    normal = normal_numbers(session.device)

    def draw(*shape: int) -> Tensor:
        return (normal(*shape) / c**0.25).to(session.dtype)

    v_CR, p_MR = draw(c, r), draw(m, r)
    v_RC = v_CR.T.contiguous()
    size = m * c * session.dtype.itemsize
    xs = [draw(m, c) for _ in range(copies_beyond_caches(session.device, size))]

    def multiply(way: Any, x: Tensor, p: Tensor, vT: Tensor, v: Tensor) -> tuple[Tensor, ...]:
        if product == "S":
            return (way.rows(x, vT),)
        return way.both(x, p, v) if product == "dS + dB" else (way.columns(x, p),)

    expected = multiply(Library(), *(t.double() for t in (xs[0], p_MR, v_RC, v_CR)))
    calls: dict[str, Call] = {}
    for name, way in ways.items():
        for value, exact in zip(multiply(way, xs[0], p_MR, v_RC, v_CR), expected, strict=True):
            assert_near(f"{name} {product}", value, exact, tolerance(session.dtype))
        calls[name] = [lambda x=x, way=way: multiply(way, x, p_MR, v_RC, v_CR) for x in xs]
    timings = session.time(calls)
    bandwidth = session.limits.bytes_per_second
    session.record(
        "narrow", timings, {"product": product, "M": m, "C": c, "R": r},
        flop=2.0 * m * c * r * len(expected), moved=size, base="library",
        each={
            name: {"of_copy": round(size / (t.median / 1e3) / bandwidth, 4)}
            for name, t in timings.items()
        },
    )  # fmt: skip
