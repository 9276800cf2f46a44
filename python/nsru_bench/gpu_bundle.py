"""Everything that a borrowed GPU machine lacks, built beforehand; see ``gpu_check.py``.

    make gpu-bundle                      # needs nvcc and Python 3.12 with its headers, no GPU

Writes ``build/gpu-bundle``: the CUDA extension for that machine's Python, with the GEMM for sm_90a,
and CUTLASS's headers, with which the check compiles where the extension does not load.
"""

from __future__ import annotations

import argparse
import re
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

from nsru_bench.rows import ROOT, commit

GLIBC = (2, 36)  # the newest symbols that the extension may ask for
PYTHON = "3.12"


def build_extension(folder: Path, python: str, cutlass: Path) -> Path:
    """The compiled module. Raises CalledProcessError."""
    import pybind11

    build = ROOT / "build" / f"cmake-gpu-{PYTHON}"
    subprocess.run(
        [
            "cmake", "-S", str(ROOT), "-B", str(build), "-G", "Ninja",
            "-DCMAKE_BUILD_TYPE=Release", "-DCMAKE_CUDA_ARCHITECTURES=90a",
            f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={folder}", f"-DPython_EXECUTABLE={python}",
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}", f"-DCUTLASS_DIR={cutlass}",
            f"-DNSRU_VERSION={commit()}",
        ],
        check=True,
    )  # fmt: skip
    subprocess.run(["cmake", "--build", str(build)], check=True)
    (module,) = folder.glob("_cuda*.so")
    return module


def check_extension(module: Path) -> None:
    """ValueError where the module would not load on the GPU machine."""
    tag = f"cpython-{PYTHON.replace('.', '')}-"
    if tag not in module.name:
        raise ValueError(f"{module.name} must be for {tag}: name another one by --python.")
    found = re.findall(rb"GLIBC_(\d+)\.(\d+)", module.read_bytes())
    newest = max((tuple(map(int, version)) for version in found), default=(0, 0))
    if newest > GLIBC:
        raise ValueError(
            f"{module.name} asks for glibc {newest[0]}.{newest[1]}, newer than "
            f"{GLIBC[0]}.{GLIBC[1]}: build it on an older system."
        )


def pack_headers(folder: Path, cutlass: Path) -> Path:
    path = folder / "cutlass.tar.gz"
    with tarfile.open(path, "w:gz") as archive:
        archive.add(cutlass / "include", arcname="cutlass/include")
    return path


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "gpu-bundle")
    parser.add_argument("--python", default=f"python{PYTHON}", help=f"an interpreter of {PYTHON}")
    parser.add_argument("--cutlass", type=Path, required=True, help="folder with include/cutlass")
    options = parser.parse_args()
    python = shutil.which(options.python)
    if python is None:
        sys.exit(f"gpu-bundle: no {options.python}; name Python {PYTHON} by --python.")
    folder = options.out.resolve()
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    headers = pack_headers(folder, options.cutlass)
    try:
        check_extension(build_extension(folder, python, options.cutlass.resolve()))
    except (OSError, subprocess.CalledProcessError, ValueError) as error:
        sys.exit(f"gpu-bundle: {error}")
    print(f"{folder}: {', '.join(sorted(path.name for path in folder.iterdir()))}; {headers.name}")
    print(f"there: NSRU_COMMIT={commit()} PYTHONPATH=.:python python3 -m nsru_bench.gpu_check")


if __name__ == "__main__":
    main()
