"""Adds the extensions to the build: ``nsru_kernels._cuda`` where nvcc is found, and on x86-64 Linux
``nsru_kernels._cpu`` where a C++ compiler is.

Neither includes or links torch, so building needs no torch. Read here only: NSRU_SKIP_CUDA=1 and
NSRU_SKIP_CPU=1 leave one out; NSRU_CUDA_ARCHS sets CMake's architectures ("90a"); CUTLASS_DIR
names a checkout of CUTLASS in place of the package nvidia-cutlass.
"""

import os
import platform
import re
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError, OptionError

ROOT = Path(__file__).resolve().parent
DEFAULT_ARCHS = "90a"
CUTLASS = "nvidia-cutlass==4.2.0"
CUDA, CPU = "nsru_kernels._cuda", "nsru_kernels._cpu"
BUILDING = {
    "bdist_wheel",
    "editable_wheel",
    "build",
    "install",
}  # commands that say what is left out
REMEDY = "Set NSRU_SKIP_CUDA=1 to install the package without the CUDA backend."


def find_nvcc() -> str | None:
    """Path of nvcc from CUDACXX, CUDA_HOME, CUDA_PATH, PATH or /usr/local/cuda, in that order."""
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH")]
    places = [os.environ.get("CUDACXX"), *(f"{home}/bin/nvcc" for home in homes if home), "nvcc"]
    for place in [*places, "/usr/local/cuda/bin/nvcc"]:
        if place and (found := shutil.which(place)):
            return found
    return None


def cuda_archs() -> str:
    """NSRU_CUDA_ARCHS as a CMake list; commas and blanks separate as well as semicolons."""
    archs = re.split(r"[;,\s]+", os.environ.get("NSRU_CUDA_ARCHS", DEFAULT_ARCHS).strip(" ;,"))
    for arch in archs:
        if not re.fullmatch(r"[1-9]\d{1,2}[af]?(-real|-virtual)?", arch):
            raise OptionError(
                f"NSRU_CUDA_ARCHS: expected architectures like '{DEFAULT_ARCHS}', got {arch!r}"
            )
    return ";".join(archs)


def is_set(name: str) -> bool:
    return os.environ.get(name, "") not in ("", "0")


class CMakeBuild(build_ext):
    def build_extension(self, ext: Extension) -> None:
        if ext.name == CPU:
            self.build_cpu(ext)
        else:
            self.build_cuda(ext)

    def build_cuda(self, ext: Extension) -> None:
        nvcc, archs = find_nvcc(), cuda_archs()
        options = [
            f"-DCMAKE_CUDA_COMPILER={nvcc}",
            f"-DCMAKE_CUDA_ARCHITECTURES={archs}",
            f"-DNSRU_VERSION={self.distribution.get_version()}",
        ]
        try:
            self.run_cmake(ext, ROOT, "cmake", options)
        except (OSError, subprocess.CalledProcessError) as error:
            status = getattr(error, "returncode", error)
            raise CompileError(f"cmake with {nvcc} failed (status {status}). {REMEDY}") from error
        print(f"nsru-kernels: CUDA extension built with {nvcc} for {archs}")

    def build_cpu(self, ext: Extension) -> None:
        # Optional: a compiler too old for AMX costs speed on some CPUs and nothing else.
        try:
            self.run_cmake(ext, ROOT / "csrc" / "cpu", "cmake-cpu", [])
        except (ImportError, OSError, subprocess.CalledProcessError) as error:
            raise CompileError("nsru-kernels: no kernels for CPUs with AMX, see above") from error
        print("nsru-kernels: CPU extension built")

    def run_cmake(self, ext: Extension, source: Path, name: str, options: list[str]) -> None:
        """Raises OSError or CalledProcessError."""
        import pybind11

        target = Path(self.get_ext_fullpath(ext.name)).resolve().parent
        # Kept between builds: with unchanged tools only changed sources are compiled again.
        build = ROOT / "build" / f"{name}-{sys.implementation.cache_tag}"
        # --fresh, which drops what was compiled, where the cache names tools of an isolated build
        # that pip has deleted since; the place of pybind11 tells.
        cache = build / "CMakeCache.txt"
        same_tools = cache.exists() and pybind11.get_cmake_dir() in cache.read_text()
        configure = [
            "cmake", *([] if same_tools else ["--fresh"]),
            "-S", str(source), "-B", str(build), "-G", "Ninja",
            f"-DCMAKE_MAKE_PROGRAM={shutil.which('ninja')}",
            "-DCMAKE_BUILD_TYPE=Release",
            f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={target}",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
            *options,
        ]  # fmt: skip
        jobs = os.environ.get("CMAKE_BUILD_PARALLEL_LEVEL") or str(os.cpu_count() or 1)
        subprocess.run(configure, check=True)
        subprocess.run(["cmake", "--build", str(build), "--parallel", jobs], check=True)


def cuda_extension() -> list[Extension]:
    if is_set("NSRU_SKIP_CUDA"):
        reason = "NSRU_SKIP_CUDA is set"
    elif find_nvcc() is None:
        reason = "nvcc was not found (CUDACXX, CUDA_HOME, CUDA_PATH, PATH, /usr/local/cuda)"
    else:
        return [Extension(CUDA, sources=[])]
    if BUILDING & set(sys.argv):
        print(f"nsru-kernels: build without the CUDA backend: {reason}")
    return []


def cpu_extension() -> list[Extension]:
    """The CPU extension where it could be of use; a build of it that fails is left out."""
    compilers = (os.environ.get("CXX"), "c++", "g++", "clang++")
    if is_set("NSRU_SKIP_CPU"):
        reason = "NSRU_SKIP_CPU is set"
    elif (platform.system(), platform.machine()) != ("Linux", "x86_64"):
        reason = "they are for x86-64 Linux"
    elif not any(name and shutil.which(name) for name in compilers):
        reason = "no C++ compiler was found (CXX, c++, g++, clang++)"
    else:
        return [Extension(CPU, sources=[], optional=True)]
    if BUILDING & set(sys.argv):
        print(f"nsru-kernels: build without the CPU kernels: {reason}")
    return []


def cutlass_requirement(extensions: list[Extension]) -> list[str]:
    """CUTLASS where the GEMM for sm_90a is built; an install without CUDA never asks for it."""
    # setuptools' PEP 517 hook asks by this command and pip then installs the answer. For any other
    # command setuptools would download it itself, even without a network.
    if not extensions or os.environ.get("CUTLASS_DIR") or "egg_info" not in sys.argv:
        return []
    return [CUTLASS] if any(arch.startswith("90a") for arch in cuda_archs().split(";")) else []


with_cuda = cuda_extension()
setup(
    packages=[
        *find_packages(str(ROOT), include=["nsru_kernels", "nsru_kernels.*"]),
        *find_packages(str(ROOT / "python"), include=["nsru_train", "nsru_train.*", "nsru_bench"]),
    ],
    package_dir={name: f"python/{name}" for name in ("nsru_train", "nsru_bench")},
    ext_modules=[*with_cuda, *cpu_extension()],
    setup_requires=cutlass_requirement(with_cuda),
    cmdclass={"build_ext": CMakeBuild},
)
