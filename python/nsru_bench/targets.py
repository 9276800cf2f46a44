"""Forward and backward of adapted linears against this repository's targets; see ``bench.py``.

Two files, for a CPU: ``linear_cpu.csv`` has one linear, ``siblings_cpu.csv`` q, k and v that read
one x. "nsru" and "group" project in every iteration, as in a step without gradient accumulation;
"fold cached" is every further micro-batch of that step. PEFT is given projected adapters, for it
knows no projection. Frozen linears compute y and dX only.
"""

from __future__ import annotations

from typing import Any

import torch

from nsru_bench import cases, providers, rows
from nsru_bench.cases import Operands, Provider, Shape
from nsru_bench.linear import calls
from nsru_bench.session import Session
from nsru_bench.timing import Timing, interleaved

WHICH = "forward+backward"
CPU = torch.device("cpu")
# provider, base, largest ratio
LINEAR_TARGETS = (
    ("nsru", "frozen", 1.12),
    ("nsru", "peft bf16", 1.03),
    ("nsru", "eager activation", 0.80),
)
SIBLING_TARGETS = (("group", "frozen", 1.08),)


def run(session: Session) -> None:
    tiny = cases.TINY
    shape = tiny if session.tiny else cases.CPU
    if session.fits("linear_cpu", 2 if session.tiny else 40):
        operands = cases.make_operands(shape, session.dtype)
        timings = time_checked(session, operands, linear_providers(operands))
        flop = 4.0 * shape.M * shape.K * sum(shape.widths)  # y and dX: the useful work
        tflops = {n: round(flop / t.median / 1e9, 4) for n, t in timings.items()}
        write(session, "linear_cpu", shape, timings, {"frozen_tflops": tflops})
        report(timings, LINEAR_TARGETS)
    shape = tiny._replace(widths=(96, 32, 32)) if session.tiny else cases.CPU_SIBLINGS
    if session.fits("siblings_cpu", 2 if session.tiny else 60):
        operands = cases.make_operands(shape, session.dtype)
        timings = time_checked(session, operands, sibling_providers(operands))
        write(session, "siblings_cpu", shape, timings, {})
        report(timings, SIBLING_TARGETS)


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


def time_checked(
    session: Session, operands: Operands, made: dict[str, Provider]
) -> dict[str, Timing]:
    for name, provider in made.items():
        cases.check(operands, name, provider)
    timed = {name: calls(operands, provider, WHICH, 1) for name, provider in made.items()}
    return interleaved(timed, CPU, session.rounds if session.tiny else 10 * session.rounds)


def write(
    session: Session,
    name: str,
    shape: Shape,
    timings: dict[str, Timing],
    more: dict[str, dict[str, Any]],
) -> None:
    """One row for each provider; more: column → provider → value."""
    sizes = {**shape._asdict(), "N": "+".join(map(str, shape.widths))}
    identity, made = rows.run_columns("peft"), []
    for provider, timing in timings.items():
        row = {"provider": provider, "pass": WHICH, "dtype": rows.dtype_name(session.dtype)}
        row |= {letter: sizes[letter] for letter in "MKNRQ"}
        row |= {column: round(ms, 4) for column, ms in timing.quantiles().items()}
        row["ratio_to_frozen"] = round(timing.median / timings["frozen"].median, 4)
        row |= {column: values[provider] for column, values in more.items()}
        made.append(row | {"rounds": len(timing.ms)} | identity)
        print(f"{provider:<30}{row['p50_ms']:9.3f} ms{row['ratio_to_frozen']:8.3f} × frozen")
    rows.replace(session.out / f"{name}.csv", made)


def report(timings: dict[str, Timing], targets: tuple[tuple[str, str, float], ...]) -> None:
    for ours, base, bar in targets:
        for name in (ours, f"{ours}, fold cached"):
            ratio = timings[name].median / timings[base].median
            verdict = "met" if ratio <= bar else "missed"
            print(f"{name} / {base}: {ratio:.3f} (target {bar:.2f}: {verdict})")
