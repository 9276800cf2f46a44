"""Forward and backward of adapted linears against this repository's targets; see ``bench.py``.

Two files, for a CPU: ``linear_cpu.csv`` has one linear, ``siblings_cpu.csv`` q, k and v that read
one x. "nsru" and "group" project in every iteration, as in a step without gradient accumulation;
"fold cached" is every further micro-batch of that step. PEFT is given projected adapters, for it
knows no projection. Frozen linears compute y and dX only.
"""

from __future__ import annotations

import torch

from nsru_bench import cases, providers, rows
from nsru_bench.cases import Operands, Provider, Shape
from nsru_bench.linear import calls, work
from nsru_bench.session import Session
from nsru_bench.timing import Timing, interleaved

WHICH = "forward+backward"
# provider, base, largest ratio
LINEAR_TARGETS = (
    ("nsru", "frozen", 1.12),
    ("nsru", "peft bf16", 1.03),
    ("nsru", "eager activation", 0.80),
)
SIBLING_TARGETS = (("group", "frozen", 1.08),)
RENAMED = {"ratio": "ratio_to_frozen", "tflops": "frozen_tflops"}  # of every benchmark's columns
COLUMNS = ("provider", "pass", "dtype", *"MKNRQ", "p20_ms", "p50_ms", "p80_ms", "ratio", "rounds")
LINEAR_COLUMNS = (*COLUMNS[:-1], "tflops", "rounds")


def run(session: Session) -> None:
    linear, siblings = cases.CPU, cases.CPU_SIBLINGS
    if session.tiny:
        linear, siblings = cases.TINY, cases.TINY._replace(widths=(96, 32, 32))
    if session.fits("linear_cpu", 2 if session.tiny else 40):
        operands = cases.make_operands(linear, session.dtype)
        timed = time_all(session, operands, linear_providers(operands))
        write(session, "linear_cpu", linear, timed, LINEAR_COLUMNS)
        report(timed, LINEAR_TARGETS)
    if session.fits("siblings_cpu", 2 if session.tiny else 60):
        operands = cases.make_operands(siblings, session.dtype)
        timed = time_all(session, operands, sibling_providers(operands))
        write(session, "siblings_cpu", siblings, timed, COLUMNS)
        report(timed, SIBLING_TARGETS)


def linear_providers(operands: Operands) -> dict[str, Provider]:
    return {
        "frozen": providers.frozen(operands),
        "nsru": providers.modules(operands, cached=False),
        "nsru, fold cached": providers.modules(operands, cached=True),
        "peft bf16": providers.peft_linears(operands, fp32_adapters=False),
        "peft default (fp32 adapters)": providers.peft_linears(operands, fp32_adapters=True),
        "eager activation": providers.eager(operands, materialised=False),
        "eager materialised": providers.eager(operands, materialised=True),
    }


def sibling_providers(operands: Operands) -> dict[str, Provider]:
    return {
        "frozen": providers.frozen(operands),
        "group": providers.modules(operands, cached=False),
        "group, fold cached": providers.modules(operands, cached=True),
        "three single": providers.modules(operands, cached=False, together=False),
        "three single, fold cached": providers.modules(operands, cached=True, together=False),
        "peft bf16": providers.peft_linears(operands, fp32_adapters=False),
    }


def time_all(session: Session, operands: Operands, made: dict[str, Provider]) -> dict[str, Timing]:
    for name, provider in made.items():
        cases.check(operands, name, provider)
    timed = {name: calls(operands, provider, WHICH, 1) for name, provider in made.items()}
    rounds = session.rounds if session.tiny else 10 * session.rounds
    return interleaved(timed, torch.device("cpu"), rounds)


def write(
    session: Session, name: str, shape: Shape, timed: dict[str, Timing], columns: tuple[str, ...]
) -> None:
    """A row for each provider."""
    widths, identity = "+".join(map(str, shape.widths)), rows.run_columns("peft")
    flop = 4.0 * shape.M * shape.K * sum(shape.widths)  # y and dX: the useful work
    _, moved = work(shape, WHICH, session.dtype.itemsize)
    sizes = {"pass": WHICH, **shape._asdict(), "N": widths}
    made = session.make_rows(name, timed, sizes, flop=flop, moved=moved, base="frozen")
    short = [{RENAMED.get(column, column): row[column] for column in columns} for row in made]
    rows.replace(session.out / f"{name}.csv", [row | identity for row in short])


def report(timed: dict[str, Timing], targets: tuple[tuple[str, str, float], ...]) -> None:
    for ours, base, bar in targets:
        for name in (ours, f"{ours}, fold cached"):
            ratio = timed[name].median / timed[base].median
            verdict = "met" if ratio <= bar else "missed"
            print(f"{name} / {base}: {ratio:.3f} (target {bar:.2f}: {verdict})")
