"""What nvcc made of the CUDA sources: registers, spills, tensor cores, symbols. Needs no GPU."""

import functools
import re
import shutil
import subprocess
from pathlib import Path

import pytest

cuda = pytest.importorskip("nsru_kernels._cuda", reason="the CUDA extension is not built")
if not hasattr(cuda, "kext_kernels"):
    pytest.skip(
        "the extension was built without sm_90a or from older sources: run `make cuda`",
        allow_module_level=True,
    )

# Of an sm_90 multiprocessor (CUDA C++ programming guide, table of compute capabilities).
REGISTERS = 64 * 1024
SHARED_BYTES_PER_BLOCK = 227 * 1024
SCHEDULES = ("Cooperative", "Pingpong")
# As the wgmma atom in a kernel's name has them.
TYPES = {"bf16": "F32BF16BF16", "fp16": "F32F16F16"}
# At launch; setmaxnreg then moves registers from the warps that load to those that compute.
LAUNCH_REGISTERS = 168


def cuobjdump(*arguments):
    found = shutil.which("cuobjdump")
    if found is None:
        triton = pytest.importorskip("triton", reason="neither cuobjdump nor Triton, which has one")
        found = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    command = [found, *arguments, cuda.__file__]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


@pytest.fixture(scope="module")
def resources():
    """Function → its resources, for every architecture in the module."""
    rows = re.findall(r"Function (\S+?):?\n\s*(REG:.*)", cuobjdump("--dump-resource-usage"))
    return [
        (name, {key: int(value) for key, value in re.findall(r"(\w+):(\d+)", fields)})
        for name, fields in rows
    ]


@functools.cache
def instructions(arch):
    """Function → its SASS."""
    parts = re.split(r"Function : (\S+)", cuobjdump("-sass", "-arch", arch))
    return dict(zip(parts[1::2], parts[2::2], strict=True))


@pytest.fixture(scope="module")
def gemms():
    return {name: sass for name, sass in instructions("sm_90a").items() if "KextMainloop" in name}


def test_no_kernel_spills(resources):
    assert resources
    for name, used in resources:
        assert used["STACK"] == used["LOCAL"] == 0, f"{name}: {used}"


def test_every_gemm_fits_a_multiprocessor(resources):
    used = [fields for name, fields in resources if "KextMainloop" in name]
    kernels = cuda.kext_kernels()
    assert len(used) == len(kernels) == len(SCHEDULES) * len(TYPES) * 2
    for fields in used:
        assert fields["REG"] <= LAUNCH_REGISTERS, fields
    for kernel in kernels:
        assert kernel["threads"] * LAUNCH_REGISTERS <= REGISTERS, kernel
        assert kernel["shared_bytes"] <= SHARED_BYTES_PER_BLOCK, kernel
        assert kernel["stages"] >= 4, kernel


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("dtype", TYPES)
def test_gemms_use_tensor_cores_and_both_pairs_of_descriptors(gemms, schedule, dtype):
    kernel = re.compile(f"KernelTmaWarpSpecialized{schedule}E.*{TYPES[dtype]}")
    found = [sass for name, sass in gemms.items() if kernel.search(name)]
    assert len(found) == 2, "W in both layouts"
    assert {bool(re.search(r"HGMMA.*tnspB", sass)) for sass in found} == {True, False}
    for sass in found:
        # Between branches: the first tile, the loop's, then each step of the last tile by itself.
        runs = [len(re.findall(r"\bHGMMA\b", run)) for run in re.split(r"\bBRA\b", sass)]
        per_step = 2 if schedule == "Pingpong" else 1
        assert [run for run in runs if run] == [4 * per_step] * 2 + [per_step] * 4
        shared = ["MULTICAST" in load for load in re.findall(r"\bUTMALDG\S*", sass)]
        assert shared.count(False) == 2, "X and P"
        assert shared.count(True) >= 2, "W and V, to both blocks of the cluster"
        assert "UTMASTG" in sass
        assert "ACQBULK" in sass, "waits for the kernel that makes P"
        assert not re.search(r"\b(STL|LDL)\b", sass)


def test_narrow_products_read_wide_words_into_tensor_cores():
    sass_of = instructions("sm_90a")
    found = {name: sass for name, sass in sass_of.items() if "columns_kernel" in name}
    assert len(found) == 2 * 3, "bf16 and fp16, every number of rank tiles"
    for name, sass in found.items():
        assert len(re.findall(r"LDGSTS\.E\S*\.128", sass)) >= 2, f"{name}: several in flight"
        assert len(re.findall(r"\bHMMA\b", sass)) >= 2, name
        assert "PREEXIT" in sass, "lets the GEMM launch before its end"


def test_narrow_products_fit_a_multiprocessor(resources):
    used = {name: fields["REG"] for name, fields in resources if "_kernelI" in name}
    for name, registers in used.items():
        assert registers * 256 <= REGISTERS, name


def test_no_symbol_of_torch_or_of_the_driver_is_needed():
    nm = shutil.which("nm") or pytest.skip("no nm on this machine")
    symbols = subprocess.check_output([nm, "-D", "--undefined-only", cuda.__file__], text=True)
    assert not re.search(r"_ZN2at|_ZN3c10|torch|\bcu[A-Z]\w+", symbols)
