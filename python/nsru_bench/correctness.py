"""Every plan of the projected linear against float64 and against itself; see ``bench.py``.

At the published shapes and odd ones: y, dX, dA and dB of each plan and configuration are compared
with float64, and a second run with the first, bit by bit. A plan that fails is printed, and left
out of what is timed afterwards by ``dropped.txt`` in the folder of the results. Before that all of
them are compiled, in as many processes as there are cores.
"""

from __future__ import annotations

import multiprocessing
import os
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import torch

import nsru_kernels as nk
from nsru_bench import internals
from nsru_bench.cases import PUBLISHED, TINY, Operands, Provider, Shape, check, make_operands
from nsru_bench.session import Session

ODD = (Shape(1000, 4104, (776,), 5, 24), Shape(1, 4096, (4096,)), Shape(63, 200, (72,), 17, 8))
SMALL = Shape(256, 4096, (4096,))  # compiles the same kernels as the published shapes
WORKERS = 16
DROPPED = "dropped.txt"


def run(session: Session) -> None:
    shapes = [TINY] if session.tiny else [*(Shape(m, k, (n,)) for m, k, n in PUBLISHED), *ODD]
    if session.device.type == "cuda":
        precompile(session)
    wrong: dict[str, str] = {}
    for shape in shapes:
        if session.fits(f"correctness {shape}", 1 if session.tiny else 3):
            operands = make_operands(shape, session.dtype, session.device)
            for plan, provider in internals.every_plan(operands).items():
                if plan not in wrong and (error := failure(operands, plan, provider)):
                    wrong[plan] = error
                    print(f"dropped {plan} at {shape}: {error}", flush=True)
    (session.out / DROPPED).write_text("".join(f"{plan}\n" for plan in wrong))
    for plan, error in wrong.items():
        session.fail(plan, RuntimeError(error))


def failure(operands: Operands, plan: str, provider: Provider) -> str | None:
    """The fault of a plan at these operands; None where there is none or it cannot serve."""
    try:
        check(operands, plan, provider)
        first, second = (values(operands, provider) for _ in range(2))
        if not all(map(torch.equal, first, second)):
            return "two runs differ"
    except nk.BackendUnavailable as error:
        print(f"no {plan}: {error}", flush=True)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return None


def values(operands: Operands, provider: Provider) -> list[torch.Tensor]:
    x = operands.x.clone().requires_grad_()
    ys = provider.forward(x)
    return [*ys, *torch.autograd.grad(ys, [x, *provider.adapters], operands.dys)]


def dropped(folder: Path) -> set[str]:
    """Plans that ``run`` found wrong."""
    path = folder / DROPPED
    return set(path.read_text().splitlines()) if path.is_file() else set()


def precompile(session: Session) -> None:
    """Fill Triton's cache by all plans at once; what fails here fails again where it counts."""
    operands = make_operands(SMALL, session.dtype, session.device)
    plans = [plan for plan in internals.every_plan(operands) if plan.startswith("triton")]
    workers = min(WORKERS, os.cpu_count() or 1, max(1, len(plans)))
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, mp_context=spawn) as pool:
        for plan, done in zip(plans, pool.map(_compile, plans, [session.dtype] * len(plans)),
                              strict=True):  # fmt: skip
            if done is not None:
                print(f"{plan} does not compile: {done}", flush=True)


def _compile(plan: str, dtype: torch.dtype) -> str | None:
    try:
        operands = make_operands(SMALL, dtype, "cuda")
        values(operands, internals.every_plan(operands)[plan])
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return None
