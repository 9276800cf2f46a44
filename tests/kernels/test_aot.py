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


def test_a_new_batch_size_compiles_nothing(tmp_path):
    """All batch sizes together need no more kernels than the one that needs most."""
    kernels = {}
    for row in rows_of(tmp_path, "tokens", 80, 90):
        kernels.setdefault((row["arch"], row["op"]), []).append(set(row["kernels"]))
    assert set(kernels) == set(itertools.product((80, 90), TOKEN_OPS))
    for case, variants in kernels.items():
        assert set.union(*variants) in variants, case


def test_the_pointer_gemm_loads_wide_words_in_both_layouts(tmp_path):
    """On an H200 loads of single elements made its backward twenty times as long."""
    rows = rows_of(tmp_path, "layouts", 80)
    assert {row["constants"].get("stride_w1k", "n") for row in rows} == {"1", "n"}
    assert all(row["kernel"] == "kext_kernel" and row["narrow_loads"] == 0 for row in rows), rows


# A compilation takes a second or two. So it is for the GPU that is at hand, and of the launches
# that share kernel, tiles, warps, bits of numbers and layout of W only for the one that holds most,
# of the op that training calls. `make aot` compiles all, for every architecture.
CASES = [
    (90, ("linear",), True),
    *(pytest.param(arch, OPS, False, marks=pytest.mark.aot) for arch in SHARED_LIMIT),
]


@pytest.mark.parametrize(("arch", "ops", "few"), CASES)
def test_kernels_compile_without_spills_for_tensor_cores(arch, ops, few, tmp_path):
    for row in rows_of(tmp_path, arch, *ops, *(["--few"] if few else [])):
        assert row["spilled"] == 0, f"spills: {row}"
        assert row["shared"] <= SHARED_LIMIT[arch], f"shared memory: {row}"
        assert row["tensor_core"] or row["kernel"] in NO_PRODUCTS, f"no tensor cores: {row}"


# Kernels that multiply no matrices.
NO_PRODUCTS = ("sum_partials_kernel", "write_table_kernel")
