"""Every Triton kernel and shipped config compiles for every architecture, within its limits."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from aot import OPS, SHARED_LIMIT, TOKEN_OPS

pytest.importorskip("triton", reason="Triton has no wheel for this platform")
from nsru_kernels.dispatch import launch


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


@pytest.mark.parametrize("op", OPS)
# Consumer cards share one table. sm_89 compiles as sm_86 does, and their fp16 as their bf16: both
# were seen, `aot.py 89`, and take too long to be seen each time.
@pytest.mark.parametrize("arch", [80, 86, 90, 100, 120])
def test_kernels_compile_without_spills_for_tensor_cores(arch, op, tmp_path):
    consumer = launch.ROWS[divmod(arch, 10)] == 86
    rows = rows_of(tmp_path, arch, op, *(("--skip", "fp16") if consumer else ()))
    for row in rows:
        assert row["spilled"] == 0, f"spills: {row}"
        assert row["shared"] <= SHARED_LIMIT[arch], f"shared memory: {row}"
        assert row["tensor_core"] or row["kernel"] in NO_PRODUCTS, f"no tensor cores: {row}"


# Kernels that multiply no matrices.
NO_PRODUCTS = ("sum_partials_kernel", "sum_splits_kernel", "write_table_kernel")
