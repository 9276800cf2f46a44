"""One whole training step on models shaped like Llama, against every other way to take it.

Forward, backward, gradient clipping and AdamW on one batch of safe, forget and retain sequences,
with the trainer's own loss and collator. Weights and bases are random. All ways compute dX down to
the embedding's output, so that one layer less of it flatters nobody. "frozen" is forward and dX of
the model without adapters: what a step cannot do without. PEFT without projection gets the folded
adapter and therefore has the same loss. Full fine-tuning runs a second model in every step, where
the others read the reference NLL from their data; its copy of the base model is counted as memory.

MFU counts 4 FLOP per weight and token, forward and dX, of all linears in the layers, and of the
head for answer tokens; attention and recomputation are not counted.
"""

from __future__ import annotations

import gc
import itertools
from collections.abc import Callable, Mapping
from functools import partial
from importlib.util import find_spec
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from nsru_bench.cases import assert_near
from nsru_bench.session import Session
from nsru_bench.training_ways import (
    ADAPTED,
    FULL,
    LLAMA_1B,
    LLAMA_8B,
    RECORDED,
    SMOLLM2_NF4,
    TINY,
    Case,
    Way,
    make_all,
    nsru_modules,
    storage_bytes,
)

COLUMNS = ("model", "layers", "vocabulary", "tokens", "length", "R", "Q")


def cases(session: Session) -> list[Case]:
    """In order of value."""
    if session.tiny:
        return [TINY]
    if session.on_cpu:
        small = {"layers": 1, "vocabulary": 8192, "tokens": 256, "length": 64}
        llamas = [LLAMA_1B._replace(**small), LLAMA_8B._replace(**small)]
        quantised = SMOLLM2_NF4._replace(layers=6, vocabulary=8192, tokens=384)
        return llamas + [quantised] * bool(find_spec("bitsandbytes"))
    half = {"tokens": 4096}
    if session.quick:
        small = LLAMA_8B._replace(layers=2, vocabulary=8192)
        return [small, small._replace(tokens=2048)]
    return [LLAMA_1B, LLAMA_8B._replace(**half), LLAMA_1B._replace(**half), LLAMA_8B]


class Result(NamedTuple):
    """Loss and gradients of a way before its first step."""

    loss: float
    gradients: list[Tensor]


def evaluate(name: str, way: Way, batch: dict[str, Tensor]) -> Result:
    """AssertionError where a gradient is missing, zero or not finite."""
    loss = way.loss(batch)
    loss.backward()
    gradients = []
    for label, parameter in way.model.named_parameters():
        if parameter.requires_grad:
            gradient, parameter.grad = parameter.grad, None
            assert gradient is not None, f"{name}: {label} has no gradient"
            assert gradient.any(), f"{name}: the gradient of {label} is zero"
            assert gradient.isfinite().all(), f"{name}: the gradient of {label} is not finite"
            if name != FULL:  # as large as the model, and nothing to compare it with
                gradients.append(gradient)
    return Result(loss.item(), gradients)


T = TypeVar("T")


def attempt(ways: dict[str, Way], name: str, run: Callable[[Way], T]) -> T | None:
    """``run`` of a way; where memory runs out, the way is named and dropped."""
    try:
        return run(ways[name])
    except torch.OutOfMemoryError as error:
        print(f"{name} is not timed: {str(error).partition('.')[0]}", flush=True)
        ways.pop(name).model.zero_grad()
        return None
    finally:
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def evaluate_ways(ways: dict[str, Way], batch: dict[str, Tensor]) -> dict[str, Result]:
    """The first forward and backward of every way that fits the memory."""
    results = {n: attempt(ways, n, lambda way, n=n: evaluate(n, way, batch)) for n in list(ways)}
    return {name: result for name, result in results.items() if result is not None}


def check(ways: Mapping[str, Way], results: Mapping[str, Result], dtype: torch.dtype) -> None:
    """AssertionError unless the ways compute what they claim to.

    Losses are equal where adapters (or their absence) are; NSRU's gradients are those of the eager
    projection, with no part of dA inside the retain subspace.
    """
    exact = dtype == torch.float32
    for group in (("frozen", FULL), ADAPTED):
        losses = {name: results[name].loss for name in group if name in results}
        for name, loss in losses.items():
            first = next(iter(losses.values()))
            error = abs(loss - first) / abs(first)
            bound = 1e-4 if exact else 8 * 2.0**-9
            assert error <= bound, f"{name}: loss {loss} against {first}, off by {error:.1e}"
    for way in ("nsru", RECORDED):
        if way not in results:
            continue
        ours = results[way].gradients  # dA and dB in turns, in model order
        modules = nsru_modules(ways[way].model)
        for (name, module), d_a in zip(modules.items(), ours[::2], strict=True):
            d_a = d_a.double()
            leak = ((d_a @ module.basis.double()).norm() / d_a.norm()).item()
            assert leak <= 1e-3, f"{way}: {leak:.1e} of dA of {name} is inside the retain subspace"
        if "peft + eager projection" not in results:
            continue
        theirs = results["peft + eager projection"].gradients
        for label, start in (("dA", 0), ("dB", 1)):
            found, wanted = (_flat(grads[start::2]) for grads in (ours, theirs))
            # bf16 models of many layers drift apart by a few percent; an unprojected dA is off by a
            # fifth and more.
            assert_near(f"{way}: {label}", found, wanted, 1e-3 if exact else 0.15)


def _flat(gradients: list[Tensor]) -> Tensor:
    return torch.cat([gradient.flatten() for gradient in gradients])


def useful_flop(case: Case, base: nn.Module, batch: Mapping[str, Tensor]) -> float:
    """Forward and dX of every linear in the layers for all tokens, of the head for answers."""
    head = base.get_output_embeddings()
    layers = sum(
        m.in_features * m.out_features
        for m in base.modules()
        if isinstance(m, nn.Linear) and m is not head
    )
    answers = int((batch["labels"][:, 1:] != -100).sum())
    return 4.0 * (layers * case.tokens + head.weight.numel() * answers)


def cpu_peak_bytes(run: Callable[[], object]) -> int:
    """Most bytes that torch had allocated on the CPU during a call, above what was there before."""
    run()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        run()
    events = [e for e in record.profiler.kineto_results.events() if e.name() == "[memory]"]
    sizes = [e.nbytes() for e in sorted(events, key=lambda e: e.start_ns())]
    return max(itertools.accumulate(sizes), default=0)


def run(session: Session) -> None:
    for case in cases(session):
        size = 1 if case.hidden <= 2048 or session.quick else 4
        seconds = 2 if session.tiny else size * (5 * session.rounds if session.on_cpu else 15)
        if session.fits(f"step {case.model}, {case.tokens} tokens", seconds):
            # Where the frozen model's activations do not fit, all recompute them.
            if not run_case(session, case, checkpointing=False):
                run_case(session, case, checkpointing=True)
            gc.collect()


def run_case(session: Session, case: Case, *, checkpointing: bool) -> bool:
    """Check, time and record one case; False where not even the frozen step fits the memory."""
    base, batches, ways = make_all(case, session.device, session.dtype)
    if checkpointing:
        for way in ways.values():
            way.model.gradient_checkpointing_enable({"use_reentrant": False})
    results = evaluate_ways(ways, batches[0])
    if "frozen" not in ways:
        return False
    check(ways, results, session.dtype)
    del results
    for name in list(ways):  # the moments come with the first step
        attempt(ways, name, lambda way: way.step(batches[0]))
    calls = {name: [partial(way.step, batch) for batch in batches] for name, way in ways.items()}
    timings = session.time(calls, capture=False)  # the loss finds its answer tokens on the host
    if session.on_cpu:
        for name, call in calls.items():
            timings[name] = timings[name]._replace(peak_bytes=cpu_peak_bytes(call[0]))
    flop = useful_flop(case, base, batches[0])
    each = {}
    for name, timing in timings.items():
        seconds, resident = timing.median / 1e3, ways[name].resident_bytes()
        each[name] = {
            "tokens_per_s": round(case.tokens / seconds, 2),
            "mfu": round(flop / seconds / session.limits.flops, 4),
            "resident_bytes": resident,
            "total_bytes": resident + (timing.peak_bytes or 0),
        }
    columns = {name: getattr(case, name) for name in COLUMNS}
    session.record(
        "step", timings, {**columns, "checkpointing": checkpointing},
        flop=flop, moved=2.0 * storage_bytes(base.parameters()), base="frozen", each=each,
    )  # fmt: skip
    return True
