"""Peak memory and time of the per-token NLL: chunked against full logits, forward and backward.

    python benchmarks/nll_memory.py                  # vocabulary 128256, as Llama 3

Each provider runs in a process of its own; its peak is what the resident memory grew by (Linux).
"""

from __future__ import annotations

import argparse
import multiprocessing
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import measure
from nsru_train.losses.nll import token_nll


def full_logits(hidden: Tensor, head_weight: Tensor, targets: Tensor) -> Tensor:
    """What a causal language model does: logits [T, V], then cross entropy in fp32."""
    return F.cross_entropy((hidden @ head_weight.T).float(), targets, reduction="none")


def chunked(hidden: Tensor, head_weight: Tensor, targets: Tensor) -> Tensor:
    return token_nll(hidden, head_weight, targets)


PROVIDERS = {"chunked": chunked, "full logits": full_logits}


def make_inputs(tokens: int, vocabulary: int, width: int, dtype: torch.dtype):
    """hidden [T, D] that wants a gradient, a frozen head [V, D], targets [T]."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(tokens, width, generator=generator).to(dtype).requires_grad_()
    head = (torch.randn(vocabulary, width, generator=generator) * width**-0.5).to(dtype)
    return hidden, head, torch.randint(vocabulary, (tokens,), generator=generator)


def check() -> None:
    """AssertionError unless both providers give float64's NLL and gradient (small vocabulary)."""
    hidden, head, targets = make_inputs(37, 1001, 64, torch.float32)
    exact = hidden.detach().double().requires_grad_()
    reference = full_logits(exact, head.double(), targets)
    reference.sum().backward()
    assert exact.grad is not None
    for name, provider in PROVIDERS.items():
        hidden.grad = None
        nll = provider(hidden, head, targets)
        nll.sum().backward()
        assert hidden.grad is not None
        for value, expected in ((nll, reference), (hidden.grad, exact.grad)):
            error = measure.relative_error(value.detach(), expected.detach())
            assert error <= 1e-6, f"{name} is off by {error:.1e}"


def resident_bytes(field: str) -> int:
    """VmRSS (now) or VmHWM (the most since it was reset) of this process."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status holds no {field}: peak memory is measured on Linux only")


def run_alone(
    provider: str, tokens: int, vocabulary: int, width: int, dtype: torch.dtype, threads: int
) -> dict[str, float]:
    """Peak bytes above the inputs, seconds and the NLL of one forward and backward."""
    torch.set_num_threads(threads)
    hidden, head, targets = make_inputs(tokens, vocabulary, width, dtype)
    PROVIDERS[provider](hidden[:8], head[:64], targets[:8] % 64).sum().backward()  # warm up
    hidden.grad = None
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts again at VmRSS
    before = resident_bytes("VmRSS")
    start = time.perf_counter()
    nll = PROVIDERS[provider](hidden, head, targets).mean()
    nll.backward()
    seconds = time.perf_counter() - start
    return {"peak_bytes": resident_bytes("VmHWM") - before, "seconds": seconds, "nll": nll.item()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, nargs="+", default=[256, 1024, 2048])
    parser.add_argument("--vocabulary", type=int, default=128256)
    parser.add_argument(
        "--width", type=int, default=512, help="hidden size; adds no memory of note"
    )
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], default="bfloat16")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--out", type=Path, default=measure.RESULTS / "nll_memory.csv")
    arguments = parser.parse_args()

    torch.set_num_threads(arguments.threads)
    check()
    columns = measure.run_columns("transformers")
    spawn = multiprocessing.get_context("spawn")
    rows: list[dict[str, Any]] = []
    print(f"V={arguments.vocabulary}, D={arguments.width}, {arguments.dtype}, forward + backward")
    print(f"{'tokens':>8}  {'provider':<14}{'peak MiB':>10}{'seconds':>10}")
    for tokens in arguments.tokens:
        shape = (tokens, arguments.vocabulary, arguments.width)
        results = {}
        for name in PROVIDERS:
            with spawn.Pool(1) as pool:
                results[name] = pool.apply(
                    run_alone, (name, *shape, getattr(torch, arguments.dtype), arguments.threads)
                )
        nlls = [result["nll"] for result in results.values()]
        assert max(nlls) - min(nlls) <= 1e-2, f"the providers disagree on the NLL: {nlls}"
        for name, result in results.items():
            print(
                f"{tokens:>8}  {name:<14}{result['peak_bytes'] / 2**20:10.0f}"
                f"{result['seconds']:10.2f}"
            )
            rows.append(
                {
                    "provider": name,
                    "dtype": arguments.dtype,
                    **dict(zip(("T", "V", "D"), shape, strict=True)),
                    "peak_bytes": int(result["peak_bytes"]),
                    "seconds": round(result["seconds"], 3),
                    **columns,
                }
            )
    measure.write_rows(arguments.out, rows)


if __name__ == "__main__":
    main()
