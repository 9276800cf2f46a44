"""Every Triton kernel and shipped config compiles for every architecture, within its limits."""

import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from aot import OPS, SHARED_LIMIT, TOKEN_OPS

pytest.importorskip("triton", reason="Triton has no wheel for this platform")


def rows_of(cache, *arguments):
    """What aot.py prints, in a process that compiles instead of interpreting."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(cache)
    command = [sys.executable, Path(__file__).with_name("aot.py"), *map(str, arguments)]
    run = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert run.returncode == 0, run.stderr[-3000:]
    rows = [json.loads(line) for line in run.stdout.splitlines()]
    assert rows
    return rows


@pytest.mark.parametrize("arch", [80, 90])
def test_a_new_batch_size_compiles_nothing(arch, tmp_path):
    """All batch sizes together need no more kernels than the one that needs most."""
    kernels = {}
    for row in rows_of(tmp_path, "tokens", arch):
        kernels.setdefault(row["op"], []).append(set(row["kernels"]))
    assert set(kernels) == set(TOKEN_OPS)
    for op, variants in kernels.items():
        assert set.union(*variants) in variants, op


# Compiling takes half the time of all tests. So fp16, which compiles as bf16 does, is seen for 9.0
# alone, and the consumer cards, which share one table, for 8.6 and 12.0 where they need most
# registers. `aot.py ARCH` compiles everything for one.
@pytest.mark.parametrize(
    ("arch", "op"),
    [*itertools.product((80, 90, 100), OPS), (86, "linear"), (120, "linear")],
)
def test_kernels_compile_without_spills_for_tensor_cores(arch, op, tmp_path):
    rows = rows_of(tmp_path, arch, op, *(() if arch == 90 else ("--skip", "fp16")))
    for row in rows:
        assert row["spilled"] == 0, f"spills: {row}"
        assert row["shared"] <= SHARED_LIMIT[arch], f"shared memory: {row}"
        assert row["tensor_core"] or row["kernel"] in NO_PRODUCTS, f"no tensor cores: {row}"


# Kernels that multiply no matrices.
NO_PRODUCTS = ("sum_partials_kernel", "sum_splits_kernel", "write_table_kernel")
