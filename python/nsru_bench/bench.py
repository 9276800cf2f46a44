"""Every benchmark from one entry: ``nsru bench [OPS]``, or ``python -m nsru_bench.bench [OPS]``.

    linear      forward and backward: every plan of ours and every peer, against the frozen layer
    siblings    q/k/v and gate/up, which read one x, against the separate frozen layers
    narrow      S, dS, dB and dA against the bandwidth of a copy
    fold        all adapters of a model in one launch
    host_time   Python around the kernels, against PEFT's
    sketch      the streaming retain subspace: time, memory
    loss        per-token NLL without logits: time and peak memory
    step        a whole training step

Only when named:

    correctness every plan of the linear against float64 and, bit by bit, against itself
    targets     NSRULinear, alone and as q/k/v, against this repository's targets on a CPU

Correctness is asserted before anything is timed; variants are interleaved and compared by ratio.
"""

from __future__ import annotations

import argparse
import importlib
import sys
import traceback
from pathlib import Path

import torch

from nsru_bench import rows
from nsru_bench.session import Session

# Each op is the module of its name. In order of value: op → its share of the budget. What one
# leaves goes to those after it.
SHARES = {
    "linear": 8, "siblings": 4, "narrow": 1, "fold": 1, "host_time": 1,
    "sketch": 3, "loss": 2, "step": 4,
}  # fmt: skip
OPS = tuple(SHARES)
ALL_OPS = (*OPS, "correctness", "targets")


def run(session: Session, ops: tuple[str, ...] = OPS) -> None:
    """Run ``ops``; each writes its rows as they come."""
    shares = [SHARES.get(op, 1) for op in ops]
    for i, op in enumerate(ops):
        module = importlib.import_module(f"nsru_bench.{op}")
        session.grant(shares[i] / sum(shares[i:]))
        if not session.fits(op, 0):
            continue
        try:
            module.run(session)
        except Exception as error:  # the other benchmarks are worth their minutes
            traceback.print_exc()
            session.fail(op, error)


def parse(
    arguments: list[str] | None = None, prog: str | None = None
) -> tuple[Session, tuple[str, ...]]:
    parser = argparse.ArgumentParser(
        prog=prog, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("ops", nargs="*", metavar="OPS", help=f"any of {', '.join(ALL_OPS)}")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float16", "float32"))
    parser.add_argument("--tiny", action="store_true", help="sizes to walk through, not to quote")
    parser.add_argument("--quick", action="store_true", help="what make gpu-check has time for")
    parser.add_argument("--rounds", type=int, default=20, help="timed rounds of every call")
    parser.add_argument("--seconds", type=float, help="budget; what does not fit is listed")
    parser.add_argument("--out", type=Path, default=rows.RESULTS / "bench")
    options = parser.parse_args(arguments)
    if unknown := set(options.ops) - set(ALL_OPS):
        parser.error(f"unknown: {', '.join(sorted(unknown))}; choose from {', '.join(ALL_OPS)}")
    if options.rounds < 1:
        parser.error(f"--rounds must be at least 1, got {options.rounds}")
    if options.seconds is not None and not options.seconds > 0:
        parser.error(f"--seconds must be positive, got {options.seconds}")
    try:
        torch.empty(0, device=options.device)
        options.out.mkdir(parents=True, exist_ok=True)
    except (AssertionError, OSError, RuntimeError) as error:
        parser.error(f"--device {options.device}, --out {options.out}: {error}")
    session = Session(
        torch.device(options.device),
        getattr(torch, options.dtype),
        options.tiny,
        options.rounds,
        options.seconds,
        options.out,
        options.quick,
    )
    return session, tuple(dict.fromkeys(options.ops)) or OPS


def main(arguments: list[str] | None = None, prog: str | None = None) -> None:
    session, ops = parse(arguments, prog)
    run(session, ops)
    for what in session.skipped:
        print(f"not run, out of time: {what}")
    for what in session.failed:
        print(f"FAILED {what}")
    if session.failed:
        sys.exit(1)


if __name__ == "__main__":
    main()
