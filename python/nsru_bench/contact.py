"""First contact with a GPU: the environment, whether the extension loads, one GEMM by everything.

    python -m nsru_bench.contact --out FOLDER [--tiny]

A tenth of ``make gpu-check``'s first minute. Writes ``environment.json``; what fails is printed and
the rest goes on.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path

import torch

from nsru_bench import cases, internals
from nsru_bench.rows import commit
from nsru_kernels.environment import describe_environment, format_environment


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--tiny", action="store_true")
    options = parser.parse_args()
    described = describe_environment()
    described["version"] = described["version"] or os.environ.get("NSRU_VERSION")
    described["commit"] = commit()
    (options.out / "environment.json").write_text(json.dumps(described, indent=1))
    print(format_environment(described), f"commit {described['commit']}", sep="\n", flush=True)

    on_gpu = torch.cuda.is_available() and not options.tiny
    device, dtype = ("cuda", torch.bfloat16) if on_gpu else ("cpu", torch.float32)
    shape = cases.Shape(1024, 1024, (1024,)) if on_gpu else cases.TINY
    operands = cases.make_operands(shape, dtype, device)
    failed = []
    plans, first = internals.every_plan(operands), {}  # one of each backend
    for plan in plans:
        first.setdefault(plan.split()[0], plan)
    for backend, plan in sorted(first.items()):  # Triton, which compiles, comes last
        try:
            cases.check(operands, plan, plans[plan])
            print(f"{backend} ({plan}): right", flush=True)
        except Exception as error:  # the others are to be tried too
            failed.append(backend)
            print(f"{backend} ({plan}): {type(error).__name__}: {error}", flush=True)
    if failed:
        sys.exit(f"wrong or broken: {', '.join(failed)}")
    print(f"{', '.join(first)} compute on {device}")


if __name__ == "__main__":
    main()
