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
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import FrameType
from typing import NamedTuple

import peft
import torch
from torch import Tensor, nn

import nsru_kernels as nk
from nsru_bench import measure, timing
from nsru_bench.session import Session

NAMES = ("q_proj", "k_proj", "v_proj")
TOKENS, FEATURES, RANK, RETAIN_RANK = 4, 64, 4, 8
ALPHA = 8
BASE = "peft"
PASSES = ("forward, no grad", "forward", "forward+backward")
CPU = torch.device("cpu")
PACKAGE = str(Path(nk.__file__).parent)


class Projections(nn.Module):
    """Frozen q, k and v of one parent, called one after the other with one tensor."""

    def __init__(self) -> None:
        super().__init__()
        for name in NAMES:
            linear = nn.Linear(FEATURES, FEATURES, bias=False).requires_grad_(False)
            self.add_module(name, linear)

    def layers(self) -> list[nn.Module]:
        return [self.get_submodule(name) for name in NAMES]


class Provider(NamedTuple):
    """Three layers, and what a backward goes back to beside x: A of all, then B of all."""

    layers: list[nn.Module]
    adapters: list[nn.Parameter]


def make_providers() -> dict[str, Provider]:
    """All ways to the same three outputs; "frozen" is without the adapters."""
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        weights = Projections().state_dict()
        basis = torch.linalg.qr(torch.randn(FEATURES, RETAIN_RANK))[0].contiguous()
        lora_as = [torch.randn(RANK, FEATURES) for _ in NAMES]
        lora_bs = [torch.randn(FEATURES, RANK) for _ in NAMES]

    def frozen() -> Projections:
        model = Projections()
        model.load_state_dict(weights)
        return model

    def ours(siblings: bool) -> Provider:
        model = frozen()
        nk.swap_linears(
            model, list(NAMES), rank=RANK, alpha=ALPHA, siblings=siblings,
            subspaces=dict.fromkeys(NAMES, basis),
        )  # fmt: skip
        layers = model.layers()
        set_adapters([layer.lora_A for layer in layers], lora_as)
        set_adapters([layer.lora_B for layer in layers], lora_bs)
        adapters = [*(layer.lora_A for layer in layers), *(layer.lora_B for layer in layers)]
        return Provider(layers, adapters)

    def peft_layers() -> Provider:
        config = peft.LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=list(NAMES))
        layers = peft.get_peft_model(frozen(), config).base_model.model.layers()
        as_, bs = ([getattr(layer, ab)["default"].weight for layer in layers]
                   for ab in ("lora_A", "lora_B"))  # fmt: skip
        set_adapters(as_, [nk.project_adapter(a, basis) for a in lora_as])
        set_adapters(bs, lora_bs)
        return Provider(layers, [*as_, *bs])

    providers = {
        "frozen": Provider(frozen().layers(), []),
        BASE: peft_layers(),
        "nsru alone": ours(siblings=False),
        "nsru group": ours(siblings=True),
    }
    check(providers, basis)
    return providers


@torch.no_grad()
def set_adapters(parameters: list[nn.Parameter], values: list[Tensor]) -> None:
    for parameter, value in zip(parameters, values, strict=True):
        parameter.copy_(value)


def forward(provider: Provider, x: Tensor) -> list[Tensor]:
    return [layer(x) for layer in provider.layers]


def forward_backward(provider: Provider, x: Tensor) -> tuple[Tensor, ...]:
    """Gradients of the sum of all outputs in x and in the adapters."""
    q, k, v = forward(provider, x)
    return torch.autograd.grad((q + k + v).sum(), (x, *provider.adapters))


def check(providers: dict[str, Provider], basis: Tensor) -> None:
    """AssertionError unless all agree: ours with PEFT, whose dA is projected here. The second
    forward counts: a group may have to see a first one."""
    x = make_input().requires_grad_()
    expected: list[Tensor] = []
    for name in (BASE, "nsru alone", "nsru group"):
        forward_backward(providers[name], x)
        dx, *others = forward_backward(providers[name], x)
        das, dbs = others[: len(NAMES)], others[len(NAMES) :]
        if name == BASE:
            das = [nk.project_adapter(da, basis) for da in das]
        found = [*forward(providers[name], x), dx, *das, *dbs]
        expected = expected or found
        for value, wanted in zip(found, expected, strict=True):
            message = partial("{}: {}".format, name)
            torch.testing.assert_close(value, wanted, rtol=1e-4, atol=1e-4, msg=message)


def make_input() -> Tensor:
    return torch.randn(TOKENS, FEATURES, generator=torch.Generator().manual_seed(1))


def make_call(provider: Provider, which: str) -> Callable[[], object]:
    x = make_input().requires_grad_()
    if which == "forward+backward":
        return lambda: forward_backward(provider, x)
    if which == "forward":
        return lambda: forward(provider, x)

    def without_grad() -> None:
        with torch.no_grad():
            forward(provider, x)

    return without_grad


@contextmanager
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


class PythonCalls(NamedTuple):
    """What a call ran through: Python frames entered, and the most that were open at once.

    Attributes:
        count, deepest: of all frames.
        own_count, own_deepest: of the frames of nsru_kernels among them.
    """

    count: int
    deepest: int
    own_count: int
    own_deepest: int


def count_python_calls(layers: list[nn.Module], x: Tensor) -> PythonCalls:
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


def count_forwards(providers: dict[str, Provider]) -> dict[str, PythonCalls]:
    """One forward with grad of all three layers of each provider, warmed up."""
    x = make_input().requires_grad_()
    counts = {}
    for name, provider in providers.items():
        for _ in range(3):
            forward_backward(provider, x)
        counts[name] = count_python_calls(provider.layers, x)
    return counts


def work(which: str) -> tuple[float, float]:
    """(FLOP, bytes) of the three linears in a pass; neither is what takes the time here."""
    gemm, narrow = 2.0 * TOKENS * FEATURES**2, 4.0 * TOKENS * FEATURES * RANK
    flop = len(NAMES) * (gemm + narrow)
    moved = 4.0 * (TOKENS * FEATURES + len(NAMES) * (FEATURES**2 + TOKENS * FEATURES))
    return (2 * flop, 2 * moved) if which == "forward+backward" else (flop, moved)


def run(session: Session) -> None:
    if not session.fits("host_time", 2 if session.tiny else 15):
        return
    rounds = session.rounds if session.tiny else 50 * session.rounds  # of a tenth of a millisecond
    with one_thread():
        providers = make_providers()
        counts = count_forwards(providers)
        for which in PASSES:
            calls = {name: [make_call(p, which)] for name, p in providers.items()}
            flop, moved = work(which)
            session.record(
                "host_time", timing.interleaved(calls, CPU, rounds),
                {"pass": which, "linears": len(NAMES), "M": TOKENS, "K": FEATURES, "N": FEATURES,
                 "R": RANK, "Q": RETAIN_RANK},
                flop=flop, moved=moved, base=BASE,
                each={
                    name: {"python_calls": c.count, "python_deepest": c.deepest,
                           "own_calls": c.own_count, "own_deepest": c.own_deepest}
                    for name, c in counts.items()
                },
                dtype="float32", **measure.run_columns("triton", "transformers", "peft"),
            )  # fmt: skip
