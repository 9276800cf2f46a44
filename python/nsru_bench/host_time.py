"""Python between ``forward`` and the kernel: q/k/v of one parent, so small that the host decides.

    nsru bench host_time

Each provider is three linears that read one x: PEFT's, ours each by itself, ours as one group, and
the frozen ones. Each call, of about a hundred microseconds, is timed by itself, on one thread of
the CPU, and the calls of all providers take turns: what one leaves in the caches slows down the
others, as it does in a model. Ratios are to PEFT. A is projected before the clock starts, as in all
micro-batches of a step but its first. ``count_python_calls`` counts what one forward runs through.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import NamedTuple

import torch
from torch import Tensor, nn

import nsru_kernels as nk
from nsru_bench import providers, rows, timing
from nsru_bench.cases import Provider, Shape, check, make_operands, normal_numbers
from nsru_bench.linear import work
from nsru_bench.session import Session

SHAPE = Shape(4, 64, (64, 64, 64), 4, 8)
PASSES = ("forward, no grad", "forward", "forward+backward")
COLUMNS = ("python_calls", "python_deepest", "own_calls", "own_deepest")  # of PythonCalls
CPU = torch.device("cpu")
PACKAGE = str(Path(nk.__file__).parent)


def make_providers() -> dict[str, Provider]:
    """All ways to the same three outputs; "frozen" is without the adapters."""
    operands = make_operands(SHAPE, torch.float32)
    made = {
        "frozen": providers.frozen(operands),
        "peft": providers.peft_linears(operands, fp32_adapters=True),
        "nsru alone": providers.modules(operands, cached=True, together=False),
        "nsru group": providers.modules(operands, cached=True),
    }
    for name, provider in made.items():
        check(operands, name, provider)
    return made


def make_input() -> Tensor:
    return normal_numbers()(SHAPE.M, SHAPE.K).requires_grad_()


def make_call(provider: Provider, which: str) -> Callable[[], object]:
    """One pass of all three; backward goes from the sum of the outputs to x and the adapters."""
    x = make_input()

    def without_grad() -> object:
        with torch.no_grad():
            return provider.forward(x)

    def forward_backward() -> object:
        q, k, v = provider.forward(x)
        return torch.autograd.grad((q + k + v).sum(), (x, *provider.adapters))

    if which == "forward":
        return lambda: provider.forward(x)
    return without_grad if which == "forward, no grad" else forward_backward


@contextmanager
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


class PythonCalls(NamedTuple):
    """Python frames that a call entered, and the most that were open at once.

    Attributes:
        calls, deepest: of all frames.
        own_calls, own_deepest: of the frames of nsru_kernels among them.
    """

    calls: int
    deepest: int
    own_calls: int
    own_deepest: int


def count_python_calls(layers: Sequence[nn.Module], x: Tensor) -> PythonCalls:
    """Count what calling ``layers`` one after the other with x runs through.

    Every entry of a Python frame counts: functions, methods, comprehensions where Python gives them
    a frame, generators each time they go on. ``nn.Module.__call__`` is part of it, this function is
    not. A backward is not followed: autograd runs it in threads of its own on a GPU.
    """
    counts, depths, deepest = [0, 0], [0, 0], [0, 0]  # of all frames, of our own

    def profile(frame: FrameType, event: str, argument: object) -> None:
        if event not in ("call", "return"):
            return
        for kind in (0, 1) if frame.f_code.co_filename.startswith(PACKAGE) else (0,):
            counts[kind] += event == "call"
            depths[kind] += 1 if event == "call" else -1
            deepest[kind] = max(deepest[kind], depths[kind])

    before = sys.getprofile()
    sys.setprofile(profile)
    try:
        for layer in layers:
            layer(x)
    finally:
        sys.setprofile(before)
    return PythonCalls(counts[0], deepest[0], counts[1], deepest[1])


def count_forwards(made: dict[str, Provider]) -> dict[str, PythonCalls]:
    """One forward with grad of all three layers of each provider, warmed up."""
    x, counts = make_input(), {}
    for name, provider in made.items():
        for _ in range(3):
            provider.forward(x)
        counts[name] = count_python_calls(provider.forward.layers, x)
    return counts


def run(session: Session) -> None:
    if not session.fits("host_time", 2 if session.tiny else 15):
        return
    rounds = session.rounds if session.tiny else 50 * session.rounds  # of a tenth of a millisecond
    with one_thread():
        made = make_providers()
        counts = count_forwards(made)
        each = {name: dict(zip(COLUMNS, counts[name], strict=True)) for name in made}
        for which in PASSES:
            calls = {name: [make_call(provider, which)] for name, provider in made.items()}
            flop, moved = work(SHAPE, which.removesuffix(", no grad"), 4)
            session.record(
                "host_time", timing.interleaved(calls, CPU, rounds),
                {"pass": which, **SHAPE.columns}, flop=flop, moved=moved, base="peft", each=each,
                run={"dtype": "float32", **rows.run_columns("triton", "transformers", "peft")},
            )  # fmt: skip
