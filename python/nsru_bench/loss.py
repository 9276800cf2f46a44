"""Per-token NLL of a large vocabulary, forward and backward; see ``bench.py``.

The head is frozen, as while unlearning, and the gradient is that of the summed NLL: all that
liger-kernel offers, whose loss has no gradient for each token. Every provider's NLL and gradient
are compared with float64 before anything is timed.

A CPU has no allocator to ask for a peak. There each provider runs once more in a process of its
own, whose heap nothing else has grown; its peak is what the resident memory grew by (Linux).
"""

from __future__ import annotations

import functools
import multiprocessing
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from nsru_bench import timing
from nsru_bench.cases import SUM_TOLERANCE, assert_near, normal_numbers
from nsru_bench.session import Session
from nsru_train.losses.nll import token_nll

VOCABULARY = 128256  # Llama 3
GPU_TOKENS, CPU_TOKENS, TINY_TOKENS = (1024, 2048, 4096, 8192, 16384), (256, 512, 1024, 2048), (64,)

Inputs = tuple[Tensor, Tensor, Tensor]
Sizes = tuple[int, int, int]  # tokens, vocabulary, hidden size


class Provider(NamedTuple):
    """NLL of hidden [T, D], head [V, D], targets [T]: one value a token, or their sum."""

    nll: Callable[[Tensor, Tensor, Tensor], Tensor]
    per_token: bool = True
    tolerance: float = 0.0  # of the gradient, where above that of the dtype


def full_logits(hidden: Tensor, head_weight: Tensor, targets: Tensor) -> Tensor:
    """The way of a causal language model: logits [T, V], then cross entropy in fp32."""
    return F.cross_entropy((hidden @ head_weight.T).float(), targets, reduction="none")


PROVIDERS = {"full logits": Provider(full_logits), "chunked": Provider(token_nll)}


def liger() -> Provider:
    from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

    nll = functools.partial(liger_fused_linear_cross_entropy, reduction="sum")
    return Provider(nll, per_token=False)


def cut_cross_entropy() -> Provider:
    from cut_cross_entropy import linear_cross_entropy

    # By default its gradient leaves out small probabilities. With random logits that is nearly the
    # whole tail, whose share of the gradient's norm is about D^-1/2.
    return Provider(functools.partial(linear_cross_entropy, reduction="none"), tolerance=0.1)


def find_providers(session: Session) -> dict[str, Provider]:
    """Ours, full logits, and those peers that can run here; the others are listed."""
    found = dict(PROVIDERS)
    for name, make in (("liger-kernel", liger), ("cut-cross-entropy", cut_cross_entropy)):
        try:
            provider = make()
            if session.on_cpu:
                raise RuntimeError("it needs a GPU")
            # A dtype may not suit it, and its kernels may be older than the Triton installed.
            inputs = make_inputs(64, 512, 64, session.dtype, session.device)
            forward_backward(provider, inputs)
        except Exception as error:
            print(f"{name} is not timed: {type(error).__name__}: {error}"[:300], flush=True)
        else:
            found[name] = provider
    return found


def make_inputs(
    tokens: int, vocabulary: int, width: int, dtype: torch.dtype, device: torch.device | str = "cpu"
) -> Inputs:
    """hidden [T, D] that wants a gradient, a frozen head [V, D], targets [T]."""
    normal = normal_numbers(device)
    hidden = normal(tokens, width).to(dtype).requires_grad_()
    head = (normal(vocabulary, width) * width**-0.5).to(dtype)
    generator = torch.Generator(device).manual_seed(1)
    return hidden, head, torch.randint(vocabulary, (tokens,), generator=generator, device=device)


def forward_backward(provider: Provider, inputs: Inputs) -> tuple[Tensor, Tensor]:
    """NLL, each or summed, and the gradient of the sum in hidden."""
    nll = provider.nll(*inputs)
    return nll.detach(), torch.autograd.grad(nll.sum(), inputs[0])[0]


def check(providers: dict[str, Provider], inputs: Inputs) -> None:
    """AssertionError unless all give float64's NLL and gradient."""
    hidden, head, targets = inputs
    exact = hidden.detach().double().requires_grad_(), head.double(), targets
    exact_nll, exact_gradient = forward_backward(PROVIDERS["full logits"], exact)
    bound = SUM_TOLERANCE[hidden.dtype]
    for name, provider in providers.items():
        nll, gradient = forward_backward(provider, inputs)
        expected = exact_nll if provider.per_token else exact_nll.sum()
        assert nll.shape == expected.shape, f"{name}: NLL is {tuple(nll.shape)}"
        for what, value, wanted, allowed in (
            ("NLL", nll, expected, bound),
            ("gradient", gradient, exact_gradient, max(bound, provider.tolerance)),
        ):
            assert_near(f"{name}: {what}", value, wanted, allowed)


def run(session: Session) -> None:
    on_cpu = session.on_cpu
    vocabulary, width = (512, 64) if session.tiny else (VOCABULARY, 512 if on_cpu else 4096)
    sizes = TINY_TOKENS if session.tiny else CPU_TOKENS if on_cpu else GPU_TOKENS
    providers = find_providers(session)
    check(providers, make_inputs(64, vocabulary, width, session.dtype, session.device))
    for tokens in sizes:
        # Full logits take a core 4 ms a token; all runs together about ten times that.
        seconds = 1 if session.tiny else 0.04 * tokens if on_cpu else 10
        if session.fits(f"loss T={tokens}", seconds):
            run_tokens(session, providers, tokens, vocabulary, width)


def run_tokens(
    session: Session, providers: dict[str, Provider], tokens: int, vocabulary: int, width: int
) -> None:
    inputs = make_inputs(tokens, vocabulary, width, session.dtype, session.device)
    calls: dict[str, timing.Call] = {}
    for name, provider in providers.items():
        call = functools.partial(forward_backward, provider, inputs)
        try:
            call()
        except torch.OutOfMemoryError:
            torch.cuda.empty_cache()
            print(f"{name} is out of memory at {tokens} tokens", flush=True)
        else:
            calls[name] = [call]
    if session.on_cpu:
        timings, peak = session.time_few_rounds(calls), "resident"
        if sys.platform == "linux":
            shape = tokens, vocabulary, width
            for name in calls:
                alone = peak_bytes_alone(name, shape, session.dtype)
                timings[name] = timings[name]._replace(peak_bytes=alone)
    else:
        # Peers wait for the device, and a graph would keep the full logits' memory for itself.
        timings, peak = session.time(calls, capture=False), "allocated"
    size = session.dtype.itemsize
    session.record(
        "loss", timings, {"T": tokens, "V": vocabulary, "D": width},
        flop=4.0 * tokens * width * vocabulary,  # logits, and the gradient in hidden
        moved=size * (vocabulary * width + 2 * tokens * width),
        base="full logits" if "full logits" in timings else None,
        each={name: {"per_token": providers[name].per_token, "peak": peak} for name in timings},
    )  # fmt: skip


def peak_bytes_alone(provider: str, sizes: Sizes, dtype: torch.dtype) -> int:
    """Peak above the inputs of one forward and backward in a process of its own."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(_run_alone, (provider, sizes, dtype, torch.get_num_threads()))


def _run_alone(provider: str, sizes: Sizes, dtype: torch.dtype, threads: int) -> int:
    torch.set_num_threads(threads)
    nll_of = PROVIDERS[provider].nll
    hidden, head, targets = make_inputs(*sizes, dtype)
    nll_of(hidden[:8], head[:64], targets[:8] % 64).sum().backward()  # warm up
    hidden.grad = None
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts again at VmRSS
    before = resident_bytes("VmRSS")
    nll_of(hidden, head, targets).mean().backward()
    return resident_bytes("VmHWM") - before


def resident_bytes(field: str) -> int:
    """VmRSS (now) or VmHWM (the most since it was reset) of this process."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status holds no {field}: peak memory is measured on Linux only")
