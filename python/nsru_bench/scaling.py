"""How cost grows: one adapted linear, the sketch's update and a whole step, one variable at a time.

All values of a variable are timed interleaved, then t = c · value^exponent is fitted by least
squares in log-log. The linear runs forward and backward, "fold cached" as further micro-batches of
a step do and "fold included" as the first. The sketch has the width Q and does not refresh here.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import NamedTuple

import numpy as np

from nsru_bench import internals, linear, providers, step, training_ways
from nsru_bench.cases import TINY, Shape, check, make_operands, normal_numbers
from nsru_bench.session import Session
from nsru_bench.sketch import check_first_batch
from nsru_bench.sketch_methods import NEVER, Sketch
from nsru_bench.timing import Call

COLUMNS = ("M", "K", "N", "R", "Q", "layers")


class Point(NamedTuple):
    """One value of a sweep: its sizes, its calls, and the work of a call."""

    sizes: Mapping[str, int]
    calls: Mapping[str, Call]
    flop: float
    moved: float


class Sweep(NamedTuple):
    """``op`` at ``start`` with ``variable`` set to each of ``values``."""

    op: str
    start: Shape
    variable: str
    values: Sequence[int]

    def shapes(self) -> list[Shape]:
        return [self.start._replace(**{self.variable: value}) for value in self.values]


def sweeps(session: Session) -> list[Sweep]:
    """In order of value."""
    values = {"M": (2048, 4096, 8192, 16384, 32768), "K": (2048, 4096, 8192, 16384)}
    values |= {"Q": (64, 128, 256, 512, 1024), "R": (8, 16, 32, 64, 128)}
    linear_start, sketch_start = Shape(8192, 4096, (4096,)), Shape(8192, 4096, (), 0, 512)
    sketch_values = values
    if session.tiny:
        linear_start = sketch_start = TINY
        values = {"M": (16, 32, 64), "Q": (4, 8, 16), "R": (2, 4, 8), "K": (64, 128, 256)}
        sketch_values = values
    elif session.on_cpu:
        linear_start, sketch_start = (
            Shape(256, 1024, (1024,), 16, 128),
            Shape(256, 2048, (), 0, 128),
        )
        values = {"M": (64, 128, 256, 512, 1024), "K": (256, 512, 1024, 2048, 4096)}
        values |= {"Q": (32, 64, 128, 256, 512), "R": (4, 8, 16, 32, 64)}
        sketch_values = {**values, "K": (512, 1024, 2048, 4096, 8192)}
    made = [Sweep("linear", linear_start, name, values[name]) for name in "MQRK"]
    return made + [Sweep("sketch", sketch_start, name, sketch_values[name]) for name in "MQK"]


def layer_cases(session: Session) -> list[training_ways.Case]:
    if session.tiny:
        return [training_ways.TINY._replace(layers=layers) for layers in (1, 2, 4)]
    if session.on_cpu:
        small = training_ways.Case("Llama, narrow", 0, 512, 8, 2, 1408, 2048, False, 128, 32)
        return [small._replace(layers=layers, Q=64) for layers in (1, 2, 4, 8)]
    return [training_ways.LLAMA_1B._replace(layers=layers, tokens=4096) for layers in (2, 4, 8, 16)]


def fit_power(values: Sequence[float], costs: Sequence[float]) -> tuple[float, float]:
    """(exponent, r²) of costs = c · values^exponent, least squares in log-log."""
    x, y = np.log(values), np.log(costs)
    exponent, offset = np.polyfit(x, y, 1)
    spread = float(((y - y.mean()) ** 2).sum())
    rest = float(((y - exponent * x - offset) ** 2).sum())
    return float(exponent), 1.0 - rest / spread if spread else 1.0


def linear_point(session: Session, shape: Shape) -> Point:
    operands = make_operands(shape, session.dtype, session.device)
    made = {
        "fold cached": internals.linear_op(operands),
        "fold included": providers.modules(operands, cached=False),
    }
    for name, provider in made.items():
        check(operands, f"{name} {shape}", provider)
    flop, moved = linear.work(shape, "forward+backward", session.dtype.itemsize)
    calls = {n: linear.calls(operands, p, "forward+backward", 2) for n, p in made.items()}
    return Point(shape.columns, calls, flop, moved)


def sketch_point(session: Session, shape: Shape) -> Point:
    m, k, _, _, q = shape
    normal = normal_numbers(session.device)
    inputs = [normal(m, k).to(session.dtype) for _ in range(2)]
    method = Sketch(k, q, session.device, refresh_every=NEVER)
    assert method.route == "nystrom", f"width {q} is too large for K={k}"
    method.update(inputs[0])
    check_first_batch("RetainSketch", method, inputs[0], q)
    size = session.dtype.itemsize
    return Point(
        {"M": m, "K": k, "Q": q},
        {"update": [partial(method.update, x) for x in inputs]},
        4.0 * m * k * q + 2.0 * m * q * q,
        size * m * k + 8.0 * (k * q + q * q),
    )


def step_point(session: Session, case: training_ways.Case) -> Point:
    names = ("frozen", "nsru")
    base, batches, ways = training_ways.make_all(case, session.device, session.dtype, names)
    step.check(ways, step.evaluate_ways(ways, batches[0]), session.dtype)
    calls = {name: [partial(way.step, batch) for batch in batches] for name, way in ways.items()}
    sizes = {"M": case.tokens, "K": case.hidden, "R": case.R, "Q": case.Q, "layers": case.layers}
    moved = 2.0 * training_ways.storage_bytes(base.parameters())
    return Point(sizes, calls, step.useful_flop(case, base, batches[0]), moved)


def run(session: Session) -> None:
    points: dict[str, Callable[[Session, Shape], Point]] = {
        "linear": linear_point,
        "sketch": sketch_point,
    }
    for sweep in sweeps(session):
        if session.fits(f"scaling {sweep.op} {sweep.variable}", 1 if session.tiny else 15):
            made = [points[sweep.op](session, shape) for shape in sweep.shapes()]
            record(session, sweep.op, sweep.variable, made)
            del made
            gc.collect()
    if session.fits("scaling step layers", 3 if session.tiny else 60):
        made = [step_point(session, case) for case in layer_cases(session)]
        record(session, "step", "layers", made)


def record(session: Session, op: str, variable: str, points: Sequence[Point]) -> None:
    """Time all points of a sweep interleaved, fit, and write one row for each and provider."""
    # Sketch and step read numbers back from the device.
    timings = session.time(
        {f"{name} {i}": call for i, p in enumerate(points) for name, call in p.calls.items()},
        capture=op == "linear",
    )
    values = [point.sizes[variable] for point in points]
    fits = {}
    for name in points[0].calls:
        costs = [timings[f"{name} {i}"].median for i in range(len(points))]
        exponent, r2 = fit_power(values, costs)
        fits[name] = {"exponent": round(exponent, 4), "r2": round(r2, 4)}
        print(f"{op} {name}: ms ~ {variable}^{exponent:.2f}, r² {r2:.3f}", flush=True)
    for i, (value, point) in enumerate(zip(values, points, strict=True)):
        rows = {name: timings[f"{name} {i}"] for name in point.calls}
        sizes = {name: point.sizes.get(name, "") for name in COLUMNS}
        session.record(
            "scaling", rows, {"of": op, "against": variable, "value": value, **sizes},
            flop=point.flop, moved=point.moved, each=fits,
        )  # fmt: skip
