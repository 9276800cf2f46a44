"""The streaming retain subspace against what else finds leading directions; see ``bench.py``.

The time of one batch (pass "update") and of the end of a stream ("finish"), each method's sums
compared with float64 before it is timed. Rows name what each method keeps in memory between
batches, and whether it subtracts the mean.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from nsru_bench import timing
from nsru_bench.cases import SUM_TOLERANCE, assert_near, normal_numbers
from nsru_bench.rows import PREFIX
from nsru_bench.session import Session
from nsru_bench.sketch_methods import (
    NEVER,
    Covariance,
    LowRankSVD,
    Method,
    Op,
    PeftPCA,
    Sketch,
    assert_orthonormal,
    residual_energy,
)

# (K, L): two inputs of Llama-3-8B, one with a narrow sketch too, and Llama-3.2-1B's.
SHAPES = [(14336, 576), (4096, 576), (4096, 128), (2048, 320)]
CPU_SHAPES = [(1024, 144), (2048, 320), (1024, 64)]
TINY_SHAPES = [(96, 16)]
EIGH_FEATURES = 8192  # of a K x K matrix that can be waited for


def run(session: Session) -> None:
    tokens = 48 if session.tiny else 512 if session.on_cpu else 8192
    shapes = TINY_SHAPES if session.tiny else CPU_SHAPES if session.on_cpu else SHAPES
    for k, width in shapes[:3] if session.quick else shapes:
        if session.fits(f"sketch K={k} L={width}", 1 if session.tiny else 30):
            run_update(session, tokens, k, width)
            if not session.quick:
                run_finish(session, tokens, k, width)


def rank_of(width: int) -> int:
    """Q that a width is for: 64 directions of oversampling, or half of a narrow one."""
    return max(width - 64, width // 2)


def make_batch(session: Session, tokens: int, k: int) -> Tensor:
    """Gaussian rows x [M, K]; the energy of feature i falls as 1/i."""
    x_MK = normal_numbers(session.device)(tokens, k)
    x_MK *= torch.arange(1, k + 1, device=session.device).rsqrt()
    return x_MK.to(session.dtype)


def make_streaming(session: Session, tokens: int, k: int, width: int) -> dict[str, Method]:
    """Methods that have an update for each batch and are fast enough for many rounds."""
    device = session.device
    methods: dict[str, Method] = {
        "covariance": Covariance(k, device),
        "RetainSketch": Sketch(k, width, device, refresh_every=NEVER),
        "RetainSketch, a refresh each": Sketch(k, width, device, refresh_every=tokens),
        f"{PREFIX}eager": Op(k, width, device),
    }
    if 4 * width <= k <= EIGH_FEATURES:
        methods["RetainSketch, exact"] = Sketch(k, k, device)
    if device.type == "cuda" and session.dtype.itemsize == 2:
        sixteen = Covariance(k, device, None)
        try:
            sixteen.update(torch.zeros(1, k, device=device, dtype=session.dtype))
        except TypeError:
            print("no covariance from 16-bit products: torch.mm has no out_dtype", flush=True)
        else:
            methods["covariance, 16-bit product"] = sixteen
    return methods


def check_first_batch(name: str, method: Method, x_MK: Tensor, rank: int) -> None:
    """AssertionError unless what ``method`` holds after a first batch x is exact enough: its sums,
    or its directions where it holds no sums."""
    sums = method.sums(x_MK)
    for value, exact in sums:
        assert_near(name, value, exact, SUM_TOLERANCE[x_MK.dtype])
    if not sums:
        check_basis(name, method, x_MK, rank)


def check_basis(name: str, method: Method, x_MK: Tensor, rank: int) -> None:
    """AssertionError unless its directions are about as good as the axes that x was made along."""
    basis_KQ, _ = method.finish(rank)
    assert_orthonormal(name, basis_KQ)
    axes_KQ = torch.eye(x_MK.shape[1], rank, device=x_MK.device)
    residual, planned = residual_energy(x_MK, basis_KQ), residual_energy(x_MK, axes_KQ)
    assert residual <= 1.5 * planned, f"{name} leaves {residual:.4f}, the axes {planned:.4f}"


def run_update(session: Session, tokens: int, k: int, width: int) -> None:
    rank = rank_of(width)
    x_MK = make_batch(session, tokens, k)
    copies = timing.copies_beyond_caches(session.device, x_MK.nbytes)
    batches = [x_MK, *(x_MK.clone() for _ in range(copies - 1))]
    fast = make_streaming(session, tokens, k, width)
    # Nothing can be added to svd_lowrank: a batch stands for the whole matrix.
    pca, whole = PeftPCA(k, width, tokens), LowRankSVD(width)
    methods = dict(fast)
    if not session.quick:
        methods |= {"peft IncrementalPCA": pca, "svd_lowrank of the batch": whole}
    for name, method in methods.items():
        method.update(x_MK)
        check_first_batch(name, method, x_MK, rank)
    timings = {}
    for waits in (False, True):
        some = {name: updates(m, batches) for name, m in fast.items() if m.waits == waits}
        timings |= session.time(some, capture=not waits)
    if not session.quick:
        slow = {"peft IncrementalPCA": updates(pca, batches[:1])}
        timings |= session.time_few_rounds({**slow, "svd_lowrank of the batch": [whole.decompose]})
    y_bytes = 4 * k * width
    session.record(
        "sketch", timings, {"pass": "update", "M": tokens, "K": k, "L": width, "Q": rank},
        flop=2.0 * tokens * k * width * 2 + 2.0 * tokens * width**2,
        moved=session.dtype.itemsize * tokens * k + 2 * y_bytes,
        base="covariance",
        plans={name: method.route for name, method in methods.items()}, each=columns(methods),
    )  # fmt: skip


def run_finish(session: Session, tokens: int, k: int, width: int) -> None:
    """From the sums to directions, once a stream."""
    rank = rank_of(width)
    methods: dict[str, Method] = {
        "RetainSketch": Sketch(k, width, session.device, refresh_every=NEVER),
        "covariance": Covariance(k, session.device),
    }
    if k > EIGH_FEATURES:
        print(f"eigh of {k} x {k} is not timed", flush=True)
        del methods["covariance"]
    x_MK = make_batch(session, tokens, k)
    calls: dict[str, timing.Call] = {}
    for name, method in methods.items():
        method.update(x_MK)
        check_basis(name, method, x_MK, rank)
        calls[name] = [functools.partial(method.finish, rank)]
    session.record(
        "sketch", session.time_few_rounds(calls),
        {"pass": "finish", "M": tokens, "K": k, "L": width, "Q": rank},
        # A Gram matrix of the factor and one rotation of it.
        flop=4.0 * k * width**2,
        moved=4 * (k * width + width**2 + k * rank),
        base="covariance" if "covariance" in methods else None,
        plans={name: method.route for name, method in methods.items()}, each=columns(methods),
    )  # fmt: skip


def updates(method: Method, batches: list[Tensor]) -> timing.Call:
    return [functools.partial(method.update, x_MK) for x_MK in batches]


def columns(methods: dict[str, Method]) -> dict[str, dict[str, object]]:
    return {
        name: {"state_bytes": method.state_bytes(), "centred": method.centred}
        for name, method in methods.items()
    }
