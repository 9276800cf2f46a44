"""The narrow products around the GEMM, each bound by reading one large matrix; see ``bench.py``.

    S            x Āᵀ                     one read of x
    dS + dB      dY B and dYᵀ S           one read of dY at best
    dA           dSᵀ x                    one read of x

The column "of_copy" is what a product reads of that matrix a second, against the bandwidth of a
copy in the same run.
"""

from __future__ import annotations

import torch
from torch import Tensor

from nsru_bench import measure
from nsru_bench.cases import element_size
from nsru_bench.session import Session
from nsru_bench.timing import Call
from nsru_kernels.dispatch import extension, launch
from nsru_kernels.ops.products import one_read_pays

# (M, C, R): the inputs and outputs of Llama-3-8B's and Llama-3.2-1B's linears.
SHAPES = [(8192, 4096, 16), (8192, 14336, 16), (16384, 2048, 16), (8192, 4096, 64), (16, 4096, 16)]
CPU_SHAPES, TINY_SHAPES = [(512, 2048, 16)], [(48, 64, 4)]
TOLERANCE = {torch.float32: 1e-5, torch.float16: 4 * 2.0**-11, torch.bfloat16: 4 * 2.0**-8}
PRODUCTS = ("S", "dS + dB", "dA")


class Library:
    """PyTorch's own products."""

    def rows(self, x_MC: Tensor, v_RC: Tensor) -> Tensor:
        return x_MC @ v_RC.T

    def both(self, x_MC: Tensor, p_MR: Tensor, v_CR: Tensor) -> tuple[Tensor, Tensor]:
        return x_MC @ v_CR, x_MC.T @ p_MR

    def columns(self, x_MC: Tensor, p_MR: Tensor) -> Tensor:
        return p_MR.T @ x_MC


class Triton(Library):
    def __init__(self) -> None:
        from nsru_kernels.ops.linear import triton_products

        self.products = triton_products

    def rows(self, x_MC: Tensor, v_RC: Tensor) -> Tensor:
        return self.products.rows_product(x_MC, v_RC.T)

    def both(self, x_MC: Tensor, p_MR: Tensor, v_CR: Tensor) -> tuple[Tensor, Tensor]:
        if not one_read_pays(p_MR.shape[1]):
            d = self.products.columns_product(x_MC, p_MR, 1.0, rank_first=False)
            return self.rows(x_MC, v_CR.T.contiguous()), d
        rows = torch.empty_like(p_MR)
        d = self.products.columns_product(
            x_MC, p_MR, 1.0, rank_first=False, v_CR=v_CR, rows_out=rows
        )
        return rows, d

    def columns(self, x_MC: Tensor, p_MR: Tensor) -> Tensor:
        return self.products.columns_product(x_MC, p_MR, 1.0, rank_first=True)


class Cuda(Triton):
    def __init__(self) -> None:
        from nsru_kernels.ops.linear import cuda_products

        self.products = cuda_products

    def rows(self, x_MC: Tensor, v_RC: Tensor) -> Tensor:
        return self.products.rows_product(x_MC, v_RC)


def run(session: Session) -> None:
    on_cpu = session.device.type == "cpu"
    ways: dict[str, Library] = {"library": Library()}
    for name, reason, make in (
        ("triton", launch.unavailable(session.device), Triton),
        ("cuda", extension.unavailable("linear", session.device), Cuda),
    ):
        if reason is None:
            ways[name] = make()
        else:
            print(f"no {name} products: {reason}", flush=True)
    for shape in TINY_SHAPES if session.tiny else CPU_SHAPES if on_cpu else SHAPES:
        for product in PRODUCTS:
            if session.fits(f"narrow {product} {shape}", 1 if session.tiny else 4):
                run_product(session, ways, product, *shape)


def run_product(
    session: Session, ways: dict[str, Library], product: str, m: int, c: int, r: int
) -> None:
    generator = torch.Generator(session.device).manual_seed(0)

    def draw(*shape: int) -> Tensor:
        drawn = torch.randn(*shape, device=session.device, generator=generator)
        return (drawn / c**0.25).to(session.dtype)

    v_RC, v_CR, p_MR = draw(r, c), draw(c, r), draw(m, r)
    size = m * c * element_size(session.dtype)
    copies = 1 if session.device.type == "cpu" else max(2, min(16, 2**28 // size))
    xs = [draw(m, c) for _ in range(copies)]
    exact = xs[0].double()
    expected: list[Tensor] = {
        "S": lambda: [exact @ v_RC.double().T],
        "dS + dB": lambda: [exact @ v_CR.double(), exact.T @ p_MR.double()],
        "dA": lambda: [p_MR.double().T @ exact],
    }[product]()
    calls: dict[str, Call] = {}
    for name, way in ways.items():
        call = {
            "S": lambda x, way=way: way.rows(x, v_RC),
            "dS + dB": lambda x, way=way: way.both(x, p_MR, v_CR),
            "dA": lambda x, way=way: way.columns(x, p_MR),
        }[product]
        got = call(xs[0])
        for value, wanted in zip(got if isinstance(got, tuple) else (got,), expected, strict=True):
            error = measure.relative_error(value, wanted)
            assert error <= TOLERANCE[session.dtype], f"{name} {product} is off by {error:.1e}"
        calls[name] = [lambda x=x, call=call: call(x) for x in xs]
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
