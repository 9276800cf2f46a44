"""The projected linear against everything a user could run instead; see ``bench.py``.

Every provider's y, dX, dA and dB are compared with float64 before anything is timed. The frozen
linear computes y and dX only. Backends and plans are timed one by one with the adapter projected
beforehand; "nsru" is the public op with the projection of this optimizer step at hand, as the
module calls it.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch

import nsru_kernels as nk
from nsru_bench import internals, providers
from nsru_bench.cases import Operands, Provider, Shape, check, linear_shapes, make_operands
from nsru_bench.correctness import dropped
from nsru_bench.rows import PREFIX
from nsru_bench.session import Session
from nsru_bench.timing import Call, copies_beyond_caches, side_stream

PASSES = ("forward", "backward", "forward+backward")


def run(session: Session) -> None:
    for shape in linear_shapes(session):
        if session.fits(f"linear {shape}", 2 if session.tiny else 15):
            run_shape(session, "linear", shape, make_providers)


def make_providers(operands: Operands, session: Session) -> dict[str, Provider]:
    found = {
        "frozen": providers.frozen(operands),
        "nsru": internals.projected_ops(operands, together=False),
        "peft bf16": providers.peft_linears(operands, fp32_adapters=False),
    }
    wrong = {f"{PREFIX}{plan}" for plan in dropped(session.out)}
    plans = providers.plans(operands, together=False)
    plans = {name: provider for name, provider in plans.items() if name not in wrong}
    found |= {
        "nsru, fold every call": providers.modules(operands, cached=False),
        "peft default, autocast": providers.peft_autocast(operands),
        "eager activation": providers.eager(operands, materialised=False),
        "eager materialised": providers.eager(operands, materialised=True),
    }
    found |= plans
    try:
        found["unsloth"] = providers.unsloth(operands)
    except Exception as error:  # not installed, or not for this device
        print(f"unsloth is not timed: {error}", flush=True)
    return found


def run_shape(
    session: Session,
    op: str,
    shape: Shape,
    make: Callable[[Operands, Session], dict[str, Provider]],
) -> None:
    """Check all providers, drop the wrong ones, time every pass; ratios are to "frozen"."""
    operands = make_operands(shape, session.dtype, session.device)
    made = make(operands, session)
    for name, provider in list(made.items()):
        try:
            check(operands, name, provider)
        except nk.BackendUnavailable as error:
            print(f"no {name}: {error}", flush=True)
            del made[name]
        except Exception as error:  # what is wrong is not timed, the others are
            session.fail(f"{op} {shape}, {name}", error)
            del made[name]
    moved_in = operands.x.nbytes + sum(dy.nbytes for dy in operands.dys)
    copies = copies_beyond_caches(session.device, moved_in)
    plans = {n: n.removeprefix(PREFIX) for n in made if n.startswith(PREFIX)}
    for which in PASSES:
        timed = {name: calls(operands, p, which, copies) for name, p in made.items()}
        flop, moved = work(shape, which, session.dtype.itemsize)
        session.record(
            op, session.time(timed), {"pass": which, **shape.columns},
            flop=flop, moved=moved, base="frozen", plans=plans,
        )  # fmt: skip


def calls(operands: Operands, provider: Provider, which: str, copies: int) -> Call:
    """The pass on ``copies`` inputs of equal size, which do not fit into the caches together."""
    return [_call(operands, provider, which) for _ in range(copies)]


def _call(operands: Operands, provider: Provider, which: str) -> Callable[[], object]:
    x, dys = operands.x.clone().requires_grad_(), [dy.clone() for dy in operands.dys]
    leaves = [x, *provider.adapters]
    if which == "forward":
        return partial(provider.forward, x)
    if which == "backward":
        with side_stream(x.device):
            ys = provider.forward(x)
        return lambda: torch.autograd.grad(ys, leaves, dys, retain_graph=True)

    def both() -> object:
        provider.prepare()
        return torch.autograd.grad(provider.forward(x), leaves, dys)

    return both


def work(shape: Shape, which: str, size: int) -> tuple[float, float]:
    """(FLOP, bytes) that no way of computing it can avoid: each operand moves once, x and dX once
    for all linears."""
    m, k, widths, r, _ = shape
    n = sum(widths)
    gemm, narrow = 2.0 * m * k * n, 2.0 * m * r * sum(k + width for width in widths)
    forward = gemm + narrow, size * (m * k + k * n + m * n)
    backward = gemm + 2 * narrow, size * (2 * m * k + k * n + m * n)
    if which == "forward":
        return forward
    if which == "backward":
        return backward
    return forward[0] + backward[0], forward[1] + backward[1]
